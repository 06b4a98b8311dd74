"""What a run reports: its record on disk (metrics.jsonl, status.json), trackers, and messages.

    with open_run(config, accelerator) as log:     # lock, watchdog and logger of the run's folder
        log.start(state, total_steps, config, accelerator)   # config.yaml, environment.json
        log.log_training(state, ...)                # a line of metrics.jsonl, also on the screen
        log.log_eval(step, epoch, scores)           # the same
        log.log_summary(state, ...)                 # status.json and the last sentences

How it looks on the screen: training/screen.py and run_summary.py. Rank 0 writes and prints; on
other ranks the methods do nothing, but they are called on all ranks: a line that cannot be written
raises CheckpointError on all of them.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.atomic_io import (
    atomic_write,
    explain_write_errors,
    flush_to_disk,
    json_safe,
    to_json,
)
from bertdist.core.config import DataConfig, TrainConfig, config_to_yaml, finished_yaml
from bertdist.core.errors import CheckpointError, ConfigError, RankLost
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import PACKAGES, package_version
from bertdist.distributed.watchdog import open_watchdog
from bertdist.training.checkpoint import TrainState
from bertdist.training.run_lock import lock_run_folder
from bertdist.training.run_summary import (
    describe_device,
    describe_times,
    show_commands,
    show_files,
    show_report,
)
from bertdist.training.screen import Evaluated, Progress, Screen, TrainedStep
from bertdist.training.throughput import ThroughputMeter

if TYPE_CHECKING:  # --report_to only
    from bertdist.training.trackers import Trackers

S = TypeVar("S", bound=TrainedStep)

GROWING = ("metrics.jsonl", "bad_rows.jsonl")  # files that grow line by line


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

    A context manager: leaving it ends the panel on the screen; by an error, with status "failed".
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        on_all_ranks: Callable[[], AbstractContextManager[None]] = nullcontext,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        """enabled: on rank 0. on_all_ranks: entered around every line that is written, so that all
        ranks raise if one does.
        """
        self.folder, self.enabled = folder, enabled
        self.on_all_ranks, self.hooks = on_all_ranks, hooks
        self.trackers: Trackers | None = None  # of --report_to, once training starts
        self.state, self.total_steps, self.steps_per_epoch = TrainState(), 0, 0
        self.screen = Screen(enabled)
        self.log_every = "auto"
        self.data = DataConfig()  # of the run
        self._began, self._processes = time.perf_counter(), 1
        self._meter: ThroughputMeter | None = None
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
        self.screen.close()
        self.screen.end_block()
        if error is not None and self._running_since is not None:
            # A full or lost disk is what ended the run then, and that error is on its way.
            with suppress(CheckpointError):
                reason = str(error) or type(error).__name__
                cause = "lost" if isinstance(error, RankLost) else "error"
                self.status("failed", self._running_since, reason, cause)
        if self.trackers is not None:
            self.say(*self.trackers.close(failed=error is not None))

    def say(self, *lines: str) -> None:
        """Show lines."""
        self.screen.say(*lines)

    def note(self, *lines: str) -> None:
        """Show lines after the start block."""
        self.screen.note(*lines)

    def log_training(
        self,
        state: TrainState,
        epoch: float,
        learning_rate: float,
        grad_norm: float | Tensor,
        throughput: Mapping[str, float],
    ) -> None:
        """The steps since the last log line. grad_norm: (), which is read from the device here."""
        values = {"loss": state.pop_mean_loss(), "learning_rate": learning_rate}
        values |= {"grad_norm": float(grad_norm), **throughput, "tokens": state.tokens}
        self.write("train", state.step, epoch=epoch, **values)
        self.screen.training(self._progress(), self.log_every != "auto", values)

    def log_eval(
        self,
        step: int,
        epoch: float,
        scores: Mapping[str, float],
        selected: str = "loss",
        is_best: bool = False,
    ) -> None:
        """The scores of an evaluation after `step`.

        selected: the one that selects the best weights; is_best: these are the best so far.
        """
        self.write("eval", step, epoch=epoch, **scores)
        self.screen.evaluation(Evaluated(step, epoch, scores), selected, is_best)

    def log_end(
        self,
        state: TrainState,
        epoch: float,
        learning_rate: float,
        grad_norm: float | Tensor,
        meter: ThroughputMeter,
    ) -> None:
        """The end of this process: the steps that have no line yet because early stopping ended the
        run, and how the time was used.

        Before the last checkpoint, so that the lines are on the disk with it.
        """
        meter.measure_again()
        if state.finished and state.unlogged_steps:
            self.log_training(state, epoch, learning_rate, grad_norm, meter.lap())
        values = {**meter.summary(), "tokens_per_micro_batch": state.tokens_per_micro_batch}
        values |= {f"{name}_seconds": seconds for name, seconds in self.screen.seconds.items()}
        self.write("meter", state.step, finished=state.finished, **values)
        self._meter = meter

    def log_summary(
        self,
        state: TrainState,
        reason: str,
        report: Mapping[str, Any] | None = None,
        test_report: Mapping[str, Any] | None = None,
    ) -> None:
        """The end of training, or of this process. reason: of a requested stop. report,
        test_report: evaluation.json and test_evaluation.json of the best weights.
        """
        reason = reason or "a stop was requested on another rank"
        if state.finished:
            self._summarize(state, report or {}, test_report or {})
        elif state.step:
            self.status("preempted", state.step, reason)
            first = ", starting with the evaluation" if state.evaluation_pending else ""
            saved = f"step {state.step} of {self.total_steps} is saved"
            self.say(f"Stopped ({reason}): {saved}. Rerun the same command to resume{first}.")
        else:
            self.status("preempted", 0, reason)
            self.say(f"Stopped ({reason}) before the first step. Rerun the same command to start.")

    def _summarize(
        self, state: TrainState, report: Mapping[str, Any], test_report: Mapping[str, Any]
    ) -> None:
        stopped_early = state.step < self.total_steps
        since_best = state.evaluations_since_best
        reason = f"early stopping after {since_best} evaluations without improvement"
        self.status("finished", state.step, reason if stopped_early else "")
        if not self.enabled:
            return
        if self.trackers is not None:
            self.say(*self.trackers.log_final(state.step, final_scores(state, report, test_report)))
        self._show_report(report, "evaluation.json", "")
        self._show_report(test_report, "test_evaluation.json", "test rows")
        by_loss = ", of the lowest loss" if state.best_loss is not None else ""
        best = f"best weights (step {state.best_step}{by_loss}) in {self.folder / 'best'}"
        steps = f"{state.step} steps"
        if stopped_early:
            steps = f"{state.step} of {self.total_steps} steps ({reason})"
        self.say(f"Finished: {steps}, {best}.")
        self._show_times()
        # Other runs cannot train on files of their own folder.
        is_fold = any(Path(file).parent == self.folder for file in self.data.train_file or ())
        if not (is_fold or self.screen.in_notebook):  # there Run has them
            show_files(self.screen, self.folder)
            show_commands(self.screen, self.folder, self.data)

    def _show_report(self, report: Mapping[str, Any], file: str, of: str) -> None:
        try:
            show_report(self.screen, report, of, file)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            self.say(f"{self.folder / file} is damaged: its tables are not shown.")

    def _show_times(self) -> None:
        """Where the time of this process went, if it took a step."""
        if self._meter is not None:
            self.screen.detail(str(self._meter))
            total = time.perf_counter() - self._began
            self.screen.block("Time", describe_times(self._meter, self.screen.seconds, total))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with self.on_all_ranks():
            if self.enabled:
                values = json_safe(values)
                line = to_json({"kind": kind, "step": step, **values})
                path = self.folder / "metrics.jsonl"
                with explain_write_errors(self.folder), open(path, "ab") as file:
                    file.write(line)
                if self.trackers is not None:
                    self.say(*self.trackers.log(kind, step, values))
                self.hooks.call(kind, step, values)

    def flush(self) -> None:
        """Flush the line-by-line files and the folder to the disk: no checkpoint, which is about to
        be written, may survive the lines written before it.
        """
        self.screen.saving()
        for path in (*(self.folder / name for name in GROWING), self.folder):
            with explain_write_errors(path), suppress(FileNotFoundError):
                flush_to_disk(path)

    def start(
        self,
        state: TrainState,
        total_steps: int,
        config: TrainConfig,
        accelerator: Accelerator,
        steps_per_epoch: int = 0,
    ) -> None:
        """Training starts at `state`: write config.yaml, environment.json and status.json. Those of
        a finished run stay, see `finished_yaml`.

        steps_per_epoch: 0 if it is not known.
        """
        self.state, self.total_steps, self.steps_per_epoch = state, total_steps, steps_per_epoch
        self._processes, self.data = accelerator.num_processes, config.data
        files = {
            "config.yaml": config_to_yaml(config),
            "environment.json": environment(accelerator),
        }
        if state.finished:
            files["config.yaml"] = finished_yaml(self.folder / "config.yaml", config)
            if (self.folder / "environment.json").exists():
                del files["environment.json"]
        with self.on_all_ranks():
            if self.enabled and config.run.report_to:
                # Before metrics.jsonl is rewound, which shows what trackers have.
                self._open_trackers(config, state, accelerator)
            self.begin(state.step, files, state.evaluation_pending)
            self.status("finished" if state.finished else "running", state.step)
        if state.finished:
            self.say(
                "This run has finished: its results are shown again. To train again, use another "
                "--output_dir."
            )
            if self.screen.has_panel:
                self.screen.show_evaluations(state.best_step)

    def _open_trackers(
        self, config: TrainConfig, state: TrainState, accelerator: Accelerator
    ) -> None:
        from bertdist.training.trackers import Trackers, flat_settings

        lines = [entry for _, entry in self._lines()]
        step, pending = state.step, state.evaluation_pending
        kept = [entry for entry in lines if not is_repeated(entry, step, pending)]
        processes, total_steps = accelerator.num_processes, self.total_steps
        settings = flat_settings(config, processes=processes, total_steps=total_steps)
        trackers = Trackers(config.run, settings, lines, kept, step)
        if not state.finished:  # else `log_final` opens them, if they lack the scores
            self.say(*trackers.open())
        self.trackers = trackers

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
        self.screen.evaluations.clear()
        if not path.exists():
            return
        kept = []
        for line, entry in self._lines():
            if not is_repeated(entry, step, evaluation_pending):
                kept.append(line + b"\n")
                self._show_again(entry)
        atomic_write(path, b"".join(kept))

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """The complete lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        found = []
        with explain_write_errors(path, "read"), suppress(FileNotFoundError):
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                        found.append((line, entry))
        return found

    def _show_again(self, entry: dict[str, Any]) -> None:
        """The evaluations before a resume are rows of the table too."""
        if entry.get("kind") == "eval" and isinstance(entry.get("epoch"), float):
            scores = {name: x for name, x in entry.items() if isinstance(x, float)}
            epoch = scores.pop("epoch")
            self.screen.evaluations.append(Evaluated(int(entry["step"]), epoch, scores))

    def status(self, state: str, step: int, reason: str = "", cause: str = "") -> None:
        """Write status.json for the script that started the run. state: running, finished,
        preempted or failed. cause of a failure: "error", which would come again; "lost", a rank;
        of the watchdog also "hang".
        """
        self._running_since = step if state == "running" else None
        if self.enabled:
            status = {"state": state, "step": step, "reason": reason}
            if cause:
                status["cause"] = cause
            atomic_write(self.folder / "status.json", json.dumps(status).encode() + b"\n")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @contextmanager
    def progress(self, steps: Generator[S]) -> Iterator[Iterator[S]]:
        """The same steps, with progress on the screen.

        They are closed at the end, also by an error: workers end then.
        """
        if self.state.tokens_per_micro_batch:
            tokens = f"{self.state.tokens_per_micro_batch:,} tokens"
            self.screen.detail(f"Micro-batch size: up to {tokens} (--tokens_per_micro_batch).")
        self.screen.open(self._progress(), self._processes)
        try:
            with closing(steps):
                yield self._advance(steps)
        finally:
            self.screen.close(self.state.best_step)

    def _advance(self, steps: Iterator[S]) -> Iterator[S]:
        for step in steps:
            yield step
            self.screen.step(step, self.state.last_loss, self._progress())

    def _progress(self) -> Progress:
        return Progress(self.step, self.total_steps, self.steps_per_epoch, self.state.best_step)


