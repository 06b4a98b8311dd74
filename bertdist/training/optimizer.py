"""AdamW with parameter groups for weight decay and layerwise learning rates; the learning rate as a
pure function of the step, so that a resumed run needs no scheduler state.

Use: `create_optimizer(model, config)` once; before each step
`set_learning_rate(optimizer, create_lr_schedule(config, total_steps)(step))`, after its backward
pass `clip_gradients` and `apply_update`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import get_scheduler

from bertdist.core.config import OptimConfig
from bertdist.core.errors import ConfigError
from bertdist.models.architectures import layer_index
from bertdist.models.cpu_layers import (
    gradient_norm,
    parameters_of,
    scale_gradients,
    zero_grad,
)


def create_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Fused AdamW. Biases and norm weights (parameters of fewer than two dimensions) do not decay;
    frozen ones (--freeze) are left out.

    With --layerwise_lr_decay d each layer has d times the learning rate of the layer above it: the
    head 1, the last of L layers d, the first d^L, the embeddings d^(L+1)
    (https://arxiv.org/abs/1905.05583, section 5.4.2). Each group keeps its highest rate as
    `peak_lr`. Raises ConfigError if the model has no numbered layers.
    """
    layer_of = {name: layer_index(name) for name, _ in model.named_parameters()}
    layers = max((layer for layer in layer_of.values() if layer is not None), default=-1) + 1
    if config.layerwise_lr_decay != 1 and layers == 0:
        raise ConfigError("--layerwise_lr_decay: this model has no numbered layers; leave it at 1.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            layer = layer_of[name]
            if layer is None:
                layer = -1 if "embedding" in name else layers
            scale = config.layerwise_lr_decay ** (layers - layer)
            groups.setdefault((decay, scale), []).append(parameter)
    settings = []
    for (decay, scale), parameters in groups.items():
        lr = config.learning_rate * scale
        settings.append({"params": parameters, "weight_decay": decay, "lr": lr, "peak_lr": lr})
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(
        settings, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )


def create_lr_schedule(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor on every group's peak_lr, from transformers' schedules.

    Raises ConfigError if the warmup is longer than the run, or a schedule's last learning rate
    (polynomial: 1e-7) is not below --learning_rate.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_ratio * total_steps)
    if warmup > total_steps:
        raise ConfigError(f"--warmup_steps is {warmup}, but the run has {total_steps} steps.")
    # get_scheduler requires an optimizer; only the function of its schedule is kept.
    dummy = SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type, dummy, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except ValueError as error:
        raise ConfigError(f"--lr_scheduler_type {config.lr_scheduler_type}: {error}.") from None
    lr_factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return lr_factor


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether reading the value needs no device synchronization."""
    return tensor.device.type == "cpu"


def clip_gradients(model: nn.Module, max_norm: float, accelerator: Accelerator) -> Tensor:
    """The norm () of all gradients; where it is above max_norm, they are scaled down to it.

    As accelerate clips, to rounding. On a CPU without its passes over what does not change: all
    gradients where the norm is not above max_norm, rows of the word embedding without a gradient.
    """
    parameters = parameters_of(model)
    if accelerator.scaler is not None or not is_on_cpu(parameters[0]):
        found: Tensor | None = accelerator.clip_grad_norm_(parameters, max_norm)
        assert found is not None
        return found
    norm = gradient_norm(model)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if factor != 1:
        scale_gradients(model, factor)
    return norm


def apply_update(
    model: nn.Module, optimizer: Any, grad_norm: Tensor, accelerator: Accelerator
) -> None:
    """optimizer.step() unless grad_norm () is not finite; then zero_grad().

    optimizer: an AdamW, with or without accelerate's wrapper. A skipped step is reported by
    nonfinite.py.
    """
    skip = is_on_cpu(grad_norm) and not math.isfinite(grad_norm.item())
    if accelerator.scaler is not None:  # it checks by itself
        optimizer.step()
    elif not is_on_cpu(grad_norm):
        fused_step_if_finite(optimizer, grad_norm)
    elif not skip:
        optimizer.step()
    if skip:  # clipping has spread NaN over rows that `zero_grad` does not reach
        model.zero_grad(set_to_none=True)
    zero_grad(model)


def fused_step_if_finite(optimizer: Any, grad_norm: Tensor) -> None:
    """optimizer.step() of fused AdamW, skipped on the device if grad_norm () is not finite."""
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    unwrapped.found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to factor x its peak_lr; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))
