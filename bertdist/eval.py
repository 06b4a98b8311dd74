"""Evaluate a trained classifier on labelled rows: scores with intervals, predictions, errors.

    python -m bertdist.eval --model out --input test.tsv
    python -m bertdist.eval --model out --input test.tsv --metrics accuracy ece --output_dir scores
    accelerate launch -m bertdist.eval --model out --input test.tsv      # on several devices

The model is any Hugging Face folder of a sequence classifier; labels of the file are matched to its
labels by name. --output_dir gets evaluation.json, predictions.jsonl, errors.jsonl and
probabilities.parquet, as a run has them for its validation rows, the same on any number of ranks.
"""

import os
import shutil
import sys

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for modules in bertdist/ itself; make it look in the folder
        # above.
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from bertdist.core.args import parse_or_exit, read_evaluate_config
    from bertdist.data.preflight import check_evaluate

    # Before torch is imported, which takes seconds
    parsed_config = parse_or_exit(read_evaluate_config, check_evaluate)

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bertdist.core.atomic_io import explain_write_errors, partial_path
from bertdist.core.config import (
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
)
from bertdist.core.errors import (
    MOST_LISTED,
    BertdistError,
    ConfigError,
    DataError,
    listed,
    nearest_first,
)
from bertdist.core.output_files import (
    REPORT_FILE,
    RESULT_FILES,
    check_evaluation_folder,
    is_own_report,
)
from bertdist.core.terminal import (
    EXIT_STOPPED,
    ProgressBar,
    print_error,
    print_to_stderr,
    process_rank,
)
from bertdist.core.thresholds import parse_threshold
from bertdist.data.bad_rows import BadRows
from bertdist.data.load_data import load_records
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET
from bertdist.data.records import Records
from bertdist.data.tokenization import create_dataset, truncation_notes
from bertdist.data.trained_columns import check_pairs, data_of_model, suggest_prediction
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import create_accelerator, run_cli
from bertdist.distributed.launcher import check_world
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import load_model_config, saved_metadata, trained_task
from bertdist.predict import Predictor, Stopped
from bertdist.tasks.labels import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelValue,
    is_multi_hot,
    match_to_model,
)
from bertdist.tasks.tasks import MultiLabel, Task, describe_thresholds
from bertdist.training.best_model import Results, write_results
from bertdist.training.evaluation import Scorer
from bertdist.training.run_summary import show_report
from bertdist.training.screen import Screen


def evaluate(config: EvaluateConfig) -> Results | None:
    """The results on rank 0, which writes them to --output_dir; None on other ranks.

    Raises, on all ranks, BertdistError, and `Stopped` where a stop was requested.
    """
    run = RunConfig(use_cpu=config.use_cpu, mixed_precision=config.mixed_precision)
    with StopSignal() as stop:
        accelerator = create_accelerator(run)
        check_world(accelerator.num_processes)
        is_main, scorer = accelerator.is_main_process, None
        given = parse_threshold(config.threshold)
        with raise_on_all_ranks(accelerator):
            # Rows first: they cost little, and their errors come before the weights are loaded.
            if is_main and config.output_dir is not None:
                check_evaluation_folder(Path(config.output_dir))
            task, records, notes = load_labelled_rows(config)
            if is_main:
                task_config = TaskConfig(
                    metrics=config.metrics, positive_label=config.positive_label
                )
                scorer = Scorer(task_config, task, config.task_name)
                scorer.use_thresholds(given)
                notes = [*notes, describe_thresholds(task) if given is None else ""]
                notes = [*notes, scorer.positive_note]
            predictor = Predictor(
                config.model,
                max_length=config.max_length,
                tokens_per_micro_batch=config.tokens_per_micro_batch or DEFAULT_TOKEN_BUDGET,
                accelerator=accelerator,
                stop=stop,
            )
            tokenizer, max_length = predictor.tokenizer, predictor.max_length
            rows = create_dataset(records, tokenizer, task, max_length)
            if is_main:
                notes += truncation_notes({"rows": records}, tokenizer, max_length)
                print_to_stderr(*filter(None, notes))
        with ProgressBar("Evaluated", "rows", is_main) as progress:

            def show(done: int) -> None:
                done = min(done, len(records))
                progress.update(done, done / len(records))

            logits = predictor.predict_logits(records, show)
        results = None
        with raise_on_all_ranks(accelerator):
            if scorer is not None:
                evaluation = scorer.score(logits, rows.targets)
                of: dict[str, Any] = {
                    "model": config.model,
                    "data": records.name,
                    "rows": len(records),
                }
                if config.positive_label is not None:
                    of["positive_label"] = task.labels[scorer.positive]
                fitted = predictor.metadata.get("calibration") or {}
                if given is not None:  # instead of those that were fitted
                    of["threshold"] = given
                    fitted = {**fitted, "threshold_for": None, "thresholds": {}}
                results = evaluation.results(rows, evaluated=of)
                if fitted.get("thresholds") or fitted.get("temperature"):
                    entry = scorer.measure_fit(fitted, logits, rows.targets)
                    results.report["calibration"] = entry
                if config.output_dir is not None:
                    _write(Path(config.output_dir), results, records, config)
        return results


