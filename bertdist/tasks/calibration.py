"""Honest probabilities: a temperature for the logits, thresholds for the labels.

Both are fitted on rows with labels that the weights were not trained on.

- `fit_temperature`: one number T by which all logits are divided, of the lowest negative
  log-likelihood (Guo et al. 2017, https://arxiv.org/abs/1706.04599). Multi-label tasks have one T
  for all labels too: a rare label has too few positive rows for a number of its own, and one T
  keeps the order of the labels of a row. No answer changes, but for logits that are equal to
  rounding.
- `fit_thresholds`: of each label the probability above which it is given (multi-label), or that of
  the positive one of two labels, so that a score is highest.

What was fitted is a dict, `calibration` in evaluation.json and in the model's config.json:

    {"temperature": 1.83, "threshold_for": "f1", "thresholds": {"joy": 0.31, ...},
     "fitted_on": {"data": "dev.tsv", "rows": 872}, "in_sample": true,
     "before": {"nll": 0.41, "ece": 0.08, "f1": 0.61}, "after": {...}, "notes": [...]}

temperature is null where none was asked for, thresholds are {}. before and after are of the rows of
this evaluation.json; in_sample says whether they are those of the fit, which flatter both numbers.

Legend: N rows, O outputs; logits and probabilities (N, O), references (N,) ids or (N, O) 0/1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from bertdist.core.errors import ConfigError, listed
from bertdist.core.terminal import excerpt_of
from bertdist.core.thresholds import ThresholdScore, parse_threshold_score
from bertdist.core.types import Array
from bertdist.tasks.labels import REGRESSION
from bertdist.tasks.row_scores import CALIBRATION_BINS, calibration_gaps
from bertdist.tasks.tasks import Task, mean_loss

LOWEST, HIGHEST = 0.05, 20.0  # temperatures
DEFAULT = 0.5  # threshold
FEW = 10  # positive rows: with fewer a threshold depends on single rows
_CHUNK = 1 << 22  # logits that are float64 at the same time


# ---- Temperature


def fit_temperature(logits: Array, references: Array) -> tuple[float, str]:
    """The temperature of the lowest negative log-likelihood, and a sentence where it is no minimum.

    The likelihood is convex in 1 / T, so its slope says exactly where there is none: if every row
    (multi-label: every label of every row) is right it grows for ever as T goes to 0, and if the
    logits tell nothing, as T goes to infinity. Then it is 1, which changes nothing. A minimum
    outside of LOWEST..HIGHEST is moved there.
    """
    from scipy.optimize import brentq  # slow to import

    rows = f"{len(logits):,} row{'s' * (len(logits) != 1)}"
    if _slope(logits, references, 0.0) >= 0:
        return 1.0, (
            f"The logits say nothing about the labels of the {rows}: equal probabilities would be "
            "more likely. The temperature is 1."
        )
    if _slope(logits, references, math.inf) <= 0:
        return 1.0, (
            f"All answers for the {rows} are right, so that no temperature is the best one: 1."
        )

    def slope(log_t: float) -> float:
        return _slope(logits, references, math.exp(-log_t))

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(low) <= 0:
        return LOWEST, f"The temperature of the {rows} is below {LOWEST:g}, which is used."
    if slope(high) >= 0:
        return HIGHEST, f"The temperature of the {rows} is above {HIGHEST:g}, which is used."
    return math.exp(brentq(slope, low, high, xtol=1e-12)), ""


def _slope(logits: Array, references: Array, beta: float) -> float:
    """The derivative of the negative log-likelihood by beta = 1 / T; inf: its limit."""
    total, chunk = 0.0, max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(logits), chunk):
        z = logits[start : start + chunk].astype(np.float64)
        truth = references[start : start + chunk]
        if truth.ndim == 1:
            right = z[np.arange(len(z)), truth]
            top = z.max(1, keepdims=True)
            if math.isinf(beta):
                mean = top[:, 0]
            else:
                weights = np.exp(beta * (z - top))
                mean = (weights * z).sum(1) / weights.sum(1)
            total += float((mean - right).sum())
        else:
            margins = np.where(truth > 0, z, -z)
            share = (margins < 0) if math.isinf(beta) else _sigmoid(-beta * margins)
            total -= float((margins * share).sum())
    return total


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    values: Array = np.where(x < 0, small, 1.0) / (1 + small)
    return values


def calibration_error(references: Array, probabilities: Array) -> float:
    """The expected calibration error, in bins as `ece` of --metrics.

    Single-label: of the predicted label. Multi-label: of all labels of all rows together, each by
    its own probability.
    """
    if references.ndim == 1:
        bins, gaps = calibration_gaps(references, probabilities)
    else:
        flat = probabilities.ravel().astype(np.float64)
        bins = np.ceil(flat * CALIBRATION_BINS).astype(np.int64) - 1
        bins, gaps = bins.clip(0, CALIBRATION_BINS - 1), flat - references.ravel()
    return float(np.abs(np.bincount(bins, gaps)).sum() / len(gaps))


# ---- Thresholds


def fit_thresholds(
    probabilities: Array, references: Array, score: ThresholdScore
) -> tuple[list[float], Array]:
    """The threshold of each label, and (O,) whether it was fitted.

    probabilities, references: (N, O), the latter 0/1. A label that no row has, or every row, keeps
    DEFAULT, and so does one whose score does not get higher. A threshold is between two observed
    probabilities, a float32; of equal scores that nearest to DEFAULT, then the higher one.
    """
    columns = range(probabilities.shape[1])
    positives = (references > 0).sum(0)
    fitted = (positives > 0) & (positives < len(references))
    cuts = [_Cuts(probabilities[:, i], references[:, i] > 0) for i in columns]
    if score.name == "f1_micro":
        chosen = _micro_cuts(cuts, fitted)
    else:
        chosen = [_best_cut(cut, cut.scores(score)) for cut in cuts]
    found = [cut.threshold(i) for cut, i in zip(cuts, chosen, strict=True)]
    return [x if is_fitted else DEFAULT for x, is_fitted in zip(found, fitted, strict=True)], fitted


class _Cuts:
    """All ways to divide the rows by the probability of one label: cut i predicts those from its
    i-th distinct probability on.
    """

    def __init__(self, probabilities: Array, truth: Array) -> None:
        values, inverse = np.unique(probabilities.astype(np.float32), return_inverse=True)
        counts = np.bincount(inverse), np.bincount(inverse, truth).astype(np.int64)
        self.predicted, self.hits = (np.append(x[::-1].cumsum()[::-1], 0) for x in counts)
        self.rows, self.positives = len(truth), int(truth.sum())
        low, high = np.append(np.float32(0), values), np.append(values, np.float32(1))
        middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
        self.thresholds = np.where(middle < high, middle, low)
        self.default = int(np.searchsorted(values, np.float32(DEFAULT), side="right"))
        if values[0] == 0:  # nothing is above it and below 0
            self.predicted, self.hits = self.predicted.copy(), self.hits.copy()
            self.predicted[0], self.hits[0] = self.predicted[1], self.hits[1]
            self.thresholds[0] = self.thresholds[1]

    def threshold(self, cut: int) -> float:
        return DEFAULT if cut == self.default else float(self.thresholds[cut])

    def scores(self, score: ThresholdScore) -> Array:
        """Of each cut; 0 / 0 is 0, and -1 where a condition is not met."""
        return threshold_score(score, self.hits, self.predicted, self.positives, self.rows)


def _best_cut(cuts: _Cuts, scores: Array) -> int:
    best = np.flatnonzero(scores == scores.max())
    if cuts.default in best:
        return cuts.default
    thresholds = cuts.thresholds[best].astype(np.float64)
    return int(best[np.lexsort((-thresholds, np.abs(thresholds - DEFAULT)))[0]])


def _micro_cuts(cuts: Sequence[_Cuts], fitted: Array) -> list[int]:
    """The cuts of the highest F1 of all labels together, by Dinkelbach's method: for the F1 reached
    so far, each label by itself takes the cut of the most 2 x hits - F1 x predicted.
    """
    positives, reached = sum(cut.positives for cut in cuts), -1.0
    chosen = before = [cut.default for cut in cuts]
    while True:
        hits = sum(int(cut.hits[i]) for cut, i in zip(cuts, chosen, strict=True))
        predicted = sum(int(cut.predicted[i]) for cut, i in zip(cuts, chosen, strict=True))
        f1 = 2 * hits / max(1, predicted + positives)
        if f1 <= reached:
            return before
        reached, before = f1, chosen
        chosen = [
            _best_cut(cut, 2 * cut.hits - f1 * cut.predicted) if is_fitted else cut.default
            for cut, is_fitted in zip(cuts, fitted, strict=True)
        ]


def threshold_score(
    score: ThresholdScore, hits: Any, predicted: Any, positives: Any, rows: int
) -> Array:
    """The score of one label, from counts: true positives, predicted rows, rows that have it."""
    hits, predicted = np.asarray(hits, np.float64), np.asarray(predicted, np.float64)
    false, missed = predicted - hits, positives - hits
    right_without = rows - predicted - missed
    recall, precision = _ratio(hits, positives + 0 * hits), _ratio(hits, predicted)
    values = _ratio(2 * hits, predicted + positives)  # f1
    if score.name == "precision_at_recall":
        values = np.where(recall >= score.least, precision, -1.0)
    elif score.name == "recall_at_precision":
        values = np.where((precision >= score.least) & (predicted > 0), recall, -1.0)
    elif score.name == "accuracy":
        values = (hits + right_without) / rows
    elif score.name == "balanced_accuracy":
        values = (recall + _ratio(right_without, right_without + false)) / 2
    elif score.name == "matthews_correlation":
        product = hits * right_without - false * missed
        sides = predicted * positives, (rows - predicted) * (rows - positives)
        values = _ratio(product, np.sqrt(sides[0]) * np.sqrt(sides[1]))
    return values


def _ratio(above: Array, below: Array) -> Array:
    values: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return values


def score_of_predictions(score: ThresholdScore, predictions: Array, references: Array) -> float:
    """The score at the predictions (N, O) 0/1: the mean over labels, f1_micro over all together.

    Labels that do not meet a condition (the least recall) count 0.
    """
    hits = ((predictions > 0) & (references > 0)).sum(0)
    counts = hits, (predictions > 0).sum(0), (references > 0).sum(0)
    if score.name == "f1_micro":
        all_hits, predicted, positives = (x.sum() for x in counts)
        return float(2 * all_hits / max(1, predicted + positives))
    of_labels = threshold_score(score, *counts, len(references))
    if score.least:
        of_labels = np.maximum(of_labels, 0.0)
    return float(of_labels.mean())


# ---- Of a task


def tune(
    task: Task, logits: Tensor, references: Array, threshold_for: str, positive: int
) -> tuple[Task, list[str]]:
    """The task with thresholds that maximise a score, and notes.

    threshold_for: as the flag; positive: the output that is the positive one of two labels.
    """
    score = parse_threshold_score(threshold_for)
    probabilities = task.predict(logits)[1]
    columns = [positive] if references.ndim == 1 else list(range(len(task.labels)))
    truth = _columns(references, positive)
    found, fitted = fit_thresholds(probabilities[:, columns], truth, score)
    thresholds: list[float | None] = [None] * len(task.labels)
    for column, threshold in zip(columns, found, strict=True):
        thresholds[column] = threshold
    names = [task.labels[column] for column in columns]
    tuned = replace(task, thresholds=tuple(thresholds))  # type: ignore[type-var]  # a Protocol
    return tuned, list(_tuning_notes(names, truth, fitted))


def _columns(labels: Array, positive: int) -> Array:
    """(N, O) 0/1 as they are; of two labels (N, 1): whether it is the positive one."""
    return (labels == positive).astype(np.int64)[:, None] if labels.ndim == 1 else labels


def _tuning_notes(labels: Sequence[str], truth: Array, fitted: Array) -> Iterable[str]:
    rows, of = (truth > 0).sum(0), f"of {len(labels):,} labels" * (len(labels) > 1)
    if lacking := [label for label, is_fitted in zip(labels, fitted, strict=True) if not is_fitted]:
        yield (
            f"The threshold {DEFAULT:g} stays for {len(lacking):,} {of} ({listed(lacking, 5)}): no "
            "row has the label, or every row has it."
        ).replace("  ", " ")
    fewest = np.minimum(rows, len(truth) - rows)
    few = [label for label, n in zip(labels, fewest, strict=True) if 0 < n < FEW]
    if few:
        yield (
            f"Fewer than {FEW} rows with or without {len(few):,} {of} ({listed(few, 5)}): their "
            "thresholds depend on single rows."
        ).replace("  ", " ")


def measure(
    task: Task, logits: Tensor, references: Array, threshold_for: str | None, positive: int
) -> dict[str, float]:
    """nll, ece and, with thresholds, their score: what before and after have."""
    predictions, probabilities = task.predict(logits)
    measured = {
        "nll": mean_loss(task, logits, references),
        "ece": calibration_error(references, probabilities),
    }
    if threshold_for is not None:
        score = parse_threshold_score(threshold_for)
        columns = _columns(predictions, positive), _columns(references, positive)
        measured[score.name] = score_of_predictions(score, *columns)
    return measured


def measure_again(
    fitted: Mapping[str, Any], task: Task, logits: Tensor, references: Array, positive: int
) -> dict[str, Any]:
    """What was fitted, with before and after of other rows.

    task: with the thresholds in use. logits: of the model into which the temperature is folded.
    positive: of two labels without a threshold; else it is the label that was fitted.
    """
    if references.ndim == 1:
        with_one = (i for i, limit in enumerate(task.thresholds) if limit is not None)
        positive = next(with_one, positive)
    plain, threshold_for = without_thresholds(task), fitted.get("threshold_for")
    uncalibrated = (logits.double() * float(fitted.get("temperature") or 1.0)).float()
    return {
        **{name: value for name, value in fitted.items() if name != "notes"},
        "in_sample": False,
        "before": measure(plain, uncalibrated, references, threshold_for, positive),
        "after": measure(task, logits, references, threshold_for, positive),
    }


def check_calibration(fitted: Any) -> dict[str, Any]:
    """What a config.json has as `calibration`, {} for nothing. Raises ConfigError if it was changed
    into what no fit gives.
    """
    if fitted is None:
        return {}
    try:
        temperature, threshold_for = fitted["temperature"], fitted["threshold_for"]
        numbers = [fitted[x][y] for x in ("before", "after") for y in ("nll", "ece")]
        numbers += [fitted["fitted_on"]["rows"], 1.0 if temperature is None else temperature]
        names = fitted["fitted_on"]["data"], *fitted["notes"]
        is_sound = all(math.isfinite(x) for x in numbers) and numbers[-1] > 0
        is_sound &= all(isinstance(name, str) for name in names)
        is_sound &= isinstance(fitted["thresholds"], dict)
        if threshold_for is not None:
            score = parse_threshold_score(threshold_for).name
            is_sound &= all(math.isfinite(fitted[x][score]) for x in ("before", "after"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"it is incomplete ({type(error).__name__}: {error}).") from None
    if not is_sound:
        raise ConfigError(f"{excerpt_of(fitted)} is not what --calibrate writes.")
    return dict(fitted)


def without_thresholds(task: Task) -> Task:
    """The task with its usual answers."""
    if task.problem_type == REGRESSION:
        return task
    return replace(task, thresholds=())  # type: ignore[type-var]  # a Protocol


def calibration_notes(report: Mapping[str, Any]) -> list[str]:
    """What the `calibration` of an evaluation.json says, in sentences."""
    entry = report.get("calibration")
    if not isinstance(entry, Mapping):
        return []
    before, after, of = entry["before"], entry["after"], entry["fitted_on"]
    rows = f"{of['rows']:,} rows of {of['data']}"
    changes, parts, notes = [], [], list(entry.get("notes", []))
    if entry["temperature"] not in (None, 1):
        parts.append(f"temperature {entry['temperature']:.3g}, folded into the output layer")
        changes += [(name.upper(), name) for name in ("nll", "ece")]
    if entry["thresholds"]:
        parts.append(f"thresholds for the highest {entry['threshold_for']}")
        name = parse_threshold_score(entry["threshold_for"]).name
        changes.append((name, name))
    if not parts:
        return notes
    shown = ", ".join(f"{title} {before[x]:.4f} -> {after[x]:.4f}" for title, x in changes)
    where = (
        " on these rows"
        if not entry.get("in_sample")
        else (
            ". These are the rows of the fit, which flatter such numbers; --test_file or bertdist "
            "evaluate measures them on other rows"
        )
    )
    return [f"Fitted on {rows}: {', and '.join(parts)}. {shown}{where}.", *notes]
