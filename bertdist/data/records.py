"""One split in memory: `Records`, texts, pairs and labels in Arrow arrays with access by row.

Texts are exactly those of the source, labels are raw values (`bertdist.tasks` interprets them), and
every error names a file and a line. `concat_records` joins several files, and the chunks of a
stream's window.

1,000,000 labelled rows (85 MB of text), CPU seconds: tsv 0.5, csv with quotes 0.8, parquet 0.2,
jsonl 3.5; `records[row]` costs 3 microseconds, `lengths()` 2 milliseconds. Each rank stores the
columns it reads once (text bytes + 12 bytes per row); forked loader workers share that memory.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bertdist.core.errors import (
    MOST_LISTED,
    DataError,
    NoLabelsError,
    did_you_mean,
    listed,
    nearest_first,
    nearest_name,
)
from bertdist.core.terminal import excerpt_of
from bertdist.data.bad_rows import BadRow, OnBadRow
from bertdist.data.columns import (
    Codes,
    LabelRules,
    Problems,
    Raw,
    Sample,
    as_array,
    filter_labels,
    filter_rows,
    read_label_columns,
    read_labels,
    read_slices,
    read_texts,
    reject,
    text_array,
    valid_rows,
)
from bertdist.data.source import (
    Chunk,
    Column,
    LocateRow,
    QuotedTable,
    bad_rows_of,
    concat_locations,
    select_locations,
    slice_locations,
)
from bertdist.tasks.labels import LabelKind, LabelStats, LabelValue, is_number, non_numeric_labels

# Usual names of columns; the first one present is used.
TEXT_COLUMNS = "text sentence sentence1 question premise review tweet content".split()
LABEL_COLUMNS = "label labels score target class".split()
TEXT_PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "question2"),
    ("premise", "hypothesis"),
)
BYTE_ORDER_MARK = "\ufeff"
_ID = re.compile(r"\S*[0-9]\S*")
MAX_NOTES = 3  # on the formats of files

# Cells of a header, where the names of its columns are not known.
HEADER_WORDS = {
    *TEXT_COLUMNS,
    *LABEL_COLUMNS,
    *(name for pair in TEXT_PAIR_COLUMNS for name in pair),
    *"text_a text_b id idx index qid title body comment message".split(),
    *"sentiment category polarity rating stars emotion intent topic gold label_text".split(),
}


class Record(NamedTuple):
    """One row: its number in the source (from 0), its text or pair of texts, and its raw label."""

    row: int
    text: str
    pair: str | None
    label: LabelValue | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """One split. Immutable, and reading a row starts no thread: forked workers may share it."""

    name: str  # short, for messages
    location: LocateRow  # row -> `dev.tsv line 12`
    has_header: bool = False
    file: Any = None  # of one file: its format (readers.file_reader.DataFile)
    text_columns: tuple[str, ...]  # several are joined with a space
    pair_column: str | None
    label_column: str | None  # None also where label_columns were read: class_names are their names
    label_kind: LabelKind | None  # None: opened without labels. "set": a label is a tuple of names
    label_values: list[LabelValue]  # distinct, in order of first appearance
    label_indices: Codes | None  # (rows,) int32, index into label_values
    class_names: tuple[str, ...] | None  # label names that the source defines, in its order
    # Of --label_columns: which of 0, 1 and None (an empty cell) there are
    indicator_values: frozenset[int | None] = frozenset()
    fingerprint: str  # xxh3 of texts, pairs and labels; independent of path and file format
    all_labels: bool = False  # labels without rows here count: other parts of the file have them
    texts: pa.Array  # (rows,) large_string without nulls
    pairs: pa.Array | None  # (rows,) the same
    slice_column: str | None = None  # --slice_column, for rows to evaluate
    slices: pa.Array | None = None  # (rows,) large_string: its values, null where there is none
    first_row: int = 0  # number of the first row, where these are some rows of a stream
    limit: int | None = None  # --max_train_samples or --max_eval_samples, where it left rows out
    rows_per_file: tuple[int, ...] = ()  # of each --train_file, where there are several
    bad_rows: tuple[BadRow, ...] = ()
    one_file: bool = True  # False: rows of several files, or those held out of a file
    format_notes: tuple[str, ...] = ()  # detected file formats that are unusual

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def text_column(self) -> str:
        """The name of the text column, or names with spaces between them."""
        return " ".join(self.text_columns)

    @property
    def is_one_file(self) -> bool:
        """Whether row n is row n of one file, none left out."""
        return self.one_file and not self.bad_rows

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self.texts):
            raise IndexError(f"row {row} of {len(self.texts)}")
        pair = None if self.pairs is None else self.pairs[row].as_py()
        label = None if self.label_indices is None else self.label_values[self.label_indices[row]]
        return Record(int(row), self.texts[row].as_py(), pair, label)

    def label_stats(self) -> LabelStats:
        """The distinct labels, and the number of rows of each."""
        assert self.label_indices is not None and self.label_kind is not None
        counts = np.bincount(self.label_indices, minlength=len(self.label_values)).tolist()
        # Without the labels of rows that --max_train_samples leaves out, but with those held out.
        counted = zip(self.label_values, counts, strict=True)
        used = {value: n for value, n in counted if n or self.all_labels}
        return LabelStats(
            self.label_kind,
            list(used),
            list(used.values()),
            self.class_names,
            self.label_column or "labels",
            self.locate_label,
            self.limit,
        )

    def has_non_numeric_labels(self) -> bool:
        """Whether nearly all labels are numbers, and some are not."""
        if self.label_kind != "text" or self.class_names is not None:
            return False
        stats = self.label_stats()
        return bool(non_numeric_labels(dict(zip(stats.values, stats.counts, strict=True))))

    def locate_label(self, label: LabelValue) -> str:
        """File and line of the first row with a label."""
        rows = np.flatnonzero(self.label_indices == self.label_values.index(label))
        return str(self.location(int(rows[0]))) if len(rows) else f"another row of {self.name}"

    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: UTF-8 bytes of text and pair, from Arrow's offsets."""
        lengths = np.diff(_offsets(self.texts))
        return lengths if self.pairs is None else lengths + np.diff(_offsets(self.pairs))

    def slice(self, start: int, stop: int) -> "Records":
        """Rows start, ..., stop - 1, without copying them."""
        return replace(
            self,
            location=slice_locations(self.location, start),
            label_indices=None if self.label_indices is None else self.label_indices[start:stop],
            texts=self.texts[start:stop],
            pairs=None if self.pairs is None else self.pairs[start:stop],
            slices=None if self.slices is None else self.slices[start:stop],
            fingerprint="",
        )


