"""Temperatures and thresholds are the best ones: against torch's LBFGS, scikit-learn and brute force."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from bertdist.core.errors import ConfigError, ModelError
from bertdist.core.thresholds import ThresholdScore, parse_threshold_score
from bertdist.core.types import Array
from bertdist.tasks.calibration import (
    DEFAULT,
    HIGHEST,
    LOWEST,
    calibration_error,
    calibration_notes,
    check_calibration,
    fit_temperature,
    fit_thresholds,
    measure,
    measure_again,
    score_of_predictions,
    tune,
)
from bertdist.tasks.metrics import load_metrics
from bertdist.tasks.tasks import MultiLabel, SingleLabel, task_of_model

SCORES = ("f1", "balanced_accuracy", "matthews_correlation", "accuracy")
F1 = ThresholdScore("f1")


def logits_and_labels(
    outputs: int, rows: int = 300, seed: int = 0, scale: float = 3.0
) -> tuple[Array, Array]:
    """Logits `scale` times too far from 0 for the labels that are drawn from them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, outputs))
    noise = generator.gumbel(size=(rows, outputs))
    return (scale * logits).astype(np.float32), (logits + noise).argmax(1)


def multi(outputs: int, rows: int = 300, seed: int = 0, scale: float = 3.0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 2, (rows, outputs))
    labels = generator.random((rows, outputs)) < 1 / (1 + np.exp(-logits))
    return (scale * logits).astype(np.float32), labels.astype(np.float32)


def loss_at(logits: Array, labels: Array, temperature: float) -> float:
    z, y = torch.from_numpy(logits).double() / temperature, torch.from_numpy(labels)
    if labels.ndim == 1:
        return F.cross_entropy(z, y).item()
    return F.binary_cross_entropy_with_logits(z, y.double()).item()


def by_lbfgs(logits: Array, labels: Array) -> float:
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        scaled = z / log_t.exp()
        if labels.ndim == 1:
            loss = F.cross_entropy(scaled, y)
        else:
            loss = F.binary_cross_entropy_with_logits(scaled, y.double())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return math.exp(log_t.item())


# ---- Temperature


@pytest.mark.parametrize("make", [logits_and_labels, multi])
@pytest.mark.parametrize(("outputs", "scale"), [(2, 3.0), (5, 0.5), (30, 1.0)])
def test_the_temperature_is_that_of_lbfgs_and_no_other_is_better(
    make: Any, outputs: int, scale: float
) -> None:
    logits, labels = make(outputs, scale=scale)
    found, note = fit_temperature(logits, labels)
    assert found == pytest.approx(by_lbfgs(logits, labels), rel=1e-4) and note == ""
    assert found == pytest.approx(scale, rel=0.35), "what the labels were drawn with"
    best = loss_at(logits, labels, found)
    assert all(loss_at(logits, labels, found * factor) > best for factor in (0.99, 1.01))
    # The control: the slope sees the labels.
    assert fit_temperature(logits, labels[::-1].copy())[0] != pytest.approx(found, rel=0.01)


def test_logits_that_are_twice_as_large_have_twice_the_temperature() -> None:
    logits, labels = logits_and_labels(3)
    found = fit_temperature(logits, labels)[0]
    assert fit_temperature(2 * logits, labels)[0] == pytest.approx(2 * found, rel=1e-9)


def test_where_there_is_no_best_temperature_nothing_changes_and_a_line_says_why() -> None:
    right: Array = np.array([[2.0, 0.0], [0.0, 1.0]], np.float32)
    cases = {
        "All answers for the 2 rows are right": (right, np.array([0, 1])),
        "All answers for the 1 row are right": (right[:1], np.array([0])),
        "The logits say nothing about the labels of the 1 row:": (right[:1], np.array([1])),
        "The logits say nothing about the labels of the 2 rows:": (0 * right, np.array([0, 1])),
    }
    for words, (logits, labels) in cases.items():
        for form in (labels, np.eye(2, dtype=np.float32)[labels] if logits.any() else labels):
            if form.ndim == 2:
                logits = logits - 0.5
            found, note = fit_temperature(logits, form)
            assert found == 1 and note.startswith(words), note
    # One wrong row is enough for a temperature.
    logits, labels = np.concatenate([right, right]), np.array([0, 1, 0, 0])
    found, note = fit_temperature(logits, labels)
    assert note == "" and loss_at(logits, labels, found) < loss_at(logits, labels, 1.01 * found)


