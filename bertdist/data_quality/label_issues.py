"""Labels and what a model says of the same rows -> which labels to doubt, the most doubted first.

In: targets and predictions in the form that a Task gives them (numpy). Out: `Doubts`: a score for every row, the order of doubt, and
which rows are likely to be wrong. Nothing here knows of files, models or ranks.

Probabilities should come from a model that has not learned these rows (`folds.py`): it comes to believe what it learns.

Classification is cleanlab's (confident learning, https://jair.org/index.php/jair/article/view/12125): a label is likely to be wrong where
the model is surer of another label than it is, on average, of the rows that carry that label. What each way of ranking finds is measured
in docs/decisions/0012-label-noise.md. One module, because cleanlab is a door: it is imported when it is needed, and may be missing.

Every row judged by a model that has not learned it: rows -> k folds -> k runs of `train` on all folds but one -> logits.

In: rows with labels and the config of a run. Out: logits for every row, from the model of the run that was not given it.

1. Rows are dealt to folds by label, so that each fold has its share of every label; rows with the same text go to the same fold, since
   a model that has learned one of them has learned all. It is a pure function of texts, labels, seed and k.
2. Run i learns from the rows outside fold i, which are written to folds/i/train.jsonl, with the words of the whole task (kind, labels in
   order), so that all models have the same outputs. It is a run like any other, in folds/i: it goes on where it was stopped, and one that
   has finished is not trained again.
3. best/ of run i answers the rows of fold i. No rows are scored while it trains: what picked the best weights would have seen labels.

One module, because that a model has not learned what it judges is one promise, from the cut to the answer.

Which labels of the rows are likely to be wrong: what `python -m bertdist.check` does with --model or --folds.

    python -m bertdist.check --folds 5 --model_name_or_path MODEL --train_file rows.tsv --output_dir doubted --output doubts.jsonl
    python -m bertdist.check --model out/best --train_file new_rows.tsv --output doubts.jsonl

In: words. Out: a table of the rows that are doubted most, what is taken for what, and a line of JSON for every row, the most doubted first:

    {"row": 7, "file": "rows.tsv", "line": 9, "label": "good", "suggested": "bad", "probability": 0.97, "score": 0.03, "issue": true}

label: as given; suggested: what the model says, and its probability; score: how well the given label stands, 0 to 1; issue: whether
the label is likely to be wrong (label_noise.py). All ranks compute answers, rank 0 ranks and writes.
"""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.atomic_io import atomic_write
from bertdist.core.config import DataConfig, RunConfig, TrainConfig
from bertdist.core.errors import CheckpointError, ConfigError, DataError
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.data.loading import load_records
from bertdist.data.records import Records
from bertdist.data.source import Kept, Placed, SkippedRows
from bertdist.data.stats import create_task, label_stats_of
from bertdist.data.tokenization import open_examples
from bertdist.data_quality.config import Doubting, read_label_issue_config
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import EXIT_STOPPED, check_world, create_accelerator
from bertdist.distributed.preemption import StopSignal
from bertdist.models.classifier import load_model_config, pretrained_labels
from bertdist.predict import Predictor
from bertdist.tasks.tasks import Task
from bertdist.train import train
from bertdist.training.run_logger import RunLogger

RANKINGS = (
    "self_confidence",
    "normalized_margin",
    "confidence_weighted_entropy",
    "confident_learning",
)

DEFAULT_RANKING = "self_confidence"

FAR_OFF = 3.5  # a residual of so many robust standard deviations: Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993


class LabelIssues(NamedTuple):
    """What is to be said of N labels."""

    order: Array  # (N,) int64: rows, the most doubted first; each row once
    scores: Array  # (N,) float64 by row, 0 to 1: how well the label stands
    issues: Array  # (N,) bool by row: the label is likely to be wrong


