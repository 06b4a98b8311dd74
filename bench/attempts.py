"""One attempt at a training run: start the ranks, kill some of them (`Kill`), wait for all.

Who starts the ranks (LAUNCHERS):

forked      each rank is a fork of this process, with everything imported: 1 to 2 s per attempt
torchrun    `torchrun --standalone`: fresh interpreters, 10 s per attempt on two idle cores
accelerate  `accelerate launch` with a config of accelerate_configs/: the same
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from accelerate.state import AcceleratorState, GradientState, PartialState

from bench.rank import run_rank

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("forked", "torchrun", "accelerate")
TIMEOUT_SECONDS = {"forked": 120, "torchrun": 300, "accelerate": 300}  # then everything is killed
# Prefixes of environment variables of another launch
FOREIGN_VARIABLES = tuple(
    "SLURM_ ACCELERATE_ TORCHELASTIC_ RANK LOCAL_ WORLD_SIZE MASTER_ OMPI_ PMI_".split()
)


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when."""

    victims: str  # "one rank", "all ranks" or "launcher"
    rank: int = 0  # with "one rank"
    after: float = 0.0  # seconds
    in_training: bool = False  # whether they count from the first step, else from the start


@dataclass
class Attempt:
    """The result of one. Times are those of time.monotonic()."""

    succeeded: bool = False  # ended by itself with exit code 0
    # of the forked ranks, or of the launcher
    exit_codes: list[int] = field(default_factory=list)
    killed_at: float | None = None  # None if all had ended before
    first_step_at: float | None = None
    killed_pids: list[int] = field(default_factory=list)
    had_steps: bool = False  # before the kill


