"""Columns of any source -> `Records`: texts, pairs and labels in Arrow memory, with random access by row.

In: the columns of a file, of a piece of a file, of a data set. Out: Records, whose texts are exactly those of the source, whose labels
are raw values (`bertdist.tasks` decides what they mean), and whose every complaint names a file and a line.
One module, because which columns are read, what counts as a label and what counts as missing must be the same for every kind of source.

1,000,000 labelled rows (85 MB of text), processor seconds: tsv 0.5, csv with quotes 0.8, parquet 0.2, jsonl 3.5; `records[row]` costs
3 microseconds, `lengths()` 2 milliseconds.
Each rank holds the columns it reads once (text bytes + 12 bytes a row); forked loader workers share that memory.

Several `Records` as one: files that are learned from together, and pieces of a stream that make a window.

One module, because what labels of different sources have in common must be the same however the rows came.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from bertdist.core.errors import DataError, did_you_mean
from bertdist.core.types import LocateRow
from bertdist.data.columns import (
    Codes,
    LabelKind,
    LabelValue,
    Problems,
    Raw,
    kept_rows,
    read_label_columns,
    read_labels,
    read_texts,
    whole,
    without,
    without_labels,
)
from bertdist.data.readers.file_reader import Reader
from bertdist.data.readers.parquet_reader import spots_in
from bertdist.data.source import (
    Chunk,
    Column,
    Kept,
    Named,
    OnBadRow,
    Placed,
    RowSource,
    SkippedRow,
    Source,
    Split,
    skipped_rows,
)

TEXT_COLUMNS = (
    "text",
    "sentence",
    "sentence1",
    "question",
    "premise",
    "review",
    "tweet",
    "content",
)

LABEL_COLUMNS = ("label", "labels", "score", "target", "class")

PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "question2"),
    ("premise", "hypothesis"),
)


class Record(NamedTuple):
    """One row: its number in the source (from 0), its text or texts, and its label as the source has it."""

    row: int
    text: str
    pair: str | None
    label: LabelValue | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """One split. Nothing in it changes after it is made, and reading a row starts no thread: forked workers may share it."""

    source: Source
    text_column: str
    pair_column: str | None
    label_column: str | None  # None also where label_columns were read: class_names are their names
    label_kind: LabelKind | None  # None: opened without labels. "set": a label is a tuple of names
    label_values: list[LabelValue]  # distinct, in the order in which rows first show them
    label_codes: Codes | None  # (rows,) int32, index into label_values
    class_names: tuple[str, ...] | None  # names that the source fixes, in its order
    fingerprint: str  # xxh3 of texts, pairs and labels; the path and the kind of file do not enter
    texts: pa.Array  # (rows,) large_string without nulls
    pairs: pa.Array | None  # (rows,) the same
    first_row: int = 0  # number of the first row, where these are some rows of a stream
    parts: tuple[int, ...] = ()  # rows of each --train_file, where there are several
    bad: tuple[SkippedRow, ...] = ()  # rows of the source that were left out
    guessed: tuple[
        str, ...
    ] = ()  # how its files are read, where that is not the usual, in sentences

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self.texts):
            raise IndexError(f"row {row} of {len(self.texts)}")
        pair = None if self.pairs is None else self.pairs[row].as_py()
        label = None if self.label_codes is None else self.label_values[self.label_codes[row]]
        return Record(int(row), self.texts[row].as_py(), pair, label)

    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) int64: UTF-8 bytes of text and pair, from Arrow's offsets."""
        lengths = np.diff(_offsets(self.texts))
        return lengths if self.pairs is None else lengths + np.diff(_offsets(self.pairs))

    def where(self, row: int) -> str:
        """`dev.tsv line 12`: where the row starts. `x.parquet row 7` where there are no lines, from 0 as in `Record.row`."""
        return self.source.where(row)

    def some(self, start: int, stop: int) -> "Records":
        """Rows start, ..., stop - 1, without copying them."""
        return replace(
            self,
            source=Placed(
                self.source.name, self.source.has_header, ((0, self.source.where, start),)
            ),
            label_codes=None if self.label_codes is None else self.label_codes[start:stop],
            texts=self.texts[start:stop],
            pairs=None if self.pairs is None else self.pairs[start:stop],
            fingerprint="",
        )


