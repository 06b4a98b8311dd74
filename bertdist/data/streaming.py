"""Rows that are never held together: sources that are read from front to back, in windows of rows.

In: row sources in parts (one a --train_file, each with its files). Out: windows of `window_rows` rows as `Records`, and with each the
state from which reading it can begin again: what a checkpoint keeps of a stream. An epoch is one pass over all rows, its files in an
order of their own; with weights it has no end: each part gives its share of every window, pass after pass.

A stream -> steps -> this rank's micro-batches: what `batching` does for rows in memory, window by window.

Two ways to share the work (--stream_sharding):
by_row   every rank reads every row and encodes only its share of each step. Steps are those of any other number of ranks.
by_file  every rank reads files of its own and takes its part of each step from them. Ranks that run out first go on with texts that count
         nothing until the last is done; before each step the ranks agree on how many rows it has.

Where a step's reading stands is in the step (`Step.after`), so that whatever workers read ahead, a checkpoint goes on behind its last step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from bertdist.core.errors import BertdistError, DataError
from bertdist.core.types import Array
from bertdist.data.batch import Step
from bertdist.data.columns import LabelValue
from bertdist.data.records import Columns, Records, choose, join, records_of_piece
from bertdist.data.sharding import (
    MapLoader,
    Message,
    RankShard,
    epoch_order,
    idle,
    iterate_loader,
    shares,
    steps_per_message,
)
from bertdist.data.source import (
    OnBadRow,
    ReaderState,
    RowSource,
    SkippedRow,
    SkippedRows,
    location_of,
)
from bertdist.data.tokenization import Examples, open_examples
from bertdist.tasks.tasks import Task

State = dict[
    str, Any
]  # {"epoch", "window": number in the epoch, "rows": of the epoch before it, "cursors": of the parts}

HEAD_ROWS = 1_000

EMPTY: State = {"epoch": 0, "window": 0, "rows": 0, "cursors": []}  # nothing was read yet


class Window(NamedTuple):
    """Some rows of a stream, in the order of reading; none where all of an epoch were left out."""

    records: Records
    state: State  # reading again from here begins with exactly this window
    after: State | None  # that of the next window; None: the epoch is over
    next_epoch: State
    bad: list[SkippedRow]  # rows that were left out


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One split. It holds no rows and no open file: forked workers may share it."""

    name: str
    parts: Sequence[Sequence[RowSource]]
    asked: Columns  # the columns, found in the first source
    label_delimiter: str | None
    window_rows: (
        int  # a multiple of the rows of a step, so that only an epoch's last step can be smaller
    )
    seed: int
    weights: tuple[float, ...] = ()  # of the parts; none: every row once an epoch
    limit: int | None = None  # rows of an epoch at most
    on_bad_row: OnBadRow = "fail"
    max_bad_rows: int = 0
    above: LabelValue | None = (
        None  # with "skip": the first label of all; rows whose label is of another kind are left out
    )
    guessed: tuple[str, ...] = ()  # see Records
    first_row: int = 0  # number of the first row of an epoch

    @property
    def sources(self) -> list[RowSource]:
        """All of them, part by part."""
        return [source for part in self.parts for source in part]

    @property
    def text_column(self) -> str:
        """Column of the text."""
        assert self.asked.text is not None
        return self.asked.text

    @property
    def pair_column(self) -> str | None:
        """Column of the second text."""
        return self.asked.pair

    @property
    def fingerprint(self) -> str:
        """Changes when the data change, or which of it is read."""
        parts = [len(part) for part in self.parts] if self.weights else []
        how = (self.asked, self.label_delimiter, self.limit, parts)
        read = [*(source.fingerprint for source in self.sources), *map(repr, how)]
        return xxhash.xxh3_128_hexdigest("\n".join(read).encode())

    def records(
        self, source: RowSource, place: ReaderState | None = None
    ) -> Iterator[tuple[ReaderState, Records, list[SkippedRow]]]:
        """The pieces of one source from a place on, checked: where each begins, its rows, those left out. Raises DataError."""
        taken = choose(source, source.column_names(), self.asked)
        for piece in source.chunks(taken.names(), place):
            records, bad = records_of_piece(
                source, piece, taken, self.label_delimiter, self.on_bad_row, self.above
            )
            yield piece.place, records, bad

    def head(self) -> Records:
        """The first rows, for what can be seen of a few. Raises DataError where there are none."""
        skipped_rows = SkippedRows(self.on_bad_row, self.max_bad_rows)
        for source in self.sources:
            for _, records, bad in self.records(source):
                if len(records):
                    return records.some(0, min(len(records), HEAD_ROWS))
                skipped_rows.add(bad)
        if first := skipped_rows.rows[:1]:
            told = f"{location_of(first[0])}: {first[0].reason}"
            raise DataError(
                f"{self.name} has no rows but {len(skipped_rows)} that cannot be read, the first of them {told}"
            )
        raise DataError(f"{self.name} has no rows.")

    def settled(self) -> "Stream":
        """The same, which also leaves out labels of another kind than the first one, wherever reading begins. Raises DataError."""
        return (
            self if self.on_bad_row == "fail" else replace(self, above=self.head().label_values[0])
        )

    def windows(self, state: State | None = None) -> Iterator[Window]:
        """From a state to the end of its epoch. Raises DataError."""
        state = state or EMPTY
        epoch, number, rows = state["epoch"], state["window"], state["rows"]
        parts = self.parts if self.weights else [self.sources]
        cursors = state["cursors"] or [{"pass": 0 if self.weights else epoch}] * len(parts)
        readers = [
            _Reader(self, part, index, cursor)
            for index, (part, cursor) in enumerate(zip(parts, cursors, strict=True))
        ]
        while True:
            room = (
                self.window_rows if self.limit is None else min(self.window_rows, self.limit - rows)
            )
            counts = (
                shares(self.weights, room, self.seed, epoch, number) if self.weights else [room]
            )
            found = [
                records
                for reader, count in zip(readers, counts, strict=True)
                for records in reader.take(count)
            ]
            bad = [row for reader in readers for row in reader.bad]
            for reader in readers:
                reader.bad.clear()
            if not found:
                empty = [reader.empty for reader in readers if reader.empty is not None]
                if bad and empty:
                    yield Window(empty[0], state, None, {**EMPTY, "epoch": epoch + 1}, bad)
                return
            records = replace(join(found, self.name), first_row=self.first_row + rows)
            rows, number = rows + len(records), number + 1
            cursors = [reader.cursor for reader in readers]
            following: State = {"epoch": epoch, "window": number, "rows": rows, "cursors": cursors}
            next_epoch: State = {
                "epoch": epoch + 1,
                "window": 0,
                "rows": 0,
                "cursors": cursors if self.weights else [],
            }
            ended = rows == self.limit or (not self.weights and readers[0].ended)
            yield Window(records, state, None if ended else following, next_epoch, bad)
            if ended:
                return
            state = following


