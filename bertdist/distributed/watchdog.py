"""Ends a run soon when a rank dies or all wait for ever, with one message that names the rank.

    with Watchdog(folder, accelerator, rank_timeout) as watchdog: ...

1. A thread of each rank writes a heartbeat every 5 seconds, `.ranks/rank_N.json` in --output_dir,
   1 KB in place: process, machine, step, location of the main thread, and for how long it has made
   no progress: its stack is the same, and neither it nor a loader worker has computed. A rank that
   computes, however long, makes progress.
2. A rank without progress reads the heartbeats of the others. A rank is dead if its process is gone
   (same machine) or its heartbeat has stopped (another machine). If no rank makes progress for
   --rank_timeout, a collective hangs: every rank writes its stacks and exits. A shared disk may
   take seconds per file, hang for a minute, and show another machine's files a minute late
   (`silence_limit`); clocks of two machines are never compared.
3. A rank that ends with an error writes it into its last heartbeat, so that the others can say why
   their connections broke.
4. The first rank that knows the reason reports it (`HeartbeatFiles.report_once`) and prints it:
   `.ranks/failure.json` exists at most once.

On one rank there is no thread and no heartbeat. Why torch's own timeouts do not replace this:
docs/decisions/0017.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator

from bertdist.core.atomic_io import atomic_write, to_json
from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError, DataError, RankLost
from bertdist.core.terminal import print_error
from bertdist.distributed.collectives import (
    NO_TIMEOUT,
    broadcast_from_rank0,
    raise_on_all_ranks,
)

HEARTBEAT_BYTES = 1024  # one write of constant size in place, which works on a full disk too
HEARTBEAT_SECONDS = 5.0  # or a tenth of --rank_timeout
# A network disk may hang for a minute, and show another machine's files a minute late (NFS caches
# attributes for up to 60 s).
SLOW_DISK_SECONDS = 150.0
READERS = 32  # heartbeats that are read at the same time: each may take seconds
PROGRESS_CPU_SHARE = 0.02  # a thread that computes for this share of the time is not waiting
STDERR = 2  # faulthandler needs the file descriptor

_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?: is killed by signal: ([^.]*))?"
)


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A rank's process, and what it does."""

    rank: int
    pid: int
    process_start: float  # seconds after boot; tells the process from a later one with the same pid
    host: str
    run: str = ""  # which start of the run: a disk may show files of an earlier one for a while
    step: int = 0
    location: str = "starting"  # innermost function of this package in the main thread
    idle_seconds: float = 0.0  # for which the main thread has made no progress
    count: int = 0
    time: float = 0.0  # this machine's clock; for people
    final_error: str = ""

    @property
    def name(self) -> str:
        where = f" (process {self.pid} on {self.host.split(' ')[0]})"
        return f"rank {self.rank}{where if self.pid else ''}"


@dataclass(frozen=True)
class FailureReport:
    """Why the run ends: a rank is "lost", or all "hang"; and whether this rank prints it."""

    kind: str
    text: str
    should_print: bool = field(compare=False)


