"""A checkpoint is bit for bit what was saved, complete or absent, and never a pickle."""

import io
import json
import math
import os
import pickle
import pickletools
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bertdist
from bertdist.core.atomic_io import find_damage, write_folder
from bertdist.core.config import OptimConfig
from bertdist.core.errors import CheckpointError
from bertdist.data.batch import RankStep
from bertdist.distributed.host_memory import limited_memory
from bertdist.training.checkpoint import (
    FORMAT,
    Checkpointer,
    TrainState,
    apply_changes,
    load_tensors,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    reader_state_of_rank,
)
from bertdist.training.optimizer import create_optimizer
from bertdist.training.resume_check import Change, ResumeSignature

FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]
MUST_MATCH = {"learning_rate": 5e-5, "labels": ["a", "b"], "dropout": None}


def one_rank(**changes: Any) -> Any:
    """Stands for an Accelerator of one process."""
    return SimpleNamespace(
        **{
            "is_main_process": True,
            "num_processes": 1,
            "process_index": 0,
            "scaler": None,
            **changes,
        }
    )


class Net(nn.Module):
    """Two tied weights, biases, a persistent buffer and one that is not."""

    def __init__(self, seed: int, size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, size)
        self.outer.weight = self.inner.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.outer(self.inner(x).tanh())


class Run:
    """A model, its optimizer and a folder of checkpoints."""

    def __init__(
        self, folder: Path, seed: int = 0, keep: int = 2, size: int = 4, **accelerator: Any
    ) -> None:
        self.model = Net(seed, size)
        self.optimizer = create_optimizer(self.model, OptimConfig(learning_rate=0.1))
        self.messages: list[str] = []
        self.checkpoints = Checkpointer(
            folder, ResumeSignature(MUST_MATCH), one_rank(**accelerator), keep, self.messages.append
        )

    def learn(self, steps: int) -> None:
        for step in range(steps):
            self.model(torch.full((1, 4), 1.0 + step)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step: int, **fields: Any) -> TrainState:
        saved = TrainState(step=step, **fields)
        self.checkpoints.save(self.model, self.optimizer, saved)
        return saved

    def restore(
        self, named: str | None = None, must_match: dict[str, Any] | None = None
    ) -> TrainState | None:
        self.checkpoints.signature = ResumeSignature(must_match or MUST_MATCH)
        return self.checkpoints.restore(self.model, self.optimizer, named)

    def bits(self) -> dict[str, bytes]:
        """Bytes of every tensor of model and optimizer."""
        state = {**model_tensors(self.model), **optimizer_tensors(self.model, self.optimizer)}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in state.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Restored values


def test_restored_run_is_bit_identical_and_continues_identically(tmp_path: Path) -> None:
    first = Run(tmp_path, seed=1)
    first.learn(3)
    with torch.no_grad():
        first.model.inner.bias[:3] = torch.tensor(
            [-0.0, 1e-45, 1 / 3]
        )  # negative zero, a denormal, a recurring fraction
    exact = {
        "rows": 2**53 - 1,
        "best_score": 0.1 + 0.2,
        "best_step": 2,
        "unlogged_steps": [[1 / 3, 8.0], [5e-324, 1e-300]],
        "tokens": 7,
    }
    saved = first.save(3, evaluations_since_best=1, **exact)
    second = Run(tmp_path, seed=2)
    assert second.bits() != first.bits()
    assert second.restore() == saved
    assert second.bits() == first.bits()
    assert "seen" in second.bits() and "inner.weight|exp_avg_sq" in second.bits()
    assert second.messages == [f"Resuming from {tmp_path / 'step_000003'} (step 3)."]
    first.learn(2), second.learn(2)
    assert second.bits() == first.bits()


def test_without_optimizer_state_a_run_continues_differently(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.learn(3)
    first.save(3)
    second.restore()
    second.optimizer.state.clear()  # negative control of the test above
    first.learn(1), second.learn(1)
    assert second.bits()["inner.weight"] != first.bits()["inner.weight"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, None, -0.25])
def test_any_score_survives(score: float | None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, best_score=score, finished=True)
    found = run.restore()
    assert found is not None and found.finished
    assert found.best_score == score or (
        isinstance(score, float) and math.isnan(score) and math.isnan(found.best_score or 0)
    )


def test_restore_copies_into_existing_weights(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    pointers = {name: weight.data_ptr() for name, weight in run.model.named_parameters()}
    held = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
    run.restore()
    assert {name: weight.data_ptr() for name, weight in run.model.named_parameters()} == pointers
    assert {id(weight) for weight in run.model.parameters()} == held
    assert run.model.outer.weight is run.model.inner.weight


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    assert sorted(model_tensors(Net(0))) == ["inner.bias", "inner.weight", "outer.bias", "seen"]


def test_restore_returns_none_without_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path / "not there")
    before = run.bits()
    assert run.restore() == TrainState()
    assert (run.bits(), run.messages) == (before, [])


