"""What a run shows on standard error while it trains: one live panel on a terminal, else lines.

    screen.block("Data", "1,000 rows of train.tsv")    # a line of the start or the end
    screen.note("--max_length 128 truncates ...")      # shown by `end_block`
    screen.open(progress, ranks)                       # the first step is about to be taken
    screen.step(step, loss); screen.evaluation(...); screen.close()

The panel is drawn again by the steps of training and of evaluations, at most every REFRESH_SECONDS:
there is no thread, so a process that is forked meanwhile holds no lock of one. Where there is no
terminal, a line comes about LINES times a run, and after LINE_SECONDS without one. Nothing here
makes the host wait for the device. Only rank 0 shows anything.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, isfinite, isnan, nan
from typing import Any, NamedTuple, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from bertdist.core.terminal import (
    Cell,
    NotebookOutput,
    create_console,
    create_table,
    excerpt,
    in_notebook,
    plain_text,
    print_lines,
    printable,
)

REFRESH_SECONDS = 0.25
LINE_SECONDS = 60.0
LINES = 50  # of training, per run
RECENT_STEPS = 50  # of the running loss and rates
NAME_WIDTH = 12  # of the names in a block
LEAST_EVALUATIONS = 4  # in the panel, however low the terminal is
SHOWN_EVALUATIONS = 30  # in the table at the end


class TrainedStep(Protocol):
    """What is read of a step: tokens of each text of each micro-batch of this rank."""

    @property
    def lengths(self) -> Sequence[Sequence[int]]: ...


class Evaluated(NamedTuple):
    """A row of the table of evaluations."""

    step: int
    epoch: float
    scores: Mapping[str, Any]


class Progress(NamedTuple):
    """How far a run is."""

    step: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 0  # 0: not known
    best_step: int = 0  # 0: none

    def position(self) -> list[str]:
        """`step 40/96` and `epoch 1.3/3`, the latter if the length of an epoch is known."""
        total = f"{self.total_steps:,}"
        words = [f"step {self.step:>{len(total)},}/{total}"]
        if self.steps_per_epoch:
            done, epochs = (n / self.steps_per_epoch for n in (self.step, self.total_steps))
            words.append(f"epoch {done:.{1 if epochs >= 2 else 2}f}/{epochs:.3g}")
        return words


class RunningLoss:
    """The mean loss per row of this rank's last steps, read without waiting for the device.

    From a GPU they are copied asynchronously: `value` is of the last copy that has arrived.
    """

    def __init__(self) -> None:
        self.value = nan
        self._recent: deque[tuple[Tensor, int]] = deque(maxlen=RECENT_STEPS)
        self._copy: tuple[Tensor, list[int], Any] | None = None  # losses, rows, CUDA event

    def add(self, loss: Tensor, rows: int) -> None:
        """loss: this rank's loss sum () over so many rows; without rows it does not count."""
        if rows:
            self._recent.append((loss, rows))

    def update(self) -> None:
        """Begin a copy unless one is on its way, and read it if it has arrived."""
        if self._copy is None and self._recent:
            losses, rows = zip(*self._recent, strict=True)
            values, event = torch.stack(losses), None
            if values.is_cuda:
                on_host = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
                values, event = on_host.copy_(values, non_blocking=True), torch.cuda.Event()
                event.record()
            self._copy = values, list(rows), event
        if self._copy is not None and (self._copy[2] is None or self._copy[2].query()):
            pairs = zip(self._copy[0].tolist(), self._copy[1], strict=True)
            # Not finite: the step was skipped, see nonfinite.py.
            counted = [(loss, rows) for loss, rows in pairs if isfinite(loss)]
            if counted:
                self.value = sum(x[0] for x in counted) / sum(x[1] for x in counted)
            self._copy = None


