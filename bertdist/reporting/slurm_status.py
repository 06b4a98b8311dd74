"""The table of `bertdist slurm status`: jobs of SLURM, and what their runs have written. No torch.

    show_status(["out", "runs"])      # two runs, or a run and a folder that holds some
    show_status(None)                 # the runs of the user's jobs in the queue

SLURM forgets a job soon after its end, and may not be installed where the table is shown: then the
columns of the run folder remain, and a line says so.
"""

import json
import os
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bertdist.core.atomic_io import explain_write_errors, read_json_object
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import (
    JOB_FILE,
    JOB_SCRIPT,
    SLURM,
    STATUS,
    is_run_folder,
    read_owner,
)
from bertdist.core.slurm import JobView, NoSlurm, SlurmError, job_view, own_jobs, plain_time
from bertdist.core.terminal import show, show_table
from bertdist.tasks.metric_names import LOWER_IS_BETTER, selected_score
from bertdist.training.trial_runs import TRIALS, is_finished, is_in_use, read_evaluations

HEADER = ("run", "job", "job state", "run state", "step", "score (best)", "time left", "restarts")
# Of columns that are numbers: never wrapped
RIGHT = (6, 7)
ALWAYS = (0, 3, 4)  # shown also where they are empty
SCRIPTS = ("train.slurm", "multi_node.slurm", "sweep.slurm", "predict.slurm")
_TAIL_BYTES = 1 << 16  # of metrics.jsonl, in which the last step is looked for


class Target(NamedTuple):
    """A folder to show, and the job that works in it."""

    folder: Path | None  # of a run or a sweep; None where a job does not say it
    job: str  # "" where none was submitted by `bertdist slurm submit`
    name: str  # as shown
    script: Path | None = None  # of the job, where it was submitted so


class Progress(NamedTuple):
    """What a run, or a sweep, has written."""

    state: str = ""
    step: str = ""
    score: str = ""
    is_alive: bool | None = None  # of a running one: as seen from this host; None if it cannot say


def show_status(folders: Sequence[str] | None) -> None:
    """Print the table. Raises BertdistError."""
    targets = list(targets_in(folders) if folders else targets_in_queue())
    if not targets:
        show("You have no jobs of bertdist in the queue; name folders to see their runs.")
        return
    note = ""  # once SLURM does not answer it is not asked again: each question may take a minute
    if folders:
        try:
            targets = with_queued_jobs(targets, list(targets_in_queue()))
        except SlurmError as error:
            note = _note(error)
    rows = []
    for target in targets:
        view, is_asked = None, False
        if target.job and not note:
            try:
                view, is_asked = job_view(target.job, target.script), True
            except SlurmError as error:
                note = _note(error)
        rows.append(row_of(target, view, is_asked, progress_of(target.folder)))
    shown = [
        i for i in range(len(HEADER)) if i in ALWAYS or any(r[i] not in ("", "0") for r in rows)
    ]
    right = [place for place, i in enumerate(shown) if i in RIGHT]
    cells = [[row[i] for i in shown] for row in rows]
    show_table("Jobs and runs", [HEADER[i] for i in shown], cells, right)
    if note:
        show(note)


def _note(error: SlurmError) -> str:
    what = str(error).split(":")[0] if isinstance(error, NoSlurm) else str(error).rstrip(".")
    return f"{what}: job states are not known."


def row_of(target: Target, view: JobView | None, is_asked: bool, progress: Progress) -> list[str]:
    """A line of the table, by HEADER; "" for what is not known.

    view: None where SLURM does not know the job, or was not asked.
    """
    left = restarts = ""
    state = "forgotten by SLURM" if is_asked else ""
    if not target.job and target.script is not None and not progress.state:
        state = "no job known"
    if view is not None:
        state = view.state
        left = "" if view.seconds_left is None else plain_time(view.seconds_left)
        restarts = "" if view.restarts is None else str(view.restarts)
    run_state = progress.state
    is_active = view is not None and view.is_active and not view.state.startswith("PENDING")
    is_over = progress.is_alive is False or (is_asked and progress.is_alive is None)
    if run_state == "running" and not is_active and is_over:
        run_state = "killed"  # it could not write its end
    # A prediction writes its file at its end.
    tells = target.folder is not None and not _is_of_prediction(target.folder)
    if not run_state and view is not None and view.is_active:
        run_state = "not started" if tells or view.state.startswith("PENDING") else ""
    return [
        target.name,
        target.job,
        state,
        run_state,
        progress.step,
        progress.score,
        left,
        restarts,
    ]


