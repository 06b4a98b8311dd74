"""Several runs of one command, one after the other: a run per fold (--folds) or per seed (--seeds).

    with open_runs(config, "seeds.json", "per_seed") as (accelerator, log):
        finished = train_in_turn(runs, "seed", abouts, train, accelerator, log, add)

Each is a run like any other, in a folder of its own: it resumes after an interruption, and a
finished run is not trained again. `summarize` and `show_scores` are of their scores: mean, and the
sample standard deviation (n - 1).
"""

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import Accelerator

from bertdist.core.atomic_io import read_json_object
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import create_accelerator
from bertdist.distributed.launcher import check_world
from bertdist.distributed.preemption import StopSignal
from bertdist.training.run_lock import FailedStart
from bertdist.training.run_logger import RunLogger
from bertdist.training.screen import cell

SHOWN_RUNS = 10  # of whose scores the table has columns

Train: TypeAlias = Callable[[TrainConfig], bool]  # whether the run finished; else it was stopped
Summary: TypeAlias = dict[str, dict[str, float | None]]


@contextmanager
def open_runs(config: TrainConfig, file: str, key: str) -> Iterator[tuple[Accelerator, RunLogger]]:
    """The ranks, and the log of the runs together.

    file: the report that will be written into --output_dir; key: one of its entries, by which one
    of an earlier command is known. Raises ConfigError on all ranks for a file of another origin.
    """
    run = config.run
    accelerator = create_accelerator(run)
    check_world(accelerator.num_processes)
    with FailedStart(Path(run.output_dir)).remove(accelerator):
        with raise_on_all_ranks(accelerator):
            path = Path(run.output_dir, file)
            log = RunLogger(path.parent, enabled=accelerator.is_main_process)
            if path.exists() and key not in read_json_object(path):
                kind = file.removesuffix(".json").replace("_", "-")
                raise ConfigError(f"No {kind} wrote {path}: give another --output_dir.")
        yield accelerator, log


def train_in_turn(
    runs: Sequence[TrainConfig],
    unit: str,
    abouts: Sequence[str],
    train: Train,
    accelerator: Accelerator,
    log: RunLogger,
    add: Callable[[int], None],
) -> bool:
    """Train the runs; False if stopped before the end: the same call then resumes.

    unit: "fold"; abouts: what is said of each run at its start; add: called after each run with its
    number from 0, on every rank. Raises what `train` raises, such as CheckpointError if the folders
    hold other runs.
    """
    with StopSignal(runs[0].run.stop_before_time_limit) as stop:
        for number, config in enumerate(runs):
            position = f"{unit} {number + 1} of {len(runs)}"
            about = f"{position}: {abouts[number]}, in {config.run.output_dir}."
            log.say(about[0].upper() + about[1:])
            with _keep_process_group():
                if not train(config):
                    return False
            add(number)
            # On GPUs a call returns the answer of the call before.
            stopping = [stop.requested(accelerator) for _ in range(2)]
            if any(stopping) and number + 1 < len(runs):
                log.say(
                    f"Stop requested ({stop.reason}) after {position}; rerun the same command to "
                    "resume."
                )
                return False
    return True


@contextmanager
def _keep_process_group() -> Iterator[None]:
    """Let `train` leave the process group alive.

    A second group would meet at the first one's store (torchrun) and find its addresses there.
    accelerate 1.15 keeps the group if it believes that somebody else launched the processes.
    """
    before = os.environ.get("FORK_LAUNCHED")
    os.environ["FORK_LAUNCHED"] = "1"
    try:
        yield
    finally:
        del os.environ["FORK_LAUNCHED"]
        if before is not None:
            os.environ["FORK_LAUNCHED"] = before


def summarize(entries: Sequence[dict[str, Any]], key: str = "scores") -> Summary:
    """Mean and standard deviation (n - 1) of every score; None where a run has no such number.

    entries: a dict per run, with its scores under `key`.
    """
    scores: Summary = {}
    for name in dict.fromkeys(name for entry in entries for name in entry[key]):
        values = [entry[key].get(name) for entry in entries]
        numbers = [value for value in values if value is not None]
        defined = len(numbers) == len(entries)
        scores[name] = {
            "mean": statistics.fmean(numbers) if defined else None,
            "std": statistics.stdev(numbers) if defined else None,
        }
    return scores


def show_scores(
    title: str,
    summary: Summary,
    entries: Sequence[dict[str, Any]],
    unit: str,
    log: RunLogger,
    key: str = "scores",
) -> None:
    """A line per score: mean, standard deviation, and each run where these are few.

    unit: the entry that names a run, such as "fold".
    """
    shown = entries if len(entries) <= SHOWN_RUNS else []
    header = ["score", "mean", "std", *(f"{unit} {entry[unit]}" for entry in shown)]
    lines = [
        [name, *map(cell, [*values.values(), *(entry[key].get(name) for entry in shown)])]
        for name, values in summary.items()
    ]
    log.screen.table(title, header, lines, range(1, len(header)))
