"""Intervals: scores of resamples are those of the drawn rows, and the resamples are those of a plain bootstrap."""

from typing import Any

import numpy as np
import pytest
from predictions import Arrays, multi, regression, single
from scipy import stats

from bertdist.tasks import confidence_intervals as intervals
from bertdist.tasks import metrics
from bertdist.tasks.confidence_intervals import Resamples, bootstrap_intervals
from bertdist.tasks.metrics import load_metrics
from bertdist.tasks.row_scores import log_losses

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
TASKS: dict[str, tuple[str, int, Arrays]] = {
    "two labels": (SINGLE, 2, single(2, 150)),
    "five labels": (SINGLE, 5, single(5, 150)),
    "an absent label": (SINGLE, 3, single(3, 60, absent=True)),
    "several labels": (MULTI, 4, multi(4, 150)),
    "one label or none": (MULTI, 1, multi(1, 60)),
    "numbers": (REGRESSION, 1, regression(150)),
}


def names_of(kind: str, labels: int) -> list[str]:
    names = [
        name
        for name, spec in metrics._METRICS.items()
        if kind in spec.problem_types and (labels == 2 or not spec.binary)
    ]
    return names + [f"top_{k}_accuracy" for k in range(1, labels) if kind == SINGLE]


def losses_of(kind: str, arrays: Arrays) -> Any:
    predictions, probabilities, references = arrays
    if kind == REGRESSION:
        return (predictions.astype(float) - references) ** 2
    return log_losses(references, probabilities)


def rounded(arrays: Arrays) -> Arrays:
    """With many equal probabilities and numbers."""
    predictions, probabilities, references = arrays
    if predictions.dtype.kind == "f":
        return np.round(predictions), probabilities, references
    return predictions, np.round(probabilities, 1), references


CASES = [
    (task, name)
    for task, (kind, labels, _) in TASKS.items()
    for name in [*names_of(kind, labels), "loss"]
]