class HeartbeatFiles:
    """The files of one run, seen from one rank. A failed write is skipped: it ends no run."""

    def __init__(self, run_folder: Path, rank: int, num_ranks: int, run: str = "") -> None:
        """run: the same text on all ranks, another one in each start."""
        self.run_folder, self.folder, self.num_ranks = run_folder, run_folder / ".ranks", num_ranks
        self.own = replace(own_heartbeat(rank), run=run)
        others = (x for x in range(num_ranks) if x != rank)
        self._last_seen = {x: Heartbeat(rank=x, pid=0, process_start=0.0, host="") for x in others}
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
        """The heartbeats of the other ranks as last seen; of pid 0, where none was seen yet."""
        if self._last_seen:
            with ThreadPoolExecutor(min(READERS, len(self._last_seen))) as pool:
                for heartbeat in pool.map(self._read, self._last_seen):
                    if heartbeat is not None:
                        self._last_seen[heartbeat.rank] = heartbeat
        return list(self._last_seen.values())

    def _read(self, rank: int) -> Heartbeat | None:
        """None for one that is missing, half written or of an earlier start of the run."""
        with suppress(OSError, ValueError, TypeError):
            heartbeat = Heartbeat(**json.loads(read_bytes(self.folder / f"rank_{rank}.json")))
            return heartbeat if heartbeat.run == self.own.run else None
        return None

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
            if not x.pid:
                return False
            if x.final_error or x.host != self.own.host:
                return bool(x.final_error) or self.seconds_since_heartbeat(x) >= max_silence
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
            report = json.loads(read_bytes(self.folder / "failure.json"))
            if report["run"] == self.own.run:
                return FailureReport(report["kind"], report["text"], False)
        return None

    def report_once(self, kind: str, text: str) -> FailureReport:
        """Report why the run ends, or return what another rank has reported before."""
        draft = self.folder / f".failure_{self.own.rank}"
        try:
            report = {"run": self.own.run, "kind": kind, "text": text}
            draft.write_text(json.dumps(report), encoding="utf-8")
            os.link(draft, self.folder / "failure.json")  # complete, and by one rank only
        except FileExistsError:
            # NFS repeats a request whose answer was lost: then it is this rank's own link.
            with suppress(OSError):
                if draft.stat().st_nlink > 1:
                    return FailureReport(kind, text, True)
            return self.failure_report() or FailureReport(kind, text, False)
        except OSError:
            pass  # the ranks cannot agree, so each of them prints
        return FailureReport(kind, text, True)


