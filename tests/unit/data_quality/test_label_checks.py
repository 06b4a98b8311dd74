"""Every label problem is found where it was planted, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds
from rows import write_rows

from bertdist.core.args import read_config
from bertdist.core.config import DataConfig, TaskConfig, TrainConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import load_splits
from bertdist.data.records import Records
from bertdist.data.tokenization import create_dataset
from bertdist.data_quality.report import check_data
from bertdist.tasks.tasks import create_task


def with_labels(labels: list[Any], seed: int = 0) -> list[dict[str, Any]]:
    return [
        {**row, "label": label}
        for row, label in zip(clean_rows(len(labels), seed), labels, strict=True)
    ]


def test_clean_rows_have_no_finding(tmp_path: Path) -> None:
    assert kinds(check_rows(tmp_path, clean_rows(60), clean_rows(20, 1), clean_rows(20, 2))) == []


def test_labels_are_counted_by_name_in_every_split(tmp_path: Path) -> None:
    found = check_rows(
        tmp_path, with_labels([1] * 30 + [0] * 20), with_labels(["0"] * 10 + ["1"] * 10, 1)
    )
    assert found.labels["train"].counts() == {"1": 30, "0": 20} and found.labels[
        "validation"
    ].counts() == {"0": 10, "1": 10}  # type: ignore[union-attr]
    assert kinds(found) == []


def test_a_label_that_train_lacks_is_an_error_and_one_that_validation_lacks_a_note(
    tmp_path: Path,
) -> None:
    found = check_rows(
        tmp_path,
        with_labels(["a"] * 20 + ["b"] * 20 + ["c"] * 20),
        with_labels(["a", "a", "a.", "b"], 1),
    )
    assert kinds(found) == [
        ("unknown_labels", "error", "validation", 1),
        ("missing_labels", "note", "validation", 1),
    ]
    error = get_finding(found, "unknown_labels", "validation")
    assert "'a.' 1" in error.meaning and "Did you mean 'a'?" in error.meaning
    assert (error.examples[0].row, error.examples[0].note) == (
        2,
        "label 'a.'",
    ) and "'c'" in get_finding(found, "missing_labels", "validation").meaning


def test_a_single_label_and_labels_that_are_ids_are_errors(tmp_path: Path) -> None:
    assert kinds(check_rows(tmp_path, with_labels(["a"] * 20))) == [
        ("single_label", "error", "train", 20)
    ]
    assert kinds(check_rows(tmp_path, with_labels([f"id{row}" for row in range(40)]))) == [
        ("labels_like_ids", "warning", "train", 40)  # as in training, which refuses it from 50 on
    ]
    found = check_rows(tmp_path, with_labels([f"id{row}" for row in range(60)]))
    assert kinds(found) == [("labels_like_ids", "error", "train", 60)]
    assert "has 60 different labels in 60 rows" in get_finding(found, "labels_like_ids").meaning
    assert kinds(check_rows(tmp_path, with_labels([f"id{row // 20}" for row in range(40)]))) == []


REFUSED = {  # training rows, validation rows (None: no such split)
    "one label": (["a"] * 20, None),
    "ids": ([f"id{row}" for row in range(60)], None),
    "no label": ([[]] * 20, None),
    "unknown": (["a", "b"] * 10, ["a", "b", "c", "d", "d"]),
    "unknown in a list": ([["a"], ["b"]] * 10, [["a"], ["a", "c"]]),
    "not a list": ([["a"], ["b"]] * 10, ["a", "b"]),
    "not a number": ([row / 4 for row in range(20)], ["1.5", "good"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_what_training_refuses_in_the_same_words(name: str, tmp_path: Path) -> None:
    train, validation = REFUSED[name]
    splits = [with_labels(train), with_labels(validation, 1) if validation else None]
    found = check_rows(tmp_path, *splits, near_threshold=0)
    (error,) = [finding for finding in found.findings if finding.severity == "error"]
    words = "--model_name_or_path m --output_dir o --train_file"
    words = f"{words} {tmp_path / 'train.jsonl'}"
    if validation:
        words += f" --validation_file {tmp_path / 'validation.jsonl'}"
    with pytest.raises(DataError) as refused:
        refuse_labels(read_config(words.split()))
    location, _, message = str(refused.value).rpartition(".jsonl line ")
    if location:  # of a row: the first example
        line, _, message = message.partition(": ")
        assert error.examples[0].where == f"validation.jsonl line {line}"
    assert message in error.meaning and message


def test_words_where_regression_is_asked_for_are_an_error_as_in_training(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", clean_rows(20))
    data = DataConfig(train_file=[str(path)])
    found = check_data(data, task=TaskConfig(problem_type="regression"), near_threshold=0)
    assert kinds(found) == [("refused_labels", "error", "train", 20)]
    error = get_finding(found, "refused_labels")
    words = f"--model_name_or_path m --output_dir o --problem_type regression --train_file {path}"
    with pytest.raises(DataError) as refused:
        refuse_labels(read_config(words.split()))
    location, message = str(refused.value).split(": ", 1)
    assert error.examples[0].where == location and message in error.meaning


def refuse_labels(config: TrainConfig) -> None:
    """What training does with labels before its first step."""
    train, validation, _ = load_splits(config)
    assert isinstance(train, Records)
    task = create_task(config.task, train.label_stats(), None)
    for records in (train, validation):
        if records is not None:
            create_dataset(records, None, task, 128)  # type: ignore[arg-type]


def test_good_labels_are_not_refused(tmp_path: Path) -> None:
    check_rows(tmp_path, clean_rows(40), clean_rows(20, 1))
    words = f"--model_name_or_path m --output_dir o --train_file {tmp_path / 'train.jsonl'}"
    refuse_labels(read_config(words.split()))


def test_unknown_labels_of_a_test_file_are_an_error_as_in_training(tmp_path: Path) -> None:
    rows = with_labels(["a", "b"] * 20)
    found = check_rows(tmp_path, rows, test=with_labels(["a", "?"], 1), near_threshold=0)
    assert kinds(found)[0] == ("unknown_labels", "error", "test", 1)


def test_rare_labels_and_imbalance(tmp_path: Path) -> None:
    found = check_rows(tmp_path, with_labels(["a"] * 200 + ["b"] * 20 + ["c"] * 3))
    assert kinds(found) == [
        ("rare_labels", "warning", "train", 1),
        ("imbalance", "note", "train", 200),
    ]
    assert (
        "'c' 3" in get_finding(found, "rare_labels").meaning
        and "67 times" in get_finding(found, "imbalance").title
    )
    assert "89.7%" in get_finding(found, "imbalance").meaning
    assert (
        kinds(check_rows(tmp_path, with_labels(["a"] * 90 + ["b"] * 10))) == []
    )  # the control: 9 times, and 10 rows


def test_labels_that_differ_only_in_case_or_white_space(tmp_path: Path) -> None:
    found = check_rows(tmp_path, with_labels(["spam"] * 20 + ["Spam "] * 10 + ["ham"] * 20))
    assert kinds(found) == [("labels_alike", "warning", "train", 10)]


def test_joined_labels_are_one_error_that_names_the_flag(tmp_path: Path) -> None:
    labels = [["27", "2,5", "5", "2", "27,5", "2"][row % 6] for row in range(60)]
    found = check_rows(tmp_path, with_labels(labels), ending="tsv", near_threshold=0)
    assert kinds(found) == [("refused_labels", "error", "train", 60)]  # and no rare labels
    assert "--label_delimiter ','" in get_finding(found, "refused_labels").meaning
    split = check_rows(
        tmp_path, with_labels(labels), ending="tsv", near_threshold=0, label_delimiter=","
    )
    assert kinds(split) == [] and split.problem_type == "multi_label_classification"


def test_the_row_that_the_message_names_is_the_first_example(tmp_path: Path) -> None:
    labels = ["1 0 0", *["0 1 0"] * 30, "1 1 0"]  # not the most frequent label
    found = check_rows(tmp_path, with_labels(labels), ending="tsv", near_threshold=0)
    refused = get_finding(found, "refused_labels")
    assert refused.meaning.startswith("train.tsv line 2: label '1 0 0'")
    assert [example.where for example in refused.examples] == [
        f"train.tsv line {line}" for line in (2, 3, 33)
    ]


def test_multi_label_rows_without_a_label(tmp_path: Path) -> None:
    sets = [["a", "b"], ["a"], ["b"], []] * 10
    found = check_rows(tmp_path, with_labels(sets), with_labels([["b", "a"], ["a"]], 1))
    assert kinds(found) == [("rows_without_a_label", "note", "train", 10)]
    assert dict(get_finding(found, "rows_without_a_label").details) == {
        "mean_labels": 1.0,
        "most_labels": 2,
    }
    assert found.problem_type == "multi_label_classification"
    assert kinds(check_rows(tmp_path, with_labels([[]] * 20)))[0] == (
        "single_label",
        "error",
        "train",
        20,
    )
    mostly = check_rows(tmp_path, with_labels([[], [], [], ["a"], ["b"]] * 10))
    assert kinds(mostly) == [("rows_without_a_label", "warning", "train", 30)]
    assert kinds(check_rows(tmp_path, with_labels([["a"], ["b"]] * 10))) == []


def test_regression_outliers_and_range(tmp_path: Path) -> None:
    numbers = [round(row / 10, 1) + 0.05 for row in range(50)]
    found = check_rows(tmp_path, with_labels([*numbers, 900.5]), with_labels([1.25, 2.5, -3.5], 1))
    assert kinds(found) == [
        ("outliers", "warning", "train", 1),
        ("outside_range", "warning", "validation", 1),
    ]
    assert (
        get_finding(found, "outliers").examples[0].note == "label 900.5"
        and get_finding(found, "outside_range", "validation").examples[0].row == 2
    )
    assert (
        found.problem_type == "regression"
        and kinds(check_rows(tmp_path, with_labels(numbers), with_labels([1.25, 2.5], 1))) == []
    )
    assert kinds(check_rows(tmp_path, with_labels([2.5] * 30))) == [
        ("single_label", "warning", "train", 30)
    ]


def test_numbers_written_as_text_are_numbers_and_words_among_them_an_error(tmp_path: Path) -> None:
    rows = with_labels([f"{row / 10:.2f}" for row in range(50)])
    assert kinds(check_rows(tmp_path, rows, with_labels(["1.5", "2.50"], 1), ending="tsv")) == []
    found = check_rows(tmp_path, rows, with_labels(["1.5", "good"], 1), ending="tsv")
    assert (
        kinds(found) == [("unknown_labels", "error", "validation", 1)]
        and "'good'" in get_finding(found, "unknown_labels", "validation").meaning
    )


def test_a_test_file_without_labels_is_a_note_and_one_whose_labels_cannot_be_read_a_warning(
    tmp_path: Path,
) -> None:
    unlabelled = [{"text": row["text"]} for row in clean_rows(10, 3)]
    assert kinds(check_rows(tmp_path, clean_rows(40), test=unlabelled)) == [
        ("no_labels", "note", "test", 10)
    ]
    columns = [
        {"text": row["text"], "a": number % 2, "b": 1 - number % 2}
        for number, row in enumerate(clean_rows(40))
    ]
    empty = [{**row, "a": 0, "b": 0} for row in columns]
    refused = get_finding(
        check_rows(tmp_path, empty, label_columns=["a", "b"]), "single_label", "train"
    )
    assert "No row of the training split has one of the labels a, b" in refused.meaning
    none = [{"text": row["text"], "a": "NONE", "b": "NONE"} for row in clean_rows(10, 3)]
    found = check_rows(tmp_path, columns, test=none, label_columns=["a", "b"])
    assert kinds(found) == [
        ("unreadable_labels", "warning", "test", 10),
        ("no_labels", "note", "test", 10),
    ]
    assert (
        "column 'a' holds 'NONE'; expected 0 or 1."
        in get_finding(found, "unreadable_labels", "test").meaning
    )


@pytest.mark.parametrize("ending", ["jsonl", "tsv", "csv", "parquet"])
def test_findings_are_the_same_for_every_file_format(tmp_path: Path, ending: str) -> None:
    rows = with_labels(["a"] * 20 + ["b"] * 20 + ["c"] * 2)
    assert kinds(check_rows(tmp_path, rows, ending=ending)) == [
        ("rare_labels", "warning", "train", 1),
        ("imbalance", "note", "train", 20),
    ]


def test_labels_are_compared_as_training_does(tmp_path: Path) -> None:
    found = check_rows(
        tmp_path, with_labels([1.0] * 30 + [0.0] * 20), with_labels(["0 "] * 10 + [1] * 10, 1)
    )
    assert found.problem_type == "single_label_classification" and kinds(found) == []
    assert found.labels["train"].counts() == {"1": 30, "0": 20}  # type: ignore[union-attr]
    hot = check_rows(tmp_path, with_labels([[0, 1], [1, 1]] * 20), with_labels([[1, 0]] * 9, 1))
    assert hot.labels["train"].counts() == {"1": 40, "0": 20}  # type: ignore[union-attr]
    assert hot.labels["validation"].counts() == {"0": 9}  # type: ignore[union-attr]
