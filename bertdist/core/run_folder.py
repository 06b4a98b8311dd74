"""What runs write into their --output_dir, and whether a folder is that of a run."""

import json
import os
from pathlib import Path
from typing import Any

from bertdist.core.atomic_io import read_json_object

LOCK, OWNER = "run.lock", "running.json"
STATUS, ENVIRONMENT = "status.json", "environment.json"
# What runs write at the top of their folder, besides checkpoints/ and best/.
WRITTEN = (
    *(LOCK, OWNER, STATUS, ENVIRONMENT, "config.yaml", "metrics.jsonl", "evaluation.json"),
    *("predictions.jsonl", "bad_rows.jsonl", "nan_rows.jsonl", "survey.json", "stacks", ".ranks"),
)


def is_run_folder(folder: Path) -> bool:
    """Whether a run, also one that was killed early, or of an older version, has made the folder.

    All take the lock first; where it is a file that is removed at the end, others remain.
    """
    if (folder / LOCK).is_file() or read_owner(folder) is not None:
        return True
    status = read_json_object(folder / STATUS)
    packages = read_json_object(folder / ENVIRONMENT).get("packages")
    return status.keys() == {"state", "step", "reason"} or (
        isinstance(packages, dict) and "bertdist" in packages
    )


def run_that_wrote(file: Path) -> Path | None:
    """The folder of the run that writes this file, or has written it; None if none has.

    In best/ and checkpoints/, *.jsonl files are a user's, such as predictions beside a model.
    """
    file = Path(os.path.realpath(file))
    for folder in file.parents:
        first, *below = file.relative_to(folder).parts
        in_model = first.split(".")[0] in ("best", "checkpoints") and below and file.is_file()
        written = first in WRITTEN or (in_model and file.suffix != ".jsonl")
        if written and is_run_folder(folder):
            return folder
    return None


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Contents of running.json; None if there is none, or it is damaged."""
    try:
        owner = json.loads((folder / OWNER).read_text())
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "since": str(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