class StepCounter(Protocol):
    """What a heartbeat reports of the run."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""


class Watchdog:
    """Watches one rank and, while that waits, the other ranks."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, timeout: float, run: str = ""
    ) -> None:
        """folder: of the run; rank 0 removes the heartbeats of an earlier run from it.

        timeout: --rank_timeout, seconds. run: as in `HeartbeatFiles`. The ranks must synchronize
        between this and `__enter__`.
        """
        self.folder, self.timeout, self.silence_limit = folder, timeout, silence_limit(timeout)
        self.rank, self.num_ranks = accelerator.process_index, accelerator.num_processes
        self.cuda = accelerator.device.type == "cuda"
        self.files = HeartbeatFiles(folder, self.rank, self.num_ranks, run)
        self.progress: StepCounter | None = None  # the run's RunLogger, as soon as there is one
        self.interval = min(HEARTBEAT_SECONDS, timeout / 10)
        self._ended, self._stacks_written = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.get_ident()
        self._stack: tuple[Any, ...] = ()
        self._cpu_seconds, self._progress_at = 0.0, time.monotonic()
        self._dead_seconds = 0.0
        if self.rank == 0:
            self.files.clear()

    def __enter__(self) -> "Watchdog":
        if self.num_ranks > 1:
            if dist.is_initialized():
                torch.distributed.distributed_c10d._set_pg_timeout(NO_TIMEOUT)
            self._write(location="train.train, starting")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.num_ranks > 1:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._write()
        on_all_ranks = isinstance(error, BertdistError) and error.on_all_ranks
        if error is None or isinstance(error, SystemExit) or on_all_ranks:
            if self.num_ranks > 1:
                self.files.remove()
            return
        explained: BaseException = loader_worker_error(error) or error
        if self.num_ranks > 1 and connection_error(error):
            explained = self._explain_lost_connection(str(error).splitlines()[0])
        elif self.num_ranks > 1:
            if isinstance(explained, BertdistError):
                explained = type(explained)(f"rank {self.rank}: {explained}")
            self._write(final_error=_summary(explained)[:400])
            name = self.files.own.name
            self.files.report_once("lost", f"{name} has ended: {_summary(explained)}")
        if explained is not error:
            raise explained from None

    # --- this rank

    def _watch(self) -> None:
        previous = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # Its timer needs no interpreter: it shows the stack of a rank that never frees the GIL.
            with suppress(OSError, ValueError, RuntimeError):
                faulthandler.dump_traceback_later(max(self.timeout, 1.0), file=STDERR)
            self._heartbeat(now, now - previous)
            previous = now

    def _heartbeat(self, now: float, elapsed: float) -> None:
        """One heartbeat, `elapsed` seconds after the last, and a look at the others."""
        self._check_progress(now, elapsed)
        self._write()
        if now - self._progress_at > 2 * self.interval:
            # If this process was suspended or the disk hung, that time does not count.
            self._check_others(now - self._progress_at, min(elapsed, 2 * self.interval))

    def _check_progress(self, now: float, elapsed: float) -> None:
        """Note whether the main thread has made progress since the last heartbeat."""
        stack, frame = [], sys._current_frames().get(self._main)
        while frame is not None:
            stack.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        cpu_seconds = _child_cpu_seconds()
        if not self.cuda:  # a thread that waits for a GPU computes
            with suppress(AttributeError, OSError):
                cpu_seconds += time.clock_gettime(time.pthread_getcpuclockid(self._main))
        computed = abs(cpu_seconds - self._cpu_seconds) > PROGRESS_CPU_SHARE * elapsed
        if tuple(stack) != self._stack or computed:
            self._progress_at = now
        self._stack, self._cpu_seconds = tuple(stack), cpu_seconds

    def _write(self, **changes: Any) -> None:
        location = location_of(sys._current_frames().get(self._main))
        idle = round(time.monotonic() - self._progress_at, 1)
        fields = {"step": self._step(), "location": location, "idle_seconds": idle}
        self.files.write(**{**fields, "time": time.time(), **changes})

    def _step(self) -> int:
        return self.progress.step if self.progress is not None else 0

    # --- the other ranks

    def _check_others(self, idle: float, elapsed: float) -> None:
        """This rank makes no progress: does it wait for a rank that is dead or hangs?"""
        report = self.files.failure_report()
        if report is not None:
            self._exit_process(report)
        others = self.files.others()
        self.files.observe(others, elapsed)
        dead = self._dead(others)
        # Usually the main thread learns of it from its connections; NCCL's does not always.
        self._dead_seconds = self._dead_seconds + elapsed if dead else 0.0
        if self._dead_seconds > 2 * self.interval:
            self._exit_process(self.files.report_once("lost", self.files.describe_dead(dead)))
        if dead:
            return
        silence = {x.rank: self.files.seconds_since_heartbeat(x) for x in others}
        frozen = {rank for rank, seconds in silence.items() if seconds >= self.silence_limit}
        # A heartbeat is seen late, so its rank may have moved on since: not before --rank_timeout.
        if idle >= self.timeout and all(
            x.idle_seconds >= self.timeout or x.rank in frozen for x in others
        ):
            ranks = sorted([self.files.own, *others], key=lambda x: x.rank)
            where = "; ".join(
                f"rank {x.rank} in {x.location}{' (no heartbeat)' * (x.rank in frozen)}"
                for x in ranks[:8]
            )
            text = (
                f"No rank has made progress for {self.timeout:g} s (--rank_timeout), so a "
                f"collective hangs: {where}. Stacks of all ranks: {self.folder / 'stacks'}. "
                f"{self.files.resume_hint()}"
            )
            self._exit_process(self.files.report_once("hang", text))

    def _dead(self, others: list[Heartbeat]) -> list[Heartbeat]:
        return self.files.dead(others, self.silence_limit)

    def _exit_process(self, report: FailureReport) -> None:
        """End this process from the watchdog's thread: its main thread may never return."""
        if report.kind == "hang":
            self._write_stacks()
            time.sleep(3 * self.interval)  # until all ranks have read the report
        if report.should_print:
            print_error(RankLost(report.text))
        self._write_status(report)
        os._exit(1)

    def _write_stacks(self) -> None:
        """Write the stack of every thread of this rank to stacks/ and to standard error."""
        if self._stacks_written:
            return
        self._stacks_written, folder = True, self.folder / "stacks"
        with suppress(OSError, ValueError):
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank_{self.rank}.txt", "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
        with suppress(OSError, ValueError):
            os.write(STDERR, f"stacks of rank {self.rank} of {self.num_ranks}:\n".encode())
            faulthandler.dump_traceback(STDERR)

    def _explain_lost_connection(self, message: str) -> RankLost:
        """Find out, within a few heartbeats, which rank's end broke a connection."""
        deadline, first_seen = time.monotonic() + 3 * self.interval + 2, dict[int, int]()
        while (report := self.files.failure_report()) is None:
            others = self.files.others()
            for x in others:
                first_seen.setdefault(x.rank, x.count)
            if dead := self._dead(others):
                report = self.files.report_once("lost", self.files.describe_dead(dead))
                break
            if time.monotonic() > deadline:
                remote = [x for x in others if x.host != self.files.own.host]
                silent = [x for x in remote if x.count == first_seen[x.rank]]
                names = ", ".join(f"{x.name}, after step {x.step}" for x in silent or remote)
                which = "without a heartbeat since then" if silent else "on other machines"
                text = (
                    f"The connection to another rank is broken ({message}). The ranks on this "
                    f"machine are alive; {which}: {names or 'none'}. "
                    f"{self.files.resume_hint()}"
                )
                report = self.files.report_once("lost", text)
                break
            time.sleep(0.05)
        if report.kind == "hang":
            self._write_stacks()
        self._write_status(report)
        error = RankLost(report.text)
        error.already_printed = not report.should_print
        return error

    def _write_status(self, report: FailureReport) -> None:
        """Write status.json, on rank 0 or, if that is dead, on the rank that prints the report."""
        rank_0_is_dead = any(x.rank == 0 for x in self._dead(self.files.others()))
        if self.rank == 0 or (report.should_print and rank_0_is_dead):
            status = {"state": "failed", "step": self._step(), "reason": report.text}
            status["cause"] = report.kind
            with suppress(BertdistError):
                atomic_write(self.folder / "status.json", to_json(status))