class _Reader:
    """The rows of one part, from a cursor on: {"pass": ..., "file": in the order of that pass, "place": of its piece, "skip": rows}."""

    def __init__(
        self, stream: Stream, sources: Sequence[RowSource], part: int, cursor: ReaderState
    ) -> None:
        self.stream, self.sources, self.part = stream, sources, part
        self.number, self.file = cursor["pass"], cursor.get("file", 0)
        self.ended = False  # the pass is over
        self.bad: list[SkippedRow] = []
        self.empty: Records | None = None  # a piece of which all rows were left out
        self._order = self._order_of_pass()
        self._untouched: ReaderState | None = cursor
        self._begin(cursor.get("place"))
        self._skip = cursor.get("skip", 0)
        self._fill()

    @property
    def cursor(self) -> ReaderState:
        if (
            self._untouched is not None
        ):  # as it was given: a state must not depend on whether reading was interrupted there
            return self._untouched
        if self.ended:
            return {"pass": self.number + 1}
        return {"pass": self.number, "file": self.file, "place": self._place, "skip": self._skip}

    def take(self, rows: int) -> list[Records]:
        """The next rows; fewer at the end of the pass, unless parts have weights: then the next pass follows."""
        taken: list[Records] = []
        while rows:
            if self.ended:
                if not self.stream.weights:
                    break
                self._next_pass()
            assert self._piece is not None
            some = self._piece.some(self._skip, min(len(self._piece), self._skip + rows))
            taken.append(some)
            self._untouched = None
            rows -= len(some)
            self._skip += len(some)
            self._fill()
        return taken

    def _next_pass(self) -> None:
        self.number, self.file, self.ended = self.number + 1, 0, False
        self._order = self._order_of_pass()
        self._begin(None)
        self._fill()
        if self.ended:
            raise DataError(f"{self.sources[0].name} has no rows.")

    def _order_of_pass(self) -> list[int]:
        if (
            self.stream.limit is not None and not self.stream.weights
        ):  # the first so many rows are the same in each pass
            return list(range(len(self.sources)))
        key = [self.stream.seed, self.number, 3, self.part]
        order: list[int] = (
            np.random.Generator(np.random.PCG64(key)).permutation(len(self.sources)).tolist()
        )
        return order

    def _begin(self, place: ReaderState | None) -> None:
        """Open the file whose turn it is, at a place."""
        self._piece: Records | None = None
        self._place, self._skip = place, 0
        self._pieces = (
            self.stream.records(self.sources[self._order[self.file]], place)
            if self.file < len(self._order)
            else iter(())
        )

    def _fill(self) -> None:
        """Have a row at hand, or know that the pass is over."""
        while self._piece is None or self._skip >= len(self._piece):
            found = next(self._pieces, None)
            if found is not None:
                place, records, bad = found
                self.bad += bad
                if not len(records):
                    self.empty = records
                else:
                    self._skip = (
                        self._skip if self._piece is None else 0
                    )  # of the first piece, what the cursor says
                    self._piece, self._place = records, place
            elif self.file + 1 < len(self.sources):
                self.file += 1
                self._begin(None)
            else:
                self.ended = True
                return


