"""What a report computes of scored rows: calibration, precision and recall, groups of rows.

Numbers that evaluation.json has are taken from there; these are the others. Each is compared with
scikit-learn in tests/unit/reporting/test_analysis.py.

Legend: N rows, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bertdist.core.types import Array
from bertdist.reporting.run_folder import ScoredRows
from bertdist.tasks.row_scores import CALIBRATION_BINS

LENGTH_BINS = 8  # quantiles of the number of tokens
MOST_SLICES = 40  # values of --slice_column that are shown, the most frequent ones
CURVE_POINTS = 200  # of a precision-recall curve
RESAMPLED_ROWS = 2e7  # rows x resamples of all groups together


# ---- Calibration


@dataclass(frozen=True)
class Reliability:
    """How probabilities compare with what is true, in bins of equal width."""

    edges: Array  # (bins + 1,)
    rows: Array  # (bins,) how many probabilities are in each bin
    confidence: Array  # (bins,) their mean; NaN where there are none
    accuracy: Array  # (bins,) how many of them came true; NaN where there are none
    low: Array  # (bins,) the 95% interval of it (Wilson)
    high: Array
    variance: Array  # (bins,) of the number that would come true, if the probabilities were honest

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| over rows."""
        gaps = np.abs(np.nan_to_num(self.accuracy) - np.nan_to_num(self.confidence))
        return float((gaps * self.rows).sum() / max(1, self.rows.sum()))

    @cached_property
    def ece_by_chance(self) -> float:
        """The ECE that honest probabilities of these rows would exceed in 5% of all draws: rows are
        right by chance, and a bin of few rows is never exactly as probable as it says.
        """
        total, rng = max(1, self.rows.sum()), np.random.default_rng(0)
        gaps = np.abs(rng.normal(0, np.sqrt(self.variance), (2_000, len(self.rows))))
        return float(np.quantile(gaps.sum(1) / total, 0.95))

    @property
    def mean_confidence(self) -> float:
        """Over all rows."""
        return float(np.nansum(self.confidence * self.rows) / max(1, self.rows.sum()))

    @property
    def mean_accuracy(self) -> float:
        """Over all rows."""
        return float(np.nansum(self.accuracy * self.rows) / max(1, self.rows.sum()))


def reliability(rows: ScoredRows) -> Reliability:
    """Single-label: the probability of the predicted label, and whether it is right. Multi-label:
    every probability, and whether the row has that label. Rows without a label are left out.
    """
    if rows.is_multi_label:
        probabilities, right = rows.probabilities.reshape(-1), rows.truth.reshape(-1)
    else:
        known = rows.truth >= 0
        probabilities = rows.probabilities[known].max(1, initial=0)
        # also where a tuned threshold gives the other one of two labels
        right = rows.probabilities[known].argmax(1) == rows.truth[known]
    return reliability_of(probabilities, right)


def reliability_of(probabilities: Array, right: Array) -> Reliability:
    """probabilities, right: (N,). Bins are ( ], as those of the metric ece."""
    finite = np.isfinite(probabilities)
    values, hits = probabilities[finite].astype(np.float64), right[finite].astype(np.float64)
    bins = (np.ceil(values * CALIBRATION_BINS).astype(np.int64) - 1).clip(0, CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    true = np.bincount(bins, hits, CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, values, CALIBRATION_BINS) / counts
        accuracy = true / counts
    low, high = wilson(true, counts)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    variance = np.bincount(bins, values * (1 - values), CALIBRATION_BINS)
    return Reliability(edges, counts, confidence, accuracy, low, high, variance)


def wilson(true: Array, rows: Array) -> tuple[Array, Array]:
    """The 95% interval of shares true / rows, NaN where there are no rows.

    https://www.itl.nist.gov/div898/handbook/prc/section2/prc241.htm
    """
    z = 1.959963984540054
    with np.errstate(invalid="ignore", divide="ignore"):
        share = true / rows
        middle = share + z * z / (2 * rows)
        width = z * np.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
        scale = 1 + z * z / rows
        # of none, or all, of the rows rounding may leave the end beside 0 or 1
        return ((middle - width) / scale).clip(0, 1), ((middle + width) / scale).clip(0, 1)


# ---- Precision and recall


@dataclass(frozen=True)
class PrecisionRecall:
    """A curve from recall 0 to 1, of at most CURVE_POINTS thresholds."""

    name: str
    precision: Array
    recall: Array
    average_precision: float
    rows: int  # with the label


def precision_recall(name: str, truth: Array, scores: Array) -> PrecisionRecall:
    """truth, scores: (N,). As `sklearn.metrics.precision_recall_curve`, whose area by steps is
    `average_precision_score`; that area is of all thresholds, the curve of some of them.
    """
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], truth[order].astype(np.int64)
    last = np.flatnonzero(np.r_[np.diff(sorted_scores) != 0, True]) if len(scores) else order
    true = np.cumsum(hits)[last]
    positives = int(hits.sum())
    precision = true / (last + 1)
    recall = true / max(1, positives)
    area = float((np.diff(np.r_[0.0, recall]) * precision).sum())
    # As the curve's steps are: from (0, 1) on
    precision, recall = np.r_[1.0, precision], np.r_[0.0, recall]
    if len(recall) > CURVE_POINTS:
        at = np.searchsorted(recall, np.linspace(0, 1, CURVE_POINTS)).clip(0, len(recall) - 1)
        at = np.unique(np.r_[0, at, len(recall) - 1])
        precision, recall = precision[at], recall[at]
    return PrecisionRecall(name, precision, recall, area, positives)


