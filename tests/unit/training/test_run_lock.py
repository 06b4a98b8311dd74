"""One run at a time in a folder; what cannot be written to is told before any time is spent."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from torch import nn

from bertdist.core.errors import BertdistError, CheckpointError, ConfigError
from bertdist.training import run_lock as run_folder
from bertdist.training.run_lock import LOCK, OWNER, check_disk_space, lock_run_folder

ONE: Any = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)


class Other(NamedTuple):
    """Another process."""

    pid: int


@contextmanager
def another_run(folder: Path, worker: bool = False) -> Iterator[Other]:
    """A process that holds the folder; with `worker` it has a child that lives 2 s longer, and the lock in it."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_run_folder(folder, ONE) as told:
            if worker and child_of_a_fork_that_filelock_does_not_see(2):
                os._exit(0)
            os.write(tell, b"".join(line.encode() for line in told) + b"held")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1000).endswith(b"held")
        yield Other(pid)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def child_of_a_fork_that_filelock_does_not_see(seconds: float) -> bool:
    """filelock closes its file in forked children; older ones did not, and a child by vfork or posix_spawn may keep it: so a raw fork."""
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        time.sleep(seconds)
    return bool(pid == 0)


def test_the_second_run_is_refused_by_name_and_the_third_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with another_run(folder) as first:
        with pytest.raises(ConfigError) as caught, lock_run_folder(folder, ONE):
            pass
        words = (
            rf"{folder} is in use by another run (pid {first.pid} on {socket.gethostname()}, since "
        )
        assert str(caught.value).startswith(words)
        assert str(caught.value).endswith("). Wait for it or end it, or take another --output_dir.")
        assert json.loads((folder / OWNER).read_text())["pid"] == first.pid, (
            "the refused one wrote nothing"
        )
    with lock_run_folder(folder, ONE) as told:
        assert json.loads((folder / OWNER).read_text())["pid"] == os.getpid()
    assert (
        told == [told[0]]
        and told[0].startswith(f"The run before (pid {first.pid} on ")
        and told[0].endswith("taken over.")
    )
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", LOCK]
    with lock_run_folder(folder, ONE) as told:
        assert told == [], "one that ended by itself leaves nothing to say"


def test_without_a_lock_two_runs_would_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the lock is for."""
    monkeypatch.setattr(
        run_folder,
        "FileLock",
        lambda path: SimpleNamespace(acquire=lambda timeout: None, release=lambda: None),
    )
    with another_run(tmp_path) as first, lock_run_folder(tmp_path, ONE):
        os.kill(first.pid, 0)  # both live


def test_a_killed_runs_lock_is_taken_over_even_while_its_worker_lives(tmp_path: Path) -> None:
    with another_run(tmp_path, worker=True) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitpid(first.pid, 0)
        began = time.monotonic()
        with lock_run_folder(tmp_path, ONE) as told:
            assert "did not end by itself" in told[0]
        assert time.monotonic() - began < run_folder.PATIENCE_SECONDS


def test_another_hosts_run_is_never_taken_for_dead(tmp_path: Path) -> None:
    with another_run(tmp_path):
        (tmp_path / OWNER).write_text(
            json.dumps({"host": "elsewhere", "pid": 2**22 + 1, "since": "then"})
        )
        with (
            pytest.raises(
                ConfigError, match=r"another run \(pid 4194305 on elsewhere, since then\)"
            ),
            lock_run_folder(tmp_path, ONE),
        ):
            pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": "a"}', '{"host": "a", "pid": "x", "since": ""}', "\0"]
)
def test_a_torn_owner_is_no_owner(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(content)
    with lock_run_folder(tmp_path, ONE) as told:
        assert told == []


class _Unlockable:
    def __init__(self, path: Path) -> None:
        pass

    def acquire(self, timeout: float) -> None:
        raise OSError(errno.ENOLCK, "No locks available")


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "FileLock", _Unlockable)
    with lock_run_folder(tmp_path, ONE) as told:
        assert told == [
            f"{tmp_path} cannot be locked (No locks available): start no second run in it."
        ]


def hold(accelerator: Accelerator, folder: Path) -> list[str]:
    with lock_run_folder(folder, accelerator) as told:
        accelerator.wait_for_everyone()
        return list(told)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_hear_of_it(ranks: int, tmp_path: Path) -> None:
    with another_run(tmp_path) as first, pytest.raises(RankError) as caught:
        run_ranks(ranks, hold, tmp_path)
    assert (
        str(caught.value).count(f"rank 0: {tmp_path} is in use by another run (pid {first.pid}")
        == ranks
    )
    assert [len(told) for told in run_ranks(ranks, hold, tmp_path)] == [1] + [0] * (ranks - 1), (
        "rank 0 talks"
    )


# ---- A folder that cannot be written to


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_folder_that_takes_no_file_is_one_line(
    code: int, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def refuse(self: Path, data: bytes) -> int:
        if self.parent == tmp_path / below:
            raise OSError(code, os.strerror(code), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(CheckpointError) as caught, lock_run_folder(tmp_path, ONE):
        pass
    place = tmp_path / below
    assert str(caught.value) == (
        f"Cannot write to {place}: {os.strerror(code)}. --output_dir must be a folder that this process may write to."
    )


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(CheckpointError, match=r"^Cannot write to .*out: File exists\."),
        lock_run_folder(tmp_path / "out", ONE),
    ):
        pass


def test_a_folder_that_vanishes_meanwhile_ends_without_another_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock_run_folder(folder, ONE):
        folder.rename(tmp_path / "moved")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("there", "free", "enough"),
    # 4,100 weights: 16,400 bytes, and 49,200 with AdamW's averages. Two checkpoints and best/: 114,800.
    [
        (0, 114_800, True),
        (0, 114_799, False),
        (60_000, 54_800, True),
        (60_000, 54_799, False),
        (10**9, 49_200, True),
        (10**9, 49_199, 0),
    ],
)
def test_two_checkpoints_must_have_room(
    there: int, free: int, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    (tmp_path / "checkpoints").mkdir()
    with open(tmp_path / "checkpoints" / "old", "wb") as file:
        file.truncate(there)
    model = nn.Linear(40, 100)
    if enough:
        assert check_disk_space(tmp_path, model, ONE).startswith(
            "A checkpoint takes about 49.2 KB; "
        )
    else:
        with pytest.raises(
            BertdistError, match=r"are needed for 2 checkpoints and best/: make room\.$"
        ):
            check_disk_space(tmp_path, model, ONE)
