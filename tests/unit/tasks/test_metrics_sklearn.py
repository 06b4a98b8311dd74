"""Every score against scikit-learn and scipy, called directly, on random predictions of all kinds of tasks."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from predictions import Arrays, multi, regression, single
from scipy import stats
from sklearn import metrics as sk

from bertdist.core.errors import ConfigError
from bertdist.tasks import metrics
from bertdist.tasks.metrics import load_metrics

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def compute(
    name: str, kind: str, labels: int, arrays: Arrays, positive: str | None = None
) -> float:
    names = [f"l{i}" for i in range(labels)]
    return load_metrics([name], kind, names, positive).compute(*arrays)[name]


def per_label(function: Callable[..., float]) -> Callable[..., float]:
    """The mean over labels of label against rest."""

    def mean(truth: Any, probable: Any) -> float:
        k = probable.shape[1]
        columns = truth if truth.ndim == 2 else np.eye(k)[truth]
        return float(np.mean([function(columns[:, i], probable[:, i]) for i in range(k)]))

    return mean


def plain_ece(truth: Any, probable: Any) -> float:
    """As it is written in the paper, bin by bin."""
    top, right, total = probable.max(1).astype(float), probable.argmax(1) == truth, 0.0
    for i in range(15):
        inside = (top > i / 15) & (top <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    return total


def macro(function: Any, average: str, labels: int) -> Any:
    return lambda t, p, _: function(
        t, p, labels=range(labels), average=average, zero_division=1.0 * (function is sk.jaccard_score and average == "samples")
    )  # fmt: skip


F1_LIKE = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score}


def averaged(labels: int) -> dict[str, Any]:
    return {
        f"{name}_{average}": macro(function, average, labels)
        for name, function in F1_LIKE.items()
        for average in ("macro", "micro", "weighted")
    }


def of_single(labels: int) -> dict[str, Any]:
    two = labels == 2
    expected = {
        "accuracy": lambda t, p, _: sk.accuracy_score(t, p),
        "balanced_accuracy": lambda t, p, _: sk.balanced_accuracy_score(t, p),
        "cohen_kappa": lambda t, p, _: sk.cohen_kappa_score(t, p),
        "matthews_correlation": lambda t, p, _: sk.matthews_corrcoef(t, p),
        "log_loss": lambda t, _, q: sk.log_loss(t, q, labels=range(labels)),
        "ece": lambda t, _, q: plain_ece(t, q),
        "roc_auc": lambda t, _, q: (
            sk.roc_auc_score(t, q[:, 1]) if two else sk.roc_auc_score(t, q, multi_class="ovr")
        ),
        "average_precision": lambda t, _, q: (
            sk.average_precision_score(t, q[:, 1])
            if two
            else sk.average_precision_score(np.eye(labels)[t], q, average="macro")
        ),
        **averaged(labels),
    }
    for k in range(1, labels):
        expected[f"top_{k}_accuracy"] = lambda t, _, q, k=k: (
            sk.accuracy_score(t, q.argmax(1))
            if two
            else sk.top_k_accuracy_score(t, q, k=k, labels=range(labels))
        )
    if two:
        expected |= {name: lambda t, p, _, f=f: f(t, p) for name, f in F1_LIKE.items()}
    return expected


OF_MULTI = {
    "accuracy": lambda t, p, _: sk.accuracy_score(t, p),
    "f1_samples": macro(sk.f1_score, "samples", 4),
    "jaccard_samples": macro(sk.jaccard_score, "samples", 4),
    "jaccard_macro": macro(sk.jaccard_score, "macro", 4),
    "roc_auc": lambda t, _, q: sk.roc_auc_score(t, q, average="macro"),
    "average_precision": lambda t, _, q: sk.average_precision_score(t, q, average="macro"),
    "log_loss": lambda t, _, q: per_label(lambda a, b: sk.log_loss(a, b))(t, q),
    **averaged(4),
}
OF_NUMBERS = {
    "pearson": lambda t, p, _: stats.pearsonr(t, p).statistic,
    "spearman": lambda t, p, _: stats.spearmanr(t, p).statistic,
    "mse": lambda t, p, _: sk.mean_squared_error(t, p),
    "rmse": lambda t, p, _: sk.root_mean_squared_error(t, p),
    "mae": lambda t, p, _: sk.mean_absolute_error(t, p),
    "r2": lambda t, p, _: sk.r2_score(t, p),
}
CASES = [
    *((SINGLE, 2, single(2), name, f) for name, f in of_single(2).items()),
    *((SINGLE, 5, single(5), name, f) for name, f in of_single(5).items()),
    *((MULTI, 4, multi(4), name, f) for name, f in OF_MULTI.items()),
    *((REGRESSION, 1, regression(), name, f) for name, f in OF_NUMBERS.items()),
]


@pytest.mark.parametrize(
    ("kind", "labels", "arrays", "name", "function"),
    CASES,
    ids=[f"{kind[:5]}-{labels}-{name}" for kind, labels, _, name, _ in CASES],
)
def test_a_score_is_that_of_scikit_learn(
    kind: str, labels: int, arrays: Arrays, name: str, function: Any
) -> None:
    predictions, probabilities, references = arrays
    said, truth = (x.astype(float) if x.dtype.kind == "f" and x.ndim == 1 else x for x in (predictions, references))  # fmt: skip
    expected = float(function(truth, said, probabilities))
    assert compute(name, kind, labels, arrays) == pytest.approx(expected, rel=2e-6), name
    other = {2: single(2, seed=1), 5: single(5, seed=1), 4: multi(4, seed=1), 1: regression(seed=1)}
    assert compute(name, kind, labels, other[labels]) != pytest.approx(expected, rel=2e-6)


def test_every_built_in_score_is_among_the_cases() -> None:
    assert {name for *_, name, _ in CASES} >= set(metrics._METRICS)


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "average_precision"])
def test_the_positive_label_is_the_second_one_or_that_of_the_flag(name: str) -> None:
    predictions, probabilities, references = arrays = single(2)
    for label in (0, 1):
        if name == "average_precision":
            expected = sk.average_precision_score(references == label, probabilities[:, label])
        else:
            expected = F1_LIKE[name](references, predictions, pos_label=label)
        found = compute(name, SINGLE, 2, arrays, f"l{label}")
        assert found == pytest.approx(expected, rel=1e-6)
        assert (found == compute(name, SINGLE, 2, arrays)) == (label == 1)


def test_which_label_is_positive_is_said_where_a_score_depends_on_it() -> None:
    note = "The positive label of f1, average_precision is 'b' (--positive_label a changes it)."
    names = ["accuracy", "f1", "roc_auc", "average_precision"]
    assert load_metrics(names, SINGLE, ["a", "b"]).positive_note == note
    other = load_metrics(names, SINGLE, ["a", "b"], "a").positive_note
    assert (
        other
        == "The positive label of f1, average_precision is 'a' (--positive_label b changes it)."
    )
    assert load_metrics(["accuracy", "f1_macro"], SINGLE, ["a", "b"]).positive_note == ""
    assert load_metrics(["average_precision"], SINGLE, ["a", "b", "c"]).positive_note == ""


@pytest.mark.parametrize(
    ("names", "kind", "labels", "label", "message"),
    [
        ("f1", SINGLE, "ab", "B", "--positive_label B: no such label. Did you mean 'b'?"),
        ("f1", SINGLE, "ab", "x", "--positive_label x: no such label. Known: 'a', 'b'."),
        ("accuracy", SINGLE, "ab", "a", "no score depends on it; --metrics has accuracy, and f1"),
        ("f1_macro", SINGLE, "abc", "a", "for tasks with two labels; this one is single_label"),
        ("roc_auc", MULTI, "ab", "a", "this one is multi_label_classification with 2 labels."),
        ("mse", REGRESSION, "a", "a", "this one is regression."),
        ("top_2_accuracy", SINGLE, "ab", None, "is 1 for any predictions of 2 labels"),
        ("top_0_accuracy", SINGLE, "abc", None, "unknown score. Did you mean 'top_3_accuracy'?"),
        ("top_5_acc", SINGLE, "abcdefgh", None, "unknown score. Did you mean 'top_3_accuracy'?"),
        ("top_1_accuracy", MULTI, "abc", None, "is for single_label_classification; this task is"),
    ],
)
def test_what_cannot_take_effect_is_an_error(
    names: str, kind: str, labels: str, label: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_metrics(names.split(), kind, list(labels), label)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- A label without rows ----


def test_an_absent_label_is_treated_as_scikit_learn_treats_it() -> None:
    """The third label has no row, and is predicted."""
    predictions, probabilities, references = arrays = single(3, absent=True)
    assert 2 in predictions and 2 not in references
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balanced = sk.balanced_accuracy_score(references, predictions)
        precision = sk.average_precision_score(np.eye(3)[references], probabilities)
        f1 = sk.f1_score(references, predictions, labels=range(3), average="macro")
    assert compute("balanced_accuracy", SINGLE, 3, arrays) == pytest.approx(balanced)
    assert compute("average_precision", SINGLE, 3, arrays) == pytest.approx(precision)
    assert compute("f1_macro", SINGLE, 3, arrays) == pytest.approx(f1)
    assert math.isnan(compute("roc_auc", SINGLE, 3, arrays))
    # The twin: the recall of all three, with 0 for the absent one.
    assert compute("recall_macro", SINGLE, 3, arrays) == pytest.approx(balanced * 2 / 3)


@pytest.mark.parametrize(
    ("name", "kind", "labels", "arrays", "expected"),
    [
        ("cohen_kappa", SINGLE, 2, ([1, 1], [[0.1, 0.9]] * 2, [1, 1]), math.nan),
        ("cohen_kappa", SINGLE, 2, ([1, 0], [[0.1, 0.9]] * 2, [1, 1]), 0.0),
        ("r2", REGRESSION, 1, ([1.0], [[1.0]], [2.0]), math.nan),
        ("r2", REGRESSION, 1, ([1.0, 2.0], [[1.0], [2.0]], [2.0, 2.0]), 0.0),
        ("average_precision", SINGLE, 2, ([0, 1], [[0.6, 0.4], [0.2, 0.8]], [0, 0]), 0.0),
        ("average_precision", MULTI, 1, ([[0], [1]], [[0.4], [0.8]], [[0], [1]]), 1.0),
        ("log_loss", SINGLE, 2, ([1], [[0.0, 1.0]], [0]), -math.log(np.finfo(np.float32).eps)),
        ("ece", SINGLE, 2, ([1, 1], [[0.25, 0.75]] * 2, [0, 1]), 0.25),
        ("balanced_accuracy", SINGLE, 2, ([0, 1], [[0.6, 0.4]] * 2, [0, 0]), 0.5),
    ],
)
def test_borders(name: str, kind: str, labels: int, arrays: Any, expected: float) -> None:
    said, probable, truth = arrays
    arrays = (np.array(said), np.array(probable, dtype=np.float32), np.array(truth))
    assert compute(name, kind, labels, arrays) == pytest.approx(expected, nan_ok=True)
