"""Files that a user names with --output and the like: checked before the work, written after it.

    check_outputs(outputs, inputs)     # ConfigError, before anything is read
    write_output(path, content)        # at the end

A regular file is replaced as a whole and keeps its mode; a symbolic link keeps its place, and its
target is written. What is no regular file (/dev/stdout, /dev/null, a FIFO) is written in place.
None replaces a file of a run: `run_that_wrote` knows what runs write into their --output_dir.
"""

import fnmatch
import glob
import json
import os
import re
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from bertdist.core.atomic_io import (
    HIDDEN_SUFFIXES,
    MANIFEST,
    atomic_write,
    explain_write_errors,
    partial_path,
    read_json_object,
)
from bertdist.core.errors import ConfigError

LINKS = 40  # as Linux
STDOUT = "-"
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
FORMATS |= {".parquet": "parquet"}

# Files that a user may put beside a model: no file of a model has such a name.
PREDICTIONS = (".jsonl", ".csv", ".tsv", ".parquet", ".gz")
LOCK, OWNER = "run.lock", "running.json"
STATUS, ENVIRONMENT, TRACKER = "status.json", "environment.json", "tracker.json"
# What runs write at the top of their folder, besides checkpoints/ and best/.
WRITTEN = (
    *(LOCK, OWNER, STATUS, ENVIRONMENT, "config.yaml", "metrics.jsonl", "evaluation.json"),
    *("predictions.jsonl", "errors.jsonl", "test_evaluation.json", "test_predictions.jsonl"),
    *("test_errors.jsonl", "bad_rows.jsonl", "nan_rows.jsonl", "survey.json", "stacks", ".ranks"),
    *("probabilities.parquet", "test_probabilities.parquet", "report.html", TRACKER),
    *("seeds.json", "cross_validation.json"),
)
# What `bertdist slurm submit` writes into a run's folder before the run, or beside predictions.
SLURM, JOB_FILE, JOB_SCRIPT = "slurm", "job.json", "job.slurm"
# What runs and evaluations write of scored rows.
RESULT_FILES = (*("evaluation.json", "predictions.jsonl", "errors.jsonl", "probabilities.parquet"),)
# The page of a run or an evaluation, and the line in it by which bertdist knows its own.
REPORT_FILE = "report.html"
REPORT_MARKER = b'<meta name="generator" content="bertdist report">'
EXPORT_REPORT = "export.json"
# What may be in a new folder: logs of the command, and files of systems.
IGNORED = ("*.log", "*.out", "*.err", ".*", "lost+found")


def check_outputs(
    outputs: Mapping[str, str], inputs: Iterable[tuple[str, str]], folder: str | None = None
) -> None:
    """Raise ConfigError for an output that cannot be written, or that is an input, a file of a run
    or another output.

    outputs: flag -> file. inputs: (flag, file, folder or glob). folder: --output_dir, in which no
    input may be.
    """
    files = [(flag, Path(file)) for flag, given in inputs for file in _paths_of(given)]
    targets: dict[str, str] = {}  # real path -> flag
    for flag, path in outputs.items():
        if problem := _problem(path):
            raise ConfigError(f"{flag} {path or repr(path)}: {problem}.")
        target = target_of(Path(path))
        for given, file in files:
            if _replaces(target, file):
                part = "a file of " if file.is_dir() else ""
                raise ConfigError(
                    f"{flag} {path} would replace {part}{given} {file}: name another file."
                )
        if not is_special(target) and (run := run_that_wrote(target)):
            raise ConfigError(
                f"{flag} {path} would replace a file of the run in {run}: name another file."
            )
        other = targets.setdefault(os.path.realpath(target), flag)
        if other != flag and not is_special(target):
            raise ConfigError(f"{flag} {path} is {other} as well: name another file.")
    for given, file in files if folder else ():
        own = (Path(str(folder), name, "config.yaml").resolve() for name in ("", SLURM))
        if given == "--config" and file.resolve() in own:
            continue  # the run's own settings, which it writes again, or those of its job
        if _is_inside(file, Path(str(folder))):
            raise ConfigError(
                f"{given} {file} is inside --output_dir {folder}, whose files a run replaces: "
                "move one of them."
            )


class OutputFormat(NamedTuple):
    """How predictions are written."""

    kind: str  # jsonl, csv, tsv or parquet
    is_compressed: bool = False  # gzip


def output_format(path: str | None, given: str = "auto") -> OutputFormat | None:
    """By the ending of --output, or as given; None if neither says it."""
    if path in (None, STDOUT):
        return OutputFormat("jsonl" if given == "auto" else given)
    target = Path(str(path))
    is_compressed = target.suffix.lower() == ".gz"
    suffix = Path(target.stem if is_compressed else target.name).suffix.lower()
    by_name = FORMATS.get(suffix) or ("jsonl" if is_special(target) else None)
    kind = by_name if given == "auto" else given
    if kind is None or (kind == "parquet" and is_compressed):
        return None
    return OutputFormat(kind, is_compressed)


