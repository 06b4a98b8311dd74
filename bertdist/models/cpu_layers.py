"""Faster embeddings and linear layers on a CPU, with the arithmetic of nn.Embedding and nn.Linear.

Both replace a module's class in place; weights and their names stay. Elsewhere than on a CPU they
are torch's own layers.

`ReusedGradientEmbedding` keeps the gradient tensor of a word embedding from step to step: rows that
occur are written, and `zero_grad(model)` clears only those. torch makes a new dense gradient in
every step: MiniLM's 47 MB are zeroed for some 300 different tokens of 32 sentences, 5% of a step on
two cores. The optimizer sees the same dense gradient as before. Used in one process only: several
ranks exchange the whole gradient.

`OneDnnLinear` computes float32 products in oneDNN, equal to rounding. torch gives them to MKL;
oneDNN, which comes with torch too, is faster on CPUs with AVX-512: 434 x 384 x 1536, forward 209
against 190 GFLOP/s, gradient of the inputs 228 against 163, of the weights of a narrowing layer 203
against 160. It prepares itself for each new number of rows, which square layers of few rows do not
win back. Without gradients GELU is computed with the product, which saves a pass over the widest
activations. Under torch.compile it is nn.Linear: inductor takes the operator only with weights that
never change (torch 2.13).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

# rows below which a product is too small to gain: of any layer, of a square one
MIN_ROWS, MIN_ROWS_SQUARE = 64, 1024

MIN_WEIGHTS = 1 << 16  # of a layer


class ReusedGradientEmbedding(nn.Embedding):
    """Its gradient is cleared by `zero_grad`; nn.Module.zero_grad works too, at torch's cost."""

    written: list[Tensor]  # rows of the gradient that may not be zero

    def forward(self, input: Tensor) -> Tensor:
        """input: int64 ids of any shape -> (*shape, embedding_dim)."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        needs_gradient = torch.is_grad_enabled() and self.weight.requires_grad
        if several or self.weight.device.type != "cpu" or not needs_gradient:
            return super().forward(input)
        out: Tensor = _Lookup.apply(self.weight, input, self)  # type: ignore[no-untyped-call]
        return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, module: ReusedGradientEmbedding) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids,), module = ctx.saved_tensors, ctx.module
        rows, gradient = ids.flatten(), gradients[0].flatten(0, -2)
        if module.padding_idx is not None:
            gradient = gradient.masked_fill((rows == module.padding_idx)[:, None], 0)
        if module.weight.grad is None:
            module.weight.grad = torch.zeros_like(module.weight)
            module.written.clear()
        module.weight.grad.index_add_(0, rows, gradient)
        module.written.append(rows)
        return None, None, None


def reuse_embedding_gradient(model: Any) -> None:
    """Make the word embedding a ReusedGradientEmbedding, if it is plain and not shared."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # Funnel, Canine
        return
    parameters = model.named_parameters(remove_duplicate=False)
    uses = sum(parameter is table.weight for _, parameter in parameters)
    if type(table) is not nn.Embedding or uses != 1:
        return
    if table.max_norm is None and not table.sparse and not table.scale_grad_by_freq:
        table.__class__ = ReusedGradientEmbedding
        cast(ReusedGradientEmbedding, table).written = []


class _Parts(NamedTuple):
    parameters: list[nn.Parameter]
    tables: list[ReusedGradientEmbedding]

    def written(self) -> dict[Tensor, list[Tensor]]:
        """Weight -> rows of its gradient that may not be zero, of the tables that have some."""
        return {table.weight: table.written for table in self.tables if table.written}


_parts: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _parts_of(model: nn.Module) -> _Parts:
    parts = _parts.get(model)
    if parts is None:
        tables = [x for x in model.modules() if isinstance(x, ReusedGradientEmbedding)]
        parts = _parts[model] = _Parts(list(model.parameters()), tables)
    return parts


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """model.parameters(), looked up once: that walk takes 0.6 ms for the 12 layers of BERT-base,
    and a step needs three. Like an optimizer, it does not see a parameter that is replaced later.
    """
    return _parts_of(model).parameters


