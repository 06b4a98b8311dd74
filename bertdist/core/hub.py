"""Names on the Hugging Face hub: whether the hub is there at all, what its errors mean, and which names are near to a wrong one.

In: the name of a model or data set that is no folder here, or an error of loading it. Out: nothing, or words of one line.
One module, because it is the only one that knows how the hub and its cache say no.

The hub is asked once before anything is loaded. Without that a loader asks for every file six times over, 28 s for a wrong name on a
machine without a network, and prints 20 lines on the way. Where the hub does not answer, this process goes on as with HF_HUB_OFFLINE=1:
what the cache holds is used.
"""

import os
import re
import sys
import time
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants, get_session

from bertdist.core.terminal import warn

PATIENCE_SECONDS = 10.0  # for an answer, as huggingface_hub has it

TRIES = 2

NEAREST = 3  # names to show

KNOWN = {  # what people most often mean, for the case that one letter is wrong; nothing depends on this list
    "model": """
        google-bert/bert-base-uncased google-bert/bert-base-cased google-bert/bert-large-uncased google-bert/bert-large-cased
        google-bert/bert-base-multilingual-cased google-bert/bert-base-multilingual-uncased google-bert/bert-base-chinese
        google-bert/bert-base-german-cased FacebookAI/roberta-base FacebookAI/roberta-large FacebookAI/xlm-roberta-base
        FacebookAI/xlm-roberta-large distilbert/distilbert-base-uncased distilbert/distilbert-base-cased distilbert/distilroberta-base
        distilbert/distilbert-base-multilingual-cased google/electra-small-discriminator google/electra-base-discriminator
        google/electra-large-discriminator albert/albert-base-v2 albert/albert-large-v2 answerdotai/ModernBERT-base
        answerdotai/ModernBERT-large microsoft/deberta-base microsoft/deberta-v3-xsmall microsoft/deberta-v3-small
        microsoft/deberta-v3-base microsoft/deberta-v3-large microsoft/mdeberta-v3-base almanach/camembert-base
        sentence-transformers/all-MiniLM-L6-v2 microsoft/MiniLM-L12-H384-uncased nreimers/MiniLM-L6-H384-uncased
    """.split(),
    "dataset": """
        nyu-mll/glue stanfordnlp/imdb stanfordnlp/sst2 fancyzhx/ag_news fancyzhx/dbpedia_14 fancyzhx/amazon_polarity
        fancyzhx/yelp_polarity Yelp/yelp_review_full dair-ai/emotion cardiffnlp/tweet_eval google-research-datasets/go_emotions
        google-research-datasets/paws ucirvine/sms_spam SetFit/20_newsgroups aps/super_glue facebook/xnli CogComp/trec
        google/boolq nyu-mll/multi_nli stanfordnlp/snli
    """.split(),
}

_answers: dict[str, str] = {}  # endpoint -> why it cannot be reached; "" where it can


def probe_hub(name: str, kind: str = "model") -> None:
    """Before a name that is no folder is loaded: go offline where the hub does not answer. kind: "model" or "dataset"."""
    if (
        constants.HF_HUB_OFFLINE
        or Path(name).expanduser().exists()
        or constants.ENDPOINT in _answers
    ):
        return
    trouble, began = "", time.monotonic()
    for attempt in range(TRIES):
        try:
            url = f"{constants.ENDPOINT}/api/{kind}s/{name}"
            # A connection of its own: some servers send more than a HEAD asks for, which the next request would read.
            alone = {"Connection": "close"}
            status = (
                get_session()
                .head(url, headers=alone, timeout=PATIENCE_SECONDS, follow_redirects=False)
                .status_code
            )
            trouble = f"it answers with HTTP error {status}" if status >= 500 else ""
        except Exception as error:  # of whatever the session is made of: another package in each version of huggingface_hub
            trouble = f"{error or type(error).__name__}".splitlines()[0]
        if (
            not trouble or time.monotonic() - began > PATIENCE_SECONDS / 2
        ):  # who does not answer at all is not asked again
            break
        time.sleep(1.0 if attempt + 1 < TRIES else 0.0)
    _answers[constants.ENDPOINT] = trouble
    if trouble:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for loader workers
        if "datasets.config" in sys.modules:
            sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def warn_if_offline(name: str) -> None:
    """After something was loaded by its name: say, once, that it came from the cache because the hub did not answer."""
    trouble = _answers.get(constants.ENDPOINT, "")
    if trouble and not Path(name).expanduser().exists() and os.environ.get("RANK", "0") == "0":
        warn(
            f"The hub ({constants.ENDPOINT}) cannot be reached ({trouble}): {name} is what the cache holds."
        )
        _answers[constants.ENDPOINT] = ""


def explain_hub_error(error: BaseException, name: str, kind: str = "model") -> str:
    """Why the hub did not give it, and the nearest names, in sentences. error: what a loader raised."""
    causes: list[BaseException] = [error]
    while (
        cause := causes[-1].__cause__ or causes[-1].__context__
    ) is not None and cause not in causes:
        causes.append(cause)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    what = {"model": "model", "dataset": "data set"}[kind]
    if "GatedRepoError" in kinds or re.search("gated (repo|dataset)", str(error)):
        return f"It is gated: accept its terms at {page}, then give HF_TOKEN or `hf auth login`."
    if "RevisionNotFoundError" in kinds:
        return "The hub has it, but no such branch, tag or commit of it."
    near = nearest(name, kind)
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds:
        return f"The hub knows no such {what}, or it is private (HF_TOKEN, `hf auth login`).{near}"
    if kinds & {"HFValidationError", "HfUriError"}:
        return f"It is no name that the hub could know; expected owner/name.{near}"
    if kinds & {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectionError",
        "TransportError",
    } or "connect to" in str(error):
        trouble = _answers.get(constants.ENDPOINT, "")
        reason = (
            f"The hub ({constants.ENDPOINT}) cannot be reached ({trouble})"
            if trouble
            else "HF_HUB_OFFLINE is set"
        )
        return f"{reason}, and the cache {constants.HF_HUB_CACHE} does not hold it.{near}"
    return f"{' '.join(str(error).split())[:300]}{near}"


def nearest(name: str, kind: str = "model") -> str:
    """The nearest of the names that can be known without a network: the cache's, folders here, and well-known ones; or nothing."""
    stored = [path.name for path in _folders(Path(constants.HF_HUB_CACHE))]
    cached = [
        folder.split("--", 1)[1].replace("--", "/")
        for folder in stored
        if folder.startswith(f"{kind}s--")
    ]
    beside = [str(path) for path in _folders(Path(name).parent)]
    names = list(dict.fromkeys([*cached, *beside, *KNOWN[kind]]))
    if name in names:
        return ""
    near = get_close_matches(name, names, n=NEAREST)
    last = {
        known.rsplit("/", 1)[-1].lower(): known for known in reversed(names)
    }  # bert-base-uncased, without its owner
    near += [
        last[word] for word in get_close_matches(name.rsplit("/", 1)[-1].lower(), last, n=NEAREST)
    ]
    near = list(dict.fromkeys(near))[:NEAREST]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(
            path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
    except OSError:
        return []
