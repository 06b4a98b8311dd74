"""What every test shares: an environment without network and with one thread, a tiny BERT, the real data beside the repository."""

import gc
import os
import signal
import string
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers and their thread pools are imported; child processes inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

import pytest
from hypothesis import HealthCheck, settings

# How long one example takes says more about the machine's other work than about the code. The examples are the same in every run, so that
# a change is judged by what it changes; `pytest --hypothesis-profile=explore` draws others.
settings.register_profile(
    "here", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

ROOT = Path(__file__).resolve().parent.parent
WORDS = "a an and bad best but dull film fine fun good great is it movie not of poor so the this very was warm worst".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of tests/runs and tests/slurm, which mostly wait, by turns with files of tests/ranks, which mostly compute; then all others.

    Processes take files in this order (setup.cfg).
    """
    turns: dict[Path, tuple[int, int]] = {}
    for path in dict.fromkeys(item.path for item in items):
        slow = path.parent.name in ("runs", "ranks", "slurm")
        number = sum(other.parent == path.parent for other in turns) if slow else len(items)
        turns[path] = (number, len(turns))
    items.sort(key=lambda item: turns[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Put back what a script's `main` changes in its process, where a test calls it in this one."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    logging = sys.modules.get("transformers.utils.logging")
    before = logging and (logging.get_verbosity(), logging.is_progress_bar_enabled())
    throughput = sys.modules.get("bertdist.training.throughput")
    rate = throughput and throughput.matmul_rate  # replaced by rows.be_quick
    yield
    if throughput:
        throughput.matmul_rate = rate  # type: ignore[attr-defined]
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    if logging and before:
        logging.set_verbosity(before[0])
        logging.enable_progress_bar() if before[1] else logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `from_pretrained` loads: a random BERT of 2 layers of 32, and its lower-casing WordPiece tokenizer.

    Every ASCII text has pieces (letters and digits are in the vocabulary, also as ##x). Shared by the session: read it, never write to it.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    pieces = string.ascii_lowercase + string.digits
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *pieces,
        *string.punctuation,
        *(f"##{piece}" for piece in pieces),
    ]
    vocabulary += [word for word in WORDS if word not in vocabulary]
    folder = tmp_path_factory.mktemp("tiny_model")
    BertTokenizerFast(
        vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512
    ).save_pretrained(folder)
    # initializer_range 0.2, not 0.02: at this width attention would be all but uniform, and a wrong mask hard to see.
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository (not part of it); without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data sets of ../shared/data beside the repository")
    return folder
