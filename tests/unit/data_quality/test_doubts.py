"""What is said of each row: one entry a row in the order of doubt, with its place, and texts that are shown as they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import write_rows

from bertdist.core.config import DataConfig
from bertdist.data.loading import load_records
from bertdist.data.records import Records
from bertdist.data_quality.label_issues import (
    SHOWN_ROWS,
    LabelIssues,
    _show,
    differences,
    entries_of,
)
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task
from bertdist.training.run_logger import RunLogger

ORDER = LabelIssues(np.array([2, 0, 1]), np.array([0.4, 0.9, 0.1]), np.array([False, False, True]))


def source(path: Path, **columns: Any) -> Records:
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return load_records(DataConfig(train_file=[str(write_rows(path, rows))]), "train")


def entries(
    records: Records, task: Task, targets: Any, predictions: Any, probabilities: Any
) -> list[dict[str, Any]]:
    found = list(
        entries_of(
            records, task, np.array(targets), np.array(predictions), np.array(probabilities), ORDER
        )
    )
    return [json.loads(line) for line in map(json.dumps, found)]


def test_an_entry_for_each_row_the_most_doubted_first(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.csv", text=["a\nb", "c", "d"], label=["bad", "good", "good"])
    found = entries(
        records,
        SingleLabel(("bad", "good")),
        [0, 1, 1],
        [1, 1, 0],
        [[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]],
    )
    assert found == [
        {
            "row": 2,
            "file": "rows.csv",
            "line": 5,
            "label": "good",
            "suggested": "bad",
            "probability": 0.9,
            "score": 0.1,
            "issue": True,
        },
        {
            "row": 0,
            "file": "rows.csv",
            "line": 2,
            "label": "bad",
            "suggested": "good",
            "probability": 0.6,
            "score": 0.4,
            "issue": False,
        },
        {
            "row": 1,
            "file": "rows.csv",
            "line": 4,
            "label": "good",
            "suggested": "good",
            "probability": 0.9,
            "score": 0.9,
            "issue": False,
        },
    ]


def test_rows_of_a_file_without_lines_have_none(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.parquet", text=["a", "b", "c"], label=["bad", "good", "good"])
    found = entries(
        records,
        SingleLabel(("bad", "good")),
        [0, 1, 1],
        [1, 1, 0],
        [[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]],
    )
    assert [entry["line"] for entry in found] == [None] * 3


def test_rows_of_several_files_are_told_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (
        write_rows(tmp_path / name, [{"text": name, "label": label} for label in ("bad", "good")])
        for name in ("a.csv", "b.csv")
    )
    records = load_records(DataConfig(train_file=[str(one), str(two)]), "train")
    doubts = LabelIssues(np.arange(4), np.full(4, 0.5), np.zeros(4, bool))
    answers = np.array([0, 0, 1, 0]), np.full((4, 2), 0.5)
    found = list(
        entries_of(records, SingleLabel(("bad", "good")), np.array([0, 1, 0, 1]), *answers, doubts)
    )
    assert [(entry["row"], entry["file"], entry["line"]) for entry in found] == [
        (0, "a.csv", 2),
        (1, "a.csv", 3),
        (2, "b.csv", 2),
        (3, "b.csv", 3),
    ]
    assert "│ b.csv │ 3" in shown(found, records, capsys)


def test_several_labels_a_row_and_the_surest_word_against_them(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.jsonl", text=["a", "b", "c"], label=[["x"], [], ["x", "y"]])
    probabilities = [[0.9, 0.2], [0.1, 0.3], [0.8, 0.05]]
    found = entries(
        records,
        MultiLabel(("x", "y")),
        [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]],
        [[1, 0], [0, 0], [1, 0]],
        probabilities,
    )
    assert [(entry["label"], entry["suggested"], entry["probability"]) for entry in found] == [
        (["x", "y"], ["x"], 0.95),
        (["x"], ["x"], 0.2),
        ([], [], 0.3),
    ]


def test_numbers_have_no_probability(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.jsonl", text=["a", "b", "c"], label=[0.5, 1.5, 2.5])
    found = entries(
        records,
        Regression(("label",)),
        [0.5, 1.5, 2.5],
        np.array([1, 2, 0], np.float32),
        [[1], [2], [0]],
    )
    assert found[0] == {
        "row": 2,
        "file": "rows.jsonl",
        "line": 3,
        "label": 2.5,
        "suggested": 0.0,
        "score": 0.1,
        "issue": True,
    }


@pytest.mark.parametrize(
    ("given", "suggested", "found"),
    [
        ("a", "b", [("a", "b")]),
        ("a", "a", []),
        (["x", "y"], ["y", "z"], [("x", "(without)"), ("(without)", "z")]),
        (["x"], ["x"], []),
        (1.0, 2.0, []),
    ],
)
def test_what_is_taken_for_what(given: Any, suggested: Any, found: list[tuple[str, str]]) -> None:
    assert differences(given, suggested) == found


def shown(
    found: list[dict[str, Any]],
    records: Records,
    capsys: pytest.CaptureFixture[str],
    width: str = "200",
) -> str:
    log = RunLogger(Path(), enabled=True)
    log.console.width = int(width)
    _show(found, records, None, log)
    return capsys.readouterr().err


def test_the_table_shows_texts_as_they_are_and_counts_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["[red]a[/red] \x1b[31m", "b " * 100, "c\td"]
    records = source(tmp_path / "rows.csv", text=texts, label=["bad", "[b]good", "[b]good"])
    found = entries(
        records,
        SingleLabel(("[b]good", "bad")),
        [1, 0, 0],
        [0, 0, 1],
        [[0.6, 0.4], [0.9, 0.1], [0.1, 0.9]],
    )
    said = shown(found, records, capsys)
    assert "[red]a[/red] \\x1b[31m" in said and "\x1b" not in said and "[b]good" in said
    assert "b b b ..." in said and "c d" in said and "0.900" in said
    assert (
        "1 of 3 labels (33.3%) are likely to be wrong." in said and "--output doubts.jsonl" in said
    )
    pairs = said[said.index("Labels that are") :].splitlines()
    assert [cell.strip() for cell in pairs[4].strip("│ ").split("│")] == ["[b]good", "bad", "1"]


def test_the_table_shows_the_first_rows_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = source(
        tmp_path / "rows.csv", text=[f"text-{at}" for at in range(50)], label=["a", "b"] * 25
    )
    found = [
        {
            "row": row,
            "file": "rows.csv",
            "line": row + 2,
            "label": "a",
            "suggested": "b",
            "probability": 0.9,
            "score": 0.1,
            "issue": True,
        }
        for row in range(50)
    ]
    said = shown(found, records, capsys)
    assert said.count("text-") == SHOWN_ROWS and "50 of 50 labels (100.0%)" in said
