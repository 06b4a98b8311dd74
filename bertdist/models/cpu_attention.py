"""Attention of many short texts on a CPU: few large batched products instead of many small ones, and dropout from the rows' own bits.

In: queries, keys and values of texts that lie end to end, sorted by length. Out: each text's attention to itself.

1. Texts whose length rounds up to the same multiple of 16 share a bucket, laid out (texts x heads, that length). So queries, keys and
   values are padded, by 16 at most, and nothing else of the model ever is.
2. They are laid out by one gather each for all buckets, and the answer comes back by one.
3. Products, softmax and masks are written out, backward too: with dropout, SDPA a length takes 4 times as long (torch 2.13: 8.4 ms
   against 1.9 for 385 tokens of 15 lengths, forward and backward). Where no gradient is wanted, SDPA a length it is.

Legend: T tokens, N texts, H heads, D size of a head, C cells: rows of all buckets, each texts x H x longest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bertdist.models.dropout import DropoutMasks, scale_of

LANES = 16  # float32 numbers of a 512-bit register: torch's softmax takes 6 times as long where a row is shorter

SCORES = (
    1 << 20
)  # most scores of a bucket, 4 MiB: what a core's cache holds, and all that is kept where there is no backward


@dataclass(frozen=True)
class Bucket:
    """Neighbouring texts, laid out as long as the longest."""

    first: int  # number of its first text
    lengths: tuple[int, ...]  # of its texts, tokens
    longest: int

    @cached_property
    def absent(self) -> Tensor | None:
        """(texts, 1, 1, longest) bool: the places behind the end of a text; None where all are as long."""
        if min(self.lengths) == self.longest:
            return None
        return (torch.arange(self.longest) >= torch.tensor(self.lengths)[:, None])[:, None, None]


class Layout:
    """The buckets of a micro-batch, and where their cells come from."""

    def __init__(self, lengths: Sequence[int], heads: int) -> None:
        """lengths: tokens of each text, best sorted."""
        self.heads, self.buckets = heads, _buckets(lengths, heads)
        sizes, starts = np.asarray(lengths), np.cumsum(lengths) - lengths
        cells, pads = (
            [],
            [],
        )  # (texts, H, longest) a bucket: row of a (T x H, D) matrix; whether it is behind its text's end
        for bucket in self.buckets:
            texts = slice(bucket.first, bucket.first + len(bucket.lengths))
            place = np.arange(bucket.longest)
            absent = place >= sizes[texts, None]
            token = np.where(absent, starts[texts, None], starts[texts, None] + place)
            cells.append((token[:, None, :] * heads + np.arange(heads)[:, None]).reshape(-1))
            pads.append(
                np.broadcast_to(absent[:, None, :], (len(absent), heads, bucket.longest)).reshape(
                    -1
                )
            )
        every, padded = np.concatenate(cells), np.concatenate(pads)
        back = np.empty(sizes.sum() * heads, dtype=np.int64)
        back[every[~padded]] = np.flatnonzero(~padded)
        self.cells = torch.from_numpy(every)  # (C,) row of (T x H, D)
        self.back = torch.from_numpy(back)  # (T x H,) its cell
        self._spans, start = [], 0  # (first cell, texts x H, longest) a bucket
        for bucket in self.buckets:
            self._spans.append((start, len(bucket.lengths) * heads, bucket.longest))
            start += len(bucket.lengths) * heads * bucket.longest
        self.pads = (
            torch.from_numpy(np.flatnonzero(padded)) if padded.any() else None
        )  # cells of no token

    def queries(self, bucket: int, first_only: bool = False) -> Callable[[Tensor], Tensor]:
        """Cells (C, D), or first tokens (N x H, D) -> a view of a bucket's (texts x H, queries, D)."""
        start, texts, longest = self._spans[bucket]
        if first_only:
            start, longest = self.buckets[bucket].first * self.heads, 1
        stop = start + texts * longest
        return lambda x: x[start:stop].view(texts, longest, x.shape[-1])

    def keeps(self, noise: DropoutMasks | None, p: float, first_only: bool) -> list[Tensor]:
        """(texts x H, queries, longest) bool a bucket: the attention weights that dropout keeps."""
        lengths = [length for bucket in self.buckets for length in bucket.lengths]
        sizes = [self.heads * (1 if first_only else length) * length for length in lengths]
        drawn = (
            torch.rand(sum(sizes)) >= p if noise is None else noise.keep(sizes, p)
        )  # without rows torch's own draws
        found, parts = [], iter(drawn.split(sizes))
        for bucket in self.buckets:
            queries = 1 if first_only else bucket.longest
            keep = torch.ones(
                len(bucket.lengths), self.heads, queries, bucket.longest, dtype=torch.bool
            )
            for mine, length in zip(keep.numpy(), bucket.lengths, strict=True):
                asked = 1 if first_only else length
                mine[:, :asked, :length] = next(parts).view(self.heads, asked, length).numpy()
            found.append(keep.view(-1, queries, bucket.longest))
        return found


