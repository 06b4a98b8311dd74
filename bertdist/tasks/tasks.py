"""Task kinds: how a label becomes a target, what the loss is, how logits become predictions.

`infer_task` finds the task in the distinct labels of a training split, `task_of_model` in a trained
model's config. Everything else works with a `Task`; a new kind is a new class here, and no other
module branches on the kind.

Legend: N texts, O outputs, V distinct labels.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError, DataError, ModelError, did_you_mean
from bertdist.core.types import Array


class Task(Protocol):
    """What the rest of the program needs to know of a task."""

    @property
    def problem_type(self) -> str:
        """As in Hugging Face model configs."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""

    def encode_label(self, label: Any) -> Any:
        """A raw label -> int, list of O floats, or float. Raises DataError, without the row."""

    def decode_target(self, target: Any) -> Any:
        """A target -> a label name, a list of names, or a number."""

    def row_weights(self, targets: Array) -> Array:
        """Weight of each row in the training loss: (N,) float32."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over rows of weight x loss, () float32.

        Never a mean: whoever adds up micro-batches divides by all rows of the step at the end.
        """

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over rows without label smoothing and class weights, () in the logits' precision.

        So it means the same in every run.
        """

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """Logits (N, O) -> predictions and probabilities, as the metrics read them.

        Predictions are label ids (N,), 0/1 rows (N, O), or numbers (N,); probabilities (N, O).
        """

    def to_records(self, logits: Tensor) -> Iterator[dict[str, Any]]:
        """Logits (N, O) -> N dicts with the keys of `pipeline("text-classification")`, one by one:
        a record may have many labels.
        """


@dataclass(frozen=True)
class SingleLabel:
    """One label per row: softmax and cross-entropy. targets: (N,) int64."""

    labels: tuple[str, ...]
    class_weights: tuple[float, ...] = ()
    smoothing: float = 0.0
    problem_type: str = "single_label_classification"
    _ids: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ids.update({label: i for i, label in enumerate(self.labels)})

    def encode_label(self, label: Any) -> int:
        if str(label) not in self._ids:
            hint = did_you_mean(str(label), self.labels)
            raise DataError(
                f"unknown label {str(label)!r}; expected one of the training labels.{hint}"
            )
        return self._ids[str(label)]

    def decode_target(self, target: Any) -> str:
        return self.labels[int(target)]

    def row_weights(self, targets: Array) -> Array:
        table = np.array(self.class_weights or [1.0] * len(self.labels), dtype=np.float32)
        return table[targets]

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        rows = F.cross_entropy(
            logits.float(), targets, reduction="none", label_smoothing=self.smoothing
        )
        return (rows * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        return logits.argmax(-1).numpy(), logits.float().softmax(-1).numpy()

    def to_records(self, logits: Tensor) -> Iterator[dict[str, Any]]:
        scores, ids = (x.tolist() for x in logits.float().softmax(-1).max(-1))
        for i, score in zip(ids, scores, strict=True):
            yield {"label": self.labels[i], "score": score}


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels per row: sigmoid and binary cross-entropy, averaged over labels.

    targets: (N, O) float32.
    """

    labels: tuple[str, ...]
    positive_weights: tuple[float, ...] = ()
    problem_type: str = "multi_label_classification"

    def encode_label(self, label: Any) -> list[float]:
        if not isinstance(label, tuple):
            raise DataError(
                f"expected a list of labels, found {label!r}; set --label_delimiter to split it."
            )
        if unknown := [str(name) for name in label if str(name) not in self.labels]:
            hint = did_you_mean(unknown[0], self.labels)
            raise DataError(
                f"unknown label {unknown[0]!r}; expected some of the training labels.{hint}"
            )
        return [float(name in label) for name in self.labels]

    def decode_target(self, target: Any) -> list[str]:
        return [self.labels[i] for i in np.flatnonzero(target)]

    def row_weights(self, targets: Array) -> Array:
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        positive = None
        if self.positive_weights:
            positive = torch.tensor(self.positive_weights, device=logits.device)
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), targets, pos_weight=positive, reduction="none"
        )  # (N, O)
        return (losses.mean(-1) * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.mean(-1).sum()

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        probabilities = logits.float().sigmoid()
        return (probabilities > 0.5).long().numpy(), probabilities.numpy()

    def to_records(self, logits: Tensor) -> Iterator[dict[str, Any]]:
        """Every label above one half, the most probable first."""
        for row in logits.float().sigmoid().numpy():
            ids = np.flatnonzero(row > 0.5)
            scores = zip(row[ids].tolist(), (self.labels[i] for i in ids), strict=True)
            above = sorted(scores, reverse=True)
            yield {"labels": [{"label": label, "score": score} for score, label in above]}


@dataclass(frozen=True)
class Regression:
    """One number per row: squared error. targets: (N,) float32."""

    labels: tuple[str, ...]  # the name of the number
    problem_type: str = "regression"

    def encode_label(self, label: Any) -> float:
        try:
            number = float(label)
        except (TypeError, ValueError):
            raise DataError(f"expected a number, found {label!r}.") from None
        if not math.isfinite(number):
            raise DataError(f"expected a finite number, found {label!r}.")
        return number

    def decode_target(self, target: Any) -> float:
        return float(target)

    def row_weights(self, targets: Array) -> Array:
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return ((logits.float()[:, 0] - targets).square() * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits[:, 0] - targets).square().sum()

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        return logits.float()[:, 0].numpy(), logits.float().numpy()

    def to_records(self, logits: Tensor) -> Iterator[dict[str, Any]]:
        for number in logits.float()[:, 0].tolist():
            yield {"label": self.labels[0], "score": number}


TASK_CLASSES: dict[str, type[SingleLabel] | type[MultiLabel] | type[Regression]] = {
    task.problem_type: task for task in (SingleLabel, MultiLabel, Regression)
}


def infer_task(
    config: TaskConfig,
    kind: str,
    values: Sequence[Any],
    counts: Array,
    class_names: tuple[str, ...] | None = None,
    column: str = "label",
    model_labels: tuple[str, ...] | None = None,
) -> Task:
    """Infer the task from the labels of the training split. Raises ConfigError and DataError.

    kind: 'text', 'integer', 'number' or 'set'; values: the V distinct labels; counts: (V,) rows of
    each; column: the label column, for messages. The order of the outputs is --label_names, else
    that of the data set (class_names), else that of the model's own head if it was trained on just
    these labels (model_labels), else sorted: whole numbers by value, other labels by code point.
    """
    problem_type = problem_type_of(config.problem_type, kind, values)
    if config.label_smoothing_factor and problem_type != SingleLabel.problem_type:
        raise ConfigError(
            f"--label_smoothing_factor is for single-label tasks; this is {problem_type}."
        )
    if problem_type == Regression.problem_type:
        if config.class_weights or config.label_names:
            raise ConfigError(
                "--class_weights and --label_names are for classification; this is regression."
            )
        return Regression((column,))
    sets = [value if isinstance(value, tuple) else (value,) for value in values]
    names = {str(name) for labels in sets for name in labels}
    labels = _label_order(names, config.label_names, class_names, model_labels)
    if problem_type == MultiLabel.problem_type:
        return _multi_label_task(config, values, counts, labels, column)
    num_rows = int(counts.sum())
    if len(labels) < 2:
        raise DataError(
            f"The training split has only the label {labels[0]!r} in column {column!r}; "
            "expected at least two."
        )
    if num_rows >= 50 and len(names) > num_rows / 2:
        raise DataError(
            f"Column {column!r} has {len(names):,} different labels in {num_rows:,} rows; "
            "is it the column of the labels?"
        )
    rows_per_label = np.zeros(len(labels))
    for value, count in zip(values, counts, strict=True):
        rows_per_label[labels.index(str(value))] += count
    balanced = num_rows / (len(labels) * np.maximum(rows_per_label, 1))
    weights = _class_weights(config.class_weights, labels, balanced)
    return SingleLabel(labels, weights, config.label_smoothing_factor)


def _multi_label_task(
    config: TaskConfig, values: Sequence[Any], counts: Array, labels: tuple[str, ...], column: str
) -> MultiLabel:
    if not labels:
        raise DataError(
            f"No row of the training split has a label in {column!r}; expected at least one label."
        )
    targets = np.array([MultiLabel(labels).encode_label(value) for value in values])  # (V, O)
    positive = (targets * counts[:, None]).sum(0)  # (O,) rows that have the label
    balanced = (int(counts.sum()) - positive) / np.maximum(positive, 1)
    return MultiLabel(labels, _class_weights(config.class_weights, labels, balanced))


def task_of_model(problem_type: str | None, labels: Sequence[str]) -> Task:
    """The task that a trained classifier's config.json states; raises ModelError."""
    if problem_type is None:  # not trained by bertdist: what `pipeline` assumes of it
        kind: type[SingleLabel | MultiLabel | Regression]
        kind = Regression if len(labels) == 1 else SingleLabel
        return kind(tuple(labels))
    if problem_type not in TASK_CLASSES:
        hint = did_you_mean(problem_type, TASK_CLASSES)
        raise ModelError(f"The model's problem_type is {problem_type!r}.{hint}")
    return TASK_CLASSES[problem_type](tuple(labels))


def problem_type_of(requested: str, kind: str, values: Sequence[Any]) -> str:
    """The problem type, of --problem_type and the training labels; ConfigError if they differ."""
    if requested != "auto":
        if (requested == MultiLabel.problem_type) != (kind == "set"):
            content = "lists of labels"
            if kind != "set":
                content = "single values; --label_delimiter or --label_columns make lists of labels"
            raise ConfigError(
                f"--problem_type is {requested}, but the label column holds {content}."
            )
        return requested
    if kind == "set":
        return MultiLabel.problem_type
    numbers = kind == "text" and all(_is_number(value) for value in values)
    fractions = numbers and not all(re.fullmatch(r"[+-]?\d+", value) for value in values)
    return Regression.problem_type if kind == "number" or fractions else SingleLabel.problem_type


def _label_order(
    names: set[str],
    label_names: list[str] | None,
    class_names: tuple[str, ...] | None,
    model_labels: tuple[str, ...] | None,
) -> tuple[str, ...]:
    if label_names is not None:
        if len(set(label_names)) < len(label_names):
            raise ConfigError(f"--label_names repeats a name: {' '.join(label_names)}.")
        if missing := sorted(names - set(label_names)):
            raise ConfigError(
                f"--label_names lacks {missing[0]!r}, which the training split has."
                f"{did_you_mean(missing[0], label_names)}"
            )
        return tuple(label_names)
    if class_names is not None:
        return class_names
    if model_labels is not None and set(model_labels) == names:
        return model_labels
    by_value = all(_is_whole_number(name) for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if by_value else None))


def _class_weights(
    weights: list[str] | None, labels: tuple[str, ...], balanced: Array
) -> tuple[float, ...]:
    """--class_weights as numbers: none, "balanced" (O,), or one per label."""
    if weights is None:
        return ()
    if weights == ["balanced"]:
        return tuple(float(weight) for weight in balanced)
    if len(weights) != len(labels):
        raise ConfigError(
            f"--class_weights has {len(weights)} numbers for {len(labels)} labels; "
            f"the order is: {', '.join(labels)}."
        )
    return tuple(float(weight) for weight in weights)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _is_whole_number(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits == "0" or not digits.startswith("0"))
