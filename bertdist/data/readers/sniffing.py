"""Detects what a file is from its name and first bytes (HEAD_BYTES): its kind, encoding, delimiter
and quoting. All commands use the same rule.

Each rule prefers to detect nothing: then the reader fails, and its message names the line, the byte
and the flag. What is detected is printed (`DataFile.note`).

1. A byte order mark of UTF-16 or UTF-32 decides. What is valid UTF-8 is UTF-8.
2. Else cp1252, if at least MIN_SPECIAL characters are not ASCII, and they are less than MAX_SHARE
   of the text: English with some quotes, dashes and pound signs, from Windows. Text of other
   languages needs --encoding, as the same bytes are letters in many code pages.
3. The kind is that of the file name extension, unless the content is JSON, parquet, or, in a .txt,
   a table: its first line has the names of columns, or most lines have as many tabs as the first.
4. The delimiter is that of Excel's line `sep=;`, if the file begins with one. Else it is the usual
   one for the file name extension, unless exactly one other gives all lines the same number of
   fields. In tsv files quotes are text (else ChnSentiCorp would lose 454 rows), unless only reading
   them as quotes gives all lines the same number of fields.
"""

import codecs
import json
import re
from collections.abc import Collection
from dataclasses import replace

from bertdist.core.errors import DataError
from bertdist.data.readers.csv_reader import (
    blank_line_size,
    is_well_formed,
    parse_row,
    scan_rows,
    with_line_end,
)
from bertdist.data.readers.text_lines import FileFormat, Lines, escape_carriage_returns, line_ends
from bertdist.data.records import HEADER_WORDS, TEXT_COLUMNS

HEAD_BYTES = 1 << 20
MIN_SPECIAL = 8  # fewer characters above ASCII prove nothing
MAX_SHARE = 1 / 200  # of characters above ASCII, in English text
DELIMITERS = {",": "csv", "\t": "tsv", ";": "csv", "|": "csv"}  # delimiter -> whose quoting it has
MIN_SHARE = 0.9  # of lines with as many tabs as the first, in a table

_FOREIGN = {  # first bytes -> what the file is, and what to do
    b"BZh": "a bzip2 file; decompress it with bunzip2",
    b"\xfd7zXZ": "an xz file; decompress it with unxz",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls); save it as CSV UTF-8",
    b"ARROW1": "an Arrow file; write it as parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    b"<!doctype html": "a web page, not data; check the URL (it must be the link to the file)",
    b"<html": "a web page, not data; check the URL (it must be the link to the file)",
}
_JSON_ROWS = re.compile(rb'\s*\[\s*\{\s*"')

_UTF8_SEQUENCE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)


def reject_foreign(path: str, head: bytes) -> None:
    """Raises DataError where the first bytes are those of a format that is not read."""
    start, problem = head[:24].lower(), None
    for magic, meaning in _FOREIGN.items():
        if start.startswith(magic.lower()):
            problem = meaning
    if head.startswith(b"PK\x03\x04"):
        is_sheet = re.search(rb"\[Content_Types\]|xl/|opendocument", head)
        problem = "a zip archive; unpack it with unzip"
        problem = "an Excel workbook (.xlsx); save it as CSV UTF-8" if is_sheet else problem
    if head[257:262] == b"ustar":
        problem = "a tar archive; unpack it with tar xf"
    if problem:
        raise DataError(f"{path} is {problem}.")


def detect_kind(
    kind: str,
    head: bytes,
    is_eof: bool,
    text_columns: Collection[str],
    trained: Collection[str] = (),
) -> str:
    """The kind of a file whose name says `kind`, and which begins with `head`, in UTF-8.

    text_columns: names that were requested; trained: those of a training, which a text may hold
    too: then the first line is a header only with two names that are usual.
    """
    if (json_kind := _json_kind(kind, head, is_eof)) is not None:
        return json_kind
    if kind != "txt":
        return kind
    lines = [line for line in head.split(b"\n")[: None if is_eof else -1] if line.strip()]
    first = lines[0].decode(errors="replace") if lines else ""
    for sign in DELIMITERS:
        fields = [field.strip().strip('"') for field in first.split(sign)]
        usual = bool(text_columns) or len(HEADER_WORDS.union(trained).intersection(fields)) > 1
        if len(fields) > 1 and usual and {*fields} & {*(text_columns or trained or TEXT_COLUMNS)}:
            return "tsv" if sign == "\t" else "csv"
    tabs = lines[0].count(b"\t") if lines else 0
    share = sum(line.count(b"\t") == tabs for line in lines) / max(1, len(lines))
    return "tsv" if tabs and len(lines) > 1 and share >= MIN_SHARE else kind


