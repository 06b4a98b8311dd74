"""The first and the last lines of a run: what is trained on what, and what came of it.

show_data(log.screen, rows, stats, eval_rows, task, test_rows)
log.screen.block("Model", describe_model(config, classifier))
show_report(log.screen, report)      # the tables of an evaluation.json
describe_times(meter, seconds, total)
show_files(log.screen, folder)
show_commands(log.screen, folder, config.data)
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from bertdist.core.config import ALL_LAYERS, DataConfig, FileConfig, OptimConfig, TrainConfig
from bertdist.core.terminal import byte_size, count_in_words, excerpt
from bertdist.data.records import Records
from bertdist.data.stats import DatasetStats
from bertdist.models.classifier import Classifier
from bertdist.models.freezing import count_parameters
from bertdist.tasks.calibration import calibration_notes
from bertdist.tasks.labels import REGRESSION, confusions, describe_alike
from bertdist.tasks.tasks import Task
from bertdist.training.screen import Screen, cell, duration
from bertdist.training.throughput import ThroughputMeter

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream

NAME_COLUMNS = 40  # of a label
SHOWN_NAMES = 10  # of labels, in a line
SHOWN_LABELS = 24  # lines of a table; of more labels a part is shown
SHOWN_MATRIX = 12  # labels of a confusion matrix
TEMPORARY = "bertdist-"  # in the path of what api.py writes of rows in memory
FILES = {
    "best": "the weights, a Hugging Face folder",
    "evaluation.json": "scores, per label too",
    "predictions.jsonl": "answer and truth of every validation row",
    "errors.jsonl": "validation rows with a wrong answer, the most confident first",
    "probabilities.parquet": "probability of every label for every validation row",
    "test_evaluation.json": "scores of the test rows",
    "metrics.jsonl": "log of the run",
}


# ---- The start


def describe_device(accelerator: Accelerator) -> str:
    """Where the run computes: `2 processes, cpu, fp32`."""
    number, device = accelerator.num_processes, accelerator.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    precision = accelerator.mixed_precision.replace("no", "fp32")
    return f"{number} process{'es' * (number > 1)}, {device.type}{name}, {precision}"


def show_data(
    screen: Screen,
    rows: "Records | Stream",
    stats: DatasetStats,
    eval_rows: Records | None,
    task: Task,
    test_rows: Records | None = None,
) -> None:
    """The data and the task; how files were read is a note."""
    screen.pairs = rows.pair_column is not None
    for name, text in describe_data(rows, stats, eval_rows, task, test_rows).items():
        screen.block(name, text)
    scored = [split for split in (eval_rows, test_rows) if split]
    of_scored = (note for split in scored for note in split.format_notes)
    guesses = (*rows.format_notes, *stats.notes, *of_scored)
    screen.note(*(f"{guess}." for guess in dict.fromkeys(guesses)))
    screen.note(*filter(None, (task.reason, describe_alike(task.labels))))


def describe_data(
    rows: "Records | Stream",
    stats: DatasetStats,
    eval_rows: Records | None,
    task: Task,
    test_rows: Records | None = None,
) -> dict[str, str]:
    """The lines of the start block about the data and the task, by name."""
    pair = f" and {rows.pair_column!r}" if rows.pair_column else ""
    column = rows.label_column if isinstance(rows, Records) else rows.columns.label
    label = f", label in {column!r}" if column else ""
    number = (
        f"{sum(stats.num_rows_per_source):,} rows of"
        if stats.num_rows_per_source
        else "an unknown number of rows in"
    )
    stream = " (streamed)" if not isinstance(rows, Records) else ""
    validation = "none: the last weights count as the best"
    if eval_rows:
        validation = f"{len(eval_rows):,} rows of {eval_rows.name}"
    kind = task.problem_type.replace("_label_", "-label ")
    labels = ", ".join(
        excerpt(label, NAME_COLUMNS) for label in task.labels[:SHOWN_NAMES]
    ) + ", ..." * (len(task.labels) > SHOWN_NAMES)
    outputs = f", {len(task.labels)} label{'s' * (len(task.labels) != 1)}: {labels}"
    return {
        "Training": f"{number} {rows.name}{stream}, text in {rows.text_column!r}{pair}{label}",
        "Validation": validation,
        **({"Test": f"{len(test_rows):,} rows of {test_rows.name}"} if test_rows else {}),
        "Task": kind + ("" if task.problem_type == REGRESSION else outputs),
    }


def describe_optimization(optim: OptimConfig) -> str:
    """The learning rate and its schedule."""
    warmup = f"{optim.warmup_steps:,} steps" if optim.warmup_steps else ""
    if optim.warmup_ratio:
        warmup = f"{optim.warmup_ratio:.3g} of the steps"
    schedule = optim.lr_scheduler_type.replace("_", " ")
    return f"learning rate {optim.learning_rate:g}, {schedule}" + (
        f", warmup {warmup}" if warmup else ""
    )


def describe_model(config: TrainConfig, classifier: Classifier) -> str:
    """The pretrained model: its name, where it is from, type and size."""
    name = config.model.model_name_or_path
    source = "folder" if os.path.isdir(name) else "Hugging Face Hub"
    number = sum(weight.numel() for weight in classifier.parameters())
    kind = classifier.model.config.model_type
    return f"{name} ({source}), {kind}, {count_in_words(number)} parameters"


def describe_frozen(config: TrainConfig, classifier: Classifier) -> str:
    """What is frozen, and what that saves; "" without --freeze."""
    layers = config.model.frozen_layers
    if layers is None:
        return ""
    what = "all but the head" if layers == ALL_LAYERS else "embeddings"
    if 0 < layers < ALL_LAYERS:
        what += f" and the first {layers} layer{'s' * (layers > 1)}"
    frozen, trained = count_parameters(classifier)
    return (
        f"{what}: {count_in_words(trained)} of {count_in_words(frozen + trained)} parameters are "
        f"trained; saves {byte_size(4 * frozen)} of gradients, {byte_size(8 * frozen)} of AdamW "
        "state, and the activations below the first trained layer"
    )


# ---- The end


def show_report(
    screen: Screen, report: Mapping[str, Any], of: str = "", file: str = "evaluation.json"
) -> None:
    """The tables of an evaluation.json: scores per label, and the confusion matrix.

    of: what was evaluated, by default the step; file: where the rest is. Of many labels the lowest
    scores, and the most frequent confusions. In a notebook only the scores, without a table: Run
    and Evaluation have the rest.
    """
    of = of or (f"step {report['step']}" if "step" in report else "")
    if not screen.in_notebook:
        _show_tables(screen, report, of, file)
    screen.say(*report_notes(report))


def _show_tables(screen: Screen, report: Mapping[str, Any], of: str, file: str) -> None:
    classes, labels = report.get("per_class", []), report.get("labels", [])
    if classes:
        shown, title = classes, ", ".join(filter(None, ["Scores per label", of]))
        if len(classes) > SHOWN_LABELS:
            with_rows = [entry for entry in classes if entry["rows"]]
            shown = sorted(with_rows, key=lambda entry: entry["f1"])[:SHOWN_LABELS]
            title += f" (the lowest f1 of {len(classes):,}; all are in {file})"
        rows = [list(map(cell, entry.values())) for entry in shown]
        screen.table(title, list(classes[0]), rows, range(1, len(classes[0])))
    if "confusion" in report and len(labels) <= SHOWN_MATRIX:
        _show_matrix(screen, labels, report["confusion"])
    elif confused := confusions(report)[:SHOWN_MATRIX]:
        rows = [list(map(cell, entry.values())) for entry in confused]
        screen.table("Most frequent confusions", list(confused[0]), rows, [2])
    if scores := report.get("scores"):
        _show_scores(screen, of, scores, report.get("intervals") or {})


def report_notes(report: Mapping[str, Any]) -> list[str]:
    """What an evaluation.json says of its answers: that they are all alike, or all empty; and what
    temperature and thresholds have changed.
    """
    notes = [str(report["note"])] if report.get("note") else []
    notes += calibration_notes(report)
    if (threshold := report.get("suggested_threshold")) is not None:
        notes.append(
            "Every answer is empty: no label of any row has a probability above "
            f"{'its threshold' if 'calibration' in report else 0.5}. With "
            f"--threshold {threshold:.3g} predict gives as many labels as the truth has."
        )
    return notes


def _show_matrix(screen: Screen, labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> None:
    names = [excerpt(label, NAME_COLUMNS) for label in labels]
    heading = list(names)
    if max(map(len, names)) + sum(len(name) + 2 for name in names) > screen.console.width - 2:
        names = [f"{number} {name}" for number, name in enumerate(names)]
        heading = list(map(str, range(len(labels))))
    counts = zip(names, confusion, strict=True)
    rows = [[name, *map(cell, numbers)] for name, numbers in counts]
    title = "Confusion matrix (rows: true, columns: predicted)"
    screen.table(title, ["", *heading], rows, range(1, len(labels) + 1))


def _show_scores(
    screen: Screen, of: str, scores: Mapping[str, Any], intervals: Mapping[str, Any]
) -> None:
    numbers = {name: x for name, x in scores.items() if not isinstance(x, list | dict)}
    rows = [[name, cell(x)] for name, x in numbers.items()]
    header = ["score", "value"]
    if intervals:
        header.append("95% interval")
        for row in rows:
            ends = intervals.get(row[0])
            row.append(" to ".join(map(cell, ends)) if ends else "")
    title = f"Scores of the best weights, {of}" if of else "Scores"
    screen.table(title, header, rows, range(1, len(header)))


def describe_times(meter: ThroughputMeter, seconds: Mapping[str, float], total: float) -> str:
    """Where the time of this process went. total: seconds since its log was opened."""
    values = meter.summary()
    waiting = values["data_wait_seconds"]
    parts = {
        "training": max(0.0, values["train_seconds"] - waiting),
        "waiting for data": waiting,
        **seconds,
    }
    parts["starting"] = max(0.0, total - sum(parts.values()))
    steps, rate = values["train_steps"], values["tokens_per_second"]
    shares = ", ".join(f"{name} {x / total:.0%}" for name, x in parts.items() if x)
    return f"{duration(total)}: {shares}; {steps:,.0f} steps, {rate:,.0f} tokens/s in training"


def show_files(screen: Screen, folder: Path) -> None:
    """What the run has written for its user."""
    present = {name: about for name, about in FILES.items() if (folder / name).exists()}
    for number, (name, about) in enumerate(present.items()):
        screen.block("" if number else "Files", f"{folder / name}: {about}")


def show_commands(screen: Screen, folder: Path, data: DataConfig) -> None:
    """The commands to use the model with. data: of the run."""
    program, model = own_command(), f"--model {shlex.quote(str(folder))}"
    pair = ' --text_pair "..."' if screen.pairs else ""
    screen.block("Next", f'{program} predict {model} --text "..."{pair}', wrap=False)
    rows = shlex.join(_rows_to_evaluate(data))
    screen.block("", f"{program} evaluate {model} {rows}", wrap=False)


def own_command() -> str:
    """How this program is started from the shell: `bertdist` where that is this one."""
    name, python = shutil.which("bertdist"), shutil.which("python")
    if name and Path(name).parent == Path(sys.executable).parent:
        return "bertdist"
    is_same = python and Path(python).parent == Path(sys.executable).parent
    return f"{'python' if is_same else shlex.quote(sys.executable)} -m bertdist"


def _rows_to_evaluate(data: DataConfig) -> list[str]:
    """Flags that name rows with labels: those that the run has scored, else a file like its own.

    The columns are known to the model; how the files are written is not.
    """
    if data.dataset_name or data.task_name:
        flags = [("dataset_name", data.dataset_name), ("task_name", data.task_name)]
        flags += [("dataset_config_name", data.dataset_config_name)]
        flags += [("split", data.test_split or data.validation_split or "test")]
    else:
        scored = data.test_file or data.validation_file
        if scored is None or TEMPORARY in scored:  # rows of Python
            name = (data.train_file or [""])[0].rstrip("/").rsplit("/", 1)[-1]
            scored = f"test{''.join(Path(name).suffixes[-2:]) or '.tsv'}"
        flags = [("input", scored)]
    words = [word for name, value in flags if value for word in (f"--{name}", value)]
    for field in fields(FileConfig):
        value = getattr(data, field.name)
        if value != field.default and field.name not in ("text_column", "text_pair_column"):
            words += [f"--{field.name}", *(value if isinstance(value, list) else [str(value)])]
    return words
