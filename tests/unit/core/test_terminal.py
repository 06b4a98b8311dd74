"""What is printed to a terminal is shown literally."""

import io
import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from bertdist.core import terminal
from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import (
    NotebookOutput,
    ProgressBar,
    byte_size,
    close_broken,
    count_in_words,
    encodable,
    escape_unencodable,
    plain_text,
    print_error,
    print_json,
    print_lines,
    print_to_stderr,
    printable,
    process_rank,
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


def test_letters_of_any_script_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = "naïve 中文\u3000好 שלום \u06cc\u200c\u0646 👩\u200d💻 a\u00a0b"
    print_json(words)
    assert printable(words) == words == capsys.readouterr().out


def test_json_lines_keep_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    values = [{"label": label} for label in HARMFUL]
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    print_json(lines)
    shown = capsys.readouterr().out
    assert [json.loads(line) for line in shown.split("\n")[:-1]] == values
    assert printable(shown.replace("\n", "")) == shown.replace("\n", "")
    assert printable(lines.replace("\n", "")) != lines.replace("\n", "")  # the control


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_another_encoding_shows_escapes_and_json_keeps_its_values(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = "schön 北京 🙂 \ud800"
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    if encoding != "ascii":
        out.write("é")
    with pytest.raises(UnicodeEncodeError):  # the control
        out.write(label)
    escape_unencodable()
    print(label)
    show_table("t", ["h"], [[label]])
    print_error(BertdistError(label))
    expected = label.encode(encoding, "backslashreplace").decode(encoding)
    for stream, lines in ((out, 2), (error, 1)):
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding).count(expected) == lines  # type: ignore[attr-defined]
    out.buffer.seek(0)
    out.buffer.truncate()
    print_json(json.dumps({"label": label}, ensure_ascii=False) + "\n")
    out.flush()
    written = out.buffer.getvalue()  # type: ignore[attr-defined]
    assert written.isascii() and json.loads(written) == {"label": label}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LONG = "/a/" + "folder/" * 12 + "train.tsv"


def test_on_a_terminal_lines_wrap_between_words_and_paths_stay_whole() -> None:
    out = Terminal()
    console = Console(file=out, width=40, force_terminal=True, color_system=None)
    words = f"bertdist: {LONG}: no such file. Did you mean the file that is beside it, or another?"
    print_lines(console, words, "--model_name_or_path is-a-flag-that-is-not-broken")
    lines = out.getvalue().splitlines()
    assert " ".join(line.strip() for line in lines[:-2]) == words
    assert lines[1] == f"{LONG}:" and max(len(line) for line in lines if LONG not in line) <= 40
    assert [line.strip() for line in lines[-2:]] == [
        "--model_name_or_path",
        "is-a-flag-that-is-not-broken",
    ]


def test_elsewhere_a_message_is_one_line() -> None:
    out = io.StringIO()
    print_lines(Console(file=out, width=40, force_terminal=True), "word " * 30, "next")
    assert out.getvalue() == "word " * 30 + "\nnext\n"


def test_sizes_and_counts_are_short() -> None:
    sizes = [byte_size(x) for x in (0, 12, 999.6, 820_000, 1_320_000_000, 2e15)]
    assert sizes == ["0 B", "12 B", "1 KB", "820 KB", "1.32 GB", "2e+03 TB"]
    assert [count_in_words(n) for n in (37_922, 109_483_778, 2_500_000_000)] == [
        "37,922",
        "109 million",
        "2.5 billion",
    ]


def test_a_notebook_gets_plain_text_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = f"{'word ' * 40}train_rows"
    print_to_stderr(long)
    assert capsys.readouterr() == ("", f"{long}\n")  # the control
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    print_to_stderr(long)
    show_table("Rows", ["name"], [["train_rows"]])
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith(f"{long}\nRows\n") and "<" not in shown.out


def test_a_bar_on_the_terminal_leaves_standard_output_to_its_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, error = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    with ProgressBar("Predicted", "rows") as progress:
        progress.update(1, 0.5)
        print("an answer")
        print_to_stderr("A message.")
        progress.update(2, 1.0)
    print_to_stderr("After it.")
    assert out.getvalue() == "an answer\n"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", error.getvalue())
    assert "Predicted 2 rows" in shown and "an answer" not in shown
    lines = re.split("[\r\n]+", shown)
    assert "A message." in lines and "After it." in lines, "lines of their own"


class Drawn:
    """Stands for IPython's DisplayHandle."""

    def __init__(self) -> None:
        calls.append(("created", {}))

    def display(self, data: dict[str, str], raw: bool) -> None:
        calls.append(("display", data))

    def update(self, data: dict[str, str], raw: bool) -> None:
        calls.append(("update", data))


calls: list[tuple[str, dict[str, str]]] = []


def test_a_notebook_has_one_output_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("IPython").display, "DisplayHandle", Drawn)
    calls.clear()
    output = NotebookOutput()
    output.draw(plain_text("<b>&[red]\x1b"))
    output.draw(Text("bold", style="bold"), Text("second line"))
    (_, (first, shown), (second, again)) = calls
    assert (first, second) == ("display", "update")
    assert "&lt;b&gt;&amp;[red]\\x1b" in shown["text/html"] and "<b>" not in shown["text/html"]
    assert again["text/plain"] == "bold\nsecond line\n" and "weight: bold" in again["text/html"]


def test_a_long_task_in_a_notebook_is_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("IPython").display, "DisplayHandle", Drawn)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    seconds = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: seconds[0])

    def evaluate(step: float, is_shown: bool = True) -> list[str]:
        calls.clear()
        with ProgressBar("Evaluated", "rows", is_shown) as progress:
            for number in range(1, 11):
                seconds[0] += step
                progress.update(100 * number, number / 10)
        return [data.get("text/plain", "").strip().split("\n")[-1] for _, data in calls]

    slow = evaluate(0.3)
    assert slow[-1] == f"{40 * '━'}  Evaluated 1,000 rows (100%), 333 rows per second"
    assert [name for name, _ in calls] == ["created", "display", *["update"] * 4]
    assert evaluate(0.01) == [] and evaluate(0.3, is_shown=False) == []  # the controls


def test_what_standard_output_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (("utf-8", "█"), ("latin-1", "#"), ("ascii", "#")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert encodable("█", "#") == shown


@pytest.mark.parametrize(
    ("rank", "ranks", "expected"),
    [("1", "2", 1), ("0", "2", 0), ("1", None, 0), ("1", "1", 0), ("x", "2", 0), (None, "2", 0)],
)
def test_a_rank_is_that_of_a_launcher(
    rank: str | None, ranks: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, RANK would mute all that a process says."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert process_rank() == expected


def test_what_is_printed_to_a_closed_terminal_is_dropped() -> None:
    other_end, terminal = pty.openpty()
    try:
        assert not close_broken(terminal)  # the control
        os.write(terminal, b"a")
        assert os.read(other_end, 1) == b"a"
        os.close(other_end)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(terminal, b"b")
        assert close_broken(terminal)
        assert os.write(terminal, b"c") == 1
    finally:
        os.close(terminal)
