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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bertdist.core.errors import DataError, RowError, did_you_mean
from bertdist.core.terminal import excerpt as shorten
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    Parsed,
    Rows,
    row_excerpt,
    rows_of_lines,
)
from bertdist.data.source import RowLocation, SkippedRow, excerpt

FIRST_OBJECTS = 100  # that are read to find the columns
_BLANK = re.compile(r"[ \t\r\n]*")
_TWICE: Any = object()  # the value of a key that an object has twice


class _Item(NamedTuple):
    """A value in a JSON text, and its position."""

    start: int
    end: int
    value: Any


def read_keys(fmt: FileFormat, lines: Lines, is_all: bool, skip: bool) -> list[str] | None:
    """Keys of the first object, and those that most of the next ones have, nested ones included.

    [] : there is no object in the file; None: none in these first lines.
    """
    skipped: list[SkippedRow] | None = [] if skip else None
    objects: Any = _document if fmt.kind == "json" else _objects
    first: list[dict[str, Any]] = []
    try:
        for *_, value in islice(objects(fmt, lines, skipped), FIRST_OBJECTS):
            first.append(value)
    except DataError:  # of a row that comes later is an error of reading it
        if not first:
            raise
    if not first:
        return [] if is_all else None
    names = Counter(name for value in first for name in _names_in(value))
    keys = [*_names_in(first[0])]
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
    skipped: list[SkippedRow] | None = [] if skip else None
    objects = _objects(fmt, lines, skipped, wanted)
    for line, value in islice(objects, num_rows):
        numbers.append(line)
        for name, column in columns.items():
            column.append(_field(value, name))

    def find_rows() -> Rows:
        rows, valid_lines = rows_of_lines(lines.data, blank=True), np.array(numbers, np.int64)
        return Rows(*(part[valid_lines] for part in rows))

    return Parsed({**columns}, len(numbers), skipped or [], find_rows)


def parse_document(fmt: FileFormat, lines: Lines, wanted: Sequence[str], *, skip: bool) -> Parsed:
    """The same of a JSON document; the lines of its rows are their numbers in the list."""
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    rows: list[tuple[int, int, int]] = []
    skipped: list[SkippedRow] | None = [] if skip else None
    for number, start, end, value in _document(fmt, lines, skipped, wanted):
        rows.append((start, end, number))
        for name, column in columns.items():
            column.append(_field(value, name))
    positions = Rows(*np.array(rows, np.int64).reshape(-1, 3).T)
    return Parsed({**columns}, len(rows), skipped or [], lambda: positions)


def parse_txt(fmt: FileFormat, lines: Lines, wanted: Sequence[str]) -> Parsed:
    """Each line without its line end, blank lines too, but for lines that cannot be decoded."""
    data = lines.data.decode().replace("\r\n", "\n").removesuffix("\n")
    texts = data.split("\n") if lines.data else []
    rows = rows_of_lines(lines.data, blank=True)
    skipped = []
    if lines.broken:
        for line, reason in sorted(lines.broken.items()):
            text = row_excerpt(lines, int(rows.starts[line]), int(rows.ends[line]))
            skipped.append(SkippedRow(fmt.name, lines.first + line, reason, text))
        valid = [line for line in range(len(texts)) if line not in lines.broken]
        valid_lines = np.array(valid, np.int64)
        texts, rows = [texts[line] for line in valid], Rows(*(part[valid_lines] for part in rows))
    column = pa.chunked_array([texts], pa.large_string())
    return Parsed(dict.fromkeys(wanted, column), len(texts), skipped, lambda: rows)


def _objects(
    fmt: FileFormat, lines: Lines, skipped: list[SkippedRow] | None, names: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 0, object) of every line that is not blank.

    What is not an object with these fields is added to `skipped`; without that it is a DataError.
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
            row = SkippedRow(fmt.name, lines.first + line, reason, excerpt(text))
            _skip(row, skipped)


def _document(
    fmt: FileFormat, lines: Lines, skipped: list[SkippedRow] | None, names: Sequence[str] = ()
) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """(number, first byte, end, object) of every item of the list of rows; else as `_objects`."""
    if lines.broken:
        line, reason = min(lines.broken.items())
        raise DataError(f"{fmt.name} line {lines.first + line}: {reason}.")
    text, names = lines.data.decode(), sorted(names)
    at = first_byte = 0
    for number, (start, end, value) in enumerate(_rows_of_document(fmt, text)):
        first_byte += len(text[at:start].encode())
        size, at = len(text[start:end].encode()), end
        reason = ""
        if type(value) is list and fmt.column_names:
            if len(value) != len(fmt.column_names):
                expected = f"expected {len(fmt.column_names)} as in --column_names"
                reason = f"a list of {len(value)} items, {expected}"
            value = dict(zip(fmt.column_names, value, strict=False))
        if reason := reason or _problem(value, names):
            location = str(RowLocation(fmt.name, row=number))
            _skip(SkippedRow(location, None, reason, excerpt(text[start:end])), skipped)
        else:
            yield number, first_byte, first_byte + size, value
        first_byte += size


