"""What a run reports: metrics.jsonl, status.json, trackers, and sentences and a progress bar on
standard error.

    with open_run(config, accelerator) as log:     # lock, watchdog and logger of the run's folder
        log.start(state, total_steps, config, accelerator)   # config.yaml, environment.json
        log.log_training(state, ...)                # a line of metrics.jsonl, which is also printed
        log.log_eval(step, epoch, scores)           # the same
        log.log_summary(state, ...)                 # status.json and the last sentences

Rank 0 writes and prints; on other ranks the methods do nothing, but they are called on all ranks: a
line that cannot be written raises CheckpointError on all of them.
"""

import json
import platform
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
from bertdist.core.config import TrainConfig, config_to_yaml
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.terminal import excerpt, plain_text
from bertdist.data.records import Records
from bertdist.data.stats import DatasetStats
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import PACKAGES, _version
from bertdist.distributed.watchdog import open_watchdog
from bertdist.tasks.labels import describe_alike
from bertdist.tasks.tasks import Task
from bertdist.training.checkpoint import TrainState
from bertdist.training.run_lock import lock_run_folder
from bertdist.training.throughput import ThroughputMeter

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream

S = TypeVar("S")

GROWING = ("metrics.jsonl", "bad_rows.jsonl")  # files that grow line by line

SHOWN_LABELS = 24  # lines of a table; of more labels a part is shown
SHOWN_MATRIX = 12  # labels of a confusion matrix


