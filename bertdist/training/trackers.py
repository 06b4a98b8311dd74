"""Trackers of --report_to (TensorBoard, MLflow, W&B, Trackio, ...), by the classes of accelerate.

    trackers = Trackers(config.run, settings, lines, kept, step)
    trackers.open()                            # and send what they lack of the lines before `step`
    trackers.log("train", 450, {"loss": 0.3})
    trackers.log_final(450, {"best/accuracy": 0.9})
    trackers.close()

metrics.jsonl is the record of a run, and a tracker has a copy of it:

1. An output folder is one run of each tracker; its id is in tracker.json. Only rank 0 has trackers.
2. A resumed run repeats steps. TensorBoard drops the points after the step that it resumes from;
   others keep what they have, and get no step twice. MLflow, W&B and Trackio are asked which steps
   they have, and get those that they lack; so does a tracker that joins a run later. For the others
   tracker.json has the last step of each start.
3. Each tracker is called in a thread of its own, so that a server that is slow or gone delays no
   step. A tracker that does not start is an error; what fails later is a warning.
"""

import itertools
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from bertdist.core.atomic_io import atomic_write, read_json_object, to_json
from bertdist.core.config import RunConfig, TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import TRACKER
from bertdist.core.urls import without_secrets
from bertdist.distributed.launch import installed_trackers, package_version

START_SECONDS = 60.0  # for a tracker to start
END_SECONDS = 60.0  # for all of them to send the last lines
DEFAULT_PROJECT = "bertdist"
BLOCK = 32768  # of a LevelDB log
KINDS = ("train", "eval")  # of the lines of metrics.jsonl that trackers get
# Where a run is one of several: the folder above it -> what it is
GROUPS = {"folds": "fold", "seeds": "seed", "trials": "trial"}
# Variables that apply where a flag is not given
PROJECT_VARIABLES = {
    "clearml": "CLEARML_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "wandb": "WANDB_PROJECT",
}
NAME_VARIABLES = {"clearml": "CLEARML_TASK", "mlflow": "MLFLOW_RUN_NAME", "wandb": "WANDB_NAME"}
ID_LENGTHS = {"comet_ml": 32, "swanlab": 21}  # that they ask for
HINTS = {
    "mlflow": "MLFLOW_TRACKING_URI names the server; 'mlflow>=3' is what works here",
    "wandb": "run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline needs no network",
}

Has = Callable[[str, int], bool]  # whether a tracker has a line, by its kind and step


class TrackedRun(NamedTuple):
    """What a tracker shows an output folder as."""

    folder: Path
    project: str
    name: str
    group: str | None
    id: str
    is_new: bool
    step: int  # that this process resumes from


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(
        self,
        run: RunConfig,
        settings: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]] = (),
        kept: Sequence[Mapping[str, Any]] = (),
        step: int = 0,
    ) -> None:
        """settings: see `flat_settings`. lines: of metrics.jsonl; kept: those of them that the run,
        which resumes from `step`, does not repeat.
        """
        self.run, self.settings, self.step = run, settings, step
        self.kept = [line for line in kept if line.get("kind") in KINDS]
        points = [(line["kind"], line["step"]) for line in lines if line.get("kind") in KINDS]
        # The last step of each kind; a later line replaces an earlier one.
        self.written = dict(sorted(points))
        self.file = Path(run.output_dir) / TRACKER
        self.saved = read_json_object(self.file)
        self.names = installed_trackers(run.report_to or [])
        self._open: list[_Tracker] = []
        self._final: dict[str, float] = {}

    def open(self, names: Sequence[str] | None = None) -> list[str]:
        """Start trackers, by default all, and send the lines that they lack; returns sentences
        about them.

        Raises ConfigError, with no tracker open, and CheckpointError.
        """
        try:
            for name in self.names if names is None else names:
                self._open.append(self._start(name))
        except ConfigError:
            self.close(failed=True)
            raise
        for tracker in self._open:
            for line in self.kept:
                tracker.log(line["kind"], line["step"], line)
        self.saved |= {tracker.name: tracker.entry() for tracker in self._open}
        atomic_write(self.file, to_json(self.saved, indent=1))
        return [f"Tracker {x.name}: {x.describe(self.run)}." for x in self._open]

    def _start(self, name: str) -> "_Tracker":
        saved = self._saved(name)
        run, before = tracked_run(name, self.run, saved, self.step), saved.get("sent", {})
        last = {kind: max(before.get(kind, -1), self.written.get(kind, -1)) for kind in KINDS}
        tracker = _Tracker(name, run, {} if run.is_new else last)
        tracker.start(self.settings)
        return tracker

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> list[str]:
        """Send a line of metrics.jsonl; returns warnings about earlier ones."""
        for tracker in self._open:
            tracker.log(kind, step, values)
        return [warning for tracker in self._open for warning in tracker.warnings()]

    def log_final(self, step: int, scores: Mapping[str, Any]) -> list[str]:
        """Send the scores of a finished run, unless its trackers have them; returns sentences."""
        self._final = final = numbers(scores)
        said: list[str] = []
        if not self._open:  # this process has not trained
            lacking = [name for name in self.names if self._saved(name).get("final") != final]
            try:
                said = self.open(lacking)
            except ConfigError as error:
                return [f"Warning: {error} The scores were not sent."]
        for tracker in self._open:
            tracker.send(final, step)
        return said

    def close(self, failed: bool = False) -> list[str]:
        """End all trackers, within END_SECONDS; returns warnings.

        failed: MLflow and W&B show the run as failed.
        """
        deadline = time.monotonic() + END_SECONDS
        for tracker in self._open:
            tracker.finish(failed)
        warnings = [x for tracker in self._open for x in tracker.wait(deadline)]
        complete = [tracker.name for tracker in self._open if not tracker.lost]
        if self._final and complete:
            for name in complete:
                self.saved[name]["final"] = self._final
            atomic_write(self.file, to_json(self.saved, indent=1))
        self._open = []
        return warnings

    def _saved(self, name: str) -> dict[str, Any]:
        saved = self.saved.get(name)
        return saved if isinstance(saved, dict) else {}


