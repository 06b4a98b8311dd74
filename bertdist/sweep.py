"""Search for the settings of training that score best on the validation rows.

    bertdist sweep --config run.yaml --try learning_rate=1e-5..5e-4:log train_batch_size=16,32 \
        --trials 20 --output_dir sweep

Each trial is a run of `bertdist train` in sweep/trials/0007, made by a process of its own; torch is
not imported here while they run. Which values come next, and which trials end early, is Optuna's
(training/search.py); the loop is training/sweep_runner.py, the page reporting/sweep_page.py.
"""

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import importlib.util
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import yaml

from bertdist.core.args import TRAIN_SECTIONS, parse_arguments, parse_or_exit
from bertdist.core.atomic_io import atomic_write, explain_write_errors
from bertdist.core.config import Section, TrainConfig, as_yaml, config_to_yaml, setting
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.output_files import REPORT_FILE, check_sweep_folder
from bertdist.core.search_space import Space, check_space, grid_of, read_space, with_values
from bertdist.core.terminal import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    escape_unencodable,
    exit_with_error,
    print_to_stderr,
    show,
)
from bertdist.core.time_limit import slurm_seconds_left
from bertdist.data import preflight
from bertdist.tasks.metric_names import own_selection_problem

if TYPE_CHECKING:  # Optuna, with the extra sweep only
    from bertdist.training.search import Search, SearchPlan

PROGRAM = "bertdist sweep"
ABOUT = """Try settings of training and keep the best; the same command continues after a stop.

  bertdist sweep --config run.yaml --trials 20 --output_dir sweep \\
      --try learning_rate=1e-5..5e-4:log train_batch_size=16,32
  bertdist sweep --output_dir sweep --status

All flags of `bertdist train` are those of every trial."""
BASE_FILE = "base.yaml"  # what all trials share
# Where a trial computes and what it writes: they may change when a sweep continues.
MAY_CHANGE = (
    *("output_dir", "test_file", "use_cpu", "tokens_per_micro_batch", "dataloader_num_workers"),
    *("torch_compile", "cuda_graphs", "gradient_checkpointing", "log_every", "save_every"),
    *("save_total_limit", "verbose", "report_to", "stop_before_time_limit", "rank_timeout"),
    *("detect_anomaly", "report", "project", "run_name"),
)
# Of one run, or of several: a trial has none of them.
NOT_OF_TRIALS = ("folds", "seeds", "dry_run", "resume_from_checkpoint", "push_to_hub")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MARGIN_SECONDS = 10.0  # before the trials themselves see the time limit


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Section):
    """The settings of a sweep, besides those of training."""

    _argument_group_name = "sweep"

    try_: list[str] | None = setting(
        None,
        "What to try, as name=values: a..b is any number (a whole one where the setting takes "
        "these), a..b:log the same evenly on a logarithmic scale, a..b:0.05 in steps, and x,y,z "
        "are these values, such as lr_scheduler_type=linear,cosine or "
        "eval_every='1 epoch,200 steps'. Required.",
        brief="Values to try: learning_rate=1e-5..5e-4:log",
    )
    trials: int | None = setting(
        None,
        "Number of trials; failed and pruned ones count. Default: 20, with --sampler grid all "
        "combinations. It may be raised later.",
        brief="Number of trials, default 20",
    )
    jobs: int = setting(
        1,
        "Trials at a time: each has a GPU of its own, or its share of the CPU's cores.",
        brief="Trials at a time, one per GPU; default 1",
    )
    processes: int = setting(1, "Processes of each trial, as `bertdist train --processes`.")
    sampler: Literal["tpe", "random", "grid"] = setting(
        "tpe",
        "How values are chosen, by --seed: tpe (Optuna's tree-structured Parzen estimator; the "
        "first 10 at random), random, or grid (all combinations, in their order).",
    )
    pruner: Literal["median", "hyperband", "none"] = setting(
        "median",
        "Which trials end early: median (an evaluation scores below the median of the others at "
        "that evaluation, after the first 5 trials), hyperband, or none.",
        brief="Which trials end early: median, hyperband, none",
    )
    keep_all: bool = setting(
        False,
        "Keep the weights (checkpoints/ and best/) of all trials. Default: of the best so far; the "
        "others keep their scores and predictions.",
    )
    status: bool = setting(
        False,
        "Show the trials of --output_dir and exit; nothing is changed.",
        brief="Show the trials of --output_dir and exit",
    )
    worker: bool = setting(
        False,
        "Take trials of a sweep that other processes work on, too: the tasks of a SLURM array "
        "(launch/sweep.slurm).",
    )