class ColumnNames(NamedTuple):
    """The columns to read: as requested (None: by usual names), or as chosen from a source's."""

    text: str | tuple[str, ...] | None  # several are joined
    pair: str | None
    label: str | None
    labels: list[str] | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return (self.text,) if isinstance(self.text, str) else self.text or ()

    def flag(self, name: str) -> str:
        """The flag that names a column."""
        if name in self.texts:
            return "--text_column"
        if name == self.pair:
            return "--text_pair_column"
        return "--label_column" if name == self.label else "--label_columns"

    def names(self) -> list[str]:
        """The distinct names."""
        names = dict.fromkeys((*self.texts, self.pair, self.label, *(self.labels or ())))
        return [name for name in names if name is not None]

    def names_and(self, other: str | None) -> list[str]:
        """The distinct names, with another column's if there is one."""
        names = self.names()
        return names if other is None or other in names else [*names, other]


def choose_columns(
    source: str,
    names: Sequence[str],
    requested: ColumnNames,
    has_header: bool = False,
    sample: Sample = dict,
) -> ColumnNames:
    """The columns to read: those requested, else the usual names. Raises DataError if missing.

    source: its name, for messages; names: of all its columns; sample: of their values, for the
    message about missing ones.
    """
    text, pair, label, labels = requested
    for name in requested.names():
        if name not in names:
            problem, advice = f"there is no column {name!r}", did_you_mean(name, names)
            likely = ""
            if nearest_name(name, list(names), cutoff=0.75) is None:  # else a typing error
                what = {"--text_column": ["text"], "--label_column": ["label"]}
                lacking = what.get(requested.flag(name), [])
                likely = _describe_likely(sample, lacking, {*requested.names()} - {name})
            if likely or not advice.startswith(" Did"):
                advice = f" Name another one with {requested.flag(name)}."
            error = _no_column(source, names, problem, advice, likely, has_header, name)
            raise NoLabelsError(error) if name == label or name in (labels or ()) else error
    present = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    texts = requested.texts
    if text is None and pair is None and "text" not in present:
        for usual in TEXT_PAIR_COLUMNS:
            if present.keys() >= {*usual}:
                text, pair = (present[name] for name in usual)
                break
    text = text or _first_present(TEXT_COLUMNS, present, (pair,))
    if labels is None:
        label = label or _first_present(LABEL_COLUMNS, present, (*(texts or (text,)), pair))
    lacking = ["text"] * (text is None) + ["label"] * (labels is None and label is None)
    if lacking:
        problem = f"no column has a usual name for the {' or the '.join(lacking)}"
        advice = f" Pass {' and '.join(f'--{what}_column' for what in lacking)}."
        likely = _describe_likely(sample, lacking, ColumnNames(text, pair, label, labels).names())
        error = _no_column(source, names, problem, advice, likely, has_header)
        raise NoLabelsError(error) if lacking == ["label"] else error
    return ColumnNames(text, pair, label, labels)


