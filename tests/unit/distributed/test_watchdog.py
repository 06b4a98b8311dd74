"""What the watchdog makes of errors, and what it takes for a move. Ranks that die and hang in earnest: tests/ranks/test_faults.py."""

import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertdist.core.errors import DataError, RankLost
from bertdist.distributed import watchdog
from bertdist.distributed.heartbeat import Heartbeat, this_rank
from bertdist.distributed.watchdog import (
    Watchdog,
    connection_lost,
    doing_of,
    end_soon,
    loader_worker_error,
    report_lost_connection,
)

ALONE: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "DataLoader worker (pid 123) is killed by signal: Killed. ",
            "Loader worker (process 123) was killed (Killed)",
        ),
        (
            "DataLoader worker (pid(s) 12, 34) exited unexpectedly",
            "Loader worker (process 12, 34) ended without a word",
        ),
    ],
)
def test_a_loader_worker_s_death_is_told(error: str, said: str) -> None:
    assert str(loader_worker_error(RuntimeError(error))).startswith(said)


def test_other_errors_are_none_of_these() -> None:
    for error in (
        RuntimeError("out of memory"),
        ValueError("DataLoader worker (pid 1) exited"),
        DataError("gloo"),
    ):
        assert loader_worker_error(error) is None and connection_lost(error) is None


def test_a_broken_connection_is_known() -> None:
    gloo = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2161. This"
    )
    assert isinstance(connection_lost(gloo), RankLost)
    assert (
        connection_lost(torch.distributed.DistBackendError("NCCL error: remote process exited"))
        is not None
    )


@pytest.mark.parametrize(
    ("gone", "mine", "said"),
    [
        ([this_rank(3)], True, "rank 3 (process "),
        ([this_rank(3)], False, ""),
        ([], True, "The connection to another rank has broken: [gloo]"),
    ],
    ids=["mine", "another's", "nobody"],
)
def test_where_no_watchdog_looks_one_rank_tells_who_is_gone(
    gone: list[Heartbeat],
    mine: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watchdog, "left", lambda seconds: (gone, mine))
    monkeypatch.setattr(watchdog, "SECONDS_TO_LOOK", 0.0)
    assert (
        not report_lost_connection(RuntimeError("out of memory")) and capsys.readouterr().err == ""
    )
    assert report_lost_connection(RuntimeError("[gloo] Connection closed by peer"))
    told = capsys.readouterr().err
    assert told.startswith(f"bertdist: {said}") if said else told == ""


def test_an_error_of_ours_passes_and_a_worker_s_death_is_mended(tmp_path: Path) -> None:
    (tmp_path / ".ranks").mkdir()
    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path, ALONE, 9):
        raise ZeroDivisionError
    with pytest.raises(DataError, match=r"^Loader worker"), Watchdog(tmp_path, ALONE, 9):
        raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")
    assert not (tmp_path / ".ranks").exists(), "what an earlier run has left is cleared away"


def test_standing_still_working_and_moving_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(tmp_path, ALONE, 9)
    stack: Any = sys._getframe()
    children = [0.0]
    monkeypatch.setattr(watchdog.sys, "_current_frames", lambda: {dog._main: stack})
    monkeypatch.setattr(watchdog, "_workers_seconds", lambda: children[0])
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "clock_gettime", lambda which: clock[0])
    place = SimpleNamespace(f_code=stack.f_code, f_lasti=1, f_back=None)
    stack = place

    def moved(now: float) -> bool:
        dog._notice(now, 1.0)
        return dog._moved == now

    assert moved(1.0), "it was somewhere else"
    assert not moved(2.0)
    clock[0] += 0.5
    assert moved(3.0), "it computes"
    assert not moved(4.0)
    children[0] += 0.5
    assert moved(5.0), "its loader workers compute"
    place.f_lasti = 2
    assert moved(6.0), "it stands elsewhere"
    clock[0] += 0.001
    assert not moved(7.0)
    dog.cuda = True
    moved(8.0)
    clock[0] += 0.9
    assert not moved(9.0), "a thread that waits for a GPU computes"


def test_what_a_thread_does_is_the_innermost_function_of_ours() -> None:
    seen = []

    class Odd:
        def __str__(self) -> str:
            seen.append(doing_of(sys._getframe()))
            return "odd"

    watchdog._words(RuntimeError(Odd()))
    assert seen and seen[0].startswith("watchdog._words, line ")
    assert doing_of(None) == "other code" and time.monotonic() > 0


@pytest.mark.parametrize(
    ("rank", "shared", "waited"),
    [("1", True, [watchdog.SECONDS_TO_TELL]), ("0", True, []), ("1", False, [])],
)
def test_under_torchrun_rank_0_may_tell_what_all_have_found(
    rank: str, shared: bool, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    handled = signal.signal(signal.SIGTERM, lambda number, frame: None)
    monkeypatch.setenv("RANK", rank)
    error = DataError("x")
    error.on_all_ranks = shared
    end_soon(error)
    assert slept == [], "no torchrun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    end_soon(error)
    heeded = signal.signal(signal.SIGTERM, handled) is signal.SIG_DFL
    assert slept == waited and heeded is bool(waited), "torchrun may end it once rank 0 has told"
