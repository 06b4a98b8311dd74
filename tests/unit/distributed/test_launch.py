"""How a process starts and ends: what a script sets and a library leaves alone, exit codes, the Accelerator."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from forked import run_ranks
from rows import words_of, write_split

from bertdist.core.args import read_config
from bertdist.core.config import RunConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError
from bertdist.distributed.launch import EXIT_INTERRUPTED, create_accelerator, run_cli
from bertdist.train import train

# ---- run_cli


def exit_code(command: Any) -> Any:
    with pytest.raises(SystemExit) as ended:
        run_cli(command)
    return ended.value.code


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_that_of_the_command(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(sys, "argv", ["x", "--seed", "3"])
    assert exit_code(lambda arguments: seen.append(arguments) or code) == code
    assert seen == [["--seed", "3"]]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("on_all_ranks", [True, False])
def test_an_error_of_all_ranks_is_printed_by_rank_0(
    rank: str,
    on_all_ranks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)

    def command(arguments: Sequence[str]) -> int:
        error = DataError("bad row")
        error.on_all_ranks = on_all_ranks
        raise error

    assert exit_code(command) == 1
    shown = "bertdist: bad row\n" if rank == "0" or not on_all_ranks else ""
    assert capfd.readouterr() == ("", shown)


def test_an_error_that_another_rank_has_printed_is_not_printed_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def command(arguments: Sequence[str]) -> int:
        error = DataError("bad row")
        error.already_printed = True
        raise error

    assert (exit_code(command), *capfd.readouterr()) == (1, "", "")


def test_other_errors_keep_their_traceback() -> None:
    def command(arguments: Sequence[str]) -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_cli(command)


def test_a_second_interrupt_ends_without_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: Sequence[str]) -> int:
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

folder, script = sys.argv[1:]
mallopt = []
before = settings()
from bertdist.distributed import launch
keep, launch.keep_freed_memory = launch.keep_freed_memory, lambda: mallopt.append(1)
if script == "yes":
    launch.configure_process()
from bertdist import Predictor
from bertdist.predict import create_accelerator
answers = Predictor(folder)(["good film"])
assert answers[0]["label"], answers
now = settings()
print(*[name for name, a, b in zip(["environ", "signals", "verbosity", "bars"], before, now) if a != b], *mallopt)
"""


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    words = words_of(tiny_model, folder / "out", write_split(folder, 12), max_train_steps=1)
    run_ranks(1, lambda accelerator: train(read_config(words)) and None)
    return folder / "out" / "best"


@pytest.mark.parametrize(("script", "changed"), [("no", ""), ("yes", "environ verbosity bars 1")])
def test_a_predictor_leaves_the_process_as_it_was(script: str, changed: str, trained: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(trained), script],
        env={**environ, "ACCELERATE_USE_CPU": "true"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == changed


@pytest.mark.parametrize("in_thread", [True, False])
def test_train_restores_the_signal_handlers_and_runs_in_any_thread(
    in_thread: bool, tiny_model: Path, tmp_path: Path
) -> None:
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 12), max_train_steps=2)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def run(accelerator: Accelerator) -> Any:
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
    assert opened(RunConfig(use_cpu=True, mixed_precision="bf16")) == (1, "cpu", "bf16")


def test_a_precision_that_cannot_take_effect_is_one_line() -> None:
    # On a CPU accelerate 1.15 takes the word and computes in float32.
    found = opened(RunConfig(use_cpu=True, mixed_precision="fp16"))
    assert found[0] == "ConfigError"
    assert "fp16" in found[1] and "\n" not in found[1]


def test_accumulation_by_accelerate_is_refused() -> None:
    assert opened(RunConfig(use_cpu=True), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}) == (
        "ConfigError",
        "accelerate was told gradient_accumulation_steps 4; leave it at 1: --train_batch_size is the whole step, and "
        "--tokens_per_micro_batch cuts it.",
    )


def test_a_tracker_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--report_to tensorbord: not a tracker that is installed here\."
    ):
        create_accelerator(
            RunConfig(use_cpu=True, output_dir=str(tmp_path), report_to=["tensorbord"])
        )
    assert PartialState._shared_state == {}  # nothing was opened
