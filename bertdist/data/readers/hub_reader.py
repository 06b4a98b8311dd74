"""Chunks of 1,000 rows of a Hub data set, or a folder for `datasets`, without downloading it first.

    HubReader("nyu-mll/glue", "sst2", "train").chunks(["sentence", "label"], state)

A state is {"shard", "at": row in the shard, "row": rows before it}; reading from it opens that
shard only. Parquet, which the Hub holds or converts to, is read here, from the right row group on,
with the retries of `remote`; shards of other kinds are read by `datasets` from their start, and
rows are dropped. `IterableDataset.state_dict` is not used: after a resume it differs at the same
row (datasets 5.2), and states of a run are compared. Its csv and json loaders change some texts
('NA' becomes None); as hf:// URLs in --train_file such files are read unchanged.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet
import xxhash

from bertdist.core.errors import DataError, did_you_mean
from bertdist.core.hub import explain_hub_error, offline_where_unreachable, probe_hub
from bertdist.data.readers.parquet_reader import decoded
from bertdist.data.readers.remote import file_fingerprint, import_fsspec, open_seekable
from bertdist.data.source import (
    Chunk,
    Column,
    ReaderState,
    chunk_of_columns,
    column_of,
    nested_names,
)

ROWS = 1000  # per chunk
_SAVED = ("dataset_dict.json", "state.json")  # in a folder of `save_to_disk`

Result = TypeVar("Result")


@dataclass
class HubReader:
    """One split, read front to back. `path`: Hub id or folder. Nothing is opened until needed."""

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # branch, tag or commit
    name: str = field(init=False)  # `nyu-mll/glue/sst2 split 'train'`
    has_header: bool = field(default=False, init=False)
    quoted_table: None = field(default=None, init=False)
    bytes: int | None = field(default=None, init=False)  # a split is one source for one rank

    def __post_init__(self) -> None:
        self.name = f"{self._title} split {self.split!r}"

    @cached_property
    def features(self) -> Any:
        """datasets.Features. Raises DataError."""
        opened = self._open()
        features = opened[self.split].features if isinstance(opened, dict) else opened.info.features
        return self._stream().features if features is None else features

    @cached_property
    def fingerprint(self) -> str:
        """Of the commit on the Hub; of the files in a folder. Raises DataError."""
        opened = self._open()
        if isinstance(opened, dict):
            parts = [file_fingerprint(file["filename"]) for file in opened[self.split].cache_files]
        else:
            parts = [str(opened.name), str(opened.config.name)]
            for file in self._files():
                is_local = Path(file).is_file()
                parts.append(file_fingerprint(file) if is_local else f"{opened.hash} {file}")
        return xxhash.xxh3_64_hexdigest(json.dumps([self.split, *parts]).encode())

    def column_names(self) -> list[str]:
        """In their order. Raises DataError."""
        return nested_names(self.features.arrow_schema)

    def chunks(self, columns: Sequence[str], state: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from `state` (None: the first row) to the last. Raises DataError."""
        state = state or {"shard": 0, "at": 0, "row": 0}
        at, row = state["at"], state["row"]
        for shard, read in enumerate(self._shards(list(columns))):
            if shard < state["shard"]:
                continue
            next_table = partial(next, _tables_of_equal_size(read(at)), None)
            while (table := _as_data_error(self.name, next_table)) is not None:
                arrays: dict[str, Column] = {name: column_of(table, name) for name in columns}
                start = {"shard": shard, "at": at, "row": row}
                yield chunk_of_columns(self.name, arrays, len(table), start)
                at, row = at + len(table), row + len(table)
            at = 0

    @property
    def _title(self) -> str:
        return "/".join(filter(None, (self.path, self.config)))

    def _open(self) -> Any:
        """datasets' builder, or splits of `save_to_disk`. Raises DataError without this split."""
        load = partial(_load, self.path, self.config, self.revision)
        opened = _as_data_error(self._title, load, self.path)
        if isinstance(opened, dict):
            names = list(opened)
        else:
            names = [str(name) for name in opened.info.splits or opened.config.data_files or ()]
        if names and self.split not in names:
            advice = did_you_mean(self.split, names)
            if "[" in self.split:
                advice = " A part of a split cannot be streamed."
            raise DataError(f"{self._title} has no split {self.split!r}.{advice}")
        return opened

    def _files(self) -> list[str]:
        """The URLs of the split's files, as far as the builder knows them."""
        return list((self._open().config.data_files or {}).get(self.split, ()))

    def _stream(self) -> Any:
        builder = self._open()
        stream = _as_data_error(self.name, lambda: builder.as_streaming_dataset(self.split))
        if stream.features is None:
            return _as_data_error(self.name, stream._resolve_features)
        return stream

    def _shards(self, columns: list[str]) -> list[Callable[[int], Iterator[pa.Table]]]:
        """Per shard what reads it from a row on; tables of any length."""
        opened, names = self._open(), self.features
        roots = [*dict.fromkeys(x if x in names else x.split(".")[0] for x in columns)]
        if isinstance(opened, dict):
            dataset = opened[self.split].select_columns(roots).with_format("arrow")
            return [partial(_read_memory, dataset)]
        if opened.name == "parquet" and (files := self._files()):
            return [partial(_read_parquet, file, columns) for file in files]
        stream = self._stream().select_columns(roots).with_format("arrow")
        shards = (stream.shard(stream.num_shards, shard) for shard in range(stream.num_shards))
        return [partial(_read_stream, shard) for shard in shards]


