"""SLURM's answers, as version 22.05 prints them."""

import time
from pathlib import Path

import pytest

from bertdist.core import slurm
from bertdist.core.slurm import (
    JobView,
    NoSlurm,
    SlurmError,
    call_slurm,
    error_text,
    is_time_limit,
    job_view,
    jobs_of_script,
    own_jobs,
    plain_time,
    read_record,
    view_of,
)

RUNNING = (
    "JobId=7 JobName=a name=b UserId=me(1000) JobState=RUNNING Reason=None Dependency=(null) "
    "Requeue=1 Restarts=2 BatchFlag=1 RunTime=00:00:10 TimeLimit=01:00:00 "
    "EndTime=2026-01-02T03:04:05 NodeList=node[1-2] Command=/home/me/my job/job.slurm --config x "
    "WorkDir=/home/me Power= JobState=FAKE"
)
PENDING = "JobId=8 JobState=PENDING Reason=Resources Restarts=0 EndTime=Unknown WorkDir=/home/me"


def test_a_record_of_scontrol() -> None:
    record = read_record(RUNNING)
    assert record["JobState"] == "RUNNING" and record["Command"].endswith("job.slurm --config x")
    assert (record["Power"], record["WorkDir"], record["Restarts"]) == ("", "/home/me", "2")


def test_a_running_job_has_time_left() -> None:
    end = time.mktime(time.strptime("2026-01-02T03:04:05", "%Y-%m-%dT%H:%M:%S"))
    view = view_of([read_record(RUNNING)], now=end - 90)
    assert view == JobView("RUNNING", True, 90.0, 2)
    assert view_of([read_record(RUNNING)], now=end + 5) == JobView("RUNNING", True, 0.0, 2)


def test_a_waiting_job_says_why_and_a_failed_one_does_not() -> None:
    assert view_of([read_record(PENDING)]) == JobView("PENDING (Resources)", True, None, 0)
    failed = PENDING.replace("PENDING Reason=Resources", "FAILED Reason=NonZeroExitCode")
    assert view_of([read_record(failed)]) == JobView("FAILED", False, None, 0)
    held = PENDING.replace("Resources", "JobHeldUser")
    assert view_of([read_record(held)]) == JobView("PENDING (JobHeldUser)", True, None, 0)
    cancelled = held.replace("PENDING", "CANCELLED")  # while it was held
    assert view_of([read_record(cancelled)]) == JobView("CANCELLED", False, None, 0)


def test_tasks_of_an_array_are_counted() -> None:
    done = PENDING.replace("PENDING Reason=Resources", "COMPLETED Reason=None")
    view = view_of(list(map(read_record, [done, done, PENDING])))
    assert view == JobView("2 COMPLETED, 1 PENDING (Resources)", True, None, 0)
    assert view_of([]) is None
    waiting = PENDING.replace("JobId=8", "JobId=8 ArrayJobId=8 ArrayTaskId=2-7,9%2")
    view = view_of(list(map(read_record, [RUNNING, waiting])))
    assert view and view.state == "1 RUNNING, 7 PENDING (Resources)"


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"])
def test_a_job_that_has_ended_is_not_active(state: str) -> None:
    assert state not in slurm.ACTIVE


def answers(monkeypatch: pytest.MonkeyPatch, **given: str | SlurmError) -> None:
    def call(*command: str, seconds: float = 0) -> tuple[str, str]:
        found = given[command[0]]
        if isinstance(found, SlurmError):
            raise found
        return found, ""

    monkeypatch.setattr(slurm, "call_slurm", call)


UNKNOWN = SlurmError("scontrol: slurm_load_jobs error: Invalid job id specified")
NO_ACCOUNTS = SlurmError("sacct: Slurm accounting storage is disabled")


