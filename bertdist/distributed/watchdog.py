"""A rank that dies, and ranks that wait for each other for ever: the run ends soon on all ranks, with one message that names who and where.

In: what each rank says of itself (beats.py). Out: nothing while all goes well; else a RankLost on every rank, one of which is printed.

1. A thread of each rank writes its beat every few seconds: process, machine, step, where its main thread stands, and for how long that has
   not moved: the same stack, while neither it nor one of its loader workers computed. A rank that works, however long, moves.
2. A rank that does not move looks at the others' beats. One whose process is gone (same machine), or whose beat has stopped (another
   machine), is lost. Where nobody moves for --rank_timeout, a collective hangs: every rank writes its stacks down, and leaves.
3. A rank that leaves by an error of its own leaves its last words, so that the others can say why their connections broke.
4. Who first knows why claims the right to tell it (a file that can be made once); the others are silent.
On one rank there is no thread and no beat.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator

from bertdist.core.atomic_io import atomic_write, to_json
from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError, DataError, RankLost
from bertdist.core.terminal import print_error, process_rank
from bertdist.distributed.collectives import NO_TIMEOUT, raise_on_all_ranks
from bertdist.distributed.heartbeat import FailureReport, Heartbeat, HeartbeatFiles
from bertdist.distributed.rendezvous import left

BEAT_SECONDS = 5.0  # between two beats, or a tenth of --rank_timeout

MOVES = 0.02  # a thread that computes for so much of the time is not waiting

SECONDS_TO_LOOK = 2.0  # for a process that broke a connection to be seen as gone, and for others to see who tells it

SECONDS_TO_TELL = (
    15.0  # for rank 0 to come as far as the others and print; then torchrun ends them anyway
)

PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

STDERR = 2  # by its number: faulthandler needs it

WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?: is killed by signal: ([^.]*))?"
)


class Watchdog:
    """Watches one rank and, while it waits, the others. A context manager around all that a run does."""

    def __init__(self, folder: Path, accelerator: Accelerator, seconds: float) -> None:
        """seconds: --rank_timeout. Rank 0 clears away what an earlier run has left: make it before the ranks next meet."""
        self.folder, self.seconds = folder, seconds
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.cuda = accelerator.device.type == "cuda"
        self.beats = HeartbeatFiles(folder, self.rank, self.ranks)
        self.progress: Any = None  # the run's Progress, as soon as there is one
        self.beat_seconds = min(BEAT_SECONDS, seconds / 10)
        self._ended, self._dumped = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.get_ident()
        self._stack: tuple[Any, ...] = ()
        self._computed, self._moved = 0.0, time.monotonic()
        self._gone_for = 0.0
        if self.rank == 0:
            self.beats.clear()

    def __enter__(self) -> "Watchdog":
        if self.ranks > 1:
            if dist.is_initialized():
                torch.distributed.distributed_c10d._set_pg_timeout(NO_TIMEOUT)
            self._write(doing="train.train, starting")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ranks > 1:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._write()
        if (
            error is None
            or isinstance(error, SystemExit)
            or (isinstance(error, BertdistError) and error.on_all_ranks)
        ):
            if self.ranks > 1:
                self.beats.remove()
            return
        found: BaseException = loader_worker_error(error) or error
        if self.ranks > 1 and connection_lost(error):
            found = self._who_left(str(error).splitlines()[0])
        elif self.ranks > 1:
            if isinstance(found, BertdistError):
                found = type(found)(f"rank {self.rank}: {found}")
            self._write(last_words=_words(found)[:400])
            self.beats.report_once("left", f"{self.beats.me.name} has ended: {_words(found)}")
        if found is not error:
            raise found from None

    # --- this rank

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.beat_seconds):
            now = time.monotonic()
            self._notice(now, now - before)
            self._write()
            # Its timer needs no interpreter: it says where a rank stands that holds the interpreter's lock for ever.
            with suppress(OSError, ValueError, RuntimeError):
                faulthandler.dump_traceback_later(max(self.seconds, 1.0), file=STDERR)
            if now - self._moved > 2 * self.beat_seconds:
                # A process that was held itself holds the time against nobody.
                self._look(now - self._moved, min(now - before, 2 * self.beat_seconds))
            before = now

    def _notice(self, now: float, elapsed: float) -> None:
        """Whether the main thread has moved since the last beat."""
        places, frame = [], sys._current_frames().get(self._main)
        while frame is not None:
            places.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        computed = _workers_seconds()
        if not self.cuda:  # there a thread that waits for the device computes
            with suppress(AttributeError, OSError):
                computed += time.clock_gettime(time.pthread_getcpuclockid(self._main))
        if tuple(places) != self._stack or abs(computed - self._computed) > MOVES * elapsed:
            self._moved = now
        self._stack, self._computed = tuple(places), computed

    def _write(self, **changed: Any) -> None:
        step = self.progress.step if self.progress is not None else 0
        doing = doing_of(sys._current_frames().get(self._main))
        idle = round(time.monotonic() - self._moved, 1)
        self.beats.write(step=step, idle=idle, time=time.time(), **{"doing": doing, **changed})

    # --- the others

    def _look(self, idle: float, elapsed: float) -> None:
        """This rank does not move: is there one that it waits for in vain?"""
        told = self.beats.told()
        if told is not None:
            self._leave(told)
        others = self.beats.others()
        self.beats.listen(others, elapsed)
        gone = self._gone(others)
        # The main thread hears of it from its connections, as a rule; NCCL's does not always.
        self._gone_for = self._gone_for + elapsed if gone else 0.0
        if self._gone_for > 2 * self.beat_seconds:
            self._leave(self.beats.report_once("left", self.beats.words_about(gone)))
        still = {
            beat.rank: max(beat.idle, self.beats.silent(beat))
            for beat in others
            if beat not in gone
        }
        if idle >= self.seconds and all(seconds >= self.seconds / 2 for seconds in still.values()):
            everyone = sorted([self.beats.me, *others], key=lambda beat: beat.rank)
            silent = {
                beat.rank: " (it is held: it says nothing)"
                for beat in others
                if self.beats.silent(beat) >= self.seconds / 2
            }
            where = "; ".join(
                f"rank {beat.rank} in {beat.doing}{silent.get(beat.rank, '')}"
                for beat in everyone[:8]
            )
            text = f"No rank has moved for {self.seconds:g} s (--rank_timeout), so a collective hangs: {where}."
            stacks = f"What each rank did stands in {self.folder / 'stacks'}."
            self._leave(self.beats.report_once("hang", f"{text} {stacks} {self.beats.cure()}"))

    def _gone(self, others: list[Heartbeat]) -> list[Heartbeat]:
        return self.beats.gone(others, self.seconds / 2)

    def _leave(self, told: FailureReport) -> None:
        """End this process from here: its main thread may never come back."""
        if told.kind == "hang":
            self._dump()
            time.sleep(3 * self.beat_seconds)  # until all have looked
        if told.mine:
            print_error(RankLost(told.text))
        self._status(told)
        os._exit(1)

    def _dump(self) -> None:
        """Where every thread of this rank stands: into a file of the run's folder, and to standard error."""
        if self._dumped:
            return
        self._dumped, folder = True, self.folder / "stacks"
        with suppress(OSError, ValueError):
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank_{self.rank}.txt", "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
        with suppress(OSError, ValueError):
            os.write(STDERR, f"rank {self.rank} of {self.ranks} stood at:\n".encode())
            faulthandler.dump_traceback(STDERR)

    def _who_left(self, error: str) -> RankLost:
        """Why a connection broke: who is gone is looked for until it is known, for a few beats at most."""
        deadline = time.monotonic() + 3 * self.beat_seconds + 2
        while (told := self.beats.told()) is None:
            others = self.beats.others()
            if gone := self._gone(others):
                told = self.beats.report_once("left", self.beats.words_about(gone))
                break
            if time.monotonic() > deadline:
                far = ", ".join(
                    f"{beat.name}, after step {beat.step}"
                    for beat in others
                    if beat.host != self.beats.me.host
                )
                text = f"The connection to another rank has broken ({error}); those of this machine are there, elsewhere: {far or 'none'}."
                told = self.beats.report_once("left", f"{text} {self.beats.cure()}")
                break
            time.sleep(0.05)
        if told.kind == "hang":
            self._dump()
        self._status(told)
        found = RankLost(told.text)
        found.already_printed = not told.mine
        return found

    def _status(self, told: FailureReport) -> None:
        """status.json is rank 0's; where that is gone, it is for who tells."""
        others = self.beats.others()
        if self.rank == 0 or (told.mine and any(beat.rank == 0 for beat in self._gone(others))):
            text = {
                "state": "failed",
                "step": self.progress.step if self.progress is not None else 0,
                "reason": told.text,
            }
            with suppress(BertdistError):
                atomic_write(self.folder / "status.json", to_json(text))


