"""A folder is whole or absent. What happens at every system call is tried in runs/test_every_call.py, checkpoints in test_checkpoint.py."""

import json
import os
from pathlib import Path

import pytest

from bertdist.core import atomic_io as whole_folder
from bertdist.core.atomic_io import (
    CHECKPOINT_FILES,
    find_damage,
    recover,
    remove_folder,
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

    def killed(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_folder.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(final)
    assert os.listdir(tmp_path) == [".step_000001.old"]


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