def attempt(
    arguments: Sequence[str],
    ranks: int,
    out: Path,
    launcher: str = "forked",
    kill: Kill | None = None,
) -> Attempt:
    """Run bertdist.train with these arguments on so many ranks, and wait for all of them."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("stderr_*.log"), out / "launcher.log"):
        old.unlink(missing_ok=True)
    start = _fork if launcher == "forked" else _launch
    return _watch(start(arguments, ranks, out, launcher), out, launcher, kill)


class _Forked:
    """Ranks that are children of this process."""

    def __init__(self, pids: dict[int, int]) -> None:
        self.running, self.exit_codes, self.ranks = pids, dict[int, int](), len(pids)

    def poll(self) -> bool:
        """Whether any is still running."""
        for rank, pid in list(self.running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.exit_codes[rank] = os.waitstatus_to_exitcode(status)
                del self.running[rank]
        return bool(self.running)

    def kill(self, kill: Kill) -> list[int]:
        """The pids killed; none if one of the victims had ended."""
        ranks = range(self.ranks) if kill.victims == "all ranks" else [kill.rank]
        pids = [self.running[rank] for rank in ranks if rank in self.running]
        if len(pids) < len(ranks):
            return []
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    def kill_all(self) -> None:
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)

    def wait_for_exit_codes(self) -> list[int]:
        return [self.exit_codes[rank] for rank in range(self.ranks)]


class _Launched:
    """Ranks that are children of a launcher."""

    def __init__(self, process: "subprocess.Popen[bytes]", ranks: int) -> None:
        self.process, self.ranks = process, ranks
        self.processes = dict[int, psutil.Process]()

    def poll(self) -> bool:
        self._find_ranks()
        return self.process.poll() is None or any(
            _is_running(rank) for rank in self.processes.values()
        )

    def _find_ranks(self) -> None:
        """By the RANK in their environment; they are remembered if the launcher dies."""
        if self.process.poll() is None and len(self.processes) < self.ranks:
            with contextlib.suppress(psutil.Error):
                launcher = psutil.Process(self.process.pid)
                for child in launcher.children():
                    with contextlib.suppress(psutil.Error):
                        # equal before exec: still a fork of the launcher
                        if child.cmdline() != launcher.cmdline():
                            self.processes[int(child.environ().get("RANK", "0"))] = child

    def kill(self, kill: Kill) -> list[int]:
        """The pids killed; none if a victim has not started or has ended.

        The launcher is stopped first, to find the ranks that it has started.
        """
        ranks = range(self.ranks) if kill.victims == "all ranks" else [kill.rank]
        if self.process.poll() is not None:
            return []
        if kill.victims == "launcher":
            self.process.send_signal(signal.SIGSTOP)
            self._find_ranks()
            self.process.kill()
            return [self.process.pid]
        victims = [
            self.processes[rank]
            for rank in ranks
            if rank in self.processes and _is_running(self.processes[rank])
        ]
        if len(victims) < len(ranks):
            return []
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        return [victim.pid for victim in victims]

    def kill_all(self) -> None:
        for process in (self.process, *self.processes.values()):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def wait_for_exit_codes(self) -> list[int]:
        return [self.process.wait()]


def _watch(running: _Forked | _Launched, out: Path, launcher: str, kill: Kill | None) -> Attempt:
    result, start, written = Attempt(), time.monotonic(), _bytes_of_steps(out)
    waited, before = 0.0, start  # `waited` excludes times when this process was suspended
    while running.poll():
        now = time.monotonic()
        if result.first_step_at is None and _bytes_of_steps(out) > written:
            result.first_step_at = now
        since = start if kill is None or not kill.in_training else result.first_step_at
        if (
            kill is not None
            and result.killed_at is None
            and since is not None
            and now >= since + kill.after
        ):
            result.killed_pids = running.kill(kill)
            if result.killed_pids:
                result.killed_at, result.had_steps = (
                    time.monotonic(),
                    result.first_step_at is not None,
                )
        waited, before = waited + min(now - before, 1.0), now
        if waited > TIMEOUT_SECONDS[launcher]:
            running.kill_all()
        time.sleep(0.002 if launcher == "forked" else 0.02)
    result.exit_codes = running.wait_for_exit_codes()
    result.succeeded = not any(result.exit_codes)
    return result


def _bytes_of_steps(out: Path) -> int:
    """Size of the step logs of all ranks."""
    return sum(path.stat().st_size for path in out.glob("steps_*.log"))


def _fork(arguments: Sequence[str], ranks: int, out: Path, launcher: str) -> _Forked:
    port, running = unused_port(), dict[int, int]()
    for rank in range(ranks):
        sys.stderr.flush()
        sys.stdout.flush()
        with warnings.catch_warnings():  # about fork with threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            for state in (AcceleratorState, GradientState, PartialState):  # of the forking process
                state._reset_state()
            if ranks > 1:
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                group |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in group.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
                os.environ["ACCELERATE_USE_CPU"] = "true"
            run_rank(arguments, rank, out)
        running[rank] = pid
    return _Forked(running)


def _launch(arguments: Sequence[str], ranks: int, out: Path, launcher: str) -> _Launched:
    command = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)],
        "accelerate": [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"accelerate_configs/{'cpu_x2' if ranks > 1 else 'cpu'}.yaml",
        ],
    }[launcher]
    if launcher == "accelerate" and ranks > 2:
        command += ["--num_processes", str(ranks)]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    added = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    added |= {"ACCELERATE_USE_CPU": "true"} if launcher == "torchrun" else {}
    with open(out / "launcher.log", "w") as stdout:
        process = subprocess.Popen(
            [sys.executable, *command, "-m", "bench.rank", *arguments],
            cwd=ROOT,
            env={**inherited, **added},
            stdout=stdout,
            stderr=stdout,
        )
    return _Launched(process, ranks)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def unused_port() -> int:
    """A free TCP port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def output_of_ranks(out: Path) -> str:
    """Standard error of all ranks in the last attempt."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("stderr_*.log")))


def output_of_launcher(out: Path) -> str:
    """Output of the launcher in the last attempt, and of ranks before they had a file."""
    path = out / "launcher.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
