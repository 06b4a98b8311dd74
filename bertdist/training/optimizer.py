"""Which parameters decay and how fast each layer learns; and the learning rate as a pure function of the step."""

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import get_scheduler

from bertdist.core.config import OptimConfig
from bertdist.core.errors import ConfigError


def create_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Fused AdamW. Biases and norm weights (all parameters of fewer than two dimensions) do not decay.

    With --layerwise_lr_decay d a layer learns at d times the rate of the layer above it: the head at 1, the last of L layers at
    d, the first at d^L, the embeddings at d^(L+1) (https://arxiv.org/abs/1905.05583, section 5.4.2).
    Each group keeps its own highest rate as `peak_lr`. Raises ConfigError where the model has no numbered layers to tell apart.
    """
    heights = {name: _height(name) for name, _ in model.named_parameters()}
    layers = max((height for height in heights.values() if height is not None), default=-1) + 1
    if config.layerwise_lr_decay != 1 and layers == 0:
        raise ConfigError(
            "--layerwise_lr_decay finds no numbered layers in this model; leave it at 1."
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            height = heights[name]
            if height is None:
                height = -1 if "embedding" in name else layers
            groups.setdefault((decay, config.layerwise_lr_decay ** (layers - height)), []).append(
                parameter
            )
    return AdamW(
        [
            {
                "params": parameters,
                "weight_decay": decay,
                "lr": config.learning_rate * scale,
                "peak_lr": config.learning_rate * scale,
            }
            for (decay, scale), parameters in groups.items()
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def create_lr_schedule(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor on every group's peak_lr: transformers' schedules, of which only the function is kept.

    A function has no state, so a resumed run needs none.
    """
    warmup = (
        round(config.warmup_ratio * total_steps)
        if config.warmup_steps is None
        else config.warmup_steps
    )
    if warmup > total_steps:
        raise ConfigError(f"--warmup_steps is {warmup}, but the run has {total_steps} steps.")
    stand_in = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler_type, stand_in, num_warmup_steps=warmup, num_training_steps=total_steps
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at factor x its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _height(name: str) -> int | None:
    """The number of the layer that a parameter belongs to, from its name: 'bert.encoder.layer.3.output.dense.weight' -> 3."""
    match = re.search(r"\.(?:layer|layers|block|blocks|h)\.(\d+)\.", name)
    return int(match[1]) if match else None
