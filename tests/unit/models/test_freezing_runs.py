"""A run with --freeze: its frozen weights are bit for bit those that were loaded, and have no AdamW state.

What is frozen, and the gradients: tests/unit/models/test_freezing.py.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from rows import (
    be_quick,
    last_checkpoint,
    run_train,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from rows import train_module as train
from torch import Tensor

from bertdist.core.args import read_config
from bertdist.core.errors import CheckpointError

FROZEN = ("embeddings.", "encoder.layer.0.")


def is_frozen(name: str) -> bool:
    return any(f"bert.{part}" in name for part in FROZEN)


def run(model: Path, folder: Path, out: str, **settings: Any) -> str:
    """Train in this process; what was said."""
    files = write_split(folder, train=20, dev=6)
    words = words_of(model, folder / out, files, **{"freeze": 1, "num_train_epochs": 2, **settings})
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train.train(read_config(words))
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that holds out/, and the screen."""
    be_quick()
    folder = tmp_path_factory.mktemp("frozen")
    return folder, run(tiny_model, folder, "out")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name.split(": ")[1]: tensor for name, tensor in tensors_of(folder).items()}


def test_frozen_weights_stay_and_the_others_are_trained(
    trained: tuple[Path, str], tiny_model: Path
) -> None:
    before, after = weights_of(tiny_model), weights_of(trained[0] / "out" / "best")
    loaded = {f"bert.{name}": tensor for name, tensor in before.items()}
    names = [name for name in after if is_frozen(name)]
    assert len(names) == 5 + 16
    assert all(torch.equal(after[name], loaded[name]) for name in names)
    others = [name for name in loaded if not is_frozen(name) and "key.bias" not in name]
    assert len(others) > 15 and not any(torch.equal(after[n], loaded[n]) for n in others)


def test_only_trained_weights_have_adamw_state(trained: tuple[Path, str]) -> None:
    last = last_checkpoint(trained[0] / "out")
    tensors = tensors_of(last)
    held = {n.split(": ")[1].split("|")[0] for n in tensors if n.startswith("optimizer")}
    weights = {n.split(": ")[1] for n in tensors if n.startswith("model")}
    assert held == {name for name in weights if not is_frozen(name)}
    assert any(map(is_frozen, weights))  # the format is that of every run: all weights


def test_a_line_says_what_is_frozen_and_saved(trained: tuple[Path, str]) -> None:
    said = " ".join(trained[1].split())
    assert "Frozen embeddings and the first 1 layer: " in said
    assert " parameters are trained; saves " in said and " of AdamW state" in said


def test_a_run_resumes_with_the_same_weights_frozen_only(
    trained: tuple[Path, str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained[0]

    class Stop(Exception):
        pass

    real, steps = train.train_step, iter(range(9))

    def stopping(*args: Any) -> Any:
        if next(steps) == 4:
            raise Stop
        return real(*args)

    monkeypatch.setattr(train, "train_step", stopping)
    with pytest.raises(Stop):
        run(tiny_model, folder, "cut", save_every="2 steps")
    monkeypatch.setattr(train, "train_step", real)
    for other in (None, "embeddings", "encoder"):  # the control: other weights were trained
        with pytest.raises(CheckpointError, match=r"freeze +\['1'\] .*trained other weights"):
            run(tiny_model, folder, "cut", save_every="2 steps", freeze=other)
    said = run(tiny_model, folder, "cut", save_every="2 steps", freeze=["embeddings", 1])
    assert "step 4" in said
    assert step_log(folder / "cut") == step_log(folder / "out")
    cut, out = (weights_of(folder / name / "best") for name in ("cut", "out"))
    assert all(torch.equal(cut[name], out[name]) for name in out)


def test_ranks_train_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    """DDP is given no frozen weight, and finds none unused."""
    files = write_split(tmp_path, train=20, dev=6)

    def words(out: str, **settings: Any) -> list[str]:
        settings = {"freeze": 1, "num_train_epochs": 1, **settings}
        return words_of(tiny_model, tmp_path / out, files, **settings)

    run_ranks(2, run_train, words("two"))
    be_quick()
    train.train(read_config(words("one")))
    train.train(read_config(words("free", freeze=None)))  # the control
    loaded = {f"bert.{name}": tensor for name, tensor in weights_of(tiny_model).items()}
    one, two, free = (weights_of(tmp_path / name / "best") for name in ("one", "two", "free"))
    for name, weight in one.items():
        if is_frozen(name):
            assert torch.equal(two[name], loaded[name]) and not torch.equal(free[name], weight)
        elif "key.bias" not in name:
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    losses = [[line["loss"] for line in step_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
