"""Scores mean what the head of bertdist/tasks/metrics.py says: every expected value here was counted by hand from a small table.

Warnings are errors (setup.cfg), so each test also shows that nothing is said on the screen about 0 / 0 or an undefined score.
"""

import json
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import evaluate
import numpy as np
import pytest

from bertdist.core.errors import ConfigError, DataError
from bertdist.tasks import metrics
from bertdist.tasks.metric_names import LOWER_IS_BETTER
from bertdist.tasks.metrics import (
    BuiltinMetric,
    classification_report,
    default_metrics,
    load_metrics,
)

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
KINDS = [(SINGLE, "ab"), (SINGLE, "abc"), (MULTI, "abc"), (MULTI, "a"), (REGRESSION, "a")]
NONE = np.zeros((0, 0))


def score(
    names: str,
    problem_type: str,
    labels: str,
    predictions: Any,
    references: Any,
    probabilities: Any = NONE,
) -> dict[str, float]:
    opened = load_metrics(names.split(), problem_type, list(labels))
    return opened.compute(np.array(predictions), np.array(probabilities), np.array(references))


# Four labels; a: 2 found, 1 too many, 1 missed. b: 1 found, 1 missed. c: never true, once said. d: nowhere.
FOUR_TRUTH, FOUR_SAID = [0, 0, 0, 1, 1], [0, 0, 2, 1, 0]
FOUR = {
    "accuracy": 3 / 5,
    "precision_macro": (2 / 3 + 1 + 0 + 0) / 4,
    "recall_macro": (2 / 3 + 1 / 2 + 0 + 0) / 4,
    "f1_macro": (2 / 3 + 2 / 3 + 0 + 0) / 4,
    "precision_micro": 3 / 5,
    "recall_micro": 3 / 5,
    "f1_micro": 3 / 5,
    "precision_weighted": (3 * 2 / 3 + 2 * 1) / 5,
    "recall_weighted": (3 * 2 / 3 + 2 * 1 / 2) / 5,
    "f1_weighted": 2 / 3,
    "matthews_correlation": (3 * 5 - (3 * 3 + 2 * 1)) / math.sqrt((25 - 9 - 1 - 1) * (25 - 9 - 4)),
}
# Two labels: of three b 1 is found, nothing is called b wrongly. P(b) of the b: .9 wins 4 of 4, .4 wins 3 and ties 1, .3 wins 2.
TWO_TRUTH, TWO_SAID = [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]
TWO_PROBABLE = [[1 - p, p] for p in (0.9, 0.4, 0.3, 0.35, 0.2, 0.1, 0.4)]
TWO = {
    "f1": 1 / 2,
    "precision": 1.0,
    "recall": 1 / 3,
    "f1_macro": (1 / 2 + 8 / 10) / 2,
    "matthews_correlation": (1 * 4 - 0) / math.sqrt(1 * 3 * 4 * 6),
    "roc_auc": 9.5 / 12,
}
TWO_OTHER = {"f1": 8 / 10, "precision": 4 / 6, "recall": 1.0}  # of the a
# Three labels at once; a: 2 found, 1 too many. b: 1 found, 1 missed. c: nowhere. The third row has nothing, and nothing is said.
MANY_TRUTH = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
MANY_SAID = [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
MANY = {
    "accuracy": 2 / 4,
    "f1_micro": 6 / 8,
    "f1_macro": (4 / 5 + 2 / 3 + 0) / 3,
    "f1_weighted": (2 * 4 / 5 + 2 * 2 / 3) / 4,
    "f1_samples": (1 + 2 / 3 + 0 + 2 / 3) / 4,
    "precision_micro": 3 / 4,
    "precision_macro": (2 / 3 + 1 + 0) / 3,
    "precision_weighted": (2 * 2 / 3 + 2 * 1) / 4,
    "recall_micro": 3 / 4,
    "recall_macro": (1 + 1 / 2 + 0) / 3,
    "recall_weighted": (2 * 1 + 2 * 1 / 2) / 4,
    "jaccard_samples": (1 + 1 / 2 + 1 + 1 / 2) / 4,
    "jaccard_macro": (2 / 3 + 1 / 2 + 0) / 3,
}
NUMBERS_TRUTH, NUMBERS_SAID = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
NUMBERS = {
    "pearson": 1 / math.sqrt(28 / 3),
    "spearman": 1 - 6 * 2 / (3 * 8),
    "mse": 5 / 3,
    "mae": 1.0,
}


# ---- The numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_single_label_scores_count_labels_that_are_absent(name: str) -> None:
    assert score(name, SINGLE, "abcd", FOUR_SAID, FOUR_TRUTH) == {
        name: pytest.approx(FOUR[name], abs=1e-12)
    }


def test_macro_over_the_labels_that_occur_would_be_another_number() -> None:
    """The twin: what scikit-learn says when it is not told the labels."""
    from sklearn.metrics import f1_score

    assert f1_score(FOUR_TRUTH, FOUR_SAID, average="macro") == pytest.approx(4 / 9)
    assert FOUR["f1_macro"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", TWO)
def test_binary_scores_are_of_the_second_label(name: str) -> None:
    assert score(name, SINGLE, "ab", TWO_SAID, TWO_TRUTH, TWO_PROBABLE) == {
        name: pytest.approx(TWO[name], abs=1e-12)
    }


def test_binary_scores_of_the_other_label_differ() -> None:
    flipped = score(
        "f1 precision recall", SINGLE, "ab", [1 - p for p in TWO_SAID], [1 - t for t in TWO_TRUTH]
    )
    assert flipped == {
        "f1": pytest.approx(8 / 10),
        "precision": pytest.approx(4 / 6),
        "recall": 1.0,
    }


def test_binary_scores_where_the_second_label_is_absent_are_0() -> None:
    assert score("f1 precision recall", SINGLE, "ab", [0, 0], [0, 0]) == {
        "f1": 0.0,
        "precision": 0.0,
        "recall": 0.0,
    }


@pytest.mark.parametrize("dtype", ["int64", "float32"])
@pytest.mark.parametrize("name", MANY)
def test_multi_label_scores(name: str, dtype: str) -> None:
    """float32 is what the loss of such a task reads, and what its rows therefore hold."""
    truth = np.array(MANY_TRUTH, dtype=dtype)
    assert score(name, MULTI, "abc", MANY_SAID, truth) == {
        name: pytest.approx(MANY[name], abs=1e-12)
    }


def test_multi_label_with_one_label_is_about_that_label() -> None:
    """One column of 0 and 1 looks like two classes to scikit-learn, whose label 0 is the rows without: f1 4/5 instead of 2/3."""
    truth, said = [[1], [0], [1], [0]], [[1], [0], [0], [0]]
    found = score(
        "f1_micro f1_macro precision_macro recall_macro jaccard_macro accuracy",
        MULTI,
        "a",
        said,
        truth,
    )
    assert found == {
        "f1_micro": pytest.approx(2 / 3),
        "f1_macro": pytest.approx(2 / 3),
        "precision_macro": 1.0,
        "recall_macro": 0.5,
        "jaccard_macro": 0.5,
        "accuracy": 0.75,
    }
    assert score("jaccard_samples f1_samples", MULTI, "a", said, truth) == {
        "jaccard_samples": 3 / 4,
        "f1_samples": 1 / 4,
    }
    assert score("roc_auc", MULTI, "a", said, truth, [[0.9], [0.1], [0.3], [0.5]]) == {
        "roc_auc": 3 / 4
    }


def test_roc_auc_of_several_labels_is_the_mean_of_label_against_rest() -> None:
    probable = np.array([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6], [0.1, 0.5, 0.4]])
    expected = (2 / 4 + 2.5 / 3 + 3 / 3) / 3
    single = score("roc_auc", SINGLE, "abc", [0, 1, 2, 1], [0, 1, 2, 0], probable)
    multi = score(
        "roc_auc",
        MULTI,
        "abc",
        [[0] * 3] * 4,
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]],
        probable,
    )
    assert single == multi == {"roc_auc": pytest.approx(expected, abs=1e-12)}