def rank_label_issues(
    problem_type: str,
    targets: Array,
    predictions: Array,
    probabilities: Array,
    rank_by: str = DEFAULT_RANKING,
) -> LabelIssues:
    """Rank N rows by how much their labels are to be doubted.

    problem_type: the word of Hugging Face configs. targets, predictions: (N,) ids, (N, O) 0/1 rows, or (N,) numbers; probabilities: (N, O),
    not read for regression. rank_by: one of RANKINGS; "confident_learning" puts the rows that are likely to be wrong before all others.
    Raises ConfigError where cleanlab is missing, DataError where the model answers with what is no number.
    """
    assert rank_by in RANKINGS, rank_by
    finite = np.isfinite(predictions).reshape(len(targets), -1).all(1) & np.isfinite(
        probabilities
    ).reshape(len(targets), -1).all(1)
    if not finite.all():
        raise DataError(
            f"The model's answer to row {int(np.argmin(finite))} is not a number: its weights are damaged."
        )
    find: dict[str, Callable[..., tuple[Array, Array]]]
    find = {
        "single_label_classification": _single,
        "multi_label_classification": _multi,
        "regression": _numbers,
    }
    score_by = "normalized_margin" if rank_by == "confident_learning" else rank_by
    with (
        warnings.catch_warnings()
    ):  # cleanlab 2.9 warns of every label of a single row, which it never marks
        warnings.filterwarnings(
            "ignore", message="May not flag all label issues", category=UserWarning
        )
        scores, issues = find[problem_type](
            targets, predictions, probabilities.astype(np.float64), score_by
        )
    first = ~issues if rank_by == "confident_learning" else np.zeros(len(scores), bool)
    return LabelIssues(np.lexsort((np.arange(len(scores)), scores, first)), scores, issues)


def need_cleanlab() -> Any:
    """The package, with the parts that are used here; ConfigError where it is not installed."""
    try:
        import cleanlab.filter
        import cleanlab.multilabel_classification
        import cleanlab.rank
    except ImportError:
        raise ConfigError(
            "Doubting labels needs cleanlab, which is not installed: pip install bertdist[noise]."
        ) from None
    return cleanlab


def _single(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N,) ids, probabilities (N, O) -> scores (N,), issues (N,)."""
    cleanlab = need_cleanlab()
    scores = cleanlab.rank.get_label_quality_scores(targets, probabilities, method=score_by)
    if (
        len(np.unique(targets)) < 2
    ):  # cleanlab 2.9 refuses a single class: there is nothing to compare with
        return scores, predictions != targets
    # As many as confident learning counts, the least probable first: better than its other marks (docs/decisions/0012-label-noise.md).
    issues = cleanlab.filter.find_label_issues(
        targets, probabilities, filter_by="low_self_confidence", n_jobs=1
    )
    return scores, issues & (predictions != targets)


def _multi(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N, O) 0/1, probabilities (N, O) -> scores (N,), issues (N,): a row is one where any of its labels is."""
    cleanlab = need_cleanlab()
    given = targets.astype(np.int64)
    if not given.any():
        raise DataError("No row has a label; expected some that have one.")
    scores = cleanlab.multilabel_classification.get_label_quality_scores(
        _lists(given), probabilities, method=score_by
    )
    mixed = np.flatnonzero(
        given.any(0) & ~given.all(0)
    )  # labels that some rows have and others have not: cleanlab 2.9 takes no others
    issues = (predictions != given)[:, np.setdiff1d(np.arange(given.shape[1]), mixed)].any(1)
    if len(mixed):
        issues |= cleanlab.multilabel_classification.filter.find_label_issues(
            _lists(given[:, mixed]), probabilities[:, mixed], n_jobs=1
        )
    # n_jobs: cleanlab's own processes would be forks of ours, which has torch's threads.
    return scores, issues


def _lists(given: Array) -> list[list[int]]:
    """0/1 rows as cleanlab wants them: lists of ids."""
    return [np.flatnonzero(row).tolist() for row in given]


