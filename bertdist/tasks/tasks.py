"""Task kinds: how a label becomes a target, what the loss is, how logits become predictions.

`create_task` finds the task in the distinct labels of a training split, by the rules of
tasks/labels.py, `task_of_model` in a trained model's config. A `Task` gives targets, losses and
predictions, whatever its kind. Other modules ask for `problem_type` where they need more than that:
metrics, reports, label statistics, checks of flags. A new kind is a new class here, and a look at
those places (grep problem_type).

Legend: N texts, O outputs, V distinct labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError, DataError, ModelError, did_you_mean, listed
from bertdist.core.terminal import excerpt, excerpt_of
from bertdist.core.thresholds import parse_threshold_score
from bertdist.core.types import Array
from bertdist.tasks.labels import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelIndex,
    LabelNames,
    LabelStats,
    describe_near_miss,
    infer_problem_type,
    is_integer,
    is_multi_hot,
    is_number,
    label_names,
    match_labels,
    quoted,
    read_label_names,
)
from bertdist.tasks.row_scores import decided_labels

Thresholds: TypeAlias = tuple[float | None, ...]
# As a user gives them: one for all labels, or some by their names
Threshold: TypeAlias = float | Mapping[str, float] | None

LOSS_CHUNK = 1 << 26  # logits that are float64 at the same time


class Task(Protocol):
    """What the rest of the program needs to know of a task."""

    @property
    def problem_type(self) -> str:
        """As in Hugging Face model configs."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, in their order."""

    @property
    def codes(self) -> tuple[str, ...]:
        """What files may have instead of each label; () where they have the labels only."""

    @property
    def reason(self) -> str:
        """Why it is this task, in a sentence; "" where it was asked for, or is plain."""

    @property
    def thresholds(self) -> Thresholds:
        """Of each output, the probability above which it is the answer; () for the usual answers.

        Of two labels only the positive one has a number, and is the answer above it, else the
        other one is.
        """

    def encode_label(self, label: Any) -> Any:
        """A raw label -> int, list of O floats, or float. Raises DataError, without the row."""

    def decode_target(self, target: Any) -> Any:
        """A target -> a label name, a list of names, or a number."""

    def row_weights(self, targets: Array) -> Array:
        """Weight of each row in the training loss: (N,) float32."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum over rows of weight x loss, () float32.

        Never a mean: whoever adds up micro-batches divides by all rows of the step at the end, also
        with --class_weights. F.cross_entropy(weight=..., reduction="mean") divides by the sum of
        the weights instead; here a step of rare labels moves the model more than one of frequent
        ones.
        """

    def eval_loss(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """Sum over rows without label smoothing and class weights, () in the logits' precision.

        So it means the same in every run. reduction "none": of each row, (N,).
        """

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        """Logits (N, O) -> predictions and probabilities, as the metrics read them.

        Predictions are label ids (N,), 0/1 rows (N, O), or numbers (N,); probabilities (N, O).
        """

    def error_sizes(self, logits: Tensor, targets: Array) -> Array:
        """How wrong each row is predicted, (N,); 0: not at all.

        The probability of the wrong label, the highest one of several, or the distance of numbers.
        """

    def to_records(
        self, logits: Tensor, top_k: int | None = None, threshold: Threshold = None
    ) -> Iterator[dict[str, Any]]:
        """Logits (N, O) -> N dicts with the keys of `pipeline("text-classification")`, one by one:
        a record may have many labels.

        Single-label: {"label", "score"}, the label None where the score is below the threshold.
        Multi-label: {"labels": [{"label", "score"}, ...]}, all above the threshold (one half), the
        most probable first. top_k: {"labels": [...]} of both, the k most probable labels, without
        those that a given threshold excludes. threshold: instead of the `thresholds` of the task;
        by label, of those only.
        """


@dataclass(frozen=True)
class SingleLabel:
    """One label per row: softmax and cross-entropy. targets: (N,) int64."""

    labels: tuple[str, ...]
    class_weights: tuple[float, ...] = ()
    smoothing: float = 0.0
    problem_type: str = SINGLE_LABEL
    reason: str = field(default="", compare=False)
    codes: tuple[str, ...] = ()
    thresholds: Thresholds = ()

    @cached_property
    def _index(self) -> LabelIndex:
        return LabelIndex(self.labels, self.codes)

    def encode_label(self, label: Any) -> int:
        if isinstance(label, tuple) and len(label) == 1:
            (label,) = label
        if (found := self._index.find(str(label))) is None:
            raise _unknown_label(str(label), (*self.labels, *self.codes), "one")
        return found

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

    def eval_loss(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        return F.cross_entropy(logits, targets, reduction=reduction)

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        probabilities = logits.float().softmax(-1).numpy()
        if self.thresholds:
            return decided_labels(probabilities, self.thresholds), probabilities
        return logits.argmax(-1).numpy(), probabilities

    def error_sizes(self, logits: Tensor, targets: Array) -> Array:
        predictions, probabilities = self.predict(logits)
        answered = probabilities[np.arange(len(predictions)), predictions]
        return np.where(predictions == targets, 0, answered)

    def to_records(
        self, logits: Tensor, top_k: int | None = None, threshold: Threshold = None
    ) -> Iterator[dict[str, Any]]:
        task, least = self, 0.0
        if isinstance(threshold, Mapping):
            task = replace(self, thresholds=thresholds_by_output(self, threshold))
        elif threshold is not None:
            task, least = replace(self, thresholds=()), threshold
        if top_k is not None:
            for best in _most_probable(logits.float().softmax(-1), self.labels, top_k):
                yield {"labels": [entry for entry in best if entry["score"] >= least]}
            return
        answers, probabilities = task.predict(logits)
        ids, scores = answers.tolist(), probabilities[np.arange(len(answers)), answers].tolist()
        for i, score in zip(ids, scores, strict=True):
            yield {"label": self.labels[i] if score >= least else None, "score": score}


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels per row: sigmoid and binary cross-entropy, averaged over labels.

    targets: (N, O) float32.
    """

    labels: tuple[str, ...]
    positive_weights: tuple[float, ...] = ()
    problem_type: str = MULTI_LABEL
    reason: str = field(default="", compare=False)
    # Whether lists of O zeros and ones are targets; else all lists hold names.
    multi_hot: bool = field(default=False, compare=False)
    codes: tuple[str, ...] = ()
    thresholds: Thresholds = ()

    @cached_property
    def _index(self) -> LabelIndex:
        return LabelIndex(self.labels, self.codes)

    def encode_label(self, label: Any) -> list[float]:
        if not isinstance(label, tuple):
            raise DataError(
                f"expected a list of labels, found {quoted(label)}; --label_delimiter splits text."
            )
        if self.multi_hot and is_multi_hot([label], len(self.labels)):
            return [float(bit) for bit in label]
        if len(set(label)) < len(label):
            if not set(label) <= {"0", "1"}:
                twice = next(name for name in label if label.count(name) > 1)
                raise DataError(f"the label {quoted(str(twice))} occurs twice in one row.")
            raise DataError(
                f"a list of {len(label)} zeros and ones; expected {len(self.labels)}, one for each "
                "training label."
            )
        targets = [0.0] * len(self.labels)
        for name in map(str, label):
            if (found := self._index.find(name)) is None:
                raise _unknown_label(name, (*self.labels, *self.codes), "some")
            targets[found] = 1.0
        return targets

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

    def eval_loss(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        targets = targets.to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        return losses.sum() if reduction == "sum" else losses

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        probabilities = logits.float().sigmoid()
        limits = torch.tensor(self.thresholds or 0.5)
        return (probabilities > limits).long().numpy(), probabilities.numpy()

    def error_sizes(self, logits: Tensor, targets: Array) -> Array:
        predictions, probabilities = self.predict(logits)
        confidence = np.where(predictions > 0, probabilities, 1 - probabilities)
        sizes: Array = np.where(predictions == targets, 0, confidence).max(-1)
        return sizes

    def to_records(
        self, logits: Tensor, top_k: int | None = None, threshold: Threshold = None
    ) -> Iterator[dict[str, Any]]:
        probabilities = logits.float().sigmoid()
        given = thresholds_by_output(self, threshold) or (0.5,) * len(self.labels)
        limits: Array = np.array(given, np.float32)
        if top_k is not None:
            least = dict(zip(self.labels, limits, strict=True)) if threshold is not None else {}
            for best in _most_probable(probabilities, self.labels, top_k):
                above = [x for x in best if x["score"] > least.get(x["label"], -1.0)]
                yield {"labels": above}
            return
        for row in probabilities.numpy():
            ids = np.flatnonzero(row > limits)
            scores = zip(row[ids].tolist(), (self.labels[i] for i in ids), strict=True)
            ordered = sorted(scores, reverse=True)
            yield {"labels": [{"label": label, "score": score} for score, label in ordered]}


@dataclass(frozen=True)
class Regression:
    """One number per row: squared error. targets: (N,) float32."""

    labels: tuple[str, ...]  # the name of the number
    problem_type: str = REGRESSION
    reason: str = field(default="", compare=False)
    codes: tuple[str, ...] = ()
    thresholds: Thresholds = ()  # always

    def encode_label(self, label: Any) -> float:
        if not is_number(str(label)):
            raise DataError(f"expected a number, found {quoted(label)}.")
        if abs(float(label)) > 1e19:
            raise DataError(
                f"the square of {quoted(label)} overflows float32; expected up to 1e19."
            )
        return float(label)

    def decode_target(self, target: Any) -> float:
        return float(target)

    def row_weights(self, targets: Array) -> Array:
        return np.ones(len(targets), dtype=np.float32)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return ((logits.float()[:, 0] - targets).square() * weights).sum()

    def eval_loss(self, logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        losses = (logits[:, 0] - targets).square()
        return losses.sum() if reduction == "sum" else losses

    def predict(self, logits: Tensor) -> tuple[Array, Array]:
        return logits.float()[:, 0].numpy(), logits.float().numpy()

    def error_sizes(self, logits: Tensor, targets: Array) -> Array:
        return np.abs(self.predict(logits)[0].astype(np.float64) - targets)

    def to_records(
        self, logits: Tensor, top_k: int | None = None, threshold: Threshold = None
    ) -> Iterator[dict[str, Any]]:
        """Neither top_k nor threshold mean anything here, see `check_answer`."""
        for number in logits.float()[:, 0].tolist():
            yield {"label": self.labels[0], "score": number}


def _most_probable(
    probabilities: Tensor, labels: Sequence[str], top_k: int
) -> Iterator[list[dict[str, Any]]]:
    """Of each row the k most probable labels, of equal ones the first."""
    scores, ids = (x[:, :top_k].tolist() for x in probabilities.sort(descending=True, stable=True))
    for row_ids, row_scores in zip(ids, scores, strict=True):
        yield [
            {"label": labels[i], "score": score}
            for i, score in zip(row_ids, row_scores, strict=True)
        ]


def mean_loss(task: Task, logits: Tensor, references: Array) -> float:
    """The mean of `eval_loss` over rows, in float64. logits: (N, O), references: (N, ...)."""
    targets, chunk = torch.from_numpy(references), max(1, LOSS_CHUNK // logits.shape[1])
    parts = zip(logits.split(chunk), targets.split(chunk), strict=True)
    return sum(task.eval_loss(part.double(), target).item() for part, target in parts) / len(logits)


def thresholds_by_output(task: Task, threshold: Threshold) -> Thresholds:
    """The thresholds that a user gives in the form of the task's own; a label without one keeps its
    own. Raises ConfigError for labels that the task has not, or where they cannot take effect.
    """
    if threshold is None:
        return task.thresholds
    multi_label = task.problem_type == MULTI_LABEL
    if isinstance(threshold, Mapping):
        for name in threshold:
            if name not in task.labels:
                hint = did_you_mean(str(name), task.labels)
                raise ConfigError(f"threshold names the label {name!r}: no such label.{hint}")
        if not multi_label and (len(task.labels) != 2 or len(threshold) != 1):
            raise ConfigError(
                "A threshold of a label is for models with several labels per text, or for one of "
                f"two labels; this one has {listed(task.labels, 5)}, one per text."
            )
        own = task.thresholds or (0.5,) * len(task.labels)
        named = [threshold.get(label) for label in task.labels]
        if multi_label:
            named = [old if new is None else new for old, new in zip(own, named, strict=True)]
        return tuple(named)
    if not multi_label:
        raise ConfigError(
            "Of one label per text a threshold needs the label that is given above it: "
            f"--threshold {task.labels[-1]}={threshold:g}, of two labels."
        )
    return (threshold,) * len(task.labels)


def with_thresholds(task: Task, threshold: Threshold) -> Task:
    """The task with thresholds as `thresholds_by_output` says."""
    by_output = thresholds_by_output(task, threshold)
    return replace(task, thresholds=by_output)  # type: ignore[type-var]  # a Protocol


def check_answer(task: Task, top_k: int | None, threshold: Threshold) -> None:
    """Raise ConfigError for a top_k or threshold that is no number of labels or probability, or
    cannot take effect.
    """
    if top_k is not None and not (type(top_k) is int and top_k >= 1):
        raise ConfigError(f"top_k is {top_k!r}; expected a number of labels, 1 or more, or 'all'.")
    by_label = isinstance(threshold, Mapping)
    for number in threshold.values() if isinstance(threshold, Mapping) else [threshold]:
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        if number is not None and not (is_number and 0 <= number <= 1):
            raise ConfigError(f"threshold is {number!r}; expected a probability from 0 to 1.")
    if task.problem_type == REGRESSION and (top_k, threshold) != (None, None):
        raise ConfigError("top_k and threshold are for labels; this model predicts a number.")
    if threshold is not None and top_k is not None and top_k >= len(task.labels):
        raise ConfigError("A threshold cannot take effect where every label is given (top_k all).")
    if by_label:
        thresholds_by_output(task, threshold)
        if top_k is not None and task.problem_type == SINGLE_LABEL:
            raise ConfigError(
                "A threshold of a label chooses the answer, and top_k gives the most probable "
                "labels: leave one of them out."
            )


def describe_thresholds(task: Task) -> str:
    """A sentence on the thresholds that a model comes with; "" if it has none."""
    pairs = zip(task.thresholds, task.labels, strict=False)
    given = [(threshold, label) for threshold, label in pairs if threshold is not None]
    if not given:
        return ""
    if task.problem_type == MULTI_LABEL:
        low, high = min(given)[0], max(given)[0]
        what = f"A label is given above its own threshold, {low:.3g} to {high:.3g}"
    else:
        threshold, label = given[0]
        what = f"The answer is {quoted(label)} above a probability of {threshold:.3g}"
    return (
        f"{what}, as stored in the model (--tune_thresholds of its training); --threshold "
        "replaces it."
    )


TASK_CLASSES: dict[str, type[SingleLabel] | type[MultiLabel] | type[Regression]] = {
    task.problem_type: task for task in (SingleLabel, MultiLabel, Regression)
}


def create_task(
    config: TaskConfig, labels: LabelStats, model_labels: tuple[str, ...] | None = None
) -> Task:
    """The task that the labels of the training split define.

    config: the section `task` of the settings. labels: `collect_stats(...).labels`. model_labels:
    the labels of the pretrained model's head, None if it has none.

    Returns a SingleLabel, MultiLabel or Regression: it encodes labels, and computes the loss from
    logits (N, O), O outputs. Raises ConfigError for settings that do not fit the labels, DataError
    for labels of which no task can be made, such as one label only.

    The order of the outputs is --label_names, else that of the data set (labels.class_names), else
    that of the model's own head if it was trained on just these labels (model_labels), else sorted:
    whole numbers by value, other labels by code point.
    """
    named: LabelNames | None = None
    if config.label_names is not None and not is_multi_hot(labels.values):
        named = read_label_names(config.label_names, labels.names)
    given = labels.class_names if named is None else (*named.codes, *named.names)
    rows_of = dict(zip(labels.values, labels.counts, strict=True))
    known = given or _if_same(model_labels, labels.values)
    problem_type, reason = infer_problem_type(config.problem_type, rows_of, known, labels.locate)
    _check_calibration(config, problem_type)
    if labels.class_names:
        reason = ""
    if config.label_smoothing_factor and problem_type != SINGLE_LABEL:
        raise ConfigError(
            f"--label_smoothing_factor is for single-label tasks; this is {problem_type}."
        )
    if problem_type == REGRESSION:
        if config.class_weights or config.label_names:
            raise ConfigError(
                "--class_weights and --label_names are for classification; this is regression."
            )
        return Regression((labels.column,), reason=reason)

    multi_hot = (
        problem_type == MULTI_LABEL and labels.class_names is None and is_multi_hot(labels.values)
    )
    codes: tuple[str, ...] = ()
    if multi_hot:
        names = _multi_hot_names(len(labels.values[0]), config.label_names)
    elif named is not None and named.codes:
        names, codes = tuple(named.names), tuple(named.codes)
        reason = f"{reason} {_describe_unused(names, codes, labels)}".strip()
    else:
        order = named and named.names, labels.class_names, model_labels
        names = _label_order(labels.names, *order)
    if problem_type == MULTI_LABEL:
        unweighted = MultiLabel(names, reason=reason, multi_hot=multi_hot, codes=codes)
        return _with_positive_weights(unweighted, config, labels)
    if len(names) < 2:
        raise DataError(_describe_one_label(names[0], labels))
    num_rows = sum(labels.counts)
    if given is None and num_rows >= 50 and len(labels.values) > num_rows / 2:
        raise DataError(
            f"Column {labels.column!r} has {len(labels.values):,} different labels in {num_rows:,} "
            "rows; is it the column of the labels? If it is, list them: --label_names."
        )
    if config.tune_thresholds and len(names) != 2:
        raise ConfigError(
            "--tune_thresholds is for several labels per text, or for two labels; this task has "
            f"{len(names):,} labels, one per text."
        )
    task = SingleLabel(names, (), config.label_smoothing_factor, reason=reason, codes=codes)
    return _with_class_weights(task, config, labels)


def _check_calibration(config: TaskConfig, problem_type: str) -> None:
    """Raise ConfigError for --calibrate and --tune_thresholds of a task without probabilities, and
    for a score that is not for the task.
    """
    names = [name for name in ("calibrate", "tune_thresholds") if getattr(config, name)]
    if names and problem_type == REGRESSION:
        raise ConfigError(f"--{names[0]} is for classification; this is regression.")
    if config.tune_thresholds:
        score = parse_threshold_score(config.threshold_for)
        if problem := score.problem(problem_type == MULTI_LABEL):
            raise ConfigError(problem)


def _describe_unused(names: tuple[str, ...], codes: tuple[str, ...], labels: LabelStats) -> str:
    """A sentence on --label_names that no row has, or ""."""
    present = {*map(LabelIndex(names, codes).find, labels.names)}
    unused = [repr(code) for output, code in enumerate(codes) if output not in present]
    return f"No row has the label {listed(unused, 3)} of --label_names." if unused else ""


def _describe_one_label(name: str, labels: LabelStats) -> str:
    problem = (
        f"The training split has only the label {quoted(name)} in column {labels.column!r}; "
        "expected at least two."
    )
    if labels.limit is None:
        return problem
    return (
        f"{problem} --max_train_samples takes the first {labels.limit:,} rows: if rows are "
        "sorted by label, as those of a folder are, shuffle the file or take more."
    )


def _with_class_weights(task: SingleLabel, config: TaskConfig, labels: LabelStats) -> SingleLabel:
    rows = np.zeros(len(task.labels))  # rows that have the label
    for value, count in zip(labels.values, labels.counts, strict=True):
        rows[task.encode_label(value)] += count
    balanced = sum(labels.counts) / (len(task.labels) * np.maximum(rows, 1))
    weights = _class_weights(config.class_weights, task.labels, balanced)
    if weights and not rows @ np.array(weights):
        raise ConfigError(
            f"--class_weights {' '.join(config.class_weights or ())}: no training row has a label "
            "with a weight above 0, and nothing would be learned; the order is: "
            f"{_shown(task.labels)}."
        )
    return replace(task, class_weights=weights)


def _with_positive_weights(task: MultiLabel, config: TaskConfig, labels: LabelStats) -> MultiLabel:
    if not task.labels:
        raise DataError(
            f"No row of the training split has a label in {labels.column!r}; expected at least one "
            "label."
        )
    positive = np.zeros(len(task.labels))  # rows that have the label
    for value, count in zip(labels.values, labels.counts, strict=True):
        positive += count * np.array(task.encode_label(value))
    if not positive.any():
        raise DataError(
            f"No row of the training split has one of the labels {listed(task.labels, 10)}; "
            "expected at least one label."
        )
    balanced = (sum(labels.counts) - positive) / np.maximum(positive, 1)
    weights = _class_weights(config.class_weights, task.labels, balanced)
    return replace(task, positive_weights=weights)


def _multi_hot_names(outputs: int, label_names: list[str] | None) -> tuple[str, ...]:
    """The names of the positions in lists of zeros and ones."""
    positions = list(map(str, range(outputs)))
    if label_names is None:
        return tuple(positions)
    name_of = dict(item.split("=", 1) for item in label_names if "=" in item)
    if len(name_of) == len(label_names) and name_of.keys() == {*positions}:
        label_names = [name_of[position] for position in positions]  # 0=mild 1=severe
    elif len(name_of) == len(label_names) and all(map(str.isdecimal, name_of)):
        raise ConfigError(
            f"--label_names has names for {listed([*name_of], 5)}; the positions in lists of zeros "
            f"and ones are 0 to {outputs - 1}."
        )
    if len(label_names) != outputs:
        raise ConfigError(
            f"--label_names has {len(label_names)} names; the lists of zeros and ones have "
            f"{outputs} entries."
        )
    return _label_order([], label_names, None, None)


def task_of_model(
    problem_type: str | None,
    labels: Sequence[str],
    codes: Sequence[str] = (),
    thresholds: Any = None,
) -> Task:
    """The task that a trained classifier's config.json states; raises ModelError.

    codes: what files may have instead of each label, from its training's --label_names.
    thresholds: by label, of --tune_thresholds.
    """
    task = _task_of_model(problem_type, labels, codes)
    if not thresholds:
        return task
    try:
        if not isinstance(thresholds, dict):
            raise ConfigError(f"expected numbers by label, found {excerpt_of(thresholds)}.")
        check_answer(task, None, thresholds)
        return with_thresholds(task, thresholds)
    except ConfigError as error:
        raise ModelError(
            f"The thresholds of the model (bertdist.calibration in config.json): {error}"
        ) from None


def _task_of_model(problem_type: str | None, labels: Sequence[str], codes: Sequence[str]) -> Task:
    if problem_type is None:  # not trained by bertdist: what `pipeline` assumes of it
        kind: type[SingleLabel | MultiLabel | Regression]
        kind = Regression if len(labels) == 1 else SingleLabel
        return kind(tuple(labels), codes=tuple(codes))
    if problem_type not in TASK_CLASSES:
        hint = did_you_mean(problem_type, TASK_CLASSES)
        raise ModelError(f"The model's problem_type is {problem_type!r}.{hint}")
    if problem_type == MULTI_LABEL:
        return MultiLabel(tuple(labels), multi_hot=not codes, codes=tuple(codes))
    return TASK_CLASSES[problem_type](tuple(labels), codes=tuple(codes))


def _if_same(model_labels: tuple[str, ...] | None, values: Sequence[Any]) -> tuple[str, ...] | None:
    """The model's labels, if they are those of the training split."""
    if model_labels is None or any(isinstance(value, tuple) for value in values):
        return None
    index = LabelIndex(model_labels)
    return (
        model_labels if {index.find(v) for v in values} == set(range(len(model_labels))) else None
    )


def _label_order(
    distinct: Sequence[str],
    given: list[str] | None,
    class_names: tuple[str, ...] | None,
    model_labels: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """Names of the outputs. given: --label_names."""
    if given is not None:
        if len(set(given)) < len(given):
            raise ConfigError(f"--label_names repeats a name: {' '.join(given)}.")
        index = LabelIndex(given)
        if missing := sorted(name for name in distinct if index.find(name) is None):
            raise ConfigError(
                f"--label_names lacks {quoted(missing[0])}, which the training split has."
                f"{describe_near_miss(missing[0], given) or did_you_mean(missing[0], given)}"
            )
        return tuple(given)
    if class_names is not None:
        return class_names
    names = set(label_names(distinct).values())
    if model_labels is not None and (order := match_labels(names, model_labels)) is not None:
        return order
    by_value = all(map(is_integer, names))
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
            f"the order is: {_shown(labels)}."
        )
    return tuple(float(weight) for weight in weights)


def _shown(labels: tuple[str, ...]) -> str:
    return listed([excerpt(name, 40) for name in labels], 100)


def label_names_of(task: Task) -> list[str]:
    """--label_names of a run with the same outputs."""
    if not task.codes:
        return list(task.labels)
    return [f"{code}={label}" for code, label in zip(task.codes, task.labels, strict=True)]


def _unknown_label(label: str, labels: Sequence[str], some: str) -> DataError:
    hint = describe_near_miss(label, labels) or did_you_mean(label, labels)
    return DataError(
        f"unknown label {quoted(label)}; expected {some} of the training labels.{hint}"
    )
