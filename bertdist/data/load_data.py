"""Reads what the flags name (files, URLs, Hub data sets, GLUE tasks) as `Records` or a `Stream`.

`load_splits` is for training and evaluation, `load_texts` for prediction. Which columns are read,
and which labels are valid or missing, is decided in data/records.py and data/columns.py; which
rows of a training file are held out, in data/train_test_split.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from bertdist.core.config import DataConfig, FileConfig, TaskConfig, TrainConfig
from bertdist.core.errors import DataError, NoLabelsError, NoRowsError, did_you_mean
from bertdist.data.bad_rows import OnBadRow, suggest_skipping
from bertdist.data.columns import LabelRules
from bertdist.data.records import (
    ColumnNames,
    Records,
    check_slice_column,
    choose_columns,
    concat_records,
    describe_choice,
    records_from_chunk,
    reject_header,
    rows_fingerprint,
    short_notes,
)
from bertdist.data.source import Column, DataSource, chunk_of_columns, column_of, nested_names
from bertdist.tasks.labels import (
    REGRESSION,
    SINGLE_LABEL,
    LabelValue,
    describe_differing,
    is_number,
)

# Readers are imported by the functions that read: a run loads only those of its sources.
if TYPE_CHECKING:
    from bertdist.data.readers.file_reader import FileReader
    from bertdist.data.readers.folder_reader import FolderReader
    from bertdist.data.streaming import Stream
    from bertdist.data.train_test_split import Part

SAMPLE_ROWS = 1000  # whose values a message about missing columns may name

# Columns of the texts, https://huggingface.co/datasets/nyu-mll/glue
GLUE: dict[str, tuple[str, str | None]] = {
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


class Splits(NamedTuple):
    """The training rows, and the rows to score, if any."""

    train: "Records | Stream"
    validation: Records | None  # to evaluate on while training
    test: Records | None = None  # to evaluate once, at the end


def load_splits(config: TrainConfig) -> Splits:
    """The rows of a run, as --train_file, --validation_file, --validation_split and the like say.

    config: its data and task sections, and the seed, are read. Returns the training rows: Records,
    or a Stream with --streaming; and the validation and test rows, Records, or None where
    there are none. Raises DataError, with file and line, for a row, column or file that cannot be
    read.
    """
    data, seed = config.data, config.run.seed
    if not data.streaming:
        parts = load_parts(data, config.task, seed)
        train = parts["train"]
        test = parts.get("test") or load_test(data, config.task, train)
        return Splits(train, parts.get("validation"), test)
    numbers_only = needs_numbers(config.task)
    stream = open_stream(data, seed, numbers_only)
    if data.on_bad_row == "skip":
        numbers_only = needs_numbers(config.task, stream.head())

    def scored(part: Literal["validation", "test"], limit: int | None) -> Records | None:
        if stream.hold_out is not None and getattr(stream.hold_out, part):
            return read_part(stream, part, limit, numbers_only, data.slice_column)
        rows = load_records(data, part, numbers_only)
        return rows and _as_trained(rows, stream)

    return Splits(stream, scored("validation", data.max_eval_samples), scored("test", None))


def needs_numbers(task: TaskConfig, train_rows: Records | None = None) -> bool | None:
    """Whether labels must be numbers: as flags or training rows say. None: to be decided."""
    if task.label_names is not None or task.problem_type == SINGLE_LABEL:
        return False
    if task.problem_type == REGRESSION:
        return True
    if train_rows is None or train_rows.label_kind != "text":
        return None
    values = train_rows.label_stats().values
    is_open = train_rows.has_non_numeric_labels() or all(is_number(str(x)) for x in values)
    return None if is_open else False


def load_test(data: DataConfig, task: TaskConfig, train: Records) -> Records | None:
    """The rows of --test_file, if there are any, for training rows in memory. Raises DataError."""
    test = load_records(data, "test", needs_numbers(task, train))
    return test and _as_trained(test, train)


def _as_trained(rows: Records, train: "Records | Stream") -> Records:
    """Validation or test rows, with a line on columns of other names than those of training.

    Raises DataError if only one of the two splits has pairs of texts.
    """
    names = train.text_column, train.pair_column, _label_column(train)
    own = rows.text_column, rows.pair_column, rows.label_column
    if (names[1] is None) != (own[1] is None):
        pairs, texts = (rows, train) if names[1] is None else (train, rows)
        raise DataError(
            f"{pairs.name} has pairs of texts (columns {pairs.text_column!r} and "
            f"{pairs.pair_column!r}), and {texts.name} single ones (column {texts.text_column!r}): "
            "name the columns with --text_column and --text_pair_column."
        )
    others = [
        f"{mine!r} (training: {theirs!r})"
        for mine, theirs in zip(own, names, strict=True)
        if mine != theirs
    ]
    note = (f"{rows.name}: columns {', '.join(others)}",) if others else ()
    return replace(rows, format_notes=(*rows.format_notes, *note))


def _label_column(rows: "Records | Stream") -> str | None:
    return rows.label_column if isinstance(rows, Records) else rows.columns.label


def read_part(
    stream: "Stream",
    part: "Part",
    limit: int | None,
    numbers_only: bool | None = None,
    slice_column: str | None = None,
) -> Records:
    """The held-out rows of a stream, in memory; limit: of them the first. Raises DataError.

    Rows that cannot be read count with the training rows. numbers_only: see `LabelRules`; None:
    with on_bad_row "skip" decided by these labels.
    """
    from bertdist.data.train_test_split import copied_locations, no_rows_error, with_note

    assert stream.hold_out is not None
    rules = stream.rules._replace(numbers_only=numbers_only is True)
    reading = replace(stream, part=part, rules=rules, slice_column=slice_column)
    found: list[Records] = []
    number = 0
    for records in (records for x in stream.sources for _, records in reading.chunks(x)):
        if limit is not None:
            records = records.slice(0, min(len(records), limit - number))
        if len(records):
            found.append(replace(records, location=copied_locations(records)))
            number += len(records)
        if number == limit:
            break
    if not found:
        raise no_rows_error(stream.name, part, stream.hold_out)
    rows = concat_records(found, stream.name)
    if numbers_only is None and stream.on_bad_row == "skip" and rows.has_non_numeric_labels():
        return read_part(stream, part, limit, True, slice_column)
    rows = replace(
        rows, fingerprint=rows_fingerprint(rows), limit=limit if number == limit else None
    )
    return with_note(rows, part, stream.hold_out, "held out of")


def load_parts(data: DataConfig, task: TaskConfig, seed: int) -> dict[str, Records]:
    """The rows in memory: "train", and "validation" and "test" where there are such rows.

    seed: of --validation_split and --test_split. Raises DataError.
    """
    numbers_only = needs_numbers(task)
    if data.validation_split is not None or data.test_split is not None:
        from bertdist.data.train_test_split import divide, hold_out_of

        if hold_out := hold_out_of(data, seed):
            every_row = replace(data, max_train_samples=None)
            rows = load_records(every_row, "train", numbers_only, scored=True)
            return divide(rows, hold_out, data)
    parts = {"train": load_records(data, "train", numbers_only)}
    if data.on_bad_row == "skip":
        numbers_only = needs_numbers(task, parts["train"])
    if (validation := load_records(data, "validation", numbers_only)) is not None:
        parts["validation"] = _as_trained(validation, parts["train"])
    if not data.train_file and (test := load_records(data, "test", numbers_only)) is not None:
        parts["test"] = _as_trained(test, parts["train"])
    return parts


@overload
def load_records(
    data: DataConfig,
    split: Literal["train"],
    numbers_only: bool | None = None,
    scored: bool = False,
) -> Records: ...


@overload
def load_records(
    data: DataConfig, split: Literal["validation", "test"], numbers_only: bool | None = None
) -> Records | None: ...


def load_records(
    data: DataConfig,
    split: Literal["train", "validation", "test"],
    numbers_only: bool | None = None,
    scored: bool = False,
) -> Records | None:
    """A split in memory, with labels; None without a validation split. Raises DataError.

    Whole files: `load_parts` divides them (--validation_split 0.1). scored: whether some of the
    training rows are evaluated, and --slice_column is read.
    numbers_only: see `LabelRules`; None: decided by the labels of the split.
    """
    if split == "train":
        patterns, limit = data.train_file or [], data.max_train_samples
        data = data if scored else replace(data, slice_column=None)
    else:
        is_test = split == "test"
        file = data.test_file if is_test else data.validation_file
        patterns, limit = [file] if file else [], None if is_test else data.max_eval_samples
        if not patterns and (data.train_file or (is_test and data.test_split is None)):
            return None

    def read(rules: LabelRules) -> Records | None:
        with suggest_skipping():
            if patterns:
                return _load_files(patterns, data, limit, rules)
            return _load_hub_split(data, split, limit, rules)

    rules = LabelRules(numbers_only=numbers_only is True)
    if (records := read(rules)) is None:
        return None
    if data.on_bad_row == "skip" and numbers_only is None and records.has_non_numeric_labels():
        return read(rules._replace(numbers_only=True))
    if {0, None} <= records.indicator_values:
        return read(rules._replace(empty="error"))
    return records


def check_files(paths: Sequence[str], data: DataConfig) -> None:
    """Raise DataError for what `load_records` finds wrong before it reads rows: a missing file, its
    format, its columns.
    """
    for path in paths:
        for reader in open_files(path, data, data.on_bad_row):
            _check_has_labels(reader)
            columns_of(reader, _requested(data))
            check_slice_column(reader.name, reader.column_names(), data.slice_column)


def _load_files(
    patterns: Sequence[str], data: DataConfig, limit: int | None, rules: LabelRules
) -> Records:
    by_pattern: list[list[Records]] = []
    # With "skip": the first label of the split; rows whose label is of another kind are skipped.
    first_label: LabelValue | None = None
    requested = _requested(data)
    for pattern in patterns:
        by_pattern.append([])
        for reader in open_files(pattern, data, data.on_bad_row):
            _check_has_labels(reader)
            limits = limit, data.max_bad_rows
            options = data.label_delimiter, *limits, first_label, rules
            records = _read_file(reader, requested, *options, slice_column=data.slice_column)
            by_pattern[-1].append(records)
            # The columns of the first file are those of all, as in a stream.
            texts = records.text_columns
            texts_or_one = texts[0] if len(texts) == 1 else texts
            columns = texts_or_one, records.pair_column, records.label_column
            requested = ColumnNames(*columns, data.label_columns)
            if data.on_bad_row == "skip":
                first_label = by_pattern[0][0].label_values[0]
    files = [records for of_pattern in by_pattern for records in of_pattern]
    records = concat_records(files, _short_name(patterns))
    if limit and len(records) > limit:  # of several files, each was read up to the limit
        fingerprint = f"{records.fingerprint}, {limit}"
        return replace(records.slice(0, limit), fingerprint=fingerprint, limit=limit)
    if limit == len(records):  # the file may have more
        records = replace(records, limit=limit)
    rows_per_file = tuple(sum(map(len, of_pattern)) for of_pattern in by_pattern)
    differing = describe_differing([(file.name, file.label_values) for file in files])
    notes = (*records.format_notes, *filter(None, [differing]))
    return replace(records, rows_per_file=rows_per_file, format_notes=notes)


def _read_file(
    reader: "FileReader | FolderReader",
    requested: ColumnNames,
    label_delimiter: str | None = None,
    limit: int | None = None,
    max_bad_rows: int = 0,
    first_label: LabelValue | None = None,
    rules: LabelRules = LabelRules(),  # noqa: B008  immutable
    known_labels: Sequence[str] = (),
    slice_column: str | None = None,
) -> Records:
    columns = columns_of(reader, requested)
    check_slice_column(reader.name, reader.column_names(), slice_column)

    def read(num_rows: int | None) -> Records:
        return records_from_chunk(
            reader.name,
            reader.read(columns.names_and(slice_column), num_rows),
            columns,
            features=reader.features,
            has_header=reader.has_header,
            label_delimiter=label_delimiter,
            on_bad_row="skip" if reader.skip else "fail",
            first_label=first_label,
            rules=rules,
            table=reader.quoted_table,
            known_labels=known_labels,
            slice_column=slice_column,
        )

    records = _read_valid(read, limit, max_bad_rows)
    reject_header(records)
    choice = describe_choice(reader.column_names(), requested, columns)
    notes = tuple(filter(None, [reader.note, choice]))
    one_file = reader.file is not None  # else a folder: a file per row
    return replace(_not_empty(records), file=reader.file, one_file=one_file, format_notes=notes)


def columns_of(reader: "FileReader | FolderReader", requested: ColumnNames) -> ColumnNames:
    """The columns to read of a file. Raises DataError; NoRowsError where it is empty."""
    names = reader.column_names()

    def sample() -> Mapping[str, Column]:
        from bertdist.data.readers.remote import STDIN

        is_stdin = reader.file is not None and reader.file.path == STDIN
        return {} if is_stdin else reader.read(names, SAMPLE_ROWS).columns

    try:
        return choose_columns(reader.name, names, requested, reader.has_header, sample)
    except NoRowsError:
        raise
    except DataError as error:
        file = reader.file
        says_nothing = file is not None and file.kind == "json" and reader.note == file.note
        how = f" {reader.note}." if reader.note and not says_nothing else ""
        raise type(error)(f"{error}{how}") from None


def _read_valid(
    read: Callable[[int | None], Records], limit: int | None, max_bad_rows: int
) -> Records:
    """The first `limit` valid rows: read(number of rows) with more rows for those skipped."""
    records, num_rows, before = read(limit), limit, -1
    while num_rows is not None and limit is not None:
        missing, skipped = limit - len(records), len(records.bad_rows)
        is_all = before == len(records) + skipped
        if not missing or not skipped or skipped > max_bad_rows or is_all:
            break
        num_rows, before = num_rows + missing, len(records) + skipped
        records = read(num_rows)
    return records


def _not_empty(records: Records) -> Records:
    if not len(records):
        skipped = " except skipped ones" if records.bad_rows else ""
        raise DataError(f"{records.name} has no rows{skipped}.")
    return records


def _load_hub_split(
    data: DataConfig, split: str, limit: int | None, rules: LabelRules
) -> Records | None:
    requested = _requested(data)
    dataset, name = find_hub_split(data, split)
    if dataset is None:
        return None
    if not len(dataset):
        raise DataError(f"{name} has no rows.")
    column_names = nested_names(dataset.features.arrow_schema)

    def first_rows(num_rows: int, names: Sequence[str]) -> dict[str, Column]:
        table = dataset.select(range(num_rows)).with_format("arrow")[:]
        return {name: column_of(table, name) for name in names}

    def sample() -> dict[str, Column]:
        return first_rows(min(SAMPLE_ROWS, len(dataset)), column_names)

    columns = choose_columns(name, column_names, requested, sample=sample)
    check_slice_column(name, column_names, data.slice_column)
    names = columns.names_and(data.slice_column)

    def read(num_rows: int | None) -> Records:
        rows = min(num_rows or len(dataset), len(dataset))
        return records_from_chunk(
            name,
            chunk_of_columns(name, first_rows(rows, names), rows, {"row": 0}),
            columns,
            slice_column=data.slice_column,
            label_delimiter=data.label_delimiter,
            features=dataset.features,
            on_bad_row=data.on_bad_row,
            rules=rules,
        )

    records = _read_valid(read, limit, data.max_bad_rows)
    is_limited = len(records) + len(records.bad_rows) < len(dataset)
    choice = describe_choice(column_names, requested, columns)
    notes = tuple(filter(None, [choice]))
    limit = limit if is_limited else None
    return replace(_not_empty(records), limit=limit, format_notes=notes)


def find_hub_split(data: DataConfig, split: str) -> tuple[Any, str]:
    """A datasets.Dataset and its name; None without --validation_split and a 'validation' split."""
    from bertdist.data.readers.hub_reader import load_hub_splits

    path, config = _hub_path(data)
    name = "/".join(filter(None, (path, config)))
    splits = load_hub_splits(name, path, config)
    import datasets  # 0.7 s, not needed for local files

    splits_of = {"train": data.train_split, "test": data.test_split}
    requested = splits_of.get(split, data.validation_split)
    if requested is None:
        usual = "validation_matched" if data.task_name == "mnli" else "validation"
        return splits.get(usual), f"{name} split {usual!r}"
    split_name = f"{name} split {requested!r}"
    try:
        if requested in splits:
            return splits[requested], split_name
        # Such as 'train[:90%]'.
        return datasets.load_dataset(path, config, split=requested), split_name
    except ValueError:
        advice = did_you_mean(requested, splits)
        raise DataError(f"{name} has no split {requested!r}.{advice}") from None


def _hub_path(data: DataConfig) -> tuple[str, str | None]:
    """Path and configuration. --task_name with --dataset_name: another copy of GLUE."""
    path = data.dataset_name or "nyu-mll/glue"
    return path, data.dataset_config_name or (None if data.dataset_name else data.task_name)


def open_stream(data: DataConfig, seed: int, numbers_only: bool | None = None) -> "Stream":
    """The training rows, read as they are needed. Raises DataError.

    With --on_bad_row skip or --label_columns, reads the first rows. numbers_only: see `LabelRules`;
    None: `collect_stats` decides.
    """
    from bertdist.data.streaming import Stream
    from bertdist.data.train_test_split import hold_out_of

    groups: list[list[DataSource]]
    notes: list[str | None] = []
    requested = _requested(data)
    if data.train_file:
        readers = [
            [*open_files(file, data, data.on_bad_row, streamed=True)] for file in data.train_file
        ]
        for reader in (reader for group in readers for reader in group):
            _check_has_labels(reader)
            notes.append(reader.note)
        groups = [[*group] for group in readers]
        name = _short_name(data.train_file)
        columns = columns_of(readers[0][0], requested)
    else:
        from bertdist.data.readers.hub_reader import HubReader

        source = HubReader(*_hub_path(data), data.train_split)
        groups = [[source]]
        name = str(data.dataset_name or data.task_name)
        columns = choose_columns(source.name, source.column_names(), requested)
    notes.append(describe_choice(groups[0][0].column_names(), requested, columns))
    return Stream(
        name=name,
        source_groups=groups,
        columns=columns,
        label_delimiter=data.label_delimiter,
        window_rows=data.stream_window,
        seed=seed,
        source_weights=tuple(data.train_weights or ()),
        limit=data.max_train_samples,
        on_bad_row=data.on_bad_row,
        max_bad_rows=data.max_bad_rows,
        rules=LabelRules(numbers_only=numbers_only is True),
        format_notes=short_notes([note for note in notes if note]),
        hold_out=hold_out_of(data, seed),
    ).with_first_rows()


def open_files(
    pattern: str,
    flags: FileConfig,
    on_bad_row: OnBadRow = "fail",
    streamed: bool = False,
    trained: Sequence[str] = (),
) -> "Iterator[FileReader | FolderReader]":
    """A reader for each file that a path, glob or URL names, or of a folder. Raises DataError.

    trained: the text columns of a training, which a header may have.
    """
    if Path(pattern).is_dir():
        from bertdist.data.readers.folder_reader import FolderReader

        yield FolderReader(pattern, flags, on_bad_row)
        return
    from bertdist.data.readers.file_reader import FileReader, inspect_file
    from bertdist.data.readers.remote import file_fingerprint, file_size, list_files

    for address in list_files(pattern):
        file = inspect_file(address, flags, trained=trained)
        fingerprint = file_fingerprint(address) if streamed else None
        size = file_size(address) if streamed else None
        yield FileReader(file, fingerprint=fingerprint, size=size, on_bad_row=on_bad_row)


def _check_has_labels(reader: "FileReader | FolderReader") -> None:
    if reader.kind == "txt":
        raise NoLabelsError(
            f"{reader.name} is read as one text per line, without labels; for a table pass "
            "--delimiter or --column_names, for a folder per label the path of the folder."
        )


def load_texts(
    path: str, flags: FileConfig, trained: ColumnNames, labels: Sequence[str] = ()
) -> Records:
    """The rows of a file without labels, for prediction. Raises DataError.

    trained: the columns of the training, for those that no flag names; labels: its labels. A .txt
    file has one text per line, blank lines included.
    """
    files = [
        _read_file(reader, requested, known_labels=labels)
        for reader, requested in open_text_files(path, flags, trained)
    ]
    return concat_records(files, _short_name([path]))


def open_text_files(
    path: str, flags: FileConfig, trained: ColumnNames
) -> "Iterator[tuple[FileReader | FolderReader, ColumnNames]]":
    """The readers of `load_texts`, and the columns requested of each. Raises DataError."""
    texts = trained._replace(text=_as_name(flags.text_column) or trained.text).texts
    for reader in open_files(path, flags, trained=texts):
        yield reader, _requested_texts(reader, flags, trained)


def _requested_texts(
    reader: "FileReader | FolderReader", flags: FileConfig, trained: ColumnNames
) -> ColumnNames:
    text, pair = _as_name(flags.text_column), flags.text_pair_column
    requested = ColumnNames(text or trained.text, pair or trained.pair, None, [])
    if reader.kind not in ("txt", "folder"):
        return requested
    how = f"{reader.name} is read as one text per {'line' if reader.file else 'file'}"
    table = "for a table pass its path, and --delimiter or --column_names"
    if requested.pair is not None:
        raise DataError(f"{how}, no pairs; {table}.")
    if text not in (None, "text"):
        raise DataError(f"{how}, so --text_column cannot take effect; remove it; {table}.")
    return requested._replace(text="text")


def _as_name(names: list[str] | None) -> str | tuple[str, ...] | None:
    """The text column of `ColumnNames`."""
    return names[0] if names and len(names) == 1 else tuple(names) if names else None


def _short_name(patterns: Sequence[str]) -> str:
    return patterns[0].rsplit("/", 1)[-1] if len(patterns) == 1 else f"{len(patterns)} files"


def _requested(data: DataConfig) -> ColumnNames:
    """The columns named by flags, or those of a GLUE task. Raises DataError for an unknown task."""
    labels = data.label_column, data.label_columns
    requested = ColumnNames(_as_name(data.text_column), data.text_pair_column, *labels)
    if data.task_name is None or data.text_column is not None or data.train_file:
        return requested
    if data.task_name not in GLUE:
        advice = did_you_mean(data.task_name, GLUE)
        raise DataError(f"--task_name {data.task_name!r} is not a GLUE task.{advice}")
    text, pair = GLUE[data.task_name]
    return requested._replace(text=text, pair=requested.pair or pair)