def _describe_likely(sample: Sample, lacking: Sequence[str], taken: Collection[str]) -> str:
    from bertdist.data.likely_columns import describe_likely  # for such messages only

    return describe_likely(sample, lacking, taken)


def check_slice_column(source: str, names: Sequence[str], column: str | None) -> None:
    """Raise DataError if a source has no column of the name that --slice_column gives."""
    if column is not None and column not in names:
        shown = listed([excerpt_of(name, 30) for name in nearest_first(column, names)])
        raise DataError(
            f"{source}: there is no column {column!r} (--slice_column)."
            f"{did_you_mean(column, names)} The columns are {shown}."
        )


def describe_choice(names: Sequence[str], requested: ColumnNames, chosen: ColumnNames) -> str:
    """A sentence on columns with a usual name that were not taken, where no flag says so; or ""."""
    is_label = requested.label is None and requested.labels is None
    choices = (
        ("text", requested.text is None, [*chosen.texts, chosen.pair], TEXT_COLUMNS),
        ("label", is_label, [chosen.label], LABEL_COLUMNS),
    )
    parts = []
    for what, is_open, taken, usual in choices:
        others = [repr(n) for n in names if n.lower() in usual and n not in chosen.names()]
        if is_open and others:
            shown = " and ".join(repr(name) for name in taken if name is not None)
            parts.append(f"{what} in {shown}, not {listed(others)} (--{what}_column)")
    return f"Columns by their usual names: {'; '.join(parts)}" if parts else ""


def _first_present(
    usual: Sequence[str], present: dict[str, str], used: Sequence[str | None]
) -> str | None:
    return next((present[n] for n in usual if n in present and present[n] not in used), None)


def _no_column(
    source: str,
    names: Sequence[str],
    problem: str,
    advice: str,
    likely: str,
    has_header: bool,
    missing: str = "",
) -> DataError:
    if len(names) > MOST_LISTED and missing:
        names = nearest_first(missing, names)
    shown = listed([repr(n if len(n) <= 30 else f"{n[:30]}...") for n in names])
    looks_like_data = any(len(n) > 30 or n.replace(".", "", 1).isdecimal() for n in names)
    if has_header and looks_like_data:
        is_data = (
            " This looks like a row of data: if the file has no header, name its columns with "
        )
        is_data += "--column_names."
        for word in ("Pass", "Name"):
            advice = advice.replace(f" {word} ", f" Otherwise {word.lower()} ")
        advice, likely = f"{is_data}{advice}", ""
    if has_header and any(name.startswith('"') for name in names):
        advice += " Without the quotes: --quoting double."
    line = " line 1" if has_header else ""
    number = f" {len(names)}" if len(names) > MOST_LISTED else ""
    return DataError(f"{source}{line}: {problem}.{advice}{likely} The{number} columns are {shown}.")