def one_vs_rest(rows: ScoredRows, label: int) -> tuple[Array, Array]:
    """(N,) whether a row has a label, and (N,) its probability."""
    truth = rows.truth[:, label] if rows.is_multi_label else rows.truth == label
    return truth, rows.probabilities[:, label]


def micro(rows: ScoredRows) -> tuple[Array, Array]:
    """(N x L,) the same of all labels together."""
    if rows.is_multi_label:
        return rows.truth.reshape(-1), rows.probabilities.reshape(-1)
    truth = rows.truth[:, None] == np.arange(len(rows.labels))
    return truth.reshape(-1), rows.probabilities.reshape(-1)


# ---- Confusions


def confusion_counts(rows: ScoredRows) -> Array:
    """(L, L) rows of label i predicted as j, where evaluation.json has no matrix."""
    labels = len(rows.labels)
    known = rows.truth >= 0
    pairs = rows.truth[known].astype(np.int64) * labels + rows.predicted[known]
    return np.bincount(pairs, minlength=labels * labels).reshape(labels, labels)


def binary_counts(rows: ScoredRows) -> Array:
    """(L, 4) of multi-label rows, per label: true positives, false positives, false negatives, true
    negatives.
    """
    truth, predicted = rows.truth, rows.predicted
    both, positive, found = (x.sum(0) for x in (truth & predicted, truth, predicted))
    columns = [both, found - both, positive - both, len(rows) - positive - found + both]
    return np.stack(columns, axis=1)


def mislabelled(rows: ScoredRows) -> Array:
    """(N,) bool: rows that look mislabelled, by confident learning: the probability of another
    label is at least the mean of that label's own rows. https://arxiv.org/abs/1911.00068

    Of several labels per text each is judged by itself, as given or not given. None for numbers.
    """
    if rows.is_regression or not len(rows):
        return np.zeros(len(rows), bool)
    if rows.is_multi_label:
        of_any: Array = np.logical_or.reduce(_wrongly_given_or_missing(rows), axis=1)
        return of_any
    known = rows.truth >= 0
    truth = np.where(known, rows.truth, 0)
    own = rows.probabilities[np.arange(len(rows)), truth].astype(np.float64)
    counts = np.bincount(truth[known], minlength=len(rows.labels))
    sums = np.bincount(truth[known], own[known], len(rows.labels))
    threshold = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    # A tuned threshold may give the less probable one of two labels.
    answered = rows.probabilities[np.arange(len(rows)), rows.predicted]
    found: Array = known & (rows.predicted != truth) & (answered >= threshold[rows.predicted])
    return found


def _wrongly_given_or_missing(rows: ScoredRows) -> Array:
    """(N, L) bool: answers that differ from the truth with at least the probability that rows of
    that answer have on average.
    """
    found = np.zeros(rows.truth.shape, bool)
    for label in range(len(rows.labels)):
        given, answered = rows.truth[:, label], rows.predicted[:, label]
        sure = rows.probabilities[:, label].astype(np.float64)
        for truth, present in ((given, sure), (~given, 1 - sure)):
            if truth.any():  # else nothing is known of such rows
                contradicted = ~truth & (answered == given[truth][0])
                found[:, label] |= contradicted & (present >= present[truth].mean())
    return found


# ---- Groups of rows


@dataclass(frozen=True)
class Group:
    """The score of some rows."""

    name: str
    rows: int
    score: float | None  # None: undefined
    interval: tuple[float, float] | None
    tokens: tuple[int, int] | None = None  # fewest and most


Scoring = Callable[[Array], tuple[float | None, tuple[float, float] | None]]


def length_groups(rows: ScoredRows, score: Scoring) -> list[Group]:
    """Rows by their number of tokens, in quantile bins; equal numbers are in one bin."""
    edges = np.quantile(rows.tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="lower")
    found = []
    number = np.searchsorted(np.unique(edges), rows.tokens, side="left")
    for group in np.unique(number):
        mine = number == group
        ends = int(rows.tokens[mine].min()), int(rows.tokens[mine].max())
        name = f"{ends[0]} to {ends[1]}" if ends[0] < ends[1] else str(ends[0])
        found.append(Group(name, int(mine.sum()), *score(mine), tokens=ends))
    return found