class Meter:
    """Replaces ThroughputMeter: two ranks with the same loss, and one token per step."""

    def gather(self, losses: Tensor, accelerator: Any) -> list[tuple[float, float]]:
        return [(2 * loss, 1.0) for loss in losses.tolist()]


def test_losses_are_filled_in_when_they_are_gathered() -> None:
    state, meter = TrainState(), Meter()
    state.advance(RankStep(number=0, micro_batches=[], rows=8), torch.tensor(4.0))
    state.advance(
        RankStep(number=1, micro_batches=[], rows=3, next_reader_state={"window": {"epoch": 1}}),
        torch.tensor(1),
    )
    expected = {
        **asdict(TrainState()),
        "step": 2,
        "rows": 11,
        "unlogged_steps": [[0.0, 8.0], [0.0, 3.0]],
        "reader_state": {"window": {"epoch": 1}},
    }
    assert asdict(state) == expected
    assert (state.epochs(4), state.epochs(0), TrainState().epochs(0)) == (0.5, 1.0, 0.0)
    for _ in range(2):  # the second time there is nothing to gather
        state.gather_losses(meter, Any)  # type: ignore[arg-type]
        expected |= {"unlogged_steps": [[8.0, 8.0], [2.0, 3.0]], "tokens": 2}
        assert asdict(state) == expected
    state.advance(RankStep(number=2, micro_batches=[], rows=5), torch.tensor(math.nan))
    state.gather_losses(meter, Any)  # type: ignore[arg-type]
    assert state.unlogged_steps == [[8.0, 8.0], [2.0, 3.0], [0.0, 0.0]], "a step that was left out"
    assert state.pop_mean_loss() == 10 / 11 and state.unlogged_steps == []
    assert math.isnan(state.pop_mean_loss())


def test_reader_state_is_restored(tmp_path: Path) -> None:
    reader = {
        "window": {
            "epoch": 1,
            "window": 3,
            "rows": 48,
            "cursors": [{"pass": 1, "file": 2, "place": {"at": 7}, "skip": 4}],
        },
        "step": 2,
    }
    run = Run(tmp_path)
    run.save(1, reader_state=reader)
    found = run.restore()
    assert (
        found is not None
        and found.reader_state == reader
        and found.epochs(0) == 1.0
        and found.epochs(4) == 0.25
    )
    assert (
        TrainState(reader_state={"over": {"epoch": 2}}).epochs(0) == 2.0
        and TrainState().epochs(0) == 0.0
    )
    state = json.loads((tmp_path / "step_000001" / "state.json").read_text())
    assert reader_state_of_rank(tmp_path, {**state, "ranks": 4}, 3, 4) == reader, (
        "one entry is for all ranks"
    )
    assert reader_state_of_rank(tmp_path, {**state, "ranks": 4}, 0, 2) == reader


def test_by_file_each_rank_continues_in_its_own_files() -> None:
    readers = [{"window": {"epoch": 0}, "step": rank} for rank in range(3)]
    state = {"must_match": {"stream_sharding": "by_file"}, "ranks": 3, "reader_states": readers}
    assert [reader_state_of_rank(Path("step"), state, rank, 3) for rank in range(3)] == readers
    with pytest.raises(
        CheckpointError, match="each in the middle of its own files, but this run has 2"
    ):
        reader_state_of_rank(Path("step"), state, 0, 2)
    some_ended = {**state, "reader_states": [{"over": {"epoch": 1}}, *readers[1:]]}
    with pytest.raises(CheckpointError, match="was written by 3 processes"):
        reader_state_of_rank(Path("step"), some_ended, 0, 2)
    all_ended = {**state, "reader_states": [{"over": {"epoch": 1}}]}
    assert [reader_state_of_rank(Path("step"), all_ended, rank, 5) for rank in range(5)] == [
        {"over": {"epoch": 1}}
    ] * 5


def test_by_file_on_other_ranks_is_logged_or_refused(tmp_path: Path) -> None:
    run, files = Run(tmp_path), {"stream_sharding": "by_file"}
    for reader in ({"over": {"epoch": 1}}, {"window": {"epoch": 0}, "step": 1}):
        run.checkpoints.signature = ResumeSignature(files)
        run.save(1, reader_state=reader)
        with_state(tmp_path / "step_000001", lambda state: state.update(ranks=3))
        if "over" in reader:
            assert run.restore(must_match=files) == TrainState(step=1, reader_state=reader)
            assert "the same rows per epoch, in other steps" in run.messages[-1]
    with pytest.raises(CheckpointError, match="was written by 3 processes"):
        run.restore(must_match=files)


