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
5. A start that fails before its first step removes what it has made, and nothing else
   (`FailedStart`).
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
    atomic_write,
    explain_write_errors,
    read_json_object,
    to_json,
)
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.output_files import (
    ENVIRONMENT,
    IGNORED,
    LOCK,
    OWNER,
    STATUS,
    TRACKER,
    check_run_folder,
    is_run_folder,
    read_owner,
)
from bertdist.core.terminal import byte_size
from bertdist.distributed.collectives import raise_on_all_ranks

# What a start may have made before its first step; in folds/ its rows too.
MADE_BY_STARTS = (
    *(LOCK, OWNER, STATUS, ENVIRONMENT, "config.yaml", "metrics.jsonl", "survey.json"),
    *("bad_rows.jsonl", ".ranks", "checkpoints", "folds", "seeds", TRACKER),
)
ROWS_OF_FOLDS = ("train.jsonl", "validation.jsonl")
RANKS_SECONDS = 5.0  # for the other ranks to leave
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
    start = FailedStart(folder)
    try:
        with start.remove_folders(), raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                check_run_folder(folder)
                _check_writable(folder)
                lock = _acquire(folder, messages)
        with start.remove(accelerator):
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
            sizes = byte_size(checkpoint), byte_size(free)
            message = f"Checkpoint size: about {sizes[0]}; {sizes[1]} free in {folder}."
            if free < needed:
                raise CheckpointError(
                    f"{message} About {byte_size(needed)} are needed for {CHECKPOINTS} checkpoints "
                    "and best/: free some space."
                )
    return message


class FailedStart:
    """What a start makes in an output folder, removed if it fails before its first step.

    Files that were there before stay, and so does all of it where a file is not one that every
    start makes: of a tracker, of a user, or a list of rows that the error names.
    """

    def __init__(self, folder: Path) -> None:
        """Before anything is made."""
        self.folder = folder
        self.before = set(os.listdir(folder)) if folder.is_dir() else set[str]()
        self.new_folders = [x for x in (folder, *folder.parents) if not x.exists()]

    @contextmanager
    def remove_folders(self) -> Iterator[None]:
        """If the block fails, remove the folders that were not there and are empty."""
        try:
            yield
        except BaseException:
            self._remove_folders()
            raise

    @contextmanager
    def remove(self, accelerator: Accelerator) -> Iterator[None]:
        """If the block fails on all ranks, remove what is new; while the lock is held."""
        try:
            yield
        except BaseException as error:
            is_common = getattr(error, "on_all_ranks", False) or accelerator.num_processes == 1
            if accelerator.is_main_process and is_common:
                deadline = time.monotonic() + RANKS_SECONDS
                while (self.folder / ".ranks").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)  # the other ranks are about to remove their heartbeats
                with suppress(OSError):
                    self._remove_files(str(error))
            raise

    def _remove_files(self, message: str) -> None:
        new = [self.folder / name for name in os.listdir(self.folder) if name not in self.before]
        made = [path for path in new if path.name in MADE_BY_STARTS]
        others = {path.name for path in new} - {path.name for path in made}
        logs = {name for pattern in IGNORED for name in fnmatch.filter(others, pattern)}
        files = [x for path in made for x in (path, *path.rglob("*")) if not x.is_dir()]
        known = all(x.name in (*MADE_BY_STARTS, *ROWS_OF_FOLDS) for x in files)
        named = any(x.name in message for x in files)
        if others - logs or not known or named or any(map(_shows_a_step, files)):
            return
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._remove_folders()

    def _remove_folders(self) -> None:
        checkpoints = self.folder / "checkpoints"
        own = [checkpoints] if checkpoints.name not in self.before else []
        for path in (*own, *self.new_folders):
            with suppress(OSError):  # not empty, or not there
                path.rmdir()


def _shows_a_step(file: Path) -> bool:
    if file.name == STATUS:
        return read_json_object(file).get("step") != 0
    return file.name == "metrics.jsonl" and file.stat().st_size > 0


def claim_run_folder(folder: Path) -> None:
    """Make a new folder a run's, so that files may be put there before the run takes the lock.

    Raises as `check_run_folder`, and CheckpointError.
    """
    check_run_folder(folder)
    if not is_run_folder(folder):
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / STATUS, to_json({"state": "running", "step": 0, "reason": ""}))


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
    owner = read_owner(folder)
    with suppress(OSError):  # a network disk may show it for a while after its removal
        (folder / OWNER).unlink()
        if owner is not None:
            messages.append(
                f"Previous run ({_describe(owner)}) did not end cleanly; lock taken over."
            )
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
