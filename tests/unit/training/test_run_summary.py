"""The first and the last lines of a run say what is true of it, and fit the terminal."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows import labelled_records

from bertdist.core.args import read_evaluate_config
from bertdist.core.config import DataConfig, OptimConfig
from bertdist.data.in_memory import records_from_texts
from bertdist.data.stats import DatasetStats
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import Regression, SingleLabel
from bertdist.training import run_summary
from bertdist.training.run_summary import (
    describe_data,
    describe_device,
    describe_optimization,
    describe_times,
    show_commands,
    show_data,
    show_report,
)
from bertdist.training.screen import Screen

REPORT = {
    "step": 4,
    "scores": {"loss": 0.25, "accuracy": 0.5},
    "labels": ["no", "yes"],
    "per_class": [{"label": "no", "f1": 0.5}, {"label": "yes", "f1": 0.25}],
    "confusion": [[3, 1], [0, 7]],
}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return Screen(enabled=True)


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_what_is_said_of_the_data_is_true() -> None:
    task = SingleLabel(("no", "yes"))
    rows = labelled_records(["no", "yes"], [0, 1], pairs=["a", "b"])
    known = DatasetStats(LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [2])
    assert describe_data(rows, known, records_from_texts(["x"] * 1234), task) == {
        "Training": "2 rows of texts, text in 'text' and 'pair', label in 'label'",
        "Validation": "1,234 rows of texts",
        "Task": "single-label classification, 2 labels: no, yes",
    }
    many = SingleLabel(tuple(f"l{i}" for i in range(12)))
    found = describe_data(rows, known, None, many)
    assert found["Task"].endswith("12 labels: l0, l1, l2, l3, l4, l5, l6, l7, l8, l9, ...")
    assert found["Validation"] == "none: the last weights count as the best"
    assert describe_data(rows, known, None, Regression(("score",)))["Task"] == "regression"


def test_a_label_with_a_line_end_stays_on_its_line(
    screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = labelled_records(["one\ntwo", "b"], [0, 1])
    stats = DatasetStats(LabelStats("text", ["one\ntwo", "b"], [1, 1], None, "label"), [2])
    show_data(screen, rows, stats, None, SingleLabel(("one\ntwo", "b")))
    screen.table("title", ["one\ntwo"], [["one\ntwo"]])
    shown = capfd.readouterr().err
    assert shown.count("one\\ntwo") == 3 and "two" not in shown.replace("\\ntwo", "")


def test_sizes_and_settings() -> None:
    optim = OptimConfig(learning_rate=2e-5, warmup_ratio=0.1, lr_scheduler_type="cosine")
    assert describe_optimization(optim) == "learning rate 2e-05, cosine, warmup 0.1 of the steps"
    assert describe_optimization(OptimConfig()) == "learning rate 5e-05, linear"
    ranks: Any = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), mixed_precision="bf16"
    )
    assert describe_device(ranks) == "2 processes, cpu, bf16"


def test_a_notebook_has_only_the_notes_of_a_report(
    screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    report = {**REPORT, "note": "All answers are 'yes'.", "suggested_threshold": 0.25}
    screen.in_notebook = True  # where Run and Evaluation show the rest
    show_report(screen, report)
    note, threshold = capfd.readouterr().err.splitlines()
    assert note == "All answers are 'yes'." and "--threshold 0.25 predict gives" in threshold
    screen.in_notebook = False  # the control
    show_report(screen, report)
    said = capfd.readouterr().err
    assert "Scores per label" in said and f"{note}\n" in said


def test_a_report_is_shown_in_tables(screen: Screen, capfd: pytest.CaptureFixture[str]) -> None:
    show_report(screen, REPORT)
    said = capfd.readouterr().err
    lines = rows_of(said)
    assert "Scores per label, step 4\n" in said and ["yes", "0.2500"] in lines
    assert "Confusion matrix (rows: true, columns: predicted)\n" in said
    assert ["yes", "0", "7"] in lines and ["accuracy", "0.5000"] in lines
    assert "interval" not in said and "threshold" not in said
    show_report(screen, REPORT | {"intervals": {"accuracy": [0.4, 0.6]}})
    lines = rows_of(capfd.readouterr().err)
    assert ["score", "value", "95%", "interval"] in lines
    assert ["accuracy", "0.5000", "0.4000", "to", "0.6000"] in lines and ["loss", "0.2500"] in lines


def test_empty_answers_are_said_with_the_threshold_that_would_answer(
    screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    show_report(screen, REPORT | {"suggested_threshold": 0.21234})
    said = capfd.readouterr().err
    assert "Every answer is empty" in said and "With --threshold 0.212 predict" in said


@pytest.mark.parametrize("matrix", [True, False])
def test_of_many_labels_the_worst_are_shown(
    matrix: bool, screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"label{i}" for i in range(1000)]
    scores = [{"label": name, "f1": i / 1000, "rows": i % 2} for i, name in enumerate(names)]
    report: dict[str, Any] = {"step": 4, "labels": names, "per_class": scores}
    wrong = [{"label": names[i], "predicted": "label7", "rows": 50 - i} for i in range(30)]
    if matrix:
        report["confusion"] = [[0] * 1000 for _ in names]
        for i, entry in enumerate(wrong):
            report["confusion"][i][7] = entry["rows"]
        report["confusion"][7][7] = 999  # right
    else:
        report["confusions"] = [entry for entry in wrong if entry["label"] != "label7"]
    show_report(screen, report)
    said = capfd.readouterr().err
    title = "Scores per label, step 4 (the lowest f1 of 1,000; all are in evaluation.json)"
    assert f"{title}\n" in said and "Most frequent confusions\n" in said
    cells = [row for row in rows_of(said) if row[:1] and row[0].startswith("label") and row[1:]]
    cells = [row for row in cells if row[0] != "label"]
    assert cells[:24] == [[f"label{i}", f"{i / 1000:.4f}", "1"] for i in range(1, 48, 2)]
    expected = [i for i in range(13) if i != 7]
    assert cells[24:] == [[f"label{i}", "label7", str(50 - i)] for i in expected]


@pytest.mark.parametrize("width", [40, 80])
def test_a_matrix_of_long_names_has_numbers(
    width: int, screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    screen.console.width = width
    names = [f"a_long_name_of_a_label_{i}" for i in range(12)]
    confusion = [[i * j for j in range(12)] for i in range(12)]
    show_report(screen, {"step": 1, "labels": names, "confusion": confusion})
    lines = capfd.readouterr().err.splitlines()
    assert max(len(line.rstrip()) for line in lines[1:]) <= width
    if width == 80:
        assert lines[2].split() == [str(i) for i in range(12)]
        assert [*map(str, range(0, 132, 11))] in [line.split()[-12:] for line in lines]


def test_the_shares_of_the_time_add_up() -> None:
    summary = {
        "train_seconds": 60.0,
        "data_wait_seconds": 6.0,
        "train_steps": 1200,
        "tokens_per_second": 5432.1,
    }
    meter: Any = SimpleNamespace(summary=lambda: summary)
    assert describe_times(meter, {"evaluation": 20.0, "saving": 10.0}, 100.0) == (
        "1 min 40 s: training 54%, waiting for data 6%, evaluation 20%, saving 10%, "
        "starting 10%; 1,200 steps, 5,432 tokens/s in training"
    )


def commands(
    screen: Screen, capfd: pytest.CaptureFixture[str], folder: str = "out", **data: Any
) -> list[list[str]]:
    show_commands(screen, Path(folder), DataConfig(**data))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Next        ")
    return [shlex.split(line[12:]) for line in lines]


def test_the_next_commands_can_be_pasted(
    screen: Screen, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_summary, "own_command", lambda: "bertdist")
    predict, evaluate = commands(
        screen,
        capfd,
        "my runs/a",
        train_file=["t.txt"],
        validation_file="dev set.txt",
        column_names=["label", "text"],
        label_column="label",  # of the run's config
        text_column=["text"],  # of the model
        delimiter="tab",
    )
    assert predict == ["bertdist", "predict", "--model", "my runs/a", "--text", "..."]
    assert evaluate[4:] == [
        *("--input", "dev set.txt", "--column_names", "label", "text", "--delimiter", "tab")
    ]
    config = read_evaluate_config(evaluate[2:])
    assert config.input == "dev set.txt" and config.column_names == ["label", "text"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train_file": ["a/t.csv.gz"]}, ["--input", "test.csv.gz"]),
        ({"train_file": ["t.csv"], "test_file": "x.csv"}, ["--input", "x.csv"]),
        ({"train_file": ["texts"]}, ["--input", "test.tsv"]),
        (
            {"train_file": ["/tmp/bertdist-x/t.parquet"], "validation_file": "/tmp/bertdist-x/v"},
            ["--input", "test.parquet"],
        ),
        ({"task_name": "rte"}, ["--task_name", "rte", "--split", "test"]),
        (
            {"dataset_name": "a/b", "validation_split": "dev"},
            ["--dataset_name", "a/b", "--split", "dev"],
        ),
    ],
)
def test_the_rows_to_evaluate_are_those_of_the_run(
    data: dict[str, Any], words: list[str], screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    assert commands(screen, capfd, **data)[1][-len(words) :] == words


def test_the_command_is_that_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "own env", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
    for file in (own / "python", own / "python3", other / "bertdist", other / "python"):
        file.write_text("")
        file.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(own / "python3"))
    monkeypatch.setenv("PATH", str(other))  # another program of that name
    assert run_summary.own_command() == f"'{own / 'python3'}' -m bertdist"
    monkeypatch.setenv("PATH", f"{own}:{other}")
    assert run_summary.own_command() == "python -m bertdist"
    (own / "bertdist").write_text("")
    (own / "bertdist").chmod(0o755)
    assert run_summary.own_command() == "bertdist"


def test_answers_that_are_all_alike_are_said(
    screen: Screen, capfd: pytest.CaptureFixture[str]
) -> None:
    show_report(screen, REPORT | {"note": "All 9 answers are 'no'."})
    assert "All 9 answers are 'no'.\n" in capfd.readouterr().err
