"""Label issues: rows whose label is probably wrong (`bertdist check --folds/--model`).

    bertdist check --folds 5 --model_name_or_path MODEL --train_file rows.tsv \
        --output_dir checked --output label_issues.jsonl
    bertdist check --model out/best --train_file rows.tsv --output label_issues.jsonl

A model predicts every row, and cleanlab compares predictions and labels by confident learning
(https://jair.org/index.php/jair/article/view/12125): a label is a likely error if the model is more
confident in another label than it is, on average, in the rows that have that label. The measured
precision of each ranking is in docs/decisions/0012-label-noise.md.

A model learns wrong labels too, so it should not have been trained on the row. --folds does that by
cross-validation (training/cross_validation.py): run i trains on the rows outside fold i, in
folds/i, and its best/ predicts the rows of fold i. No run has a validation split: choosing the best
weights would let labels of held-out rows in.

The result is a table of the rows of lowest label quality, and one JSON line per row, those first:

    {"row": 7, "file": "rows.tsv", "line": 9, "label": "good", "suggested": "bad",
     "probability": 0.97, "score": 0.03, "issue": true}

label: as given; suggested: the prediction, and its probability; score: label quality from 0 to 1;
issue: whether the label is a likely error. All ranks predict, rank 0 ranks and writes.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertdist.core.atomic_io import to_json
from bertdist.core.config import TrainConfig
from bertdist.core.errors import ConfigError, DataError
from bertdist.core.output_files import write_output
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.data.records import Records
from bertdist.data.source import select_locations
from bertdist.data.tokenization import create_dataset
from bertdist.data_quality.config import DEFAULT_RANKING, RANKINGS, LabelIssueConfig
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.launch import create_accelerator
from bertdist.distributed.launcher import check_world
from bertdist.tasks.tasks import Task
from bertdist.training.cross_validation import Fold, Rows, load_rows, read_rows, train_folds
from bertdist.training.repeated_runs import Train
from bertdist.training.run_lock import FailedStart
from bertdist.training.run_logger import RunLogger

# A residual of this many robust standard deviations is an outlier.
# Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993
OUTLIER = 3.5
MAD_TO_STD = 1.4826  # median absolute deviation -> standard deviation of a normal distribution

SHOWN_ROWS = 20
SHOWN_PAIRS = 20
SHOWN_COLUMNS = 60  # of a text


class LogitPredictor(Protocol):
    """What is needed of `bertdist.Predictor`, which is above this package."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    metadata: dict[str, Any]

    def predict_logits(self, records: Records) -> Tensor:
        """(rows, outputs) float32, the same on every rank."""


PredictorLoader: TypeAlias = Callable[[str | Path], LogitPredictor]  # from the folder of a model


class LabelIssues(NamedTuple):
    """The label quality of N rows."""

    order: Array  # (N,) int64: rows, lowest label quality first
    scores: Array  # (N,) float64 by row, 0 to 1: label quality
    issues: Array  # (N,) bool by row: the label is a likely error


class Predictions(NamedTuple):
    """All rows and what the models predicted."""

    records: Records
    task: Task
    targets: Array  # the labels in the form of the task
    logits: Tensor  # (rows, outputs)


class Commands(NamedTuple):
    """What of the scripts, which are above this package, is needed, and where to compute."""

    train: Train
    load: PredictorLoader
    accelerator: Accelerator
    log: RunLogger


def find_label_issues(
    config: LabelIssueConfig,
    train_config: TrainConfig,
    train: Train,
    predictor: Callable[..., LogitPredictor],
) -> bool:
    """Find, show and write label issues; False if --folds was stopped before the end.

    train, predictor: `train` and `Predictor` of the scripts. Raises BertdistError.
    """
    run = train_config.run
    # The runs of the folds report to trackers themselves.
    accelerator = create_accelerator(replace(run, report_to=None))
    check_world(accelerator.num_processes)
    start = FailedStart(Path(run.output_dir)) if run.output_dir else None
    with start.remove(accelerator) if start is not None else nullcontext():
        return _find_label_issues(config, train_config, train, predictor, accelerator)


