"""Attention over texts packed end to end in one row: each text attends to itself only.

Usage: load a model with `attn_implementation=NAME` after `register()`, and hand it
`packing=build_packing(...)` of the micro-batch as a keyword argument; transformers carries it down
to `packed_attention`. A layer that computes the first token of each text only has N queries, not T.

Three kernels, equal to float32 rounding (tests/unit/models/test_attention.py):
  buckets   batched products over texts of about one length (cpu_attention.py). For the CPU.
  varlen    flash attention over the packed row, dropout inside. For CUDA in half precision.
  padded    queries, keys and values are padded to (N, longest): one SDPA with a mask. For all else.

Legend: T tokens, N texts, H heads, D head size; Q is T, or N where only first tokens are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bertdist.models.cpu_attention import BucketLayout, bucketed_attention
from bertdist.models.dropout import DropoutMasks

NAME = "bertdist_packed"

Kernel = Literal["buckets", "padded", "varlen"]


@dataclass(frozen=True)
class Packing:
    """Where the texts of a micro-batch lie in its row, in the form that the kernel reads."""

    kernel: Kernel
    lengths: tuple[int, ...]  # tokens of each text
    first_tokens: Tensor  # (N,) int64: index of the first token of each text
    heads: int
    # of the kernel "buckets"
    buckets: BucketLayout | None = None
    dropout_masks: DropoutMasks | None = None  # in training
    # of the kernel "padded"
    pad_index: Tensor | None = None  # (N, longest) int64: token at each position, 0 for padding
    attention_mask: Tensor | None = None  # (N, 1, 1, longest) bool: False for padding
    unpad_index: Tensor | None = None  # (T,) int64: position of each token in (N x longest)
    # of the kernel "varlen"
    cu_seqlens: Tensor | None = None  # (N + 1,) int32: cumulative lengths


def select_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """The kernel for a device and the type that attention computes in."""
    if device.type == "cpu":
        return "buckets"
    # The aten op: torch.nn.attention.varlen has its dropout fixed at 0 (torch 2.11 to 2.13).
    has_op = hasattr(torch.ops.aten, "_flash_attention_forward")
    flash = has_op and torch.backends.cuda.is_flash_attention_available()
    fits = dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    if not (flash and fits and device.type == "cuda"):
        return "padded"
    return "varlen" if torch.cuda.get_device_capability(device) >= (8, 0) else "padded"


def build_packing(
    lengths: Sequence[int],
    first_tokens: Tensor,
    heads: int,
    kernel: Kernel,
    dropout_masks: DropoutMasks | None = None,
) -> Packing:
    """Describe a row of texts of these lengths, in any order; sorted lengths make few buckets."""
    device, sizes = first_tokens.device, tuple(lengths)
    if kernel == "buckets":
        layout = BucketLayout(lengths, heads)
        return Packing(
            kernel, sizes, first_tokens, heads, buckets=layout, dropout_masks=dropout_masks
        )
    if kernel == "varlen":
        # made on the device: a CUDA graph cannot copy from the host
        cu_seqlens = F.pad(first_tokens, (0, 1), value=sum(lengths)).to(torch.int32)
        return Packing(kernel, sizes, first_tokens, heads, cu_seqlens=cu_seqlens)
    index, real = padded_layout(lengths)
    arrays = (index, real[:, None, None, :], np.flatnonzero(real))
    pad, mask, unpad = (torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)
    return Packing(
        kernel, sizes, first_tokens, heads, pad_index=pad, attention_mask=mask, unpad_index=unpad
    )


def padded_layout(lengths: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token at each padded position (N, longest) int64, 0 for padding; mask (N, longest) bool."""
    sizes = np.asarray(lengths)
    column = np.arange(sizes.max())
    mask = column < sizes[:, None]
    return np.where(mask, (sizes.cumsum() - sizes)[:, None] + column, 0), mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    query (1, H, Q, D), key and value (1, H, T, D) -> (1, Q, H, D).
    sliding_window: a token attends to tokens less than so many positions away (ModernBERT's local
    layers); None: to all of its text.
    """
    # transformers 5.23 silently drops a 2-D mask for an attention registered without a mask
    # function: without a packing the texts would attend to each other.
    assert packing is not None and attention_mask is None, (
        f"attention {NAME!r} needs a packing and no mask: call the model through "
        "bertdist.models.classifier.Classifier"
    )
    # (Q, H, D) and (T, H, D), the layout that the projections made
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window
    if window is not None and window >= max(packing.lengths):
        window = None
    if packing.kernel == "buckets":
        assert packing.buckets is not None
        out = bucketed_attention(
            q, k, v, packing.buckets, scale, window, dropout, packing.dropout_masks
        )
        return out.to(v.dtype)[None], None
    kernel = _varlen if packing.kernel == "varlen" else _padded
    return kernel(q, k, v, packing, dropout, scale, window)[None], None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, p: float, scale: float, window: int | None
) -> Tensor:
    """torch's own flash attention over packed texts; not run on a GPU yet."""
    assert packing.cu_seqlens is not None
    longest, cu_seqlens = max(packing.lengths), packing.cu_seqlens
    cu_queries, longest_query = cu_seqlens, longest
    if len(q) != len(k):
        cu_queries = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
        longest_query = 1
        if window is not None:
            # Flash attention counts a window from the text's end: give a first token the keys in
            # its window, and no window.
            assert not (q.is_cuda and torch.cuda.is_current_stream_capturing()), (
                "the host computes the keys of a window: not inside a CUDA graph"
            )
            lengths = np.asarray(packing.lengths)
            keys_in_window = np.minimum(lengths, window)
            offsets = lengths.cumsum() - lengths - (keys_in_window.cumsum() - keys_in_window)
            index = torch.from_numpy(
                np.repeat(offsets, keys_in_window) + np.arange(keys_in_window.sum())
            )
            index = index.to(k.device, non_blocking=True)
            k, v = k.index_select(0, index), v.index_select(0, index)
            cumulative = torch.from_numpy(
                np.concatenate([[0], keys_in_window.cumsum()]).astype(np.int32)
            )
            cu_seqlens = cumulative.to(cu_seqlens.device, non_blocking=True)
            longest, window = int(keys_in_window.max()), None
    sides = ("window_size_left", "window_size_right")
    windows = {} if window is None else dict.fromkeys(sides, window - 1)
    sizes = (cu_queries, cu_seqlens, longest_query, longest)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, *sizes, p, False, False, scale=scale, **windows
    )[0]
    return out


def _padded(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, p: float, scale: float, window: int | None
) -> Tensor:
    """q (Q, H, D), k and v (T, H, D) -> (Q, H, D) by one SDPA over padded texts."""
    index, mask = packing.pad_index, packing.attention_mask
    assert index is not None and mask is not None and packing.unpad_index is not None
    all_tokens = len(q) == len(k)
    keys, values = (x[index].transpose(1, 2) for x in (k, v))  # (N, H, longest, D)
    # (N, H, longest or 1, D)
    queries = q[index].transpose(1, 2) if all_tokens else q[:, :, None]
    if window is not None:
        position = torch.arange(keys.shape[2], device=q.device)
        near = (position[: queries.shape[2], None] - position).abs() < window
        # padding attends to everything, so that no softmax is over nothing
        mask = (mask & near) | ~mask.transpose(2, 3)[:, :, : queries.shape[2]]
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=p, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1)[packing.unpad_index] if all_tokens else out[:, :, 0]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def register() -> None:
    """Register NAME with transformers, for attention and for masks (there are none)."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
