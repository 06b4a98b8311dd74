"""Slices of a parquet file, from the start and from any state, are the complete file."""

import io
import json
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertdist.core.errors import DataError, RowLocation
from bertdist.data.readers.parquet_reader import parquet_columns, read_parquet, read_slices
from bertdist.data.source import Chunk


def parquet_of(rows: int = 100, **settings: Any) -> Any:
    """What opens a file of three columns."""
    table = pa.table(
        {
            "a": [f"t{row}" for row in range(rows)],
            "b": list(range(rows)),
            "c": [[row] for row in range(rows)],
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, **settings)
    return partial(io.BytesIO, sink.getvalue())


def values(pieces: list[Chunk], name: str) -> list[Any]:
    return [value for piece in pieces for value in piece.columns[name].to_pylist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("row_group_size", [30, 1000])
def test_slices_concatenated_are_the_complete_file(row_group_size: int) -> None:
    opener = parquet_of(row_group_size=row_group_size)
    assert parquet_columns("a.parquet", opener)[0] == ["a", "b", "c"]
    whole = read_parquet("a.parquet", opener, ["a", "c"], None)
    pieces = list(read_slices("a.parquet", opener, ["a", "c"], None, 200))
    assert (
        len(pieces) > 8 and whole.num_rows == 100 and list(whole.columns) == ["a", "c"]
    )  # only what was asked for
    assert values(pieces, "a") == values([whole], "a") and values(pieces, "c") == values(
        [whole], "c"
    )
    for at, piece in enumerate(pieces):
        assert [str(piece.location(row)) for row in range(piece.num_rows)] == [
            f"a.parquet row {piece.state['row'] + row}" for row in range(piece.num_rows)
        ]
        again = list(
            read_slices("a.parquet", opener, ["a", "c"], json.loads(json.dumps(piece.state)), 200)
        )
        assert [(other.state, other.columns) for other in again] == [
            (other.state, other.columns) for other in pieces[at:]
        ]
    # A state is a row, not the number of a slice.
    assert values(
        list(read_slices("a.parquet", opener, ["a"], {"group": 0, "row": pieces[0].num_rows}, 200)),
        "a",
    ) == values(pieces[1:], "a")


def test_a_slice_has_a_bounded_number_of_rows() -> None:
    pieces = list(read_slices("a.parquet", parquet_of(20_000), ["b"], None, 1 << 30))
    assert [piece.num_rows for piece in pieces] == [8192, 8192, 3616]


def test_the_first_rows_and_their_locations() -> None:
    piece = read_parquet("a.parquet", parquet_of(), ["c", "a"], 7)
    assert piece.num_rows == 7
    assert piece.location(6) == RowLocation("a.parquet", row=6)
    assert piece.excerpts([6, 0]) == ['{"c": [6], "a": "t6"}', '{"c": [0], "a": "t0"}']


def test_two_columns_of_one_name_are_refused_where_they_are_read() -> None:
    sink = io.BytesIO()
    columns = [pa.array([1]), pa.array([2]), pa.array([3])]
    pq.write_table(pa.Table.from_arrays(columns, names=["a", "a", "b"]), sink)
    opened = partial(io.BytesIO, sink.getvalue())
    assert parquet_columns("x.parquet", opened)[0] == ["a", "a", "b"]
    assert read_parquet("x.parquet", opened, ["b"], None).columns["b"].to_pylist() == [3]  # type: ignore[union-attr]
    for read in (
        lambda: read_parquet("x.parquet", opened, ["a"], None),
        lambda: next(read_slices("x.parquet", opened, ["a"], None, 1)),
    ):
        with pytest.raises(DataError, match=r"x\.parquet has two columns 'a'; rename one"):
            read()


def test_a_field_of_a_struct_is_a_column() -> None:
    sink = io.BytesIO()
    rows = [{"m": {"t": "a", "n": {"l": 1}}}, {"m": None}, {"m": {"t": "b", "n": None}}]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    opened = partial(io.BytesIO, sink.getvalue())
    assert parquet_columns("x.parquet", opened)[0] == ["m", "m.t", "m.n", "m.n.l"]
    wanted = ["m.t", "m.n.l"]
    for piece in (
        read_parquet("x.parquet", opened, wanted, None),
        next(read_slices("x.parquet", opened, wanted, None, 1 << 20)),
    ):
        found = [piece.columns[name].to_pylist() for name in wanted]  # type: ignore[union-attr]
        assert found == [["a", None, "b"], [1, None, None]]


def test_bytes_that_are_not_utf8_are_shown_as_escapes() -> None:
    """Parquet does not check them; `records` decides what happens to such rows."""
    texts = pa.Array.from_buffers(
        pa.string(), 3, pa.array([b"good", b"ba\xd9d \\", b"fine"], pa.binary()).buffers()
    )
    table = pa.table(
        {
            "text": texts,
            "names": pa.ListArray.from_arrays([0, 1, 3, 3], texts),
            "word": texts.dictionary_encode(),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    names = ["text", "names", "word"]
    (piece,) = read_slices("a.parquet", partial(io.BytesIO, sink.getvalue()), names, None, 1 << 20)
    for found in (
        piece,
        read_parquet("a.parquet", partial(io.BytesIO, sink.getvalue()), names, None),
    ):
        assert found.num_rows == 3
        assert found.excerpts([0, 1]) == [
            '{"text": "good", "names": ["good"], "word": "good"}',
            r'{"text": "ba\xd9d \\", "names": ["ba\xd9d \\", "fine"], "word": "ba\xd9d \\"}',
        ]