def _find_label_issues(
    config: LabelIssueConfig,
    train_config: TrainConfig,
    train: Train,
    predictor: Callable[..., LogitPredictor],
    accelerator: Accelerator,
) -> bool:
    run = train_config.run
    with raise_on_all_ranks(accelerator):
        log = RunLogger(Path(run.output_dir or "."), enabled=accelerator.is_main_process)
        import_cleanlab()  # fail now, not after an hour of training
    tokens = train_config.batch.tokens_per_micro_batch
    load = partial(predictor, tokens_per_micro_batch=tokens, accelerator=accelerator)
    predict = _predict_by_folds if config.model is None else _predict_with_model
    predicted = predict(config, train_config, Commands(train, load, accelerator, log))
    if predicted is None:
        return False
    records, task, targets, logits = predicted
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            arrays = (targets, *task.predict(logits))
            rank_by = config.rank_by or DEFAULT_RANKING
            ranking = rank_label_issues(task.problem_type, *arrays, rank_by)
            entries = list(label_issue_entries(records, task, *arrays, ranking))
            if config.output is not None:
                write_output(config.output, b"".join(map(to_json, entries)))
            show_label_issues(entries, records, config.output, log)
    accelerator.end_training()
    return True


def _predict_with_model(
    config: LabelIssueConfig, train_config: TrainConfig, commands: Commands
) -> Predictions:
    """The predictions of the model of --model."""
    log, data = commands.log, train_config.data
    with raise_on_all_ranks(commands.accelerator):
        assert config.model is not None
        predictor = commands.load(config.model)
        task = predictor.task
        _check_ranking(config, task)
        data = replace(
            data,
            text_column=data.text_column or predictor.metadata.get("text_column"),
            text_pair_column=data.text_pair_column or predictor.metadata.get("text_pair_column"),
        )
        # --output_dir is refused with --model.
        records = read_rows(data, "", log, task.problem_type == "regression")
        examples = create_dataset(records, predictor.tokenizer, task, predictor.max_length)
    log.say(f"{config.model} checks the labels of {len(records):,} rows of {records.name}.")
    log.say("It misses label errors in rows that it was trained on; for those use --folds.")
    logits = predictor.predict_logits(select_rows(records, np.arange(len(records))))
    return Predictions(records, task, examples.targets, logits)


def _predict_by_folds(
    config: LabelIssueConfig, train_config: TrainConfig, commands: Commands
) -> Predictions | None:
    """The cross-validated predictions of --folds; None if stopped."""
    data, log = train_config.data, commands.log
    unused = data.validation_file or data.validation_split or data.test_split
    train_config = replace(  # every label is checked
        train_config, data=replace(data, validation_split=None, test_split=None)
    )
    with raise_on_all_ranks(commands.accelerator):
        rows = load_rows(train_config, log)
        _check_ranking(config, rows.task)
    if unused:
        log.say("The validation split is not used: each fold keeps its last weights.")
    logits = predict_out_of_fold(train_config, rows, commands)
    return None if logits is None else Predictions(*rows, logits)


def _check_ranking(config: LabelIssueConfig, task: Task) -> None:
    if task.problem_type == "regression" and config.rank_by:
        raise ConfigError(
            f"--rank_by {config.rank_by} is for classification; these labels are numbers, ranked "
            "by their residuals."
        )


def predict_out_of_fold(config: TrainConfig, rows: Rows, commands: Commands) -> Tensor | None:
    """(rows, outputs) float32 logits on every rank; None if stopped: the same call then resumes.

    Raises as `train_folds`.
    """
    logits: list[Tensor] = []

    def predict(fold: Fold) -> None:
        with raise_on_all_ranks(commands.accelerator):
            predictor = commands.load(fold.folder / "best")
        of_fold = predictor.predict_logits(select_rows(rows.records, fold.rows))
        if not logits:
            logits.append(torch.zeros(len(rows.records), of_fold.shape[1]))
        logits[0][torch.from_numpy(fold.rows)] = of_fold

    finished = train_folds(
        config, rows, commands.train, commands.accelerator, commands.log, predict, scored=False
    )
    return logits[0] if finished else None


