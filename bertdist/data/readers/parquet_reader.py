"""Parquet files: columns in the file's own types, complete or in slices of row groups.

A reader state is {"group": row group, "row": rows of the file before it}.

A small file may decode to many gigabytes, and its footer may be wrong: decoding stops at half of
the free memory, and rows are counted.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from bertdist.core.errors import DataError
from bertdist.data.readers.remote import OpenSeekable
from bertdist.data.source import (
    Chunk,
    Column,
    ReaderState,
    chunk_of_columns,
    column_of,
    nested_names,
)
from bertdist.distributed.host_memory import free_host_bytes, limited_memory

MAX_SLICE_ROWS = 8192


class ClassNames(NamedTuple):
    """The names of a column's class labels, as datasets.ClassLabel has them."""

    names: list[str]


def parquet_columns(
    name: str, open_seekable: OpenSeekable
) -> tuple[list[str], dict[str, ClassNames]]:
    """Names of the columns, in their order; and the class names that `datasets` has written for
    some of them.
    """
    with _opened(name, open_seekable) as parquet:
        schema = parquet.schema_arrow
        if not schema.names:
            raise DataError(f"{name} has no columns.")
        names = _class_names((schema.metadata or {}).get(b"huggingface"))
        # the metadata may be older than a column, which has names or numbers of its own since
        codes = {field.name for field in schema if _has_codes(field.type)}
        return nested_names(schema), {name: names[name] for name in names if name in codes}


def _has_codes(kind: pa.DataType) -> bool:
    if any(is_list(kind) for is_list in (pa.types.is_list, pa.types.is_large_list)):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind))


def _class_names(metadata: bytes | None) -> dict[str, ClassNames]:
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        inner = {name: feature.get("feature", feature) for name, feature in features.items()}
        return {
            name: ClassNames(list(map(str, feature["names"])))
            for name, feature in inner.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # of another program
        return {}


def read_parquet(
    name: str, open_seekable: OpenSeekable, wanted: Sequence[str], num_rows: int | None
) -> Chunk:
    """The columns `wanted` of the first `num_rows` rows."""
    with _opened(name, open_seekable, wanted) as parquet:
        rows = parquet.metadata.num_rows
        with _decoding(
            name, f"{rows:,} rows", "--streaming reads training rows in parts."
        ) as check:
            table = parquet.read(columns=list(wanted), use_threads=False)
            check(table)
        _check_rows(name, "all its row groups", rows, table.num_rows)
        table = table.slice(0, num_rows)
    columns: dict[str, Column] = {column: column_of(table, column) for column in wanted}
    return chunk_of_columns(name, columns, table.num_rows, {"group": 0, "row": 0})


def read_slices(
    name: str,
    open_seekable: OpenSeekable,
    wanted: Sequence[str],
    state: ReaderState | None,
    slice_bytes: int,
) -> Iterator[Chunk]:
    """In slices of about `slice_bytes`. A state within a row group reads all of the group."""
    state = state or {"group": 0, "row": 0}
    with _opened(name, open_seekable, wanted) as parquet:
        groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        row = sum(group.num_rows for group in groups[: state["group"]])
        for index in range(state["group"], len(groups)):
            group = groups[index]
            size = slice_bytes * group.num_rows // max(1, group.total_byte_size)
            batches = parquet.iter_batches(
                max(1, min(MAX_SLICE_ROWS, size)),
                row_groups=[index],
                columns=list(wanted),
                use_threads=False,
            )
            first = row
            for table in decoded(name, batches):
                if table.num_rows and row >= state["row"]:
                    columns: dict[str, Column] = {name: column_of(table, name) for name in wanted}
                    start = {"group": index, "row": row}
                    yield chunk_of_columns(name, columns, table.num_rows, start)
                row += table.num_rows
            _check_rows(name, f"row group {index}", group.num_rows, row - first)


def decoded(name: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Each batch as a table. Raises DataError where one needs too much memory."""
    while True:
        with _decoding(name, "some of its rows", "Leave the file out.") as check:
            if (batch := next(batches, None)) is None:
                return
            table = pa.Table.from_batches([batch])
            check(table)
        yield table


@contextmanager
def _decoding(name: str, rows: str, advice: str) -> Iterator[Callable[[pa.Table], None]]:
    """Raises DataError where decoding needs more than half of the free memory: inside, or with a
    table that the function is given, once its columns of dictionaries are decoded too.

    rows: which ones.
    """
    limit = free_host_bytes() // 2

    def check(table: pa.Table) -> None:
        if table.nbytes + sum(map(_bytes_in_dictionary, table.columns)) > limit:
            raise MemoryError

    try:
        with limited_memory(limit):
            yield check
    except MemoryError:
        raise DataError(
            f"{name}: {rows} need more than {limit:,} bytes, half of the free memory. {advice}"
        ) from None


def _bytes_in_dictionary(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a dictionary column, each as often as it occurs; 0 of other columns."""
    kind = column.type
    if not pa.types.is_dictionary(kind) or not _has_texts(kind.value_type):
        return 0
    lengths = (pc.binary_length(x.dictionary).take(x.indices) for x in column.chunks)
    return sum(pc.sum(each).as_py() or 0 for each in lengths)


def _has_texts(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _check_rows(name: str, group: str, expected: int, found: int) -> None:
    """Raise DataError where the footer counts other rows than there are."""
    if found != expected:
        raise DataError(
            f"{name} is damaged: {found:,} rows in {group}, and its footer says {expected:,}."
        )


@contextmanager
def _opened(
    name: str, open_seekable: OpenSeekable, wanted: Sequence[str] = ()
) -> Iterator[pa.parquet.ParquetFile]:
    with closing(open_seekable()) as source:
        try:
            parquet = pa.parquet.ParquetFile(source, pre_buffer=False)
            names = list(parquet.schema_arrow.names)
            about = parquet.metadata
            groups = (about.row_group(group).num_rows for group in range(about.num_row_groups))
            _check_rows(name, "all its row groups", about.num_rows, sum(groups))
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: the name of a column is not UTF-8 ({error}).") from None
        for column in wanted:
            if names.count(column) > 1:
                raise DataError(f"{name} has two columns {column!r}; rename one.")
        yield parquet
