"""python -m bench.faults: a few random kills, and that it sees what is not identical."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rows import train_module as train

from bench.attempts import Attempt, Blow, attempt, launcher_said, said_in
from bench.faults import Kind, Stage, Tally, kinds


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("faults") / "stage")


@pytest.mark.parametrize(
    "kind", [Kind("map", 2, "three", "one rank"), Kind("stream", 3, "one", "all ranks")], ids=str
)
def test_random_kills_lose_nothing(stage: Stage, kind: Kind) -> None:
    tally = Tally()
    stage.trial(kind, 2, random.Random(5), tally)
    assert (tally.runs, tally.lost, tally.identical) == (1, 0, tally.kills)


def test_dropout_that_depends_on_the_start_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waits at its eighth step is killed there."""
    calls, seed_dropout, waits = iter(range(10**6)), train.seed_dropout, tmp_path / "waits"

    def counted(seed: int, step: int, rank: int) -> None:
        if step == 7 and waits.exists():
            waits.unlink()
            time.sleep(100)
        seed_dropout(seed, next(calls), rank)

    monkeypatch.setattr(train, "seed_dropout", counted)
    stage, tally, kind = Stage(tmp_path / "stage"), Tally(), Kind("map", 1, "one", "all ranks")
    stage.undisturbed(kind)
    for seconds in (0.5, 2, 8, 32):  # a kill before the first checkpoint changes nothing
        waits.touch()
        monkeypatch.setattr(
            stage,
            "blow",
            lambda *args, after=seconds: Blow("all ranks", 0, after, in_training=True),
        )
        stage.trial(kind, 1, random.Random(0), tally)
        if tally.identical < tally.kills:
            return
    pytest.fail(f"{tally.kills} kills, and nothing was seen")


def test_a_killed_rank_is_killed(stage: Stage, tmp_path: Path) -> None:
    words = stage.words(Kind("map", 1, "one", "all ranks"), tmp_path / "out")
    found = attempt(words, 1, tmp_path / "out", "forked", Blow("all ranks", 0, 0.05))
    assert (
        found.codes == [-signal.SIGKILL]
        and found.killed is not None
        and not found.done
        and not found.began
    )
    assert "Finished" not in said_in(tmp_path / "out")


@pytest.mark.timeout(600)
def test_a_launcher_is_killed_in_training_and_its_rank_leaves(stage: Stage, tmp_path: Path) -> None:
    """Its steps count from when they begin, and it is waited for though nobody is its parent any more."""
    out = tmp_path / "out"
    words = [*stage.words(Kind("map", 1, "one", "launcher"), out), "--num_train_epochs", "400"]
    found = attempt(words, 1, out, "torchrun", Blow("launcher", 0, 0.0, in_training=True))
    assert found.codes == [-signal.SIGKILL] and found.began, launcher_said(out)
    assert json.loads((out / "status.json").read_text())["reason"] == "the launcher is gone", (
        said_in(out)
    )


@pytest.mark.parametrize(
    ("lines", "launcher", "heard"),
    [
        ("bertdist: rank 1 (process 7 on x) is gone", "", 1),
        ("bertdist: rank 1 (process 7 on x) is gone\nbertdist: more", "", 0),
        ("bertdist: rank 0 (process 7 on x) is gone", "", 0),
        ("Traceback\nbertdist: rank 1 (process 7 on x) is gone", "", 0),
        ("", "  exitcode   : -9 (pid: 7)", 1),
        ("", "  exitcode   : -9 (pid: 8)", 0),
    ],
)
def test_one_line_that_names_the_rank_is_asked_for(
    stage: Stage, tmp_path: Path, lines: str, launcher: str, heard: int
) -> None:
    (tmp_path / "said_0.txt").write_text(lines)
    (tmp_path / "launcher.txt").write_text(launcher)
    tally = Tally()
    stage.heard(
        Kind("map", 2, "one", "one rank"),
        tmp_path,
        Blow("one rank", 1),
        Attempt(killed=time.monotonic(), pids=[7]),
        tally,
    )
    assert (tally.survivors, tally.one_message) == (1, heard)


@pytest.mark.parametrize(
    ("launcher", "ranks", "number"),
    [("forked", {1, 2, 3}, 20), ("torchrun", {1, 2}, 10), ("accelerate", {1, 2}, 10)],
)
def test_all_kinds_come_in_turns(launcher: str, ranks: set[int], number: int) -> None:
    some: Any = kinds(random.Random(0), launcher)
    first = [next(some) for _ in range(number)]
    assert (
        len(set(first)) == number
        and {kind.ranks for kind in first} == ranks
        and {kind.source for kind in first} == {"map", "stream"}
    )
    assert {kind.victims for kind in first} == {"one rank", "all ranks"} | (
        {"launcher"} if launcher != "forked" else set()
    )
