"""What ranks say of themselves, and what others read from it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bertdist.distributed.watchdog import (
    HEARTBEAT_BYTES,
    HeartbeatFiles,
    is_alive,
    start_of,
    this_host,
)


@pytest.fixture
def two(tmp_path: Path) -> tuple[HeartbeatFiles, HeartbeatFiles]:
    return HeartbeatFiles(tmp_path, 0, 2), HeartbeatFiles(tmp_path, 1, 2)


def test_a_beat_is_read_by_the_others(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    first, second = two
    (none_yet,) = first.others()
    assert (none_yet.name, none_yet.pid, first.dead([none_yet], 0)) == ("rank 1", 0, [])
    second.write(step=7, location="train.train, line 1")
    (beat,) = first.others()
    assert (beat.rank, beat.step, beat.location, beat.pid, beat.count) == (
        1,
        7,
        "train.train, line 1",
        os.getpid(),
        1,
    )
    assert beat.name == f"rank 1 (process {os.getpid()} on {this_host().split(' ')[0]})"
    second.write(step=8)
    assert first.others()[0].step == 8 and first.others()[0].location == "train.train, line 1"


def test_a_beat_keeps_its_size(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    """So that it needs no new block on a full disk."""
    for words in ("x" * 300, ""):
        two[0].write(final_error=words)
        assert (two[0].folder / "rank_0.json").stat().st_size == HEARTBEAT_BYTES


def test_half_a_beat_is_none(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    two[1].write(step=7)
    (seen,) = two[0].others()
    two[1].write(step=8)
    path = two[1].folder / "rank_1.json"
    path.write_bytes(path.read_bytes()[:50])
    assert two[0].others() == [seen] and seen.step == 7


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / ".ranks").write_text("a file")
    HeartbeatFiles(tmp_path, 0, 2).write()


def test_a_dead_process_is_gone_and_a_number_that_was_given_again_too() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        born = start_of(psutil.Process(child.pid))
        assert is_alive(child.pid, born) and not is_alive(child.pid, born - 100)
        child.kill()
        os.waitid(
            os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
        )  # dead, and not buried: its parent has not asked yet
        assert not is_alive(child.pid, born)
        child.wait()
    assert not is_alive(child.pid, born)


def test_who_is_gone(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    first, second = two
    second.write(step=3, location="somewhere")
    (beat,) = first.others()
    assert first.dead([beat], 10) == []
    dead = replace(beat, process_start=beat.process_start - 100)
    assert first.dead([dead], 10) == [dead]
    assert (
        "is gone without a message (killed? out of memory?). Its last heartbeat was in somewhere, step 3"
        in first.describe_dead([dead])
    )
    ended = replace(beat, final_error="KeyError: 'x'")
    assert first.dead([ended], 10) == [ended] and "has ended: KeyError: 'x'" in first.describe_dead(
        [ended]
    )


def test_silence_counts_for_ranks_of_other_machines_only(
    two: tuple[HeartbeatFiles, HeartbeatFiles],
) -> None:
    first, second = two
    second.write()
    near = first.others()[0]
    far = replace(near, host="elsewhere", pid=1)
    for beat in (near, far):
        first._unchanged.clear()
        first.observe([beat], 5)
        for _ in range(3):
            first.observe([beat], 5)
        assert first.seconds_since_heartbeat(beat) == 15 and first.dead([beat], 10) == (
            [far] if beat is far else []
        )
        first.observe([replace(beat, count=beat.count + 1)], 5)
        assert first.seconds_since_heartbeat(beat) == 0 and first.dead([beat], 10) == []


def test_one_of_all_may_tell(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    first, second = two
    first.write()
    assert first.failure_report() is None
    assert second.report_once("lost", "rank 0 is gone").should_print
    late = first.report_once("lost", "rank 1 is gone")
    assert (late.text, late.should_print) == ("rank 0 is gone", False)
    told = first.failure_report()
    assert told is not None and (told.kind, told.text, told.should_print) == (
        "lost",
        "rank 0 is gone",
        False,
    )


def test_the_last_one_takes_the_folder_away(two: tuple[HeartbeatFiles, HeartbeatFiles]) -> None:
    for one in two:
        one.write()
    two[0].remove()
    assert two[0].folder.exists()
    two[1].remove()
    assert not two[0].folder.exists()


def test_where_the_run_will_go_on(tmp_path: Path) -> None:
    beats = HeartbeatFiles(tmp_path, 0, 2)
    assert beats.resume_hint() == "The same command resumes from the beginning."
    for name in ("step_000400", "step_1000000", ".step_9999999.partial", "step_000600.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert beats.resume_hint() == "The same command resumes from step 1000000."
