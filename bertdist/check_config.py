"""The words of `python -m bertdist.check` -> settings: those of `config.py` for the data, and its own.

A module of its own, because whoever trains never reads these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from bertdist.command_line import data_problems
from bertdist.config import DataConfig
from bertdist.errors import ConfigError, did_you_mean
from bertdist.words import read_words

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
    check, data = read_words("python -m bertdist.check", [CheckConfig, DataConfig], words)
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
