"""The rows of each optimizer step, and each rank's part of them.

1. `epoch_order`, `mixed_epoch_order`: the rows of an epoch in training order, a pure function of
   (rows, seed, epoch). So ranks need not communicate, and resuming is starting at a later step.
2. `balance_by_length` assigns a step's rows to ranks: longest first, to the least loaded rank.
3. `RankShard`: this rank tokenizes only its own rows, and packs them into micro-batches of at most
   `tokens_per_micro_batch` tokens, longest first, so that texts of a micro-batch have similar
   lengths.
4. `iterate_loader`: loader workers prefetch 3. Several small steps are one item.
5. `prefetch_to_device`: on a GPU, a step's batches are copied while the previous step runs.

The gradient does not depend on any of this: it is a sum over the step's rows.
"""

import heapq
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bertdist.core.errors import BertdistError, DataError
from bertdist.core.types import Array
from bertdist.data.batch import PackedBatch, RankStep, collate, split_by_tokens
from bertdist.data.tokenization import TokenizedDataset
from bertdist.distributed.preemption import ignore_stop_signals

# Of a block of prediction: enough to keep any device busy, few enough to deal them to many ranks.
BLOCK_TOKENS = 8_192
BYTES_PER_TOKEN = 4  # of English; only the size of a block depends on it

BYTES_PER_ITEM = 1 << 16  # of text, from a loader worker: 1,000 sentences of SST-2

WorkerItem = list[
    RankStep | BertdistError
]  # what a loader worker sends at a time: some steps in order


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key only."""
    return np.random.Generator(np.random.PCG64(list(key)))


def epoch_order(rows: int, seed: int, epoch: int, window: int = 0) -> Array:
    """(rows,) int64: a permutation of the rows of an epoch, or of a stream's window."""
    return generator(seed, epoch, window).permutation(rows)


def rows_per_source(weights: Sequence[float], rows: int, *key: int) -> list[int]:
    """Number of rows of each source among `rows` rows (--train_weights).

    Counts are rounded down, and the remaining rows assigned at random, so that a source of small
    weight has its fraction in the long run. key: of the random generator.
    """
    exact = np.asarray(weights, np.float64) / sum(weights) * rows
    counts = np.floor(exact + 1e-9).astype(np.int64)
    remaining = rows - int(counts.sum())
    if remaining:
        fractions = np.maximum(exact - counts, 0.0)
        p = fractions / fractions.sum()
        drawn = generator(*key, 1).choice(len(counts), remaining, replace=False, p=p)
        counts[drawn] += 1
    return [int(count) for count in counts]


