"""bench.faults: a few random kills, and that runs which are not identical are detected."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rows import EVERY_FAULT, some_of
from rows import train_module as train

from bench.attempts import Attempt, Kill, attempt, output_of_launcher, output_of_ranks
from bench.faults import FaultTest, Scenario, Tally, scenarios


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FaultTest:
    return FaultTest(tmp_path_factory.mktemp("faults") / "stage")


@pytest.mark.parametrize(
    ("scenario", "kills"),
    [
        (Scenario("map", 2, "three", "one rank"), 2),
        (Scenario("mixture", 1, "one", "all ranks"), 1),
        *some_of([], [(Scenario("by_file", 2, "three", "all ranks"), 2)]),
    ],
    ids=str,
)
def test_random_kills_lose_nothing(faults: FaultTest, scenario: Scenario, kills: int) -> None:
    tally = Tally()
    faults.trial(scenario, kills, random.Random(5), tally)
    assert (tally.runs, tally.lost, tally.identical) == (1, 0, tally.kills)


def test_dropout_that_depends_on_the_start_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run waits at its eighth step and is killed there."""
    calls, seed_dropout, waits = iter(range(10**6)), train.seed_dropout, tmp_path / "waits"

    def counted(seed: int, step: int, rank: int) -> None:
        if step == 7 and waits.exists():
            waits.unlink()
            time.sleep(100)
        seed_dropout(seed, next(calls), rank)

    monkeypatch.setattr(train, "seed_dropout", counted)
    faults, tally, scenario = (
        FaultTest(tmp_path / "stage"),
        Tally(),
        Scenario("map", 1, "one", "all ranks"),
    )
    faults.uninterrupted(scenario)
    for seconds in (0.5, 2, 8, 32):  # a kill before the first checkpoint changes nothing
        waits.touch()
        monkeypatch.setattr(
            faults,
            "random_kill",
            lambda *args, after=seconds: Kill("all ranks", 0, after, in_training=True),
        )
        faults.trial(scenario, 1, random.Random(0), tally)
        if tally.identical < tally.kills:
            return
    pytest.fail(f"{tally.kills} kills, and no difference was detected")


def test_a_killed_rank_is_killed(faults: FaultTest, tmp_path: Path) -> None:
    arguments = faults.arguments(Scenario("map", 1, "one", "all ranks"), tmp_path / "out")
    result = attempt(arguments, 1, tmp_path / "out", "forked", Kill("all ranks", 0, 0.05))
    assert (
        result.exit_codes == [-signal.SIGKILL]
        and result.killed_at is not None
        and not result.succeeded
        and not result.had_steps
    )
    assert "Finished" not in output_of_ranks(tmp_path / "out")


@pytest.mark.skipif(
    not EVERY_FAULT,
    reason="tests/runs/test_launched_accelerate.py kills a launcher: with BERTDIST_EVERY_FAULT=1 only",
)
@pytest.mark.timeout(600)
def test_rank_ends_after_its_launcher_is_killed_in_training(
    faults: FaultTest, tmp_path: Path
) -> None:
    """The kill counts from the first step; the orphaned rank is waited for."""
    out = tmp_path / "out"
    arguments = [
        *faults.arguments(Scenario("map", 1, "one", "launcher"), out),
        "--num_train_epochs",
        "400",
    ]
    result = attempt(arguments, 1, out, "torchrun", Kill("launcher", 0, 0.0, in_training=True))
    assert result.exit_codes == [-signal.SIGKILL] and result.had_steps, output_of_launcher(out)
    assert json.loads((out / "status.json").read_text())["reason"] == "the launcher is gone", (
        output_of_ranks(out)
    )


@pytest.mark.parametrize(
    ("lines", "launcher", "counted"),
    [
        ("bertdist: rank 1 (process 7 on x) is gone", "", 1),
        ("bertdist: rank 1 (process 7 on x) is gone\nbertdist: more", "", 0),
        ("bertdist: rank 0 (process 7 on x) is gone", "", 0),
        ("Traceback\nbertdist: rank 1 (process 7 on x) is gone", "", 0),
        ("", "  exitcode   : -9 (pid: 7)", 1),
        ("", "  exitcode   : -9 (pid: 8)", 0),
    ],
)
def test_only_one_line_that_names_the_rank_counts(
    faults: FaultTest, tmp_path: Path, lines: str, launcher: str, counted: int
) -> None:
    (tmp_path / "stderr_0.log").write_text(lines)
    (tmp_path / "launcher.log").write_text(launcher)
    tally = Tally()
    faults.check_messages(
        Scenario("map", 2, "one", "one rank"),
        tmp_path,
        Kill("one rank", 1),
        Attempt(killed_at=time.monotonic(), killed_pids=[7]),
        tally,
    )
    assert (tally.survivors, tally.one_line) == (1, counted)


@pytest.mark.parametrize(
    ("launcher", "ranks", "number"),
    [("forked", {1, 2, 3}, 20), ("torchrun", {1, 2}, 10), ("accelerate", {1, 2}, 10)],
)
def test_every_scenario_comes_once_per_round(launcher: str, ranks: set[int], number: int) -> None:
    some: Any = scenarios(random.Random(0), launcher)
    first = [next(some) for _ in range(number)]
    assert (
        len(set(first)) == number
        and {scenario.ranks for scenario in first} == ranks
        and {scenario.source for scenario in first} == {"map", "stream"}
    )
    assert {scenario.victims for scenario in first} == {"one rank", "all ranks"} | (
        {"launcher"} if launcher != "forked" else set()
    )
