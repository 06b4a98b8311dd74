"""Trials in the journal: the same values however often the process is killed, and how many."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.errors import ConfigError
from bertdist.core.search_space import read_space
from bertdist.training.search import (
    COMPLETE,
    FAIL,
    JOURNAL,
    PRUNED,
    RUNNING,
    SearchPlan,
    open_search,
    read_search,
)

WORDS = ["learning_rate=1e-5..5e-4:log", "train_batch_size=16,32", "warmup_ratio=0..0.2"]
TRIALS = 13  # 10 are random
PLAN = SearchPlan(
    space=read_space(WORDS),
    trials=TRIALS,
    sampler="tpe",
    pruner="median",
    seed=42,
    metric="accuracy",
    settings={"try": dict(word.split("=") for word in WORDS), "seed": 42, "sampler": "tpe"},
)


def score_of(values: dict[str, Any]) -> float:
    """Best at 1e-4."""
    rate = abs(math.log(values["learning_rate"] / 1e-4))
    return 0.9 - 0.1 * rate - float(values["warmup_ratio"])


def search_all(folder: Path, plan: SearchPlan, killed: bool = False) -> list[tuple[Any, ...]]:
    """Values and end of every trial. killed: every trial's process is, half way."""
    search = open_search(folder, plan)
    while (trial := search.next()) is not None:
        for evaluation in (1, 2, 3):
            if prune := search.report(trial.number, evaluation, score_of(trial.params)):
                break
            if killed and evaluation == 2:  # a new process reads the evaluations again
                search = open_search(folder, plan)
                assert search.trials[trial.number].state == RUNNING
                assert not search.report(trial.number, 1, -1.0)
        search.finish(
            trial.number, PRUNED if prune else COMPLETE, None if prune else score_of(trial.params)
        )
    return [(x.params, x.state, x.value) for x in search.trials]


@pytest.mark.parametrize(("sampler", "pruner"), [("tpe", "median"), ("random", "hyperband")])
def test_a_killed_search_tries_the_same_values(tmp_path: Path, sampler: Any, pruner: Any) -> None:
    plan = replace(PLAN, sampler=sampler, pruner=pruner)
    expected = search_all(tmp_path / "a", plan)
    assert len(expected) == TRIALS
    assert search_all(tmp_path / "b", plan, killed=True) == expected
    assert any(state == PRUNED for _, state, _ in expected)
    other = open_search(tmp_path / "c", replace(plan, seed=43)).next()  # the control
    assert other is not None and other.params != expected[0][0]


def test_tpe_learns_from_the_scores(tmp_path: Path) -> None:
    by_tpe, by_chance = (
        search_all(tmp_path / name, replace(PLAN, sampler=name, pruner="none"))  # type: ignore[arg-type]
        for name in ("tpe", "random")
    )
    assert by_tpe[:10] == by_chance[:10] and by_tpe[10:] != by_chance[10:]


def test_the_grid_is_tried_in_its_order(tmp_path: Path) -> None:
    space = read_space(["train_batch_size=16,32", "max_length=8,9"])
    search = open_search(tmp_path, replace(PLAN, space=space, sampler="grid", trials=4))
    tried = []
    while (trial := search.next()) is not None:
        tried.append(tuple(trial.params.values()))
    assert tried == [(16, 8), (16, 9), (32, 8), (32, 9)]


def test_the_number_of_trials_is_exact_and_may_be_raised(tmp_path: Path) -> None:
    first, second = (open_search(tmp_path, replace(PLAN, trials=3)) for _ in range(2))
    numbers = [x.next() for x in (first, second, first, second, first)]
    assert [x and x.number for x in numbers] == [0, 1, 2, None, None]
    more = open_search(tmp_path, replace(PLAN, trials=4)).next()
    assert more is not None and more.number == 3 and first.next() is None


def test_other_settings_are_refused(tmp_path: Path) -> None:
    open_search(tmp_path, PLAN)
    other = {**PLAN.settings, "seed": 1, "max_length": 9}
    with pytest.raises(ConfigError) as error:
        open_search(tmp_path, replace(PLAN, settings=other))
    text = str(error.value)
    assert "(seed was 42, is 1, max_length was the default, is 9)" in text and "\n" not in text
    open_search(tmp_path, PLAN)


def test_half_a_line_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    search = open_search(tmp_path, PLAN)
    search.next()
    whole = (tmp_path / JOURNAL).read_bytes()
    half = b'{"op_code": 4, "stu'
    (tmp_path / JOURNAL).write_bytes(whole + half)
    assert len(read_search(tmp_path).trials) == 1  # to look at, it stays
    assert (tmp_path / JOURNAL).read_bytes().endswith(half)
    again = open_search(tmp_path, PLAN)
    assert (tmp_path / JOURNAL).read_bytes().startswith(whole)
    assert half + b"{" not in (tmp_path / JOURNAL).read_bytes()
    assert again.next() is not None and len(open_search(tmp_path, PLAN).trials) == 2


def test_the_best_is_by_the_direction_of_the_score(tmp_path: Path) -> None:
    def best(folder: Path, metric: str) -> tuple[int, bool]:
        search = open_search(folder, replace(PLAN, metric=metric))
        for value in (0.5, 0.9, 0.9, 0.1):
            trial = search.next()
            assert trial is not None
            search.finish(trial.number, COMPLETE, value, metric=metric)
        trial = search.next()
        assert trial is not None
        search.finish(trial.number, FAIL, error="CUDA out of memory")
        assert search.trials[4].user_attrs == {"error": "CUDA out of memory"}
        found = read_search(folder)
        assert found.plan.space == PLAN.space and found.plan.trials == TRIALS
        assert found.best is not None
        return found.best.number, found.minimizes

    assert best(tmp_path / "a", "accuracy") == (1, False)
    assert best(tmp_path / "b", "rmse") == (3, True)


def test_importance_of_the_setting_that_decides(tmp_path: Path) -> None:
    search = open_search(tmp_path, replace(PLAN, sampler="random"))
    assert search.importance() == {}
    for _ in range(8):
        trial = search.next()
        assert trial is not None
        search.finish(trial.number, COMPLETE, -abs(math.log(trial.params["learning_rate"] / 1e-4)))
    shares = search.importance()
    assert sum(shares.values()) == pytest.approx(1) and next(iter(shares)) == "learning_rate"


def test_a_folder_of_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a sweep"):
        read_search(tmp_path)
    (tmp_path / JOURNAL).write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="is damaged, or not of a sweep"):
        read_search(tmp_path)
