"""The words of `python -m bertdist.check` -> settings: those of `config.py` for the data, and its own.

A module of its own, because whoever trains never reads these.

Words of `python -m bertdist.check --model ...` and `--folds ...` -> what is asked about labels, and what a training run would take.

One module beside config.py, because these words stand together with all words of training: --folds trains.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from bertdist.core.args import config_problems, data_problems, parse_arguments
from bertdist.core.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from bertdist.core.errors import ConfigError, did_you_mean

FIX_KINDS = (
    "encoding",
    "empty",
    "conflicts",
    "duplicates",
    "leaks",
    "near_duplicates",
    "near_leaks",
)

USUAL_FIX_KINDS = FIX_KINDS[:5]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    _argument_group_name = "check"

    test_file: str | None = HfArg(
        default=None,
        help="Rows that will be predicted or scored later, with or without labels; read as --train_file is.",
    )
    model_name_or_path: str | None = HfArg(
        default=None,
        help="Model whose tokenizer counts tokens: a folder or a name on the hub; None counts characters and words.",
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a model on the hub.")
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer, where it is not the model's own."
    )
    max_length: int = HfArg(
        default=128,
        help="Longest text in tokens that training will keep; how many rows it truncates is counted.",
    )
    problem_type: Literal[
        "auto", "single_label_classification", "multi_label_classification", "regression"
    ] = HfArg(default="auto", help="Kind of task; auto reads it from the labels.")
    near_threshold: float = HfArg(
        default=0.8,
        help="Texts are near duplicates from this Jaccard similarity of their shingles (5 bytes) on, at least 0.7; 0 does not look for them.",
    )
    examples: int = HfArg(default=3, help="Examples to show of each finding.")
    output: str | None = HfArg(
        default=None, help="Where to write the findings as JSON, such as check.json."
    )
    fix: str | None = HfArg(
        default=None,
        help="Where to write the cleaned training rows, a .parquet file to train on; beside it .dropped.jsonl says what was dropped or changed, and why.",
    )
    fix_kinds: list[str] | None = HfArg(
        default=None,
        help=f"What --fix mends, of: {', '.join(FIX_KINDS)}; None takes {', '.join(USUAL_FIX_KINDS)}.",
    )


def read_check_config(words: Sequence[str]) -> tuple[CheckConfig, DataConfig]:
    """Raises ConfigError with one line a problem."""
    check, data = parse_arguments("python -m bertdist.check", [CheckConfig, DataConfig], words)
    assert isinstance(check, CheckConfig) and isinstance(data, DataConfig)
    problems = list(data_problems(data))
    if check.max_length < 3:
        problems.append(f"--max_length is {check.max_length}; expected at least 3.")
    if (
        check.near_threshold and not 0.7 <= check.near_threshold <= 1
    ):  # what is less alike is found by chance
        problems.append(
            f"--near_threshold is {check.near_threshold}; expected from 0.7 to 1, or 0."
        )
    if check.examples < 0:
        problems.append(f"--examples is {check.examples}; expected at least 0.")
    if check.fix is not None and not check.fix.endswith(".parquet"):
        problems.append(f"--fix is {check.fix!r}; expected a file that ends in .parquet.")
    if check.fix_kinds is not None and check.fix is None:
        problems.append("--fix_kinds goes with --fix.")
    problems += [
        f"--fix_kinds knows no {kind!r}.{did_you_mean(kind, FIX_KINDS)}"
        for kind in check.fix_kinds or ()
        if kind not in FIX_KINDS
    ]
    if check.tokenizer_name is None and check.model_name_or_path is None:
        if check.max_length != CheckConfig.max_length:
            problems.append(
                "--max_length needs a tokenizer to count tokens: give --model_name_or_path."
            )
        if check.model_revision != CheckConfig.model_revision:
            problems.append("--model_revision goes with --model_name_or_path.")
    if any(kind.startswith("near") for kind in check.fix_kinds or ()) and not check.near_threshold:
        problems.append(
            "--fix_kinds near_duplicates and near_leaks need a --near_threshold above 0."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return check, data


@dataclass(frozen=True, kw_only=True)
class LabelIssueConfig:
    _argument_group_name = "doubts about labels"

    model: str | None = HfArg(
        default=None,
        help="Folder of a trained classifier, such as out/best, that judges the labels of the rows. It should not have learned these rows; for rows that it has learned there is --folds.",
    )
    folds: int | None = HfArg(
        default=None,
        help="Cut the rows into so many folds and judge each by a model that was trained on the others, with the flags of training. Runs go to --output_dir/folds.",
    )
    rank_by: (
        Literal[
            "self_confidence",
            "normalized_margin",
            "confidence_weighted_entropy",
            "confident_learning",
        ]
        | None
    ) = HfArg(
        default=None,
        help="What orders the rows: cleanlab's score of this name, or confident_learning: first all rows that are likely to be wrong. None takes self_confidence.",
    )
    output: str | None = HfArg(
        default=None,
        help="Where to write one JSON line a row, the most doubted first; None shows the table only.",
    )


@dataclass(frozen=True, kw_only=True)
class Doubting:
    """All that decides what is doubted."""

    doubts: LabelIssueConfig
    train: TrainConfig  # of one fold; with --model only what reads rows and where to compute


# With --model nothing is trained, and no split is scored. Of the flags of training those that say where to compute are left.
_JUDGING = {"tokens_per_micro_batch", "use_cpu", "mixed_precision"}

_SCORING = {"validation_file", "validation_split", "max_eval_samples"}

# All rows are held at once and judged once, whatever --folds or --model.
_PER_STEP = ("streaming", "stream_window", "stream_sharding", "train_weights")


def read_label_issue_config(words: Sequence[str]) -> Doubting:
    """`--model out/best --train_file rows.tsv ...` or `--folds 5 --model_name_or_path M --train_file rows.tsv --output_dir out ...`.

    Raises ConfigError with one line a problem.
    """
    sections = [
        LabelIssueConfig,
        ModelConfig,
        DataConfig,
        TaskConfig,
        BatchConfig,
        OptimConfig,
        RunConfig,
    ]
    doubts, *rest = parse_arguments("python -m bertdist.check", sections, words)
    train = TrainConfig(
        **dict(zip(("model", "data", "task", "batch", "optim", "run"), rest, strict=True))
    )
    found = Doubting(doubts=doubts, train=train)
    if problems := list(_problems(found)):
        raise ConfigError("\n".join(problems))
    return found


def _problems(config: Doubting) -> Iterable[str]:
    doubts, train = config.doubts, config.train
    if (doubts.model is None) == (doubts.folds is None):
        yield "Give a trained model with --model, or --folds to train one for each part of the rows; one of the two."
    elif doubts.folds is not None:
        if doubts.folds < 2:
            yield f"--folds is {doubts.folds}; expected at least 2."
        if train.run.resume_from_checkpoint:
            yield "--resume_from_checkpoint is for one run; each fold goes on from its own newest checkpoint."
        yield from config_problems(train)
    else:
        if not (train.data.train_file or train.data.dataset_name or train.data.task_name):
            yield "No rows to judge: give --train_file, or --dataset_name, or --task_name."
        for section in (train.model, train.data, train.task, train.batch, train.optim, train.run):
            given = {
                field.name
                for field in dataclasses.fields(section)
                if getattr(section, field.name) != field.default
            }
            idle = given & _SCORING if section is train.data else given - _JUDGING
            yield from (
                f"--{name} is for training; --model takes a model as it is, and judges the training rows."
                for name in sorted(idle)
            )
    for name in _PER_STEP:
        if getattr(train.data, name) != getattr(DataConfig, name):
            yield f"--{name} cannot take effect: all rows are held in memory and judged once; remove it."
    if train.run.dry_run and doubts.folds is not None:
        yield "--dry_run is for train.py; give it the same flags without --folds."
    if doubts.output is not None and not Path(doubts.output).parent.is_dir():
        yield f"--output {doubts.output}: there is no folder {Path(doubts.output).parent}."
