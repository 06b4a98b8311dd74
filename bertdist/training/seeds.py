"""The same run with several seeds: how much of a score is chance.

`train_seeds` is `bertdist train --seeds 5`: a run per seed in output_dir/seeds/42 and so on, which
differ in nothing else: rows that --validation_split holds out are those of --split_seed, the same
in all. seeds.json has the scores of every run, their mean and standard deviation, and the best:

    {"seeds": [42, 43], "metric": "accuracy",
     "best": {"seed": 43, "folder": "seeds/43", "score": 0.92},
     "scores": {"accuracy": {"mean": 0.91, "std": 0.01}, ...}, "test_scores": {...},
     "per_seed": [{"seed": 42, "step": 75, "scores": {...}, "test_scores": {...}}, ...]}
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bertdist.core.atomic_io import atomic_write, read_json_object, to_json
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.tasks.metric_names import own_selection_problem, selected_score
from bertdist.training.repeated_runs import (
    Train,
    open_runs,
    show_scores,
    summarize,
    train_in_turn,
)
from bertdist.training.run_logger import RunLogger

REPORT_FILE = "seeds.json"
FOLDER = "seeds"


def train_seeds(config: TrainConfig, train: Train) -> bool:
    """The runs of --seeds, seeds.json and a table; False if stopped before the end.

    train: that of the script. Raises BertdistError.
    """
    if problem := own_selection_problem(config.task.metrics, config.task.metric_for_best_model):
        raise ConfigError(problem)
    seeds = config.run.seed_list
    runs = [run_of_seed(config, seed) for seed in seeds]
    entries: list[dict[str, Any]] = []

    def add_scores(number: int) -> None:
        folder = Path(runs[number].run.output_dir)
        report, test = (
            read_json_object(folder / f"{prefix}evaluation.json") for prefix in ("", "test_")
        )
        entry = {"seed": seeds[number], "step": report.get("step", test.get("step"))}
        entry |= {"scores": report.get("scores", {}), "test_scores": test.get("scores", {})}
        entries.append(entry)

    with open_runs(config, REPORT_FILE, "per_seed") as (accelerator, log):
        abouts = [f"--seed {seed}" for seed in seeds]
        if not train_in_turn(runs, "run", abouts, train, accelerator, log, add_scores):
            return False
        _report(config, entries, accelerator, log)
        accelerator.end_training()
    return True


def run_of_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """The run of a seed: all else is the same, the held-out rows too."""
    data, run = config.data, config.run
    if data.train_file and (data.validation_split or data.test_split) and data.split_seed is None:
        data = replace(data, split_seed=run.seed)
    folder = Path(run.output_dir, FOLDER, str(seed))
    return replace(
        config, data=data, run=replace(run, seed=seed, seeds=None, output_dir=str(folder))
    )


def _report(
    config: TrainConfig, entries: list[dict[str, Any]], accelerator: Accelerator, log: RunLogger
) -> None:
    path = Path(config.run.output_dir, REPORT_FILE)
    with raise_on_all_ranks(accelerator):
        if not accelerator.is_main_process:
            return
        summary, test = summarize(entries), summarize(entries, "test_scores")
        metric, best = _best(config, entries)
        report = {"seeds": [entry["seed"] for entry in entries], "metric": metric, "best": best}
        report |= {"scores": summary, "test_scores": test, "per_seed": entries}
        atomic_write(path, to_json(report, indent=1))
        number = len(entries)
        if summary:
            show_scores(f"Scores of {number} seeds", summary, entries, "seed", log)
        if test:
            title = f"Scores of the test rows, {number} seeds"
            show_scores(title, test, entries, "seed", log, "test_scores")
        if best is not None:
            folder = path.parent / best["folder"]
            log.say(
                f"Best by {metric}: seed {best['seed']}, in {folder}. It was chosen by its score: "
                "expect the mean of new data, not this score."
            )
        log.screen.block("Files", f"{path}: scores of every seed, mean and standard deviation")
        log.screen.block("", f"{path.parent / FOLDER}: a run per seed")


def _best(
    config: TrainConfig, entries: list[dict[str, Any]]
) -> tuple[str | None, dict[str, Any] | None]:
    """The score that selects, and the run with the best one; None where there is none."""
    named = config.task.metric_for_best_model
    found = [(*selected_score(entry["scores"], named), entry) for entry in entries]
    defined = [(rank, entry) for _, rank, entry in found if rank is not None]
    if not defined:
        return None, None
    name, entry = found[0][0], max(defined, key=lambda pair: pair[0])[1]
    seed = entry["seed"]
    return name, {"seed": seed, "folder": f"{FOLDER}/{seed}", "score": entry["scores"][name]}
