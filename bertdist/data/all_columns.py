"""Reads the rows of a split once more, with all columns of their files, for `check --fix`.

    source = read_source(data, records)   # row i of it is row i of records
    source.texts("review"), source.names, source.parts

They are written as they were but for what is corrected. Unlike those of prediction_input.py, all
are in memory, and rows that the records lack (--on_bad_row skip, --max_train_samples) are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data.in_memory import class_names, named_table, with_names
from bertdist.data.load_data import find_hub_split, open_files
from bertdist.data.prediction_input import (
    Kept,
    columns_to_keep,
    kept_of_chunk,
    read_chunks,
    unnamed_note,
)
from bertdist.data.readers.file_reader import FileReader
from bertdist.data.readers.folder_reader import FolderReader
from bertdist.data.readers.jsonl_reader import WHOLE_OBJECT, field_of
from bertdist.data.records import Records
from bertdist.data.source import Chunk, chunk_of_columns, column_of


@dataclass(frozen=True)
class SourceRows:
    """All columns of some rows: of each file, or part of one, its own."""

    parts: list[Kept]
    notes: tuple[str, ...]  # on columns that are not there

    @property
    def names(self) -> list[str]:
        """The columns of all parts, in the order in which they appear."""
        found: dict[str, None] = {}
        for part in self.parts:
            found |= dict.fromkeys(part.columns)
            for value in part.objects or ():
                found |= dict.fromkeys(value)
        return list(found)

    def texts(self, column: str) -> list[Any]:
        """The values of a column, which may be a field: review.text."""
        found: list[Any] = []
        for part in self.parts:
            if part.objects is None:
                table = pa.table({name: part.columns[name] for name in part.columns})
                found += column_of(table, column).to_pylist()
            else:
                found += [field_of(value, column) for value in part.objects]
        return found

    def with_texts(self, column: str, changed: Mapping[int, str]) -> "SourceRows":
        """The same with other texts in a column; changed: row -> text."""
        parts, start = [], 0
        for part in self.parts:
            own = {
                row - start: text
                for row, text in changed.items()
                if 0 <= row - start < part.num_rows
            }
            parts.append(_with_texts(part, column, own) if own else part)
            start += part.num_rows
        return SourceRows(parts, self.notes)

    def take(self, rows: Sequence[int]) -> "SourceRows":
        """Some rows, in ascending order."""
        parts, start, wanted = [], 0, set(rows)
        for part in self.parts:
            parts.append(part.take([row for row in range(part.num_rows) if row + start in wanted]))
            start += part.num_rows
        return SourceRows([part for part in parts if part.num_rows], self.notes)


def read_source(data: DataConfig, records: Records) -> SourceRows:
    """The rows of --train_file, or of the training split of a hub data set.

    records: the same rows, as `load_records` read them. Raises DataError, also where a file has
    changed since.
    """
    parts, notes, row = list[Kept](), list[str](), 0
    for chunk, kept in _chunks(data, records.label_column or "", notes):
        found = []
        for at in range(chunk.num_rows):
            if row < len(records) and chunk.location(at) == records.location(row):
                found.append(at)
                row += 1
        parts.append(kept if len(found) == chunk.num_rows else kept.take(found))
    source = SourceRows([part for part in parts if part.num_rows], tuple(dict.fromkeys(notes)))
    texts = zip(*(source.texts(name) for name in records.text_columns), strict=True)
    if [" ".join(parts) for parts in texts] != records.texts.to_pylist():
        raise DataError(f"{records.name} has changed while it was read.")
    return source


def _chunks(data: DataConfig, label: str, notes: list[str]) -> Iterator[tuple[Chunk, Kept]]:
    """label: the column of the labels, which get the names that a parquet file has for them."""
    if not data.train_file:
        dataset, name = find_hub_split(data, "train")
        table = named_table(dataset)
        columns: dict[str, Any] = {column: table[column] for column in table.column_names}
        yield chunk_of_columns(name, columns, len(table), {"row": 0}), Kept(columns)
        return
    for pattern in data.train_file:
        for reader in open_files(pattern, data, data.on_bad_row):
            is_json = reader.kind in ("json", "jsonl")
            names = columns_to_keep(reader)
            notes += filter(None, [unnamed_note(reader), _unread_note(reader)])
            labels = class_names(reader.features or {}).get(label)
            for chunk in read_chunks(reader, [WHOLE_OBJECT] if is_json else names):
                kept = kept_of_chunk(chunk, None if is_json else names)
                if labels is not None:
                    kept.columns[label] = with_names(kept.columns[label], labels)
                yield chunk, kept


def _unread_note(reader: FileReader | FolderReader) -> str | None:
    """Columns that --column_names calls _ have no name to be written with."""
    names = reader.file.column_names if isinstance(reader, FileReader) else ()
    count = list(names).count("_")
    are = "column named _ is" if count == 1 else "columns named _ are"
    return f"{reader.name}: {count} {are} not written" if count else None


def _with_texts(part: Kept, column: str, changed: Mapping[int, str]) -> Kept:
    if part.objects is not None:
        objects = list(part.objects)
        for row, text in changed.items():
            objects[row] = _with_field(objects[row], column, text)
        return part._replace(objects=objects)
    name = column if column in part.columns else column.partition(".")[0]
    values = part.columns[name].to_pylist()
    for row, text in changed.items():
        is_field = name != column
        path = column.removeprefix(f"{name}.")
        values[row] = _with_field(values[row], path, text) if is_field else text
    kind = part.columns[name].type
    return part._replace(columns={**part.columns, name: pa.chunked_array([pa.array(values, kind)])})


def _with_field(value: dict[str, Any], name: str, text: str) -> dict[str, Any]:
    if name in value or "." not in name:
        return {**value, name: text}
    first, _, rest = name.partition(".")
    return {**value, first: _with_field(value[first], rest, text)}
