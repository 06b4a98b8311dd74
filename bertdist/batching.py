"""Examples -> steps -> this rank's micro-batches: which rows make a step, who computes them, in which pieces.

1. plan: the rows of every step, a pure function of (rows, seed, epoch), the same on all ranks. So ranks need not talk, and
   resuming is nothing but starting at a later step.
2. deal: one step's rows over the ranks by length of text, longest first, to the least loaded.
3. this rank encodes its share only, in loader workers, while the steps before it run. Small steps travel several in a message.
4. cut: the share in micro-batches of at most `tokens_per_micro_batch` tokens, longest first, so that texts of one length lie
   side by side.
5. sent_ahead: on a GPU, a step's batches travel to the device while the step before it runs.
None of it changes what a step learns: its gradient is a sum over its rows, and the rows are the plan's.

Legend: T tokens, N texts of a micro-batch.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bertdist.encoding import Example, Examples
from bertdist.errors import BertdistError
from bertdist.slurm import leave_signals_to_the_rank
from bertdist.tasks import Array

PLENTY = 8_192  # tokens of a micro-batch that keep any CPU busy; more would only take memory
BYTES_PER_MESSAGE = 1 << 16  # of text in what a loader worker sends at once: 1,000 sentences of SST-2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several texts laid end to end, without padding."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, counts from 0 again at each text
    segments: Tensor  # (T,) int64, 1 in the second text of a pair
    starts: Tensor  # (N + 1,) int64: text i is ids[starts[i]:starts[i + 1]]
    targets: Tensor  # (N,) int64 or float32, or (N, outputs) float32
    weights: Tensor  # (N,) float32, 0 for a text that only keeps an idle rank busy
    rows: Tensor  # (N,) int64, row numbers of the source; -1 for the text of an idle rank
    lengths: tuple[int, ...]  # tokens of each text, known to the host without asking the device

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **fields)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy runs beside the host where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that another stream reads the batch than the one that it was made on."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader's pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a loader worker as bytes: as shared tensors every field of every batch ahead would hold an open file."""
        return _unpack, ({name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(self).items()},)


def _unpack(fields: dict[str, Any]) -> Batch:
    arrays: dict[str, Any] = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    return Batch(**arrays)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of one optimizer step."""

    number: int  # counts from 0 over the whole run
    share: list[Batch]  # this rank's micro-batches, never empty
    rows: int  # rows of the step, all ranks together
    idle: bool = False  # the share is one text that counts nothing: this rank has no row in this step

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Tokens of each text of each micro-batch; of an idle rank none."""
        return [] if self.idle else [batch.lengths for batch in self.share]

    def to(self, device: torch.device) -> "Step":
        """The same step on a device."""
        return replace(self, share=[batch.to(device) for batch in self.share])

    def pin_memory(self) -> "Step":
        """Called by the DataLoader's pinning thread."""
        return replace(self, share=[batch.pin_memory() for batch in self.share])


def plan(rows: int, seed: int, epoch: int) -> Array:
    """(rows,) int64: the order of an epoch. Each row once. Step k of the epoch takes the k-th train_batch_size of them."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def deal(rows: Array, lengths: Array, ranks: int) -> list[Array]:
    """The rows of a step over the ranks, each about as many tokens: longest first, to the least loaded.

    rows, lengths: (rows of the step,). Returns one array of row numbers a rank; with fewer rows than ranks some are empty.
    On SST-2 with 32 rows a rank the slowest of 64 ranks has 1.07 times the mean load in tokens, dealt by bytes of text; dealt by tokens,
    which nobody knows before tokenizing, 1.003 times; dealt at random, 1.31 times (python -m bench.scaling).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank is on top, the lowest of equals
    for place in np.argsort(-lengths, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(rows[place]))
        heapq.heappush(loads, (load + int(lengths[place]), rank))
    return [np.array(share, dtype=np.int64) for share in shares]


