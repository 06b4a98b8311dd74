"""The rows of `predict --input`, window by window: texts, and the columns that are kept.

    rows = InputRows(["a.csv", "more/*.jsonl"], flags, trained, keep=["all"], window_rows=2048)
    for window in rows.windows(position):  # an earlier window's `next`; None: from the start
        window.records, window.kept, window.next

A window has `window_rows` rows of one file, the last one of a file fewer: so windows depend on the
files alone, and memory does not grow with them. From any `next` the same windows follow.
"""

import codecs
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError, NoRowsError, did_you_mean, listed
from bertdist.core.partial_file import stamp_of
from bertdist.core.terminal import print_to_stderr
from bertdist.data.load_data import columns_of, open_text_files
from bertdist.data.readers.file_reader import FileReader
from bertdist.data.readers.folder_reader import FolderReader
from bertdist.data.readers.jsonl_reader import WHOLE_OBJECT, field_of, key_twice
from bertdist.data.readers.remote import STDIN, compression_of, forget_standard_input, redacted
from bertdist.data.readers.text_lines import is_stateful
from bertdist.data.records import (
    ColumnNames,
    Records,
    concat_records,
    describe_choice,
    records_from_chunk,
    short_notes,
)
from bertdist.data.source import Chunk, Column, ReaderState

ALL = "all"

Objects = list[dict[str, Any]]


class Position(TypedDict):
    """Where a window begins; JSON."""

    input: int  # number of the file
    state: ReaderState | None  # of its chunk; None: the first one
    skip: int  # rows of the chunk before the window
    row: int  # rows of the file before the window


START: Position = {"input": 0, "state": None, "skip": 0, "row": 0}


class Kept(NamedTuple):
    """The kept columns of a window: Arrow columns of its length, or the rows' JSON objects."""

    columns: dict[str, pa.ChunkedArray]
    objects: Objects | None = None

    def slice(self, start: int, stop: int) -> "Kept":
        """Rows start, ..., stop - 1."""
        columns = {name: x.slice(start, stop - start) for name, x in self.columns.items()}
        return Kept(columns, None if self.objects is None else self.objects[start:stop])

    def take(self, rows: Sequence[int]) -> "Kept":
        """These rows."""
        columns = {name: x.take(pa.array(rows, pa.int64())) for name, x in self.columns.items()}
        return Kept(columns, None if self.objects is None else [self.objects[x] for x in rows])

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        columns = self.columns.values() if self.objects is None else (self.objects,)
        return next(map(len, columns), 0)


class InputWindow(NamedTuple):
    """Some rows of a file."""

    records: Records
    kept: Kept
    file: str | None  # its path; None where there is one input, which says nothing
    first_row: int  # number of its first row in the file
    next: Position  # where the next window begins

    def slice(self, start: int, stop: int) -> "InputWindow":
        """Rows start, ..., stop - 1."""
        records, kept = self.records.slice(start, stop), self.kept.slice(start, stop)
        return self._replace(records=records, kept=kept, first_row=self.first_row + start)

    def file_of(self, row: int) -> str | None:
        """The file of a row of the window: in a folder, each row has its own."""
        return self.records.location(row).file if self.file == "" else self.file


