"""Dropout masks that belong to the rows, not to the devices: a function of (seed, step, row) alone.

On a CPU a step with dropout is the same on any number of ranks, in any micro-batches, padded too.

1. Every text of a micro-batch has a bit generator (numpy's SFC64), seeded by (seed, step, row).
2. Each dropout layer, and the attention of each layer, takes the next bits of each text: 16 per
   element, which is dropped where they are below p x 65,536. So p is met to 1 / 131,072, and the
   scale is exact for the p that is met.
3. 434 tokens of a 6 x 384 model take 2.8 million draws per step: 3 ms, where torch takes 26 (its
   CPU draws run on one thread).

On other devices torch's own dropout is used, seeded by (seed, step, rank). So it is in the
attention of a model that runs padded, if that is SDPA; and where a model has activations of a shape
that `_keep_mask` does not know, its masks are a function of the micro-batch.

Legend: T tokens, N texts, H heads, W width of the last dimension.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # of 16 random bits

_seed_and_step: tuple[int, int] = (0, 0)

# of the current micro-batch, for compiled layers
_current_masks: "DropoutMasks | None" = None


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and the rows (CPU) or the rank (elsewhere)."""
    global _seed_and_step
    _seed_and_step = seed, step
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    seed_torch(int(state[0]))


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the CPU and, where CUDA is in use, of the GPUs.

    `torch.manual_seed` does the same, and notes the seed with a stack trace for every kind of
    device that is not in use (CUDA, XPU, MTIA): 1 to 3 ms on every step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class DropoutMasks:
    """The dropout masks of one micro-batch on the CPU."""

    def __init__(self, rows: Iterable[int], lengths: Sequence[int]) -> None:
        """rows: row numbers, -1 for the text of an idle rank; lengths: tokens of each text."""
        self.lengths = lengths
        self._text_generators = [np.random.SFC64([*_seed_and_step, row + 1]) for row in rows]
        self._shared_generator = np.random.SFC64([*_seed_and_step, 0, 1])

    def draw(self, sizes: Sequence[int], p: float) -> Tensor:
        """(sum of sizes,) bool, False with probability p: the next `sizes[i]` of each text i."""
        pairs = zip(self._text_generators, sizes, strict=True)
        bits = np.concatenate([_bits(generator, size) for generator, size in pairs])
        return torch.from_numpy(bits >= _threshold(p))

    def draw_shared(self, size: int, p: float) -> Tensor:
        """(size,) bool for what belongs to no text, like a table of relative positions.

        The same in every micro-batch of a step.
        """
        return torch.from_numpy(_bits(self._shared_generator, size) >= _threshold(p))

    def replay_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For activation checkpointing: the second context draws again what the first one drew."""
        generators = [*self._text_generators, self._shared_generator]
        states: list[Any] = []

        def restore(earlier: list[Any]) -> None:
            for generator, state in zip(generators, earlier, strict=True):
                generator.state = state

        @contextmanager
        def forward() -> Iterator[None]:
            states.extend(generator.state for generator in generators)
            yield

        @contextmanager
        def recompute() -> Iterator[None]:
            present = [generator.state for generator in generators]
            restore(states)
            yield
            restore(present)

        return forward(), recompute()


def _bits(generator: np.random.SFC64, size: int) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """(size,) uint16: the next random bits."""
    return generator.random_raw(-(-size // 4)).view(np.uint16)[:size]


def set_current_masks(masks: DropoutMasks | None) -> None:
    """The masks for compiled layers: an operator takes tensors and numbers, not DropoutMasks."""
    global _current_masks
    _current_masks = masks


# An operator that the compiler cannot look into. The tag: it may not be removed, merged with
# another call, or run again in the backward.
@torch.library.custom_op(
    "bertdist::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _keep_mask_op(x: Tensor, p: float) -> Tensor:
    assert _current_masks is not None, "compiled layers are for training"
    return _keep_mask(_current_masks, x.shape, p)


@_keep_mask_op.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def keep_scale(p: float) -> float:
    """The factor of the kept elements: 1 / (1 - p), with p rounded to a multiple of 2^-16."""
    return _LEVELS / max(1, _LEVELS - _threshold(p))


def scale_mask(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Bool -> 0 or `keep_scale(p)`. As bytes: torch 2.13 converts bool six times as slowly."""
    return keep.view(torch.uint8).to(dtype).mul_(keep_scale(p))


def _threshold(p: float) -> int:
    """Elements whose 16 bits are below it are dropped."""
    return round(p * _LEVELS)


class Dropout(nn.Module):
    """nn.Dropout with the masks of the micro-batch's texts if there are any, else torch's."""

    def __init__(self, p: float, masks: Callable[[], DropoutMasks | None]) -> None:
        super().__init__()
        self.p, self._masks = p, masks

    def scaled_mask(self, x: Tensor) -> Tensor | None:
        """What the forward multiplies x by, from the masks of the texts; None: nothing."""
        masks = self._masks()
        if masks is None or not self.training or self.p == 0:
            return None
        return scale_mask(_keep_mask(masks, x.shape, self.p), self.p, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out; `_keep_mask` says which shapes have a mask per text."""
        if torch.compiler.is_compiling() and self.training and self.p and x.device.type == "cpu":
            keep: Tensor = torch.ops.bertdist.keep_mask(x, self.p)
            return x * torch.mul(keep, x.new_tensor(keep_scale(self.p)))
        mask = self.scaled_mask(x)
        return F.dropout(x, self.p, self.training) if mask is None else x * mask


def _keep_mask(masks: DropoutMasks, shape: torch.Size, p: float) -> Tensor:
    """Bool of that shape, False for what is dropped.

    Shapes with a mask per text: (1, T, W) tokens, (N, longest, W) the same padded, (N, H, longest,
    longest) attention, (1, N, W) or (N, ...) texts.
    """
    lengths, texts, longest = masks.lengths, len(masks.lengths), max(masks.lengths)
    if shape[:-1] == (1, sum(lengths)):
        return masks.draw([length * shape[-1] for length in lengths], p).view(shape)
    if shape[0] == texts and shape[1:-1] == (longest,):
        keep = masks.draw([length * shape[-1] for length in lengths], p).view(-1, shape[-1])
        return nn.utils.rnn.pad_sequence(keep.split(list(lengths)), batch_first=True)
    if shape[0] == texts and shape[2:] == (longest, longest):
        sizes = [shape[1] * length**2 for length in lengths]
        parts = masks.draw(sizes, p).split(sizes)
        keep = torch.ones(shape, dtype=torch.bool)
        for text, part, length in zip(keep, parts, lengths, strict=True):
            text[:, :length, :length] = part.view(-1, length, length)
        return keep
    if shape[0] == texts or shape[:-1] == (1, texts):
        return masks.draw([shape.numel() // texts] * texts, p).view(shape)
    return masks.draw_shared(shape.numel(), p).view(shape)


def replace_dropouts(model: nn.Module, masks: Callable[[], DropoutMasks | None]) -> None:
    """Replace every nn.Dropout of a model by `Dropout`; weights and their names stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, masks))