def write_output(path: str | Path, content: bytes) -> None:
    """Write a file that `check_outputs` has accepted. Raises CheckpointError."""
    target = target_of(Path(path))
    if not is_special(target):
        atomic_write(target, content)
        return
    with explain_write_errors(Path(path)), open_special(target) as file:
        file.write(content)


def open_special(target: Path) -> IO[bytes]:
    """To append to what `is_special`. Raises OSError."""
    number = _descriptor(target)
    if number is None:
        return open(target, "ab")
    sys.stdout.flush()
    sys.stderr.flush()
    # opened again, a file behind it would be written from its start
    return open(number, "wb", closefd=False)


def _paths_of(given: str) -> Iterator[str]:
    """The local files or folders that a path or a glob names, as far as they exist."""
    if "://" not in given:
        paths = (os.path.expanduser(path) for path in {given, *glob.glob(given, recursive=True)})
        yield from filter(os.path.exists, paths)


def _replaces(target: Path, given: Path) -> bool:
    """Whether writing the target changes an input file, or a file in an input folder."""
    if not target.is_file():
        return False
    if given.is_dir():  # predictions beside a model are not of the model
        return target.suffix not in PREDICTIONS and _is_inside(target, given)
    return os.path.samefile(given, target)


def _is_inside(file: Path, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(file)).parents


def target_of(path: Path) -> Path:
    """The file that is written: links followed, except those of /dev and /proc."""
    for _ in range(LINKS):
        if not path.is_symlink() or _is_system(path):
            return path
        path = path.parent / os.readlink(path)
    return path


def _is_system(path: Path) -> bool:
    return path.is_absolute() and path.parts[1:2] in (("dev",), ("proc",))


def is_special(target: Path) -> bool:
    """Whether it is no regular file, and is written in place."""
    return _is_system(target) or (target.exists() and not target.is_file())


def _descriptor(target: Path) -> int | None:
    """1 for /dev/stdout, 5 for /dev/fd/5 and /proc/self/fd/5."""
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(target))
    named = {"/dev/stdout": 1, "/dev/stderr": 2}
    return int(match[1]) if match else named.get(str(target))


def _problem(path: str) -> str | None:
    """Why a file cannot be written, None if it can."""
    try:
        target = target_of(Path(path))
        folder = target.parent
        if target.is_dir() or path.endswith("/"):
            return "it is a folder; name a file"
        if not folder.is_dir():
            return f"there is no folder {folder}"
        if target.is_symlink() and not _is_system(target):
            return "too many symbolic links"
        exists = target.exists()
        if exists and stat.S_ISSOCK(target.stat().st_mode):
            return "it is a socket; name a file"
        if exists and not os.access(target, os.W_OK):
            return "it is not writable"
        if not is_special(target) and not os.access(folder, os.W_OK | os.X_OK):
            return f"the folder {folder} is not writable"
    except (OSError, ValueError) as error:  # a name that is too long, a NUL in a YAML file
        return str(getattr(error, "strerror", None) or error)
    return None


def is_run_folder(folder: Path) -> bool:
    """Whether a run, also one that was killed early, or of an older version, has made the folder.

    All make checkpoints/ and take the lock first, whose name other programs use too; where it is a
    file that is removed at the end, others remain.
    """
    took_lock = (folder / LOCK).is_file() and (folder / "checkpoints").is_dir()
    if took_lock or read_owner(folder) is not None:
        return True
    status = read_json_object(folder / STATUS)
    packages = read_json_object(folder / ENVIRONMENT).get("packages")
    return status.keys() == {"state", "step", "reason"} or (
        isinstance(packages, dict) and "bertdist" in packages
    )


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds files, and is not of a run, and for a file; nothing
    is written.
    """
    _reject_file(folder)
    if not folder.is_dir():
        return
    own = {"checkpoints"} if _is_unused(folder / "checkpoints") else set[str]()
    with suppress(OSError):
        own |= {LOCK} if (folder / LOCK).stat().st_size == 0 else set()
    own |= _submitted(folder)
    if not is_run_folder(folder) and (foreign := _foreign_files(folder, own, WRITTEN)):
        raise ConfigError(
            f"--output_dir {folder} holds {foreign}, which no run wrote: give a folder that is "
            "new, empty or of an earlier run."
        )
    _reject_links(folder, WRITTEN, "a run")


def check_sweep_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds files, and is not of a sweep."""
    _reject_file(folder)
    if not folder.is_dir() or (folder / "journal.log").is_file():
        return
    if foreign := _foreign_files(folder, {"trials", *_submitted(folder)}, ()):
        raise ConfigError(
            f"--output_dir {folder} holds {foreign}, which no sweep wrote: give a folder that is "
            "new, empty or of an earlier sweep."
        )


