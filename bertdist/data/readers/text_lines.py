"""The bytes of a file, from something that opens it: as many as were asked for, however few a read gives.

In: a function that opens the unpacked file at a byte. Out: blocks of bytes that do not depend on how they were delivered, and a stamp that
changes when a file of this machine does. One module: what is known of a file before anything is known of what it holds.

How a text file is written, and its bytes as UTF-8 lines.

In: raw bytes (of a whole file, or some whole lines of it) and an encoding. Out: the same lines as UTF-8, and which of them hold bytes that
are not of the encoding. One module, because a line must mean the same whether a file is read whole or in pieces: it ends at a newline of
its encoding, so that raw bytes can be cut there before they are decoded, and lines counted there afterwards.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from bertdist.core.errors import DataError
from bertdist.data.source import Column, SkippedRow, excerpt

STAMP_BYTES = 1 << 16

OpenBytes: TypeAlias = Callable[[int], BinaryIO]  # from this byte of the unpacked file on

OpenSeekable: TypeAlias = Callable[[], Any]  # seekable, for parquet


class Buffer:
    """The bytes of a stream that were asked for and not dropped; however few a read gives, as many as were asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._data, self._ended = stream, b"", False

    def first(self, size: int) -> tuple[bytes, bool]:
        """The first `size` bytes, fewer where the stream ends before; and whether it ends with them."""
        parts, missing = [self._data], size + 1 - len(self._data)
        while missing > 0 and not self._ended:
            part = self._stream.read(missing)
            self._ended, missing = not part, missing - len(part)
            parts.append(part)
        self._data = b"".join(parts)
        return self._data[:size], len(self._data) <= size

    def drop(self, size: int) -> None:
        """Forget the first `size` bytes."""
        self._data = self._data[size:]


def read_all(stream: BinaryIO) -> bytes:
    """To the end, also where a read gives less; without a copy where it gives all."""
    parts = []
    while part := stream.read():
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def open_local(path: str, at: int = 0) -> BinaryIO:
    """A file of this machine, from byte `at` on."""
    file = open(path, "rb")  # noqa: SIM115  whoever asked for it closes it
    file.seek(at)
    return file


def local_stamp(path: str) -> str:
    """Changes when a file of this machine does: size, and digest of its head and tail."""
    with open(path, "rb") as file:
        digest = xxhash.xxh3_128(file.read(STAMP_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - STAMP_BYTES))
        digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


def first_bytes(path: str, open_bytes: OpenBytes, size: int) -> tuple[bytes, bool]:
    """The first `size` bytes, and whether they are all. Raises DataError."""
    with reading(path), closing(open_bytes(0)) as stream:
        return Buffer(stream).first(size)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong inside is a DataError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None


Offsets = npt.NDArray[np.int64]

_STATEFUL = ("iso2022", "hz", "utf-7", "utf_7")  # a line means what the lines before it say