# ---- Which runs


def targets_in(folders: Sequence[str]) -> Iterable[Target]:
    """The runs in folders, or right below them; of a single folder that holds some, by their names
    in it. Raises ConfigError.
    """
    for given in folders:
        folder = Path(os.path.expanduser(given))
        if not folder.is_dir():
            raise ConfigError(f"{given}: there is no such folder.")
        if _is_target(folder):
            yield _target(folder)
            continue
        with explain_write_errors(folder, "read"):
            below = [path for path in sorted(folder.iterdir()) if _is_target(path)]
        if not below:
            raise ConfigError(f"{given} is not the folder of a run or a job, and holds none.")
        is_only = len(folders) == 1
        yield from (_target(path, path.name if is_only else "") for path in below)


def _is_target(folder: Path) -> bool:
    with suppress(OSError):
        is_sweep = (folder / TRIALS).is_dir()
        return _job_file(folder).is_file() or is_sweep or is_run_folder(folder)
    return False


def _is_of_prediction(folder: Path) -> bool:
    """Whether it is OUTPUT.slurm; a run's folder may have such a name too."""
    return folder.suffix == f".{SLURM}" and (folder / JOB_FILE).is_file()


def _job_file(folder: Path) -> Path:
    """Of a run's folder, and of OUTPUT.slurm."""
    return folder / JOB_FILE if _is_of_prediction(folder) else folder / SLURM / JOB_FILE


def _target(folder: Path, name: str = "") -> Target:
    file = _job_file(folder)
    job = read_json_object(file).get("job_id")
    script = file.absolute().with_name(JOB_SCRIPT) if file.is_file() else None
    return Target(folder, str(job or ""), name or _short(folder), script)


def with_queued_jobs(targets: Iterable[Target], queued: Iterable[Target]) -> list[Target]:
    """A folder's jobs in the queue instead of the one in its job.json: sbatch may have been called
    by hand, with the script of an ended job or one of launch/.
    """
    jobs = defaultdict[str, list[Target]](list)
    for target in queued:
        if target.folder is not None:
            jobs[os.path.realpath(target.folder)].append(target)
    found = []
    for target in targets:
        own = jobs.get(os.path.realpath(target.folder or ""), [])
        found += [target._replace(job=x.job, script=None) for x in own] or [target]
    return found


def targets_in_queue() -> Iterable[Target]:
    """The jobs of this user that are of bertdist. Raises SlurmError."""
    for job, place, command in own_jobs():
        if (folder := folder_of_job(place, command)) is not None:
            yield Target(folder or None, job, _short(folder) if str(folder) != "." else command)


