"""`accelerate launch` and its two ranks: one of them or the launcher is killed, asked to stop, or started twice; the same command then
goes on as if nothing had been. tests/runs/test_train.py kills all at once; tests/runs/test_launched_torchrun.py is torchrun's.
"""

import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_ranks
from launched import HELD, SLOW, STEPS, Story, until
from rows import EVERY_FAULT, assert_same_run, checkpoints_of, json_of, run_main, run_train
from slurm.cluster import missing_commands

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not EVERY_FAULT and not missing_commands(),
        reason="tests/slurm/test_train_jobs.py has launches and tests/ranks/test_faults.py forked ranks: "
        "with BERTDIST_EVERY_FAULT=1 or without SLURM only",
    ),
]


@pytest.fixture(scope="module")
def told(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was seen at each end of one run, which three launches, or five, brought on, and forked ranks to its end."""
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
        story.go(HELD)
        seen.second = run_ranks(2, run_main, story.words(story.out))
        step = launch.step()
        seen.first = SimpleNamespace(runs=launch.launcher.poll() is None, pid=launch.ranks[0].pid)
        story.go(SLOW)
        until(lambda: launch.step() > step, launch.said)
        launch.launcher.kill()
        seen.launcher = SimpleNamespace(
            code=launch.wait(), status=launch.status(), kept=checkpoints_of(story.out)[-1]
        )
    for number in (signal.SIGTERM, *((signal.SIGINT, signal.SIGUSR1) if EVERY_FAULT else ())):
        with story.launch() as launch:
            launch.wait_for_steps(2)
            launch.launcher.send_signal(number)
            code, kept = launch.wait(), checkpoints_of(story.out)[-1]
            setattr(
                seen,
                number.name,
                SimpleNamespace(code=code, status=launch.status(), kept=kept, said=launch.said()),
            )
    seen.said = launch.said()
    run_ranks(2, run_train, story.words(story.out))
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
    ("number", "reason"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "the launcher is gone")],
)
def test_a_signal_to_the_launcher_saves_and_ends(told: Any, number: str, reason: str) -> None:
    """As a cluster sends it, to the launcher alone.

    SIGTERM and SIGINT are passed on. Of SIGUSR1 the launcher dies, unless it is told to pass it on
    (tests/runs/test_launched_torchrun.py).
    """
    if not hasattr(told, number):
        pytest.skip("a launch more: with BERTDIST_EVERY_FAULT=1 only")
    seen = getattr(told, number)
    step = seen.status["step"]
    assert seen.code != 0 and (seen.status["state"], seen.status["reason"]) == (
        "preempted",
        reason,
    ), seen.said
    assert seen.kept == f"step_{step:06d}"
    assert f"Stopped ({reason}): step {step} of {STEPS} is saved. Rerun the same" in seen.said


def test_a_second_run_in_the_folder_is_refused_with_one_line(told: Any) -> None:
    (code, said, _), other = told.second
    assert code == 1 and other == (1, "", "")
    (line,) = (line for line in said.splitlines() if line.startswith("bertdist: "))
    pattern = rf"bertdist: .*/out is in use by another run \(pid {told.first.pid} on "
    assert re.match(pattern, line), line
    assert told.first.runs, "and the first goes on"


def test_nothing_was_lost(told: Any) -> None:
    """Bit for bit the run of forked ranks that nobody disturbed. tests/runs/test_examples.py launches two ranks to their end."""
    assert "2 processes, cpu, fp32" in told.said
    assert json_of(told.story.out / "status.json")["state"] == "finished"
    straight = told.story.folder / "straight"
    run_ranks(2, run_train, told.story.words(straight))
    assert_same_run(told.story.out, straight)
