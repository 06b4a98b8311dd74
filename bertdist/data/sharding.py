"""Rows of several sources in given shares (--train_weights), as pure functions of the seed.

Every source is an endless sequence of passes, and a window (of a stream; else an epoch) takes the next rows of each: as many as its weight
says. What is left of rounding is drawn, so that a source of the smallest weight has its share in the long run.
"""

import heapq
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bertdist.core.errors import BertdistError, DataError
from bertdist.core.types import Array
from bertdist.data.batch import PackedBatch, Step, collate, cut
from bertdist.data.source import ReaderState
from bertdist.data.tokenization import Examples
from bertdist.distributed.preemption import ignore_stop_signals


def shares(weights: Sequence[float], rows: int, *key: int) -> list[int]:
    """How many of `rows` rows each source gives; they add up. key: of the generator that draws what rounding leaves."""
    exact = np.asarray(weights, np.float64) / sum(weights) * rows
    counts = np.floor(exact + 1e-9).astype(np.int64)
    left = rows - int(counts.sum())
    if left:
        fractions = np.maximum(exact - counts, 0.0)
        drawn = np.random.Generator(np.random.PCG64([*key, 1])).choice(
            len(counts), left, replace=False, p=fractions / fractions.sum()
        )
        counts[drawn] += 1
    return [int(count) for count in counts]


