"""python -m bench.faults: a few random kills, and that it sees what is not identical."""

import contextlib
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from bench.faults import Kind, Stage, Tally, attempt_killed, kinds, said_in
from bertdist import train


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("faults") / "stage")


@pytest.mark.parametrize("kind", [Kind("map", 2, "three", "one rank"), Kind("stream", 3, "one", "all ranks")], ids=str)
def test_random_kills_lose_nothing(stage: Stage, kind: Kind) -> None:
    tally = Tally()
    stage.trial(kind, 2, random.Random(5), tally)
    assert (tally.runs, tally.lost, tally.identical) == (1, 0, tally.kills)


def test_dropout_that_depends_on_the_start_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seed_dropout = iter(range(10**6)), train.seed_dropout
    monkeypatch.setattr(train, "seed_dropout", lambda seed, step, rank: seed_dropout(seed, next(calls), rank))
    stage, tally, kind = Stage(tmp_path / "stage"), Tally(), Kind("map", 1, "one", "all ranks")
    _, seconds = stage.undisturbed(kind)
    while not tally.kills or not tally.runs:
        with contextlib.suppress(AssertionError):
            stage.trial(kind, 1, At(0.6), tally)  # type: ignore[arg-type]
    assert tally.identical < tally.kills and seconds > 0


class At:
    """Stands for chance: always the same moment."""

    def __init__(self, share: float) -> None:
        self.share = share

    def random(self) -> float:
        return self.share

    def randrange(self, ranks: int) -> int:
        return 0


def test_a_killed_rank_is_killed(stage: Stage, tmp_path: Path) -> None:
    kind = Kind("map", 1, "one", "all ranks")
    codes, killed = attempt_killed(stage.words(kind, tmp_path / "out"), 1, tmp_path / "out", [0], 0.05)
    assert codes == [-signal.SIGKILL] and killed is not None and "Finished" not in said_in(tmp_path / "out")


def test_all_kinds_come_in_turns() -> None:
    some: Any = kinds(random.Random(0))
    first = [next(some) for _ in range(20)]
    assert len(set(first)) == 20 and {kind.ranks for kind in first} == {1, 2, 3} and {kind.source for kind in first} == {"map", "stream"}