def _json_kind(kind: str, head: bytes, is_eof: bool) -> str | None:
    """`jsonl`, or `json` where the file is one document; None: neither, or not certain."""
    text, is_json = head.lstrip(), kind in ("json", "jsonl")
    first, _, rest = text.partition(b"\n")
    if text.startswith(b"["):
        return "json" if is_json or _JSON_ROWS.match(text) else None
    value = _json_object(first)
    if value:
        is_document = kind == "json" and is_eof and not rest.strip() and _has_rows(value)
        return "json" if is_document else "jsonl"
    if not is_json or not text.startswith(b"{"):
        return None
    second = rest.lstrip().partition(b"\n")[0]
    return kind if (kind == "jsonl" and first.strip() != b"{") or _json_object(second) else "json"


def _has_rows(value: dict[str, object]) -> bool:
    """Whether there is a list of objects in it, or pandas wrote it with orient="split"."""
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return True
    return any(
        (isinstance(item, list) and item[:1] and isinstance(item[0], dict))
        or (isinstance(item, dict) and "text" not in value and _has_rows(item))
        for item in value.values()
    )


def _json_object(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line) if line.startswith(b"{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def detect_encoding(head: bytes, is_eof: bool) -> str | None:
    """The encoding of a file that begins with `head`; None where that is uncertain."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for first, codec in ((0, "utf-16-be"), (1, "utf-16-le")):
        # ASCII in UTF-16, without a mark: every other byte is 0.
        zeros = head[first::2].count(0), head[1 - first :: 2].count(0)
        if zeros[0] > len(head) / 4 and not zeros[1]:
            return codec
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_eof)
        return "utf-8"
    except UnicodeDecodeError:
        lines = head if is_eof else head[: head.rfind(b"\n") + 1]
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
    fmt: FileFormat, head: bytes, is_eof: bool, *, delimiter: bool, quoting: bool
) -> FileFormat | None:
    """`fmt` with the delimiter and quoting, if requested, of a table that begins with `head`.

    `fmt` has the kind of the file name extension, and the usual delimiter and quoting of that kind,
    which stay where nothing else is certain. With an unknown extension, None: this is not a table.
    """
    data = head if is_eof else head[: head.rfind(b"\n") + 1]
    lines = escape_carriage_returns(Lines(data, 1, {}))
    is_table = fmt.kind in ("csv", "tsv")
    unchanged = fmt if is_table else None
    if b"\0" in data:
        return unchanged
    usual = [fmt] if is_table else []
    if is_table and quoting and not fmt.quoted:
        usual.append(replace(fmt, quoted=True))
    for candidate in usual:
        if _has_even_rows(candidate, lines, is_eof):
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
            if _has_even_rows(candidate, lines, is_eof):
                matches.append(candidate)
                break
    return matches[0] if len(matches) == 1 else unchanged


def quotes_are_ambiguous(fmt: FileFormat, head: bytes, is_eof: bool) -> bool:
    """Whether a table without quoting has quoted fields, and the same rows if read with it."""
    data = head if is_eof else head[: head.rfind(b"\n") + 1]
    sign = fmt.delimiter.encode()
    if not (data.startswith(b'"') or b'\n"' in data or sign + b'"' in data):
        return False  # far quicker than the search
    sign = re.escape(sign)
    if not re.search(rb'(?m)(?:^|(?<=%b))"[^\n]*?"(?=%b|\r?$)' % (sign, sign), data):
        return False
    lines = escape_carriage_returns(Lines(data, 1, {}))
    return _has_even_rows(replace(fmt, quoted=True), lines, is_eof)


def _has_even_rows(fmt: FileFormat, lines: Lines, is_eof: bool) -> bool:
    """Whether two rows or more all have the same number of fields (2 or more, --column_names)."""
    data, at = with_line_end(lines.data), 0
    while at < len(lines.data) and (blank := blank_line_size(data, at)):
        at += blank
    if at >= len(lines.data):
        return False
    row = parse_row(fmt, data, at, 1, len(data), is_eof)
    num_fields = len(row.fields)
    if row.error or not row.end or num_fields < 2:
        return False
    if fmt.column_names and num_fields != len(fmt.column_names):
        return False
    scan = scan_rows(fmt, lines, num_fields, len(data), is_eof)
    if len(scan.row_spans.starts) < 2 or scan.bad:
        return False
    if not fmt.quoted or fmt.delimiter != "\t":
        return True
    # In a tsv file a quote within a field means that quotes are text everywhere.
    return is_well_formed(fmt, lines.data[: scan.stop], len(data))


def head_as_utf8(head: bytes, codec: str, is_eof: bool) -> bytes:
    """The complete lines of a file's beginning in UTF-8, with undecodable bytes replaced."""
    ends = line_ends(head, codec)
    lines = head if is_eof or not len(ends) else head[: ends[-1]]
    return lines.decode(codec, "replace").encode(errors="replace").removeprefix(codecs.BOM_UTF8)
