"""Attention over texts that lie end to end in one row: each text attends to itself only. One API, one kernel a device.

A model calls whatever is registered under its `attn_implementation`; `register()` adds NAME. The classifier hands a `Packing`
of the micro-batch to the model as a keyword argument, and transformers carries it down to `packed_attention`.

Two kernels, chosen by device, equal to float32 rounding (tests/unit/test_attention.py):
  grouped   texts of one length are views of the row (the row is sorted by length): one mask-free SDPA a length, nothing copied
            or padded. The CPU's.
  padded    queries, keys and values only are laid out (N, longest) with a mask: one SDPA, no matter how many lengths. For GPUs,
            where many small kernels cost more than the padding of attention alone.

Legend: T tokens, N texts, L tokens of one text, H heads, D size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "bertdist_packed"
Kernel = Literal["grouped", "padded"]


@dataclass(frozen=True)
class Packing:
    """Where the texts of a micro-batch lie in its row."""

    kernel: Kernel
    groups: list[tuple[int, int, int]]  # (first token, texts, L) of each run of texts of one length
    places: Tensor | None = None  # (N, longest) int64: the token of each cell, 0 where there is none
    real: Tensor | None = None  # (N, 1, 1, longest) bool: the cells that are tokens
    cells: Tensor | None = None  # (T,) int64: the cell of each token


def pack(lengths: Sequence[int], device: torch.device, kernel: Kernel | None = None) -> Packing:
    """Describe a row of texts of these lengths (any order; a sorted one makes few groups). kernel None: the device's own."""
    kernel = kernel or ("grouped" if device.type == "cpu" else "padded")
    if kernel == "grouped":
        groups, first = [], 0
        for length, run in groupby(lengths):
            texts = len(list(run))
            groups.append((first, texts, length))
            first += texts * length
        return Packing(kernel, groups)
    places, real = grid(lengths)
    tensors = (torch.from_numpy(array).to(device, non_blocking=True) for array in (places, real[:, None, None, :], np.flatnonzero(real)))
    return Packing(kernel, [], *tensors)


def grid(lengths: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(N, longest) int64 tokens of a padded layout, 0 where there is none; and (N, longest) bool, where there is one."""
    size = np.asarray(lengths)
    column = np.arange(size.max())
    real = column < size[:, None]
    return np.where(real, (size.cumsum() - size)[:, None] + column, 0), real


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D), like key and value
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (1, T, H, D)."""
    # A name that is registered here but not for masks makes transformers 5.23 drop a 2-D mask without a word: without a packing
    # the texts would read each other.
    assert packing is not None and attention_mask is None, "bertdist's attention was called outside of bertdist.classifier"
    rows = [x.transpose(1, 2)[0] for x in (query, key, value)]  # (T, H, D), the layout the projections left
    if packing.kernel == "grouped":
        return _grouped(rows, packing.groups, dropout, scaling)[None], None
    return _padded(rows, packing, dropout, scaling)[None], None


def _grouped(rows: list[Tensor], groups: list[tuple[int, int, int]], dropout: float, scaling: float | None) -> Tensor:
    parts = []
    for first, texts, length in groups:
        q, k, v = (x[first : first + texts * length].unflatten(0, (texts, length)).transpose(1, 2) for x in rows)  # (texts, H, L, D)
        part = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (texts x L, H, D)
    return torch.cat(parts)


def _padded(rows: list[Tensor], packing: Packing, dropout: float, scaling: float | None) -> Tensor:
    assert packing.places is not None and packing.cells is not None
    q, k, v = (x[packing.places].transpose(1, 2) for x in rows)  # (N, H, longest, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.real, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[packing.cells]  # (T, H, D)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register() -> None:
    """Make NAME known to transformers, for attention and for masks (there are none)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
