"""--cuda_graphs and --torch_compile on a GPU: the losses of eager steps. Skipped, saying so, where there is none.

Losses of about 0.7 are compared in bf16, where products of other shapes round differently; the controls move them by far more.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import Files, words_of, write_split
from rows import train_module as train
from torch import Tensor

from bertdist.core.args import read_config
from bertdist.training import cuda_graph as graphed
from bertdist.training.cuda_graph import GraphedStep, StepResult

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS, REPLAYED = (
    20,
    1 + 15,
)  # a trial; and of 5 steps an epoch all but the smaller last, and the first of all, which makes AdamW's state
ROUNDING = 0.02


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_split(tmp_path_factory.mktemp("rows"), 38, 6)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each replay."""
    seen: list[int] = []
    capture = graphed.capture_on_cuda

    def watched(*args: Any) -> Any:
        replay, results = capture(*args)
        return lambda: (seen.append(1), replay()), results

    monkeypatch.setattr(graphed, "capture_on_cuda", watched)
    return seen


def curve(model: Path, out: Path, files: Files, **settings: Any) -> Tensor:
    """The loss of each step."""
    usual = {
        "use_cpu": None,
        "mixed_precision": "bf16",
        "num_train_epochs": 4,
        "dropout": 0,
        "warmup_steps": 3,
    }
    train.train(read_config(words_of(model, out, files, **{**usual, **settings})))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "train"])


def far(a: Tensor, b: Tensor) -> float:
    assert len(a) == len(b) == STEPS
    return (a - b).abs().max().item()


def taken_again(
    take: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """Instead of a capture: the same filled-up steps, launched one kernel at a time."""
    results = take()

    def replay() -> None:
        for into, new in zip(results, take(), strict=True):
            into.copy_(new)

    return replay, results


def test_replays_learn_what_eager_steps_learn(
    tiny_model: Path, files: Files, tmp_path: Path, replays: list[int]
) -> None:
    eager = curve(tiny_model, tmp_path / "eager", files)
    assert not replays
    assert far(curve(tiny_model, tmp_path / "graphed", files, cuda_graphs=True), eager) < ROUNDING
    assert len(replays) == REPLAYED
    assert (
        far(curve(tiny_model, tmp_path / "slow", files, learning_rate=1e-4), eager) > 5 * ROUNDING
    )  # the control


def test_dropout_of_a_replay_is_a_function_of_the_step(
    tiny_model: Path, tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step has the same rows and weights, so that only dropout tells them apart."""
    same = write_split(tmp_path / "same", 8, 6)
    still = {"cuda_graphs": True, "dropout": 0.3, "learning_rate": 0, "num_train_epochs": STEPS}
    once, again = (curve(tiny_model, tmp_path / name, same, **still) for name in ("once", "again"))
    assert len(replays) == 2 * STEPS  # with the trial, without the first step
    assert far(once, again) < 1e-3
    assert len(set(once.tolist())) == STEPS and once.std() > ROUNDING
    monkeypatch.setattr(graphed, "capture_on_cuda", taken_again)
    assert (
        far(once, curve(tiny_model, tmp_path / "launched", same, **still)) < 1e-3
    )  # the masks are those of the same step without a graph
    other = curve(tiny_model, tmp_path / "other", same, **still, seed=43)
    assert far(once, other) > ROUNDING  # the control


def test_a_run_with_replays_resumes(
    tiny_model: Path,
    files: Files,
    tmp_path: Path,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"cuda_graphs": True, "dropout": 0.3, "save_every": "3 steps"}
    straight = curve(tiny_model, tmp_path / "straight", files, **settings)
    step = GraphedStep.__call__

    def dying(self: GraphedStep, model: Any, optimizer: Any, at: Any, *rest: Any) -> StepResult:
        if at.number == 8:
            raise KeyboardInterrupt
        return step(self, model, optimizer, at, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(GraphedStep, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            curve(tiny_model, tmp_path / "resumed", files, **settings)
    before = len(replays)
    assert far(curve(tiny_model, tmp_path / "resumed", files, **settings), straight) < ROUNDING
    assert len(replays) > before


def test_a_failed_capture_falls_back_to_eager_steps(
    tiny_model: Path,
    files: Files,
    tmp_path: Path,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the midst of it, with the generator in use: the run ends as an eager one."""
    eager = curve(tiny_model, tmp_path / "eager", files, dropout=0.3)
    train_step = train.train_step

    def breaking(model: Any, optimizer: Any, step: Any, *rest: Any) -> Any:
        taken = train_step(model, optimizer, step, *rest)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("in the midst of it")
        return taken

    monkeypatch.setattr(train, "train_step", breaking)
    broken = curve(tiny_model, tmp_path / "broken", files, dropout=0.3, cuda_graphs=True)
    assert (
        "--cuda_graphs cannot take effect, steps run eagerly: ValueError: in the midst of it"
        in capsys.readouterr().err
    )
    assert not replays and far(broken, eager) < ROUNDING


def test_compiled_layers_learn_what_eager_ones_learn(
    tiny_model: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = curve(tiny_model, tmp_path / "eager", files, dropout=0.3)
    compiled = curve(tiny_model, tmp_path / "compiled", files, dropout=0.3, torch_compile=True)
    assert "--torch_compile: the layers are compiled (" in capsys.readouterr().err
    assert far(compiled, eager) < ROUNDING
    assert (
        far(curve(tiny_model, tmp_path / "other", files, dropout=0.3, seed=43), eager)
        > 5 * ROUNDING
    )  # the control
