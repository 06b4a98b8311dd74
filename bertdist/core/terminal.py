"""Lines, errors and tables on the terminal, printed with rich as plain text.

Text from data or files is never read as markup, and what could control a terminal, end a line or
reorder it is shown as an escape. By convention only rank 0 prints: `process_rank()`.
"""

import io
import json
import os
import re
import select
import signal
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias
from unicodedata import east_asian_width

from rich.box import HORIZONTALS
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar as RichBar
from rich.table import Column, Table
from rich.text import Text

from bertdist.core.errors import BertdistError

Cell: TypeAlias = "str | Sequence[tuple[str, str]]"  # text, or (text, rich style) pairs

EXCERPT_COLUMNS = 100
NOTEBOOK_COLUMNS, NOTEBOOK_LINES = 100, 40
NOTEBOOK_HTML = '<pre style="font-family: monospace; line-height: 1.25; margin: 0">{code}</pre>'
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped before the end; the same command resumes
EXIT_INTERRUPTED = 130  # a second Ctrl-C, as a shell has it for SIGINT
EXIT_BROKEN_PIPE = 141  # as of a command that SIGPIPE has ended
# For rank 0 to come as far as the others and print; then torchrun ends them anyway.
PRINT_SECONDS = 15.0
SECONDS_PER_DRAWING = 0.5  # of one in a notebook
SECONDS_PER_LINE = 60  # of a ProgressBar that is not on a terminal
_bar_console: Console | None = None  # of the ProgressBar that shows a bar
_NOT_ASCII = re.compile("[^\x20-\x7e]")

# Control characters, marks of bidirectional text, ends of lines and paragraphs; lone surrogates,
# which cannot be encoded.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def process_rank() -> int:
    """The rank that the launcher gave this process, also before there is an Accelerator; else 0.

    A RANK without the WORLD_SIZE of several is not of a launcher: torch ignores it too.
    """
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_launched = rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)
    return int(rank) if is_launched else 0


def print_error(error: BertdistError) -> None:
    """Print an error to standard error, each line as `bertdist: <line>`."""
    print_to_stderr(*(f"bertdist: {line}" for line in str(error).split("\n")))


def exit_with_error(error: BertdistError) -> NoReturn:
    """Print an error, from rank 0 where it is that of all ranks, and exit with code 1.

    torchrun ends rank 0 as soon as it sees another rank exit, so the others wait until it has
    printed; once rank 0 has exited, torchrun ends them.
    """
    if not error.already_printed and (process_rank() == 0 or not error.on_all_ranks):
        print_error(error)
    if error.on_all_ranks and process_rank() != 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PRINT_SECONDS)
    sys.exit(1)


def close_broken_stdout() -> bool:
    """Whether nobody reads standard output any more; then what is left of it is dropped."""
    return close_broken(1)


def close_broken(descriptor: int) -> bool:
    """The same of any output: of a pipe, or of a terminal that was closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    if is_broken := any(event & select.POLLERR for _, event in poll.poll(0)):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
    return is_broken


def create_console(stderr: bool) -> Console:
    """A console of rich; in a notebook plain text on standard output.

    Of rich's HTML each line would be a box of its own, which cuts long ones, and standard error is
    shown in red.
    """
    console = Console(stderr=stderr, highlight=False)
    if console.is_jupyter:
        options: dict[str, Any] = {"force_jupyter": False, "force_interactive": False}
        return Console(highlight=False, width=NOTEBOOK_COLUMNS, **options)
    return console


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return Console().is_jupyter


class NotebookOutput:
    """An output of a notebook's cell that is drawn again in place, where it was drawn first."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._handle: Any = DisplayHandle()
        self._is_drawn = False

    def draw(self, *parts: RenderableType) -> None:
        """Replace its contents."""
        options: dict[str, Any] = {"force_jupyter": False, "record": True, "highlight": False}
        options |= {"width": NOTEBOOK_COLUMNS, "height": NOTEBOOK_LINES}
        console = Console(file=io.StringIO(), **options)
        for part in parts:
            console.print(part)
        html = console.export_html(code_format=NOTEBOOK_HTML, inline_styles=True, clear=False)
        data = {"text/plain": console.export_text(), "text/html": html}
        draw = self._handle.update if self._is_drawn else self._handle.display
        draw(data, raw=True)
        self._is_drawn = True


def print_to_stderr(*lines: str) -> None:
    """`print_lines` to standard error, above the bar of a ProgressBar."""
    print_lines(_bar_console or create_console(stderr=True), *lines)


def show(*lines: str) -> None:
    """`print_lines` to standard output."""
    print_lines(create_console(stderr=False), *lines)


def print_lines(console: Console, *lines: str) -> None:
    """Print lines, on a terminal wrapped between words; a path that is longer than a line stays
    whole, to be copied. Elsewhere, for grep, a message is one line.
    """
    for line in map(printable, lines):
        parts = [line]
        if console.is_terminal and console.file.isatty():  # FORCE_COLOR makes a pipe one
            width = console.width
            parts = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        for part in parts or [""]:
            console.print(Text(part), soft_wrap=True)


def create_table(
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    right: Collection[int] = (),
    lines: bool = False,
) -> Table:
    """A table with light rules.

    right: indices of columns of numbers, right-aligned and never wrapped; lines: a rule between
    rows.
    """
    columns = [
        Column(plain_text(name), justify="right", no_wrap=True)
        if i in right
        else Column(plain_text(name), overflow="fold")
        for i, name in enumerate(header)
    ]
    table = Table(
        *columns,
        box=HORIZONTALS,
        show_lines=lines,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*map(_styled, row))
    return table


