"""torchrun and its two ranks: one of them or torchrun is killed, asked to stop; the same command then goes on as if nothing had been.

And ranks that torchrun or `accelerate launch` starts with another command or other data.
"""

import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_ranks
from launched import STEPS, Story, until
from rows import EVERY_FAULT, assert_same_run, checkpoints_of, make_rows, run_train, write_rows

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def told(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was seen at each end of one run, which four launches brought to its end."""
    if not EVERY_FAULT:
        pytest.skip(
            "a minute, and torchrun is what accelerate launch runs: with BERTDIST_EVERY_FAULT=1 only"
        )
    story, seen = (
        Story("torchrun", tiny_model, tmp_path_factory.mktemp("torchrun")),
        SimpleNamespace(),
    )
    with story.launch() as launch:
        launch.wait_for_steps(12)
        launch.ranks[1].kill()
        seen.rank = SimpleNamespace(
            code=launch.wait(),
            pid=launch.ranks[1].pid,
            told=launch.complaints(),
            status=launch.status(),
        )
    with story.launch() as launch:
        launch.wait_for_steps(2)
        launch.launcher.kill()
        seen.launcher = SimpleNamespace(
            code=launch.wait(),
            status=launch.status(),
            kept=checkpoints_of(story.out)[-1],
            said=launch.said(),
        )
    with story.launch(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1") as launch:
        launch.wait_for_steps(2)
        launch.launcher.send_signal(signal.SIGUSR1)
        seen.signal = SimpleNamespace(
            code=launch.wait(),
            status=launch.status(),
            kept=checkpoints_of(story.out)[-1],
            said=launch.said(),
        )
    story.go(0)
    with story.launch() as launch:
        seen.last = SimpleNamespace(code=launch.wait(), said=launch.said(), status=launch.status())
    seen.story = story
    return seen


def test_a_killed_rank_ends_the_other_with_one_message(told: Any) -> None:
    assert told.rank.code == 1 and len(told.rank.told) == 1, told.rank
    assert told.rank.told[0].startswith(f"bertdist: rank 1 (process {told.rank.pid} on "), told.rank
    assert told.rank.status["state"] == "failed" and "rank 1 " in told.rank.status["reason"]


def test_without_their_launcher_ranks_save_and_leave(told: Any) -> None:
    """Nobody is left who would end them, or start them again."""
    status = told.launcher.status
    assert (status["state"], status["reason"]) == ("preempted", "the launcher is gone"), (
        told.launcher
    )
    assert told.launcher.kept == f"step_{status['step']:06d}"


def test_a_signal_that_torchrun_passes_on_saves_and_ends(told: Any) -> None:
    status = told.signal.status
    assert told.signal.code != 0 and (status["state"], status["reason"]) == (
        "preempted",
        "SIGUSR1",
    ), told.signal.said
    assert told.signal.kept == f"step_{status['step']:06d}"


def test_nothing_was_lost(told: Any) -> None:
    """Bit for bit the run of forked ranks that nobody disturbed."""
    assert told.last.code == 0 and told.last.status == {
        "state": "finished",
        "step": STEPS,
        "reason": "",
    }, told.last.said
    straight = told.story.folder / "straight"
    run_ranks(2, run_train, told.story.words(straight))
    assert_same_run(told.story.out, straight)


@pytest.mark.skipif(
    not EVERY_FAULT,
    reason="tests/ranks/test_faults.py has forked ranks: with BERTDIST_EVERY_FAULT=1 only",
)
@pytest.mark.parametrize(
    ("launcher", "other", "differs"),
    [
        ("accelerate", "config", r"--learning_rate is 0\.5 instead of 0\.001\."),
        ("torchrun", "data", r"train\.tsv \(digest of the rows\) is .* instead of .*\."),
    ],
    ids=["accelerate-config", "torchrun-data"],
)
def test_a_rank_that_was_started_with_something_else_is_named(
    tiny_model: Path, tmp_path: Path, launcher: str, other: str, differs: str
) -> None:
    story = Story(launcher, tiny_model, tmp_path, train_file="train.tsv", validation_file=None)
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other" / "train.tsv", make_rows(200, seed=3))
    with story.launch(other) as launch:
        until(lambda: launch.launcher.poll() is not None, launch.said)
        assert launch.wait() == 1
        first, *rest = launch.complaints()
    assert re.fullmatch(
        rf"bertdist: rank 1 \(on .*\) differs from rank 0 \(on .*\): {differs}", first
    ), first
    assert rest == [
        "bertdist: Every rank must be started with the same command, data and packages."
    ], rest
    assert not (story.out / "checkpoints").exists() or not checkpoints_of(story.out), (
        "nothing was trained"
    )
