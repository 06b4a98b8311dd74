"""Where rows of csv and tsv files begin and end, and what is no row.

In: lines as UTF-8 without lone carriage returns, and how they are written. Out: `cut`, the end of the last whole row; `scan`, every row
with its line, and every fault. One module, because a file that is cut into pieces must fall into the same rows as the whole of it.

Where quotes pair up (in well-formed lines every other quote opens a field: 0.2 s for 1,000,000 rows of 85 MB), a newline ends a row when an
even number of quotes stands before it. Else each row is judged: a quote within an unquoted field is text, a quote that never closes, or
that text follows, is a fault. It costs the line on which the quote opens: reading goes on at the next line. "Never" is `limit` bytes.

Rows of csv and tsv files: whole lines -> columns, strictly, or a DataError that names the line.

In: lines as UTF-8 without lone carriage returns, and how they are written. Out: the header, Arrow large_string columns, and what is no row.
One module, because the header and the rows below it are one table.

How rows are read, and why it takes three steps (pyarrow 26; 1,000,000 rows of 85 MB on one core):
1. pyarrow ends a row at a lone carriage return too. Such a one is text here: a character that the lines do not hold stands in for it.
2. pyarrow reads the rows (0.15 s; Python's csv module: 2.2 s) on one thread (two are slower).
3. pyarrow takes an open quote at the end, and reads `"so" he said` as `so he said`, without a word. Where quotes do not pair up, and where
   pyarrow refuses a row, `row_ends.scan` judges row by row, names the line, and knows what to leave out where rows are to be skipped.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from bertdist.core.errors import DataError
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    Offsets,
    Parsed,
    Rows,
    rows_between,
    rows_of_lines,
    text_at,
    twice_in,
)
from bertdist.data.source import Column, SkippedRow

_QUOTED = re.compile(rb'"[^"]*(?:""[^"]*)*"(?!")')

_ADVICE = 'write a quote in a quoted field twice (""), or take quotes as text with --quoting none'


class Bad(NamedTuple):
    """What is no row: data[start:end], told on line `line` (from 0)."""

    start: int
    end: int
    line: int
    reason: str


class Scan(NamedTuple):
    """Rows, what is none, and how far that is settled: a row that begins at `stop` goes on beyond the data."""

    rows: Rows
    bad: list[Bad]
    stop: int


class Row(NamedTuple):
    """One row in full. `fault` says why it is none, and then `end` is where reading goes on. end 0: it goes on beyond the data."""

    end: int
    fields: list[bytes]
    fault: str = ""
    told_at: int = 0  # the line on which the fault is told, from that of the row


def cut(
    form: FileFormat, lines: Lines, num_fields: int, is_all: bool, soft: int, limit: int
) -> tuple[int, Scan | None]:
    """Where the last row ends that ends within `soft` bytes, else the first one; 0: it ends beyond the lines. is_all: nothing follows them.

    Where quotes do not tell by themselves which newlines end a row, every row is judged; then what was found comes with it.
    """
    data = lines.data
    if not form.quoted:
        return last_line_end(data, is_all, soft), None
    ends, _ = _even_ends(data)
    within = ends[ends <= soft]
    stop = int(within[-1] if len(within) else ends[0] if len(ends) else 0)
    if is_all and (len(data) <= soft or stop == 0):
        stop = len(data)
    if stop and is_clean(form, data[:stop], limit):
        return stop, None
    found = scan(form, lines, num_fields, limit, is_all, soft)
    return found.stop, found


def last_line_end(data: bytes, is_all: bool, soft: int) -> int:
    """`cut` where every newline ends a row."""
    if is_all and len(data) <= soft:
        return len(data)
    stop = data.rfind(b"\n", 0, soft) + 1 or data.find(b"\n") + 1
    return len(data) if is_all and not stop else stop


def clean_rows(form: FileFormat, data: bytes, num_fields: int) -> Rows:
    """Rows of data without fault, whose quotes pair up where it is quoted."""
    if not form.quoted:
        return rows_of_lines(data, blank=num_fields == 1)
    ends, num_lines = _even_ends(data)
    if data and not data.endswith(b"\n"):
        ends, num_lines = np.append(ends, len(data)), np.append(num_lines, 0)
    return rows_between(data, ends, np.append(0, num_lines[:-1])[: len(ends)], num_fields == 1)


def _even_ends(data: bytes) -> tuple[Offsets, Offsets]:
    """Bytes, and lines, up to and with each newline that has an even number of quotes before it."""
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    even = np.flatnonzero(np.searchsorted(np.flatnonzero(text == ord('"')), newlines) % 2 == 0)
    return newlines[even] + 1, even + 1


def is_clean(form: FileFormat, data: bytes, limit: int) -> bool:
    """Whether newlines tell by themselves where rows end: quotes pair up, and no row has more than `limit` bytes."""
    if not form.quoted or not quotes_pair_up(data, form.delimiter):
        return not form.quoted
    return (
        len(data) <= limit
        or int(np.diff(_even_ends(data)[0], prepend=0, append=len(data)).max()) <= limit
    )


def quotes_pair_up(data: bytes, delimiter: str) -> bool:
    """Whether quotes 0, 2, 4, ... open a field or follow a quote, and quotes 1, 3, 5, ... close one or precede a quote."""
    text = np.frombuffer(b"\n" + data + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    before, after, edges = (
        text[quotes[::2] - 1],
        text[quotes[1::2] + 1],
        [ord(delimiter), ord("\n"), ord('"')],
    )
    return bool(
        len(quotes) % 2 == 0
        and np.isin(before, edges).all()
        and np.isin(after, [*edges, ord("\r")]).all()
    )


def scan(
    form: FileFormat,
    lines: Lines,
    num_fields: int,
    limit: int,
    is_all: bool = True,
    soft: int | None = None,
) -> Scan:
    """Every row, judged one by one (1,000,000 rows: 2 s with quotes, 0.5 s without), as far as `cut` says."""
    if not form.quoted:
        return _scan_unquoted(form, lines.data, num_fields)
    size, data = len(lines.data), with_line_end(lines.data)
    delimiter = re.escape(form.delimiter.encode())
    field = rb'(?:"[^"]*(?:""[^"]*)*"(?!")|[^"%b\n][^%b\n]*|)' % (delimiter, delimiter)
    # A row of the right number of fields; the last one may take the \r of the line end.
    good = re.compile(rb"%b(?:%b%b){%d}\r?\n" % (field, delimiter, field, num_fields - 1))
    found: list[tuple[int, int, int]] = []
    bad: list[Bad] = []
    at = line = 0
    while at < len(data):
        fault, told_at, blank = "", 0, 0
        if match := good.match(data, at, at + limit):
            end = match.end()
        elif blank := blank_at(data, at):
            end = at + blank
        else:
            row = judge(form, data, at, lines.first + line, limit, is_all)
            end, told_at = row.end, row.told_at
            fault = row.fault or _wrong_count(form, len(row.fields), num_fields)
        if not end or (soft is not None and at and end > soft):
            break
        if fault:
            bad.append(Bad(at, min(end, size), line + told_at, fault))
        elif not blank:
            found.append((at, min(end, size), line))
        line, at = line + data.count(b"\n", at, end), end
    starts, ends, firsts = np.array(found, np.int64).reshape(-1, 3).T
    return Scan(Rows(starts, ends, firsts), bad, min(at, size))


def _scan_unquoted(form: FileFormat, data: bytes, num_fields: int) -> Scan:
    rows = rows_of_lines(data, blank=num_fields == 1)
    delimiters = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(form.delimiter))
    counts = np.searchsorted(delimiters, rows.ends) - np.searchsorted(delimiters, rows.starts) + 1
    wrong = counts != num_fields
    bad = [
        Bad(start, end, line, _wrong_count(form, count, num_fields))
        for start, end, line, count in zip(
            *(part[wrong].tolist() for part in (*rows, counts)), strict=True
        )
    ]
    return Scan(Rows(*(part[~wrong] for part in rows)), bad, len(data))


def judge(form: FileFormat, data: bytes, at: int, line: int, limit: int, is_all: bool) -> Row:
    """The row that begins at `at`, on line `line` (from 1) of the file, field by field; data ends with a newline."""
    plain = re.compile(rb"[^%b\n]*" % re.escape(form.delimiter.encode()))
    fields: list[bytes] = []
    start, delimiter = at, form.delimiter.encode()
    while True:
        if form.quoted and data.startswith(b'"', at):
            quoted = _QUOTED.match(data, at, start + limit)
            if quoted is None:
                if not is_all and len(data) <= start + limit:
                    return Row(0, fields)
                never = (
                    "never closes"
                    if len(data) <= start + limit
                    else f"does not close within {limit:,} bytes"
                )
                told = f"a quote opens here and {never}; {_ADVICE}"
                return Row(data.index(b"\n", at) + 1, fields, told, data.count(b"\n", start, at))
            end = quoted.end()
            if not data.startswith((delimiter, b"\n", b"\r\n"), end):
                closed = line + data.count(b"\n", start, end)
                told = f"text follows the quote closed on line {closed}; {_ADVICE}"
                return Row(data.index(b"\n", at) + 1, fields, told)
            fields.append(quoted[0][1:-1].replace(b'""', b'"'))
            at = end
        else:
            unquoted = plain.match(data, at)
            assert unquoted is not None
            at = unquoted.end()
            fields.append(
                unquoted[0].removesuffix(b"\r") if data.startswith(b"\n", at) else unquoted[0]
            )
        if not data.startswith(delimiter, at):
            return Row(data.index(b"\n", at) + 1, fields)
        at += 1


def with_line_end(data: bytes) -> bytes:
    """The same lines, the last one ended too."""
    return data if data.endswith(b"\n") else data + b"\n"


def blank_at(data: bytes, at: int) -> int:
    """Length of the blank line that begins at `at`, else 0."""
    return 1 if data.startswith(b"\n", at) else 2 if data.startswith(b"\r\n", at) else 0


def _wrong_count(form: FileFormat, found: int, expected: int) -> str:
    if found == expected:
        return ""
    source = "the header" if form.has_header else "--column_names"
    advice = "put a field that holds the delimiter in double quotes (--quoting double), or name the delimiter with --delimiter"
    return f"{found} field{'s' * (found > 1)}, expected {expected} as in {source}; {advice}"


_BOM = b"\xef\xbb\xbf"


def read_header(
    form: FileFormat, lines: Lines, is_all: bool, limit: int
) -> tuple[list[str], int] | None:
    """Names of the columns (none where there is no row), and how many lines stand before the first row.

    None where the header goes on beyond these lines, which are the file's first. Raises DataError.
    """
    data = with_line_end(lines.data)
    at = line = 0
    while at < len(lines.data) and (blank := blank_at(data, at)) and len(form.column_names) != 1:
        at, line = at + blank, line + 1
    if at >= len(lines.data):
        return ([], line) if is_all else None
    row = judge(form, data, at, 1 + line, limit, is_all)
    if not row.end:
        return None
    if row.fault and not form.has_header:
        return list(form.column_names), 0  # a row of data: `parse` refuses it, or leaves it out
    if row.fault:
        raise DataError(f"{form.name} line {1 + line + row.told_at}: {row.fault}.")
    num_lines = line + data.count(b"\n", at, row.end)
    if broken := [number for number in lines.broken if number < num_lines and form.has_header]:
        raise DataError(f"{form.name} line {1 + broken[0]}: {lines.broken[broken[0]]}.")
    fields = [field.decode().replace(lines.stand_in or "\r", "\r") for field in row.fields]
    here = f"{form.name} line {1 + line}"
    if form.has_header:
        if twice := twice_in([name for name in fields if name]):
            raise DataError(
                f"{here}: the header has two columns {twice!r}; rename one, or give --column_names."
            )
        return fields, num_lines
    named = [
        (field, name) for field, name in zip(fields, form.column_names, strict=False) if name != "_"
    ]
    if len(named) > 1 and all(field == name for field, name in named):
        raise DataError(
            f"{here} holds the names of --column_names: the file has a header; remove --column_names."
        )
    return list(form.column_names), 0


def parse(
    form: FileFormat,
    lines: Lines,
    names: list[str],
    wanted: Sequence[str],
    *,
    skip: bool,
    limit: int,
    block_bytes: int,
    found: Scan | None = None,
) -> Parsed:
    """The columns `wanted` of whole rows. `found`: what `row_ends.cut` saw of these very lines.

    Raises DataError at what is no row; with skip, it is left out and told.
    """
    data, num_fields, keys = lines.data, len(names), [names.index(name) for name in wanted] or [0]
    if found is None and (lines.broken or not is_clean(form, data, limit)):
        found = scan(form, lines, num_fields, limit)
    table = None
    if found is None:
        try:
            table = _read_csv(form, data, num_fields, keys, block_bytes)
        except pa.ArrowInvalid:
            found = scan(form, lines, num_fields, limit)
            if not found.bad:
                raise
    bad: list[SkippedRow] = []
    rows = None
    if found is not None:
        bad, rows = _refuse(form, lines, found, skip)
        table = _read_csv(
            form, b"".join(_runs(data, rows)) if bad else data, num_fields, keys, block_bytes
        )
    assert table is not None
    columns: dict[str, Column] = {}
    for name, column in zip(wanted, table.columns, strict=False):
        columns[name] = (
            pc.replace_substring(column, lines.stand_in, "\r") if lines.stand_in else column
        )
    return Parsed(
        columns,
        table.num_rows,
        bad,
        lambda: clean_rows(form, data, num_fields) if rows is None else rows,
    )


def _read_csv(
    form: FileFormat, data: bytes, num_fields: int, keys: list[int], block_bytes: int
) -> pa.Table:
    """Columns `keys` as large_string; raises ArrowInvalid."""
    types = {str(key): pa.large_string() for key in keys}
    if not data:  # pyarrow would call it an invalid file
        return pa.table([pa.chunked_array([], kind) for kind in types.values()], names=list(types))
    parsing = pa.csv.ParseOptions(
        delimiter=form.delimiter,
        quote_char='"' if form.quoted else False,
        newlines_in_values=form.quoted,
    )
    parsing.ignore_empty_lines = num_fields > 1
    reading = pa.csv.ReadOptions(
        use_threads=False,
        block_size=block_bytes,
        column_names=[str(at) for at in range(num_fields)],
    )
    converting = pa.csv.ConvertOptions(
        include_columns=list(types), column_types=types, strings_can_be_null=False, check_utf8=False
    )
    data = (
        _BOM + data if data.startswith(_BOM) else data
    )  # pyarrow takes one away, and here it is text
    return pa.csv.read_csv(pa.BufferReader(data), reading, parsing, converting)


def _refuse(
    form: FileFormat, lines: Lines, found: Scan, skip: bool
) -> tuple[list[SkippedRow], Rows]:
    """What is left out, in the order of the lines, and the rows that stay. Without skip, a DataError at the first one that is."""
    rows, bad = found.rows, list(found.bad)
    if lines.broken:
        ends = np.flatnonzero(np.frombuffer(lines.data, np.uint8) == ord("\n")) + 1
        keep = np.ones(len(rows.starts), bool)
        for line, reason in sorted(lines.broken.items()):
            start = int(ends[line - 1]) if line else 0
            row = int(np.searchsorted(rows.starts, start, "right")) - 1
            if row >= 0 and start < rows.ends[row] and keep[row]:
                keep[row] = False
                bad.append(
                    Bad(int(rows.starts[row]), int(rows.ends[row]), int(rows.lines[row]), reason)
                )
        rows = Rows(*(part[keep] for part in rows))
    bad.sort()
    if bad and not skip:
        raise DataError(f"{form.name} line {lines.first + bad[0].line}: {bad[0].reason}.")
    return [
        SkippedRow(
            form.name, lines.first + one.line, one.reason, text_at(lines, one.start, one.end)
        )
        for one in bad
    ], rows


def _runs(data: bytes, rows: Rows) -> Iterator[bytes]:
    """Rows that stand side by side, together."""
    if len(rows.starts):
        gaps = (np.flatnonzero(rows.starts[1:] != rows.ends[:-1]) + 1).tolist()
        for first, last in zip([0, *gaps], [*gaps, len(rows.starts)], strict=True):
            yield data[rows.starts[first] : rows.ends[last - 1]]