# This rank's step -> its rows over all ranks, and the rows that any of them left out; raises the error of any rank.
Agree = Callable[[Step | BertdistError | None], tuple[int, tuple[SkippedRow, ...]]]


@dataclass(frozen=True, kw_only=True)
class StreamLoader:
    """A stream in steps, as one rank sees it. It has no state: `steps` goes on from the place that a step gave."""

    stream: Stream  # with --stream_sharding by_file, of this rank's files
    task: Task
    examples: Examples  # its first rows: what memory is measured with
    rows_per_step: int  # of all ranks; with --stream_sharding by_file, of this one
    tokens_per_micro_batch: int
    rank: int = 0
    ranks: int = 1  # among which a step is dealt
    seed: int = 0
    workers: int = 0
    pin: bool = False
    steps_per_epoch: int = 0  # 0: not known
    agree: Agree | None = None  # with --stream_sharding by_file

    def steps(self, start: int, stop: int, place: ReaderState | None = None) -> Iterator[Step]:
        """This rank's share of steps start, ..., stop - 1, counted over the whole run, from the place behind step start - 1.

        place: `after` of that step; None: the stream's begin. Raises DataError.
        """
        if self.agree is None:
            yield from iterate_loader(
                _Shares(self, start, stop, place, one_epoch=False), self.workers, self.pin
            )
            return
        place = place or {"window": EMPTY, "step": 0}
        taken, passes = start, 0
        while start < stop:
            own = self._own(start, stop, place)
            while start < stop:
                step = next(own, None)
                if step is None and "window" in place:
                    place = {
                        "over": {**EMPTY, "epoch": place["window"]["epoch"] + 1}
                    }  # this rank has no file at all
                rows, bad = self.agree(step)
                if not rows:
                    break
                assert not isinstance(step, BertdistError)
                if step is None or not step.rows:
                    after = place if step is None else step.after
                    step = Step(
                        number=start, share=[idle(self.examples, 0)], rows=0, idle=True, after=after
                    )
                place = step.after
                assert place is not None
                yield replace(step, number=start, rows=rows, bad=bad)
                start += 1
            place = {"window": place["over"], "step": 0} if "over" in place else place
            passes += 1
            if passes == 2 and start == taken:  # the same on all ranks
                raise DataError(f"{self.stream.name} has no rows.")

    def _own(self, start: int, stop: int, place: ReaderState) -> Iterator[Step | BertdistError]:
        """The steps of this rank's files, to the end of the epoch, or to the error that ends them."""
        try:
            if "window" in place:
                yield from iterate_loader(
                    _Shares(self, start, stop, place, one_epoch=True), self.workers, self.pin
                )
        except BertdistError as error:
            yield error

    def where(self, rows: Sequence[int], place: ReaderState | None) -> list[str]:
        """The file and line of each row of a step with this `place`: its window is read again. Else its number in the stream."""
        told = [f"{self.stream.name} row {row - self.stream.first_row}" for row in rows]
        try:
            window = next(self.stream.windows(place)).records if place and rows else None
        except (
            BertdistError,
            OSError,
            MemoryError,
            StopIteration,
        ):  # the data have changed since; the message that asks matters more
            window = None
        if window is None or not all(0 <= row - window.first_row < len(window) for row in rows):
            return told
        return [window.where(row - window.first_row) for row in rows]