class Hooks(NamedTuple):
    """A user's functions, called on rank 0 after a line is written: on_log(step, values) after a
    training line, on_evaluation(values) after an evaluation.
    """

    on_log: Callable[[int, dict[str, Any]], None] | None = None
    on_evaluation: Callable[[dict[str, Any]], None] | None = None

    def call(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Call the function of a kind of line with a copy of its values.

        The random state and the modes of torch stay as they are. Raises ConfigError if it fails.
        """
        copy = deepcopy(dict(values))
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                if kind == "train" and self.on_log is not None:
                    self.on_log(step, copy)
                elif kind == "eval" and self.on_evaluation is not None:
                    self.on_evaluation({"step": step, **copy})
        except Exception as error:
            name = "on_log" if kind == "train" else "on_evaluation"
            raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error


NO_HOOKS = Hooks()


class RunLogger:
    """The log of one run.

    A context manager: leaving it ends the progress bar; by an error, with status "failed".
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        track: Callable[[dict[str, Any], int], None] | None = None,
        on_all_ranks: Callable[[], AbstractContextManager[None]] = nullcontext,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        """enabled: on rank 0. track: a tracker's log(values, step). on_all_ranks: entered around
        every line that is written, so that all ranks raise if one does.
        """
        self.folder, self.enabled = folder, enabled
        self.track, self.on_all_ranks, self.hooks = track, on_all_ranks, hooks
        self.state, self.total_steps = TrainState(), 0
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
            # A full or lost disk is what ended the run then, and that error is on its way.
            with suppress(CheckpointError):
                self.status("failed", self._running_since, str(error) or type(error).__name__)

    def say(self, *lines: str) -> None:
        """Print lines as they are."""
        if self.enabled:
            for line in lines:
                self.console.print(plain_text(line))

    def log_training(
        self,
        state: TrainState,
        epoch: float,
        learning_rate: float,
        grad_norm: float,
        throughput: Mapping[str, float],
    ) -> None:
        """The steps since the last log line."""
        values = {"loss": state.pop_mean_loss(), "learning_rate": learning_rate}
        values |= {"grad_norm": grad_norm, **throughput, "tokens": state.tokens}
        self.record("train", state.step, epoch=epoch, **values)

    def log_eval(self, step: int, epoch: float, scores: Mapping[str, float]) -> None:
        """The scores of an evaluation after `step`."""
        self.record("eval", step, epoch=epoch, **scores)

    def log_end(
        self,
        state: TrainState,
        epoch: float,
        learning_rate: float,
        grad_norm: float,
        meter: ThroughputMeter,
    ) -> None:
        """The end of this process: the steps that have no line yet because early stopping ended the
        run, and how the time was used.

        Before the last checkpoint, so that the lines are on the disk with it.
        """
        if state.finished and state.unlogged_steps:
            self.log_training(state, epoch, learning_rate, grad_norm, meter.lap())
        self.write("meter", state.step, finished=state.finished, **meter.summary())
        self.say(str(meter))

    def log_summary(
        self, state: TrainState, reason: str, report: Mapping[str, Any] | None = None
    ) -> None:
        """The end of training, or of this process. reason: of a requested stop. report:
        evaluation.json of the best weights.
        """
        reason = reason or "a stop was requested on another rank"
        if state.finished:
            stopped_early = state.step < self.total_steps
            since_best = state.evaluations_since_best
            reason = f"early stopping after {since_best} evaluations without improvement"
            self.status("finished", state.step, reason if stopped_early else "")
            try:
                self.show_report(report or {})
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                path = self.folder / "evaluation.json"
                self.say(f"{path} is damaged: its tables are not shown.")
            by_loss = ", of the lowest loss" if state.best_loss is not None else ""
            best = f"best weights (step {state.best_step}{by_loss}) in {self.folder / 'best'}"
            steps = f"{state.step} steps"
            if stopped_early:
                steps = f"{state.step} of {self.total_steps} steps ({reason})"
            self.say(f"Finished: {steps}, {best}.")
        elif state.step:
            self.status("preempted", state.step, reason)
            first = ", starting with the evaluation" if state.evaluation_pending else ""
            saved = f"step {state.step} of {self.total_steps} is saved"
            self.say(f"Stopped ({reason}): {saved}. Rerun the same command to resume{first}.")
        else:
            self.status("preempted", 0, reason)
            self.say(f"Stopped ({reason}) before the first step. Rerun the same command to start.")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with self.on_all_ranks():
            if self.enabled:
                values = json_safe(values)
                line = to_json({"kind": kind, "step": step, **values})
                path = self.folder / "metrics.jsonl"
                with explain_write_errors(self.folder), open(path, "ab") as file:
                    file.write(line)
                self.hooks.call(kind, step, values)
                if self.track is not None:
                    self.track({f"{kind}_{name}": value for name, value in values.items()}, step)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and print it."""
        self.write(kind, step, **values)
        numbers = ((n, v) for n, v in values.items() if not isinstance(v, list | dict))
        shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers)
        if self._bar is not None and kind == "train":
            loss, rate = _short(values.get("loss")), _short(values.get("tokens_per_second"))
            self._note = f"loss {loss}  {rate} tokens/s"
            self._bar.update(self._task, note=self._note)
        if self._bar is None or kind != "train" or not self.console.is_terminal:
            self.say(f"{kind:5} step {step:6d}  {shown}")

    def flush(self) -> None:
        """Flush the line-by-line files and the folder to the disk: no checkpoint may survive the
        lines written before it.
        """
        for path in (*(self.folder / name for name in GROWING), self.folder):
            with explain_write_errors(path), suppress(FileNotFoundError):
                flush_to_disk(path)

    def start(
        self, state: TrainState, total_steps: int, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        """Training starts at `state`: write config.yaml, environment.json and status.json."""
        self.state, self.total_steps = state, total_steps
        files = {
            "config.yaml": config_to_yaml(config),
            "environment.json": environment(accelerator),
        }
        with self.on_all_ranks():
            self.begin(state.step, files, state.evaluation_pending)
            self.status("finished" if state.finished else "running", state.step)

    def begin(self, step: int, files: Mapping[str, str], evaluation_pending: bool = False) -> None:
        """Write files, and drop the lines of metrics.jsonl that will be repeated: after `step`.

        evaluation_pending: the evaluation after `step` will be repeated too.
        """
        if self.enabled:
            for name, text in files.items():
                atomic_write(self.folder / name, text.encode())
            self._rewind(step, evaluation_pending)

    def _rewind(self, step: int, evaluation_pending: bool) -> None:
        """Drop lines after `step`, incomplete lines, and the throughput of stopped processes
        ("finished": false).
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        with explain_write_errors(path, "read"):
            lines = path.read_bytes().split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
                repeated = entry["step"] > step or (
                    evaluation_pending
                    and entry["step"] == step
                    and entry["kind"] in ("eval", "meter")
                )
                if not repeated and entry.get("finished") is not False:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        atomic_write(path, b"".join(kept))

    def status(self, state: str, step: int, reason: str = "") -> None:
        """Write status.json for the script that started the run. state: running, finished,
        preempted or failed.
        """
        self._running_since = step if state == "running" else None
        if self.enabled:
            status = {"state": state, "step": step, "reason": reason}
            atomic_write(self.folder / "status.json", json.dumps(status).encode() + b"\n")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @contextmanager
    def progress(self, steps: Generator[S]) -> Iterator[Iterator[S]]:
        """The same steps, with a progress bar on terminals.

        They are closed at the end, also by an error: workers end then.
        """
        if self.enabled and self.console.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = ProgressBar(*columns, console=self.console)
            self._task = self._bar.add_task(
                "", total=self.total_steps, completed=self.step, note=self._note
            )
            self._bar.start()
        try:
            with closing(steps):
                yield self._advance(steps)
        finally:
            self.close_progress()

    def _advance(self, steps: Iterator[S]) -> Iterator[S]:
        for step in steps:
            yield step
            if self._bar is not None:
                self._bar.update(self._task, completed=self.step)

    def close_progress(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step)
            self._bar.stop()
            self._bar = None

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table: numbers with four digits, the beginning of long labels and texts."""
        if self.enabled:
            table = Table(
                *(Column(plain_text(excerpt(name, 40))) for name in header),
                title=plain_text(title),
                title_justify="left",
            )
            for row in rows:
                table.add_row(*(plain_text(excerpt(_short(value))) for value in row))
            self.console.print(table)

    def show_report(self, report: Mapping[str, Any]) -> None:
        """The tables of an evaluation.json: scores per label, and the confusion matrix.

        Of many labels the lowest scores, and the most frequent confusions.
        """
        classes, labels = report.get("per_class", []), report.get("labels", [])
        if classes:
            shown, title = classes, f"Scores per label, step {report['step']}"
            if len(classes) > SHOWN_LABELS:
                with_rows = [entry for entry in classes if entry["rows"]]
                shown = sorted(with_rows, key=lambda entry: entry["f1"])[:SHOWN_LABELS]
                title += f" (the lowest f1 of {len(classes):,}; all are in evaluation.json)"
            self.table(title, list(classes[0]), [list(entry.values()) for entry in shown])
        if "confusion" in report and len(labels) <= SHOWN_MATRIX:
            counts = zip(labels, report["confusion"], strict=True)
            rows = [[label, *numbers] for label, numbers in counts]
            self.table("Confusion matrix (rows: true, columns: predicted)", ["", *labels], rows)
        elif confusions := _confusions(report)[:SHOWN_MATRIX]:
            rows = [list(entry.values()) for entry in confusions]
            self.table("Most frequent confusions", list(confusions[0]), rows)


@contextmanager
def open_run(
    config: TrainConfig, accelerator: Accelerator, hooks: Hooks = NO_HOOKS
) -> Iterator[RunLogger]:
    """Lock the run's folder, open its log and start the watchdog; at the end, end the process
    group. A collective.
    """
    folder = Path(config.run.output_dir)
    with (
        lock_run_folder(folder, accelerator) as messages,
        open_log(folder, accelerator, hooks) as log,
        open_watchdog(folder, accelerator, config.run) as watchdog,
    ):
        watchdog.progress = log
        if config.run.report_to:
            accelerator.init_trackers("bertdist")  # may write into the folder
        number, device = accelerator.num_processes, accelerator.device.type
        processes = f"{number} process{'es' if number > 1 else ''}"
        precision = accelerator.mixed_precision.replace("no", "fp32")
        log.say(*messages, f"{processes}, device {device}, {precision}.")
        yield log
        accelerator.end_training()


def open_log(folder: Path, accelerator: Accelerator, hooks: Hooks = NO_HOOKS) -> RunLogger:
    """The log of a run; a line that cannot be written raises on all ranks."""
    on_all_ranks = partial(raise_on_all_ranks, accelerator)
    return RunLogger(folder, accelerator.is_main_process, accelerator.log, on_all_ranks, hooks)


def describe_data(
    rows: "Records | Stream", stats: DatasetStats, eval_rows: Records | None, task: Task
) -> list[str]:
    """The data and the task, in sentences."""
    pair = f" and {rows.pair_column!r}" if rows.pair_column else ""
    column = rows.label_column if isinstance(rows, Records) else rows.columns.label
    label = f", label in {column!r}" if column else ""
    number = f"{sum(stats.rows):,} of" if stats.rows else "an unknown number in"
    stream = " (streamed)" if not isinstance(rows, Records) else ""
    validation = "none, the last weights count as the best"
    if eval_rows:
        validation = f"{len(eval_rows):,} of {eval_rows.name}"
    labels = ", ".join(excerpt(label, 40) for label in task.labels[:10])
    if len(task.labels) > 10:
        labels += f", ... ({len(task.labels)} in total)"
    return [
        *(
            f"{guess}."
            for guess in dict.fromkeys(
                (*rows.format_notes, *stats.notes, *(eval_rows.format_notes if eval_rows else ()))
            )
        ),
        f"Training rows: {number} {rows.name}{stream}, text in {rows.text_column!r}{pair}{label}; "
        f"validation rows: {validation}.",
        f"Task: {task.problem_type}; outputs in order: {labels}.",
        *filter(None, (task.reason, describe_alike(task.labels))),
    ]


def environment(accelerator: Accelerator) -> str:
    """The software, hardware and command of a run, as JSON."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "command": sys.argv,
    }
    return json.dumps(facts, indent=1) + "\n"


def _confusions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The wrong predictions of an evaluation.json, the most frequent ones first."""
    if "confusion" not in report:
        return list(report.get("confusions", []))
    labels = report["labels"]
    wrong = [
        {"label": labels[i], "predicted": labels[j], "rows": rows}
        for i, row in enumerate(report["confusion"])
        for j, rows in enumerate(row)
        if rows and i != j
    ]
    return sorted(wrong, key=lambda entry: -entry["rows"])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
