"""A table of word embeddings that keeps its gradient: rows that occur are written, and cleared again after the step.

In: token ids. Out: their vectors, as nn.Embedding's. torch makes a new dense gradient for every step: MiniLM's 47 MB are zeroed for
some 300 different tokens of 32 sentences, 5% of a step on two cores. The optimizer sees the same dense gradient as before.

Only in one process on a CPU. Elsewhere it is nn.Embedding: several ranks exchange the whole gradient, and a GPU zeroes it in no time.
"""

from typing import Any, cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn


class KeptGradientEmbedding(nn.Embedding):
    """Its gradient is cleared by `clear_gradients`; zero_grad works too and costs what it did."""

    written: list[Tensor]  # rows of the gradient that may not be zero

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape of int64 ids; one dimension more out."""
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if (
            ranks > 1
            or self.weight.device.type != "cpu"
            or not (torch.is_grad_enabled() and self.weight.requires_grad)
        ):
            return super().forward(input)
        out: Tensor = _Lookup.apply(self.weight, input, self)  # type: ignore[no-untyped-call]
        return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: KeptGradientEmbedding) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids,), table = ctx.saved_tensors, ctx.table
        rows, gradient = ids.flatten(), gradients[0].flatten(0, -2)
        if table.padding_idx is not None:
            gradient = gradient.masked_fill((rows == table.padding_idx)[:, None], 0)
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
            table.written.clear()
        table.weight.grad.index_add_(0, rows, gradient)
        table.written.append(rows)
        return None, None, None


def keep_gradient(model: Any) -> None:
    """Make the word embeddings of a Hugging Face model keep their gradient, in place, if they are plain and nothing else uses them."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # Funnel, Canine
        return
    uses = sum(
        parameter is table.weight for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    if (
        type(table) is nn.Embedding
        and uses == 1
        and table.max_norm is None
        and not table.sparse
        and not table.scale_grad_by_freq
    ):
        table.__class__ = KeptGradientEmbedding
        cast(KeptGradientEmbedding, table).written = []


def clear_gradients(model: nn.Module) -> None:
    """What zero_grad does; a gradient that is kept gets zeros where it was written."""
    kept = {
        module.weight: module.written
        for module in model.modules()
        if isinstance(module, KeptGradientEmbedding) and module.written
    }
    for parameter in model.parameters():
        if parameter not in kept or parameter.grad is None:
            parameter.grad = None
        else:
            parameter.grad.index_fill_(0, torch.cat(kept[parameter]), 0)
            kept[parameter].clear()
