"""What the ranks of a run say of themselves, in a folder that all see: a beat each, and, once, why the run ends.

In: what a rank does. Out: files in `.ranks/` of --output_dir, and what another rank reads from them: who is gone. It is one module because
all of it is about those files; when they are written, and what follows from them, is the watchdog's.
"""

import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

BEAT_BYTES = 1024  # a beat is one write of so many bytes in place: on a full disk too


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    pid: int
    born: float  # when the process was made: a number may be given again
    host: str
    step: int = 0
    doing: str = "starting"  # the innermost function of ours
    idle: float = 0.0  # seconds in which the main thread has not moved
    count: int = 0
    time: float = 0.0  # of this machine's clock; for people
    last_words: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host.split(' ')[0]})"


@dataclass(frozen=True)
class FailureReport:
    """Why a run ends: "left" or "hang", in words; and whether this rank is the one to say them."""

    kind: str
    text: str
    mine: bool = field(compare=False)


class HeartbeatFiles:
    """The files of one run, as one rank sees them. What cannot be written is left out: it must never end a run."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        """folder: of the run."""
        self.run, self.folder, self.ranks = folder, folder / ".ranks", ranks
        self.me = this_rank(rank)
        self._silent: dict[
            int, tuple[int, float]
        ] = {}  # rank -> its last count, seconds for which it has been that

    def clear(self) -> None:
        """Take away what an earlier run has left; before any rank writes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, **changed: Any) -> None:
        """This rank's beat, with what has changed of it."""
        self.me = replace(self.me, count=self.me.count + 1, **changed)
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            handle = os.open(
                self.folder / f"rank_{self.me.rank}.json", os.O_WRONLY | os.O_CREAT, 0o644
            )
            try:
                os.pwrite(handle, json.dumps(asdict(self.me)).encode().ljust(BEAT_BYTES), 0)
            finally:
                os.close(handle)

    def remove(self) -> None:
        """This rank leaves in agreement with all; the last one takes the folder away."""
        with suppress(OSError):
            (self.folder / f"rank_{self.me.rank}.json").unlink()
            self.folder.rmdir()

    def others(self) -> list[Heartbeat]:
        """The beats of the other ranks that are there."""
        found = []
        for rank in range(self.ranks):
            if rank != self.me.rank:
                with suppress(
                    OSError, ValueError, TypeError
                ):  # half a beat: the next look reads a whole one
                    found.append(
                        Heartbeat(**json.loads((self.folder / f"rank_{rank}.json").read_bytes()))
                    )
        return found

    def listen(self, others: list[Heartbeat], seconds: float) -> None:
        """So many seconds have passed since the last look: whose beat has not changed? Clocks of two machines are never compared."""
        for beat in others:
            count, silent = self._silent.get(beat.rank, (-1, 0.0))
            self._silent[beat.rank] = beat.count, silent + seconds if count == beat.count else 0.0

    def silent(self, beat: Heartbeat) -> float:
        """Seconds for which a rank has not been heard of."""
        return self._silent.get(beat.rank, (0, 0.0))[1]

    def gone(self, others: list[Heartbeat], most_silent: float) -> list[Heartbeat]:
        """Those that have ended: by their last words, by their process, or, on another machine, by their silence of so many seconds."""

        def is_gone(beat: Heartbeat) -> bool:
            if beat.last_words or beat.host != self.me.host:
                return bool(beat.last_words) or self.silent(beat) > most_silent
            return not is_alive(beat.pid, beat.born)

        return [beat for beat in others if is_gone(beat)]

    def words_about(self, gone: list[Heartbeat]) -> str:
        """Who has ended, how and where, and what to do."""
        said = []
        for beat in gone:
            how = (
                f"has ended: {beat.last_words}"
                if beat.last_words
                else "is gone without a word (killed? out of memory?)"
            )
            if not beat.last_words and beat.host != self.me.host:
                how = f"has not been heard of for {self.silent(beat):.0f} s"
            last = f"It was last heard of in {beat.doing}, step {beat.step}; the others are at step {self.me.step}."
            said.append(f"{beat.name} {how}. {last}")
        return " ".join([*said, self.cure()])

    def cure(self) -> str:
        """What to do, and from where the run will go on."""
        steps = sorted(
            int(path.name[5:])
            for path in (self.run / "checkpoints").glob("step_*")
            if path.name[5:].isdigit()
        )
        return f"The same command goes on from {f'step {steps[-1]}' if steps else 'the beginning'}."

    def told(self) -> FailureReport | None:
        """Why the run ends, where a rank has told it."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.folder / "told.json").read_text(encoding="utf-8"))
            return FailureReport(found["kind"], found["text"], False)
        return None

    def report_once(self, kind: str, text: str) -> FailureReport:
        """Be the one that tells it, unless another rank has told: then what that has said."""
        mine = self.folder / f".told_{self.me.rank}"
        try:
            mine.write_text(json.dumps({"kind": kind, "text": text}), encoding="utf-8")
            os.link(mine, self.folder / "told.json")  # whole, and only once
        except FileExistsError:
            return self.told() or FailureReport(kind, text, False)
        except OSError:
            pass  # no place to agree: everyone tells
        return FailureReport(kind, text, True)


def this_rank(rank: int) -> Heartbeat:
    """The first beat of this process."""
    return Heartbeat(
        rank=rank, pid=os.getpid(), born=psutil.Process().create_time(), host=this_host()
    )


def is_alive(pid: int, born: float) -> bool:
    """Whether that very process of this machine still runs; one that is dead and not yet buried does not."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1 and process.status() not in (
            psutil.STATUS_ZOMBIE,
            psutil.STATUS_DEAD,
        )
    except psutil.Error:
        return False


def this_host() -> str:
    """The machine, and the space in which its process numbers count (a container has its own)."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
