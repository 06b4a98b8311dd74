"""Cross-validation: one run per fold, each trained on the rows of the other folds.

`cross_validate` is `bertdist train --folds 5`: every fold scores the rows that its run was not
trained on, once, with the weights after the last step. Choosing among evaluations by these rows
would raise the scores. cross_validation.json has the scores of every fold, and their mean and
standard deviation:

    {"folds": 5, "rows": 1000, "seed": 42, "scores": {"accuracy": {"mean": 0.91, "std": 0.01}, ...},
     "per_fold": [{"fold": 0, "rows": 200, "step": 75, "scores": {"accuracy": 0.9, ...}}, ...]}

`train_folds` trains the runs of `check --folds` too (data_quality/label_issues.py). Run k is in
output_dir/folds/k, a run like any other: it resumes after an interruption, and a finished run is
not trained again. Rows of the same text up to case and white space are in one fold: a model trained
on one of them has seen all.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from accelerate import Accelerator

from bertdist.core.atomic_io import atomic_write, read_json_object, to_json
from bertdist.core.config import DataConfig, RunConfig, TrainConfig
from bertdist.core.errors import DataError
from bertdist.core.types import Array
from bertdist.data.bad_rows import BadRows
from bertdist.data.load_data import load_records, needs_numbers
from bertdist.data.records import Records
from bertdist.data.train_test_split import text_numbers
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.models.classifier import load_model_config, pretrained_labels
from bertdist.tasks.tasks import Task, create_task, label_names_of
from bertdist.training.evaluation import GLUE_METRICS, location_fields
from bertdist.training.repeated_runs import (
    Train,
    open_runs,
    show_scores,
    summarize,
    train_in_turn,
)
from bertdist.training.run_lock import claim_run_folder
from bertdist.training.run_logger import RunLogger

TRAIN_FILE, VALIDATION_FILE = "train.jsonl", "validation.jsonl"  # of a fold
REPORT_FILE = "cross_validation.json"

ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


class Rows(NamedTuple):
    """All rows, before they are divided into folds."""

    records: Records
    task: Task
    targets: Array  # (rows, ...) the labels in the form of the task


class Fold(NamedTuple):
    """A finished run of a fold."""

    number: int  # from 0
    rows: Array  # of the fold, on which it was not trained
    folder: Path


def cross_validate(config: TrainConfig, train: Train) -> bool:
    """The runs of --folds, cross_validation.json and a table; False if stopped before the end.

    train: that of the script. Raises BertdistError.
    """
    with open_runs(config, REPORT_FILE, "per_fold") as (accelerator, log):
        return _cross_validate(config, train, accelerator, log)


def _cross_validate(
    config: TrainConfig, train: Train, accelerator: Accelerator, log: RunLogger
) -> bool:
    run = config.run
    folds: list[dict[str, Any]] = []

    def add_scores(fold: Fold) -> None:
        if accelerator.is_main_process:
            name_rows(fold, rows.records)
        report = read_json_object(fold.folder / "evaluation.json")
        entry = {"fold": fold.number, "rows": len(fold.rows), "step": report.get("step")}
        folds.append({**entry, "scores": report.get("scores", {})})

    path = Path(run.output_dir) / REPORT_FILE
    with raise_on_all_ranks(accelerator):
        rows = load_rows(config, log)
    log.say(
        "Each fold is scored once, after the last step, by a run on the other folds; other "
        "validation rows are not used."
    )
    if not train_folds(config, rows, train, accelerator, log, add_scores, scored=True):
        return False
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            summary = summarize(folds)
            report: dict[str, Any] = {"folds": run.folds, "rows": len(rows.records)}
            report |= {"seed": run.seed, "scores": summary, "per_fold": folds}
            atomic_write(path, to_json(report, indent=1))
            title = f"Scores of {run.folds} folds, each by a model of the others"
            show_scores(title, summary, folds, "fold", log)
            log.screen.block("Files", f"{path}: scores of every fold, mean and standard deviation")
            about = "a run per fold, with predictions.jsonl and errors.jsonl of its rows"
            log.screen.block("", f"{path.parent / 'folds'}: {about}")
            other = "the same command without --folds, and with another --output_dir"
            log.screen.block("Next", f"{other}: one model of all rows")
    accelerator.end_training()
    return True


def name_rows(fold: Fold, records: Records) -> None:
    """Let the lines of a fold's errors.jsonl name the user's file and line, not the fold's own."""
    path, own = fold.folder / "errors.jsonl", VALIDATION_FILE
    entries = list(map(json.loads, path.read_bytes().splitlines())) if path.exists() else []
    if all(entry.get("file") != own for entry in entries):  # done by an earlier process
        return
    lines = []
    for entry in entries:
        place = location_fields(records, int(fold.rows[entry["row"]]))
        others = {name: x for name, x in entry.items() if name not in ("row", "file", "line")}
        lines.append(to_json({"row": entry["row"], **place, **others}))
    atomic_write(path, b"".join(lines))


def load_rows(config: TrainConfig, log: RunLogger) -> Rows:
    """The training rows, and the task that all of them define. Raises BertdistError."""
    numbers_only = needs_numbers(config.task)
    records = read_rows(config.data, config.run.output_dir, log, numbers_only)
    model_labels = pretrained_labels(load_model_config(config.model))
    task = create_task(config.task, records.label_stats(), model_labels)
    assert records.label_indices is not None
    values = np.array([task.encode_label(value) for value in records.label_values])
    return Rows(records, task, values[records.label_indices])


