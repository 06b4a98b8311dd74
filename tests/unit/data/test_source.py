"""Rows that are left out are told once, written once, and too many of them end the run."""

import json
from pathlib import Path

import pytest

from bertdist.core.errors import DataError
from bertdist.data.source import (
    RowLocation,
    SkippedRow,
    SkippedRows,
    excerpt,
    location_of,
    read_skipped_rows,
    skipped_rows,
)

ROWS = [
    SkippedRow("a.csv", 3, "1 field, expected 2", "x"),
    SkippedRow("a.csv", 7, "label is missing", "y,"),
    SkippedRow("b.parquet", 0, "null", ""),
]


def test_fail_raises_at_the_first_bad_row() -> None:
    bad = SkippedRows()
    bad.add([])
    with pytest.raises(DataError, match=r"^a\.csv line 3: 1 field, expected 2\.$"):
        bad.add(ROWS)
    with pytest.raises(
        DataError, match=r"^a\.csv line 1: the key 'a' is missing\. Did you mean 'b'\?$"
    ):
        bad.add([SkippedRow("a.csv", 1, "the key 'a' is missing. Did you mean 'b'?", "")])


def test_a_row_counts_once_however_often_it_is_read() -> None:
    bad = SkippedRows("skip", 3)
    for _ in range(3):
        bad.add(ROWS)
    assert bad.rows == ROWS and len(bad) == 3
    with pytest.raises(
        DataError,
        match=r"^More than 3 rows .* The last of them: b\.csv line 3: 1 field, expected 2\.$",
    ):
        bad.add([ROWS[0]._replace(file="b.csv")])


def test_too_many_name_the_file_of_their_reasons(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    with pytest.raises(DataError) as caught:
        SkippedRows("skip", 2, path).add(ROWS)
    assert (
        str(caught.value)
        == f"More than 2 rows cannot be read (--max_bad_rows). Their reasons are in {path}."
    )
    assert read_skipped_rows(path) == ROWS


def test_what_is_written_is_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    SkippedRows("skip", 9, path).write()
    assert not path.exists()  # no bad rows, no file
    for rows in (ROWS[:2], ROWS[1:]):
        bad = SkippedRows("skip", 9, path)
        bad.add(rows)
        bad.write()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [row._asdict() for row in ROWS] and list(lines[0]) == [
        "file",
        "line",
        "reason",
        "text",
    ]
    path.write_text(path.read_text() + '{"torn":\n{"other": 1}\n')  # not ours: no reason to fail
    assert read_skipped_rows(path) == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad_rows.jsonl"]


def test_an_excerpt_is_printable_and_short() -> None:
    assert excerpt('a\tb\x00\ud800 é\u2028"\r\n') == r'a\tb\x00\ud800 é\u2028"'
    assert excerpt("x" * 1000) == "x" * 200
    json.dumps(excerpt("\ud800")).encode()


def test_rows_found_wrong_by_their_columns_know_where_they_stand() -> None:
    spots = [RowLocation("a.csv", 4, "one"), RowLocation("a.csv", 9, "two")]
    found = skipped_rows(
        {8: "b", 2: "a"},
        lambda row: f"a.csv row {row}",
        lambda rows: [spots[rows.index(row)] for row in rows],
    )
    assert found == [SkippedRow("a.csv", 4, "a", "one"), SkippedRow("a.csv", 9, "b", "two")]
    plain = skipped_rows({8: "b"}, lambda row: f"hub row {row}")
    assert (
        plain == [SkippedRow("hub row 8", None, "b", "")] and location_of(plain[0]) == "hub row 8"
    )
