"""Predictions in every output format: the right columns, and kept values unchanged."""

import csv
import gzip
import io
import json
import sys
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from bertdist.core.errors import DataError
from bertdist.core.output_files import OutputFormat
from bertdist.data.in_memory import records_from_texts
from bertdist.data.prediction_input import START, InputWindow, Kept
from bertdist.data.writers import AnswerColumns, Writer, create_writer, renamed

SINGLE = AnswerColumns(False, None, ("no", "yes"))
HARD = [
    "9007199254740993",
    "007",
    'a "quoted", field',
    "two\nlines\r\nand\rthree",
    "lone\rreturn",
    "😀\t北京",
    "",
]
ANSWERS = [{"label": "yes", "score": 0.75}, {"label": None, "score": 0.25}]


def window_of(kept: Kept, rows: int, first: int = 0, file: str | None = None) -> InputWindow:
    return InputWindow(records_from_texts(["x"] * rows), kept, file, first, START)


def arrow(**columns: Any) -> Kept:
    return Kept({name: pa.chunked_array([pa.array(x)]) for name, x in columns.items()})


def written(
    kind: str,
    windows: list[tuple[Kept, list[dict[str, Any]]]],
    names: list[str],
    answers: AnswerColumns = SINGLE,
    is_compressed: bool = False,
) -> bytes:
    writer: Writer = create_writer(OutputFormat(kind, is_compressed), answers, names, False)
    data, first = writer.header(), 0
    for kept, predictions in windows:
        data += writer.rows(window_of(kept, len(predictions), first), predictions)
        first += len(predictions)
    if writer.needs_conversion:
        whole = io.BytesIO()
        writer.convert(io.BytesIO(data), whole)
        return whole.getvalue()
    return data


def csv_rows(data: bytes, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))


def test_text_is_unchanged_in_every_format() -> None:
    kept, answers = arrow(note=HARD), [{"label": "yes", "score": 0.5}] * len(HARD)
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        rows = csv_rows(written(kind, [(kept, answers)], ["note"]), delimiter)
        assert rows[0] == ["row", "note", "label", "score"]
        assert [row[1] for row in rows[1:]] == HARD
    lines = written("jsonl", [(kept, answers)], ["note"]).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": row, "note": note, "label": "yes", "score": 0.5} for row, note in enumerate(HARD)
    ]
    table = pa.parquet.read_table(io.BytesIO(written("parquet", [(kept, answers)], ["note"])))
    assert table.column("note").to_pylist() == HARD and table.schema.field("row").type == "int64"


def test_parquet_keeps_types_and_the_others_their_digits() -> None:
    kept = arrow(
        id=[2**53 + 1, -(2**63)],
        price=pa.array([Decimal("1.10"), None], pa.decimal128(20, 2)),
        day=[date(2020, 2, 29), None],
        at=pa.array(
            [datetime(2020, 1, 2, 3, 4, 5, 6000, tzinfo=timezone.utc)] * 2,
            pa.timestamp("ns", "UTC"),
        ),
        tags=[["a", "b"], []],
        kind=pa.array(["x", "y"]).dictionary_encode(),
    )
    names = list(kept.columns)
    table = pa.parquet.read_table(io.BytesIO(written("parquet", [(kept, ANSWERS)], names)))
    for name, column in kept.columns.items():
        expected = column.cast(pa.string()) if name == "kind" else column
        assert table.column(name).equals(expected), name
    first, second = (json.loads(x) for x in written("jsonl", [(kept, ANSWERS)], names).splitlines())
    assert (first["id"], first["price"], first["day"]) == (2**53 + 1, "1.10", "2020-02-29")
    assert first["at"].startswith("2020-01-02 03:04:05.006") and first["tags"] == ["a", "b"]
    assert (second["id"], second["price"], second["day"]) == (-(2**63), None, None)
    assert (second["label"], second["score"]) == (None, 0.25)
    row = csv_rows(written("csv", [(kept, ANSWERS)], names))[2]
    assert row[:4] == ["1", str(-(2**63)), "", ""] and row[5:] == ["[]", "y", "", "0.25"]


def test_values_of_json_rows_are_unchanged() -> None:
    objects: list[dict[str, Any]] = [
        {"id": 2**70, "x": 1, "only here": {"a": [1, None]}},
        {"id": 2, "x": 0.5, "lone": "\ud800"},
    ]
    lines = written("jsonl", [(Kept({}, objects), ANSWERS)], ["id", "x"]).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": row, **value, **answer}
        for row, (value, answer) in enumerate(zip(objects, ANSWERS, strict=True))
    ]
    known = [{key: value.get(key) for key in ("id", "x")} for value in objects]
    rows = csv_rows(written("csv", [(Kept({}, known), ANSWERS)], ["id", "x"]))
    assert [row[1:3] for row in rows[1:]] == [[str(2**70), "1"], ["2", "0.5"]]


