"""The loop of a sweep, with trials that only write what a run writes, in no time."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bertdist.core.args import read_config
from bertdist.core.config import TrainConfig
from bertdist.core.errors import BertdistError, ConfigError
from bertdist.core.search_space import read_space
from bertdist.training.search import (
    COMPLETE,
    FAIL,
    PRUNED,
    RUNNING,
    Search,
    SearchPlan,
    open_search,
)
from bertdist.training.sweep_results import collect_results, show_results, write_results
from bertdist.training.sweep_runner import SweepRunner
from bertdist.training.trial_runs import read_evaluations, trial_folder

EPOCHS = 4
CONFIG = read_config(
    [
        *("--model_name_or_path=m", "--output_dir=o", "--train_file=t", "--validation_file=v"),
        f"--num_train_epochs={EPOCHS}",
    ]
)
SPACE = read_space(["learning_rate=1e-5..5e-4:log", "train_batch_size=16,32"])


class Killed(Exception):
    """Of the process of the sweep, by SIGKILL: nothing is cleaned up."""


class FakeTrial:
    """A run that has an evaluation per poll, and remembers how far it was."""

    def __init__(self, run: Path, values: Mapping[str, Any], outcome: Any) -> None:
        self.run, self.values, self.outcome, self.stopped = run, values, outcome, False
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "train", "step": 1, "epoch": 0.1, "loss": 1.0}) + "\n")

    def poll(self) -> int | None:
        done = len(read_evaluations(self.run))
        if self.stopped:
            return 75
        if done == 2 and self.outcome is not None:
            outcome, self.outcome = self.outcome, None
            if isinstance(outcome, str):
                self.status("failed", outcome)
                return 1
            return int(outcome)
        if done == EPOCHS:
            self.status("finished")
            best = self.run / "best"
            best.mkdir(exist_ok=True)
            (best / "model.safetensors").write_text("weights")
            (best / "manifest.json").write_text(
                json.dumps({"files": {"model.safetensors": {"bytes": 7, "xxh3_128": ""}}})
            )
            return 0
        score = score_of(self.values) * (done + 1) / EPOCHS
        line = {"kind": "eval", "step": 10 * (done + 1), "epoch": done + 1.0, "loss": 0.5}
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**line, "accuracy": score, "f1": None}) + "\n")
        saved = self.run / "checkpoints" / f"step_{10 * (done + 1):06d}"
        saved.mkdir(parents=True, exist_ok=True)
        return None

    def stop(self) -> None:
        self.stopped = True

    def status(self, state: str, reason: str = "") -> None:
        status = {"state": state, "step": 1, "reason": reason}
        (self.run / "status.json").write_text(json.dumps(status))


def score_of(values: Mapping[str, Any]) -> float:
    return 0.9 - 0.1 * abs(math.log(values["learning_rate"] / 1e-4))


class Sweep:
    """A sweep of fake trials in a folder, to be killed and started again."""

    def __init__(self, folder: Path, trials: int = 10, **outcomes: Any) -> None:
        """outcomes: of trial n (as t3): an exit code, or the error of a failed run."""
        self.folder, self.trials, self.outcomes = folder, trials, outcomes
        self.lines: list[str] = []
        self.running: list[FakeTrial] = []
        self.starts: list[int] = []
        self.polls_left = 10**6
        self.most = 0

    def search(self) -> Search:
        plan = SearchPlan(
            space=SPACE,
            trials=self.trials,
            sampler="tpe",
            pruner="median",
            seed=42,
            metric=None,
            settings={},
        )
        return open_search(self.folder, plan)

    def start(self, number: int, values: Mapping[str, Any], slot: int) -> FakeTrial:
        self.starts.append(number)
        outcome = self.outcomes.pop(f"t{number}", None)
        self.running.append(FakeTrial(trial_folder(self.folder, number), values, outcome))
        return self.running[-1]

    def runner(self, jobs: int = 1, stop: Callable[[], str] = str, **more: Any) -> SweepRunner:
        def stop_reason() -> str:
            self.polls_left -= 1
            if self.polls_left < 0:
                raise Killed
            self.most = max(self.most, len(runner._jobs))
            return stop()

        runner = SweepRunner(
            *(self.search(), self.folder, CONFIG, self.start, jobs, self.lines.append, stop_reason),
            poll_seconds=0.0,
            **more,
        )
        return runner

    def found(self) -> list[tuple[Any, ...]]:
        trials = self.search().trials
        return [(x.params, x.state, x.value, x.intermediate_values) for x in trials]


def test_trials_are_run_judged_and_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep(tmp_path, t3="CUDA out of memory")
    assert sweep.runner().run()
    found = sweep.found()
    assert len(found) == 10 and found[3][1] == FAIL
    states = [state for _, state, _, _ in found]
    assert PRUNED in states and set(states) == {COMPLETE, PRUNED, FAIL}
    for values, state, score, evaluations in found:
        if state == COMPLETE:
            assert score == pytest.approx(score_of(values)) and len(evaluations) == EPOCHS
        if state == PRUNED:
            assert len(evaluations) < EPOCHS
    best = max((x for x in found if x[1] == COMPLETE), key=lambda x: x[2])
    search = sweep.search()
    results = collect_results(search, tmp_path)
    assert results["best"]["values"] == best[0] and results["metric"] == "accuracy"
    write_results(results, tmp_path, CONFIG)
    again = read_config(["--config", str(tmp_path / "best.yaml")])
    assert again.optim.learning_rate == best[0]["learning_rate"]
    assert again.run.output_dir == str(tmp_path / "final") and again.data == CONFIG.data
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["results"][3]["error"] == "CUDA out of memory" and len(saved["results"]) == 10
    show_results(results, tmp_path)
    shown = capsys.readouterr().out
    assert "Trial 3 failed: CUDA out of memory" in shown and "10 of 10 trials:" in shown
    kept = [x.number for x in search.trials if (trial_folder(tmp_path, x.number) / "best").exists()]
    assert kept == [results["best"]["trial"]]
    kept = [x.name for x in (tmp_path / "trials").glob("*/checkpoints/step_*")]
    assert len(kept) == EPOCHS  # of the best


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    expected = Sweep(tmp_path / "a")
    expected.runner().run()
    sweep, kills = Sweep(tmp_path / "b"), 0
    while True:
        sweep.polls_left = 3 + kills % 4
        runner = sweep.runner()
        runner._stop_all = lambda: None  # type: ignore[method-assign]
        try:
            assert runner.run()
            break
        except Killed:
            kills += 1
            for job in runner._jobs:
                job.lock.release(force=True)  # as the system does
    assert kills > 3 and sweep.found() == expected.found()


def test_several_at_a_time(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.runner(jobs=3).run()
    assert len(sweep.found()) == 10 and sorted(sweep.starts) == list(range(10))
    assert sweep.most == 3


def test_a_stop_saves_the_trials_and_the_next_start_continues_them(tmp_path: Path) -> None:
    sweep, reasons = Sweep(tmp_path), iter(["", "", "", "SIGTERM"])
    assert not sweep.runner(jobs=2, stop=lambda: next(reasons, "SIGTERM")).run()
    assert [trial.stopped for trial in sweep.running] == [True, True]
    assert [x.state for x in sweep.search().trials] == [RUNNING, RUNNING]
    sweep.starts.clear()
    assert sweep.runner(jobs=2).run() and sweep.starts[:2] == [0, 1]
    assert sorted(sweep.starts) == list(range(10)) and RUNNING not in [x[1] for x in sweep.found()]


@pytest.mark.parametrize(("reason", "state"), [("SIGTERM", RUNNING), ("", FAIL)])
def test_a_trial_that_ends_as_the_sweep_is_stopped_has_not_failed(
    tmp_path: Path, reason: str, state: Any
) -> None:
    """SLURM's TERM is for all processes: a launcher may end by it before the sweep looks."""
    sweep = Sweep(tmp_path, trials=2, t0="the launcher was ended by SIGTERM")
    ended = lambda: reason if sweep.running and not sweep.running[0].outcome else ""  # noqa: E731
    sweep.runner(stop=ended).run()
    assert sweep.search().trials[0].state == state
    assert sweep.runner().run() and sweep.starts == ([0, 0, 1] if reason else [0, 1])