_WIDE = {
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a file is written: `kind` is csv, tsv, jsonl, json, txt or parquet; delimiter and quoting are settled for csv and tsv."""

    name: str  # for messages
    kind: str
    delimiter: str = ","
    quoted: bool = False
    encoding: str = "utf-8"
    column_names: tuple[str, ...] = ()  # none: the file has a header

    @property
    def has_header(self) -> bool:
        return self.kind in ("csv", "tsv") and not self.column_names


class Lines(NamedTuple):
    """Some whole lines of a file."""

    data: bytes  # UTF-8 without a byte order mark
    first: int  # number of the first line, from 1
    broken: dict[
        int, str
    ]  # lines (from 0) with bytes that are not of the encoding -> what is wrong; the bytes stand there as \\x81
    stand_in: str | None = None  # stands for lone carriage returns, see `hide_returns`


class Rows(NamedTuple):
    """Where rows stand in some lines: bytes from, bytes to (with the line end), and line, from 0."""

    starts: Offsets  # (rows,)
    ends: Offsets  # (rows,)
    lines: Offsets  # (rows,)


class Parsed(NamedTuple):
    """Rows of some lines: the columns asked for, each `num_rows` long; rows that were left out; and where the others stand."""

    columns: dict[str, Column]
    num_rows: int
    bad: list[SkippedRow]
    rows: Callable[[], Rows]


def codec_of(form: FileFormat, head: bytes) -> tuple[str, int]:
    """Python's name of the encoding, byte order settled, and how many bytes of `head` (at least 4) are a byte order mark."""
    try:
        codec = codecs.lookup(form.encoding).name.removesuffix("-sig")
        "a".encode(codec)  # hex and its like are no encodings of text
    except LookupError:
        raise DataError(
            f"--encoding {form.encoding} is not a text encoding that Python knows, such as utf-8, cp1252 or gb18030."
        ) from None
    if codec == "utf-8" and head.startswith(_WIDE["utf-16"]):
        raise DataError(
            f"{form.name} is UTF-16, expected UTF-8; convert it, or pass --encoding utf-16."
        )
    if codec in _WIDE:
        codec += "-be" if head.startswith(_WIDE[codec][1]) else "-le"
    try:
        mark = "\ufeff".encode(codec)
    except UnicodeEncodeError:
        return codec, 0
    return codec, len(mark) if head.startswith(mark) else 0


def is_stateful(codec: str) -> bool:
    """Whether reading cannot begin at some line of the file."""
    return codec.startswith(_STATEFUL)


def line_ends(raw: bytes, codec: str) -> Offsets:
    """Bytes up to the end of each line, its newline counted; what follows the last newline is not in it."""
    unit = b"\n" if codec == "utf-8" else "\n".encode(codec)
    width = len(unit)
    cells = np.frombuffer(raw, f"u{width}", len(raw) // width)
    found: Offsets = (np.flatnonzero(cells == np.frombuffer(unit, f"u{width}")[0]) + 1) * width
    return found


def utf8_lines(form: FileFormat, raw: bytes, codec: str, first: int, skip: bool) -> Lines:
    """Whole lines as UTF-8. Bytes that are not of the encoding are a DataError; with skip, their lines are told."""
    try:
        if (
            codec == "utf-8"
        ):  # no copy; bytes.decode() would cost up to four times the file in memory
            pa.LargeStringArray.from_buffers(
                1, pa.array([0, len(raw)]).buffers()[1], pa.py_buffer(raw)
            ).validate(full=True)
            return Lines(raw, first, {})
        return Lines(raw.decode(codec).encode(), first, {})
    except (pa.ArrowInvalid, UnicodeError):
        pass
    advice = (
        "--encoding (such as cp1252 for Western European, cp1251 for Cyrillic, gb18030 for Chinese, "
        "cp932 for Japanese text),"
        if codec == "utf-8"
        else "the --encoding it was written in"
    )
    ends = [0, *line_ends(raw, codec).tolist()]
    ends += [len(raw)] * (ends[-1] < len(raw))
    found, broken = [], {}
    for at, (start, end) in enumerate(pairwise(ends)):
        line = raw[start:end]
        try:
            found.append(line.decode(codec).encode())
        except UnicodeError as error:
            what = (
                f"byte 0x{line[error.start]:02X}"
                if isinstance(error, UnicodeDecodeError)
                else "a lone surrogate"
            )
            broken[at] = (
                f"{what} is not {form.encoding}; pass {advice} or convert the file to UTF-8"
            )
            if not skip:
                raise DataError(f"{form.name} line {first + at}: {broken[at]}.") from None
            text = (
                line.decode(codec, "backslashreplace")
                .replace("\n", "")
                .encode(errors="backslashreplace")
            )
            found.append(text + b"\n" * (at < len(ends) - 2 or raw.endswith("\n".encode(codec))))
    return Lines(b"".join(found), first, broken)


def hide_returns(lines: Lines) -> Lines:
    """The lines without lone carriage returns, and the character that stands in for them."""
    if not re.search(rb"\r(?!\n)", lines.data):
        return lines
    stand_in = next(
        char for char in map(chr, range(0xE000, 0xF900)) if char.encode() not in lines.data
    )
    return lines._replace(
        data=re.sub(rb"\r(?!\n)", stand_in.encode(), lines.data), stand_in=stand_in
    )


def refuse_old_mac(form: FileFormat, lines: Lines) -> None:
    """DataError where the whole of a file has carriage returns and no newline."""
    if (lines.stand_in or b"\r" in lines.data) and b"\n" not in lines.data:
        raise DataError(
            f"{form.name}: its lines end with a lone carriage return (old Mac); convert them to newlines."
        )


def rows_of_lines(data: bytes, *, blank: bool) -> Rows:
    """Every line as a row; with blank False, without those that are empty."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    if not data.endswith(b"\n") and data:
        ends = np.append(ends, len(data))
    return rows_between(data, ends, np.arange(len(ends)), blank)


def rows_between(data: bytes, ends: Offsets, lines: Offsets, blank: bool) -> Rows:
    """Rows that end at `ends` and begin on `lines`, one after the other; with blank False, without those that are empty lines."""
    starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    if blank or not len(ends):
        return Rows(starts, ends, lines)
    text = np.frombuffer(data, np.uint8)
    sizes, opens = ends - starts, text[starts]
    empty = (opens == ord("\n")) | (
        (sizes == 2) & (opens == ord("\r")) & (text[ends - 1] == ord("\n"))
    )
    return (
        Rows(starts[~empty], ends[~empty], lines[~empty])
        if empty.any()
        else Rows(starts, ends, lines)
    )


def text_at(lines: Lines, start: int, end: int) -> str:
    """The row lines.data[start:end] for a SkippedRow."""
    text = lines.data[start : min(end, start + 1000)].decode("utf-8", "ignore")
    return excerpt(text.replace(lines.stand_in, "\r") if lines.stand_in else text)


def excerpts_of(lines: Lines, rows: Rows, wanted: Sequence[int]) -> list[str]:
    """The text of each of the `wanted` rows, for a SkippedRow."""
    return [text_at(lines, int(rows.starts[row]), int(rows.ends[row])) for row in wanted]


def twice_in(names: Sequence[str]) -> str | None:
    """The first name that stands there twice."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)