def test_a_temperature_out_of_bounds_is_the_bound() -> None:
    logits, labels = logits_and_labels(3)
    small, large = (fit_temperature(logits * factor, labels) for factor in (1e-4, 1e4))
    assert small[0] == LOWEST and f"below {LOWEST:g}, which is used" in small[1]
    assert large[0] == HIGHEST and f"above {HIGHEST:g}, which is used" in large[1]
    # Logits that overflow an exponential, all but one row right
    logits = np.array([[9e4, 0], [9e4, 0], [0, 9e4]], np.float32)
    assert fit_temperature(logits, np.array([0, 0, 0]))[0] == HIGHEST


def test_the_calibration_error_is_that_of_the_metric_and_falls() -> None:
    logits, labels = logits_and_labels(4, rows=2000)
    temperature, _ = fit_temperature(logits, labels)
    before, after = (
        torch.from_numpy(logits).div(t).softmax(-1).numpy() for t in (1.0, temperature)
    )
    metric = load_metrics(["ece"], "single_label_classification", list("abcd"))
    found = metric.compute(before.argmax(1), before, labels)["ece"]
    assert calibration_error(labels, before) == found
    assert calibration_error(labels, after) < found / 3


def test_the_calibration_error_of_several_labels_is_that_of_all_pairs() -> None:
    probabilities: Array = np.array([[0.95, 0.10], [0.96, 0.12]], np.float32)
    references: Array = np.array([[1, 0], [0, 0]], np.float32)
    expected = (abs(0.95 + 0.96 - 1) + abs(0.10 + 0.12)) / 4  # bins 14 and 1
    assert calibration_error(references, probabilities) == pytest.approx(expected)


# ---- Thresholds


def brute_force(p: Array, truth: Array, score: str) -> float:
    """The highest score of any threshold, by scikit-learn."""
    function: Any = {
        "f1": lambda y, x: metrics.f1_score(y, x, zero_division=0.0),
        "accuracy": metrics.accuracy_score,
        "balanced_accuracy": lambda y, x: metrics.recall_score(
            y, x, average="macro", zero_division=0.0
        ),
        "matthews_correlation": metrics.matthews_corrcoef,
    }[score]
    cuts = [-1.0, *np.unique(p).tolist()]
    return float(max(function(truth, p > cut) for cut in cuts if cut < 0 or cut in p))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("seed", range(2))
def test_a_threshold_reaches_the_highest_score_there_is(score: str, seed: int) -> None:
    logits, truth = multi(3, rows=40, seed=seed)
    p = torch.from_numpy(logits).sigmoid().numpy().round(1)  # with ties
    thresholds, fitted = fit_thresholds(p, truth, ThresholdScore(score))
    assert fitted.all()
    for column, threshold in enumerate(thresholds):
        x, y = p[:, column], truth[:, column]
        reached = score_of_predictions(
            ThresholdScore(score), (x > np.float32(threshold))[:, None], y[:, None]
        )
        assert reached == pytest.approx(brute_force(x, y, score))
        assert threshold == np.float32(threshold), "JSON keeps it"
        assert threshold == DEFAULT or not np.isin(np.float32(threshold), x)


@pytest.mark.parametrize("name", ["precision_at_recall", "recall_at_precision"])
def test_one_is_highest_where_the_other_is_high_enough(name: str) -> None:
    logits, truth = multi(4, rows=60, seed=5)
    p = torch.from_numpy(logits).sigmoid().numpy()
    thresholds, _ = fit_thresholds(p, truth, ThresholdScore(name, 0.8))
    for column, threshold in enumerate(thresholds):
        x, y = p[:, column], truth[:, column]
        precision, recall, _ = metrics.precision_recall_curve(y, x)
        if name == "precision_at_recall":
            best = precision[recall >= 0.8].max()
        else:
            best = recall[:-1][precision[:-1] >= 0.8].max()
        found = {
            "precision_at_recall": metrics.precision_score(y, x > threshold),
            "recall_at_precision": metrics.recall_score(y, x > threshold),
        }
        assert found[name] == pytest.approx(best)
    # No threshold reaches it: nothing changes.
    wrong: Array = np.array([[0.9], [0.2]], np.float32)
    assert fit_thresholds(wrong, np.array([[0], [1]]), ThresholdScore(name, 0.99))[0][0] in (
        0.5,
        pytest.approx(0.1),
    )


