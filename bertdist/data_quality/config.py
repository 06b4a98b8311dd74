"""Settings of `bertdist check`: flags and YAML -> checked dataclasses.

`read_check_config` reads those of a data report (CheckConfig, and DataConfig for the rows),
`read_label_issue_config` those of --model and --folds, which need all settings of training besides.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from bertdist.core.args import (
    config_problems,
    data_problems,
    fold_problems,
    given_setting_names,
    parse_arguments,
)
from bertdist.core.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Section,
    TaskConfig,
    TrainConfig,
    setting,
)
from bertdist.core.errors import ConfigError, did_you_mean
from bertdist.core.output_files import STDOUT, is_special, output_format, target_of
from bertdist.data import preflight

PROGRAM = "bertdist check"
ABOUT = """Check rows before training: labels, tables, texts, duplicates, leaks and lengths.
With --folds or --model, find label errors: see `bertdist check --folds 5 --help`.
The exit code is 1 where a finding is an error, else 0.

  bertdist check --train_file train.tsv --validation_file dev.tsv \\
      --fix clean.tsv
  bertdist check --train_file train.tsv --folds 5 --output_dir out \\
      --model_name_or_path google-bert/bert-base-uncased"""

FIX_KINDS = (
    *("encoding", "empty", "conflicts", "duplicates", "leaks"),
    *("near_duplicates", "near_leaks"),
)
DEFAULT_FIX_KINDS = FIX_KINDS[:5]

Ranking = Literal[
    "self_confidence",
    "normalized_margin",
    "confidence_weighted_entropy",
    "confident_learning",
]
RANKINGS = get_args(Ranking)
DEFAULT_RANKING = "self_confidence"

# With --model nothing is trained and no split is scored: these flags say where to compute,
INFERENCE_FLAGS = {"tokens_per_micro_batch", "use_cpu", "mixed_precision"}
# and these name rows that are not read.
EVAL_FLAGS = {
    "validation_file",
    "validation_split",
    "max_eval_samples",
    "slice_column",
    "split_seed",
}
# All rows are held in memory and used once, with --folds and with --model.
STREAMING_FLAGS = ("streaming", "stream_window", "stream_sharding", "train_weights")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Section):
    """The settings of a data report, besides those of the rows."""

    _argument_group_name = "check"

    model_name_or_path: str | None = setting(
        None,
        "Model whose tokenizer counts tokens: a folder or a Hub id; without one, characters and "
        "words are counted.",
        brief="Model whose tokenizer counts tokens",
    )
    model_revision: str = setting("main", "Branch, tag or commit of a Hub model.")
    tokenizer_name: str | None = setting(None, "Tokenizer, if it is not the model's own.")
    max_length: int = setting(
        128, "Maximum length in tokens for training; longer texts are counted as truncated."
    )
    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = setting("auto", "Kind of task; auto derives it from the labels.")
    near_threshold: float = setting(
        0.8,
        "Minimum Jaccard similarity (of 5-byte shingles) of near duplicates, from 0.7 to 1; 0 "
        "disables the search.",
    )
    examples: int = setting(3, "Examples to show per finding.")
    seed: int = setting(42, "Seed of --validation_split and --test_split, as in training.")
    output: str | None = setting(
        None,
        "Output file for the report as JSON, such as check.json.",
        brief="File for the report as JSON",
    )
    fix: str | None = setting(
        None,
        "File for the training rows without these problems, with all columns of theirs: .csv, "
        ".tsv, .jsonl (also as .gz) or .parquet by its ending. The list of every dropped, changed "
        "or skipped row with the reason has the same name and .dropped.jsonl.",
        brief="File for the cleaned training rows",
    )
    fix_kinds: list[str] | None = setting(
        None,
        f"Problems that --fix corrects, of: {', '.join(FIX_KINDS)}. "
        f"Default: {', '.join(DEFAULT_FIX_KINDS)}.",
    )


@dataclass(frozen=True, kw_only=True)
class LabelIssueConfig(Section):
    """The settings of --model and --folds, besides those of training."""

    _argument_group_name = "label issues"

    model: str | None = setting(
        None,
        "Folder of a trained classifier, such as out/best, to check the labels with. It should "
        "not have been trained on these rows; for training rows use --folds.",
    )
    rank_by: Ranking | None = setting(
        None,
        "How to sort the rows: a label quality score of cleanlab, or confident_learning: all "
        "likely label errors first. Default: self_confidence.",
    )
    output: str | None = setting(
        None,
        "Output file with one JSON line per row, lowest label quality first; without it only the "
        "table is shown.",
    )


def read_check_arguments(
    args: Sequence[str],
) -> tuple[CheckConfig, DataConfig] | tuple[LabelIssueConfig, TrainConfig]:
    """`read_label_issue_config` with --model or --folds, else `read_check_config`."""
    if {"model", "folds"} & given_setting_names(args):
        return read_label_issue_config(args)
    return read_check_config(args)


def check_start(
    config: tuple[CheckConfig, DataConfig] | tuple[LabelIssueConfig, TrainConfig],
) -> None:
    """Raise BertdistError for what can be seen before torch is imported."""
    first, second = config
    if isinstance(second, TrainConfig) and second.run.folds:
        preflight.check_train(second)
        return
    if isinstance(second, TrainConfig):
        preflight.check_rows(second.data)
    else:  # rows that cannot be read are in the report
        preflight.check_rows(replace(second, on_bad_row="skip"))
    if isinstance(first, LabelIssueConfig):
        preflight.check_model(first.model, "--model")
    else:
        revision = first.model_revision
        preflight.check_model(first.model_name_or_path, "--model_name_or_path", revision)
        preflight.check_tokenizer(first.tokenizer_name)


def read_check_config(args: Sequence[str]) -> tuple[CheckConfig, DataConfig]:
    """Raises ConfigError with one line per problem."""
    data, check = parse_arguments(PROGRAM, [DataConfig, CheckConfig], args, ABOUT)
    assert isinstance(check, CheckConfig) and isinstance(data, DataConfig)
    problems = [*data_problems(replace(data, slice_column=None)), *_check_problems(check, data)]
    if problems:
        raise ConfigError("\n".join(problems))
    return check, data


def _check_problems(check: CheckConfig, data: DataConfig) -> Iterable[str]:
    if data.slice_column is not None:
        yield "--slice_column divides rows to evaluate, and check evaluates none; remove it."
    if check.max_length < 3:
        yield f"--max_length is {check.max_length}; expected at least 3."
    # Pairs of less similarity are found by chance only.
    if check.near_threshold and not 0.7 <= check.near_threshold <= 1:
        yield f"--near_threshold is {check.near_threshold}; expected from 0.7 to 1, or 0."
    if check.examples < 0:
        yield f"--examples is {check.examples}; expected at least 0."
    if check.fix is not None and not _is_named(check.fix):
        yield (
            f"--fix is {check.fix!r}; expected a file that ends in .csv, .tsv, .jsonl or .parquet, "
            "of text also .gz after it."
        )
    if check.fix is not None and data.train_file and (data.validation_split or data.test_split):
        yield (
            "--fix writes all rows of --train_file, before they are divided: remove "
            "--validation_split and --test_split."
        )
    if check.fix is not None and data.max_train_samples:
        yield "--fix writes all rows of --train_file: remove --max_train_samples."
    kinds = check.fix_kinds or ()
    if check.fix_kinds is not None and check.fix is None:
        yield "--fix_kinds goes with --fix."
    for kind in kinds:
        if kind not in FIX_KINDS:
            yield f"--fix_kinds knows no {kind!r}.{did_you_mean(kind, FIX_KINDS)}"
    if check.tokenizer_name is None and check.model_name_or_path is None:
        if check.max_length != CheckConfig.max_length:
            yield "--max_length needs a tokenizer to count tokens: give --model_name_or_path."
        if check.model_revision != CheckConfig.model_revision:
            yield "--model_revision goes with --model_name_or_path."
    if any(kind.startswith("near") for kind in kinds) and not check.near_threshold:
        yield "--fix_kinds near_duplicates and near_leaks need a --near_threshold above 0."


def _is_named(path: str) -> bool:
    """Whether it is a regular file of a known format."""
    return path != STDOUT and not is_special(target_of(Path(path))) and bool(output_format(path))


def read_label_issue_config(args: Sequence[str]) -> tuple[LabelIssueConfig, TrainConfig]:
    """`--model out/best --train_file rows.tsv`, or `--folds 5` and the flags of training.

    The TrainConfig is that of one fold; with --model, what reads the rows and where to compute.
    Raises ConfigError with one line per problem.
    """
    names = ("model", "data", "task", "batch", "optim", "run")
    sections = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
    issues, *rest = parse_arguments(PROGRAM, [LabelIssueConfig, *sections], args, ABOUT)
    assert isinstance(issues, LabelIssueConfig)
    train = TrainConfig(**dict(zip(names, rest, strict=True)))
    if problems := list(_label_issue_problems(issues, train)):
        raise ConfigError("\n".join(problems))
    return issues, train


def _label_issue_problems(issues: LabelIssueConfig, train: TrainConfig) -> Iterable[str]:
    folds = train.run.folds
    if (issues.model is None) == (folds is None):
        yield "Give either a trained model with --model, or --folds to train one per fold."
    elif folds is not None:
        yield from fold_problems(folds)
        if train.run.resume_from_checkpoint:
            yield (
                "--resume_from_checkpoint is for one run; "
                "each fold resumes its own newest checkpoint."
            )
        yield from config_problems(replace(train, run=replace(train.run, folds=None, seeds=None)))
    else:
        if not (train.data.train_file or train.data.dataset_name or train.data.task_name):
            yield "No rows to check: give --train_file, or --dataset_name, or --task_name."
        for section in (train.model, train.data, train.task, train.batch, train.optim, train.run):
            changed = {
                field.name
                for field in dataclasses.fields(section)
                if getattr(section, field.name) != field.default
            }
            data = section is train.data
            for name in sorted(changed & EVAL_FLAGS if data else changed - INFERENCE_FLAGS):
                use = "--model trains nothing and checks the training rows"
                yield f"--{name} is for training; {use}."
    if train.data.test_file is not None:
        yield "--test_file is evaluated at the end of training, not here; remove it."
    for name in STREAMING_FLAGS:
        if getattr(train.data, name) != getattr(DataConfig, name):
            yield f"--{name} has no effect: all rows are held in memory and used once; remove it."
    if train.run.seeds is not None and folds is not None:
        yield "--seeds is for training: each fold is checked by one model; remove it."
    if train.run.dry_run and folds is not None:
        yield "--dry_run is for `bertdist train`; give it the same flags without --folds."
