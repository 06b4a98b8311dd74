"""The words of check are checked together, and told together."""

import pytest

from bertdist.core.errors import ConfigError
from bertdist.data_quality.config import FIX_KINDS, read_check_config


def test_words_become_settings() -> None:
    check, data = read_check_config(
        "--train_file a.tsv --test_file b.tsv --model_name_or_path m --max_length 64 --fix c.parquet".split()
    )
    assert (data.train_file, check.test_file, check.max_length, check.fix, check.fix_kinds) == (
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
            "--train_file a --fix out.csv",
            "--fix is 'out.csv'; expected a file that ends in .parquet.",
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
        ("--train_fle a", "Unknown setting 'train_fle'. Did you mean 'train_file'?"),
    ],
)
def test_what_cannot_be_is_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_check_config(words.split())
    assert message in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_check_config("--near_threshold 2 --examples -1 --fix a".split())
    assert len(str(caught.value).splitlines()) == 4
