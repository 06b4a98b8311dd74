"""Micro-batches: texts laid end to end, and how a rank's share of a step is cut into them.

Legend: T tokens, N texts of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertdist.data.source import ReaderState, SkippedRow
from bertdist.data.tokenization import Example


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Several texts laid end to end, without padding."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, counts from 0 again at each text
    segments: Tensor  # (T,) int64, 1 in the second text of a pair
    starts: Tensor  # (N + 1,) int64: text i is ids[starts[i]:starts[i + 1]]
    targets: Tensor  # (N,) int64 or float32, or (N, outputs) float32
    weights: Tensor  # (N,) float32, 0 for a text that only keeps an idle rank busy
    rows: Tensor  # (N,) int64, row numbers of the source; -1 for the text of an idle rank
    lengths: tuple[int, ...]  # tokens of each text, known to the host without asking the device

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        fields: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **fields)

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device; the copy runs beside the host where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that another stream reads the batch than the one that it was made on."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def pin_memory(self) -> "PackedBatch":
        """Called by the DataLoader's pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a loader worker as bytes: as shared tensors every field of every batch ahead would hold an open file."""
        return _unpack, (
            {
                name: value.numpy() if isinstance(value, Tensor) else value
                for name, value in vars(self).items()
            },
        )


def _unpack(fields: dict[str, Any]) -> PackedBatch:
    arrays: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }
    return PackedBatch(**arrays)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of one optimizer step."""

    number: int  # counts from 0 over the whole run
    share: list[PackedBatch]  # this rank's micro-batches, never empty
    rows: int  # rows of the step, all ranks together
    idle: bool = (
        False  # the share is one text that counts nothing: this rank has no row in this step
    )
    place: ReaderState | None = None  # of a stream: reading from here gives the window of its rows
    after: ReaderState | None = None  # of a stream: where the reading goes on behind this step
    bad: tuple[SkippedRow, ...] = ()  # of a stream: rows that were left out on the way here

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


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end. Vectorised: 32 sentences cost 0.1 ms."""
    lengths = np.array([len(example.ids) for example in examples])
    ends = lengths.cumsum()
    starts = np.concatenate([[0], ends])
    positions = np.arange(ends[-1]) - np.repeat(starts[:-1], lengths)
    return PackedBatch(
        ids=torch.from_numpy(
            np.concatenate([example.ids for example in examples]).astype(np.int64)
        ),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(
            np.concatenate([example.segments for example in examples]).astype(np.int64)
        ),
        starts=torch.from_numpy(starts),
        targets=torch.from_numpy(np.array([example.target for example in examples])),
        weights=torch.tensor([example.weight for example in examples]),
        rows=torch.tensor([example.row for example in examples]),
        lengths=tuple(lengths.tolist()),
    )


def split_batch(share: Sequence[PackedBatch], tokens: int) -> list[PackedBatch]:
    """A share in other micro-batches: those, to the bit, that it would have come in with that many tokens_per_micro_batch.

    share: as it was cut, longest text first. So a rank that halves its micro-batches while it runs computes what a
    run does that begins with the halves.
    """
    lengths = [length for batch in share for length in batch.lengths]
    ends = list(accumulate(lengths, initial=0))
    a_token, a_text = ("ids", "positions", "segments"), ("targets", "weights", "rows")
    whole = {
        name: torch.cat([getattr(batch, name) for batch in share]) for name in (*a_token, *a_text)
    }
    batches = []
    for part in cut(lengths, tokens):
        first, last = part[0], part[-1] + 1
        assert part == list(range(first, last)), "the texts of a share come longest first"
        fields = {name: whole[name][ends[first] : ends[last]] for name in a_token} | {
            name: whole[name][first:last] for name in a_text
        }
        starts = (torch.tensor(ends[first : last + 1]) - ends[first]).to(whole["ids"].device)
        batches.append(PackedBatch(**fields, starts=starts, lengths=tuple(lengths[first:last])))
    return batches


def single_token_batch(batch: PackedBatch) -> PackedBatch:
    """The first token of a micro-batch as a text that counts nothing."""
    fields = {
        name: getattr(batch, name)[:1]
        for name in ("ids", "positions", "segments", "targets", "weights", "rows")
    }
    device = batch.ids.device
    fields |= {"weights": torch.zeros(1, device=device), "rows": torch.tensor([-1], device=device)}
    return PackedBatch(**fields, starts=torch.tensor([0, 1], device=device), lengths=(1,))