AnyLoader: TypeAlias = MapLoader | StreamLoader

LoaderT = TypeVar("LoaderT", MapLoader, StreamLoader, AnyLoader)


class _Shares(IterableDataset[Message]):
    """A pass over windows. With several workers each reads all of it, and encodes every so-manieth message."""

    def __init__(
        self,
        batches: StreamLoader,
        start: int,
        stop: int,
        place: ReaderState | None,
        *,
        one_epoch: bool,
    ) -> None:
        self.batches, self.start, self.stop, self.place, self.one_epoch = (
            batches,
            start,
            stop,
            place,
            one_epoch,
        )
        self.steps_per_message = (
            steps_per_message(
                batches.examples.records.lengths(), batches.rows_per_step, batches.ranks
            )
            if batches.workers
            else 1
        )

    def __iter__(self) -> Iterator[Message]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        message: Message = []
        try:
            for number, share, rows, place, after, bad in self._planned():
                turn, last = divmod(number - self.start, self.steps_per_message)
                if turn % workers == mine:
                    step = (
                        share.of(rows, number)
                        if share
                        else Step(number=number, share=[], rows=0, idle=True)
                    )
                    message.append(
                        step
                        if isinstance(step, BertdistError)
                        else replace(step, place=place, after=after, bad=bad)
                    )
                    if last == self.steps_per_message - 1:
                        yield message
                        message = []
        except BertdistError as error:
            message.append(error)
        if message:
            yield message

    def _planned(
        self,
    ) -> Iterator[
        tuple[int, RankShard | None, Array, ReaderState, ReaderState, tuple[SkippedRow, ...]]
    ]:
        """(number, examples of the window, its rows in the step, place of the window, of the next step, rows left out) of each step.

        Without examples: a rank whose files have no rows but those left out.
        """
        batches, number = self.batches, self.start
        place = self.place or {"window": EMPTY, "step": 0}
        size = batches.rows_per_step
        while number < self.stop:
            first_step, next_epoch = place["step"], place["window"]
            for window in batches.stream.windows(place["window"]):
                if not len(
                    window.records
                ):  # all were left out, which this rank has yet to tell the others
                    if self.one_epoch:
                        yield (
                            number,
                            None,
                            epoch_order(0, 0, 0),
                            window.state,
                            {"over": window.next_epoch},
                            tuple(window.bad),
                        )
                    continue
                share = self._share_of(window)
                epoch, which, rows = (
                    window.state["epoch"],
                    window.state["window"],
                    len(window.records),
                )
                order = epoch_order(rows, batches.seed, epoch, which)
                bad, last_step, next_epoch = (
                    tuple(window.bad),
                    -(-rows // size) - 1,
                    window.next_epoch,
                )
                for step in range(first_step, last_step + 1):
                    after: ReaderState = {"window": window.state, "step": step + 1}
                    if step == last_step:
                        over = (
                            {"over": next_epoch}
                            if self.one_epoch
                            else {"window": next_epoch, "step": 0}
                        )
                        after = (
                            over if window.after is None else {"window": window.after, "step": 0}
                        )
                    yield (
                        number,
                        share,
                        order[step * size : (step + 1) * size],
                        window.state,
                        after,
                        bad,
                    )
                    number, bad = number + 1, ()
                    if number == self.stop:
                        return
                first_step = 0
            if self.one_epoch:
                return
            if next_epoch is place["window"]:
                raise DataError(f"{batches.stream.name} has no rows.")
            place = {"window": next_epoch, "step": 0}

    def _share_of(self, window: Window) -> RankShard:
        b = self.batches
        examples = open_examples(
            window.records, b.examples.tokenizer, b.task, b.examples.max_length
        )
        return RankShard(
            examples, b.tokens_per_micro_batch, b.rank, b.ranks, window.records.lengths()
        )