def test_a_forgotten_job_is_looked_for_in_the_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, scontrol=UNKNOWN, sacct="CANCELLED by 1000\n")
    assert job_view("7") == JobView("CANCELLED", False)
    answers(monkeypatch, scontrol=UNKNOWN, sacct=NO_ACCOUNTS)
    assert job_view("7") is None
    answers(monkeypatch, scontrol=UNKNOWN, sacct=NoSlurm("no sacct"))
    assert job_view("7") is None


@pytest.mark.parametrize("error", [SlurmError("scontrol: Unable to contact"), NoSlurm("none")])
def test_a_controller_that_is_away_is_not_a_forgotten_job(
    error: SlurmError, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, scontrol=error)
    with pytest.raises(type(error), match=str(error)):
        job_view("7")


def test_the_same_id_may_be_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch, scontrol=f"{PENDING} Command=/home/me/it's out/slurm/job.slurm WorkDir=/\n"
    )
    assert job_view("8", Path("/home/me/it's out/slurm/job.slurm")) == job_view("8") is not None
    assert job_view("8", Path("/home/me/out/slurm/job.slurm")) is None
    script = "/home/me/it LR=1e-5/slurm/job.slurm"
    answers(monkeypatch, scontrol=f"{PENDING} Command={script} WorkDir=/home/me/it LR=1e-5\n")
    assert job_view("8", Path(script)) is not None


def test_jobs_of_a_user_have_an_array_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "12\x1f/home/me\x1f/home/me/a|b/slurm/job.slurm\n"
    answers(monkeypatch, squeue=line + line + "13\x1f/tmp\x1f(null)\n\n")
    expected = [("12", "/home/me", "/home/me/a|b/slurm/job.slurm"), ("13", "/tmp", "(null)")]
    assert own_jobs() == expected
    assert jobs_of_script(Path("/home/me/x/../a|b/slurm/job.slurm")) == ["12"]
    assert jobs_of_script(Path("/home/me/b/slurm/job.slurm")) == []


def test_variables_do_not_change_what_a_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_WAIT", "SBATCH_ARRAY_INX", "SQUEUE_STATES", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    names = [line.split("=")[0] for line in slurm.call_slurm("env")[0].splitlines()]
    assert [x for x in names if x.startswith(("SBATCH_", "SQUEUE_", "SLURM_"))] == ["SLURM_CONF"]
    # a submission inside a job
    for name in ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.setenv(name, "2")
    names = [line.split("=")[0] for line in slurm.call_slurm("env")[0].splitlines()]
    assert [x for x in names if x.startswith("SLURM_")] == ["SLURM_CONF"]


def test_errors_are_one_line() -> None:
    text = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no\n\n"
    assert error_text(text) == "invalid partition specified: x; Batch job submission failed: no"


def test_commands_that_are_missing_fail_or_hang() -> None:
    with pytest.raises(NoSlurm, match="there is no command no_such_sbatch"):
        call_slurm("no_such_sbatch")
    with pytest.raises(SlurmError, match=r"^sh: a problem$"):
        call_slurm("sh", "-c", "echo 'sh: error: a problem' >&2; exit 3")
    with pytest.raises(SlurmError, match=r"^sh: exit 3$"):
        call_slurm("sh", "-c", "exit 3")
    with pytest.raises(SlurmError, match=r"sleep did not answer within 0\.05 s"):
        call_slurm("sleep", "5", seconds=0.05)


@pytest.mark.parametrize(
    "text", ["30", "30:00", "4:00:00", "2-0", "2-12:30", "1-00:00:00", "UNLIMITED", "infinite"]
)
def test_time_limits(text: str) -> None:
    assert is_time_limit(text)


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-1", "2-", "1.5", "04:00:00 "])
def test_no_time_limits(text: str) -> None:
    assert not is_time_limit(text)


def test_times_as_squeue_has_them() -> None:
    shown = [plain_time(x) for x in (0, 59.9, 3599, 4 * 3600, 86400 * 2 + 61)]
    assert shown == ["0:00:00", "0:00:59", "0:59:59", "4:00:00", "2-00:01:01"]
