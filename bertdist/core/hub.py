"""The Hugging Face Hub: is it reachable, and what do its errors mean.

    probe_hub(name)                    # before a loader is called with the name
    explain_hub_error(error, name)     # what the loader's error means, as a sentence
    explain_upload_error(error, name)  # of an upload
    check_model_name(name, "--model")  # before torch is imported
    warn_if_offline(name)              # after it was loaded

The probe is one HEAD request per process. Without it a loader requests every file six times: 28 s
for a wrong name on a machine without network, and 20 lines of output. Where the hub is not
reachable, a script (not a program that imports bertdist) continues as with HF_HUB_OFFLINE=1, from
the cache.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from bertdist.core.atomic_io import read_json_object
from bertdist.core.errors import ConfigError, ModelError, did_you_mean_path
from bertdist.core.terminal import print_to_stderr, process_rank

OFFLINE_HELP = (
    "Offline, give a folder that holds config.json, model.safetensors and the tokenizer; on a "
    "machine with a network, `hf download NAME --local-dir FOLDER` makes one."
)
TIMEOUT_SECONDS = 10.0  # of one request, as in huggingface_hub
ATTEMPTS = 2
MAX_CONFIG_BYTES = 64 << 20

_CONNECTION_ERRORS = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "TransportError",
}
_problems: dict[str, str] = {}  # endpoint -> why it is not reachable; "" where it is
_offline_fallback = False
_warned: set[str] = set()  # endpoints


def enable_offline_fallback() -> None:
    """Let `probe_hub` put this process into offline mode; for scripts, which own their process."""
    global _offline_fallback
    _offline_fallback = True


def probe_hub(name: str, kind: str = "model") -> None:
    """Find out whether the hub is reachable, once per process; a program that imports bertdist asks
    again as long as it is not. kind: "model" or "dataset".

    Nothing is requested for an existing path, or in offline mode.
    """
    local = Path(name).expanduser().exists()
    known = _problems.get(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or local or known == "" or (known and _offline_fallback):
        return
    url = f"{constants.ENDPOINT}/api/{kind}s/{name}"
    problem, start = "", time.monotonic()
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(1.0)
        problem = _request_problem(url)
        # A server that does not answer at all is not retried.
        if not problem or time.monotonic() - start > TIMEOUT_SECONDS / 2:
            break
    _problems[constants.ENDPOINT] = problem
    if problem and _offline_fallback:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for loader workers
        if "datasets.config" in sys.modules:
            sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def from_cache() -> bool:
    """`local_files_only` of loaders: whether the hub is known not to be reachable. Else they try
    again for half a minute, with two lines of output each time.
    """
    return bool(_problems.get(constants.ENDPOINT))


@contextmanager
def offline_where_unreachable() -> Iterator[None]:
    """Let `datasets`, which has no `local_files_only`, read its cache only, where the hub is known
    not to be reachable.
    """
    modules: list[Any] = [constants, sys.modules.get("datasets.config")]
    before = [(module, module.HF_HUB_OFFLINE) for module in modules if module is not None]
    for module, is_offline in before:
        module.HF_HUB_OFFLINE = is_offline or from_cache()
    try:
        yield
    finally:
        for module, is_offline in before:
            module.HF_HUB_OFFLINE = is_offline


def _request_problem(url: str) -> str:
    """Why a HEAD request fails; "" for any answer but a server error."""
    from huggingface_hub import get_session  # 0.1 s, which --help does not need

    # Without keep-alive: some servers answer HEAD with a body, which the next request would read.
    headers = {"Connection": "close"}
    try:
        answer = get_session().head(
            url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False
        )
    except Exception as error:  # its type depends on the version of huggingface_hub
        return f"{error or type(error).__name__}".splitlines()[0]
    return f"it answers with HTTP error {answer.status_code}" if answer.status_code >= 500 else ""


@contextmanager
def trying_again() -> Iterator[None]:
    """Ask the hub although it was not reachable before: an upload ends a run of hours."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and not from_cache()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def warn_if_offline(name: str) -> None:
    """Print, once, that `name` was loaded from the cache because the hub is not reachable."""
    problem = _problems.get(constants.ENDPOINT, "")
    is_new = constants.ENDPOINT not in _warned
    if problem and is_new and not Path(name).expanduser().exists() and process_rank() == 0:
        print_to_stderr(
            f"The hub ({constants.ENDPOINT}) cannot be reached ({problem}): {name} is loaded from "
            "the cache."
        )
        _warned.add(constants.ENDPOINT)


