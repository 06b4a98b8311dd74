"""Near duplicates are exact and few are missed; duplicates, conflicts and leaks are counted."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds
from rows import write_rows

from bertdist.core.config import DataConfig
from bertdist.core.types import IntArray
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_records
from bertdist.data.records import Records
from bertdist.data_quality import duplicates
from bertdist.data_quality.duplicates import (
    group_texts,
    is_repeat,
    jaccard,
    near_duplicate_rows,
    near_duplicates_to_drop,
    shingles,
)

pytest.importorskip("rensa", reason="near duplicates need the extra `check`")


def sets_of(texts: list[str]) -> list[set[bytes]]:
    """The same shingles in plain Python."""
    raw = [text.encode() for text in texts]
    return [
        {text[at : at + 5] for at in range(max(1, len(text) - 4))} if text else set()
        for text in raw
    ]


def array(texts: list[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


NASTY = [
    "",
    "a",
    "ab",
    "abcd",
    "abcde",
    "abcdef",
    "aaaaaaaaaa",
    "中文很好",
    "é" * 4,
    "",
    "x y z",
    "\0\0\0\0\0\0",
]


def test_shingles_are_the_runs_of_five_bytes() -> None:
    values, counts = shingles(array(NASTY))
    at, found = 0, []
    for count, text in zip(counts.tolist(), NASTY, strict=True):
        width = min(5, len(text.encode()))
        found.append(
            {int(value).to_bytes(8, "big")[8 - width :] for value in values[at : at + count]}
        )
        at += count
    assert found == sets_of(NASTY) and at == len(values)
    sliced, counts = shingles(array(["not this", *NASTY])[1:])
    assert np.array_equal(sliced, values) and counts.sum() == len(values)
    assert not np.array_equal(shingles(array(["not this", *NASTY]))[0], values)  # the control


def test_jaccard_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row["text"][:cut] for row in clean_rows(12) for cut in (9, 30, 31, 60)] + [
        "aaaaaaaaa",
        "aaaaab",
        "中文很好吗",
    ]
    left, right = np.array(list(combinations(range(len(texts)), 2))).T
    sets = sets_of(texts)
    expected = [
        len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in zip(left, right, strict=True)
    ]
    assert jaccard(array(texts), left, right).tolist() == expected
    assert 0 < np.count_nonzero(expected) < len(expected)
    monkeypatch.setattr(duplicates, "BYTES_PER_CHUNK", 100)  # in many pieces
    assert jaccard(array(texts), left, right).tolist() == expected


def changed(text: str, random: np.random.Generator, times: int) -> str:
    letters = list(text)
    for _ in range(times):
        letters[random.integers(len(letters))] = "q"
    return "".join(letters)


def test_every_reported_pair_is_near_and_few_are_missed() -> None:
    random = np.random.default_rng(0)
    base = [row["text"] for row in clean_rows(150)]
    texts = base + [changed(text, random, int(random.integers(1, 4))) for text in base]
    same = group_texts({"train": records_from_texts(texts)}, 0.8)
    assert same.near is not None
    sets = sets_of(same.normalized_texts.to_pylist())
    near = {
        (a, b)
        for a, b in combinations(range(len(sets)), 2)
        if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b])
    }
    found = set(zip(same.near.left.tolist(), same.near.right.tolist(), strict=True))
    assert found <= near and len(near) > 30
    assert len(found) >= 0.98 * len(near)
    # The control: with another threshold other pairs would have been near.
    stricter = group_texts({"train": records_from_texts(texts)}, 0.9).near
    assert stricter is not None and 0 < len(stricter.left) < len(found)


def test_clean_rows_have_no_near_duplicates_and_threshold_0_disables_the_search() -> None:
    records = records_from_texts([row["text"] for row in clean_rows(300)])
    pairs = group_texts({"train": records}, 0.8).near
    assert pairs is not None and len(pairs.left) == 0
    assert group_texts({"train": records}, 0.0).near is None


def test_a_popular_bucket_costs_a_bounded_number_of_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = 0
    whole = duplicates.jaccard

    def counted(texts: pa.Array, left: IntArray, right: IntArray) -> np.ndarray:
        nonlocal compared
        compared += len(left)
        return whole(texts, left, right)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    texts = [
        f"Your code for the bank is {number:09d}, do not share it with anybody."
        for number in range(0, 10**9, 10**6)
    ]
    pairs = group_texts({"train": records_from_texts(texts)}, 0.8).near
    assert pairs is not None and len(np.unique([pairs.left, pairs.right])) > 900
    assert compared < 13 * len(texts)  # all with all: 499,500


def test_texts_are_numbered_over_all_splits_and_up_to_case_and_white_space() -> None:
    train, dev = (
        records_from_texts(["A  film", "a film", "other", "A  film"]),
        records_from_texts([" a film\u00a0", "Other", "none"]),
    )
    same = group_texts({"train": train, "validation": dev}, 0)
    assert is_repeat(same.exact["train"]).tolist() == [False, False, False, True]
    assert is_repeat(same.normalized["train"]).tolist() == [False, True, False, True]
    assert np.isin(same.exact["validation"], same.exact["train"]).tolist() == [False, False, False]
    assert np.isin(same.normalized["validation"], same.normalized["train"]).tolist() == [
        True,
        True,
        False,
    ]
    assert same.normalized_texts.to_pylist() == ["a film", "other", "none"]


def test_a_pair_of_texts_is_one_text(tmp_path: Path) -> None:
    rows = [
        {"sentence1": a, "sentence2": b, "label": "x"}
        for a, b in (("a", "b"), ("ab", ""), ("a", "c"), ("a", "b"), ("b", "a"))
    ]
    records: Records = load_records(
        DataConfig(train_file=[str(write_rows(tmp_path / "a.jsonl", rows))]), "train"
    )
    pairs = records_from_texts(["a", "a", "A"], ["b", "c", "b "])
    assert is_repeat(group_texts({"train": pairs}, 0).normalized["train"]).tolist() == [
        *(False, False, True)
    ]
    assert is_repeat(group_texts({"train": records}, 0).exact["train"]).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


pytest.importorskip("rensa", reason="near duplicates need the extra `check`")


def test_duplicates_are_rows_beyond_the_first_of_their_text(tmp_path: Path) -> None:
    rows = clean_rows(400)
    rows += [rows[3], rows[3], rows[8]]
    found = check_rows(tmp_path, rows)
    assert kinds(found) == [("duplicates", "note", "train", 3)]
    finding = get_finding(found, "duplicates")
    assert dict(finding.details) == {"texts": 2, "most_times": 3} and finding.total == 403
    assert [(example.row, example.note) for example in finding.examples] == [
        (3, "3 times"),
        (8, "2 times"),
    ]
    assert kinds(check_rows(tmp_path, [*clean_rows(40), rows[3]])) == [
        ("duplicates", "warning", "train", 1)
    ]  # from 1% on
    assert kinds(check_rows(tmp_path, clean_rows(400))) == []


def test_duplicates_up_to_case_and_white_space_are_a_finding_of_their_own(tmp_path: Path) -> None:
    rows = clean_rows(40)
    rows.append({**rows[0], "text": rows[0]["text"].upper().replace(" ", "  ")})
    assert kinds(check_rows(tmp_path, rows)) == [("alike_texts", "note", "train", 1)]


def test_conflicts_are_texts_with_several_labels(tmp_path: Path) -> None:
    rows = clean_rows(40)
    rows += [
        {**rows[0], "label": "good"},
        {**rows[0], "label": "good"},
        rows[2],
    ]  # row 0 is bad, row 2 repeats itself
    found = check_rows(tmp_path, rows)
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "warning", "train", 3),
    ]
    finding = get_finding(found, "conflicting_labels")
    assert (finding.unit, dict(finding.details), finding.total) == ("texts", {"rows": 3}, 40)
    (pair,) = finding.examples  # of one text
    assert (pair.row, pair.note, pair.like_text) == (0, "label 'bad'", "")
    assert (pair.like, pair.like_note) == ("train.jsonl line 41", "label 'good'")


def test_sets_of_labels_in_another_order_do_not_contradict(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": [["a", "b"], ["c"]][number % 2]}
        for number, row in enumerate(clean_rows(400))
    ]
    assert kinds(check_rows(tmp_path, [*rows, {**rows[0], "label": ["b", "a"]}])) == [
        ("duplicates", "note", "train", 1)
    ]
    found = check_rows(tmp_path, [*rows, {**rows[0], "label": ["b"]}])
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "note", "train", 1),
    ]


def test_numbers_of_one_text_contradict_where_they_are_far_apart(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": number / 100} for number, row in enumerate(clean_rows(401))
    ]
    assert kinds(check_rows(tmp_path, [*rows, {**rows[0], "label": 0.95}])) == [
        ("duplicates", "note", "train", 1)
    ]
    found = check_rows(tmp_path, [*rows, {**rows[0], "label": 1.05}])  # a quarter of 0 to 4
    assert kinds(found) == [
        ("conflicting_labels", "warning", "train", 1),
        ("duplicates", "note", "train", 1),
    ]


def test_leaks_are_rows_of_the_later_split(tmp_path: Path) -> None:
    train, dev = clean_rows(40), clean_rows(200, 1)
    found = check_rows(tmp_path, train, [*dev, train[5]])
    assert kinds(found) == [("leaks", "warning", "train/validation", 1)]  # below 1%
    finding = get_finding(found, "leaks", "train/validation")
    assert (finding.examples[0].where, finding.examples[0].row, finding.examples[0].like) == (
        "validation.jsonl line 201",
        200,
        "train.jsonl line 6",
    )
    found = check_rows(
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
    assert kinds(check_rows(tmp_path, train, dev, test=clean_rows(20, 2))) == []


def test_an_example_shows_where_near_duplicates_differ(tmp_path: Path) -> None:
    train, long = clean_rows(40), " ".join(row["text"] for row in clean_rows(5, 2))
    train += [{"text": f"{long}{end}", "label": "good"} for end in ("", " more")]
    (pair,) = get_finding(check_rows(tmp_path, train), "near_duplicates").examples
    assert (pair.where, pair.like) == ("train.jsonl line 41", "train.jsonl line 42")
    assert pair.text == f"...{long[-40:]}" and pair.like_text == f"...{long[-40:]} more"


def test_near_duplicates_and_near_leaks(tmp_path: Path) -> None:
    train, dev = clean_rows(40), clean_rows(20, 1)
    train.append({"text": train[4]["text"] + "s", "label": "good"})  # row 4 is bad
    dev.append({"text": train[7]["text"] + "!", "label": "good"})
    found = check_rows(tmp_path, train, dev)
    assert kinds(found) == [
        ("near_leaks", "warning", "train/validation", 1),
        ("near_duplicates", "note", "train", 2),
    ]
    near = get_finding(found, "near_duplicates")
    (pair,) = near.examples  # each pair once, with both places, texts and labels
    assert (pair.where, pair.like) == ("train.jsonl line 5", "train.jsonl line 41")
    assert (pair.note, pair.like_note) == ("label 'bad'", "label 'good'")
    assert pair.like_text == f"{pair.text}s" and "at least 80% are in both" in near.meaning
    assert near.meaning.endswith("In 2 of these rows the label is not that of the near duplicate.")
    assert dict(near.details) == {"with_another_label": 2}
    leak = get_finding(found, "near_leaks", "train/validation")
    assert (
        leak.examples[0].row == 20
        and leak.examples[0].like == "train.jsonl line 8"
        and dict(leak.details) == {"with_another_label": 0}
    )
    assert near_duplicate_rows(found.groups, "train", "validation")[7] == 20
    assert [
        row for row, drop in enumerate(near_duplicates_to_drop(found.groups, "train")) if drop
    ] == [40]
