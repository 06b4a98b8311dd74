"""What is shown while a run trains: the panel of a terminal, lines elsewhere, never too wide."""

import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bertdist.core.errors import DataError
from bertdist.core.terminal import print_error
from bertdist.training import screen as screen_module
from bertdist.training.screen import (
    Evaluated,
    Progress,
    RunningLoss,
    Screen,
    _Panel,
    cell,
    clock,
    duration,
    evaluations_table,
)

STEP = SimpleNamespace(lengths=[(3, 4), (5,)])
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A screen that is a file or a pipe, whoever runs the tests."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    found = Screen(enabled=True)
    assert not found.has_panel
    return found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A screen that believes that it is a terminal with colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(screen_module, "REFRESH_SECONDS", 0.0)
    found = Screen(enabled=True)
    assert found.console.is_terminal and not found.has_panel  # colours, but no terminal
    found.has_panel = True
    return found


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the screen: its only item."""
    found = [100.0]
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: found[0])
    return found


def shown(capfd: pytest.CaptureFixture[str]) -> str:
    return CODES.sub("", capfd.readouterr().err)


def train(screen: Screen, total: int = 6, per_epoch: int = 2, evaluations: int = 2) -> None:
    """All steps, with losses 1, 2, ... per row."""
    screen.open(Progress(0, total, per_epoch))
    best = 0
    for number in range(1, total + 1):
        screen.step(STEP, torch.tensor(3.0 * number), Progress(number, total, per_epoch, best))
        if number % (total // max(evaluations, 1)) == 0 and evaluations:
            with screen.evaluating(300) as advance:
                advance(256)
                advance(512)
            best = best or number
            scores = {"loss": 0.5, "accuracy": 1 / number}
            screen.evaluation(Evaluated(number, number / 2, scores), "accuracy", best == number)
    screen.close(best)


# ---- Panel


def test_a_terminal_has_a_panel_and_then_a_table(
    terminal: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    train(terminal)
    raw = capfd.readouterr().err
    assert raw.count("\x1b[?25l") == 1 and raw.count("\x1b[?25h") == 1  # the cursor is back
    said = CODES.sub("", raw)
    assert "epoch 2.5/3  step 5/6" in said and "loss 3.0000" in said  # mean of 1, ..., 5
    assert "best accuracy 0.3333" in said and "evaluating 256 of 300 rows" in said
    assert "evaluating 300 of 300 rows" in said
    table = [line.split() for line in said.splitlines()[-6:] if line.strip()]
    assert table[0] == ["step", "epoch", "loss", "accuracy"]
    assert table[2:] == [["3", "1.5", "0.5000", "0.3333", "best"], ["6", "3", "0.5000", "0.1667"]]


@pytest.mark.parametrize("evaluations", [0, 2])
def test_a_notebook_has_one_output_which_stays(
    evaluations: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []

    class Output:
        def draw(self, panel: Any) -> None:
            console = Console(file=io.StringIO(), width=100, height=40)
            console.print(panel)
            drawn.append(console.file.getvalue())  # type: ignore[attr-defined]

    monkeypatch.setattr(screen_module, "in_notebook", lambda: True)
    monkeypatch.setattr(screen_module, "NotebookOutput", Output)
    monkeypatch.setattr(screen_module, "REFRESH_SECONDS", 0.0)
    notebook = Screen(enabled=True)
    assert notebook.in_notebook and notebook.has_panel
    assert not Screen(enabled=False).has_panel  # on other ranks
    train(notebook, evaluations=evaluations)
    assert "evaluating" in "".join(drawn) or not evaluations
    last = drawn[-1].splitlines()
    assert last[-2].startswith("epoch 3.0/3  step 6/6  ") and "loss 3.5000" in last[-1]
    assert "left" not in last[-1] and "evaluating" not in drawn[-1]
    assert sum("best" in line for line in last[:-2]) == (evaluations > 0)
    assert capfd.readouterr() == ("", "")  # neither lines nor the table again


def test_the_mark_moves_to_the_last_best(terminal: Screen) -> None:
    for step, score in enumerate([0.1, 0.2, 0.3], 1):
        terminal.evaluation(Evaluated(step, step, {"f1": score}), "f1", is_best=True)
    with terminal.console.capture() as found:
        terminal.show_evaluations()
    assert [line.split() for line in CODES.sub("", found.get()).splitlines() if "best" in line] == [
        ["3", "3", "0.3000", "best"]
    ]


def test_a_message_stays_above_the_panel(
    terminal: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal.open(Progress(0, 6, 2))
    terminal.say("a message")
    terminal.close()
    said = shown(capfd)
    assert "a message" in said and said.index("a message") < said.rindex("step 0/6")


def test_without_evaluations_there_is_no_table(
    terminal: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    train(terminal, evaluations=0)
    assert "accuracy" not in shown(capfd)


def test_a_finished_run_has_no_panel(terminal: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    terminal.open(Progress(6, 6, 2))
    terminal.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_draw_has_lines(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(screen_module.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert Screen(enabled=True).has_panel  # the control
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not Screen(enabled=True).has_panel


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("scores", [1, 4, 12])
def test_nothing_is_wider_than_the_terminal(
    width: int, scores: int, terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.console.width = width
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # lines wrap on a terminal only
    names = ["loss", *(f"very_long_metric_{n}" for n in range(scores))]
    for step in range(1, 60):
        values = dict.fromkeys(names, step / 60)
        terminal.evaluation(Evaluated(1000 * step, step, values), names[-1], is_best=step == 7)
    with terminal.console.capture() as found:
        terminal.console.print(_Panel(terminal))
        terminal.block("Data", "word " * 60)
        terminal.say("word " * 60)
        terminal.table("A title of several words", ["label " * 9, "f1"], [["x" * 90, "1"]], [1])
    lines = CODES.sub("", found.get()).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.rstrip().endswith(("wor", "wo")) for line in lines), "words wrap whole"
    assert len([line for line in lines if "7,000" in line and "best" in line]) == 1
    left_out = (width == 80 and scores > 4) or (width == 40 and scores > 1)
    assert ("more scores" in " ".join(lines)) == left_out


def test_the_table_keeps_the_best_of_many_and_says_how_many_there_are() -> None:
    entries = [Evaluated(n, n, {"f1": 0.5}) for n in (1, 9)]
    table = evaluations_table(entries, 1, "f1", total=9, width=80)
    assert table.row_count == 2 and table.caption == (
        "2 of 9 evaluations; all are in metrics.jsonl"
    )
    assert evaluations_table(entries, 1, "f1", total=2, width=80).caption is None


# ---- Lines


def test_a_file_has_lines(lines: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    train(lines)
    assert capfd.readouterr().err.splitlines() == [
        "eval   step 3/6  epoch 1.5/3  loss 0.5000  accuracy 0.3333  best so far",
        "eval   step 6/6  epoch 3.0/3  loss 0.5000  accuracy 0.1667",
    ]


@pytest.mark.parametrize(("total", "expected"), [(10, 10), (96, 48), (1000, 50), (100_000, 50)])
def test_training_lines_are_about_fifty_a_run(
    total: int, expected: int, lines: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    lines.open(Progress(0, total))
    every = max(1, min(50, -(-total // 50)))
    for step in range(every, total + 1, every):
        lines.training(Progress(step, total), False, {"loss": 1.0})
    said = capfd.readouterr().err.splitlines()
    assert len(said) == expected and f"step {total:,}/{total:,}" in said[-1]
    lines.training(Progress(total - 1, total), True, {"loss": 1.0})  # --log_every was given
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_line_comes_at_least_every_minute(
    lines: Screen, now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    lines.open(Progress(0, 1000, 500), ranks=2)
    for step in range(1, 14):
        now[0] += 10
        lines.step(STEP, torch.tensor(6.0), Progress(step, 1000, 500))
    said = capfd.readouterr().err.splitlines()
    # 12 tokens in 10 s on each of 2 ranks; 988 steps of 10 s are left.
    assert said[1] == "train  step    12/1,000  epoch 0.0/2  loss 2.0000  2 tokens/s  2:44:40 left"
    assert len(said) == 2
    with lines.evaluating(1000) as advance:
        for batch in range(1, 5):
            now[0] += 45
            advance(256 * batch)
    (line, _) = capfd.readouterr().err.splitlines()
    assert line == "eval   step    13/1,000  epoch 0.0/2  evaluating 512 of 1,000 rows"
    assert lines.seconds == {"evaluation": 180.0, "saving": 0.0}


def test_the_time_left_counts_evaluations_and_saving(
    lines: Screen, now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    lines.open(Progress(10, 20))
    for step in (11, 12, 13, 14, 15):
        now[0] += 2
        lines.step(STEP, None, Progress(step, 20))
    assert lines._time_left() == 10.0
    with lines.evaluating(5):
        now[0] += 5
    lines.saving()
    now[0] += 3
    lines.saving()
    now[0] += 2
    lines.close(15)
    assert lines.seconds == {"evaluation": 5.0, "saving": 5.0}
    assert lines._time_left() == 20.0  # five steps of 2 s, and 10 s for five steps so far


def test_a_stream_of_unknown_length_has_steps_only() -> None:
    assert Progress(5, 20).position() == ["step  5/20"]
    assert Progress(5, 20, 10).position() == ["step  5/20", "epoch 0.5/2"]


def test_details_are_for_the_verbose(lines: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    lines.detail("figures")
    assert capfd.readouterr().err == ""
    lines.verbose = True
    lines.detail("figures")
    assert capfd.readouterr().err == "figures\n"


def test_notes_follow_the_block(lines: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    lines.note("first", "second")
    lines.block("Data", "rows")
    assert capfd.readouterr().err == "Data        rows\n"
    for _ in range(2):
        lines.end_block()
    assert capfd.readouterr().err == "Notes       first\n            second\n"


# ---- Running loss


def test_the_running_loss_is_a_mean_over_rows_of_the_last_steps() -> None:
    loss = RunningLoss()
    loss.update()
    assert loss.value != loss.value
    for total, rows in [(4.0, 1), (6.0, 4), (float("nan"), 3), (float("inf"), 3), (9.0, 0)]:
        loss.add(torch.tensor(total), rows)
    loss.update()
    assert loss.value == 2.0  # not 2.75, the mean of means
    for _ in range(screen_module.RECENT_STEPS):
        loss.add(torch.tensor(3.0), 1)
    loss.update()
    assert loss.value == 3.0


def test_a_copy_that_has_not_arrived_is_not_waited_for() -> None:
    loss, arrived = RunningLoss(), [False]
    loss.add(torch.tensor(2.0), 1)
    loss.update()
    loss._copy = torch.tensor([8.0]), [2], SimpleNamespace(query=lambda: arrived[0])
    loss.update()
    assert loss.value == 2.0
    arrived[0] = True
    loss.update()
    assert loss.value == 4.0 and loss._copy is None


# ---- What comes from data


MARKUP = "[bold]x[/bold] [/] [red]y :smile: [link=http://a]b[/link] \\[z]"


def test_lines_are_shown_as_they_are(lines: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    long = "word " * 100
    lines.say(MARKUP, long, "")
    assert capfd.readouterr() == ("", f"{MARKUP}\n{long}\n\n")


def test_markup_in_data_is_text_everywhere(
    terminal: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    terminal.say(MARKUP)
    terminal.block("Data", MARKUP)
    terminal.table(MARKUP, [MARKUP], [[MARKUP]])
    terminal.evaluation(Evaluated(1, 1.0, {MARKUP: 0.5}), "loss", is_best=True)
    terminal.show_evaluations()
    print_error(DataError(MARKUP))
    plain = shown(capfd)
    assert "\x1b" not in plain
    assert plain.count("[bold]x[/bold]") == 7
    assert ":smile:" in plain and "[link=" in plain


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "\x1b[2Jgone",
        "\x9b31m",
        "back\x08\x08",
        "line\rover",
        "\u202egnp.exe",
        "\u2028another line",
    ],
)
def test_escape_codes_in_data_do_not_reach_the_terminal(
    text: str, lines: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    lines.say(text)
    lines.block("Data", text)
    lines.table("title", ["head"], [[text]])
    lines.evaluation(Evaluated(1, 1.0, {text: 0.5}), "loss", is_best=True)
    lines.show_evaluations()
    print_error(DataError(text))
    said = capfd.readouterr().err
    assert not set(said) & set("\x1b\x9b\x08\x07\r\u202e\u2028"), repr(said)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5000"),
        (0.0, "0.0000"),
        (1e-5, "1e-05"),
        (-12.25, "-12.2500"),
        (3, "3"),
        (123456.7, "123,457"),
        (float("nan"), "nan"),
        ("x", "x"),
    ],
)
def test_a_cell(value: Any, expected: str) -> None:
    assert cell(value) == expected


def test_times() -> None:
    assert list(map(clock, (0.4, 67, 754, 11554))) == ["0:00", "1:07", "12:34", "3:12:34"]
    assert list(map(duration, (4.21, 171, 11554))) == ["4.2 s", "2 min 51 s", "3 h 12 min"]
