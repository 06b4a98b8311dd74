"""Differences of scores between runs: those of a plain paired bootstrap, with 5% false alarms."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from scored_runs import MULTI, REGRESSION, SINGLE, softmax

from bertdist.reporting.matched_rows import MatchedRows, row_losses
from bertdist.reporting.score_differences import (
    Difference,
    compare_scores,
    mcnemar,
    pairwise_differences,
    rows_needed,
)
from bertdist.tasks import confidence_intervals


def matched_of(problem_type: str, truth: Any, *probabilities: Any) -> MatchedRows:
    number = probabilities[0].shape[1]
    decide = {
        SINGLE: lambda p: p.argmax(1),
        MULTI: lambda p: p > 0.5,
        REGRESSION: lambda p: p[:, 0],
    }[problem_type]
    return MatchedRows(
        problem_type=problem_type,
        labels=tuple(f"l{i}" for i in range(number)),
        lacking=((),) * len(probabilities),
        truth=truth,
        probabilities=probabilities,
        predictions=tuple(map(decide, probabilities)),
        rows=(np.arange(len(truth)),) * len(probabilities),
        totals=(len(truth),) * len(probabilities),
        relabelled=0,
    )


def single(rows: int, runs: int, labels: int = 3, seed: int = 0) -> MatchedRows:
    rng = np.random.default_rng(seed)
    truth = rng.integers(labels, size=rows)
    shared = rng.normal(size=(rows, labels)) + 1.5 * np.eye(labels)[truth]
    answers = [softmax(shared + 0.7 * rng.normal(size=shared.shape)) for _ in range(runs)]
    return matched_of(SINGLE, truth, *answers)


def several(rows: int) -> MatchedRows:
    rng = np.random.default_rng(1)
    truth = rng.random((rows, 4)) < 0.4
    answers = [1 / (1 + np.exp(-(rng.normal(size=truth.shape) + 2 * truth - 1))) for _ in range(2)]
    return matched_of(MULTI, truth, *(p.astype(np.float32) for p in answers))


def numbers(rows: int) -> MatchedRows:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=rows).astype(np.float32)
    answers = [(truth + noise * rng.normal(size=rows))[:, None] for noise in (0.5, 0.7)]
    return matched_of(REGRESSION, truth, *(p.astype(np.float32) for p in answers))


def score_of(name: str, matched: MatchedRows, run: int, rows: Any) -> float:
    truth, answers = matched.truth[rows], matched.predictions[run][rows]
    if name == "accuracy":
        return float((answers == truth).reshape(len(rows), -1).all(1).mean())
    if name == "f1_macro":
        if truth.ndim == 1:
            truth, answers = (
                np.eye(matched.probabilities[0].shape[1])[ids] for ids in (truth, answers)
            )
        both, sums = (truth * answers).sum(0), truth.sum(0) + answers.sum(0)
        return float(np.mean(2 * both / np.maximum(sums, 1)))
    if name == "pearson":
        return float(np.corrcoef(truth, answers)[0, 1])
    return float(row_losses(matched.problem_type, truth, matched.probabilities[run][rows]).mean())


@pytest.mark.parametrize(
    ("matched", "names"),
    [
        (single(90, 2), ["loss", "accuracy", "f1_macro"]),
        (several(60), ["loss", "accuracy", "f1_macro"]),
        (numbers(60), ["loss", "pearson"]),
    ],
    ids=["labels", "sets of labels", "numbers"],
)
def test_differences_are_those_of_the_drawn_rows(matched: MatchedRows, names: list[str]) -> None:
    """The same resamples, each row written out as often as it is drawn."""
    weights = np.concatenate(list(confidence_intervals._weights(len(matched), 100)), axis=1)
    drawn = [np.repeat(np.arange(len(matched)), column.astype(int)) for column in weights.T]
    scores, differences = compare_scores(names, matched, resamples=100)
    every = np.arange(len(matched))
    for score in scores:
        (found,) = differences[score.name]
        loop = np.array([score_of(score.name, matched, 1, r) - score_of(score.name, matched, 0, r) for r in drawn])  # fmt: skip
        assert score.values == pytest.approx([score_of(score.name, matched, i, every) for i in (0, 1)], rel=2e-6)  # fmt: skip
        assert found.value == pytest.approx(score.values[1] - score.values[0])
        assert found.interval == pytest.approx(np.percentile(loop, (2.5, 97.5)), rel=1e-4, abs=1e-7)
        better = loop * score.sign
        assert found.probability == pytest.approx((better > 1e-12).mean() + (abs(better) <= 1e-12).mean() / 2, abs=0.011)  # fmt: skip
        unpaired = np.sqrt(np.var([score_of(score.name, matched, 0, r) for r in drawn]) * 2)
        assert matched.problem_type != SINGLE or loop.std() < 0.95 * unpaired, "the control"


def false_alarms(runs: int, effect: float = 0.0, together: bool = True) -> float:
    """The share of 300 experiments in which some interval excludes 0. The accuracy of all runs is 0.8, of the first one `effect` more.

    together: False for the interval of each pair on its own.
    """
    times, rows, rng = 300, 250, np.random.default_rng(5)
    weights = np.concatenate(list(confidence_intervals._weights(rows, 400)), axis=1)
    hard = rng.random((times, 1, rows)) < 0.5  # rows on which all runs are less often right
    chances = np.where(hard, 0.65, 0.95) + effect * (np.arange(runs) == 0)[:, None]
    right = (rng.random((times, runs, rows)) < chances).astype(np.float32)
    draws, values = right @ weights / rows, right.mean(2, dtype=np.float64)
    alarms = 0
    for score, drawn in zip(values, draws, strict=True):
        pairs = pairwise_differences(score, drawn)
        if not together:
            pairs = [pairwise_differences(score[[x.a, x.b]], drawn[[x.a, x.b]])[0] for x in pairs]
        alarms += any(pair.is_sure for pair in pairs)
    return alarms / times


@pytest.mark.parametrize("runs", [2, 4])
def test_equally_good_runs_give_five_false_alarms_in_a_hundred(runs: int) -> None:
    """Also where 6 pairs are compared; 300 experiments have a standard error of 1.3%."""
    assert 0.01 < false_alarms(runs) < 0.09


def test_a_better_run_and_intervals_that_are_not_simultaneous_are_seen() -> None:
    """The controls."""
    assert false_alarms(2, 0.2) > 0.9 and false_alarms(4, 0.2) > 0.9
    assert false_alarms(4, together=False) > 0.12


def test_runs_that_give_the_same_answers_do_not_differ() -> None:
    matched = single(50, 1)
    both = matched_of(SINGLE, matched.truth, *(matched.probabilities * 2))
    _, differences = compare_scores(["accuracy", "loss"], both)
    for (pair,) in differences.values():
        assert (pair.value, pair.interval, pair.probability) == (0, (0, 0), 0.5)
        assert not pair.is_sure
    three = matched_of(SINGLE, matched.truth, *(matched.probabilities * 3))
    _, differences = compare_scores(["accuracy"], three)
    assert [pair.interval for pair in differences["accuracy"]] == [(0, 0)] * 3


def test_an_undefined_score_has_no_interval() -> None:
    """roc_auc where a label has no row; and a run that gives NaN."""
    matched = single(40, 2)
    one_label = matched_of(SINGLE, np.zeros(40, int), *matched.probabilities)
    _, differences = compare_scores(["accuracy", "roc_auc"], one_label)
    assert differences["roc_auc"][0].interval is None and not differences["roc_auc"][0].is_sure
    assert differences["accuracy"][0].interval is not None, "the control"
    broken = matched.probabilities[1].copy()
    broken[3] = np.nan
    _, differences = compare_scores(["accuracy"], matched_of(SINGLE, matched.truth, matched.probabilities[0], broken))  # fmt: skip
    (pair,) = differences["accuracy"]
    assert (pair.interval, pair.probability) == (None, None) and np.isnan(pair.value)


def test_lower_is_better_for_losses() -> None:
    scores, differences = compare_scores(["mse", "pearson"], numbers(400))
    assert [score.sign for score in scores] == [-1, 1]
    assert differences["mse"][0].value > 0 and differences["mse"][0].probability == 0
    assert differences["pearson"][0].value < 0 and differences["pearson"][0].probability == 0


def test_mcnemar_is_the_exact_binomial_test() -> None:
    a = np.array([True] * 10 + [False] * 7 + [True] * 50)
    b = np.array([False] * 10 + [True] * 7 + [True] * 50)
    expected = 2 * stats.binom(17, 0.5).cdf(7)
    assert mcnemar(a, b) == pytest.approx(expected) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0
    assert mcnemar(a, np.zeros_like(a)) < 1e-9, "the control"


@pytest.mark.parametrize(
    ("interval", "value", "expected"),
    [((-0.01, 0.03), 0.01, 4000), ((0.001, 0.03), 0.01, None), ((-0.01, 0.01), 0.0, None)],
)
def test_rows_needed_grow_with_the_square_of_the_width(
    interval: tuple[float, float], value: float, expected: int | None
) -> None:
    assert rows_needed(Difference(0, 1, value, interval, 0.7), 1000) == expected
