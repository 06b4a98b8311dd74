"""The layer that makes a classifier's logits, and a temperature that is folded into it.

Logits divided by a temperature are those of an output layer whose weight and bias are divided by
it: the folder stays a plain Hugging Face model, and `pipeline` gives the same probabilities.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bertdist.core.errors import ModelError


def last_linear(model: Any) -> tuple[str, nn.Linear | None]:
    """The last linear layer outside of the encoder, by its name; "" and None without one.

    model: the Hugging Face model. The logits are computed last.
    """
    body = f"{model.base_model_prefix}."
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(body)
    }
    name = next(reversed(layers), "")
    return name, layers.get(name)


def output_layer(model: Any, probe: Callable[[], Tensor]) -> nn.Linear:
    """The linear layer whose output is the logits; raises ModelError where there is none.

    probe: computes some logits.
    """
    name, layer = last_linear(model)
    found: list[Tensor] = []
    if layer is not None:
        hook = layer.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            logits = probe()
        finally:
            hook.remove()
        # under autocast there may be more rows, of padding
        made = found[-1].float().flatten()[: logits.numel()] if found else None
        if made is not None and torch.equal(made, logits.float().flatten()):
            return layer
    raise ModelError(
        f"A temperature cannot be folded into a model of type "
        f"{model.config.model_type!r}: "
        + (f"{name} does not make its logits." if name else "it has no output layer.")
        + " Train without --calibrate."
    )


@torch.no_grad()
def divide_output(layer: nn.Linear, temperature: float) -> None:
    """Divide weight and bias by the temperature, rounded once."""
    for weight in layer.parameters():
        weight.copy_(weight.double() / temperature)