class InputRows:
    """The rows of --input; errors in names of files and columns are raised when it is created."""

    def __init__(
        self,
        inputs: Sequence[str],
        flags: FileConfig,
        trained: ColumnNames,
        *,
        labels: Sequence[str] = (),
        keep: Sequence[str] = (),
        window_rows: int,
        same_columns: bool = False,
    ) -> None:
        """trained: the columns of the training, for those that no flag names; labels: its
        labels, by which rows that a stray quote has swallowed are seen. keep: names, or all.
        same_columns: the output is a table, so that all files must have the same kept columns.
        """
        self._window_rows, self._same_columns = window_rows, same_columns
        self._labels, notes = labels, list[str | None]()
        self._keep_all = list(keep) == [ALL]
        self._readers: list[FileReader | FolderReader] = []
        self._columns: list[ColumnNames | None] = []  # None: a file without rows
        self._kept: list[list[str]] = []  # of each file
        if STDIN in inputs and len(inputs) > 1:
            raise DataError("--input - is standard input; give it alone.")
        if STDIN in inputs and sys.stdin.isatty():
            print_to_stderr("Reading one text per line from the terminal; Ctrl-D ends.")
        opened = (open_text_files(path, flags, trained) for path in inputs)
        for reader, requested in chain.from_iterable(opened):
            self._readers.append(reader)
            columns: ColumnNames | None = None
            with suppress(NoRowsError):
                columns = columns_of(reader, requested)
                notes.append(describe_choice(reader.column_names(), requested, columns))
            notes.append(reader.note)
            self._columns.append(columns)
            self._kept.append(self._kept_names(reader, keep) if columns and keep else [])
            notes.append(unnamed_note(reader) if columns and self._keep_all else None)
        with_rows = [
            kept for kept, columns in zip(self._kept, self._columns, strict=True) if columns
        ]
        self.kept_names = with_rows[0] if with_rows else [] if self._keep_all else list(keep)
        # Whether rows are pairs of texts; None where there are no rows.
        pairs = [columns.pair is not None for columns in self._columns if columns]
        self.has_pair = any(pairs) if pairs else None
        self.is_named = len(inputs) > 1 or any(map(_is_several, inputs))
        self.is_standard_input = STDIN in inputs
        self.notes = [f"{note}." for note in short_notes([note for note in notes if note])]

    def _kept_names(self, reader: FileReader | FolderReader, keep: Sequence[str]) -> list[str]:
        names = _kept_of_table(reader) or reader.column_names()
        if self._keep_all:
            kept = columns_to_keep(reader)
        else:
            kept = [name for given in keep for name in _names_in(given, names)]
            kept = list(dict.fromkeys(kept))
        for name in kept:
            if name not in names:
                raise DataError(
                    f"{reader.name}: --keep_columns {name!r} is not one of its columns."
                    f"{did_you_mean(name, names)}"
                )
        first = next(
            (x for x, columns in zip(self._kept, self._columns, strict=False) if columns), kept
        )
        if self._same_columns and self._keep_all and set(first) != set(kept):
            odd = sorted(set(first) ^ set(kept))
            raise DataError(
                f"{reader.name} and {self._readers[0].name} differ in their columns "
                f"({listed(list(map(repr, odd)), 5)}), and a table has the same ones in all rows: "
                "name those to keep (--keep_columns id date), or write .jsonl."
            )
        return kept

    @property
    def fingerprint(self) -> list[Any]:
        """Changes with the files, and with how they are read: sizes, times, first and last MiB."""
        return [
            [str(reader.name), reader.fingerprint, list(columns or ()), *_stamps(reader)]
            for reader, columns in zip(self._readers, self._columns, strict=True)
        ]

    def fraction(self, position: Position) -> float | None:
        """How much of the input is before a position; None where that is not known."""
        sizes = [reader.bytes for reader in self._readers]
        total, index = sum(filter(None, sizes)), position["input"]
        if not total or None in sizes:
            return None
        done = sum(size or 0 for size in sizes[:index])
        if index < len(self._readers):
            reader, state = self._readers[index], position["state"] or {}
            path = getattr(reader.file, "path", "")
            if len(sizes) == 1 and (compression_of(path) or "at" not in state):
                return None
            done += state.get("at", 0) if not compression_of(path) else 0
        return done / total

    def windows(self, position: Position | None = None) -> Iterator[InputWindow]:
        """From a position on. Raises DataError."""
        start = position or START
        if self.is_standard_input:
            forget_standard_input()
        for index in range(start["input"], len(self._readers)):
            columns = self._columns[index]
            if columns is not None:
                yield from self._windows_of(index, columns, start)
            start = {**START, "input": index + 1}

    def _windows_of(
        self, index: int, columns: ColumnNames, start: Position
    ) -> Iterator[InputWindow]:
        reader, kept = self._readers[index], self._kept[index]
        is_json = reader.kind in ("json", "jsonl")
        wanted = columns.names()
        wanted += [WHOLE_OBJECT] if is_json and kept else [x for x in kept if x not in wanted]
        parts: list[tuple[Records, Kept]] = []
        waiting, row, skip = 0, start["row"], start["skip"]
        for chunk in read_chunks(reader, wanted, start["state"]):
            texts = {name: chunk.columns[name] for name in columns.names()}
            records = records_from_chunk(
                reader.name,
                chunk._replace(columns=texts),
                columns,
                has_header=reader.has_header,
                table=reader.quoted_table,
                known_labels=self._labels,
            )
            of_chunk = Kept({})
            if kept:
                fields = None if self._keep_all else kept
                of_chunk = kept_of_chunk(chunk, None if is_json else kept, fields)
            at, skip = skip, 0
            while at < len(records):
                stop = min(len(records), at + self._window_rows - waiting)
                parts.append((records.slice(at, stop), of_chunk.slice(at, stop)))
                waiting, at = waiting + stop - at, stop
                if waiting == self._window_rows:
                    after: Position = {
                        "input": index,
                        "state": chunk.state,
                        "skip": at,
                        "row": row + waiting,
                    }
                    yield self._join(parts, index, row, after)
                    parts, waiting, row = [], 0, row + waiting
        if parts:
            after = {**START, "input": index + 1}
            yield self._join(parts, index, row, after)

    def _join(
        self, parts: list[tuple[Records, Kept]], index: int, row: int, after: Position
    ) -> InputWindow:
        reader = self._readers[index]
        records = concat_records([records for records, _ in parts], reader.name)
        kept = [kept for _, kept in parts]
        columns = {
            name: pa.chunked_array(
                [x for part in kept for x in part.columns[name].chunks], one.type
            )
            for name, one in kept[0].columns.items()
        }
        objects = None
        if kept[0].objects is not None:
            objects = [value for part in kept for value in part.objects or ()]
        file = None
        if self.is_named:
            file = "" if isinstance(reader, FolderReader) else redacted(reader.file.path)
        return InputWindow(records, Kept(columns, objects), file, row, after)


