"""launch/sweep.slurm on a real cluster: a signal and a cancellation are of one task of the array."""

import re
from pathlib import Path

import yaml
from rows import json_of, words_of, write_split
from slurm.cluster import Cluster, Job, until

from bertdist.core.args import read_config
from bertdist.train import run as train
from bertdist.training.trial_runs import (
    is_finished,
    last_saved_step,
    log_file,
    read_evaluations,
    trial_folder,
)

RATES = (3e-3, 1e-3, 3e-4, 1e-4)
STARTS = re.compile(r"^Trial (\d+)(?:, from step (\d+))?: learning_rate", re.MULTILINE)


def started(task: Job) -> list[tuple[int, int]]:
    """(trial, step that it starts from) in their order; 0 for one that is new."""
    return [(int(trial), int(step or 0)) for trial, step in STARTS.findall(task.log())]


def wait_for_checkpoint(tasks: list[Job], sweep: Path) -> tuple[Job, int]:
    """The first of them that is in the middle of a trial, with something saved; and that trial."""
    found: list[tuple[Job, int]] = []

    def is_saved() -> bool:
        for task in tasks:
            for trial, _ in started(task)[-1:]:
                run = trial_folder(sweep, trial)
                if last_saved_step(run) > 0 and not is_finished(run):
                    found.append((task, trial))
        return bool(found)

    until(is_saved, tasks[0].story)
    return found[0]


def test_four_tasks_find_the_best_and_one_that_is_cancelled_touches_no_other(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    settings = {"learning_rate": None, "max_train_steps": 240, "eval_every": "120 steps"}
    settings |= {"save_every": "10 steps", "log_every": "50 steps", "metric_for_best_model": "loss"}
    words = words_of(tiny_model, sweep, write_split(tmp_path, 64, 64), **settings)
    words += ["--sampler", "grid", "--pruner", "none", "--try"]
    words += ["learning_rate=" + ",".join(map(str, RATES))]
    array = cluster.sbatch(
        "sweep.slurm", *words, cwd=tmp_path, options=["--array=0-3", "--cpus-per-task=2"]
    )
    tasks = [Job(cluster, f"{array.id}_{task}") for task in range(4)]
    requeued, resumed = wait_for_checkpoint(tasks, sweep)
    requeued.signal("USR1")
    others = [task for task in tasks if task is not requeued]
    cancelled, freed = wait_for_checkpoint(others, sweep)
    cancelled.cancel()
    others.remove(cancelled)
    assert cancelled.wait() == "CANCELLED", cancelled.story()
    for task in (requeued, *others):
        assert task.wait() == "COMPLETED", task.story()
    restarts = [task.restarts() for task in (requeued, cancelled, *others)]
    assert restarts == [1, 0, 0, 0], requeued.story()

    # Each trial was begun once; those of two tasks went on from a checkpoint, in any task.
    starts = [start for task in tasks for start in started(task)]
    assert sorted(trial for trial, step in starts if step == 0) == [0, 1, 2, 3]
    assert sorted(trial for trial, step in starts if step) == sorted([resumed, freed])
    results = json_of(sweep / "sweep.json")
    assert results["states"]["finished"] == 4, results
    scores = {entry["trial"]: entry["score"] for entry in results["results"]}
    best = results["best"]["trial"]
    assert scores[best] == min(scores.values()) and len(set(scores.values())) == 4
    found = yaml.safe_load((sweep / "best.yaml").read_text())
    assert found["learning_rate"] == results["best"]["values"]["learning_rate"] == RATES[best]
    assert (sweep / "report.html").exists()

    # Trained again undisturbed, the one that was freed and another have the same evaluations.
    other = next(trial for trial in range(4) if trial not in (resumed, freed))
    assert "esum" not in log_file(sweep, other).read_text()
    assert "esum" in log_file(sweep, freed).read_text(), "the control"
    for trial in (freed, other):
        out = tmp_path / f"again{trial}"
        flags = ["--learning_rate", str(RATES[trial]), "--output_dir", str(out)]
        assert train(read_config(["--config", str(sweep / "base.yaml"), *flags])) == 0
        assert read_evaluations(out) == read_evaluations(trial_folder(sweep, trial))
    assert read_evaluations(out) != read_evaluations(trial_folder(sweep, freed)), "the control"
