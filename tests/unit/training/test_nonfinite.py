"""NaN and Inf reach no weight: loss scale, optimizer step, nan_rows.jsonl, --detect_anomaly.

Complete runs are in ranks/test_nan.py.
"""

import inspect
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertdist.core.args import read_config
from bertdist.core.config import OptimConfig
from bertdist.core.errors import ConfigError, NonFiniteError
from bertdist.training.nonfinite import (
    NonFiniteGuard,
    find_anomaly,
    nan_aware_scale,
    write_rows,
)
from bertdist.training.optimizer import apply_update, create_optimizer, fused_step_if_finite

PLAIN: Any = SimpleNamespace(scaler=None)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2 / 38, 8 / 7])
def test_scale_of_a_finite_loss_is_bit_identical(scale: float) -> None:
    weight = torch.tensor([0.1, -3.7, 1e-30], requires_grad=True)
    (plain,) = torch.autograd.grad((weight.exp().sum()) * scale, weight)
    (found,) = torch.autograd.grad(
        (loss := weight.exp().sum()) * nan_aware_scale(loss, scale), weight
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradient_of_a_nonfinite_loss_is_nan(value: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(
        (loss := weight.sum() + value) * nan_aware_scale(loss, 0.5), weight
    )
    assert found.isnan().all()
    (plain,) = torch.autograd.grad((weight.sum() + value) * 0.5, weight)
    assert plain.isfinite().all(), "negative control: its own derivative is finite"


class Learner:
    """A small model and its AdamW."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = create_optimizer(self.model, OptimConfig(learning_rate=0.1))

    def gradient(self, of: float) -> Tensor:
        (self.model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum() * of).backward()
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def bits(self) -> list[bytes]:
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [tensor.detach().numpy().tobytes() for tensor in [*self.model.parameters(), *state]]


@pytest.mark.parametrize("on_device", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_step_is_skipped_and_finite_steps_are_unchanged(
    on_device: bool, value: float
) -> None:
    """`found_inf` is tested with the CPU's fused kernel, which reads it too."""

    def take(learner: Learner, of: float) -> None:
        norm = learner.gradient(of)
        if on_device:
            fused_step_if_finite(learner.optimizer, norm)
            learner.optimizer.zero_grad()
        else:
            apply_update(learner.model, learner.optimizer, norm, PLAIN)

    guarded, plain = Learner(), Learner()
    for of in (1.0, 2.0, value, value, 0.5):
        before = guarded.bits()
        take(guarded, of)
        if math.isfinite(of):
            plain.gradient(of)
            plain.optimizer.step()
            plain.optimizer.zero_grad()
            assert guarded.bits() != before
        else:
            assert guarded.bits() == before
    assert guarded.bits() == plain.bits()
    plain.gradient(value)  # negative control
    plain.optimizer.step()
    assert any(weight.isnan().any() for weight in plain.model.parameters())


def test_grad_scaler_decides_by_itself() -> None:
    stepped = []
    optimizer: Any = SimpleNamespace(step=lambda: stepped.append(1))
    apply_update(
        nn.Linear(1, 1), optimizer, torch.tensor(math.inf), SimpleNamespace(scaler=object())
    )  # type: ignore[arg-type]
    assert stepped == [1], "GradScaler decides, and halves its scale"


# ---- nan_rows.jsonl


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_ends_without_an_update_is_an_error(fused: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    guard: Any = SimpleNamespace(state=SimpleNamespace(finished=True, step=2))
    weight.grad = torch.ones(2)
    if fused:  # as on a GPU: the kernel skips the update
        fused_step_if_finite(optimizer, torch.tensor(math.nan))
        assert optimizer.state
    with pytest.raises(NonFiniteError, match="Nothing was trained: each of the 2 steps"):
        NonFiniteGuard.check_end(guard, optimizer)
    guard.state.finished = False  # a stop: the run goes on
    NonFiniteGuard.check_end(guard, optimizer)
    guard.state.finished = True
    fused_step_if_finite(optimizer, torch.tensor(1.0)) if fused else optimizer.step()
    NonFiniteGuard.check_end(guard, optimizer)


def row(number: int, loss: float = math.nan) -> dict[str, Any]:
    return {
        "row": number,
        "where": f"a.tsv line {number + 2}",
        "text": "x\u202e",
        "loss": loss,
        "grad_norm": math.inf,
    }


def test_rows_of_a_repeated_step_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "nan_rows.jsonl"
    write_rows(path, 3, [row(1), row(5)])
    write_rows(path, 4, [row(2)])
    first = path.read_bytes()
    write_rows(path, 3, [row(1), row(5)])  # a start from a checkpoint before step 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 3]
    write_rows(path, 4, [row(2)])
    assert path.read_bytes() == first
    path.write_bytes(first + b'{"step": 5, "ro')  # truncated
    write_rows(path, 6, [])
    assert path.read_bytes() == first
    entry = json.loads(
        first.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert entry == {
        "step": 3,
        "row": 1,
        "where": "a.tsv line 3",
        "text": "x\u202e",
        "loss": "nan",
        "grad_norm": "inf",
    }


# ---- find_anomaly: the operation and its line of code

X = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.1, -0.2]])
TARGETS = torch.tensor([0, 2])


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGETS)


