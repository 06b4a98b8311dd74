"""fp16's loss scale and NaN: a step that overflows is skipped and not counted, a NaN is counted.

A real torch.amp.GradScaler in complete runs on CPUs, patched in because Accelerate creates one on
GPUs only. A scale is a power of two: in float32 everything is exact except for overflow.
"""

import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Breaking,
    Files,
    assert_same_run,
    assert_same_tensors,
    at_step,
    clip_with_torch,
    die,
    json_of,
    last_checkpoint,
    rows_by_step,
    run_train,
    skip_updates,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from torch import Tensor
from torch.amp import GradScaler

from bertdist.distributed import launch
from bertdist.models.classifier import Classifier
from bertdist.tasks.tasks import SingleLabel
from bertdist.training import nonfinite

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "save_every": "3 steps",
    "eval_every": "4 steps",
    "tokens_per_micro_batch": 60,
}
OVERFLOWS = 2.0**127  # the largest scale there is


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_split(tmp_path_factory.mktemp("scaler"), 38, 12)


def scaled(scale: float, half: bool = False) -> Breaking:
    """Runs get a GradScaler of this initial scale. half: products in float16, else in float32."""

    def breaking(accelerator: Accelerator) -> None:
        create_accelerator = launch.create_accelerator

        def with_scaler(run: Any, *notes: Any) -> Accelerator:
            made = create_accelerator(run, *notes)
            made.scaler = GradScaler("cpu", init_scale=scale, growth_interval=1000)
            if half:
                made.native_amp, made.state._mixed_precision = True, "fp16"
            else:
                made.unscale_gradients = lambda: made.scaler.unscale_(made._optimizers[0].optimizer)
            return made

        launch.create_accelerator = with_scaler

    return breaking


def scale_loss_up(accelerator: Accelerator) -> None:
    """A loss 32 times as large: OVERFLOWS does so in float32 until it is halved a few times."""
    loss = SingleLabel.loss
    SingleLabel.loss = lambda self, *rest: loss(self, *rest) * 32  # type: ignore[method-assign]


def all_of(*breakings: Breaking) -> Breaking:
    def breaking(accelerator: Accelerator) -> None:
        for each in breakings:
            each(accelerator)

    return breaking


def make_nonfinite(rows: set[int] | None, how: str) -> Breaking:
    """Logits of these rows (None: of all) are NaN, or have an infinite gradient."""

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * math.inf

    def breaking(accelerator: Accelerator) -> None:
        forward = Classifier.forward

        def changed(self: Classifier, batch: Any) -> Tensor:
            logits = forward(self, batch)
            chosen = [
                self.training and row >= 0 and (rows is None or row in rows)
                for row in batch.row_numbers.tolist()
            ]
            broken = {"nan": lambda one: one * math.nan, "gradient": Infinite.apply}[how]
            return torch.stack(
                [
                    broken(one) if is_chosen else one
                    for one, is_chosen in zip(logits, chosen, strict=True)
                ]
            )

        Classifier.forward = changed  # type: ignore[method-assign]

    return breaking


def skip_first_steps(steps: int) -> Breaking:
    """No scaler; the first steps run without their optimizer step."""
    return all_of(skip_updates(range(1, steps + 1)), clip_with_torch)


