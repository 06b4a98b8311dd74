"""JSON and plain text: lines -> columns, strictly, or a DataError that names the line.

JSON lines and plain text have one row per line. A JSON document has a list of objects: it is the
list, or has it under a key, or is objects one after the other; their rows are named by their number
in the list. With --column_names a row may be a list of values. JSON becomes Python lists of the
values, plain text one Arrow column of large_string. A field of a nested object is `review.text`.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from bertdist.core.errors import DataError, RowError, RowLocation, did_you_mean
from bertdist.core.terminal import excerpt
from bertdist.data.bad_rows import BadRow, escaped_excerpt
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    Parsed,
    RowSpans,
    row_excerpt,
    rows_of_lines,
)
from bertdist.data.records import TEXT_COLUMNS
from bertdist.data.source import Chunk, Column, chunk_of_columns, locate_rows, select_locations

FIRST_OBJECTS = 100  # that are read to find the columns
# Of a chunk: a column of the whole objects, with the keys that only some rows have.
WHOLE_OBJECT = "\0object"
_BLANK = re.compile(r"[ \t\r\n]*")
_TWICE: Any = object()  # the value of a key that an object has twice


def read_keys(fmt: FileFormat, lines: Lines, is_eof: bool, skip: bool) -> list[str] | None:
    """Keys of the first object, and those that most of the next ones have, nested ones included.

    [] : there is no object in the file; None: none in these first lines.
    """
    keys = _keys_of(_objects(fmt, lines, [] if skip else None))
    return keys or ([] if is_eof else None)


def document_keys(fmt: FileFormat, items: list[Any], skip: bool) -> list[str]:
    """The same of the `items` of a JSON document."""
    return _keys_of(_document(fmt, items, [] if skip else None))


def _keys_of(objects: Iterator[tuple[int, dict[str, Any]]]) -> list[str]:
    first: list[dict[str, Any]] = []
    try:
        for _, value in islice(objects, FIRST_OBJECTS):
            first.append(value)
    except DataError:  # of a row that comes later is an error of reading it
        if not first:
            raise
    names = Counter(name for value in first for name in _names_in(value))
    keys = [*_names_in(first[0])] if first else []
    return keys + [name for name, n in names.items() if 2 * n > len(first) and name not in keys]


def _names_in(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        yield prefix + key
        if isinstance(item, dict):
            yield from _names_in(item, f"{prefix}{key}.")


def parse_json(
    fmt: FileFormat, lines: Lines, wanted: Sequence[str], *, skip: bool, num_rows: int | None = None
) -> Parsed:
    """The values of the keys `wanted`, of the first `num_rows` objects.

    Raises DataError at what is not an object or lacks a key; with skip, it is skipped and returned.
    """
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    numbers: list[int] = []
    bad_rows: list[BadRow] | None = [] if skip else None
    objects = _objects(fmt, lines, bad_rows, wanted)
    for line, value in islice(objects, num_rows):
        numbers.append(line)
        for name, column in columns.items():
            column.append(value if name == WHOLE_OBJECT else field_of(value, name))

    def find_rows() -> RowSpans:
        rows, valid_lines = rows_of_lines(lines.data, blank=True), np.array(numbers, np.int64)
        return RowSpans(*(part[valid_lines] for part in rows))

    return Parsed({**columns}, len(numbers), bad_rows or [], find_rows)


def parse_document(
    fmt: FileFormat, items: list[Any], wanted: Sequence[str], *, skip: bool, first: int = 0
) -> Chunk:
    """The same of some `items` of a JSON document, the first of which is number `first`."""
    columns: dict[str, Column] = {name: [] for name in wanted}
    numbers: list[int] = []
    bad_rows: list[BadRow] | None = [] if skip else None
    for number, value in _document(fmt, items, bad_rows, wanted, first):
        numbers.append(number)
        for name, column in columns.items():
            column.append(value if name == WHOLE_OBJECT else field_of(value, name))
    chunk = chunk_of_columns(fmt.name, columns, len(numbers), {"row": first})
    location = select_locations(locate_rows(fmt.name), np.array(numbers, np.int64))
    return chunk._replace(location=location, bad_rows=tuple(bad_rows or ()))


def parse_txt(fmt: FileFormat, lines: Lines, wanted: Sequence[str]) -> Parsed:
    """Each line without its line end, blank lines too, but for lines that cannot be decoded."""
    data = lines.data.decode().replace("\r\n", "\n").removesuffix("\n")
    texts = data.split("\n") if lines.data else []
    rows = rows_of_lines(lines.data, blank=True)
    bad_rows = []
    if lines.broken:
        for line, reason in sorted(lines.broken.items()):
            text = row_excerpt(lines, int(rows.starts[line]), int(rows.ends[line]))
            bad_rows.append(BadRow(fmt.name, lines.first + line, reason, text))
        valid = [line for line in range(len(texts)) if line not in lines.broken]
        valid_lines = np.array(valid, np.int64)
        texts, rows = (
            [texts[line] for line in valid],
            RowSpans(*(part[valid_lines] for part in rows)),
        )
    column = pa.chunked_array([texts], pa.large_string())
    return Parsed(dict.fromkeys(wanted, column), len(texts), bad_rows, lambda: rows)


def _objects(
    fmt: FileFormat, lines: Lines, bad_rows: list[BadRow] | None, names: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 0, object) of every line that is not blank.

    What is not an object with these fields is added to `bad_rows`; without that it is a DataError.
    """
    names = sorted(names)
    # newline: a line ends at \n only
    texts = io.TextIOWrapper(io.BytesIO(lines.data), encoding="utf-8", newline="\n")
    for line, text in enumerate(texts):
        if not text.strip(" \t\r\n"):
            continue
        value: Any = None
        reason = lines.broken.get(line, "")
        if not reason:
            try:
                value = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON: {getattr(error, 'msg', error)}; expected one object per line"
            else:
                reason = _problem(value, names)
        if not reason:
            yield line, value
        else:
            row = BadRow(fmt.name, lines.first + line, reason, escaped_excerpt(text))
            _skip(row, bad_rows)


