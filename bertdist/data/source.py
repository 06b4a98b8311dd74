"""The interface of data sources: chunks of rows, the location of each row, and skipped rows.

A reader (of files, URLs or the Hub) is a `DataSource`. It yields `Chunk`s, each with the reader
state from which reading can resume. Every error message names a row by its `RowLocation`, such as
`dev.tsv line 12`; `RowLocations` tracks it when rows are concatenated, sliced or selected.
`SkippedRows` collects the rows that --on_bad_row skip drops.
"""

import contextlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import DataError, RowError

EXCERPT_CHARACTERS = 200

Column: TypeAlias = "pa.ChunkedArray | list[Any]"
ReaderState: TypeAlias = dict[str, Any]  # JSON; where reading can resume
OnBadRow = Literal["fail", "skip"]

# Of a stream of which nothing was read yet, see data/streaming.py.
STREAM_START: ReaderState = {"epoch": 0, "window": 0, "rows": 0, "cursors": []}


class RowLocation(NamedTuple):
    """A row's file and line. str: `dev.tsv line 12`, or `x.parquet row 7` without lines."""

    file: str
    line: int | None = None  # where the row starts, from 1
    row: int | None = None  # from 0, where there are no lines

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file} row {self.row}"
        return f"{self.file} line {self.line}"


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


@contextmanager
def suggest_skipping() -> Iterator[None]:
    """Add --on_bad_row skip to the message about a row; for training and checks."""
    try:
        yield
    except RowError as error:
        raise DataError(f"{error} --on_bad_row skip leaves such rows out.") from None


class SkippedRow(NamedTuple):
    """A row that was skipped: a line of bad_rows.jsonl."""

    file: str  # or its location, for a row without line
    line: int | None  # where it starts, from 1; in parquet its row, from 0
    reason: str  # without the location: "3 fields, expected 2 as in the header; ..."
    text: str  # its first EXCERPT_CHARACTERS; what is not text is written as \\x81 or \\ud800

    @property
    def location(self) -> str:
        """`dev.tsv line 12`; `x.parquet row 7`."""
        if self.line is None:
            return self.file
        if self.file.endswith(".parquet"):
            return str(RowLocation(self.file, row=self.line))
        return str(RowLocation(self.file, self.line))

    @property
    def message(self) -> str:
        """The location and the reason, as a sentence."""
        end = "" if self.reason.endswith((".", "?")) else "."
        return f"{self.location}: {self.reason}{end}"


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
    excerpts: Callable[[Sequence[int]], list[str]]  # rows -> the text of each, for `SkippedRow`
    skipped_rows: tuple[SkippedRow, ...] = ()  # rows among these that were skipped


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
        excerpts.append(excerpt(encoded.decode("utf-8", "backslashreplace")))
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
    skipped = tuple(
        row for row in chunk.skipped_rows if row.line is None or end is None or row.line < end
    )
    columns = {
        name: column[:rows] if isinstance(column, list) else column.slice(0, rows)
        for name, column in chunk.columns.items()
    }
    return chunk._replace(columns=columns, num_rows=rows, skipped_rows=skipped)


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


def excerpt(text: str) -> str:
    """The beginning of a row, with control characters and lone surrogates as escapes."""
    shown = text[:EXCERPT_CHARACTERS].rstrip("\r\n")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def skipped_rows_of(chunk: Chunk, problems: dict[int, str]) -> list[SkippedRow]:
    """The rows of a chunk that data/columns.py rejected ({row: reason}), in order."""
    rows = sorted(problems)
    skipped = []
    for row, text in zip(rows, chunk.excerpts(rows) if rows else (), strict=True):
        location = chunk.location(row)
        line = location.row if location.file.endswith(".parquet") else location.line
        file = str(location) if line is None else location.file
        skipped.append(SkippedRow(file, line, problems[row], text))
    return skipped


class SkippedRows:
    """Collects skipped rows, each once even if read again, and fails when there are too many.

    on_bad_row "fail": a DataError at the first row; "skip": when there are more than
    `max_bad_rows`, after writing `path`, if given.
    """

    def __init__(
        self, on_bad_row: OnBadRow = "fail", max_bad_rows: int = 100, path: Path | None = None
    ) -> None:
        self.on_bad_row, self.max_bad_rows, self.path = on_bad_row, max_bad_rows, path
        # The text too: files of several folders may share a name.
        self._rows: dict[tuple[str, int | None, str], SkippedRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[SkippedRow]:
        """In the order in which they were added."""
        return list(self._rows.values())

    def add(self, rows: Iterable[SkippedRow]) -> None:
        """Raises DataError as described above."""
        for row in rows:
            if self.on_bad_row == "fail":
                raise DataError(row.message)
            self._rows.setdefault((row.file, row.line, row.text), row)
        if len(self._rows) > self.max_bad_rows:
            details = f"The last of them: {self.rows[self.max_bad_rows].message}"
            if self.path is not None:
                self.write()
                details = f"Their reasons are in {self.path}."
            raise DataError(
                f"More than {self.max_bad_rows} rows cannot be read (--max_bad_rows). {details}"
            )

    def add_and_write(self, rows: Sequence[SkippedRow]) -> None:
        """`add`, and `write` if there are any. Raises DataError, CheckpointError."""
        if rows:
            self.add(rows)
            self.write()

    def write(self) -> None:
        """Add the rows to `path` as JSON lines, atomically. Raises CheckpointError."""
        if self.path is None or not self._rows:
            return
        rows = {(row.file, row.line, row.text): row for row in read_skipped_rows(self.path)}
        lines = [
            json.dumps(row._asdict(), ensure_ascii=False) for row in (rows | self._rows).values()
        ]
        atomic_write(self.path, "".join(f"{line}\n" for line in lines).encode())


def read_skipped_rows(path: Path) -> list[SkippedRow]:
    """The rows of a bad_rows.jsonl, other lines ignored; empty if there is no such file."""
    rows: list[SkippedRow] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                rows.append(validated(SkippedRow(**json.loads(line))))
    return rows


def validated(row: SkippedRow) -> SkippedRow:
    """The row, as read from a file. Raises TypeError if a field has another type."""
    are_texts = all(isinstance(value, str) for value in (row.file, row.reason, row.text))
    if not are_texts or not (row.line is None or type(row.line) is int):
        raise TypeError(f"not a skipped row: {row!r}")
    return row