def _read_memory(dataset: Any, at: int) -> Iterator[pa.Table]:
    for begin in range(at, len(dataset), ROWS):
        yield dataset[begin : begin + ROWS]


def _read_parquet(path: str, columns: list[str], at: int) -> Iterator[pa.Table]:
    with open_seekable(path) as file:
        parquet = pa.parquet.ParquetFile(file)
        group, groups = 0, parquet.metadata.num_row_groups
        while group < groups and at >= (rows := parquet.metadata.row_group(group).num_rows):
            group, at = group + 1, at - rows
        remaining_groups = list(range(group, groups))
        batches = parquet.iter_batches(ROWS, remaining_groups, columns, use_threads=False)
        for table in decoded(path, batches):
            yield table.slice(at)
            at = max(0, at - len(table))


def _read_stream(stream: Any, at: int) -> Iterator[pa.Table]:
    for table in stream.iter(ROWS):
        yield table.slice(at)
        at = max(0, at - len(table))


def _tables_of_equal_size(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, 1,000 per table."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        while sum(map(len, pending)) >= ROWS:
            joined = pa.concat_tables(pending, promote_options="default")
            yield joined.slice(0, ROWS).combine_chunks()
            pending = [joined.slice(ROWS)]
    if any(map(len, pending)):
        yield pa.concat_tables(pending, promote_options="default").combine_chunks()


@lru_cache(maxsize=16)
def _load(path: str, config: str | None, revision: str | None) -> Any:
    """Loaded once per process and its forks."""
    probe_hub(path, "dataset")
    import_fsspec()  # which `datasets` uses: with the fork hooks
    import datasets  # lazy, here and below: 0.7 s, only hub data needs it

    if not any(Path(path, name).is_file() for name in _SAVED):
        with offline_where_unreachable():
            return datasets.load_dataset_builder(path, config, revision=revision)
    saved = datasets.load_from_disk(path)
    return dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}


def load_hub_splits(name: str, path: str, config: str | None) -> Any:
    """Name -> datasets.Dataset: the splits of a data set, downloaded. name: for messages.

    Raises DataError.
    """
    probe_hub(path, "dataset")
    import datasets

    if Path(path, "state.json").is_file():  # one Dataset, of save_to_disk
        return _as_data_error(name, lambda: _load(path, config, None), path)
    with offline_where_unreachable():
        return _as_data_error(name, lambda: datasets.load_dataset(path, config), path)


def _as_data_error(name: str, action: Callable[[], Result], path: str = "") -> Result:
    """The result of `action`; raises DataError for whatever the library and its readers raise."""
    try:
        return action()
    except DataError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
        problem = " ".join(str(error).split())
        if "scripts are no longer supported" in problem:
            raise DataError(
                f"{name} is made by a Python script, which `datasets` no longer runs; "
                "use a parquet copy of it."
            ) from None
        is_absent = "DatasetNotFoundError" in kinds or problem.startswith("Couldn't find")
        is_absent = is_absent or "gated dataset" in problem
        if is_absent or kinds & {"ConnectionError", "OfflineModeIsEnabled"}:
            reason = explain_hub_error(error, path or name, "dataset")
            raise DataError(
                f"{name} is neither a local folder nor a data set on the Hub. {reason} "
                "--train_file takes files."
            ) from None
        raise DataError(f"{name} cannot be read: {problem} (--train_file takes files)") from None