def zero_grad(model: nn.Module) -> None:
    """What model.zero_grad() does; a reused gradient is zeroed where it was written."""
    written = _parts_of(model).written()
    for parameter in parameters_of(model):
        if parameter not in written or parameter.grad is None:
            parameter.grad = None
        else:
            parameter.grad.index_fill_(0, torch.cat(written[parameter]), 0)
            written[parameter].clear()


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm () of all gradients; of a reused gradient the rows that were written.

    By scalar products: 5 times as fast as `torch.linalg.vector_norm`, and equal to rounding.
    """
    gradients = [gradient.flatten() for _, gradient, _ in _written_gradients(model)]
    squares = [gradient.dot(gradient) for gradient in gradients]
    return torch.stack(squares).sum().sqrt() if squares else torch.tensor(0.0)


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply all gradients by factor (); a reused gradient where it was written."""
    dense = []
    for parameter, gradient, rows in _written_gradients(model):
        if rows is None:
            dense.append(gradient)
        elif parameter.grad is not None:
            parameter.grad.index_copy_(0, rows, gradient.mul_(factor))
    torch._foreach_mul_(dense, factor)


def _written_gradients(
    model: nn.Module,
) -> Iterator[tuple[nn.Parameter, Tensor, Tensor | None]]:
    """Each parameter with its gradient and None; for a reused gradient with a copy of the rows that
    may not be zero, and their indices.
    """
    written = _parts_of(model).written()
    for parameter in parameters_of(model):
        if parameter.grad is not None and parameter in written:
            rows = torch.cat(written[parameter]).unique()
            yield parameter, parameter.grad.index_select(0, rows), rows
        elif parameter.grad is not None:
            yield parameter, parameter.grad, None


class OneDnnLinear(nn.Linear):
    """nn.Linear with its products in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        if not self.is_faster(input):
            return super().forward(input)
        x = input.view(-1, self.in_features)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out.view(*input.shape[:-1], self.out_features)

    def is_faster(self, input: Tensor) -> bool:
        """Whether oneDNN can compute this product, and is faster."""
        float32 = input.dtype == self.weight.dtype == torch.float32
        if not (input.device.type == "cpu" and float32 and input.is_contiguous()):
            return False
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        min_rows = MIN_ROWS_SQUARE if self.in_features == self.out_features else MIN_ROWS
        return input.numel() >= min_rows * self.in_features


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad  # False: frozen, or there is none
        d_x = _product(gradient, weight.t(), None) if of_x else None
        d_weight = None
        if of_weight and weight.shape[0] < weight.shape[1]:
            d_weight = _product(gradient.t(), x.t(), None)
        elif of_weight:
            d_weight = gradient.t() @ x  # MKL is the faster one where the layer widens
        return d_x, d_weight, gradient.sum(0) if of_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x (rows, in), weight (out, in), bias (out,) or None -> (rows, out), or its GELU."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    try:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    except RuntimeError as error:
        # Near the end of memory oneDNN cannot allocate its code, where MKL needs none.
        if "could not create a primitive" not in str(error):
            raise
        out = F.linear(x, weight, bias)
        out = F.gelu(out) if gelu else out
    return out


def onednn_available() -> bool:
    """Whether torch has the operator, which is private, and the CPU gains by it."""
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (torch.backends.mkldnn.is_available() and avx512):
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        plain, gelu = _product(x, weight, bias), _product(x, weight, bias, gelu=True)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(plain, F.linear(x, weight, bias)) and torch.allclose(gelu, F.gelu(plain))


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model OneDnnLinear, in place, where oneDNN is available."""
    if not onednn_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= MIN_WEIGHTS:
            module.__class__ = OneDnnLinear
    for module in model.modules():
        dense = getattr(module, "dense", None)
        activation = getattr(module, "intermediate_act_fn", None)
        # BERT, RoBERTa, ELECTRA
        if isinstance(dense, OneDnnLinear) and getattr(activation, "act", None) is F.gelu:
            _fuse_gelu(module, dense)


def _fuse_gelu(module: nn.Module, dense: OneDnnLinear) -> None:
    plain = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not dense.is_faster(hidden_states):
            out: Tensor = plain(hidden_states)
            return out
        x = hidden_states.view(-1, dense.in_features)
        out = _product(x, dense.weight, dense.bias, gelu=True)
        return out.view(*hidden_states.shape[:-1], -1)

    module.forward = forward
