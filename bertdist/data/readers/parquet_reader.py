"""Rows of parquet files: columns of the file's own types, whole, or slices of row groups.

In: what opens the file for random access. Out: pieces, whose places are {"group": row group, "row": rows of the file before it}.
One module: parquet has no lines, no encoding and no rows that are none, so nothing here is shared with text files.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet

from bertdist.core.errors import DataError
from bertdist.data.readers.text_lines import OpenSeekable, twice_in
from bertdist.data.source import Chunk, ReaderState, chunk_of_columns

PIECE_ROWS = 8192  # at most


def parquet_columns(name: str, open_seekable: OpenSeekable) -> list[str]:
    """Names of the columns, in their order."""
    with _opened(name, open_seekable) as parquet:
        return list(parquet.schema_arrow.names)


def read_whole(
    name: str, open_seekable: OpenSeekable, wanted: Sequence[str], rows: int | None
) -> Chunk:
    """The columns `wanted` of the first `rows` rows."""
    with _opened(name, open_seekable) as parquet:
        table = parquet.read(columns=list(wanted), use_threads=False).slice(0, rows)
    return chunk_of_columns(
        name,
        {column: table.column(column) for column in wanted},
        table.num_rows,
        {"group": 0, "row": 0},
    )


def read_slices(
    name: str,
    open_seekable: OpenSeekable,
    wanted: Sequence[str],
    place: ReaderState | None,
    chunk_bytes: int,
) -> Iterator[Chunk]:
    """The same in slices of about `chunk_bytes`; one within a row group is found again by reading the group from its beginning."""
    place = place or {"group": 0, "row": 0}
    with _opened(name, open_seekable) as parquet:
        begin = sum(parquet.metadata.row_group(group).num_rows for group in range(place["group"]))
        for group in range(place["group"], parquet.metadata.num_row_groups):
            told = parquet.metadata.row_group(group)
            size = max(
                1, min(PIECE_ROWS, chunk_bytes * told.num_rows // max(1, told.total_byte_size))
            )
            for batch in parquet.iter_batches(
                size, row_groups=[group], columns=list(wanted), use_threads=False
            ):
                if batch.num_rows and begin >= place["row"]:
                    columns = {
                        column: pa.chunked_array([batch.column(column)]) for column in wanted
                    }
                    yield chunk_of_columns(
                        name, columns, batch.num_rows, {"group": group, "row": begin}
                    )
                begin += batch.num_rows


@contextmanager
def _opened(name: str, open_seekable: OpenSeekable) -> Iterator[pa.parquet.ParquetFile]:
    with closing(open_seekable()) as source:
        try:
            parquet = pa.parquet.ParquetFile(source, pre_buffer=False)
            names = list(parquet.schema_arrow.names)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: the name of a column is not UTF-8 ({error}).") from None
        if twice := twice_in(names):
            raise DataError(f"{name} has two columns {twice!r}; rename one.")
        yield parquet