def records_from_chunk(
    name: str,
    chunk: Chunk,
    columns: ColumnNames,
    *,
    has_header: bool = False,
    label_delimiter: str | None = None,
    features: Any = None,
    on_bad_row: OnBadRow = "fail",
    first_label: LabelValue | None = None,
    rules: LabelRules = LabelRules(),  # noqa: B008  immutable
    table: QuotedTable | None = None,
    known_labels: Sequence[str] = (),
    slice_column: str | None = None,
) -> Records:
    """The rows of a chunk, checked. Raises DataError at a bad row, or column with "skip".

    name: of the source. features: datasets.Features, if any. first_label: see `read_labels`.
    table: reject texts in which a quote has swallowed rows. known_labels: of a prediction.
    """
    assert columns.texts
    location = chunk.location
    problems: Problems | None = {} if on_bad_row == "skip" else None
    arrays = {
        column: _validated(values, column, location, problems)
        for column, values in chunk.columns.items()
        if column != slice_column or column in columns.names()
    }
    slices = None if slice_column is None else read_slices(chunk.columns[slice_column])
    parts = [read_texts(arrays[column], column, location, problems) for column in columns.texts]
    texts = parts[0]
    if len(parts) > 1:
        texts = pc.binary_join_element_wise(*parts, pa.scalar(" ", pa.large_string()))
    pairs = None
    if columns.pair is not None:
        pairs = read_texts(arrays[columns.pair], columns.pair, location, problems)
    if headers := _repeated_headers(parts[0], arrays, columns):
        reason = "every column holds its own name: a header, as of joined files; remove that row"
        reject(problems, headers, reason, location)
    class_names = _class_names(features, columns)
    options = label_delimiter, class_names, first_label, rules
    labels = _read_labels(arrays, columns, location, problems, *options)
    if table is not None:
        names = (*columns.texts, columns.pair)
        for column, array in zip(names, (*parts, pairs), strict=True):
            if column is not None:
                known = labels.values or known_labels
                for row, reason in rows_with_stray_quotes(array, column, columns, table, known):
                    reject(problems, [row], reason, location)
    if (valid := valid_rows(problems or {}, len(texts))) is not None:
        location = select_locations(location, np.flatnonzero(valid))
        texts = filter_rows(texts, valid)
        pairs = None if pairs is None else filter_rows(pairs, valid)
        slices = None if slices is None else filter_rows(slices, valid)
        labels = labels.filter(valid)
    return Records(
        name=name,
        location=location,
        has_header=has_header,
        text_columns=columns.texts,
        pair_column=columns.pair,
        label_column=columns.label,
        label_kind=labels.kind,
        label_values=labels.values,
        label_indices=labels.indices,
        class_names=tuple(columns.labels) if columns.labels else class_names,
        indicator_values=labels.indicator_values,
        fingerprint=_fingerprint(texts, pairs, labels.values, labels.indices),
        texts=texts,
        pairs=pairs,
        slice_column=slice_column,
        slices=slices,
        bad_rows=(*chunk.bad_rows, *bad_rows_of(chunk, problems or {})),
    )


class _Labels(NamedTuple):
    """The label fields of `Records`."""

    kind: LabelKind | None
    values: list[LabelValue]
    indices: Codes | None
    indicator_values: frozenset[int | None] = frozenset()

    def filter(self, valid: npt.NDArray[np.bool_]) -> "_Labels":
        """Without the rows that are not valid."""
        if self.indices is None:
            return self
        values, indices = filter_labels(self.values, self.indices, valid)
        return self._replace(values=values, indices=indices)


def _read_labels(
    arrays: dict[str, Raw],
    columns: ColumnNames,
    location: LocateRow,
    problems: Problems | None,
    delimiter: str | None,
    class_names: tuple[str, ...] | None,
    first_label: LabelValue | None,
    rules: LabelRules,
) -> _Labels:
    """The labels of a chunk: of --label_columns, of one column, or none."""
    if columns.labels:
        chosen = {column: arrays[column] for column in columns.labels}
        return _Labels("set", *read_label_columns(chosen, location, problems, rules.empty))
    if columns.label is None:
        return _Labels(None, [], None)
    numbers_only = rules.numbers_only and class_names is None
    options = delimiter, class_names, problems, first_label, numbers_only
    return _Labels(*read_labels(arrays[columns.label], columns.label, location, *options))


