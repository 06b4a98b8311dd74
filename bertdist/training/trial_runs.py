"""The trials of a sweep as processes: each is `bertdist train` in a folder of its own.

    start = TrialLauncher(folder, base_file, processes=1, gpus=["0", "1"])
    process = start(7, {"learning_rate": 3e-5}, slot=1)     # sweep/trials/0007, on the second GPU
    process.poll(); process.stop()

What is known of a trial is read from its run folder: the evaluations in metrics.jsonl, status.json.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from bertdist.core.atomic_io import explain_write_errors, read_json_object, remove_folder
from bertdist.core.config import RunConfig
from bertdist.core.cores import usable_cores
from bertdist.core.output_files import LOCK, STATUS
from bertdist.core.search_space import Value, as_flags

TRIALS = "trials"
# In the environment of a trial: it saves and ends when its parent, with this process id, has ended
# (distributed/preemption.py, which imports torch).
TRIAL_VARIABLE = "BERTDIST_TRIAL"
IN_USE = "is in use by another run"  # in the message of training/run_lock.py
MOST_LOG_BYTES = 1 << 16  # of the end of a log, in which an error is looked for


class TrialProcess(Protocol):
    """A trial that has been started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Let it save a checkpoint and end, soon."""


class Evaluation(NamedTuple):
    """A line of metrics.jsonl."""

    step: int
    epoch: float
    scores: dict[str, Any]  # loss first; None for one that is undefined

    def is_last(self, run: RunConfig) -> bool:
        """Whether all steps were done; a run that stopped early does not count."""
        if run.max_train_steps is not None:
            return self.step >= run.max_train_steps
        return self.epoch >= run.num_train_epochs * (1 - 1e-9)


def trial_folder(folder: Path, number: int) -> Path:
    """The run folder of a trial."""
    return folder / TRIALS / f"{number:04d}"


def log_file(folder: Path, number: int) -> Path:
    """What a trial prints."""
    return folder / TRIALS / f"{number:04d}.log"


def read_evaluations(run: Path) -> list[Evaluation]:
    """The evaluations of a run so far; a line that is being written is not read."""
    found = []
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                entry = json.loads(line)
                if entry.pop("kind") == "eval":
                    found.append(Evaluation(int(entry.pop("step")), entry.pop("epoch"), entry))
    return found


def is_finished(run: Path) -> bool:
    """Whether training is done."""
    return bool(read_json_object(run / STATUS).get("state") == "finished")


def last_saved_step(run: Path) -> int:
    """The step of the newest checkpoint, -1 without one."""
    names = [path.name.removeprefix("step_") for path in run.glob("checkpoints/step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def rows_of(run: Path) -> dict[str, str]:
    """Number and fingerprint of its rows, as the newest checkpoint has them; {} without one."""
    # As train_state.step is written, in six digits or more (checkpoint.py).
    newest = run / "checkpoints" / f"step_{last_saved_step(run):06d}" / "state.json"
    state = read_json_object(newest) if newest.is_file() else {}
    found = {**state.get("must_match", {}), **state.get("may_change", {})}
    names = ("training_rows", "validation_rows")
    return {name: str(found[name]) for name in names if found.get(name)}


def is_in_use(run: Path) -> bool:
    """Whether a process still trains in the folder: one that an earlier sweep has left."""
    if not (run / LOCK).exists():
        return False
    try:
        with FileLock(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a disk without locks
        return False


def error_of(run: Path, log: Path, code: int) -> str:
    """Why a trial failed, in one line."""
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            return f"ended by {name}" + " (out of memory?)" * (name == "SIGKILL")
    lines: list[str] = []
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - MOST_LOG_BYTES))
        lines = [
            line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()
        ]
    own = [line.removeprefix("bertdist: ") for line in lines if line.startswith("bertdist: ")]
    status = read_json_object(run / STATUS)
    is_failed = status.get("state") == "failed" and not any(IN_USE in line for line in own[-1:])
    reason = [str(status["reason"]).splitlines()[0]] if is_failed and status.get("reason") else []
    return [f"exit code {code}", *lines[-1:], *own[-1:], *reason][-1]


def remove_weights(run: Path) -> None:
    """Remove checkpoints/ and best/ of a run, but for what it has not written; results stay."""
    for folder in (*sorted((run / "checkpoints").glob("step_*")), run / "best"):
        if folder.is_dir() and not folder.is_symlink():
            remove_folder(folder)


class TrialLauncher:
    """Starts trials."""

    def __init__(
        self,
        folder: Path,
        base_file: Path,
        processes: int = 1,
        gpus: Sequence[str] = (),
        jobs: int = 1,
    ) -> None:
        """base_file: YAML with the settings that all trials share; processes: of each trial; gpus:
        names for CUDA_VISIBLE_DEVICES, none: of the environment; jobs: trials at a time.
        """
        self._folder, self._base_file, self._processes = folder, base_file, processes
        self._gpus, self._jobs = list(gpus), jobs

    def __call__(
        self, number: int, values: Mapping[str, Value], slot: int, more: Sequence[str] = ()
    ) -> TrialProcess:
        """Start a trial, or let it resume. slot: 0 to jobs - 1, which chooses its GPUs; more: flags
        besides.
        """
        log = log_file(self._folder, number)
        with explain_write_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as output:
                command = [*self.command(number, values), *more]
                return _Process(command, self._environment(slot), output)

    def command(self, number: int, values: Mapping[str, Value]) -> list[str]:
        """What trains a trial."""
        words = [sys.executable, "-m", "bertdist", "train", "--config", str(self._base_file)]
        words += as_flags(values)
        words += ["--processes", str(self._processes)] * (self._processes > 1)
        return [*words, "--output_dir", str(trial_folder(self._folder, number))]

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {**os.environ, TRIAL_VARIABLE: str(os.getpid())}
        # Found by `python -m` also where this program was run by path.
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if self._gpus:
            first = slot * self._processes
            own = self._gpus[first : first + self._processes]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        elif self._jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            threads = usable_cores() // (self._jobs * self._processes)
            environment["OMP_NUM_THREADS"] = str(max(1, threads))
        return environment


class _Process:
    """A `TrialProcess`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Any) -> None:
        # A session of its own: Ctrl-C reaches the sweep alone, which stops its trials.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
