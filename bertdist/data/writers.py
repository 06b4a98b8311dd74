"""Predictions -> JSON lines, csv, tsv or parquet, with the input's columns beside them.

    writer = create_writer(OutputFormat("csv"), answers, kept_names, is_named)
    file.write(writer.header())
    file.write(writer.rows(window, predictions))   # bytes that need nothing of other windows
    writer.convert(file, target)                   # parquet: once, at the end

A row of JSON lines is {"row": 0, the kept columns, "label": "positive", "score": 0.98}. A table
(csv, tsv, parquet) has one column for each: see `AnswerColumns`. Kept values are not changed: text
stays as it is, numbers and dates of parquet keep their type in parquet, and are their digits
elsewhere. Of compressed output each window is one gzip member; of parquet, until `convert`, Arrow
streams with their size before them.
"""

import csv
import gzip
import io
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from bertdist.core.atomic_io import to_json
from bertdist.core.errors import DataError
from bertdist.core.output_files import OutputFormat
from bertdist.data.prediction_input import InputWindow, Kept

ROW_GROUP_ROWS = 1 << 16  # of parquet output, at least
LARGEST_EXACT = 1 << 53  # every smaller integer is a float64
KEEP_FEWER = ", or name the columns to keep (--keep_columns id date)"
_SIZE = struct.Struct("<q")


class Writer(Protocol):
    """One output format."""

    def header(self) -> bytes:
        """What stands before the rows."""

    def rows(self, window: InputWindow, predictions: Sequence[dict[str, Any]]) -> bytes:
        """Some rows. Raises DataError for a kept value that the format does not have."""

    def convert(self, source: IO[bytes], target: IO[bytes]) -> None:
        """The file of header and rows -> the final file, if `needs_conversion`."""

    needs_conversion: bool


@dataclass(frozen=True)
class AnswerColumns:
    """The columns of a prediction in a table.

    single-label, regression: label, score. multi-label: labels, scores (lists; in csv as JSON).
    top_k 2: label_1, score_1, label_2, score_2. every label: score_negative, score_positive.
    """

    is_multi_label: bool
    top_k: int | None  # None: those that a prediction has without --top_k
    labels: tuple[str, ...]  # of the model

    @property
    def has_all(self) -> bool:
        """Whether every label has a column of its own."""
        return self.top_k == sys.maxsize  # --top_k all

    def names(self) -> list[str]:
        """In their order."""
        if self.top_k is None:
            return ["labels", "scores"] if self.is_multi_label else ["label", "score"]
        if self.has_all:
            best = [] if self.is_multi_label else ["label"]
            return best + [f"score_{label}" for label in self.labels]
        return [f"{x}_{k + 1}" for k in range(self.top_k) for x in ("label", "score")]

    def types(self) -> list[pa.DataType]:
        """In parquet."""
        one = {"label": pa.string(), "score": pa.float32()}
        if self.top_k is None and self.is_multi_label:
            return [pa.list_(one["label"]), pa.list_(one["score"])]
        return [one[name.split("_")[0]] for name in self.names()]

    def values(self, prediction: dict[str, Any]) -> list[Any]:
        """Of one row; None where there is none."""
        if not prediction:  # NO_ANSWERS
            return []
        if "labels" not in prediction:
            return [prediction["label"], prediction["score"]]
        found = prediction["labels"]
        names, scores = [x["label"] for x in found], [x["score"] for x in found]
        if self.top_k is None:
            return [names, scores]
        if self.has_all:
            score_of = dict(zip(names, scores, strict=True))
            best = [] if self.is_multi_label else names[:1]
            return best + [score_of[label] for label in self.labels]
        pairs = [value for pair in zip(names, scores, strict=True) for value in pair]
        return pairs + [None] * (2 * self.top_k - len(pairs))


NO_ANSWERS = AnswerColumns(False, 0, ("",))


def create_row_writer(fmt: OutputFormat, names: Sequence[str], is_quoted: bool = True) -> Writer:
    """Of rows as they are: `Writer.rows` gets an empty dict for each. is_quoted: fields of a table
    may be; else csv.Error is raised for one that has to be.
    """
    kind, is_compressed = fmt
    kept = {name: name for name in names}
    if kind == "jsonl":
        return JsonLines(is_compressed, [], kept)
    if kind == "parquet":
        return Parquet([], kept, NO_ANSWERS)
    delimiter = "," if kind == "csv" else "\t"
    return Csv(is_compressed, [], kept, NO_ANSWERS, delimiter, is_quoted)


