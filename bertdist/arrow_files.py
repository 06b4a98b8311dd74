"""One file -> its columns, strictly: every row and every byte of a text arrives as it stands, or a DataError names the line.

In: a path and how it is written (delimiter, quoting, encoding, names of the columns). Out: the names of the columns, and a function
that reads some of them: Arrow large_string (csv, tsv, txt), Arrow of the file's own types (parquet), Python lists (JSON lines).
One module, because what decides where a row begins must also say on which line it stands.

How csv and tsv are read, and why it takes four steps (pyarrow 26; 1,000,000 rows of 85 MB on one core):
1. All bytes are checked to be UTF-8, or decoded from --encoding (0.06 s).
2. pyarrow ends a row at a lone carriage return too. Such a one is text here: a character that the file does not hold stands in for it.
3. pyarrow reads the rows (0.15 s; Python's csv module: 2.2 s), the whole file as one block up to 1 GiB, on one thread (two are slower).
4. pyarrow takes an open quote at the end of the file, and reads `"so" he said` as `so he said`, without a word. In a well-formed file
   every other quote opens a field; where one does not (0.2 s), and where pyarrow refuses a row, Python's csv module walks the file in
   strict mode to judge it and to name the line. The same walk finds the line of a row when a message wants it.
"""

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from bertdist.errors import DataError, did_you_mean

KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "txt")
BLOCK_BYTES = 1 << 30  # a row longer than a block is refused; pyarrow's limit is 2 GiB

Column: TypeAlias = "pa.ChunkedArray | list[Any]"
Reader: TypeAlias = Callable[[Sequence[str]], dict[str, Column]]  # names of columns -> those columns


@dataclass(frozen=True, kw_only=True)
class File:
    """A file and how it is written; `kind` is one of KINDS, and delimiter and quoting are settled for csv and tsv."""

    path: Path
    kind: str
    delimiter: str = ","
    quoted: bool = False
    encoding: str = "utf-8"
    column_names: tuple[str, ...] = ()  # none: the file has a header

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def has_header(self) -> bool:
        return self.kind in ("csv", "tsv") and not self.column_names

    def where(self, row: int) -> str:
        """`dev.tsv line 12`, the line on which row `row` (from 0) starts; `x.parquet row 7`. Reads the file again: 1 s a million rows."""
        try:
            line = None if self.kind == "parquet" else next(islice(lines_of(self), row, None), None)
        except (OSError, DataError):  # the file has changed since; the message that asks matters more
            line = None
        return f"{self.name} row {row}" if line is None else f"{self.name} line {line}"


def find_file(path: str, *, delimiter: str | None, quoting: str, encoding: str, column_names: list[str] | None) -> File:
    """The file behind `path`; raises DataError when it is not there, of no known kind, or described by settings that cannot take effect."""
    place = Path(path)
    if place.is_dir():
        raise DataError(f"{path} is a folder; expected a file.")
    if not place.exists():
        near = sorted(file.name for file in place.parent.iterdir()) if place.parent.is_dir() else None
        raise DataError(f"{path}: no such {'folder' if near is None else 'file'}.{did_you_mean(place.name, near or ())}")
    kind = place.suffix.lower().removeprefix(".")
    if delimiter is not None and (kind == "txt" or kind not in KINDS):  # many data sets call their tables train.txt, or nothing at all
        kind = "tsv" if delimiter in ("tab", "\\t", "\t") else "csv"
    if kind not in KINDS:
        raise DataError(f"{path}: the ending {place.suffix!r} is not known; expected .{', .'.join(KINDS)}, or a table and its --delimiter.")
    given = {"--delimiter": delimiter is not None, "--column_names": bool(column_names), "--quoting": quoting != "auto"}
    given = {**(given if kind not in ("csv", "tsv") else {}), "--encoding": kind == "parquet" and encoding.lower() not in ("utf-8", "utf8")}
    if idle := [flag for flag, is_given in given.items() if is_given]:
        raise DataError(f"{place.name}: {idle[0]} cannot take effect on a .{kind} file; remove it.")
    delimiter = {"tab": "\t", "\\t": "\t", None: "," if kind == "csv" else "\t"}.get(delimiter, delimiter)
    assert delimiter is not None
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        raise DataError(f"--delimiter is {delimiter!r}; expected one ASCII character that is no quote and no line end, or 'tab'.")
    if twice := _twice([name for name in column_names or () if name != "_"]):
        raise DataError(f"--column_names has {twice!r} twice; a column that is not to be read is named '_'.")
    quoted = kind == "csv" if quoting == "auto" else quoting == "double"
    return File(path=place, kind=kind, delimiter=delimiter, quoted=quoted, encoding=encoding, column_names=tuple(column_names or ()))


