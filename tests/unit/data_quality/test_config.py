"""What the words of doubting may be, and what each mistake is told."""

from pathlib import Path

import pytest

from bertdist.core.errors import ConfigError
from bertdist.data_quality.config import read_label_issue_config

JUDGED = ["--model", "out/best", "--train_file", "rows.tsv"]
FOLDED = [
    "--folds",
    "3",
    "--model_name_or_path",
    "M",
    "--train_file",
    "rows.tsv",
    "--output_dir",
    "out",
]


def test_the_words_of_both_ways_are_read(tmp_path: Path) -> None:
    words = [
        *JUDGED,
        "--use_cpu",
        "--tokens_per_micro_batch",
        "64",
        "--text_column",
        "t",
        "--output",
        str(tmp_path / "x"),
    ]
    judged = read_label_issue_config(words)
    assert (judged.doubts.model, judged.doubts.folds, judged.train.data.text_column) == (
        "out/best",
        None,
        "t",
    )
    (tmp_path / "run.yaml").write_text(
        "folds: 4\nlearning_rate: 1e-4\nvalidation_file: dev.tsv\nrank_by: normalized_margin\n"
    )
    folded = read_label_issue_config([*FOLDED[2:], "--config", str(tmp_path / "run.yaml")])
    assert (folded.doubts.folds, folded.train.optim.learning_rate, folded.doubts.rank_by) == (
        4,
        1e-4,
        "normalized_margin",
    )


ONE_OF_TWO = "Give a trained model with --model, or --folds to train one for each part of the rows; one of the two."
FOR_TRAINING = " is for training; --model takes a model as it is, and judges the training rows."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train_file", "rows.tsv"], ONE_OF_TWO),
        ([*JUDGED, "--folds", "3"], ONE_OF_TWO),
        (JUDGED[:2], "No rows to judge: give --train_file, or --dataset_name, or --task_name."),
        ([*JUDGED, "--learning_rate", "1"], f"--learning_rate{FOR_TRAINING}"),
        ([*JUDGED, "--validation_file", "d"], f"--validation_file{FOR_TRAINING}"),
        ([*JUDGED, "--max_length", "64"], f"--max_length{FOR_TRAINING}"),
        ([*FOLDED, "--folds", "1"], "--folds is 1; expected at least 2."),
        (
            [*FOLDED, "--streaming"],
            "--streaming cannot take effect: all rows are held in memory and judged once; remove it.",
        ),
        (
            [*JUDGED, "--stream_window", "9"],
            "--stream_window cannot take effect: all rows are held in memory and judged once; remove it.",
        ),
        (
            [*FOLDED, "--dry_run"],
            "--dry_run is for train.py; give it the same flags without --folds.",
        ),
        (
            [*FOLDED, "--resume_from_checkpoint", "c"],
            "--resume_from_checkpoint is for one run; each fold goes on from its own newest checkpoint.",
        ),
        (FOLDED[:-2], "--output_dir is missing: the folder that the run writes to."),
        ([*FOLDED, "--learning_rate", "-1"], "--learning_rate is -1.0; expected at least 0."),
        ([*JUDGED, "--output", "gone/x.jsonl"], "--output gone/x.jsonl: there is no folder gone."),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_label_issue_config(words)
    assert str(error.value) == told


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read_label_issue_config(
            [
                *JUDGED,
                "--learning_rate",
                "1",
                "--num_train_epochs",
                "2",
                "--output_dir",
                "out",
                "--output",
                "gone/x",
            ]
        )
    assert len(str(error.value).splitlines()) == 4


def test_a_way_of_ranking_that_is_not_known_is_told() -> None:
    with pytest.raises(ConfigError, match="--rank_by: invalid choice: 'margin'"):
        read_label_issue_config([*JUDGED, "--rank_by", "margin"])
