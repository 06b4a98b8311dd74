"""The parts of `bertdist slurm doctor` that read SLURM's variables; tests/slurm runs all of it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertdist.core.errors import ConfigError
from bertdist.distributed import doctor
from bertdist.distributed.doctor import (
    in_step,
    numbers_of_tasks,
    place_in_step,
    print_table,
    silent_tasks,
    start_step,
)
from bertdist.distributed.doctor_checks import Finding
from bertdist.distributed.slurm_config import DoctorConfig
from bertdist.distributed.task_exchange import Answer, Place

STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"SLURM_STEP_ID": "4294967291"}, False),  # the batch script
        ({"SLURM_STEP_ID": "4294967290"}, False),  # the shell of salloc
        ({"SLURM_STEP_ID": ""}, False),
    ],
)
def test_inside_a_step(changes: dict[str, str], expected: bool) -> None:
    assert in_step({**STEP, **changes}) == expected
    assert not in_step({"SLURM_JOB_ID": "1"})


def test_the_place_is_that_of_a_launch() -> None:
    environ = {**STEP, "MAIN_PROCESS_IP": "10.1.2.3", "SLURM_RESTART_COUNT": "2"}
    place = place_in_step(environ)
    assert place[:4] == (2, 4, "10.1.2.3", 20000 + (12345 + 2 * 131) % 10000)
    assert place_in_step({**environ, "MAIN_PROCESS_PORT": "29500"}).port == 29500
    assert place.token != place_in_step({**environ, "SLURM_STEP_ID": "4"}).token
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        place_in_step({"SLURM_JOB_ID": "1"})


def test_numbers_of_tasks_of_nodes() -> None:
    assert numbers_of_tasks("2(x3),1") == [2, 2, 2, 1]
    assert numbers_of_tasks("8") == [8] and numbers_of_tasks("") == []


def test_silent_tasks_are_named_with_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "hosts_of", lambda environ: ["node1", "node2"])
    environ = {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert silent_tasks([1, 2, 5], environ) == "task 1 (node1), task 2 (node2), task 5"


def replace_srun(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "srun").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_step_has_the_tasks_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_srun(tmp_path, monkeypatch, f'printf "%s\\n" "$@" > {tmp_path}/words; exit 3')
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert start_step(DoctorConfig(folder="/shared/me", bandwidth=False, wait=7.0)) == 1
    command = (tmp_path / "words").read_text().splitlines()
    assert "--cpus-per-task=64" in command
    assert not any(word.startswith(("--nodes", "--ntasks")) for word in command)
    words = command[command.index("doctor") + 1 :]
    assert words == ["--folder=/shared/me", "--tasks_per_node=1", "--bandwidth=False", "--wait=7.0"]
    # A task that ends at once must not end the first one, which waits for it and prints the table.
    (wait,) = (word for word in command[: command.index("doctor")] if word.startswith("--wait="))
    assert int(wait.removeprefix("--wait=")) > 10 * 7


def test_a_task_that_hangs_is_not_waited_for_after_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "LEAVE_SECONDS", 0.1)
    for code in (0, 1):
        replace_srun(tmp_path, monkeypatch, f'printf "a table\\n\\x1e{code}\\n"; exec sleep 100')
        assert start_step(DoctorConfig()) == code
        assert capsys.readouterr().out == "a table\n"
    monkeypatch.setattr(doctor, "TORCH_SECONDS", -5.0)
    replace_srun(tmp_path, monkeypatch, "exec sleep 100")
    with pytest.raises(ConfigError, match="srun did not end within"):
        start_step(DoctorConfig(wait=1.05))


def test_the_rank_that_failed_is_named_not_one_that_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    late = "RuntimeError: no answer within 120 s"
    errors = {0: late, 1: "RuntimeError: ModuleNotFoundError: No module named 'torch'", 2: late}
    place = Place(0, 3, "node1", 20001, "x")
    tasks: Any = SimpleNamespace(
        place=place, ask_each=lambda *_: {x: Answer(None, error) for x, error in errors.items()}
    )
    facts = [{"rank": x, "node": f"node{x}", "gpus": None, "environ": {}} for x in errors]
    (found,) = doctor.reduce_on_all(tasks, facts, True, False, 1.0)
    assert found.result == "gloo: task 1 (node1): ModuleNotFoundError: No module named 'torch'"
    assert found.level == "error" and "IFNAME" not in found.advice
    errors[1] = late
    (found,) = doctor.reduce_on_all(tasks, facts, True, False, 1.0)
    assert found.result == "gloo: task 0 (node0): no answer within 120 s"
    assert "IFNAME" in found.advice


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_the_table_and_its_exit_code(
    level: doctor.doctor_checks.Level, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(0, 2, "node1", 20001, "x")
    advice = "Change it." * (level != "ok")
    assert print_table([Finding("GPUs", "eight", level, advice)], place) == code
    out = capsys.readouterr().out
    assert "2 tasks; the first on node1" in out and "eight" in out and level in out
    assert ("what to change" in out) == (level != "ok")
    assert "\x1b" not in out and os.linesep in out