def test_a_table_refuses_what_it_cannot_hold() -> None:
    for kind in ("csv", "parquet"):
        with pytest.raises(DataError, match="the key 'new' is no column of the table"):
            written(kind, [(Kept({}, [{"id": 1}, {"new": 2}]), ANSWERS)], ["id"])
    with pytest.raises(DataError, match="a kept column, or its name, has a lone surrogate"):
        written("csv", [(Kept({}, [{"id": "\ud800"}, {}]), ANSWERS)], ["id"])
    raw = arrow(image=[b"\x00\xff", b"x"])
    for kind in ("csv", "jsonl"):
        with pytest.raises(DataError, match="column 'image' holds bytes, which text cannot hold"):
            written(kind, [(raw, ANSWERS)], ["image"])
    table = pa.parquet.read_table(io.BytesIO(written("parquet", [(raw, ANSWERS)], ["image"])))
    assert table.column("image").to_pylist() == [b"\x00\xff", b"x"], "the control"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2], [0.5, None], [1.0, 2.0, 0.5, None]),
        ([2**53 + 1, 2], [0.5, 1.5], [str(2**53 + 1), "2", "0.5", "1.5"]),
        ([None, None], ["a", "b"], [None, None, "a", "b"]),
        ([1, "a"], [True, [1]], ["1", "a", "true", "[1]"]),
        ([True, False], [1, 2], ["true", "false", "1", "2"]),
        ([{"a": 1}, None], [{"b": 2}, 3], ['{"a": 1}', None, '{"b": 2}', "3"]),
    ],
)
def test_parquet_of_json_has_one_type_per_column(
    first: list[Any], second: list[Any], expected: list[Any]
) -> None:
    windows = [(Kept({}, [{"x": value} for value in some]), ANSWERS) for some in (first, second)]
    table = pa.parquet.read_table(io.BytesIO(written("parquet", windows, ["x"])))
    assert table.column("x").to_pylist() == expected


def test_parquet_has_objects_without_keys_as_text() -> None:
    windows = [(Kept({}, [{"x": {}, "y": [{}]}, {"x": {}, "y": [{}]}]), ANSWERS)]
    table = pa.parquet.read_table(io.BytesIO(written("parquet", windows, ["x", "y"])))
    assert table.column("x").to_pylist() == ["{}", "{}"]
    assert table.column("y").to_pylist() == ["[{}]", "[{}]"]


def test_objects_that_are_nested_too_deep_for_parquet_are_text() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    windows = [(Kept({}, [{"x": deep}, {"x": deep}]), ANSWERS)]
    table = pa.parquet.read_table(io.BytesIO(written("parquet", windows, ["x"])))
    assert table.column("x").to_pylist() == [json.dumps(deep)] * 2


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("value", [{"x": "\ud800"}, {"x": ["\ud800"]}, {"\ud800": 1}])
def test_a_table_cannot_hold_a_lone_surrogate(kind: str, value: dict[str, Any]) -> None:
    windows = [(Kept({}, [value, value]), ANSWERS)]
    with pytest.raises(DataError, match="has a lone surrogate, which tables cannot hold: write"):
        written(kind, windows, list(value))
    assert written("jsonl", windows, list(value)), "the control"


def test_kinds_that_one_parquet_column_cannot_hold(tmp_path: Path) -> None:
    raw, number = arrow(x=[b"a", b"b"]), arrow(x=[1, 2])
    with pytest.raises(
        DataError, match="column 'x' holds binary and int64, which one column canno"
    ):
        written("parquet", [(raw, ANSWERS), (number, ANSWERS)], ["x"])
    late = [datetime(2500, 1, 1)] * 2
    windows = [
        (Kept({"x": pa.chunked_array([pa.array(late, pa.timestamp("us"))])}), ANSWERS),
        (Kept({"x": pa.chunked_array([pa.array([1, 2], pa.timestamp("ns"))])}), ANSWERS),
    ]
    large = arrow(x=pa.array([2**63, 1], pa.uint64())), arrow(x=pa.array([-1, 2], pa.int64()))
    both = written("parquet", [(kept, ANSWERS) for kept in large], ["x"])
    found = pa.parquet.read_table(io.BytesIO(both)).column("x").to_pylist()
    assert found == [str(2**63), "1", "-1", "2"]
    table = pa.parquet.read_table(io.BytesIO(written("parquet", windows, ["x"])))
    assert [str(x)[:10] for x in table.column("x").to_pylist()] == ["2500-01-01"] * 2 + ["1970-01-01"] * 2  # fmt: skip