def explain_hub_error(error: BaseException, name: str, kind: str = "model") -> str:
    """Why `name` could not be loaded, in sentences. error: what the loader raised."""
    types = _types(causes_of(error))
    if "GatedRepoError" in types or re.search("(?<!or )gated (repo|dataset)", str(error)):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"It is gated: accept its terms at {page}, then set HF_TOKEN or run `hf auth login`."
    if "RevisionNotFoundError" in types:
        return "It is on the hub, but has no such branch, tag or commit."
    if types & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        noun = {"model": "model", "dataset": "data set"}[kind]
        login = "set HF_TOKEN or run `hf auth login`"
        return f"There is no such {noun} on the hub, or it is private ({login})."
    if types & {"HFValidationError", "HfUriError"}:
        return "Not a valid Hub id; expected owner/name."
    if types & _CONNECTION_ERRORS or "connect to" in str(error):
        problem = _problems.get(constants.ENDPOINT, "")
        reason = f"The hub ({constants.ENDPOINT}) cannot be reached ({problem})"
        if not problem and constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        elif not problem:
            reason = f"The hub ({constants.ENDPOINT}) cannot be reached"
        return f"{reason}, and it is not in the cache {constants.HF_HUB_CACHE}."
    return " ".join(str(error).split())[:300]


def causes_of(error: BaseException) -> list[BaseException]:
    """The error, and those that it followed from."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes


def _types(causes: list[BaseException]) -> set[str]:
    return {base.__name__ for cause in causes for base in type(cause).__mro__}


def hub_name_problem(name: str) -> str:
    """What is wrong with the name of a repository to upload to; "" if nothing is."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    expected = "expected the name of a repository on the hub, owner/name."
    if "://" in name:
        near = "/".join(name.rstrip("/").split("/")[-2:])
        return f"{expected} Did you mean {near!r}?"
    with suppress(HFValidationError):
        validate_repo_id(name)
        return "" if name.count("/") == 1 else expected
    return expected


def upload_problem(needs_token: bool = True) -> str:
    """Why nothing can be uploaded, as far as it is known here; "" if nothing is in the way."""
    from huggingface_hub import get_token

    if constants.HF_HUB_OFFLINE and not from_cache():
        return "HF_HUB_OFFLINE is set: unset it to upload."
    if needs_token and not get_token():
        return "there is no token: run `hf auth login`, or set HF_TOKEN to one with write access."
    return ""