def overflows(out: Path) -> int:
    """Number of times the scale was halved."""
    return int(
        math.log2(OVERFLOWS / json_of(last_checkpoint(out) / "state.json")["scaler"]["scale"])
    )


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_overflowing_steps_are_skipped_and_nothing_else_changes(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    out, by_hand = tmp_path / "out", tmp_path / "by_hand"
    ranks = run_ranks(
        n,
        run_train,
        words_of(tiny_model, out, files, **SETTINGS),
        all_of(scale_loss_up, scaled(OVERFLOWS)),
    )
    assert (
        ranks[0][0].finished and ranks[0][0].nan_steps == ranks[0][0].consecutive_nan_steps == 0
    ), "not counted"
    assert not (out / "nan_rows.jsonl").exists() and "NaN" not in ranks[0][2]
    halved = overflows(out)
    assert 2 <= halved < 8
    plain = run_ranks(
        n,
        run_train,
        words_of(tiny_model, by_hand, files, **SETTINGS),
        all_of(scale_loss_up, skip_first_steps(halved)),
    )
    assert rows_by_step([seen for _, seen, _ in ranks]) == rows_by_step(
        [seen for _, seen, _ in plain]
    )
    assert_same_tensors(tensors_of(last_checkpoint(out)), tensors_of(last_checkpoint(by_hand)))
    log = step_log(out, "train")
    assert [line["grad_norm"] is None for line in log] == [
        step < halved for step in range(len(log))
    ]
    for mine, other in zip(log, step_log(by_hand, "train"), strict=True):
        assert {**mine, "grad_norm": 0} == {**other, "grad_norm": 0}, (
            "same rows, same loss, same learning rate"
        )
    run_ranks(
        n,
        run_train,
        words_of(tiny_model, tmp_path / "control", files, **SETTINGS),
        all_of(scale_loss_up, skip_first_steps(halved - 1)),
    )
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same_tensors(
            tensors_of(last_checkpoint(out)), tensors_of(last_checkpoint(tmp_path / "control"))
        )


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_a_restart_goes_on_with_its_scale(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    words = {
        name: words_of(tiny_model, tmp_path / name, files, **SETTINGS)
        for name in ("straight", "killed", "forgotten")
    }
    run_ranks(n, run_train, words["straight"], all_of(scale_loss_up, scaled(OVERFLOWS)))
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(
            n, run_train, words["killed"], all_of(scale_loss_up, scaled(OVERFLOWS), at_step(5, die))
        )
    run_ranks(n, run_train, words["killed"], all_of(scale_loss_up, scaled(OVERFLOWS)))
    assert_same_run(tmp_path / "killed", tmp_path / "straight")

    def forget(accelerator: Accelerator) -> None:
        GradScaler.load_state_dict = lambda self, state: None  # type: ignore[method-assign]

    shutil.copytree(tmp_path / "straight", tmp_path / "forgotten")
    shutil.rmtree(last_checkpoint(tmp_path / "forgotten"))
    run_ranks(n, run_train, words["forgotten"], all_of(scale_loss_up, scaled(OVERFLOWS), forget))
    with pytest.raises(AssertionError):  # negative control
        assert_same_run(tmp_path / "forgotten", tmp_path / "straight")


def count_overflows(accelerator: Accelerator) -> None:
    """Negative control: as if every gradient that is not finite were a fault."""
    nonfinite.NonFiniteGuard._is_skipped = lambda self, loss, grad_norm: ~torch.isfinite(grad_norm)  # type: ignore[method-assign]


def test_counted_overflows_would_end_the_run(
    tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    with pytest.raises(
        RankError,
        match=r"Step 1: the loss or gradient is NaN or infinite, in none of its 8 rows alone",
    ):
        run_ranks(
            2,
            run_train,
            words_of(tiny_model, tmp_path / "out", files, **SETTINGS),
            all_of(scale_loss_up, scaled(OVERFLOWS), count_overflows),
        )


@pytest.mark.parametrize(
    ("n", "how"), some_of([(1, "gradient"), (2, "nan")], product((1, 2), ("nan", "gradient")))
)
def test_a_real_nan_is_noticed(
    tiny_model: Path, files: Files, tmp_path: Path, n: int, how: str
) -> None:
    """NaN in the loss at any scale; in the gradient at a scale of 1, where it is no overflow."""
    out = tmp_path / "out"
    with pytest.raises(RankError, match=r"train\.tsv line 19") as caught:
        run_ranks(
            n,
            run_train,
            words_of(tiny_model, out, files, **SETTINGS),
            all_of(scaled(1.0), make_nonfinite({17}, how)),
        )
    assert str(caught.value).count("errors.NonFiniteError") == n
    assert [line["row"] for line in json_of(out / "nan_rows.jsonl")] == [17]


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_an_overflow_that_no_scale_helps_is_noticed(
    tiny_model: Path, files: Files, tmp_path: Path, n: int
) -> None:
    """Every gradient is infinite: the scale falls from 4 to 1 in two uncounted steps."""
    out = tmp_path / "out"
    with pytest.raises(
        RankError, match="Step 3: the loss or gradient is NaN or infinite"
    ) as caught:
        run_ranks(
            n,
            run_train,
            words_of(tiny_model, out, files, **SETTINGS),
            all_of(scaled(4.0), make_nonfinite(None, "gradient")),
        )
    assert str(caught.value).count("errors.NonFiniteError") == n
    assert len(json_of(out / "nan_rows.jsonl")) == 8


@pytest.mark.parametrize("n", some_of([2], [1]))
def test_float16_itself(tiny_model: Path, files: Files, tmp_path: Path, n: int) -> None:
    """float16 gradients overflow at 65504: such steps are skipped uncounted, a NaN is counted."""
    out = tmp_path / "out"
    words = words_of(
        tiny_model, out, files, **{**SETTINGS, "num_train_epochs": 4, "on_nan": "skip"}
    )
    ranks = run_ranks(
        n, run_train, words, all_of(scaled(2.0**20, half=True), make_nonfinite({17}, "nan"))
    )
    progress = ranks[0][0]
    assert progress.finished and progress.nan_steps == 4, "row 17, once an epoch"
    log = step_log(out, "train")
    overflown = [line["step"] for line in log if line["grad_norm"] is None]
    assert (
        len(overflown) > 4
        and json_of(last_checkpoint(out) / "state.json")["scaler"]["scale"] < 2.0**20
    )
    assert all(tensor.isfinite().all() for tensor in tensors_of(out / "best").values())
