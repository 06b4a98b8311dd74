"""Two machines whose network is slow, loses packets or breaks: network namespaces with a wire between them, a host name each, and one
folder that both see.

A process that is killed on one machine closes its connections; a machine that is lost, or a wire that is cut, does not. Needs the right to
make network namespaces (root) and `ip`; skipped elsewhere. The ranks are forks of the test, which start on the other side of the wire.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import TO_TELL, RankError, run_ranks
from rows import (
    Breaking,
    assert_same_run,
    at_step,
    be_quick,
    on_rank,
    run_train,
    skip_updates,
    words_of,
    write_split,
)

from bench.jobs import BenchError
from bench.machines import Machines, Network, two_machines
from bertdist import cli

CADENCE = {"max_train_steps": 8, "save_every": "2 steps", "eval_every": "4 steps"}
STEP = 5  # in which the network breaks
SLOW = Network(mbit=100, delay_ms=1, loss=0.01)


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    try:
        with two_machines(relay=getattr(request, "param", False)) as made:
            yield made
    except BenchError as error:
        pytest.skip(str(error))


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def made(**settings: Any) -> list[str]:
        files = write_split(tmp_path, 40, 8)
        return words_of(tiny_model, tmp_path / "out", files, **CADENCE, **settings)

    return made


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, on one machine."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(
        2, run_train, words_of(tiny_model, folder / "out", write_split(folder, 40, 8), **CADENCE)
    )
    return folder / "out"


def run_and_say(
    accelerator: Accelerator, words: list[str], breaking: Breaking, folder: Path
) -> int:
    """The command line; what it says is in a file, also where the watchdog ends the process. Returns the exit code."""
    be_quick()
    breaking(accelerator)
    with (
        open(folder / f"said_{accelerator.process_index}.txt", "w", buffering=1) as said,
        contextlib.redirect_stderr(said),
    ):
        try:
            cli.main(["train", *words])
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def complaints(folder: Path) -> list[str]:
    """The lines for a person that say why the run has ended, of all ranks."""
    said = "".join((folder / f"said_{rank}.txt").read_text() for rank in range(2))
    return [line for line in said.splitlines() if line.startswith("bertdist: ")]


def test_a_machine_that_is_lost_is_named_and_nothing_is_lost(
    tmp_path: Path, machines: Machines, words: Callable[..., list[str]], straight: Path
) -> None:
    """The other one hears nothing of it: it waits in a collective, and what it goes by is the silence of the lost rank's heartbeat."""

    def lose() -> None:
        machines.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError) as ended:
        run_ranks(
            2,
            run_and_say,
            words(rank_timeout=5),
            lambda accelerator: at_step(STEP, lambda: on_rank(1, lose)(accelerator))(accelerator),
            tmp_path,
            grace=TO_TELL,
            enter=machines.enter,
        )
    assert "rank 1 of 2: ended with status -9" in str(ended.value)
    assert "rank 0 of 2: ended with status 1" in str(ended.value)
    (line,) = complaints(tmp_path)
    assert (
        line.startswith("bertdist: rank 1 (process ")
        and "on machine1) has sent no heartbeat for " in line
    )
    run_ranks(2, run_train, words(rank_timeout=20))  # on one machine now
    assert_same_run(tmp_path / "out", straight)


def test_a_wire_that_is_cut_ends_both_ranks(
    tmp_path: Path, machines: Machines, words: Callable[..., list[str]]
) -> None:
    """Both machines are there and say so, and both wait: a collective that hangs."""
    with pytest.raises(RankError, match="ended with status 1"):
        run_ranks(
            2,
            run_and_say,
            words(rank_timeout=5),
            at_step(STEP, machines.cut),
            tmp_path,
            grace=TO_TELL,
            enter=machines.enter,
        )
    (line,) = complaints(tmp_path)
    assert "No rank has made progress for 5 s (--rank_timeout)" in line
    stacks = {path.name for path in (tmp_path / "out" / "stacks").iterdir()}
    assert stacks == {"rank_0.txt", "rank_1.txt"}


def test_a_wire_that_is_mended_soon_changes_nothing(
    tmp_path: Path, machines: Machines, words: Callable[..., list[str]], straight: Path
) -> None:
    def cut_for_a_while() -> None:
        machines.cut()
        threading.Timer(1.0, machines.plug).start()

    breaking = on_rank(0, lambda: at_step(STEP, cut_for_a_while)(Accelerator()))
    run_ranks(2, run_train, words(rank_timeout=60), breaking, enter=machines.enter)
    assert_same_run(tmp_path / "out", straight)


@pytest.mark.parametrize("machines", [True], indirect=True)
def test_a_network_that_is_slow_and_loses_packets_changes_nothing(
    tmp_path: Path, machines: Machines, words: Callable[..., list[str]], straight: Path
) -> None:
    machines.set_network(SLOW)
    run_ranks(2, run_train, words(), enter=machines.enter)
    assert machines.dropped > 0 and machines.passed > 50 * machines.dropped
    assert_same_run(tmp_path / "out", straight)


def test_a_step_that_was_not_exchanged_is_seen(
    tmp_path: Path, words: Callable[..., list[str]], straight: Path
) -> None:
    """The control of all that compare."""
    run_ranks(2, run_train, words(), skip_updates([STEP]))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "out", straight)
