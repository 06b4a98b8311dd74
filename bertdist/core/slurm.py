"""Commands of SLURM: their answers as values, and their errors as one line.

    call_slurm("sbatch", "--parsable", "job.slurm")
    job_view("1234")        # state, time left, restarts; None for a job that SLURM has forgotten

A job is asked for with scontrol, which knows it until MinJobAge (5 minutes by default) after its
end, then with sacct, where the cluster keeps accounts. Every call has a time limit.
"""

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bertdist.core.errors import BertdistError

CALL_SECONDS = 60.0
# States of a job that waits, runs or is being ended; all others are those of a job that has ended.
ACTIVE = frozenset(
    "PENDING RUNNING CONFIGURING COMPLETING SUSPENDED STOPPED RESIZING SIGNALING STAGE_OUT "
    "REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD".split()
)
UNKNOWN_JOB = "Invalid job id specified"
_SECONDS_PER_DAY = 86400
# Variables that would change what the commands do or answer: sbatch would wait for the job's end,
# or make an array of it; squeue would leave jobs out; times would have another form.
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_UNWANTED = ("SBATCH_WAIT", "SBATCH_ARRAY_INX", "SLURM_TIME_FORMAT")
_PLAIN_STATES = ("RUNNING", "COMPLETED", "CANCELLED")  # whose reason is an earlier one
_PLAIN_REASONS = ("", "None", "NonZeroExitCode")  # the state says it


class SlurmError(BertdistError):
    """A command of SLURM is missing, fails or does not answer."""


class NoSlurm(SlurmError):
    """The command is not installed here."""


class JobView(NamedTuple):
    """A job, or all tasks of an array together."""

    state: str  # "RUNNING"; "PENDING (Resources)"; "2 RUNNING, 1 PENDING (Priority)"
    is_active: bool
    seconds_left: float | None = None  # until its time limit; None where it does not run
    restarts: int | None = None


def call_slurm(*command: str, seconds: float = CALL_SECONDS) -> tuple[str, str]:
    """What a command prints on standard output, and on standard error. Raises SlurmError."""
    # Of the job in which this may run: a new job without GPUs would keep its SLURM_GPUS_ON_NODE.
    foreign = ("SQUEUE_", *(("SLURM_",) if "SLURM_JOB_ID" in os.environ else ()))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _OF_CLUSTER or not (name in _UNWANTED or name.startswith(foreign))
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise NoSlurm(
            f"SLURM is not installed here: there is no command {command[0]}. Use a login node, or "
            "load its module (module load slurm)."
        ) from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error.strerror or error}.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {seconds:g} s.") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {error_text(done.stderr) or f'exit {done.returncode}'}")
    return done.stdout, done.stderr


def error_text(stderr: str) -> str:
    """`sbatch: error: Batch job submission failed: ...` -> the sentences, in one line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", x).strip() for x in stderr.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))


def job_view(job: str, script: Path | None = None) -> JobView | None:
    """Of a job or an array, by its id; None where SLURM does not know it (any more).

    script: of the job, if known: on another cluster the same id is another job. Raises SlurmError.
    """
    try:
        records = [read_record(x) for x in _lines("scontrol", "show", "job", "--oneliner", job)]
    except NoSlurm:
        raise
    except SlurmError as error:
        if UNKNOWN_JOB not in str(error):
            raise
        return _accounted(job)
    known = [x for x in records if x.get("JobState")]
    if script is not None:
        path = os.path.realpath(script)
        known = [x for x in known if os.path.realpath(x.get("Command", path)) == path]
    return view_of(known)


def view_of(records: list[dict[str, str]], now: float | None = None) -> JobView | None:
    """Records of `scontrol show job` -> their states, and the time left of the first to end."""
    if not records:
        return None
    now, states, left = time.time() if now is None else now, Counter[str](), list[float]()
    for record in records:
        state, reason = record["JobState"], record.get("Reason", "None")
        if state == "RUNNING" and (end := _epoch(record.get("EndTime", ""))) is not None:
            left.append(max(0.0, end - now))
        is_said = state not in _PLAIN_STATES and reason not in _PLAIN_REASONS
        tasks = _number_of_tasks(record.get("ArrayTaskId", ""))
        states[f"{state} ({reason})" if is_said else state] += tasks
    restarts = [int(x["Restarts"]) for x in records if x.get("Restarts", "").isdecimal()]
    is_active = any(record["JobState"] in ACTIVE for record in records)
    seconds_left = min(left, default=None)
    return JobView(_counted(states), is_active, seconds_left, sum(restarts) if restarts else None)


def _number_of_tasks(text: str) -> int:
    """Of an array that wait in one record: `3` -> 1, `0-7,9` -> 9, `0-31:2%8` -> 16."""
    number = 0
    for part in text.split("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            number += len(range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)))
    return max(1, number)


def _counted(states: Mapping[str, int]) -> str:
    if sum(states.values()) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _accounted(job: str) -> JobView | None:
    """From sacct, where there are accounts."""
    try:
        flags = ("--noheader", "--parsable2", "--allocations", "--format=State")
        lines = _lines("sacct", "--jobs", job, *flags)
    except SlurmError:  # none; or an old cluster that says something else
        return None
    # "CANCELLED by 1000"
    states = Counter(line.split(" by ")[0].strip() for line in lines)
    return JobView(_counted(states), any(x in ACTIVE for x in states)) if states else None


def _lines(*command: str) -> list[str]:
    return [line for line in call_slurm(*command)[0].splitlines() if line.strip()]


def read_record(line: str) -> dict[str, str]:
    """A line of `scontrol show job --oneliner`: `JobId=7 JobName=a b Reason=None ...`."""
    found = re.findall(r"(?:^|\s)([A-Z][\w/:.]*)=(.*?)(?=\s[A-Z][\w/:.]*=|\s*$)", line)
    record = dict(reversed(found))  # the first of each name: a later one is part of a command
    if command := re.search(r"\sCommand=(.*) WorkDir=", line):  # in which ` LR=` names a folder
        record["Command"] = command[1]
    return record


def own_jobs() -> list[tuple[str, str, str]]:
    """(id, working folder, command) of this user's jobs that wait or run, each array once.

    Raises SlurmError.
    """
    # Not by name: $USER may be another one (su, a container).
    lines = _lines("squeue", "--noheader", "--me", "--format=%F\x1f%Z\x1f%o")
    rows = (line.strip().split("\x1f", 2) for line in lines)
    found = dict.fromkeys((x[0], x[1], x[2]) for x in rows if len(x) == 3)
    return list(found)


def jobs_of_script(script: Path) -> list[str]:
    """Ids of this user's jobs that wait or run and are of a script, submitted by hand or not.

    Raises SlurmError.
    """
    path = os.path.realpath(script)
    found = ((job, os.path.join(place, command)) for job, place, command in own_jobs())
    return [job for job, of in found if os.path.realpath(of) == path]


def _epoch(text: str) -> float | None:
    """`2026-11-27T11:00:00`, in this machine's time zone."""
    with suppress(ValueError, OverflowError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return None


def is_time_limit(text: str) -> bool:
    """Whether sbatch takes it for --time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    return bool(
        re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text)
        or text.upper() in ("UNLIMITED", "INFINITE")
    )


def plain_time(seconds: float) -> str:
    """`3:59:10`, `2-01:00:00`, as squeue has it."""
    days, rest = divmod(int(seconds), _SECONDS_PER_DAY)
    hours, minutes = divmod(rest // 60, 60)
    clock = f"{hours:02d}:{minutes:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock.removeprefix("0")
