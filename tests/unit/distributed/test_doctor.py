"""The parts of `bertdist slurm doctor` that read SLURM's variables; tests/slurm runs all of it."""

import os

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
from bertdist.distributed.task_exchange import Place

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


def test_the_step_has_the_tasks_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Done:
        returncode = 1

    monkeypatch.setattr(
        doctor.subprocess, "run", lambda command, **_: calls.append(command) or Done
    )
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert start_step(DoctorConfig(folder="/shared/me", bandwidth=False, wait=7.0)) == 1
    (command,) = calls
    assert command[0] == "srun" and "--cpus-per-task=64" in command
    assert not any(word.startswith(("--nodes", "--ntasks")) for word in command)
    words = command[command.index("doctor") + 1 :]
    assert words == ["--folder=/shared/me", "--tasks_per_node=1", "--bandwidth=False", "--wait=7.0"]


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
