"""One file -> its columns, strictly: every row and every byte of a text arrives as it stands, or a DataError names the line.

In: a file, how it is written, and what opens it. Out: the names of its columns, and some of them, whole or in pieces of whole rows: Arrow
large_string (csv, tsv, txt), Arrow of the file's own types (parquet), Python lists (JSON lines).
One module, because the whole of a file and its pieces must be the same rows.

A text file in pieces: some bytes are read, cut at the last newline, decoded (`text_files`), cut at the last end of a row (`row_ends`), and
parsed by what parses the whole (`separated`, `json_lines`). Where no row ends in them, twice as many are taken. So a piece depends on the
bytes of the file and on where it begins, and on nothing else: the same pieces come from the start and from the place of any piece.

Which file, and how it is written: an address and the user's words about it -> DataFile, whose columns are then read strictly.

In: an address, and the flags that describe the file (delimiter, quoting, encoding, names of the columns). Out: a `DataFile`; what the flags do
not say is guessed from the file's beginning. `open_file` reads a file of this machine whole, `file_rows.FileReader` any file in pieces too.
One module, because what a flag means, and that it cannot take effect, must be the same for every file.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import xxhash

from bertdist.core.errors import DataError, did_you_mean
from bertdist.data.readers.csv_reader import (
    ScanResult,
    find_row_end,
    last_line_end,
    parse_csv,
    read_header,
)
from bertdist.data.readers.jsonl_reader import parse_json, parse_txt, read_keys
from bertdist.data.readers.parquet_reader import parquet_columns, read_slices, read_whole
from bertdist.data.readers.sniffing import HEAD_BYTES, detect_encoding, detect_table, head_as_utf8
from bertdist.data.readers.text_lines import (
    Buffer,
    FileFormat,
    Lines,
    OpenBytes,
    OpenSeekable,
    Parsed,
    Rows,
    codec_of,
    excerpts_of,
    first_bytes,
    hide_returns,
    is_stateful,
    line_ends,
    local_stamp,
    open_local,
    read_all,
    reading,
    refuse_old_mac,
    twice_in,
    utf8_lines,
)
from bertdist.data.source import (
    Chunk,
    Column,
    OnBadRow,
    ReaderState,
    RowLocation,
    RowLocations,
    first_rows_of_chunk,
    locate_lines,
)

CHUNK_BYTES = 4 << 20

ROW_BYTES = (
    64 << 20
)  # longest row in pieces; where rows are skipped, how far the end of a quote is looked for

BLOCK_BYTES = 1 << 30  # what pyarrow reads at once; its limit is 2 GiB


@dataclass(frozen=True, kw_only=True)
class DataFile(FileFormat):
    """A file, how it is written, and what opens it."""

    path: str
    open_bytes: OpenBytes
    open_seekable: OpenSeekable
    guessed: bool = False  # not as its ending says, and no flag said so

    def describe(self) -> str | None:
        """How the file is read, in one sentence, where that was guessed and is not the usual."""
        if not self.guessed:
            return None
        table = f", delimiter {'tab' if self.delimiter == chr(9) else repr(self.delimiter)}, {'' if self.quoted else 'un'}quoted"
        return f"{self.name}: read as {self.encoding}{table if self.kind in ('csv', 'tsv') else ''}"


class _Head(NamedTuple):
    """What the beginning of a text file says of the rest."""

    names: list[str]  # of all columns, also of those without a name
    codec: str
    place: ReaderState  # of the first row


class FileReader:
    """The rows of one file, as a `DataSource`; on_bad_row "skip" leaves out what is no row and tells it."""

    def __init__(
        self,
        file: DataFile,
        *,
        fingerprint: str | None = None,
        size: int | None = None,
        on_bad_row: OnBadRow = "fail",
        chunk_bytes: int = CHUNK_BYTES,
        row_bytes: int = ROW_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """fingerprint and size: of the bytes as stored, where the file is not of this machine."""
        self.file, self.name, self.has_header, self.skip = (
            file,
            file.name,
            file.has_header,
            on_bad_row == "skip",
        )
        self.chunk_bytes, self.row_bytes, self.block_bytes = chunk_bytes, row_bytes, block_bytes
        self.features: Any = None
        here = fingerprint is None and os.path.isfile(file.path)
        stamp = local_stamp(file.path) if here else fingerprint
        how = (
            file.kind,
            file.delimiter,
            file.quoted,
            file.encoding.lower(),
            file.column_names,
            self.skip,
        )
        self.fingerprint = xxhash.xxh3_128_hexdigest(f"{stamp} {how}".encode())
        self.bytes: int | None = os.path.getsize(file.path) if here and size is None else size
        self._known: _Head | None = None

    def column_names(self) -> list[str]:
        """Names of the columns that have one, in their order. Raises DataError, also where there is no row."""
        with reading(self.file.path):
            if self.file.kind == "parquet":
                return parquet_columns(self.name, self.file.open_seekable)
            names = self._head().names
        return [name for name in names if name and not (name == "_" and self.file.column_names)]

    def read(self, wanted: Sequence[str], rows: int | None = None) -> Chunk:
        """The first `rows` rows in one piece, whose `where` and `spots` read the file again. Raises DataError."""
        with reading(self.file.path):
            if self.file.kind == "parquet":
                return read_whole(self.name, self.file.open_seekable, wanted, rows)
            parsed, lines = self._parse_all(wanted, rows)
            again = _ReadAgain(self, wanted)
            chunk = Chunk(
                parsed.columns,
                parsed.num_rows,
                self._head().place,
                again.location,
                again.excerpts,
                tuple(parsed.bad),
            )
            if rows is None or rows >= parsed.num_rows:
                return chunk
            location = locate_lines(self.name, lines.first, parsed.rows().lines)
            chunk = first_rows_of_chunk(chunk._replace(location=location), rows)
        return chunk._replace(location=again.location)

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from `place` (None: from the first) to the last, about `chunk_bytes` at a time. Raises DataError.

        A place is {"at": byte of the unpacked file, "line": from 1, "row": rows before it}, or {"group", "row"} of a parquet file.
        """
        with reading(self.file.path):
            if self.file.kind == "parquet":
                yield from read_slices(
                    self.name, self.file.open_seekable, wanted, place, self.chunk_bytes
                )
                return
            head = self._head()
            if is_stateful(head.codec):
                raise DataError(
                    f"{self.name}: {head.codec} can only be read whole; convert the file to UTF-8."
                )
            place = place or head.place
            with closing(self.file.open_bytes(place["at"])) as stream:
                buffer = Buffer(stream)
                while (taken := self._take(buffer, head, place)) is not None:
                    lines, found, size = taken
                    parsed = self._parse(head, lines, wanted, found)
                    rows = parsed.rows()
                    numbers = (
                        None
                        if len(rows.lines) == 0 or rows.lines[-1] == len(rows.lines) - 1
                        else rows.lines
                    )
                    assert len(rows.lines) == parsed.num_rows, (
                        f"{len(rows.lines)} lines, {parsed.num_rows} rows"
                    )
                    if parsed.num_rows or parsed.bad:
                        yield Chunk(
                            parsed.columns,
                            parsed.num_rows,
                            place,
                            locate_lines(self.name, lines.first, numbers),
                            partial(excerpts_of, lines, rows),
                            tuple(parsed.bad),
                        )
                    num_lines = lines.data.count(b"\n")
                    place = {
                        "at": place["at"] + size,
                        "line": place["line"] + num_lines,
                        "row": place["row"] + parsed.num_rows,
                    }
                    buffer.drop(size)

    def _take(
        self, buffer: Buffer, head: _Head, place: ReaderState
    ) -> tuple[Lines, ScanResult | None, int] | None:
        """The next lines that hold whole rows, what was seen of them, and their bytes in the file; None at its end."""
        size = self.chunk_bytes
        while True:
            raw, is_all = buffer.first(size)
            if not raw:
                return None
            ends = line_ends(raw, head.codec)
            num_bytes = len(raw) if is_all else int(ends[-1]) if len(ends) else 0
            if num_bytes:
                lines = self._lines(raw[:num_bytes], head.codec, place["line"])
                if self._is_table():
                    stop, found = find_row_end(
                        self.file, lines, len(head.names), is_all, self.chunk_bytes, self.row_bytes
                    )
                else:
                    stop, found = last_line_end(lines.data, is_all, self.chunk_bytes), None
                if stop == len(lines.data):
                    return lines, found, num_bytes
                if stop:
                    data = lines.data[:stop]
                    num_lines = data.count(b"\n")
                    broken = {
                        line: reason for line, reason in lines.broken.items() if line < num_lines
                    }
                    return lines._replace(data=data, broken=broken), found, int(ends[num_lines - 1])
            if size > (8 if num_bytes else 1) * self.row_bytes:
                raise DataError(
                    f"{self.name} line {place['line']}: a row begins here that does not end within {self.row_bytes:,} bytes."
                )
            size *= 2

    def _head(self) -> _Head:
        if self._known is None:
            with closing(self.file.open_bytes(0)) as stream:
                self._known = self._read_head(Buffer(stream))
        return self._known

    def _read_head(self, buffer: Buffer) -> _Head:
        size = max(4, self.chunk_bytes)
        while True:
            raw, is_all = buffer.first(size)
            codec, mark = codec_of(self.file, raw)
            ends = line_ends(raw[mark:], codec)
            lines = self._lines(
                raw[mark:] if is_all else raw[mark : mark + int(ends[-1]) if len(ends) else mark],
                codec,
                1,
            )
            if is_all:
                refuse_old_mac(self.file, lines)
            names, num_lines = self._names(lines, is_all)
            if names is not None:
                break
            if size > self.row_bytes:
                raise DataError(f"{self.name} line 1: no row ends within {self.row_bytes:,} bytes.")
            size *= 2
        if not names:
            raise DataError(f"{self.name} has no rows.")
        at = (
            0
            if not num_lines
            else int(ends[num_lines - 1])
            if num_lines <= len(ends)
            else len(raw) - mark
        )
        return _Head(names, codec, {"at": mark + at, "line": 1 + num_lines, "row": 0})

    def _names(self, lines: Lines, is_all: bool) -> tuple[list[str] | None, int]:
        """Names of all columns, None where they stand further down; and lines before the first row."""
        if self._is_table():
            return read_header(
                self.file, lines, is_all, self.row_bytes if self.skip else BLOCK_BYTES
            ) or (None, 0)
        if self.file.kind == "txt":
            return ["text"] if lines.data else [] if is_all else None, 0
        return read_keys(self.file, lines, is_all, self.skip), 0

    def _is_table(self) -> bool:
        return self.file.kind in ("csv", "tsv")

    def _lines(self, raw: Any, codec: str, first: int) -> Lines:
        lines = utf8_lines(self.file, raw, codec, first, self.skip)
        return hide_returns(lines) if self._is_table() else lines

    def _parse(
        self,
        head: _Head,
        lines: Lines,
        wanted: Sequence[str],
        found: ScanResult | None = None,
        rows: int | None = None,
    ) -> Parsed:
        if self.file.kind == "txt":
            return parse_txt(self.file, lines, wanted)
        if not self._is_table():
            return parse_json(self.file, lines, wanted, skip=self.skip, num_rows=rows)
        limit = self.row_bytes if self.skip or found else 1 << 40
        return parse_csv(
            self.file,
            lines,
            head.names,
            wanted,
            skip=self.skip,
            limit=limit,
            block_bytes=self.block_bytes,
            scan=found,
        )

    def _parse_all(self, wanted: Sequence[str], rows: int | None = None) -> tuple[Parsed, Lines]:
        head = self._head()
        with closing(self.file.open_bytes(head.place["at"])) as stream:
            lines = self._lines(read_all(stream), head.codec, head.place["line"])
        return self._parse(head, lines, wanted, rows=rows), lines

    def read_rows_again(self, wanted: Sequence[str]) -> tuple[Lines, Rows]:
        """The lines behind the header, and the rows in them. Takes as long as `read`. Raises DataError."""
        parsed, lines = self._parse_all(wanted)
        return lines, parsed.rows()


