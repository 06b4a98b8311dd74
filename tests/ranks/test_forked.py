"""The tests' own ranks: results come back by rank, and no failure is lost or hangs."""

import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from forked import RankError, run_ranks


def total(accelerator: Accelerator, offset: int) -> tuple[int, int, torch.Tensor]:
    """Rank, ranks, and the sum over ranks of (rank + offset)."""
    mine = torch.tensor([float(accelerator.process_index + offset)])
    return accelerator.process_index, accelerator.num_processes, accelerator.reduce(mine, "sum")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_results_come_back_by_rank(n: int) -> None:
    expected = {1: 10.0, 2: 21.0, 3: 33.0}[n]
    assert run_ranks(n, total, 10) == [(rank, n, torch.tensor([expected])) for rank in range(n)]


def test_nothing_leaks_into_the_test() -> None:
    before, state = dict(os.environ), dict(PartialState._shared_state)
    run_ranks(1, lambda accelerator: os.environ.update(LEAKED="1"))
    assert dict(os.environ) == before
    assert PartialState._shared_state == state


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_failing_rank_is_named_with_its_traceback(n: int) -> None:
    def fail_on_the_last(accelerator: Accelerator) -> None:
        if accelerator.process_index == n - 1:
            raise ValueError("a wrong turn")
        accelerator.wait_for_everyone()

    begin = time.monotonic()
    with pytest.raises(
        RankError,
        match=rf"^rank {n - 1} of {n}: Traceback(.|\n)*fail_on_the_last(.|\n)*ValueError: a wrong turn",
    ):
        run_ranks(n, fail_on_the_last)
    assert time.monotonic() - begin < 10


def test_an_exit_is_a_failure() -> None:
    with pytest.raises(RankError, match="SystemExit: 0"):
        run_ranks(1, lambda accelerator: exit(0))


def test_a_killed_rank_is_named_before_those_that_miss_it() -> None:
    def die(accelerator: Accelerator) -> None:
        if accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        accelerator.wait_for_everyone()

    with pytest.raises(RankError, match=r"^rank 1 of 2: ended with status -9"):
        run_ranks(2, die)


def test_a_rank_that_hangs_is_ended_and_says_where() -> None:
    def hang(accelerator: Accelerator) -> None:
        if accelerator.process_index == 1:
            time.sleep(3600)

    begin = time.monotonic()
    with pytest.raises(
        RankError, match=r"rank 1 of 2: did not end within 2 s; it stood at\n(.|\n)*in hang"
    ):
        run_ranks(2, hang, timeout=2)
    assert time.monotonic() - begin < 8


def test_a_rank_that_leaves_without_a_result_is_a_failure() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1: ended with status 0"):
        run_ranks(1, lambda accelerator: os._exit(0))


def test_a_result_that_cannot_be_pickled_is_a_failure() -> None:
    with pytest.raises(RankError, match="pickle"):
        run_ranks(1, lambda accelerator: lambda: None)
