"""Rows of JSON lines and of plain text: whole lines -> columns, strictly, or a DataError that names the line.

In: lines as UTF-8. Out: Python lists of what the objects hold (JSON lines); the lines themselves as Arrow large_string (txt).
One module: both have one row a line, whatever stands in it.
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
    rows_of_lines,
    text_at,
    twice_in,
)
from bertdist.data.source import Column, SkippedRow, excerpt


def read_keys(form: FileFormat, lines: Lines, is_all: bool, skip: bool) -> list[str] | None:
    """Keys of the first object (none where there is none). None where it stands beyond these lines, which are the file's first."""
    if lines.data.lstrip(b" \t\r\n").startswith(b"["):
        raise DataError(
            f"{form.name} starts with '[': it is one JSON array, expected one object a line (`jq -c '.[]'` writes that)."
        )
    _, first = next(_objects(form, lines, [] if skip else None), (0, {}))
    return list(first) if first or is_all else None


def parse_json(
    form: FileFormat,
    lines: Lines,
    wanted: Sequence[str],
    *,
    skip: bool,
    num_rows: int | None = None,
) -> Parsed:
    """The values of the keys `wanted`, of the first `num_rows` objects. Raises DataError at what is no object or lacks a key.

    With skip, it is left out and told.
    """
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    numbers: list[int] = []
    bad: list[SkippedRow] | None = [] if skip else None
    objects = _objects(form, lines, bad, frozenset(wanted))
    for line, found in islice(objects, num_rows):
        numbers.append(line)
        for name, column in columns.items():
            column.append(found[name])

    def rows() -> Rows:
        every, kept = rows_of_lines(lines.data, blank=True), np.array(numbers, np.int64)
        return Rows(*(part[kept] for part in every))

    taken: dict[str, Column] = dict(columns)
    return Parsed(taken, len(numbers), bad or [], rows)


def parse_txt(form: FileFormat, lines: Lines, wanted: Sequence[str]) -> Parsed:
    """Every line as a text; those with bytes that are not of the encoding are left out and told."""
    texts = (
        lines.data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        if lines.data
        else []
    )
    rows = rows_of_lines(lines.data, blank=True)
    bad = []
    if lines.broken:
        bad = [
            SkippedRow(
                form.name,
                lines.first + line,
                reason,
                text_at(lines, int(rows.starts[line]), int(rows.ends[line])),
            )
            for line, reason in sorted(lines.broken.items())
        ]
        kept = np.array([line for line in range(len(texts)) if line not in lines.broken], np.int64)
        texts, rows = [texts[line] for line in kept], Rows(*(part[kept] for part in rows))
    return Parsed(
        dict.fromkeys(wanted, pa.chunked_array([texts], pa.large_string())),
        len(texts),
        bad,
        lambda: rows,
    )


def _objects(
    form: FileFormat, lines: Lines, bad: list[SkippedRow] | None, keys: Set[str] = frozenset()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 0, object) of every line that is not blank; where there is `bad`, what is no object with these keys goes there."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_object)
    for line, text in enumerate(
        io.TextIOWrapper(io.BytesIO(lines.data), encoding="utf-8", newline="\n")
    ):  # a line ends at \n only
        if not text.strip(" \t\r\n"):
            continue
        found: Any = None
        reason = lines.broken.get(line, "")
        if not reason:
            try:
                found = decoder.decode(text)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON: {getattr(error, 'msg', error)}; expected one object a line"
            else:
                reason = _lacks(found, keys)
        if not reason:
            yield line, found
        elif bad is None:
            raise DataError(
                f"{form.name} line {lines.first + line}: {reason}{'' if reason.endswith(('.', '?')) else '.'}"
            )
        else:
            bad.append(SkippedRow(form.name, lines.first + line, reason, excerpt(text)))


def _lacks(found: Any, keys: Set[str]) -> str:
    if type(found) is dict and found and found.keys() >= keys:
        return ""
    if type(found) is not dict or not found:
        return f"expected a JSON object with keys, found {json.dumps(found)[:40]}"
    missing = min(key for key in keys if key not in found)
    return f"the key {missing!r} is missing.{did_you_mean(missing, found)}"


def _object(pairs: list[tuple[str, Any]] | str) -> dict[str, Any]:
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a JSON number")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {twice_in([key for key, _ in pairs])!r} stands twice")
    return found