class Screen:
    """Standard error of one run."""

    def __init__(self, enabled: bool, stderr: bool = True) -> None:
        """enabled: on rank 0. stderr: False for standard output."""
        self.enabled, self.verbose = enabled, False
        self.console = create_console(stderr)
        # Words wrap on a terminal; in a file a message is one line, for grep.
        self.console.soft_wrap = not self.console.is_terminal
        self.in_notebook = enabled and in_notebook()
        is_terminal = self.console.is_interactive and sys.stderr.isatty()
        self.has_panel = self.in_notebook or is_terminal
        self.pairs = False  # whether the model takes two texts
        self.evaluations: list[Evaluated] = []
        self.selected = ""  # the score that selects the best weights
        self.seconds = {"evaluation": 0.0, "saving": 0.0}
        self._notes: list[str] = []
        self._live: Live | _NotebookPanel | None = None
        self._progress, self._activity, self._ranks = Progress(), "", 1
        self._loss = RunningLoss()
        # (end, tokens) of the last steps without a pause between them, and what they gave
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self._tokens_per_second = self._seconds_per_step = nan
        self._saving_since: float | None = None
        self._first_step, self._drawn_at, self._line_at, self._line_step = 0, 0.0, 0.0, 0

    # ---- Messages

    def say(self, *lines: str) -> None:
        """Show lines, above the panel."""
        if self.enabled:
            print_lines(self.console, *lines)

    def detail(self, *lines: str) -> None:
        """Show lines for engineers: with --verbose only."""
        if self.verbose:
            self.say(*lines)

    def block(self, name: str, text: str, wrap: bool = True) -> None:
        """Show `text` after its name, in a column of its own. wrap: not for commands, which are
        copied.
        """
        if not self.enabled:
            return
        if self.console.is_terminal and wrap:
            table = Table.grid(Column(width=NAME_WIDTH), Column(overflow="fold"))
            table.add_row(Text(name, style="bold"), plain_text(text))
            self.console.print(table)
        else:
            self.console.print(
                Text.assemble((name.ljust(NAME_WIDTH), "bold"), plain_text(text)), soft_wrap=True
            )

    def note(self, *lines: str) -> None:
        """Keep lines until `end_block`."""
        self._notes += lines

    def end_block(self) -> None:
        """Show the notes so far."""
        for number, note in enumerate(self._notes):
            self.block("" if number else "Notes", note)
        self._notes = []

    def table(
        self,
        title: str,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        right: Sequence[int] = (),
    ) -> None:
        """Show a table, of long texts the beginning. right: indices of right-aligned columns."""
        if self.enabled:
            self.say(title)
            cells = [[excerpt(x) if isinstance(x, str) else x for x in row] for row in rows]
            self.console.print(create_table(header, cells, right), soft_wrap=False)

    # ---- Training

    def open(self, progress: Progress, ranks: int = 1) -> None:
        """Training starts, or resumes; ranks: each has about as many tokens as this one."""
        self._progress, self._ranks = progress, ranks
        self._first_step = self._line_step = progress.step
        self._line_at = time.monotonic()
        if self.enabled and self.has_panel and progress.step < progress.total_steps:
            # stderr of forked loader workers is not redirected into it: they would draw it too.
            if self.in_notebook:
                self._live = _NotebookPanel(self)
            else:
                self._live = Live(
                    _Panel(self), console=self.console, auto_refresh=False, transient=True
                )
            self._live.start(refresh=True)

    def step(self, step: TrainedStep, loss: Tensor | None, progress: Progress) -> None:
        """A step was taken. loss: this rank's loss sum (), on the device."""
        self._end_saving()
        self._progress, self._activity = progress, ""
        if not self.enabled:
            return
        self._recent.append((time.monotonic(), sum(map(sum, step.lengths))))
        if len(self._recent) > 1:
            seconds = self._recent[-1][0] - self._recent[0][0]
            tokens = sum(count for _, count in self._recent) - self._recent[0][1]
            if seconds > 0:
                self._tokens_per_second = tokens * self._ranks / seconds
                self._seconds_per_step = seconds / (len(self._recent) - 1)
        if loss is not None:
            self._loss.add(loss, sum(map(len, step.lengths)))
        self._refresh(self._line)

    def training(self, progress: Progress, every_line: bool, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl about training. every_line: show all of them, as --log_every
        asks; else about LINES of a run.
        """
        if not self.enabled:
            return
        self._progress = progress
        share = max(1, ceil(progress.total_steps / LINES))
        due = every_line or progress.step // share > self._line_step // share
        ends = progress.step == progress.total_steps
        if self.verbose or (self._live is None and (due or ends)):
            self._line(values)

    def _line(self, values: Mapping[str, Any] | None = None) -> None:
        """A line about training. values: of metrics.jsonl; None: what is known at this moment."""
        if values is None:
            self._loss.update()
            rates = {"loss": self._loss.value, "tokens_per_second": self._tokens_per_second}
            items = self._items(rates, all_values=False)
        else:
            items = self._items(values, self.verbose)
        self._line_at, self._line_step = time.monotonic(), self._progress.step
        self.say("  ".join(["train", *self._progress.position(), *items]))

    def _items(self, values: Mapping[str, Any], all_values: bool) -> list[str]:
        rate, left = values.get("tokens_per_second", nan), self._time_left()
        items = [] if isnan(values["loss"]) else [f"loss {cell(values['loss'])}"]
        items += [] if isnan(rate) else [f"{rate:,.0f} tokens/s"]
        items += [f"{clock(left)} left"] if left > 0 else []  # not NaN, not at the end
        if all_values:
            shown = ("loss", "tokens_per_second", "epoch")
            items += [f"{name} {short(x)}" for name, x in values.items() if name not in shown]
        return items

    def _time_left(self) -> float:
        """Seconds to the last step, with as much evaluation and saving per step as so far."""
        steps = self._progress.step - self._first_step
        pauses = sum(self.seconds.values()) / steps if steps else nan
        return (self._progress.total_steps - self._progress.step) * (
            self._seconds_per_step + pauses
        )

    # ---- Evaluation and saving

    @contextmanager
    def evaluating(self, rows: int) -> Iterator[Callable[[int], None]]:
        """An evaluation of so many rows; gives a function to call with the rows done."""
        begin = time.monotonic()
        self._recent.clear()

        def show() -> None:
            self.say("  ".join(["eval ", *self._progress.position(), self._activity]))
            self._line_at = time.monotonic()

        def advance(done: int) -> None:
            self._activity = f"evaluating {min(done, rows):,} of {rows:,} rows"
            if self.enabled:
                self._refresh(show)

        advance(0)
        try:
            yield advance
        finally:
            self._activity = ""
            self.seconds["evaluation"] += time.monotonic() - begin

    def saving(self) -> None:
        """Weights are about to be saved; it ends with the next step, or `close`."""
        if self._saving_since is None:
            self._saving_since, self._activity = time.monotonic(), "saving weights"
            self._recent.clear()
            if self._live is not None:
                self._live.refresh()

    def _end_saving(self) -> None:
        if self._saving_since is not None:
            self.seconds["saving"] += time.monotonic() - self._saving_since
            self._saving_since = None

    def evaluation(self, evaluated: Evaluated, selected: str, is_best: bool) -> None:
        """An evaluation ended. selected: the score that selects the best weights; is_best: these
        are the best so far.
        """
        self.evaluations.append(evaluated)
        self.selected = selected
        best_step = evaluated.step if is_best else self._progress.best_step
        self._progress = self._progress._replace(step=evaluated.step, best_step=best_step)
        if self._live is not None:
            self._live.refresh()
        elif self.enabled:
            shown = evaluated.scores.items()
            scores = [f"{name} {cell(x)}" for name, x in shown if not isinstance(x, list | dict)]
            best = ["best so far"] * is_best
            self._line_at = time.monotonic()
            self.say("  ".join(["eval ", *self._progress.position(), *scores, *best]))

    # ---- The panel

    def close(self, best_step: int | None = None) -> None:
        """Training ended: the panel gives way to the table of evaluations. best_step: None: as the
        evaluations say.
        """
        self._end_saving()
        if self._live is not None:
            live, self._live = self._live, None
            self._activity = ""
            if best_step is not None:
                self._progress = self._progress._replace(best_step=best_step)
            live.stop()
            if not self.in_notebook:  # where the panel stays, with the table in it
                self.show_evaluations()

    def show_evaluations(self, best_step: int | None = None) -> None:
        """The table of evaluations, of many the last ones and the best. best_step: see `close`."""
        if best_step is not None:
            self._progress = self._progress._replace(best_step=best_step)
        if self.enabled and self.evaluations:
            width = self.console.width
            self.console.print(self._evaluations(SHOWN_EVALUATIONS, width), soft_wrap=False)

    def _refresh(self, line: Callable[[], None]) -> None:
        """Draw the panel again, or show a line, if it is time to."""
        now = time.monotonic()
        if self._live is None:
            if now - self._line_at >= LINE_SECONDS:
                line()
        elif now - self._drawn_at >= REFRESH_SECONDS:
            self._drawn_at = now
            self._loss.update()
            self._live.refresh()

    def render(self, width: int, height: int) -> RenderResult:
        """The panel, for a terminal of so many columns and lines."""
        if self.evaluations:
            yield self._evaluations(max(LEAST_EVALUATIONS, height - 10), width)
        progress = self._progress
        bar = ProgressBar(total=max(1, progress.total_steps), completed=progress.step)
        words = progress.position()[::-1]
        grid = Table.grid(*(Column(no_wrap=True) for _ in words), Column(ratio=1), expand=True)
        grid.add_row(*(f"{word}  " for word in words), bar)
        yield grid
        rates = {"loss": self._loss.value, "tokens_per_second": self._tokens_per_second}
        items = [self._activity, *self._items(rates, all_values=False)]
        best = next((x for x in self.evaluations if x.step == progress.best_step), None)
        if best is not None and self.selected in best.scores:
            items.append(f"best {self.selected} {cell(best.scores[self.selected])}")
        yield Text("\n".join(_fill([printable(item) for item in items if item], width)))

    def _evaluations(self, rows: int, width: int) -> Table:
        best = self._progress.best_step
        chosen = self.evaluations[-rows:]
        if len(chosen) < len(self.evaluations):  # the best stays
            chosen = [x for x in self.evaluations if x.step == best and x not in chosen] + chosen
        return evaluations_table(chosen, best, self.selected, len(self.evaluations), width)


class _Panel:
    """What rich draws: as wide as the terminal is at that moment."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.screen.render(options.max_width, console.height)


class _NotebookPanel:
    """The same of a notebook, as `Live`: it stays after the end, as it was drawn last."""

    def __init__(self, screen: Screen) -> None:
        self.panel, self._output = _Panel(screen), NotebookOutput()

    def start(self, refresh: bool) -> None:
        """Begin, and draw it."""
        self.refresh()

    def refresh(self) -> None:
        """Draw it again."""
        self._output.draw(self.panel)

    def stop(self) -> None:
        """Draw it for the last time."""
        self.refresh()


def evaluations_table(
    evaluations: Sequence[Evaluated], best_step: int, selected: str, total: int, width: int
) -> Table:
    """A row per evaluation, the best marked.

    selected: the score that is shown in any case; of the others, as many as fit into so many
    columns, those behind it are left out. total: evaluations of the run.
    """
    names = list(dict.fromkeys(name for entry in evaluations for name in entry.scores))
    columns = [("step", [f"{entry.step:,}" for entry in evaluations])]
    columns += [("epoch", [f"{entry.epoch:.4g}" for entry in evaluations])]
    used = sum(_width(name, cells) for name, cells in columns) + len("best")
    shown, left_out = {}, 0
    for name in sorted(names, key=lambda name: name not in ("loss", selected)):
        cells = [cell(entry.scores.get(name, "")) for entry in evaluations]
        if used + _width(name, cells) <= width or name in ("loss", selected):
            shown[name] = cells
            used += _width(name, cells)
        else:
            left_out += 1
    columns += [(name, shown[name]) for name in names if name in shown]
    marks = ["best" if entry.step == best_step else "" for entry in evaluations]
    caption = [f"{len(evaluations)} of {total} evaluations"] * (len(evaluations) < total)
    caption += [f"{left_out} more scores"] * (left_out > 0)
    table = Table(
        *(Column(Text(_heading(name)), justify="right", overflow="fold") for name, _ in columns),
        Column(""),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"{', '.join(caption)}; all are in metrics.jsonl" if caption else None,
        caption_justify="left",
    )
    for row in zip(*(cells for _, cells in columns), marks, strict=True):
        table.add_row(*map(plain_text, row), style="bold" if row[-1] else "")
    return table


def _heading(name: str) -> str:
    """The name of a score, which may wrap behind _ as at a blank: `balanced_` `accuracy`."""
    return printable(name).replace("_", "_\n") if len(name) > 10 else printable(name)


def _width(name: str, cells: Sequence[str]) -> int:
    """Columns of a table's column, with the space beside it."""
    return max(map(len, [*_heading(name).split("\n"), *cells])) + 2


def _fill(items: Sequence[str], width: int) -> list[str]:
    """The items, unbroken, in lines of at most so many columns where that is possible."""
    lines = [""]
    for item in items:
        longer = f"{lines[-1]}  {item}" if lines[-1] else item
        if len(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(item)
    return lines


def short(value: Any) -> str:
    """A value for people: numbers with four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def cell(value: Any) -> str:
    """A value in a table: numbers with four decimals, so that they align."""
    if isinstance(value, float) and (value == 0 or 1e-3 <= abs(value) < 1e4):
        return f"{value:.4f}"
    return short(value)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:12:34`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`4.2 s`, `2 min 51 s`, `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