def test_a_killed_trial_resumes(tmp_path: Path) -> None:
    expected, sweep = Sweep(tmp_path / "a"), Sweep(tmp_path / "b", t0=-9)
    assert expected.runner().run() and sweep.runner().run()
    assert sweep.starts[:3] == [0, 0, 1] and sweep.found() == expected.found()
    assert "Trial 0: ended by SIGKILL (out of memory?); it resumes." in sweep.lines


def test_a_trial_that_is_killed_without_progress_fails(tmp_path: Path) -> None:
    class Dies(FakeTrial):
        def poll(self) -> int | None:
            return -9

    sweep = Sweep(tmp_path, trials=4)
    start = sweep.start

    def start_or_die(number: int, values: Mapping[str, Any], slot: int) -> FakeTrial:
        trial = start(number, values, slot)
        return Dies(trial.run, values, None) if number == 1 else trial

    sweep.start = start_or_die  # type: ignore[method-assign]
    assert sweep.runner().run() and sweep.starts == [0, 1, 1, 1, 2, 3]
    error = sweep.search().trials[1].user_attrs["error"]
    assert error == "ended by SIGKILL (out of memory?), 3 times without a new checkpoint"


def test_the_same_failure_of_the_first_trials_ends_the_sweep(tmp_path: Path) -> None:
    failures = {f"t{k}": "no model" for k in range(9)}
    sweep = Sweep(tmp_path, **failures)
    with pytest.raises(BertdistError, match=r"The first 3 trials failed, .*: no model"):
        sweep.runner().run()
    assert [x[1] for x in sweep.found()] == [FAIL] * 3
    del failures["t0"]  # the control: one that ends well is enough
    sweep = Sweep(tmp_path / "b", **failures)
    assert sweep.runner().run() and [x[1] for x in sweep.found()] == [
        COMPLETE,
        *[FAIL] * 8,
        COMPLETE,
    ]


