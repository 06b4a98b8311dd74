"""Which labels are doubted, from probabilities written by rule: wrong ones are found, and where there is nothing to find nothing is."""

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bertdist.core.errors import ConfigError, DataError
from bertdist.data_quality.label_issues import RANKINGS, need_cleanlab, rank_label_issues

ROWS, WRONG = 400, 40


def judged(outputs: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Labels (ROWS,), probabilities (ROWS, outputs) of a model that is right, and which labels are wrong: a tenth."""
    random = np.random.default_rng(seed)
    truth = random.integers(outputs, size=ROWS)
    logits = random.normal(size=(ROWS, outputs)) + 4 * np.eye(outputs)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = np.zeros(ROWS, bool)
    wrong[random.permutation(ROWS)[:WRONG]] = True
    return np.where(wrong, (truth + 1) % outputs, truth), probabilities, wrong


def share_at_the_head(order: Any, wrong: Any) -> float:
    """Of the wrong labels, how many are among the first WRONG."""
    return float(wrong[order[:WRONG]].sum() / wrong.sum())


@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("outputs", [2, 5])
def test_wrong_labels_stand_at_the_head(rank_by: str, outputs: int) -> None:
    labels, probabilities, wrong = judged(outputs)
    doubts = rank_label_issues(
        "single_label_classification", labels, probabilities.argmax(1), probabilities, rank_by
    )
    assert sorted(doubts.order) == list(range(ROWS))
    assert share_at_the_head(doubts.order, wrong) > 0.8
    assert wrong[doubts.issues].mean() > 0.8 and doubts.issues[wrong].mean() > 0.6


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_probabilities_of_other_rows_find_nothing(rank_by: str) -> None:
    labels, probabilities, wrong = judged(3)
    other = np.random.default_rng(1).permutation(probabilities)
    doubts = rank_label_issues(
        "single_label_classification", labels, other.argmax(1), other, rank_by
    )
    assert share_at_the_head(doubts.order, wrong) < 0.25  # a tenth is chance


def test_labels_that_the_model_agrees_with_are_not_marked() -> None:
    _, probabilities, _ = judged(3)
    doubts = rank_label_issues(
        "single_label_classification",
        probabilities.argmax(1),
        probabilities.argmax(1),
        probabilities,
    )
    assert not doubts.issues.any()


def test_confident_learning_puts_what_is_marked_first_and_the_others_do_not() -> None:
    labels, probabilities, _ = judged(5)
    marked = {}
    for rank_by in RANKINGS:
        doubts = rank_label_issues(
            "single_label_classification", labels, probabilities.argmax(1), probabilities, rank_by
        )
        marked[rank_by] = doubts.issues[doubts.order].astype(int)
    assert (np.diff(marked["confident_learning"]) <= 0).all()
    assert any(
        (np.diff(order) > 0).any()
        for rank_by, order in marked.items()
        if rank_by != "confident_learning"
    )


def test_the_order_is_that_of_the_scores_and_equal_scores_keep_the_order_of_rows() -> None:
    probabilities = np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    doubts = rank_label_issues(
        "single_label_classification",
        np.array([0, 1, 1, 1]),
        probabilities.argmax(1),
        probabilities,
    )
    assert doubts.order.tolist() == [1, 0, 2, 3]
    assert doubts.scores == pytest.approx([0.5, 0.1, 0.5, 0.8])


def test_rows_of_one_label_are_judged_by_what_the_model_says() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    doubts = rank_label_issues(
        "single_label_classification", np.zeros(3, int), probabilities.argmax(1), probabilities
    )
    assert doubts.order.tolist() == [1, 2, 0] and doubts.issues.tolist() == [False, True, False]


def test_labels_of_the_model_that_no_row_has_do_no_harm() -> None:
    labels, probabilities, wrong = judged(3)
    wider = np.concatenate([probabilities, np.full((ROWS, 1), 1e-6)], axis=1)
    doubts = rank_label_issues("single_label_classification", labels, wider.argmax(1), wider)
    assert share_at_the_head(doubts.order, wrong) > 0.8


def several(seed: int = 0) -> tuple[Any, Any, Any]:
    """0/1 labels (ROWS, 4), the last given to all rows and the one before it to none, probabilities, and which rows are wrong."""
    random = np.random.default_rng(seed)
    truth = random.integers(2, size=(ROWS, 4))
    truth[:, 2:] = [0, 1]
    probabilities = 1 / (1 + np.exp(-(random.normal(size=(ROWS, 4)) + 8 * (truth - 0.5))))
    wrong = np.zeros(ROWS, bool)
    wrong[random.permutation(ROWS)[:WRONG]] = True
    labels = truth.astype(np.float32)
    labels[wrong, 0] = 1 - labels[wrong, 0]
    return labels, probabilities, wrong


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_wrong_sets_of_labels_stand_at_the_head(rank_by: str) -> None:
    labels, probabilities, wrong = several()
    doubts = rank_label_issues(
        "multi_label_classification",
        labels,
        (probabilities > 0.5).astype(int),
        probabilities,
        rank_by,
    )
    assert sorted(doubts.order) == list(range(ROWS))
    assert share_at_the_head(doubts.order, wrong) > 0.8
    assert wrong[doubts.issues].mean() > 0.6


def test_sets_of_labels_that_others_are_judged_by_find_nothing() -> None:
    labels, probabilities, wrong = several()
    other = np.random.default_rng(1).permutation(probabilities)
    doubts = rank_label_issues(
        "multi_label_classification", labels, (other > 0.5).astype(int), other
    )
    assert share_at_the_head(doubts.order, wrong) < 0.25


def test_some_rows_may_have_no_label_but_not_all() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.1], [0.3, 0.8]])
    predictions = (probabilities > 0.5).astype(int)
    doubts = rank_label_issues(
        "multi_label_classification", np.array([[0, 0], [0, 0], [0, 1]]), predictions, probabilities
    )
    assert doubts.order.tolist() == [0, 2, 1] and doubts.issues.tolist() == [True, False, False]
    with pytest.raises(DataError, match="No row has a label"):
        rank_label_issues(
            "multi_label_classification", np.zeros((3, 2)), predictions, probabilities
        )


def test_numbers_are_ranked_by_how_far_off_they_are() -> None:
    random = np.random.default_rng(0)
    truth = random.uniform(0, 5, ROWS)
    said = (truth + random.normal(scale=0.2, size=ROWS) + 0.5).astype(
        np.float32
    )  # all a little too high: that is no doubt of any one
    given, wrong = truth.copy(), np.arange(ROWS) < WRONG
    given[wrong] += 2
    doubts = rank_label_issues("regression", given, said, said[:, None])
    assert share_at_the_head(doubts.order, wrong) == 1 and (doubts.issues == wrong).mean() > 0.98
    assert ((doubts.scores >= 0) & (doubts.scores <= 1)).all()
    assert (
        share_at_the_head(
            rank_label_issues("regression", given, random.permutation(said), said[:, None]).order,
            wrong,
        )
        < 0.4
    )


def test_numbers_that_are_told_exactly_are_not_doubted() -> None:
    given = np.arange(10.0)
    assert (
        rank_label_issues("regression", given, given, given[:, None]).scores.tolist() == [1.0] * 10
    )
    one_off = np.where(np.arange(10) == 3, 7.0, given)
    doubts = rank_label_issues("regression", one_off, given, given[:, None])
    assert doubts.order[0] == 3 and doubts.issues.tolist() == (np.arange(10) == 3).tolist()


def test_an_answer_that_is_no_number_is_named() -> None:
    probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]])
    with pytest.raises(DataError, match="answer to row 1 is not a number"):
        rank_label_issues(
            "single_label_classification", np.array([0, 1]), np.array([0, 0]), probabilities
        )


def test_a_missing_cleanlab_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return import_(name, *rest)

    need_cleanlab()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"^Doubting labels needs cleanlab.*pip install bertdist\[noise\]\.$"
    ):
        need_cleanlab()


def test_the_module_does_not_need_cleanlab_to_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import bertdist.data_quality.label_issues as module

    seen: Sequence[str] = [name for name in vars(importlib.reload(module)) if "cleanlab" in name]
    assert seen == ["need_cleanlab"]