def loader_worker_error(error: BaseException) -> DataError | None:
    """What torch says of a loader worker that was killed, as a user should read it; None for other errors."""
    found = WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if not found:
        return None
    how = f"was killed ({found[2].strip()})" if found[2] else "ended without a word"
    return DataError(
        f"Loader worker (process {found[1]}) {how}: most often the system had run out of memory. --dataloader_num_workers 0 does without; "
        "the same command goes on from the last checkpoint."
    )


def connection_lost(error: BaseException) -> RankLost | None:
    """What gloo and NCCL say when another rank is gone (torch 2.13), in words; None for other errors."""
    if isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    ):
        return RankLost(f"The connection to another rank has broken: {str(error).splitlines()[0]}")
    return None


def report_lost_connection(error: BaseException) -> bool:
    """Where no Watchdog looks, in the first seconds of a run and in prediction: tells of a broken connection. False for other errors.

    Once, and by name, where the rank that is gone ran on this machine.
    """
    lost = connection_lost(error)
    if lost is None:
        return False
    gone, mine = left(SECONDS_TO_LOOK)
    if gone:
        names = ", ".join(beat.name for beat in gone[:8])
        lost = RankLost(
            f"{names} is gone (killed? out of memory? else its own message says why). Start the same command again."
        )
    if mine:
        print_error(lost)
    time.sleep(SECONDS_TO_LOOK)
    return True


