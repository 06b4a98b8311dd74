"""A data set of the hub, or a folder that `datasets` reads -> its rows as a stream, without fetching it first.

In: name (or folder), configuration, split. Out: a DataSource, whose pieces are Arrow columns of at most 1,000 rows with a place to begin
again, or a DataError of one line. One module, because it is the only one that knows how `datasets` finds, streams, and complains.

A place is (shard, row in it): a reading that begins there opens that file only. Parquet, which is what the hub holds or converts to, is
then read here from the right row group on, with the retries of `remote`; of other kinds `datasets` reads that file from its start and
drops rows. `IterableDataset.state_dict` is not used: after a resume it says another thing at the same row (datasets 5.2), and states of
a run are compared. Its csv and json loaders change some texts ('NA' becomes nothing); by their hf:// addresses they are read as they are.
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
from bertdist.core.hub import explain_hub_error, probe_hub
from bertdist.data.readers.remote import file_fingerprint, open_seekable
from bertdist.data.source import Chunk, ReaderState, chunk_of_columns

ROWS = 1000  # of a piece

SAVED = ("dataset_dict.json", "state.json")  # in a folder of `save_to_disk`

Found = TypeVar("Found")


@dataclass
class HubReader:
    """One split, read front to back. `path` is a name on the hub or a folder; nothing is opened before something is asked for."""

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # branch, tag or commit
    name: str = field(init=False)  # `nyu-mll/glue/sst2 split 'train'`
    has_header: bool = field(default=False, init=False)
    bytes: int | None = field(default=None, init=False)  # a split is one source: it is not dealt

    def __post_init__(self) -> None:
        self.name = f"{self._title} split {self.split!r}"

    @cached_property
    def features(self) -> Any:
        """datasets.Features. Raises DataError."""
        found = self._open()
        features = found[self.split].features if isinstance(found, dict) else found.info.features
        return self._stream().features if features is None else features

    @cached_property
    def fingerprint(self) -> str:
        """Of the commit on the hub; of the files' sizes, heads and tails in a folder. Raises DataError."""
        found = self._open()
        if isinstance(found, dict):
            known = [file_fingerprint(file["filename"]) for file in found[self.split].cache_files]
        else:
            files = self._files()
            known = [str(found.name), str(found.config.name)]
            known += [
                file_fingerprint(file) if Path(file).is_file() else f"{found.hash} {file}"
                for file in files
            ]
        return xxhash.xxh3_64_hexdigest(json.dumps([self.split, *known]).encode())

    def column_names(self) -> list[str]:
        """Raises DataError."""
        return list(self.features)

    def chunks(self, wanted: Sequence[str], place: ReaderState | None = None) -> Iterator[Chunk]:
        """The rows from a place on, else from the first. Raises DataError."""
        first, at, row = (place["shard"], place["at"], place["row"]) if place else (0, 0, 0)
        for shard, read in enumerate(self._shards(list(wanted))):
            if shard < first:
                continue
            following = partial(next, _cut(read(at)), None)
            while (table := _told(self.name, following)) is not None:
                columns = {name: table.column(name) for name in wanted}
                state = {"shard": shard, "at": at, "row": row}
                yield chunk_of_columns(self.name, columns, len(table), state)
                at, row = at + len(table), row + len(table)
            at = 0

    @property
    def _title(self) -> str:
        return "/".join(filter(None, (self.path, self.config)))

    def _open(self) -> Any:
        """datasets' builder, or the splits of a folder of `save_to_disk`. Raises DataError where this split is not in it."""
        found = _told(self._title, lambda: _load(self.path, self.config, self.revision), self.path)
        splits = [
            str(name)
            for name in (
                found
                if isinstance(found, dict)
                else found.info.splits or found.config.data_files or ()
            )
        ]
        if splits and self.split not in splits:
            advice = (
                " A part of a split cannot be streamed."
                if "[" in self.split
                else did_you_mean(self.split, splits)
            )
            raise DataError(f"{self._title} has no split {self.split!r}.{advice}")
        return found

    def _files(self) -> list[str]:
        """The addresses of the split's files, as far as the builder tells."""
        return list((self._open().config.data_files or {}).get(self.split, ()))

    def _stream(self) -> Any:
        stream = _told(self.name, lambda: self._open().as_streaming_dataset(self.split))
        return _told(self.name, stream._resolve_features) if stream.features is None else stream

    def _shards(self, wanted: list[str]) -> list[Callable[[int], Iterator[pa.Table]]]:
        """For each shard what reads it from a row on; tables of any length."""
        found = self._open()
        if isinstance(found, dict):
            return [
                partial(_of_memory, found[self.split].select_columns(wanted).with_format("arrow"))
            ]
        if found.name == "parquet" and (files := self._files()):
            return [partial(_of_parquet, file, wanted) for file in files]
        stream = self._stream().select_columns(wanted).with_format("arrow")
        return [
            partial(_of_stream, stream.shard(stream.num_shards, shard))
            for shard in range(stream.num_shards)
        ]


