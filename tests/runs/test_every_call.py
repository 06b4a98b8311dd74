"""A crash or a disk error at every system call of one step's writes leaves complete files.

A step writes log lines, best/, predictions, a checkpoint and the status. strace counts its system
calls, then lets the K-th call of a kind fail, or kills the process before it, for every kind and K.
That includes what safetensors does in Rust. Each trial is a forked child; skipped where strace is
missing or may not trace.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows import some_of
from torch import Tensor, nn

from bertdist.core.atomic_io import atomic_write, find_damage, recover, write_folder
from bertdist.core.config import OptimConfig
from bertdist.core.errors import BertdistError
from bertdist.training.checkpoint import Checkpointer, TrainState, model_tensors, optimizer_tensors
from bertdist.training.optimizer import create_optimizer
from bertdist.training.resume_check import ResumeSignature
from bertdist.training.run_logger import RunLogger

ONE: Any = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, scaler=None)
SIGNATURE = ResumeSignature({"seed": 1})
REFUSED, ODD = 3, 4
CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,mkdir,mkdirat,rename,renameat,renameat2,fsync,"
    "fdatasync,ftruncate,fallocate"
)
CHANGING = [
    *CALLS.split(","),
    "unlink",
    "unlinkat",
    "rmdir",
    "close",
    "newfstatat",
    "lseek",
    "mmap",
    "getdents64",
    "fstat",
    "copy_file_range",
]


class Net(nn.Module):
    """Small, and more than one buffer of a file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(60, 60)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class Run:
    """What a run writes at one step, and what it finds when it is started again."""

    def __init__(self, out: Path) -> None:
        self.out, self.said = out, list[str]()
        self.model = Net()
        self.optimizer = create_optimizer(self.model, OptimConfig(learning_rate=0.1))
        self.log = RunLogger(out, enabled=True)
        self.checkpoints = Checkpointer(
            out / "checkpoints",
            SIGNATURE,
            ONE,
            2,
            lambda *lines: self.said.extend(lines),
            lambda: self.log.flush(),
        )

    def write(self, step: int) -> None:
        self.log.write("train", step, loss=step / 3, note="x" * 9000)  # longer than a buffer
        write_folder(
            self.out / "best",
            lambda folder: (folder / "model.safetensors").write_bytes(bytes([step]) * 70_000),
        )
        atomic_write(
            self.out / "predictions.jsonl",
            json.dumps({"row": step, "text": "y" * 70_000}).encode() + b"\n",
        )
        self.checkpoints.save(self.model, self.optimizer, TrainState(step=step))
        self.log.status("running", step)

    def learn(self) -> None:
        self.model(torch.ones(1, 60)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bits(self) -> dict[str, bytes]:
        state = {**model_tensors(self.model), **optimizer_tensors(self.model, self.optimizer)}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in state.items()}


