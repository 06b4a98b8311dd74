"""A folder is whole or absent. What happens at every system call is tried in runs/test_every_call.py, checkpoints in test_checkpoint.py."""

import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bertdist.core import atomic_io as whole_folder
from bertdist.core.atomic_io import (
    CHECKPOINT_FILES,
    atomic_write,
    find_damage,
    read_json_object,
    recover,
    remove_folder,
    remove_leftover,
    write_folder,
)
from bertdist.core.errors import CheckpointError


def fill(folder: Path) -> None:
    for name in CHECKPOINT_FILES:
        (folder / name).write_bytes(name.encode() * 40)


def test_what_was_moved_away_and_not_replaced_is_put_back(tmp_path: Path) -> None:
    final = tmp_path / "best"
    write_folder(final, fill)
    final.rename(tmp_path / ".best.replaced")
    recover(final)
    assert find_damage(final) is None and os.listdir(tmp_path) == ["best"]
    (tmp_path / ".best.replaced").mkdir()
    recover(final)
    assert find_damage(final) is None, "where it was replaced, the new one stays"
    recover(tmp_path / "none")


def test_a_folder_is_never_half_removed_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "step_000001"
    write_folder(final, fill)

    unlink, calls = Path.unlink, list[Path]()

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        calls.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(final)
    assert os.listdir(tmp_path) == [".step_000001.old"] and len(calls) == 1
    assert remove_leftover(tmp_path / ".step_000001.old") is None and os.listdir(tmp_path) == []


# ---- What a user has added


def test_a_user_s_files_in_a_folder_survive_its_replacement_and_its_removal(tmp_path: Path) -> None:
    final = tmp_path / "best"
    assert write_folder(final, fill) is None
    (final / "onnx").mkdir()
    (final / "onnx" / "model.onnx").write_bytes(b"exported")
    (final / "thesis.txt").write_text("years")
    kept = write_folder(final, fill)
    assert kept == tmp_path / "best.kept" and find_damage(final) is None
    assert sorted(str(x.relative_to(kept)) for x in kept.rglob("*")) == [
        "onnx",
        "onnx/model.onnx",
        "thesis.txt",
    ]
    assert (kept / "thesis.txt").read_text() == "years"
    (final / "more.txt").symlink_to(kept / "thesis.txt")
    assert remove_folder(final) == tmp_path / "best.kept-2"
    assert (tmp_path / "best.kept-2" / "more.txt").read_text() == "years"
    assert sorted(os.listdir(tmp_path)) == ["best.kept", "best.kept-2"]


def test_a_folder_of_a_user_is_kept_as_it_is(tmp_path: Path) -> None:
    """One without a manifest: no run wrote it."""
    final = tmp_path / "best"
    final.mkdir()
    (final / "model.txt").write_text("mine")
    kept = write_folder(final, fill)
    assert kept is not None and (kept / "model.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../thesis.txt", "sub/../../thesis.txt", "{}/thesis.txt", "..", "a\0b"]
)
def test_names_in_a_manifest_read_and_remove_nothing_outside_the_folder(
    name: str, tmp_path: Path
) -> None:
    final, outside = tmp_path / "best", tmp_path / "thesis.txt"
    write_folder(final, fill)
    outside.write_text("years")
    name = name.format(tmp_path)
    manifest = json.loads((final / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 5, "xxh3_128": whole_folder._digest(outside)}
    (final / "manifest.json").write_text(json.dumps(manifest))
    assert find_damage(final) == f"manifest.json names {name!r}, which is not in this folder"
    assert remove_folder(final) is None
    assert os.listdir(tmp_path) == ["thesis.txt"] and outside.read_text() == "years"


def test_a_file_below_a_folder_of_the_manifest_is_inside(tmp_path: Path) -> None:
    """The control of the above."""

    def fill_deep(folder: Path) -> None:
        fill(folder)
        (folder / "a..b").mkdir()
        (folder / "a..b" / "...").write_text("x")

    write_folder(tmp_path / "best", fill_deep)
    assert find_damage(tmp_path / "best") is None


@pytest.mark.parametrize("suffix", ["partial", "replaced", "old"])
def test_a_link_in_place_of_a_leftover_is_not_followed(suffix: str, tmp_path: Path) -> None:
    elsewhere, final = tmp_path / "elsewhere", tmp_path / "best"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("years")
    hidden = tmp_path / f".best.{suffix}"
    hidden.symlink_to(elsewhere)
    with suppress(CheckpointError):  # one line, where it cannot be written over
        write_folder(final, fill)
    if hidden.is_symlink():
        with suppress(CheckpointError):
            remove_leftover(hidden)
    assert (elsewhere / "model.safetensors").read_text() == "years"


def test_json_that_would_fill_the_memory_or_wait_for_ever_is_damaged(tmp_path: Path) -> None:
    write_folder(tmp_path / "best", fill)
    manifest = tmp_path / "best" / "manifest.json"
    os.truncate(manifest, 100 << 30)  # takes no space
    assert find_damage(tmp_path / "best") == "manifest.json cannot be read"
    assert read_json_object(manifest) == {}
    manifest.unlink()
    os.mkfifo(manifest)
    assert find_damage(tmp_path / "best") == "manifest.json cannot be read"
    assert read_json_object(manifest) == {}


def test_a_link_is_neither_replaced_nor_followed(tmp_path: Path) -> None:
    elsewhere, final = tmp_path / "elsewhere", tmp_path / "best"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("years")
    final.symlink_to(elsewhere)
    with pytest.raises(CheckpointError) as caught:
        write_folder(final, fill)
    assert str(caught.value) == (
        f"{final} is a symbolic link to {elsewhere}, and a run replaces best as a whole: "
        "remove the link, or use another --output_dir."
    )
    assert final.is_symlink() and os.listdir(elsewhere) == ["thesis.txt"]
    # Version 0.1.0 renamed the link before it failed.
    final.rename(tmp_path / ".best.replaced")
    assert write_folder(final, fill) is None and find_damage(final) is None
    assert (tmp_path / "best.kept").is_symlink() and os.listdir(elsewhere) == ["thesis.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    def private(folder: Path) -> None:  # as safetensors does
        fill(folder)
        (folder / CHECKPOINT_FILES[0]).chmod(0o600)

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "best", private)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "best").iterdir()} == {mode}