def _repeated_headers(texts: pa.Array, arrays: dict[str, Raw], columns: ColumnNames) -> list[int]:
    """Rows in which each of several columns holds its own name. texts: of the first column.

    The first cell of such a row may begin with the byte order mark of its file.
    """
    first, *others = columns.names()
    if not others:
        return []
    marked = (f"{BYTE_ORDER_MARK}{first}", f'{BYTE_ORDER_MARK}"{first}"')
    return [
        row
        for row in pc.indices_nonzero(pc.is_in(texts, text_array([first, *marked]))).to_pylist()
        if all(str(arrays[name][row]).strip(f'{BYTE_ORDER_MARK}"') == name for name in others)
    ]


def _validated(column: Column, name: str, location: LocateRow, problems: Problems | None) -> Raw:
    """The column `as_array`, null where bytes are not UTF-8, which parquet does not check."""
    if isinstance(column, list):
        return column
    try:
        column.validate(full=True)
        return as_array(column)
    except pa.ArrowInvalid as error:
        damage = str(error)
    wrong = np.zeros(len(column), bool)
    for row, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError as error:
            wrong[row] = True
            reject(problems, [row], f"column {name!r} is not UTF-8 ({error})", location)
    # The invalid value of a dictionary may not occur in any row.
    if not wrong.any() and not pa.types.is_dictionary(column.type):
        raise DataError(f"{location(0)}: column {name!r} is damaged ({damage}).")
    array: pa.Array = as_array(column)
    return array.take(pa.array(np.arange(len(wrong)), mask=wrong))


def _class_names(features: Any, columns: ColumnNames) -> tuple[str, ...] | None:
    """The label names of a Hub data set's ClassLabel or List(ClassLabel)."""
    feature = (features or {}).get(columns.label)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else tuple(names)


