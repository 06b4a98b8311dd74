"""One run at a time per output folder, which must be new or a run's, writable and have enough free
space: checked before any time is spent on data or weights.

Use: `with lock_run_folder(folder, accelerator) as messages:` around a run, and `check_disk_space`
once the model is known.

1. Rank 0 holds run.lock with flock, which the system releases when a process ends, however it ends:
   a lock is never stale. The file itself stays, because removing it would let two runs lock two
   files of the same name (filelock's own advice).
2. running.json beside it names the owner: host, pid and start time. The message of a second run
   shows it, and a run that finds it after taking the lock knows that the previous one was killed.
3. A folder with files that no run wrote is refused, and so is a symbolic link in place of a file
   that a run writes: nothing of a user's is overwritten.
4. On a disk without flock (some network disks) filelock uses the existence of the file as the lock,
   with host and pid inside; where that fails too, a message says that nothing is locked.
"""

import fnmatch
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn

from bertdist.core.atomic_io import (
    HIDDEN_SUFFIXES,
    atomic_write,
    explain_write_errors,
    to_json,
)
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.output_files import LOCK, OWNER, STATUS, WRITTEN, is_run_folder, read_owner
from bertdist.distributed.collectives import raise_on_all_ranks

# What may be in a new folder: logs of the command, and files of systems.
IGNORED = ("*.log", "*.out", "*.err", ".*", "lost+found")
# A dead rank's loader workers notice within 5 s that it is gone (torch 2.13); until then they may
# hold its lock.
WAIT_SECONDS = 15.0
# Checkpoints on the disk at the same time: the last complete one, and the one being written.
CHECKPOINTS = 2


@contextmanager
def lock_run_folder(folder: Path, accelerator: Accelerator) -> Iterator[list[str]]:
    """Hold the lock of an output folder; yields messages for the log (rank 0). A collective.

    Raises ConfigError on all ranks if another run holds it, or if it holds files that no run wrote,
    CheckpointError if it is not writable.
    """
    messages: list[str] = []
    lock: FileLock | None = None
    try:
        with raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                check_run_folder(folder)
                _check_writable(folder)
                lock = _acquire(folder, messages)
        yield messages
    finally:
        if lock is not None:
            with suppress(OSError):  # a deleted folder needs no clean-up
                (folder / OWNER).unlink(missing_ok=True)
            lock.release()


def check_disk_space(folder: Path, model: nn.Module, accelerator: Accelerator) -> str:
    """The size of a checkpoint and the free space, as a message. A collective.

    Raises CheckpointError on all ranks if the space is not enough. An estimate: float32 weights,
    AdamW's two averages, and best/. It does not see quotas or what other processes write.
    """
    weights = sum(weight.nbytes for weight in model.state_dict().values())
    averages = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    checkpoint = weights + averages
    message = ""
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            used = _bytes_in(folder / "checkpoints") + _bytes_in(folder / "best")
            needed = max(CHECKPOINTS * checkpoint + weights - used, checkpoint)
            free = shutil.disk_usage(folder).free
            message = f"Checkpoint size: about {_size(checkpoint)}; {_size(free)} free in {folder}."
            if free < needed:
                raise CheckpointError(
                    f"{message} About {_size(needed)} are needed for {CHECKPOINTS} checkpoints "
                    "and best/: free some space."
                )
    return message


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds files, and is not of a run; nothing is written."""
    if not folder.is_dir():
        return  # new, or `_check_writable` says what it is
    with explain_write_errors(folder, "read"):
        names = sorted(os.listdir(folder))
    if not is_run_folder(folder):
        ignored = {name for pattern in IGNORED for name in fnmatch.filter(names, pattern)}
        if _is_unused(folder / "checkpoints"):  # of a run that was killed in its first second
            ignored.add("checkpoints")
        ignored -= {*WRITTEN, *(name for name in names if name.endswith(HIDDEN_SUFFIXES))}
        if foreign := [name for name in names if name not in ignored]:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ConfigError(
                f"--output_dir {folder} holds {foreign[0]!r}{more}, which no run wrote: give a "
                "folder that is new, empty or of an earlier run."
            )
    for name in WRITTEN:
        if (folder / name).is_symlink():
            raise ConfigError(
                f"{folder / name} is a symbolic link, and a run replaces this file: remove the "
                "link, or use another --output_dir."
            )


def claim_run_folder(folder: Path) -> None:
    """Make a new folder a run's, so that files may be put there before the run takes the lock.

    Raises as `check_run_folder`, and CheckpointError.
    """
    check_run_folder(folder)
    if not is_run_folder(folder):
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / STATUS, to_json({"state": "running", "step": 0, "reason": ""}))


def _is_unused(checkpoints: Path) -> bool:
    with suppress(OSError):
        return all(x.name.startswith(".probe.") and x.is_file() for x in checkpoints.iterdir())
    return False


def _check_writable(folder: Path) -> None:
    for path in (folder, folder / "checkpoints"):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path, prefix=".probe.") as probe:
                probe.write(b"x")
        except OSError as error:
            raise CheckpointError(
                f"Cannot write to {path}: {error.strerror or error}. "
                "--output_dir must be a folder that this process may write to."
            ) from None


def _acquire(folder: Path, messages: list[str]) -> FileLock | None:
    """The lock; None on a disk that has no locks. Raises ConfigError if another run holds it."""
    lock = FileLock(folder / LOCK)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            owner = read_owner(folder)
            if (owner is not None and _may_be_alive(owner)) or time.monotonic() > deadline:
                who = _describe(owner) if owner else f"it holds {LOCK} but left no {OWNER}"
                raise ConfigError(
                    f"{folder} is in use by another run ({who}). "
                    "Wait for it, stop it, or use another --output_dir."
                ) from None
            time.sleep(0.1)
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            messages.append(f"{folder} cannot be locked ({reason}): start no second run in it.")
            return None
    if (owner := read_owner(folder)) is not None:
        messages.append(f"Previous run ({_describe(owner)}) did not end cleanly; lock taken over.")
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
    try:
        atomic_write(folder / OWNER, json.dumps(owner).encode() + b"\n")
    except CheckpointError:
        lock.release()
        raise
    return lock


def _describe(owner: dict[str, Any]) -> str:
    return f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"


def _may_be_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner's process exists; assumed for a process on another host."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
