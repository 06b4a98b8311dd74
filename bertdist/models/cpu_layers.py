"""A table of word embeddings that keeps its gradient: rows that occur are written, and cleared again after the step.

In: token ids. Out: their vectors, as nn.Embedding's. torch makes a new dense gradient for every step: MiniLM's 47 MB are zeroed for
some 300 different tokens of 32 sentences, 5% of a step on two cores. The optimizer sees the same dense gradient as before.

Only in one process on a CPU. Elsewhere it is nn.Embedding: several ranks exchange the whole gradient, and a GPU zeroes it in no time.

Linear layers whose products run in oneDNN on a CPU: the same arithmetic as nn.Linear's, to rounding, in less time.

torch gives float32 products to MKL. oneDNN, which comes with torch too, is faster on CPUs with AVX-512: 434 x 384 x 1536, forward
209 against 190 GFLOP/s, to the inputs 228 against 163, to the weights of a narrowing layer 203 against 160. It prepares itself for
each new number of rows, which square layers of few rows do not win back. Where no gradient is wanted, GELU comes with the product
and saves a pass over the widest activations.

It is used where torch has it, in float32, on a CPU; elsewhere nn.Linear's, and so under torch.compile, whose inductor takes the
operator only with weights that never change (torch 2.13).
"""

from typing import Any, cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn


class ReusedGradientEmbedding(nn.Embedding):
    """Its gradient is cleared by `zero_grad`; zero_grad works too and costs what it did."""

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
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: ReusedGradientEmbedding) -> Tensor:
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


def reuse_embedding_gradient(model: Any) -> None:
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
        table.__class__ = ReusedGradientEmbedding
        cast(ReusedGradientEmbedding, table).written = []


def zero_grad(model: nn.Module) -> None:
    """What zero_grad does; a gradient that is kept gets zeros where it was written."""
    kept = {
        module.weight: module.written
        for module in model.modules()
        if isinstance(module, ReusedGradientEmbedding) and module.written
    }
    for parameter in model.parameters():
        if parameter not in kept or parameter.grad is None:
            parameter.grad = None
        else:
            parameter.grad.index_fill_(0, torch.cat(kept[parameter]), 0)
            kept[parameter].clear()


FEW_ROWS, FEW_ROWS_SQUARE = 64, 1024  # below them a product is too small to gain


class OneDnnLinear(nn.Linear):
    """nn.Linear with its products in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        if not self.gains(input):
            return super().forward(input)
        x = input.view(-1, self.in_features)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out.view(*input.shape[:-1], self.out_features)

    def gains(self, input: Tensor) -> bool:
        """Whether oneDNN can take this product, and is faster."""
        here = (
            input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and input.is_contiguous()
        )
        if not here or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        few = FEW_ROWS_SQUARE if self.in_features == self.out_features else FEW_ROWS
        return input.numel() >= few * self.in_features


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        d_x = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        narrows = weight.shape[0] < weight.shape[1]
        d_weight = (
            _product(gradient.t(), x.t(), None) if narrows else gradient.t() @ x
        )  # MKL is the faster one where it widens
        return d_x, d_weight, gradient.sum(0) if ctx.has_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x (rows, in), weight (out, in), bias (out,) or None -> (rows, out), with gelu the GELU of it."""
    try:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else ""
        )
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        out = F.linear(
            x, weight, bias
        )  # near the end of memory oneDNN finds no place for its code, where MKL needs none
        out = F.gelu(out) if gelu else out
    return out


def available() -> bool:
    """Whether this torch has the product, and a CPU that gains by it; the operator is private, so it is tried."""
    if (
        not torch.backends.mkldnn.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        plain, gelu = _product(x, weight, bias), _product(x, weight, bias, gelu=True)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(plain, F.linear(x, weight, bias)) and torch.allclose(gelu, F.gelu(plain))


def use_onednn(model: nn.Module) -> None:
    """Let the layers of a model, in place, take their products from oneDNN where it is available."""
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= 1 << 16:
            module.__class__ = OneDnnLinear
    for module in model.modules():
        dense, activation = (
            getattr(module, "dense", None),
            getattr(module, "intermediate_act_fn", None),
        )
        if (
            isinstance(dense, OneDnnLinear) and getattr(activation, "act", None) is F.gelu
        ):  # BERT, RoBERTa, ELECTRA
            _with_gelu(module, dense)


def _with_gelu(module: nn.Module, dense: OneDnnLinear) -> None:
    plain = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not dense.gains(hidden_states):
            out: Tensor = plain(hidden_states)
            return out
        product = _product(
            hidden_states.view(-1, dense.in_features), dense.weight, dense.bias, gelu=True
        )
        return product.view(*hidden_states.shape[:-1], -1)

    module.forward = forward
