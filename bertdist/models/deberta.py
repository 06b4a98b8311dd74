"""DeBERTa-v2 and -v3 without padding: their attention is no function that transformers lets one choose.

In: a DebertaV2ForSequenceClassification. Out: the same module, prepared in place. It is a module because the layers stay Hugging
Face's and everything around them is written again: the classifier's forward hands no keyword on, and the attention's is replaced.

1. A token's score of another is content times content, plus content times the table row of their distance, both ways
   (https://arxiv.org/abs/2006.03654, 3.1). Distances are those inside a text, so texts that lie end to end need nothing but their ends.
2. Queries, keys and values only are laid out (texts, longest): a bucket of about one length at a time on the CPU, all together elsewhere.
   No mask over all tokens of the row is ever built.
3. Only those rows of the table that the longest text can ask for are projected: 39 of 512 for 20 tokens.
4. Only first tokens leave the last layer (`query_states`, which Hugging Face's layer takes).

Legend: T tokens, N texts, H heads, D size of a head, R rows of the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from bertdist.models.attention import Packing, grid
from bertdist.models.dropout import DropoutMasks, scale_of


def prepare(model: Any) -> None:
    """Change a classifier in place: it takes `packing`, ids and positions (1, T), and gives logits (N, outputs)."""
    body, encoder = model.deberta, model.deberta.encoder
    distances = _Distances(encoder) if encoder.relative_attention else None
    for layer in encoder.layer:
        layer.attention.self.forward = partial(_attention, layer.attention.self)

    def forward(input_ids: Tensor, packing: Packing, **places: Tensor) -> SequenceClassifierOutput:
        embedded = x = body.embeddings(input_ids=input_ids, **places)
        texts, table = _Texts(packing, distances, input_ids.device), encoder.get_rel_embedding()
        for i, layer in enumerate(encoder.layer):
            last = i == len(encoder.layer) - 1
            whole = (
                encoder.conv is not None and i == 0
            )  # the convolution reads what leaves the first layer
            asked = x[:, packing.firsts] if last and not whole else None
            x, _ = layer(x, texts, query_states=asked, rel_embeddings=table)
            if whole:
                x = _convolved(encoder.conv, embedded, x, packing)
                x = x[:, packing.firsts] if last else x
        return SequenceClassifierOutput(
            logits=model.classifier(model.dropout(model.pooler(x.transpose(0, 1))))
        )

    model.forward = forward


class _Distances:
    """Rows of the table of relative positions, for texts of any length."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._span = (
            encoder.position_buckets
            if encoder.position_buckets > 0
            else encoder.max_relative_positions
        )
        self._rows = torch.zeros(0, 0, dtype=torch.long)  # (longest so far, longest so far)
        self._ends: list[tuple[int, int]] = []  # lowest and highest row, by length

    def rows(self, longest: int, device: torch.device) -> tuple[Tensor, int, int]:
        """(longest, longest) int64: the row for each query and key, counted from the lowest; lowest row, and the one behind the highest."""
        if longest > len(self._rows) or device != self._rows.device:
            size = -(-longest // 64) * 64
            distance = self._encoder.get_rel_pos(torch.empty(size, 1, device=device))[0]
            self._rows = (distance + self._span).clamp(0, 2 * self._span - 1)
            self._ends = list(zip(self._rows[0].tolist(), self._rows[:, 0].tolist(), strict=True))
        low, high = self._ends[longest - 1]
        return self._rows[:longest, :longest] - low, low, high + 1


@dataclass(frozen=True)
class _Group:
    """Neighbouring texts, laid out as long as the longest."""

    texts: slice  # which of the micro-batch
    places: Tensor  # (texts, longest) int64: the token of each cell, 0 where there is none
    real: Tensor  # (texts, longest) bool: the cells that are tokens
    cells: Tensor  # (tokens,) int64: the cell of each token
    rows: Tensor | None  # (longest, longest) int64: the table's row of each query and key

    def lay_out(self, x: Tensor) -> Tensor:
        """(1, T, W) -> (texts, longest, W)."""
        return x[0].index_select(0, self.places.flatten()).view(*self.places.shape, -1)


def _group(packing: Packing, texts: slice, rows: Tensor | None, device: torch.device) -> _Group:
    places, real = (array[texts, : max(packing.lengths[texts])] for array in grid(packing.lengths))
    there = [
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (places, real, np.flatnonzero(real))
    ]
    return _Group(
        texts,
        there[0],
        there[1],
        there[2],
        None if rows is None else rows[: real.shape[1], : real.shape[1]],
    )


class _Texts:
    """The groups of a micro-batch. It goes to Hugging Face's layers in the place of the attention mask."""

    def __init__(
        self, packing: Packing, distances: _Distances | None, device: torch.device
    ) -> None:
        self.packing = packing
        rows, self.low, self.high = (
            (None, 0, 0) if distances is None else distances.rows(max(packing.lengths), device)
        )
        buckets = (
            []
            if packing.layout is None
            else [slice(b.first, b.first + len(b.lengths)) for b in packing.layout.buckets]
        )
        self.groups = [_group(packing, texts, rows, device) for texts in buckets or [slice(None)]]


def _convolved(convolution: Any, embedded: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """DeBERTa-v2's convolution over neighbouring tokens of a text, zeros at its ends; embedded and x (1, T, hidden) -> like x."""
    texts = _group(packing, slice(None), None, x.device)
    mask = texts.real.long()
    out: Tensor = convolution(texts.lay_out(embedded) * mask[:, :, None], texts.lay_out(x), mask)
    return out.flatten(0, 1).index_select(0, texts.cells)[None]


def _attention(
    module: Any,
    hidden_states: Tensor,  # (1, T, hidden)
    attention_mask: _Texts,
    output_attentions: bool = False,
    query_states: Tensor | None = None,  # (1, N, hidden), where only first tokens are asked for
    relative_pos: None = None,
    rel_embeddings: Tensor | None = None,  # (table's rows, hidden)
) -> tuple[Tensor, None]:
    """In the place of DisentangledSelfAttention.forward; returns (1, T or N, hidden)."""
    texts, noise, heads = attention_mask, attention_mask.packing.noise, module.num_attention_heads
    query = module.query_proj(hidden_states if query_states is None else query_states)
    key, value = module.key_proj(hidden_states), module.value_proj(hidden_states)
    kinds = module.pos_att_type
    scale = (
        torch.tensor(float(query.shape[-1] // heads * (1 + ("c2p" in kinds) + ("p2c" in kinds))))
        .sqrt()
        .item()
    )  # float32, as there
    query = query / scale
    row_keys = row_queries = None
    if rel_embeddings is not None:
        table = _dropped(rel_embeddings, module, noise)[texts.low : texts.high]
        own = not module.share_att_key
        if "c2p" in kinds:
            row_keys = _of_heads(
                (module.pos_key_proj if own else module.key_proj)(table)[None], heads
            )[0]  # (H, R, D)
        if "p2c" in kinds:
            row_queries = (
                _of_heads(
                    (module.pos_query_proj if own else module.query_proj)(table)[None], heads
                )[0]
                / scale
            )
    drops = _drops(module, texts, query_states is not None)
    parts = []
    for i, group in enumerate(texts.groups):
        k, v = (_of_heads(group.lay_out(x), heads) for x in (key, value))  # (texts, H, longest, D)
        q = _of_heads(
            group.lay_out(query) if query_states is None else query[0, group.texts, None], heads
        )
        scores = q @ k.mT  # (texts, H, queries, longest)
        if row_keys is not None and group.rows is not None:
            rows = group.rows[: q.shape[2]].expand(*scores.shape)
            scores = scores + _with_rows(q, row_keys).gather(-1, rows)
        if row_queries is not None and group.rows is not None:
            rows = group.rows[: q.shape[2]].mT.expand(*scores.mT.shape)
            scores = scores + _with_rows(k, row_queries).gather(-1, rows).mT
        scores = scores.masked_fill(~group.real[:, None, None], torch.finfo(scores.dtype).min)
        out = (
            (drops(i, scores.softmax(-1)) @ v).transpose(1, 2).flatten(2).flatten(0, 1)
        )  # (texts x queries, hidden)
        parts.append(out if query_states is not None else out.index_select(0, group.cells))
    return torch.cat(parts)[None], None


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """(texts, longest, hidden) -> (texts, H, longest, D)."""
    out: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return out


def _with_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(texts, H, longest, D) and (H, R, D) -> (texts, H, longest, R); a product by heads, which copies no row for each text."""
    return torch.einsum("nhld,hrd->nhlr", x, rows)


def _dropped(table: Tensor, module: Any, noise: DropoutMasks | None) -> Tensor:
    """Dropout of the table, which is of no text."""
    p = module.pos_dropout.p
    if noise is None or not module.training or not p:
        return F.dropout(table, p, module.training)
    return table * torch.mul(
        noise.keep_common(table.numel(), p).view_as(table), table.new_tensor(scale_of(p))
    )


def _drops(module: Any, texts: _Texts, first_only: bool) -> Callable[[int, Tensor], Tensor]:
    """Group number, attention weights (texts, H, queries, longest) -> what dropout leaves of them."""
    p, packing = module.dropout.p, texts.packing
    if packing.layout is None or not module.training or not p:
        return lambda i, weights: F.dropout(weights, p, module.training)
    keeps = packing.layout.keeps(packing.noise, p, first_only)

    def drop(i: int, weights: Tensor) -> Tensor:
        keep = keeps[i].unflatten(0, weights.shape[:2])[
            :, :, : weights.shape[2], : weights.shape[3]
        ]  # a bucket may be longer
        return weights * torch.mul(keep, weights.new_tensor(scale_of(p)))

    return drop