def _of_memory(dataset: Any, at: int) -> Iterator[pa.Table]:
    for begin in range(at, len(dataset), ROWS):
        yield dataset[begin : begin + ROWS]


def _of_parquet(address: str, wanted: list[str], at: int) -> Iterator[pa.Table]:
    with open_seekable(address) as file:
        parquet = pa.parquet.ParquetFile(file)
        group, groups = 0, parquet.metadata.num_row_groups
        while group < groups and at >= (rows := parquet.metadata.row_group(group).num_rows):
            group, at = group + 1, at - rows
        for batch in parquet.iter_batches(
            ROWS, list(range(group, groups)), wanted, use_threads=False
        ):
            table = pa.Table.from_batches([batch])
            yield table.slice(at)
            at = max(0, at - len(table))


def _of_stream(stream: Any, at: int) -> Iterator[pa.Table]:
    for table in stream.iter(ROWS):
        yield table.slice(at)
        at = max(0, at - len(table))


def _cut(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, 1,000 a table, however they came."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= ROWS:
            whole = pa.concat_tables(held, promote_options="default")
            yield whole.slice(0, ROWS).combine_chunks()
            held = [whole.slice(ROWS)]
    if any(map(len, held)):
        yield pa.concat_tables(held, promote_options="default").combine_chunks()


@lru_cache(maxsize=16)
def _load(path: str, config: str | None, revision: str | None) -> Any:
    """Asked for once by a process and its forks."""
    probe_hub(path, "dataset")
    import datasets  # 0.7 s that files need not pay

    if any(Path(path, name).is_file() for name in SAVED):
        found = datasets.load_from_disk(path)
        return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
    return datasets.load_dataset_builder(path, config, revision=revision)


def load_hub_splits(name: str, path: str, config: str | None) -> Any:
    """The splits of a data set, fetched whole: a DatasetDict. name: for messages. Raises DataError."""
    probe_hub(path, "dataset")
    import datasets

    return _told(name, lambda: datasets.load_dataset(path, config), path)


def _told(name: str, action: Callable[[], Found], path: str = "") -> Found:
    """What `action` gives; raises DataError for what the library and its readers raise, a dozen kinds."""
    try:
        return action()
    except DataError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
        found = " ".join(str(error).split())
        if "scripts are no longer supported" in found:
            raise DataError(
                f"{name} is made by a Python script, which `datasets` no longer runs; use a parquet copy of it."
            ) from None
        gone = "DatasetNotFoundError" in kinds or found.startswith("Couldn't find")
        if gone or "gated dataset" in found or kinds & {"ConnectionError", "OfflineModeIsEnabled"}:
            told = explain_hub_error(error, path or name, "dataset")
            raise DataError(
                f"{name} is neither a folder here nor a data set that the hub gave. {told} --train_file takes files."
            ) from None
        raise DataError(f"{name} cannot be read: {found} (--train_file takes files)") from None
