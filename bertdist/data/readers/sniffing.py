"""Detects how a text file is written from its first bytes (HEAD_BYTES): encoding, delimiter,
quoting.

Each rule prefers to detect nothing: then the reader fails, and its message names the line, the byte
and the flag.

1. A byte order mark of UTF-16 or UTF-32 decides. What is valid UTF-8 is UTF-8.
2. Else cp1252, if at least MIN_SPECIAL characters are not ASCII, and they are less than MAX_SHARE
   of the text: English with some quotes, dashes and pound signs, from Windows. Text of other
   languages needs --encoding, as the same bytes are letters in many code pages. What is detected is
   printed (`DataFile.describe`).
3. The delimiter is the usual one for the file name extension, unless exactly one other gives all
   lines the same number of fields. In tsv files quotes are text (else ChnSentiCorp would lose 454
   rows), unless only reading them as quotes gives all lines the same number of fields.
"""

import codecs
import re
from dataclasses import replace

from bertdist.data.readers.csv_reader import (
    blank_line_size,
    is_well_formed,
    parse_row,
    scan_rows,
    with_line_end,
)
from bertdist.data.readers.text_lines import FileFormat, Lines, escape_carriage_returns, line_ends

HEAD_BYTES = 1 << 20
MIN_SPECIAL = 8  # fewer characters above ASCII prove nothing
MAX_SHARE = 1 / 200  # of characters above ASCII, in English text
DELIMITERS = {",": "csv", "\t": "tsv", ";": "csv", "|": "csv"}  # delimiter -> whose quoting it has

_UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)


def detect_encoding(head: bytes, is_all: bool) -> str | None:
    """The encoding of a file that begins with `head`; None where that is uncertain."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_all)
        return "utf-8"
    except UnicodeDecodeError:
        lines = head if is_all else head[: head.rfind(b"\n") + 1]
        return "cp1252" if b"\0" not in lines and _is_english_cp1252(lines) else None


def _is_english_cp1252(data: bytes) -> bool:
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    num_special = len(re.findall(r"[^\x00-\x7f]", text))
    if not MIN_SPECIAL <= num_special < MAX_SHARE * len(text):
        return False
    is_damaged_utf8 = 4 * sum(map(len, _UTF8_SEQUENCE.findall(data))) > num_special
    return not is_damaged_utf8


def detect_table(
    fmt: FileFormat, head: bytes, is_all: bool, *, delimiter: bool, quoting: bool
) -> FileFormat | None:
    """`fmt` with the delimiter and quoting, if requested, of a table that begins with `head`.

    `fmt` has the kind of the file name extension, and the usual delimiter and quoting of that kind,
    which stay where nothing else is certain. With an unknown extension, None: this is not a table.
    """
    data = head if is_all else head[: head.rfind(b"\n") + 1]
    lines = escape_carriage_returns(Lines(data, 1, {}))
    is_table = fmt.kind in ("csv", "tsv")
    unchanged = fmt if is_table else None
    if b"\0" in data:
        return unchanged
    usual = [fmt] if is_table else []
    if is_table and quoting and not fmt.quoted:
        usual.append(replace(fmt, quoted=True))
    for candidate in usual:
        if _has_even_rows(candidate, lines, is_all):
            return candidate
    if not delimiter:
        return unchanged
    matches = []
    for sign, kind in DELIMITERS.items():
        if is_table and sign == fmt.delimiter:
            continue
        quotings = ([True] if kind == "csv" else [False, True]) if quoting else [fmt.quoted]
        for quoted in quotings:
            name = fmt.kind if is_table else kind
            candidate = replace(fmt, kind=name, delimiter=sign, quoted=quoted)
            if _has_even_rows(candidate, lines, is_all):
                matches.append(candidate)
                break
    return matches[0] if len(matches) == 1 else unchanged


def _has_even_rows(fmt: FileFormat, lines: Lines, is_all: bool) -> bool:
    """Whether two rows or more all have the same number of fields (2 or more, --column_names)."""
    data, at = with_line_end(lines.data), 0
    while at < len(lines.data) and (blank := blank_line_size(data, at)):
        at += blank
    if at >= len(lines.data):
        return False
    row = parse_row(fmt, data, at, 1, len(data), is_all)
    num_fields = len(row.fields)
    if row.error or not row.end or num_fields < 2:
        return False
    if fmt.column_names and num_fields != len(fmt.column_names):
        return False
    scan = scan_rows(fmt, lines, num_fields, len(data), is_all)
    if len(scan.rows.starts) < 2 or scan.bad:
        return False
    if not fmt.quoted or fmt.delimiter != "\t":
        return True
    # In a tsv file a quote within a field means that quotes are text everywhere.
    return is_well_formed(fmt, lines.data[: scan.stop], len(data))


def head_as_utf8(head: bytes, codec: str, is_all: bool) -> bytes:
    """The complete lines of a file's beginning in UTF-8, with undecodable bytes replaced."""
    ends = line_ends(head, codec)
    lines = head if is_all or not len(ends) else head[: ends[-1]]
    return lines.decode(codec, "replace").encode(errors="replace").removeprefix(codecs.BOM_UTF8)
