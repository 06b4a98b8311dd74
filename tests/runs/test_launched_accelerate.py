"""`accelerate launch` and its two ranks: one of them, the launcher or all are killed, asked to stop, or started twice; the same command
then goes on as if nothing had been. tests/runs/test_train.py sends SIGTERM; tests/runs/test_launched_torchrun.py is torchrun's.
"""

import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_ranks
from launched import HELD, SLOW, STEPS, Story, until
from rows import EVERY_FAULT, assert_same_run, checkpoints_of, run_train

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def told(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was seen at each end of one run, which five launches brought, or seven to its end."""
    story, seen = (
        Story("accelerate", tiny_model, tmp_path_factory.mktemp("accelerate")),
        SimpleNamespace(),
    )
    with story.launch() as launch:
        launch.wait_for_steps(12)
        launch.ranks[0].kill()
        seen.rank = SimpleNamespace(
            code=launch.wait(),
            pid=launch.ranks[0].pid,
            told=launch.complaints(),
            status=launch.status(),
        )
    with story.launch() as launch:
        launch.wait_for_steps(2)
        launch.launcher.kill()
        seen.launcher = SimpleNamespace(
            code=launch.wait(), status=launch.status(), kept=checkpoints_of(story.out)[-1]
        )
    for number in (signal.SIGINT, signal.SIGUSR1) if EVERY_FAULT else ():
        with story.launch() as launch:
            launch.wait_for_steps(2)
            launch.launcher.send_signal(number)
            code, kept = launch.wait(), checkpoints_of(story.out)[-1]
            setattr(
                seen,
                number.name,
                SimpleNamespace(code=code, status=launch.status(), kept=kept, said=launch.said()),
            )
    with story.launch() as first:
        first.wait_for_steps(2)
        story.go(HELD)
        with story.launch(where="second") as second:
            until(lambda: second.launcher.poll() is not None, second.said)
            seen.second = SimpleNamespace(
                code=second.wait(), told=second.complaints(), said=second.said()
            )
        step = first.step()
        seen.first = SimpleNamespace(runs=first.launcher.poll() is None, pid=first.ranks[0].pid)
        story.go(SLOW)
        until(lambda: first.step() > step, first.said)
        first.kill()
    story.go(0)
    with story.launch() as launch:  # at once
        seen.last = SimpleNamespace(
            code=launch.wait(), said=launch.said(), status=launch.status(), pid=first.ranks[0].pid
        )
    seen.story = story
    return seen


def test_a_killed_rank_is_named_once(told: Any) -> None:
    """Rank 0: the other one writes status.json."""
    assert told.rank.code == 1 and len(told.rank.told) == 1, told.rank
    assert told.rank.told[0].startswith(f"bertdist: rank 0 (process {told.rank.pid} on "), told.rank
    assert told.rank.status["state"] == "failed" and "rank 0 " in told.rank.status["reason"]


def test_without_their_launcher_ranks_save_and_leave(told: Any) -> None:
    status = told.launcher.status
    assert told.launcher.code == -signal.SIGKILL
    assert (status["state"], status["reason"]) == ("preempted", "the launcher is gone")
    assert told.launcher.kept == f"step_{status['step']:06d}"


@pytest.mark.parametrize(
    ("number", "reason"), [("SIGINT", "SIGINT"), ("SIGUSR1", "the launcher is gone")]
)
def test_a_signal_to_the_launcher_saves_and_ends(told: Any, number: str, reason: str) -> None:
    """SIGINT is passed on. Of SIGUSR1 the launcher dies, unless it is told to pass it on (tests/runs/test_launched_torchrun.py)."""
    if not hasattr(told, number):
        pytest.skip(
            "a launch more, and SIGTERM is in test_train.py: with BERTDIST_EVERY_FAULT=1 only"
        )
    seen = getattr(told, number)
    assert seen.code != 0 and (seen.status["state"], seen.status["reason"]) == (
        "preempted",
        reason,
    ), seen.said
    assert seen.kept == f"step_{seen.status['step']:06d}"


def test_a_second_run_in_the_folder_is_refused_with_one_line(told: Any) -> None:
    assert told.second.code == 1 and len(told.second.told) == 1, told.second.said
    assert re.match(
        rf"bertdist: .*/out is in use by another run \(pid {told.first.pid} on ",
        told.second.told[0],
    ), told.second.told
    assert told.first.runs, "and the first goes on"


def test_a_run_that_was_killed_with_all_its_ranks_is_taken_over_at_once(told: Any) -> None:
    assert told.last.code == 0 and told.last.status == {
        "state": "finished",
        "step": STEPS,
        "reason": "",
    }, told.last.said
    assert re.search(
        rf"^Previous run \(pid {told.last.pid} on .*\) did not end cleanly; lock taken over\.$",
        told.last.said,
        re.MULTILINE,
    )


def test_nothing_was_lost(told: Any) -> None:
    """Bit for bit the run of forked ranks that nobody disturbed."""
    straight = told.story.folder / "straight"
    run_ranks(2, run_train, told.story.words(straight))
    assert_same_run(told.story.out, straight)
