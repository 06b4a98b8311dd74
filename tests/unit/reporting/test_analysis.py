"""The numbers that a report computes, beside those of scikit-learn, on random rows; each with a control that differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_folders import random_rows, write_run
from sklearn import calibration, metrics

from bertdist.reporting import analysis
from bertdist.reporting.run_folder import ScoredRows, read_run
from bertdist.tasks.metrics import BuiltinMetric

LABELS = tuple("abcde")


def rows_of(folder: Path, kind: str = "single", number: int = 700, **given: Any) -> ScoredRows:
    labels = LABELS if kind != "regression" else ("score",)
    found = read_run(
        write_run(folder / kind, random_rows(number, labels, kind, **given))
    ).validation
    assert found is not None
    return found


def test_calibration_error_is_that_of_the_metric(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    found = analysis.reliability(rows)
    metric = BuiltinMetric("ece", "single_label_classification", len(LABELS))
    expected = metric.compute(
        predictions=rows.predicted, probabilities=rows.probabilities, references=rows.truth
    )
    assert found.ece == pytest.approx(expected["ece"], rel=1e-9) and found.rows.sum() == 700
    other = analysis.reliability_of(rows.probabilities.max(1) ** 2, rows.predicted == rows.truth)
    assert other.ece != pytest.approx(expected["ece"], rel=1e-3)
    assert found.mean_accuracy == pytest.approx((rows.predicted == rows.truth).mean())
    assert found.mean_confidence == pytest.approx(rows.probabilities.max(1).mean())


def test_bins_are_those_of_scikit_learn(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "multi")
    found, some = analysis.reliability(rows), slice(None)
    truth, scores = rows.truth.reshape(-1), rows.probabilities.reshape(-1)
    right, mean = calibration.calibration_curve(truth, scores, n_bins=analysis.CALIBRATION_BINS)
    some = found.rows > 0
    np.testing.assert_allclose(found.accuracy[some], right, rtol=1e-9)
    np.testing.assert_allclose(found.confidence[some], mean, rtol=1e-6)
    assert not np.allclose(found.accuracy[some], right[::-1])


def test_honest_probabilities_are_within_chance() -> None:
    rng = np.random.default_rng(3)
    beyond = 0
    for _ in range(60):
        scores = rng.uniform(0.5, 1, size=500)
        found = analysis.reliability_of(scores, rng.random(500) < scores)
        beyond += found.ece > found.ece_by_chance
    assert beyond <= 9  # 3 are expected
    sure = analysis.reliability_of(np.full(500, 0.95), rng.random(500) < 0.8)
    assert sure.ece > 2 * sure.ece_by_chance


def test_intervals_of_shares_cover_them() -> None:
    low, high = analysis.wilson(np.array([0, 5, 10, 0]), np.array([10, 10, 10, 0]))
    np.testing.assert_allclose(low[:3], [0, 0.236593, 0.722467], atol=1e-5)  # statsmodels
    np.testing.assert_allclose(high[:3], [0.277533, 0.763407, 1], atol=1e-5)
    assert np.isnan(low[3])


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_precision_and_recall(kind: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, kind)
    for label in range(len(LABELS)):
        truth, scores = analysis.one_vs_rest(rows, label)
        curve = analysis.precision_recall("a", truth, scores)
        expected = metrics.average_precision_score(truth, scores)
        assert curve.average_precision == pytest.approx(expected, rel=1e-9)
        assert curve.average_precision != pytest.approx(
            metrics.average_precision_score(~truth, scores), rel=1e-3
        )
        precision, recall, _ = metrics.precision_recall_curve(truth, scores)
        known = {(round(x, 9), round(y, 9)) for x, y in zip(recall, precision, strict=True)}
        mine = [
            (round(x, 9), round(y, 9)) for x, y in zip(curve.recall, curve.precision, strict=True)
        ]
        assert {*mine[1:]} <= known and len(mine) <= analysis.CURVE_POINTS + 2
        assert curve.rows == truth.sum() and mine[-1][0] == 1
    truth, scores = analysis.micro(rows)
    expected = metrics.average_precision_score(truth, scores)
    assert analysis.precision_recall("all", truth, scores).average_precision == pytest.approx(
        expected
    )


def test_equal_probabilities_are_one_threshold() -> None:
    truth, scores = np.array([True, False, True, False]), np.array([0.5, 0.5, 0.5, 0.1])
    curve = analysis.precision_recall("a", truth, scores)
    assert curve.average_precision == pytest.approx(metrics.average_precision_score(truth, scores))
    none = analysis.precision_recall("a", np.zeros(3, bool), np.ones(3))
    assert none.average_precision == 0 and none.rows == 0


def test_confusions(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    expected = metrics.confusion_matrix(rows.truth, rows.predicted, labels=range(5))
    assert (analysis.confusion_counts(rows) == expected).all()
    assert expected.tolist() == rows.report["confusion"] and (expected != expected.T).any()
    rows = rows_of(tmp_path, "multi")
    expected = metrics.multilabel_confusion_matrix(rows.truth, rows.predicted)
    found = analysis.binary_counts(rows)
    for label, ((tn, fp), (fn, tp)) in enumerate(expected.tolist()):
        assert found[label].tolist() == [tp, fp, fn, tn]


def test_groups_are_all_rows_once_and_scored_as_they_are(tmp_path: Path) -> None:
    slices = [["en", "de", None][n % 3] for n in range(700)]
    rows = rows_of(tmp_path, slices=slices, truncated=np.arange(700) % 7 == 0)
    name, score = analysis.scoring(rows)
    assert name == "accuracy"
    found = analysis.length_groups(rows, score)
    assert sum(group.rows for group in found) == 700 and len(found) == analysis.LENGTH_BINS
    for group in found:
        low, high = group.tokens or (0, 0)
        mine = (rows.tokens >= low) & (rows.tokens <= high)
        accuracy = (rows.truth == rows.predicted)[mine].mean()
        assert group.rows == mine.sum() and group.score == pytest.approx(accuracy)
        assert group.interval and group.interval[0] <= accuracy <= group.interval[1]
    by_slice, left_out = analysis.slice_groups(rows, score)
    assert [(group.name, group.rows) for group in by_slice] == [
        ("en", 234),
        ("de", 233),
        ("(no value)", 233),
    ] or {group.name for group in by_slice} == {"en", "de", "(no value)"}
    assert left_out == 0 and by_slice[0].score == pytest.approx(
        (rows.truth == rows.predicted)[0::3].mean()
    )
    assert [group.rows for group in analysis.truncation_groups(rows, score)] == [100, 600]
    same = rows_of(tmp_path / "same", tokens=[9] * 700)
    assert [group.name for group in analysis.length_groups(same, score)] == ["9"]


@pytest.mark.parametrize(("kind", "expected"), [("multi", "f1_micro"), ("regression", "mae")])
def test_the_score_of_groups(kind: str, expected: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, kind, 60)
    name, score = analysis.scoring(rows)
    value, interval = score(np.ones(60, bool))
    assert value == pytest.approx(rows.report["scores"][name])
    assert interval and interval[0] < value < interval[1]
    assert name == expected or name in rows.report["scores"]
    assert score(np.zeros(60, bool)) == (None, None)


def test_rows_that_look_mislabelled(tmp_path: Path) -> None:
    """Labels that were changed on purpose are found, and hardly any other."""
    given = random_rows(600, LABELS, sure=9.0)
    changed = np.zeros(600, bool)
    changed[::20] = True
    given.dataset.targets[changed] = (given.dataset.targets[changed] + 1) % 5
    rows = read_run(write_run(tmp_path / "out", given)).validation
    assert rows is not None
    found = analysis.mislabelled(rows)
    assert (found & changed).sum() >= 27 and (found & ~changed).sum() <= 3
    assert not analysis.mislabelled(rows_of(tmp_path, "regression")).any()


def test_of_several_labels_each_is_judged_by_itself(tmp_path: Path) -> None:
    """A label that was left out, and one that was added; a naive count of all cells agrees."""
    given = random_rows(600, LABELS, "multi", sure=9.0)
    truth = given.dataset.targets
    left_out, added = np.flatnonzero(truth[:, 0] == 1)[:5], np.flatnonzero(truth[:, 3] == 0)[:5]
    truth[left_out, 0], truth[added, 3] = 0, 1
    rows = read_run(write_run(tmp_path / "out", given)).validation
    assert rows is not None
    found, changed = analysis.mislabelled(rows), np.zeros(600, bool)
    changed[[*left_out, *added]] = True
    assert (found & changed).sum() >= 8 and (found & ~changed).sum() <= 30
    expected = np.zeros(600, bool)
    for label in range(len(LABELS)):
        p, true = rows.probabilities[:, label].astype(float), rows.truth[:, label]
        for row in range(600):
            other = p if not true[row] else 1 - p  # of what the row is not
            like = other[true != true[row]].mean()
            expected[row] |= (p[row] > 0.5) != true[row] and other[row] >= like
    assert (found == expected).all()
    alone = random_rows(20, LABELS, "multi")
    alone.dataset.targets[:, 1] = 0  # no row has it: nothing is known of such rows
    none = read_run(write_run(tmp_path / "none", alone)).validation
    assert none is not None and not analysis._wrongly_given_or_missing(none)[:, 1].any()


def test_labels_are_doubted_by_the_probability_of_the_answer(tmp_path: Path) -> None:
    """After --tune_thresholds the answer need not be the more probable one of two labels."""
    given = random_rows(3, ["a", "b"])
    given.dataset.targets[:] = [0, 1, 0]
    for first, expected in ((0.4, False), (0.95, True)):  # the mean of b is 0.9
        probabilities = np.array([[1 - first, first], [0.1, 0.9], [0.9, 0.1]])
        tuned = replace(given.task, thresholds=(None, 0.3))
        rows = given._replace(task=tuned, logits=torch.tensor(probabilities).log().float())
        found = read_run(write_run(tmp_path / str(first), rows)).validation
        assert found is not None and found.predicted.tolist() == [1, 1, 0]
        assert analysis.mislabelled(found).tolist() == [expected, False, False]


def test_numbers_that_are_drawn(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "regression", 100)
    found = analysis.residuals(rows, 10)
    gaps = rows.predicted - rows.truth
    assert found.mean == pytest.approx(gaps.mean(), abs=1e-6) and len(found.shown) == 10
    assert (np.diff(rows.truth[found.shown]) >= 0).all()
    assert (
        rows.truth.min() in rows.truth[found.shown] and rows.truth.max() in rows.truth[found.shown]
    )
    assert analysis.majority(rows) is None


def test_the_majority(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    counts = np.bincount(rows.truth)
    assert analysis.majority(rows) == {
        "label": LABELS[counts.argmax()],
        "accuracy": counts.max() / 700,
    }
