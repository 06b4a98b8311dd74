"""The command `bertdist`: commands, mistakes, and how several processes are started."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bertdist
from bertdist import cli
from bertdist.core.errors import ConfigError
from bertdist.core.terminal import EXIT_BROKEN_PIPE
from bertdist.data import preflight

TRAIN = ["--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=o"]


@pytest.fixture(autouse=True)
def nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of TRAIN do not exist; tests/unit/data/test_preflight.py."""
    monkeypatch.setattr(preflight, "is_launched", lambda: True)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_deleted_current_folder_is_one_line(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run(capsys, command, *TRAIN) == (
        1,
        "",
        "bertdist: The current folder was deleted: change to another one (cd).\n",
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(capsys, *words)
    assert (code, error) == (0, "")
    for name in (*cli.COMMANDS, *cli.OTHER_COMMANDS):
        assert f"  bertdist {name} " in out
    assert max(map(len, out.split("\n"))) <= 80


@pytest.mark.parametrize("name", [*cli.COMMANDS, *cli.OTHER_COMMANDS])
@pytest.mark.parametrize("words", [["--help"], ["--help", "all"]])
def test_help_fits_into_80_columns(
    name: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, error = run(capsys, name, *words)
    assert (code, error) == (0, "") and f"  bertdist {name} " in out
    assert max(map(len, out.split("\n"))) <= 80


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"bertdist {bertdist.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "There is no command 'trian'. Did you mean 'train'? `bertdist --help` lists"),
        (["--seed"], "There is no command '--seed'. Known: '"),
        (["train", "--max_lenght=3"], "Unknown setting --max_lenght. Did you mean --max_length?"),
        (["train"], "--model_name_or_path is missing"),
        (["predict"], "--model is missing"),
        (["check"], "No training rows"),
        (["train", *TRAIN, "--processes", "0"], "--processes is 0; expected at least 1."),
        (["train", *TRAIN, "--processes", "x"], "--processes: invalid int value: 'x'."),
        (["train", *TRAIN, "--config_file", "no.yaml"], "--config_file no.yaml: there is no such"),
        (["info", "x"], "bertdist info takes accelerate_configs or launch, or nothing."),
        (["completion", "csh"], "bertdist completion takes a shell: bash, zsh, fish."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(capsys, *words)
    assert (code, out) == (1, "")
    assert error.startswith(f"bertdist: {message}")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "check"])
def test_help_of_a_command_names_the_flags_of_launches(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "--processes N" in out and f"bertdist {name} --" in out


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "check", "export"])
def test_a_command_runs_its_script_with_the_checked_config(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    words = {"train": TRAIN, "predict": ["--model=m", "--text=x"], "check": ["--train_file=t.tsv"]}
    words |= {"evaluate": ["--model=m", "--input=t.tsv"], "export": ["--model=m"]}
    script = importlib.import_module(f"bertdist.{cli.MODULES.get(name, name)}")
    monkeypatch.setattr(script, "run", lambda config: seen.append(config) or 75)
    assert run(capsys, name, *words[name])[0] == 75
    assert seen == [cli.COMMANDS[name].read(words[name])]


def test_info_shows_versions_devices_and_folders(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    for part in (bertdist.__version__, "torch ", "transformers ", "cores", "launch"):
        assert part in out
    assert code == 0
    code, out, _ = run(capsys, "info", "launch")
    assert (code, out) == (0, f"{bertdist.resource_folder('launch')}\n")


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_commands_and_flags(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0
    for word in ("train", "predict", "model_name_or_path", "accelerate_configs"):
        assert word in out


def test_completion_without_shtab_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    message = "needs shtab: pip install shtab, or 'bertdist[completion]'."
    assert message in run(capsys, "completion", "bash")[2]


# ---- Several processes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The flags with which `accelerate launch` was called, which starts nothing."""
    seen: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", seen.append)
    return seen


@pytest.mark.parametrize(
    ("gpus", "words", "file"),
    [
        (0, [], "cpu_x2.yaml"),
        (4, [], "gpu_x8.yaml"),
        (4, ["--use_cpu"], "cpu_x2.yaml"),
    ],
)
def test_processes_start_accelerate_with_the_config_of_the_device(
    gpus: int,
    words: list[str],
    file: str,
    launched: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert run(capsys, "train", *TRAIN, *words, "--processes", "3")[0] == 0
    (flags,) = launched
    assert Path(flags.config_file).name == file and flags.num_processes == 3
    assert (flags.module, flags.training_script) == (True, "bertdist.train")
    assert flags.training_script_args == [*TRAIN, *words]
    assert flags.mixed_precision == "no"


def test_more_processes_than_gpus_is_an_error(
    launched: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    code, _, error = run(capsys, "train", *TRAIN, "--processes=3")
    assert code == 1 and "--processes is 3, and there are 2 GPUs" in error and not launched


def test_one_process_is_not_launched(
    launched: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("bertdist.train"), "run", lambda config: 0)
    assert run(capsys, "train", *TRAIN, "--processes", "1")[0] == 0
    assert launched == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: FSDP\nfsdp_config: {}\nnum_processes: 2\n", "distributed_type FSDP"),
        ("[", "accelerate cannot read it"),
    ],
)
def test_settings_that_have_no_effect_are_refused(
    text: str,
    message: str,
    launched: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\n{text}")
    code, _, error = run(capsys, "train", *TRAIN, "--config_file", str(file))
    assert code == 1 and message in error and "Traceback" not in error and not launched


def test_the_exit_code_is_that_of_the_first_process_that_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(flags: Any) -> None:
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=75, error_file="none")
        raise ChildFailedError("train", {0: failure})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert run(capsys, "train", *TRAIN, "--processes", "2")[0] == 75


def test_flags_of_launches_are_taken_wherever_they_stand() -> None:
    def split(*words: str) -> tuple[int, str, Sequence[str]]:
        return cli._launch_flags(words)

    assert split("--seed", "1", "--processes", "2", "--text", "a", "b") == (
        2,
        "",
        ["--seed", "1", "--text", "a", "b"],
    )
    assert split("--use_cpu") == (0, "", ["--use_cpu"])
    with pytest.raises(ConfigError):
        split("--processes")


@pytest.mark.parametrize("words", [["train", "--help", "all"], ["--help"], ["info", "launch"]])
def test_a_closed_pipe_ends_without_a_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "bertdist", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == EXIT_BROKEN_PIPE
