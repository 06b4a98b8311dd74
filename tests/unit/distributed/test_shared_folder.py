"""A folder of all nodes, by tasks that are threads; a folder of each node's own is planted."""

import fcntl
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bertdist.distributed import shared_folder
from bertdist.distributed.shared_folder import (
    HANDLERS,
    examine_folder,
    file_system,
    try_lock,
    wait_for,
)
from bertdist.distributed.task_exchange import Exchange, Place, create_server, serve


def examine(
    folder: Path, other: dict[str, Callable[..., Any]], wait: float = 0.3
) -> shared_folder.FolderResult:
    """other: handlers of the second task, by name, in place of the usual ones."""
    with create_server(0) as probe:
        port = probe.getsockname()[1]
    place = Place(0, 2, "127.0.0.1", min(port, 65000), "test")

    def answer() -> None:
        with suppress(SystemExit):  # of a task that ends
            serve(place._replace(rank=1), {**HANDLERS, **other}, 10.0)

    task = threading.Thread(target=answer)
    task.start()
    try:
        with Exchange(place, HANDLERS, 10.0) as tasks:
            return examine_folder(tasks, str(folder), wait)
    finally:
        task.join(10)


def elsewhere(folder: Path, own: Path) -> dict[str, Callable[..., Any]]:
    """Handlers of a task on whose node `folder` is another one."""

    def moved(name: str) -> Callable[..., Any]:
        return lambda path, **more: HANDLERS[name](path.replace(str(folder), str(own)), **more)

    return {name: moved(name) for name in HANDLERS}


def test_a_shared_folder(tmp_path: Path) -> None:
    found = examine(tmp_path, {})
    assert not (
        found.made or found.missing or found.unseen or found.unwritable or found.unseen_here
    )
    assert found.compared == 1 and found.unlocked == () and found.lock_error == ""
    assert found.replaced is not None and 0 <= found.seconds < 0.3 and found.fsync > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_each_node(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    found = examine(tmp_path / "mine", elsewhere(tmp_path / "mine", tmp_path / "theirs"))
    assert found.unseen == (1,) or found.missing == (1,)
    assert list(tmp_path.rglob("*.partial")) == [] and len(list(tmp_path.rglob("*"))) == 2


def test_a_folder_that_one_node_lacks(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    found = examine(tmp_path / "mine", elsewhere(tmp_path / "mine", tmp_path / "none"))
    assert found.missing == (1,)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert examine(tmp_path / "none", {}).made == "No such file or directory"

    def read_only(path: str, content: str) -> float:
        raise OSError(30, "Read-only file system")

    assert "Read-only" in examine(tmp_path, {"write": read_only}).unwritable[1]


def test_a_task_that_ends_meanwhile_is_not_compared(tmp_path: Path) -> None:
    found = examine(tmp_path, {"look": lambda path: sys.exit()})
    assert found.compared == 0 and found.unseen == ()


def test_a_stale_file_is_seen(tmp_path: Path) -> None:
    def stale(path: str, content: str, seconds: float) -> float | None:
        return wait_for(path, content, seconds) if content == "1" else None

    assert examine(tmp_path, {"wait_for": stale}).replaced is None


def test_files_that_do_not_come_back_are_seen(tmp_path: Path) -> None:
    assert examine(tmp_path, {"write": lambda path, content: 0.01}).unseen_here == (1,)


def test_locks_of_one_node_only_are_seen(tmp_path: Path) -> None:
    assert examine(tmp_path, {"try_lock": lambda path: "got"}).unlocked == (1,)

    def no_locks(path: str) -> str:
        raise OSError(37, "No locks available")

    assert "No locks available" in examine(tmp_path, {"try_lock": no_locks}).lock_error


def test_a_lock_that_is_held_is_busy(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert try_lock(f"{tmp_path}/x") == "got"
    with open(tmp_path / "x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert try_lock(f"{tmp_path}/x") == "busy"


def test_the_file_system_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "overlay / overlay rw 0 0\nfs:/x /shared nfs4 rw 0 0\nb /my\\040disk ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: mounts)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    found = [file_system(x) for x in ("/shared/me", "/sharedother", "/my disk/a", "/shared")]
    assert found == ["nfs4 on /shared", "overlay on /", "ext4 on /my disk", "nfs4 on /shared"]