def load_labelled_rows(config: EvaluateConfig) -> tuple[Task, Records, list[str]]:
    """The model's task, the rows with its names as labels, and notes. Raises BertdistError."""
    model_config = load_model_config(ModelConfig(model_name_or_path=config.model), "--model")
    task, metadata = (
        trained_task(model_config, f"--model {config.model}"),
        saved_metadata(model_config),
    )
    if (names := config.label_names) is not None:
        if task.problem_type == REGRESSION or len(names) != len(task.labels):
            raise ConfigError(
                f"--label_names has {len(names)} names; the model has {len(task.labels)} outputs: "
                f"{listed(task.labels)}."
            )
        if sorted(names) == sorted(task.labels) and tuple(names) != task.labels:
            raise ConfigError(
                "--label_names has the model's own names in another order, which would rename its "
                f"outputs ({listed(task.labels)}): leave it out, labels are matched by name."
            )
        task = replace(task, labels=names_in_files(names, task.labels), codes=())  # type: ignore[type-var]  # a Protocol
    data = data_of_model(config, metadata)
    with suggest_prediction():
        records = load_records(data, "validation", task.problem_type == REGRESSION)
    if records is None:
        raise DataError(f"There are no rows of --split {config.split}.")
    check_pairs(metadata, records.pairs is not None)
    bad_rows = BadRows(config.on_bad_row, config.max_bad_rows)
    bad_rows.add(records.bad_rows)
    notes = [f"{note}." for note in records.format_notes]
    if number := len(bad_rows):
        notes.append(f"Skipped {_rows(number)} that cannot be read: {bad_rows.rows[0].message}")
    task, records, named = name_labels(task, records)
    return task, records, [*notes, *named]