def read_rows(
    data: DataConfig, output_dir: str, log: RunLogger, numbers_only: bool | None = None
) -> Records:
    """The training rows in memory; those skipped are written to bad_rows.jsonl of output_dir."""
    records = load_records(data, "train", numbers_only)
    if number := len(records.bad_rows):  # --on_bad_row skip
        path = Path(output_dir) / "bad_rows.jsonl" if output_dir and log.enabled else None
        BadRows(data.on_bad_row, data.max_bad_rows, path).add_and_write(records.bad_rows)
        see = f", see {path}" if path else ""
        log.say(f"Skipped {number:,} row{'s' * (number != 1)} that cannot be read{see}.")
    return records


def assign_folds(targets: Array, groups: Array, folds: int, seed: int) -> Array:
    """(N,) int64: the fold of each row.

    targets: (N,) ids or numbers, or (N, O) 0/1; groups: (N,) int64, rows of one group stay
    together. The folds differ by at most one in the groups of a label; for multi-label rows that
    holds for the rarest label; numbers are assigned in turn, from the smallest to the largest.
    """
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    columns = targets[first].reshape(len(first), -1).T  # (1 or O, groups)
    # The rarest label last: lexsort's primary key is the last one.
    columns = columns[np.argsort(-columns.sum(1), kind="stable")]
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), *columns))
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[order] = np.arange(len(first)) % folds
    return fold_of_group[group_of_row.reshape(-1)]


def train_folds(
    config: TrainConfig,
    rows: Rows,
    train: Train,
    accelerator: Accelerator,
    log: RunLogger,
    add: Callable[[Fold], None],
    *,
    scored: bool,
) -> bool:
    """Train a run per fold; False if stopped before the end: the same call then resumes.

    add: called after each run, on every rank. scored: whether a run evaluates its fold at its end;
    else it evaluates nothing. Raises DataError if there are too few rows, and what `train` raises,
    such as CheckpointError if the folders hold other runs.
    """
    records, folds = rows.records, config.run.folds
    assert folds is not None
    fold_of_row = assign_folds(rows.targets, text_numbers(records), folds, config.run.seed)
    root = Path(config.run.output_dir) / "folds"
    with raise_on_all_ranks(accelerator):
        if (num_texts := int(fold_of_row.max()) + 1) < folds:  # the first fold gets the first text
            raise DataError(
                f"{records.name} has {num_texts} different texts, too few for --folds {folds}; "
                "expected at least one per fold."
            )
        if accelerator.is_main_process:
            for fold in range(folds):
                claim_run_folder(root / str(fold))
            for fold in range(folds):
                parts = {TRAIN_FILE: fold_of_row != fold}
                parts |= {VALIDATION_FILE: fold_of_row == fold} if scored else {}
                for name, chosen in parts.items():
                    _write_rows(root / str(fold) / name, records, np.flatnonzero(chosen))
    runs, held_out, abouts = [], [], []
    for fold in range(folds):
        held_out.append(np.flatnonzero(fold_of_row == fold))
        runs.append(_fold_config(config, root / str(fold), rows.task, records, scored))
        abouts.append(f"training on the other {len(records) - len(held_out[fold]):,} rows")

    def add_fold(fold: int) -> None:
        add(Fold(fold, held_out[fold], root / str(fold)))

    return train_in_turn(runs, "fold", abouts, train, accelerator, log, add_fold)


def _fold_config(
    config: TrainConfig, folder: Path, task: Task, records: Records, scored: bool
) -> TrainConfig:
    """The run that trains on folder/train.jsonl, and evaluates folder/validation.jsonl or nothing.

    With the task of all rows, so that all models have the same outputs.
    """
    kind, defaults = cast(ProblemType, task.problem_type), RunConfig()
    data = DataConfig(
        train_file=[str(folder / TRAIN_FILE)],
        validation_file=str(folder / VALIDATION_FILE) if scored else None,
        text_column=["text"],
        text_pair_column=None if records.pairs is None else "text_pair",
        label_column="label",
    )
    metrics = config.task.metrics or GLUE_METRICS.get(config.data.task_name or "")
    task_config = replace(
        config.task,
        problem_type=kind,
        label_names=None if kind == "regression" else label_names_of(task),
        metrics=metrics if scored else None,
        metric_for_best_model=None,
    )
    run = replace(
        config.run,
        output_dir=str(folder),
        folds=None,
        eval_every="never" if scored else defaults.eval_every,
        early_stopping_patience=None,
        early_stopping_threshold=defaults.early_stopping_threshold,
    )
    return replace(config, data=data, task=task_config, run=run)


def _write_rows(path: Path, records: Records, rows: Array) -> None:
    """Texts and labels as JSON lines, which preserve every kind of label."""
    assert records.label_indices is not None
    columns = {"text": records.texts.take(rows).to_pylist()}
    if records.pairs is not None:
        columns["text_pair"] = records.pairs.take(rows).to_pylist()
    columns["label"] = [records.label_values[code] for code in records.label_indices[rows]]
    entries = zip(*columns.values(), strict=True)
    lines = [to_json(dict(zip(columns, values, strict=True))) for values in entries]
    atomic_write(path, b"".join(lines))
