"""Labels and what a model says of the same rows -> which labels to doubt, the most doubted first.

In: targets and predictions in the form that a Task gives them (numpy). Out: `Doubts`: a score for every row, the order of doubt, and
which rows are likely to be wrong. Nothing here knows of files, models or ranks.

Probabilities should come from a model that has not learned these rows (`folds.py`): it comes to believe what it learns.

Classification is cleanlab's (confident learning, https://jair.org/index.php/jair/article/view/12125): a label is likely to be wrong where
the model is surer of another label than it is, on average, of the rows that carry that label. What each way of ranking finds is measured
in docs/decisions/0012-label-noise.md. One module, because cleanlab is a door: it is imported when it is needed, and may be missing.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bertdist.errors import ConfigError, DataError

Array = np.ndarray[Any, np.dtype[Any]]

RANKINGS = (
    "self_confidence",
    "normalized_margin",
    "confidence_weighted_entropy",
    "confident_learning",
)
DEFAULT_RANKING = "self_confidence"
FAR_OFF = 3.5  # a residual of so many robust standard deviations: Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993


class Doubts(NamedTuple):
    """What is to be said of N labels."""

    order: Array  # (N,) int64: rows, the most doubted first; each row once
    scores: Array  # (N,) float64 by row, 0 to 1: how well the label stands
    issues: Array  # (N,) bool by row: the label is likely to be wrong


def find_doubts(
    problem_type: str,
    targets: Array,
    predictions: Array,
    probabilities: Array,
    rank_by: str = DEFAULT_RANKING,
) -> Doubts:
    """Rank N rows by how much their labels are to be doubted.

    problem_type: the word of Hugging Face configs. targets, predictions: (N,) ids, (N, O) 0/1 rows, or (N,) numbers; probabilities: (N, O),
    not read for regression. rank_by: one of RANKINGS; "confident_learning" puts the rows that are likely to be wrong before all others.
    Raises ConfigError where cleanlab is missing, DataError where the model answers with what is no number.
    """
    assert rank_by in RANKINGS, rank_by
    finite = np.isfinite(predictions).reshape(len(targets), -1).all(1) & np.isfinite(
        probabilities
    ).reshape(len(targets), -1).all(1)
    if not finite.all():
        raise DataError(
            f"The model's answer to row {int(np.argmin(finite))} is not a number: its weights are damaged."
        )
    find: dict[str, Callable[..., tuple[Array, Array]]]
    find = {
        "single_label_classification": _single,
        "multi_label_classification": _multi,
        "regression": _numbers,
    }
    score_by = "normalized_margin" if rank_by == "confident_learning" else rank_by
    with (
        warnings.catch_warnings()
    ):  # cleanlab 2.9 warns of every label of a single row, which it never marks
        warnings.filterwarnings(
            "ignore", message="May not flag all label issues", category=UserWarning
        )
        scores, issues = find[problem_type](
            targets, predictions, probabilities.astype(np.float64), score_by
        )
    first = ~issues if rank_by == "confident_learning" else np.zeros(len(scores), bool)
    return Doubts(np.lexsort((np.arange(len(scores)), scores, first)), scores, issues)


def need_cleanlab() -> Any:
    """The package, with the parts that are used here; ConfigError where it is not installed."""
    try:
        import cleanlab.filter
        import cleanlab.multilabel_classification
        import cleanlab.rank
    except ImportError:
        raise ConfigError(
            "Doubting labels needs cleanlab, which is not installed: pip install bertdist[noise]."
        ) from None
    return cleanlab


def _single(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N,) ids, probabilities (N, O) -> scores (N,), issues (N,)."""
    cleanlab = need_cleanlab()
    scores = cleanlab.rank.get_label_quality_scores(targets, probabilities, method=score_by)
    if (
        len(np.unique(targets)) < 2
    ):  # cleanlab 2.9 refuses a single class: there is nothing to compare with
        return scores, predictions != targets
    # As many as confident learning counts, the least probable first: better than its other marks (docs/decisions/0012-label-noise.md).
    issues = cleanlab.filter.find_label_issues(
        targets, probabilities, filter_by="low_self_confidence", n_jobs=1
    )
    return scores, issues & (predictions != targets)


def _multi(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N, O) 0/1, probabilities (N, O) -> scores (N,), issues (N,): a row is one where any of its labels is."""
    cleanlab = need_cleanlab()
    given = targets.astype(np.int64)
    if not given.any():
        raise DataError("No row has a label; expected some that have one.")
    scores = cleanlab.multilabel_classification.get_label_quality_scores(
        _lists(given), probabilities, method=score_by
    )
    mixed = np.flatnonzero(
        given.any(0) & ~given.all(0)
    )  # labels that some rows have and others have not: cleanlab 2.9 takes no others
    issues = (predictions != given)[:, np.setdiff1d(np.arange(given.shape[1]), mixed)].any(1)
    if len(mixed):
        issues |= cleanlab.multilabel_classification.filter.find_label_issues(
            _lists(given[:, mixed]), probabilities[:, mixed], n_jobs=1
        )
    # n_jobs: cleanlab's own processes would be forks of ours, which has torch's threads.
    return scores, issues


def _lists(given: Array) -> list[list[int]]:
    """0/1 rows as cleanlab wants them: lists of ids."""
    return [np.flatnonzero(row).tolist() for row in given]


def _numbers(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets, predictions (N,) numbers -> scores (N,), issues (N,). Score 1: the middle of all residuals; 1/2: their usual size."""
    residuals = predictions.astype(np.float64) - targets
    away = np.abs(residuals - np.median(residuals))
    usual = np.median(away)
    if usual == 0:  # more than half of all rows are told exactly
        usual = away.mean() or 1.0
    return 1 / (1 + away / usual), away > FAR_OFF * 1.4826 * usual
