"""Exact scores and predictions on any number of ranks: every rank computes its share, each row exactly once.

1. A split is dealt as in training, in row order. 2. (row, logits) of all ranks come together once. 3. That each row came exactly
once is asserted, every time. 4. Rank 0 computes loss and scores from logits in row order, so they do not depend on ranks or
batches; the others are told.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bertdist.core.config import TaskConfig
from bertdist.core.errors import BertdistError, ConfigError, did_you_mean
from bertdist.core.types import Array
from bertdist.data.batch import PackedBatch
from bertdist.data.sharding import MapLoader
from bertdist.distributed.collectives import (
    all_reduce_sum,
    broadcast_from_rank0,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.preemption import StopSignal
from bertdist.tasks.tasks import Task
from bertdist.training.memory import fitting

GLUE_METRICS = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
}

SHOWN_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One split, scored."""

    scores: dict[str, float]  # loss first
    selection_score: float  # the score that picks the best weights; more is better, so it is negative where less is
    answers: list[dict[str, Any]] = field(
        default_factory=list
    )  # a row each; rank 0 only, like what follows
    references: Array | None = None
    classes: dict[str, Any] = field(default_factory=dict)  # per-class table and confusion matrix
    no_number: tuple[
        int, ...
    ] = ()  # rows for which the model gave NaN or Inf; with any, all scores are NaN. On every rank


class EvaluationStopped(Exception):
    """A rank was asked to stop, or has failed, before all rows were scored; all ranks know."""


@torch.no_grad()
def predict_rows(
    model: nn.Module, batches: MapLoader, accelerator: Accelerator, stop: StopSignal | None = None
) -> Tensor | None:
    """Logits (rows, outputs) float32 on the CPU, in row order, the same on every rank; None on all, where `stop` was asked for meanwhile.

    A rank that was asked leaves out what is left of a step, and the ranks agree after each. Raises DataError on all ranks where one of
    them cannot read or encode a row, or where a text does not fit into memory alone.
    """
    was_training = model.training
    model.eval()
    rows, logits, group = [], [], host_group(accelerator)

    def agree(failed: bool) -> None:
        if any(
            all_reduce_sum(
                accelerator, [int(stop is not None and stop.requested_here()), int(failed)], group
            )
        ):
            raise EvaluationStopped

    def share() -> Iterator[PackedBatch]:
        for step in batches.steps(0, batches.steps_per_epoch):
            for batch in step.share:
                if batch.rows[0] >= 0 and not (
                    stop is not None and stop.requested_here()
                ):  # else it is idle
                    yield batch
            agree(False)

    given_up = False
    with raise_on_all_ranks(accelerator):
        try:
            for batch, found in fitting(
                lambda batch: model(batch.to(accelerator.device)).float(), share(), batches
            ):
                rows.append(batch.rows)
                logits.append(found)
        except EvaluationStopped:
            given_up = True
        except BertdistError:
            with suppress(EvaluationStopped):
                agree(True)
            raise
    model.train(was_training)
    return None if given_up else _in_row_order(rows, logits, len(batches.examples), accelerator)


def _in_row_order(
    rows: list[Tensor], logits: list[Tensor], total: int, accelerator: Accelerator
) -> Tensor:
    """Bring the ranks' rows together; asserts that each of the `total` rows came exactly once."""
    width = _outputs(logits, accelerator)
    mine = torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(accelerator.device)
    values = torch.cat([torch.zeros(0, width, device=accelerator.device), *logits])
    if accelerator.num_processes > 1:
        padded = accelerator.pad_across_processes(mine, dim=0, pad_index=-1)
        missing = len(padded) - len(mine)
        values = accelerator.gather(torch.cat([values, values.new_zeros(missing, width)]))
        mine = accelerator.gather(padded)
        values, mine = values[mine >= 0], mine[mine >= 0]
    mine, values = mine.cpu(), values.cpu()
    assert_each_row_once(mine, total)
    ordered = torch.empty_like(values)
    ordered[mine] = values
    return ordered


