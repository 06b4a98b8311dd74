"""A model that gives the same answer for every row is named, one that does not is not."""

import numpy as np
import pytest

from bertdist.core.types import Array
from bertdist.tasks.constant_answers import describe_constant_answers
from bertdist.tasks.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL

LABELS = ("negative", "positive", "neutral")
SCORES = {"loss": 0.7, "accuracy": 0.6, "f1_macro": 0.25}


def told(kind: str, predictions: Array, references: Array, **scores: float) -> str:
    return describe_constant_answers(kind, predictions, references, LABELS, scores or SCORES)


def test_one_label_for_all() -> None:
    truth = np.array([0] * 600 + [1] * 300 + [2] * 100)
    always = np.zeros(1000, np.int64)
    assert told(SINGLE_LABEL, always, truth) == (
        "All 1,000 answers are 'negative': accuracy is only the share of that label, 0.6000; "
        "f1_macro is 0.2500."
    )
    assert "; --metrics f1_macro counts every label alike." in told(
        SINGLE_LABEL, always, truth, accuracy=0.6
    )
    always[700:705] = 1
    assert told(SINGLE_LABEL, always, truth) == (
        "995 of 1,000 answers are 'negative': accuracy is only about the share of that label, "
        "0.6000; f1_macro is 0.2500."
    )


@pytest.mark.parametrize("others", [11, 50, 500])
def test_answers_that_differ_are_not_named(others: int) -> None:
    truth = np.array([0] * 600 + [1] * 400)
    answers = np.array([0] * (1000 - others) + [1] * others)
    assert told(SINGLE_LABEL, answers, truth) == ""


def test_labels_that_are_as_much_alike_are_not_named() -> None:
    truth = np.array([0] * 999 + [1])
    assert told(SINGLE_LABEL, truth, truth) == ""
    assert told(SINGLE_LABEL, np.array([1] * 1000), truth).startswith("All 1,000 answers are 'pos")
    assert told(SINGLE_LABEL, np.zeros(5, int), np.array([0, 1, 0, 1, 0])) == "", "too few rows"


def test_one_set_of_labels_for_all() -> None:
    truth = np.eye(3, dtype=np.int64)[np.arange(60) % 3]
    always = np.tile([1, 0, 1], (60, 1))
    assert told(MULTI_LABEL, always, truth) == (
        "All 60 answers are the same, 'negative', 'neutral': f1_macro is 0.2500."
    )
    assert told(MULTI_LABEL, truth, truth) == ""
    assert told(MULTI_LABEL, np.zeros_like(truth), truth) == "", "the suggested threshold says it"


def test_one_number_for_all() -> None:
    truth = np.linspace(0, 5, 100)
    noise = np.random.default_rng(0).normal(size=100)
    assert told(REGRESSION, (2.5 + 0.01 * noise).astype(np.float32), truth).startswith(
        "All 100 answers are nearly the same number, from 2.4"
    )
    constant = np.full(100, 2.5, np.float32)
    assert told(REGRESSION, constant, truth) == (
        "All 100 answers are nearly the same number, 2.5; the mean of the true numbers is 2.5."
    )
    assert told(REGRESSION, (2.5 + 0.2 * noise).astype(np.float32), truth) == ""
    assert told(REGRESSION, np.full(100, np.nan, np.float32), truth) == ""
    assert told(REGRESSION, constant, np.full(100, 2.5)) == "", "so are the true numbers"
