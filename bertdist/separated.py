"""Rows of csv and tsv files: whole lines -> columns, strictly, or a DataError that names the line.

In: lines as UTF-8 without lone carriage returns, and how they are written. Out: the header, Arrow large_string columns, and what is no row.
One module, because the header and the rows below it are one table.

How rows are read, and why it takes three steps (pyarrow 26; 1,000,000 rows of 85 MB on one core):
1. pyarrow ends a row at a lone carriage return too. Such a one is text here: a character that the lines do not hold stands in for it.
2. pyarrow reads the rows (0.15 s; Python's csv module: 2.2 s) on one thread (two are slower).
3. pyarrow takes an open quote at the end, and reads `"so" he said` as `so he said`, without a word. Where quotes do not pair up, and where
   pyarrow refuses a row, `row_ends.scan` judges row by row, names the line, and knows what to leave out where rows are to be skipped.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from bertdist.errors import DataError
from bertdist.pieces import BadRow, Column
from bertdist.row_ends import Bad, Scan, blank_at, clean_rows, is_clean, judge, scan, with_line_end
from bertdist.text_files import Form, Lines, Parsed, Rows, text_at, twice_in

_BOM = b"\xef\xbb\xbf"


def read_header(form: Form, lines: Lines, is_all: bool, limit: int) -> tuple[list[str], int] | None:
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
    form: Form,
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
    bad: list[BadRow] = []
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
    form: Form, data: bytes, num_fields: int, keys: list[int], block_bytes: int
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


def _refuse(form: Form, lines: Lines, found: Scan, skip: bool) -> tuple[list[BadRow], Rows]:
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
        BadRow(form.name, lines.first + one.line, one.reason, text_at(lines, one.start, one.end))
        for one in bad
    ], rows


def _runs(data: bytes, rows: Rows) -> Iterator[bytes]:
    """Rows that stand side by side, together."""
    if len(rows.starts):
        gaps = (np.flatnonzero(rows.starts[1:] != rows.ends[:-1]) + 1).tolist()
        for first, last in zip([0, *gaps], [*gaps, len(rows.starts)], strict=True):
            yield data[rows.starts[first] : rows.ends[last - 1]]
