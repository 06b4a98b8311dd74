"""A first pass over a stream, for what must be known before the first step: its labels, and how many rows it has.

In: a Stream. Out: a Survey, the same on all ranks, each of which reads some of the files. It is kept in the run's folder, so that going
on costs nothing; --label_names and --max_train_steps make it needless. A stop is answered within half a second, and leaves nothing.

What must be known of the training rows before the first step: their labels, and how many there are.

Of rows in memory that is at hand. A stream is read once for it (`survey`), unless flags tell it: what for is said.
"""

import hashlib
import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.core.atomic_io import atomic_write
from bertdist.core.config import TaskConfig, TrainConfig
from bertdist.core.errors import BertdistError, DataError
from bertdist.data.batch import Step
from bertdist.data.columns import LabelKind, LabelValue
from bertdist.data.records import Records, as_kind, common_kind
from bertdist.data.source import SkippedRow, SkippedRows, checked
from bertdist.data.streaming import Agree, Stream
from bertdist.distributed.collectives import (
    all_reduce_sum,
    broadcast_from_rank0,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.preemption import StopSignal
from bertdist.tasks.tasks import Task, infer_task

SECONDS_BETWEEN = (
    0.5  # of reading, until the ranks ask each other whether to go on; a piece takes some 10 ms
)

END = object()


@dataclass
class StreamScan:
    """What one pass over some rows has found."""

    rows: dict[int, int] = field(default_factory=dict)  # number of the source -> its rows
    kind: LabelKind | None = None
    labels: dict[LabelValue, int] = field(default_factory=dict)  # label -> rows
    bad: list[SkippedRow] = field(default_factory=list)  # rows that were left out

    def add(self, source: int, found: Records) -> None:
        """Count some rows of a source. Raises DataError where their labels are of another kind than those before."""
        assert found.label_codes is not None
        counts = np.bincount(found.label_codes, minlength=len(found.label_values)).tolist()
        self._merge(
            found.label_kind, dict(zip(found.label_values, counts, strict=True)), found.where(0)
        )
        self.rows[source] = self.rows.get(source, 0) + len(found)

    def join(self, other: "StreamScan") -> None:
        """Add what another rank has found."""
        if other.kind is not None:
            self._merge(other.kind, other.labels, "another file")
        self.rows |= other.rows
        self.bad += other.bad

    def _merge(self, kind: LabelKind | None, labels: dict[LabelValue, int], where: str) -> None:
        common = (
            kind if self.kind is None else common_kind(self.kind, self.labels, kind, labels, where)
        )
        held: dict[LabelValue, int] = {}
        if common == self.kind:
            held, self.labels = self.labels, {}
        for value, count in [*self.labels.items(), *labels.items()]:
            value = as_kind(common, value)
            held[value] = held.get(value, 0) + count
        self.kind, self.labels = common, held


def survey(
    stream: Stream, accelerator: Accelerator, kept: Path, stop: StopSignal | None = None
) -> StreamScan | None:
    """Of the whole stream: what an earlier start has kept, else by reading; None on all ranks where `stop` was asked for meanwhile.

    A collective. Raises DataError on all ranks.
    """
    known, fingerprint = None, ""
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            fingerprint = stream.fingerprint
            known = _read(kept, fingerprint)
    known = broadcast_from_rank0(accelerator, known)
    if known is not None:
        return known
    mine = StreamScan()
    with raise_on_all_ranks(accelerator):
        if not _read_on(
            _pieces(stream, mine, accelerator.process_index, accelerator.num_processes),
            accelerator,
            stop,
        ):
            return None
    whole = StreamScan()
    with_all: list[StreamScan] = [mine] if accelerator.num_processes == 1 else gather_object([mine])
    with raise_on_all_ranks(accelerator):
        for found in with_all:
            whole.join(found)
        if not sum(whole.rows.values()):
            raise DataError(f"{stream.name} has no rows.")
        if accelerator.is_main_process:
            text = {
                "fingerprint": fingerprint,
                **asdict(whole),
                "labels": list(whole.labels.items()),
            }
            atomic_write(kept, json.dumps(text, indent=1).encode())
    return whole


def _pieces(stream: Stream, mine: StreamScan, rank: int, ranks: int) -> Iterator[None]:
    """Read this rank's share, a piece at a time."""
    skipped_rows = SkippedRows(stream.on_bad_row, stream.max_bad_rows)
    if stream.limit is not None:
        for window in stream.windows() if rank == 0 else ():
            skipped_rows.add(window.bad)
            if len(window.records):
                mine.add(0, window.records)
            yield
    else:
        for number, source in enumerate(stream.sources[rank::ranks]):
            mine.rows[rank + number * ranks] = 0
            for _, records, bad in stream.records(source):
                skipped_rows.add(bad)
                if len(records):
                    mine.add(rank + number * ranks, records)
                yield
    mine.bad = skipped_rows.rows


def _read_on(pieces: Iterator[None], accelerator: Accelerator, stop: StopSignal | None) -> bool:
    """Whether all ranks came to their end; the ranks ask each other every half second. Raises the error of this rank's reading, if any."""
    group, going = host_group(accelerator), True
    error: BertdistError | None = None

    def asked() -> bool:
        return stop is not None and stop.requested_here()

    while True:
        until = time.monotonic() + SECONDS_BETWEEN
        try:
            while going and not asked() and time.monotonic() < until:
                going = next(pieces, END) is None
        except BertdistError as found:
            error = found
        stops, errors, still = all_reduce_sum(
            accelerator, [int(asked()), int(error is not None), int(going)], group
        )
        if error is not None:
            raise error
        if stops or errors or not still:
            return not stops


def _read(kept: Path, fingerprint: str) -> StreamScan | None:
    """What an earlier start has found of the same data."""
    try:
        text = json.loads(kept.read_text())
        if text["fingerprint"] != fingerprint:
            return None
        labels = {
            tuple(value) if isinstance(value, list) else value: int(count)
            for value, count in text["labels"]
        }
        rows = {int(source): int(count) for source, count in text["rows"].items()}
        if text["kind"] not in get_args(LabelKind):
            return None
        return StreamScan(
            rows=rows,
            kind=text["kind"],
            labels=labels,
            bad=[checked(SkippedRow(*row)) for row in text["bad"]],
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        return None


class LabelStats(NamedTuple):
    """The labels of a training split: what a task is made of."""

    kind: LabelKind
    values: list[LabelValue]  # distinct
    counts: list[int]  # rows of each
    class_names: tuple[str, ...] | None  # that the source fixes, in its order
    column: str


class DatasetStats(NamedTuple):
    """What is known of the training rows."""

    labels: LabelStats
    rows: list[int]  # of each source; none: nobody has counted
    bad: Sequence[SkippedRow] = ()  # rows that were left out


def label_stats_of(rows: Records) -> LabelStats:
    """Of rows in memory."""
    assert rows.label_codes is not None and rows.label_kind is not None
    counts = np.bincount(rows.label_codes, minlength=len(rows.label_values)).tolist()
    return LabelStats(
        rows.label_kind, rows.label_values, counts, rows.class_names, rows.label_column or "labels"
    )


def collect_stats(
    rows: Records | Stream,
    config: TrainConfig,
    accelerator: Accelerator,
    say: Callable[[str], None],
    stop: StopSignal | None = None,
) -> DatasetStats | None:
    """A collective: of a stream, each rank reads some of the files. None where `stop` was asked for meanwhile. Raises DataError."""
    if isinstance(rows, Records):
        return DatasetStats(label_stats_of(rows), [len(rows)], rows.bad)
    with raise_on_all_ranks(accelerator):
        head = rows.head()
    labels = label_stats_of(head)
    if reasons := list(_reasons(config, labels)):
        say(f"Reading {rows.name} once, for {', '.join(reasons)}.")
        found = survey(rows, accelerator, Path(config.run.output_dir) / "survey.json", stop)
        if found is None:
            return None
        assert found.kind is not None
        labels = labels._replace(
            kind=found.kind, values=list(found.labels), counts=list(found.labels.values())
        )
        return DatasetStats(
            labels, [found.rows[number] for number in sorted(found.rows)], found.bad
        )
    names = config.task.label_names or labels.class_names
    values: list[LabelValue] = (
        [(name,) if labels.kind == "set" else name for name in names] if names else labels.values
    )
    return DatasetStats(labels._replace(values=values, counts=[len(head)] * len(values)), [])


def _reasons(config: TrainConfig, labels: LabelStats) -> list[str]:
    """Why a stream must be read before its first step; none: flags say it all."""
    task, run = config.task, config.run
    reasons = []
    fixed = (
        task.label_names
        or labels.class_names
        or labels.kind == "number"
        or task.problem_type == "regression"
    )
    if not fixed:
        reasons.append("its labels (--label_names tells them)")
    if task.class_weights == ["balanced"]:
        reasons.append("the rows of each label (--class_weights balanced)")
    if run.max_train_steps is None:
        reasons.append("its length (--max_train_steps instead of --num_train_epochs)")
    for name in ("eval_every", "save_every", "log_every"):
        if "epoch" in (every := getattr(run, name)):
            reasons.append(f"--{name} {every!r} (in steps it needs no length)")
    return reasons


def assign_files_to_ranks(stream: Stream, ranks: int) -> list[list[int]]:
    """Which sources each rank reads (--stream_sharding by_file): largest first, to the rank that has least to read."""
    told = [source.bytes for source in stream.sources]
    known = [size for size in told if size is not None]
    usual = sum(known) // max(1, len(known))  # where the size is not known
    sizes = [usual if size is None else size for size in told]
    files: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, 0, rank) for rank in range(ranks)]  # a heap: (bytes, files, rank)
    for source in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, count, rank = loads[0]
        files[rank].append(source)
        heapq.heapreplace(loads, (load + sizes[source], count + 1, rank))
    return [sorted(of_rank) for of_rank in files]


