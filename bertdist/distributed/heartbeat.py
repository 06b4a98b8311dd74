"""Heartbeats of the ranks of a run, in files that all ranks see: who is alive, and why a run ends.

Each rank writes `.ranks/rank_N.json` in --output_dir, 1 KB in place, and reads those of the others.
The first rank that knows why the run fails writes `.ranks/failure.json`, which exists at most once.
When they are written, and what follows from them, is decided in watchdog.py.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT_BYTES = 1024  # one write of constant size in place, which works on a full disk too


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A rank's process, and what it does."""

    rank: int
    pid: int
    process_start: float  # tells the process from a later one with the same pid
    host: str
    step: int = 0
    location: str = "starting"  # innermost function of this package in the main thread
    idle_seconds: float = 0.0  # for which the main thread has made no progress
    count: int = 0
    time: float = 0.0  # this machine's clock; for people
    final_error: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host.split(' ')[0]})"


@dataclass(frozen=True)
class FailureReport:
    """Why the run ends: a rank is "lost", or all "hang"; and whether this rank prints it."""

    kind: str
    text: str
    should_print: bool = field(compare=False)


class HeartbeatFiles:
    """The files of one run, seen from one rank. A failed write is skipped: it ends no run."""

    def __init__(self, run_folder: Path, rank: int, num_ranks: int) -> None:
        self.run_folder, self.folder, self.num_ranks = run_folder, run_folder / ".ranks", num_ranks
        self.own = own_heartbeat(rank)
        self._unchanged: dict[int, tuple[int, float]] = {}  # rank -> (count, seconds since then)

    def clear(self) -> None:
        """Remove the files of an earlier run, before any rank writes."""
        for pattern in ("rank_*.json", "failure.json", ".failure_*"):
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):  # not empty: it holds files of others
            self.folder.rmdir()

    def write(self, **changes: Any) -> None:
        """Write this rank's heartbeat. changes: fields of Heartbeat."""
        self.own = replace(self.own, count=self.own.count + 1, **changes)
        path = self.folder / f"rank_{self.own.rank}.json"
        content = json.dumps(asdict(self.own)).encode().ljust(HEARTBEAT_BYTES)
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Remove this rank's heartbeat at the common end; the last rank removes the folder."""
        with suppress(OSError):
            (self.folder / f"rank_{self.own.rank}.json").unlink()
            self.folder.rmdir()

    def others(self) -> list[Heartbeat]:
        """The heartbeats of the other ranks, without those that are missing or half written."""
        heartbeats = []
        for rank in range(self.num_ranks):
            path = self.folder / f"rank_{rank}.json"
            if rank != self.own.rank:
                with suppress(OSError, ValueError, TypeError):
                    heartbeats.append(Heartbeat(**json.loads(path.read_bytes())))
        return heartbeats

    def observe(self, others: list[Heartbeat], seconds: float) -> None:
        """Note which heartbeats have not changed in the `seconds` since the last call.

        Clocks of two machines are never compared.
        """
        for x in others:
            count, unchanged = self._unchanged.get(x.rank, (-1, 0.0))
            self._unchanged[x.rank] = x.count, unchanged + seconds if count == x.count else 0.0

    def seconds_since_heartbeat(self, heartbeat: Heartbeat) -> float:
        """Seconds for which a rank's heartbeat has not changed."""
        return self._unchanged.get(heartbeat.rank, (0, 0.0))[1]

    def dead(self, others: list[Heartbeat], max_silence: float) -> list[Heartbeat]:
        """Ranks that ended with an error, whose process is gone, or silent on another machine."""

        def is_dead(x: Heartbeat) -> bool:
            if x.final_error or x.host != self.own.host:
                return bool(x.final_error) or self.seconds_since_heartbeat(x) > max_silence
            return not is_alive(x.pid, x.process_start)

        return [x for x in others if is_dead(x)]

    def describe_dead(self, dead: list[Heartbeat]) -> str:
        """Who has ended, how and where, and what to do."""
        sentences = []
        for x in dead:
            how = "is gone without a message (killed? out of memory?)"
            if x.final_error:
                how = f"has ended: {x.final_error}"
            elif x.host != self.own.host:
                how = f"has sent no heartbeat for {self.seconds_since_heartbeat(x):.0f} s"
            last = f"Its last heartbeat was in {x.location}, step {x.step}"
            sentences.append(f"{x.name} {how}. {last}; the others are at step {self.own.step}.")
        return " ".join([*sentences, self.resume_hint()])

    def resume_hint(self) -> str:
        """What to do, and from where the run will resume."""
        folders = (self.run_folder / "checkpoints").glob("step_*")
        steps = sorted(int(path.name[5:]) for path in folders if path.name[5:].isdigit())
        where = f"step {steps[-1]}" if steps else "the beginning"
        return f"The same command resumes from {where}."

    def failure_report(self) -> FailureReport | None:
        """Why the run ends, if a rank has reported it."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads((self.folder / "failure.json").read_text(encoding="utf-8"))
            return FailureReport(report["kind"], report["text"], False)
        return None

    def report_once(self, kind: str, text: str) -> FailureReport:
        """Report why the run ends, or return what another rank has reported before."""
        draft = self.folder / f".failure_{self.own.rank}"
        try:
            draft.write_text(json.dumps({"kind": kind, "text": text}), encoding="utf-8")
            os.link(draft, self.folder / "failure.json")  # complete, and by one rank only
        except FileExistsError:
            return self.failure_report() or FailureReport(kind, text, False)
        except OSError:
            pass  # the ranks cannot agree, so each of them prints
        return FailureReport(kind, text, True)


def own_heartbeat(rank: int) -> Heartbeat:
    """The first heartbeat of this process."""
    start = psutil.Process().create_time()
    return Heartbeat(rank=rank, pid=os.getpid(), process_start=start, host=this_host())


def is_alive(pid: int, process_start: float) -> bool:
    """Whether that process of this machine still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return abs(process.create_time() - process_start) < 1 and not ended
    except psutil.Error:
        return False


def this_host() -> str:
    """The machine and its pid namespace: a container numbers its processes itself."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
