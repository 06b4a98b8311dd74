"""Flags of check are read, and every mistake is one line."""

from pathlib import Path

import pytest

from bertdist.core.errors import ConfigError
from bertdist.data_quality.config import FIX_KINDS, read_check_config, read_label_issue_config


def test_flags_become_settings() -> None:
    check, data = read_check_config(
        "--train_file a.tsv --test_file b.tsv --model_name_or_path m --max_length 64 "
        "--fix c.parquet".split()
    )
    assert (data.train_file, data.test_file, check.max_length, check.fix, check.fix_kinds) == (
        ["a.tsv"],
        "b.tsv",
        64,
        "c.parquet",
        None,
    )
    check, _ = read_check_config(
        ["--train_file", "a", "--fix", "c.parquet", "--fix_kinds", *FIX_KINDS]
    )
    assert check.fix_kinds == list(FIX_KINDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "No training rows: give --train_file"),
        ("--train_file a --dataset_name b", "both name training rows"),
        (
            "--train_file a --fix out.xlsx",
            "--fix is 'out.xlsx'; expected a file that ends in .csv, .tsv, .jsonl or .parquet, of "
            "text also .gz after it.",
        ),
        (
            "--train_file a --fix out.parquet.gz",
            "--fix is 'out.parquet.gz'; expected a file that ends in .csv, .tsv, .jsonl",
        ),
        (
            "--train_file a --fix /dev/null",
            "--fix is '/dev/null'; expected a file that ends in .csv, .tsv, .jsonl",
        ),
        ("--train_file a --fix_kinds empty", "--fix_kinds goes with --fix."),
        (
            "--train_file a --fix b.parquet --fix_kinds duplicate",
            "--fix_kinds knows no 'duplicate'. Did you mean 'duplicates'?",
        ),
        ("--train_file a --max_length 64", "--max_length needs a tokenizer"),
        (
            "--train_file a --model_name_or_path m --max_length 2",
            "--max_length is 2; expected at least 3.",
        ),
        ("--train_file a --model_revision v1", "--model_revision goes with --model_name_or_path."),
        (
            "--train_file a --near_threshold 1.5",
            "--near_threshold is 1.5; expected from 0.7 to 1, or 0.",
        ),
        (
            "--train_file a --near_threshold 0.5",
            "--near_threshold is 0.5; expected from 0.7 to 1, or 0.",
        ),
        ("--train_file a --examples -1", "--examples is -1; expected at least 0."),
        (
            "--train_file a --near_threshold 0 --fix b.parquet --fix_kinds near_leaks",
            "need a --near_threshold above 0",
        ),
        ("--train_fle a", "Unknown setting --train_fle. Did you mean --train_file?"),
    ],
)
def test_an_invalid_setting_is_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_check_config(words.split())
    assert message in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_check_config("--near_threshold 2 --examples -1 --fix a".split())
    assert len(str(caught.value).splitlines()) == 4


MODEL = ["--model", "out/best", "--train_file", "rows.tsv"]
FOLDS = [
    "--folds",
    "3",
    "--model_name_or_path",
    "M",
    "--train_file",
    "rows.tsv",
    "--output_dir",
    "out",
]


def test_flags_of_model_and_folds_become_settings(tmp_path: Path) -> None:
    words = [
        *MODEL,
        "--use_cpu",
        "--tokens_per_micro_batch",
        "64",
        "--text_column",
        "t",
        "--output",
        str(tmp_path / "x"),
    ]
    issues, train = read_label_issue_config(words)
    assert (issues.model, train.run.folds, train.data.text_column) == (
        "out/best",
        None,
        ["t"],
    )
    (tmp_path / "run.yaml").write_text(
        "folds: 4\nlearning_rate: 1e-4\nvalidation_file: dev.tsv\nrank_by: normalized_margin\n"
    )
    issues, train = read_label_issue_config([*FOLDS[2:], "--config", str(tmp_path / "run.yaml")])
    assert (train.run.folds, train.optim.learning_rate, issues.rank_by) == (
        4,
        1e-4,
        "normalized_margin",
    )


ONE_OF_TWO = "Give either a trained model with --model, or --folds to train one per fold."
FOR_TRAINING = " is for training; --model trains nothing and checks the training rows."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "rows.tsv"], ONE_OF_TWO),
        ([*MODEL, "--folds", "3"], ONE_OF_TWO),
        (MODEL[:2], "No rows to check: give --train_file, or --dataset_name, or --task_name."),
        ([*MODEL, "--learning_rate", "1"], f"--learning_rate{FOR_TRAINING}"),
        ([*MODEL, "--validation_file", "d"], f"--validation_file{FOR_TRAINING}"),
        ([*MODEL, "--max_length", "64"], f"--max_length{FOR_TRAINING}"),
        ([*FOLDS, "--folds", "1"], "--folds is 1; expected at least 2."),
        (
            [*FOLDS, "--streaming"],
            "--streaming has no effect: all rows are held in memory and used once; remove it.",
        ),
        (
            [*MODEL, "--stream_window", "9"],
            "--stream_window has no effect: all rows are held in memory and used once; remove it.",
        ),
        (
            [*FOLDS, "--dry_run"],
            "--dry_run is for `bertdist train`; give it the same flags without --folds.",
        ),
        (
            [*FOLDS, "--resume_from_checkpoint", "c"],
            "--resume_from_checkpoint is for one run; each fold resumes its own newest checkpoint.",
        ),
        (FOLDS[:-2], "--output_dir is missing: the folder that the run writes to."),
        ([*FOLDS, "--learning_rate", "-1"], "--learning_rate is -1.0; expected at least 0."),
        ([*MODEL, "--output", "gone/x.jsonl"], "--output gone/x.jsonl: there is no folder gone."),
    ],
)
def test_an_invalid_label_issue_setting_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_label_issue_config(words)
    assert str(error.value) == message


def test_all_label_issue_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read_label_issue_config(
            [
                *MODEL,
                "--learning_rate",
                "1",
                "--num_train_epochs",
                "2",
                "--output_dir",
                "out",
            ]
        )
    assert len(str(error.value).splitlines()) == 3


def test_an_unknown_ranking_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rank_by: invalid choice: 'margin'"):
        read_label_issue_config([*MODEL, "--rank_by", "margin"])
