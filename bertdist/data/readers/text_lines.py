"""Text files: how one is written, and its bytes as lines of UTF-8.

A line ends at a newline of the file's encoding, so raw bytes are split there before they are
decoded, and line numbers mean the same whether a file is read at once or in chunks. Bytes that are
not of the encoding are a DataError that names the line, or, with --on_bad_row skip, a reason per
line.
"""

import codecs
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bertdist.core.errors import DataError
from bertdist.data.bad_rows import BadRow, escaped_excerpt
from bertdist.data.source import Column
from bertdist.distributed.host_memory import free_host_bytes

PART_BYTES = 64 << 20  # of a file, read at once

Offsets: TypeAlias = npt.NDArray[np.int64]

# Encodings in which a line depends on the lines before it.
_STATEFUL = ("iso2022", "hz", "utf-7", "utf_7")
_WIDE = {
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}
_UTF8_ADVICE = (
    "--encoding (such as cp1252 for Western European, cp1251 for Cyrillic, gb18030 for Chinese, "
    "cp932 for Japanese text),"
)


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a file is written: csv, tsv, jsonl, json, txt or parquet. Tables have a delimiter."""

    name: str  # for messages
    kind: str
    delimiter: str = ","
    quoted: bool = False
    encoding: str = "utf-8"
    column_names: tuple[str, ...] = ()  # (): the file has a header
    json_field: str | None = None  # of a JSON document: the key of the list of rows

    @property
    def is_table(self) -> bool:
        return self.kind in ("csv", "tsv")

    @property
    def has_header(self) -> bool:
        return self.is_table and not self.column_names


class Lines(NamedTuple):
    """Some complete lines of a file."""

    data: bytes  # UTF-8 without a byte order mark
    first: int  # number of the first line, from 1
    # Line (from 0) that cannot be decoded -> reason; data has such bytes as \\x81.
    broken: dict[int, str]
    # Replaces lone carriage returns, see `escape_carriage_returns`.
    cr_placeholder: str | None = None


class RowSpans(NamedTuple):
    """Positions of rows in some lines: first byte, end (with the line end), and line, from 0."""

    starts: Offsets  # (rows,)
    ends: Offsets  # (rows,)
    lines: Offsets  # (rows,)


class Parsed(NamedTuple):
    """The requested columns of some lines, `num_rows` long; bad rows; the others' positions."""

    columns: dict[str, Column]
    num_rows: int
    bad_rows: list[BadRow]
    row_spans: Callable[[], RowSpans]


class Buffer:
    """A stream whose first bytes can be read repeatedly, until they are dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._data, self._ended = stream, b"", False

    def first(self, size: int) -> tuple[bytes, bool]:
        """The first `size` bytes (fewer at the end), and whether the stream ends with them."""
        parts, missing = [self._data], size + 1 - len(self._data)
        while missing > 0 and not self._ended:
            part = self._stream.read(missing)
            self._ended, missing = not part, missing - len(part)
            parts.append(part)
        self._data = b"".join(parts)
        return self._data[:size], len(self._data) <= size

    def drop(self, size: int) -> None:
        """Remove the first `size` bytes."""
        self._data = self._data[size:]


def read_all(stream: BinaryIO, name: str, line_bytes: int | None) -> bytes:
    """To the end. Raises DataError where that is more than half of the free memory, or a line of
    a compressed or remote file is longer than `line_bytes`.
    """
    limit = free_host_bytes() // 2
    parts, size, line_start = [], 0, 0
    part_bytes = PART_BYTES
    with suppress(io.UnsupportedOperation):  # a local file as it is: at once, without a copy
        size_on_disk = os.fstat(stream.fileno()).st_size
        part_bytes = size_on_disk + 1 if size_on_disk <= limit else part_bytes
    while part := stream.read(part_bytes):
        if (newline := part.rfind(b"\n")) >= 0:
            line_start = size + newline
        parts.append(part)
        size += len(part)
        if line_bytes is not None and len(parts) > 1 and size - line_start > line_bytes:
            raise DataError(f"{name}: a line is longer than {line_bytes:,} bytes.")
        if size > limit:
            advice = "" if line_bytes is not None else "written as JSON lines, "
            raise DataError(
                f"{name} has more than {limit:,} bytes, half of the free memory; "
                f"{advice}--streaming reads training rows in parts."
            )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def one_line(error: BaseException) -> str:
    """What an error says, without a full stop."""
    return " ".join(str(error).split()).rstrip(".")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Errors inside become a DataError that names the file."""
    try:
        yield
    except MemoryError:
        raise DataError(
            f"{path} does not fit into memory; --streaming reads training rows in parts."
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}.") from None


def resolve_codec(fmt: FileFormat, head: bytes) -> tuple[str, int]:
    """Python's name of encoding and byte order; size of the mark in `head` (4 bytes or more)."""
    try:
        codec = codecs.lookup(fmt.encoding).name.removesuffix("-sig")
        "a".encode(codec)  # hex and the like are not encodings of text
        if codec in ("idna", "punycode", "unicode-escape", "raw-unicode-escape"):
            raise LookupError
    except (LookupError, UnicodeError):
        raise DataError(
            f"--encoding {fmt.encoding} is not a text encoding that Python knows, "
            "such as utf-8, cp1252 or gb18030."
        ) from None
    if codec == "utf-8" and head.startswith(_WIDE["utf-16"]):
        raise DataError(
            f"{fmt.name} is UTF-16, expected UTF-8; convert it, or pass --encoding utf-16."
        )
    if codec in _WIDE:
        codec += "-be" if head.startswith(_WIDE[codec][1]) else "-le"
    try:
        mark = "\ufeff".encode(codec)
    except UnicodeEncodeError:
        return codec, 0
    return codec, len(mark) if head.startswith(mark) else 0


