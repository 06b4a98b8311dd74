"""The only module that knows task kinds: how a label becomes a target, what the loss is, how logits are read.

In: the distinct raw labels of a training split. Out: a Task. Everywhere else a task is just a Task; no other module branches
on the kind, and a new kind is a new class here.

Legend: N texts, O outputs, V distinct labels.
"""

import math
import re
from collections.abc import Sequence
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
        """The word of Hugging Face model configs."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""

    def target(self, label: Any) -> Any:
        """A raw label -> int, list of O floats, or float. Raises DataError (without the place; the caller knows it)."""

    def label(self, target: Any) -> Any:
        """A target -> the label as a person knows it: a name, a list of names, or a number."""

    def weights(self, targets: Array) -> Array:
        """(N,) float32: what each row counts in the training loss."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """() float32: sum over rows of weight x loss, never a mean: who adds up parts divides by all rows at the end."""

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """() in the precision of the logits: the sum without label smoothing and class weights, so that it means the same in every run."""

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """Logits (N, O) -> (predictions, probabilities) in the form `scores` takes: ids, 0/1 rows, or numbers."""

    def to_records(self, logits: Tensor) -> list[dict[str, Any]]:
        """Logits (N, O) -> N dicts in the words of `pipeline("text-classification")`."""


@dataclass(frozen=True)
class SingleLabel:
    """One label a row: softmax and cross-entropy. targets: (N,) int64."""

    labels: tuple[str, ...]
    class_weights: tuple[float, ...] = ()
    smoothing: float = 0.0
    problem_type: str = "single_label_classification"
    _ids: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ids.update({label: i for i, label in enumerate(self.labels)})

    def target(self, label: Any) -> int:
        """See Task."""
        if str(label) not in self._ids:
            raise DataError(
                f"unknown label {str(label)!r}; expected one of the training labels.{did_you_mean(str(label), self.labels)}"
            )
        return self._ids[str(label)]

    def label(self, target: Any) -> str:
        """See Task."""
        return self.labels[int(target)]

    def weights(self, targets: Array) -> Array:
        """See Task."""
        table = np.array(self.class_weights or [1.0] * len(self.labels), dtype=np.float32)
        return table[targets]

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """See Task."""
        return (
            F.cross_entropy(
                logits.float(), targets, reduction="none", label_smoothing=self.smoothing
            )
            * weights
        ).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task."""
        return F.cross_entropy(logits, targets, reduction="sum")

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """See Task."""
        return logits.argmax(-1).numpy(), logits.float().softmax(-1).numpy()

    def to_records(self, logits: Tensor) -> list[dict[str, Any]]:
        """See Task."""
        scores, ids = logits.float().softmax(-1).max(-1)
        return [
            {"label": self.labels[i], "score": score}
            for i, score in zip(ids.tolist(), scores.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels a row: a sigmoid and binary cross-entropy for each, averaged over labels. targets: (N, O) float32."""

    labels: tuple[str, ...]
    positive_weights: tuple[float, ...] = ()
    problem_type: str = "multi_label_classification"

    def target(self, label: Any) -> list[float]:
        """See Task."""
        if not isinstance(label, tuple):
            raise DataError(
                f"expected a list of labels, found {label!r}; --label_delimiter says what stands between them."
            )
        if unknown := [str(name) for name in label if str(name) not in self.labels]:
            raise DataError(
                f"unknown label {unknown[0]!r}; expected some of the training labels.{did_you_mean(unknown[0], self.labels)}"
            )
        return [float(name in label) for name in self.labels]

    def label(self, target: Any) -> list[str]:
        """See Task."""
        return [label for label, on in zip(self.labels, target, strict=True) if on]

    def weights(self, targets: Array) -> Array:
        """See Task."""
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """See Task."""
        positive = (
            torch.tensor(self.positive_weights, device=logits.device)
            if self.positive_weights
            else None
        )
        rows = F.binary_cross_entropy_with_logits(
            logits.float(), targets, pos_weight=positive, reduction="none"
        ).mean(-1)
        return (rows * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task."""
        return (
            F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
            .mean(-1)
            .sum()
        )

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """See Task."""
        probabilities = logits.float().sigmoid()
        return (probabilities > 0.5).long().numpy(), probabilities.numpy()

    def to_records(self, logits: Tensor) -> list[dict[str, Any]]:
        """See Task. Every label above one half, the most probable first."""
        answers = []
        for row in logits.float().sigmoid().tolist():
            found = sorted(
                (
                    (score, label)
                    for score, label in zip(row, self.labels, strict=True)
                    if score > 0.5
                ),
                reverse=True,
            )
            answers.append({"labels": [{"label": label, "score": score} for score, label in found]})
        return answers


@dataclass(frozen=True)
class Regression:
    """One number a row: squared error. targets: (N,) float32."""

    labels: tuple[str, ...]  # the name of the number
    problem_type: str = "regression"

    def target(self, label: Any) -> float:
        """See Task."""
        try:
            number = float(label)
        except (TypeError, ValueError):
            raise DataError(f"expected a number, found {label!r}.") from None
        if not math.isfinite(number):
            raise DataError(f"expected a finite number, found {label!r}.")
        return number

    def label(self, target: Any) -> float:
        """See Task."""
        return float(target)

    def weights(self, targets: Array) -> Array:
        """See Task."""
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """See Task."""
        return ((logits.float()[:, 0] - targets).square() * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task."""
        return (logits[:, 0] - targets).square().sum()

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """See Task."""
        return logits.float()[:, 0].numpy(), logits.float().numpy()

    def to_records(self, logits: Tensor) -> list[dict[str, Any]]:
        """See Task."""
        return [
            {"label": self.labels[0], "score": number} for number in logits.float()[:, 0].tolist()
        ]


def infer_task(
    config: TaskConfig,
    kind: str,
    values: Sequence[Any],
    counts: Array,
    class_names: tuple[str, ...] | None = None,
    column: str = "label",
    model_labels: tuple[str, ...] | None = None,
) -> Task:
    """Find the task in the labels of the training split.

    kind: 'text', 'integer', 'number' or 'set'; values: the V distinct labels; counts: (V,) rows of each. The order of the
    labels is --label_names, else the order the data set states (class_names), else the order of the model's own head where it
    was trained on just these labels (model_labels), else sorted: whole numbers by value, other labels by code point.
    Raises ConfigError and DataError.
    """
    problem_type = problem_type_of(config.problem_type, kind, values)
    rows = int(counts.sum())
    if config.label_smoothing_factor and problem_type != "single_label_classification":
        raise ConfigError(
            f"--label_smoothing_factor is for single-label tasks; this is {problem_type}."
        )
    if problem_type == "regression":
        if config.class_weights or config.label_names:
            raise ConfigError(
                "--class_weights and --label_names are for classification; this is regression."
            )
        return Regression((column,))
    names = {
        str(name) for value in values for name in (value if isinstance(value, tuple) else (value,))
    }
    labels = _order(names, config.label_names, class_names, model_labels)
    if problem_type == "multi_label_classification":
        if not labels:
            raise DataError(
                f"No row of the training split has a label in {column!r}; expected at least one label."
            )
        task = MultiLabel(labels)
        targets = np.array([task.target(value) for value in values])
        positive = (targets * counts[:, None]).sum(0)
        return MultiLabel(
            labels,
            _class_weights(
                config.class_weights, labels, (rows - positive) / np.maximum(positive, 1)
            ),
        )
    if len(labels) < 2:
        raise DataError(
            f"The training split has only the label {labels[0]!r} in column {column!r}; expected at least two."
        )
    if rows >= 50 and len(names) > rows / 2:
        raise DataError(
            f"Column {column!r} has {len(names):,} different labels in {rows:,} rows; is it the column of the labels?"
        )
    of_label = np.zeros(len(labels))
    for value, count in zip(values, counts, strict=True):
        of_label[labels.index(str(value))] += count
    weights = _class_weights(
        config.class_weights, labels, rows / (len(labels) * np.maximum(of_label, 1))
    )
    return SingleLabel(labels, weights, config.label_smoothing_factor)


def task_of_model(problem_type: str | None, labels: Sequence[str]) -> Task:
    """The task a trained classifier was trained for, from the words of its config.json; raises ModelError."""
    kinds: dict[str, type[SingleLabel] | type[MultiLabel] | type[Regression]]
    kinds = {
        "single_label_classification": SingleLabel,
        "multi_label_classification": MultiLabel,
        "regression": Regression,
    }
    if problem_type is None:  # a model from elsewhere: what `pipeline` assumes of it
        problem_type = "regression" if len(labels) == 1 else "single_label_classification"
    if problem_type not in kinds:
        raise ModelError(
            f"The model's problem_type is {problem_type!r}.{did_you_mean(problem_type, kinds)}"
        )
    return kinds[problem_type](tuple(labels))


def problem_type_of(asked: str, kind: str, values: Sequence[Any]) -> str:
    """What --problem_type and the labels of the training rows make together; raises ConfigError where they contradict each other."""
    if asked != "auto":
        if (asked == "multi_label_classification") != (kind == "set"):
            found = (
                "lists of labels"
                if kind == "set"
                else "single values, which --label_delimiter or --label_columns make lists of"
            )
            raise ConfigError(f"--problem_type is {asked}, but the label column holds {found}.")
        return asked
    if kind == "set":
        return "multi_label_classification"
    fractions = (
        kind == "text"
        and all(_is_number(v) for v in values)
        and not all(re.fullmatch(r"[+-]?\d+", v) for v in values)
    )
    return "regression" if kind == "number" or fractions else "single_label_classification"


def _order(
    names: set[str], asked: list[str] | None, *stated: tuple[str, ...] | None
) -> tuple[str, ...]:
    if asked is not None:
        if len(set(asked)) < len(asked):
            raise ConfigError(f"--label_names repeats a name: {' '.join(asked)}.")
        if missing := sorted(names - set(asked)):
            raise ConfigError(
                f"--label_names lacks {missing[0]!r}, which the training split has.{did_you_mean(missing[0], asked)}"
            )
        return tuple(asked)
    class_names, model_labels = stated
    if class_names is not None:
        return class_names
    if model_labels is not None and set(model_labels) == names:
        return model_labels
    whole = all(_is_whole(name) for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def _class_weights(
    asked: list[str] | None, labels: tuple[str, ...], balanced: Array
) -> tuple[float, ...]:
    if asked is None:
        return ()
    if asked == ["balanced"]:
        return tuple(float(weight) for weight in balanced)
    if len(asked) != len(labels):
        raise ConfigError(
            f"--class_weights has {len(asked)} numbers for {len(labels)} labels; the order is: {', '.join(labels)}."
        )
    return tuple(float(word) for word in asked)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _is_whole(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and (digits == "0" or not digits.startswith("0"))
