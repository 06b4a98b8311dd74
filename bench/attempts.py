"""One attempt at a run: its ranks are started, some are killed, and all are waited for.

In: the words of bertdist.train, how many ranks, who starts them (LAUNCHERS), and a Blow. Out: what came of it.

forked      each rank is forked from this process, which has imported everything: 1 to 2 s an attempt
torchrun    `torchrun --standalone`: fresh interpreters, 10 s an attempt on two idle cores
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

from bench.rank import be_a_rank

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("forked", "torchrun", "accelerate")
SECONDS = {"forked": 120, "torchrun": 300, "accelerate": 300}  # then everything is killed
NOT_OURS = (
    "SLURM_",
    "ACCELERATE_",
    "TORCHELASTIC_",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "OMPI_",
    "PMI_",
)  # of another launch


@dataclass(frozen=True)
class Blow:
    """Who is killed, and when."""

    victims: str  # one rank, all ranks, launcher
    rank: int = 0  # which one
    after: float = 0.0  # seconds
    in_training: bool = False  # counted from the first step, else from the start


@dataclass
class Attempt:
    """What came of one."""

    done: bool = False  # it came to its end by itself, with exit code 0
    codes: list[int] = field(
        default_factory=list
    )  # of the ranks that were forked, or of the launcher
    killed: float | None = None  # when; None: all had ended before
    begun: float | None = None  # when the first step of this attempt was seen
    pids: list[int] = field(default_factory=list)  # of those that were killed
    began: bool = False  # there had been a step when they were


def attempt(
    words: Sequence[str], ranks: int, out: Path, launcher: str = "forked", blow: Blow | None = None
) -> Attempt:
    """Start the command on so many ranks, and wait for all of them."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("said_*.txt"), out / "launcher.txt"):
        old.unlink(missing_ok=True)
    start = _fork if launcher == "forked" else _launch
    return _watch(start(words, ranks, out, launcher), out, launcher, blow)


class _Forked:
    """Ranks that are children of this process."""

    def __init__(self, pids: dict[int, int]) -> None:
        self.running, self.codes, self.many = pids, dict[int, int](), len(pids)

    def poll(self) -> bool:
        """Whether any still runs."""
        for rank, pid in list(self.running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.running[rank]
        return bool(self.running)

    def kill(self, blow: Blow) -> list[int]:
        """Strike; none, where a victim has ended."""
        ranks = range(self.many) if blow.victims == "all ranks" else [blow.rank]
        pids = [self.running[rank] for rank in ranks if rank in self.running]
        if len(pids) < len(ranks):
            return []
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    def kill_all(self) -> None:
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)

    def ends(self) -> list[int]:
        return [self.codes[rank] for rank in range(self.many)]


class _Launched:
    """Ranks that are children of a launcher."""

    def __init__(self, process: "subprocess.Popen[bytes]", ranks: int) -> None:
        self.process, self.many = process, ranks
        self.found = dict[int, psutil.Process]()

    def poll(self) -> bool:
        self._look()
        return self.process.poll() is None or any(_runs(rank) for rank in self.found.values())

    def _look(self) -> None:
        """By their RANK, once they have one; where one was seen, and the launcher died, it is known still."""
        if self.process.poll() is None and len(self.found) < self.many:
            with contextlib.suppress(psutil.Error):
                launcher = psutil.Process(self.process.pid)
                for child in launcher.children():
                    with contextlib.suppress(psutil.Error):
                        if (
                            child.cmdline() != launcher.cmdline()
                        ):  # it is no copy of the launcher any more
                            self.found[int(child.environ().get("RANK", "0"))] = child

    def kill(self, blow: Blow) -> list[int]:
        """Nothing is hit before it is there; the launcher is, but it is held first, and whom it has started is looked for."""
        ranks = range(self.many) if blow.victims == "all ranks" else [blow.rank]
        if self.process.poll() is not None:
            return []
        if blow.victims == "launcher":
            self.process.send_signal(signal.SIGSTOP)
            self._look()
            self.process.kill()
            return [self.process.pid]
        victims = [
            self.found[rank] for rank in ranks if rank in self.found and _runs(self.found[rank])
        ]
        if len(victims) < len(ranks):
            return []
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        return [victim.pid for victim in victims]

    def kill_all(self) -> None:
        for process in (self.process, *self.found.values()):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def ends(self) -> list[int]:
        return [self.process.wait()]


def _watch(running: _Forked | _Launched, out: Path, launcher: str, blow: Blow | None) -> Attempt:
    found, start, written = Attempt(), time.monotonic(), _written(out)
    waited, before = 0.0, start  # a machine that is held is held against nobody
    while running.poll():
        now = time.monotonic()
        if found.begun is None and _written(out) > written:
            found.begun = now
        since = start if blow is None or not blow.in_training else found.begun
        if (
            blow is not None
            and found.killed is None
            and since is not None
            and now >= since + blow.after
        ):
            found.pids = running.kill(blow)
            if found.pids:
                found.killed, found.began = time.monotonic(), found.begun is not None
        waited, before = waited + min(now - before, 1.0), now
        if waited > SECONDS[launcher]:
            running.kill_all()
        time.sleep(0.002 if launcher == "forked" else 0.02)
    found.codes = running.ends()
    found.done = not any(found.codes)
    return found


def _written(out: Path) -> int:
    """Bytes about steps, of all ranks."""
    return sum(path.stat().st_size for path in out.glob("steps_*.txt"))


def _fork(words: Sequence[str], ranks: int, out: Path, launcher: str) -> _Forked:
    port, running = free_port(), dict[int, int]()
    for rank in range(ranks):
        sys.stderr.flush()
        sys.stdout.flush()
        with warnings.catch_warnings():  # of a fork beside threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            if ranks > 1:
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    LOCAL_RANK=str(rank),
                    LOCAL_WORLD_SIZE=str(ranks),
                )
                os.environ.update(
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    GLOO_SOCKET_IFNAME="lo",
                    ACCELERATE_USE_CPU="true",
                )
            be_a_rank(words, rank, out)
        running[rank] = pid
    return _Forked(running)


def _launch(words: Sequence[str], ranks: int, out: Path, launcher: str) -> _Launched:
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    more |= {"ACCELERATE_USE_CPU": "true"} if launcher == "torchrun" else {}
    with open(out / "launcher.txt", "w") as said:
        process = subprocess.Popen(
            [sys.executable, *command, "-m", "bench.rank", *words],
            cwd=ROOT,
            env={**kept, **more},
            stdout=said,
            stderr=said,
        )
    return _Launched(process, ranks)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def said_in(out: Path) -> str:
    """What all ranks have printed in the last attempt."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("said_*.txt")))


def launcher_said(out: Path) -> str:
    """What torchrun or `accelerate launch` has printed in the last attempt, and ranks before they had a file."""
    path = out / "launcher.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
