"""What a config names -> `Records` or a `Stream`: local files, addresses of any kind, data sets of the hub, tasks of GLUE.

In: a DataConfig (training and scoring) or a path (prediction). Out: rows in memory, or rows that are read as they are needed. Which
columns are read, what counts as a label and what as missing is decided in `records` and `columns`, the same for all of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from accelerate import Accelerator

from bertdist.core.config import DataConfig, TrainConfig
from bertdist.core.errors import DataError, did_you_mean
from bertdist.core.terminal import print_to_stderr
from bertdist.data.batch import Step
from bertdist.data.columns import LabelValue
from bertdist.data.readers.file_reader import DataFile, FileReader, inspect_file, open_file
from bertdist.data.readers.hub_reader import HubReader, load_hub_splits
from bertdist.data.readers.remote import (
    compression_of,
    file_fingerprint,
    file_size,
    list_files,
    open_bytes,
    open_seekable,
    protocol_of,
)
from bertdist.data.records import Columns, Records, choose, join, read_records, records_of_piece
from bertdist.data.source import Column, Placed, RowSource, SkippedRows, Split, read_skipped_rows
from bertdist.data.stats import DatasetStats
from bertdist.data.streaming import Stream
from bertdist.distributed.collectives import raise_on_all_ranks

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


@overload
def load_records(data: DataConfig, split: Literal["train"]) -> Records: ...


@overload
def load_records(data: DataConfig, split: Literal["validation"]) -> Records | None: ...


def load_records(data: DataConfig, split: Literal["train", "validation"]) -> Records | None:
    """The rows to learn from or to score, in memory and with labels; None where there is nothing to score. Raises DataError."""
    patterns = (
        data.train_file
        if split == "train"
        else [data.validation_file]
        if data.validation_file
        else None
    )
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    if patterns:
        files: list[list[Records]] = []
        above: LabelValue | None = (
            None  # with "skip": the first label of all; rows whose label is of another kind are left out
        )
        for pattern in patterns:
            files.append([])
            for address in list_files(pattern):
                files[-1].append(_read_file(address, data, limit, above))
                above = files[0][0].label_values[0] if data.on_bad_row == "skip" else None
        whole = join([records for of in files for records in of], _name(patterns))
        parts = tuple(sum(map(len, of)) for of in files)
        if limit and len(whole) > limit:  # of the files only: each was read up to its own limit
            return replace(whole.some(0, limit), fingerprint=f"{whole.fingerprint}, {limit}")
        return replace(whole, parts=parts)
    if data.train_file and split == "validation":
        return None
    asked, found = _asked(data), _load_split(data, split)
    if found is None:
        return None
    name, dataset = found
    dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))

    def read_split(wanted: Sequence[str]) -> dict[str, Column]:
        table = dataset.with_format("arrow")[:]
        return {column: table.column(column) for column in wanted}

    return read_records(
        Split(name),
        dataset.column_names,
        read_split,
        asked,
        data.label_delimiter,
        dataset.features,
        data.on_bad_row,
    )


def open_stream(data: DataConfig, seed: int) -> Stream:
    """The rows to learn from, read as they are needed; with --on_bad_row skip the first ones are read here. Raises DataError."""
    if data.train_file:
        parts: list[list[RowSource]] = [
            [_rows(address, data) for address in list_files(pattern)] for pattern in data.train_file
        ]
        name = _name(data.train_file)
    else:
        name = data.dataset_name or "nyu-mll/glue"
        config = data.dataset_config_name or (None if data.dataset_name else data.task_name)
        parts, name = (
            [[HubReader(name, config, data.train_split)]],
            str(data.dataset_name or data.task_name),
        )
    first = parts[0][0]
    return Stream(
        name=name,
        parts=parts,
        asked=choose(first, first.column_names(), _asked(data)),
        label_delimiter=data.label_delimiter,
        window_rows=data.stream_window,
        seed=seed,
        weights=tuple(data.train_weights or ()),
        limit=data.max_train_samples,
        on_bad_row=data.on_bad_row,
        max_bad_rows=data.max_bad_rows,
        guessed=tuple(
            told
            for part in parts
            for source in part
            if isinstance(source, FileReader) and (told := source.file.describe())
        ),
    ).settled()


def _file(
    address: str,
    *,
    delimiter: str | None,
    quoting: str,
    encoding: str | None,
    column_names: list[str] | None,
) -> DataFile:
    """The file at an address, and how it is written. Raises DataError."""
    here = protocol_of(address) is None and compression_of(address) is None
    return inspect_file(
        address,
        delimiter=delimiter,
        quoting=quoting,
        encoding=encoding,
        column_names=column_names,
        open_bytes=None if here else partial(open_bytes, address, warn=print_to_stderr),
        open_seekable=None if here else partial(open_seekable, address, warn=print_to_stderr),
    )


def _labelled_file(address: str, data: DataConfig) -> DataFile:
    file = _file(
        address,
        delimiter=data.delimiter,
        quoting=data.quoting,
        encoding=data.encoding,
        column_names=data.column_names,
    )
    if file.kind == "txt":
        raise DataError(
            f"{address}: a .txt file has no labels; expected .csv, .tsv, .jsonl or .parquet."
        )
    return file


def _rows(address: str, data: DataConfig) -> FileReader:
    return FileReader(
        _labelled_file(address, data),
        fingerprint=file_fingerprint(address),
        size=file_size(address),
        on_bad_row=data.on_bad_row,
    )


def _read_file(
    address: str, data: DataConfig, limit: int | None, above: LabelValue | None
) -> Records:
    source = FileReader(_labelled_file(address, data), on_bad_row=data.on_bad_row)
    taken = choose(source, source.column_names(), _asked(data))
    piece = source.read(taken.names(), limit)
    records, bad = records_of_piece(
        source, piece, taken, data.label_delimiter, data.on_bad_row, above
    )
    if not len(records):
        raise DataError(
            f"{source.name} has no rows{', but for those that were left out' if bad else ''}."
        )
    place = Placed(source.name, source.has_header, ((0, records.where, 0),), form=source.file)
    return replace(
        records, source=place, bad=tuple(bad), guessed=tuple(filter(None, [source.file.describe()]))
    )


def _name(patterns: Sequence[str]) -> str:
    """Short, for messages."""
    return patterns[0].rsplit("/", 1)[-1] if len(patterns) == 1 else f"{len(patterns)} files"


def _asked(data: DataConfig) -> Columns:
    """The columns that flags name, or that a task of GLUE has. Raises DataError for an unknown task."""
    asked = Columns(data.text_column, data.text_pair_column, data.label_column, data.label_columns)
    if data.task_name is None or data.text_column is not None or data.train_file:
        return asked
    if data.task_name not in GLUE:
        raise DataError(
            f"--task_name {data.task_name!r} is no task of GLUE.{did_you_mean(data.task_name, GLUE)}"
        )
    text, pair = GLUE[data.task_name]
    return asked._replace(text=text, pair=asked.pair or pair)


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
    found = []
    for address in list_files(path):
        file = _file(
            address,
            delimiter=delimiter,
            quoting=quoting,
            encoding=encoding,
            column_names=column_names,
        )
        if file.kind == "txt" and text_pair_column is not None:
            raise DataError(
                f"{address}: a .txt file has one text a line, no pairs; expected .csv, .tsv, .jsonl or .parquet."
            )
        names, read = open_file(file)
        found.append(
            read_records(
                file,
                names,
                read,
                Columns("text" if file.kind == "txt" else text_column, text_pair_column, None, []),
            )
        )
    return join(found, _name([path]))


def _load_split(data: DataConfig, split: str) -> tuple[str, Any] | None:
    """(name in words, datasets.Dataset), or None where nothing names a split to score and there is no 'validation'."""
    path = (
        data.dataset_name or "nyu-mll/glue"
    )  # --task_name beside --dataset_name: another copy of GLUE, with the task's columns
    config = data.dataset_config_name or (None if data.dataset_name else data.task_name)
    name = "/".join(filter(None, (path, config)))
    splits = load_hub_splits(name, path, config)
    import datasets  # 0.7 s that local files need not pay

    wanted = data.train_split if split == "train" else data.validation_split
    if wanted is None:
        usual = "validation_matched" if data.task_name == "mnli" else "validation"
        return (f"{name} split {usual!r}", splits[usual]) if usual in splits else None
    try:
        found = (
            splits[wanted]
            if wanted in splits
            else datasets.load_dataset(path, config, split=wanted)
        )  # such as 'train[:90%]'
    except ValueError:
        raise DataError(f"{name} has no split {wanted!r}.{did_you_mean(wanted, splits)}") from None
    return f"{name} split {wanted!r}", found


def load_splits(config: TrainConfig) -> tuple[Records | Stream, Records | None]:
    """The rows to learn from and those to score, if any. Raises DataError."""
    rows = (
        open_stream(config.data, config.run.seed)
        if config.data.streaming
        else load_records(config.data, "train")
    )
    return rows, load_records(config.data, "validation")


def collect_skipped_rows(
    known: DatasetStats, dev_rows: Records | None, config: TrainConfig, accelerator: Accelerator
) -> SkippedRows:
    """The rows that were left out, by an earlier start too; rank 0 writes them down. Raises DataError where they are too many."""
    path = Path(config.run.output_dir) / "bad_rows.jsonl"
    found = SkippedRows(
        config.data.on_bad_row,
        config.data.max_bad_rows,
        path if accelerator.is_main_process else None,
    )
    if config.data.on_bad_row == "skip":
        found.add(read_skipped_rows(path))
    found.take([*known.bad, *(dev_rows.bad if dev_rows else ())])
    return found


def record_skipped_rows(found: SkippedRows, step: Step, accelerator: Accelerator) -> None:
    """Rows that a stream left out on the way to a step; all ranks know them, rank 0 writes. Raises DataError on all ranks."""
    if step.bad:
        with raise_on_all_ranks(accelerator):
            found.take(step.bad)