def test_by_file_the_steps_of_other_ranks_are_explained(tmp_path: Path) -> None:
    run, settings = Run(tmp_path), {"stream_sharding": "by_file", "total_steps": 21}
    run.checkpoints.signature = ResumeSignature(settings)
    run.save(7, reader_state={"over": {"epoch": 1}})
    with pytest.raises(CheckpointError, match=r"length\n.*or another --output_dir\.$"):
        run.restore(must_match={**settings, "total_steps": 15})  # the control
    with_state(tmp_path / "step_000007", lambda state: state.update(ranks=4))
    with pytest.raises(
        CheckpointError,
        match=r"or another --output_dir\. With --stream_sharding by_file, 4 processes make 21 steps "
        r"of these epochs, and 1 make 15: --max_train_steps 21 keeps the length\.$",
    ):
        run.restore(must_match={**settings, "total_steps": 15})
    assert run.restore(must_match=settings) is not None


def test_grad_scaler_is_restored(tmp_path: Path) -> None:
    class Scaler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.scale = state["scale"]

    Run(tmp_path, scaler=Scaler(1024.0)).save(1)
    fresh = Scaler(65536.0)
    Run(tmp_path, scaler=fresh).restore()
    assert fresh.scale == 1024.0
    Run(tmp_path).restore()  # and a run without a scaler ignores it


def test_another_number_of_ranks_is_logged(tmp_path: Path) -> None:
    Run(tmp_path, num_processes=1).save(1)
    with_state(tmp_path / "step_000001", lambda state: state.update(ranks=3))
    run = Run(tmp_path)
    assert run.restore() == TrainState(step=1)
    assert run.messages[1].startswith(
        "Written by 3 processes, resumed by 1: the same rows per step; sums"
    )


# ---- Which checkpoint is loaded


@pytest.mark.parametrize(
    ("keep", "left"), [(2, [1000000, 1000001]), (3, [999999, 1000000, 1000001])]
)
def test_the_newest_checkpoints_are_kept_by_number(
    keep: int, left: list[int], tmp_path: Path
) -> None:
    run = Run(tmp_path, keep=keep)
    for step in (9, 10, 999999, 1000000, 1000001):  # as strings 1000000 sorts before 999999
        run.save(step)
    assert names(tmp_path) == sorted(f"step_{step:06d}" for step in left)
    assert run.restore() == TrainState(step=1000001)


@pytest.mark.parametrize("keep", [2, 3, 4, 5, 7])
def test_number_of_checkpoints_never_exceeds_the_limit(keep: int, tmp_path: Path) -> None:
    run = Run(tmp_path, keep=keep)
    for step in range(1, 10):
        run.save(step)
        assert names(tmp_path) == [
            f"step_{kept:06d}" for kept in range(max(1, step - keep + 1), step + 1)
        ]


def test_an_old_checkpoint_that_cannot_be_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An OSError would end rank 0 alone, and the other ranks would wait for it.
    run = Run(tmp_path)
    run.save(1), run.save(2)
    real = Path.unlink

    def refuse(path: Path, *rest: Any, **settings: Any) -> None:
        if path.parent.name == ".step_000001.old":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *rest, **settings)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match="step_000001"):
        run.save(3)
    assert find_damage(tmp_path / "step_000003") is None  # the new one is complete


def test_new_checkpoint_is_not_deleted_as_the_oldest(tmp_path: Path) -> None:
    # Resuming from an older one with --resume_from_checkpoint leaves newer folders.
    run = Run(tmp_path, keep=3)
    for step in (2, 4, 6):
        run.save(step)
    run = Run(tmp_path, keep=2)
    assert run.restore(str(tmp_path / "step_000002")) == TrainState(step=2)
    run.save(3)
    assert "step_000003" in names(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1, rows=1)
    run.save(1, rows=2)
    assert run.restore() == TrainState(step=1, rows=2)
    assert names(tmp_path) == ["step_000001"]


def test_named_checkpoint_is_loaded_instead_of_a_newer_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1), run.save(2)
    assert run.restore(str(tmp_path / "step_000001")) == TrainState(step=1)
    assert run.restore() == TrainState(step=2)


