"""One run at a time per folder; a folder that cannot be written to is an error before any work."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import tempfile
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

from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError, CheckpointError, ConfigError, DataError
from bertdist.core.output_files import LOCK, OWNER
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.watchdog import open_watchdog
from bertdist.training import run_lock
from bertdist.training.run_lock import (
    check_disk_space,
    check_run_folder,
    claim_run_folder,
    lock_run_folder,
)

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


@pytest.mark.parametrize("is_there", [False, True])
def test_a_removed_owner_that_a_network_disk_still_shows_is_no_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    owner = {"host": "elsewhere", "pid": 7, "since": "then"}
    monkeypatch.setattr(run_lock, "read_owner", lambda folder: owner)
    if is_there:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / OWNER).write_text(json.dumps(owner))
    with lock_run_folder(tmp_path, ONE) as messages:
        assert len(messages) == is_there


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
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / LOCK).touch()
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


# ---- A folder with files that no run wrote


def snapshot(folder: Path) -> dict[str, tuple[Any, bytes]]:
    """Everything in it: inode and mode, content of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content = (
            os.readlink(path).encode()
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else b""
        )
        found[str(path.relative_to(folder))] = (
            (stat.st_ino, stat.st_mode, stat.st_mtime_ns),
            content,
        )
    return found


