"""Rows in pieces: what a source of rows gives, and what becomes of rows that cannot be read.

In: nothing; these are the words that readers (files, addresses, the hub) and those who take rows have in common. Out: `Piece`, some whole
rows with the place at which reading can begin again; `RowSource`, what gives them; `SkippedRow` and `SkippedRows`, rows that were left out.
One module, because a reader, a stream over several of them and the report of what was left out must mean the same row.

Where rows stand, in words: `dev.tsv line 12`, through all that joins, cuts and leaves out rows.
"""

import contextlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bertdist.core.errors import DataError

EXCERPT_CHARACTERS = 200

Column: TypeAlias = "pa.ChunkedArray | list[Any]"

ReaderState: TypeAlias = dict[str, Any]  # JSON-able; where a reading can begin again

OnBadRow = Literal["fail", "skip"]


class SkippedRow(NamedTuple):
    """A row that was left out. `line` is where it starts in the file, from 1; in parquet its row, from 0."""

    file: str
    line: int | None
    reason: str  # without the place: "3 fields, expected 2 as in the header; ..."
    text: str  # the row as it stood, at most EXCERPT_CHARACTERS of it; what is no text is written as \\x81 or \\ud800


class RowLocation(NamedTuple):
    """Where a row stands, and how it looks there: a SkippedRow without a reason."""

    file: str
    line: int | None
    text: str


Spots: TypeAlias = Callable[
    [Sequence[int]], list[RowLocation]
]  # rows -> where each of them stands, in one look at the bytes


class Chunk(NamedTuple):
    """Some whole rows of a source, in its order."""

    columns: dict[str, Column]  # the columns that were asked for, each `rows` long
    rows: int
    place: ReaderState  # reading again from here begins with exactly this piece, bit for bit
    where: Callable[[int], str]  # row of this piece, from 0 -> "dev.tsv line 12"
    bad: tuple[
        SkippedRow, ...
    ] = ()  # rows that stood among these and were left out (--on_bad_row skip)
    spots: Spots | None = (
        None  # for `skipped_rows`; None where a source knows no more than `where` says
    )


class RowSource(Protocol):
    """Rows in one fixed order, read from front to back, and again from any place a piece gave. Picklable; opens nothing until read."""

    @property
    def name(self) -> str:
        """Short, for messages."""

    @property
    def has_header(self) -> bool:
        """Whether the first line holds the names of the columns."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data change (size, ETag, digest of head and tail ...): cheap, no reading of the whole."""

    @property
    def bytes(self) -> int | None:
        """Size as stored, for dealing files to ranks."""

    @property
    def features(self) -> Any:
        """datasets.Features of a hub data set, else None."""

    def column_names(self) -> list[str]:
        """Names of the columns, in their order. Raises DataError."""

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from `place` (None: from the first) to the last, as columns `wanted`. Raises DataError."""


def first_rows_of_chunk(piece: Chunk, rows: int) -> Chunk:
    """The first `rows` rows of a piece, and what was left out before the first row that is not among them."""
    if rows >= piece.rows:
        return piece
    bad = piece.bad
    if bad and piece.spots is not None:
        end = piece.spots([rows])[0].line
        bad = tuple(row for row in bad if row.line is None or end is None or row.line < end)
    columns = {
        name: column[:rows] if isinstance(column, list) else column.slice(0, rows)
        for name, column in piece.columns.items()
    }
    return piece._replace(columns=columns, rows=rows, bad=bad)


def excerpt(text: str) -> str:
    """The beginning of a row as printable text: line ends, control characters and lone surrogates as escapes."""
    shown = text[:EXCERPT_CHARACTERS].rstrip("\r\n")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


def skipped_rows(
    problems: dict[int, str], where: Callable[[int], str], spots: Spots | None = None
) -> list[SkippedRow]:
    """Rows that `bertdist.columns` found wrong ({row: reason}) as SkippedRows, in the order of the rows."""
    rows = sorted(problems)
    found = [RowLocation(where(row), None, "") for row in rows] if spots is None else spots(rows)
    return [
        SkippedRow(spot.file, spot.line, problems[row], spot.text)
        for row, spot in zip(rows, found, strict=True)
    ]


class SkippedRows:
    """Gathers the rows that are left out, each once however often it is read, and gives up when they are too many.

    on_bad_row "fail" raises a DataError at the first one; "skip" raises one beyond `max_bad_rows`, after writing `path` where it is given.
    """

    def __init__(
        self, on_bad_row: OnBadRow = "fail", max_bad_rows: int = 100, path: Path | None = None
    ) -> None:
        self.on_bad_row, self.max_bad_rows, self.path = on_bad_row, max_bad_rows, path
        self._rows: dict[
            tuple[str, int | None, str], SkippedRow
        ] = {}  # files of several folders may share a name

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[SkippedRow]:
        """In the order in which they were found."""
        return list(self._rows.values())

    def add(self, rows: Iterable[SkippedRow]) -> None:
        """Raises DataError: at the first row ("fail"), or as soon as there are more than `max_bad_rows` ("skip")."""
        for row in rows:
            if self.on_bad_row == "fail":
                raise DataError(f"{location_of(row)}: {_sentence(row.reason)}")
            self._rows.setdefault((row.file, row.line, row.text), row)
        if len(self._rows) > self.max_bad_rows:
            last = self.rows[self.max_bad_rows]
            told = f"The last of them: {location_of(last)}: {_sentence(last.reason)}"
            if self.path is not None:
                self.write(self.path)
                told = f"Their reasons are in {self.path}."
            raise DataError(
                f"More than {self.max_bad_rows} rows cannot be read (--max_bad_rows). {told}"
            )

    def take(self, rows: Sequence[SkippedRow]) -> None:
        """`add` and `write`, where there are any."""
        if rows:
            self.add(rows)
            self.write()

    def write(self, path: Path | None = None) -> None:
        """Write one JSON line a row, the file's own and the new ones, atomically. Without bad rows nothing. Raises DataError."""
        path = path or self.path
        if path is None or not self._rows:
            return
        known = {(row.file, row.line, row.text): row for row in read_skipped_rows(path)}
        known = {**known, **self._rows}
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in known.values()
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            raise DataError(f"Cannot write {path}: {error.strerror or error}.") from None


