"""--threshold and --threshold_for, before torch is loaded."""

import pytest

from bertdist.core.config import EvaluateConfig, PredictConfig
from bertdist.core.errors import ConfigError
from bertdist.core.thresholds import parse_threshold, parse_threshold_score


def test_one_number_or_one_of_each_label_that_is_named() -> None:
    assert parse_threshold(None) is None and parse_threshold([]) is None
    assert parse_threshold(["0.3"]) == 0.3
    assert parse_threshold(["joy=0.2", "a=b=1", "0.5=0"]) == {"joy": 0.2, "a=b": 1.0, "0.5": 0.0}
    assert PredictConfig(threshold=0.3).threshold == ["0.3"]  # type: ignore[arg-type]
    assert EvaluateConfig(threshold=["x=0.3"]).threshold == ["x=0.3"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["high"], "--threshold is high; expected a probability from 0 to 1, or LABEL=0.3"),
        (["1.5"], "--threshold is 1.5"),
        (["nan"], "--threshold is nan"),
        (["joy=-0.1"], "--threshold is joy=-0.1"),
        (["joy="], "--threshold is joy="),
        (["0.3", "0.4"], "expected one number, or LABEL=NUMBER for each"),
        (["0.3", "joy=0.4"], "expected one number, or LABEL=NUMBER for each"),
        (["joy=0.3", "joy=0.4"], "--threshold names 'joy' twice"),
    ],
)
def test_what_is_no_threshold_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("[", r"\[")):
        parse_threshold(words)


def test_scores_are_names_and_two_of_them_have_a_number() -> None:
    assert parse_threshold_score("f1") == ("f1", 0.0)
    assert parse_threshold_score("precision_at_recall=0.9") == ("precision_at_recall", 0.9)
    for text, problem in {
        "f2": "no such score. .*'f1', 'f1_macro'",
        "precision_at_recall": "expected the least recall, above 0 and at most 1",
        "recall_at_precision=0": "expected the least precision",
        "f1=0.9": "f1 takes no number",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            parse_threshold_score(text)
    fits = parse_threshold_score("accuracy").problem
    assert fits(is_multi_label=False) == "" and "has f1, f1_macro" in fits(is_multi_label=True)
    assert "a task with two labels has f1, accuracy" in parse_threshold_score("f1_micro").problem(
        is_multi_label=False
    )