def cut(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of the texts of each micro-batch: longest first, at most `tokens` tokens each (a longer text goes alone)."""
    parts: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or lengths[place] > room:
            parts.append([])
            room = tokens
        parts[-1].append(place)
        room -= lengths[place]
    return parts


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end. Vectorised: 32 sentences cost 0.1 ms."""
    lengths = np.array([len(example.ids) for example in examples])
    ends = lengths.cumsum()
    starts = np.concatenate([[0], ends])
    positions = np.arange(ends[-1]) - np.repeat(starts[:-1], lengths)
    return Batch(
        ids=torch.from_numpy(np.concatenate([example.ids for example in examples]).astype(np.int64)),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(np.concatenate([example.segments for example in examples]).astype(np.int64)),
        starts=torch.from_numpy(starts),
        targets=torch.from_numpy(np.array([example.target for example in examples])),
        weights=torch.tensor([example.weight for example in examples]),
        rows=torch.tensor([example.row for example in examples]),
        lengths=tuple(lengths.tolist()),
    )


def recut(share: Sequence[Batch], tokens: int) -> list[Batch]:
    """A share in other micro-batches: those, to the bit, that it would have come in with that many tokens_per_micro_batch.

    share: as it was cut, longest text first. So a rank that halves its micro-batches while it runs computes what a
    run does that begins with the halves.
    """
    lengths = [length for batch in share for length in batch.lengths]
    ends = list(accumulate(lengths, initial=0))
    a_token, a_text = ("ids", "positions", "segments"), ("targets", "weights", "rows")
    whole = {name: torch.cat([getattr(batch, name) for batch in share]) for name in (*a_token, *a_text)}
    batches = []
    for part in cut(lengths, tokens):
        first, last = part[0], part[-1] + 1
        assert part == list(range(first, last)), "the texts of a share come longest first"
        fields = {name: whole[name][ends[first] : ends[last]] for name in a_token} | {name: whole[name][first:last] for name in a_text}
        starts = (torch.tensor(ends[first : last + 1]) - ends[first]).to(whole["ids"].device)
        batches.append(Batch(**fields, starts=starts, lengths=tuple(lengths[first:last])))
    return batches


def one_token(batch: Batch) -> Batch:
    """The first token of a micro-batch as a text that counts nothing."""
    fields = {name: getattr(batch, name)[:1] for name in ("ids", "positions", "segments", "targets", "weights", "rows")}
    device = batch.ids.device
    fields |= {"weights": torch.zeros(1, device=device), "rows": torch.tensor([-1], device=device)}
    return Batch(**fields, starts=torch.tensor([0, 1], device=device), lengths=(1,))


@dataclass(frozen=True, kw_only=True)
class Batches:
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

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller; it is a step like any other."""
        return -(-len(self.examples) // self.rows_per_step)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """This rank's share of steps start, ..., stop - 1, counted over the whole run."""
        shares = _Shares(self, stop)
        loader = DataLoader(
            shares,
            batch_size=None,
            sampler=range(start, stop, shares.together),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            multiprocessing_context="fork" if self.workers else None,  # the rows are shared with the workers, not copied
            collate_fn=_as_it_is,
            worker_init_fn=leave_signals_to_the_rank,
            pin_memory=self.pin,
            generator=torch.Generator(),  # else the loader draws from the generator that dropout draws from
        )
        for step in chain.from_iterable(loader):
            if isinstance(step, BertdistError):
                raise step
            yield step


def sent_ahead(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
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


class _Shares(Dataset[list[Step | BertdistError]]):
    """Step number -> this rank's shares of this step and of some behind it. What a DataLoader can send to its workers.

    A message from a worker costs this process 1 to 3 ms beside a computation on all cores, whatever is in it: it is woken, and
    so is the thread that asks for the next one, when a core is free. So small steps share a message.
    """

    def __init__(self, batches: Batches, stop: int) -> None:
        self.batches, self.stop = batches, stop
        self.lengths = batches.examples.records.lengths()
        bytes_of_share = self.lengths.sum() / max(1, len(self.lengths)) * batches.rows_per_step / batches.ranks
        self.together = max(1, int(BYTES_PER_MESSAGE / max(1.0, bytes_of_share))) if batches.workers else 1
        self.epoch, self.order = -1, np.arange(len(batches.examples))

    def __getitem__(self, first: int) -> list[Step | BertdistError]:
        return [self._share(number) for number in range(first, min(first + self.together, self.stop))]

    def _share(self, number: int) -> Step | BertdistError:
        batches = self.batches
        epoch, step = divmod(number, batches.steps_per_epoch)
        if batches.shuffle and epoch != self.epoch:
            self.epoch, self.order = epoch, plan(len(batches.examples), batches.seed, epoch)
        rows = self.order[step * batches.rows_per_step : (step + 1) * batches.rows_per_step]
        share = deal(rows, self.lengths[rows], batches.ranks)[batches.rank]
        try:
            if not len(share):  # An idle rank still has to join the exchange of gradients: one text that counts nothing.
                shortest = rows[self.lengths[rows].argmin()]
                idle = [example._replace(row=-1, weight=0.0) for example in batches.examples[[shortest]]]
                return Step(number=number, share=[collate(idle)], rows=len(rows), idle=True)
            examples = batches.examples[share.tolist()]
        except BertdistError as error:  # raised in a worker it would arrive wrapped in the worker's traceback
            return error
        parts = cut([len(example.ids) for example in examples], batches.tokens_per_micro_batch)
        return Step(number=number, share=[collate([examples[i] for i in part]) for part in parts], rows=len(rows))


def _as_it_is(step: Any) -> Any:
    return step