def show_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    right: Collection[int] = (),
    lines: bool = False,
) -> None:
    """Print a title and a `create_table` to standard output."""
    show(title)
    create_console(stderr=False).print(create_table(header, rows, right, lines))


def _styled(cell: Cell) -> Text:
    """A cell of one text is one line; parts are joined as they are and may begin new lines."""
    if isinstance(cell, str):
        return plain_text(cell)
    lines = (("\n".join(map(printable, text.split("\n"))), style) for text, style in cell)
    return Text.assemble(*lines)


def printable(text: str) -> str:
    """The text as one line that cannot control the terminal: escapes such as `\\n`, `\\u202e`."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def print_json(lines: str) -> None:
    """Print JSON lines to standard output, with what `printable` escapes as JSON escapes.

    Where standard output is not UTF-8, every character that is not ASCII is one: still JSON, and
    the same values.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    escaped = _UNPRINTABLE if encoding.lower().startswith("utf") else _NOT_ASCII
    print(escaped.sub(_json_escape, lines), end="")


def write_to_stdout(part: bytes, is_json: bool) -> None:
    """JSON lines as `print_json`; else the bytes, without control characters on a terminal.

    Raises BrokenPipeError where what reads it has ended.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    if is_json or buffer is None or sys.stdout.isatty():
        text = part.decode("utf-8", "replace")
        if is_json:
            print_json(text)
        else:
            print(_UNPRINTABLE.sub(_shown, text), end="")
    else:
        buffer.write(part)
    sys.stdout.flush()


def _shown(match: re.Match[str]) -> str:
    return match[0] if match[0] in "\n\t" else repr(match[0])[1:-1]


class ProgressBar:
    """How far a long task is: a bar on a terminal (standard error) and in a notebook, else a line
    per minute.
    """

    def __init__(self, action: str, unit: str, is_shown: bool = True) -> None:
        """action: "Predicted". unit: "rows"."""
        self._action, self._unit, self._is_shown = action, unit, is_shown
        self._said_at = self._started = time.monotonic()
        self._bar: RichProgress | None = None
        self._first: int | None = None
        self._output: NotebookOutput | None = None
        self._in_notebook, self._drawn_at = is_shown and in_notebook(), self._started
        if is_shown and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            # Not redirected: else rich would show standard output here, not write it to its pipe.
            self._bar = RichProgress(
                *columns,
                console=create_console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(action, total=None)

    def __enter__(self) -> "ProgressBar":
        global _bar_console
        if self._bar is not None:
            self._bar.start()
            _bar_console = self._bar.console
        return self

    def __exit__(self, *error: object) -> None:
        global _bar_console
        if self._bar is not None:
            self._bar.stop()
            _bar_console = None

    def update(self, count: int, fraction: float | None) -> None:
        """count: units that are done, also by earlier processes; fraction: of the whole."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = count, now
        seconds = max(1e-9, now - self._started)
        rate = (count - self._first) / seconds
        share = "" if fraction is None else f" ({fraction:.0%})"
        speed = f", {rate:,.0f} {self._unit} per second" if rate else ""
        line = f"{self._action} {count:,} {self._unit}{share}{speed}"
        if self._bar is not None:
            done = None if fraction is None else int(1000 * fraction)
            total = None if fraction is None else 1000
            self._bar.update(self._task, description=line, completed=done or 0, total=total)
        elif self._in_notebook:
            if now - self._drawn_at >= SECONDS_PER_DRAWING or (self._output and fraction == 1):
                self._drawn_at, self._output = now, self._output or NotebookOutput()
                row = Table.grid(padding=(0, 2))
                bar = [] if fraction is None else [RichBar(total=1.0, completed=fraction, width=40)]
                row.add_row(*bar, plain_text(line))
                self._output.draw(row)
        elif self._is_shown and now - self._said_at >= SECONDS_PER_LINE:
            self._said_at = now
            print_to_stderr(f"{line}.")


def _json_escape(match: re.Match[str]) -> str:
    return "\n" if match[0] == "\n" else json.dumps(match[0])[1:-1]


def escape_unencodable() -> None:
    """Let standard output and error show what their encoding lacks as `\\xe9`, not raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain_text(text: str) -> Text:
    """A `printable` line for rich, without markup."""
    return Text(printable(text))


def encodable(text: str, plain: str) -> str:
    """The text, or `plain` where standard output has no such characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return plain
    return text


def byte_size(count: float) -> str:
    """`1.32 GB`, `820 KB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def count_in_words(number: int) -> str:
    """`109 million`; small numbers in full."""
    for size, word in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def excerpt(text: str, columns: int = EXCERPT_COLUMNS) -> str:
    """The beginning of a text as one printable line, other characters as Python escapes (`\\n`).

    columns: its width on a terminal, where a wide (East Asian) character takes two; "..." follows
    a text that was cut.
    """
    shown: list[str] = []
    for character in text:
        columns -= 2 if east_asian_width(character) in "WF" else 1
        if columns < 0:
            return "".join(shown) + "..."
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)


def excerpt_of(value: object, columns: int = 60) -> str:
    """The beginning of a value's repr, as `excerpt`, with its line ends as blanks."""
    return excerpt(" ".join(repr(value).split()), columns)
