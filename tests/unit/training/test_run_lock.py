"""One run at a time per folder; a folder that cannot be written to is an error before any work."""

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
from bertdist.training import run_lock
from bertdist.training.run_lock import LOCK, OWNER, check_disk_space, lock_run_folder

ONE: Any = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)


class OtherRun(NamedTuple):
    """A process that holds the lock."""

    pid: int


@contextmanager
def another_run(folder: Path, worker: bool = False) -> Iterator[OtherRun]:
    """A process that holds the lock; with `worker` a child keeps it open for 2 s longer."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_run_folder(folder, ONE) as messages:
            if worker and fork_without_filelocks_hooks(2):
                os._exit(0)
            os.write(tell, b"".join(line.encode() for line in messages) + b"held")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1000).endswith(b"held")
        yield OtherRun(pid)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def fork_without_filelocks_hooks(seconds: float) -> bool:
    """Fork by libc: filelock closes its file in children of os.fork (older versions did not), but a
    child of vfork or posix_spawn may keep it open. True in the child, after `seconds`."""
    pid = ctypes.CDLL(None).fork()
    if pid == 0:
        time.sleep(seconds)
    return bool(pid == 0)


def test_second_run_is_refused_with_the_owner_and_a_later_run_takes_over(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with another_run(folder) as first:
        with pytest.raises(ConfigError) as caught, lock_run_folder(folder, ONE):
            pass
        owner = f"pid {first.pid} on {socket.gethostname()}, since "
        assert str(caught.value).startswith(f"{folder} is in use by another run ({owner}")
        assert str(caught.value).endswith("). Wait for it, stop it, or use another --output_dir.")
        assert json.loads((folder / OWNER).read_text())["pid"] == first.pid, (
            "the refused run wrote nothing"
        )
    with lock_run_folder(folder, ONE) as messages:
        assert json.loads((folder / OWNER).read_text())["pid"] == os.getpid()
    (message,) = messages
    assert message.startswith(f"Previous run (pid {first.pid} on ")
    assert message.endswith(") did not end cleanly; lock taken over.")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", LOCK]
    with lock_run_folder(folder, ONE) as messages:
        assert messages == [], "a run that ended cleanly leaves no message"


def test_without_a_lock_two_runs_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the lock both runs live."""
    monkeypatch.setattr(
        run_lock,
        "FileLock",
        lambda path: SimpleNamespace(acquire=lambda timeout: None, release=lambda: None),
    )
    with another_run(tmp_path) as first, lock_run_folder(tmp_path, ONE):
        os.kill(first.pid, 0)  # both live


def test_lock_of_a_killed_run_is_taken_over_while_its_worker_lives(tmp_path: Path) -> None:
    with another_run(tmp_path, worker=True) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitpid(first.pid, 0)
        began = time.monotonic()
        with lock_run_folder(tmp_path, ONE) as messages:
            assert "did not end cleanly" in messages[0]
        assert time.monotonic() - began < run_lock.WAIT_SECONDS


def test_run_on_another_host_counts_as_alive(tmp_path: Path) -> None:
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
def test_damaged_owner_file_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(content)
    with lock_run_folder(tmp_path, ONE) as messages:
        assert messages == []


class _Unlockable:
    def __init__(self, path: Path) -> None:
        pass

    def acquire(self, timeout: float) -> None:
        raise OSError(errno.ENOLCK, "No locks available")


def test_disk_without_locks_gives_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "FileLock", _Unlockable)
    with lock_run_folder(tmp_path, ONE) as messages:
        assert messages == [
            f"{tmp_path} cannot be locked (No locks available): start no second run in it."
        ]


def hold(accelerator: Accelerator, folder: Path) -> list[str]:
    with lock_run_folder(folder, accelerator) as messages:
        accelerator.wait_for_everyone()
        return list(messages)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_raise(ranks: int, tmp_path: Path) -> None:
    with another_run(tmp_path) as first, pytest.raises(RankError) as caught:
        run_ranks(ranks, hold, tmp_path)
    assert (
        str(caught.value).count(f"rank 0: {tmp_path} is in use by another run (pid {first.pid}")
        == ranks
    )
    assert [len(messages) for messages in run_ranks(ranks, hold, tmp_path)] == [1] + [0] * (
        ranks - 1
    ), "only rank 0 has messages"


# ---- A folder that cannot be written to


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_unwritable_folder_is_a_checkpoint_error(
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
    assert str(caught.value) == (
        f"Cannot write to {tmp_path / below}: {os.strerror(code)}. "
        "--output_dir must be a folder that this process may write to."
    )


def test_file_in_place_of_the_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(CheckpointError, match=r"^Cannot write to .*out: File exists\."),
        lock_run_folder(tmp_path / "out", ONE),
    ):
        pass


def test_folder_deleted_during_the_run_adds_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock_run_folder(folder, ONE):
        folder.rename(tmp_path / "moved")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("used", "free", "enough"),
    # 4,100 weights: 16,400 bytes, with AdamW's averages 49,200. Two checkpoints, best/: 114,800.
    [
        (0, 114_800, True),
        (0, 114_799, False),
        (60_000, 54_800, True),
        (60_000, 54_799, False),
        (10**9, 49_200, True),
        (10**9, 49_199, 0),
    ],
)
def test_space_for_two_checkpoints_is_required(
    used: int, free: int, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    (tmp_path / "checkpoints").mkdir()
    with open(tmp_path / "checkpoints" / "old", "wb") as file:
        file.truncate(used)
    model = nn.Linear(40, 100)
    if enough:
        assert check_disk_space(tmp_path, model, ONE).startswith("Checkpoint size: about 49.2 KB; ")
    else:
        with pytest.raises(
            BertdistError, match=r"are needed for 2 checkpoints and best/: free some space\.$"
        ):
            check_disk_space(tmp_path, model, ONE)
