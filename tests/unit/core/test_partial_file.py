"""A file written in parts is whole or absent, and a second process continues where the first saved."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from bertdist.core.atomic_io import partial_path
from bertdist.core.errors import CheckpointError, DataError
from bertdist.core.partial_file import (
    InPlaceFile,
    OutputClosed,
    PartialFile,
    partial_paths,
    stamp_of,
)

KEY = {"input": ["a.csv", 3], "settings": {"top_k": None}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_after(
    target: Path, parts: list[bytes], saved: int, key: dict[str, object] = KEY
) -> None:
    """A process that appended all parts, saved after `saved` of them, and was killed."""
    file = PartialFile(target, key)
    for number, part in enumerate(parts, 1):
        file.append(part)
        if number == saved:
            file.save({"parts": number})
    file._file.flush()  # what the system wrote by itself
    file._file.close()


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with PartialFile(target, KEY) as file:
        file.append(b"new ")
        file.save({"row": 1})
        assert target.read_bytes() == b"old" and len(names(tmp_path)) == 3
        file.append(b"whole")
        file.finish()
    assert target.read_bytes() == b"new whole" and names(tmp_path) == ["out.csv"]
    assert target.stat().st_mode & 0o777 == 0o640


def test_the_next_process_cuts_off_what_was_not_saved_and_continues(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    killed_after(target, [b"one,", b"two,", b"thr"], saved=2)
    assert not target.exists()
    with PartialFile(target, KEY) as file:
        assert file.saved == {"parts": 2} and file.notes == []
        file.append(b"three")
        file.finish()
    assert target.read_bytes() == b"one,two,three" and names(tmp_path) == ["out.csv"]


def test_another_key_begins_again_and_says_what_differs(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    killed_after(target, [b"one,", b"two,"], saved=1)
    with PartialFile(target, {**KEY, "input": ["a.csv", 4]}) as file:
        assert file.saved is None
        (note,) = file.notes
        assert note.endswith(
            ".out.csv.partial is of another command (input differ): beginning again."
        )
        file.append(b"new")
        file.finish()
    assert target.read_bytes() == b"new"


def test_a_partial_file_that_lost_bytes_begins_again(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    killed_after(target, [b"one,", b"two,"], saved=2)
    os.truncate(partial_paths(target)[0], 3)
    with PartialFile(target, KEY) as file:
        assert file.saved is None and "is shorter than it was" in file.notes[0]


def test_nothing_is_left_where_nothing_was_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError), PartialFile(tmp_path / "out.csv", KEY) as file:
        file.append(b"part")
        raise ValueError
    assert names(tmp_path) == []
    with pytest.raises(ValueError), PartialFile(tmp_path / "out.csv", KEY) as file:
        file.append(b"part")
        file.save({"row": 1}, now=False)  # too early
        file.save({"row": 1})
        raise ValueError
    assert names(tmp_path) == [".out.csv.partial", ".out.csv.partial.json"], "the control"


@pytest.mark.parametrize("error", [DataError("rows.csv line 7"), RuntimeError("a rank is gone")])
def test_the_state_has_the_error_that_would_come_again(tmp_path: Path, error: Exception) -> None:
    """launch/predict.slurm reads it: the job is not requeued. Others end with the rank or node."""
    target = tmp_path / "out.csv"
    with pytest.raises(type(error)), PartialFile(target, KEY) as file:
        file.append(b"one,")
        file.save({"row": 1})
        raise error
    state = json.loads(partial_paths(target)[1].read_text())
    assert state.get("error") == ("rows.csv line 7" if isinstance(error, DataError) else None)
    with PartialFile(target, KEY) as file:
        assert file.saved == {"row": 1}
        file.save({"row": 2})
        assert "error" not in json.loads(partial_paths(target)[1].read_text())


def test_a_stranger_is_never_replaced(tmp_path: Path) -> None:
    one, two = partial_paths(tmp_path / "out.csv")
    whole, other = tmp_path / ".out.csv.whole", json.dumps({"format": "other"})
    for stranger, content in ((one, "mine"), (two, "mine"), (two, other), (whole, "")):
        stranger.write_text(content)
        with pytest.raises(CheckpointError, match="is not of an unfinished prediction: rename or"):
            PartialFile(tmp_path / "out.csv", KEY)
        assert stranger.read_text() == content
        stranger.unlink()


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "out.csv", KEY) as file:
        file.append(b"first")
        with pytest.raises(CheckpointError, match="is being written by another process"):
            PartialFile(tmp_path / "out.csv", KEY)
        file.finish()
    assert (tmp_path / "out.csv").read_bytes() == b"first"


def test_a_conversion_that_fails_can_be_repeated(tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"

    def convert(source: IO[bytes], whole: IO[bytes]) -> None:
        whole.write(source.read().upper())

    def fail(source: IO[bytes], whole: IO[bytes]) -> None:
        whole.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"), PartialFile(target, KEY) as file:
        file.append(b"abc")
        file.save({"row": 3})
        file.finish(fail)
    assert names(tmp_path) == [".out.parquet.partial", ".out.parquet.partial.json"]
    (tmp_path / ".out.parquet.whole").write_text("half")  # as after SIGKILL
    with PartialFile(target, KEY) as file:
        assert file.saved == {"row": 3}
        file.finish(convert)
    assert target.read_bytes() == b"ABC"


def test_a_stamp_changes_with_size_and_time_and_a_missing_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("a")
    before = stamp_of([path, tmp_path / "nowhere"])
    assert len(before) == 1 and stamp_of([path]) == before
    path.write_text("ab")
    assert stamp_of([path]) != before
    os.utime(path, ns=(0, 0))
    assert stamp_of([path])[0][2] == 0


def test_what_closes_a_stream_is_no_error_of_writing() -> None:
    def closed(part: bytes) -> None:
        raise BrokenPipeError

    def full(part: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputClosed):
        InPlaceFile(closed, "standard output", False).append(b"a")
    with pytest.raises(CheckpointError, match="Cannot write standard output: No space left"):
        InPlaceFile(full, "standard output", False).append(b"a")


def test_a_stream_of_a_format_that_is_converted_is_written_at_the_end() -> None:
    written: list[bytes] = []
    with InPlaceFile(written.append, "standard output", True) as stream:
        stream.append(b"abc")
        assert written == []
        stream.finish(lambda source, whole: whole.write(source.read()[::-1]) and None)
    assert written == [b"cba"]


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can be flushed to the disk."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def test_a_full_disk_says_how_much_is_written_and_leaves_what_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.csv"
    with PartialFile(target, KEY) as file:
        file.append(b"x" * 1000)
        with full_disk(monkeypatch), pytest.raises(CheckpointError) as caught:
            file.save({"row": 1})
    message = str(caught.value).split(" so far, ")
    assert message[0] == f"Cannot write {file.path}: No space left on device (1 KB"
    assert message[1].endswith(" free).") and names(tmp_path) == []
    with PartialFile(target, KEY) as file:
        file.append(b"one,")
        file.save({"row": 1})
        file.append(b"two")
        with full_disk(monkeypatch), pytest.raises(CheckpointError) as caught:
            file.save({"row": 2})
        assert str(caught.value).endswith(" free). The same command continues from here.")
    assert names(tmp_path) == [".out.csv.partial", ".out.csv.partial.json"]
    with PartialFile(target, KEY) as file:
        assert file.saved == {"row": 1}
        leftover = partial_path(partial_paths(target)[1])  # of a process that was killed meanwhile
        leftover.write_text("{")
        (tmp_path / "..other.csv.partial.json.partial").write_text("{")  # the control
        file.finish()
    assert target.read_bytes() == b"one,"
    assert names(tmp_path) == ["..other.csv.partial.json.partial", "out.csv"]
