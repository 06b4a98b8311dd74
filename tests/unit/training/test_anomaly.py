"""The first operation that makes NaN or Inf is named, with the line of code that called it. Whole runs are in ranks/test_nan.py."""

import inspect
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertdist.training.anomaly import Anomaly, find_anomaly

X = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.1, -0.2]])
TARGETS = torch.tensor([0, 2])


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGETS)


def log_of_negative(x: Tensor) -> Tensor:
    hidden = x.clone()
    return loss_of(hidden.log())  # blamed


def nan_from_overflow(x: Tensor) -> Tensor:
    large = (x * 1e30).exp()  # said, too
    return loss_of(large - large)  # blamed


def in_place(x: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    anything = torch.empty_like(x)  # NaN in this mode, as memory may be that was used before
    torch.use_deterministic_algorithms(False)
    assert anything.isnan().all()
    anything.copy_(x)
    anything.sub_(5).sqrt_()  # blamed
    return loss_of(x * anything)


def overflow_alone(x: Tensor) -> Tensor:
    return (x * 1e30).square().sum()  # blamed


def masked(x: Tensor) -> Tensor:
    """Inf that is meant, and a square root whose slope at 0 is infinite."""
    scores = x.masked_fill(torch.tensor([True, False, False]), -math.inf).softmax(-1)
    return ((scores - scores.detach()).sqrt() * 0).sum()  # blamed


@pytest.mark.parametrize(
    ("compute", "what"),
    [
        (log_of_negative, "in the forward pass aten.log makes the first NaN"),
        (nan_from_overflow, "in the forward pass aten.sub makes the first NaN"),
        (in_place, "in the forward pass aten.sqrt_ makes the first NaN"),
        (overflow_alone, "in the forward pass aten.pow makes the first Inf"),
        (masked, "in the backward pass (Sqrt|Mul)Backward0 gives the first NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_operation_and_its_line_are_named(
    compute: Callable[[Tensor], Tensor], what: str
) -> None:
    x = X.clone().requires_grad_()
    found = find_anomaly(lambda: compute(x))
    lines, first = inspect.getsourcelines(compute)
    (line,) = (number for number, text in enumerate(lines, first) if "# blamed" in text)
    assert found is not None and re.fullmatch(
        f"{what}, at test_anomaly.py line {line} in {compute.__name__}", str(found)
    )
    assert pickle.loads(pickle.dumps(found)) == found
    if compute is nan_from_overflow:
        assert (
            f"First, in the forward pass aten.exp makes the first Inf, at test_anomaly.py line {line - 1} "
            in found.stack
        )


def test_nothing_is_named_where_all_is_well() -> None:
    x = X.clone().requires_grad_()
    assert find_anomaly(lambda: loss_of(x.masked_fill(x < 0, -math.inf)[:, :1] * x)) is None, (
        "the control"
    )
    assert x.grad is not None and not torch.is_anomaly_enabled(), "and the mode is off again"


def test_an_infinite_gradient_is_not_looked_for() -> None:
    """Anomaly mode sees NaN only; what is said of that is nonfinite's."""
    x = torch.zeros(2).requires_grad_()
    assert (
        find_anomaly(lambda: x.sqrt().sum()) is None and x.grad is not None and x.grad.isinf().all()
    )


def test_other_errors_are_not_hidden() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(
        RuntimeError, match="grad can be implicitly created only for scalar outputs"
    ):
        find_anomaly(lambda: x * 2)


def test_a_compiled_module_is_looked_into() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    compiled = torch.compile(Log(), backend="eager")
    x = X.clone().requires_grad_()
    assert "aten.log makes the first NaN" in str(find_anomaly(lambda: loss_of(compiled(x))))


def test_without_a_stack_the_operation_is_named_alone() -> None:
    assert (
        str(Anomaly("in the backward pass X gives the first NaN", ""))
        == "in the backward pass X gives the first NaN"
    )