def slice_groups(rows: ScoredRows, score: Scoring) -> tuple[list[Group], int]:
    """Rows by their value of --slice_column, the most frequent values first, and how many values
    are left out.
    """
    counts = np.bincount(rows.slices + 1, minlength=len(rows.slice_values) + 1)
    order = [int(x) for x in np.argsort(-counts, kind="stable") if counts[x]]
    found = []
    for value in order[:MOST_SLICES]:
        name = rows.slice_values[value - 1] if value else "(no value)"
        found.append(Group(name or "(empty)", int(counts[value]), *score(rows.slices == value - 1)))
    return found, max(0, len(order) - MOST_SLICES)


def truncation_groups(rows: ScoredRows, score: Scoring) -> list[Group]:
    """Rows that were truncated, and the others; none where none was."""
    if not rows.truncated.any():
        return []
    parts = {"truncated": rows.truncated, "not truncated": ~rows.truncated}
    return [
        Group(name, int(mine.sum()), *score(mine)) for name, mine in parts.items() if mine.any()
    ]


def scoring(rows: ScoredRows, positive: int = 1) -> tuple[str, Scoring]:
    """The score that groups of rows are compared by, and what computes it with its interval.

    The first built-in score of evaluation.json that does not need a positive label or a curve.
    """
    from bertdist.tasks.confidence_intervals import Arrays, bootstrap_intervals
    from bertdist.tasks.metrics import BuiltinMetric

    name = _group_score(rows)
    metric = BuiltinMetric(name, rows.problem_type, len(rows.labels), positive)
    predicted = rows.predicted.astype(np.int64) if rows.is_multi_label else rows.predicted
    truth = rows.truth.astype(np.int64) if not rows.is_regression else rows.truth
    known = np.isfinite(truth) if rows.is_regression else np.ones(len(rows), bool)
    known = known & (truth >= 0) if truth.ndim == 1 and not rows.is_regression else known
    resamples = int(np.clip(RESAMPLED_ROWS / max(1, len(rows)), 100, 400))

    def score(mine: Array) -> tuple[float | None, tuple[float, float] | None]:
        chosen = mine & known
        if not chosen.any():
            return None, None
        arrays = Arrays(predicted[chosen], rows.probabilities[chosen], truth[chosen])
        value = metric.compute(predictions=arrays.predictions, references=arrays.references)[name]
        losses = np.zeros(int(chosen.sum()))
        interval = bootstrap_intervals([name], arrays, losses, positive, resamples).get(name)
        return (value if np.isfinite(value) else None), interval

    return name, score


_GROUP_SCORES = {
    "single_label_classification": ("accuracy", "f1_macro", "f1_weighted", "f1_micro"),
    "multi_label_classification": ("f1_micro", "f1_macro", "f1_samples", "accuracy"),
    "regression": ("mae", "rmse", "mse", "pearson", "spearman"),
}


def _group_score(rows: ScoredRows) -> str:
    """The first score of evaluation.json that a group of rows has, else the usual one."""
    usual: Sequence[str] = _GROUP_SCORES[rows.problem_type]
    found = [name for name in rows.report["scores"] if name in usual]
    return found[0] if found else usual[0]


# ---- Numbers


@dataclass(frozen=True)
class Residuals:
    """Predicted and true numbers."""

    truth: Array
    predicted: Array
    shown: Array  # the rows that are drawn
    mean: float  # of predicted - true
    std: float


def residuals(rows: ScoredRows, most: int) -> Residuals:
    """Of rows with a label. At most so many are drawn: evenly spaced in the order of the truth."""
    known = np.flatnonzero(np.isfinite(rows.truth) & np.isfinite(rows.predicted))
    order = known[np.argsort(rows.truth[known], kind="stable")]
    at = np.linspace(0, len(order) - 1, min(most, len(order))).astype(np.int64)
    gaps = (rows.predicted[known] - rows.truth[known]).astype(np.float64)
    mean, std = (float(gaps.mean()), float(gaps.std())) if len(gaps) else (np.nan, np.nan)
    return Residuals(rows.truth, rows.predicted, order[at], mean, std)


def majority(rows: ScoredRows) -> dict[str, Any] | None:
    """What always giving the most frequent label would score: {"label", "accuracy"}."""
    known = rows.truth[rows.truth >= 0] if rows.truth.dtype.kind == "i" else np.zeros(0, np.int32)
    if rows.is_multi_label or rows.is_regression or not len(known):
        return None
    counts = np.bincount(known, minlength=len(rows.labels))
    return {
        "label": rows.labels[int(counts.argmax())],
        "accuracy": float(counts.max() / len(known)),
    }
