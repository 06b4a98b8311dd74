"""How a process starts and ends: exit codes, settings of the process, lost ranks of a launch, the Accelerator, rendezvous."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from forked import Command, run_ranks
from rows import be_quick, run_train, words_of, write_split
from torch.distributed import TCPStore

from bertdist.core import terminal
from bertdist.core.args import read_config
from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError
from bertdist.core.terminal import exit_with_error
from bertdist.distributed import launch
from bertdist.distributed.launch import (
    EXIT_INTERRUPTED,
    create_accelerator,
    find_dead_ranks,
    report_lost_connection,
    run_cli,
    wait_for_all_ranks,
)
from bertdist.distributed.watchdog import own_heartbeat, start_of
from bertdist.train import train

SECONDS = 100  # for anything to happen

# ---- run_cli


def exit_code(command: Any) -> Any:
    with pytest.raises(SystemExit) as ended:
        run_cli(command, None)
    return ended.value.code


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_that_of_the_command(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    assert exit_code(lambda config: seen.append(config) or code) == code
    assert seen == [None]


@pytest.mark.parametrize("is_read", [False, True])
def test_standard_output_that_nobody_reads_ends_a_command(is_read: bool) -> None:
    def command(config: Any) -> int:
        raise BrokenPipeError

    reader, writer = os.pipe()
    stdout = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    if not is_read:
        os.close(reader)
    try:
        if is_read:  # the control: another pipe is broken
            with pytest.raises(BrokenPipeError):
                run_cli(command, None)
        else:
            assert exit_code(command) == 141
            os.write(1, b"dropped")
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("on_all_ranks", [True, False])
def test_an_error_of_all_ranks_is_printed_by_rank_0(
    rank: str,
    on_all_ranks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def command(config: None) -> int:
        error = DataError("bad row")
        error.on_all_ranks = on_all_ranks
        raise error

    assert exit_code(command) == 1
    shown = "bertdist: bad row\n" if rank == "0" or not on_all_ranks else ""
    assert capfd.readouterr() == ("", shown)


def test_an_error_that_another_rank_has_printed_is_not_printed_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def command(config: None) -> int:
        error = DataError("bad row")
        error.already_printed = True
        raise error

    assert (exit_code(command), *capfd.readouterr()) == (1, "", "")


def test_other_errors_keep_their_traceback() -> None:
    def command(config: None) -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_cli(command, None)


def test_a_second_interrupt_ends_without_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(config: None) -> int:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    assert exit_code(command) == EXIT_INTERRUPTED == 130


def test_a_late_signal_does_not_change_the_exit_code() -> None:
    assert exit_code(lambda arguments: 75) == 75
    signal.raise_signal(signal.SIGTERM)  # would end this process


# ---- The host process: scripts change it, a program that imports bertdist keeps its own settings

HOST = """
import os, signal, sys
from transformers.utils import logging

def settings():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)
    handlers = [signal.getsignal(number) for number in numbers]
    return [dict(os.environ), handlers, logging.get_verbosity(), logging.is_progress_bar_enabled()]

def changed():
    names = ["environ", "signals", "verbosity", "bars"]
    return [name for name, a, b in zip(names, before, settings()) if a != b] + mallopt

