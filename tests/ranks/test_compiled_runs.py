"""Whole runs under --torch_compile, with inductor: the eager loss curve, a restart that is invisible, and a compiler that is not there.

The first of them compiles, for some seconds; the others find in inductor's cache on disk what it compiled.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    EVERY_FAULT,
    Breaking,
    Files,
    assert_same_run,
    run_train,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from rows import train_module as train

from bertdist.models import dropout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch 2.13 warns of its own compiler
    import torch._inductor.compile_fx  # before the ranks are forked: each would wait for it

STEPS = 10  # 5 an epoch, the last smaller
SAID = "--torch_compile: the layers are compiled ("

long = pytest.mark.skipif(
    not EVERY_FAULT,
    reason="it compiles for half a minute, and tests/unit/models/test_compile.py compiles layers: "
    "with BERTDIST_EVERY_FAULT=1 only",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's own, so that each session compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch._inductor.config.cpp, "vec_isa_ok", True
        )  # trying each of the CPU's instruction sets takes as long again
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_split(tmp_path_factory.mktemp("rows"), 38, 12)


@pytest.fixture(scope="module")
def words(tiny_model: Path, files: Files) -> Callable[..., list[str]]:
    """A run with dropout, cut into micro-batches of ever other sizes."""

    def given(out: Path, **settings: Any) -> list[str]:
        usual = {
            "num_train_epochs": 2,
            "dropout": 0.3,
            "tokens_per_micro_batch": 60,
            "save_every": "3 steps",
            "torch_compile": True,
        }
        return words_of(tiny_model, out, files, **{**usual, **settings})

    return given


def compiled_run(
    accelerator: Accelerator, words: list[str], breaking: Breaking | None = None
) -> tuple[str, int, int]:
    """What was said; graphs that were made of the layers' Python code; graphs that inductor was given, forward and backward."""
    from torch._dynamo.utils import counters

    counters.clear()  # what the tests before have counted in the process that this one is a fork of
    said = run_train(accelerator, words, breaking)[2]
    return (
        said,
        counters["stats"]["unique_graphs"],
        counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"],
    )


def far(one: Path, other: Path) -> float:
    """The largest difference of a loss or a score, and of a gradient's norm to its size."""
    lines = list(zip(step_log(one), step_log(other), strict=True))
    assert [a["step"] for a, _ in lines] == [b["step"] for _, b in lines]
    assert max(a["step"] for a, _ in lines) == STEPS
    norms = [
        abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in lines if "grad_norm" in b
    ]
    assert len(norms) == STEPS
    return max(*norms, *(abs(a["loss"] - b["loss"]) for a, b in lines))


@pytest.fixture(scope="module")
def eager(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eager") / "out"
    run_ranks(1, run_train, words(out, torch_compile=None))
    return out


@pytest.fixture(scope="module")
def compiled(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph, forward and backward, for all sizes."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    ((said, graphs, lowered),) = run_ranks(1, compiled_run, words(out), timeout=110)
    assert said.count("--torch_compile") == said.count(SAID) == 1
    assert (graphs, lowered) == (1, 2)
    return out


@long
def test_the_loss_curve_is_the_eager_one(
    compiled: Path, eager: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert far(compiled, eager) < 2e-5
    assert tensors_of(compiled / "best").keys() == tensors_of(eager / "best").keys()
    assert (compiled / "best" / "config.json").read_text() == (
        eager / "best" / "config.json"
    ).read_text()

    def other_masks(accelerator: Accelerator) -> None:
        dropout._keep_mask = lambda masks, shape, p: torch.rand(shape) >= p

    run_ranks(1, run_train, words(tmp_path / "out", torch_compile=None), other_masks)
    assert far(tmp_path / "out", eager) > 0.01  # the control


@long
def test_two_ranks_learn_it_too(
    words: Callable[..., list[str]], eager: Path, tmp_path: Path
) -> None:
    for said, graphs, lowered in run_ranks(2, compiled_run, words(tmp_path / "out")):
        assert said.count(SAID) <= 1 and (graphs, lowered) == (1, 2)
    assert far(tmp_path / "out", eager) < 2e-5


@long
def test_resume_equals_uninterrupted(
    compiled: Path, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    def dying(accelerator: Accelerator) -> None:
        seed_dropout = train.seed_dropout
        train.seed_dropout = lambda seed, step, rank: (
            seed_dropout(seed, step, rank) if step < 7 else os._exit(9)
        )

    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words(tmp_path / "out"), dying)
    run_ranks(1, run_train, words(tmp_path / "out"))
    assert_same_run(tmp_path / "out", compiled)


def test_without_a_compiler_and_a_gpu_the_run_is_eager(
    words: Callable[..., list[str]], eager: Path, tmp_path: Path
) -> None:
    def no_compiler(accelerator: Accelerator) -> None:
        import torch._inductor.config

        torch._inductor.config.cpp.cxx = (str(tmp_path / "no_such_compiler"),)
        torch._inductor.config.force_disable_caches = True

    ((said, *_),) = run_ranks(
        1, compiled_run, words(tmp_path / "out", cuda_graphs=True), no_compiler
    )
    assert (
        said.count(
            "\n--cuda_graphs cannot take effect, steps run eagerly: it needs a CUDA GPU, and this run is on cpu.\n"
        )
        == 1
    )
    (line,) = (line for line in said.splitlines() if "--torch_compile" in line)
    assert (
        line.startswith("--torch_compile cannot take effect, the layers run eagerly: ")
        and "no_such_compiler" in line
    )
    assert_same_run(tmp_path / "out", eager)
