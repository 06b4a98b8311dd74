"""Which operation made a number that is not finite: a computation is done again, and looked at. (--detect_anomaly)

In: a way to compute a loss, known to be NaN or infinite, or to have such a gradient. Out: the first operation to blame, and the stack of
Python calls that led to it in the forward pass; None where nothing is found.

1. The forward pass: the result of every operation is looked at. To blame is the first that makes NaN where no tensor it reads has one;
   where none does, the first that makes Inf of finite numbers (so masks of -inf are none).
2. The backward pass, where the forward pass was sound: anomaly mode of torch.autograd, which ends it at the first function that gives
   NaN, and remembers from which call of the forward pass that function came. It looks for NaN only, not for Inf.

One module, because everything else need only know that it was asked for. It costs nothing until a step is not finite: only that step
is computed again.
"""

import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TORCH = str(Path(torch.__file__).parent)

FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<name>.+)$', re.MULTILINE)


class Anomaly(NamedTuple):
    """An operation, and how the forward pass came to it. Picklable."""

    what: str  # in words: "in the forward pass aten.log makes the first NaN"
    stack: str  # as Python prints it, the innermost call last

    def __str__(self) -> str:
        frames = [
            found for found in FRAME.finditer(self.stack) if not found["file"].startswith(TORCH)
        ]
        if not frames:
            return self.what
        last = frames[-1]
        return f"{self.what}, at {Path(last['file']).name} line {last['line']} in {last['name']}"


def find_anomaly(compute: Callable[[], Tensor]) -> Anomaly | None:
    """compute: gives a loss () with a gradient, as the step did; called once. Gradients are left in the parameters."""
    looking = _Looking()
    # a compiled layer is one operation to torch: eagerly it is many
    with torch.compiler.set_stance("force_eager"), torch.autograd.set_detect_anomaly(True):
        with looking, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = compute()
        return looking.found() or _of_backward(loss)


def _of_backward(loss: Tensor) -> Anomaly | None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            loss.backward()
        except RuntimeError as error:
            # "Function 'SqrtBackward0' returned nan values in its 0th output." and, as a warning, the stack (torch 2.13)
            function = re.search(r"Function '(\w+)' returned nan values", str(error))
            if function is None:
                raise
            stacks = [
                str(warning.message)
                for warning in told
                if "Traceback of forward call" in str(warning.message)
            ]
            stack = "\n".join(stacks[0].splitlines()[1:]) if stacks else ""
            return Anomaly(f"in the backward pass {function[1]} gives the first NaN", stack)
    return None


class _Looking(TorchDispatchMode):
    """Remembers the first operation that makes NaN, and the first that makes Inf."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nan: Anomaly | None = None
        self.inf: Anomaly | None = None

    def found(self) -> Anomaly | None:
        """NaN before Inf, which may be meant; an Inf that came before a NaN stands in its stack."""
        if self.nan is not None and self.inf is not None:
            return self.nan._replace(
                stack=f"First, {self.inf}:\n{self.inf.stack}\nThen, {self.nan}:\n{self.nan.stack}"
            )
        return self.nan or self.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [args, kwargs or {}]
        if self.nan is not None or "empty" in str(
            func
        ):  # what empty gives is to be written over, and may be anything
            return func(*args, **(kwargs or {}))
        read = _kinds(given)  # before the call: it may write in place
        out = func(*args, **(kwargs or {}))
        made = _kinds(out) - read
        if "NaN" in made:
            self.nan = self._blame(func, "NaN")
        elif (
            "Inf" in made
            and self.inf is None
            and not read
            and all(map(math.isfinite, _numbers(given)))
        ):
            self.inf = self._blame(func, "Inf")
        return out

    def _blame(self, func: Any, kind: str) -> Anomaly:
        frames = traceback.extract_stack(sys._getframe(2))
        while frames and frames[-1].filename.startswith(
            (f"{TORCH}/_compile", f"{TORCH}/_dynamo")
        ):  # how torch came to this class
            frames.pop()
        stack = "".join(traceback.format_list(frames))
        return Anomaly(f"in the forward pass {func.overloadpacket} makes the first {kind}", stack)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [leaf for part in value for leaf in _leaves(part)]
        if isinstance(value, list | tuple)
        else [value]
    )


def _numbers(value: Any) -> list[float]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, float)]


def _kinds(value: Any) -> set[str]:
    """NaN, Inf: which of them the tensors in a value hold."""
    found = set()
    for leaf in _leaves(value):
        if (
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.layout == torch.strided
            and leaf.numel()
        ):
            total = leaf.detach().sum()
            if not math.isfinite(total.item()):  # one pass tells of nearly all that all is well
                found |= {"NaN"} if bool(leaf.isnan().any()) else set()
                found |= {"Inf"} if bool(leaf.isinf().any()) else set()
    return found
