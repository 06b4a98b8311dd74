"""Scores of single rows: what metrics that are means over rows, and their intervals, share.

Legend, as in tasks/metrics.py: N rows, O outputs; references (N,) label ids or (N, O) 0/1,
probabilities (N, O).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from bertdist.core.types import Array

CALIBRATION_BINS = 15


def decided_labels(probabilities: Array, thresholds: Sequence[float | None]) -> Array:
    """(N,) labels, of two: the one that has a threshold where its probability is above it, else the
    other one; without thresholds the most probable one.
    """
    for positive, threshold in enumerate(thresholds):
        if threshold is not None:
            above = probabilities[:, positive] > np.float32(threshold)
            return np.where(above, positive, 1 - positive)
    most_probable: Array = probabilities.argmax(1)
    return most_probable


def one_vs_rest(
    references: Array, probabilities: Array, positive: int = 1
) -> Iterator[tuple[Array, Array]]:
    """(N,) truth and (N,) probability of the positive one of two labels, else of each label.

    roc_auc_score(multi_class="ovr") refuses rows whose sum is not 1 to 1e-5, those of half
    precision.
    """
    single, k = references.ndim == 1, probabilities.shape[1]
    for label in [positive] if single and k == 2 else range(k):
        truth = references == label if single else references[:, label] > 0
        yield truth, probabilities[:, label]


def log_losses(references: Array, probabilities: Array) -> Array:
    """(N,) log loss of each row."""
    if probabilities.dtype == np.float16:
        probabilities = probabilities.astype(np.float32)
    if references.ndim == 1:
        right = probabilities[np.arange(len(references)), references][:, None]
    else:
        right = np.where(references > 0, probabilities, 1 - probabilities)
    smallest = np.finfo(right.dtype).eps
    losses: Array = -np.log(right.clip(smallest, 1 - smallest).astype(np.float64)).mean(1)
    return losses


def top_hits(references: Array, probabilities: Array, k: int) -> Array:
    """(N,) bool: the label is among the k most probable; of equals the last ones, as in
    `sklearn.metrics.top_k_accuracy_score`.
    """
    order = np.argsort(probabilities, axis=1, kind="stable")[:, ::-1]
    hits: Array = (order[:, :k] == references[:, None]).any(1)
    return hits


def calibration_gaps(references: Array, probabilities: Array) -> tuple[Array, Array]:
    """(N,) bin of each row by the probability of its predicted label, and (N,) that probability,
    less 1 where the prediction is right.
    """
    top = probabilities.max(1).astype(np.float64)
    bins = np.ceil(top * CALIBRATION_BINS).astype(np.int64) - 1  # ( ], as Guo et al. have them
    right = probabilities.argmax(1) == references
    return bins.clip(0, CALIBRATION_BINS - 1), top - right


def set_overlaps(references: Array, predictions: Array) -> tuple[Array, Array]:
    """Of multi-label rows: (N,) F1, 0 where nothing is true and nothing predicted, and (N,) Jaccard
    index, 1 there.
    """
    true, predicted = references > 0, predictions > 0
    both, sizes = (true & predicted).sum(1), true.sum(1) + predicted.sum(1)
    f1 = 2 * both / np.maximum(sizes, 1)
    return f1, np.where(sizes > 0, both / np.maximum(sizes - both, 1), 1.0)
