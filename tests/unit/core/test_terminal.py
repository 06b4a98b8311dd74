"""What is printed to a terminal is shown literally."""

import os
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import print_error, show, show_table


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_reader_finds_the_old_file_or_the_new_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    atomic_write(path, b"old")

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, call, die)
        atomic_write(path, b"new and longer")
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_file_is_flushed_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1]
        )
    atomic_write(tmp_path / "a", b"x")
    assert done == ["fsync", "replace"]


def test_an_error_is_shown_line_by_line(capfd: pytest.CaptureFixture[str]) -> None:
    print_error(BertdistError("first\nsecond [x]"))
    assert capfd.readouterr() == ("", "bertdist: first\nbertdist: second [x]\n")


def test_a_table_shows_its_cells_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show_table(
        "[b]title[/b]",
        ["[red]a", "b"],
        [["[bold]x", [("\x1b[2J", "bold red"), ("[/]", "")]]],
        right=[1],
        lines=True,
    )
    show("[i]line\x07")
    out, error = capsys.readouterr()
    assert (
        "[b]title[/b]" in out
        and "[red]a" in out
        and "[bold]x" in out
        and "\ufffd[2J[/]" in out
        and "[i]line\ufffd" in out
    )
    assert "\x1b" not in out and "\x07" not in out and error == ""


def test_a_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (40, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_table("t", ["a", "b"], [["word " * 50, "x" * 200]])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= columns
