"""torchrun and its ranks: what is left when one of them, or torchrun itself, is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rows import words_of, write_split

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 110


class Launched:
    """A run of two ranks under torchrun."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.out, self.error = folder / "out", folder / "error.txt"
        settings = {"num_train_epochs": 4000, "save_every": "50 steps", "rank_timeout": 60, "log_every": "50 steps"}
        words = words_of(model, self.out, write_split(folder, 40), **settings)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_", "RANK", "WORLD_SIZE"))}
        env = {**kept, "PYTHONPATH": str(ROOT), "HF_HOME": "/nonexistent", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bertdist.train", *words]
        with open(self.error, "w") as error:
            self.launcher = subprocess.Popen(command, env=env, stdout=error, stderr=error, cwd=folder, start_new_session=True)
        until(lambda: any((self.out / "checkpoints").glob("step_*")) or self.launcher.poll() is not None)
        assert self.launcher.poll() is None, self.error.read_text()
        self.ranks = psutil.Process(self.launcher.pid).children()
        assert len(self.ranks) == 2, self.error.read_text()

    def status(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.out / "status.json").read_text())
        return found


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Iterator[Launched]:
    run = Launched(tiny_model, tmp_path)
    yield run
    for process in [*run.ranks, psutil.Process(run.launcher.pid)] if run.launcher.poll() is None else run.ranks:
        if process.is_running():
            process.kill()
    run.launcher.wait()


def test_a_killed_rank_ends_the_other_with_one_message(run: Launched) -> None:
    run.ranks[1].kill()
    assert run.launcher.wait(SECONDS) == 1
    told = [line for line in run.error.read_text().splitlines() if line.startswith("bertdist: ")]
    assert len(told) == 1 and told[0].startswith(f"bertdist: rank 1 (process {run.ranks[1].pid} on "), told
    assert run.status()["state"] == "failed" and "rank 1 " in run.status()["reason"]


def test_without_their_launcher_ranks_save_and_leave(run: Launched) -> None:
    """Nobody is left who would end them, or start them again."""
    run.launcher.send_signal(signal.SIGKILL)
    until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in run.ranks))
    status = run.status()
    assert (status["state"], status["reason"]) == ("preempted", "the launcher is gone")
    assert (run.out / "checkpoints" / f"step_{int(status['step']):06d}").is_dir()
