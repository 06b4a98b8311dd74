"""What is printed to a terminal is shown literally."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import (
    print_error,
    print_to_stderr,
    printable,
    printable_json,
    show,
    show_table,
)


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
        and "\\x1b[2J[/]" in out
        and "[i]line\\x07" in out
    )
    assert "\x1b" not in out and "\x07" not in out and error == ""


def test_a_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (40, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_table("t", ["a", "b"], [["word " * 50, "x" * 200]])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


# What ends a line, moves the cursor, reorders what is beside it, or cannot be encoded.
HARMFUL = [
    *("\n", "\r", "\t", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029"),
    *("\u202a", "\u202e", "\u2066", "\u2069", "\u200e", "\u200f", "\u061c", "\ud800"),
]


@pytest.mark.parametrize("harmful", HARMFUL, ids=ascii)
def test_every_line_escapes_what_could_reorder_or_break_it(
    harmful: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    label = f"a{harmful}z"
    escaped = f"a{ascii(harmful)[1:-1]}z"
    show(label)
    print_to_stderr(label)
    show_table("t", ["h"], [[label]])
    out, error = capsys.readouterr()
    assert error == f"{escaped}\n" and out.splitlines()[0] == escaped
    assert out.count(escaped) == 2 and harmful not in out.replace("\n", "")
    assert printable(label) == escaped != label


def test_letters_of_any_script_are_shown_as_they_are() -> None:
    words = "naïve 中文\u3000好 שלום \u06cc\u200c\u0646 👩\u200d💻 a\u00a0b"
    assert printable(words) == words == printable_json(words)


def test_json_lines_keep_their_values() -> None:
    values = [{"label": label} for label in HARMFUL]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    shown = printable_json(lines)
    assert [json.loads(line) for line in shown.split("\n")[:-1]] == values
    assert printable(shown.replace("\n", "")) == shown.replace("\n", "")
    assert printable(lines.replace("\n", "")) != lines.replace("\n", "")  # the control
