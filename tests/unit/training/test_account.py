"""What a run says of itself at its end and after an evaluation; the numbers themselves: tests/ranks/test_resume.py."""

import json
from pathlib import Path
from typing import Any

from bertdist.training.account import keep_score, record_training, tell_end
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation
from bertdist.training.run_logger import RunLogger


class Asked:
    """Stands for Best: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def consider(self, *what: Any) -> None:
        self.asked.append(what)

    def show(self, log: RunLogger) -> None:
        self.asked.append("show")


def lines_of(folder: Path) -> list[Any]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_evaluation_that_was_given_up_is_owed_and_the_run_not_finished(tmp_path: Path) -> None:
    progress, best, model = TrainState(step=8, finished=True), Asked(), Any
    log = RunLogger(tmp_path, enabled=True)
    keep_score(None, model, log, best, progress, 4)  # type: ignore[arg-type]
    assert (progress.evaluation_pending, progress.finished, best.asked, lines_of(tmp_path)) == (
        True,
        False,
        [],
        [],
    )


def test_an_evaluation_is_written_down_and_weighed(tmp_path: Path) -> None:
    progress, best, found = (
        TrainState(step=8, finished=True),
        Asked(),
        Evaluation(scores={"loss": 0.5, "accuracy": 1.0}, selection_score=1.0),
    )
    keep_score(found, Any, RunLogger(tmp_path, enabled=True), best, progress, 4)  # type: ignore[arg-type]
    assert lines_of(tmp_path) == [
        {"kind": "eval", "step": 8, "epoch": 2.0, "loss": 0.5, "accuracy": 1.0}
    ]
    assert (
        best.asked == [(Any, found, progress)]
        and progress.finished
        and not progress.evaluation_pending
    )


def test_losses_are_summed_and_then_divided(tmp_path: Path) -> None:
    progress = TrainState(step=2, tokens=9, unlogged_steps=[[3.0, 4.0], [1.0, 1.0]])
    record_training(RunLogger(tmp_path, enabled=True), progress, 4, learning_rate=0.1)
    ((line),) = lines_of(tmp_path)
    assert line["loss"] == 0.8 and progress.unlogged_steps == []


def test_the_end_is_said(tmp_path: Path, capsys: Any) -> None:
    for progress, said, state in (
        (
            TrainState(step=8, finished=True, best_step=4),
            "Finished: 8 steps, best weights (step 4)",
            "finished",
        ),
        (
            TrainState(step=4),
            "Asked to stop (SIGTERM): step 4 of 8 is saved; the same command goes on.",
            "preempted",
        ),
        (
            TrainState(step=4, evaluation_pending=True),
            "step 4 of 8 is saved; the same command goes on; its evaluation comes first then.",
            "preempted",
        ),
    ):
        tell_end(RunLogger(tmp_path, enabled=True), progress, Asked(), 8, "SIGTERM")  # type: ignore[arg-type]
        assert said in capsys.readouterr().err
        assert json.loads((tmp_path / "status.json").read_text())["state"] == state
