"""A run stops when it is asked to, on all ranks at once."""

import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from torch.utils.data import DataLoader

from bertdist.core.time_limit import slurm_seconds_left
from bertdist.distributed import preemption
from bertdist.distributed.preemption import StopSignal, ignore_stop_signals

ALONE: Any = SimpleNamespace(num_processes=1)  # an accelerator of one rank; it has no collectives


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    request = StopSignal()
    yield request
    request.close()


def ends_in(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + seconds))


# --- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_remembered(stop: StopSignal, name: str) -> None:
    assert stop.reason == "" and not stop.requested(ALONE)
    signal.raise_signal(signal.Signals[name])
    assert stop.reason == name
    assert stop.requested(ALONE) and stop.requested(ALONE)


def test_without_a_stop_request_an_interrupt_ends_the_process() -> None:
    old = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job begins with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_closed_terminal_stops_but_under_nohup() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested_locally()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_second_interrupt_ends_at_once(stop: StopSignal) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)  # the first one of its kind
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_termination_is_only_remembered(stop: StopSignal) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    assert stop.reason == "SIGUSR1"


def test_close_puts_the_old_handlers_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    request = StopSignal()
    assert [signal.getsignal(number) for number in numbers] != before
    request.close()
    assert [signal.getsignal(number) for number in numbers] == before


# --- the time limit


@pytest.mark.parametrize("value", [None, "", "unlimited"])
def test_time_left_is_unknown_where_slurm_does_not_say(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", value)
    assert slurm_seconds_left() is None


def test_time_left_is_seconds_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_in(monkeypatch, 100)
    left = slurm_seconds_left()
    assert left is not None and 99 < left <= 100


NEAR = [(60, 59, True), (60, 61, False), (0, 1, False), (60, -5, True), (60, None, False)]


@pytest.mark.parametrize(("margin", "seconds", "stops"), NEAR)
def test_it_stops_so_long_before_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, margin: float, seconds: float | None, stops: bool
) -> None:
    ends_in(monkeypatch, 10_000)
    request = StopSignal(margin)
    request.close()
    if seconds is None:
        monkeypatch.delenv("SLURM_JOB_END_TIME")
    else:
        ends_in(monkeypatch, seconds)
    assert request.requested(ALONE) is stops
    assert request.reason.startswith("time limit in ") is stops


def test_a_short_job_keeps_half_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be queued again for ever: 120 s before the end of a job of 60 s is before its first step."""
    ends_in(monkeypatch, 60)
    request = StopSignal(120)
    request.close()
    assert not request.requested(ALONE)
    ends_in(monkeypatch, 29)
    assert request.requested(ALONE)


# --- ranks agree


def answers(accelerator: Accelerator, told: int) -> tuple[list[bool], list[bool], str]:
    """Rank `told` gets SIGUSR1 before its third call: what `requested` said, what the rank itself knew, the reason it gives."""
    stop, said, knew = StopSignal(), [], []
    for call in range(4):
        if call == 2 and accelerator.process_index == told:
            signal.raise_signal(signal.SIGUSR1)
        knew.append(bool(stop.reason))
        said.append(stop.requested(accelerator))
    return said, knew, stop.reason


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_ranks_stop_at_the_same_call(n: int) -> None:
    results = run_ranks(n, answers, n - 1)
    assert [said for said, _, _ in results] == [[False, False, True, True]] * n
    assert [reason for _, _, reason in results] == ["a stop was requested on another rank"] * (
        n - 1
    ) + ["SIGUSR1"]


def test_a_rank_by_itself_would_not_have_known() -> None:
    said, knew, _ = run_ranks(2, answers, 1)[0]
    assert said[2] and not knew[2]


def test_no_rank_stops_unasked() -> None:
    assert [said for said, _, _ in run_ranks(2, answers, -1)] == [[False] * 4] * 2


def test_the_time_limit_of_one_rank_stops_all() -> None:
    def stops(accelerator: Accelerator) -> bool:
        os.environ["SLURM_JOB_END_TIME"] = str(time.time() + 1000)
        stop = StopSignal(60)
        if accelerator.process_index == 0:
            os.environ["SLURM_JOB_END_TIME"] = str(time.time() + 50)
        return stop.requested(accelerator)

    assert run_ranks(2, stops) == [True, True]


# --- loader workers


class Slow(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.005)
        return index


def rows_read_when_all_are_told_to_end(accelerator: Accelerator, worker_init_fn: Any) -> int | str:
    os.setpgid(0, 0)
    StopSignal()
    rows = 0
    try:
        for batch in DataLoader(Slow(), batch_size=4, num_workers=1, worker_init_fn=worker_init_fn):
            rows += len(batch)
            if rows == 8:
                os.killpg(0, signal.SIGTERM)  # as SLURM and torchrun do
    except RuntimeError as error:
        return str(error)
    return rows


def test_loader_workers_outlive_a_termination() -> None:
    assert run_ranks(1, rows_read_when_all_are_told_to_end, ignore_stop_signals) == [40]


def test_without_it_the_rank_dies_before_it_can_save() -> None:
    assert "exited unexpectedly" in run_ranks(1, rows_read_when_all_are_told_to_end, None)[0]


# --- the launcher


@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_is_gone_asks_to_stop(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent of a run that nobody launched may go: a shell, nohup."""
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as users do
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    request = StopSignal()
    assert not request.requested(ALONE)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert request.requested(ALONE) is launched and request.reason == (
        "the launcher is gone" if launched else ""
    )
    request.close()


def test_a_launcher_that_went_before_there_was_a_request_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While torch was imported and ranks met. A process that was forked later has a parent of its own."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    for process, reason in ((os.getpid(), "the launcher is gone"), (os.getpid() + 1, "")):
        monkeypatch.setattr(preemption, "_AT_IMPORT", (process, os.getppid() + 1))
        request = StopSignal()
        assert request.requested(ALONE) is bool(reason) and request.reason == reason
        request.close()


@pytest.mark.parametrize(
    ("seen_here_since", "reason"),
    [(True, "the launcher is gone"), (False, "a stop was requested on another rank")],
)
def test_a_rank_gives_the_reason_it_can_see_itself(
    seen_here_since: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends between this rank's look and the other's: both then say so."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def reduce(asked: torch.Tensor, reduction: str) -> torch.Tensor:
        if seen_here_since:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        return asked + 1

    request = StopSignal()
    two: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    assert request.requested(two) and request.reason == reason
    request.close()
