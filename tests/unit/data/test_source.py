"""Rows that are left out are told once, written once, and too many of them end the run."""

import json
from pathlib import Path

import numpy as np
import pytest

from bertdist.core.errors import DataError
from bertdist.data.source import (
    Chunk,
    LocateRow,
    SkippedRow,
    SkippedRows,
    concat_locations,
    excerpt,
    locate_lines,
    locate_rows,
    read_skipped_rows,
    select_locations,
    skipped_rows_of,
    slice_locations,
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


def test_rejected_rows_are_skipped_rows_with_their_location_and_text() -> None:
    def chunk(location: LocateRow) -> Chunk:
        texts = [f"text {row}" for row in range(9)]
        return Chunk({}, 9, {}, location, lambda rows: [texts[row] for row in rows])

    lines = chunk(locate_lines("a.csv", 2, np.array([0, 1, 2, 3, 4, 6, 7, 8, 9])))
    problems = {8: "b", 2: "a"}
    assert skipped_rows_of(lines, problems) == [
        SkippedRow("a.csv", 4, "a", "text 2"),
        SkippedRow("a.csv", 11, "b", "text 8"),
    ]
    (row,) = skipped_rows_of(chunk(locate_rows("x.parquet", 5)), {2: "a"})
    assert row[:2] == ("x.parquet", 7) and row.location == "x.parquet row 7"
    (row,) = skipped_rows_of(chunk(locate_rows("hub")), {2: "a"})
    assert row[:2] == ("hub row 2", None) and row.location == "hub row 2"
    assert skipped_rows_of(lines, {}) == []


def test_locations_follow_rows_through_concatenation_slices_and_selections() -> None:
    lines = locate_lines("a.csv", 2, np.array([0, 3, 4]))
    rows = locate_rows("x.parquet", 10)
    both = concat_locations([(3, lines), (0, rows), (2, rows)])
    expected = [
        "a.csv line 2",
        "a.csv line 5",
        "a.csv line 6",
        "x.parquet row 10",
        "x.parquet row 11",
    ]
    assert [str(both(row)) for row in range(5)] == expected
    later = slice_locations(both, 2)
    assert [str(later(row)) for row in range(3)] == expected[2:]
    some = select_locations(later, np.array([2, 0]))
    assert [str(some(row)) for row in range(2)] == [expected[4], expected[2]]
    again = concat_locations([(2, some), (1, locate_lines("b.txt", 1))])
    assert [str(again(row)) for row in range(3)] == [expected[4], expected[2], "b.txt line 1"]
