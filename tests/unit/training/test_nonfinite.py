"""What is not finite reaches no weight: the factor on a loss, the update on either device, the file of rows.

Whole runs are in ranks/test_nan.py.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bertdist.core.args import read_config
from bertdist.core.config import OptimConfig
from bertdist.core.errors import ConfigError
from bertdist.training.nonfinite import (
    _write,
    fused_step_if_finite,
    nan_aware_scale,
    step_if_finite,
)
from bertdist.training.optimizer import create_optimizer

PLAIN: Any = SimpleNamespace(scaler=None)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2 / 38, 8 / 7])
def test_the_factor_of_a_finite_loss_is_the_scale_to_the_bit(scale: float) -> None:
    weight = torch.tensor([0.1, -3.7, 1e-30], requires_grad=True)
    (plain,) = torch.autograd.grad((weight.exp().sum()) * scale, weight)
    (found,) = torch.autograd.grad(
        (loss := weight.exp().sum()) * nan_aware_scale(loss, scale), weight
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_gradient_of_a_loss_that_is_not_finite_is_nan(value: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(
        (loss := weight.sum() + value) * nan_aware_scale(loss, 0.5), weight
    )
    assert found.isnan().all()
    (plain,) = torch.autograd.grad((weight.sum() + value) * 0.5, weight)
    assert plain.isfinite().all(), "the control: its own derivative is finite"


class Learner:
    """A small model with AdamW's averages, and a way to take a step."""

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
def test_an_update_is_left_out_or_is_what_it_always_was(on_device: bool, value: float) -> None:
    """The kernel that reads `found_inf` is tried on the CPU, which has it too."""

    def take(learner: Learner, of: float) -> None:
        norm = learner.gradient(of)
        if on_device:
            fused_step_if_finite(learner.optimizer, norm)
            learner.optimizer.zero_grad()
        else:
            step_if_finite(learner.model, learner.optimizer, norm, PLAIN)

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
    plain.gradient(value)  # the control
    plain.optimizer.step()
    assert any(weight.isnan().any() for weight in plain.model.parameters())


def test_a_scaler_is_left_to_itself() -> None:
    stepped = []
    optimizer: Any = SimpleNamespace(step=lambda: stepped.append(1))
    step_if_finite(
        nn.Linear(1, 1), optimizer, torch.tensor(math.inf), SimpleNamespace(scaler=object())
    )  # type: ignore[arg-type]
    assert stepped == [1], "GradScaler decides, and halves its scale"


# ---- nan_rows.jsonl


def row(number: int, loss: float = math.nan) -> dict[str, Any]:
    return {
        "row": number,
        "where": f"a.tsv line {number + 2}",
        "text": "x\u202e",
        "loss": loss,
        "grad_norm": math.inf,
    }


def test_lines_of_a_step_that_is_taken_again_come_once(tmp_path: Path) -> None:
    path = tmp_path / "nan_rows.jsonl"
    _write(path, 3, [row(1), row(5)])
    _write(path, 4, [row(2)])
    first = path.read_bytes()
    _write(path, 3, [row(1), row(5)])  # a start from a checkpoint before step 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 3]
    _write(path, 4, [row(2)])
    assert path.read_bytes() == first
    path.write_bytes(first + b'{"step": 5, "ro')  # torn by an old version or a hand
    _write(path, 6, [])
    assert path.read_bytes() == first
    told = json.loads(
        first.splitlines()[0], parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert told == {
        "step": 3,
        "row": 1,
        "where": "a.tsv line 3",
        "text": "x\u202e",
        "loss": "nan",
        "grad_norm": "inf",
    }


# ---- The flags

NEEDED = ["--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=o"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max_nan_steps=3"], "--max_nan_steps goes with --on_nan skip."),
        (["--on_nan=skip", "--max_nan_steps=-1"], "--max_nan_steps is -1; expected at least 0."),
        (["--on_nan=never"], "--on_nan"),
        (["--detect_anomaly", "--cuda_graphs"], "--detect_anomaly looks at every operation"),
    ],
)
def test_flags_that_cannot_take_effect_are_errors(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([*NEEDED, *words])
    assert told in str(caught.value)
    read_config([*NEEDED, "--on_nan=skip", "--max_nan_steps=0", "--detect_anomaly"])
