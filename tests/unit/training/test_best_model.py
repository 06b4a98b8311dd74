"""The best weights are kept when they are better, and a run stops when it no longer gets better."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from bertdist.core.config import ModelConfig, RunConfig, TaskConfig
from bertdist.core.errors import CheckpointError
from bertdist.data.in_memory import records_from_texts
from bertdist.data.loader import MapLoader
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_trained_classifier,
)
from bertdist.tasks.tasks import SingleLabel
from bertdist.training import best_model as best_module
from bertdist.training import evaluation as evaluation_module
from bertdist.training.best_model import BestModel, EarlyStopping, Results
from bertdist.training.checkpoint import TrainState
from bertdist.training.evaluation import Evaluation, RunEvaluator
from bertdist.training.screen import Screen

ONE_RANK: Any = SimpleNamespace(num_processes=1, is_main_process=True)
NAN = math.nan
TASK = SingleLabel(("no", "yes"))


class Evaluations:
    """Scores of one evaluation after the other: which weights are saved, and after which training
    ends.
    """

    def __init__(
        self,
        scores: list[float],
        state: TrainState | None = None,
        losses: list[float] | None = None,
        **settings: Any,
    ) -> None:
        self.state = state or TrainState()
        self.saved: list[int] = []
        self.counts: list[int] = []
        self.stopped: int | None = None
        best: Any = SimpleNamespace(
            save=lambda *args: self.saved.append(self.state.step), lacks=lambda state: False
        )
        rows: Any = type("Rows", (list,), {"records": SimpleNamespace(is_one_file=True)})()
        loader: Any = MapLoader(dataset=rows, rows_per_step=1, tokens_per_micro_batch=1)
        config: Any = SimpleNamespace(
            run=RunConfig(**settings), task=TaskConfig(), data=SimpleNamespace(task_name=None)
        )
        log: Any = SimpleNamespace(
            log_eval=lambda *args: None, say=lambda *lines: None, screen=Screen(enabled=False)
        )
        evaluator = RunEvaluator(loader, TASK, config, ONE_RANK, best, log)
        early_stopping = EarlyStopping(config.run, self.state)
        for score, loss in zip(scores, losses or [0.5] * len(scores), strict=True):
            self.state.step += 1
            evaluation = Evaluation(scores={"loss": loss}, selection_score=score)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluation_module, "evaluate_split", lambda *_, e=evaluation: e)
                improvement = evaluator.evaluate_step(None, self.state, 0.0, None)  # type: ignore[arg-type]
            early_stopping.update(improvement)
            self.counts.append(self.state.evaluations_since_best)
            if early_stopping.triggered and self.stopped is None:
                self.stopped = self.state.step


# ---- What is kept


@pytest.mark.parametrize(
    ("scores", "saved", "best_score"),
    [
        ([0.5], [1], 0.5),
        ([0.0], [1], 0.0),
        ([-2.0, -1.0, -3.0], [1, 2], -1.0),  # a loss: less is better, so scores are negated
        ([0.5, 0.6, 0.4, 0.6, 0.7], [1, 2, 5], 0.7),
        ([0.5, 0.5, 0.5], [1], 0.5),  # as good is not better: the earlier weights stay
        ([0.5, NAN, 0.6], [1, 3], 0.6),
        (
            [NAN, 0.1, 0.05],
            [1, 2],
            0.1,
        ),  # the first are kept whatever they are, and any number is better than none
        ([0.5, -math.inf, math.inf, 0.6], [1, 4], 0.6),  # infinite is no number either
    ],
)
def test_the_best_weights_are_kept_when_they_are_better(
    scores: list[float], saved: list[int], best_score: float
) -> None:
    found = Evaluations(scores)
    assert found.saved == saved
    assert found.state.best_score == best_score
    assert found.state.best_step == saved[-1]


@pytest.mark.parametrize("undefined", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("scores", "losses", "saved", "best_score", "best_loss"),
    [
        ([None] * 4, [0.9, 0.7, 0.8, 0.7], [1, 2], None, 0.7),  # as low is not lower
        ([None, None, 0.1, None], [0.5, 0.4, 0.9, 0.1], [1, 2, 3], 0.1, None),
        ([0.1, None, None], [0.9, 0.1, 0.05], [1], 0.1, None),
        ([None, 0.1, None, 0.05, 0.2], [0.5, 0.6, 0.1, 0.1, 0.9], [1, 2, 5], 0.2, None),
        ([None] * 3, [NAN, 0.9, NAN], [1, 2], None, 0.9),
        ([None] * 3, [NAN, NAN, math.inf], [1, 2, 3], None, None),  # nothing to compare: the last
    ],
)
def test_the_loss_selects_as_long_as_no_score_is_a_number(
    undefined: float,
    scores: list[float | None],
    losses: list[float],
    saved: list[int],
    best_score: float | None,
    best_loss: float | None,
) -> None:
    numbers = [undefined if score is None else score for score in scores]
    found = Evaluations(numbers, losses=losses)
    assert found.saved == saved and found.state.best_step == saved[-1]
    assert (found.state.best_score, found.state.best_loss) == (best_score, best_loss)


def test_an_undefined_score_does_not_count_for_early_stopping() -> None:
    found = Evaluations([NAN] * 5, early_stopping_patience=2)
    assert (found.counts, found.stopped) == ([0] * 5, None)
    found = Evaluations([0.5, NAN, 0.4, NAN, 0.4], early_stopping_patience=2)
    assert (found.counts, found.stopped) == ([0, 0, 1, 1, 2], 5)
    # the control: numbers that are as bad count
    assert Evaluations([0.5, 0.4, 0.4], early_stopping_patience=2).stopped == 3


@pytest.mark.parametrize(
    "scores", [[0.3, 0.5, 0.4, 0.45, 0.6, 0.1], [NAN, NAN, 0.2, NAN, 0.1, 0.3], [NAN] * 6]
)
def test_a_run_that_goes_on_remembers_its_best(scores: list[float]) -> None:
    losses = [0.5, 0.4, 0.6, 0.3, 0.35, 0.2]
    whole = Evaluations(scores, losses=losses)
    for cut in range(len(scores)):
        first = Evaluations(scores[:cut], losses=losses[:cut])
        state = TrainState(
            **json.loads(json.dumps(asdict(first.state)))
        )  # as a checkpoint keeps it
        second = Evaluations(scores[cut:], state=state, losses=losses[cut:])
        assert first.saved + second.saved == whole.saved
        assert second.state == whole.state


# ---- When it is enough


@pytest.mark.parametrize(
    ("scores", "patience", "threshold", "counts", "stopped"),
    [
        ([0.5, 0.4, 0.4], None, 0.0, [0, 1, 2], None),
        ([0.5, 0.4, 0.4], 2, 0.0, [0, 1, 2], 3),
        ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 0.0, [0, 1, 0, 1, 2], 5),
        ([0.5, 0.5], 1, 0.0, [0, 1], 2),  # as good is not better
        ([0.5, 0.5625, 0.625], 1, 0.125, [0, 1, 2], 2),  # better, but by too little
        ([0.5, 0.75, 0.875], 1, 0.125, [0, 0, 1], 3),  # by exactly the threshold: too little
        ([-4.0, -3.0, -2.9375], 1, 0.5, [0, 0, 1], 3),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_a_better_score(
    scores: list[float],
    patience: int | None,
    threshold: float,
    counts: list[int],
    stopped: int | None,
) -> None:
    found = Evaluations(
        scores, early_stopping_patience=patience, early_stopping_threshold=threshold
    )
    assert (found.counts, found.stopped) == (counts, stopped)


def test_a_little_better_is_kept_though_it_does_not_count_against_the_patience() -> None:
    found = Evaluations([0.5, 0.5625, 0.625], early_stopping_threshold=0.125)
    assert found.saved == [1, 2, 3]


def test_an_interrupted_evaluation_does_not_count() -> None:
    state = TrainState(evaluations_since_best=1)
    early_stopping = EarlyStopping(RunConfig(early_stopping_patience=2), state)
    early_stopping.update(math.nan)
    assert not early_stopping.triggered and state.evaluations_since_best == 1
    early_stopping.update(-1.0)  # the control
    assert early_stopping.triggered and state.evaluations_since_best == 2


def test_without_a_validation_split_the_present_weights_are_saved() -> None:
    saved: list[Any] = []
    best: Any = SimpleNamespace(save=lambda *args: saved.append(args))
    config: Any = SimpleNamespace(run=RunConfig(), task=TaskConfig())
    state = TrainState(step=3)
    evaluator = RunEvaluator(None, TASK, config, ONE_RANK, best, Any)  # type: ignore[arg-type]
    assert evaluator.evaluate_step("weights", state, 0.0, None) == math.inf  # type: ignore[arg-type]
    assert (state.best_step, state.best_score, saved) == (3, None, [("weights", 3)])


# ---- What is written


@pytest.fixture
def model(tiny_model: Path) -> Classifier:
    config = ModelConfig(model_name_or_path=str(tiny_model))
    torch.manual_seed(0)
    return load_classifier(config, TASK)[0]


def config_of(folder: Path) -> Any:
    model = SimpleNamespace(max_length=16)
    return SimpleNamespace(run=RunConfig(output_dir=str(folder)), model=model)


def best_in(folder: Path, tiny_model: Path) -> BestModel:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return BestModel(config_of(folder), tokenizer, records_from_texts(["a"], ["b"]), ONE_RANK)


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_saved_can_be_used_and_read(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    report = {"step": 7, "scores": {"loss": 0.5}, "labels": ["no", "yes"]}
    rows = [{"row": 0, "label": "ä", "score": 0.5, "truth": "yes"}, {"row": 1, "score": NAN}]
    best = best_in(tmp_path, tiny_model)
    best.save(model, 7, Results(report, rows, rows[1:]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "errors.jsonl",
        "evaluation.json",
        "predictions.jsonl",
    ]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert lines_of(tmp_path / "predictions.jsonl") == [rows[0], {"row": 1, "score": None}]
    assert lines_of(tmp_path / "errors.jsonl") == [{"row": 1, "score": None}]
    assert "ä" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    again, task, settings = load_trained_classifier(str(tmp_path / "best"))
    columns = {"text_column": "text", "text_pair_column": "pair"}
    assert (task, settings) == (TASK, {"max_length": 16, "step": 7, **columns})
    for name, weight in model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)


def test_weights_without_an_evaluation_are_saved_alone(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    best_in(tmp_path, tiny_model).save(model, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_run_without_a_place_to_write_ends_with_one_line(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^Cannot write .*file/best: Not a directory"):
        best_in(tmp_path / "file", tiny_model).save(model, 7)


def test_only_the_main_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("written")

    for name in ("write_folder", "atomic_write"):
        monkeypatch.setattr(best_module, name, refuse)
    for main in (False, True):
        rank: Any = SimpleNamespace(num_processes=1, is_main_process=main)
        best = BestModel(config_of(tmp_path), None, records_from_texts(["a"]), rank)  # type: ignore[arg-type]
        if main:  # the control
            with pytest.raises(AssertionError, match="written"):
                best.save(torch.nn.Identity(), 7, Results({}, [{}], []))  # type: ignore[arg-type]
        else:
            best.save(None, 7, Results({}, [{}], []))  # type: ignore[arg-type]


def test_a_number_that_json_does_not_have_is_null(
    model: Classifier, tiny_model: Path, tmp_path: Path
) -> None:
    """json.dumps would write NaN, which other programs refuse."""
    best_in(tmp_path, tiny_model).save(
        model, 7, Results({"scores": {"mse": NAN}}, [{"score": NAN}], [])
    )
    for name, expected in (
        ("evaluation.json", {"scores": {"mse": None}}),
        ("predictions.jsonl", {"score": None}),
    ):
        assert json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail) == expected