class Columns(NamedTuple):
    """Which columns to read: as asked for, and then as found."""

    text: str | None
    pair: str | None
    label: str | None
    labels: list[str] | None

    def names(self) -> list[str]:
        """Each once."""
        return [
            name
            for name in dict.fromkeys((self.text, self.pair, self.label, *(self.labels or ())))
            if name is not None
        ]


def records_of(texts: Sequence[str], pairs: Sequence[str] | None = None) -> Records:
    """Texts that are in memory already, without labels; raises DataError for what is not text."""
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(
            f"There are {len(texts)} texts and {len(pairs)} second texts; they go together."
        )
    names = ["text"] if pairs is None else ["text", "pair"]
    given: dict[str, Column] = {"text": list(texts), "pair": list(pairs or ())}
    return read_records(
        Split("texts"),
        names,
        lambda wanted: {name: given[name] for name in wanted},
        Columns("text", None if pairs is None else "pair", None, []),
    )


def choose(source: Named, names: Sequence[str], asked: Columns) -> Columns:
    """The columns to read: those asked for, else the usual names, else DataError."""
    for name in asked.names():
        if name not in names:
            raise _no_column(
                source, names, f"there is no column {name!r}", did_you_mean(name, names)
            )
    plain = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    text, pair, label, labels = asked
    if text is None and pair is None and "text" not in plain:
        text, pair = next(
            ((plain[a], plain[b]) for a, b in PAIRS if a in plain and b in plain), (None, None)
        )
    text = text or next(
        (plain[name] for name in TEXT_COLUMNS if name in plain and plain[name] != pair), None
    )
    if text is None:
        raise _no_column(
            source, names, "no column has a usual name for the text", " Pass --text_column."
        )
    if labels is None:
        label = label or next(
            (
                plain[name]
                for name in LABEL_COLUMNS
                if name in plain and plain[name] not in (text, pair)
            ),
            None,
        )
        if label is None:
            raise _no_column(
                source, names, "no column has a usual name for the label", " Pass --label_column."
            )
    return Columns(text, pair, label, labels)


def _no_column(source: Named, names: Sequence[str], problem: str, advice: str) -> DataError:
    found = ", ".join(repr(name if len(name) <= 30 else f"{name[:30]}...") for name in names[:20])
    advice = "" if advice.startswith(" Known") else advice  # the columns are told already
    if source.has_header and any(
        len(name) > 30 or name.replace(".", "", 1).isdecimal() for name in names
    ):
        advice += " This looks like a row of data: if the file has no header, name its columns with --column_names."
    return DataError(
        f"{source.name}{' line 1' * source.has_header}: {problem}; the columns are {found}.{advice}"
    )


def read_records(
    source: Source,
    names: Sequence[str],
    read: Reader,
    asked: Columns,
    label_delimiter: str | None = None,
    features: Any = None,
    on_bad_row: OnBadRow = "fail",
) -> Records:
    """All rows of a source. names: all its columns; read: gives some of them. Raises DataError, with "skip" where no row is left."""
    taken = choose(source, names, asked)
    columns = read(taken.names())
    if not len(columns[taken.names()[0]]):
        raise DataError(f"{source.name} has no rows.")
    problems: Problems | None = {} if on_bad_row == "skip" else None
    records = records_from(
        source, columns, taken, label_delimiter, class_names_of(features, taken), problems
    )
    if not len(records):
        raise DataError(f"{source.name} has no rows, but for those that were left out.")
    return replace(
        records,
        bad=tuple(
            skipped_rows(problems or {}, source.where, partial(spots_in, source.where, columns))
        ),
    )