def select_rows(records: Records, rows: Array) -> Records:
    """Some rows, without labels; messages about them name their location in the source."""
    return replace(
        records,
        location=select_locations(records.location, rows),
        texts=records.texts.take(rows),
        pairs=None if records.pairs is None else records.pairs.take(rows),
        label_kind=None,
        label_values=[],
        label_indices=None,
        fingerprint="",
        rows_per_file=(),
        bad_rows=(),
    )


# Ranking.


def rank_label_issues(
    problem_type: str,
    targets: Array,
    predictions: Array,
    probabilities: Array,
    rank_by: str = DEFAULT_RANKING,
) -> LabelIssues:
    """Rank N rows by label quality.

    problem_type: as in Hugging Face configs. targets, predictions: (N,) ids, (N, O) 0/1, or (N,)
    numbers; probabilities: (N, O), unused for regression. rank_by: of RANKINGS.
    Raises ConfigError if cleanlab is missing, DataError if a prediction is not finite.
    """
    assert rank_by in RANKINGS, rank_by
    finite = np.isfinite(np.c_[predictions, probabilities]).all(1)
    if not finite.all():
        raise DataError(
            f"The prediction for row {int(np.argmin(finite))} is not a number: the model's weights "
            "are damaged."
        )
    rank: Callable[[Array, Array, Array, str], tuple[Array, Array]]
    rank = {
        "single_label_classification": _rank_single_label,
        "multi_label_classification": _rank_multi_label,
        "regression": _rank_regression,
    }[problem_type]
    score_by = "normalized_margin" if rank_by == "confident_learning" else rank_by
    with warnings.catch_warnings():
        # cleanlab 2.9 warns of every label with a single row, which it never flags.
        message = "May not flag all label issues"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
        scores, issues = rank(targets, predictions, probabilities.astype(np.float64), score_by)
    first = ~issues if rank_by == "confident_learning" else np.zeros(len(scores), bool)
    return LabelIssues(np.lexsort((np.arange(len(scores)), scores, first)), scores, issues)


def import_cleanlab() -> Any:
    """The package with the modules that are used here; ConfigError if it is not installed."""
    try:
        import cleanlab.filter
        import cleanlab.multilabel_classification
        import cleanlab.rank
    except ImportError:
        raise ConfigError(
            "Finding label issues needs cleanlab, which is not installed: "
            "pip install 'bertdist[noise]'."
        ) from None
    return cleanlab


def _rank_single_label(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N,) ids, probabilities (N, O) -> scores (N,), issues (N,)."""
    cleanlab = import_cleanlab()
    scores = cleanlab.rank.get_label_quality_scores(targets, probabilities, method=score_by)
    if len(np.unique(targets)) < 2:  # cleanlab 2.9 refuses a single class
        return scores, predictions != targets
    # As many as confident learning counts, the least probable first: more precise than its other
    # filters (docs/decisions/0012-label-noise.md).
    issues = cleanlab.filter.find_label_issues(
        targets, probabilities, filter_by="low_self_confidence", n_jobs=1
    )
    return scores, issues & (predictions != targets)


def _rank_multi_label(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets (N, O) 0/1, probabilities (N, O) -> scores (N,), issues (N,): any label is wrong."""
    cleanlab = import_cleanlab()
    given = targets.astype(np.int64)
    if not given.any():
        raise DataError("No row has a label; expected some that have one.")
    scores = cleanlab.multilabel_classification.get_label_quality_scores(
        _label_lists(given), probabilities, method=score_by
    )
    # cleanlab 2.9 takes only labels that some rows have and others have not.
    mixed = given.any(0) & ~given.all(0)
    issues = (predictions != given)[:, ~mixed].any(1)
    if mixed.any():
        # n_jobs: cleanlab's own processes would be forks of this one, which has torch's threads.
        issues |= cleanlab.multilabel_classification.filter.find_label_issues(
            _label_lists(given[:, mixed]), probabilities[:, mixed], n_jobs=1
        )
    return scores, issues


def _label_lists(given: Array) -> list[list[int]]:
    """0/1 rows as cleanlab takes them: lists of ids."""
    return [np.flatnonzero(row).tolist() for row in given]