def _rows_of_document(fmt: FileFormat, text: str) -> list[_Item]:
    """Begin, end and value of each item of the list of rows. Raises DataError without one."""
    lists: dict[str, list[_Item]] = {}
    if not text.strip():
        return []
    try:
        end = _skip_blank(text, _find_lists(text, _skip_blank(text, 0), "", lists))
        if end < len(text):  # objects one after the other
            lists = {"": list(_items(text, 0, ""))}
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problem = getattr(error, "msg", error)
        raise DataError(f"{fmt.name}{line}: not JSON: {problem}.") from None
    if fmt.json_field is not None:
        if fmt.json_field not in lists:
            advice = did_you_mean(fmt.json_field, filter(None, lists))
            raise DataError(f"{fmt.name}: --json_field {fmt.json_field!r} is no list.{advice}")
        return lists[fmt.json_field]
    kinds = (dict, list) if fmt.column_names else dict
    rows = {
        name: items
        for name, items in lists.items()
        if not name or any(isinstance(item.value, kinds) for item in items)
    }
    if len(rows) == 1:
        return next(iter(rows.values()))
    if rows:
        listed = ", ".join(f"{name!r} ({len(items):,})" for name, items in rows.items())
        raise DataError(f"{fmt.name} has several lists of rows: {listed}; name one: --json_field.")
    raise DataError(
        f"{fmt.name}: expected a list of objects, or one object per line; with pandas, write "
        "df.to_json(path, orient='records', lines=True)."
    )


def _find_lists(text: str, at: int, name: str, lists: dict[str, list[_Item]]) -> int:
    """The end of the value at `at`; adds the lists in it by name, but those within lists."""
    if text.startswith("[", at):
        if name in lists:
            raise json.JSONDecodeError(f"the key {name!r} occurs twice", text, at)
        lists[name] = list(_items(text, at + 1, "]"))
        at = lists[name][-1].end if lists[name] else at + 1
        return text.index("]", at) + 1
    if not text.startswith("{", at):
        return _decode(text, at).end
    at = _skip_blank(text, at + 1)
    while not text.startswith("}", at):
        key = _decode(text, at)
        at = _skip_blank(text, key.end)
        if type(key.value) is not str or not text.startswith(":", at):
            raise json.JSONDecodeError("expected a key and ':'", text, at)
        child = f"{name}.{key.value}" if name else key.value
        at = _skip_blank(text, _find_lists(text, _skip_blank(text, at + 1), child, lists))
        at = _after_item(text, at, "}")
    return at + 1


def _items(text: str, at: int, end: str) -> Iterator[_Item]:
    """The values up to the character `end`, with commas between them; "": to the end of the text,
    without."""
    at = _skip_blank(text, at)
    while not text.startswith(end, at) if end else at < len(text):
        item = _decode(text, at)
        yield item
        at = _skip_blank(text, item.end)
        at = _after_item(text, at, end) if end else at


def _after_item(text: str, at: int, end: str) -> int:
    """Where the next item begins, or the `end`."""
    if text.startswith(end, at):
        return at
    if not text.startswith(",", at):
        raise json.JSONDecodeError(f"expected ',' or {end!r}", text, at)
    at = _skip_blank(text, at + 1)
    if text.startswith(end, at):
        raise json.JSONDecodeError("a comma before the end", text, at)
    return at


def _decode(text: str, at: int) -> _Item:
    value, end = _DECODER.raw_decode(text, at)
    return _Item(at, end, value)


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _skip(row: SkippedRow, skipped: list[SkippedRow] | None) -> None:
    if skipped is None:
        raise RowError(row.message)
    skipped.append(row)


def _field(value: dict[str, Any], name: str) -> Any:
    """value["review"]["text"] for `review.text`. Raises KeyError where it is missing."""
    if name in value or "." not in name:
        return value[name]
    first, _, rest = name.partition(".")
    if type(value[first]) is not dict:
        raise KeyError(name)
    return _field(value[first], rest)


def _problem(value: Any, names: Sequence[str]) -> str:
    """Why the value is not an object with these fields; "" if it is."""
    if type(value) is not dict or not value:
        advice = "; --column_names names the items of lists" if type(value) is list else ""
        found = shorten(json.dumps(value, default=str), 40)
        return f"expected a JSON object with keys, found {found}{advice}"
    for name in names:
        try:
            if _field(value, name) is _TWICE:
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