def _offsets(texts: pa.Array) -> npt.NDArray[np.int64]:
    """(rows + 1,) bytes before each text in the array's buffer of characters."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def rows_fingerprint(records: Records) -> str:
    """The fingerprint of rows that were selected."""
    return _fingerprint(records.texts, records.pairs, records.label_values, records.label_indices)


def _fingerprint(
    texts: pa.Array, pairs: pa.Array | None, values: list[LabelValue], indices: Codes | None
) -> str:
    digest = xxhash.xxh3_128()
    for column in (texts, pairs):
        if column is None:
            digest.update(b"none")
        elif len(column):
            offsets = _offsets(column)
            digest.update(np.diff(offsets).tobytes())
            digest.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    if indices is not None:
        digest.update(indices.tobytes())
        digest.update(repr(values).encode())
    return digest.hexdigest()


def rows_with_stray_quotes(
    texts: pa.Array,
    column: str,
    columns: ColumnNames,
    table: QuotedTable,
    labels: Iterable[LabelValue],
) -> Iterator[tuple[int, str]]:
    """(row, reason) of texts that hold rows of the table, as a stray quote opened the field.

    All lines but the first and the last are complete rows, with a label in its place. Where rows
    are read without labels, with one or an id (a word with a digit) beside the text. texts: of
    `column`; labels: the known ones.
    """
    width, own = len(table.header), table.header.index(column)
    label_columns = columns.labels or ([columns.label] if columns.label else [])
    places = [table.header.index(name) for name in label_columns]
    texts_at = {table.header.index(name) for name in columns.names()}
    names = {"0", "1", "0.0", "1.0", "true", "false"} if columns.labels else set()
    if not columns.labels:
        for label in labels:
            names |= {str(name) for name in (label if isinstance(label, tuple) else (label,))}
    numbers = all(map(is_number, names))

    def is_row(fields: list[str]) -> bool:
        if len(fields) == width and not places:
            cells = [field.strip() for at, field in enumerate(fields) if at not in texts_at]
            return any(cell in names or _ID.fullmatch(cell) for cell in cells)
        cells = [fields[place].strip() for place in places] if len(fields) == width else []
        return bool(cells) and all(cell in names or (numbers and is_number(cell)) for cell in cells)

    for row in pc.indices_nonzero(pc.match_substring(texts, "\n")).to_pylist():
        lines = [line for line in texts[row].as_py().split("\n") if line.strip()]
        fields = [line.split(table.delimiter) for line in lines]
        if (
            len(fields) > 2
            and len(fields[0]) == width - own
            and len(fields[-1]) == own + 1
            and all(map(is_row, fields[1:-1]))
        ):
            yield (
                row,
                f"column {column!r} holds {len(fields) - 1} other rows of the table, from a quote "
                "that opened by mistake to the next one; pass --quoting none to read every line "
                "as a row, or --quoting double to keep such texts",
            )


def reject_header(records: Records) -> None:
    """Raises DataError where the first of all rows is a header: the only one with its label."""
    indices = records.label_indices
    if (
        records.has_header
        or indices is None
        or len(records) < 2
        or (indices == indices[0]).sum() > 1
    ):
        return
    label, text = records.label_values[indices[0]], records.texts[0].as_py()
    if isinstance(label, str) and label.strip().lower() in HEADER_WORDS:
        raise DataError(
            f"{records.location(0)} looks like a header (text {excerpt_of(text, 30)}, label "
            f"{excerpt_of(label, 30)}); remove that row, or --column_names, which is for files "
            "without a header."
        )


def short_notes(notes: Sequence[str]) -> tuple[str, ...]:
    """Notes on the formats of files: of many files, the first one and how many others there are."""
    distinct = tuple(dict.fromkeys(notes))
    if len(distinct) <= MAX_NOTES:
        return distinct
    return distinct[0], f"{len(distinct) - 1:,} other files are not read as their names say either"


def concat_records(parts: Sequence[Records], name: str) -> Records:
    """Several records as one, in their order.

    Raises DataError if their labels differ in kind, or only some are pairs.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts:
        differ = f"{other.name} and {first.name} differ"
        if (other.pairs is None) != (first.pairs is None):
            raise DataError(
                f"{differ}: one has pairs of texts. Name --text_column, and --text_pair_column."
            )
        if other.class_names != first.class_names:
            names = f"{other.class_names} and {first.class_names}"
            raise DataError(f"{differ} in the names of their labels: {names}.")
    kind, values, indices = _concat_labels(parts)
    fingerprints = " ".join(part.fingerprint for part in parts)
    return replace(
        first,
        name=name,
        location=concat_locations([(len(part), part.location) for part in parts]),
        file=None,
        one_file=False,
        label_kind=kind,
        label_values=values,
        label_indices=indices,
        indicator_values=frozenset().union(*(part.indicator_values for part in parts)),
        texts=pa.concat_arrays([part.texts for part in parts]),
        pairs=None if first.pairs is None else pa.concat_arrays([part.pairs for part in parts]),
        slices=None if first.slices is None else pa.concat_arrays([part.slices for part in parts]),
        fingerprint=xxhash.xxh3_128_hexdigest(fingerprints.encode()),
        bad_rows=tuple(row for part in parts for row in part.bad_rows),
        format_notes=short_notes([note for part in parts for note in part.format_notes]),
    )


def _concat_labels(
    parts: Sequence[Records],
) -> tuple[LabelKind | None, list[LabelValue], Codes | None]:
    if parts[0].label_indices is None:
        return None, [], None
    kind = parts[0].label_kind
    for part in parts:
        check_same_kind(kind, part.label_kind, str(part.location(0)))
    index_of: dict[LabelValue, int] = {}
    indices = []
    for part in parts:
        assert part.label_indices is not None
        new_indices = [index_of.setdefault(value, len(index_of)) for value in part.label_values]
        indices.append(np.array(new_indices, np.int32)[part.label_indices])
    return kind, list(index_of), np.concatenate(indices)


def check_same_kind(kind: LabelKind | None, other: LabelKind | None, location: str) -> None:
    """Raises DataError if some rows have lists of labels, and others, from `location`, do not."""
    if kind != other:
        words = {"set": "lists of labels", "text": "single labels", None: "none"}
        raise DataError(
            f"{location}: the labels are {words[other]}, those before are {words[kind]}; "
            "expected one kind in all rows."
        )