@pytest.mark.parametrize(("task", "name"), CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_score_of_a_resample_is_that_of_the_rows_that_it_draws(
    task: str, name: str, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "BLOCK", 32)  # several blocks
    if ties:
        monkeypatch.setattr(intervals, "DENSE_LABELS", 0)  # as of many labels
    kind, labels, arrays = TASKS[task]
    arrays = rounded(arrays) if ties else arrays
    losses, positive = losses_of(kind, arrays), 0
    weights = next(intervals._weights(len(losses), 4))
    data = intervals._Data(intervals.Arrays(*arrays), losses, positive, [name])
    score = intervals._score_of(name, data)
    assert score is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        found = score(Resamples(data, weights))
    label_names = [f"l{i}" for i in range(labels)]
    for column, value in zip(weights.T, found, strict=True):
        rows = np.repeat(np.arange(len(losses)), column.astype(int))
        if name == "loss":
            expected = losses[rows].mean()
        else:
            is_of_positive = labels == 2 and name in metrics.OF_POSITIVE and kind == SINGLE
            opened = load_metrics([name], kind, label_names, "l0" if is_of_positive else None)
            expected = opened.compute(*(array[rows] for array in arrays))[name]
        assert value == pytest.approx(expected, rel=2e-6, abs=1e-9, nan_ok=True)
    assert len(np.unique(found)) > 1 or np.isnan(found).all(), "of other rows it is another one"


def test_every_built_in_score_is_among_the_cases() -> None:
    assert {name for _, name in CASES} >= {*metrics._METRICS, "loss", "top_3_accuracy"}


@pytest.mark.parametrize("rows", [2, 7, 30, 400])
def test_weights_are_draws_with_replacement(rows: int) -> None:
    """Each row binomial, any two of them as N draws make them: below chance by 1 / N."""
    weights = np.concatenate(list(intervals._weights(rows, 4000)), axis=1).astype(int)
    assert (weights.sum(0) == rows).all() and weights.min() == 0
    expected = stats.binom(rows, 1 / rows).pmf(np.arange(rows + 1)) * 4000
    few = np.flatnonzero(expected >= 5)
    for row in (0, rows - 1):
        seen = np.bincount(weights[row], minlength=rows + 1)
        pooled = [np.r_[x[few], x.sum() - x[few].sum()] for x in (seen, expected)]
        assert stats.chisquare(pooled[0][:-1], pooled[1][:-1] * pooled[0][:-1].sum() / pooled[1][:-1].sum()).pvalue > 1e-3  # fmt: skip
    pairs = (weights[0] - 1) * (weights[-1] - 1)
    error = pairs.std() / np.sqrt(4000)
    assert abs(pairs.mean() + 1 / rows) < 4 * error
    assert not np.array_equal(weights[:, :2000], weights[:, 2000:])


def test_a_table_of_another_rate_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: twice as many rows that do not come."""
    table = intervals._poisson_pairs

    def clumped(rate: float) -> Any:
        return 2 * table(rate / 2)

    monkeypatch.setattr(intervals, "_poisson_pairs", clumped)
    weights = np.concatenate(list(intervals._weights(400, 1000)), axis=1)
    assert (weights.sum(0) == 400).all()
    assert (weights == 0).mean() > 0.45 > 0.37 > np.exp(-1)


@pytest.mark.parametrize(
    ("task", "names"),
    [("two labels", ["f1", "roc_auc"]), ("several labels", ["f1_macro"]), ("numbers", ["pearson"])],
)
def test_intervals_are_those_of_a_plain_loop(task: str, names: list[str]) -> None:
    """Within the error of 250 resamples: five standard errors of the share below a 2.5% percentile are 5%."""
    kind, labels, arrays = TASKS[task]
    opened = load_metrics(names, kind, [f"l{i}" for i in range(labels)])
    rng, rows, loop = np.random.default_rng(7), len(arrays[2]), []
    for _ in range(250):
        drawn = rng.integers(rows, size=rows)
        loop.append([opened.compute(*(array[drawn] for array in arrays))[name] for name in names])
    found = bootstrap_intervals(names, intervals.Arrays(*arrays), losses_of(kind, arrays))
    assert list(found) == names
    for name, values in zip(names, np.transpose(loop), strict=True):
        interval = found[name]
        assert interval is not None
        below, above = (values < interval[0]).mean(), (values > interval[1]).mean()
        assert 0 < below < 0.075 and 0 < above < 0.075, name
        wrong = np.mean(interval)  # the control
        assert (values < wrong).mean() > 0.3


def test_an_interval_covers_the_true_score_in_95_of_100_samples() -> None:
    hits = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        references = rng.integers(2, size=200)
        predictions = np.where(rng.random(200) < 0.8, references, 1 - references)
        arrays = intervals.Arrays(predictions, np.eye(2)[predictions], references)
        found = bootstrap_intervals(["accuracy"], arrays, np.zeros(200), resamples=200)["accuracy"]
        assert found is not None
        hits.append(found[0] <= 0.8 <= found[1])
    assert 50 <= sum(hits) < 60


def test_the_same_rows_give_the_same_interval_and_others_another() -> None:
    arrays = TASKS["five labels"][2]
    losses = losses_of(SINGLE, arrays)
    first, again = (
        bootstrap_intervals(["loss", "accuracy"], intervals.Arrays(*arrays), losses) for _ in "12"
    )
    other = bootstrap_intervals(["loss", "accuracy"], intervals.Arrays(*single(5, 150, 9)), losses)
    assert first == again and first["accuracy"] != other["accuracy"]


def test_scores_that_sort_many_rows_take_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def counted(name: str, data: Any) -> Any:
        def score(r: Resamples) -> Any:
            seen[name] = seen.get(name, 0) + r.weights.shape[1]
            return np.zeros(r.weights.shape[1])

        return score

    monkeypatch.setattr(intervals, "_score_of", counted)
    arrays = intervals.Arrays(*multi(4, 150))
    for limit, expected in [(150 * 4 * 200, 256), (1, 128), (1e9, 1000)]:
        seen.clear()
        monkeypatch.setattr(intervals, "SORTED_ROWS", limit)
        bootstrap_intervals(["roc_auc", "accuracy"], arrays, np.zeros(150))
        assert seen == {"roc_auc": expected, "accuracy": 1000}


@pytest.mark.parametrize(
    ("name", "task", "references"),
    [
        ("roc_auc", "two labels", 0),
        ("cohen_kappa", "two labels", None),
        ("pearson", "numbers", 1),
        ("spearman", "numbers", 1),
    ],
)
def test_an_undefined_score_has_no_interval(name: str, task: str, references: int | None) -> None:
    predictions, probabilities, truth = TASKS[task][2]
    truth = np.full_like(truth, references or 0)
    predictions = np.zeros_like(predictions) if references is None else predictions
    found = bootstrap_intervals(
        [name, "accuracy" if task == "two labels" else "mse"],
        intervals.Arrays(predictions, probabilities, truth),
        np.ones(len(truth)),
    )
    assert found[name] is None and list(found.values())[1] is not None


def test_neither_one_row_nor_what_is_not_finite_has_an_interval() -> None:
    predictions, probabilities, references = (array.copy() for array in TASKS["two labels"][2])
    one = intervals.Arrays(predictions[:1], probabilities[:1], references[:1])
    assert bootstrap_intervals(["loss", "mine"], one, np.zeros(1)) == {"loss": None}
    probabilities[3] = np.nan
    broken = intervals.Arrays(predictions, probabilities, references)
    assert bootstrap_intervals(["accuracy"], broken, np.zeros(150)) == {"accuracy": None}
