"""What the watchdog makes of errors, and what it takes for a move. Ranks that die and hang in earnest: tests/ranks/test_faults.py."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bertdist.core.errors import DataError, RankLost
from bertdist.distributed import watchdog
from bertdist.distributed.watchdog import (
    Watchdog,
    connection_error,
    loader_worker_error,
    location_of,
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
            "Loader worker (process 12, 34) ended without a message",
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
        assert loader_worker_error(error) is None and connection_error(error) is None


def test_a_broken_connection_is_known() -> None:
    gloo = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2161. This"
    )
    assert isinstance(connection_error(gloo), RankLost)
    assert (
        connection_error(torch.distributed.DistBackendError("NCCL error: remote process exited"))
        is not None
    )


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
    monkeypatch.setattr(watchdog, "_child_cpu_seconds", lambda: children[0])
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "clock_gettime", lambda which: clock[0])
    place = SimpleNamespace(f_code=stack.f_code, f_lasti=1, f_back=None)
    stack = place

    def moved(now: float) -> bool:
        dog._check_progress(now, 1.0)
        return dog._progress_at == now

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
            seen.append(location_of(sys._getframe()))
            return "odd"

    watchdog._summary(RuntimeError(Odd()))
    assert seen and seen[0].startswith("watchdog._summary, line ")
    assert location_of(None) == "other code" and time.monotonic() > 0