def names_in_files(given: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """--label_names in the order of the model's outputs: `b a`, or as for training
    `1=pos 0=neg`, which names the codes of the file by labels of the model, in any order.

    Raises ConfigError.
    """
    pairs = [(name.strip(), code.strip()) for code, _, name in (x.partition("=") for x in given)]
    codes = dict(pairs)
    if {*given} & {*labels} or not codes.keys() & {*labels} or len({*codes.values()}) < len(pairs):
        return tuple(given)
    if unknown := [name for name in codes if name not in labels]:
        raise ConfigError(
            f"--label_names names {listed(unknown)}, which the model does not have: expected "
            f"CODE=NAME for each of its labels {listed(labels)}."
        )
    return tuple(codes[label] for label in labels)


def name_labels(task: Task, records: Records) -> tuple[Task, Records, list[str]]:
    """The rows with the model's names as labels, the task as the rows have it, and notes.

    Raises DataError.
    """
    notes: list[str] = []
    if task.problem_type == REGRESSION:
        return task, records, notes
    if isinstance(task, MultiLabel):
        no_names = records.class_names is None
        is_hot = no_names and is_multi_hot(records.label_values, len(task.labels))
        task = replace(task, multi_hot=is_hot)  # judged over all rows, as in training
        if is_hot:
            notes.append(
                f"Labels of {records.name}: lists of {len(task.labels)} zeros and ones, in the "
                f"order of the model's labels: {listed(task.labels)}."
            )
            return task, records, notes
    values, matched = _match_labels(records, task)
    return task, replace(records, label_values=values), [*notes, *matched]


def _match_labels(records: Records, task: Task) -> tuple[list[LabelValue], list[str]]:
    """The labels with the model's names, and notes. Raises DataError for what matches none."""
    values = records.label_values
    if task.problem_type == SINGLE_LABEL:
        for value in values:
            if isinstance(value, tuple) and len(value) != 1:
                raise DataError(
                    f"{records.locate_label(value)}: {len(value)} labels; the model gives one "
                    f"label per text ({SINGLE_LABEL}), of {listed(task.labels)}."
                )
    rows_of = {name: value for value in reversed(values) for name in _names(value)}
    found = match_to_model(rows_of, task.labels, task.codes)
    if missing := [name for name in rows_of if name not in found]:
        joined = task.problem_type == MULTI_LABEL and records.label_kind != "set"
        hint = " --label_delimiter ';' splits cells with several labels." if joined else ""
        shown = listed([f"{name!r} ({records.locate_label(rows_of[name])})" for name in missing], 3)
        known: Sequence[str] = task.labels
        known = nearest_first(missing[0], known) if len(known) > MOST_LISTED else known
        raise DataError(
            f"{len(missing):,} of {len(rows_of):,} labels of {records.name} are none of the "
            f"model's: {shown}. Rename them, or give the names of the model's outputs, in their "
            f"order, as the file has them: --label_names.{hint} Labels of the model: "
            f"{listed(known)}."
        )
    matched: list[LabelValue] = []
    for value in values:
        new = tuple(found[name] for name in _names(value))
        matched.append(new if isinstance(value, tuple) else new[0])
    changed = [f"{name!r} is {found[name]!r}" for name in rows_of if found[name] != name]
    notes = [f"Labels of {records.name} and of the model: {listed(changed, 10)}."] * bool(changed)
    if records.label_column is None:  # --label_columns
        columns = match_to_model(records.class_names or (), task.labels, task.codes).values()
        if lacking := [repr(label) for label in task.labels if label not in columns]:
            notes.append(
                f"--label_columns lacks {listed(lacking, 10)} of the model's labels: all rows "
                "count as rows without."
            )
    return matched, notes


def _names(value: LabelValue) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"


def _write(folder: Path, results: Results, records: Records, config: EvaluateConfig) -> None:
    """Write all files aside, then put them in the place of an earlier evaluation's."""
    aside = partial_path(folder / RESULT_FILES[0])
    report, *others = (*RESULT_FILES, "bad_rows.jsonl")
    page = [REPORT_FILE] if is_own_report(folder / REPORT_FILE) else []  # of other rows
    with explain_write_errors(aside):
        shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
        aside.mkdir(parents=True)
    try:
        bad_rows = BadRows(config.on_bad_row, config.max_bad_rows, aside / others[-1])
        bad_rows.add_and_write(records.bad_rows)
        write_results(aside, results)
        with explain_write_errors(folder):
            (folder / report).unlink(missing_ok=True)  # no scores beside rows of others
            for name in (*others, *page):
                (folder / name).unlink(missing_ok=True)
                if (aside / name).exists():
                    os.replace(aside / name, folder / name)
            os.replace(aside / report, folder / report)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run(config: EvaluateConfig) -> int:
    """Evaluate, show and write; returns the exit code."""
    try:
        results = evaluate(config)
    except Stopped:
        if process_rank() == 0:
            print_error(
                BertdistError("Stopped on request: nothing was written; rerun the same command.")
            )
        return EXIT_STOPPED
    if results is not None:
        _show(results.report, config)
        if config.output_dir is not None and config.report:
            from bertdist.reporting.after_run import write_report

            write_report(Path(config.output_dir))
    return 0


def _show(report: dict[str, Any], config: EvaluateConfig) -> None:
    screen, of = Screen(enabled=True, stderr=False), report["evaluated"]
    show_report(screen, report)
    screen.say(f"Evaluated: {of['model']} on {_rows(of['rows'])} of {of['data']}.")
    for name in RESULT_FILES if config.output_dir is not None else ():
        screen.say(f"Written: {Path(str(config.output_dir)) / name}")


if __name__ == "__main__":
    run_cli(run, parsed_config)