class _Tracker:
    """A tracker in a thread of its own, which makes all calls: MLflow's active run and Trackio's
    are those of a thread.
    """

    def __init__(self, name: str, run: TrackedRun, last: Mapping[str, int]) -> None:
        """last: kind -> the last step that the tracker has, as far as metrics.jsonl shows."""
        self.name, self.run, self.lost = name, run, 0
        self._last = last
        self._has: Has | None = None  # its own answer
        self._problem, self._told = "", False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._tracker: GeneralTracker

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # also SystemExit: only this tracker has failed
                self.lost += 1
                self._problem = self._problem or first_line(error)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError, if need be after START_SECONDS."""
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def begin() -> None:
            try:
                with batch_job():
                    self._begin(settings)
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        self._thread.start()
        self._calls.put(begin)
        try:
            error = ended.get(timeout=START_SECONDS)
            problem = "" if error is None else first_line(error)
        except queue.Empty:
            problem = f"no answer within {START_SECONDS:g} s"
        if problem:
            self._calls.put(None)
            hint = f" ({HINTS[self.name]})" if self.name in HINTS else ""
            raise ConfigError(
                f"--report_to {self.name}: it does not start: {problem.rstrip('.')}{hint}."
            )

    def _begin(self, settings: Mapping[str, Any]) -> None:
        run, kind = self.run, LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "trackio" and run.is_new:
            run = run._replace(name=unused_name(run.project, run.name))
        if self.name == "tensorboard":
            purge = None if run.is_new else run.step + 1
            self._tracker = kind("tensorboard", str(run.folder), purge_step=purge)
        else:
            self._tracker = kind(run.project, **arguments(self.name, run))
        tracker = self._tracker
        if self.name == "mlflow":
            tracker.experiment_name = run.project  # else MLFLOW_EXPERIMENT_NAME has priority
        tracker.start()
        self.run = run = run._replace(id=own_id(self.name, tracker) or run.id)
        if self.name in ("aim", "comet_ml"):
            set_name = getattr(tracker.writer, "set_name", None)
            set_name(run.name) if set_name else setattr(tracker.writer, "name", run.name)
        # MLflow's cannot be changed, TensorBoard has them, Trackio keeps those of the last start.
        if run.is_new or self.name not in ("mlflow", "tensorboard"):
            store_settings(self.name, tracker, dict(settings))
        if not run.is_new:
            self._has = asked(self.name, tracker)

    def entry(self) -> dict[str, Any]:
        """What tracker.json keeps."""
        run = self.run
        sent = {} if run.is_new else {k: step for k, step in self._last.items() if step >= 0}
        return {"project": run.project, "name": run.name, "id": run.id, "sent": sent}

    def describe(self, given: RunConfig) -> str:
        """Where its run is, for the screen."""
        run = self.run
        if self.name == "tensorboard":
            return f"`tensorboard --logdir {run.folder}`"
        text = f"run {run.name} of project {run.project}"
        if given.project not in (None, run.project):
            text += f", where it began; --project {given.project} is for new runs"
        return text

    def has(self, kind: str, step: int) -> bool:
        """Whether it has the line of this step from an earlier process."""
        if self._has is not None:
            return self._has(kind, step)
        last = self._last.get(kind, -1)
        if self.name == "tensorboard":
            last = min(last, self.run.step)
        return step <= last

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl, if it is of a kind for trackers and not there yet."""
        if kind in KINDS and not self.has(kind, step):
            named = {name: value for name, value in values.items() if name not in ("kind", "step")}
            self.send({f"{kind}/{name}": value for name, value in numbers(named).items()}, step)

    def send(self, values: Mapping[str, float], step: int) -> None:
        """Without waiting for it."""
        self._calls.put(lambda: self._tracker.log(dict(values), step=step))

    def finish(self, failed: bool) -> None:
        """Without waiting for it."""
        self._calls.put(lambda: end_run(self.name, self._tracker, failed))
        self._calls.put(None)

    def wait(self, deadline: float) -> list[str]:
        """Wait for the end; returns warnings."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.lost += 1
            self._problem = self._problem or f"no answer within {END_SECONDS:g} s"
        return self.warnings()

    def warnings(self) -> list[str]:
        """The first problem, once."""
        if not self._problem or self._told:
            return []
        self._told = True
        return [
            f"Warning: {self.name} did not take a line: {self._problem.rstrip('.')}. Training "
            "is not affected; metrics.jsonl has all lines."
        ]


# ---- What is sent


def flat_settings(config: TrainConfig, **others: Any) -> dict[str, bool | int | float | str]:
    """All settings that are not None, by name, with lists as text: what every tracker can show.

    Passwords and queries of URLs are left out. others: facts to add.
    """
    given = {k: v for section in asdict(config).values() for k, v in section.items()}
    versions = {name: package_version(name) for name in ("bertdist", "torch", "transformers")}
    settings: dict[str, bool | int | float | str] = {}
    for name, value in {**given, **others, **versions}.items():
        if isinstance(value, bool | int | float):
            settings[name] = value
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            settings[name] = ", ".join(without_secrets(str(each)) for each in values)
    return settings


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that a curve can show."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def tracked_run(name: str, run: RunConfig, saved: Mapping[str, Any], step: int) -> TrackedRun:
    """The run of a tracker: of tracker.json, else a new one as the flags, the tracker's variables
    or the folder name it.

    Runs of --folds, of --seeds and of a sweep are one group.
    """
    folder = Path(run.output_dir)
    own, above = folder.resolve().name, folder.resolve().parent
    kind, parent = GROUPS.get(above.name), above.parent.name
    project = run.project or os.environ.get(PROJECT_VARIABLES.get(name, ""), DEFAULT_PROJECT)
    whole = run.run_name or os.environ.get(NAME_VARIABLES.get(name, ""), parent if kind else own)
    given = os.environ.get("WANDB_RUN_ID") if name == "wandb" else None
    new = TrackedRun(
        folder=folder,
        project=project,
        name=f"{whole}-{kind}-{own}" if kind else whole,
        group=whole if kind else None,
        id=given or secrets.token_hex(16)[: ID_LENGTHS.get(name, 12)],
        is_new=True,
        step=step,
    )
    if not all(isinstance(saved.get(key), str) for key in ("project", "name", "id")):
        return new
    old = {key: saved[key] for key in ("project", "name", "id")}
    return new._replace(**old, is_new=False)


# ---- The differences between trackers


@contextmanager
def batch_job() -> Iterator[None]:
    """A tracker that would ask for a key finds no terminal; those that record the command find no
    secrets of URLs in it.
    """
    stdin, argv = sys.stdin, sys.argv
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin, sys.argv = nothing, list(map(without_secrets, argv))
        try:
            yield
        finally:
            sys.stdin, sys.argv = stdin, argv


def arguments(name: str, run: TrackedRun) -> dict[str, Any]:
    """Of accelerate's class, besides the project: the name, the group, and what makes it resume."""
    own = None if run.is_new else run.id
    if name == "wandb":
        place = {} if os.environ.get("WANDB_DIR") else {"dir": str(run.folder)}
        return {"id": run.id, "resume": "allow", "name": run.name, "group": run.group, **place}
    if name == "mlflow":
        tags = {"group": run.group} if run.group else None
        return {"run_id": own, "run_name": run.name, "tags": tags}
    if name == "trackio":
        resume = "never" if run.is_new else "allow"
        return {"name": run.name, "group": run.group, "resume": resume, "embed": False}
    if name == "comet_ml":
        return {"experiment_key": run.id, "mode": "get_or_create"}
    if name == "swanlab":
        return {
            "experiment_name": run.name,
            "id": run.id,
            "resume": "allow",
            "logdir": str(run.folder / "swanlog"),
        }
    if name == "clearml":
        return {
            "task_name": run.name,
            "project_name": run.project,
            "reuse_last_task_id": False,
            "continue_last_task": own or False,
        }
    if name == "dvclive":
        return {"dir": str(run.folder / "dvclive"), "resume": not run.is_new}
    return {"run_hash": own, "experiment": run.project} if name == "aim" else {}


