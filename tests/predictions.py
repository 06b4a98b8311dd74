"""Random predictions of all kinds of tasks, better than chance."""

from typing import Any

import numpy as np

Arrays = tuple[Any, Any, Any]  # predictions, probabilities, references


def single(labels: int, rows: int = 400, seed: int = 0, absent: bool = False) -> Arrays:
    """Predictions that are often right; absent: the last label has no row, and is predicted."""
    rng = np.random.default_rng(seed)
    references = rng.integers(labels - absent, size=rows)
    logits = rng.normal(size=(rows, labels)) + 1.2 * np.eye(labels)[references]
    weights = np.exp(logits)
    probabilities = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return probabilities.argmax(1), probabilities, references


def multi(labels: int, rows: int = 400, seed: int = 0, absent: bool = False) -> Arrays:
    rng = np.random.default_rng(seed)
    references = (rng.random((rows, labels)) < 0.3).astype(np.float32)
    references[:, labels - absent :] = 0
    logits = rng.normal(size=(rows, labels)) + 2 * references - 1
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return (probabilities > 0.5).astype(np.int64), probabilities, references


def regression(rows: int = 400, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    references = np.round(rng.normal(size=rows), 1).astype(np.float32)  # with equal ones
    predictions = (references + rng.normal(size=rows)).astype(np.float32)
    return predictions, predictions[:, None], references
