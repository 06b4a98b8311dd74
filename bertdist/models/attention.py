"""Attention over texts packed end to end in one row: each text attends to itself only.

Usage: load a model with `attn_implementation=NAME` after `register()`, and hand it
`packing=build_packing(...)` of the micro-batch as a keyword argument; transformers carries it down
to `packed_attention`. A layer that computes the first token of each text only has N queries, not T.

Three kernels, equal to float32 rounding (tests/unit/models/test_attention.py):
  buckets   batched products over texts of about one length (`bucketed_attention`). For the CPU.
  varlen    flash attention over the packed row, dropout inside. For CUDA in half precision.
  padded    queries, keys and values are padded to (N, longest): one SDPA with a mask. For all else.

`bucketed_attention`: few large products, and dropout masks of each row.

1. Texts whose length rounds up to the same multiple of 16 share a bucket, (texts x heads, that
   length). So queries, keys and values are padded, by 15 at most, and nothing else of the model is.
2. They are padded by one gather each for all buckets, and the output is unpadded by one.
3. Products, softmax and masks are written out, the backward too: with dropout, one SDPA per length
   takes 4 times as long (torch 2.13: 8.4 ms against 1.9 for 385 tokens of 15 lengths, forward and
   backward). Where no gradient is needed, one SDPA per length is used.

Legend: T tokens, N texts, H heads, D head size, C padded positions of all buckets (texts x H x
longest each); Q is T, or N where only first tokens are computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from bertdist.models.dropout import DropoutMasks, scale_mask

NAME = "bertdist_packed"

Kernel = Literal["buckets", "padded", "varlen"]

# float32 numbers of a 512-bit register: torch's softmax takes 6 times as long where a row is
# shorter
SIMD_WIDTH = 16
# 4 MiB: what a core's cache holds, and all that is kept where there is no backward
MAX_SCORES_PER_BUCKET = 1 << 20


@dataclass(frozen=True)
class Bucket:
    """Neighbouring texts, padded to one length."""

    first: int  # index of its first text
    lengths: tuple[int, ...]  # of its texts, tokens
    longest: int  # the length that they are padded to

    @cached_property
    def padding(self) -> Tensor | None:
        """(texts, longest) bool: True for padding; None where there is none."""
        if min(self.lengths) == self.longest:
            return None
        return torch.arange(self.longest) >= torch.tensor(self.lengths)[:, None]


# int64 indices of the attention weights of tokens among the weights of all buckets, and the shape
# of each bucket's
_Weights = tuple[Tensor, list[tuple[int, int, int]]]


class BucketLayout:
    """The buckets of a micro-batch, and which token is at each of their padded positions."""

    def __init__(self, lengths: Sequence[int], heads: int) -> None:
        """lengths: tokens of each text, best sorted."""
        self.heads, self.buckets = heads, _make_buckets(lengths, heads)
        sizes, starts = np.asarray(lengths), np.cumsum(lengths) - lengths
        index_parts, padding_parts = [], []  # (texts, H, longest) per bucket, flat
        for bucket in self.buckets:
            texts = slice(bucket.first, bucket.first + len(bucket.lengths))
            position = np.arange(bucket.longest)
            padding = position >= sizes[texts, None]  # (texts, longest)
            token = np.where(padding, starts[texts, None], starts[texts, None] + position)
            row = token[:, None, :] * heads + np.arange(heads)[:, None]  # (texts, H, longest)
            index_parts.append(row.reshape(-1))
            padding_parts.append(np.broadcast_to(padding[:, None, :], row.shape).reshape(-1))
        pad_index, padding = np.concatenate(index_parts), np.concatenate(padding_parts)
        unpad_index = np.empty(sizes.sum() * heads, dtype=np.int64)
        unpad_index[pad_index[~padding]] = np.flatnonzero(~padding)
        self.pad_index = torch.from_numpy(pad_index)  # (C,) int64: row of a (T x H, D) matrix
        self.unpad_index = torch.from_numpy(unpad_index)  # (T x H,) int64: its padded position
        # int64: padded positions without a token
        self.padding = torch.from_numpy(np.flatnonzero(padding)) if padding.any() else None
        self._score_bias: dict[torch.dtype, list[Tensor | None]] = {}
        self._spans, start = [], 0  # (first position, texts x H, longest) per bucket
        for bucket in self.buckets:
            self._spans.append((start, len(bucket.lengths) * heads, bucket.longest))
            start += len(bucket.lengths) * heads * bucket.longest

    @cached_property
    def joined_indices(self) -> tuple[Tensor, Tensor]:
        """`pad_index` and `unpad_index` of queries, keys and values side by side.

        (3 x C,): row of a (T x 3 x H, D) matrix; (T x 3 x H,): its position in a (3 x C, D) one.
        """
        parts = torch.arange(3)[:, None]
        row = self.pad_index + self.pad_index.div(self.heads, rounding_mode="floor") * (
            2 * self.heads
        )
        pad = (row + parts * self.heads).flatten()
        unpad = self.unpad_index.view(-1, 1, self.heads) + parts * len(self.pad_index)
        return pad, unpad.flatten()

    def view_of(self, bucket: int, first_only: bool = False) -> Callable[[Tensor], Tensor]:
        """Padded (C, D), or first tokens (N x H, D) -> a bucket's view (texts x H, queries, D)."""
        start, texts, longest = self._spans[bucket]
        if first_only:
            start, longest = self.buckets[bucket].first * self.heads, 1
        stop = start + texts * longest
        return lambda x: x[start:stop].view(texts, longest, x.shape[-1])

    def score_bias(self, dtype: torch.dtype) -> list[Tensor | None]:
        """What is added to scores, (texts x H, 1, longest) per bucket: for padding the lowest
        number, which leaves no weight, else 0; None where there is no padding.
        """
        if dtype not in self._score_bias:
            self._score_bias[dtype] = [
                None
                if bucket.padding is None
                else torch.zeros(bucket.padding.shape, dtype=dtype)
                .masked_fill_(bucket.padding, torch.finfo(dtype).min)
                .repeat_interleave(self.heads, 0)[:, None]
                for bucket in self.buckets
            ]
        return self._score_bias[dtype]

    def draw_masks(
        self, masks: DropoutMasks | None, p: float, first_only: bool, dtype: torch.dtype
    ) -> list[Tensor]:
        """What dropout multiplies attention weights by, (texts x H, queries, longest) per bucket:
        0 for what is dropped and for padding, else `keep_scale(p)`.
        """
        lengths = [length for bucket in self.buckets for length in bucket.lengths]
        sizes = [self.heads * (1 if first_only else length) * length for length in lengths]
        # without row numbers torch's own draws
        drawn = torch.rand(sum(sizes)) >= p if masks is None else masks.draw(sizes, p)
        where, shapes = self._first_weights if first_only else self._all_weights
        flat = torch.zeros(sum(map(math.prod, shapes)), dtype=dtype)
        flat.index_copy_(0, where, scale_mask(drawn, p, dtype))
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @cached_property
    def _all_weights(self) -> _Weights:
        return self._find_weights(first_only=False)

    @cached_property
    def _first_weights(self) -> _Weights:
        return self._find_weights(first_only=True)

    def _find_weights(self, first_only: bool) -> _Weights:
        real, shapes = [], []
        for bucket in self.buckets:
            texts, longest = len(bucket.lengths), bucket.longest
            is_token = np.arange(longest) < np.asarray(bucket.lengths)[:, None]  # (texts, longest)
            is_query = np.ones((texts, 1), dtype=bool) if first_only else is_token
            shape = (texts * self.heads, is_query.shape[1], longest)
            each = is_query[:, None, :, None] & is_token[:, None, None, :]
            real.append(np.broadcast_to(each, (texts, self.heads, *shape[1:])).ravel())
            shapes.append(shape)
        return torch.from_numpy(np.flatnonzero(np.concatenate(real))), shapes