def create_writer(
    fmt: OutputFormat, answers: AnswerColumns, kept_names: Sequence[str], is_named: bool
) -> Writer:
    """is_named: rows have the file that they are of."""
    kind, is_compressed = fmt
    own = ["file", "row"] if is_named else ["row"]
    if kind == "jsonl":
        taken = {*own, "label", "score", "labels"}
        return JsonLines(is_compressed, own, renamed(kept_names, taken))
    with _refuse_surrogates("--input"):
        "".join(kept_names).encode()
    names = renamed(kept_names, {*own, *answers.names()})
    if kind == "parquet":
        return Parquet(own, names, answers)
    return Csv(is_compressed, own, names, answers, "," if kind == "csv" else "\t")


def renamed(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Input column -> its name in the output: input_label where the answer has a label."""
    result: dict[str, str] = {}
    used = {*taken}
    others = {*names}
    for name in names:
        new = name
        while new in used or (new != name and new in others):
            new = f"input_{new}"
        used.add(new)
        result[name] = new
    return result


class JsonLines:
    """One JSON object per row."""

    needs_conversion = False

    def __init__(self, is_compressed: bool, own: list[str], kept: dict[str, str]) -> None:
        self.is_compressed, self.own, self.kept = is_compressed, own, kept
        self._taken = {*own, "label", "score", "labels"}

    def header(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, window: InputWindow, predictions: Sequence[dict[str, Any]]) -> bytes:
        """See `Writer`."""
        lines = []
        for row, (kept, prediction) in enumerate(
            zip(_objects(window, len(predictions)), predictions, strict=True)
        ):
            line = dict(zip(self.own, _own_values(window, row, self.own), strict=True))
            for name, value in kept.items():
                if name not in self.kept:  # of a JSON object: its first rows lack it
                    self.kept.update(renamed([name], {*self._taken, *self.kept.values()}))
                line[self.kept[name]] = value
            try:
                lines.append(to_json({**line, **prediction}))
            except (TypeError, ValueError) as error:
                place = window.records.location(row)
                raise DataError(f"{place}: cannot be written as JSON: {error}.") from None
        return _packed(b"".join(lines), self.is_compressed)

    def convert(self, source: IO[bytes], target: IO[bytes]) -> None:
        """Never called."""
        raise AssertionError


class Csv:
    """A table with a header; fields are quoted where they must be, also in tsv."""

    needs_conversion = False

    def __init__(
        self,
        is_compressed: bool,
        own: list[str],
        kept: dict[str, str],
        answers: AnswerColumns,
        delimiter: str,
        is_quoted: bool = True,
    ) -> None:
        self.is_compressed, self.own, self.kept, self.answers = is_compressed, own, kept, answers
        self.options: dict[str, Any] = {"delimiter": delimiter, "lineterminator": "\r\n"}
        if not is_quoted:
            self.options |= {"quoting": csv.QUOTE_NONE, "quotechar": None}

    def header(self) -> bytes:
        """The names of the columns."""
        names = [*self.own, *self.kept.values(), *self.answers.names()]
        return _packed(self._lines([names]), self.is_compressed)

    def rows(self, window: InputWindow, predictions: Sequence[dict[str, Any]]) -> bytes:
        """See `Writer`."""
        own = [_own_values(window, row, self.own) for row in range(len(predictions))]
        kept = [_as_text(window, name) for name in _checked(window, self.kept)]
        answers = [map(_cell, self.answers.values(prediction)) for prediction in predictions]
        kept_rows: Iterable[Sequence[str]] = zip(*kept, strict=True) if kept else [()] * len(own)
        lines = ([*a, *b, *c] for a, b, c in zip(own, kept_rows, answers, strict=True))
        with _refuse_surrogates(window.records.name):
            return _packed(self._lines(lines), self.is_compressed)

    def convert(self, source: IO[bytes], target: IO[bytes]) -> None:
        """Never called."""
        raise AssertionError

    def _lines(self, rows: Iterable[Sequence[Any]]) -> bytes:
        text = _LineFeeds(newline="")
        csv.writer(text, **self.options).writerows(rows)
        return text.getvalue().encode()


class _LineFeeds(io.StringIO):
    """Ends rows with a line feed. Told to do so, `csv.writer` leaves lone carriage returns without
    quotes before Python 3.13.
    """

    def write(self, row: str) -> int:
        """row: with its \\r\\n."""
        return super().write(row.removesuffix("\r\n") + "\n")


class Parquet:
    """Windows are Arrow streams; `convert` gives all of them one type per column."""

    needs_conversion = True

    def __init__(self, own: list[str], kept: dict[str, str], answers: AnswerColumns) -> None:
        self.own, self.kept, self.answers = own, kept, answers

    def header(self) -> bytes:
        """A stream without rows: an empty output has the columns too."""
        columns = {self.kept[name]: pa.array([], pa.null()) for name in self.kept}
        return self._stream([], columns, [])

    def rows(self, window: InputWindow, predictions: Sequence[dict[str, Any]]) -> bytes:
        """See `Writer`."""
        own = [_own_values(window, row, self.own) for row in range(len(predictions))]
        with _refuse_surrogates(window.records.name):
            names = _checked(window, self.kept)
            columns = {self.kept[name]: _as_arrow(window, name) for name in names}
        return self._stream(own, columns, [self.answers.values(x) for x in predictions])

    def _stream(
        self, own: list[list[Any]], kept: dict[str, Any], answers: list[list[Any]]
    ) -> bytes:
        columns: dict[str, Any] = {}
        for index, name in enumerate(self.own):
            kind = pa.string() if name == "file" else pa.int64()
            columns[name] = pa.array([row[index] for row in own], kind)
        columns |= kept
        for index, (name, kind) in enumerate(
            zip(self.answers.names(), self.answers.types(), strict=True)
        ):
            columns[name] = pa.array([row[index] for row in answers], kind)
        table, sink = pa.table(columns), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        buffer = sink.getvalue()
        return _SIZE.pack(buffer.size) + bytes(buffer)

    def convert(self, source: IO[bytes], target: IO[bytes]) -> None:
        """See `Writer`."""
        start, kinds = source.tell(), _ColumnTypes()
        for table in _tables(source):
            kinds.add(table)
        schema = kinds.schema()
        source.seek(start)
        with pa.parquet.ParquetWriter(target, schema) as file:
            group: list[pa.Table] = []
            for table in _tables(source):
                group.append(_cast(table, schema))
                if sum(part.num_rows for part in group) >= ROW_GROUP_ROWS:
                    file.write_table(pa.concat_tables(group))
                    group = []
            if group:
                file.write_table(pa.concat_tables(group))


class _ColumnTypes:
    """One type per column for all windows: their own; text where they differ in kind."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._exact: dict[str, bool] = {}  # whether all integers are float64 as well

    def add(self, table: pa.Table) -> None:
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_integer(column.type) and len(column):
                low, high = pc.min_max(column).as_py().values()
                exact = max(abs(low or 0), abs(high or 0)) <= LARGEST_EXACT
                self._exact[name] = self._exact.get(name, True) and exact
            before = self._types.get(name, pa.null())
            self._types[name] = self._common(name, before, column.type)

    def _common(self, name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
        if one == other or pa.types.is_null(other):
            return one
        if pa.types.is_null(one):
            return other
        if _has_bytes(one) != _has_bytes(other):
            raise DataError(
                f"column {name!r} holds {one} and {other}, which one column cannot: leave it out "
                "(--keep_columns id date)."
            )
        both = (one, other)
        is_wide = pa.uint64() in both and any(map(pa.types.is_signed_integer, both))
        if (
            is_wide
            or all(map(pa.types.is_temporal, both))
            or any(map(pa.types.is_nested, both))
            or not all(map(pa.types.is_primitive, both))
        ):
            return pa.large_string()
        try:
            fields = (pa.schema([(name, kind)]) for kind in (one, other))
            return pa.unify_schemas(fields, promote_options="permissive").field(0).type
        except pa.ArrowException:
            return pa.large_string()

    def schema(self) -> pa.Schema:
        for name, kind in self._types.items():
            inexact = pa.types.is_floating(kind) and not self._exact.get(name, True)
            if inexact or not _is_in_parquet(kind):
                self._types[name] = pa.large_string()
        return pa.schema(list(self._types.items()))


def _is_in_parquet(kind: pa.DataType) -> bool:
    """Whether a column of this type can be written; objects without keys, or nested too deep,
    cannot.
    """
    table, sink = pa.schema([("_", kind)]).empty_table(), pa.BufferOutputStream()
    try:
        pa.parquet.write_table(table, pa.BufferOutputStream())
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        pa.ipc.open_stream(sink.getvalue()).read_all()
    except (pa.ArrowException, OSError):
        return False
    return True


def _tables(source: IO[bytes]) -> Iterator[pa.Table]:
    while head := source.read(_SIZE.size):
        (size,) = _SIZE.unpack(head)
        yield pa.ipc.open_stream(source.read(size)).read_all()


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        column = table.column(name)
        if column.type != kind and pa.types.is_large_string(kind):
            texts = [None if x is None else _json_cell(x) for x in _plain(column)]
            columns.append(pa.chunked_array([pa.array(texts, kind)]))
        else:
            columns.append(column.cast(kind))
    return pa.Table.from_arrays(columns, schema=schema)


def _packed(data: bytes, is_compressed: bool) -> bytes:
    return gzip.compress(data, mtime=0) if is_compressed and data else data


def _own_values(window: InputWindow, row: int, own: Sequence[str]) -> list[Any]:
    number = window.first_row + row
    values = {"file": window.file_of(row), "row": number}
    return [values[name] for name in own]


def _checked(window: InputWindow, kept: dict[str, str]) -> Iterable[str]:
    """The kept columns. Raises DataError at a JSON object with a key that the header lacks."""
    objects = window.kept.objects
    for row, value in enumerate(objects or ()):
        if not value.keys() <= kept.keys():
            odd = next(key for key in value if key not in kept)
            raise DataError(
                f"{window.records.location(row)}: the key {odd!r} is no column of the table, which "
                "has the keys of most of the first rows, but no empty one: write "
                f".jsonl{KEEP_FEWER}."
            )
    return kept


def _objects(window: InputWindow, rows: int) -> Iterable[dict[str, Any]]:
    """The kept values of each row, as JSON has them."""
    if window.kept.objects is not None:
        return window.kept.objects
    if not window.kept.columns:
        return [{}] * rows
    names = list(window.kept.columns)
    columns = [_plain_of(window, name) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain_of(window: InputWindow, name: str) -> list[Any]:
    """`_plain` of a kept column. Raises DataError."""
    try:
        return _plain(window.kept.columns[name])
    except UnicodeDecodeError as error:
        raise _unfit(window.kept, window, name, f"is not UTF-8 ({error.reason})") from None
    except _BinaryError:
        raise _unfit(window.kept, window, name, "holds bytes") from None


def _unfit(kept: Kept, window: InputWindow, name: str, problem: str) -> DataError:
    return DataError(
        f"{window.records.name}: column {name!r} {problem}, which text cannot hold: write "
        f".parquet{KEEP_FEWER}."
    )


class _BinaryError(Exception):
    """A column of bytes."""


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Values that JSON has; dates, times and decimals as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if _has_bytes(kind):
        raise _BinaryError
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        column = pc.cast(column, pa.string())
    values: list[Any] = column.to_pylist()
    return [json.loads(json.dumps(x, default=str)) for x in values] if _is_nested(kind) else values


def _is_nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _as_text(window: InputWindow, name: str) -> list[str]:
    """The cells of a kept column; null is an empty one."""
    if window.kept.objects is not None:
        return [_cell(value.get(name)) for value in window.kept.objects]
    return [_cell(value) for value in _plain_of(window, name)]


def _cell(value: Any) -> str:
    return "" if value is None else _json_cell(value)


def _json_cell(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _as_arrow(window: InputWindow, name: str) -> Any:
    """A kept column in its own type; JSON values of several kinds as text."""
    if window.kept.objects is None:
        column = window.kept.columns[name]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        kind = pa.string() if pa.types.is_string_view(kind) else kind
        return column.cast(kind)
    values = [value.get(name) for value in window.kept.objects]
    with suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
        array = pa.array(values)
        if not _is_nested(array.type) or _is_in_parquet(array.type):
            return array
    texts = [None if value is None else _json_cell(value) for value in values]
    return pa.array(texts, pa.large_string())


@contextmanager
def _refuse_surrogates(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError:
        raise DataError(
            f"{name}: a kept column, or its name, has a lone surrogate, which tables cannot hold: "
            f"write .jsonl{KEEP_FEWER}."
        ) from None
