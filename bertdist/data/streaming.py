"""Training data larger than memory (--streaming): `Stream`, its windows of rows, `StreamLoader`.

1. Data sources are read front to back. An epoch is one pass over all rows, its files in random
   order; with --train_weights it has no end: each --train_file contributes its fraction of every
   window, pass after pass.
2. A window of `window_rows` rows is a `Records`. It is shuffled as an epoch is, and split into
   steps as in data/sharding.py.
3. Each window has the reader state from which it can be read again. A step has that of its window
   and that after itself (`RankStep.next_reader_state`): whatever workers prefetch, a checkpoint
   resumes after its last step.

--stream_sharding by_row: every rank reads every row and tokenizes only its part of each step. The
steps do not depend on the number of ranks. by_file: every rank reads other files, and its part of
each step has rows of these. Ranks whose files end first continue with texts of weight 0 until the
last is done; before each step the ranks sum up its rows.

A reader state is {"epoch", "window": its number in the epoch, "rows": of the epoch before it,
"cursors": one per source group}; a loader's is {"window": that state, "step": in the window}, or
{"over": state of the next epoch} at the end of a rank's files.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import xxhash
from accelerate import Accelerator
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError
from bertdist.core.types import Array
from bertdist.data.bad_rows import BadRow, BadRows, OnBadRow, suggest_skipping
from bertdist.data.batch import RankStep
from bertdist.data.columns import LabelRules
from bertdist.data.records import (
    ColumnNames,
    Records,
    check_slice_column,
    choose_columns,
    concat_records,
    records_from_chunk,
    reject_header,
)
from bertdist.data.sharding import (
    RankShard,
    WorkerItem,
    epoch_order,
    generator,
    idle_batch,
    iterate_loader,
    rows_per_source,
    steps_per_item,
)
from bertdist.data.source import STREAM_START, DataSource, ReaderState
from bertdist.data.tokenization import TokenizedDataset, create_dataset
from bertdist.data.train_test_split import HoldOut, Part, no_rows_error
from bertdist.distributed.collectives import (
    all_reduce_sum,
    gather_from_all_ranks,
    host_group,
    raise_on_all_ranks,
)
from bertdist.distributed.host_memory import free_host_bytes
from bertdist.tasks.labels import LabelValue
from bertdist.tasks.tasks import Task

HEAD_ROWS = 1_000


class Window(NamedTuple):
    """Some rows of a stream, in the order of reading; none if all of an epoch were skipped."""

    records: Records
    state: ReaderState  # reading from here begins with exactly this window
    next_state: ReaderState | None  # that of the next window; None: the epoch is over
    next_epoch_state: ReaderState
    bad_rows: list[BadRow]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One split, without rows or open files: forked workers may share it."""

    name: str
    source_groups: Sequence[Sequence[DataSource]]  # one per --train_file, each with its files
    columns: ColumnNames  # chosen from the first source
    label_delimiter: str | None
    # A multiple of a step's rows, so that only an epoch's last step can be smaller.
    window_rows: int
    seed: int
    source_weights: tuple[float, ...] = ()  # of the groups; empty: every row once per epoch
    limit: int | None = None  # maximum number of rows of an epoch
    on_bad_row: OnBadRow = "fail"
    max_bad_rows: int = 0
    # With "skip": rows with a label of another kind are skipped.
    first_label: LabelValue | None = None
    rules: LabelRules = LabelRules()  # noqa: RUF009  immutable
    format_notes: tuple[str, ...] = ()  # see Records
    first_row: int = 0  # number of the first row of an epoch
    hold_out: HoldOut | None = None  # --validation_split, --test_split: only rows of `part`
    part: Part = "train"
    slice_column: str | None = None  # of a part that is evaluated

    @property
    def sources(self) -> list[DataSource]:
        """The sources of all groups."""
        return [source for group in self.source_groups for source in group]

    @property
    def text_column(self) -> str:
        """The name of the text column, or names with spaces between them."""
        return " ".join(self.text_columns)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the text."""
        return self.columns.texts

    @property
    def pair_column(self) -> str | None:
        """Column of the second text."""
        return self.columns.pair

    @property
    def fingerprint(self) -> str:
        """Changes with the data, and with the settings that select rows and columns."""
        group_sizes = [len(group) for group in self.source_groups] if self.source_weights else []
        settings: list[Any] = [self.columns, self.label_delimiter, self.limit, group_sizes]
        settings += [] if self.hold_out is None else [tuple(self.hold_out), self.part]
        parts = [*(source.fingerprint for source in self.sources), *map(repr, settings)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def chunks(
        self, source: DataSource, state: ReaderState | None = None
    ) -> Iterator[tuple[ReaderState, Records]]:
        """State and checked records of each chunk of a source. Raises DataError."""
        names, header = source.column_names(), source.has_header
        columns = choose_columns(source.name, names, self.columns, header)
        check_slice_column(source.name, names, self.slice_column)
        read = columns.names_and(self.slice_column)
        chunks, is_empty = source.chunks(read, state), state is None
        while True:
            with suggest_skipping():
                if (chunk := next(chunks, None)) is None:
                    break
                is_empty &= not (chunk.num_rows or chunk.bad_rows)
                records = records_from_chunk(
                    source.name,
                    chunk,
                    columns,
                    has_header=header,
                    label_delimiter=self.label_delimiter,
                    features=source.features,
                    on_bad_row=self.on_bad_row,
                    first_label=self.first_label,
                    rules=self.rules,
                    table=source.quoted_table,
                    slice_column=self.slice_column,
                )
            if self.hold_out is not None:
                records = self.hold_out.select(self.part, records)
            yield chunk.state, records
        if is_empty:  # a header alone; as in memory, also where other files have rows
            raise DataError(f"{source.name} has no rows.")

    def head(self) -> Records:
        """The first rows, at most HEAD_ROWS. Raises DataError if there are none."""
        bad_rows = BadRows(self.on_bad_row, self.max_bad_rows)
        for source in self.sources:
            for _, records in replace(self, hold_out=None).chunks(source):
                if len(records):
                    reject_header(records)
                if self.hold_out is not None:
                    records = self.hold_out.select(self.part, records)
                if len(records):
                    return records.slice(0, min(len(records), HEAD_ROWS))
                bad_rows.add(records.bad_rows)
        if first := bad_rows.rows[:1]:
            raise DataError(
                f"{self.name} has no rows but {len(bad_rows)} that cannot be read, "
                f"the first of them {first[0].location}: {first[0].reason}"
            )
        if self.hold_out is not None:
            raise no_rows_error(self.name, self.part, self.hold_out)
        raise DataError(f"{self.name} has no rows.")

    def with_first_rows(self) -> "Stream":
        """The same stream, with what its first rows decide: with on_bad_row "skip" `first_label`,
        with --label_columns what an empty cell means. Raises DataError.
        """
        if self.on_bad_row == "fail" and not self.columns.labels:
            return self
        head = replace(self, hold_out=None).head()
        is_zero = None in head.indicator_values and 0 not in head.indicator_values
        rules = self.rules._replace(empty="zero" if is_zero else "error")
        first_label = head.label_values[0] if self.on_bad_row == "skip" else None
        return replace(self, first_label=first_label, rules=rules)

    def windows(self, state: ReaderState | None = None) -> Iterator[Window]:
        """From a state to the end of its epoch. Raises DataError."""
        state = state or STREAM_START
        epoch, number, rows = state["epoch"], state["window"], state["rows"]
        groups = self.source_groups if self.source_weights else [self.sources]
        cursors = state["cursors"] or [{"pass": 0 if self.source_weights else epoch}] * len(groups)
        readers = [
            _GroupReader(self, group, index, cursor)
            for index, (group, cursor) in enumerate(zip(groups, cursors, strict=True))
        ]
        while True:
            size = self.window_rows
            size = size if self.limit is None else min(size, self.limit - rows)
            counts = [size]
            if self.source_weights:
                counts = rows_per_source(self.source_weights, size, self.seed, epoch, number)
            reads = zip(readers, counts, strict=True)
            parts = self._within_memory(
                records for reader, count in reads for records in reader.read(count)
            )
            bad_rows = [row for reader in readers for row in reader.pop_bad_rows()]
            next_epoch: ReaderState = {**STREAM_START, "epoch": epoch + 1}
            if not parts:
                empty = [reader.empty for reader in readers if reader.empty is not None]
                if bad_rows and empty:
                    yield Window(empty[0], state, None, next_epoch, bad_rows)
                return
            records = replace(concat_records(parts, self.name), first_row=self.first_row + rows)
            rows, number = rows + len(records), number + 1
            cursors = [reader.cursor for reader in readers]
            next_state = {"epoch": epoch, "window": number, "rows": rows, "cursors": cursors}
            if self.source_weights:
                next_epoch["cursors"] = cursors
            ended = rows == self.limit or (not self.source_weights and readers[0].ended)
            yield Window(records, state, None if ended else next_state, next_epoch, bad_rows)
            if ended:
                return
            state = next_state

    def _within_memory(self, parts: Iterable[Records]) -> list[Records]:
        """The parts of a window. Raises DataError where its texts take half of the free memory."""
        limit, size, found = free_host_bytes() // 2, 0, list[Records]()
        for records in parts:
            size += records.texts.nbytes + (0 if records.pairs is None else records.pairs.nbytes)
            if size > limit:
                raise DataError(
                    f"{records.location(0)}: the texts of a window of {self.window_rows:,} rows "
                    f"have more than {limit:,} bytes, half of the free memory; a smaller "
                    "--stream_window has fewer rows."
                )
            found.append(records)
        return found


class _GroupReader:
    """The rows of one source group from a cursor on.

    A cursor is {"pass", "file": in the order of that pass, "place": reader state of a chunk,
    "skip": rows of the chunk}.
    """

    def __init__(
        self, stream: Stream, sources: Sequence[DataSource], group: int, cursor: ReaderState
    ) -> None:
        self.stream, self.sources, self.group = stream, sources, group
        self.number, self.file = cursor["pass"], cursor.get("file", 0)
        self.ended = False  # the pass is over
        self.empty: Records | None = None  # a chunk of which all rows were skipped
        self._bad_rows: list[BadRow] = []
        self._order = self._file_order()
        self._initial_cursor: ReaderState | None = cursor
        self._open(cursor.get("place"))
        self._skip = cursor.get("skip", 0)
        self._load_chunk()

    @property
    def cursor(self) -> ReaderState:
        # Until a row is read, the initial one: states must not depend on interruptions.
        if self._initial_cursor is not None:
            return self._initial_cursor
        if self.ended:
            return {"pass": self.number + 1}
        return {"pass": self.number, "file": self.file, "place": self._state, "skip": self._skip}

    def read(self, rows: int) -> Iterator[Records]:
        """The next rows; fewer at the end of a pass, if groups have no weights."""
        while rows:
            if self.ended:
                if not self.stream.source_weights:
                    break
                self._next_pass()
            assert self._chunk is not None
            stop = min(len(self._chunk), self._skip + rows)
            yield self._chunk.slice(self._skip, stop)
            self._initial_cursor = None
            rows -= stop - self._skip
            self._skip = stop
            self._load_chunk()

    def pop_bad_rows(self) -> list[BadRow]:
        """The rows skipped since the last call."""
        rows, self._bad_rows = self._bad_rows, []
        return rows

    def _next_pass(self) -> None:
        self.number, self.file, self.ended = self.number + 1, 0, False
        self._order = self._file_order()
        self._open(None)
        self._load_chunk()
        if self.ended:
            raise DataError(f"{self.sources[0].name} has no rows.")

    def _file_order(self) -> list[int]:
        files = len(self.sources)
        # With a limit, each pass has the same first rows.
        if self.stream.limit is not None and not self.stream.source_weights:
            return list(range(files))
        order = generator(self.stream.seed, self.number, 3, self.group).permutation(files)
        return [int(file) for file in order]

    def _open(self, state: ReaderState | None) -> None:
        """Open the current file at a reader state."""
        self._chunk: Records | None = None
        self._state, self._skip = state, 0
        self._chunks: Iterator[tuple[ReaderState, Records]] = iter(())
        if self.file < len(self._order):
            self._chunks = self.stream.chunks(self.sources[self._order[self.file]], state)

    def _load_chunk(self) -> None:
        """Load chunks until there is a row to read, or set `ended`."""
        while self._chunk is None or self._skip >= len(self._chunk):
            if (chunk := next(self._chunks, None)) is not None:
                state, records = chunk
                self._bad_rows += records.bad_rows
                if not len(records):
                    self.empty = records
                    continue
                # In the first chunk, skip the rows before the cursor.
                self._skip = self._skip if self._chunk is None else 0
                self._chunk, self._state = replace(records, bad_rows=()), state
            elif self.file + 1 < len(self.sources):
                self.file += 1
                self._open(None)
            else:
                self.ended = True
                return


# This rank's step -> number of rows and bad rows of all ranks. Raises the error of any rank.
AgreeOnStep = Callable[[RankStep | BertdistError | None], tuple[int, tuple[BadRow, ...]]]


@dataclass(frozen=True, kw_only=True)
class StreamLoader:
    """One rank's part of the steps of a stream. Stateless: `steps` resumes from a reader state."""

    stream: Stream  # with --stream_sharding by_file, of this rank's files
    task: Task
    dataset: TokenizedDataset  # the stream's first rows: memory is measured with them
    rows_per_step: int  # of all ranks; with --stream_sharding by_file, of this one
    tokens_per_micro_batch: int
    rank: int = 0
    ranks: int = 1  # over which a step's rows are balanced
    seed: int = 0
    workers: int = 0
    pin: bool = False
    steps_per_epoch: int = 0  # 0: unknown
    agree: AgreeOnStep | None = None  # with --stream_sharding by_file

    def steps(
        self, start: int, stop: int, reader_state: ReaderState | None = None
    ) -> Iterator[RankStep]:
        """This rank's part of steps start, ..., stop - 1 of the run. Raises DataError.

        reader_state: `next_reader_state` of step start - 1; None: the beginning of the stream.
        """
        if self.agree is None:
            step_dataset = _StreamStepDataset(self, start, stop, reader_state, one_epoch=False)
            yield from iterate_loader(step_dataset, self.workers, self.pin)
            return
        state = reader_state or {"window": STREAM_START, "step": 0}
        first, passes = start, 0
        while start < stop:
            own_steps = self._steps_of_epoch(start, stop, state)
            while start < stop:
                step = next(own_steps, None)
                if step is None and "window" in state:  # this rank has no file at all
                    state = {"over": {**STREAM_START, "epoch": state["window"]["epoch"] + 1}}
                rows, bad_rows = self.agree(step)
                if not rows:
                    break
                assert not isinstance(step, BertdistError)
                if step is None or not step.rows:
                    step = RankStep(
                        number=start,
                        micro_batches=[idle_batch(self.dataset, 0)],
                        rows=0,
                        idle=True,
                        next_reader_state=state if step is None else step.next_reader_state,
                    )
                assert step.next_reader_state is not None
                state = step.next_reader_state
                yield replace(step, number=start, rows=rows, bad_rows=bad_rows)
                start += 1
            state = {"window": state["over"], "step": 0} if "over" in state else state
            passes += 1
            if passes == 2 and start == first:  # the same on all ranks
                raise DataError(f"{self.stream.name} has no rows.")

    def _steps_of_epoch(
        self, start: int, stop: int, state: ReaderState
    ) -> Iterator[RankStep | BertdistError]:
        """The steps of this rank's files to the end of the epoch, or to an error, the last item."""
        try:
            if "window" in state:
                step_dataset = _StreamStepDataset(self, start, stop, state, one_epoch=True)
                yield from iterate_loader(step_dataset, self.workers, self.pin)
        except BertdistError as error:
            yield error

    def locations(self, rows: Sequence[int], window_state: ReaderState | None) -> list[str]:
        """The file and line of each row of a step: reads its window again.

        Without `window_state`, or if the window has changed: the row's number in the stream.
        """
        try:
            read_again = window_state is not None and len(rows) > 0
            window = next(self.stream.windows(window_state)).records if read_again else None
        except (BertdistError, OSError, MemoryError, StopIteration):
            # The data have changed; do not mask the error whose message needs the location.
            window = None
        if window is None or not all(0 <= row - window.first_row < len(window) for row in rows):
            return [f"{self.stream.name} row {row - self.stream.first_row}" for row in rows]
        return [str(window.location(row - window.first_row)) for row in rows]


