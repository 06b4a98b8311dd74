"""Linear layers whose products run in oneDNN on a CPU: the same arithmetic as nn.Linear's, to rounding, in less time.

torch gives float32 products to MKL. oneDNN, which comes with torch too, is faster on CPUs with AVX-512: 434 x 384 x 1536, forward
209 against 190 GFLOP/s, to the inputs 228 against 163, to the weights of a narrowing layer 203 against 160. It prepares itself for
each new number of rows, which square layers of few rows do not win back. Where no gradient is wanted, GELU comes with the product
and saves a pass over the widest activations.

It is used where torch has it, in float32, on a CPU; elsewhere nn.Linear's, and so under torch.compile, whose inductor takes the
operator only with weights that never change (torch 2.13).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