class Sweep(NamedTuple):
    """A command."""

    sweep: SweepConfig
    train: TrainConfig  # what all trials share; without --try
    space: Space

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return Path(self.train.run.output_dir)

    @property
    def trials(self) -> int:
        """How many."""
        grid = self.sweep.sampler == "grid"
        return self.sweep.trials or (len(list(grid_of(self.space))) if grid else 20)

    @property
    def pruner(self) -> Literal["median", "hyperband", "none"]:
        """The one that is used: evaluations at different points of training do not compare."""
        return "none" if "eval_every" in self.space else self.sweep.pruner


# ---- The flags


def read_sweep_config(arguments: Sequence[str]) -> Sweep:
    """The flags of a sweep and of training. Raises ConfigError with one line per problem."""
    if sum(word.split("=")[0] == "--try" for word in arguments) > 1:
        raise ConfigError("--try is given twice: name all settings after one --try.")
    sections = [SweepConfig, *TRAIN_SECTIONS]
    sweep, *rest = parse_arguments(PROGRAM, sections, arguments, ABOUT)
    assert isinstance(sweep, SweepConfig)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    train = TrainConfig(**dict(zip(names, rest, strict=True)))
    if sweep.status:
        if not train.run.output_dir:
            raise ConfigError("--status needs --output_dir: the folder of the sweep.")
        return Sweep(sweep, train, {})
    if problems := list(_problems(sweep, train)):
        raise ConfigError("\n".join(problems))
    space = read_space(sweep.try_ or [])
    check_space(space, train)
    if sweep.sampler == "grid":
        size = len(list(grid_of(space)))
        if (sweep.trials or 0) > size:
            raise ConfigError(f"--trials is {sweep.trials}, and the grid has {size} combinations.")
    return Sweep(sweep, train, space)


def _problems(sweep: SweepConfig, train: TrainConfig) -> Iterable[str]:
    if not sweep.try_:
        yield "--try is missing: what to try, such as --try learning_rate=1e-5..5e-4:log."
    for name in ("trials", "jobs", "processes"):
        value = getattr(sweep, name)
        if value is not None and value < 1:
            yield f"--{name} is {value}; expected at least 1."
    if problem := own_selection_problem(train.task.metrics, train.task.metric_for_best_model):
        yield problem
    data = train.data
    if data.train_file and not (data.validation_file or data.validation_split):
        yield (
            "A sweep needs rows to compare trials on: give --validation_file, or a share as "
            "--validation_split."
        )
    for section in (train.data, train.task, train.run):
        for name in NOT_OF_TRIALS:
            if hasattr(section, name) and getattr(section, name) != getattr(type(section), name):
                yield f"--{name} is not for trials; give it to `bertdist train --config best.yaml`."


