"""Whether a folder is the same on all nodes, how soon they see a new file, and whether locks work.

The first task makes a folder of its own in it, and asks the others to look (task_exchange.py). A
task writes only where it has seen a file of the first one, so nothing is left behind elsewhere.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bertdist.distributed.task_exchange import Answer, Exchange

POLL_SECONDS = 0.01
FSYNCS = 5


class FolderResult(NamedTuple):
    """What was found, by rank."""

    compared: int = 0  # tasks that have answered all questions, besides the first
    made: str = ""  # "" or why the first task cannot write
    missing: tuple[int, ...] = ()  # ranks without the folder
    unseen: tuple[int, ...] = ()  # ranks that do not see a new file of the first task
    unwritable: Mapping[int, str] = {}  # rank -> why
    unseen_here: tuple[int, ...] = ()  # ranks whose files the first task does not see
    seconds: float = 0.0  # until the slowest task saw a new file
    replaced: float | None = 0.0  # until the slowest saw it replaced; None: it did not
    fsync: float = 0.0  # the slowest task's median
    unlocked: tuple[int, ...] = ()  # ranks that got a lock which the first task held
    lock_error: str = ""


def look(path: str) -> dict[str, bool]:
    """Whether a file is there, and its folder; a client of NFS then knows that it is not."""
    folder = os.path.dirname(os.path.dirname(path))
    return {"folder": os.path.isdir(folder), "file": os.path.exists(path)}


def wait_for(path: str, content: str, seconds: float) -> float | None:
    """Seconds until a file has this content; None after `seconds`."""
    start = time.monotonic()
    while True:
        with suppress(OSError):
            if Path(path).read_text() == content:
                return time.monotonic() - start
        if time.monotonic() - start > seconds:
            return None
        time.sleep(POLL_SECONDS)


def write(path: str, content: str) -> float:
    """Write a file beside, flush it, and rename it; returns the median seconds of a flush.

    Raises OSError.
    """
    times = []
    partial = f"{path}.partial"
    for _ in range(FSYNCS):
        with open(partial, "w") as file:
            file.write(content)
            file.flush()
            start = time.monotonic()
            os.fsync(file.fileno())
            times.append(time.monotonic() - start)
    os.replace(partial, path)
    return sorted(times)[len(times) // 2]


def try_lock(path: str) -> str:
    """`got` a lock of a file, or `busy`. Raises OSError where there are no locks."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "busy"
        return "got"


HANDLERS: dict[str, Callable[..., Any]] = {
    "look": look,
    "wait_for": wait_for,
    "write": write,
    "try_lock": try_lock,
}


def examine_folder(tasks: Exchange, folder: str, wait: float) -> FolderResult:
    """On the first task. Raises nothing for what the folder lacks."""
    try:
        probe = tempfile.mkdtemp(prefix=".bertdist_doctor.", dir=folder)
    except OSError as error:
        return FolderResult(made=error.strerror or str(error))
    try:
        os.chmod(probe, 0o700)
        return _examine(tasks, probe, wait)
    except OSError as error:
        return FolderResult(made=error.strerror or str(error))
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _examine(tasks: Exchange, probe: str, wait: float) -> FolderResult:
    others = [rank for rank in tasks.ranks if rank]
    path, margin = f"{probe}/first", wait + 5
    looks = tasks.ask("look", path=path)
    missing = tuple(rank for rank, x in looks.items() if x.error or not x.value["folder"])
    write(path, "1")
    ranks = [rank for rank in others if rank not in missing]
    seen = _ask(tasks, ranks, "wait_for", margin, path=path, content="1", seconds=wait)
    unseen = tuple(rank for rank, answer in seen.items() if answer.value is None)
    ranks = [rank for rank in seen if rank not in unseen]
    write(path, "2")
    again = _ask(tasks, ranks, "wait_for", margin, path=path, content="2", seconds=wait)
    stale = [rank for rank, answer in again.items() if answer.value is None]
    ranks = list(again)
    each = {rank: {"path": f"{probe}/task_{rank}", "content": str(rank)} for rank in [0, *ranks]}
    written = tasks.ask_each("write", each, margin)
    unwritable = {r: x.error for r, x in written.items() if x.error}
    wrote = [rank for rank, answer in written.items() if rank and not answer.error]
    unseen_here = tuple(r for r in wrote if wait_for(each[r]["path"], str(r), wait) is None)
    unlocked, lock_error = _locks(tasks, ranks, path, margin)
    return FolderResult(
        compared=len(wrote),
        missing=missing,
        unseen=unseen,
        unwritable=unwritable,
        unseen_here=unseen_here,
        seconds=max((seen[rank].value for rank in ranks), default=0.0),
        replaced=None if stale else max((x.value for x in again.values()), default=0.0),
        fsync=max((x.value for x in written.values() if not x.error), default=0.0),
        unlocked=unlocked,
        lock_error=lock_error,
    )


def _locks(
    tasks: Exchange, ranks: list[int], path: str, margin: float
) -> tuple[tuple[int, ...], str]:
    """Ranks that got a lock although it is held here, and the error of a disk without locks."""
    try:
        with _held(path):
            tried = _ask(tasks, ranks, "try_lock", margin, path=path)
    except OSError as error:
        return (), error.strerror or str(error)
    errors = [x.error for x in tried.values() if x.error]
    return tuple(r for r, x in tried.items() if x.value == "got"), "".join(errors[:1])


@contextmanager
def _held(path: str) -> Iterator[None]:
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _ask(
    tasks: Exchange, ranks: list[int], name: str, limit: float, **options: Any
) -> dict[int, Answer]:
    return tasks.ask_each(name, dict.fromkeys(ranks, options), limit)


def file_system(folder: str) -> str:
    """`nfs4 on /shared`: of the last mount that a folder lies in; "" where it is not known."""
    found, best = "", -1
    with suppress(OSError):
        real = os.path.realpath(folder)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            words = line.split(" ")
            where = words[1].encode().decode("unicode_escape")
            if (real + "/").startswith(where.rstrip("/") + "/") and len(where) >= best:
                found, best = f"{words[2]} on {where}", len(where)
    return found
