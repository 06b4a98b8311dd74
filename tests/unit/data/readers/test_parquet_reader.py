"""Slices of a parquet file, from the start and from any state, are the complete file."""

import base64
import io
import json
import resource
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from accelerate import Accelerator
from forked import run_ranks

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError, RowLocation
from bertdist.data import streaming
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.readers import parquet_reader
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


# ---- Hostile files

ROWS = 40


def good_file() -> bytes:
    table = pa.table({"text": ["fine", "dull"] * (ROWS // 2), "label": ["a", "b"] * (ROWS // 2)})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def footer_of(content: bytes) -> tuple[bytes, bytes]:
    """What is before the footer, and the footer."""
    (size,) = struct.unpack("<I", content[-8:-4])
    return content[: -8 - size], content[-8 - size : -8]


def with_footer(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    data, footer = footer_of(content)
    footer = change(footer)
    return data + footer + struct.pack("<I", len(footer)) + b"PAR1"


def rows_field(number: int) -> bytes:
    """A field of 64 bits of thrift's compact protocol, whose number is one more than the last's."""
    number, out = number << 1, b"\x16"
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def all_counts(footer: bytes) -> bytes:
    return footer.replace(rows_field(ROWS), rows_field(1 << 40))


def last_count(footer: bytes) -> bytes:
    """That of the row group."""
    before, _, after = footer.rpartition(rows_field(ROWS))
    return before + rows_field(1 << 40) + after


class KeyService(pe.KmsClient):
    """Keys wrapped in nothing."""

    def wrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64decode(key)


def encrypted(plain_footer: bool) -> bytes:
    config = pe.EncryptionConfiguration(
        footer_key="k", column_keys={"k": ["text"]}, plaintext_footer=plain_footer
    )
    factory = pe.CryptoFactory(lambda connection: KeyService())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    table, sink = pq.read_table(io.BytesIO(good_file())), io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return sink.getvalue()


def nested(depth: int) -> bytes:
    kind = pa.string()
    for _ in range(depth):
        kind = pa.list_(kind)
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([None], kind), "label": ["a"]}), sink)
    return sink.getvalue()


def of_no_columns() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({}), sink)
    return sink.getvalue()


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda good: good[: len(good) // 2], "cannot be read: Parquet magic bytes"),
    "empty": (lambda good: b"", "cannot be read: Parquet file size is 0 bytes"),
    "wrong magic": (lambda good: good[:-4] + b"XXXX", "cannot be read: Parquet magic bytes"),
    "footer of 2 GB": (
        lambda good: good[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "smaller than the size reported by footer's",
    ),
    "footer of 0 bytes": (lambda good: good[:-8] + bytes(4) + b"PAR1", "cannot be read: "),
    "2^40 rows": (lambda good: with_footer(good, all_counts), "1,099,511,627,776"),
    "2^40 rows in a group": (
        lambda good: with_footer(good, last_count),
        "is damaged: 1,099,511,627,776 rows in all its row groups, and its footer says 40.",
    ),
    "no columns": (lambda good: of_no_columns(), "x.parquet has no columns."),
    "nested": (lambda good: nested(200), "cannot be read: Parquet schema too deeply nested"),
    "encrypted": (lambda good: encrypted(False), "cannot be read: Could not read encrypted"),
    "encrypted columns": (lambda good: encrypted(True), "cannot be read: Cannot decrypt"),
}


def read_all(path: Path, stream: bool) -> int:
    data = DataConfig(train_file=[str(path)], streaming=stream)
    if stream:
        return sum(len(window.records) for window in open_stream(data, 16).windows())
    return len(load_records(data, "train") or ())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name: str, stream: bool, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    path = tmp_path / "x.parquet"
    path.write_bytes(good_file())
    assert read_all(path, stream) == ROWS, "the control"
    path.write_bytes(change(good_file()))
    with pytest.raises(DataError) as caught:
        read_all(path, stream)
    said = str(caught.value)
    assert message in said and str(path.name) in said and "\n" not in said
    assert said.endswith(".") and not said.endswith("..")


@pytest.mark.parametrize("at", range(4, 60, 3))
def test_an_index_outside_of_the_dictionary_is_one_line(at: int, tmp_path: Path) -> None:
    """Bytes of the pages of an uncompressed file without statistics."""
    table = pa.table({"text": ["aa", "bb", "cc", "dd"] * 4, "label": ["x", "y"] * 8})
    sink, path = io.BytesIO(), tmp_path / "x.parquet"
    pq.write_table(table, sink, compression="none", write_statistics=False)
    for mask in (0xFF, 0x80, 0x10):
        content = bytearray(sink.getvalue())
        content[at] ^= mask
        path.write_bytes(content)
        try:
            assert read_all(path, False) == 16
        except DataError as error:
            assert "\n" not in str(error)


def bomb(path: Path, kept: bool) -> None:
    """20,000 texts of 1 MB, 20 GB, in less than 2 KB. kept: the type of the column is dictionary."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), ["b" * (1 << 20)])
    table = pa.table({"text": texts, "label": ["a", "b"] * 10_000})
    pq.write_table(table, path, compression="zstd", store_schema=kept)
    assert path.stat().st_size < 2_000


@pytest.mark.parametrize(("kept", "stream"), [(False, False), (False, True), (True, False)])
def test_a_decompression_bomb_is_one_line_and_ends_at_half_of_the_free_memory(
    kept: bool, stream: bool, tmp_path: Path
) -> None:
    bomb(tmp_path / "bomb.parquet", kept)

    def read(accelerator: Accelerator) -> tuple[str, int]:
        parquet_reader.free_host_bytes = lambda: 256 << 20
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DataError) as caught:
            read_all(tmp_path / "bomb.parquet", stream)
        return str(caught.value), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    ((said, kilobytes),) = run_ranks(1, read)
    rows = "some of its rows" if stream else "20,000 rows"
    end = "Leave the file out." if stream else "--streaming reads training rows in parts."
    assert said == (
        f"bomb.parquet: {rows} need more than 134,217,728 bytes, half of the free memory. {end}"
    )
    assert kilobytes < 2 << 20, "and what the allocator had reserved"


def test_a_window_of_long_texts_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["b" * 100_000] * 30, "label": ["a", "b"] * 15}), path)
    assert read_all(path, True) == 30, "the control"
    monkeypatch.setattr(streaming, "free_host_bytes", lambda: 4 << 20)
    message = r"x\.parquet row .*: the texts of a window of 16,384 rows have more than 2,097,152 "
    with pytest.raises(DataError, match=message):
        read_all(path, True)