def columns_to_keep(reader: FileReader | FolderReader) -> list[str]:
    """All columns of a file, without the fields in them; of a table also one without a name."""
    own = _kept_of_table(reader) or reader.column_names()
    parents = {f"{name}." for name in own}
    return [x for x in own if not any(x.startswith(parent) for parent in parents)]


def _kept_of_table(reader: FileReader | FolderReader) -> list[str] | None:
    """Its columns: those with a name, and one without, as pandas writes its index."""
    if not isinstance(reader, FileReader) or not reader.file.is_table:
        return None
    named = [name for name in reader.header() if name != "_" or not reader.file.column_names]
    return named if named.count("") < 2 else [*filter(None, named)]


def kept_of_chunk(
    chunk: Chunk, names: Sequence[str] | None, fields: Sequence[str] | None = None
) -> Kept:
    """Columns of a chunk; names: None for its JSON objects, of these the fields, None: all.

    Raises DataError for a key that an object has twice.
    """
    if names is None:
        objects: Any = chunk.columns[WHOLE_OBJECT]
        if fields is not None:
            objects = [dict(_fields(value, fields)) for value in objects]
        for row, value in enumerate(objects):
            if (key := key_twice(value)) is not None:
                raise DataError(f"{chunk.location(row)}: the key {key!r} occurs twice.")
        return Kept({}, objects)
    return Kept({name: _as_chunked(chunk.columns[name]) for name in names})


def unnamed_note(reader: FileReader | FolderReader) -> str | None:
    """One column without a name, as pandas writes its index, is kept; several are not."""
    if not isinstance(reader, FileReader) or not reader.file.is_table:
        return None
    count = reader.header().count("")
    return f"{reader.name}: {count} columns without a name are not written" if count > 1 else None


def _is_several(path: str) -> bool:
    return os.path.isdir(path) or (glob.has_magic(path) and not os.path.exists(path))


def _names_in(given: str, names: Iterable[str]) -> list[str]:
    """`id,date` is two columns, unless there is one of that name."""
    return [given] if given in names else [x.strip() for x in given.split(",") if x.strip()]


def read_chunks(
    reader: FileReader | FolderReader, wanted: list[str], state: Any = None
) -> Iterator[Chunk]:
    """The rows from a state on; a file that is decoded as a whole only is one chunk."""
    if isinstance(reader, FileReader) and reader.file.kind != "parquet":
        with_marks = codecs.lookup(reader.file.encoding).name
        if is_stateful(with_marks):  # decoded as a whole only
            yield reader.read(wanted)
            return
    yield from reader.chunks(wanted, state)


def _fields(value: dict[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        with suppress(KeyError):  # not in every object
            yield name, field_of(value, name)


def _as_chunked(column: Column) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _stamps(reader: FileReader | FolderReader) -> list[Any]:
    path = reader.path if isinstance(reader, FolderReader) else reader.file.path
    return stamp_of([path])