def test_a_checkpoint_of_another_run_does_not_go_on_in_the_folder_of_a_run(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    run, other = Run(a / "checkpoints"), Run(b / "checkpoints")
    run.save(1), run.save(2)
    settings = {**MUST_MATCH, "seed": 2}
    other.checkpoints.signature = ResumeSignature(settings)
    other.save(1)
    named = str(b / "checkpoints" / "step_000001")
    error = f"{named} is of another run than that of {a}, whose log and best weights would be repl"
    with pytest.raises(CheckpointError, match=error):
        run.restore(named, settings)
    assert names(a / "checkpoints") == ["step_000001", "step_000002"]
    assert Run(tmp_path / "new" / "checkpoints").restore(named, settings) == TrainState(step=1)
    # A copy of the run is the same run.
    copy = shutil.copytree(a, tmp_path / "copy") / "checkpoints" / "step_000001"
    assert run.restore(str(copy)) == TrainState(step=1)
    assert run.checkpoints.source == a / "checkpoints" / "step_000001"
    moved = copy.rename(tmp_path / "backup")  # whatever its name
    run.restore(str(moved))
    assert run.checkpoints.source == a / "checkpoints" / "step_000001"
    # The controls: a damaged one, or one of the same step and other bytes, is not taken for it.
    weights = a / "checkpoints" / "step_000001" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run.restore(str(moved))
    assert run.checkpoints.source == moved
    weights.write_bytes(whole)
    third = Run(tmp_path / "third" / "checkpoints")
    third.save(1)
    manifest = third.checkpoints.folder / "step_000001" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    run.restore(str(manifest.parent))
    assert run.checkpoints.source == manifest.parent
    # The same command again, after its run was killed before its first checkpoint.
    shutil.rmtree(a / "checkpoints")
    (a / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match=error):
        run.restore(named, settings)
    (a / "config.yaml").write_text(f"resume_from_checkpoint: {named}\n")
    assert run.restore(named, settings) == TrainState(step=1)


def test_a_named_checkpoint_that_is_damaged_or_absent_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1), run.save(2)
    (tmp_path / "step_000002" / "state.json").unlink()
    for name, damage in (
        ("step_000002", "state.json is missing"),
        ("step_000007", "there is no such folder"),
    ):
        path = tmp_path / name
        with pytest.raises(CheckpointError) as caught:
            run.restore(str(path))
        assert str(caught.value) == f"--resume_from_checkpoint {path}: {damage}."
    assert names(tmp_path) == [
        "step_000001",
        "step_000002",
    ]  # a checkpoint named by the user is not renamed


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_link(path: Path) -> None:
    """To the same bytes in another folder."""
    path.symlink_to(path.rename(path.parents[2] / f"{path.parents[1].name} {path.name}"))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "{} has"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "{} has"),
    "emptied": (lambda path: path.write_bytes(b""), "{} has 0 bytes instead of"),
    "one bit flipped": (flip, "{} is not what was written (its digest differs)"),
    "zeroed": (
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "{} is not what was written",
    ),
    "deleted": (Path.unlink, "{} is missing"),
    "made a folder": (lambda path: (path.unlink(), path.mkdir()), "{} is missing"),
    "made a link": (lambda path: make_link(path), "{} is a symbolic link"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_its_checkpoint_moved_aside(
    damage: str, file: str, tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    run = Run(tmp_path)
    run.save(1)
    before = run.bits()
    run.learn(1)
    run.save(2)
    change(tmp_path / "step_000002" / file)
    run.learn(1)
    assert run.restore() == TrainState(step=1)
    assert run.bits() == before
    assert run.messages[0].startswith(
        f"Skipping damaged checkpoint {tmp_path / 'step_000002'}: {message.format(file)}"
    )
    assert run.messages[0].endswith(". Renamed to step_000002.damaged.")
    assert names(tmp_path) == ["step_000001", "step_000002.damaged"]
    run.save(2)
    assert run.restore() == TrainState(step=2)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.json is missing"),
        (b"", "manifest.json cannot be read"),
        (b'{"format": 1, "files": {"mod', "manifest.json cannot be read"),
        (b"[]", "manifest.json cannot be read"),
        (b"3", "manifest.json cannot be read"),
        (b"{}", "manifest.json cannot be read"),
        (b'{"files": 3}', "manifest.json cannot be read"),
        (b'{"files": ["model.safetensors"]}', "manifest.json cannot be read"),
        (b'{"files": {"model.safetensors": 3}}', "manifest.json cannot be read"),
        (
            b'{"files": {"model.safetensors": {"bytes": null, "xxh3_128": ""}}}',
            "manifest.json cannot be read",
        ),
        (b"\xff\xfe", "manifest.json cannot be read"),
        pytest.param(b"[" * 5000, "manifest.json cannot be read", id="deep"),
        (b'{"files": {}}', "manifest.json does not name model.safetensors"),
        (
            b'{"files": {"../step_000001/model.safetensors": {"bytes": 1, "xxh3_128": ""}}}',
            "manifest.json names '../step_000001/model.safetensors', which is not in this folder",
        ),
        (
            b'{"files": {"/etc/passwd": {"bytes": 1, "xxh3_128": ""}}}',
            "manifest.json names '/etc/passwd', which is not in this folder",
        ),
    ],
)
def test_broken_manifest_is_named_and_skipped(
    manifest: bytes | None, message: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.save(1), run.save(2)
    path = tmp_path / "step_000002" / "manifest.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)
    assert run.restore() == TrainState(step=1)
    assert (
        run.messages[0] == f"Skipping damaged checkpoint {tmp_path / 'step_000002'}: {message}. "
        "Renamed to step_000002.damaged."
    )


def test_every_digest_of_the_manifest_is_checked(tmp_path: Path) -> None:
    Run(tmp_path).save(1)
    assert find_damage(tmp_path / "step_000001") is None
    path = tmp_path / "step_000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert sorted(manifest["files"]) == FILES
    for name in FILES:
        broken = json.loads(json.dumps(manifest))
        broken["files"][name]["xxh3_128"] = "0" * 32
        path.write_text(json.dumps(broken))
        assert find_damage(path.parent) == f"{name} is not what was written (its digest differs)"


def test_repeated_damage_gets_numbered_names(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(3):
        run.save(1)
        flip(tmp_path / "step_000001" / "model.safetensors")
        assert run.restore() == TrainState()
    assert names(tmp_path) == [
        "step_000001.damaged",
        "step_000001.damaged-2",
        "step_000001.damaged-3",
    ]


def test_partial_checkpoint_is_removed_with_a_message(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    (tmp_path / ".step_000002.partial").mkdir()
    (tmp_path / ".step_000002.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()  # not ours
    assert run.restore() == TrainState(step=1)
    assert (
        run.messages[0] == "Removing .step_000002.partial: writing this checkpoint was interrupted."
    )
    assert names(tmp_path) == ["notes", "step_000001"]


def test_other_settings_are_refused_in_a_table(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    before = run.bits()
    run.learn(1)
    learned = run.bits()
    with pytest.raises(CheckpointError) as caught:
        run.restore(
            must_match={"learning_rate": 1e-5, "labels": ["b", "a"], "dropout": None, "seed": 3}
        )
    assert str(caught.value) == (
        f"{tmp_path / 'step_000001'} belongs to a run with other settings:\n"
        "  setting        before      now         effect\n"
        "  learning_rate  5e-05       1e-05       the steps done so far used another value\n"
        "  labels         ['a', 'b']  ['b', 'a']  the model's outputs stand for other labels\n"
        "  seed           None        3           another row order and dropout: "
        "rows of this epoch are repeated or missed\n"
        "Use the old settings, or another --output_dir."
    )
    assert run.bits() == learned != before  # nothing was loaded


def test_another_model_is_refused_and_the_weight_is_named(tmp_path: Path) -> None:
    Run(tmp_path).save(1)
    with pytest.raises(
        CheckpointError,
        match=r"step_000001 is of another model: inner\.bias differs \(3 in all\)\.$",
    ):
        Run(tmp_path, size=5).restore()
    with pytest.raises(
        CheckpointError, match=r"is of another model: extra differs \(1 in all\)\.$"
    ):
        load_tensors(
            {"a": torch.zeros(1)}, {"a": torch.zeros(1), "extra": torch.zeros(1)}, tmp_path
        )


def test_stream_with_changed_data_restarts_its_epoch() -> None:
    cursors = [{"pass": 2, "file": 1}]
    within = {"window": {"epoch": 2, "window": 5, "rows": 70, "cursors": cursors}, "step": 3}
    between = {"over": {"epoch": 3, "window": 0, "rows": 0, "cursors": []}}
    changed = [Change("training_rows", "a", "b", "")]
    start = {"epoch": 2, "window": 0, "rows": 0, "cursors": []}

    def after(reader: Any, changes: list[Change]) -> Any:
        return apply_changes(TrainState(step=9, reader_state=reader), changes, 99).reader_state

    assert after(within, changed) == {"window": start, "step": 0}
    assert after(between, changed) == between
    assert after(within, []) is within
    assert after(None, changed) is None


PATIENCE, METRIC = "early_stopping_patience", "metric_for_best_model"


@pytest.mark.parametrize(
    ("step", "changes", "finished", "count"),
    [
        (6, {}, True, 2),
        (6, {PATIENCE: (2, 3)}, False, 2),  # stopped by a patience of 2, of 9 steps
        (6, {PATIENCE: (2, None)}, False, 2),
        (6, {PATIENCE: (2, 1)}, True, 2),
        (6, {PATIENCE: (3, 2)}, True, 2),
        (6, {METRIC: ("f1", "loss")}, False, 0),
        (6, {METRIC: ("f1", "loss"), PATIENCE: (2, 1)}, False, 0),
        (6, {"validation_rows": ("a", "b")}, False, 0),
        (6, {"eval_every": ("1 epoch", "2 steps")}, True, 2),
        (6, {"total_steps": (6, 9)}, False, 2),
        (6, {"total_steps": (8, 9)}, True, 2),
        (9, {PATIENCE: (2, 3), METRIC: ("f1", "loss")}, True, 2),  # all steps are done
    ],
)
def test_a_finished_run_goes_on_where_a_change_gives_it_something_to_do(
    step: int, changes: dict[str, Any], finished: bool, count: int
) -> None:
    state = TrainState(step=step, finished=True, best_score=0.5, evaluations_since_best=2)
    accepted = [Change(name, *values, "") for name, values in changes.items()]
    after = apply_changes(state, accepted, 9)
    assert (after.finished, after.evaluations_since_best) == (finished, count)
    assert after.best_score == (None if count == 0 else 0.5)


# ---- Format


def with_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite state.json of a checkpoint, with a manifest that matches."""

    def changed(content: bytes) -> bytes:
        state = json.loads(content)
        change(state)
        return json.dumps(state).encode()

    with_file(folder, "state.json", changed)


def with_file(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Replace a file of a checkpoint, with a manifest that matches."""
    files = {each: (folder / each).read_bytes() for each in FILES}
    files[name] = change(files[name])
    write_folder(folder, lambda new: [(new / each).write_bytes(files[each]) for each in files])


def test_format_and_version_are_recorded(tmp_path: Path) -> None:
    Run(tmp_path).save(1)
    state = json.loads((tmp_path / "step_000001" / "state.json").read_text())
    assert (state["format"], state["version"]) == (FORMAT, bertdist.__version__) == (2, ANY)
    assert TrainState(**state["train_state"]) == TrainState(step=1)


@pytest.mark.parametrize(
    ("change", "writer"),
    [
        (lambda state: [state.pop(name) for name in ("format", "version")], "0.1.0 or earlier"),
        (lambda state: state.update(format=3, version="9.1"), "9.1"),
    ],
)
def test_other_formats_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], writer: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.save(1)
    folder, before = tmp_path / "step_000001", run.bits()
    with_state(folder, change)
    run.learn(1)
    learned = run.bits()
    with pytest.raises(CheckpointError) as caught:
        run.restore()
    number = 3 if writer == "9.1" else 1
    assert str(caught.value) == (
        f"{folder} was written by bertdist {writer} (checkpoint format {number}), this is "
        f"{bertdist.__version__} (format 2). Finish the run with that version, or start a new "
        "--output_dir."
    )
    assert run.bits() == learned != before and names(tmp_path) == ["step_000001"], "untouched"
    with_state(folder, lambda state: state.update(format=2))  # negative control
    assert run.restore() == TrainState(step=1) and run.bits() == before


def test_checkpoint_of_version_0_1_0_is_refused(tmp_path: Path) -> None:
    """state.json as that version wrote it: no format, other keys."""
    run = Run(tmp_path)
    run.save(1)
    old = {
        "progress": {"step": 1, "rows": 8, "owed": False, "window": [], "place": None},
        "identity": MUST_MATCH,
        "besides": {},
        "scaler": None,
        "ranks": 1,
        "places": [None],
    }
    with_state(tmp_path / "step_000001", lambda state: (state.clear(), state.update(old)))
    with pytest.raises(CheckpointError, match=r"was written by bertdist 0\.1\.0 or earlier"):
        run.restore()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["train_state"].update(step="1"), "step is '1'"),
        (lambda state: state["train_state"].update(step=-1), "step is -1"),
        (lambda state: state["train_state"].update(unlogged_steps=[[1.0]]), "unlogged_steps is"),
        (lambda state: state["train_state"].update(best_score="high"), "best_score is 'high'"),
        (lambda state: state.update(ranks="2"), "an entry is missing or has another type"),
        (lambda state: state.update(reader_states=[]), "an entry is missing or has another type"),
        (lambda state: state.update(reader_states=[{"row": 1}]), "reader_states is"),
        (lambda state: state.pop("must_match"), "'must_match'"),
        (lambda state: state.update(train_state=[]), "is damaged"),
    ],
)
def test_damaged_state_with_a_valid_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.save(1)
    with_state(tmp_path / "step_000001", change)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        run.restore()
    assert message in str(caught.value)


# ---- Hostile safetensors, with a manifest that matches


def safetensors_of(
    header: dict[str, Any] | bytes, data: bytes, claimed: int | None = None
) -> bytes:
    """claimed: the size of the header that the file says."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if claimed is None else claimed
    return size.to_bytes(8, "little") + content + data


def header_and_data(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def changed_entry(name: str, **changes: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda header, data: safetensors_of({**header, name: {**header[name], **changes}}, data)


def renamed(old: str, new: str) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda header, data: safetensors_of(
        {new if name == old else name: entry for name, entry in header.items()}, data
    )


WEIGHT, MOMENT = "inner.weight", "inner.weight|exp_avg"
HOSTILE: list[tuple[str, Any, str]] = [
    (
        "model",
        lambda header, data: safetensors_of(header, data, claimed=10 << 30),
        "its header would have 10,737,418,240 bytes, and the file has ",
    ),
    (
        "model",
        lambda header, data: safetensors_of(header, data, claimed=1 << 63),
        "would have 9,223",
    ),
    ("model", lambda header, data: safetensors_of(header, data, claimed=0), "it has no header"),
    ("model", lambda header, data: b"", "it has no header"),
    (
        "model",
        lambda header, data: safetensors_of(json.dumps(header).encode() + b" " * (17 << 20), data),
        "its header would have 17,8",
    ),
    (
        "model",
        lambda header, data: safetensors_of(
            json.dumps(header)[:-1].encode()
            + b', "inner.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            data,
        ),
        "Cannot read ",
    ),
    ("model", changed_entry(WEIGHT, data_offsets=[0, 64]), "Cannot read "),
    ("model", changed_entry(WEIGHT, data_offsets=[0, 10 << 30]), "Cannot read "),
    ("model", changed_entry(WEIGHT, shape=[1 << 40, 1 << 40]), "Cannot read "),
    ("model", changed_entry(WEIGHT, shape=[16]), "inner.weight differs"),
    ("model", changed_entry(WEIGHT, dtype="I32"), "inner.weight differs"),
    ("model", lambda header, data: safetensors_of(b"[" * 5000, data), "Cannot read "),
    ("optimizer", changed_entry(MOMENT, dtype="I32"), "'inner.weight|exp_avg' of shape (4, 4) and"),
    ("optimizer", changed_entry(MOMENT, shape=[16]), "'inner.weight|exp_avg' of shape (16,)"),
    (
        "optimizer",
        changed_entry("inner.weight|step", dtype="I32"),
        "'inner.weight|step' of shape ()",
    ),
    ("optimizer", renamed(MOMENT, "inner.weight|other"), "its optimizer holds 'inner.weight|"),
    ("optimizer", renamed(MOMENT, "exp_avg"), "its optimizer holds "),
]


@pytest.mark.parametrize(("file", "change", "message"), HOSTILE)
def test_hostile_weights_with_a_valid_manifest_are_one_line(
    file: str, change: Callable[[dict[str, Any], bytes], bytes], message: str, tmp_path: Path
) -> None:
    run, folder = Run(tmp_path), tmp_path / "step_000001"
    run.learn(1)
    run.save(1)
    before = run.bits()
    with_file(folder, f"{file}.safetensors", lambda content: content)
    assert run.restore() == TrainState(step=1) and run.bits() == before, "the control"
    with_file(folder, f"{file}.safetensors", lambda content: change(*header_and_data(content)))
    assert find_damage(folder) is None
    with limited_memory(1 << 30), pytest.raises(CheckpointError) as caught:
        run.restore()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_of_10_gb_is_not_read(tmp_path: Path) -> None:
    """A file with a hole, as large as it says."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((10 << 30).to_bytes(8, "little"))
    os.truncate(path, (10 << 30) + 8)
    with limited_memory(1 << 30):
        with pytest.raises(CheckpointError, match="its header would have 10,737,418,240 bytes"):
            read_tensors(path)
        with pytest.raises(MemoryError):  # the control
            load_file(path)


# ---- No pickle


def is_pickle(data: bytes) -> bool:
    """Whether pickle or torch.load would read these bytes."""
    if data[:4] == b"PK\x03\x04":
        return True
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(data))
    except Exception:  # genops raises a dozen kinds
        return False


