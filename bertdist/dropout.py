"""Dropout whose masks belong to the rows, not to the devices: what a text loses is a function of (seed, step, row) alone.

In: the rows of a micro-batch. Out: keep-or-drop masks, in any order of sites that a model asks for. It is one module because the
promise is one: on CPU a step with dropout learns the same on any number of ranks, in any micro-batches, padded or not.

1. Every text of a micro-batch has its own bit generator (numpy's SFC64), started from (seed, step, row).
2. A site (a dropout layer, the attention of a layer) takes the next bits of each text: 16 for an element, dropped where they are
   below p x 65,536. So p is met to 1 / 131,072, and the scale is exact for the p that is met.
3. 434 tokens of a 6 x 384 model take 2.8 million draws a step: 3 ms, where torch takes 26 (its CPU draws run on one thread).

On other devices torch's own dropout is used, seeded by (seed, step, rank).

Legend: T tokens, N texts, W width of a site.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16
_seed_of_step: tuple[int, int] = (0, 0)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout of the steps to come is a function of this seed, this step and the rows (CPU) or the rank (elsewhere)."""
    global _seed_of_step
    _seed_of_step = seed, step
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class Noise:
    """The masks of one micro-batch on the CPU."""

    def __init__(self, rows: Iterable[int], lengths: Sequence[int]) -> None:
        """rows: row numbers, -1 for the text of an idle rank; lengths: tokens of each text."""
        self.lengths = lengths
        self._generators = [np.random.SFC64([*_seed_of_step, row + 1]) for row in rows]

    def keep(self, sizes: Sequence[int], p: float) -> Tensor:
        """(sum of sizes,) bool, False with probability p: the next `sizes[i]` elements of each text i, texts end to end."""
        bits = [g.random_raw(-(-size // 4)).view(np.uint16)[:size] for g, size in zip(self._generators, sizes, strict=True)]
        return torch.from_numpy(np.concatenate(bits) >= _dropped(p))

    def replayed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For activation checkpointing: the second context draws again what the first one drew."""
        states: list[Any] = []

        @contextmanager
        def first() -> Iterator[None]:
            states.extend(generator.state for generator in self._generators)
            yield

        @contextmanager
        def again() -> Iterator[None]:
            present = [generator.state for generator in self._generators]
            self._set(states)
            yield
            self._set(present)

        return first(), again()

    def _set(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.state = state


def scale_of(p: float) -> float:
    """What is kept is multiplied by this: 1 / (1 - the p that 16 bits can meet)."""
    return _LEVELS / max(1, _LEVELS - _dropped(p))


def _dropped(p: float) -> int:
    return round(p * _LEVELS)


class Dropout(nn.Module):
    """Stands in for nn.Dropout: with the masks of the micro-batch's texts where there are any, else torch's own."""

    def __init__(self, p: float, noise: Callable[[], Noise | None]) -> None:
        super().__init__()
        self.p, self._noise = p, noise

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, T, W) tokens, (N, longest, W) the same padded, (1, N, W) or (N, ...) texts; same shape out."""
        noise = self._noise()
        if noise is None or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        lengths, texts = noise.lengths, len(noise.lengths)
        if x.shape[0] == 1 and x.shape[-2] == sum(lengths):
            keep = noise.keep([length * x.shape[-1] for length in lengths], self.p).view_as(x)
        elif x.ndim == 3 and x.shape[0] == texts and x.shape[1] == max(lengths):
            keep = noise.keep([length * x.shape[-1] for length in lengths], self.p).view(-1, x.shape[-1])
            keep = nn.utils.rnn.pad_sequence(keep.split(list(lengths)), batch_first=True)
        elif x.shape[0] == texts or x.shape[:-1] == (1, texts):
            keep = noise.keep([x.numel() // texts] * texts, self.p).view_as(x)
        else:  # not of the texts, like a table of relative positions
            return F.dropout(x, self.p, self.training)
        return x * torch.mul(keep, x.new_tensor(scale_of(self.p)))


def replace_dropouts(model: nn.Module, noise: Callable[[], Noise | None]) -> None:
    """Put `Dropout` in the place of every nn.Dropout of a model; weights and their names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, noise))