def records_of_piece(
    source: RowSource,
    piece: Chunk,
    taken: Columns,
    label_delimiter: str | None,
    on_bad_row: OnBadRow,
    above: LabelValue | None = None,
) -> tuple[Records, list[SkippedRow]]:
    """The rows of a piece, and those that were left out, in it or here. Raises DataError, with "skip" for a wrong column only."""
    problems: Problems | None = {} if on_bad_row == "skip" else None
    place = Placed(source.name, source.has_header, ((0, piece.where, 0),))
    records = records_from(
        place,
        piece.columns,
        taken,
        label_delimiter,
        class_names_of(source.features, taken),
        problems,
        above,
    )
    return records, [*piece.bad, *skipped_rows(problems or {}, piece.where, piece.spots)]


def records_from(
    source: Source,
    columns: dict[str, Column],
    taken: Columns,
    label_delimiter: str | None = None,
    class_names: tuple[str, ...] | None = None,
    problems: Problems | None = None,
    above: LabelValue | None = None,
) -> Records:
    """Rows of the columns that are taken, checked. A row that is wrong is a DataError, or, where `problems` is given, left out.

    class_names, above: see `read_labels`.
    """
    assert taken.text is not None
    held = {
        name: _readable(column, name, source.where, problems) for name, column in columns.items()
    }
    texts = read_texts(held[taken.text], taken.text, source.where, problems)
    pairs = (
        None
        if taken.pair is None
        else read_texts(held[taken.pair], taken.pair, source.where, problems)
    )
    kind: LabelKind | None = None
    values: list[LabelValue] = []
    codes = None
    if taken.labels:
        kind, class_names = "set", tuple(taken.labels)
        values, codes = read_label_columns(
            {name: held[name] for name in taken.labels}, source.where, problems
        )
    elif taken.label is not None:
        kind, values, codes = read_labels(
            held[taken.label],
            taken.label,
            source.where,
            label_delimiter,
            class_names,
            problems,
            above,
        )
    if (kept := kept_rows(problems or {}, len(texts))) is not None:
        source = Placed(
            source.name, source.has_header, ((0, Kept(source.where, np.flatnonzero(kept)), 0),)
        )
        texts, pairs = without(texts, kept), None if pairs is None else without(pairs, kept)
        values, codes = (values, None) if codes is None else without_labels(values, codes, kept)
    return Records(
        source=source,
        text_column=taken.text,
        pair_column=taken.pair,
        label_column=taken.label,
        label_kind=kind,
        label_values=values,
        label_codes=codes,
        class_names=class_names,
        fingerprint=_fingerprint(texts, pairs, values, codes),
        texts=texts,
        pairs=pairs,
    )


def _readable(column: Column, name: str, where: LocateRow, problems: Problems | None) -> Raw:
    """The column as `whole` gives it, null where bytes are not UTF-8: parquet does not look, and Python would, much later."""
    if isinstance(column, list):
        return column
    try:
        column.validate(full=True)
        return whole(column)
    except pa.ArrowInvalid as error:
        damage = str(error)
    wrong = np.zeros(len(column), bool)
    for row, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError as error:
            wrong[row], reason = True, f"column {name!r} is not UTF-8 ({error})"
            if problems is None:
                raise DataError(f"{where(row)}: {reason}.") from None
            problems.setdefault(row, reason)
    if not wrong.any() and not pa.types.is_dictionary(
        column.type
    ):  # whose wrong word no row may have
        raise DataError(f"{where(0)}: column {name!r} is damaged ({damage}).")
    held: pa.Array = whole(column)
    return held.take(pa.array(np.arange(len(wrong)), mask=wrong))


def class_names_of(features: Any, taken: Columns) -> tuple[str, ...] | None:
    """The names that a data set of the hub keeps for labels that are numbers: ClassLabel, List(ClassLabel)."""
    feature = (features or {}).get(taken.label)
    fixed = getattr(getattr(feature, "feature", feature), "names", None)
    return None if fixed is None else tuple(fixed)


