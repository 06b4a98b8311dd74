"""Linear layers whose products run in oneDNN on a CPU: the same arithmetic as nn.Linear's, to rounding, in less time.

torch gives float32 products to MKL. For layers that widen or narrow (the feed-forward ones) oneDNN, which comes with torch too, is
faster on CPUs with AVX-512: 434 x 384 x 1536, forward 209 against 190 GFLOP/s, to the inputs 228 against 163, to the weights of the
narrowing layer 203 against 160. Square layers gain nothing that its preparation for each new number of tokens does not cost again.

It is used where torch has it, in float32, on a CPU; elsewhere and under torch.compile, which does the same by itself, nn.Linear's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 64  # below it the product is too small to gain


class OneDnnLinear(nn.Linear):
    """nn.Linear with its products in oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        rows = input.numel() // self.in_features
        here = input.device.type == "cpu" and input.dtype == torch.float32 and input.is_contiguous()
        if not here or rows < FEW_ROWS or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(input)
        out: Tensor = _Linear.apply(input.view(rows, self.in_features), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out.view(*input.shape[:-1], self.out_features)


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
        d_weight = _product(gradient.t(), x.t(), None) if narrows else gradient.t() @ x  # MKL is the faster one where it widens
        return d_x, d_weight, gradient.sum(0) if ctx.has_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in), weight (out, in), bias (out,) or None -> (rows, out)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def available() -> bool:
    """Whether this torch has the product, and a CPU that gains by it; the operator is private, so it is tried."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError):
        return False


def use_onednn(model: nn.Module) -> None:
    """Let the feed-forward layers of a model, in place, take their products from oneDNN where it is available."""
    if available():
        for module in model.modules():
            if type(module) is nn.Linear and module.in_features != module.out_features and module.weight.numel() >= 1 << 16:
                module.__class__ = OneDnnLinear
