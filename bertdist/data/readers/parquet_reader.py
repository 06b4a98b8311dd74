"""Parquet files: columns in the file's own types, complete or in slices of row groups.

A reader state is {"group": row group, "row": rows of the file before it}.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import pyarrow as pa
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
        table = parquet.read(columns=list(wanted), use_threads=False).slice(0, num_rows)
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
            for batch in parquet.iter_batches(
                max(1, min(MAX_SLICE_ROWS, size)),
                row_groups=[index],
                columns=list(wanted),
                use_threads=False,
            ):
                if batch.num_rows and row >= state["row"]:
                    table = pa.Table.from_batches([batch])
                    columns: dict[str, Column] = {name: column_of(table, name) for name in wanted}
                    start = {"group": index, "row": row}
                    yield chunk_of_columns(name, columns, batch.num_rows, start)
                row += batch.num_rows


@contextmanager
def _opened(
    name: str, open_seekable: OpenSeekable, wanted: Sequence[str] = ()
) -> Iterator[pa.parquet.ParquetFile]:
    with closing(open_seekable()) as source:
        try:
            parquet = pa.parquet.ParquetFile(source, pre_buffer=False)
            names = list(parquet.schema_arrow.names)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: the name of a column is not UTF-8 ({error}).") from None
        for column in wanted:
            if names.count(column) > 1:
                raise DataError(f"{name} has two columns {column!r}; rename one.")
        yield parquet