def open_file(file: File, rows: int | None = None) -> tuple[list[str], Reader]:
    """The names of the file's columns, and a function that reads the first `rows` rows of some of them. Raises DataError."""
    reader = {"parquet": _open_parquet, "json": _open_json, "jsonl": _open_json, "txt": _open_txt}.get(file.kind, _open_separated)

    def strictly(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file.path} cannot be read: {' '.join(str(error).split())}.") from None

    names, read = strictly(lambda: reader(file, rows))
    if not names:
        raise DataError(f"{file.name} has no rows.")
    return names, lambda wanted: strictly(lambda: read(wanted))


def _utf8(file: File) -> bytes:
    """The file's bytes as UTF-8 without a byte order mark."""
    data = file.path.read_bytes()
    try:
        codec = codecs.lookup(file.encoding).name
        if codec in ("utf-8", "utf-8-sig"):
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{file.name} is UTF-16, expected UTF-8; convert it, or pass --encoding utf-16.")
            try:  # no copy; bytes.decode() would cost up to four times the file in memory
                pa.LargeStringArray.from_buffers(1, pa.array([0, len(data)]).buffers()[1], pa.py_buffer(data)).validate(full=True)
            except pa.ArrowInvalid:
                data.decode()  # says where
        else:
            data = data.decode(codec).encode()
    except LookupError:
        raise DataError(f"--encoding {file.encoding} is not a text encoding that Python knows, such as utf-8, cp1252 or gb18030.") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(codec, "ignore").count("\n") + 1
        found = f"{file.name} line {line}: byte 0x{data[error.start]:02X} is not {file.encoding}"
        advice = "--encoding cp1252 (or the right one)" if codec.startswith("utf-8") else "the --encoding it was written in"
        raise DataError(f"{found}; pass {advice} or convert the file to UTF-8.") from None
    if b"\r" in data and b"\n" not in data:
        raise DataError(f"{file.name}: its lines end with a lone carriage return (old Mac); convert them to newlines.")
    return data.removeprefix(codecs.BOM_UTF8)


def _hide_returns(data: bytes) -> tuple[bytes, str | None]:
    """The bytes without lone carriage returns, and the character that stands in for them."""
    if not re.search(rb"\r(?!\n)", data):
        return data, None
    stand_in = next(char for char in map(chr, range(0xE000, 0xF900)) if char.encode() not in data)
    return re.sub(rb"\r(?!\n)", stand_in.encode(), data), stand_in


def _text_lines(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n")  # a line ends at \n only


def _open_separated(file: File, rows: int | None) -> tuple[list[str], Reader]:
    data, stand_in = _hide_returns(_utf8(file))
    names, skip = _layout(file, data)
    names = [name.replace(stand_in, "\r") if stand_in else name for name in names]
    if file.quoted and not _quotes_pair_up(data, file.delimiter):
        deque(_walk(file, data, len(names)), maxlen=0)
    parsing = pa.csv.ParseOptions(delimiter=file.delimiter, quote_char='"' if file.quoted else False, newlines_in_values=file.quoted)
    parsing.ignore_empty_lines = len(names) > 1
    reading = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=[str(at) for at in range(len(names))])

    def read(wanted: Sequence[str]) -> dict[str, Column]:
        keys = {name: str(names.index(name)) for name in wanted}
        types = dict.fromkeys(keys.values(), pa.large_string())
        converting = pa.csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=False, check_utf8=False)
        try:
            table = pa.csv.read_csv(pa.BufferReader(data), reading, parsing, converting)
        except pa.ArrowInvalid:
            deque(_walk(file, data, len(names)), maxlen=0)  # names the line
            raise
        columns = {name: table.column(key).slice(skip, rows) for name, key in keys.items()}
        return {name: pc.replace_substring(column, stand_in, "\r") if stand_in else column for name, column in columns.items()}

    return [name for name in names if name and not (name == "_" and file.column_names)], read


def _layout(file: File, data: bytes) -> tuple[list[str], int]:
    """Names of the columns, and how many rows stand before the first one of data."""
    blank = 0
    for line, fields in _walk(file, data):
        if not fields and len(file.column_names) != 1:
            blank += 1
            continue
        if file.has_header:
            if twice := _twice([name for name in fields if name]):
                raise DataError(f"{file.name} line {line}: the header has two columns {twice!r}; rename one, or give --column_names.")
            return fields, 1 if len(fields) > 1 else blank + 1
        named = [(field, name) for field, name in zip(fields, file.column_names, strict=False) if name != "_"]
        if len(named) > 1 and all(field == name for field, name in named):
            raise DataError(f"{file.name} line {line} holds the names of --column_names: the file has a header; remove --column_names.")
        return list(file.column_names), 0
    return [], 0