class _ReadAgain:
    """Locations and texts of rows of a file that was read: reads it once more, at the first call."""

    def __init__(self, reader: FileReader, wanted: Sequence[str]) -> None:
        self._reader, self._wanted = reader, tuple(wanted)
        self._locate: RowLocations | None = None

    def location(self, row: int) -> RowLocation:
        try:
            if self._locate is None:
                self.excerpts(())
            assert self._locate is not None
            return self._locate(row)
        except (DataError, IndexError, OSError):
            # The file has changed since; the message that needs the location matters more.
            return RowLocation(self._reader.name, row=row)

    def excerpts(self, rows: Sequence[int]) -> list[str]:
        lines, parts = self._reader.read_rows_again(self._wanted)
        self._locate = locate_lines(self._reader.name, lines.first, parts.lines)
        return excerpts_of(lines, parts, rows)


KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "txt")

PACKED = (".gz", ".zst")  # endings of what an opener unpacks; the ending before it is the file's

READ_BYTES = (
    1 << 30
)  # of a file that is read whole; a row longer than a block is refused; pyarrow's limit is 2 GiB

Reader: TypeAlias = Callable[
    [Sequence[str]], dict[str, Column]
]  # names of columns -> those columns


def open_file(file: DataFile, rows: int | None = None) -> tuple[list[str], Reader]:
    """The names of the file's columns, and a function that reads the first `rows` rows of some of them. Raises DataError."""
    source = FileReader(file, block_bytes=READ_BYTES)
    return source.column_names(), lambda wanted: source.read(wanted, rows).columns