def open_watchdog(folder: Path, accelerator: Accelerator, run: RunConfig) -> Watchdog:
    """A Watchdog; the ranks synchronize after it is made, so rank 0 has cleared the folder."""
    start = broadcast_from_rank0(accelerator, uuid.uuid4().hex[:8])
    with raise_on_all_ranks(accelerator):
        return Watchdog(folder, accelerator, run.rank_timeout, start)


def loader_worker_error(error: BaseException) -> DataError | None:
    """The death of a loader worker, as torch reports it, as a DataError; None for other errors."""
    match = _WORKER_DIED.search(str(error)) if isinstance(error, RuntimeError) else None
    if not match:
        return None
    how = f"was killed ({match[2].strip()})" if match[2] else "ended without a message"
    return DataError(
        f"Loader worker (process {match[1]}) {how}: usually the system was out of memory. "
        "--dataloader_num_workers 0 needs less; the same command resumes from the last checkpoint."
    )


def connection_error(error: BaseException) -> RankLost | None:
    """What gloo and NCCL raise when another rank is gone (torch 2.13); None for other errors."""
    if isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    ):
        return RankLost(f"The connection to another rank is broken: {str(error).splitlines()[0]}")
    return None


def location_of(frame: FrameType | None) -> str:
    """The innermost function of this package that a thread is in."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            return f"{Path(path).stem}.{frame.f_code.co_name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "other code"


def _child_cpu_seconds() -> float:
    """CPU seconds of this process's children, the loader workers."""
    total = 0.0
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                times = child.cpu_times()
                total += times.user + times.system
    return total


def _summary(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, BertdistError):
        return text
    name = type(error).__name__
    return f"{name}: {text.splitlines()[0]}" if text else name


def silence_limit(timeout: float) -> float:
    """Seconds without a heartbeat after which a rank on another machine is dead.

    timeout: --rank_timeout. Half of it, but not so soon that a slow disk is taken for a dead rank.
    """
    return max(timeout / 2, min(timeout, SLOW_DISK_SECONDS))


def read_bytes(path: Path) -> bytes:
    """A file of another rank; tests put a slow disk in its place."""
    return path.read_bytes()


def own_heartbeat(rank: int) -> Heartbeat:
    """The first heartbeat of this process."""
    return Heartbeat(
        rank=rank, pid=os.getpid(), process_start=start_of(psutil.Process()), host=this_host()
    )


def start_of(process: psutil.Process) -> float:
    """Seconds from boot to a process's start: create_time() alone moves when the clock is set."""
    return float(process.create_time() - psutil.boot_time())


def is_alive(pid: int, process_start: float) -> bool:
    """Whether that process of this machine still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return abs(start_of(process) - process_start) < 1 and not ended
    except psutil.Error:
        return False


def this_host() -> str:
    """The machine and its pid namespace: a container numbers its processes itself, and machines
    may share a name.
    """
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)