def _document(
    fmt: FileFormat,
    items: list[Any],
    bad_rows: list[BadRow] | None,
    names: Sequence[str] = (),
    first: int = 0,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every item of the list of rows; else as `_objects`."""
    names = sorted(names)
    for number, value in enumerate(items, first):
        reason, row = "", value
        if type(value) is list and fmt.column_names:
            if len(value) != len(fmt.column_names):
                expected = f"expected {len(fmt.column_names)} as in --column_names"
                reason = f"a list of {len(value)} items, {expected}"
            row = dict(zip(fmt.column_names, value, strict=False))
        if reason := reason or _problem(row, names):
            location = str(RowLocation(fmt.name, row=number))
            _skip(BadRow(location, None, reason, escaped_excerpt(_written(value))), bad_rows)
        else:
            yield number, row


def document_items(fmt: FileFormat, text: str) -> tuple[list[Any], str]:
    """The rows of a JSON document, and which part of it they are where that is not all of it.

    Raises DataError without rows.
    """
    lists: dict[str, list[Any]] = {}
    try:
        values = _values(text)
        if len(values) == 1:
            _find_lists(values[0], "", lists)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problem = getattr(error, "msg", error)
        raise DataError(f"{fmt.name}{line}: not JSON: {problem}.") from None
    if len(values) != 1:  # none, or objects one after the other
        return values, ""
    if fmt.json_field is not None:
        if fmt.json_field not in lists:
            advice = did_you_mean(fmt.json_field, filter(None, lists))
            raise DataError(f"{fmt.name}: --json_field {fmt.json_field!r} is no list.{advice}")
        return lists[fmt.json_field], ""
    names = lists.get("columns", [])  # pandas, orient="split"
    if names and not fmt.column_names and "data" in lists and {*map(type, names)} == {str}:
        rows_of_table = [
            _object(list(zip(names, row, strict=True)))
            if type(row) is list and len(row) == len(names)
            else row
            for row in lists["data"]
        ]
        return rows_of_table, ""
    kinds = (dict, list) if fmt.column_names else dict
    rows = {
        name: items
        for name, items in lists.items()
        if not name or any(isinstance(item, kinds) for item in items)
    }
    value = values[0]
    if type(value) is dict and any(type(value.get(name)) is str for name in TEXT_COLUMNS):
        lists_in_it = f"; --json_field {next(iter(rows))} reads a list in it" if rows else ""
        return values, f"one row, the object itself{lists_in_it}"
    if len(rows) == 1:
        ((name, items),) = rows.items()
        return items, f"the rows are its list {name!r}" if name else ""
    if rows:
        listed = ", ".join(f"{name!r} ({len(items):,})" for name, items in rows.items())
        raise DataError(f"{fmt.name} has several lists of rows: {listed}; name one: --json_field.")
    raise DataError(
        f"{fmt.name}: expected a list of objects, or one object per line; with pandas, write "
        "df.to_json(path, orient='records', lines=True)."
    )


def _values(text: str) -> list[Any]:
    """The values in a text, one after the other; mostly it is one. Raises ValueError."""
    values: list[Any] = []
    at = _skip_blank(text, 0)
    while at < len(text):
        value, end = _DECODER.raw_decode(text, at)
        values.append(value)
        at = _skip_blank(text, end)
    return values


def _find_lists(value: Any, name: str, lists: dict[str, list[Any]]) -> None:
    """Add the lists in a value by their name, but those within lists. Raises ValueError."""
    if value is _TWICE or (type(value) is list and name in lists):
        raise ValueError(f"the key {name!r} occurs twice")
    if type(value) is list:
        lists[name] = value
    elif type(value) is dict:
        for key, item in value.items():
            _find_lists(item, f"{name}.{key}" if name else key, lists)


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _written(value: Any) -> str:
    """A value as JSON, for messages."""
    try:
        return json.dumps(value, ensure_ascii=False, default=lambda twice: "...")
    except RecursionError:
        return "a nested value"


def _skip(row: BadRow, bad_rows: list[BadRow] | None) -> None:
    if bad_rows is None:
        raise RowError(row.message)
    bad_rows.append(row)


def field_of(value: dict[str, Any], name: str) -> Any:
    """value["review"]["text"] for `review.text`. Raises KeyError where it is missing."""
    if name in value or "." not in name:
        return value[name]
    first, _, rest = name.partition(".")
    if type(value[first]) is not dict:
        raise KeyError(name)
    return field_of(value[first], rest)


def key_twice(value: Any) -> str | None:
    """A key that an object, or one in it, has twice."""
    items = (
        value.items() if type(value) is dict else enumerate(value if type(value) is list else ())
    )
    for key, item in items:
        found = str(key) if item is _TWICE else key_twice(item)
        if found is not None:
            return found
    return None


def _problem(value: Any, names: Sequence[str]) -> str:
    """Why the value is not an object with these fields; "" if it is."""
    if type(value) is not dict or not value:
        advice = "; --column_names names the items of lists" if type(value) is list else ""
        return f"expected a JSON object with keys, found {excerpt(_written(value), 40)}{advice}"
    for name in names:
        if name == WHOLE_OBJECT:
            continue
        try:
            if field_of(value, name) is _TWICE:
                return f"the key {name!r} occurs twice"
        except KeyError:
            return f"the key {name!r} is missing.{did_you_mean(name, value)}"
    return ""


def _object(pairs: list[tuple[str, Any]] | str) -> dict[str, Any]:
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a JSON number")
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        result |= {key: _TWICE for key, count in counts.items() if count > 1}
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_object)