def _offsets(texts: pa.Array) -> npt.NDArray[np.int64]:
    """(rows + 1,) bytes before each text in the array's buffer of characters."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _fingerprint(
    texts: pa.Array, pairs: pa.Array | None, values: list[LabelValue], codes: Codes | None
) -> str:
    digest = xxhash.xxh3_128()
    for column in (texts, pairs):
        if column is None:
            digest.update(b"none")
        elif len(column):
            offsets = _offsets(column)
            digest.update(np.diff(offsets).tobytes())
            digest.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    if codes is not None:
        digest.update(codes.tobytes())
        digest.update(repr(values).encode())
    return digest.hexdigest()


def join(found: Sequence[Records], name: str) -> Records:
    """Several records as one, in their order. Raises DataError where their labels are of different kinds, or only some are pairs."""
    first = found[0]
    if len(found) == 1:
        return first
    for other in found:
        if (other.pairs is None) != (first.pairs is None):
            raise DataError(
                f"{other.name} and {first.name} differ: one has pairs of texts. Name --text_column, and --text_pair_column."
            )
        if other.class_names != first.class_names:
            names = f"{other.class_names} and {first.class_names}"
            raise DataError(
                f"{other.name} and {first.name} differ in the names of their labels: {names}."
            )
    starts = [0, *accumulate(map(len, found))]
    kind, values, codes = _joined_labels(found)
    return replace(
        first,
        source=Placed(
            name,
            first.source.has_header,
            tuple((at, one.source.where, 0) for at, one in zip(starts, found, strict=False)),
        ),
        label_kind=kind,
        label_values=values,
        label_codes=codes,
        texts=pa.concat_arrays([one.texts for one in found]),
        pairs=None if first.pairs is None else pa.concat_arrays([one.pairs for one in found]),
        fingerprint=xxhash.xxh3_128_hexdigest(" ".join(one.fingerprint for one in found).encode()),
        bad=tuple(row for one in found for row in one.bad),
        guessed=tuple(told for one in found for told in one.guessed),
    )


def _joined_labels(
    found: Sequence[Records],
) -> tuple[LabelKind | None, list[LabelValue], Codes | None]:
    first = found[0]
    if first.label_codes is None:
        return None, [], None
    kind = first.label_kind
    seen: list[LabelValue] = []
    for one in found:
        kind = common_kind(kind, seen, one.label_kind, one.label_values, one.where(0))
        seen += one.label_values
    places: dict[LabelValue, int] = {}
    codes = []
    for one in found:
        assert one.label_codes is not None
        of_value = [
            places.setdefault(as_kind(kind, value), len(places)) for value in one.label_values
        ]
        codes.append(np.array(of_value, np.int32)[one.label_codes])
    return kind, list(places), np.concatenate(codes)


def common_kind(
    kind: LabelKind | None,
    values: Iterable[LabelValue],
    other: LabelKind | None,
    others: Iterable[LabelValue],
    where: str,
) -> LabelKind | None:
    """The kind of label that rows share with others, which begin at `where`: numbers take in whole numbers, and so do texts that are some.

    Raises DataError where they share none.
    """
    kinds = {kind, other}
    if len(kinds) == 1:
        return kind
    if kinds == {"integer", "number"}:
        return "number"
    if kinds == {"text", "integer"} and all(
        re.fullmatch(r"-?\d+", str(value)) for value in [*values, *others]
    ):
        return "text"
    raise DataError(
        f"{where}: the labels are of kind {other!r}, those before of kind {kind!r}; expected one kind in all rows."
    )


def as_kind(kind: LabelKind | None, value: LabelValue) -> LabelValue:
    """A label as one of a common kind."""
    if kind == "text":
        return str(value)
    return float(value) if kind == "number" and isinstance(value, int) else value
