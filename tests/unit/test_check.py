"""The command line of check: output, files and exit codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_checks import clean_rows
from rows import write_rows

from bertdist import cli


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: Any,
    columns: int = 100,
) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    for name, value in (
        ("COLUMNS", str(columns)),
        ("TERM", "xterm-256color"),
        ("FORCE_COLOR", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pytest.raises(SystemExit) as left:
        cli.main(["check", *map(str, words)])
    out, error = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, error


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_exit_codes_tell_errors_from_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, dev = write_rows(tmp_path / "train.tsv", clean_rows(60)), clean_rows(20, 1)
    assert run(monkeypatch, capsys, "--train_file", train)[0] == 0
    warned = write_rows(tmp_path / "warned.tsv", [*clean_rows(60), clean_rows(60)[3]])
    code, out, _ = run(monkeypatch, capsys, "--train_file", warned)
    assert code == 0 and "0 errors, 1 warning, 0 notes." in plain(out)
    dev[4]["label"] = "unknown"
    wrong = write_rows(tmp_path / "dev.tsv", dev)
    code, out, _ = run(monkeypatch, capsys, "--train_file", train, "--validation_file", wrong)
    assert (
        code == 1
        and "1 error, 0 warnings, 0 notes." in plain(out)
        and "dev.tsv line 6" in plain(out)
    )


def test_rows_that_training_refuses_are_an_error_beside_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clean_rows(60)
    lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in [*rows, rows[3]])]
    lines[1:1], lines[30:30] = ["one field"], ["no label\t"]
    train = tmp_path / "train.tsv"
    train.write_text("\n".join(lines) + "\n")
    words = ["--train_file", train, "--near_threshold", 0]
    code, out, error = run(monkeypatch, capsys, *words, "--output", tmp_path / "check.json")
    shown = " ".join(re.sub(r"[│┃]", " ", plain(out)).split())
    assert (code, error) == (1, "") and "1 error, 1 warning, 0 notes." in shown
    assert "train.tsv line 2: 1 field, expected 2 as in the header" in shown
    assert "train.tsv line 31: label is missing" in shown
    report = json.loads((tmp_path / "check.json").read_text())
    first, second = report["findings"]
    assert [first[x] for x in ("kind", "severity", "count")] == ["refused_rows", "error", 2]
    assert "leave them out of training with --on_bad_row skip" in first["advice"]
    assert second["kind"] == "duplicates"  # the others are checked
    skipping = [*words, "--on_bad_row", "skip"]
    code, out, _ = run(monkeypatch, capsys, *skipping)
    assert code == 0 and "0 errors, 2 warnings, 0 notes." in plain(out)
    limited = run(monkeypatch, capsys, *words, "--max_bad_rows", 1, "--on_bad_row", "skip")
    assert limited[0] == 1 and "1 error, 1 warning, 0 notes." in plain(limited[1])
    # Cleaned, they would be lost without a word.
    clean = tmp_path / "clean.csv"
    code, _, error = run(monkeypatch, capsys, *words, "--fix", clean)
    assert code == 1 and not clean.exists()
    assert error.startswith(f"bertdist: --fix {clean} would lose the 2 rows that cannot be read")
    assert run(monkeypatch, capsys, *skipping, "--fix", clean)[0] == 0
    assert len(clean.read_text().splitlines()) == 1 + 60


def test_a_config_file_with_folds_or_model_finds_label_issues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "check.yaml"
    for text in ("folds: 1", "model: m\nfolds: 2"):
        config.write_text(
            f"{text}\ntrain_file: nowhere.tsv\nmodel_name_or_path: m\noutput_dir: o\n"
        )
        code, _, error = run(monkeypatch, capsys, "--config", config)
        assert code == 1 and (
            "--folds is 1" in error or "Give either a trained model with --model" in error
        )
    config.write_text("folds:\ntrain_file: nowhere.tsv\n")  # the control: nothing is asked
    code, _, error = run(monkeypatch, capsys, "--config", config)
    assert code == 1 and "folds" in error and "Give" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bertdist: No training rows: give --train_file"),
        (["--train_file", "nowhere.tsv"], "bertdist: nowhere.tsv: no such file."),
        (
            ["--train_file", "a.tsv", "--output", "no/where/check.json"],
            "bertdist: --output no/where/check.json: there is no folder no/where.",
        ),
        (
            ["--train_file", "a.tsv", "--fix", "no/where.parquet"],
            "bertdist: --fix no/where.parquet: there is no folder no.",
        ),
        (
            ["--train_file", "a.tsv", "--model_name_or_path", "no/model"],
            "bertdist: --model_name_or_path no/model is neither a folder here nor a model on the Hub.",
        ),
    ],
)
def test_a_users_mistake_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.tsv", clean_rows(20))
    code, out, error = run(monkeypatch, capsys, *words)
    assert (
        code == 1
        and out == ""
        and plain(error).startswith(message)
        and len(error.splitlines()) == 1
    )


EVIL = [
    "[bold red]not markup[/bold red] [link=file:///etc]x[/link]",
    "\x1b[2J\x1b]0;title\x07clear the screen",
    "\u202egnp.exe",
    "a\rb\nc",
]


@pytest.mark.parametrize("columns", [80, 160])
def test_texts_and_labels_cannot_control_the_terminal(
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = clean_rows(60)
    for number, evil in enumerate(EVIL):
        rows += [{"text": evil, "label": evil}] * 2
        rows[number]["label"] = evil
    train = write_rows(tmp_path / "[red]train.jsonl", rows)
    code, out, _ = run(
        monkeypatch,
        capsys,
        "--train_file",
        train,
        "--examples",
        20,
        "--output",
        tmp_path / "check.json",
        columns=columns,
    )
    assert code == 0
    assert (
        set(re.findall(r"\x1b(?!\[[0-9;]*m)[^m]{0,9}", out)) == set()
    )  # no command to the terminal but colours
    shown = plain(out)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    tables = [line for line in shown.splitlines() if not line.startswith("Written: ")]
    assert max(map(len, tables)) <= columns
    joined = " ".join(shown.split())
    assert (
        "[bold red]not markup[/bold red] [link=file:///etc]x[/link]" in joined
        and "\\x1b[2J" in joined
        and "\\u202e" in joined
    )
    assert "[red]train.jsonl" in joined
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert found["splits"]["train"]["label_counts"][EVIL[1]] == 3  # data are data there
    # The control: the terminal would have been told these.
    assert "\x1b[2J" in EVIL[1] and "\u202e" in EVIL[2]


def test_fix_prints_the_rows_per_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(tmp_path / "train.tsv", [*clean_rows(60), clean_rows(60)[3]])
    code, out, _ = run(
        monkeypatch,
        capsys,
        "--train_file",
        train,
        "--fix",
        tmp_path / "clean.parquet",
        "--fix_kinds",
        "duplicates",
        columns=400,
    )
    path = tmp_path / "clean.parquet"
    assert code == 0 and Path(f"{path}.dropped.jsonl").read_text().count("\n") == 1
    assert f"Written: {path}, 60 of 61 rows with 2 columns." in plain(out)
    assert f"dropped (duplicates): 1; all of them are in {path}.dropped.jsonl." in plain(out)
    assert f"To train on them: --train_file {path}\n" in plain(out)


def test_regression_and_multi_label_statistics_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "label": number / 8} for number, row in enumerate(clean_rows(41))
    ]
    _, out, _ = run(
        monkeypatch, capsys, "--train_file", write_rows(tmp_path / "numbers.jsonl", rows)
    )
    assert "Regression targets" in plain(out) and "train 0 1.25 2.5 3.75 5 2.5" in " ".join(
        plain(out).split()
    )
    rows = [
        {**row, "label": [["a"], ["a", "b"], ["b", "c", "a"]][number % 3]}
        for number, row in enumerate(clean_rows(60))
    ]
    _, out, _ = run(monkeypatch, capsys, "--train_file", write_rows(tmp_path / "sets.jsonl", rows))
    assert "Labels per row: train mean 2.00, max 3." in plain(out)


def test_lengths_and_labels_have_their_tables(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = write_rows(tmp_path / "train.tsv", clean_rows(60))
    code, out, _ = run(
        monkeypatch,
        capsys,
        "--train_file",
        train,
        "--model_name_or_path",
        tiny_model,
        "--max_length",
        20,
    )
    shown = plain(out)
    assert code == 0 and "Lengths in tokens" in shown and "> 20" in shown and "30   50.0%" in shown
    _, out, _ = run(monkeypatch, capsys, "--train_file", train)
    assert "Lengths in characters" in plain(
        out
    ) and "No tokenizer: pass --model_name_or_path to count tokens." in plain(out)


def test_under_a_launcher_only_rank_0_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, report = write_rows(tmp_path / "train.tsv", clean_rows(30)), tmp_path / "check.json"
    for rank, written in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, out, _ = run(monkeypatch, capsys, "--train_file", train, "--output", report)
        assert (code, bool(out), report.exists()) == (0, written, written)
