"""A stream -> steps -> this rank's micro-batches: what `batching` does for rows in memory, window by window.

Two ways to share the work (--stream_split):
rows   every rank reads every row and encodes only its share of each step. Steps are those of any other number of ranks.
files  every rank reads files of its own and takes its part of each step from them. Ranks that run out first go on with texts that count
       nothing until the last is done; before each step the ranks agree on how many rows it has.

Where a step's reading stands is in the step (`Step.after`), so that whatever workers read ahead, a checkpoint goes on behind its last step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from bertdist.batch import Step
from bertdist.batching import Batches, Message, Share, idle, in_a_message, loaded, plan
from bertdist.encoding import Examples, open_examples
from bertdist.errors import BertdistError, DataError
from bertdist.pieces import BadRow, Place
from bertdist.stream import EMPTY, Stream, Window
from bertdist.tasks import Array, Task

# This rank's step -> its rows over all ranks, and the rows that any of them left out; raises the error of any rank.
Agree = Callable[[Step | BertdistError | None], tuple[int, tuple[BadRow, ...]]]


@dataclass(frozen=True, kw_only=True)
class StreamBatches:
    """A stream in steps, as one rank sees it. It has no state: `steps` goes on from the place that a step gave."""

    stream: Stream  # with --stream_split files, of this rank's files
    task: Task
    examples: Examples  # its first rows: what memory is measured with
    rows_per_step: int  # of all ranks; with --stream_split files, of this one
    tokens_per_micro_batch: int
    rank: int = 0
    ranks: int = 1  # among which a step is dealt
    seed: int = 0
    workers: int = 0
    pin: bool = False
    steps_per_epoch: int = 0  # 0: not known
    agree: Agree | None = None  # with --stream_split files

    def steps(self, start: int, stop: int, place: Place | None = None) -> Iterator[Step]:
        """This rank's share of steps start, ..., stop - 1, counted over the whole run, from the place behind step start - 1.

        place: `after` of that step; None: the stream's begin. Raises DataError.
        """
        if self.agree is None:
            yield from loaded(
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

    def _own(self, start: int, stop: int, place: Place) -> Iterator[Step | BertdistError]:
        """The steps of this rank's files, to the end of the epoch, or to the error that ends them."""
        try:
            if "window" in place:
                yield from loaded(
                    _Shares(self, start, stop, place, one_epoch=True), self.workers, self.pin
                )
        except BertdistError as error:
            yield error

    def where(self, rows: Sequence[int], place: Place | None) -> list[str]:
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


AnyBatches: TypeAlias = Batches | StreamBatches
SomeBatches = TypeVar("SomeBatches", Batches, StreamBatches, AnyBatches)


class _Shares(IterableDataset[Message]):
    """A pass over windows. With several workers each reads all of it, and encodes every so-manieth message."""

    def __init__(
        self, batches: StreamBatches, start: int, stop: int, place: Place | None, *, one_epoch: bool
    ) -> None:
        self.batches, self.start, self.stop, self.place, self.one_epoch = (
            batches,
            start,
            stop,
            place,
            one_epoch,
        )
        self.together = (
            in_a_message(batches.examples.records.lengths(), batches.rows_per_step, batches.ranks)
            if batches.workers
            else 1
        )

    def __iter__(self) -> Iterator[Message]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        message: Message = []
        try:
            for number, share, rows, place, after, bad in self._planned():
                turn, last = divmod(number - self.start, self.together)
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
                    if last == self.together - 1:
                        yield message
                        message = []
        except BertdistError as error:
            message.append(error)
        if message:
            yield message

    def _planned(
        self,
    ) -> Iterator[tuple[int, Share | None, Array, Place, Place, tuple[BadRow, ...]]]:
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
                            plan(0, 0, 0),
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
                order = plan(rows, batches.seed, epoch, which)
                bad, last_step, next_epoch = (
                    tuple(window.bad),
                    -(-rows // size) - 1,
                    window.next_epoch,
                )
                for step in range(first_step, last_step + 1):
                    after: Place = {"window": window.state, "step": step + 1}
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

    def _share_of(self, window: Window) -> Share:
        b = self.batches
        examples = open_examples(
            window.records, b.examples.tokenizer, b.task, b.examples.max_length
        )
        return Share(examples, b.tokens_per_micro_batch, b.rank, b.ranks, window.records.lengths())