def mixed_epoch_order(
    parts: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> Array:
    """(sum of parts,) int64: the rows of an epoch. parts: rows of each source, which lie one behind the other.

    A source's rows come in passes, each a permutation of it, that go on from epoch to epoch: none comes a second time before all
    have come once.
    """
    total = sum(parts)
    counts = [shares(weights, total, seed, before) for before in range(epoch + 1)]
    chosen = []
    for part, rows in enumerate(parts):
        begin = sum(of[part] for of in counts[:-1])
        end = begin + counts[-1][part]
        passes = range(begin // rows, -(-end // rows)) if end > begin else range(0)
        orders = [
            np.random.Generator(np.random.PCG64([seed, number, 2, part])).permutation(rows)
            for number in passes
        ]
        if orders:
            first = passes.start * rows
            chosen.append(sum(parts[:part]) + np.concatenate(orders)[begin - first : end - first])
    rows_of_epoch = np.concatenate(chosen)
    return rows_of_epoch[np.random.Generator(np.random.PCG64([seed, epoch])).permutation(total)]


DEFAULT_TOKEN_BUDGET = (
    8_192  # tokens of a micro-batch that keep any CPU busy; more would only take memory
)

BYTES_PER_MESSAGE = (
    1 << 16
)  # of text in what a loader worker sends at once: 1,000 sentences of SST-2


def epoch_order(rows: int, seed: int, epoch: int, window: int = 0) -> Array:
    """(rows,) int64: the order of an epoch, or of a window of a stream. Each row once; step k takes the k-th train_batch_size of them."""
    return np.random.Generator(np.random.PCG64([seed, epoch, window])).permutation(rows)


def balance_by_length(rows: Array, lengths: Array, ranks: int) -> list[Array]:
    """The rows of a step over the ranks, each about as many tokens: longest first, to the least loaded.

    rows, lengths: (rows of the step,). Returns one array of row numbers a rank; with fewer rows than ranks some are empty.
    On SST-2 with 32 rows a rank the slowest of 64 ranks has 1.07 times the mean load in tokens, dealt by bytes of text; dealt by tokens,
    which nobody knows before tokenizing, 1.003 times; dealt at random, 1.31 times (python -m bench.scaling).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [
        (0, rank) for rank in range(ranks)
    ]  # a heap: the least loaded rank is on top, the lowest of equals
    for place in np.argsort(-lengths, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(rows[place]))
        heapq.heappush(loads, (load + int(lengths[place]), rank))
    return [np.array(share, dtype=np.int64) for share in shares]


@dataclass(frozen=True, kw_only=True)
class MapLoader:
    """A split in steps, as one of `ranks` ranks sees it. It has no state: `steps(k)` begins at step k.

    shuffle: training, in the order of `plan`, epoch after epoch; else one pass in row order.
    """

    examples: Examples
    rows_per_step: int
    tokens_per_micro_batch: int
    rank: int = 0
    ranks: int = 1
    shuffle: bool = False
    seed: int = 0
    workers: int = 0  # processes that encode ahead; 0: in this one, when asked
    pin: bool = False  # page-locked memory, for copies to a GPU beside the computation
    weights: tuple[
        float, ...
    ] = ()  # of the parts of the rows (--train_weights); none: every row once an epoch

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller; it is a step like any other."""
        return -(-len(self.examples) // self.rows_per_step)

    def steps(self, start: int, stop: int, place: ReaderState | None = None) -> Iterator[Step]:
        """This rank's share of steps start, ..., stop - 1, counted over the whole run. place: for streams; nothing here needs it."""
        shares = _Shares(self, stop)
        return iterate_loader(
            shares, self.workers, self.pin, range(start, stop, shares.steps_per_message)
        )

    def order(self, epoch: int) -> Array:
        """(rows,) int64: the rows of an epoch in the order in which they are taken."""
        if not self.shuffle:
            return np.arange(len(self.examples))
        if self.weights:
            return mixed_epoch_order(self.examples.records.parts, self.weights, self.seed, epoch)
        return epoch_order(len(self.examples), self.seed, epoch)

    def where(self, rows: Sequence[int], place: ReaderState | None) -> list[str]:
        """The file and line of each row. place: for streams; nothing here needs it."""
        return [self.examples.records.where(row) for row in rows]


Message = list[Step | BertdistError]  # what a loader worker sends at once


def iterate_loader(
    shares: Dataset[Message], workers: int, pin: bool, sampler: range | None = None
) -> Iterator[Step]:
    """The steps of a data set of messages, made by workers ahead of their use, in their order. Raises the error that one ends with."""
    loader = DataLoader(
        shares,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork"
        if workers
        else None,  # the rows are shared with the workers, not copied
        collate_fn=_as_it_is,
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin,
        generator=torch.Generator(),  # else the loader draws from the generator that dropout draws from
    )
    for step in chain.from_iterable(loader):
        if isinstance(step, BertdistError):
            raise step
        yield step


def prefetch_to_device(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The same steps with their batches on the device; on a GPU each is sent while the step before it runs.

    The copies have a stream of their own, so they need not queue behind the kernels of the running step, and a step is asked for one
    step early, so that they begin before anything in the running step makes the host wait. Elsewhere a plain pass-through.
    """
    if device.type != "cuda":
        yield from steps
        return
    copies, running = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def send(step: Step | None) -> tuple[Step, torch.cuda.Event] | None:
        if step is None:
            return None
        with torch.cuda.stream(copies):
            return step.to(device), copies.record_event()

    ready = send(next(steps, None))
    while ready is not None:
        (step, arrived), ready = ready, send(next(steps, None))
        running.wait_event(arrived)
        for batch in step.share:
            batch.record_stream(running)
        yield step


class _Shares(Dataset[Message]):
    """Step number -> this rank's shares of this step and of some behind it. What a DataLoader can send to its workers."""

    def __init__(self, batches: MapLoader, stop: int) -> None:
        self.batches, self.stop = batches, stop
        lengths = batches.examples.records.lengths()
        self.steps_per_message = (
            steps_per_message(lengths, batches.rows_per_step, batches.ranks)
            if batches.workers
            else 1
        )
        self.share = RankShard(
            batches.examples, batches.tokens_per_micro_batch, batches.rank, batches.ranks, lengths
        )
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def __getitem__(self, first: int) -> Message:
        return [
            self._step(number)
            for number in range(first, min(first + self.steps_per_message, self.stop))
        ]

    def _step(self, number: int) -> Step | BertdistError:
        size = self.batches.rows_per_step
        epoch, step = divmod(number, self.batches.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.batches.order(epoch)
        return self.share.of(self.order[step * size : (step + 1) * size], number)


def steps_per_message(lengths: Array, rows_per_step: int, ranks: int) -> int:
    """How many steps a loader worker sends at once. lengths: (rows,) bytes of text.

    A message from a worker costs this process 1 to 3 ms beside a computation on all cores, whatever is in it: it is woken, and
    so is the thread that asks for the next one, when a core is free. So small steps share a message.
    """
    bytes_of_share = lengths.sum() / max(1, len(lengths)) * rows_per_step / ranks
    return max(1, int(BYTES_PER_MESSAGE / max(1.0, bytes_of_share)))


@dataclass(frozen=True)
class RankShard:
    """What one rank computes of the steps of some examples."""

    examples: Examples
    tokens_per_micro_batch: int
    rank: int
    ranks: int
    lengths: Array  # (rows,) bytes of text

    def of(self, rows: Array, number: int) -> Step | BertdistError:
        """This rank's share of step `number`, which takes these rows of the examples."""
        share = balance_by_length(rows, self.lengths[rows], self.ranks)[self.rank]
        try:
            if not len(
                share
            ):  # An idle rank still has to join the exchange of gradients: one text that counts nothing.
                shortest = rows[self.lengths[rows].argmin()]
                return Step(
                    number=number,
                    share=[idle(self.examples, int(shortest))],
                    rows=len(rows),
                    idle=True,
                )
            examples = self.examples[share.tolist()]
        except (
            BertdistError
        ) as error:  # raised in a worker it would arrive wrapped in the worker's traceback
            return error
        except Exception as error:
            return self._odd_row(share.tolist(), error)
        parts = cut([len(example.ids) for example in examples], self.tokens_per_micro_batch)
        return Step(
            number=number,
            share=[collate([examples[i] for i in part]) for part in parts],
            rows=len(rows),
        )

    def _odd_row(self, rows: list[int], error: Exception) -> DataError:
        """Which of the rows it is that cannot be encoded, for a reason that nobody thought of."""
        where = f"one of {len(rows)} rows from {self.examples.records.where(rows[0])} on"
        for row in rows:
            try:
                self.examples[[row]]
            except Exception as found:
                error, where = found, self.examples.records.where(row)
                break
        place = traceback.extract_tb(error.__traceback__)[-1]
        return DataError(
            f"{where}: cannot be encoded: {type(error).__name__}: {error} ({Path(place.filename).name} line {place.lineno})."
        )


def idle(examples: Examples, row: int) -> PackedBatch:
    """A row's text as one that counts nothing."""
    return collate([example._replace(row=-1, weight=0.0) for example in examples[[row]]])


def _as_it_is(step: Any) -> Any:
    return step