def test_micro_f1_is_the_highest_of_all_combinations() -> None:
    differs = 0
    for seed in range(4):
        logits, truth = multi(3, rows=8, seed=seed, scale=1.0)
        p = torch.from_numpy(logits).sigmoid().numpy().round(1)
        score = ThresholdScore("f1_micro")
        thresholds, fitted = fit_thresholds(p, truth, score)
        cuts = [[-1.0, *np.unique(p[:, i])] if fitted[i] else [DEFAULT] for i in range(p.shape[1])]
        best = max(
            2 * ((p > np.array(cut)) * truth).sum() / ((p > np.array(cut)).sum() + truth.sum())
            for cut in itertools.product(*cuts)
        )
        reached = score_of_predictions(score, p > np.array(thresholds, np.float32), truth)
        assert reached == pytest.approx(best)
        # The control: thresholds for the mean over labels are not those.
        others, _ = fit_thresholds(p, truth, F1)
        differs += score_of_predictions(score, p > np.array(others, np.float32), truth) < best
    assert differs


def test_labels_that_tell_nothing_and_scores_that_do_not_rise_keep_one_half() -> None:
    p: Array = np.array([[0.9, 0.2, 0.1, 0.3], [0.8, 0.4, 0.1, 0.2]], np.float32)
    truth: Array = np.array([[1, 0, 1, 1], [1, 0, 0, 0]])
    thresholds, fitted = fit_thresholds(p, truth, F1)
    assert thresholds == [0.5, 0.5, pytest.approx(0.05), pytest.approx(0.25)]
    assert fitted.tolist() == [False, False, True, True]  # each row has it; none has


def test_of_equal_scores_the_threshold_nearest_to_one_half() -> None:
    p: Array = np.array([[0.1], [0.2], [0.3], [0.9]], np.float32)
    assert fit_thresholds(p, np.array([[0], [1], [1], [1]]), F1)[0] == [pytest.approx(0.15)]
    above: Array = np.array([[0.95], [0.7], [0.6]], np.float32)
    assert fit_thresholds(above, np.array([[1], [0], [0]]), F1)[0] == [pytest.approx(0.825)]


def test_neighbouring_floats_zero_and_one_are_told_apart() -> None:
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    p: Array = np.array([[low], [high], [0], [1]], np.float32)
    for truth in ([0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]):
        y = np.array(truth)[:, None]
        (threshold,), _ = fit_thresholds(p, y, F1)
        reached = score_of_predictions(F1, p > np.float32(threshold), y)
        assert reached == max(
            score_of_predictions(F1, p > cut, y) for cut in (low, high, np.float32(0), 1.0)
        )


# ---- Of a task


def test_the_positive_one_of_two_labels_is_the_answer_above_its_threshold() -> None:
    logits, labels = logits_and_labels(2, rows=60, scale=1.0)
    logits[:, 1] -= 2  # a model that says "yes" too rarely
    z = torch.from_numpy(logits)
    for positive in (0, 1):
        task, notes = tune(SingleLabel(("no", "yes")), z, labels, "f1", positive)
        threshold = task.thresholds[positive]
        assert threshold is not None and task.thresholds[1 - positive] is None and not notes
        p = z.softmax(-1).numpy()[:, positive]
        predictions, _ = task.predict(z)
        assert ((predictions == positive) == (p > np.float32(threshold))).all()
        reached = metrics.f1_score(labels, predictions, pos_label=positive)
        assert reached == pytest.approx(brute_force(p, labels == positive, "f1"))
        assert reached > metrics.f1_score(labels, logits.argmax(1), pos_label=positive)
        answers = list(task.to_records(z))
        assert [x["label"] for x in answers] == [("no", "yes")[i] for i in predictions]
        shown = [x["score"] for x in answers]
        assert shown == pytest.approx(z.softmax(-1).numpy()[range(60), predictions].tolist())
        wrong = predictions != labels
        sizes = task.error_sizes(z, labels)
        assert (sizes[wrong] == np.array(shown, np.float32)[wrong]).all()
        assert not sizes[~wrong].any()


def test_labels_of_few_rows_and_of_none_are_named() -> None:
    logits, truth = multi(4, rows=100)
    truth[:, 1] = 0
    truth[:, 2] = np.arange(100) < 3
    task, notes = tune(MultiLabel(tuple("abcd")), torch.from_numpy(logits), truth, "f1", 1)
    assert task.thresholds[1] == 0.5 != task.thresholds[0]
    assert notes == [
        "The threshold 0.5 stays for 1 of 4 labels (b): no row has the label, or every row has it.",
        "Fewer than 10 rows with or without 1 of 4 labels (c): their thresholds depend on single "
        "rows.",
    ]
    restored = task_of_model(
        task.problem_type, task.labels, (), dict(zip("abcd", task.thresholds, strict=True))
    )
    z = torch.from_numpy(logits)
    assert (restored.predict(z)[0] == task.predict(z)[0]).all()
    assert (restored.predict(z)[0] != MultiLabel(tuple("abcd")).predict(z)[0]).any()


