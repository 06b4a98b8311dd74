"""DeBERTa-v2 and -v3 without padding. transformers offers no attention interface for them.

`prepare(model)` changes a DebertaV2ForSequenceClassification in place. Its layers stay Hugging
Face's; the classifier's forward, which hands no keyword on, and the attention's are replaced.

1. The score of two tokens is content times content, plus content times the row of their distance in
   a table, both ways (https://arxiv.org/abs/2006.03654, 3.1). Distances are those inside a text, so
   packed texts need nothing but their boundaries.
2. Queries, keys and values only are padded to (texts, longest): one bucket of about one length at a
   time on the CPU, all texts together elsewhere. No mask over all pairs of tokens is ever built.
3. Only those rows of the table that the longest text needs are projected: 39 of 512 for 20 tokens.
4. Only first tokens leave the last layer (`query_states`, an argument of Hugging Face's layer).

Legend: T tokens, N texts, H heads, D head size, R rows of the table, W width; Q is T, or N where
only first tokens are computed.
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

from bertdist.models.attention import Packing, padded_layout
from bertdist.models.dropout import DropoutMasks, scale_mask


def prepare(model: Any) -> None:
    """Change a classifier in place: packing, ids and positions (1, T) -> logits (N, outputs)."""
    body, encoder = model.deberta, model.deberta.encoder
    positions = _RelativePositions(encoder) if encoder.relative_attention else None
    for layer in encoder.layer:
        layer.attention.self.forward = partial(_attention, layer.attention.self)

    def forward(input_ids: Tensor, packing: Packing, **inputs: Tensor) -> SequenceClassifierOutput:
        embedded = x = body.embeddings(input_ids=input_ids, **inputs)  # (1, T, hidden)
        padded, table = (
            _PaddedGroups(packing, positions, input_ids.device),
            encoder.get_rel_embedding(),
        )
        for i, layer in enumerate(encoder.layer):
            last = i == len(encoder.layer) - 1
            # the convolution reads all tokens that leave the first layer
            convolve = encoder.conv is not None and i == 0
            queries = x[:, packing.first_tokens] if last and not convolve else None
            x, _ = layer(x, padded, query_states=queries, rel_embeddings=table)
            if convolve:
                x = _convolution(encoder.conv, embedded, x, packing)
                x = x[:, packing.first_tokens] if last else x
        pooled = model.dropout(model.pooler(x.transpose(0, 1)))  # (N, hidden)
        return SequenceClassifierOutput(logits=model.classifier(pooled))

    model.forward = forward


class _RelativePositions:
    """Rows of the table of relative positions, for texts of any length."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        buckets = encoder.position_buckets
        self._span = buckets if buckets > 0 else encoder.max_relative_positions
        self._rows = torch.zeros(0, 0, dtype=torch.long)  # (longest so far, longest so far)
        self._ranges: list[tuple[int, int]] = []  # lowest and highest row, by length

    def rows(self, longest: int, device: torch.device) -> tuple[Tensor, int, int]:
        """The row of each query and key, counted from the lowest row (longest, longest) int64.

        And the range of these rows: the lowest, and the one behind the highest.
        """
        if longest > len(self._rows) or device != self._rows.device:
            size = -(-longest // 64) * 64
            distance = self._encoder.get_rel_pos(torch.empty(size, 1, device=device))[0]
            self._rows = (distance + self._span).clamp(0, 2 * self._span - 1)
            self._ranges = list(zip(self._rows[0].tolist(), self._rows[:, 0].tolist(), strict=True))
        low, high = self._ranges[longest - 1]
        return self._rows[:longest, :longest] - low, low, high + 1


@dataclass(frozen=True)
class _Group:
    """Neighbouring texts, padded to one length."""

    texts: slice  # which of the micro-batch
    pad_index: Tensor  # (texts, longest) int64: token at each position, 0 for padding
    mask: Tensor  # (texts, longest) bool: False for padding
    unpad_index: Tensor  # (tokens,) int64: position of each token in (texts x longest)
    rows: Tensor | None  # (longest, longest) int64: the table's row of each query and key

    def pad(self, x: Tensor) -> Tensor:
        """(1, T, W) -> (texts, longest, W)."""
        return x[0].index_select(0, self.pad_index.flatten()).view(*self.pad_index.shape, -1)


def _group(packing: Packing, texts: slice, rows: Tensor | None, device: torch.device) -> _Group:
    longest = max(packing.lengths[texts])
    pad_index, mask = (array[texts, :longest] for array in padded_layout(packing.lengths))
    arrays = (pad_index, mask, np.flatnonzero(mask))
    index, real, unpad = (torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)
    return _Group(texts, index, real, unpad, None if rows is None else rows[:longest, :longest])


class _PaddedGroups:
    """The groups of a micro-batch; handed to Hugging Face's layers as the attention mask."""

    def __init__(
        self, packing: Packing, positions: _RelativePositions | None, device: torch.device
    ) -> None:
        self.packing = packing
        longest, slices = max(packing.lengths), [slice(None)]
        # range of the table's rows that are needed
        rows, self.low, self.high = positions.rows(longest, device) if positions else (None, 0, 0)
        if packing.buckets is not None:
            slices = [slice(b.first, b.first + len(b.lengths)) for b in packing.buckets.buckets]
        self.groups = [_group(packing, texts, rows, device) for texts in slices]


def _convolution(conv: Any, embedded: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """DeBERTa-v2's convolution over neighbouring tokens of a text, zeros at its ends.

    embedded and x (1, T, hidden) -> (1, T, hidden).
    """
    group = _group(packing, slice(None), None, x.device)
    mask = group.mask.long()
    out: Tensor = conv(group.pad(embedded) * mask[:, :, None], group.pad(x), mask)
    return out.flatten(0, 1).index_select(0, group.unpad_index)[None]


def _attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: _PaddedGroups,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Replaces DisentangledSelfAttention.forward.

    hidden_states (1, T, hidden), query_states (1, N, hidden) where only first tokens are computed,
    rel_embeddings (rows of the table, hidden) -> (1, Q, hidden).
    """
    padded, heads = attention_mask, module.num_attention_heads
    first_only, types = query_states is not None, module.pos_att_type
    query = module.query_proj(query_states if first_only else hidden_states)
    key, value = module.key_proj(hidden_states), module.value_proj(hidden_states)
    # the square root in float32, as Hugging Face computes it
    size = query.shape[-1] // heads * (1 + ("c2p" in types) + ("p2c" in types))
    scale = torch.tensor(float(size)).sqrt().item()
    query = query / scale
    row_keys, row_queries = _project_table(module, padded, rel_embeddings, scale)
    dropout = _weight_dropout(module, padded, first_only)
    parts = []
    for i, group in enumerate(padded.groups):
        # (texts, H, longest, D)
        k, v = (_split_heads(group.pad(x), heads) for x in (key, value))
        q = _split_heads(query[0, group.texts, None] if first_only else group.pad(query), heads)
        scores = q @ k.mT  # (texts, H, queries, longest)
        if row_keys is not None and group.rows is not None:
            rows = group.rows[: q.shape[2]].expand(*scores.shape)
            scores = scores + _row_scores(q, row_keys).gather(-1, rows)
        if row_queries is not None and group.rows is not None:
            rows = group.rows[: q.shape[2]].mT.expand(*scores.mT.shape)
            scores = scores + _row_scores(k, row_queries).gather(-1, rows).mT
        scores = scores.masked_fill(~group.mask[:, None, None], torch.finfo(scores.dtype).min)
        context = (dropout(i, scores.softmax(-1)) @ v).transpose(1, 2)
        out = context.flatten(2).flatten(0, 1)  # (texts x queries, hidden)
        parts.append(out if first_only else out.index_select(0, group.unpad_index))
    return torch.cat(parts)[None], None


def _project_table(
    module: Any, padded: _PaddedGroups, rel_embeddings: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Keys and queries of the needed rows of the table, each (H, R, D); None if not used."""
    if rel_embeddings is None:
        return None, None
    table = _table_dropout(rel_embeddings, module, padded.packing.dropout_masks)
    table = table[padded.low : padded.high][None]  # (1, R, hidden)
    heads, shared, row_keys, row_queries = (
        module.num_attention_heads,
        module.share_att_key,
        None,
        None,
    )
    if "c2p" in module.pos_att_type:
        project = module.key_proj if shared else module.pos_key_proj
        row_keys = _split_heads(project(table), heads)[0]
    if "p2c" in module.pos_att_type:
        project = module.query_proj if shared else module.pos_query_proj
        row_queries = _split_heads(project(table), heads)[0] / scale
    return row_keys, row_queries


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(texts, longest, hidden) -> (texts, H, longest, D)."""
    out: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return out


def _row_scores(x: Tensor, rows: Tensor) -> Tensor:
    """(texts, H, longest, D) and (H, R, D) -> (texts, H, longest, R); rows are not copied."""
    return torch.einsum("nhld,hrd->nhlr", x, rows)


def _table_dropout(table: Tensor, module: Any, masks: DropoutMasks | None) -> Tensor:
    """Dropout of the table, which belongs to no text."""
    p = module.pos_dropout.p
    if masks is None or not module.training or not p:
        return F.dropout(table, p, module.training)
    keep = masks.draw_shared(table.numel(), p).view_as(table)
    return table * scale_mask(keep, p, table.dtype)


def _weight_dropout(
    module: Any, padded: _PaddedGroups, first_only: bool
) -> Callable[[int, Tensor], Tensor]:
    """The function (index of a group, weights (texts, H, queries, longest)) -> after dropout."""
    p, packing = module.dropout.p, padded.packing
    if packing.buckets is None or not module.training or not p:
        return lambda i, weights: F.dropout(weights, p, module.training)
    dtype = module.query_proj.weight.dtype
    masks = packing.buckets.draw_masks(packing.dropout_masks, p, first_only, dtype)

    def dropout(i: int, weights: Tensor) -> Tensor:
        mask = masks[i].unflatten(0, weights.shape[:2])
        mask = mask[:, :, : weights.shape[2], : weights.shape[3]]  # a bucket may be longer
        dropped: Tensor = weights * mask.to(weights.dtype)
        return dropped

    return dropout