def log_of_negative(x: Tensor) -> Tensor:
    hidden = x.clone()
    return loss_of(hidden.log())  # named


def nan_from_overflow(x: Tensor) -> Tensor:
    large = (x * 1e30).exp()  # named too
    return loss_of(large - large)  # named


def in_place(x: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    uninitialized = torch.empty_like(x)  # NaN in this mode, as recycled memory may hold
    torch.use_deterministic_algorithms(False)
    assert uninitialized.isnan().all()
    uninitialized.copy_(x)
    uninitialized.sub_(5).sqrt_()  # named
    return loss_of(x * uninitialized)


def overflow_alone(x: Tensor) -> Tensor:
    return (x * 1e30).square().sum()  # named


def masked(x: Tensor) -> Tensor:
    """A mask of -inf, and a square root whose derivative at 0 is infinite."""
    scores = x.masked_fill(torch.tensor([True, False, False]), -math.inf).softmax(-1)
    return ((scores - scores.detach()).sqrt() * 0).sum()  # named


def all_masked(x: Tensor) -> Tensor:
    """The usual NaN of attention: every key of a query is masked."""
    scores = x.masked_fill(torch.ones(3, dtype=torch.bool), -math.inf)
    return loss_of(scores.softmax(-1) * x)  # named


def nan_constant(x: Tensor) -> Tensor:
    return (x * math.nan).sum()  # named


@pytest.mark.parametrize(
    ("compute", "operation"),
    [
        (log_of_negative, r"aten\.log in the forward pass makes the first NaN"),
        (nan_from_overflow, r"aten\.sub in the forward pass makes the first NaN"),
        (in_place, r"aten\.sqrt_ in the forward pass makes the first NaN"),
        (overflow_alone, r"aten\.pow in the forward pass makes the first Inf"),
        (masked, r"(Sqrt|Mul)Backward0 in the backward pass makes the first NaN"),
        (nan_constant, r"aten\.mul in the forward pass makes the first NaN"),
        (all_masked, r"aten\._softmax in the forward pass makes the first NaN"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_operation_and_its_line_are_named(
    compute: Callable[[Tensor], Tensor], operation: str
) -> None:
    x = X.clone().requires_grad_()
    anomaly = find_anomaly(lambda: compute(x))
    lines, first = inspect.getsourcelines(compute)
    (line,) = (number for number, text in enumerate(lines, first) if text.endswith("# named\n"))
    assert anomaly is not None and pickle.loads(pickle.dumps(anomaly)) == anomaly
    *before, sentence = anomaly[0].split("; then ")
    expected = rf"{operation} \(test_nonfinite\.py, line {line}, in {compute.__name__}\)"
    assert re.fullmatch(expected, sentence)
    assert f"line {line}, in {compute.__name__}\n" in anomaly[1]
    inf = f"aten.exp in the forward pass makes the first Inf (test_nonfinite.py, line {line - 1}, "
    assert before == ([f"{inf}in nan_from_overflow)"] if compute is nan_from_overflow else [])


def test_no_operation_is_named_in_a_finite_step() -> None:
    x = X.clone().requires_grad_()
    assert find_anomaly(lambda: loss_of(x.masked_fill(x < 0, -math.inf)[:, :1] * x)) is None
    assert x.grad is not None and not torch.is_anomaly_enabled(), "the mode is off again"


def test_an_infinite_gradient_is_not_an_anomaly() -> None:
    """Torch's anomaly mode sees NaN only."""
    x = torch.zeros(2).requires_grad_()
    assert find_anomaly(lambda: x.sqrt().sum()) is None
    assert x.grad is not None and x.grad.isinf().all()


def test_find_anomaly_raises_other_errors() -> None:
    x = X.clone().requires_grad_()
    message = "grad can be implicitly created only for scalar outputs"
    with pytest.raises(RuntimeError, match=message):
        find_anomaly(lambda: x * 2)


def test_find_anomaly_sees_inside_a_compiled_module() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    compiled = torch.compile(Log(), backend="eager")
    x = X.clone().requires_grad_()
    anomaly = find_anomaly(lambda: loss_of(compiled(x)))
    assert anomaly is not None and "aten.log in the forward pass" in anomaly[0]


# ---- The flags

NEEDED = ["--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=o"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_nan_steps=3"], "--max_nan_steps needs --on_nan skip."),
        (["--on_nan=skip", "--max_nan_steps=-1"], "--max_nan_steps is -1; expected at least 0."),
        (["--on_nan=never"], "--on_nan"),
        (["--detect_anomaly", "--cuda_graphs"], "--detect_anomaly cannot see operations"),
    ],
)
def test_flags_that_cannot_take_effect_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([*NEEDED, *flags])
    assert message in str(caught.value)
    read_config([*NEEDED, "--on_nan=skip", "--max_nan_steps=0", "--detect_anomaly"])