def inspect_file(
    path: str,
    *,
    delimiter: str | None,
    quoting: str,
    encoding: str | None,
    column_names: list[str] | None,
    open_bytes: OpenBytes | None = None,
    open_seekable: OpenSeekable | None = None,
) -> DataFile:
    """The file behind `path`; what is not said of how it is written is guessed from its first bytes.

    Without openers it is a file of this machine. Raises DataError when it is not there, of no known kind, or described by settings that
    cannot take effect.
    """
    name = path.split("?")[0].rstrip("/").rsplit("/", 1)[-1] if open_bytes else _existing(path).name
    plain = (
        name[: -len(Path(name).suffix)] if open_bytes and name.lower().endswith(PACKED) else name
    )
    kind = Path(plain).suffix.lower().removeprefix(".")
    tab = delimiter in ("tab", "\\t", "\t")
    if delimiter is not None and (
        kind == "txt" or kind not in KINDS
    ):  # many data sets call their tables train.txt, or nothing at all
        kind = "tsv" if tab else "csv"
    given = {
        "--delimiter": delimiter is not None,
        "--column_names": bool(column_names),
        "--quoting": quoting != "auto",
    }
    given = given if kind in KINDS and kind not in ("csv", "tsv") else {}
    given["--encoding"] = kind == "parquet" and (encoding or "utf-8").lower() not in (
        "utf-8",
        "utf8",
    )
    if idle := [flag for flag, is_given in given.items() if is_given]:
        raise DataError(f"{name}: {idle[0]} cannot take effect on a .{kind} file; remove it.")
    sign = "\t" if tab else delimiter or ("," if kind == "csv" else "\t")
    if len(sign) != 1 or not sign.isascii() or sign in '"\r\n\0':
        raise DataError(
            f"--delimiter is {sign!r}; expected one ASCII character that is no quote and no line end, or 'tab'."
        )
    if twice := twice_in([column for column in column_names or () if column != "_"]):
        raise DataError(
            f"--column_names has {twice!r} twice; a column that is not to be read is named '_'."
        )
    quoted = kind == "csv" if quoting == "auto" else quoting == "double"
    form = FileFormat(
        name=name,
        kind=kind,
        delimiter=sign,
        quoted=quoted,
        encoding=encoding or "utf-8",
        column_names=tuple(column_names or ()),
    )
    opener = open_bytes or partial(open_local, path)
    settled = (
        form
        if kind == "parquet"
        else _guess(form, opener, encoding is None, delimiter is None, quoting == "auto")
    )
    if settled is None:
        suffix = Path(plain).suffix
        raise DataError(
            f"{path}: the ending {suffix!r} is not known; expected .{', .'.join(KINDS)}, or a table and its --delimiter."
        )
    described = {each.name: getattr(settled, each.name) for each in fields(FileFormat)}
    random = open_seekable or partial(pa.OSFile, path)
    return DataFile(
        **described, path=path, open_bytes=opener, open_seekable=random, guessed=settled != form
    )


def _existing(path: str) -> Path:
    place = Path(path)
    if place.is_dir():
        raise DataError(f"{path} is a folder; expected a file.")
    if not place.exists():
        near = (
            sorted(file.name for file in place.parent.iterdir()) if place.parent.is_dir() else None
        )
        raise DataError(
            f"{path}: no such {'folder' if near is None else 'file'}.{did_you_mean(place.name, near or ())}"
        )
    return place


def _guess(
    form: FileFormat, open_bytes: OpenBytes, encoding: bool, delimiter: bool, quoting: bool
) -> FileFormat | None:
    """`form` as far as it is to be guessed, guessed; None where the file is of no known kind."""
    head, is_all = first_bytes(form.name, open_bytes, HEAD_BYTES)
    if encoding:
        form = replace(form, encoding=detect_encoding(head, is_all) or "utf-8")
    if form.kind in ("jsonl", "json", "txt") or not (delimiter or quoting):
        return form
    codec, mark = codec_of(form, head)
    return detect_table(
        form, head_as_utf8(head[mark:], codec, is_all), is_all, delimiter=delimiter, quoting=quoting
    )