def agreement(accelerator: Accelerator) -> Agree:
    """How ranks that read own files agree on a step: its rows over all ranks, and what any of them left out. A collective at every call."""
    group = cache(lambda: host_group(accelerator))

    def agree(step: Step | BertdistError | None) -> tuple[int, tuple[SkippedRow, ...]]:
        told, failed = (step.bad, False) if isinstance(step, Step) else ((), step is not None)
        rows, failures, bad = all_reduce_sum(
            accelerator,
            [step.rows if isinstance(step, Step) else 0, int(failed), len(told)],
            group(),
        )
        if failures:
            with raise_on_all_ranks(accelerator):
                if isinstance(step, BertdistError):
                    raise step
        return rows, tuple(gather_object(told) if bad and accelerator.num_processes > 1 else told)

    return agree


def create_task(
    config: TaskConfig, labels: LabelStats, model_labels: tuple[str, ...] | None
) -> Task:
    """The task that the labels of the training rows make."""
    return infer_task(
        config,
        labels.kind,
        labels.values,
        np.array(labels.counts),
        labels.class_names,
        labels.column,
        model_labels,
    )


def data_fingerprint(
    settings: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Records | Stream,
    dev_rows: Records | None,
) -> dict[str, object]:
    """What must be the same on all ranks before the model is built: rows (as digests), tokenizer, model config."""
    vocabulary = hashlib.sha256(
        json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    ).hexdigest()
    return {
        f"{train_rows.name} (digest of the rows)": train_rows.fingerprint,
        **({f"{dev_rows.name} (digest of the rows)": dev_rows.fingerprint} if dev_rows else {}),
        "the tokenizer (digest of its vocabulary)": vocabulary,
        "the model's config": hashlib.sha256(settings.to_json_string().encode()).hexdigest(),
    }
