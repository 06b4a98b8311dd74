"""Duplicates, contradictions and leaks are counted as they are said to be, and not in clean rows."""

from pathlib import Path
from typing import Any

import pytest
from looking import clean_rows, kinds, look, the

from bertdist.data_quality.duplicates import first_of_near, near_rows

pytest.importorskip("rensa", reason="near duplicates need the extra `check`")


def test_duplicates_are_rows_beyond_the_first_of_their_text(tmp_path: Path) -> None:
    rows = clean_rows(400)
    rows += [rows[3], rows[3], rows[8]]
    found = look(tmp_path, rows)
    assert kinds(found) == [("duplicates", "note", "train", 3)]
    finding = the(found, "duplicates")
    assert dict(finding.details) == {"texts": 2, "most_times": 3} and finding.total == 403
    assert [(example.row, example.note) for example in finding.examples] == [
        (3, "3 times"),
        (8, "2 times"),
    ]
    assert kinds(look(tmp_path, [*clean_rows(40), rows[3]])) == [
        ("duplicates", "warning", "train", 1)
    ]  # from 1% on
    assert kinds(look(tmp_path, clean_rows(400))) == []


def test_the_same_up_to_case_and_blanks_is_told_apart(tmp_path: Path) -> None:
    rows = clean_rows(40)
    rows.append({**rows[0], "text": rows[0]["text"].upper().replace(" ", "  ")})
    assert kinds(look(tmp_path, rows)) == [("alike_texts", "note", "train", 1)]


def test_conflicts_are_texts_with_several_labels(tmp_path: Path) -> None:
    rows = clean_rows(40)
    rows += [
        {**rows[0], "label": "good"},
        {**rows[0], "label": "good"},
        rows[2],
    ]  # row 0 is bad, row 2 repeats itself
    found = look(tmp_path, rows)
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "warning", "train", 3),
    ]
    finding = the(found, "conflicting_labels")
    assert (finding.unit, dict(finding.details), finding.total) == ("texts", {"rows": 3}, 40)
    assert [(example.row, example.note) for example in finding.examples] == [
        (0, "label 'bad'"),
        (40, "label 'good'"),
    ]


def test_sets_of_labels_in_another_order_do_not_contradict(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": [["a", "b"], ["c"]][number % 2]}
        for number, row in enumerate(clean_rows(400))
    ]
    assert kinds(look(tmp_path, [*rows, {**rows[0], "label": ["b", "a"]}])) == [
        ("duplicates", "note", "train", 1)
    ]
    found = look(tmp_path, [*rows, {**rows[0], "label": ["b"]}])
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "note", "train", 1),
    ]


def test_numbers_of_one_text_contradict_where_they_are_far_apart(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": number / 100} for number, row in enumerate(clean_rows(401))
    ]
    assert kinds(look(tmp_path, [*rows, {**rows[0], "label": 0.95}])) == [
        ("duplicates", "note", "train", 1)
    ]
    found = look(tmp_path, [*rows, {**rows[0], "label": 1.05}])  # a quarter of 0 to 4
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "note", "train", 1),
    ]


def test_leaks_are_rows_of_the_split_that_is_scored(tmp_path: Path) -> None:
    train, dev = clean_rows(40), clean_rows(200, 1)
    found = look(tmp_path, train, [*dev, train[5]])
    assert kinds(found) == [("leaks", "warning", "train/validation", 1)]  # below 1%
    finding = the(found, "leaks", "train/validation")
    assert (finding.examples[0].split, finding.examples[0].row, finding.examples[0].like) == (
        "validation",
        200,
        ("train", 5),
    )
    found = look(
        tmp_path,
        train,
        [*dev, *train[:8]],
        test=[*clean_rows(20, 2), dev[0], {**train[0], "text": train[0]["text"].upper()}],
    )
    assert kinds(found) == [
        ("leaks", "error", "train/validation", 8),
        ("alike_leaks", "error", "train/test", 1),
        ("leaks", "warning", "validation/test", 1),
        ("alike_leaks", "warning", "validation/test", 1),
    ]
    assert kinds(look(tmp_path, train, dev, test=clean_rows(20, 2))) == []


def test_near_duplicates_and_near_leaks(tmp_path: Path) -> None:
    train, dev = clean_rows(40), clean_rows(20, 1)
    train.append({"text": train[4]["text"] + "s", "label": "good"})  # row 4 is bad
    dev.append({"text": train[7]["text"] + "!", "label": "good"})
    found = look(tmp_path, train, dev)
    assert kinds(found) == [
        ("near_leaks", "warning", "train/validation", 1),
        ("near_duplicates", "note", "train", 2),
    ]
    near = the(found, "near_duplicates")
    assert [example.row for example in near.examples] == [4, 40] and near.examples[0].like == (
        "train",
        40,
    )
    assert dict(near.details) == {"with_another_label": 2}
    leak = the(found, "near_leaks", "train/validation")
    assert (
        leak.examples[0].row == 20
        and leak.examples[0].like == ("train", 7)
        and dict(leak.details) == {"with_another_label": 0}
    )
    assert near_rows(found.same, "train", "validation")[7] == 20
    assert [row for row, first in enumerate(first_of_near(found.same, "train")) if not first] == [
        40
    ]