@contextmanager
def open_run(
    config: TrainConfig,
    accelerator: Accelerator,
    hooks: Hooks = NO_HOOKS,
    precision_notes: Iterable[str] = (),
) -> Iterator[RunLogger]:
    """Lock the run's folder, open its log and start the watchdog; at the end, end the process
    group. A collective.

    precision_notes: of `launch`, for the start block.
    """
    folder = Path(config.run.output_dir)
    with (
        lock_run_folder(folder, accelerator) as messages,
        open_log(folder, accelerator, hooks) as log,
        open_watchdog(folder, accelerator, config.run) as watchdog,
    ):
        watchdog.progress = log
        log.screen.verbose, log.log_every = config.run.verbose, config.run.log_every.strip()
        log.say(*messages)
        log.screen.block("Device", describe_device(accelerator))
        for note in precision_notes:
            log.screen.block("Precision", note)
        yield log
        accelerator.end_training()


def open_log(folder: Path, accelerator: Accelerator, hooks: Hooks = NO_HOOKS) -> RunLogger:
    """The log of a run; a line that cannot be written raises on all ranks."""
    on_all_ranks = partial(raise_on_all_ranks, accelerator)
    return RunLogger(folder, accelerator.is_main_process, on_all_ranks, hooks)


def final_scores(
    state: TrainState, report: Mapping[str, Any], test_report: Mapping[str, Any]
) -> dict[str, Any]:
    """What trackers show of a finished run: best/accuracy, test/accuracy."""
    scores: dict[str, Any] = {"best/step": state.best_step}
    for of, found in {"best": report, "test": test_report}.items():
        given = found.get("scores")
        given = given if isinstance(given, dict) else {}  # of a damaged file
        scores |= {f"{of}/{name}": value for name, value in given.items()}
    return scores


def is_repeated(entry: Mapping[str, Any], step: int, evaluation_pending: bool) -> bool:
    """Whether a run that resumes from `step` writes a line of metrics.jsonl once more, or it is the
    throughput of a stopped process.
    """
    pending = (
        evaluation_pending and entry["step"] == step and entry.get("kind") in ("eval", "meter")
    )
    return entry["step"] > step or pending or entry.get("finished") is False


def environment(accelerator: Accelerator) -> str:
    """The software, hardware and command of a run, as JSON."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "command": sys.argv,
    }
    return json.dumps(facts, indent=1) + "\n"
