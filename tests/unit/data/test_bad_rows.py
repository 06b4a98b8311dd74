"""Rows that are left out are told once, written once, and too many of them end the run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bertdist.core.config import DataConfig, PredictConfig
from bertdist.core.errors import DataError
from bertdist.data.bad_rows import BadRow, BadRows, escaped_excerpt, read_bad_rows
from bertdist.data.load_data import load_records, load_texts, open_stream
from bertdist.data.records import ColumnNames
from bertdist.data.source import (
    Chunk,
    LocateRow,
    bad_rows_of,
    locate_lines,
    locate_rows,
)

ROWS = [
    BadRow("a.csv", 3, "1 field, expected 2", "x"),
    BadRow("a.csv", 7, "label is missing", "y,"),
    BadRow("b.parquet", 0, "null", ""),
]


def test_fail_raises_at_the_first_bad_row() -> None:
    bad = BadRows()
    bad.add([])
    with pytest.raises(DataError, match=r"^a\.csv line 3: 1 field, expected 2\.$"):
        bad.add(ROWS)
    with pytest.raises(
        DataError, match=r"^a\.csv line 1: the key 'a' is missing\. Did you mean 'b'\?$"
    ):
        bad.add([BadRow("a.csv", 1, "the key 'a' is missing. Did you mean 'b'?", "")])


def test_a_row_counts_once_however_often_it_is_read() -> None:
    bad = BadRows("skip", 3)
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
        BadRows("skip", 2, path).add(ROWS)
    assert (
        str(caught.value)
        == f"More than 2 rows cannot be read (--max_bad_rows). Their reasons are in {path}."
    )
    assert read_bad_rows(path) == ROWS


def test_what_is_written_is_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    BadRows("skip", 9, path).write()
    assert not path.exists()  # no bad rows, no file
    for rows in (ROWS[:2], ROWS[1:]):
        bad = BadRows("skip", 9, path)
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
    assert read_bad_rows(path) == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad_rows.jsonl"]


def test_an_excerpt_is_printable_and_short() -> None:
    assert escaped_excerpt('a\tb\x00\ud800 é\u2028"\r\n') == r'a\tb\x00\ud800 é\u2028"'
    assert escaped_excerpt("x" * 1000) == "x" * 200
    json.dumps(escaped_excerpt("\ud800")).encode()


def test_rejected_rows_are_bad_rows_with_their_location_and_text() -> None:
    def chunk(location: LocateRow) -> Chunk:
        texts = [f"text {row}" for row in range(9)]
        return Chunk({}, 9, {}, location, lambda rows: [texts[row] for row in rows])

    lines = chunk(locate_lines("a.csv", 2, np.array([0, 1, 2, 3, 4, 6, 7, 8, 9])))
    problems = {8: "b", 2: "a"}
    assert bad_rows_of(lines, problems) == [
        BadRow("a.csv", 4, "a", "text 2"),
        BadRow("a.csv", 11, "b", "text 8"),
    ]
    (row,) = bad_rows_of(chunk(locate_rows("x.parquet", 5)), {2: "a"})
    assert row[:2] == ("x.parquet", 7) and row.location == "x.parquet row 7"
    (row,) = bad_rows_of(chunk(locate_rows("hub")), {2: "a"})
    assert row[:2] == ("hub row 2", None) and row.location == "hub row 2"
    assert bad_rows_of(lines, {}) == []


BAD = {  # a file whose third row is no row, and what of the message names it
    "rows.csv": (b"text,label\na,x\nb,y\nc,x,z\n", "rows.csv line 4: "),
    "empty.csv": (b"text,label\na,x\nb,y\nc,\n", "empty.csv line 4: "),
    "rows.jsonl": (b'{"text":"a","label":"x"}\n{"text":"b","label":"y"}\n[1]\n', "line 3: "),
}
HINT = " --on_bad_row skip leaves such rows out."


@pytest.mark.parametrize("name", sorted(BAD))
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_an_error_about_a_row_names_the_flag_that_skips_it(
    name: str, streaming: bool, tmp_path: Path
) -> None:
    content, place = BAD[name]
    (tmp_path / name).write_bytes(content)
    data = DataConfig(train_file=[str(tmp_path / name)], encoding="utf-8", streaming=streaming)

    def read(data: DataConfig) -> int:
        if not streaming:
            return len(load_records(data, "train"))
        stream = open_stream(data, seed=0)
        return sum(len(x) for source in stream.sources for _, x in stream.chunks(source))

    with pytest.raises(DataError) as caught:
        read(data)
    assert place in str(caught.value) and str(caught.value).endswith(f".{HINT}")
    assert read(replace(data, on_bad_row="skip")) == 2  # the way out is one


def test_a_prediction_has_no_such_flag(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(BAD["rows.csv"][0])
    config = PredictConfig(input=str(tmp_path / "rows.csv"), column_names=["text", "label"])
    with pytest.raises(DataError) as caught:
        load_texts(str(tmp_path / "rows.csv"), config, ColumnNames("text", None, None, []))
    assert "--on_bad_row" not in str(caught.value)