def _make_buckets(lengths: Sequence[int], heads: int) -> list[Bucket]:
    buckets, first = [], 0
    for longest, run in groupby(-(-length // SIMD_WIDTH) * SIMD_WIDTH for length in lengths):
        stop = first + len(list(run))
        max_texts = max(1, MAX_SCORES_PER_BUCKET // (heads * longest**2))
        for text in range(first, stop, max_texts):
            sizes = tuple(lengths[text : min(text + max_texts, stop)])
            buckets.append(Bucket(text, sizes, longest))
        first = stop
    return buckets


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
        return out[None], None
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


def bucketed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BucketLayout,
    scale: float,
    window: int | None,
    dropout: float,
    masks: DropoutMasks | None,
) -> Tensor:
    """query (Q, H, D), key and value (T, H, D) -> (Q, H, D).

    window: a token attends to tokens less than so many positions away; None: to all of its text.
    """
    if not torch.is_grad_enabled() and window is None and not dropout:
        return _sdpa_per_length(query, key, value, layout, scale)
    keep = None
    if dropout:
        dtype = at_least_float32(query[:0]).dtype
        keep = layout.draw_masks(masks, dropout, len(query) != len(key), dtype)
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, layout, scale, window, keep
    )
    return out


def _sdpa_per_length(
    query: Tensor, key: Tensor, value: Tensor, layout: BucketLayout, scale: float
) -> Tensor:
    """Without gradients: 1.02 times as fast as the buckets, on views, and no scores are stored."""
    parts, first_query, first = [], 0, 0
    for length, run in groupby(length for bucket in layout.buckets for length in bucket.lengths):
        texts, queries = len(list(run)), 1 if len(query) != len(key) else length
        stop_query, stop = first_query + texts * queries, first + texts * length
        # (texts, H, queries or length, D)
        q = query[first_query:stop_query].unflatten(0, (texts, queries)).transpose(1, 2)
        k, v = (x[first:stop].unflatten(0, (texts, length)).transpose(1, 2) for x in (key, value))
        part = F.scaled_dot_product_attention(q, k, v, scale=scale)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (texts x queries, H, D)
        first_query, first = stop_query, stop
    return torch.cat(parts)


class _Attention(torch.autograd.Function):
    # without autocast: bf16 is gathered, and float32 computed: oneDNN would need new code for most
    # of these small products, MKL needs none
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: BucketLayout,
        scale: float,
        window: int | None,
        keep: list[Tensor] | None,
    ) -> Tensor:
        ctx.first_only = len(query) != len(key)
        q = _rows(query) if ctx.first_only else _rows(query).index_select(0, layout.pad_index)
        k, v = (_rows(x).index_select(0, layout.pad_index) for x in (key, value))  # (C, D)
        q, k, v = (at_least_float32(x) for x in (q, k, v))
        out, saved = attend_padded(q, k, v, layout, scale, window, keep)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.layout, ctx.scale, ctx.dropped = layout, scale, keep is not None
        out = out.to(query.dtype)
        return (out if ctx.first_only else out.index_select(0, layout.unpad_index)).view(
            query.shape
        )

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout, (q, k, v, *saved) = ctx.layout, ctx.saved_tensors
        d_out = _rows(gradients[0])
        if not ctx.first_only:
            d_out = d_out.index_select(0, layout.pad_index)
            if layout.padding is not None:
                d_out.index_fill_(0, layout.padding, 0)
        d_out = at_least_float32(d_out)
        d_q, d_k, d_v = found = [torch.empty_like(x) for x in (q, k, v)]
        attend_padded_backward(d_out, (q, k, v), saved, layout, ctx.scale, ctx.dropped, found)
        d_q, d_k, d_v = (x.to(gradients[0].dtype) for x in found)
        if not ctx.first_only:
            d_q = d_q.index_select(0, layout.unpad_index)
        d_k, d_v = (x.index_select(0, layout.unpad_index) for x in (d_k, d_v))
        shape = gradients[0].shape[1:]  # (H, D)
        return *(x.view(-1, *shape) for x in (d_q, d_k, d_v)), None, None, None, None


def attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BucketLayout,
    scale: float,
    window: int | None,
    keep: list[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Padded q, k, v (C, D) -> the output (C, D), and what `attend_padded_backward` reads.

    q has (N x H, D) where only first tokens are computed, and so has the output.
    """
    first_only = len(q) != len(k)
    out, saved = torch.empty_like(q), []
    for i, (bucket, bias) in enumerate(
        zip(layout.buckets, layout.score_bias(q.dtype), strict=True)
    ):
        queries, keys = layout.view_of(i, first_only), layout.view_of(i)
        # (texts x H, queries, longest)
        added, beta = (q.new_empty(1, 1, 1), 0) if bias is None else (bias, 1)
        scores = torch.baddbmm(added, queries(q), keys(k).mT, beta=beta, alpha=scale)
        if window is not None and window < bucket.longest:
            position = torch.arange(bucket.longest)
            distance = (position[: scores.shape[1], None] - position).abs()
            scores.masked_fill_(distance >= window, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        mask = None if keep is None else keep[i]
        torch.bmm(weights if mask is None else weights * mask, keys(v), out=queries(out))
        saved += [weights, weights if mask is None else mask]
    return out, saved


def attend_padded_backward(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    layout: BucketLayout,
    scale: float,
    dropped: bool,
    found: Sequence[Tensor],
) -> None:
    """Write the gradients of the inputs (q, k, v) into `found`, tensors of their shapes.

    d_out: of the output, zero at padding. dropped: whether there were dropout masks.
    """
    (q, k, v), (d_q, d_k, d_v) = inputs, found
    first_only = len(q) != len(k)
    empty = q.new_empty(1, 1, 1)
    for i in range(len(layout.buckets)):
        weights, mask = saved[2 * i : 2 * i + 2]
        queries, keys = layout.view_of(i, first_only), layout.view_of(i)
        dropped_out = weights * mask if dropped else weights
        torch.bmm(dropped_out.mT, queries(d_out), out=keys(d_v))
        d_weights = torch.bmm(queries(d_out), keys(v).mT)
        if dropped:
            d_weights *= mask
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.baddbmm(empty, d_scores, keys(k), beta=0, alpha=scale, out=queries(d_q))
        torch.baddbmm(empty, d_scores.mT, queries(q), beta=0, alpha=scale, out=keys(d_k))


def _rows(x: Tensor) -> Tensor:
    """(T, H, D) -> (T x H, D)."""
    return x.reshape(-1, x.shape[-1])


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()