def _walk(file: File, data: bytes, num_fields: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """Every row as (line it starts on, fields), by Python's csv module; a blank line has none. DataError on wrong quotes and counts."""
    csv.field_size_limit((1 << 31) - 1)  # Python's own limit is 128 KiB a field
    reader = csv.reader(_text_lines(data), delimiter=file.delimiter, quoting=0 if file.quoted else csv.QUOTE_NONE, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = 'write a quote in a quoted field twice (""), or take quotes as text with --quoting none'
            if "unexpected end" not in str(error):
                raise DataError(f"{file.name} line {line}: text follows the quote closed on line {reader.line_num}; {advice}.") from None
            *_, row = csv.reader(rest := list(_text_lines(data))[line - 1 :], delimiter=file.delimiter)
            line += len(rest) - len(row[-1].removesuffix("\n").split("\n"))  # the open field goes to the end of the file
            raise DataError(f"{file.name} line {line}: a quote opens here and never closes; {advice}.") from None
        if num_fields and fields and len(fields) != num_fields:
            found, source = f"{len(fields)} field{'s' * (len(fields) > 1)}", "the header" if file.has_header else "--column_names"
            advice = "put a field that holds the delimiter in double quotes (--quoting double), or name the delimiter with --delimiter"
            raise DataError(f"{file.name} line {line}: {found}, expected {num_fields} as in {source}; {advice}.") from None
        yield line, fields


def _quotes_pair_up(data: bytes, delimiter: str) -> bool:
    """Whether quotes 0, 2, 4, ... open a field or follow a quote, and quotes 1, 3, 5, ... close one or precede a quote."""
    text = np.frombuffer(b"\n" + data + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    before, after, edges = text[quotes[::2] - 1], text[quotes[1::2] + 1], [ord(delimiter), ord("\n"), ord('"')]
    return bool(len(quotes) % 2 == 0 and np.isin(before, edges).all() and np.isin(after, [*edges, ord("\r")]).all())


def _open_json(file: File, rows: int | None) -> tuple[list[str], Reader]:
    data = _utf8(file)
    _, first = next(_json_objects(file, data), (0, {}))

    def read(wanted: Sequence[str]) -> dict[str, Column]:
        columns: dict[str, list[Any]] = {name: [] for name in wanted}
        for line, found in islice(_json_objects(file, data), rows):
            for name, column in columns.items():
                if name not in found:
                    raise DataError(f"{file.name} line {line}: the key {name!r} is missing.{did_you_mean(name, found)}")
                column.append(found[name])
        return dict(columns)

    return list(first), read


def _json_objects(file: File, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every line that is not blank."""
    if data.lstrip(b" \t\r\n").startswith(b"["):
        raise DataError(f"{file.name} starts with '[': it is one JSON array, expected one object a line (`jq -c '.[]'` writes that).")
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_object)
    for line, text in enumerate(_text_lines(data), 1):
        if not text.strip(" \t\r\n"):
            continue
        try:
            found = decoder.decode(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.name} line {line}: not JSON: {getattr(error, 'msg', error)}; expected one object a line.") from None
        if type(found) is not dict or not found:
            raise DataError(f"{file.name} line {line}: expected a JSON object with keys, found {json.dumps(found)[:40]}.")
        yield line, found


def _object(pairs: list[tuple[str, Any]] | str) -> dict[str, Any]:
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a JSON number")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {_twice([key for key, _ in pairs])!r} stands twice")
    return found


def _open_txt(file: File, rows: int | None) -> tuple[list[str], Reader]:
    data = _utf8(file)
    lines = data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n") if data else []
    texts = pa.chunked_array([lines[:rows]], pa.large_string())
    return ["text"], lambda wanted: dict.fromkeys(wanted, texts)


def _open_parquet(file: File, rows: int | None) -> tuple[list[str], Reader]:
    parquet = pa.parquet.ParquetFile(file.path)
    if twice := _twice(names := list(parquet.schema_arrow.names)):
        raise DataError(f"{file.name} has two columns {twice!r}; rename one.")

    def read(wanted: Sequence[str]) -> dict[str, Column]:
        table = parquet.read(columns=list(wanted), use_threads=False).slice(0, rows)
        return {name: table.column(name) for name in wanted}

    return names, read


def _twice(names: Sequence[str]) -> str | None:
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def lines_of(file: File) -> Iterator[int]:
    """The line on which every row starts."""
    if file.kind == "txt":
        return iter(range(1, 1 << 62))
    if file.kind in ("json", "jsonl"):
        return (line for line, _ in _json_objects(file, _utf8(file)))
    data, _ = _hide_returns(_utf8(file))
    names, skip = _layout(file, data)
    return islice((line for line, fields in _walk(file, data) if fields or len(names) == 1), skip, None)