def test_workers_share_the_trials(tmp_path: Path) -> None:
    one, other = Sweep(tmp_path), Sweep(tmp_path)
    first, second = (x.runner(is_worker=True) for x in (one, other))
    taken = first._take()
    assert taken is not None and taken.number == 0
    assert not second.run()  # all but the one that the other holds
    assert other.starts == list(range(1, 10)) and not second.is_complete
    taken.lock.release()
    third = Sweep(tmp_path)  # the first was killed: its trial is free
    assert third.runner(is_worker=True).run() and third.starts == [0]


def test_a_folder_in_use_is_waited_for(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=2)
    sweep.search().next()  # by the earlier sweep
    run = trial_folder(tmp_path, 0)
    run.mkdir(parents=True)
    lock = FileLock(run / "run.lock")
    lock.acquire()
    looks = iter(range(100))

    def release_later() -> str:
        if next(looks) == 5:
            assert sweep.starts == []
            lock.release()
        return ""

    assert sweep.runner(stop=release_later).run() and sweep.starts == [0, 1]
    assert sweep.lines[0] == "Trial 0: an earlier process still trains it; waiting for its end."


def test_an_undefined_score_is_a_failure(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=1)
    sweep.search().next()
    run = trial_folder(tmp_path, 0)
    run.mkdir(parents=True)
    lines = [{"kind": "eval", "step": k, "epoch": k, "loss": 1, "mcc": None} for k in (1, 2, 3, 4)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "status.json").write_text('{"state": "finished"}')
    with pytest.raises(BertdistError, match="mcc is undefined in every evaluation"):
        sweep.runner().run()


def test_a_run_that_this_sweep_has_not_started_is_no_trial(tmp_path: Path) -> None:
    first = Sweep(tmp_path, trials=2)
    assert first.runner().run()
    (tmp_path / "journal.log").unlink()  # to begin again, with other settings
    sweep = Sweep(tmp_path, trials=2)
    with pytest.raises(ConfigError, match=r"0000 holds files, and this sweep has not started"):
        sweep.runner().run()
    assert sweep.search().trials == [] and not sweep.starts
    (tmp_path / "trials" / "0000").rename(tmp_path / "mine")
    (tmp_path / "trials" / "0001").rename(tmp_path / "trials" / "0002")  # not of these two
    assert sweep.runner().run() and sweep.starts == [0, 1]


def test_trials_on_other_rows_do_not_compare(tmp_path: Path) -> None:
    class Saves(FakeTrial):
        rows = "40 rows, abc"

        def status(self, state: str, reason: str = "") -> None:
            super().status(state, reason)
            for folder in (self.run / "checkpoints").iterdir():
                old = folder.name != f"step_{10 * EPOCHS:06d}"
                rows = {"validation_rows": "old" if old else self.rows}
                text = {"must_match": {"training_rows": "60 rows, def"}, "may_change": rows}
                (folder / "state.json").write_text(json.dumps(text))

    def start(number: int, values: Mapping[str, Any], slot: int) -> FakeTrial:
        return Saves(trial_folder(tmp_path, number), values, None)

    sweep = Sweep(tmp_path, trials=2)
    sweep.start = start  # type: ignore[method-assign]
    assert sweep.runner().run()  # the control: the same rows
    sweep.trials, Saves.rows = 4, "40 rows, xyz"
    with pytest.raises(ConfigError, match=r"Trial 2 does not compare: it had other rows than"):
        sweep.runner().run()
    assert [x.state for x in sweep.search().trials] == [COMPLETE, COMPLETE, FAIL]


def test_weights_that_were_to_be_kept_are_kept(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, trials=3)
    assert sweep.runner(keep_all=True).run()
    sweep.trials = 6
    assert sweep.runner().run()  # without --keep_all
    search = sweep.search()
    kept = [x.number for x in search.trials if (trial_folder(tmp_path, x.number) / "best").exists()]
    assert search.best is not None and kept == sorted({0, 1, 2, search.best.number})


def test_a_score_of_the_other_direction_ends_the_sweep(tmp_path: Path) -> None:
    class Mse(FakeTrial):
        def poll(self) -> int | None:
            done = len(read_evaluations(self.run))
            line = {"kind": "eval", "step": done, "epoch": done, "loss": 0.5, "mse": 0.1}
            with open(self.run / "metrics.jsonl", "a") as file:  # of hub:mse
                file.write(json.dumps(line) + "\n")
            return 75 if self.stopped else None

    def start(number: int, values: Mapping[str, Any], slot: int) -> FakeTrial:
        return Mse(trial_folder(tmp_path, number), values, None)

    sweep = Sweep(tmp_path, trials=2)
    sweep.start = start  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="lower is better; give --metric_for_best_model mse"):
        sweep.runner().run()


def test_the_last_evaluation_prunes_nothing() -> None:
    config: TrainConfig = CONFIG
    from bertdist.training.trial_runs import Evaluation

    assert Evaluation(40, 4.0, {}).is_last(config.run)
    assert not Evaluation(30, 3.0, {}).is_last(config.run)
