"""Runs with --mixed_precision bf16 on the CPU, an invariant each; on a CPU without units for it bf16 is emulated.

I1, I2: other cuts and ranks have the same rows in every step, and differ by rounding. I3: every row is predicted once, with the same
bits on any number of ranks. I4: tests/unit/models/test_bf16_padding.py. I5: a resumed run has the bits of an uninterrupted one.
I6: what is saved is float32. I7: all ranks skip a step that is not finite; they agree on the precision in
tests/unit/distributed/test_launch_precision.py.
"""

import math
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
from rows import (
    assert_same_run,
    assert_same_tensors,
    last_checkpoint,
    make_rows,
    rows_by_step,
    run_train,
    skip_updates,
    some_of,
    step_log,
    tensors_of,
)
from rows import train_module as train
from torch import Tensor
from undisturbed import STEPS, Runs

from bertdist import predict
from bertdist.core.config import RunConfig, saved_setting
from bertdist.data.in_memory import records_from_texts
from bertdist.distributed import launch
from bertdist.models import bf16
from bertdist.tasks.tasks import SingleLabel

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
    launch.cpu_has_bf16 = launch.cpu_has_amx = lambda: has_units
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


@pytest.mark.parametrize("n", some_of([1], [2]))
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    n: int, runs: Runs, straight: Curve, tmp_path: Path
) -> None:
    """Begun by --mixed_precision auto, and resumed where the CPU has no units for bf16."""
    straight = straight if n == 1 else Curve(runs, tmp_path / "straight", n)
    words = runs.words(tmp_path / "out", **{**SETTINGS, "mixed_precision": "auto"})

    def dies(accelerator: Accelerator) -> None:
        in_bf16(accelerator)
        at_step(7, lambda: os._exit(9))

    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(n, run_train, words, dies)
    (_, _, shown), *_ = run_ranks(n, run_train, words, partial(in_bf16, has_units=False))
    where = "this CPU" if n == 1 else "a rank"
    assert f"Precision   --mixed_precision auto: using bf16: as this run began; {where}" in shown
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


def logits_of(folder: Path, n: int, tokens: int = 60, precision: str = "bf16") -> Tensor:
    """What n ranks predict, checked to be the same on all of them."""
    records = records_from_texts([row["text"] for row in make_rows(17)])

    def predicted(accelerator: Accelerator) -> Tensor:
        AcceleratorState._reset_state()
        launch.cpu_has_bf16 = lambda: True
        predict.ROWS_PER_WINDOW = 3
        run = RunConfig(use_cpu=True, mixed_precision=precision)  # type: ignore[arg-type]
        made = launch.create_accelerator(run)
        predictor = predict.Predictor(folder, tokens_per_micro_batch=tokens, accelerator=made)
        return predictor.predict_logits(records)

    first, *others = run_ranks(n, predicted)
    assert len(first) == 17 and all(torch.equal(first, other) for other in others)
    return first


def test_every_row_is_predicted_once_with_the_same_bits_on_any_number_of_ranks(
    straight: Curve,
) -> None:
    best = straight.out / "best"
    one = logits_of(best, 1)
    assert torch.equal(logits_of(best, 2), one) and torch.equal(logits_of(best, 3), one)
    float32 = logits_of(best, 1, precision="no")  # the control
    assert 0 < (one - float32).abs().max() < 0.02 * float32.abs().max()


def test_what_is_saved_is_float32(straight: Curve) -> None:
    for folder in (last_checkpoint(straight.out), straight.out / "best"):
        tensors = {name: x for name, x in tensors_of(folder).items() if x.is_floating_point()}
        assert tensors and {x.dtype for x in tensors.values()} == {torch.float32}
        values = torch.cat([x.flatten() for name, x in tensors.items() if "weight" in name])
        values = values[values != 0]  # and of all their bits: few would be left by rounding to bf16
        assert (values != values.bfloat16().float()).float().mean() > 0.9


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(runs: Runs, tmp_path: Path) -> None:
    """With the bits of a run with finite rows in which the step was skipped by hand."""

    def spoil(accelerator: Accelerator, row: int) -> None:
        in_bf16(accelerator)
        loss = SingleLabel.loss

        def spoiled(self: Any, logits: Tensor, *rest: Any) -> Tensor:
            return loss(self, logits, *rest) * (math.nan if row in rows_now else 1.0)

        rows_now: list[int] = []
        train_step = train.train_step

        def watched(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
            rows_now[:] = [x for each in step.micro_batches for x in each.row_numbers.tolist()]
            return train_step(model, optimizer, step, *rest)

        SingleLabel.loss = spoiled  # type: ignore[method-assign]
        train.train_step = watched

    def skip(accelerator: Accelerator, steps: list[int]) -> None:
        in_bf16(accelerator)
        skip_updates(steps)(accelerator)

    settings = {**SETTINGS, "on_nan": "skip", "max_train_steps": 5, "save_every": "never"}

    def weights(name: str, breaking: Any) -> tuple[list[Any], dict[str, Tensor]]:
        ended = run_ranks(2, run_train, runs.words(tmp_path / name, **settings), breaking)
        return ended, tensors_of(last_checkpoint(tmp_path / name))

    ended, skipped = weights("nan", partial(spoil, row=17))
    steps = rows_by_step([seen for _, seen, _ in ended])
    (step,) = [number + 1 for number, rows in steps.items() if 17 in rows]
    assert [state.nan_steps for state, _, _ in ended] == [1, 1] and 1 < step < 5
    assert_same_tensors(skipped, weights("by_hand", partial(skip, steps=[step]))[1])
    with pytest.raises(AssertionError):  # the control: another step
        assert_same_tensors(skipped, weights("other", partial(skip, steps=[step - 1]))[1])
