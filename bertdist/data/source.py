"""What all readers have in common: their interface, `DataSource`, chunks of rows, row locations.

A reader (of files, URLs or the Hub) is a `DataSource`. It yields `Chunk`s, each with the reader
state from which reading can resume. Every error message names a row by its `RowLocation`, such as
`dev.tsv line 12`; `RowLocations` tracks it when rows are concatenated, sliced or selected.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.errors import RowLocation
from bertdist.data.bad_rows import BadRow, escaped_excerpt

Column: TypeAlias = "pa.ChunkedArray | list[Any]"
ReaderState: TypeAlias = dict[str, Any]  # JSON; where reading can resume

# Of a stream of which nothing was read yet, see data/streaming.py.
STREAM_START: ReaderState = {"epoch": 0, "window": 0, "rows": 0, "cursors": []}


LocateRow: TypeAlias = Callable[[int], RowLocation]  # row number from 0 -> its location


@dataclass(frozen=True)
class RowLocations:
    """Row number -> RowLocation, for rows of a file, and for rows concatenated or selected.

    Each part is (its first row, the `LocateRow` of the original rows, their numbers): consecutive
    numbers from an int, or an array of one number per row.
    """

    parts: tuple[tuple[int, LocateRow, int | npt.NDArray[np.int64]], ...]

    def __call__(self, row: int) -> RowLocation:
        index = bisect_right(self.parts, row, key=lambda part: part[0]) - 1
        start, locate, numbers = self.parts[index]
        offset = row - start
        return locate(numbers + offset if isinstance(numbers, int) else int(numbers[offset]))


def locate_rows(file: str, first: int = 0) -> RowLocations:
    """Rows without lines; `first`: number of the first one."""
    return RowLocations(((0, lambda row: RowLocation(file, row=row), first),))


def locate_lines(file: str, first: int, lines: npt.NDArray[np.int64] | None = None) -> RowLocations:
    """Rows of a text file, which begin at line `first`.

    lines: (rows,) the line of each row, relative to `first`; None: one line per row.
    """

    def locate(line: int) -> RowLocation:
        return RowLocation(file, first + line)

    return RowLocations(((0, locate, 0 if lines is None else lines),))


def slice_locations(locate: LocateRow, first: int) -> RowLocations:
    """The rows from row `first` on."""
    return RowLocations(((0, locate, first),))


def select_locations(locate: LocateRow, rows: npt.NDArray[np.int64]) -> RowLocations:
    """The rows with these numbers."""
    return RowLocations(((0, locate, rows),))


def concat_locations(parts: Sequence[tuple[int, LocateRow]]) -> RowLocations:
    """Parts of (number of rows, their locations), one after the other."""
    starts = accumulate((rows for rows, _ in parts), initial=0)
    located = zip(starts, parts, strict=False)
    return RowLocations(tuple((start, locate, 0) for start, (_, locate) in located))


class QuotedTable(NamedTuple):
    """A table that is read with quotes, though no flag says that it has any."""

    delimiter: str
    header: list[str]  # names of all columns


class Chunk(NamedTuple):
    """Some rows of a source, in its order."""

    columns: dict[str, Column]  # the requested columns, each `num_rows` long
    num_rows: int
    state: ReaderState  # reading from here begins with exactly this chunk, bit for bit
    location: LocateRow  # row of this chunk, from 0 -> its location
    excerpts: Callable[[Sequence[int]], list[str]]  # rows -> the text of each, for `BadRow`
    bad_rows: tuple[BadRow, ...] = ()  # rows among these that were skipped


class DataSource(Protocol):
    """Rows in a fixed order, read from the start or from any chunk's state.

    Picklable; opens nothing until read.
    """

    @property
    def name(self) -> str:
        """Short, for messages."""

    @property
    def has_header(self) -> bool:
        """Whether the first line has the names of the columns."""

    @property
    def fingerprint(self) -> str:
        """Changes with the data: size, ETag, digest of head and tail ...; reads only a part."""

    @property
    def bytes(self) -> int | None:
        """Size as stored, for assigning files to ranks."""

    @property
    def features(self) -> Any:
        """datasets.Features of a Hub data set, else None."""

    @property
    def quoted_table(self) -> QuotedTable | None:
        """Of a table that is read with quotes, though no flag says that it has any."""

    def column_names(self) -> list[str]:
        """In their order. Raises DataError."""

    def chunks(self, columns: Sequence[str], state: ReaderState | None = None) -> Iterator[Chunk]:
        """These columns of the rows from `state` (None: the start) to the end. Raises DataError."""


def chunk_of_columns(
    name: str, columns: dict[str, Column], num_rows: int, state: ReaderState
) -> Chunk:
    """A chunk of rows without lines, the first of which is row state["row"] of `name`."""
    location = locate_rows(name, state["row"])
    return Chunk(columns, num_rows, state, location, partial(_excerpts, columns))


def _excerpts(columns: dict[str, Column], rows: Sequence[int]) -> list[str]:
    """Each row as JSON; bytes that are not UTF-8 as \\x81."""
    excerpts = []
    for row in rows:
        values = {name: _plain(column[row]) for name, column in columns.items()}
        row_json = json.dumps(values, ensure_ascii=False, default=str)
        encoded = row_json.encode("utf-8", "surrogateescape")
        excerpts.append(escaped_excerpt(encoded.decode("utf-8", "backslashreplace")))
    return excerpts


def _plain(value: Any) -> Any:
    """An Arrow scalar as Python's, with bytes that are not UTF-8 as lone surrogates."""
    try:
        return value.as_py() if isinstance(value, pa.Scalar) else value
    except UnicodeDecodeError:
        if isinstance(value, pa.DictionaryScalar):
            return _plain(value.value)
        if isinstance(value, pa.ListScalar):  # and its subclasses
            return [_plain(item) for item in value.values]
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def first_rows_of_chunk(chunk: Chunk, rows: int) -> Chunk:
    """The first `rows` rows of a chunk, and the rows skipped among them."""
    if rows >= chunk.num_rows:
        return chunk
    end = chunk.location(rows).line
    bad_rows = tuple(
        row for row in chunk.bad_rows if row.line is None or end is None or row.line < end
    )
    columns = {
        name: column[:rows] if isinstance(column, list) else column.slice(0, rows)
        for name, column in chunk.columns.items()
    }
    return chunk._replace(columns=columns, num_rows=rows, bad_rows=bad_rows)


def nested_names(schema: pa.Schema) -> list[str]:
    """The names of all columns, and of the fields in them: review, review.text, ..."""

    def names_of(fields: Iterable[pa.Field], prefix: str) -> Iterator[str]:
        for field in fields:
            yield prefix + field.name
            if pa.types.is_struct(field.type):
                yield from names_of(field.type, f"{prefix}{field.name}.")

    return list(names_of(schema, ""))


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or a field in one: review.text."""
    if name in table.column_names or "." not in name:
        return table.column(name)
    first, *fields = name.split(".")
    return pc.struct_field(table.column(first), fields)


def bad_rows_of(chunk: Chunk, problems: dict[int, str]) -> list[BadRow]:
    """The rows of a chunk that data/columns.py rejected ({row: reason}), in order."""
    rows = sorted(problems)
    bad_rows = []
    for row, text in zip(rows, chunk.excerpts(rows) if rows else (), strict=True):
        location = chunk.location(row)
        line = location.row if location.file.endswith(".parquet") else location.line
        file = str(location) if line is None else location.file
        bad_rows.append(BadRow(file, line, problems[row], text))
    return bad_rows