def test_other_rows_are_measured_without_and_with_what_was_fitted() -> None:
    logits, labels = logits_and_labels(2, rows=400)
    temperature, _ = fit_temperature(logits, labels)
    plain, folded = SingleLabel(("no", "yes")), torch.from_numpy(logits) / temperature
    tuned, _ = tune(plain, folded, labels, "f1", 1)
    before = measure(plain, torch.from_numpy(logits), labels, "f1", 1)
    after = measure(tuned, folded, labels, "f1", 1)
    entry = {
        "temperature": temperature,
        "threshold_for": "f1",
        "thresholds": {"yes": tuned.thresholds[1]},
        "fitted_on": {"data": "dev.tsv", "rows": 400},
        "in_sample": True,
        "before": before,
        "after": after,
        "notes": ["A note."],
    }
    assert check_calibration(entry) == entry
    again = measure_again(entry, tuned, folded, labels, 1)
    assert again["before"] == pytest.approx(before, rel=1e-5) and again["after"] == after
    assert not again["in_sample"] and "notes" not in again
    assert after["nll"] == pytest.approx(loss_at(logits, labels, temperature), rel=1e-6)
    assert after["nll"] < before["nll"] and after["f1"] >= before["f1"]
    first, note = calibration_notes({"calibration": entry})
    assert note == "A note." and "Fitted on 400 rows of dev.tsv: temperature " in first
    assert "rows of the fit, which flatter" in first
    (other,) = calibration_notes({"calibration": again})
    assert other.endswith("on these rows.") and calibration_notes({}) == []

    for broken in (
        [],
        {**entry, "temperature": 0.0},
        {**entry, "temperature": "x"},
        {**entry, "thresholds": 0.5},
        {**entry, "threshold_for": "f9"},
        {name: value for name, value in entry.items() if name != "after"},
    ):
        with pytest.raises(ConfigError):
            check_calibration(broken)


def test_other_rows_are_measured_by_the_label_of_the_threshold() -> None:
    """Also where --positive_label of the training is not given again."""
    logits, labels = logits_and_labels(2, rows=400)
    z, plain = torch.from_numpy(logits), SingleLabel(("no", "yes"))
    tuned, _ = tune(plain, z, labels, "f1", 0)
    assert tuned.thresholds[1] is None
    entry = {"temperature": None, "threshold_for": "f1"}
    again = measure_again(entry, tuned, z, labels, 1)
    assert again["before"] == pytest.approx(measure(plain, z, labels, "f1", 0))
    assert again["after"] == measure(tuned, z, labels, "f1", 0)
    assert again["after"]["f1"] != measure(tuned, z, labels, "f1", 1)["f1"]


def test_thresholds_of_a_config_are_checked() -> None:
    two, many = "single_label_classification", "multi_label_classification"
    assert task_of_model(two, ["a", "b"], (), {"b": 0.25}).thresholds == (None, 0.25)
    assert task_of_model(many, ["a", "b"], (), {"b": 0.25}).thresholds == (0.5, 0.25)
    assert task_of_model(many, ["a", "b"], (), {}).thresholds == ()
    for kind, labels, thresholds, problem in (
        (many, ["a", "b"], {"c": 0.5}, "names the label 'c': no such label"),
        (many, ["a", "b"], {"a": 2}, "threshold is 2; expected a probability"),
        (many, ["a", "b"], [0.5, 0.5], "expected numbers by label"),
        (two, ["a", "b"], {"a": 0.5, "b": 0.5}, "for one of two labels"),
        (two, ["a", "b", "c"], {"a": 0.5}, "for one of two labels"),
        ("regression", ["a"], {"a": 0.5}, "predicts a number"),
    ):
        with pytest.raises(ModelError, match=problem):
            task_of_model(kind, labels, (), thresholds)


def test_the_names_of_scores_are_those_of_the_metrics() -> None:
    predictions: Array = np.array([1, 1, 0, 1, 0])
    labels: Array = np.array([1, 0, 0, 1, 1])
    names = [*SCORES]
    metric = load_metrics(names, "single_label_classification", ["no", "yes"])
    expected = metric.compute(predictions, np.eye(2, dtype=np.float32)[predictions], labels)
    for name in names:
        score = parse_threshold_score(name)
        found = score_of_predictions(score, predictions[:, None], labels[:, None])
        assert found == pytest.approx(expected[name])
    _, truth = multi(3, rows=30)
    _, other = multi(3, rows=30, seed=1)
    several = load_metrics(["f1_macro", "f1_micro"], "multi_label_classification", list("abc"))
    expected = several.compute(other.astype(np.int64), other, truth.astype(np.int64))
    for name in expected:
        assert score_of_predictions(ThresholdScore(name), other, truth) == pytest.approx(
            expected[name]
        )