def _rank_regression(
    targets: Array, predictions: Array, probabilities: Array, score_by: str
) -> tuple[Array, Array]:
    """targets, predictions (N,) numbers -> scores (N,), issues (N,).

    The score is 1 at the median residual and 1/2 at one median absolute deviation from it.
    """
    residuals = predictions.astype(np.float64) - targets
    deviations = np.abs(residuals - np.median(residuals))
    scale = np.median(deviations)
    if scale == 0:  # more than half of all rows are predicted exactly
        scale = deviations.mean() or 1.0
    return 1 / (1 + deviations / scale), deviations > OUTLIER * MAD_TO_STD * scale


# Output.


def label_issue_entries(
    records: Records,
    task: Task,
    targets: Array,
    predictions: Array,
    probabilities: Array,
    ranking: LabelIssues,
) -> Iterator[dict[str, Any]]:
    """One dict per row, lowest label quality first; arrays in the form of the task."""
    for row in map(int, ranking.order):
        location = records.location(row)
        yield {
            "row": row,
            "file": location.file,
            "line": location.line,
            "label": task.decode_target(targets[row]),
            "suggested": task.decode_target(predictions[row]),
            **_probability(targets[row], predictions[row], probabilities[row]),
            "score": round(float(ranking.scores[row]), 6),
            "issue": bool(ranking.issues[row]),
        }


def _probability(target: Any, prediction: Any, probabilities: Array) -> dict[str, float]:
    """Of the suggested label; multi-label: the highest that a label is wrong; regression: none."""
    if np.ndim(target):
        wrong = np.where(np.asarray(target) > 0.5, 1 - probabilities, probabilities)
        return {"probability": round(float(wrong.max()), 6)}
    if isinstance(prediction, np.integer):
        return {"probability": round(float(probabilities[prediction]), 6)}
    return {}


def label_changes(given: Any, suggested: Any) -> list[tuple[str, str]]:
    """[("positive", "negative")]; multi-label: [("joy", "(none)"), ...]; empty for numbers."""
    if isinstance(given, list):
        removed = [(label, "(none)") for label in given if label not in suggested]
        return removed + [("(none)", label) for label in suggested if label not in given]
    return [(given, suggested)] if isinstance(given, str) and given != suggested else []


def show_label_issues(
    entries: Sequence[dict[str, Any]], records: Records, output: str | None, log: RunLogger
) -> None:
    """Show the rows of lowest label quality, the most frequent label changes, and the counts."""
    issues = [entry for entry in entries if entry["issue"]]
    measure = "probability" if "probability" in entries[0] else "score"  # regression: score
    files = ["file"] if len({entry["file"] for entry in entries}) > 1 else []
    rows = []
    for entry in entries[:SHOWN_ROWS]:
        source = [str(entry["row"]), *(entry[name] for name in files), str(entry["line"] or "")]
        labels = [_label_text(entry["label"]), _label_text(entry["suggested"])]
        rows.append(
            [*source, *labels, f"{entry[measure]:.3f}", _text_excerpt(records, entry["row"])]
        )
    header = ["row", *files, "line", "label", "predicted", measure, "text"]
    log.screen.table(f"Lowest label quality in {records.name}", header, rows)
    changes = Counter(
        change for entry in issues for change in label_changes(entry["label"], entry["suggested"])
    )
    if changes:
        counted = [[*change, str(count)] for change, count in changes.most_common(SHOWN_PAIRS)]
        log.screen.table("Likely label errors", ["label", "predicted", "rows"], counted)
    share = f"{len(issues) / len(entries):.1%}"
    log.say(f"{len(issues):,} of {len(entries):,} labels ({share}) are likely errors.")
    log.say(
        f"All rows, lowest label quality first: {output}"
        if output
        else "--output label_issues.jsonl writes all rows, lowest label quality first."
    )


def _label_text(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(label) or "(none)"
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _text_excerpt(records: Records, row: int) -> str:
    record = records[row]
    text = record.text if record.pair is None else f"{record.text} / {record.pair}"
    return excerpt(" ".join(text.split()), SHOWN_COLUMNS)