def is_stateful(codec: str) -> bool:
    """Whether decoding can only begin at the start of the file."""
    return codec.startswith(_STATEFUL)


def line_ends(raw: bytes, codec: str) -> Offsets:
    """The end of each line, after its newline; what follows the last newline does not count."""
    unit = b"\n" if codec == "utf-8" else "\n".encode(codec)
    width = len(unit)
    cells = np.frombuffer(raw, f"u{width}", len(raw) // width)
    ends: Offsets = (np.flatnonzero(cells == np.frombuffer(unit, f"u{width}")[0]) + 1) * width
    return ends


def decode_lines(fmt: FileFormat, raw: bytes, codec: str, first: int, skip: bool) -> Lines:
    """Complete lines as UTF-8. Raises DataError at wrong bytes; with skip, lines are `broken`."""
    try:
        if codec != "utf-8":
            return Lines(raw.decode(codec).encode(), first, {})
        # Without a copy: bytes.decode() would need up to four times the file in memory.
        offsets = pa.py_buffer(np.array([0, len(raw)]))  # pa.array would import pandas: 0.3 s
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(raw)).validate(full=True)
        return Lines(raw, first, {})
    except (pa.ArrowInvalid, UnicodeError):
        return _decode_each_line(fmt, raw, codec, first, skip)


def _decode_each_line(fmt: FileFormat, raw: bytes, codec: str, first: int, skip: bool) -> Lines:
    encoding = _UTF8_ADVICE if codec == "utf-8" else "the --encoding it was written in"
    newline = "\n".encode(codec)
    ends = [0, *line_ends(raw, codec).tolist()]
    ends += [len(raw)] * (ends[-1] < len(raw))
    texts, broken = [], {}
    for at, (start, end) in enumerate(pairwise(ends)):
        line = raw[start:end]
        try:
            texts.append(line.decode(codec).encode())
        except UnicodeError as error:
            what = "a lone surrogate"
            if isinstance(error, UnicodeDecodeError):
                what = f"byte 0x{line[error.start]:02X}"
            broken[at] = (
                f"{what} is not {fmt.encoding}; pass {encoding} or convert the file to UTF-8"
            )
            if not skip:
                raise DataError(f"{fmt.name} line {first + at}: {broken[at]}.") from None
            text = line.decode(codec, "backslashreplace").replace("\n", "")
            has_newline = at < len(ends) - 2 or raw.endswith(newline)
            texts.append(text.encode(errors="backslashreplace") + b"\n" * has_newline)
    return Lines(b"".join(texts), first, broken)


def escape_carriage_returns(lines: Lines) -> Lines:
    """The lines with lone carriage returns replaced by a character that they do not contain."""
    if b"\r" not in lines.data or not re.search(rb"\r(?!\n)", lines.data):
        return lines
    private_use = map(chr, range(0xE000, 0xF900))
    cr_placeholder = next(char for char in private_use if char.encode() not in lines.data)
    data = re.sub(rb"\r(?!\n)", cr_placeholder.encode(), lines.data)
    return lines._replace(data=data, cr_placeholder=cr_placeholder)


def reject_old_mac(fmt: FileFormat, lines: Lines) -> None:
    """Raises DataError where a complete file has carriage returns and no newline."""
    if (lines.cr_placeholder or b"\r" in lines.data) and b"\n" not in lines.data:
        raise DataError(
            f"{fmt.name}: its lines end with a lone carriage return (old Mac); "
            "convert them to newlines."
        )


def rows_of_lines(data: bytes, *, blank: bool) -> RowSpans:
    """Every line as a row; with blank False, without empty lines."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    if not data.endswith(b"\n") and data:
        ends = np.append(ends, len(data))
    return rows_between(data, ends, np.arange(len(ends)), blank)


def rows_between(data: bytes, ends: Offsets, lines: Offsets, blank: bool) -> RowSpans:
    """Adjacent rows that end at `ends` and begin on `lines`; without empty ones, unless blank."""
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    if blank or not len(ends):
        return RowSpans(starts, ends, lines)
    text = np.frombuffer(data, np.uint8)
    sizes, first_bytes = ends - starts, text[starts]
    is_crlf = (sizes == 2) & (first_bytes == ord("\r")) & (text[ends - 1] == ord("\n"))
    empty = (first_bytes == ord("\n")) | is_crlf
    if not empty.any():
        return RowSpans(starts, ends, lines)
    return RowSpans(starts[~empty], ends[~empty], lines[~empty])


def row_excerpt(lines: Lines, start: int, end: int) -> str:
    """The row lines.data[start:end] for a BadRow."""
    text = lines.data[start : min(end, start + 1000)].decode("utf-8", "ignore")
    return escaped_excerpt(
        text.replace(lines.cr_placeholder, "\r") if lines.cr_placeholder else text
    )


def row_excerpts(lines: Lines, rows: RowSpans, wanted: Sequence[int]) -> list[str]:
    """The text of each of the `wanted` rows for a BadRow."""
    return [row_excerpt(lines, int(rows.starts[row]), int(rows.ends[row])) for row in wanted]


def first_duplicate(names: Sequence[str]) -> str | None:
    """The first name that occurs twice."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)
