"""A caller's modes of torch are off inside `reset_torch_modes`, and are there again after it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from bertdist.distributed.launch import reset_torch_modes


def state() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device().type,
        torch.zeros(1).device.type,
    )


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "default_dtype": double,
    "device": lambda: torch.device("meta"),
    "default_device": meta,
}
DEFAULT = (False, True, False, torch.float32, "cpu", "cpu")


@reset_torch_modes()
def state_inside(fails: bool) -> tuple[Any, ...]:
    if fails:
        raise ValueError(state())
    return state()


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_off_inside_and_on_again_after_it(name: str) -> None:
    assert state() == DEFAULT
    with MODES[name]():
        before = state()
        assert before != DEFAULT, "negative control: the mode is on"
        assert state_inside(fails=False) == DEFAULT
        assert state() == before
        with pytest.raises(ValueError, match=r"^\(False, True, False, torch\.float32, 'cpu'"):
            state_inside(fails=True)
        assert state() == before
    assert state() == DEFAULT
