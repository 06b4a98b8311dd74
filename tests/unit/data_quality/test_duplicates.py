"""What is the same is found exactly; what is nearly the same is never claimed wrongly, and seldom missed."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from looking import clean_rows
from rows import write_rows

from bertdist.core.config import DataConfig
from bertdist.data.loading import load_records
from bertdist.data.records import Records, records_of
from bertdist.data_quality import duplicates
from bertdist.data_quality.duplicates import compare_texts, jaccard, repeated, shingles

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
    monkeypatch.setattr(duplicates, "SHINGLES_AT_ONCE", 100)  # in many pieces
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
    same = compare_texts({"train": records_of(texts)}, 0.8)
    assert same.pairs is not None
    sets = sets_of(same.plain_texts.to_pylist())
    near = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        for a, b in combinations(range(len(sets)), 2)
        if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b])
    }
    found = dict(
        zip(
            zip(same.pairs.left.tolist(), same.pairs.right.tolist(), strict=True),
            same.pairs.similarity.tolist(),
            strict=True,
        )
    )
    assert found.items() <= near.items() and len(near) > 30
    assert len(found) >= 0.98 * len(near)
    # The control: with another threshold other pairs would have been near.
    stricter = compare_texts({"train": records_of(texts)}, 0.9).pairs
    assert stricter is not None and 0 < len(stricter.left) < len(found)


def test_clean_rows_have_no_near_duplicates_and_a_threshold_of_0_does_not_look() -> None:
    records = records_of([row["text"] for row in clean_rows(300)])
    pairs = compare_texts({"train": records}, 0.8).pairs
    assert pairs is not None and len(pairs.left) == 0
    assert compare_texts({"train": records}, 0.0).pairs is None


def test_a_popular_bucket_costs_a_bounded_number_of_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = 0
    whole = duplicates.jaccard

    def counted(texts: pa.Array, left: duplicates.Ints, right: duplicates.Ints) -> np.ndarray:
        nonlocal compared
        compared += len(left)
        return whole(texts, left, right)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    texts = [
        f"Your code for the bank is {number:09d}, do not share it with anybody."
        for number in range(0, 10**9, 10**6)
    ]
    pairs = compare_texts({"train": records_of(texts)}, 0.8).pairs
    assert pairs is not None and len(np.unique([pairs.left, pairs.right])) > 900
    assert compared < 13 * len(texts)  # all with all: 499,500


def test_texts_are_numbered_over_all_splits_and_up_to_case_and_blanks() -> None:
    train, dev = (
        records_of(["A  film", "a film", "other", "A  film"]),
        records_of([" a film\u00a0", "Other", "none"]),
    )
    same = compare_texts({"train": train, "validation": dev}, 0)
    assert repeated(same.texts["train"]).tolist() == [False, False, False, True]
    assert repeated(same.plain["train"]).tolist() == [False, True, False, True]
    assert np.isin(same.texts["validation"], same.texts["train"]).tolist() == [False, False, False]
    assert np.isin(same.plain["validation"], same.plain["train"]).tolist() == [True, True, False]
    assert same.plain_texts.to_pylist() == ["a film", "other", "none"]


def test_a_pair_of_texts_is_one_text(tmp_path: Path) -> None:
    rows = [
        {"sentence1": a, "sentence2": b, "label": "x"}
        for a, b in (("a", "b"), ("ab", ""), ("a", "c"), ("a", "b"), ("b", "a"))
    ]
    records: Records = load_records(
        DataConfig(train_file=[str(write_rows(tmp_path / "a.jsonl", rows))]), "train"
    )
    assert repeated(compare_texts({"train": records}, 0).texts["train"]).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]