def read_skipped_rows(path: Path) -> list[SkippedRow]:
    """The rows of a bad_rows.jsonl; none where there is no such file, and without lines that are not ours."""
    found: list[SkippedRow] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                found.append(checked(SkippedRow(**json.loads(line))))
    return found


def checked(row: SkippedRow) -> SkippedRow:
    """The row, as a file had it; raises TypeError where a field is something else."""
    texts = all(isinstance(value, str) for value in (row.file, row.reason, row.text))
    if not texts or not (row.line is None or type(row.line) is int):
        raise TypeError(f"no row: {row!r}")
    return row


def location_of(row: SkippedRow) -> str:
    """`dev.tsv line 12`; `x.parquet row 7`."""
    if row.line is None:
        return row.file
    return f"{row.file} {'row' if row.file.endswith('.parquet') else 'line'} {row.line}"


def _sentence(reason: str) -> str:
    return reason if reason.endswith((".", "?")) else f"{reason}."


class Named(Protocol):
    """What rows come from."""

    @property
    def name(self) -> str: ...
    @property
    def has_header(self) -> bool: ...


class Source(Named, Protocol):
    """Where rows come from, in words."""

    def where(self, row: int) -> str: ...


@dataclass(frozen=True)
class Split:
    """A split of a data set of the hub."""

    name: str
    has_header: bool = False

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"


@dataclass(frozen=True)
class Placed:
    """Rows of one source or of several, one behind the other, each where it stood."""

    name: str
    has_header: bool
    runs: tuple[
        tuple[int, Callable[[int], str], int], ...
    ]  # (its first row here, where, its first row there), in order
    form: Any = None  # of one whole file: how it is written (text_files.Form)

    def where(self, row: int) -> str:
        first, where, there = self.runs[bisect_right(self.runs, row, key=lambda run: run[0]) - 1]
        return where(row - first + there)


@dataclass(frozen=True)
class Kept:
    """Where rows stand from which some were left out."""

    before: Callable[[int], str]
    rows: npt.NDArray[np.int64]  # (rows that are left,) their numbers before

    def __call__(self, row: int) -> str:
        return self.before(int(self.rows[row]))