def check_evaluation_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds files, and is not of an evaluation; nothing is
    written.
    """
    _reject_file(folder)
    if not folder.is_dir():
        return
    if is_run_folder(folder) or (folder / "config.json").exists():
        what = "a run" if is_run_folder(folder) else "a model"
        raise ConfigError(
            f"--output_dir {folder} is the folder of {what}; name another, such as "
            f"{folder / 'test'}."
        )
    report = folder / RESULT_FILES[0]
    is_own = _is_evaluation(folder) or partial_path(report).exists()
    if not is_own and (foreign := _foreign_files(folder, (), RESULT_FILES)):
        raise ConfigError(
            f"--output_dir {folder} holds {foreign}, which no evaluation wrote: give a folder that "
            "is new, empty or of an earlier evaluation."
        )
    _reject_links(folder, (*RESULT_FILES, "bad_rows.jsonl"), "an evaluation")


def check_export_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that holds files, and is not of an export, and for one that
    cannot be written; nothing is written.
    """
    _reject_file(folder)
    parent = next((x for x in folder.absolute().parents if x.exists()), folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {folder}: the folder {parent} is not writable.")
    if folder.is_symlink():
        raise ConfigError(
            f"--output_dir {folder} is a symbolic link, and an export replaces the folder as a "
            "whole: remove the link, or name another folder."
        )
    is_own = "exported" in read_json_object(folder / EXPORT_REPORT) and (folder / MANIFEST).exists()
    if folder.is_dir() and not is_own and (foreign := _foreign_files(folder, (), ())):
        raise ConfigError(
            f"--output_dir {folder} holds {foreign}, which no export wrote: give a folder that is "
            "new, empty or of an earlier export."
        )


def _submitted(folder: Path) -> set[str]:
    """The name of the folder of a job, where it is one; else nothing."""
    job = folder / SLURM
    names = set(os.listdir(job)) if job.is_dir() and not job.is_symlink() else {""}
    return {SLURM} if not names - {".lock"} or JOB_FILE in names else set()


def _reject_file(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; name a folder.")


def _foreign_files(folder: Path, own: Collection[str], written: Collection[str]) -> str:
    """`'a.txt' and 3 more`: what is neither in `own` nor of the system; "" if there is nothing.

    written: names that would be replaced, so that they are foreign whatever they look like.
    """
    with explain_write_errors(folder, "read"):
        names = sorted(os.listdir(folder))
    ignored = {name for pattern in IGNORED for name in fnmatch.filter(names, pattern)}
    ignored -= {*written, *(name for name in names if name.endswith(HIDDEN_SUFFIXES))}
    foreign = [name for name in names if name not in ignored and name not in own]
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    return f"{foreign[0]!r}{more}" if foreign else ""


def _reject_links(folder: Path, written: Iterable[str], who: str) -> None:
    for name in written:
        if (folder / name).is_symlink():
            raise ConfigError(
                f"{folder / name} is a symbolic link, and {who} replaces this file: remove the "
                "link, or use another --output_dir."
            )


def _is_unused(checkpoints: Path) -> bool:
    with suppress(OSError):
        return all(x.name.startswith(".probe.") and x.is_file() for x in checkpoints.iterdir())
    return False


def is_own_report(path: Path) -> bool:
    """Whether a report may be written there, or removed: a file that bertdist wrote, or none."""
    if not os.path.lexists(path):
        return True
    if not path.is_file():  # a FIFO has no end
        return False
    try:
        with open(path, "rb") as file:
            return not path.is_symlink() and REPORT_MARKER in file.read(4096)
    except OSError:
        return False


def _is_evaluation(folder: Path) -> bool:
    return "evaluated" in read_json_object(folder / RESULT_FILES[0])


def run_that_wrote(file: Path) -> Path | None:
    """The folder of the run, or evaluation, that writes this file, or has written it; None if none
    has.

    In best/ and checkpoints/, PREDICTIONS are a user's.
    """
    file = Path(os.path.realpath(file))
    for folder in file.parents:
        first, *below = file.relative_to(folder).parts
        in_model = first.split(".")[0] in ("best", "checkpoints") and below and file.is_file()
        written = first in WRITTEN or (in_model and file.suffix not in PREDICTIONS)
        if written and (is_run_folder(folder) or _is_evaluation(folder)):
            return folder
    return None


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Contents of running.json; None if there is none, or it is damaged."""
    try:
        owner = json.loads((folder / OWNER).read_text())
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "since": str(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