def _buckets(lengths: Sequence[int], heads: int) -> list[Bucket]:
    found, first = [], 0
    for longest, run in groupby(-(-length // LANES) * LANES for length in lengths):
        stop = first + len(list(run))
        most = max(1, SCORES // (heads * longest**2))  # texts
        found += [
            Bucket(text, tuple(lengths[text : min(text + most, stop)]), longest)
            for text in range(first, stop, most)
        ]
        first = stop
    return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    dropout: float,
    noise: DropoutMasks | None,
) -> Tensor:
    """query (T or N, H, D): of all tokens or of the first tokens; key, value (T, H, D) -> like query.

    window: a token reads those less than so many places away; None: all of its text.
    """
    if not torch.is_grad_enabled() and window is None and not dropout:
        return _a_length_at_a_time(query, key, value, layout, scale)
    keeps = layout.keeps(noise, dropout, len(query) != len(key)) if dropout else None
    out: Tensor = _Attention.apply(
        query, key, value, layout, scale, window, keeps, scale_of(dropout)
    )  # type: ignore[no-untyped-call]
    return out


def _a_length_at_a_time(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Without gradients SDPA, on views of the texts of one length: 1.02 times as fast as the buckets, and no scores are kept."""
    parts, asked, first = [], 0, 0
    for length, run in groupby(length for bucket in layout.buckets for length in bucket.lengths):
        texts, queries = len(list(run)), 1 if len(query) != len(key) else length
        q = (
            query[asked : asked + texts * queries].unflatten(0, (texts, queries)).transpose(1, 2)
        )  # (texts, H, queries, D)
        k, v = (
            x[first : first + texts * length].unflatten(0, (texts, length)).transpose(1, 2)
            for x in (key, value)
        )
        part = F.scaled_dot_product_attention(q, k, v, scale=scale)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (texts x queries, H, D)
        asked, first = asked + texts * queries, first + texts * length
    return torch.cat(parts)


class _Attention(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]  # bf16 rounds only the layers' own products
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        window: int | None,
        keeps: list[Tensor] | None,
        keep_scale: float,
    ) -> Tensor:
        ctx.first_only = len(query) != len(key)
        q = _rows(query) if ctx.first_only else _rows(query).index_select(0, layout.cells)
        k, v = (_rows(x).index_select(0, layout.cells) for x in (key, value))
        out, saved = torch.empty_like(q), []
        for i, bucket in enumerate(layout.buckets):
            mine, theirs = layout.queries(i, ctx.first_only), layout.queries(i)
            scores = torch.baddbmm(
                q.new_empty(1, 1, 1), mine(q), theirs(k).mT, beta=0, alpha=scale
            )  # (texts x H, queries, longest)
            _hide(scores, bucket, window)
            weights = scores.softmax(-1)
            mask = None if keeps is None else torch.mul(keeps[i], q.new_tensor(keep_scale))
            torch.bmm(weights if mask is None else weights * mask, theirs(v), out=mine(out))
            saved += [weights, weights if mask is None else mask]
        ctx.save_for_backward(q, k, v, *saved)
        ctx.layout, ctx.scale, ctx.dropped = layout, scale, keeps is not None
        return (out if ctx.first_only else out.index_select(0, layout.back)).view(query.shape)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout, (q, k, v, *saved) = ctx.layout, ctx.saved_tensors
        d_out = _rows(gradients[0])
        if not ctx.first_only:
            d_out = d_out.index_select(0, layout.cells)
            if layout.pads is not None:
                d_out.index_fill_(0, layout.pads, 0)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        empty = q.new_empty(1, 1, 1)
        for i in range(len(layout.buckets)):
            weights, mask = saved[2 * i : 2 * i + 2]
            mine, theirs = layout.queries(i, ctx.first_only), layout.queries(i)
            torch.bmm((weights * mask if ctx.dropped else weights).mT, mine(d_out), out=theirs(d_v))
            d_weights = torch.bmm(mine(d_out), theirs(v).mT)
            if ctx.dropped:
                d_weights *= mask
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            torch.baddbmm(empty, d_scores, theirs(k), beta=0, alpha=ctx.scale, out=mine(d_q))
            torch.baddbmm(empty, d_scores.mT, mine(q), beta=0, alpha=ctx.scale, out=theirs(d_k))
        found = [
            d_q if ctx.first_only else d_q.index_select(0, layout.back),
            *(x.index_select(0, layout.back) for x in (d_k, d_v)),
        ]
        return *(x.view(-1, *gradients[0].shape[1:]) for x in found), None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(T, H, D) -> (T x H, D)."""
    return x.reshape(-1, x.shape[-1])


def _hide(scores: Tensor, bucket: Bucket, window: int | None) -> None:
    """Give what a token does not see the least score there is: no weight, and no NaN where a place behind a text's end sees nothing."""
    least = torch.finfo(scores.dtype).min
    if bucket.absent is not None:
        scores.view(len(bucket.lengths), -1, *scores.shape[1:]).masked_fill_(bucket.absent, least)
    if window is not None and window < bucket.longest:
        place = torch.arange(bucket.longest)
        scores.masked_fill_((place[: scores.shape[1], None] - place).abs() >= window, least)
