"""One file -> its columns, strictly: every row and every byte of a text arrives unchanged, or a
DataError names the line.

    file = inspect_file(path, FileConfig())
    reader = FileReader(file)
    reader.read(["text", "label"])  # or: for chunk in reader.chunks(["text", "label"], state)

`inspect_file` takes a local path or URL and what the flags say of its format, and detects the rest.
Columns are Arrow large_string (csv, tsv, txt), Arrow of the file's own types (parquet), or Python
lists (JSON).

How a text file is read in chunks:

1. `chunk_bytes` are read, split at the last newline, decoded (`text_lines`), and split at the last
   end of a row.
2. Where no row ends in them, twice as many bytes are read.
3. What parses a complete file parses the rows (`csv_reader`, `jsonl_reader`).

So a chunk depends on the bytes of the file and on where it begins, and on nothing else: the same
chunks come from the start and from the state of any chunk. A JSON document is read at once, and
sliced.

A new file format touches:
1. core/config.py: a value of `FileConfig.file_format`, and the sentences that list the formats.
2. This module: its name in KINDS (also its extension; others in ALIASES), and its branches in
   FileReader. Text of rows that end at a line end: `_column_names` and `_parse` (as jsonl). Read as
   a whole: `read`, `chunks` and `_read_header` (as json). Binary, or columns with types of their
   own: `column_names`, `read` and `chunks` (as parquet). `reject_unused_flags`: the flags that it
   cannot obey.
3. readers/<format>_reader.py: bytes or lines -> `Parsed`, or `Chunk`s with a state to go on from.
4. sniffing.py: `detect_kind` where its content says what it is, whatever the name; `_FOREIGN` has
   the formats that are refused, so remove it there.
5. data/prediction_input.py and data/all_columns.py: how predict and check --fix keep its columns.
6. tests/unit/data/readers/test_<format>_reader.py, and the table in
   docs/guides/own_data.md ("What a file is").
To write it too (--output): core/output_files.py (FORMATS, PREDICTIONS), core/config.py
(`output_format`), and a `Writer` in data/writers.py (`create_writer`, `create_row_writer`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import xxhash

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError, NoRowsError, RowLocation
from bertdist.core.terminal import print_to_stderr
from bertdist.data.bad_rows import OnBadRow
from bertdist.data.readers.csv_reader import (
    BLOCK_BYTES,
    SEP_LINE,
    ScanResult,
    find_row_end,
    last_line_end,
    parse_csv,
    read_header,
)
from bertdist.data.readers.remote import (
    STDIN,
    STDIN_NAME,
    OpenBytes,
    OpenSeekable,
    Warn,
    check_local_file,
    compression_in,
    compression_of,
    decompressed,
    file_fingerprint,
    file_name,
    open_bytes,
    open_seekable,
    open_stored,
    protocol_of,
)
from bertdist.data.readers.sniffing import (
    HEAD_BYTES,
    detect_encoding,
    detect_kind,
    detect_table,
    head_as_utf8,
    quotes_are_ambiguous,
    reject_foreign,
)
from bertdist.data.readers.text_lines import (
    Buffer,
    FileFormat,
    Lines,
    Parsed,
    RowSpans,
    decode_lines,
    escape_carriage_returns,
    first_duplicate,
    is_stateful,
    line_ends,
    read_all,
    reading,
    reject_old_mac,
    resolve_codec,
    row_excerpts,
)
from bertdist.data.source import (
    Chunk,
    QuotedTable,
    ReaderState,
    RowLocations,
    first_rows_of_chunk,
    locate_lines,
)

CHUNK_BYTES = 4 << 20
# Longest row in chunks; with --on_bad_row skip, how far the end of a quote is searched.
ROW_BYTES = 64 << 20
KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "txt")
ALIASES = {"ndjson": "jsonl", "jsonlines": "jsonl", "tab": "tsv", "text": "txt"}
SLICE_ROWS = 8192  # of a JSON document, per chunk


@dataclass(frozen=True, kw_only=True)
class DataFile(FileFormat):
    """A file, its format, and what opens it."""

    path: str
    open_bytes: OpenBytes
    open_seekable: OpenSeekable
    note: str | None = None  # how it is read, where that is not what its name and the flags say
    is_quoting_given: bool = False  # --quoting says whether there are quotes


class _Header(NamedTuple):
    """What the beginning of a text file says of the rest."""

    names: list[str]  # of all columns, also of those without a name
    codec: str
    state: ReaderState  # of the first row


class FileReader:
    """The rows of one file, a `DataSource`; on_bad_row "skip" skips and returns what is not a row.

    A state is {"at": byte of the decompressed file, "line": from 1, "row": rows before it}, of a
    JSON document {"row": items before it}, or that of `parquet_reader`.
    """

    def __init__(
        self,
        file: DataFile,
        *,
        fingerprint: str | None = None,
        size: int | None = None,
        on_bad_row: OnBadRow = "fail",
        chunk_bytes: int = CHUNK_BYTES,
        row_bytes: int = ROW_BYTES,
    ) -> None:
        """fingerprint and size: of the bytes as stored, unless the file is local."""
        self.file, self.name, self.has_header = file, file.name, file.has_header
        self.kind, self.note = file.kind, file.note
        self.skip = on_bad_row == "skip"
        self.chunk_bytes, self.row_bytes = chunk_bytes, row_bytes
        self._stored = fingerprint
        is_local = fingerprint is None and os.path.isfile(file.path)
        self.bytes: int | None = os.path.getsize(file.path) if is_local and size is None else size
        self._header: _Header | None = None
        self._items: list[Any] | None = None  # of a JSON document, from its header to `read`

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the file, and with how it is read."""
        stored, file = self._stored, self.file
        if stored is None and os.path.isfile(file.path):
            stored = file_fingerprint(file.path)
        encoding = file.encoding.lower()
        kind = file.kind + (file.json_field or "")
        how = (kind, file.delimiter, file.quoted, encoding, file.column_names, self.skip)
        return xxhash.xxh3_128_hexdigest(f"{stored} {how}".encode())

    @property
    def features(self) -> Any:
        """The class names of columns in a parquet file, as `datasets.Features` has them."""
        if self.file.kind != "parquet":
            return None
        with reading(self.file.path):
            return self._parquet_columns[1]

    @cached_property
    def _parquet_columns(self) -> tuple[list[str], Any]:
        # lazy, here and below: only parquet needs it
        from bertdist.data.readers.parquet_reader import parquet_columns

        return parquet_columns(self.name, self.file.open_seekable)

    def column_names(self) -> list[str]:
        """Of the columns that have a name, in order. Raises DataError, also without a row."""
        with reading(self.file.path):
            if self.file.kind == "parquet":
                return self._parquet_columns[0]
            names = self._read_header().names
        return [name for name in names if name and not (name == "_" and self.file.column_names)]

    def header(self) -> list[str]:
        """The names of all columns of a table, "" of those without one. Raises DataError."""
        with reading(self.file.path):
            return self._read_header().names

    @property
    def quoted_table(self) -> QuotedTable | None:
        """The delimiter and header, where quotes are assumed. Raises DataError."""
        file = self.file
        if not file.is_table or not file.quoted or file.is_quoting_given:
            return None
        return QuotedTable(file.delimiter, self.header())

    def rename_columns(self, names: list[str]) -> None:
        """Read all columns of a table under other names. Raises DataError."""
        with reading(self.file.path):
            self._header = self._read_header()._replace(names=names)

    def read(self, columns: Sequence[str], num_rows: int | None = None) -> Chunk:
        """The first rows as one chunk. Its locations read the file again. Raises DataError."""
        with reading(self.file.path):
            if self.file.kind == "parquet":
                from bertdist.data.readers.parquet_reader import read_parquet

                return read_parquet(self.name, self.file.open_seekable, columns, num_rows)
            if self.file.kind == "json":
                from bertdist.data.readers.jsonl_reader import parse_document

                chunk = parse_document(self.file, self._take_items(), columns, skip=self.skip)
                return chunk if num_rows is None else first_rows_of_chunk(chunk, num_rows)
            parsed, lines = self._parse_all(columns, num_rows)
            again = _ReadAgain(self, columns)
            chunk = Chunk(
                parsed.columns,
                parsed.num_rows,
                self._read_header().state,
                again.location,
                again.excerpts,
                tuple(parsed.bad_rows),
            )
            if num_rows is None or num_rows >= parsed.num_rows:
                return chunk
            location = locate_lines(self.name, lines.first, parsed.row_spans().lines)
            chunk = first_rows_of_chunk(chunk._replace(location=location), num_rows)
        return chunk._replace(location=again.location)

    def chunks(self, columns: Sequence[str], state: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from `state` on (None: all), about `chunk_bytes` at a time. Raises DataError."""
        file = self.file
        with reading(file.path):
            if file.kind == "parquet":
                from bertdist.data.readers.parquet_reader import read_slices

                slices = (file.open_seekable, columns, state, self.chunk_bytes)
                yield from read_slices(self.name, *slices)
                return
            if file.kind == "json":
                from bertdist.data.readers.jsonl_reader import parse_document

                items = self._take_items()
                for row in range((state or {"row": 0})["row"], len(items), SLICE_ROWS):
                    some = items[row : row + SLICE_ROWS]
                    yield parse_document(file, some, columns, skip=self.skip, first=row)
                return
            header = self._read_header()
            if is_stateful(header.codec):
                advice = "convert the file to UTF-8"
                raise DataError(f"{self.name}: {header.codec} cannot be read in chunks; {advice}.")
            state = state or header.state
            with closing(file.open_bytes(state["at"])) as stream:
                buffer = Buffer(stream)
                while (block := self._next_lines(buffer, header, state)) is not None:
                    lines, scan, size = block
                    parsed = self._parse(header, lines, columns, scan)
                    rows = parsed.row_spans()
                    assert len(rows.lines) == parsed.num_rows, (len(rows.lines), parsed.num_rows)
                    if parsed.num_rows or parsed.bad_rows:
                        yield Chunk(
                            parsed.columns,
                            parsed.num_rows,
                            state,
                            locate_lines(self.name, lines.first, rows.lines),
                            partial(row_excerpts, lines, rows),
                            tuple(parsed.bad_rows),
                        )
                    state = {
                        "at": state["at"] + size,
                        "line": state["line"] + lines.data.count(b"\n"),
                        "row": state["row"] + parsed.num_rows,
                    }
                    buffer.drop(size)

    def _next_lines(
        self, buffer: Buffer, header: _Header, state: ReaderState
    ) -> tuple[Lines, ScanResult | None, int] | None:
        """The next lines of complete rows, their scan, their size in the file; None at the end."""
        size = self.chunk_bytes
        while True:
            raw, is_eof = buffer.first(size)
            if not raw:
                return None
            ends = line_ends(raw, header.codec)
            num_bytes = len(raw) if is_eof else int(ends[-1]) if len(ends) else 0
            if num_bytes:
                lines = self._decode(raw[:num_bytes], header.codec, state["line"])
                stop, scan = self._find_row_end(header, lines, is_eof)
                if stop == len(lines.data):
                    return lines, scan, num_bytes
                if stop:
                    data = lines.data[:stop]
                    num_lines = data.count(b"\n")
                    broken = {line: why for line, why in lines.broken.items() if line < num_lines}
                    lines = lines._replace(data=data, broken=broken)
                    return lines, scan, int(ends[num_lines - 1])
            if size > (8 if num_bytes else 1) * self.row_bytes:
                raise DataError(
                    f"{self.name} line {state['line']}: a row begins here that does not end "
                    f"within {self.row_bytes:,} bytes."
                )
            size *= 2

    def _find_row_end(
        self, header: _Header, lines: Lines, is_eof: bool
    ) -> tuple[int, ScanResult | None]:
        if not self.file.is_table:
            return last_line_end(lines.data, is_eof, self.chunk_bytes), None
        limits = (self.chunk_bytes, self.row_bytes)
        return find_row_end(self.file, lines, len(header.names), is_eof, *limits)

    def _read_header(self) -> _Header:
        if self._header is None:
            if self.file.kind == "json":
                from bertdist.data.readers.jsonl_reader import document_keys

                items = self._take_items()
                names = document_keys(self.file, items, self.skip)
                if not names:
                    raise NoRowsError(f"{self.name} has no rows.")
                self._header, self._items = _Header(names, "", {"row": 0}), items
                return self._header
            with closing(self.file.open_bytes(0)) as stream:
                self._header = self._header_of(stream)
        return self._header

    def _take_items(self) -> list[Any]:
        """The rows of a JSON document: those read with the header, which are then let go."""
        from bertdist.data.readers.jsonl_reader import document_items

        items, self._items = self._items, None
        if items is not None:
            return items
        with closing(self.file.open_bytes(0)) as stream:
            raw = read_all(stream, self.name, None)
        codec, mark = resolve_codec(self.file, raw)
        lines = decode_lines(self.file, raw[mark:], codec, 1, skip=False)
        items, which = document_items(self.file, lines.data.decode())
        if which and self.file.note is not None:
            self.note = f"{self.file.note}; {which}"
        return items

    def _header_of(self, stream: BinaryIO) -> _Header:
        buffer, size = Buffer(stream), max(4, self.chunk_bytes)
        while True:
            raw, is_eof = buffer.first(size)
            codec, mark = resolve_codec(self.file, raw)
            ends = line_ends(raw[mark:], codec)
            stop = len(raw) if is_eof else mark + int(ends[-1]) if len(ends) else mark
            lines = self._decode(raw[mark:stop], codec, 1)
            if is_eof:
                reject_old_mac(self.file, lines)
            names, num_lines = self._column_names(lines, is_eof)
            if names is not None:
                break
            if size > self.row_bytes:
                raise DataError(f"{self.name} line 1: no row ends within {self.row_bytes:,} bytes.")
            size *= 2
        if not names:
            raise NoRowsError(f"{self.name} has no rows.")
        at = mark
        if num_lines:
            at = mark + int(ends[num_lines - 1]) if num_lines <= len(ends) else len(raw)
        return _Header(names, codec, {"at": at, "line": 1 + num_lines, "row": 0})

    def _column_names(self, lines: Lines, is_eof: bool) -> tuple[list[str] | None, int]:
        """Names of all columns (None: beyond the lines); number of lines before the first row."""
        if self.file.is_table:
            limit = self.row_bytes if self.skip else BLOCK_BYTES
            return read_header(self.file, lines, is_eof, limit) or (None, 0)
        if self.file.kind == "txt":
            return ["text"] if lines.data else [] if is_eof else None, 0
        # lazy, here and below: only jsonl and txt need it
        from bertdist.data.readers.jsonl_reader import read_keys

        return read_keys(self.file, lines, is_eof, self.skip), 0

    def _decode(self, raw: Any, codec: str, first: int) -> Lines:
        lines = decode_lines(self.file, raw, codec, first, self.skip)
        return escape_carriage_returns(lines) if self.file.is_table else lines

    def _parse(
        self,
        header: _Header,
        lines: Lines,
        columns: Sequence[str],
        scan: ScanResult | None = None,
        num_rows: int | None = None,
    ) -> Parsed:
        if self.file.is_table:
            limit = self.row_bytes if self.skip or scan else 1 << 40
            names = header.names
            return parse_csv(
                self.file, lines, names, columns, skip=self.skip, limit=limit, scan=scan
            )
        from bertdist.data.readers.jsonl_reader import parse_json, parse_txt

        if self.file.kind == "txt":
            return parse_txt(self.file, lines, columns)
        return parse_json(self.file, lines, columns, skip=self.skip, num_rows=num_rows)

    def _parse_all(
        self, columns: Sequence[str], num_rows: int | None = None
    ) -> tuple[Parsed, Lines]:
        header = self._read_header()
        with closing(self.file.open_bytes(header.state["at"])) as stream:
            raw = read_all(stream, self.name, BLOCK_BYTES)
        lines = self._decode(raw, header.codec, header.state["line"])
        return self._parse(header, lines, columns, num_rows=num_rows), lines

    def read_rows_again(self, columns: Sequence[str]) -> tuple[Lines, RowSpans, RowLocations]:
        """The lines after the header, and the rows in them. As slow as `read`. Raises DataError."""
        parsed, lines = self._parse_all(columns)
        rows = parsed.row_spans()
        return lines, rows, locate_lines(self.name, lines.first, rows.lines)


class _ReadAgain:
    """Locations and excerpts of rows that were read: reads the file again, at the first call."""

    def __init__(self, reader: FileReader, columns: Sequence[str]) -> None:
        self._reader, self._columns = reader, tuple(columns)
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
        lines, positions, self._locate = self._reader.read_rows_again(self._columns)
        return row_excerpts(lines, positions, rows)


def inspect_file(
    path: str, flags: FileConfig, warn: Warn = print_to_stderr, trained: Sequence[str] = ()
) -> DataFile:
    """The file at a local path or URL, and its format: as the flags say, else detected.

    `warn` gets one line about the first transient error of a remote file. trained: text columns
    that a header may have. Raises DataError where there is no such file, its kind is unknown, or a
    flag cannot take effect.
    """
    is_stdin = path == STDIN
    is_local = protocol_of(path) is None and not is_stdin
    if is_local:
        check_local_file(path)
    name = STDIN_NAME if is_stdin else file_name(path)
    extension = Path(Path(name).stem if compression_of(path) else name).suffix.lower()
    by_name = "txt" if is_stdin else extension.removeprefix(".")
    by_name = ALIASES.get(by_name, by_name)
    seekable = partial(pa.OSFile, path) if is_local else partial(open_seekable, path, warn)
    codec = note = None
    kind = by_name if flags.file_format == "auto" else flags.file_format
    if kind == "parquet" and compression_of(path) is None:
        fmt = _format_by_flags(name, "parquet", flags)
    else:
        with reading(name), closing(open_stored(path, warn)) as stored:
            start = stored.read(4096)
            stored.seek(0)
            reject_foreign(path, start)
            codec = compression_in(start, path)
            head, is_eof = Buffer(decompressed(path, stored, codec)).first(HEAD_BYTES)
        reject_foreign(path, head)
        fmt, note = _detect(name, by_name, head, is_eof, flags, trained)
        if codec and fmt.kind == "parquet":
            raise DataError(f"{path} is a compressed parquet file; decompress it.")
    return DataFile(
        **asdict(fmt),
        path=path,
        open_bytes=partial(open_bytes, path, warn=warn, codec=codec),
        open_seekable=seekable,
        note=note,
        is_quoting_given=flags.quoting != "auto",
    )


def _format_by_flags(name: str, kind: str, flags: FileConfig) -> FileFormat:
    """The usual format of a kind, with what the flags say. Raises DataError."""
    reject_unused_flags(name, kind, flags)
    if twice := first_duplicate([column for column in flags.column_names or () if column != "_"]):
        raise DataError(
            f"--column_names has {twice!r} twice; a column that is not to be read is named '_'."
        )
    return FileFormat(
        name=name,
        kind=kind,
        delimiter=_delimiter_of(kind, flags.delimiter),
        quoted=kind == "csv" if flags.quoting == "auto" else flags.quoting == "double",
        encoding=flags.encoding or "utf-8",
        column_names=tuple(flags.column_names or ()),
        json_field=flags.json_field,
    )


def _detect(
    name: str, by_name: str, head: bytes, is_eof: bool, flags: FileConfig, trained: Sequence[str]
) -> tuple[FileFormat, str | None]:
    """The format of a file that begins with `head`, and a sentence if it is not the usual one.

    Raises DataError where its kind is unknown, or a flag cannot take effect.
    """
    is_auto = flags.file_format == "auto"
    kind = by_name if is_auto else flags.file_format
    if is_auto and head.startswith(b"PAR1"):
        fmt = _format_by_flags(name, "parquet", flags)
        return fmt, f"{name}: read as parquet" if by_name not in ("", "parquet") else None
    encoding = flags.encoding or detect_encoding(head, is_eof) or "utf-8"
    codec, mark = resolve_codec(FileFormat(name=name, kind=kind, encoding=encoding), head)
    text = head_as_utf8(head[mark:], codec, is_eof)
    sep = SEP_LINE.match(text)
    delimiter = flags.delimiter or (sep[1].decode() if sep else None)
    if is_auto and delimiter is None:
        kind = detect_kind(kind, text, is_eof, flags.text_column or (), trained)
    if is_auto and (kind not in KINDS or kind == "txt") and (delimiter or flags.column_names):
        # Many data sets call their tables train.txt, or have no extension.
        is_tab = delimiter in ("tab", "\\t", "\t") or (delimiter is None and kind == "txt")
        kind = "tsv" if is_tab else "csv" if delimiter else kind
    usual = _format_by_flags(name, kind, replace(flags, delimiter=delimiter))
    fmt = replace(usual, encoding=encoding)
    table: FileFormat | None = fmt
    auto = {"delimiter": delimiter is None, "quoting": flags.quoting == "auto"}
    if kind not in ("jsonl", "json") and any(auto.values()):
        table = detect_table(fmt, text[sep.end() :] if sep else text, is_eof, **auto)
    if kind == "txt":
        if table is None or not is_auto:
            return fmt, _describe(fmt, usual, by_name, flags)
        other = "--file_format csv or tsv reads it as a table"
        return fmt, f"{name}: read as one text per line; {other}"
    if table is None:
        raise DataError(
            f"{name}: the kind of file is not known by its name, and its lines are not a "
            "table; pass --file_format, such as csv, jsonl or txt, or --delimiter."
        )
    note = _describe(table, usual, by_name, flags)
    is_unquoted = table.is_table and not table.quoted and auto["quoting"]
    if is_unquoted and quotes_are_ambiguous(table, text, is_eof):
        note = note or f"{name}: read as unquoted"
        note += "; quotes around fields are text (--quoting double overrules)"
    return table, note


def _describe(fmt: FileFormat, usual: FileFormat, by_name: str, flags: FileConfig) -> str | None:
    """How the file is read, in one sentence; None where the name or the flags say it."""
    is_flag = flags.file_format != "auto" or flags.delimiter is not None
    other_kind = fmt.kind != by_name and by_name in KINDS and not is_flag
    if fmt.kind == "jsonl" and by_name == "json":
        other_kind = False
    if fmt == usual and not other_kind and fmt.kind != "json":
        return None
    parts = [fmt.encoding]
    if fmt.is_table:
        delimiter = "tab" if fmt.delimiter == "\t" else repr(fmt.delimiter)
        parts += [f"delimiter {delimiter}", f"{'' if fmt.quoted else 'un'}quoted"]
    elif fmt.kind == "json":
        parts = ["one JSON document, held in memory"]
    elif other_kind:
        parts.insert(0, fmt.kind)
    overrule = f"; --file_format {by_name} overrules" if other_kind else ""
    return f"{fmt.name}: read as {', '.join(parts)}{overrule}"


def reject_unused_flags(name: str, kind: str, flags: FileConfig) -> None:
    """Raises DataError where a flag cannot take effect on a kind of file, or on a "folder"."""
    is_table = kind in ("csv", "tsv") or kind not in (*KINDS, "folder")
    given = {
        "--delimiter": flags.delimiter is not None and not is_table,
        "--column_names": bool(flags.column_names) and not is_table and kind != "json",
        "--quoting": flags.quoting != "auto" and not is_table,
        "--json_field": flags.json_field is not None and kind != "json",
        "--encoding": kind == "parquet"
        and (flags.encoding or "utf-8").lower() not in ("utf-8", "utf8"),
        "--file_format": kind == "folder" and flags.file_format not in ("auto", "txt"),
    }
    what = "a folder" if kind == "folder" else f"a .{kind} file"
    for flag, is_unused in given.items():
        if is_unused:
            raise DataError(f"{name}: {flag} cannot take effect on {what}; remove it.")


def _delimiter_of(kind: str, delimiter: str | None) -> str:
    if delimiter in (None, "tab", "\\t"):
        return "," if kind == "csv" and delimiter is None else "\t"
    assert delimiter is not None
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        raise DataError(
            f"--delimiter is {delimiter!r}; expected one ASCII character that is not a quote "
            "or a line end, or 'tab'."
        )
    return delimiter
