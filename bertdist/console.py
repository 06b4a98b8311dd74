"""What a person sees, and the same numbers in files: metrics.jsonl, status.json. Rank 0 talks, the others are silent.

Everything goes to the screen through rich, as plain text: what comes from data or files is never read as markup.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from rich.box import HORIZONTALS
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from bertdist.errors import BertdistError, CheckpointError

Cell: TypeAlias = "str | Sequence[tuple[str, str]]"  # text, or parts of (text, style)

GROWING = ("metrics.jsonl", "bad_rows.jsonl")
_COMMANDS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class RunLog:
    """The voice of a run. A context manager: the progress bar lives inside it."""

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        also: Callable[[dict[str, Any], int], None] | None = None,
        agree: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """also: where numbers go besides, such as a tracker's log(values, step). agree: around every line, so that ranks fail together."""
        self.folder, self.enabled, self.also, self.agree = folder, enabled, also, agree
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._note = ""
        self._running_since: int | None = None
        if enabled:
            with _told(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_progress()
        if error is not None and self._running_since is not None:
            with suppress(
                CheckpointError
            ):  # where the disk is full or gone, that is what ended the run, and it is being told
                self.status("failed", self._running_since, str(error) or type(error).__name__)

    def say(self, *lines: str) -> None:
        """Print lines as they are."""
        if self.enabled:
            for line in lines:
                self.console.print(_plain(line))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with self.agree():
            if self.enabled:
                self._write(kind, step, values)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        told = finite(values)
        line = json.dumps({"kind": kind, "step": step, **told}, ensure_ascii=False)
        with _told(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.also is not None:
            self.also({f"{kind}_{name}": value for name, value in told.items()}, step)

    def to_disk(self) -> None:
        """Have the files that grow line by line on the disk, and their names: a checkpoint that knows of a line must not outlive it."""
        for path in (*(self.folder / name for name in GROWING), self.folder):
            with _told(path), suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and show it."""
        self.write(kind, step, **values)
        shown = "  ".join(
            f"{name} {_short(value)}"
            for name, value in values.items()
            if not isinstance(value, list | dict)
        )
        if self._bar is not None and kind == "train":
            self._note = f"loss {_short(values.get('loss'))}  {_short(values.get('tokens_per_second'))} tokens/s"
            self._bar.update(self._task, note=self._note)
        if self._bar is None or kind != "train" or not self.console.is_terminal:
            self.say(f"{kind:5} step {step:6d}  {shown}")

    def begin(self, step: int, files: dict[str, str], owed: bool = False) -> None:
        """Write down what the run is made of, and take back what metrics.jsonl says of steps that will be taken again.

        owed: the evaluation of `step` will be, too.
        """
        if self.enabled:
            for name, text in files.items():
                write_whole(self.folder / name, text.encode())
            self._rewind(step, owed)

    def _rewind(self, step: int, owed: bool = False) -> None:
        """Drop the lines behind `step`, a torn last line, and what a process that was stopped said of itself ("finished": false)."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().split(b"\n"):
            try:
                found = json.loads(line)
                again = found["step"] > step or (
                    owed and found["step"] == step and found["kind"] in ("eval", "meter")
                )
                if not again and found.get("finished") is not False:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(path, b"".join(kept))

    def status(self, state: str, step: int, reason: str = "") -> None:
        """status.json: what a script that started the run wants to know. state: running, finished, preempted or failed."""
        self._running_since = step if state == "running" else None
        if self.enabled:
            write_whole(
                self.folder / "status.json",
                json.dumps({"state": state, "step": step, "reason": reason}).encode() + b"\n",
            )

    def open_progress(self, done: int, total: int) -> None:
        """Begin the progress bar, on terminals only."""
        if self.enabled and self.console.is_terminal:
            times = (
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(
                TextColumn("step"), BarColumn(), MofNCompleteColumn(), *times, console=self.console
            )
            self._task = self._bar.add_task("", total=total, completed=done, note=self._note)
            self._bar.start()

    def advance(self) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def close_progress(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; numbers with four digits."""
        if self.enabled:
            table = Table(
                *(Column(_plain(name)) for name in header),
                title=_plain(title),
                title_justify="left",
            )
            for row in rows:
                table.add_row(*(_plain(_short(value)) for value in row))
            self.console.print(table)


def finite(value: Any) -> Any:
    """The same for a JSON file, with None where a number is NaN or infinite: JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a crash, finds the old one or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.partial")
    with _told(path), open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with _told(path):
        os.replace(beside, path)


class _told:
    """An OSError while writing becomes one line that names the place."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"Cannot write {self.place}: {error.strerror or error}."
            ) from None


def complain(error: BertdistError) -> None:
    """Print an error's lines as a user should read them."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in str(error).splitlines():
        console.print(_plain(f"bertdist: {line}"))


def warn(line: str) -> None:
    """Print a line to standard error, from whatever process."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(_plain(line))


def show(*lines: str) -> None:
    """Print lines to standard output, wrapped to the terminal."""
    console = Console(highlight=False)
    for line in lines:
        console.print(_plain(line))


def show_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    right: Collection[int] = (),
    lines: bool = False,
) -> None:
    """Print a table to standard output. right: columns that are aligned to the right; lines: a rule between rows.

    A cell is text, or parts of text with a rich style each.
    """
    columns = [
        Column(_plain(name), justify="right" if at in right else "left", overflow="fold")
        for at, name in enumerate(header)
    ]
    table = Table(
        *columns,
        title=_plain(title),
        title_justify="left",
        box=HORIZONTALS,
        show_lines=lines,
        pad_edge=False,
    )
    for row in rows:
        cells = [[(cell, "")] if isinstance(cell, str) else cell for cell in row]
        table.add_row(
            *(
                Text.assemble(*((_plain(text).plain, style) for text, style in cell))
                for cell in cells
            )
        )
    Console(highlight=False).print(table)


def without_commands(text: str) -> str:
    """The text, with a box in place of what a terminal would obey."""
    return text.translate(_COMMANDS)


def _plain(text: str) -> Text:
    """Text as it is: no markup, and what a terminal would obey (escape codes of a data file, say) is shown as a box."""
    return Text(without_commands(text))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