mallopt = []
before = settings()
from bertdist.distributed import launch
launch.keep_freed_memory = lambda: mallopt.append("mallopt")
from bertdist import Predictor
answers = Predictor(sys.argv[1])(["good film"])
assert answers[0]["label"], answers
print(*changed())
launch.configure_process()
print(*changed())
"""


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    words = words_of(tiny_model, folder / "out", write_split(folder, 12), max_train_steps=1)
    run_ranks(1, run_train, words)
    return folder / "out" / "best"


def test_a_predictor_leaves_the_process_as_it_was(trained: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(trained)],
        env={**environ, "ACCELERATE_USE_CPU": "true"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\nenviron verbosity bars mallopt\n"  # the second is the control


@pytest.mark.parametrize("in_thread", [True, False])
def test_train_restores_the_signal_handlers_and_runs_in_any_thread(
    in_thread: bool, tiny_model: Path, tmp_path: Path
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 12), max_train_steps=2)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def run(accelerator: Accelerator) -> Any:
        be_quick()
        module = sys.modules["bertdist.train"]
        load_splits, during, ended = module.load_splits, [], []  # type: ignore[attr-defined]
        before = [signal.getsignal(number) for number in numbers]

        def watched(*args: Any) -> Any:
            during.append([signal.getsignal(number) for number in numbers] != before)
            return load_splits(*args)

        module.load_splits = watched  # type: ignore[attr-defined]
        if in_thread:
            thread = threading.Thread(target=lambda: ended.append(train(read_config(words)).step))
            thread.start()
            thread.join()
        else:
            ended.append(train(read_config(words)).step)
        return ended, during, [signal.getsignal(number) for number in numbers] == before

    assert run_ranks(1, run) == [([2], [not in_thread], True)]


# ---- create_accelerator, in a process of its own: accelerate's state is the process's

ONE_RANK = {"num_processes": 1, "is_main_process": True, "device": torch.device("cpu")}


def opened(run: RunConfig, environ: dict[str, str] | None = None) -> Any:
    """(processes, device, precision), or the error in words."""

    def open_it(accelerator: Accelerator) -> Any:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        os.environ.update(environ or {})
        try:
            found = create_accelerator(run)
        except BertdistError as error:
            return type(error).__name__, str(error)
        return found.num_processes, found.device.type, found.mixed_precision

    return run_ranks(1, open_it)[0]


def test_without_a_launcher_there_is_one_process() -> None:
    assert opened(RunConfig(use_cpu=True)) == (1, "cpu", "no")


@pytest.mark.parametrize("by_flag", [True, False])
def test_bf16_needs_a_cpu_that_has_it(
    by_flag: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if by_flag else "bf16")
    run = RunConfig(use_cpu=True, mixed_precision="bf16" if by_flag else None)
    monkeypatch.setattr("bertdist.distributed.launch.cpu_has_bf16", lambda: True)
    assert opened(run) == (1, "cpu", "bf16") and capfd.readouterr().err == ""
    monkeypatch.setattr("bertdist.distributed.launch.cpu_has_bf16", lambda: False)
    assert opened(run) == (1, "cpu", "no")
    error = capfd.readouterr().err
    assert "AVX512_BF16" in error and "using float32" in error and error.count("\n") == 1


def test_a_precision_that_cannot_take_effect_is_one_line() -> None:
    # On a CPU accelerate 1.15 takes the word and computes in float32.
    found = opened(RunConfig(use_cpu=True, mixed_precision="fp16"))
    assert found[0] == "ConfigError"
    assert "fp16" in found[1] and "\n" not in found[1]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["tensorbord"], "tensorbord: not a tracker of accelerate. Did you mean 'tensorboard'?"),
        (["neptune"], "neptune: not a tracker of accelerate. Known: "),
        (["wandb"], "wandb: not an installed tracker; pip install wandb."),
        (["mlflow"], "mlflow: not an installed tracker; pip install 'mlflow>=3'."),
        (["tensorboard"], "tensorboard: not an installed tracker; pip install 'bertdist[tensorbo"),
        (["all"], "all: no tracker is installed."),
        (["mlflow", "none"], "none: give it alone."),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(
    given: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, state = ["mlflow"] if "none" in given else [], dict(PartialState._shared_state)
    monkeypatch.setattr(launch, "get_available_trackers", lambda: installed)
    with pytest.raises(ConfigError) as caught:
        create_accelerator(RunConfig(use_cpu=True, output_dir=str(tmp_path), report_to=given))
    assert str(caught.value).startswith(f"--report_to {line}")
    assert PartialState._shared_state == state  # nothing was opened


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], []), (["none"], []), (["all"], ["aim", "mlflow"]), (["mlflow"], ["mlflow"])],
)
def test_trackers_by_name_all_or_none(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "get_available_trackers", lambda: ["aim", "mlflow"])
    assert launch.installed_trackers(given) == expected


def test_what_accelerate_cannot_do_is_one_line() -> None:
    found = opened(RunConfig(use_cpu=True), {"ACCELERATE_DEBUG_MODE": "maybe"})
    assert found == ("ConfigError", "accelerate: invalid truth value maybe")
    found = opened(RunConfig(use_cpu=True), {"ACCELERATE_USE_FSDP": "true"})
    assert found[0] == "ConfigError" and found[1].startswith("ACCELERATE_USE_FSDP is 'true'")


@pytest.mark.parametrize(("use_cpu", "lines"), [(False, 1), (True, 0)])
def test_a_device_that_is_not_supported_is_named(
    use_cpu: bool, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        launch,
        "Accelerator",
        lambda cpu, **_: SimpleNamespace(
            distributed_type="NO", mixed_precision="no", device=torch.device("cpu"), cpu=cpu
        ),
    )
    monkeypatch.setattr(launch, "PartialState", lambda **_: SimpleNamespace(**ONE_RANK))
    assert create_accelerator(RunConfig(use_cpu=use_cpu)).cpu
    line = "bertdist: device mps is not supported; using the CPU.\n"
    assert capsys.readouterr().err == line * lines


# ---- Rendezvous


def meet(seconds: float) -> None:
    """In a process of its own, which stays until it is killed: torch's stores leave threads behind."""
    try:
        store = wait_for_all_ranks(timedelta(seconds=seconds))
        print("met" if store else "alone")  # the store goes with this process
    except BertdistError as error:
        print(error if not error.already_printed else "silent")
    time.sleep(SECONDS)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def placed(rank: int, of: int, port: int) -> dict[str, str]:
    """The environment of a rank."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(of),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {**plain, **place}


class Ranks:
    """Ranks that meet."""

    def __init__(self, folder: Path, ranks: list[int], of: int, port: int, seconds: float) -> None:
        self.files = [folder / f"rank_{rank}" for rank in ranks]
        self.running = [
            Command(partial(meet, seconds), ["meet"], file, placed(rank, of, port), folder / "err")
            for rank, file in zip(ranks, self.files, strict=True)
        ]

    def said(self, index: int) -> str:
        """The line of one of them, once it has come."""
        file, deadline = self.files[index], time.monotonic() + SECONDS
        while not file.exists() or not file.read_text().endswith("\n"):
            assert time.monotonic() < deadline, "it says nothing"
            time.sleep(0.01)
        return file.read_text().strip()

    def kill(self) -> None:
        for run in self.running:
            run.kill()
            run.wait()


Said = Callable[..., list[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts ranks; none outlives the test."""
    started: list[Ranks] = []

    def start(*words: Any) -> Ranks:
        started.append(Ranks(tmp_path, *words))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.fixture
