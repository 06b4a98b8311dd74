"""The best weights are kept when they are better, and a run stops when it no longer gets better."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bertdist.core.config import ModelConfig, RunConfig
from bertdist.core.errors import CheckpointError
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_trained_classifier,
)
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task
from bertdist.training import best_model as best_module
from bertdist.training.best_model import BestModel
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation

ONE_RANK: Any = SimpleNamespace(num_processes=1, is_main_process=True)
NAN = math.nan
TASK = SingleLabel(("no", "yes"))


class Considered:
    """What `consider` makes of a row of merits: steps whose weights were kept, and the step after which it was enough."""

    def __init__(
        self, merits: list[float], progress: TrainState | None = None, **settings: Any
    ) -> None:
        self.kept: list[int] = []
        self.progress = progress or TrainState()
        self.waited: list[int] = []
        self.stopped: int | None = None
        best = BestModel(RunConfig(**settings), None, TASK, ONE_RANK, {})  # type: ignore[arg-type]  # nothing is written here
        best.keep = lambda model, evaluation, progress: self.kept.append(progress.step)  # type: ignore[method-assign, assignment]
        for selection_score in merits:
            self.progress.step += 1
            best.consider(
                None, Evaluation(scores={}, selection_score=selection_score), self.progress
            )  # type: ignore[arg-type]
            self.waited.append(self.progress.evaluations_since_best)
            if self.progress.finished and self.stopped is None:
                self.stopped = self.progress.step


# ---- What is kept


@pytest.mark.parametrize(
    ("merits", "kept", "best_score"),
    [
        ([0.5], [1], 0.5),
        ([0.0], [1], 0.0),
        ([-2.0, -1.0, -3.0], [1, 2], -1.0),  # a loss: less is better, so merits are negative
        ([0.5, 0.6, 0.4, 0.6, 0.7], [1, 2, 5], 0.7),
        ([0.5, 0.5, 0.5], [1], 0.5),  # as good is not better: the earlier weights stay
        ([0.5, NAN, 0.6], [1, 3], 0.6),
        (
            [NAN, 0.1, 0.05],
            [1, 2],
            0.1,
        ),  # the first are kept whatever they are, and any number is better than none
        ([0.5, -math.inf, math.inf], [1, 3], math.inf),
    ],
)
def test_the_best_weights_are_kept_when_they_are_better(
    merits: list[float], kept: list[int], best_score: float
) -> None:
    found = Considered(merits)
    assert found.kept == kept
    assert found.progress.best_score == best_score
    assert found.progress.best_step == kept[-1]


def test_nothing_is_not_better_than_nothing() -> None:
    found = Considered([NAN, NAN, NAN], early_stopping_patience=2)
    assert found.waited == [0, 1, 2]
    assert found.stopped == 3
    assert found.kept == [1]


def test_a_run_that_goes_on_remembers_its_best() -> None:
    merits = [0.3, 0.5, 0.4, 0.45, 0.6, 0.1]
    whole = Considered(merits)
    for cut in range(len(merits)):
        first = Considered(merits[:cut])
        state = TrainState(
            **json.loads(json.dumps(vars(first.progress)))
        )  # as a checkpoint keeps it
        second = Considered(merits[cut:], progress=state)
        assert first.kept + second.kept == whole.kept
        assert second.progress == whole.progress


# ---- When it is enough


@pytest.mark.parametrize(
    ("merits", "patience", "threshold", "waited", "stopped"),
    [
        ([0.5, 0.4, 0.4], None, 0.0, [0, 1, 2], None),
        ([0.5, 0.4, 0.4], 2, 0.0, [0, 1, 2], 3),
        ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 0.0, [0, 1, 0, 1, 2], 5),
        ([0.5, 0.5], 1, 0.0, [0, 1], 2),  # as good is not better
        ([0.5, NAN, NAN], 2, 0.0, [0, 1, 2], 3),
        ([0.5, 0.5625, 0.625], 1, 0.125, [0, 1, 2], 2),  # better, but by too little
        ([0.5, 0.75, 0.875], 1, 0.125, [0, 0, 1], 3),  # by exactly the threshold: too little
        ([-4.0, -3.0, -2.9375], 1, 0.5, [0, 0, 1], 3),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_a_better_score(
    merits: list[float],
    patience: int | None,
    threshold: float,
    waited: list[int],
    stopped: int | None,
) -> None:
    found = Considered(merits, early_stopping_patience=patience, early_stopping_threshold=threshold)
    assert (found.waited, found.stopped) == (waited, stopped)


def test_a_little_better_is_kept_though_it_does_not_count_against_the_patience() -> None:
    found = Considered([0.5, 0.5625, 0.625], early_stopping_threshold=0.125)
    assert found.kept == [1, 2, 3]


def test_a_finished_run_stays_finished() -> None:
    assert Considered(
        [0.5, 0.6], TrainState(finished=True), early_stopping_patience=5
    ).progress.finished


# ---- What is written


@pytest.fixture
def model(tiny_model: Path) -> Classifier:
    config = ModelConfig(model_name_or_path=str(tiny_model))
    torch.manual_seed(0)
    return load_classifier(config, TASK)[0]


def best_in(folder: Path, tiny_model: Path, task: Task = TASK) -> BestModel:
    return BestModel(
        RunConfig(output_dir=str(folder)),
        AutoTokenizer.from_pretrained(tiny_model),
        task,
        ONE_RANK,
        {"max_length": 16},
    )


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_kept_can_be_used_and_read(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    logits = torch.tensor([[0.0, 0.0], [-50.0, 50.0]])
    classes = {"labels": ["no", "yes"]}
    evaluation = Evaluation(
        scores={"loss": 0.5},
        selection_score=0.5,
        answers=TASK.to_records(logits),
        references=np.array([1, 0]),
        classes=classes,
    )
    progress = TrainState(step=7)
    best_in(tmp_path, tiny_model).consider(model, evaluation, progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "evaluation.json",
        "predictions.jsonl",
    ]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "step": 7,
        "scores": {"loss": 0.5},
        "labels": ["no", "yes"],
    }
    assert lines_of(tmp_path / "predictions.jsonl") == [
        {"row": 0, "label": "no", "score": 0.5, "truth": "yes"},
        {"row": 1, "label": "yes", "score": 1.0, "truth": "no"},
    ]
    again, task, notes = load_trained_classifier(str(tmp_path / "best"))
    assert (task, notes) == (TASK, {"max_length": 16})
    for name, weight in model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("task", "logits", "references", "first"),
    [
        (
            MultiLabel(("ä", "b")),
            [[9.0, -9.0]],
            [[0.0, 1.0]],
            {"labels": [{"label": "ä", "score": pytest.approx(0.9999, abs=1e-4)}], "truth": ["b"]},
        ),
        (Regression(("stars",)), [[1.5]], [2.25], {"label": "stars", "score": 1.5, "truth": 2.25}),
    ],
)
def test_every_kind_of_task_writes_its_truth(
    task: Task,
    logits: list[Any],
    references: list[Any],
    first: dict[str, Any],
    model: Classifier,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    answers = task.to_records(torch.tensor(logits))
    evaluation = Evaluation(
        scores={"loss": 0.5},
        selection_score=0.5,
        answers=answers,
        references=np.array(references, dtype=np.float32),
    )
    best_in(tmp_path, tiny_model, task).keep(model, evaluation, TrainState(step=1))
    assert lines_of(tmp_path / "predictions.jsonl") == [{"row": 0, **first}]
    if isinstance(task, MultiLabel):
        assert "ä" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")


def test_weights_without_an_evaluation_are_kept_alone(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    progress = TrainState(step=3)
    best_in(tmp_path, tiny_model).keep(model, None, progress)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert progress.best_step == 3


def test_a_run_without_a_place_to_write_ends_with_one_line(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^Cannot write .*file/best: Not a directory"):
        best_in(tmp_path / "file", tiny_model).keep(model, None, TrainState(step=3))


def test_only_the_main_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("written")

    for name in ("write_folder", "atomic_write"):
        monkeypatch.setattr(best_module, name, refuse)
    for main in (False, True):
        rank: Any = SimpleNamespace(num_processes=1, is_main_process=main)
        best = BestModel(RunConfig(output_dir=str(tmp_path)), None, TASK, rank, {})  # type: ignore[arg-type]
        progress = TrainState(step=4)
        if main:  # the control
            with pytest.raises(AssertionError, match="written"):
                best.keep(None, None, progress)  # type: ignore[arg-type]
        else:
            best.keep(None, None, progress)  # type: ignore[arg-type]
        assert progress.best_step == 4  # all ranks know which it was


def test_no_number_is_written_as_json_has_it(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    """null; json.dumps would write NaN, which other programs refuse."""
    task = Regression(("stars",))
    evaluation = Evaluation(
        scores={"mse": NAN},
        selection_score=NAN,
        answers=task.to_records(torch.tensor([[NAN]])),
        references=np.array([2.25]),
    )
    best_in(tmp_path, tiny_model, task).keep(model, evaluation, TrainState(step=1))
    assert json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)[
        "scores"
    ] == {"mse": None}
    found = json.loads((tmp_path / "predictions.jsonl").read_text(), parse_constant=pytest.fail)
    assert found == {"row": 0, "label": "stars", "score": None, "truth": 2.25}