def explain_upload_error(error: BaseException, name: str) -> str:
    """Why an upload to the repository failed, and what to do. error: of huggingface_hub."""
    causes = causes_of(error)
    types, tokens = _types(causes), f"{constants.ENDPOINT}/settings/tokens"
    answers = [x for cause in causes if (x := getattr(cause, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    said = next((x for cause in causes if (x := getattr(cause, "server_message", None))), "")
    said = f" The hub says: {' '.join(str(said).split())[:200]}" if said else ""
    if status == 401:
        return (
            "The hub does not accept the token (HF_TOKEN, or that of `hf auth login`): make one "
            f"with write access at {tokens}.{said}"
        )
    if status == 403:
        return (
            f"The token may not write to {name}: give it write access at {tokens}, or name a "
            f"repository of an owner that you may write to.{said}"
        )
    if status == 404:
        return f"There is no {name} on the hub, or the token may not see it.{said}"
    if status in (409, 412):
        return f"{name} was changed by somebody else meanwhile: run the same command again.{said}"
    if status is not None and (status == 429 or status >= 500):
        return f"The hub answers with HTTP error {status}: run the same command later.{said}"
    if types & _CONNECTION_ERRORS:
        reason = " ".join(str(causes[-1]).split())[:200] or type(causes[-1]).__name__
        return (
            f"The hub ({constants.ENDPOINT}) cannot be reached ({reason}): run the same command "
            "later."
        )
    return " ".join(str(error).split())[:300]


def model_folder(name: str | os.PathLike[str]) -> str:
    """The folder of a run means its best/, that of several runs (--seeds, sweep) that of the best;
    every other name is returned as it is.

    Raises ConfigError for what is no name.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ConfigError(f"The model is {name!r}; expected a folder, or a name on the hub.")
    name = str(name)
    folder = Path(name).expanduser()
    if (folder / "best" / "config.json").is_file() and not (folder / "config.json").exists():
        return str(folder / "best")
    for file in ("seeds.json", "sweep.json"):
        best = read_json_object(folder / file).get("best")
        if isinstance(best, dict) and isinstance(best.get("folder"), str):
            return str(folder / best["folder"] / "best")
    return name


def run_folder_hint(folder: Path) -> str:
    """The end of a message about a folder without a model."""
    run = next((x for x in (folder, *folder.parents[:2]) if (x / "checkpoints").is_dir()), None)
    if run is None:
        return ""
    if (run / "best" / "config.json").is_file():
        return f". The trained model is {run / 'best'}."
    if aside := sorted(path.name for path in run.glob("best.*")):
        return f". {run} is the folder of a run without best/; it has {', '.join(aside)}."
    return f". {run} is the folder of a run that has written no best/ yet."


def check_folder(name: str, where: str) -> None:
    """Raise ModelError for what can only be a path, and does not exist. where: for messages."""
    path = Path(name).expanduser()
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if not path.exists() and (is_path or ("/" in name and path.parent.is_dir())):
        near = did_you_mean_path(str(path), is_folder=True)
        raise ModelError(f"{where}: there is no such folder.{near}")


def check_model_folder(name: str, where: str) -> None:
    """Raise ModelError for the path of a folder that is missing, or holds no config.json.

    where: `--model out`, for messages. Other names are those of models on the hub.
    """
    folder = Path(name).expanduser()
    check_folder(name, where)
    if folder.is_file():
        raise ModelError(f"{where} is a file; give the folder of the model.")
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise adapter_error(where)
    file, reason = folder / "config.json", "there is none"
    if file.is_file():
        if file.stat().st_size > MAX_CONFIG_BYTES:
            return  # models/model_config.py
        try:
            json.loads(file.read_bytes())
            return
        except RecursionError:
            return
        except (OSError, ValueError) as error:
            reason = str(error)
    raise ModelError(
        f"{where}: the folder holds no config.json that can be read ({reason})"
        f"{run_folder_hint(folder)}"
    )


def check_model_name(name: str, flag: str, revision: str | None = None) -> None:
    """`check_model_folder`; of a name on the hub its config.json is loaded into the cache.

    Raises ModelError.
    """
    where = f"{flag} {name}"
    check_model_folder(name, where)
    if Path(name).expanduser().is_dir():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    probe_hub(name)
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        is_there = isinstance(error, EntryNotFoundError)
        if not is_there or isinstance(error, LocalEntryNotFoundError):
            raise unknown_model(error, name, where) from None
        # the loader of the model says what else it needs


def unknown_model(error: BaseException, name: str, where: str) -> ModelError:
    """The message about a name that is no folder. error: what the loader raised."""
    near = did_you_mean_path(name, is_folder=True)
    return ModelError(
        f"{where} is neither a folder here nor a model on the Hub.{near} "
        f"{explain_hub_error(error, name)} {OFFLINE_HELP}"
    )


def adapter_error(where: str) -> ModelError:
    """The message about an adapter of peft."""
    return ModelError(
        f"{where} holds an adapter (adapter_config.json), which is not loaded: merge it into its "
        "base model (merge_and_unload of peft), save that, and give its folder. To use a model "
        "that is beside it without it, remove adapter_config.json."
    )