def said(start: Callable[..., Ranks]) -> Said:
    """What these ranks have to say of their meeting."""

    def said(ranks: list[int], of: int, port: int, seconds: float) -> list[str]:
        running = start(ranks, of, port, seconds)
        return [running.said(index) for index in range(len(ranks))]

    return said


def test_ranks_that_all_come_meet(said: Said) -> None:
    assert said([0, 1, 2], 3, free_port(), 60) == ["met"] * 3


def test_who_does_not_arrive_is_named_once(said: Said) -> None:
    port, host = free_port(), socket.gethostname()
    first, third = said([0, 2], 4, port, 5)
    assert first == (
        f"Rank 1, 3 of 4 did not arrive at 127.0.0.1:{port} within 5 s (--rank_timeout). Present: rank 0 (on {host}), rank 2 (on {host})."
    )
    assert third == "silent"


def test_who_starts_later_is_silent_too(start: Callable[..., Ranks]) -> None:
    """The first rank, which keeps the store, waits until the others have read who is missing."""
    first = start([0], 3, port := free_port(), 6)
    TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60)).wait(["bertdist/0/0"])
    time.sleep(1)
    later = start([1], 3, port, 60)
    assert first.said(0).startswith(f"Rank 2 of 3 did not arrive at 127.0.0.1:{port} within 6 s")
    assert later.said(0) == "silent"


def keep_a_store_without_rank_1(port: int) -> None:
    store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=60), False)
    store.set("bertdist/0/0", json.dumps(asdict(own_heartbeat(0))))
    store.set("bertdist/0/1", launch.ABSENT)
    print("ready")
    time.sleep(SECONDS)


