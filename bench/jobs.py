"""Jobs and answers that the benchmark exchanges with its child processes, and how one is started.

Each run has its own process, so that its peak memory, thread pools and allocator are its own. Jobs
and answers are JSON, and only the standard library is imported here: Linux counts the memory of the
process that starts a child in the child's ru_maxrss (exec_mmap in the kernel): keep it small.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {  # bench/contenders.py runs them
    "a": "bertdist",
    "b": "Trainer, defaults",
    "c": "Trainer, group_by_length",
    "d": "Accelerate loop, padded to --max_length",
    "e": "Accelerate loop, padded to the model's longest",
}
PREDICTORS = {
    "bertdist": "bertdist.predict",
    "pipeline": "pipeline",
    "sorted": "pipeline, texts sorted by length",
    "onnx": "ONNX Runtime",
}  # bench/prediction.py runs them
FLOAT32 = {"float32": "bertdist.predict, float32"}  # what answers in bf16 are compared with

Child = Callable[[str, dict[str, Any]], dict[str, Any]]  # (kind of job, job) -> answer


class BenchError(Exception):
    """What a user can mend: one line, what was variables, what was expected, what to do."""


class Killed(BenchError):
    """A child was killed, probably because memory ran out; other contenders can continue."""


class TimeLimit(BenchError):
    """A child had not ended after the seconds that it had."""


class StepRows(NamedTuple):
    """The rows of one optimizer step, as the model received them."""

    rows: list[int]  # row numbers of the file of rows
    lengths: list[int]  # real tokens of each
    cells: int  # tokens that the model computed: real ones and padding


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run of one contender: one epoch over the first `rows` rows of a file."""

    contender: str
    model: str  # a model folder with its tokenizer
    rows_file: str  # JSON lines {"text", "label"}, label "0", "1", ...
    labels: int
    rows: int
    batch_size: int
    untimed_steps: int
    learning_rate: float
    seed: int
    max_length: int
    mixed_precision: str
    use_cpu: bool
    loss_rows: int  # the final loss is over the first so many rows, trained on or not
    dev_file: str | None
    output_dir: str
    flags: tuple[str, ...] = ()  # more flags of contender a

    @property
    def steps(self) -> int:
        """Optimizer steps; the last may be smaller."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training run."""

    stamps: list[float]  # seconds of a monotonic clock, one after every optimizer step
    seen: list[StepRows]  # one per step
    process_mib: float  # peak memory until the last step
    child_mib: float  # peak memory of its largest child, a loader worker; 0 without one
    device_mib: float | None  # peak of torch's allocator on the GPU; None on the CPU
    device: str  # "cpu", or the GPU's name
    loss: float  # cross-entropy a row of the trained model, without dropout
    accuracy: float | None  # on the rows of dev_file


@dataclass(frozen=True, kw_only=True)
class PredictJob:
    """Prediction by one contender for the first `rows` texts of a file."""

    contender: str
    model: str  # what training exported
    onnx: str | None  # the same model, exported
    rows_file: str
    rows: int
    batch_size: int
    max_length: int
    threads: int
    use_cpu: bool
    mixed_precision: Literal["no", "bf16"] = "no"


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """What a prediction run answer_file and took."""

    seconds: (
        float  # texts to answers, without loading the model and without a first call on 64 texts
    )
    answers: list[tuple[str, float]]  # (label, score) in the order of the texts
    process_mib: float
    device: str


def parse_train_result(answer: dict[str, Any]) -> TrainResult:
    """From a child's JSON."""
    return TrainResult(**{**answer, "seen": [StepRows(*step) for step in answer["seen"]]})


def run_child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run the job in a child process (`bench.child`), for at most job["time_limit"] seconds if it
    has that.

    Raises BenchError with the last line of a child that failed, Killed, or TimeLimit.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer_file = Path(folder, "job.json"), Path(folder, "answer.json")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "bench.child", kind, str(job_file), str(answer_file)]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(job.get("threads")),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as child:
            try:
                _, stderr = child.communicate(timeout=job.get("time_limit"))
            except subprocess.TimeoutExpired:
                raise TimeLimit(f"after its {job['time_limit']:.0f} seconds") from None
            finally:  # loader workers too, also where Ctrl+C ends this process
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        if child.returncode == -signal.SIGKILL:
            raise Killed("killed, probably because memory ran out")
        if child.returncode or not answer_file.exists():
            said = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
            raise BenchError(
                f"{kind} {job.get('contender', '')} ended with code {child.returncode}: {said[-1]}"
            )
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
        return answer


def child_environment(threads: int | None) -> dict[str, str]:
    """Environment of every child: no network, the same number of threads, one GPU.

    With more GPUs, Trainer would use them all.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if threads:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return variables