def test_roc_auc_takes_probabilities_of_half_precision() -> None:
    """Their rows do not sum to 1 within 1e-5, which scikit-learn's own one-against-rest refuses."""
    probable = np.array([[0.6, 0.3, 0.101], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]], dtype=np.float16)
    assert score("roc_auc", SINGLE, "abc", [0, 1, 2], [0, 1, 2], probable) == {"roc_auc": 1.0}


@pytest.mark.parametrize("name", NUMBERS)
def test_regression_scores(name: str) -> None:
    assert score(name, REGRESSION, "a", NUMBERS_SAID, NUMBERS_TRUTH) == {
        name: pytest.approx(NUMBERS[name], abs=1e-12)
    }


def test_regression_is_counted_in_double_precision() -> None:
    """In float32, which the model answers in, 2**24 + 1 is 2**24, and the second row's error would be lost."""
    found = score("mae mse", REGRESSION, "a", np.float32([2**24, 0]), np.float32([0, 1]))
    assert found == {"mae": (2**24 + 1) / 2, "mse": (2**48 + 1) / 2}


# ---- Where there is no number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "problem_type", "labels", "said", "truth", "probable"),
    [
        ("roc_auc", SINGLE, "ab", [1, 0], [1, 1], [[0.2, 0.8], [0.6, 0.4]]),
        ("roc_auc", SINGLE, "abc", [0, 1], [0, 1], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]),
        ("roc_auc", MULTI, "ab", [[0, 0], [0, 0]], [[1, 0], [0, 0]], [[0.8, 0.1], [0.1, 0.8]]),
        ("roc_auc", SINGLE, "ab", [1, 0], [1, 0], [[math.nan, math.nan], [0.6, 0.4]]),
        ("pearson spearman", REGRESSION, "a", [0.5, 0.5, 0.5], [1.0, 2.0, 3.0], NONE),
        ("pearson spearman", REGRESSION, "a", [1.0, 2.0, 3.0], [0.5, 0.5, 0.5], NONE),
        ("pearson", REGRESSION, "a", [1.0, 1.0 + 2e-16, 1.0], [1.0, 2.0, 3.0], NONE),
        ("pearson spearman", REGRESSION, "a", [0.5], [1.0], NONE),
        ("pearson spearman mse mae", REGRESSION, "a", [math.nan, 1.0, 2.0], [1.0, 2.0, 3.0], NONE),
        ("pearson spearman mse mae", REGRESSION, "a", [math.inf, 1.0, 2.0], [1.0, 2.0, 3.0], NONE),
    ],
)
def test_an_undefined_score_is_nan_without_output(
    names: str,
    problem_type: str,
    labels: str,
    said: Any,
    truth: Any,
    probable: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = score(names, problem_type, labels, said, truth, probable)
    assert list(found) == names.split()
    assert all(type(value) is float and math.isnan(value) for value in found.values())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("truth", [[0, 0], [0, 1]])
def test_matthews_correlation_of_constant_predictions_is_0(truth: list[int]) -> None:
    assert score("matthews_correlation", SINGLE, "ab", [0, 0], truth) == {
        "matthews_correlation": 0.0
    }


@pytest.mark.parametrize(("problem_type", "labels"), KINDS)
def test_no_rows_is_a_data_error(problem_type: str, labels: str) -> None:
    rows = np.zeros((0, len(labels)) if problem_type == MULTI else 0, dtype=int)
    with pytest.raises(DataError, match="no rows"):
        load_metrics(default_metrics(problem_type), problem_type, list(labels)).compute(
            rows, NONE, rows
        )
    with pytest.raises(DataError, match="no rows"):
        classification_report(rows, rows, list(labels))


@pytest.mark.parametrize(("problem_type", "labels"), KINDS)
def test_one_row_is_enough(problem_type: str, labels: str) -> None:
    row = [[1, *[0] * (len(labels) - 1)]] if problem_type == MULTI else [0]
    names = [
        name
        for name, kind in metrics._METRICS.items()
        if problem_type in kind.problem_types and (len(labels) == 2 or not kind.binary)
    ]
    found = score(
        " ".join(names), problem_type, labels, row, row, [[1.0 / len(labels)] * len(labels)]
    )
    assert list(found) == names
    assert all(type(value) is float for value in found.values())


def test_inconsistent_arrays_are_assertion_errors() -> None:
    for said, truth in [
        ([0, 1], [0]),
        ([0, 2], [0, 1]),
        ([0, 1], [0, -1]),
        ([[0, 1, 0]], [[0, 1, 0]]),
    ]:
        with pytest.raises(AssertionError):
            score("accuracy", SINGLE, "ab", said, truth)
    with pytest.raises(AssertionError):
        score("roc_auc", SINGLE, "ab", [0, 1], [0, 1], [[0.5, 0.5]])


# ---- The class table -------------------------------------------------------------------------------------------------------------


def test_class_table_of_single_label() -> None:
    table = classification_report(np.array(FOUR_SAID), np.array(FOUR_TRUTH), list("abcd"))
    assert json.loads(json.dumps(table)) == {
        "labels": ["a", "b", "c", "d"],
        "per_class": [
            {
                "label": "a",
                "precision": pytest.approx(2 / 3),
                "recall": pytest.approx(2 / 3),
                "f1": pytest.approx(2 / 3),
                "rows": 3,
            },
            {"label": "b", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2},
            {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0},
            {"label": "d", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0},
        ],
        "confusion": [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    }


def test_confusions_of_many_labels_are_the_most_frequent_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth, said = np.random.default_rng(0).integers(0, 6, (2, 400))
    labels = list("abcdef")
    matrix = classification_report(said, truth, labels)["confusion"]
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and matrix[i][j]]
    pairs.sort(key=lambda pair: -matrix[pair[0]][pair[1]])
    expected = [
        {"label": labels[i], "predicted": labels[j], "rows": matrix[i][j]} for i, j in pairs
    ]
    monkeypatch.setattr(metrics, "MATRIX_LABELS", 5)
    table = classification_report(said, truth, labels)
    assert "confusion" not in table and len(table["per_class"]) == 6
    assert json.loads(json.dumps(table["confusions"])) == expected
    monkeypatch.setattr(metrics, "CONFUSIONS", 7)
    assert classification_report(said, truth, labels)["confusions"] == expected[:7]
    assert classification_report(truth, truth, labels)["confusions"] == []


def test_a_report_of_thousands_of_labels_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(labels: int) -> int:
        truth = np.arange(labels)
        report = classification_report(truth[::-1].copy(), truth, [f"l{i}" for i in truth])
        assert len(report["per_class"]) == labels
        return len(json.dumps(report))

    assert size(4000) < 4000 * 100 + metrics.CONFUSIONS * 60
    monkeypatch.setattr(metrics, "MATRIX_LABELS", 1000)  # the control
    assert size(1000) > 1000 * 1000


def test_class_table_of_multi_label_has_no_confusion() -> None:
    table = classification_report(
        np.array(MANY_SAID), np.array(MANY_TRUTH, dtype=np.float32), list("abc")
    )
    assert json.loads(json.dumps(table)) == {
        "labels": ["a", "b", "c"],
        "per_class": [
            {
                "label": "a",
                "precision": pytest.approx(2 / 3),
                "recall": 1.0,
                "f1": pytest.approx(0.8),
                "rows": 2,
            },
            {"label": "b", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2},
            {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0},
        ],
    }


def test_class_table_of_one_multi_label_column() -> None:
    table = classification_report(
        np.array([[1], [0], [0], [0]]), np.array([[1], [0], [1], [0]]), ["a"]
    )
    assert table["per_class"] == [
        {"label": "a", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2}
    ]


# ---- Names -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem_type", "labels"), KINDS)
def test_default_metrics_load(problem_type: str, labels: str) -> None:
    names = default_metrics(problem_type)
    assert load_metrics(names, problem_type, list(labels)).names == tuple(names)


def test_default_scores_start_with_the_main_score() -> None:
    assert default_metrics(SINGLE) == ["accuracy", "f1_macro"]
    assert default_metrics(MULTI) == ["f1_micro", "f1_macro", "accuracy", "jaccard_samples"]
    assert default_metrics(REGRESSION) == ["pearson", "spearman"]


def test_names_keep_their_order_without_duplicates() -> None:
    opened = load_metrics(["recall", "accuracy", "recall", "f1"], SINGLE, ["a", "b"])
    assert opened.names == ("recall", "accuracy", "f1")
    assert list(opened.compute(np.array([0, 1]), NONE, np.array([0, 1]))) == [
        "recall",
        "accuracy",
        "f1",
    ]


def test_lower_is_better_names_known_scores() -> None:
    assert LOWER_IS_BETTER - {"loss"} == {"log_loss", "ece", "mse", "rmse", "mae"}
    assert LOWER_IS_BETTER - {"loss"} <= set(metrics._METRICS)


@pytest.mark.parametrize(
    ("names", "problem_type", "labels", "lines"),
    [
        (["acuracy"], SINGLE, "ab", ["--metrics acuracy: unknown score. Did you mean 'accuracy'?"]),
        (
            ["qqq"],
            REGRESSION,
            "a",
            [
                "--metrics qqq: unknown score. Known: 'pearson', 'spearman', 'mse', 'rmse', 'mae', 'r2'."
            ],
        ),
        (
            ["f1"],
            SINGLE,
            "abc",
            [
                "--metrics f1: is for single_label_classification with two labels; this task is single_label_classification with 3 labels, "
                "which has f1_macro, f1_micro, f1_weighted."
            ],
        ),
        (
            ["pearson", "accuracy", "roc_auk"],
            SINGLE,
            "ab",
            [
                "--metrics pearson: is for regression; this task is single_label_classification, which has accuracy, f1, ",
                "'roc_auc'?",
            ],
        ),
        (
            ["recall"],
            MULTI,
            "ab",
            [
                "multi_label_classification with 2 labels, which has recall_macro, recall_micro, recall_weighted."
            ],
        ),
        (
            ["f1"],
            REGRESSION,
            "a",
            ["this task is regression, which has pearson, spearman, mse, rmse, mae, r2."],
        ),
        ([], SINGLE, "ab", ["--metrics names no score."]),
        (["./not/there.py"], SINGLE, "ab", ["--metrics ./not/there.py: there is no file /"]),
        (["./nowhere/"], SINGLE, "ab", ["nowhere/nowhere.py."]),
        (["hub:"], SINGLE, "ab", ["--metrics hub:: expected hub:NAME or hub:OWNER/NAME."]),
        (["hub:../accuracy"], SINGLE, "ab", ["expected hub:NAME or hub:OWNER/NAME."]),
        (["hub:/tmp/x.py"], SINGLE, "ab", ["expected hub:NAME or hub:OWNER/NAME."]),
    ],
)
def test_a_wrong_name_is_a_one_line_error(
    names: list[str], problem_type: str, labels: str, lines: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_metrics(names, problem_type, list(labels))
    told = str(caught.value).splitlines()
    assert len(told) == len(lines)
    assert all(line in message for line, message in zip(lines, told, strict=True)), told


# ---- evaluate, without its scripts, files and network ----------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("this must not be called")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty current folder, evaluate's caches beside it in `cache/`, and no sockets."""
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache" / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "cache" / "modules")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", metrics._METRICS)
def test_each_score_is_an_evaluate_metric_with_its_source(name: str, home: Path) -> None:
    kind = metrics._METRICS[name]
    metric = BuiltinMetric(name, kind.problem_types[0], 2)
    assert isinstance(metric, evaluate.Metric)
    assert set(metric.features) == {kind.reads, "references"}
    assert name in metric.description
    assert metric.citation
    page = "https://arxiv.org/abs/1706.04599" if name == "ece" else f"/{kind.source}.html"
    assert metric.info.reference_urls[0].endswith(page)
    assert not (home / "cache").exists(), "no folder is made in the cache of the user"


def test_arrays_lists_and_single_rows_give_the_same_score(home: Path) -> None:
    """Whole arrays skip evaluate's Arrow table, lists and `add` fill it: the same numbers to the last bit."""
    cases = [(name, SINGLE, 4, FOUR_SAID, FOUR_TRUTH) for name in FOUR] + [
        (name, MULTI, 3, MANY_SAID, MANY_TRUTH) for name in MANY
    ]
    cases += [("roc_auc", SINGLE, 2, TWO_PROBABLE, TWO_TRUTH)] + [
        (name, REGRESSION, 1, NUMBERS_SAID, NUMBERS_TRUTH) for name in NUMBERS
    ]
    for name, problem_type, labels, answers, truth in cases:
        metric = BuiltinMetric(name, problem_type, labels)
        reads = metric.spec.reads
        whole = metric.compute(**{reads: np.array(answers), "references": np.array(truth)})
        lists = metric.compute(**{reads: answers, "references": truth})
        metric.add_batch(**{reads: answers[:2], "references": truth[:2]})
        metric.add_batch(**{reads: np.array(answers[2:]), "references": np.array(truth[2:])})
        assert whole == lists == metric.compute(), name
        assert not math.isnan(whole[name])
    assert not (home / "cache").exists()


def test_added_rows_count_with_arrays_too(home: Path) -> None:
    metric = BuiltinMetric("accuracy", SINGLE, 2)
    metric.add_batch(predictions=[0, 0, 0], references=[1, 1, 1])
    assert metric.compute(predictions=np.array([1]), references=np.array([1])) == {
        "accuracy": 1 / 4
    }
    assert metric.compute(predictions=np.array([1]), references=np.array([1])) == {"accuracy": 1.0}


def test_arrays_do_not_pass_through_arrow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs more than the score; the twin shows that lists do."""
    metric, rows = BuiltinMetric("accuracy", SINGLE, 2), np.arange(1000) % 2
    monkeypatch.setattr(metric, "add_batch", refuse)
    assert metric.compute(predictions=rows, references=rows) == {"accuracy": 1.0}
    with pytest.raises(AssertionError, match="must not be called"):
        metric.compute(predictions=rows.tolist(), references=rows.tolist())


def test_two_scores_do_not_disturb_each_other_and_computing_again_gives_the_same() -> None:
    first, second = (
        load_metrics(["accuracy", "f1_macro"], SINGLE, list(labels)) for labels in ("abcd", "ab")
    )
    four, two = (
        (np.array(FOUR_SAID), NONE, np.array(FOUR_TRUTH)),
        (np.array(TWO_SAID), NONE, np.array(TWO_TRUTH)),
    )
    before = first.compute(*four)
    other = second.compute(*two)
    assert (
        first.compute(*four)
        == before
        == {name: pytest.approx(FOUR[name]) for name in ("accuracy", "f1_macro")}
    )
    assert (
        second.compute(*two)
        == other
        == {"accuracy": pytest.approx(5 / 7), "f1_macro": pytest.approx(TWO["f1_macro"])}
    )


def test_scores_leave_the_random_state_and_the_arrays_alone() -> None:
    before = np.random.get_state()[1].tolist()
    said, truth = np.array(MANY_SAID), np.array(MANY_TRUTH)
    score(" ".join(MANY), MULTI, "abc", said, truth)
    assert np.random.get_state()[1].tolist() == before
    assert said.tolist() == MANY_SAID
    assert truth.tolist() == MANY_TRUTH


# ---- A user's own metric ---------------------------------------------------------------------------------------------------------

OWN = """
import datasets
import evaluate
from pathlib import Path

Path({flag!r}).touch()

class Mine(evaluate.Metric):
    def _info(self):
        features = {{"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}}
        return evaluate.MetricInfo(description="d", citation="c", features=datasets.Features(features))

    def _compute(self, predictions, references):
        {body}
"""
HITS = 'return {"hits": sum(p == r for p, r in zip(predictions, references)), "rows": len(predictions)}'


def plant(path: Path, body: str = HITS) -> Path:
    """Write a metric; the flag that is returned exists once it has run."""
    flag = path.with_suffix(".ran").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OWN.format(flag=str(flag), body=body))
    return flag


@pytest.mark.parametrize(
    "name", ["./mine.py", "mine.py", "./mine/", "mine/mine.py", "./mine/../mine", "{absolute}"]
)
def test_a_metric_of_ones_own_is_loaded_by_its_path(name: str, home: Path) -> None:
    plant(Path("mine.py"))
    plant(Path("mine/mine.py"))
    opened = load_metrics(
        ["accuracy", name.format(absolute=home / "here" / "mine.py")], SINGLE, ["a", "b"]
    )
    found = opened.compute(np.array([0, 1, 1]), NONE, np.array([0, 1, 0]))
    assert found == {"accuracy": pytest.approx(2 / 3), "hits": 2.0, "rows": 3.0}
    assert list(found) == ["accuracy", "hits", "rows"]
    assert all(type(value) is float for value in found.values())
    assert found == opened.compute(np.array([0, 1, 1]), NONE, np.array([0, 1, 0]))


def test_a_metric_of_ones_own_is_read_again_when_it_has_changed(home: Path) -> None:
    rows = np.array([0, 1])
    plant(Path("mine.py"), 'return {"x": 1}')
    assert load_metrics(["./mine.py"], SINGLE, ["a", "b"]).compute(rows, NONE, rows) == {"x": 1.0}
    plant(Path("mine.py"), 'return {"x": 2}')
    assert load_metrics(["./mine.py"], SINGLE, ["a", "b"]).compute(rows, NONE, rows) == {"x": 2.0}


def test_a_duplicate_key_is_prefixed_with_the_metrics_name(home: Path) -> None:
    plant(Path("mine.py"), 'return {"accuracy": 7, "loss": 8, "own": 9}')
    rows = np.array([0, 1])
    for names in (["./mine.py", "accuracy"], ["accuracy", "./mine.py"]):
        found = load_metrics(names, SINGLE, ["a", "b"]).compute(rows, NONE, rows)
        assert found == {"accuracy": 1.0, "mine_accuracy": 7.0, "mine_loss": 8.0, "own": 9.0}


def test_a_metric_of_ones_own_may_read_probabilities_and_multi_label_rows(home: Path) -> None:
    body = 'return {"x": sum(map(sum, probabilities)), "y": sum(map(sum, references)), "int": isinstance(references[0][0], int)}'
    text = OWN.format(flag="ran", body=body).replace("predictions", "probabilities")
    for name, before, after in [
        ("probabilities", "int64", "float64"),
        ("references", "int64", "int64"),
    ]:
        text = text.replace(
            f'"{name}": datasets.Value("{before}")',
            f'"{name}": datasets.List(datasets.Value("{after}"))',
        )
    Path("mine.py").write_text(text)
    truth = np.array([[1, 1], [0, 1]], dtype=np.float32)
    found = load_metrics(["./mine.py"], MULTI, ["a", "b"]).compute(
        np.zeros((2, 2), dtype=int), np.array([[0.5, 0.25], [1.0, 0.0]]), truth
    )
    assert found == {"x": 1.75, "y": 3.0, "int": 1.0}


def test_a_metric_of_ones_own_draws_the_same_random_numbers_in_every_run(home: Path) -> None:
    plant(Path("mine.py"), 'import numpy; return {"x": numpy.random.random()}')
    rows = np.array([0, 1])
    found = []
    for _ in range(2):
        np.random.random(3)  # what else the process draws
        found.append(load_metrics(["./mine.py"], SINGLE, ["a", "b"]).compute(rows, NONE, rows))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class", "cannot be loaded: SyntaxError: invalid syntax (mine.py, line 1)."),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero."),
        (
            "import not_a_package",
            "cannot be loaded: ImportError: To be able to use mine, you need to install the following dependencies",
        ),
        (
            "x = 1",
            "Expected `import evaluate`, not `from evaluate import Metric`, and one `class Name(evaluate.Metric)`.",
        ),
        (
            "from evaluate import Metric\n\nclass Mine(Metric):\n    pass\n",
            "NotImplementedError. Expected `import evaluate`, not",
        ),
        (
            OWN.format(flag="ran", body="pass").replace("predictions", "prediction_scores"),
            "reads prediction_scores; a metric here may",
        ),
    ],
)
def test_a_metric_that_cannot_be_loaded_is_a_one_line_error(
    text: str, said: str, home: Path
) -> None:
    Path("mine.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_metrics(["accuracy", "./mine.py"], SINGLE, ["a", "b"])
    assert str(caught.value).startswith("--metrics ./mine.py: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        'raise KeyError("gone\\n wrong")',
        "return None",
        "return 0.5",
    ],
)
def test_a_metric_that_fails_is_a_one_line_error(body: str, home: Path) -> None:
    plant(Path("mine.py"), body)
    opened = load_metrics(["./mine.py"], SINGLE, ["a", "b"])
    with pytest.raises(
        ConfigError, match=r"^--metrics ./mine.py: failed on 2 rows: \w+Error: .+$"
    ) as caught:
        opened.compute(np.array([0, 1]), NONE, np.array([0, 1]))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None, (
        "with --debug or in a notebook the traceback into the user's file is there"
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("None", "None (NoneType)"),
        ("'much'", "'much' (str)"),
        ("[1, 2]", "[1, 2] (list)"),
        ("float('nan')", "nan (float)"),
        ("10 ** 400", f"1{'0' * 59}... (int)"),
        ("1j", "1j (complex)"),
    ],
)
def test_a_value_that_is_not_a_number_is_nan(value: str, what: str, home: Path) -> None:
    plant(Path("mine.py"), f'return {{"x": {value}, "y": "0.5", "z": True}}')
    opened = load_metrics(["./mine.py"], SINGLE, ["a", "b"])
    rows = np.array([0, 1])
    found = opened.compute(rows, NONE, rows)
    assert math.isnan(found.pop("x")) and found == {"y": 0.5, "z": 1.0}
    assert opened.not_numbers == {"x": what}


# ---- Never a script that happens to stand in the current folder ------------------------------------------------------------------


def test_no_name_runs_a_file_of_the_current_folder(home: Path) -> None:
    flags = [plant(Path(f"{name}/{name}.py")) for name in metrics._METRICS] + [
        plant(Path(f"{name}.py")) for name in metrics._METRICS
    ]
    for problem_type, labels in KINDS:
        for name, kind in metrics._METRICS.items():
            if problem_type in kind.problem_types and (len(labels) == 2 or not kind.binary):
                load_metrics([name], problem_type, list(labels))
    assert not any(flag.exists() for flag in flags)


def test_evaluate_load_of_a_bare_name_runs_it(home: Path) -> None:
    """The twin: why no name is given to `evaluate.load`, and that the flag of the test above can be raised."""
    flag = plant(Path("accuracy/accuracy.py"))
    evaluate.load("accuracy", keep_in_memory=True)
    assert flag.exists()


def test_an_unknown_name_of_a_folder_here_is_not_run_but_explained(home: Path) -> None:
    flag = plant(Path("mine/mine.py"))
    with pytest.raises(
        ConfigError, match=r"unknown score\..* For your own metric in this folder write ./mine\.$"
    ):
        load_metrics(["mine"], SINGLE, ["a", "b"])
    assert not flag.exists()


def test_a_hub_metric_is_loaded_from_the_hub_only(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        evaluate,
        "load",
        lambda path, **options: (
            asked.append((path, options)) or BuiltinMetric("accuracy", SINGLE, 2)
        ),
    )
    flag = plant(Path("accuracy/accuracy.py"))
    load_metrics(["hub:accuracy", "hub:someone/their-metric"], SINGLE, ["a", "b"])
    options = {"module_type": "metric", "keep_in_memory": True, "seed": 0}
    assert asked == [("evaluate-metric/accuracy", options), ("someone/their-metric", options)]
    assert not flag.exists()


@pytest.mark.parametrize(
    ("name", "in_the_way"),
    [
        ("hub:accuracy", "evaluate-metric/accuracy/accuracy.py"),
        ("hub:someone/theirs", "someone/theirs/theirs.py"),
    ],
)
def test_a_local_file_named_like_a_hub_metric_is_not_run(
    name: str, in_the_way: str, home: Path
) -> None:
    flag = plant(Path(in_the_way))
    with pytest.raises(
        ConfigError,
        match=f"./{in_the_way} would be loaded instead; for that file write ./{in_the_way}.",
    ):
        load_metrics([name], SINGLE, ["a", "b"])
    assert not flag.exists()


def test_rows_of_labels_are_whole_numbers() -> None:
    """Also of one row, where scikit-learn counts in floats."""
    for truth in ([1], [1, 0]):
        report = classification_report(np.array(truth), np.array(truth), ["a", "b"])
        rows = [entry["rows"] for entry in report["per_class"]]
        assert sum(rows) == len(truth) and all(type(x) is int for x in rows)