def _outputs(logits: list[Tensor], accelerator: Accelerator) -> int:
    """Outputs of the model, also on a rank that had no row."""
    width = torch.tensor([logits[0].shape[1] if logits else 0], device=accelerator.device)
    return (
        int(accelerator.gather(width).max().item())
        if accelerator.num_processes > 1
        else int(width.item())
    )


def assert_each_row_once(rows: Tensor, total: int) -> None:
    """Our own promise, checked on every evaluation and prediction."""
    times = torch.bincount(rows, minlength=total)
    assert len(times) == total and bool((times == 1).all()), (
        f"{total} rows were to be scored once each; {int((times == 0).sum())} came not at all, {int((times > 1).sum())} more than once"
    )


class Evaluator:
    """What rank 0 needs to score a split: metrics, the one that picks the best weights, and the classes of the task.

    Made on rank 0 only: `evaluate` takes longer to import than everything else together.
    """

    def __init__(self, config: TaskConfig, task: Task, glue: str | None) -> None:
        """Raises ConfigError for metrics that are unknown or do not fit the task."""
        from bertdist.tasks import metrics

        self.task = task
        names = (
            config.metrics
            or GLUE_METRICS.get(glue or "")
            or metrics.default_metrics(task.problem_type)
        )
        self._scores = metrics.load_metrics(names, task.problem_type, task.labels)
        self._class_table = metrics.classification_report
        self.main = config.metric_for_best_model or self._scores.names[0]
        self.sign = -1 if self.main in metrics.LOWER_IS_BETTER else 1
        own_keys = any("/" in name or ":" in name or name.endswith(".py") for name in names)
        if self.main not in ("loss", *self._scores.names) and not own_keys:
            hint = did_you_mean(self.main, ["loss", *self._scores.names])
            raise ConfigError(
                f"--metric_for_best_model {self.main}: not among the scores that are computed.{hint}"
            )

    def judge(self, logits: Tensor, references: Array) -> Evaluation:
        """logits (rows, outputs), references in the form of the task -> all that is to be said of a split."""
        predictions, probabilities = self.task.predict(logits)
        loss = self.task.eval_loss(logits.double(), torch.from_numpy(references)).item() / len(
            logits
        )
        found = {"loss": loss, **self._scores.compute(predictions, probabilities, references)}
        if no_number(logits):
            found = dict.fromkeys(
                found, math.nan
            )  # the largest of NaNs is some label, and might be right
        main = self.main if self.main in found else next(key for key in found if key != "loss")
        classes = (
            self._class_table(predictions, references, self.task.labels)
            if self.task.problem_type != "regression"
            else {}
        )
        selection_score = self.sign * found[main]
        return Evaluation(
            scores=found,
            selection_score=selection_score,
            answers=self.task.to_records(logits),
            references=references,
            classes=classes,
        )


def evaluate_split(
    model: nn.Module,
    batches: MapLoader,
    judge: Evaluator | None,
    accelerator: Accelerator,
    stop: StopSignal | None = None,
) -> Evaluation | None:
    """Score a split; None where `stop` was asked for meanwhile. judge: on rank 0; None elsewhere, where only scores and merit come back."""
    logits = predict_rows(model, batches, accelerator, stop)
    if logits is None:
        return None
    found = judge.judge(logits, batches.examples.targets) if judge is not None else None
    scores, selection_score = broadcast_from_rank0(
        accelerator, (found.scores, found.selection_score) if found else None
    )
    return replace(
        found or Evaluation(scores=scores, selection_score=selection_score),
        no_number=no_number(logits),
    )


def no_number(logits: Tensor) -> tuple[int, ...]:
    """Rows of logits (rows, outputs) that hold NaN or Inf."""
    return tuple(torch.nonzero(~torch.isfinite(logits).all(-1))[:, 0].tolist())


def describe_nonfinite_rows(rows: tuple[int, ...], total: int, where: Callable[[int], str]) -> str:
    """That the model has no answer for some rows, and why that may be, in words."""
    first = ", ".join(where(row) for row in rows[:SHOWN_ROWS]) + (
        ", and more" if len(rows) > SHOWN_ROWS else ""
    )
    why = "Its weights are broken, or the precision is too small for it (--mixed_precision no)."
    return f"the model gives NaN or Inf for {len(rows):,} of {total:,} rows: {first}. {why}"
