"""TODO."""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar
from rich.table import Column, Table

from bertdist.core.atomic_io import (
    atomic_write,
    explain_write_errors,
    flush_to_disk,
    json_safe,
    to_json,
)
from bertdist.core.config import TrainConfig
from bertdist.core.errors import CheckpointError
from bertdist.core.terminal import plain_text
from bertdist.data.records import Records
from bertdist.data.stats import DatasetStats
from bertdist.data.streaming import Stream
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import PACKAGES, _version
from bertdist.tasks.tasks import Task

GROWING = ("metrics.jsonl", "bad_rows.jsonl")


class RunLogger:
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
        self._bar: ProgressBar | None = None
        self._task: Any = None
        self._note = ""
        self._running_since: int | None = None
        if enabled:
            with explain_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "RunLogger":
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
                self.console.print(plain_text(line))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with self.agree():
            if self.enabled:
                self._write(kind, step, values)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        told = json_safe(values)
        line = to_json({"kind": kind, "step": step, **told})
        with (
            explain_write_errors(self.folder),
            open(self.folder / "metrics.jsonl", "ab") as file,
        ):
            file.write(line)
        if self.also is not None:
            self.also({f"{kind}_{name}": value for name, value in told.items()}, step)

    def to_disk(self) -> None:
        """Have the files that grow line by line on the disk, and their names: a checkpoint that knows of a line must not outlive it."""
        for path in (*(self.folder / name for name in GROWING), self.folder):
            with explain_write_errors(path), suppress(FileNotFoundError):
                flush_to_disk(path)

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
                atomic_write(self.folder / name, text.encode())
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
        atomic_write(path, b"".join(kept))

    def status(self, state: str, step: int, reason: str = "") -> None:
        """status.json: what a script that started the run wants to know. state: running, finished, preempted or failed."""
        self._running_since = step if state == "running" else None
        if self.enabled:
            atomic_write(
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
            self._bar = ProgressBar(
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
                *(Column(plain_text(name)) for name in header),
                title=plain_text(title),
                title_justify="left",
            )
            for row in rows:
                table.add_row(*(plain_text(_short(value)) for value in row))
            self.console.print(table)


def open_log(folder: Path, accelerator: Accelerator) -> RunLogger:
    """The run's voice; a line that cannot be written ends all ranks."""
    return RunLogger(
        folder,
        accelerator.is_main_process,
        accelerator.log,
        partial(raise_on_all_ranks, accelerator),
    )


def describe_data(
    rows: Records | Stream,
    known: DatasetStats,
    dev_rows: Records | None,
    task: Task,
    per_epoch: int,
    total_steps: int,
) -> list[str]:
    """What a person should see before any time is spent."""
    pair = f" and {rows.pair_column!r}" if rows.pair_column else ""
    names = ", ".join(task.labels[:10]) + (
        f", ... ({len(task.labels)} in all)" if len(task.labels) > 10 else ""
    )
    dev = (
        f"{len(dev_rows):,} of {dev_rows.name}"
        if dev_rows
        else "none: the last weights count as the best"
    )
    many = f"{sum(known.rows):,} of" if known.rows else "as many as there are in"
    stream = ", read as they are needed" if isinstance(rows, Stream) else ""
    return [
        *(f"{told}." for told in (*rows.guessed, *(dev_rows.guessed if dev_rows else ()))),
        f"Training rows: {many} {rows.name}{stream}, text in {rows.text_column!r}{pair}; validation rows: {dev}.",
        f"Task: {task.problem_type}; outputs in order: {names}.",
        f"{total_steps:,} steps{f', {per_epoch:,} an epoch' if per_epoch else ''}.",
    ]


def notes_of(config: TrainConfig, rows: Records | Stream) -> dict[str, Any]:
    """What `Predictor` wants to know of the training."""
    return {
        "max_length": config.model.max_length,
        "text_column": rows.text_column,
        "text_pair_column": rows.pair_column,
    }


def environment(accelerator: Accelerator) -> str:
    """What a run was made with, as JSON."""
    cuda = accelerator.device.type == "cuda"
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(accelerator.device)
        if cuda
        else accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "command": sys.argv,
    }
    return json.dumps(found, indent=1) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