def _short(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return min(relative, str(folder.absolute()), key=len)


def folder_of_job(place: str, command: str) -> Path | None:
    """The run folder of a job, from its working folder and its command; None for one that is not of
    bertdist, Path() where its arguments do not say it.
    """
    if command.endswith(
        f"/{JOB_SCRIPT}"
    ):  # a path without arguments, in which squeue quotes nothing
        job = Path(place, command).parent
        if not (job / JOB_FILE).is_file():
            return None
        return job.parent if job.name == SLURM else job
    script, *words = command.split() or [""]
    path = Path(place, script)
    if path.name not in SCRIPTS:
        return None
    given = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if match := re.fullmatch(r"--(output[_-]dir|config)(?:=(.*))?", word):
            given[match[1].replace("-", "_")] = match[2] or following
    folder = given.get("output_dir")
    if folder is None and "config" in given:
        folder = _settings(Path(place, given["config"])).get("output_dir")
    return Path(place, folder) if folder else Path()


# ---- What a run has written


def progress_of(folder: Path | None) -> Progress:
    """Of a run or a sweep; empty where there is none (yet)."""
    try:
        return Progress() if folder is None else _progress_of(folder)
    except OSError as error:
        return Progress(f"cannot be read ({error.strerror})")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return Progress("its files are damaged")  # which does not hide the other runs


def _progress_of(folder: Path) -> Progress:
    if _is_of_prediction(folder):
        return _progress_of_prediction(folder)
    if (folder / TRIALS).is_dir():
        return _progress_of_sweep(folder)
    status = read_json_object(folder / STATUS)
    if "state" not in status:
        if not (folder / STATUS).exists():
            return Progress()
        with open(folder / STATUS, "rb"):  # raises OSError where it cannot be read
            raise ValueError
    settings = _settings(folder / "config.yaml")
    step = int(status["step"]) if isinstance(status.get("step"), int) else 0
    last = _last_line(folder / "metrics.jsonl")
    step = max(step, last.get("step", 0)) if status["state"] == "running" else step
    total = total_steps(settings, last)
    shown = f"{step:,} of {total:,}" if total else f"{step:,}"
    is_alive = _is_alive(folder) if status["state"] == "running" else None
    return Progress(str(status["state"]), shown, _scores(folder, settings), is_alive)


def _is_alive(folder: Path) -> bool | None:
    """Whether a process trains there, if this host can see it."""
    if is_in_use(folder):
        return True
    owner = read_owner(folder)
    if owner is not None and owner["host"] == socket.gethostname():
        with suppress(PermissionError, OverflowError):  # of another user
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return False
        return True
    return None


def total_steps(settings: dict[str, Any], line: dict[str, Any]) -> int | None:
    """Of a run, from its settings and a line of metrics.jsonl; None before the first line."""
    if isinstance(given := settings.get("max_train_steps"), int):
        return given
    step, epoch, epochs = line.get("step"), line.get("epoch"), settings.get("num_train_epochs")
    if not (step and epoch and epochs):
        return None
    total: int = max(int(step), round(step / epoch * epochs))
    return total


def _scores(folder: Path, settings: dict[str, Any]) -> str:
    """`accuracy 0.91 (0.93)`: of the last evaluation, and the best so far."""
    named = settings.get("metric_for_best_model")
    selected = [selected_score(x.scores, named) for x in read_evaluations(folder)]
    known = [(name, value) for name, value in selected if value is not None]
    if not known:
        return ""
    name = known[-1][0]
    sign = -1 if name in LOWER_IS_BETTER else 1
    last, best = known[-1][1], max(value for _, value in known)
    return f"{name} {sign * last:.4g} ({sign * best:.4g})"


def _progress_of_sweep(folder: Path) -> Progress:
    runs = [path for path in (folder / TRIALS).iterdir() if path.is_dir()]
    settings = _settings(folder / "base.yaml")
    named = settings.get("metric_for_best_model")
    lasts = [found[-1].scores for found in map(read_evaluations, runs) if found]
    known = [(x, y) for x, y in (selected_score(x, named) for x in lasts) if y is not None]
    planned = _settings(folder / SLURM / "config.yaml").get("trials")
    planned = planned or read_json_object(folder / "sweep.json").get("trials") or 0
    finished, total = sum(map(is_finished, runs)), max(len(runs), planned)
    score = ""
    if known:
        name, best = max(known, key=lambda pair: pair[1])
        score = f"{name} ({abs(best) if name in LOWER_IS_BETTER else best:.4g})"
    return Progress("sweep", f"{finished} of {total} trials", score)


def _progress_of_prediction(folder: Path) -> Progress:
    """Of OUTPUT.slurm: the file is there when all rows are predicted."""
    with suppress(OSError):
        written = os.path.getmtime(folder.with_suffix(""))
        if written >= os.path.getmtime(folder / JOB_FILE):
            return Progress("finished")
    return Progress()


def _last_line(path: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that has a step and an epoch; {} without one."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        for line in reversed(file.read().split(b"\n")[:-1]):
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and {"step", "epoch"} <= entry.keys():
                    return entry
    return {}


def _settings(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
