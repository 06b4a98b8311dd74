"""top_k and threshold: which labels of a prediction are given."""

from typing import Any

import numpy as np
import pytest
import torch

from bertdist.core.errors import ConfigError
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task, check_answer

ONE = SingleLabel(("a", "b", "c", "d"))
MANY = MultiLabel(("a", "b", "c", "d"))
TWO = SingleLabel(("no", "yes"), thresholds=(None, 0.9))
LOGITS = torch.tensor([[0.0, 2.0, 1.0, 1.0], [5.0, -5.0, 0.0, 0.0]])


def answers(task: Task, *options: Any) -> list[Any]:
    return [
        [(x["label"], round(x["score"], 4)) for x in answer.get("labels", [answer])]
        for answer in task.to_records(LOGITS, *options)
    ]


def test_the_k_most_probable_labels_of_equal_ones_the_first() -> None:
    soft, sigmoid = LOGITS.softmax(-1), LOGITS.sigmoid()
    for task, p in ((ONE, soft), (MANY, sigmoid)):
        expected = [
            [("b", p[0, 1]), ("c", p[0, 2]), ("d", p[0, 3]), ("a", p[0, 0])],
            [("a", p[1, 0]), ("c", p[1, 2]), ("d", p[1, 3]), ("b", p[1, 1])],
        ]
        rounded = [[(name, round(float(x), 4)) for name, x in row] for row in expected]
        for k in (1, 2, 4, 100):
            assert answers(task, k) == [row[:k] for row in rounded]


def test_a_single_label_below_the_threshold_is_none() -> None:
    assert [row[0][0] for row in answers(ONE)] == ["b", "a"]
    assert [row[0][0] for row in answers(ONE, None, 0.9)] == [None, "a"]
    assert answers(ONE, None, 0.9)[0][0][1] == answers(ONE)[0][0][1], "with its score"
    assert [len(row) for row in answers(ONE, 3, 0.19)] == [3, 1]
    assert [len(row) for row in answers(ONE, 3, 0.5)] == [1, 1]


def test_multi_label_rows_have_all_labels_above_the_threshold() -> None:
    assert [[name for name, _ in row] for row in answers(MANY)] == [["b", "d", "c"], ["a"]]
    assert [[name for name, _ in row] for row in answers(MANY, None, 0.8)] == [["b"], ["a"]]
    assert [[name for name, _ in row] for row in answers(MANY, None, 0.0)][1][0] == "a"
    assert [[name for name, _ in row] for row in answers(MANY, 2, 0.8)] == [["b"], ["a"]]
    assert [len(row) for row in answers(MANY, 2)] == [2, 2], "top_k alone has no threshold"


@pytest.mark.parametrize(
    ("task", "top_k", "threshold", "problem"),
    [
        (ONE, 0, None, "top_k is 0; expected a number of labels"),
        (ONE, True, None, "top_k is True"),
        (ONE, "2", None, "top_k is '2'"),
        (ONE, None, 1.5, "threshold is 1.5; expected a probability"),
        (ONE, None, float("nan"), "threshold is nan"),
        (ONE, None, "0.5", "threshold is '0.5'; expected a probability"),
        (ONE, None, [0.5], r"threshold is \[0.5\]"),
        (ONE, None, True, "threshold is True"),
        (ONE, 4, 0.5, "A threshold cannot take effect where every label is given"),
        (ONE, None, {"b": 0.5}, "for models with several labels per text, or for one of two"),
        (TWO, None, {"yes": 0.5, "no": 0.5}, "or for one of two labels"),
        (TWO, None, {"yes": 2}, "threshold is 2; expected a probability"),
        (TWO, 1, {"yes": 0.5}, "A threshold of a label chooses the answer, and top_k"),
        (MANY, None, {"e": 0.5}, "threshold names the label 'e': no such label"),
        (Regression(("score",)), 2, None, "this model predicts a number"),
        (Regression(("score",)), None, 0.5, "this model predicts a number"),
    ],
)
def test_what_cannot_be_is_refused(task: Task, top_k: Any, threshold: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_answer(task, top_k, threshold)
    check_answer(ONE, 3, 0.5)
    check_answer(ONE, None, np.float32(0.5))  # type: ignore[arg-type]
    check_answer(ONE, None, 1)
    check_answer(Regression(("score",)), None, None)


def test_thresholds_of_labels_replace_those_of_the_task() -> None:
    z = torch.tensor([[0.0, 2.0], [0.0, 4.0], [1.0, 0.0]])  # yes: 0.88, 0.98, 0.27

    def labels(*options: Any) -> list[Any]:
        return [x["label"] for x in TWO.to_records(z, *options)]

    assert labels() == ["no", "yes", "no"]
    assert labels(None, {"yes": 0.2}) == ["yes", "yes", "yes"]
    assert labels(None, {"no": 0.1}) == ["no", "yes", "no"]
    assert labels(None, 0.5) == ["yes", "yes", "no"], "a number has the usual answers"
    assert next(TWO.to_records(z))["score"] == pytest.approx(0.1192, abs=1e-4)

    tuned = MultiLabel(MANY.labels, thresholds=(0.5, 0.95, 0.6, 0.8))
    assert [[name for name, _ in row] for row in answers(tuned)] == [["c"], ["a"]]
    names = [[name for name, _ in row] for row in answers(tuned, None, {"b": 0.5, "a": 0.4})]
    assert names == [["b", "c", "a"], ["a"]]
    assert [[name for name, _ in row] for row in answers(tuned, None, 0.8)] == [["b"], ["a"]]
    assert [len(row) for row in answers(tuned, 2)] == [2, 2], "top_k alone has no threshold"
    assert [len(row) for row in answers(tuned, 2, {"b": 0.5})] == [2, 1]
