"""Answers that are the same for (nearly) every row, whatever the text says: in one sentence.

Accuracy hides such a model: where 90% of the rows have one label, giving always that one is right
for 90%. The macro scores, which count every label alike, show it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bertdist.core.errors import listed
from bertdist.core.types import Array
from bertdist.tasks.labels import REGRESSION, SINGLE_LABEL, quoted

NEARLY_ALL = 0.99  # share of the rows
NARROW = 0.02  # standard deviation of the answers, as a share of that of the true numbers
MACRO_SCORES = ("f1_macro", "balanced_accuracy", "recall_macro", "precision_macro")
MIN_ROWS = 10  # fewer say nothing


def describe_constant_answers(
    kind: str,
    predictions: Array,
    references: Array,
    labels: Sequence[str],
    scores: Mapping[str, float],
) -> str:
    """The sentence; "" where answers differ, or the true labels are as much alike.

    kind: problem_type. predictions, references: (rows,) ids or numbers, or (rows, labels) 0/1.
    """
    if len(predictions) < MIN_ROWS:
        return ""
    if kind == REGRESSION:
        return _constant_number(predictions, references)
    answers, counts = np.unique(predictions, axis=0, return_counts=True)
    most, rows = int(counts.argmax()), len(predictions)
    number, answer = int(counts[most]), answers[most]
    is_true = (references == answer).reshape(rows, -1).all(1)
    if number < NEARLY_ALL * rows or is_true.sum() >= number:
        return ""
    who = f"All {rows:,} answers are" if number == rows else f"{number:,} of {rows:,} answers are"
    if kind != SINGLE_LABEL:
        names = [quoted(labels[i]) for i in np.flatnonzero(answer).tolist()]
        if not names:
            return ""  # `suggested_threshold` says more
        return f"{who} the same, {listed(names)}: {_macro(scores)}."
    about = "" if number == rows else "about "
    share = f"{about}the share of that label, {is_true.mean():.4f}"
    name = quoted(labels[int(answer)])
    return f"{who} {name}: accuracy is only {share}; {_macro(scores)}."


def _macro(scores: Mapping[str, float]) -> str:
    """The scores that count every label alike, if there are any."""
    found = [f"{name} is {scores[name]:.4f}" for name in MACRO_SCORES if name in scores]
    return listed(found[:2]) if found else "--metrics f1_macro counts every label alike"


def _constant_number(predictions: Array, references: Array) -> str:
    spread = float(np.std(references.astype(np.float64)))
    if spread == 0 or not np.std(predictions.astype(np.float64)) <= NARROW * spread:  # or NaN
        return ""
    ends = predictions.min(), predictions.max(), references.mean()
    low, high, mean = (f"{x:.4g}" for x in ends)
    between = low if low == high else f"from {low} to {high}"
    return (
        f"All {len(predictions):,} answers are nearly the same number, {between}; the mean of the "
        f"true numbers is {mean}."
    )