@pytest.mark.parametrize("file", [*CHECKPOINT_FILES, "manifest.json"])
def test_every_flipped_bit_of_every_byte_is_noticed(file: str, tmp_path: Path) -> None:
    """All bits of all bytes: in the manifest a bit may also change a blank, which changes nothing."""
    final = tmp_path / "step_000001"
    write_folder(final, fill)
    whole = (final / file).read_bytes()
    meaning = json.loads((final / "manifest.json").read_text())["files"]
    unnoticed = 0
    for at in range(0, len(whole), 1 if file == "manifest.json" else 17):
        for bit in range(8):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            (final / file).write_bytes(broken)
            if find_damage(final) is None:
                assert file == "manifest.json" and json.loads(broken)["files"] == meaning, (at, bit)
                unnoticed += 1
    assert unnoticed < len(whole), "most are seen"
    (final / file).write_bytes(whole)
    assert find_damage(final) is None


@pytest.mark.parametrize("file", [*CHECKPOINT_FILES, "manifest.json"])
def test_every_truncation_is_noticed(file: str, tmp_path: Path) -> None:
    final = tmp_path / "step_000001"
    write_folder(final, fill)
    whole = (final / file).read_bytes()
    for size in range(len(whole)):
        os.truncate(final / file, size)
        assert find_damage(final) is not None, size
        (final / file).write_bytes(whole)


@pytest.mark.parametrize("file", [*CHECKPOINT_FILES, "manifest.json"])
def test_a_file_of_another_checkpoint_is_noticed(file: str, tmp_path: Path) -> None:
    one, other = tmp_path / "step_000001", tmp_path / "step_000002"
    write_folder(one, fill)
    write_folder(
        other,
        lambda folder: [
            (folder / name).write_bytes(name.encode()[::-1] * 40) for name in CHECKPOINT_FILES
        ],
    )
    (one / file).write_bytes((other / file).read_bytes())
    assert find_damage(one) is not None and find_damage(other) is None


def test_a_file_that_cannot_be_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", fill)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(whole_folder, "_digest", broken)
    assert find_damage(tmp_path / "a") == "model.safetensors cannot be read (Input/output error)"
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_folder(tmp_path / "b", fill)


def test_a_full_disk_says_what_is_needed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError) as caught:
        atomic_write(tmp_path / "a.json", b"x" * 2000)
    full = r"No space left on device \(2 KB needed, [\d.]+ .?B free\)\."
    assert re.fullmatch(
        f"Cannot write {re.escape(str(tmp_path))}/a.json: {full}", str(caught.value)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"
    with pytest.raises(CheckpointError, match=r"\(2 KB or more needed, "):
        atomic_write(tmp_path / "b.jsonl", (b"x" * 1000 for _ in range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def save(folder: Path) -> None:  # as safetensors fails
        (folder / "model.safetensors").write_bytes(b"x")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError) as caught:
        write_folder(tmp_path / "step_1", save, 3_000_000)
    assert " (about 3 MB needed, " in str(caught.value) and "os error" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    monkeypatch.undo()
    atomic_write(tmp_path / "a.json", b"new")  # the control
    assert (tmp_path / "a.json").read_bytes() == b"new"
