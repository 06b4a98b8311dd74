"""A run's folder belongs to one run at a time, can be written to, and has room: known before any time is spent.

In: the folder, and on rank 0 the disk it is on. Out: `lock_run_folder`, inside which no other run enters it; `check_disk_space`, an estimate.

1. Rank 0 holds run.lock with flock, which the system gives back when a process ends, however it ends: a lock is never stale. The file
   itself stays; removing it would let two runs hold two files of one name (filelock's own advice).
2. running.json beside it says who: host, pid, since when. It is what the second run's message names, and what the next run finds when
   the one before was killed.
3. Where a disk has no flock (some network disks), filelock takes the file's existence for the lock, with host and pid inside, or this
   module says that nothing is locked.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.distributed.collectives import raise_on_all_ranks

LOCK, OWNER = "run.lock", "running.json"

PATIENCE_SECONDS = 15.0  # a dead rank's loader workers see within 5 s that it is gone (torch 2.13), and may hold its lock until then

CHECKPOINTS = 2  # that must have room: the last whole one, and the one that is being written


@contextmanager
def lock_run_folder(folder: Path, accelerator: Accelerator) -> Iterator[list[str]]:
    """Hold the folder of a run; gives what there is to say of it. A collective: all ranks wait for rank 0's answer.

    Raises ConfigError on all ranks where another run holds it, CheckpointError where it cannot be written to.
    """
    told: list[str] = []
    lock: FileLock | None = None
    try:
        with raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                _try_to_write(folder)
                lock = _take(folder, told)
        yield told
    finally:
        if lock is not None:
            with suppress(OSError):  # a folder that is gone holds nobody up
                (folder / OWNER).unlink(missing_ok=True)
            lock.release()


def check_disk_space(folder: Path, model: nn.Module, accelerator: Accelerator) -> str:
    """What checkpoints will take and what there is, in words. A collective; raises CheckpointError on all ranks where it cannot do.

    An estimate: float32 weights, AdamW's two averages, and best/. A quota is not seen, nor what others write meanwhile.
    """
    weights = sum(weight.nbytes for weight in model.state_dict().values())
    averages = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    said = ""
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            there = _bytes_in(folder / "checkpoints") + _bytes_in(folder / "best")
            needed = max(CHECKPOINTS * (weights + averages) + weights - there, weights + averages)
            free = shutil.disk_usage(folder).free
            said = f"A checkpoint takes about {_size(weights + averages)}; {_size(free)} are free in {folder}."
            if free < needed:
                raise CheckpointError(
                    f"{said} About {_size(needed)} are needed for {CHECKPOINTS} checkpoints and best/: make room."
                )
    return said


def _try_to_write(folder: Path) -> None:
    """Raises CheckpointError where the run could not write its files."""
    for place in (folder, folder / "checkpoints"):
        probe = place / f".probe.{os.getpid()}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"Cannot write to {place}: {error.strerror or error}. --output_dir must be a folder that this process may write to."
            ) from None


def _take(folder: Path, told: list[str]) -> FileLock | None:
    lock = FileLock(folder / LOCK)
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            owner = _owner(folder)
            if (owner is not None and _may_be_alive(owner)) or time.monotonic() > until:
                raise ConfigError(_refusal(folder, owner)) from None
            time.sleep(0.1)
        except (OSError, NotImplementedError) as error:
            told.append(
                f"{folder} cannot be locked ({getattr(error, 'strerror', None) or error}): start no second run in it."
            )
            return None
    if (owner := _owner(folder)) is not None:
        told.append(
            f"The run before (pid {owner['pid']} on {owner['host']}, since {owner['since']}) did not end by itself; taken over."
        )
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    try:
        atomic_write(
            folder / OWNER,
            json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode()
            + b"\n",
        )
    except CheckpointError:
        lock.release()
        raise
    return lock


def _refusal(folder: Path, owner: dict[str, Any] | None) -> str:
    who = (
        f"pid {owner['pid']} on {owner['host']}, since {owner['since']}"
        if owner
        else f"it holds {LOCK} and has not said who it is"
    )
    return f"{folder} is in use by another run ({who}). Wait for it or end it, or take another --output_dir."


def _owner(folder: Path) -> dict[str, Any] | None:
    """Who wrote running.json; None where nobody did."""
    try:
        found = json.loads((folder / OWNER).read_text())
        return {"host": str(found["host"]), "pid": int(found["pid"]), "since": str(found["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _may_be_alive(owner: dict[str, Any]) -> bool:
    """Of another host nobody can tell."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _bytes_in(folder: Path) -> int:
    return (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if folder.is_dir()
        else 0
    )


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
