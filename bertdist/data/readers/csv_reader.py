"""csv and tsv: lines -> header and columns, strictly: what is not a row is a DataError that names
the line, or is skipped.

How rows are read (pyarrow 26; 1,000,000 rows of 85 MB on one core):

1. pyarrow ends a row at a lone carriage return too, which is text here: a character that the lines
   do not contain replaces it while they are parsed (`escape_carriage_returns`).
2. Quotes are well-formed where every other one opens a field; a newline then ends a row when an
   even number of quotes precedes it (0.2 s). pyarrow reads such rows on one thread (0.15 s; two are
   slower; Python's csv module: 2.2 s).
3. pyarrow accepts an open quote at the end of the file, and reads `"so" he said` as `so he said`,
   without an error. Where quotes are not well-formed, or pyarrow refuses a row, `scan_rows` parses
   row by row (2 s with quotes, 0.5 s without).

A quote within an unquoted field is text. A quote that never closes (within `limit` bytes), or is
followed by text, is an error of the line on which it opens, and reading continues at the next line.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertdist.core.errors import DataError, RowError, listed
from bertdist.data.bad_rows import BadRow
from bertdist.data.readers.text_lines import (
    FileFormat,
    Lines,
    Offsets,
    Parsed,
    RowSpans,
    row_excerpt,
    rows_between,
    rows_of_lines,
)
from bertdist.data.records import HEADER_WORDS, LABEL_COLUMNS
from bertdist.data.source import Column

BLOCK_BYTES = 1 << 30  # what pyarrow reads at once, and its longest row; its limit is 2 GiB
# The first line of a file for Excel; not a row.
SEP_LINE = re.compile(rb'"?sep=([^\r\n"])"?\r?\n', re.IGNORECASE)
_BOM = b"\xef\xbb\xbf"
_QUOTED_FIELD = re.compile(rb'"[^"]*(?:""[^"]*)*"(?!")')
_QUOTE_ADVICE = (
    'write a quote in a quoted field twice (""), or take quotes as text with --quoting none'
)
_DELIMITER_ADVICE = (
    "put a field that contains the delimiter in double quotes (--quoting double), "
    "or set the delimiter with --delimiter"
)


class BadRowSpan(NamedTuple):
    """data[start:end] is not a row; `line` (from 0) is the one to report."""

    start: int
    end: int
    line: int
    reason: str


class ScanResult(NamedTuple):
    """Rows, bad rows, and the end of the scan: a row at `stop` continues beyond the data."""

    row_spans: RowSpans
    bad: list[BadRowSpan]
    stop: int


class ParsedRow(NamedTuple):
    """The fields of a row and its end; end 0: it continues beyond the data.

    `error` says why it is not a row; then `end` is where reading continues.
    """

    end: int
    fields: list[bytes]
    error: str = ""
    error_line: int = 0  # counted from the first line of the row


def find_row_end(
    fmt: FileFormat,
    lines: Lines,
    num_fields: int,
    is_eof: bool,
    soft_limit: int,
    limit: int,
) -> tuple[int, ScanResult | None]:
    """The last end of a row within `soft_limit` bytes, else the first; 0: it is beyond the lines.

    is_eof: nothing follows the lines. Where quotes are not well-formed, the rows are scanned, and
    the result is returned too.
    """
    data = lines.data
    if not fmt.quoted:
        return last_line_end(data, is_eof, soft_limit), None
    ends, _ = _row_ends(data)
    within = ends[ends <= soft_limit]
    stop = int(within[-1] if len(within) else ends[0] if len(ends) else 0)
    if is_eof and (len(data) <= soft_limit or stop == 0):
        stop = len(data)
    if stop and is_well_formed(fmt, data[:stop], limit):
        return stop, None
    result = scan_rows(fmt, lines, num_fields, limit, is_eof, soft_limit)
    return result.stop, result


def last_line_end(data: bytes, is_eof: bool, soft_limit: int) -> int:
    """`find_row_end` where every newline ends a row."""
    if is_eof and len(data) <= soft_limit:
        return len(data)
    stop = data.rfind(b"\n", 0, soft_limit) + 1 or data.find(b"\n") + 1
    return len(data) if is_eof and not stop else stop


def well_formed_rows(fmt: FileFormat, data: bytes, num_fields: int) -> RowSpans:
    """Rows of data without bad rows, whose quotes are well-formed."""
    if not fmt.quoted:
        return rows_of_lines(data, blank=num_fields == 1)
    ends, num_lines = _row_ends(data)
    if data and not data.endswith(b"\n"):
        ends, num_lines = np.append(ends, len(data)), np.append(num_lines, 0)
    return rows_between(data, ends, np.append(0, num_lines[:-1])[: len(ends)], num_fields == 1)


def _row_ends(data: bytes) -> tuple[Offsets, Offsets]:
    """Bytes, and lines, up to and with each newline that an even number of quotes precedes."""
    text = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    even = np.flatnonzero(np.searchsorted(np.flatnonzero(text == ord('"')), newlines) % 2 == 0)
    return newlines[even] + 1, even + 1


def is_well_formed(fmt: FileFormat, data: bytes, limit: int) -> bool:
    """Whether newlines and quotes alone show where rows end, all within `limit` bytes."""
    if not fmt.quoted:
        return True
    if not quotes_pair_up(data, fmt.delimiter):
        return False
    sizes = np.diff(_row_ends(data)[0], prepend=0, append=len(data))
    return len(data) <= limit or int(sizes.max()) <= limit


def quotes_pair_up(data: bytes, delimiter: str) -> bool:
    """Whether quotes 0, 2, ... open a field or follow a quote; 1, 3, ... close or precede one."""
    text = np.frombuffer(b"\n" + data + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    before, after = text[quotes[::2] - 1], text[quotes[1::2] + 1]
    edges = [ord(delimiter), ord("\n"), ord('"')]
    return bool(
        len(quotes) % 2 == 0
        and np.isin(before, edges).all()
        and np.isin(after, [*edges, ord("\r")]).all()
    )


def scan_rows(
    fmt: FileFormat,
    lines: Lines,
    num_fields: int,
    limit: int,
    is_eof: bool = True,
    soft_limit: int | None = None,
) -> ScanResult:
    """Every row, parsed one by one, up to the end that `find_row_end` describes."""
    if not fmt.quoted:
        return _scan_unquoted(fmt, lines.data, num_fields)
    size, data = len(lines.data), with_line_end(lines.data)
    delimiter = re.escape(fmt.delimiter.encode())
    field = rb'(?:"[^"]*(?:""[^"]*)*"(?!")|[^"%b\n][^%b\n]*|)' % (delimiter, delimiter)
    # A row of the right number of fields; the last one may include the \r of the line end.
    good = re.compile(rb"%b(?:%b%b){%d}\r?\n" % (field, delimiter, field, num_fields - 1))
    rows: list[tuple[int, int, int]] = []
    bad: list[BadRowSpan] = []
    at = line = 0
    while at < len(data):
        error, error_line, blank = "", 0, 0
        if match := good.match(data, at, at + limit):
            end = match.end()
        elif blank := blank_line_size(data, at):
            end = at + blank
        else:
            row = parse_row(fmt, data, at, lines.first + line, limit, is_eof)
            end, error_line = row.end, row.error_line
            error = row.error or _wrong_count(fmt, len(row.fields), num_fields)
        if not end or (soft_limit is not None and at and end > soft_limit):
            break
        if error:
            bad.append(BadRowSpan(at, min(end, size), line + error_line, error))
        elif not blank:
            rows.append((at, min(end, size), line))
        line, at = line + data.count(b"\n", at, end), end
    starts, ends, first_lines = np.array(rows, np.int64).reshape(-1, 3).T
    return ScanResult(RowSpans(starts, ends, first_lines), bad, min(at, size))


def _scan_unquoted(fmt: FileFormat, data: bytes, num_fields: int) -> ScanResult:
    rows = rows_of_lines(data, blank=num_fields == 1)
    delimiters = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(fmt.delimiter))
    counts = np.searchsorted(delimiters, rows.ends) - np.searchsorted(delimiters, rows.starts) + 1
    wrong = counts != num_fields
    bad = [
        BadRowSpan(start, end, line, _wrong_count(fmt, count, num_fields))
        for start, end, line, count in zip(
            *(part[wrong].tolist() for part in (*rows, counts)), strict=True
        )
    ]
    return ScanResult(RowSpans(*(part[~wrong] for part in rows)), bad, len(data))


def parse_row(
    fmt: FileFormat, data: bytes, start: int, line: int, limit: int, is_eof: bool
) -> ParsedRow:
    """The row at `start`, on line `line` (from 1) of the file; data ends with a newline."""
    delimiter = fmt.delimiter.encode()
    unquoted_field = re.compile(rb"[^%b\n]*" % re.escape(delimiter))
    fields: list[bytes] = []
    at = start
    while True:
        if fmt.quoted and data.startswith(b'"', at):
            quoted = _QUOTED_FIELD.match(data, at, start + limit)
            if quoted is None:
                is_short = len(data) <= start + limit
                if not is_eof and is_short:
                    return ParsedRow(0, fields)
                never = "never closes" if is_short else f"does not close within {limit:,} bytes"
                error = f"a quote opens here and {never}; {_QUOTE_ADVICE}"
                error_line = data.count(b"\n", start, at)
                return ParsedRow(data.index(b"\n", at) + 1, fields, error, error_line)
            end = quoted.end()
            if not data.startswith((delimiter, b"\n", b"\r\n"), end):
                closed = line + data.count(b"\n", start, end)
                error = f"text follows the quote closed on line {closed}; {_QUOTE_ADVICE}"
                return ParsedRow(data.index(b"\n", at) + 1, fields, error)
            fields.append(quoted[0][1:-1].replace(b'""', b'"'))
            at = end
        else:
            unquoted = unquoted_field.match(data, at)
            assert unquoted is not None, at
            at, field = unquoted.end(), unquoted[0]
            fields.append(field.removesuffix(b"\r") if data.startswith(b"\n", at) else field)
        if not data.startswith(delimiter, at):
            return ParsedRow(data.index(b"\n", at) + 1, fields)
        at += 1


def with_line_end(data: bytes) -> bytes:
    """The same lines, the last one ended too."""
    return data if data.endswith(b"\n") else data + b"\n"


def blank_line_size(data: bytes, at: int) -> int:
    """Bytes of the blank line that begins at `at`, else 0."""
    return 1 if data.startswith(b"\n", at) else 2 if data.startswith(b"\r\n", at) else 0


def _wrong_count(fmt: FileFormat, count: int, expected: int) -> str:
    if count == expected:
        return ""
    source = "the header" if fmt.has_header else "--column_names"
    plural = "s" * (count > 1)
    return f"{count} field{plural}, expected {expected} as in {source}; {_DELIMITER_ADVICE}"


def read_header(
    fmt: FileFormat, lines: Lines, is_eof: bool, limit: int
) -> tuple[list[str], int] | None:
    """Names of the columns ([]: the file has no rows), and number of lines before the first row.

    lines: the first of the file. None: the header continues beyond them. Raises DataError.
    """
    data = with_line_end(lines.data)
    sep = SEP_LINE.match(data)
    at, line = (sep.end(), 1) if sep else (0, 0)
    num_before = line
    if len(fmt.column_names) != 1:  # else a blank line is a row
        while at < len(lines.data) and (blank := blank_line_size(data, at)):
            at, line = at + blank, line + 1
    if at >= len(lines.data):
        return ([], line) if is_eof else None
    row = parse_row(fmt, data, at, 1 + line, limit, is_eof)
    if not row.end:
        return None
    if row.error and not fmt.has_header:
        return list(fmt.column_names), num_before  # a row of data: `parse_csv` rejects it
    if row.error:
        raise DataError(f"{fmt.name} line {1 + line + row.error_line}: {row.error}.")
    num_lines = line + data.count(b"\n", at, row.end)
    broken = [number for number in lines.broken if number < num_lines]
    if broken and fmt.has_header:
        raise DataError(f"{fmt.name} line {1 + broken[0]}: {lines.broken[broken[0]]}.")
    fields = [field.decode().replace(lines.cr_placeholder or "\r", "\r") for field in row.fields]
    location = f"{fmt.name} line {1 + line}"
    if fmt.has_header:
        return fields, num_lines
    if _is_header(fields, fmt.column_names):
        raise DataError(
            f"{location} is a header ({listed(list(map(repr, fields)), 5)}), and --column_names is "
            "for files without one; remove --column_names, or that line."
        )
    return list(fmt.column_names), num_before


def _is_header(fields: Sequence[str], column_names: Sequence[str]) -> bool:
    """Whether the first row has the names of the columns, their own or usual ones."""
    pairs = list(zip(fields, column_names, strict=False))
    cells = [(field.strip().casefold(), name.casefold()) for field, name in pairs if name != "_"]
    own = sum(field == name for field, name in cells)
    usual = sum(field == name or field in HEADER_WORDS for field, name in cells)
    is_label = any(field == name and name in LABEL_COLUMNS for field, name in cells)
    return bool(cells) and (usual > 1 or own == len(cells) or is_label)


def parse_csv(
    fmt: FileFormat,
    lines: Lines,
    names: list[str],
    wanted: Sequence[str],
    *,
    skip: bool,
    limit: int,
    scan: ScanResult | None = None,
) -> Parsed:
    """The columns `wanted` of complete rows. scan: the result of `find_row_end` for these lines.

    Raises DataError at a bad row; with skip, returns it as such.
    """
    data, num_fields = lines.data, len(names)
    for name in wanted:
        if names.count(name) > 1:
            advice = "rename one; or remove the header, and name the columns with --column_names"
            raise DataError(f"{fmt.name} line 1: the header has two columns {name!r}; {advice}.")
    indices = [names.index(name) for name in wanted] or [0]
    if scan is None and (lines.broken or not is_well_formed(fmt, data, limit)):
        scan = scan_rows(fmt, lines, num_fields, limit)
    table = None
    if scan is None:
        try:
            table = _read_csv(fmt, data, num_fields, indices)
        except pa.ArrowInvalid:
            scan = scan_rows(fmt, lines, num_fields, limit)
            if not scan.bad:
                raise
    bad_rows: list[BadRow] = []
    rows = None
    if scan is not None:
        bad_rows, rows = _reject(fmt, lines, scan, skip)
        good = b"".join(_adjacent_rows(data, rows)) if bad_rows else data
        table = _read_csv(fmt, good, num_fields, indices)
    assert table is not None
    columns: dict[str, Column] = dict(zip(wanted, table.columns, strict=False))
    if lines.cr_placeholder:
        for name, column in columns.items():
            columns[name] = pc.replace_substring(column, lines.cr_placeholder, "\r")

    def find_rows() -> RowSpans:
        return well_formed_rows(fmt, data, num_fields) if rows is None else rows

    return Parsed(columns, table.num_rows, bad_rows, find_rows)


def _read_csv(fmt: FileFormat, data: bytes, num_fields: int, indices: list[int]) -> pa.Table:
    """The columns at `indices` as large_string; raises ArrowInvalid."""
    from pyarrow import csv  # lazy: only csv and tsv need it

    types = {str(index): pa.large_string() for index in indices}
    if not data:  # pyarrow would call it an invalid file
        return pa.table([pa.chunked_array([], kind) for kind in types.values()], names=list(types))
    parse_options = csv.ParseOptions(
        delimiter=fmt.delimiter,
        quote_char='"' if fmt.quoted else False,
        newlines_in_values=fmt.quoted,
        ignore_empty_lines=num_fields > 1,
    )
    read_options = csv.ReadOptions(
        use_threads=False,
        block_size=BLOCK_BYTES,
        column_names=[str(index) for index in range(num_fields)],
    )
    convert_options = csv.ConvertOptions(
        include_columns=list(types), column_types=types, strings_can_be_null=False, check_utf8=False
    )
    if data.startswith(_BOM):  # pyarrow removes one, and here it is text
        data = _BOM + data
    return csv.read_csv(pa.BufferReader(data), read_options, parse_options, convert_options)


def _reject(
    fmt: FileFormat, lines: Lines, scan: ScanResult, skip: bool
) -> tuple[list[BadRow], RowSpans]:
    """The bad rows, in order; the others. Without skip, a DataError at the first."""
    rows, bad = scan.row_spans, list(scan.bad)
    if lines.broken:
        ends = np.flatnonzero(np.frombuffer(lines.data, np.uint8) == ord("\n")) + 1
        keep = np.ones(len(rows.starts), bool)
        for line, reason in sorted(lines.broken.items()):
            start = int(ends[line - 1]) if line else 0
            row = int(np.searchsorted(rows.starts, start, "right")) - 1
            if row >= 0 and start < rows.ends[row] and keep[row]:
                keep[row] = False
                start, end, first_line = (int(part[row]) for part in rows)
                bad.append(BadRowSpan(start, end, first_line, reason))
        rows = RowSpans(*(part[keep] for part in rows))
    bad.sort()
    if bad and not skip:
        raise RowError(f"{fmt.name} line {lines.first + bad[0].line}: {bad[0].reason}.")
    bad_rows = [
        BadRow(fmt.name, lines.first + line, reason, row_excerpt(lines, start, end))
        for start, end, line, reason in bad
    ]
    return bad_rows, rows


def _adjacent_rows(data: bytes, rows: RowSpans) -> Iterator[bytes]:
    """The bytes of the rows; rows without a gap between them together."""
    if len(rows.starts):
        gaps = (np.flatnonzero(rows.starts[1:] != rows.ends[:-1]) + 1).tolist()
        for first, last in zip([0, *gaps], [*gaps, len(rows.starts)], strict=True):
            yield data[rows.starts[first] : rows.ends[last - 1]]
