"""Any source of rows -> `Records`: texts, pairs and labels in Arrow memory, with random access by row.

In: a DataConfig (training and scoring) or a path (prediction). Out: Records, whose texts are exactly those of the source, whose labels
are raw values (`bertdist.tasks` decides what they mean), and whose every complaint names a file and a line.
One module, because which columns are read, what counts as a label and what counts as missing must be the same for every kind of source.

1,000,000 labelled rows (85 MB of text), processor seconds: tsv 0.5, csv with quotes 0.8, parquet 0.2, jsonl 3.5; `records[row]` costs
3 microseconds, `lengths()` 2 milliseconds.
Each rank holds the columns it reads once (text bytes + 12 bytes a row); forked loader workers share that memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from bertdist.arrow_files import Column, Reader, find_file, open_file
from bertdist.columns import Codes, LabelKind, LabelValue, read_label_columns, read_labels, read_texts, whole
from bertdist.config import DataConfig
from bertdist.errors import DataError, did_you_mean

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question", "premise", "review", "tweet", "content")
LABEL_COLUMNS = ("label", "labels", "score", "target", "class")
PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "question2"),
    ("premise", "hypothesis"),
)
GLUE: dict[str, tuple[str, str | None]] = {  # https://huggingface.co/datasets/nyu-mll/glue
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


class Record(NamedTuple):
    """One row: its number in the source (from 0), its text or texts, and its label as the source has it."""

    row: int
    text: str
    pair: str | None
    label: LabelValue | None


class Source(Protocol):
    """Where rows come from, in words."""

    @property
    def name(self) -> str: ...
    @property
    def has_header(self) -> bool: ...
    def where(self, row: int) -> str: ...


@dataclass(frozen=True)
class Split:
    """A split of a data set of the hub."""

    name: str
    has_header: bool = False

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"


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


class Columns(NamedTuple):
    """Which columns to read: as asked for, and then as found."""

    text: str | None
    pair: str | None
    label: str | None
    labels: list[str] | None


@overload
def open_source(data: DataConfig, split: Literal["train"]) -> Records: ...
@overload
def open_source(data: DataConfig, split: Literal["validation"]) -> Records | None: ...
def open_source(data: DataConfig, split: Literal["train", "validation"]) -> Records | None:
    """The rows to learn from or to score, with labels; None where there is nothing to score. Raises DataError."""
    path, rows = (data.train_file, data.max_train_samples) if split == "train" else (data.validation_file, data.max_eval_samples)
    asked = Columns(data.text_column, data.text_pair_column, data.label_column, data.label_columns)
    if path is not None:
        file = find_file(path, delimiter=data.delimiter, quoting=data.quoting, encoding=data.encoding, column_names=data.column_names)
        if file.kind == "txt":
            raise DataError(f"{path}: a .txt file has no labels; expected .csv, .tsv, .jsonl or .parquet.")
        names, read = open_file(file, rows)
        return _read_records(file, names, read, asked, data.label_delimiter)
    if data.train_file is not None and split == "validation":
        return None
    if data.task_name is not None and data.text_column is None:
        if data.task_name not in GLUE:
            raise DataError(f"--task_name {data.task_name!r} is no task of GLUE.{did_you_mean(data.task_name, GLUE)}")
        text, pair = GLUE[data.task_name]
        asked = asked._replace(text=text, pair=asked.pair or pair)
    found = _load_split(data, split)
    if found is None:
        return None
    name, dataset = found
    dataset = dataset.select(range(min(rows or len(dataset), len(dataset))))

    def read_split(wanted: Sequence[str]) -> dict[str, Column]:
        table = dataset.with_format("arrow")[:]
        return {column: table.column(column) for column in wanted}

    return _read_records(Split(name), dataset.column_names, read_split, asked, data.label_delimiter, dataset.features)


def open_texts(
    path: str,
    *,
    text_column: str | None,
    text_pair_column: str | None,
    column_names: list[str] | None,
    delimiter: str | None,
    quoting: str,
    encoding: str | None,
) -> Records:
    """The rows of a file without labels, for prediction; a .txt file has one text a line, blank lines too. Raises DataError."""
    file = find_file(path, delimiter=delimiter, quoting=quoting, encoding=encoding, column_names=column_names)
    if file.kind == "txt" and text_pair_column is not None:
        raise DataError(f"{path}: a .txt file has one text a line, expected pairs of texts; expected .csv, .tsv, .jsonl or .parquet.")
    names, read = open_file(file)
    return _read_records(file, names, read, Columns("text" if file.kind == "txt" else text_column, text_pair_column, None, []))


def records_of(texts: Sequence[str], pairs: Sequence[str] | None = None) -> Records:
    """Texts that are in memory already, without labels; raises DataError for what is not text."""
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"There are {len(texts)} texts and {len(pairs)} second texts; they go together.")
    names = ["text"] if pairs is None else ["text", "pair"]
    given: dict[str, Column] = {"text": list(texts), "pair": list(pairs or ())}
    return _read_records(
        Split("texts"),
        names,
        lambda wanted: {name: given[name] for name in wanted},
        Columns("text", None if pairs is None else "pair", None, []),
    )


def _load_split(data: DataConfig, split: str) -> tuple[str, Any] | None:
    """(name in words, datasets.Dataset), or None where nothing names a split to score and there is no 'validation'."""
    import datasets  # 0.7 s that local files need not pay

    path = data.dataset_name or "nyu-mll/glue"  # --task_name beside --dataset_name: another copy of GLUE, with the task's columns
    config = data.dataset_config_name or (None if data.dataset_name else data.task_name)
    name = "/".join(filter(None, (path, config)))
    try:
        splits = datasets.load_dataset(path, config)
    except (ConnectionError, FileNotFoundError):
        raise DataError(f"{name}: the hub could not be reached or does not know this data set; --train_file takes local files.") from None
    except Exception as error:  # the library raises a dozen kinds, of its own and of its readers
        raise DataError(f"{name} cannot be loaded: {' '.join(str(error).split())} (--train_file takes local files)") from None
    wanted = data.train_split if split == "train" else data.validation_split
    if wanted is None:
        usual = "validation_matched" if data.task_name == "mnli" else "validation"
        return (f"{name} split {usual!r}", splits[usual]) if usual in splits else None
    try:
        found = splits[wanted] if wanted in splits else datasets.load_dataset(path, config, split=wanted)  # such as 'train[:90%]'
    except ValueError:
        raise DataError(f"{name} has no split {wanted!r}.{did_you_mean(wanted, splits)}") from None
    return f"{name} split {wanted!r}", found


def _choose(source: Source, names: Sequence[str], asked: Columns) -> Columns:
    """The columns to read: those asked for, else the usual names, else DataError."""
    for name in filter(None, (asked.text, asked.pair, asked.label, *(asked.labels or ()))):
        if name not in names:
            raise _no_column(source, names, f"there is no column {name!r}", did_you_mean(name, names))
    plain = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    text, pair, label, labels = asked
    if text is None and pair is None and "text" not in plain:
        text, pair = next(((plain[a], plain[b]) for a, b in PAIRS if a in plain and b in plain), (None, None))
    text = text or next((plain[name] for name in TEXT_COLUMNS if name in plain and plain[name] != pair), None)
    if text is None:
        raise _no_column(source, names, "no column has a usual name for the text", " Pass --text_column.")
    if labels is None:
        label = label or next((plain[name] for name in LABEL_COLUMNS if name in plain and plain[name] not in (text, pair)), None)
        if label is None:
            raise _no_column(source, names, "no column has a usual name for the label", " Pass --label_column.")
    return Columns(text, pair, label, labels)


def _no_column(source: Source, names: Sequence[str], problem: str, advice: str) -> DataError:
    found = ", ".join(repr(name if len(name) <= 30 else f"{name[:30]}...") for name in names[:20])
    advice = "" if advice.startswith(" Known") else advice  # the columns are told already
    if source.has_header and any(len(name) > 30 or name.replace(".", "", 1).isdecimal() for name in names):
        advice += " This looks like a row of data: if the file has no header, name its columns with --column_names."
    return DataError(f"{source.name}{' line 1' * source.has_header}: {problem}; the columns are {found}.{advice}")


def _read_records(
    source: Source, names: Sequence[str], read: Reader, asked: Columns, label_delimiter: str | None = None, features: Any = None
) -> Records:
    taken = _choose(source, names, asked)
    assert taken.text is not None
    wanted = [taken.text, taken.pair, taken.label, *(taken.labels or ())]
    columns = {name: whole(column) for name, column in read([name for name in dict.fromkeys(wanted) if name is not None]).items()}
    if not len(columns[taken.text]):
        raise DataError(f"{source.name} has no rows.")
    texts = read_texts(columns[taken.text], taken.text, source.where)
    pairs = None if taken.pair is None else read_texts(columns[taken.pair], taken.pair, source.where)
    kind: LabelKind | None = None
    values: list[LabelValue] = []
    codes, class_names = None, None
    if taken.labels:
        kind, class_names = "set", tuple(taken.labels)
        values, codes = read_label_columns({name: columns[name] for name in taken.labels}, source.where)
    elif taken.label is not None:
        feature = (features or {}).get(taken.label)
        fixed = getattr(getattr(feature, "feature", feature), "names", None)  # ClassLabel, List(ClassLabel)
        class_names = None if fixed is None else tuple(fixed)
        kind, values, codes = read_labels(columns[taken.label], taken.label, source.where, label_delimiter, class_names)
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


def _offsets(texts: pa.Array) -> npt.NDArray[np.int64]:
    """(rows + 1,) bytes before each text in the array's buffer of characters."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _fingerprint(texts: pa.Array, pairs: pa.Array | None, values: list[LabelValue], codes: Codes | None) -> str:
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
