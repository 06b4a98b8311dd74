"""Dropout whose masks belong to the rows, not to the devices: what a text loses is a function of (seed, step, row) alone.

In: the rows of a micro-batch. Out: keep-or-drop masks, in any order of sites that a model asks for. It is one module because the
promise is one: on CPU a step with dropout learns the same on any number of ranks, in any micro-batches, padded or not.

1. Every text of a micro-batch has its own bit generator (numpy's SFC64), started from (seed, step, row).
2. A site (a dropout layer, the attention of a layer) takes the next bits of each text: 16 for an element, dropped where they are
   below p x 65,536. So p is met to 1 / 131,072, and the scale is exact for the p that is met.
3. 434 tokens of a 6 x 384 model take 2.8 million draws a step: 3 ms, where torch takes 26 (its CPU draws run on one thread).

On other devices torch's own dropout is used, seeded by (seed, step, rank). So it is in the attention of a model that runs padded, if
that is SDPA; and where a model lays texts out in another way than `_mask` knows, its masks are a function of the micro-batch.

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

_in_hand: "DropoutMasks | None" = (
    None  # of the micro-batch that is computed now, for layers that are compiled
)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout of the steps to come is a function of this seed, this step and the rows (CPU) or the rank (elsewhere)."""
    global _seed_of_step
    _seed_of_step = seed, step
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    )


class DropoutMasks:
    """The masks of one micro-batch on the CPU."""

    def __init__(self, rows: Iterable[int], lengths: Sequence[int]) -> None:
        """rows: row numbers, -1 for the text of an idle rank; lengths: tokens of each text."""
        self.lengths = lengths
        self._generators = [np.random.SFC64([*_seed_of_step, row + 1]) for row in rows]
        self._common = np.random.SFC64([*_seed_of_step, 0, 1])

    def keep(self, sizes: Sequence[int], p: float) -> Tensor:
        """(sum of sizes,) bool, False with probability p: the next `sizes[i]` elements of each text i, texts end to end."""
        bits = [
            g.random_raw(-(-size // 4)).view(np.uint16)[:size]
            for g, size in zip(self._generators, sizes, strict=True)
        ]
        return torch.from_numpy(np.concatenate(bits) >= _dropped(p))

    def keep_common(self, size: int, p: float) -> Tensor:
        """(size,) bool for what is of no text, like a table of relative positions: the same in every micro-batch of a step."""
        return torch.from_numpy(
            self._common.random_raw(-(-size // 4)).view(np.uint16)[:size] >= _dropped(p)
        )

    def replayed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For activation checkpointing: the second context draws again what the first one drew."""
        states: list[Any] = []

        @contextmanager
        def first() -> Iterator[None]:
            states.extend(generator.state for generator in self._all())
            yield

        @contextmanager
        def again() -> Iterator[None]:
            present = [generator.state for generator in self._all()]
            self._set(states)
            yield
            self._set(present)

        return first(), again()

    def _all(self) -> list[np.random.SFC64]:
        return [*self._generators, self._common]

    def _set(self, states: list[Any]) -> None:
        for generator, state in zip(self._all(), states, strict=True):
            generator.state = state


def hold(noise: DropoutMasks | None) -> None:
    """Give compiled layers the masks of the micro-batch that is computed now: an operator takes tensors and numbers, no Noise."""
    global _in_hand
    _in_hand = noise


# An operator that the compiler cannot look into. The tag: it may not be left out, made once for two, or made again in the backward.
@torch.library.custom_op(
    "bertdist::keep", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _keep(x: Tensor, p: float) -> Tensor:
    assert _in_hand is not None, "compiled layers are for training"
    return _mask(_in_hand, x.shape, p)


@_keep.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def scale_of(p: float) -> float:
    """What is kept is multiplied by this: 1 / (1 - the p that 16 bits can meet)."""
    return _LEVELS / max(1, _LEVELS - _dropped(p))


def _dropped(p: float) -> int:
    return round(p * _LEVELS)


class Dropout(nn.Module):
    """Stands in for nn.Dropout: with the masks of the micro-batch's texts where there are any, else torch's own."""

    def __init__(self, p: float, noise: Callable[[], DropoutMasks | None]) -> None:
        super().__init__()
        self.p, self._noise = p, noise

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out; see `_mask` for the shapes that are known as texts'."""
        if torch.compiler.is_compiling() and self.training and self.p and x.device.type == "cpu":
            keep: Tensor = torch.ops.bertdist.keep(x, self.p)
        else:
            noise = self._noise()
            if noise is None or not self.training or self.p == 0:
                return F.dropout(x, self.p, self.training)
            keep = _mask(noise, x.shape, self.p)
        return x * torch.mul(keep, x.new_tensor(scale_of(self.p)))


def _mask(noise: DropoutMasks, shape: torch.Size, p: float) -> Tensor:
    """What is kept, of that shape.

    Known as texts': (1, T, W) tokens, (N, longest, W) the same padded, (N, H, longest, longest) attention, (1, N, W) or (N, ...) texts.
    """
    lengths, texts, longest = noise.lengths, len(noise.lengths), max(noise.lengths)
    if shape[:-1] == (1, sum(lengths)):
        return noise.keep([length * shape[-1] for length in lengths], p).view(shape)
    if shape[0] == texts and shape[1:-1] == (longest,):
        keep = noise.keep([length * shape[-1] for length in lengths], p).view(-1, shape[-1])
        return nn.utils.rnn.pad_sequence(keep.split(list(lengths)), batch_first=True)
    if shape[0] == texts and shape[2:] == (longest, longest):
        parts = noise.keep([shape[1] * length**2 for length in lengths], p).split(
            [shape[1] * length**2 for length in lengths]
        )
        keep = torch.ones(shape, dtype=torch.bool)
        for text, part, length in zip(keep, parts, lengths, strict=True):
            text[:, :length, :length] = part.view(-1, length, length)
        return keep
    if shape[0] == texts or shape[:-1] == (1, texts):
        return noise.keep([shape.numel() // texts] * texts, p).view(shape)
    return noise.keep_common(shape.numel(), p).view(shape)


def replace_dropouts(model: nn.Module, noise: Callable[[], DropoutMasks | None]) -> None:
    """Put `Dropout` in the place of every nn.Dropout of a model; weights and their names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, noise))