def put(folder: Path, *names: str) -> Path:
    """Files of one line; a name that ends with / is a folder."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("years of work")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "best/thesis.txt",
        "checkpoints/.step_notes/a.txt",
        "checkpoints/.probe.1/a.txt",
        "config.yaml",
        "environment.json",
        "status.json",
        "running.json",
        "run.lock/a",
        "predictions.jsonl",
        "train.jsonl",
        "sub/",
        ".ranks/rank_0.json",
        ".best.partial/thesis.txt",
        ".best.replaced/thesis.txt",
        ".config.yaml.partial",
    ],
)
def test_a_folder_of_a_user_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    folder = put(tmp_path / "out", name)
    before, shown = snapshot(folder), name.split("/")[0]
    with pytest.raises(ConfigError) as caught, lock_run_folder(folder, ONE):
        pass
    assert str(caught.value) == (
        f"--output_dir {folder} holds {shown!r}, which no run wrote: give a folder that is new, "
        "empty or of an earlier run."
    )
    with pytest.raises(ConfigError, match="which no run wrote"):
        claim_run_folder(folder)
    assert snapshot(folder) == before
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="which no run wrote"):
        check_run_folder(tmp_path / "link")


def test_the_number_of_other_files_is_told(tmp_path: Path) -> None:
    put(tmp_path, "b.txt", "a.txt", "run.log")
    with pytest.raises(ConfigError, match=r"holds 'a\.txt' and 1 more, which no run wrote"):
        check_run_folder(tmp_path)


def refused(accelerator: Accelerator, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, lock_run_folder(folder, accelerator):
        pass
    return str(caught.value)


def test_a_folder_of_a_user_is_refused_on_all_ranks(tmp_path: Path) -> None:
    before = snapshot(put(tmp_path / "out", "thesis.txt"))
    answers = run_ranks(3, refused, tmp_path / "out")
    assert len(set(answers)) == 1 and "holds 'thesis.txt', which no run wrote" in answers[0]
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("files", "contents"),
    [
        ([], {}),
        (["train.log", "slurm-1.out", "slurm-1.err", "lost+found/", ".gitignore"], {}),
        # a run that was killed in its first second
        (["checkpoints/"], {}),
        (["checkpoints/.probe.77", ".probe.77"], {}),
        (["checkpoints/", "run.lock", ".running.json.partial"], {}),
        # runs of any version, with what users put beside their files
        (["run.lock", "best/model.safetensors", "notes.txt", "checkpoints/step_000001/a"], {}),
        (["config.yaml", "notes.txt"], {"environment.json": {"packages": {"bertdist": "0.1.0"}}}),
        (["best/a"], {"status.json": {"state": "finished", "step": 2, "reason": ""}}),
        (["checkpoints/"], {"running.json": {"host": "a", "pid": 2**22, "since": "then"}}),
    ],
)
def test_a_new_folder_and_that_of_a_run_are_taken(
    files: list[str], contents: dict[str, Any], tmp_path: Path
) -> None:
    put(tmp_path, *files)
    for name, value in contents.items():
        (tmp_path / name).write_text(json.dumps(value))
    check_run_folder(tmp_path)


def test_a_lock_of_another_program_does_not_make_a_folder_a_run_s(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_run_folder(tmp_path)  # alone it is nothing that could be lost
    for name in ("predictions.jsonl", "config.yaml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'config\.yaml' and 1 more, which no run wrote"):
        check_run_folder(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # which a run makes before it takes the lock
    check_run_folder(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"packages": []}', '{"packages": {"torch": "2"}}', "{"])
def test_a_file_of_the_same_name_does_not_make_a_folder_a_run_s(
    content: str, tmp_path: Path
) -> None:
    for name in ("environment.json", "status.json", "running.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"holds 'environment\.json' and 2 more"):
        check_run_folder(tmp_path)


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "folds" / "0"
    claim_run_folder(folder)
    put(folder, "train.jsonl")
    (folder / "status.json").write_text('{"state": "finished", "step": 9, "reason": ""}')
    before = snapshot(folder)
    claim_run_folder(folder)
    assert snapshot(folder) == before
    with lock_run_folder(folder, ONE) as messages:
        assert messages == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "run.lock", "stacks", ".ranks"])
@pytest.mark.parametrize("target", ["thesis.txt", "missing"])
def test_a_link_in_place_of_a_file_of_the_run_is_refused(
    name: str, target: str, tmp_path: Path
) -> None:
    folder = put(tmp_path / "out", "environment.json", "best/model")
    (folder / "environment.json").write_text('{"packages": {"bertdist": "1"}}')
    put(tmp_path, "thesis.txt")
    (folder / name).symlink_to(tmp_path / target)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError) as caught, lock_run_folder(folder, ONE):
        pass
    assert str(caught.value) == (
        f"{folder / name} is a symbolic link, and a run replaces this file: remove the link, or "
        "use another --output_dir."
    )
    assert snapshot(tmp_path) == before


def test_the_folder_and_its_checkpoints_may_be_links(tmp_path: Path) -> None:
    put(tmp_path, "disk/", "large_disk/")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "checkpoints").symlink_to(tmp_path / "large_disk")
    with lock_run_folder(tmp_path / "out", ONE):
        assert (tmp_path / "disk" / LOCK).is_file()


# ---- A folder that cannot be written to


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_unwritable_folder_is_a_checkpoint_error(
    code: int, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary_file = tempfile.TemporaryFile

    def refuse(dir: Path, **settings: Any) -> Any:
        if dir == tmp_path / below:
            raise OSError(code, os.strerror(code), str(dir))
        return temporary_file(dir=dir, **settings)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(CheckpointError) as caught, lock_run_folder(tmp_path, ONE):
        pass
    assert str(caught.value) == (
        f"Cannot write to {tmp_path / below}: {os.strerror(code)}. "
        "--output_dir must be a folder that this process may write to."
    )


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(ConfigError, match=r"^--output_dir .*out is a file; name a folder\.$"),
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


STATUS_0 = '{"state": "failed", "step": 0, "reason": "x"}'


def fail(folder: Path, files: dict[str, str], error: BaseException | None = None) -> None:
    """A start that writes files and fails."""
    with pytest.raises(BaseException, match="no model"), lock_run_folder(folder, ONE):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        raise error or ConfigError("no model")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"survey.json": "{}", "bad_rows.jsonl": "{}", "metrics.jsonl": ""},
        {"config.yaml": "", "environment.json": "{}", "status.json": STATUS_0},
        {"folds/0/train.jsonl": "{}", "folds/0/status.json": STATUS_0},
    ],
)
def test_a_failed_start_leaves_nothing(files: dict[str, str], tmp_path: Path) -> None:
    fail(tmp_path / "deep" / "out", files)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.log").write_text("")  # the command's own output
    fail(tmp_path / "mine", files, ValueError("no model"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["run.log"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metrics.jsonl": "{}\n"}, "no model"),  # a step was taken
        ({"status.json": STATUS_0.replace("0", "1")}, "no model"),
        ({"checkpoints/step_000001/manifest.json": "{}"}, "no model"),
        ({"bertdist/events": ""}, "no model"),  # of a tracker, or a user
        ({"train.txt": ""}, "no model"),
        ({"nan_rows.jsonl": "{}"}, "no model"),
        ({"bad_rows.jsonl": "{}"}, "no model: see bad_rows.jsonl"),
    ],
)
def test_a_failed_run_keeps_its_files(files: dict[str, str], message: str, tmp_path: Path) -> None:
    fail(tmp_path / "out", files, DataError(message))
    assert {*map(str, files)} <= {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")
    }
    assert (tmp_path / "out" / LOCK).exists(), "still the folder of a run"


def test_a_failed_start_removes_only_what_it_made(tmp_path: Path) -> None:
    fail(tmp_path, {"metrics.jsonl": "{}\n"})
    before = snapshot(tmp_path)
    fail(tmp_path, {"config.yaml": "", "status.json": STATUS_0})
    assert snapshot(tmp_path) == before
    with lock_run_folder(tmp_path / "new", ONE):
        (tmp_path / "new" / "status.json").write_text(STATUS_0)
    assert (tmp_path / "new" / LOCK).exists(), "a run that ends, or is stopped, keeps its folder"


def test_a_refused_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_acquire", lambda *_: refuse())

    def refuse() -> None:
        raise ConfigError("no model")

    with pytest.raises(ConfigError), lock_run_folder(tmp_path / "a" / "b", ONE):
        pass
    assert list(tmp_path.iterdir()) == []


def fail_on_all_ranks(accelerator: Accelerator, folder: Path) -> None:
    with (
        pytest.raises(ConfigError),
        lock_run_folder(folder, accelerator),
        open_watchdog(folder, accelerator, RunConfig()),
        raise_on_all_ranks(accelerator),
    ):
        raise ConfigError("no model")


def test_several_ranks_leave_nothing(tmp_path: Path) -> None:
    run_ranks(2, fail_on_all_ranks, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
