"""Attention over texts that lie end to end in one row: each text attends to itself only. One API, one kernel a device.

A model calls whatever is registered under its `attn_implementation`; `register()` adds NAME. The classifier hands a `Packing`
of the micro-batch to the model as a keyword argument, and transformers carries it down to `packed_attention`. Where only the
first token of each text is asked for (the last layer), queries are (N, ...) instead of (T, ...).

Three kernels, equal to float32 rounding (tests/unit/test_attention.py):
  buckets   texts of about one length together (attention_cpu.py). The CPU's.
  varlen    flash attention over the row as it is, dropout inside. CUDA, in half precision.
  padded    queries, keys and values only are laid out (N, longest) with a mask: one SDPA. Everything else.

Legend: T tokens, N texts, L tokens of one text, H heads, D size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bertdist.models import cpu_attention as attention_cpu
from bertdist.models.cpu_attention import Layout
from bertdist.models.dropout import DropoutMasks

NAME = "bertdist_packed"

Kernel = Literal["buckets", "padded", "varlen"]


@dataclass(frozen=True)
class Packing:
    """Where the texts of a micro-batch lie in its row."""

    kernel: Kernel
    lengths: tuple[int, ...]
    firsts: Tensor  # (N,) int64: the first token of each text
    heads: int
    layout: Layout | None = None  # on the CPU
    places: Tensor | None = (
        None  # (N, longest) int64: the token of each cell, 0 where there is none
    )
    real: Tensor | None = None  # (N, 1, 1, longest) bool: the cells that are tokens
    cells: Tensor | None = None  # (T,) int64: the cell of each token
    starts: Tensor | None = None  # (N + 1,) int32
    noise: DropoutMasks | None = None  # dropout's masks, on the CPU in training


def select_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """The kernel for a device and the type that attention computes in."""
    if device.type == "cpu":
        return "buckets"
    # the aten op, and not torch.nn.attention.varlen, whose dropout is fixed at 0 (torch 2.11 to 2.13)
    flash = (
        hasattr(torch.ops.aten, "_flash_attention_forward")
        and torch.backends.cuda.is_flash_attention_available()
    )
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    return (
        "varlen"
        if flash
        and fits
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        else "padded"
    )


def build_packing(
    lengths: Sequence[int],
    firsts: Tensor,
    heads: int,
    kernel: Kernel,
    noise: DropoutMasks | None = None,
) -> Packing:
    """Describe a row of texts of these lengths (any order; a sorted one makes few buckets). firsts: see Packing."""
    device = firsts.device
    if kernel == "buckets":
        return Packing(kernel, tuple(lengths), firsts, heads, Layout(lengths, heads), noise=noise)
    if kernel == "varlen":
        starts = F.pad(firsts, (0, 1), value=sum(lengths)).to(
            torch.int32
        )  # made on the device: a CUDA graph cannot copy from the host
        return Packing(kernel, tuple(lengths), firsts, heads, starts=starts)
    places, real = grid(lengths)
    arrays = (places, real[:, None, None, :], np.flatnonzero(real))
    there = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
    return Packing(
        kernel, tuple(lengths), firsts, heads, places=there[0], real=there[1], cells=there[2]
    )


def grid(lengths: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(N, longest) int64 tokens of a padded layout, 0 where there is none; and (N, longest) bool, where there is one."""
    size = np.asarray(lengths)
    column = np.arange(size.max())
    real = column < size[:, None]
    return np.where(real, (size.cumsum() - size)[:, None] + column, 0), real


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D), or (1, H, N, D): of the first tokens only
    key: Tensor,  # (1, H, T, D), like value
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (1, T or N, H, D).

    sliding_window: a token reads those less than so many places away (ModernBERT's local layers), None: all of its text.
    """
    # A name that is registered here but not for masks makes transformers 5.23 drop a 2-D mask without a word: without a packing
    # the texts would read each other.
    assert packing is not None and attention_mask is None, (
        "bertdist's attention was called outside of bertdist.classifier"
    )
    q, k, v = (
        x.transpose(1, 2)[0] for x in (query, key, value)
    )  # (T, H, D), the layout the projections left
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = (
        sliding_window
        if sliding_window is not None and sliding_window < max(packing.lengths)
        else None
    )
    if packing.kernel == "buckets":
        assert packing.layout is not None
        out = attention_cpu.attend(
            q, k, v, packing.layout, scale, window, dropout, packing.noise
        ).to(v.dtype)
    else:
        out = (_varlen if packing.kernel == "varlen" else _padded)(
            q, k, v, packing, dropout, scale, window
        )
    return out[None], None


def _band(length: int, window: int, queries: int, device: torch.device) -> Tensor:
    """(queries, length) bool: what the first `queries` tokens of a text see."""
    place = torch.arange(length, device=device)
    return (place[:queries, None] - place).abs() < window


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    dropout: float,
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's own flash attention over texts end to end; not run on a GPU yet."""
    assert packing.starts is not None
    longest, starts = max(packing.lengths), packing.starts
    queries, longest_query = starts, longest
    if len(q) != len(k):
        queries, longest_query = (
            torch.arange(len(starts), dtype=torch.int32, device=starts.device),
            1,
        )
        if (
            window is not None
        ):  # flash counts a window from the text's end: give a first token the keys that it sees, and no window
            assert not (q.is_cuda and torch.cuda.is_current_stream_capturing()), (
                "the host works out which: not for a CUDA graph"
            )
            lengths = np.asarray(packing.lengths)
            kept = np.minimum(lengths, window)
            near = np.repeat(lengths.cumsum() - lengths - (kept.cumsum() - kept), kept) + np.arange(
                kept.sum()
            )
            k, v = (
                x.index_select(0, torch.from_numpy(near).to(x.device, non_blocking=True))
                for x in (k, v)
            )
            starts = torch.from_numpy(np.concatenate([[0], kept.cumsum()]).astype(np.int32)).to(
                starts.device, non_blocking=True
            )
            longest, window = int(kept.max()), None
    reach = (
        {} if window is None else {"window_size_left": window - 1, "window_size_right": window - 1}
    )
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        queries,
        starts,
        longest_query,
        longest,
        dropout,
        False,
        False,
        scale=scale,
        **reach,
    )[0]
    return out


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    dropout: float,
    scale: float,
    window: int | None,
) -> Tensor:
    assert packing.places is not None and packing.cells is not None and packing.real is not None
    as_long = len(q) == len(k)
    keys, values = (x[packing.places].transpose(1, 2) for x in (k, v))  # (N, H, longest, D)
    queries = q[packing.places].transpose(1, 2) if as_long else q[:, :, None]
    mask = packing.real
    if window is not None:
        near = _band(keys.shape[2], window, queries.shape[2], q.device)
        # a cell that is no token sees all, so that no softmax is of nothing
        mask = (packing.real & near) | ~packing.real.transpose(2, 3)[:, :, : queries.shape[2]]
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return (
        out.transpose(1, 2).flatten(0, 1)[packing.cells] if as_long else out[:, :, 0]
    )  # (T or N, H, D)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register() -> None:
    """Make NAME known to transformers, for attention and for masks (there are none)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
