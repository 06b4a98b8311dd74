"""What is decided over all rows of a split: labels that are no numbers, and empty cells in --label_columns."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from bertdist.core.args import read_config
from bertdist.core.config import TaskConfig
from bertdist.core.errors import DataError
from bertdist.data.load_data import Splits, load_splits
from bertdist.data.stats import collect_stats
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import create_task

ALONE = Accelerator(cpu=True)


def write(path: Path, labels: list[str]) -> Path:
    path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels)))
    return path


def load(folder: Path, *words: Any) -> tuple[Splits, LabelStats, list[int | None]]:
    """The splits, the labels of training, and the lines of the rows that it skips."""
    base = ["--model_name_or_path", "m", "--output_dir", str(folder / "out")]
    config = read_config([*base, *map(str, words)])
    splits = load_splits(config)
    found = collect_stats(splits.train, config, ALONE, lambda text: None)
    assert found is not None
    skipped = sorted((row.file, row.line) for row in found.bad_rows)
    return splits, found.labels, [line for _, line in skipped]


MODES = pytest.mark.parametrize("mode", [[], ["--streaming"]], ids=["memory", "streaming"])
SKIP = ["--on_bad_row", "skip", "--train_file"]


@MODES
def test_whether_labels_are_numbers_is_judged_over_all_files(
    mode: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    one = write(tmp_path / "a.csv", ["0", "1"] * 50 + ["other"] * 2)
    two = write(tmp_path / "b.csv", ["other"] * 50)
    _, labels, skipped = load(tmp_path, *mode, *SKIP, one, two)
    assert dict(zip(labels.values, labels.counts, strict=True)) == {"0": 50, "1": 50, "other": 52}
    assert not skipped
    three = write(tmp_path / "c.csv", ["n/a", "1", "0"])  # the control: few over the split
    for _ in range(2):  # a stream's second start reads survey.json
        _, labels, skipped = load(tmp_path, *mode, *SKIP, three, one)
        assert dict(zip(labels.values, labels.counts, strict=True)) == {"1": 51, "0": 51}
        assert skipped == [102, 103, 2]
    with pytest.raises(DataError, match=r"a\.csv line 102: label 'other' is not a number"):
        stats = load(tmp_path, *mode, "--train_file", one)[1]
        create_task(TaskConfig(), stats, None)


@MODES
def test_a_limit_counts_the_rows_that_are_kept(mode: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write(tmp_path / "a.csv", ["0", "1"] * 20 + ["n/a"] + ["0", "1"] * 20)
    _, labels, skipped = load(tmp_path, *mode, *SKIP, path, "--max_train_samples", 60)
    assert (sum(labels.counts), labels.values, skipped) == (60, ["0", "1"], [42])


@MODES
def test_a_rare_class_stays_one_in_validation(mode: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    train = write(tmp_path / "a.csv", ["0", "1", "other"] * 9)
    dev = write(tmp_path / "b.csv", ["0", "1"] * 50 + ["other"])
    words = [*SKIP, train, "--validation_file", dev]
    assert len(load(tmp_path, *mode, *words)[0].validation or ()) == 101
    write(train, ["0", "1"] * 9)  # the control: of numbers
    assert len(load(tmp_path, *mode, *words)[0].validation or ()) == 100


@MODES
def test_every_label_of_a_regression_must_be_a_number(mode: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write(tmp_path / "a.csv", ["0.5", "n/a", "n/a", "1.5"])
    words = [*mode, "--problem_type", "regression", *SKIP, path]
    assert load(tmp_path, *words)[1].values == ["0.5", "1.5"]


@MODES
@pytest.mark.parametrize("files", [["1,\n", "0,1\n"], ["0,1\n", "1,\n"], ["1,\n0,1\n"]])
def test_what_an_empty_cell_means_is_judged_over_all_files(
    mode: list[str], files: list[str], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{at}.csv" for at in range(len(files))]
    marks = [*mode, "--label_columns", "a", "b", "--max_train_steps", "3", "--train_file", *paths]
    for path, rows in zip(paths, files, strict=True):
        path.write_text("text,a,b\n" + "".join(f"t,{row}\n" for row in rows.split()))
    with pytest.raises(DataError, match=r"\.csv line [23]: column '[ab]' holds '0?'; expected"):
        splits = load(tmp_path, *marks)[0]
        list(splits.train.windows())  # type: ignore[union-attr]  # a stream, where it is met
    for path, rows in zip(paths, files, strict=True):  # the control: no 0 in any file
        path.write_text(
            "text,a,b\n" + "".join(f"t,{row}\n" for row in rows.replace("0", "").split())
        )
    splits = load(tmp_path, *marks)[0]
    rows_read = splits.train
    if mode:
        (window,) = rows_read.windows()  # type: ignore[union-attr]
        rows_read = window.records
    assert set(rows_read.label_values) == {("a",), ("b",)}  # type: ignore[union-attr]
