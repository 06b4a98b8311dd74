"""Runs with --mixed_precision bf16 on the CPU: the same rows, a resumed run has the bits of an uninterrupted one, and other cuts
and ranks differ by bf16 rounding."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import RankError, run_ranks
from rows import assert_same_run, rows_by_step, run_train, step_log
from rows import train_module as train
from undisturbed import STEPS, Runs

from bertdist.core.config import saved_setting
from bertdist.distributed import launch
from bertdist.models import bf16

SETTINGS: dict[str, Any] = {"mixed_precision": "bf16", "dropout": 0.2, "log_every": "1 steps"}


def at_step(number: int, act: Callable[[], None]) -> None:
    """Act before a step is taken."""
    train_step = train.train_step

    def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        if step.number == number:
            act()
        return train_step(model, optimizer, step, *rest)

    train.train_step = watched


def in_bf16(accelerator: Accelerator, has_units: bool = True) -> None:
    """On any CPU; the layer's operation must be what trains. has_units: what the CPU says."""
    AcceleratorState._reset_state()  # the rank's: it has a precision
    launch.cpu_has_bf16 = lambda: has_units
    apply, calls = bf16._Layer.apply, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    bf16._Layer.apply = counted  # type: ignore[method-assign]

    def check() -> None:
        assert calls, "the layer's modules were used"

    at_step(STEPS - 1, check)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("bf16"))


class Curve:
    """Rows, losses and gradient norms of a run, step by step."""

    def __init__(self, runs: Runs, out: Path, n: int, **settings: Any) -> None:
        words = runs.words(out, **{**SETTINGS, **settings})
        ended = run_ranks(n, run_train, words, in_bf16)
        self.out, self.rows = out, rows_by_step([seen for _, seen, _ in ended])
        lines = step_log(out, "train")
        self.numbers = torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])

    def far_from(self, other: "Curve") -> float:
        """The largest relative difference in the first steps: later ones learn from the rounding."""
        return float(((self.numbers - other.numbers) / other.numbers)[:3].abs().max())


@pytest.fixture(scope="module")
def straight(runs: Runs) -> Curve:
    return Curve(runs, runs.folder / "straight", 1)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    runs: Runs, straight: Curve, tmp_path: Path
) -> None:
    """Begun by --mixed_precision auto, and resumed where the CPU has no units for bf16."""
    words = runs.words(tmp_path / "out", **{**SETTINGS, "mixed_precision": "auto"})

    def dies(accelerator: Accelerator) -> None:
        in_bf16(accelerator)
        at_step(7, lambda: os._exit(9))

    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(1, run_train, words, dies)
    (_, _, shown), *_ = run_ranks(1, run_train, words, partial(in_bf16, has_units=False))
    assert "Precision   --mixed_precision auto: using bf16: as this run began; this CPU" in shown
    assert_same_run(tmp_path / "out", straight.out)
    assert saved_setting(tmp_path / "out" / "config.yaml", "mixed_precision") == "bf16"
    float32 = runs.words(tmp_path / "float32", **{**SETTINGS, "mixed_precision": "no"})
    run_ranks(1, run_train, float32)
    with pytest.raises(AssertionError):  # the control
        assert_same_run(tmp_path / "float32", straight.out)


def test_other_cuts_and_ranks_differ_by_rounding(
    runs: Runs, straight: Curve, tmp_path: Path
) -> None:
    far = {}
    for n, tokens in ((1, 8192), (2, 30)):
        other = Curve(runs, tmp_path / str(n), n, tokens_per_micro_batch=tokens)
        assert other.rows == straight.rows
        far[n, tokens] = other.far_from(straight)
    assert min(far.values()) > 0 and max(far.values()) < 0.03, far
    other = Curve(runs, tmp_path / "seed", 1, seed=43)
    assert other.rows != straight.rows and other.far_from(straight) > 0.1  # the control