def test_nothing_that_is_written_is_a_pickle(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.learn(1)
    run.save(1, best_score=0.5, unlogged_steps=[[1.0, 2.0]])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["manifest.json", *FILES]
    assert [path.name for path in files if is_pickle(path.read_bytes())] == []
    held = io.BytesIO()
    torch.save({"a": 1}, held)  # negative controls
    assert (
        is_pickle(held.getvalue())
        and is_pickle(pickle.dumps({"a": 1}))
        and is_pickle(pickle.dumps({"a": 1}, protocol=0))
    )


def test_restoring_reads_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.learn(1)
    run.save(1)
    (tmp_path / "step_000001" / "custom_checkpoint_0.pkl").write_bytes(
        b"cos\nsystem\n(S'false'\ntR."
    )  # what accelerate would run

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in (
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, refuse)
    assert run.restore() == TrainState(step=1)
    with pytest.raises(AssertionError, match="a pickle"):
        torch.load(tmp_path)  # negative control


# ---- Complete or absent


def fill_with(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(text)

    return fill


@contextmanager
def recorded(
    monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None, error: BaseException | None = None
) -> Iterator[list[Any]]:
    """Flushes and renames in order; raises `error` before number `stop_at`."""
    done: list[Any] = []

    def count(entry: Any) -> None:
        done.append(entry)
        if error is not None and len(done) - 1 == stop_at:
            raise error

    def fsync(handle: int) -> None:
        count(("flush", os.fstat(handle).st_ino))
        real["fsync"](handle)

    def rename(old: Any, new: Any) -> None:
        count(("rename", Path(old).name, Path(new).name))
        real["rename"](old, new)

    real = {"fsync": os.fsync, "rename": os.rename}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        yield done


def test_manifest_is_last_and_everything_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest_when_filled = []
    final = tmp_path / "final"

    def fill(folder: Path) -> None:
        fill_with("x")(folder)
        manifest_when_filled.append((folder / "manifest.json").exists())

    with recorded(monkeypatch) as done:
        write_folder(final, fill)
    number = {
        path.stat().st_ino: path.relative_to(tmp_path).as_posix()
        for path in (tmp_path, *tmp_path.rglob("*"))
    }
    order = [number[entry[1]] if entry[0] == "flush" else entry for entry in done]
    assert order == [
        "final/a",
        "final/deep/b",
        "final/manifest.json",
        "final",
        ("rename", ".final.partial", "final"),
        ".",
    ]
    assert manifest_when_filled == [False]
    assert sorted(json.loads((final / "manifest.json").read_text())["files"]) == ["a", "deep/b"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")]
)
def test_failed_write_leaves_the_old_folder(error: OSError, tmp_path: Path) -> None:
    final = tmp_path / "final"
    write_folder(final, fill_with("old"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(CheckpointError) as caught:
        write_folder(final, fail)
    assert (
        str(caught.value)
        == f"Cannot write {final}: {error.strerror}. What was there before is untouched."
    )
    assert (final / "a").read_text() == (final / "deep" / "b").read_text() == "old"
    write_folder(final, fill_with("new"))  # and nothing is in the way of the next one
    assert (final / "a").read_text() == "new"
    assert names(tmp_path) == ["final"]


def test_folder_that_cannot_be_created_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=r"^Cannot write .*file/final: Not a directory\. What was there"
    ):
        write_folder(tmp_path / "file" / "final", fill_with("x"))


@contextmanager
def small_disk(max_bytes: int) -> Iterator[None]:
    """No file may grow beyond max_bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_a_checkpoint_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, size=32)
    run.save(1)
    with small_disk(1000), pytest.raises(CheckpointError, match=r"^Cannot write .*step_000002: "):
        run.save(2)
    assert run.restore() == TrainState(step=1)


@pytest.mark.parametrize("which", range(2))
def test_a_rename_that_fails_leaves_the_old_folder(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final"
    write_folder(final, fill_with("old"))
    with recorded(monkeypatch) as done:
        write_folder(tmp_path / "other", fill_with("x"))
    flushes = sum(entry[0] == "flush" for entry in done) - 1  # all but the parent's
    error = OSError(5, "Input/output error")
    with (
        recorded(monkeypatch, flushes + which, error),
        pytest.raises(CheckpointError, match=r"What was there before is untouched\.$"),
    ):
        write_folder(final, fill_with("new"))
    assert (final / "a").read_text() == "old"


class Killed(BaseException):
    """Stands for SIGKILL: not caught anywhere, nothing is cleaned up."""


def test_run_killed_while_saving_resumes_from_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(monkeypatch) as done:
        Run(tmp_path / "measured").save(1)
    assert len(done) == 7  # five files and folders flushed, a rename, the parent flushed
    steps = set()
    for moment in range(len(done) + 1):
        folder = tmp_path / str(moment)
        run = Run(folder)
        run.save(1)
        bits = {1: run.bits()}
        run.learn(1)
        bits[2] = run.bits()
        with recorded(monkeypatch, moment, Killed()):
            if moment < len(done):
                with pytest.raises(Killed):
                    run.save(2)
            else:
                run.save(2)
        again = Run(folder, seed=5)
        found = again.restore()
        assert found is not None
        assert again.bits() == bits[found.step]
        assert all(find_damage(path) is None for path in folder.glob("step_*"))
        assert not list(folder.glob(".step_*"))
        steps.add((moment, found.step))
    # Before the rename the old checkpoint, after it the new one.
    assert steps == {(moment, 1 if moment <= 5 else 2) for moment in range(8)}


def test_an_optimizer_tensor_is_named_after_its_weight(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert optimizer_tensors(run.model, run.optimizer) == {}
    run.learn(2)
    found = optimizer_tensors(run.model, run.optimizer)
    assert sorted(found)[:3] == ["inner.bias|exp_avg", "inner.bias|exp_avg_sq", "inner.bias|step"]
    assert found["inner.bias|step"].item() == 2