class _PlannedStep(NamedTuple):
    """A step's rows, before they are tokenized."""

    number: int
    shard: RankShard | None  # None: all rows of the rank's files were skipped
    rows: Array  # of the window
    window_state: ReaderState
    next_reader_state: ReaderState
    bad_rows: tuple[BadRow, ...]


class _StreamStepDataset(IterableDataset[WorkerItem]):
    """A pass over windows. Each of n workers reads all rows, and tokenizes every n-th item."""

    def __init__(
        self,
        loader: StreamLoader,
        start: int,
        stop: int,
        state: ReaderState | None,
        *,
        one_epoch: bool,
    ) -> None:
        self.loader, self.start, self.stop = loader, start, stop
        self.state, self.one_epoch = state or {"window": STREAM_START, "step": 0}, one_epoch
        self.steps_per_item = 1
        if loader.workers:
            lengths = loader.dataset.records.lengths()
            self.steps_per_item = steps_per_item(lengths, loader.rows_per_step, loader.ranks)

    def __iter__(self) -> Iterator[WorkerItem]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        item: WorkerItem = []
        try:
            for planned in self._planned_steps():
                turn, position = divmod(planned.number - self.start, self.steps_per_item)
                if turn % workers != own:
                    continue
                item.append(self._step(planned))
                if position == self.steps_per_item - 1:
                    yield item
                    item = []
        except BertdistError as error:
            item.append(error)
        if item:
            yield item

    def _step(self, planned: _PlannedStep) -> RankStep | BertdistError:
        number, shard = planned.number, planned.shard
        step: RankStep | BertdistError = RankStep(
            number=number, micro_batches=[], rows=0, idle=True
        )
        if shard is not None:
            step = shard.step(planned.rows, number)
        if isinstance(step, BertdistError):
            return step
        return replace(
            step,
            window_state=planned.window_state,
            next_reader_state=planned.next_reader_state,
            bad_rows=planned.bad_rows,
        )

    def _planned_steps(self) -> Iterator[_PlannedStep]:
        state, number, stream = self.state, self.start, self.loader.stream
        while number < self.stop:
            next_epoch = state["window"]
            first_step = state["step"]
            for window in stream.windows(state["window"]):
                for planned in self._steps_of_window(window, number, first_step):
                    yield planned
                    number += planned.shard is not None
                    if number == self.stop:
                        return
                if len(window.records):
                    first_step, next_epoch = 0, window.next_epoch_state
            if self.one_epoch:
                return
            if next_epoch is state["window"]:
                raise DataError(f"{stream.name} has no rows.")
            state = {"window": next_epoch, "step": 0}

    def _steps_of_window(self, window: Window, number: int, first: int) -> Iterator[_PlannedStep]:
        """The steps of a window from its step `first` on, which is step `number` of the run."""
        next_epoch, bad_rows = window.next_epoch_state, tuple(window.bad_rows)
        if not len(window.records):
            if self.one_epoch:  # report the bad rows to the other ranks
                over: ReaderState = {"over": next_epoch}
                no_rows = epoch_order(0, 0, 0)
                yield _PlannedStep(number, None, no_rows, window.state, over, bad_rows)
            return
        loader, rows, size = self.loader, len(window.records), self.loader.rows_per_step
        order = epoch_order(rows, loader.seed, window.state["epoch"], window.state["window"])
        shard = self._shard(window)
        last = -(-rows // size) - 1
        for step in range(first, last + 1):
            state: ReaderState = {"window": window.state, "step": step + 1}
            if step == last and window.next_state is None and self.one_epoch:
                state = {"over": next_epoch}
            elif step == last:
                state = {"window": window.next_state or next_epoch, "step": 0}
            step_rows = order[step * size : (step + 1) * size]
            yield _PlannedStep(number, shard, step_rows, window.state, state, bad_rows)
            number, bad_rows = number + 1, ()

    def _shard(self, window: Window) -> RankShard:
        loader, records = self.loader, window.records
        tokenizer, max_length = loader.dataset.tokenizer, loader.dataset.max_length
        dataset = create_dataset(records, tokenizer, loader.task, max_length)
        budget = loader.tokens_per_micro_batch
        return RankShard(dataset, budget, loader.rank, loader.ranks, records.lengths())


def create_stream_loader(
    stream: Stream,
    source_rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    settings: dict[str, Any],
    accelerator: Accelerator,
) -> StreamLoader:
    """This rank's loader of a stream. Raises DataError and ConfigError.

    source_rows: rows of each source; empty if not counted. settings: of `loader_settings`.
    """
    size, seed = config.batch.train_batch_size, config.run.seed
    dataset = create_dataset(stream.head(), tokenizer, task, config.model.max_length)
    agree, steps = None, -(-sum(source_rows) // size)
    if config.data.stream_sharding == "by_file":
        rank, ranks = accelerator.process_index, accelerator.num_processes
        _check_by_file(stream, size, ranks)
        files = assign_files_to_ranks(stream, ranks)
        sizes = [size // ranks + (other < size % ranks) for other in range(ranks)]
        if source_rows:
            rows = [sum(source_rows[file] for file in of_rank) for of_rank in files]
            steps = max(-(-rows[other] // sizes[other]) for other in range(ranks))
        own = tuple(stream.sources[file] for file in files[rank])
        stream = replace(stream, source_groups=(own,), first_row=rank << 40)
        agree, size = agree_on_steps(accelerator), sizes[rank]
        settings = {**settings, "rank": 0, "ranks": 1}
    stream = replace(stream, window_rows=-(-stream.window_rows // size) * size)
    return StreamLoader(
        stream=stream,
        task=task,
        dataset=dataset,
        rows_per_step=size,
        seed=seed,
        steps_per_epoch=steps,
        agree=agree,
        **settings,
    )


def _check_by_file(stream: Stream, rows_per_step: int, ranks: int) -> None:
    """Raises ConfigError if a rank would have no rows in a step."""
    by_row = "With --stream_sharding by_row any number will do."
    if rows_per_step < ranks:
        raise ConfigError(
            f"--stream_sharding by_file needs at least one row per process and step: "
            f"--train_batch_size is {rows_per_step}, for {ranks} processes. {by_row}"
        )
    if (sources := len(stream.sources)) < ranks:
        raise ConfigError(
            f"--stream_sharding by_file needs at least one file per process: "
            f"{stream.name} has {sources}, for {ranks} processes. {by_row}"
        )


def assign_files_to_ranks(stream: Stream, ranks: int) -> list[list[int]]:
    """Indices of the sources of each rank: largest first, to the rank with the fewest bytes."""
    sizes = [source.bytes for source in stream.sources]
    sizes_given = [size for size in sizes if size is not None]
    mean = sum(sizes_given) // max(1, len(sizes_given))
    loads = [mean if size is None else size for size in sizes]
    files: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, 0, rank) for rank in range(ranks)]  # (bytes, files, rank)
    for source in sorted(range(len(loads)), key=lambda number: (-loads[number], number)):
        load, count, rank = heap[0]
        files[rank].append(source)
        heapq.heapreplace(heap, (load + loads[source], count + 1, rank))
    return [sorted(of_rank) for of_rank in files]


def agree_on_steps(accelerator: Accelerator) -> AgreeOnStep:
    """A function that sums a step's rows over all ranks, and gathers their bad rows.

    Every call is a collective.
    """
    group = cache(lambda: host_group(accelerator))

    def agree(step: RankStep | BertdistError | None) -> tuple[int, tuple[BadRow, ...]]:
        own_rows, bad_rows = (step.rows, step.bad_rows) if isinstance(step, RankStep) else (0, ())
        counts = [own_rows, int(isinstance(step, BertdistError)), len(bad_rows)]
        rows, failures, num_bad = all_reduce_sum(accelerator, counts, group())
        if failures:
            with raise_on_all_ranks(accelerator):
                if isinstance(step, BertdistError):
                    raise step
        return rows, tuple(gather_from_all_ranks(accelerator, bad_rows) if num_bad else ())

    return agree