def end_soon(error: BaseException) -> None:
    """For a command line that leaves by this error: neither before it is told, nor never.

    torchrun ends rank 0 as soon as it sees another rank leave, and what all have to say is rank 0's to print. Once that has left, torchrun
    ends this one. gloo's threads may keep a process that has lost another from ending.
    """
    if isinstance(error, RankLost):
        faulthandler.dump_traceback_later(30, exit=True, file=STDERR)
    on_all_ranks = getattr(error, "on_all_ranks", False)
    if on_all_ranks and process_rank() != 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_TELL)


def doing_of(frame: FrameType | None) -> str:
    """The innermost function of this package that a thread is in."""
    while frame is not None:
        folder, name = os.path.split(frame.f_code.co_filename)
        if f"{folder}{os.sep}".startswith(PACKAGE):
            return f"{name.removesuffix('.py')}.{frame.f_code.co_name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "other code"


def _workers_seconds() -> float:
    """What this process's children have computed, seconds."""
    total = 0.0
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                times = child.cpu_times()
                total += times.user + times.system
    return total


def _words(error: BaseException) -> str:
    text = str(error).strip()
    return (
        text
        if isinstance(error, BertdistError)
        else f"{type(error).__name__}: {text.splitlines()[0]}"
        if text
        else type(error).__name__
    )


def open_watchdog(folder: Path, accelerator: Accelerator, run: RunConfig) -> Watchdog:
    """Made before the ranks meet here: rank 0 clears away the beats of an earlier run, and only then anyone writes."""
    with raise_on_all_ranks(accelerator):
        return Watchdog(folder, accelerator, run.rank_timeout)