def test_who_comes_too_late_does_not_go_on(start: Callable[..., Ranks], tmp_path: Path) -> None:
    """torchrun's agent keeps the store when the others have given up."""
    serve = partial(keep_a_store_without_rank_1, port := free_port())
    agent = Command(serve, ["agent"], tmp_path / "agent")
    try:
        assert start([1], 2, port, 60).said(0) == "silent"
    finally:
        agent.kill()
        agent.wait()


def test_a_missing_first_rank_is_named(said: Said) -> None:
    port = free_port()
    (found,) = said([1], 2, port, 2)
    assert found.startswith(
        f"rank 1 of 2 (on {socket.gethostname()}): rank 0 has not arrived at 127.0.0.1:{port} within 2 s"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_is_taken_is_named(said: Said, rank: int) -> None:
    """By a program that takes connections and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (found,) = said([rank], 2, port := other.getsockname()[1], 2)
    assert (
        found.startswith(f"Rendezvous failed at 127.0.0.1:{port}: ")
        and "give another (--main_process_port to" in found
    )


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {"RANK": "zero"},
    ],
)
def test_one_rank_meets_nobody(words: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert wait_for_all_ranks(timedelta(seconds=1)) is None


def test_port_0_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in placed(1, of=2, port=0).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^MASTER_PORT is 0, .*torchrun --standalone"):
        wait_for_all_ranks(timedelta(seconds=1))


def test_a_first_rank_that_is_killed_before_all_have_met_is_told(
    start: Callable[..., Ranks],
) -> None:
    ranks = start([0, 1], 3, port := free_port(), 60)
    TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60)).wait(["bertdist/0/1"])
    ranks.running[0].kill()
    assert (
        ranks.said(1)
        == f"rank 1 of 3: rank 0 exited before the rendezvous completed at 127.0.0.1:{port}; its own message says more."
    )


def test_who_is_gone_is_told_by_the_lowest_rank_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me, parent = own_heartbeat(1), psutil.Process().parent()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = replace(me, rank=2, pid=child.pid)
    alive = replace(me, rank=0, pid=parent.pid, process_start=start_of(parent))
    elsewhere = replace(dead, rank=3, host="elsewhere")
    for met, found in (
        ([dead, me], ([dead], True)),
        ([alive, me, dead], ([dead], False)),
        ([me, elsewhere], ([], True)),
        ([], ([], True)),
    ):
        monkeypatch.setattr(launch, "_rendezvous_ranks", met)
        assert find_dead_ranks(0.2) == found


@pytest.mark.parametrize(
    ("gone", "mine", "said"),
    [
        ([own_heartbeat(3)], True, "rank 3 (process "),
        ([own_heartbeat(3)], False, ""),
        ([], True, "The connection to another rank is broken: [gloo]"),
    ],
    ids=["mine", "another's", "nobody"],
)
def test_where_no_watchdog_looks_one_rank_tells_who_is_gone(
    gone: list[Any],
    mine: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "find_dead_ranks", lambda seconds: (gone, mine))
    monkeypatch.setattr(launch, "DEAD_RANK_WAIT_SECONDS", 0.0)
    assert (
        not report_lost_connection(RuntimeError("out of memory")) and capsys.readouterr().err == ""
    )
    assert report_lost_connection(RuntimeError("[gloo] Connection closed by peer"))
    told = capsys.readouterr().err
    assert told.startswith(f"bertdist: {said}") if said else told == ""


@pytest.mark.parametrize(
    ("rank", "shared", "waited"),
    [("1", True, [terminal.PRINT_SECONDS]), ("0", True, []), ("1", False, [])],
)
def test_under_torchrun_rank_0_may_tell_what_all_have_found(
    rank: str, shared: bool, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(terminal.time, "sleep", slept.append)
    handled = signal.signal(signal.SIGTERM, lambda number, frame: None)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = DataError("x")
    error.on_all_ranks = shared
    with pytest.raises(SystemExit):
        exit_with_error(error)
    assert slept == [], "no torchrun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit):
        exit_with_error(error)
    heeded = signal.signal(signal.SIGTERM, handled) is signal.SIG_DFL
    assert slept == waited and heeded is bool(waited), "torchrun may end it once rank 0 has told"
