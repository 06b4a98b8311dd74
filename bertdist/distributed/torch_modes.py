"""A caller's modes of torch, which must not change what a run computes.

    @with_default_modes()
    def train(config): ...     # the same bits inside torch.autocast, torch.no_grad, ...

What a run computes follows from its config alone: a program that calls train() or a Predictor
within a mode of its own gets the same result as outside, and its modes back.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def with_default_modes() -> Iterator[None]:
    """No autocast, no inference mode, gradients enabled, float32 and the CPU as defaults."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
