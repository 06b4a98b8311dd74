"""Which labels of the rows are likely to be wrong: what `python -m bertdist.check` does with --model or --folds.

    python -m bertdist.check --folds 5 --model_name_or_path MODEL --train_file rows.tsv --output_dir doubted --output doubts.jsonl
    python -m bertdist.check --model out/best --train_file new_rows.tsv --output doubts.jsonl

In: words. Out: a table of the rows that are doubted most, what is taken for what, and a line of JSON for every row, the most doubted first:

    {"row": 7, "file": "rows.tsv", "line": 9, "label": "good", "suggested": "bad", "probability": 0.97, "score": 0.03, "issue": true}

label: as given; suggested: what the model says, and its probability; score: how well the given label stands, 0 to 1; issue: whether
the label is likely to be wrong (label_noise.py). All ranks compute answers, rank 0 ranks and writes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from bertdist.begin import open_accelerator, task_of_rows
from bertdist.classifier import labels_of, load_settings
from bertdist.config import DataConfig
from bertdist.console import RunLog, write_whole
from bertdist.doubts_config import Doubting, read_doubts_config
from bertdist.encoding import open_examples
from bertdist.errors import ConfigError
from bertdist.folds import answers_out_of_fold, subset
from bertdist.known import labels_in
from bertdist.label_noise import DEFAULT_RANKING, Doubts, find_doubts, need_cleanlab
from bertdist.pieces import BadRows
from bertdist.predict import Predictor
from bertdist.ranks import together
from bertdist.records import Records
from bertdist.slurm import check_world
from bertdist.sources import open_source
from bertdist.tasks import Array, Task
from bertdist.train import STOPPED

_PLACE = re.compile(
    r"(?P<file>.*) (?:line (?P<line>\d+)|row \d+)", re.DOTALL
)  # as `Records.where` says it
SHOWN_ROWS = 20
SHOWN_PAIRS = 20
SHOWN_CHARACTERS = 60  # of a text


def show_doubts(words: Sequence[str]) -> int:
    """Doubt the labels that the words name; the exit code: 0, or STOPPED where --folds was asked to stop. Raises BertdistError."""
    config = read_doubts_config(words)
    run = config.train.run
    accelerator = open_accelerator(
        replace(run, report_to=None)
    )  # the folds' runs tell their trackers themselves
    check_world(accelerator.num_processes)
    with together(accelerator):
        log = RunLog(Path(run.output_dir or "."), enabled=accelerator.is_main_process)
        need_cleanlab()  # now, not after an hour of training
    judge = _judge_with_model if config.doubts.model else _judge_out_of_fold
    judged = judge(config, accelerator, log)
    if judged is None:
        return STOPPED
    records, task, targets, logits = judged
    with together(accelerator):
        if accelerator.is_main_process:
            predictions, probabilities = task.read(logits)
            doubts = find_doubts(
                task.problem_type,
                targets,
                predictions,
                probabilities,
                config.doubts.rank_by or DEFAULT_RANKING,
            )
            entries = list(entries_of(records, task, targets, predictions, probabilities, doubts))
            if config.doubts.output is not None:
                write_whole(
                    Path(config.doubts.output),
                    b"".join(json.dumps(e, ensure_ascii=False).encode() + b"\n" for e in entries),
                )
            _show(entries, records, config.doubts.output, log)
    accelerator.end_training()
    return 0


Judged = tuple[
    Records, Task, Array, Tensor
]  # rows, their task, their labels in its form, logits (rows, outputs)


def _judge_with_model(config: Doubting, accelerator: Accelerator, log: RunLog) -> Judged:
    with together(accelerator):
        assert config.doubts.model is not None
        room = config.train.batch.tokens_per_micro_batch
        predictor = Predictor(
            config.doubts.model, tokens_per_micro_batch=room, accelerator=accelerator
        )
        _check_ranking(config, predictor.task)
        data, notes = config.train.data, predictor.notes
        if data.text_column is None and data.text_pair_column is None:
            data = replace(
                data,
                text_column=notes.get("text_column"),
                text_pair_column=notes.get("text_pair_column"),
            )
        records = _rows_of(data, config.train.run.output_dir, log)
        targets = open_examples(
            records, predictor.tokenizer, predictor.task, predictor.max_length
        ).targets
    log.say(f"{config.doubts.model} judges the labels of {len(records):,} rows of {records.name}.")
    log.say("What it has learned it doubts too little: --folds trains models that have not.")
    logits = predictor.logits(subset(records, np.arange(len(records))))
    return records, predictor.task, targets, logits


def _judge_out_of_fold(config: Doubting, accelerator: Accelerator, log: RunLog) -> Judged | None:
    train, folds = config.train, config.doubts.folds
    assert folds is not None
    with together(accelerator):
        records = _rows_of(train.data, train.run.output_dir, log)
        task = task_of_rows(train.task, labels_in(records), labels_of(load_settings(train.model)))
        _check_ranking(config, task)
        assert records.label_codes is not None
        targets = np.array([task.target(value) for value in records.label_values])[
            records.label_codes
        ]
    if train.data.validation_file or train.data.validation_split:
        log.say(
            "The validation rows are not read: each fold keeps its last weights, so that nothing but its own rows has a say in them."
        )
    logits = answers_out_of_fold(train, folds, records, targets, task, accelerator, log.say)
    return None if logits is None else (records, task, targets, logits)


def _rows_of(data: DataConfig, output_dir: str, log: RunLog) -> Records:
    records = open_source(data, "train")
    if records.bad:  # --on_bad_row skip
        path = Path(output_dir) / "bad_rows.jsonl" if output_dir and log.enabled else None
        BadRows(data.on_bad_row, data.max_bad_rows, path).take(records.bad)
        log.say(
            f"{len(records.bad):,} rows that cannot be read are left out{f', see {path}' if path else ''}."
        )
    return records


def _check_ranking(config: Doubting, task: Task) -> None:
    if task.problem_type == "regression" and config.doubts.rank_by:
        raise ConfigError(
            f"--rank_by {config.doubts.rank_by} is for labels; these are numbers, ranked by how far off they are."
        )


def entries_of(
    records: Records,
    task: Task,
    targets: Array,
    predictions: Array,
    probabilities: Array,
    doubts: Doubts,
) -> Iterator[dict[str, Any]]:
    """One dict a row, in the order of doubt; targets, predictions, probabilities in the form of the task."""
    for row in map(int, doubts.order):
        place = _PLACE.fullmatch(records.where(row))
        assert place is not None, records.where(row)
        yield {
            "row": row,
            "file": place["file"],
            "line": int(place["line"]) if place["line"] else None,
            "label": task.name(targets[row]),
            "suggested": task.name(predictions[row]),
            **_probability(targets[row], predictions[row], probabilities[row]),
            "score": round(float(doubts.scores[row]), 6),
            "issue": bool(doubts.issues[row]),
        }


def _probability(target: Any, prediction: Any, probabilities: Array) -> dict[str, float]:
    """Of the suggested label; of several labels a row, that of the surest word against the given ones; nothing for numbers."""
    if np.ndim(target):
        against = np.where(np.asarray(target) > 0.5, 1 - probabilities, probabilities)
        return {"probability": round(float(against.max()), 6)}
    if isinstance(prediction, np.integer):
        return {"probability": round(float(probabilities[prediction]), 6)}
    return {}


def differences(given: Any, suggested: Any) -> list[tuple[str, str]]:
    """What is taken for what: [("positive", "negative")]; of several labels a row [("joy", "(not given)"), ...]; none of numbers."""
    if isinstance(given, list):
        gone = [(label, "(without)") for label in given if label not in suggested]
        return gone + [("(without)", label) for label in suggested if label not in given]
    return [(given, suggested)] if isinstance(given, str) and given != suggested else []


def _show(
    entries: Sequence[dict[str, Any]], records: Records, output: str | None, log: RunLog
) -> None:
    """The table, the counts, and where the rest is."""
    issues = [entry for entry in entries if entry["issue"]]
    measure = (
        "probability" if "probability" in entries[0] else "score"
    )  # numbers have no probability
    several = len({entry["file"] for entry in entries}) > 1
    rows = []
    for entry in entries[:SHOWN_ROWS]:
        place = [
            str(entry["row"]),
            *([entry["file"]] if several else []),
            "" if entry["line"] is None else str(entry["line"]),
        ]
        said = [_words(entry["label"]), _words(entry["suggested"]), f"{entry[measure]:.3f}"]
        rows.append([*place, *said, _excerpt(records, entry["row"])])
    header = [
        "row",
        *(["file"] if several else []),
        "line",
        "given",
        "the model says",
        measure,
        "text",
    ]
    log.table(f"The most doubted labels of {records.name}", header, rows)
    pairs = Counter(
        pair for entry in issues for pair in differences(entry["label"], entry["suggested"])
    )
    if pairs:
        counted = [
            [given, suggested, str(count)]
            for (given, suggested), count in pairs.most_common(SHOWN_PAIRS)
        ]
        log.table(
            "Labels that are likely to be wrong", ["given", "the model says", "rows"], counted
        )
    share = 100 * len(issues) / len(entries)
    log.say(f"{len(issues):,} of {len(entries):,} labels ({share:.1f}%) are likely to be wrong.")
    log.say(
        f"All rows in the order of doubt: {output}"
        if output
        else "--output doubts.jsonl writes all rows in the order of doubt."
    )


def _words(label: Any) -> str:
    return (
        ", ".join(label) or "(none)"
        if isinstance(label, list)
        else f"{label:.4g}"
        if isinstance(label, float)
        else str(label)
    )


def _excerpt(records: Records, row: int) -> str:
    record = records[row]
    text = " ".join(
        (record.text if record.pair is None else f"{record.text} / {record.pair}").split()
    )
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
