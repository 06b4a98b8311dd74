"""Rows of several runs are matched by text and truth, and labels by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_runs import MULTI, REGRESSION, write_rows

from bertdist.reporting.matched_rows import MatchedRows, match_rows, read_texts, row_losses
from bertdist.reporting.run_folder import read_scored_rows


def matched(tmp_path: Path, *runs: dict[str, Any]) -> MatchedRows | None:
    scored = []
    for number, rows in enumerate(runs):
        write_rows(tmp_path / str(number), **rows)
        found = read_scored_rows(tmp_path / str(number))
        assert found is not None
        scored.append(found)
    return match_rows(scored, [read_texts(rows.path) for rows in scored])


A = {
    "labels": ("x", "y"),
    "texts": ["a", "b", "b", "c", "d"],
    "truth": [0, 1, 1, 0, None],
    "probabilities": [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [1, 0]],
}


def test_rows_in_another_order_with_labels_in_another_order_are_the_same(tmp_path: Path) -> None:
    b = {
        "labels": ("y", "x", "z"),
        "texts": ["b", "new", "c", "a", "b", "d"],
        "truth": [0, 2, 1, 1, 0, 1],
        "probabilities": [[0.9, 0.1, 0], [0, 0, 1], [0.2, 0.8, 0], [0.3, 0.6, 0.1], [0.5, 0.2, 0.3], [0, 1, 0]],
    }  # fmt: skip
    found = matched(tmp_path, A, b)
    assert found is not None
    assert found.labels == ("x", "y", "z") and found.lacking == (("z",), ())
    assert [rows.tolist() for rows in found.rows] == [[0, 1, 2, 3], [3, 0, 4, 2]]
    assert found.truth.tolist() == [0, 1, 1, 0] and found.totals == (5, 6)
    assert np.allclose(found.probabilities[1], [[0.6, 0.3, 0.1], [0.1, 0.9, 0], [0.2, 0.5, 0.3], [0.8, 0.2, 0]])  # fmt: skip
    assert found.predictions[1].tolist() == [0, 1, 1, 0]
    assert found.is_right(1).all() and found.is_right(0).all()
    assert not found.all_shared and not found.in_order and found.relabelled == 0


def test_equal_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = {**A, "truth": [0, 1, 1, 0, 1]}
    found = matched(tmp_path, rows, rows, rows)
    assert found is not None and found.all_shared and found.in_order and len(found) == 5
    assert found.is_right(2).tolist() == [True, True, True, True, False]


def test_a_text_with_another_truth_is_left_out_and_counted(tmp_path: Path) -> None:
    found = matched(tmp_path, A, {**A, "truth": [1, 1, 1, 0, 0]})
    assert found is not None
    assert found.rows[0].tolist() == [1, 2, 3] and found.relabelled == 1


def test_rows_that_one_run_has_more_often_are_not_relabelled(tmp_path: Path) -> None:
    found = matched(tmp_path, A, {key: value[:2] for key, value in A.items()})
    assert found is not None
    assert found.rows[0].tolist() == [0, 1] and found.relabelled == 0


def test_nothing_shared_and_other_tasks_do_not_match(tmp_path: Path) -> None:
    assert matched(tmp_path / "1", A, {**A, "texts": list("vwxyz")}) is None
    numbers = {"problem_type": REGRESSION, "labels": ("score",), "truth": [1.0] * 5}
    other = {**A, **numbers, "probabilities": [[1.0]] * 5}
    assert matched(tmp_path / "2", A, other) is None
    assert matched(tmp_path / "3", other, other) is not None, "the control"


def test_sets_of_labels_by_name_and_threshold(tmp_path: Path) -> None:
    a = {
        "problem_type": MULTI,
        "labels": ("x", "y"),
        "texts": ["a", "b", "c"],
        "truth": [[0], [], [0, 1]],
        "probabilities": [[0.9, 0.4], [0.1, 0.1], [0.6, 0.45]],
    }
    b = {**a, "labels": ("y", "x"), "truth": [[1], [], [0, 1]], "threshold": 0.4}
    found = matched(tmp_path, a, b)
    assert found is not None and found.all_shared
    assert found.truth.tolist() == [[True, False], [False, False], [True, True]]
    assert found.predictions[0].tolist() == [[True, False], [False, False], [True, False]]
    assert found.predictions[1].tolist() == [[False, True], [False, False], [True, True]]
    reordered = {key: value[::-1] if isinstance(value, list) else value for key, value in b.items()}
    again = matched(tmp_path / "again", a, reordered)
    assert again is not None and again.rows[1].tolist() == [2, 1, 0]
    assert np.array_equal(again.predictions[1], found.predictions[1])


def test_pairs_match_by_both_texts(tmp_path: Path) -> None:
    a = {**A, "truth": [0, 1, 1, 0, 0], "pairs": list("12345")}
    found = matched(tmp_path, a, {**a, "pairs": list("12340")})
    assert found is not None and found.rows[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["single", "multi", "numbers"])
def test_losses_are_those_of_the_task(kind: str) -> None:
    import torch

    from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel

    logits = torch.tensor([[2.0, -1, 0.5], [-30, 20, 3], [0, 0, 0]])
    if kind == "single":
        task: Any = SingleLabel(("a", "b", "c"))
        targets: Any = torch.tensor([0, 2, 1])
    elif kind == "multi":
        task, targets = (
            MultiLabel(("a", "b", "c")),
            torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]]),
        )
    else:
        task, targets, logits = Regression(("n",)), torch.tensor([1.0, -3, 0.5]), logits[:, :1]
    _, probabilities = task.predict(logits)
    found = row_losses(task.problem_type, targets.numpy(), probabilities)
    expected = task.eval_loss(logits.double(), targets, "none").numpy()
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 3


def test_certain_and_wrong_is_a_finite_loss() -> None:
    assert np.isfinite(row_losses(MULTI, np.array([[True, False]]), np.array([[0, 1]], np.float32)))
    assert np.isfinite(row_losses("single_label_classification", np.array([0]), np.array([[0, 1]], np.float32)))  # fmt: skip