def mixed_epoch_order(
    source_sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> Array:
    """(sum of source_sizes,) int64: the rows of an epoch of concatenated sources with weights.

    Each source is an endless sequence of passes, each a permutation of its rows; an epoch has the
    next rows of each, in proportion to its weight. So no row is repeated before all rows of its
    source were used once.
    """
    total = sum(source_sizes)
    counts = [rows_per_source(weights, total, seed, before) for before in range(epoch + 1)]
    chosen = []
    for source, size in enumerate(source_sizes):
        begin = sum(of_epoch[source] for of_epoch in counts[:-1])
        end = begin + counts[-1][source]
        if end == begin:
            continue
        passes = range(begin // size, -(-end // size))
        orders = [generator(seed, number, 2, source).permutation(size) for number in passes]
        first = passes.start * size
        rows = np.concatenate(orders)[begin - first : end - first]
        chosen.append(sum(source_sizes[:source]) + rows)
    return np.concatenate(chosen)[generator(seed, epoch).permutation(total)]


def balance_by_length(rows: Array, lengths: Array, ranks: int) -> list[Array]:
    """A step's rows split over the ranks with similar loads: longest first, to the least loaded.

    rows, lengths: (rows of the step,). Returns one array of row numbers per rank; with fewer rows
    than ranks some are empty. On SST-2 with 32 rows per rank the slowest of 64 ranks has 1.07 times
    the mean number of tokens if balanced by bytes of text; by tokens, which would require
    tokenizing first, 1.003 times; at random, 1.31 times (python -m bench.scaling).
    """
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]  # (load, rank)
    for index in np.argsort(-lengths, kind="stable"):
        load, rank = heapq.heappop(heap)
        by_rank[rank].append(int(rows[index]))
        heapq.heappush(heap, (load + int(lengths[index]), rank))
    return [np.array(of_rank, dtype=np.int64) for of_rank in by_rank]


def length_blocks(rows: Array, lengths: Array, max_length: int) -> list[Array]:
    """The rows cut into blocks of about BLOCK_TOKENS tokens, longest first; rows, lengths: (N,).

    A matrix product rounds a row differently in micro-batches of different sizes. Blocks are a
    function of the rows, and a rank computes whole blocks: so the same bits on any number of ranks.
    """
    order = np.argsort(-lengths, kind="stable")
    tokens = np.minimum(lengths[order] // BYTES_PER_TOKEN + 2, max_length)
    block = tokens.cumsum() // BLOCK_TOKENS
    return np.split(rows[order], np.flatnonzero(np.diff(block)) + 1)


@dataclass(frozen=True)
class RankShard:
    """Tokenizes and packs one rank's part of each step of a dataset.

    window: of prediction; the `length_blocks` of each `window` rows are distributed over the
    ranks. 0: rows.
    """

    dataset: TokenizedDataset
    tokens_per_micro_batch: int
    rank: int
    ranks: int
    lengths: Array  # (rows,) bytes of text
    window: int = 0

    def step(self, rows: Array, number: int) -> RankStep | BertdistError:
        """This rank's part of step `number`, which has these rows.

        An error is returned, as DataLoader wraps those raised in a worker in its traceback.
        """
        blocks = self._own_blocks(rows)
        own = [row for block in blocks for row in block]
        shortest = int(rows[self.lengths[rows].argmin()])
        try:
            if not own:  # an idle rank still takes part in the all-reduce of gradients
                idle = idle_batch(self.dataset, shortest)
                return RankStep(number=number, micro_batches=[idle], rows=len(rows), idle=True)
            examples = self.dataset[own]
        except BertdistError as error:
            return error
        except Exception as error:
            return self._encoding_error(own or [shortest], error)
        micro_batches, remaining = [], iter(examples)
        for block in blocks:
            some = list(islice(remaining, len(block)))
            parts = split_by_tokens([len(e.ids) for e in some], self.tokens_per_micro_batch)
            micro_batches += [collate([some[i] for i in part]) for part in parts]
        return RankStep(number=number, micro_batches=micro_batches, rows=len(rows))

    def _own_blocks(self, rows: Array) -> list[list[int]]:
        """This rank's rows of a step, in groups that are packed into micro-batches separately."""
        if not self.window:
            own = balance_by_length(rows, self.lengths[rows], self.ranks)[self.rank]
            return [own.tolist()]
        blocks = [
            block
            for some in np.split(rows, range(self.window, len(rows), self.window))
            for block in length_blocks(some, self.lengths[some], self.dataset.max_length)
        ]
        loads = np.array([self.lengths[block].sum() for block in blocks])
        own = balance_by_length(np.arange(len(blocks)), loads, self.ranks)[self.rank]
        return [blocks[index].tolist() for index in own]

    def _encoding_error(self, rows: list[int], error: Exception) -> DataError:
        """Names the row that cannot be encoded, for an unexpected error."""
        location = self.dataset.records.location
        row_name = f"one of {len(rows)} rows from {location(rows[0])} on"
        for row in rows:
            try:
                self.dataset[[row]]
            except Exception as again:
                error, row_name = again, str(location(row))
                break
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return DataError(
            f"{row_name}: cannot be encoded: {type(error).__name__}: {error} "
            f"({Path(frame.filename).name} line {frame.lineno})."
        )


def idle_batch(dataset: TokenizedDataset, row: int) -> PackedBatch:
    """A row's text with weight 0, for a rank without rows."""
    return collate([example._replace(row=-1, weight=0.0) for example in dataset[[row]]])


def steps_per_item(lengths: Array, rows_per_step: int, ranks: int) -> int:
    """Number of steps that a loader worker sends at a time. lengths: (rows,) bytes of text.

    An item of any size costs this process 1 to 3 ms while it computes on all cores: it is woken,
    and so is the thread that requests the next one, when a core is free.
    """
    bytes_per_step = lengths.sum() / max(1, len(lengths)) * rows_per_step / ranks
    return max(1, int(BYTES_PER_ITEM / max(1.0, bytes_per_step)))


def iterate_loader(
    step_dataset: Dataset[WorkerItem], workers: int, pin: bool, sampler: range | None = None
) -> Iterator[RankStep]:
    """The steps of all items in order, prefetched by workers. Raises the errors among them."""
    loader = DataLoader(
        step_dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        # Forked workers share the rows instead of copying them.
        multiprocessing_context="fork" if workers else None,
        collate_fn=_identity,
        worker_init_fn=partial(_start_worker, os.getpid()),
        pin_memory=pin,
        # The default is the global generator, which dropout uses.
        generator=torch.Generator(),
    )
    for step in chain.from_iterable(_start_workers(loader)):
        if isinstance(step, BertdistError):
            raise step
        yield step


def _start_worker(parent: int, worker: int) -> None:
    """Ignore stop signals; exit if the parent is dead already, which torch takes for another parent
    and then never ends.
    """
    ignore_stop_signals(worker)
    if os.getppid() != parent:
        os._exit(1)


def _start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """iter(loader), without torch's warning of more workers than cores: see loader.py."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        return iter(loader)


def _identity(item: Any) -> Any:
    return item


def prefetch_to_device(steps: Iterator[RankStep], device: torch.device) -> Iterator[RankStep]:
    """The same steps with their batches on the device, copied while the previous step runs.

    The copies have their own CUDA stream, so they do not queue behind the kernels of the running
    step. A step is requested one step early, so that its copy begins before anything in the running
    step makes the host wait. On a CPU, a pass-through.
    """
    if device.type != "cuda":
        yield from steps
        return
    copy_stream, compute_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def send(step: RankStep | None) -> tuple[RankStep, torch.cuda.Event] | None:
        if step is None:
            return None
        with torch.cuda.stream(copy_stream):
            return step.to(device), copy_stream.record_event()

    ready = send(next(steps, None))
    while ready is not None:
        (step, copied), ready = ready, send(next(steps, None))
        compute_stream.wait_event(copied)
        for batch in step.micro_batches:
            batch.record_stream(compute_stream)
        yield step