def test_as_many_answers_as_asked_for_whatever_the_model_has() -> None:
    for top_k in (2, 3):
        names = AnswerColumns(False, top_k, ("no", "yes")).names()
        assert names == [f"{x}_{k + 1}" for k in range(top_k) for x in ("label", "score")]
    every = AnswerColumns(False, sys.maxsize, ("no", "yes"))
    assert every.names() == ["label", "score_no", "score_yes"], "the control: --top_k all"
    both = [{"label": "yes", "score": 0.75}, {"label": "no", "score": 0.25}]
    assert AnswerColumns(False, 3, ("no", "yes")).values({"labels": both}) == ["yes", 0.75, "no", 0.25, None, None]  # fmt: skip


def test_an_empty_output_has_its_columns() -> None:
    assert written("csv", [], ["id"]) == b"row,id,label,score\n" and written("jsonl", [], []) == b""
    assert gzip.decompress(written("tsv", [], [], is_compressed=True)) == b"row\tlabel\tscore\n"
    table = pa.parquet.read_table(io.BytesIO(written("parquet", [], ["id"])))
    assert table.column_names == ["row", "id", "label", "score"] and table.num_rows == 0


def test_several_labels_in_a_table() -> None:
    labels = ("a;b", "c", 'd"')
    found = [{"label": "c", "score": 0.5}, {"label": "a;b", "score": 0.25}]
    rest = {"label": 'd"', "score": 0.125}
    every = AnswerColumns(True, None, labels)
    rows = csv_rows(written("csv", [(Kept({}), [{"labels": found}, {"labels": []}])], [], every))
    assert rows == [
        ["row", "labels", "scores"],
        ["0", '["c", "a;b"]', "[0.5, 0.25]"],
        ["1", "[]", "[]"],
    ]
    two = AnswerColumns(True, 2, labels)
    rows = csv_rows(
        written("csv", [(Kept({}), [{"labels": found}, {"labels": found[:1]}])], [], two)
    )
    assert rows == [
        ["row", "label_1", "score_1", "label_2", "score_2"],
        ["0", "c", "0.5", "a;b", "0.25"],
        ["1", "c", "0.5", "", ""],
    ]
    for is_multi_label, before in ((False, ["c"]), (True, [])):
        columns = AnswerColumns(is_multi_label, sys.maxsize, labels)
        data = written("parquet", [(Kept({}), [{"labels": [*found, rest]}])], [], columns)
        table = pa.parquet.read_table(io.BytesIO(data))
        assert list(table.to_pylist()[0].values()) == [0, *before, 0.25, 0.5, 0.125]
        assert table.column_names[-3:] == ["score_a;b", "score_c", 'score_d"']


def test_input_columns_give_way_to_the_answers() -> None:
    taken = {"row", "label", "score"}
    assert renamed(["id", "label", "row"], taken) == {
        "id": "id",
        "label": "input_label",
        "row": "input_row",
    }
    assert renamed(["label", "input_label"], taken) == {
        "label": "input_input_label",
        "input_label": "input_label",
    }
    kept = arrow(label=["gold", "b"])
    assert csv_rows(written("csv", [(kept, ANSWERS)], ["label"]))[:2] == [
        ["row", "input_label", "label", "score"],
        ["0", "gold", "yes", "0.75"],
    ]
    line = json.loads(written("jsonl", [(kept, ANSWERS)], ["label"]).splitlines()[0])
    assert line == {"row": 0, "input_label": "gold", "label": "yes", "score": 0.75}


def test_each_window_is_a_gzip_member_and_the_bytes_are_always_the_same() -> None:
    windows = [(arrow(id=["1", "2"]), ANSWERS)] * 3
    data = written("csv", windows, ["id"], is_compressed=True)
    assert data == written("csv", windows, ["id"], is_compressed=True)
    assert gzip.decompress(data) == written("csv", windows, ["id"])
    assert data.count(b"\x1f\x8b\x08") == 4


def test_row_groups_join_windows(tmp_path: Path) -> None:
    data = written("parquet", [(arrow(id=["1", "2"]), ANSWERS)] * 5, ["id"])
    file = pa.parquet.ParquetFile(io.BytesIO(data))
    assert file.num_row_groups == 1 and file.metadata.num_rows == 10


def test_the_file_of_each_row() -> None:
    writer = create_writer(OutputFormat("csv"), SINGLE, [], True)
    data = writer.header() + writer.rows(window_of(Kept({}), 2, 5, "dir/a.csv"), ANSWERS)
    assert csv_rows(data) == [
        ["file", "row", "label", "score"],
        ["dir/a.csv", "5", "yes", "0.75"],
        ["dir/a.csv", "6", "", "0.25"],
    ]