def check_start(sweep: Sweep) -> None:
    """Raise BertdistError for what can be seen before any trial."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("A sweep needs Optuna: pip install optuna, or 'bertdist[sweep]'.")
    check_sweep_folder(sweep.folder)
    if sweep.sweep.status:
        return
    first = {name: dimension.ends()[0] for name, dimension in sweep.space.items()}
    train = with_values(sweep.train, first)
    preflight.check_train(replace(train, run=replace(train.run, output_dir="")))
    for name in sweep.space["model_name_or_path"].ends() if "model_name_or_path" in first else ():
        preflight.check_model(str(name), "--try model_name_or_path")


# ---- The command


def run(sweep: Sweep) -> int:
    """Run the trials, or show them; returns the exit code."""
    with explain_write_errors(sweep.folder):
        return _show_status(sweep.folder) if sweep.sweep.status else _run(sweep)


def _run(sweep: Sweep) -> int:
    from filelock import FileLock, Timeout

    from bertdist.training.search import COMPLETE, open_search
    from bertdist.training.sweep_runner import SweepRunner
    from bertdist.training.trial_runs import TrialLauncher

    config, folder = sweep.sweep, sweep.folder
    gpus = visible_gpus(sweep)
    search = open_search(folder, search_plan(sweep))
    only = FileLock(folder / ".running.lock")
    if not config.worker:
        try:
            only.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"Another process runs the sweep in {folder}. --worker takes trials of it, too."
            ) from None
    with search.locked():  # workers write it at the same time
        atomic_write(folder / BASE_FILE, _base_yaml(sweep).encode())
    launcher = TrialLauncher(folder, folder / BASE_FILE, config.processes, gpus, config.jobs)
    finished = False
    with StopFlag(sweep.train.run.stop_before_time_limit) as stop:
        _say_start(sweep, search, gpus)
        runner = SweepRunner(
            search,
            folder,
            sweep.train,
            launcher,
            config.jobs,
            print_to_stderr,
            stop.reason,
            keep_all=config.keep_all,
            is_worker=config.worker,
            discard=discard_weights,
        )
        try:
            finished = runner.run()
            if finished and not stop.reason():
                with search.locked():  # by one worker
                    finished = _test_best(sweep, search, launcher, stop)
        finally:
            is_last = finished or not config.worker
            with_page = is_last and not stop.reason()
            results = _write(search, folder, sweep.train, with_page)
        _show(results, folder)
        only.release()
    if stop.reason():
        print_to_stderr(f"Stopped ({stop.reason()}); the same command continues.")
        return EXIT_STOPPED
    if not finished:
        print_to_stderr("Other processes still run trials of this sweep.")
    if finished and not any(trial.state == COMPLETE for trial in search.trials):
        raise BertdistError("No trial has finished: there is no best one.")
    return 0


def discard_weights(run: Path) -> None:
    """Remove checkpoints/ and best/ of a run, with the model card that bertdist has written."""
    from bertdist.core.atomic_io import MODEL_CARD
    from bertdist.reporting.model_card import is_own
    from bertdist.training.trial_runs import remove_weights

    card = run / "best" / MODEL_CARD
    if card.is_file() and is_own(card.read_text(encoding="utf-8", errors="replace")):
        card.unlink()
    remove_weights(run)


def search_plan(sweep: Sweep) -> "SearchPlan":
    """What is searched, and what must stay the same when it continues."""
    from bertdist.training.search import SearchPlan

    train, config = sweep.train, sweep.sweep
    # Not the defaults: a later version has more settings.
    sections = [getattr(train, field.name) for field in dataclasses.fields(train)]
    kept = {
        field.name: getattr(section, field.name)
        for section in sections
        for field in dataclasses.fields(section)
        if field.name not in {*MAY_CHANGE, *sweep.space}
        and getattr(section, field.name) != field.default
    }
    space = {name: str(dimension) for name, dimension in sweep.space.items()}
    settings = {**kept, "try": space, "sampler": config.sampler, "pruner": config.pruner}
    return SearchPlan(
        space=sweep.space,
        trials=sweep.trials,
        sampler=config.sampler,
        pruner=sweep.pruner,
        seed=train.run.seed,
        metric=train.task.metric_for_best_model or next(iter(train.task.metrics or []), None),
        settings=settings,
    )


def _base_yaml(sweep: Sweep) -> str:
    """The settings of all trials: the rows to test on are for the best alone."""
    data = sweep.train.data
    data = replace(data, test_file=None, test_split=data.test_split if data.train_file else None)
    values = yaml.safe_load(config_to_yaml(replace(sweep.train, data=data)))
    return as_yaml(
        {name: x for name, x in values.items() if name not in {"output_dir", *sweep.space}}
    )


def _say_start(sweep: Sweep, search: "Search", gpus: Sequence[str]) -> None:
    config, done = sweep.sweep, len(search.trials)
    where = f", GPUs {' '.join(gpus)}" if gpus else ""
    space = " ".join(f"{name}={dimension}" for name, dimension in sweep.space.items())
    print_to_stderr(
        f"Sweep of {sweep.trials} trials in {sweep.folder}, {config.jobs} at a time{where}; "
        f"sampler {config.sampler}, pruner {sweep.pruner}, seed {sweep.train.run.seed}.",
        f"Trying {space}.",
        *["No trial is pruned: with eval_every their evaluations are at different points."]
        * (sweep.pruner != config.pruner),
        *[f"It continues: {done} trials have been started."] * (done > 0),
    )


def visible_gpus(sweep: Sweep) -> list[str]:
    """The GPUs to divide among the trials, as CUDA_VISIBLE_DEVICES names them; [] for one trial at
    a time, which takes what it gets, and on the CPU. Raises ConfigError if there are too few.
    """
    needed = sweep.sweep.jobs * sweep.sweep.processes
    if sweep.train.run.use_cpu or sweep.sweep.jobs == 1:
        return []
    # By another process: torch takes seconds and memory, for hours.
    count = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    number = int(found.stdout.strip() or 0) if found.returncode == 0 else 0
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = given[:number] if given else list(map(str, range(number)))
    if names and len(names) < needed:
        raise ConfigError(
            f"--jobs {sweep.sweep.jobs} with {sweep.sweep.processes} process(es) each needs "
            f"{needed} GPUs, and there are {len(names)} (with --use_cpu there may be any number)."
        )
    return names


def _test_best(sweep: Sweep, search: "Search", launcher: Any, stop: "StopFlag") -> bool:
    """Evaluate the best trial on the rows of --test_file; False after a stop."""
    data, best = sweep.train.data, search.best
    more = ["--test_file", str(data.test_file)] if data.test_file else []
    more += (
        ["--test_split", str(data.test_split)] if data.test_split and not data.train_file else []
    )
    if best is None or not more:
        return True
    print_to_stderr(f"Trial {best.number}, the best: evaluating the test rows.")
    process = launcher(best.number, dict(best.params), 0, more)
    while (code := process.poll()) is None:
        if stop.reason():
            process.stop()
        time.sleep(0.2)
    if code and not stop.reason():
        from bertdist.training.trial_runs import error_of, log_file, trial_folder

        log = log_file(sweep.folder, best.number)
        error = error_of(trial_folder(sweep.folder, best.number), log, code)
        raise BertdistError(f"The test rows could not be evaluated: {error}")
    return not code


def _write(search: "Search", folder: Path, train: TrainConfig, with_page: bool) -> dict[str, Any]:
    from bertdist.training.sweep_results import collect_results, write_results

    results = collect_results(search, folder)
    with search.locked():
        write_results(results, folder, train)
        if with_page:  # its charts import torch
            _write_page(results, folder)
    return results


def _write_page(results: dict[str, Any], folder: Path) -> None:
    """report.html; where it cannot be written, a line says why, and the sweep is as good."""
    try:
        from bertdist.reporting.page import save
        from bertdist.reporting.sweep_page import page_of_sweep

        save(folder / REPORT_FILE, page_of_sweep(results, folder))
    except (BertdistError, ImportError, ValueError, ArithmeticError) as error:
        print_to_stderr(f"{folder / REPORT_FILE} could not be written: {error}")


def _show(results: dict[str, Any], folder: Path) -> None:
    from bertdist.training.sweep_results import BEST_FILE, RESULTS_FILE, show_results

    show_results(results, folder)
    files = [name for name in (REPORT_FILE, RESULTS_FILE, BEST_FILE) if (folder / name).exists()]
    if results["best"]:
        show(
            f"Files: {', '.join(str(folder / name) for name in files)}.",
            f"Next: bertdist predict --model {shlex.quote(str(folder))} --input new.csv, or "
            f"bertdist train --config {shlex.quote(str(folder / BEST_FILE))} --seeds 5",
        )


def _show_status(folder: Path) -> int:
    """The trials so far, from the journal alone."""
    from bertdist.training.search import read_search
    from bertdist.training.sweep_results import collect_results, show_results

    show_results(collect_results(read_search(folder), folder), folder)
    return 0


class StopFlag:
    """Set by a signal, or shortly before the time limit of a SLURM job. A second Ctrl-C raises
    KeyboardInterrupt at once; the trials see that their parent has ended, and save.
    """

    def __init__(self, margin_seconds: float) -> None:
        left = slurm_seconds_left()
        self._margin = 0.0 if left is None else min(margin_seconds + MARGIN_SECONDS, left / 2)
        self._reason = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._reason = self._reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._reason = "SIGINT"

    def reason(self) -> str:
        """Why to stop; "" to go on."""
        left = slurm_seconds_left()
        if not self._reason and left is not None and left < self._margin:
            self._reason = f"time limit in {left:.0f} s"
        return self._reason


def run_and_exit(sweep: Sweep) -> NoReturn:
    """The command of a shell: `run`, and its exit code; mistakes are one line."""
    escape_unencodable()
    try:
        code = run(sweep)
        sys.stdout.flush()
    except BertdistError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print_to_stderr("bertdist: Interrupted; the same command continues.")
        os._exit(EXIT_INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit(parse_or_exit(read_sweep_config, check_start))
