"""Real launches of two ranks on the CPU, by `accelerate launch` and torchrun, to be killed and started again. The launcher is a fork of
the test, and the ranks that it starts are forks of it: a Python that imports torch takes 5 s of a core. With BERTDIST_EVERY_FAULT=1 they
are Pythons of their own, as they always are in tests/slurm, tests/runs/test_examples.py and the smoke run of tests/runs/test_launch.py.

    story = Story("torchrun", tiny_model, folder)          # one command
    with story.launch() as launch:                         # started
        launch.wait_for_steps(3)
        launch.ranks[1].kill()
        assert launch.wait() == 1 and launch.complaints() == [...]

No time is measured: a step takes as long as the test wants (slowed.py), so what is to happen in the midst of a run does, on any machine.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch.distributed.run as torchrun
from accelerate.commands import launch as accelerate_launcher
from accelerate.commands.config import config_args
from forked import Command, ForkedPython
from rows import EVERY_FAULT, json_of, words_of, write_split
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # for anything to happen; on two idle cores a launch takes 8
STEPS = 100
SETTINGS = {
    "num_train_epochs": 4,
    "save_every": "5 steps",
    "log_every": "2 steps",
    "rank_timeout": 120,
    "tokens_per_micro_batch": 200,
}
SLOW, HELD = 0.25, 3.0  # seconds a step: 25 a run; 5 minutes a run
NOT_OURS = (
    "SLURM_",
    "ACCELERATE_",
    "TORCHELASTIC_",
    "PET_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
)  # of another launch


def fork_pythons() -> None:
    """In a launcher: what it starts is forked."""
    if not EVERY_FAULT:
        subprocess.Popen = subprocess_handler.Popen = ForkedPython  # type: ignore[misc]


def torchrun_launch() -> None:
    fork_pythons()
    torchrun.main()


def accelerate_launch() -> None:
    """`accelerate launch` in a fork: the place of the user's own config is found when accelerate is imported, so it is found again."""
    fork_pythons()
    home = os.path.join(os.environ["HF_HOME"], "accelerate", "default_config.yaml")
    accelerate_launcher.default_config_file = config_args.default_config_file = home
    accelerate_launcher.main()


LAUNCHERS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "accelerate": (
        accelerate_launch,
        ["--quiet", "--config_file", f"{ROOT}/accelerate_configs/cpu_x2.yaml"],
    ),
    "torchrun": (torchrun_launch, ["--standalone", "--nproc_per_node", "2"]),
}


def until(done: Callable[[], Any], said: Callable[[], str] = str) -> None:
    """Wait for it; what was `said` is shown where it does not come."""
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"not within {SECONDS} s:\n{said()}"
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """Neither ended nor dead and not yet buried."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Launch:
    """A launcher that was started, its two ranks, and what they print."""

    def __init__(
        self, launcher: str, words: list[str], env: dict[str, str], folder: Path, out: Path
    ) -> None:
        self.out, self.file, self.ranks = out, folder / "said.txt", dict[int, psutil.Process]()
        self.first = self.step()
        self.file.write_text("")
        main, options = LAUNCHERS[launcher]
        self.launcher = Command(main, [launcher, *options, *words], self.file, env, cwd=folder)

    def said(self) -> str:
        return self.file.read_text(errors="replace")

    def complaints(self) -> list[str]:
        """What ranks tell their user."""
        return [line for line in self.said().splitlines() if line.startswith("bertdist: ")]

    def status(self) -> Any:
        return json_of(self.out / "status.json")

    def step(self) -> int:
        """The last one that metrics.jsonl tells of."""
        path = self.out / "metrics.jsonl"
        lines = (
            [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )
        return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else 0

    def wait_for_steps(self, many: int) -> None:
        """Until the run is so many steps further than any before; its ranks are known then."""
        until(
            lambda: self.launcher.poll() is not None or self.step() >= self.first + many, self.said
        )
        assert self.launcher.poll() is None, f"it has ended:\n{self.said()}"
        children = psutil.Process(self.launcher.pid).children()
        children.sort(key=lambda child: (child.create_time(), child.pid))  # as they are started
        self.ranks = dict(enumerate(children))
        assert sorted(self.ranks) == [0, 1], self.said()

    def wait(self) -> int:
        """The launcher's exit code; the ranks have ended, too."""
        until(lambda: self.launcher.poll() is not None, self.said)
        until(lambda: not any(map(runs, self.ranks.values())), self.said)
        return self.launcher.wait()

    def kill(self) -> None:
        """SIGKILL to the launcher and all that it has started, at once."""
        with contextlib.suppress(psutil.Error):
            self.launcher.send_signal(signal.SIGSTOP)  # it starts no more
            self.ranks |= enumerate(psutil.Process(self.launcher.pid).children(), start=2)
        for process in (self.launcher, *self.ranks.values()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.launcher.wait()
        until(lambda: not any(map(runs, self.ranks.values())))


class Story:
    """One command that is launched again and again in one folder."""

    def __init__(self, launcher: str, model: Path, folder: Path, **settings: Any) -> None:
        self.launcher, self.model, self.folder, self.settings = (
            launcher,
            model,
            folder,
            {**SETTINGS, **settings},
        )
        self.files, self.out, self.pace = (
            write_split(folder, 200, 12),
            folder / "out",
            folder / "pace",
        )
        self.go(SLOW)

    def go(self, seconds: float) -> None:
        """From now on a step takes so many seconds more."""
        self.pace.with_suffix(".new").write_text(str(seconds))
        self.pace.with_suffix(".new").replace(self.pace)

    def words(self, out: Path) -> list[str]:
        return words_of(self.model, out, self.files, **self.settings)

    @contextlib.contextmanager
    def launch(self, other: str = "", where: str = ".", **env: str) -> Iterator[Launch]:
        """other: what rank 1 does differently. where: the folder to start it in, from which paths count."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
        kept |= {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": "/nonexistent",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        kept |= {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS),
            **env,
        }  # a rank that is asked to stop has so long to save, not 30 s
        program = [
            str(ROOT / "tests" / "slowed.py"),
            str(self.pace),
            other,
            "--",
            *self.words(self.out),
        ]
        (self.folder / where).mkdir(exist_ok=True)
        launch = Launch(self.launcher, program, kept, self.folder / where, self.out)
        try:
            yield launch
        finally:
            launch.kill()
