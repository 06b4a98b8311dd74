"""JSON lines and plain text, one row per line: lines -> columns, strictly, or a DataError that
names the line.

JSON lines become Python lists of the values, plain text becomes one Arrow column of large_string.
"""

import io
import json
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from bertdist.core.errors import DataError, did_you_mean
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    Parsed,
    Rows,
    first_duplicate,
    row_excerpt,
    rows_of_lines,
)
from bertdist.data.source import SkippedRow, excerpt


def read_keys(fmt: FileFormat, lines: Lines, is_all: bool, skip: bool) -> list[str] | None:
    """Keys of the first object ([]: none in the file; None: beyond these first lines)."""
    if lines.data.lstrip(b" \t\r\n").startswith(b"["):
        raise DataError(
            f"{fmt.name} starts with '[': it is one JSON array, expected one object per line "
            "(`jq -c '.[]'` writes that)."
        )
    _, first = next(_objects(fmt, lines, [] if skip else None), (0, {}))
    return list(first) if first or is_all else None


def parse_json(
    fmt: FileFormat, lines: Lines, wanted: Sequence[str], *, skip: bool, num_rows: int | None = None
) -> Parsed:
    """The values of the keys `wanted`, of the first `num_rows` objects.

    Raises DataError at what is not an object or lacks a key; with skip, it is skipped and returned.
    """
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    numbers: list[int] = []
    skipped: list[SkippedRow] | None = [] if skip else None
    objects = _objects(fmt, lines, skipped, frozenset(wanted))
    for line, value in islice(objects, num_rows):
        numbers.append(line)
        for name, column in columns.items():
            column.append(value[name])

    def find_rows() -> Rows:
        rows, valid_lines = rows_of_lines(lines.data, blank=True), np.array(numbers, np.int64)
        return Rows(*(part[valid_lines] for part in rows))

    return Parsed({**columns}, len(numbers), skipped or [], find_rows)


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
    fmt: FileFormat, lines: Lines, skipped: list[SkippedRow] | None, keys: Set[str] = frozenset()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 0, object) of every line that is not blank.

    What is not an object with these keys is added to `skipped`; without that it is a DataError.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_object)
    # newline: a line ends at \n only
    texts = io.TextIOWrapper(io.BytesIO(lines.data), encoding="utf-8", newline="\n")
    for line, text in enumerate(texts):
        if not text.strip(" \t\r\n"):
            continue
        value: Any = None
        reason = lines.broken.get(line, "")
        if not reason:
            try:
                value = decoder.decode(text)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON: {getattr(error, 'msg', error)}; expected one object per line"
            else:
                reason = _missing(value, keys)
        if not reason:
            yield line, value
        elif skipped is None:
            end = "" if reason.endswith((".", "?")) else "."
            raise DataError(f"{fmt.name} line {lines.first + line}: {reason}{end}")
        else:
            skipped.append(SkippedRow(fmt.name, lines.first + line, reason, excerpt(text)))


def _missing(value: Any, keys: Set[str]) -> str:
    """Why the value is not an object with these keys; "" if it is."""
    if type(value) is not dict or not value:
        return f"expected a JSON object with keys, found {json.dumps(value)[:40]}"
    if value.keys() >= keys:
        return ""
    missing = min(key for key in keys if key not in value)
    return f"the key {missing!r} is missing.{did_you_mean(missing, value)}"


def _object(pairs: list[tuple[str, Any]] | str) -> dict[str, Any]:
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a JSON number")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"the key {first_duplicate([key for key, _ in pairs])!r} occurs twice")
    return result