def unused_name(project: str, name: str) -> str:
    """`out`, or `out-2` where the project has it: Trackio resumes the last run of a name."""
    import trackio

    try:
        taken = {run.name for run in trackio.Api().runs(project)}
    except ValueError:  # no such project yet
        return name
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def own_id(name: str, tracker: GeneralTracker) -> str | None:
    """The id that a tracker gave to the run, of those that choose it."""
    if name == "mlflow":
        return str(tracker.active_run.info.run_id)
    if name == "clearml":
        return str(tracker.task.id)
    return str(tracker.writer.hash) if name == "aim" else None


def store_settings(name: str, tracker: GeneralTracker, settings: dict[str, Any]) -> None:
    """The settings of a new run."""
    if name != "tensorboard" or not type(tracker.writer).__module__.startswith("torch."):
        tracker.store_init_configuration(settings)  # also of tensorboardX
        return
    # accelerate's would be another run in the list of runs, in a folder named by the time.
    from torch.utils.tensorboard.summary import hparams

    _, session, _ = hparams(settings, {})  # of which TensorBoard finds out what there is to compare
    tracker.writer.file_writer.add_summary(session)
    tracker.writer.flush()


def asked(name: str, tracker: GeneralTracker) -> Has | None:
    """What a resumed run of a tracker has, of those that can be asked; None of the others."""
    points: set[tuple[str, int]]  # kind, step
    if name == "wandb" and not tracker.run.offline:
        return lambda kind, step: bool(step < tracker.run.starting_step)
    if name == "wandb":
        folder = Path(tracker.run.dir).parents[1]
        files = folder.glob(f"offline-run-*-{tracker.run.id}/*.wandb")
        points = {(kind, step) for file in files for kind in KINDS for step in steps_in(file, kind)}
    elif name == "mlflow":
        import mlflow

        client, run = mlflow.MlflowClient(), tracker.active_run.info.run_id
        points = {
            (kind, point.step)
            for kind in KINDS
            for point in client.get_metric_history(run, f"{kind}/loss")
        }
    elif name == "trackio" and getattr(tracker.run, "_is_local", False):
        from trackio.sqlite_storage import SQLiteStorage

        of, key = tracker.run, "{}/loss"
        points = {
            (kind, int(point["step"]))
            for kind in KINDS
            for point in SQLiteStorage.get_metric_values(
                of.project, of.name, key.format(kind), run_id=of.id
            )
        }
    else:
        return None
    return lambda kind, step: (kind, step) in points


def steps_in(file: Path, kind: str) -> list[int]:
    """The steps with a loss in the file of an offline run of W&B, which loses its last 15 seconds
    when the run is killed: a LevelDB log of protobufs.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record, steps = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # too short for a header
            at += left
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a whole record, or its last part
            history, record = Record.FromString(record).history, b""
            if any(f"{kind}/loss" in (item.key, *item.nested_key) for item in history.item):
                steps.append(int(history.step.num))
    return steps


def end_run(name: str, tracker: GeneralTracker, failed: bool) -> None:
    """As finished, or as failed where a tracker can show it."""
    if failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    elif failed and name == "wandb":
        tracker.run.finish(exit_code=1)
    else:
        tracker.finish()


def first_line(error: BaseException) -> str:
    """The reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