def may_be_traced() -> None:
    """By a process that is not a parent, where the system lets that be said (Yama)."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))


def traced(out: Path, run: Run, words: list[str]) -> int:
    """Exit status (-9: killed) of a child that writes step 4 under strace with these options."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = ODD
        try:
            may_be_traced()
            run.log = RunLogger(out, enabled=True)
            run.out, run.checkpoints.folder = out, out / "checkpoints"
            os.write(ready[1], b"r")
            os.read(go[0], 1)
            run.write(4)
            code = 0
        except BertdistError as error:
            code = (
                REFUSED
                if re.match(r"Cannot (read|write|remove or rename) .*\.$", str(error))
                else ODD
            )
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.read(ready[0], 1)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), *words], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.skip(f"strace may not look at a process here: {said.strip()}")
    os.write(go[1], b"g")
    status = os.waitpid(pid, 0)[1]
    tracer.communicate()
    for end in (*ready, *go):
        os.close(end)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def before(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[int, dict[str, bytes]], Run]:
    """A folder with steps 1 to 3 written (two kept), the bits of each step, and a run at step 4."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    out = tmp_path_factory.mktemp("every_call") / "out"
    run, bits = Run(out), {}
    for step in (1, 2, 3, 4):
        run.learn()
        bits[step] = run.bits()
        if step < 4:
            run.write(step)
    return out, bits, run


def calls_of(before: tuple[Path, Any, Run], tmp_path: Path) -> Counter[str]:
    """How often a step makes each call."""
    out = tmp_path / "counted"
    shutil.copytree(before[0], out)
    log = tmp_path / "calls"
    assert (
        traced(
            out,
            before[2],
            ["-o", str(log), "-e", f"trace={','.join(f'?{name}' for name in CHANGING)}"],
        )
        == 0
    )
    return Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))


def begin_again(out: Path, bits: dict[int, dict[str, bytes]]) -> int:
    """Start again in the folder: everything is whole. The step that it goes on from."""
    again = Run(out)
    recover(out / "best")
    found = again.checkpoints.restore(again.model, again.optimizer)
    assert found is not None and again.bits() == bits[found.step]
    removed = [line for line in again.said if line.startswith("Removing ")]
    assert len(removed) <= 1 and all(
        re.search(": (writing|deleting) this checkpoint was interrupted[.]$", line)
        for line in removed
    )
    assert not [line for line in again.said if "Skipping" in line], again.said
    assert all(find_damage(path) is None for path in (out / "checkpoints").iterdir()), (
        "nothing half-written is left"
    )
    again.log.begin(found.step, {})
    lines = (out / "metrics.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert lines.endswith(b"\n") and steps == list(range(1, found.step + 1)), (
        "never torn, never a repeated line"
    )
    assert json.loads((out / "status.json").read_text())["step"] in (3, 4)
    assert json.loads((out / "predictions.jsonl").read_text())["row"] in (3, 4)
    best = (out / "best" / "model.safetensors").read_bytes()
    assert best in (bytes([3]) * 70_000, bytes([4]) * 70_000)
    manifest = json.loads((out / "best" / "manifest.json").read_text())["files"]
    assert manifest["model.safetensors"]["bytes"] == 70_000
    again.learn()
    again.write(4)  # and the way is free
    assert not list(out.rglob(".*"))
    return found.step


def try_all(
    before: tuple[Path, Any, Run], tmp_path: Path, calls: dict[str, int], how: str, every: int = 1
) -> list[tuple[str, int, int, int]]:
    """(call, which, exit status, step gone on from) of each trial."""
    out, bits, run = before
    found = []
    for name, count in sorted(calls.items()):
        for which in range(1, count + 1, every):
            trial = tmp_path / "trial"
            shutil.copytree(out, trial)
            code = traced(
                trial,
                run,
                [
                    "-o",
                    "/dev/null",
                    "-e",
                    f"trace={name}",
                    "-e",
                    f"inject={name}:{how}:when={which}",
                ],
            )
            try:
                found.append((name, which, code, begin_again(trial, bits)))
            except BaseException as error:
                raise AssertionError(
                    f"{how} at {name} number {which}: exit status {code}: {error!r}"
                ) from error
            shutil.rmtree(trial)
    return found


def order_of_calls(before: tuple[Path, Any, Run], tmp_path: Path) -> list[str]:
    """The calls of one step: log lines written, files flushed, the rename of the checkpoint."""
    out, log = tmp_path / "ordered", tmp_path / "order.txt"
    shutil.copytree(before[0], out)
    # -y: the paths of file descriptors
    assert (
        traced(
            out,
            before[2],
            ["-y", "-o", str(log), "-e", "trace=write,fsync,?rename,?renameat,?renameat2"],
        )
        == 0
    )
    found = []
    for call in log.read_text().splitlines():
        if "metrics.jsonl" in call:
            found.append(f"{call.split()[1].split('(')[0]} metrics.jsonl")
        elif re.search(r"\brename\w*\(.*step_000004\"", call):
            found.append("rename step_000004")
    return found


def test_the_log_is_on_disk_before_its_checkpoint(
    before: tuple[Path, Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut can undo what was not flushed; one flush per checkpoint, none per line."""
    found = order_of_calls(before, tmp_path)
    assert found[-2:] == ["fsync metrics.jsonl", "rename step_000004"] and set(found[:-2]) == {
        "write metrics.jsonl"
    }, found
    monkeypatch.setattr(before[2].checkpoints, "before_save", lambda: None)
    found = order_of_calls(before, tmp_path / "control")
    assert found[-1] == "rename step_000004" and set(found[:-1]) == {"write metrics.jsonl"}, (
        "the control"
    )


EVERY = 1 if os.environ.get("BERTDIST_EVERY_FAULT") else 11  # 1: all calls, about a minute


def test_a_kill_at_any_call_leaves_complete_files(
    before: tuple[Path, Any, Run], tmp_path: Path
) -> None:
    found = try_all(before, tmp_path, dict(calls_of(before, tmp_path)), "signal=KILL", EVERY)
    assert all(code == -9 for *_, code, _ in found), found
    assert {step for *_, step in found} == {3, 4}, (
        "up to the rename of the checkpoint the old one, from there on the new one"
    )
    print(f"{len(found)} kills")


@pytest.mark.parametrize("error", some_of(["ENOSPC"], ["EROFS", "EIO"]))
def test_a_disk_error_at_any_call_is_one_line_and_leaves_complete_files(
    before: tuple[Path, Any, Run], tmp_path: Path, error: str
) -> None:
    calls = {
        name: count
        for name, count in calls_of(before, tmp_path).items()
        if name in CALLS.split(",")
    }
    found = try_all(before, tmp_path, calls, f"error={error}", EVERY)
    assert {code for *_, code, _ in found} <= {0, REFUSED}, [
        entry for entry in found if entry[2] not in (0, REFUSED)
    ]
    assert sum(code == REFUSED for *_, code, _ in found) > len(found) // 2
    print(f"{len(found)} failing calls, {sum(code == REFUSED for *_, code, _ in found)} told")


def test_a_checkpoint_written_in_place_would_be_damaged(
    before: tuple[Path, Any, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same kills, with folders and files that are written where they stand."""

    def in_place(final: Path, fill: Callable[[Path], Any], size: int = 0) -> None:
        final.mkdir(parents=True, exist_ok=True)
        fill(final)

    monkeypatch.setattr(sys.modules["bertdist.training.checkpoint"], "write_folder", in_place)
    monkeypatch.setattr(sys.modules[__name__], "write_folder", in_place)
    calls = {"write": calls_of(before, tmp_path)["write"]}
    with pytest.raises(AssertionError, match="signal=KILL at write"):
        try_all(before, tmp_path, calls, "signal=KILL", 2)