def _numbers(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets, predictions (N,) numbers -> scores (N,), issues (N,). Score 1: the middle of all residuals; 1/2: their usual size."""
    residuals = predictions.astype(np.float64) - targets
    away = np.abs(residuals - np.median(residuals))
    usual = np.median(away)
    if usual == 0:  # more than half of all rows are told exactly
        usual = away.mean() or 1.0
    return 1 / (1 + away / usual), away > FAR_OFF * 1.4826 * usual


ProblemType: TypeAlias = Literal[
    "single_label_classification", "multi_label_classification", "regression"
]


def cut(targets: Array, groups: Array, folds: int, seed: int) -> Array:
    """(N,) int64: the fold of each row.

    targets: (N,) ids or numbers, or (N, O) 0/1; groups: (N,) int64, rows of one group stay together. Of every label the folds have equally
    many groups, to one; of several labels a row the rarest ones are dealt so; numbers are dealt from the smallest to the largest.
    """
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    columns = targets[first].reshape(len(first), -1).T  # (1 or O, groups)
    columns = columns[
        np.argsort(-columns.sum(1), kind="stable")
    ]  # the rarest label last: lexsort looks at the last key first
    order = np.lexsort((np.random.default_rng(seed).random(len(first)), *columns))
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[order] = np.arange(len(first)) % folds
    return fold_of_group[group_of_row.reshape(-1)]


def groups_of(records: Records) -> Array:
    """(rows,) int64: rows whose texts are equal but for case and white space have the same number."""
    texts = records.texts.to_pylist()
    pairs = [""] * len(texts) if records.pairs is None else records.pairs.to_pylist()
    seen: dict[tuple[str, str], int] = {}
    keys = (
        (" ".join(text.lower().split()), " ".join(pair.lower().split()))
        for text, pair in zip(texts, pairs, strict=True)
    )
    return np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int64, len(texts))


def answers_out_of_fold(
    config: TrainConfig,
    folds: int,
    records: Records,
    targets: Array,
    task: Task,
    accelerator: Accelerator,
    say: Callable[..., None],
) -> Tensor | None:
    """(rows, outputs) float32 on every rank; None where the run was asked to stop: the same call goes on.

    config: of the run; targets: the labels of all rows in the form of the task. Raises DataError where there are too few rows, and what
    `train` raises, such as CheckpointError where the folders hold other runs.
    """
    fold_of_row = cut(targets, groups_of(records), folds, config.run.seed)
    runs = [
        _run_of_fold(config, Path(config.run.output_dir) / "folds" / str(fold), task, records)
        for fold in range(folds)
    ]
    with raise_on_all_ranks(accelerator):
        _enough(fold_of_row, folds, records)
        if accelerator.is_main_process:
            for fold, run in enumerate(runs):
                _write_rows(_file_of(run), records, np.flatnonzero(fold_of_row != fold))
    found: Tensor | None = None
    with StopSignal(config.run.stop_before_time_limit) as stop:
        for fold, run in enumerate(runs):
            held_out = np.flatnonzero(fold_of_row == fold)
            say(
                f"Fold {fold + 1} of {folds}: a model learns from the other {len(records) - len(held_out):,} rows, in {run.run.output_dir}."
            )
            with _process_group_kept():
                if not train(run).finished:
                    return None
            with raise_on_all_ranks(accelerator):
                model = Path(run.run.output_dir) / "best"
                predictor = Predictor(
                    model,
                    tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
                    accelerator=accelerator,
                )
            logits = predictor.logits(subset(records, held_out))
            found = torch.zeros(len(records), logits.shape[1]) if found is None else found
            found[torch.from_numpy(held_out)] = logits
            stopping = [
                stop.requested(accelerator) for _ in range(2)
            ]  # on GPUs a call gives the answer of the one before
            if any(stopping) and fold + 1 < folds:
                say(
                    f"Asked to stop ({stop.reason}) after fold {fold + 1} of {folds}; the same command goes on."
                )
                return None
    return found


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """`train` ends the process group with itself, unless accelerate 1.15 believes that somebody else has launched these processes for it.

    A second group would meet at the same store as the first (torchrun), and find its addresses there.
    """
    before = os.environ.get("FORK_LAUNCHED")
    os.environ["FORK_LAUNCHED"] = "1"
    try:
        yield
    finally:
        os.environ.pop("FORK_LAUNCHED") if before is None else os.environ.update(
            FORK_LAUNCHED=before
        )


def subset(records: Records, rows: Array) -> Records:
    """Some rows as rows of their own, without labels; a message about one names its place in the source."""
    texts, pairs = (
        None if column is None else column.take(rows) for column in (records.texts, records.pairs)
    )
    source = Placed(records.name, False, ((0, Kept(records.where, rows), 0),))
    unlabelled = replace(
        records, label_kind=None, label_values=[], label_codes=None, parts=(), bad=()
    )
    return replace(unlabelled, source=source, texts=texts, pairs=pairs, fingerprint="")


def _enough(fold_of_row: Array, folds: int, records: Records) -> None:
    if (texts := int(fold_of_row.max()) + 1) < folds:  # the first fold gets the first text
        raise DataError(
            f"{records.name} has {texts} different texts, too few for --folds {folds}; expected at least one a fold."
        )


def _run_of_fold(config: TrainConfig, folder: Path, task: Task, records: Records) -> TrainConfig:
    """The run that learns from folder/train.jsonl and scores nothing."""
    pair = None if records.pairs is None else "text_pair"
    kind, plain = cast(ProblemType, task.problem_type), RunConfig()
    names = None if kind == "regression" else list(task.labels)
    return replace(
        config,
        data=DataConfig(
            train_file=[str(folder / "train.jsonl")],
            text_column="text",
            text_pair_column=pair,
            label_column="label",
        ),
        task=replace(
            config.task,
            problem_type=kind,
            label_names=names,
            metrics=None,
            metric_for_best_model=None,
        ),
        run=replace(
            config.run,
            output_dir=str(folder),
            eval_every=plain.eval_every,
            early_stopping_patience=None,
            early_stopping_threshold=plain.early_stopping_threshold,
        ),
    )


def _file_of(run: TrainConfig) -> Path:
    assert run.data.train_file is not None
    return Path(run.data.train_file[0])


def _write_rows(path: Path, records: Records, rows: Array) -> None:
    """Texts and labels as JSON lines, which keep every kind of label as it is."""
    assert records.label_codes is not None
    columns = {"text": records.texts.take(rows).to_pylist()}
    if records.pairs is not None:
        columns["text_pair"] = records.pairs.take(rows).to_pylist()
    columns["label"] = [records.label_values[code] for code in records.label_codes[rows]]
    lines = (
        json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False)
        for values in zip(*columns.values(), strict=True)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}.") from None
    atomic_write(path, "".join(f"{line}\n" for line in lines).encode())


_PLACE = re.compile(
    r"(?P<file>.*) (?:line (?P<line>\d+)|row \d+)", re.DOTALL
)  # as `Records.where` says it

SHOWN_ROWS = 20

SHOWN_PAIRS = 20

SHOWN_CHARACTERS = 60  # of a text


def show_label_issues(words: Sequence[str]) -> int:
    """Doubt the labels that the words name; the exit code: 0, or EXIT_STOPPED where --folds was asked to stop. Raises BertdistError."""
    config = read_label_issue_config(words)
    run = config.train.run
    accelerator = create_accelerator(
        replace(run, report_to=None)
    )  # the folds' runs tell their trackers themselves
    check_world(accelerator.num_processes)
    with raise_on_all_ranks(accelerator):
        log = RunLogger(Path(run.output_dir or "."), enabled=accelerator.is_main_process)
        need_cleanlab()  # now, not after an hour of training
    judge = _judge_with_model if config.doubts.model else _judge_out_of_fold
    judged = judge(config, accelerator, log)
    if judged is None:
        return EXIT_STOPPED
    records, task, targets, logits = judged
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            predictions, probabilities = task.predict(logits)
            doubts = rank_label_issues(
                task.problem_type,
                targets,
                predictions,
                probabilities,
                config.doubts.rank_by or DEFAULT_RANKING,
            )
            entries = list(entries_of(records, task, targets, predictions, probabilities, doubts))
            if config.doubts.output is not None:
                atomic_write(
                    Path(config.doubts.output),
                    b"".join(json.dumps(e, ensure_ascii=False).encode() + b"\n" for e in entries),
                )
            _show(entries, records, config.doubts.output, log)
    accelerator.end_training()
    return 0


Judged = tuple[
    Records, Task, Array, Tensor
]  # rows, their task, their labels in its form, logits (rows, outputs)


def _judge_with_model(config: Doubting, accelerator: Accelerator, log: RunLogger) -> Judged:
    with raise_on_all_ranks(accelerator):
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


def _judge_out_of_fold(config: Doubting, accelerator: Accelerator, log: RunLogger) -> Judged | None:
    train, folds = config.train, config.doubts.folds
    assert folds is not None
    with raise_on_all_ranks(accelerator):
        records = _rows_of(train.data, train.run.output_dir, log)
        task = create_task(
            train.task, label_stats_of(records), pretrained_labels(load_model_config(train.model))
        )
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


def _rows_of(data: DataConfig, output_dir: str, log: RunLogger) -> Records:
    records = load_records(data, "train")
    if records.bad:  # --on_bad_row skip
        path = Path(output_dir) / "bad_rows.jsonl" if output_dir and log.enabled else None
        SkippedRows(data.on_bad_row, data.max_bad_rows, path).take(records.bad)
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
    doubts: LabelIssues,
) -> Iterator[dict[str, Any]]:
    """One dict a row, in the order of doubt; targets, predictions, probabilities in the form of the task."""
    for row in map(int, doubts.order):
        place = _PLACE.fullmatch(records.where(row))
        assert place is not None, records.where(row)
        yield {
            "row": row,
            "file": place["file"],
            "line": int(place["line"]) if place["line"] else None,
            "label": task.label(targets[row]),
            "suggested": task.label(predictions[row]),
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
    entries: Sequence[dict[str, Any]], records: Records, output: str | None, log: RunLogger
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
    text, pair = record.text, record.pair
    words = (text if pair is None else f"{text} / {pair}").split()
    return excerpt(" ".join(words), SHOWN_CHARACTERS)
