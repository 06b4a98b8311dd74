"""check --folds and --model from flags to files: interrupted, on several ranks, with mistakes."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import (
    EVERY_FAULT,
    Files,
    json_of,
    make_rows,
    run_main,
    run_train,
    words_of,
    write_rows,
    write_split,
)
from rows import train_module as train

from bertdist import check
from bertdist.training import run_logger

ROWS, K = 36, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Rows of two labels; every ninth label is wrong."""
    folder = tmp_path_factory.mktemp("rows")
    rows = make_rows(ROWS, seed=5)
    for row in rows[::9]:
        row["label"] = {"negative": "positive", "positive": "negative"}[row["label"]]
    return Files(write_rows(folder / "rows.tsv", rows))


def folds_args(model: Path, out: Path, files: Files, **settings: Any) -> list[str]:
    usual = {"folds": K, "num_train_epochs": 2, "max_length": 24, "output": out / "issues.jsonl"}
    out.mkdir(parents=True, exist_ok=True)
    return words_of(model, out, files, **{**usual, **settings})


def run_check(
    accelerator: Accelerator, words: list[str], stop_in_fold: int | None = None
) -> tuple[Any, str, list[str]]:
    """Exit code and standard error on this rank, and the run folder of every training step."""
    steps: list[str] = []
    train_step, begin = train.train_step, run_logger.open_log

    def watched(*args: Any) -> Any:
        steps.append(now[0])
        if stop_in_fold is not None and now[0] == str(stop_in_fold) and len(steps) % 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    now = [""]

    def opened(folder: Path, *rest: Any) -> Any:
        now[0] = folder.name
        return begin(folder, *rest)

    train.train_step, run_logger.open_log = watched, opened
    code, said, _ = run_main(accelerator, words, None, check)
    return code, said, steps


def check_entries(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json_of(path)
    assert sorted(entry["row"] for entry in found) == list(range(ROWS))
    assert [entry["line"] for entry in found] == [entry["row"] + 2 for entry in found]
    assert [entry["score"] for entry in found] == sorted(entry["score"] for entry in found)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a --folds run."""
    out = tmp_path_factory.mktemp("folded") / "out"
    ((code, said, steps),) = run_ranks(
        1, run_check, folds_args(tiny_model, out, files), timeout=300
    )
    assert code == 0 and "labels (" in said and "Lowest label quality in rows.tsv" in said, said
    assert {name: steps.count(name) for name in steps} == {"0": 6, "1": 6, "2": 6}
    return out


def test_every_row_is_ranked_out_of_fold(uninterrupted: Path) -> None:
    found = check_entries(uninterrupted / "issues.jsonl")
    assert {"row", "file", "line", "label", "suggested", "probability", "score", "issue"} == set(
        found[0]
    )
    rows = make_rows(ROWS, seed=5)
    assert all(
        (entry["label"] == rows[entry["row"]]["label"]) == bool(entry["row"] % 9) for entry in found
    )
    assert sorted(path.name for path in (uninterrupted / "folds").iterdir()) == ["0", "1", "2"]


def test_an_interrupted_run_resumes_and_finished_folds_are_not_trained_again(
    uninterrupted: Path, tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    words = folds_args(tiny_model, tmp_path / "out", files)
    ((code, said, steps),) = run_ranks(1, run_check, words, 1, timeout=300)
    assert (
        code == 75
        and "Stopped (SIGTERM)" in said
        and not (tmp_path / "out" / "issues.jsonl").exists()
    )
    assert steps.count("0") == 6 and 0 < (taken := steps.count("1")) < 6 and "2" not in steps
    ((code, said, steps),) = run_ranks(1, run_check, words, timeout=300)
    assert code == 0 and {name: steps.count(name) for name in steps} == {"1": 6 - taken, "2": 6}, (
        said
    )
    assert (tmp_path / "out" / "issues.jsonl").read_bytes() == (
        uninterrupted / "issues.jsonl"
    ).read_bytes()
    for name in ("checkpoints", "best"):  # the control: what is not there is trained
        shutil.rmtree(tmp_path / "out" / "folds" / "0" / name)
    ((code, _, steps),) = run_ranks(1, run_check, words, timeout=300)
    assert code == 0 and {name: steps.count(name) for name in steps} == {"0": 6}


def test_folds_of_other_settings_are_not_resumed(
    uninterrupted: Path, tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "out")
    for other in ({"learning_rate": 1e-4}, {"folds": 2}, {"seed": 43}):
        ((code, said, steps),) = run_ranks(
            1, run_check, folds_args(tiny_model, tmp_path / "out", files, **other), timeout=300
        )
        last = said.strip().splitlines()[-1]
        assert code == 1 and not steps and last.startswith("bertdist: ") and "step_" in said, said


def test_two_ranks_rank_the_same(
    uninterrupted: Path, tiny_model: Path, files: Files, tmp_path: Path
) -> None:
    (main, other) = run_ranks(
        2, run_check, folds_args(tiny_model, tmp_path / "out", files), timeout=300
    )
    assert main[0] == other[0] == 0 and other[1] == "", other[1]
    one, two = (
        check_entries(folder / "issues.jsonl") for folder in (uninterrupted, tmp_path / "out")
    )
    scores = {entry["row"]: entry["score"] for entry in one}
    assert [entry["score"] for entry in two] == pytest.approx(
        [scores[entry["row"]] for entry in two], abs=1e-3
    )


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a run on other rows."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(
        1,
        run_train,
        words_of(
            tiny_model, folder / "out", write_split(folder, 200), num_train_epochs=3, max_length=24
        ),
        timeout=300,
    )
    return folder / "out" / "best"


def model_args(model: Path, rows: Path, *words: Any) -> list[str]:
    return ["--model", str(model), "--train_file", str(rows), "--use_cpu", *map(str, words)]


def test_a_trained_model_ranks_wrong_labels_first(
    trained: Path, files: Files, tmp_path: Path
) -> None:
    words = model_args(trained, files.train, "--output", tmp_path / "issues.jsonl")
    ((code, said, _),) = run_ranks(1, run_main, words, None, check, timeout=300)
    assert code == 0 and "It misses label errors in rows that it was trained on" in said, said
    found = check_entries(tmp_path / "issues.jsonl")
    assert sum(entry["row"] % 9 == 0 for entry in found[:6]) >= 3
    assert sum(entry["row"] % 9 == 0 for entry in found[-18:]) == 0


def test_a_wrong_label_has_its_line(trained: Path, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text(files.train.read_text() + "a film\tpositiv\n")
    ((code, said, _),) = run_ranks(1, run_main, model_args(trained, path), None, check)
    assert code == 1 and said.count("\n") == 1, said
    assert (
        said.startswith(f"bertdist: rows.tsv line {ROWS + 2}: unknown label 'positiv'")
        and "Did you mean 'positive'?" in said
    )


def test_skipped_rows_do_not_shift_the_lines(trained: Path, files: Files, tmp_path: Path) -> None:
    first, *rest = files.train.read_text().splitlines(keepends=True)
    path = tmp_path / "rows.tsv"
    path.write_text("".join([first, "a row without a label\n", *rest]))
    words = model_args(trained, path, "--on_bad_row", "skip", "--output", tmp_path / "issues.jsonl")
    ((code, said, _),) = run_ranks(1, run_main, words, None, check, timeout=300)
    assert code == 0 and "Skipped 1 row that cannot be read." in said, said
    assert [entry["line"] for entry in json_of(tmp_path / "issues.jsonl")] == [
        entry["row"] + 3 for entry in json_of(tmp_path / "issues.jsonl")
    ]
    ((code, said, _),) = run_ranks(
        1, run_main, [*words, "--max_bad_rows", "0"], None, check, timeout=300
    )
    assert code == 1 and "More than 0 rows cannot be read" in said


def test_mistakes_are_one_line(trained: Path, files: Files, tiny_model: Path) -> None:
    for words, told in (
        (
            model_args(trained, files.train, "--lerning_rate", 1),
            "Unknown setting --lerning_rate. Did you mean --learning_rate?",
        ),
        (model_args(tiny_model, files.train), "is not a trained classifier"),
        (model_args(trained, files.train.with_name("gone.tsv")), "no such file"),
    ):
        ((code, said, _),) = run_ranks(1, run_main, words, None, check)
        assert (
            code == 1 and said.startswith("bertdist: ") and said.count("\n") == 1 and told in said
        ), said


@pytest.mark.skipif(
    not EVERY_FAULT,
    reason="half a minute; tests/unit/data_quality has the ranking of each kind: with BERTDIST_EVERY_FAULT=1 only",
)
def test_several_labels_and_numbers_are_ranked_out_of_fold(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = make_rows(20, seed=6)
    sets = [
        {
            "text": row["text"],
            "labels": [row["label"], "short"] if len(row["text"]) < 40 else [row["label"]],
        }
        for row in rows
    ]
    numbers = [{"text": row["text"], "score": len(row["text"]) / 8 + 0.01} for row in rows]
    for name, written in (("sets", sets), ("numbers", numbers)):
        path = write_rows(tmp_path / f"{name}.jsonl", written)
        words = folds_args(tiny_model, tmp_path / name, Files(path), folds=2, num_train_epochs=1)
        ((code, said, _),) = run_ranks(1, run_check, words, timeout=300)
        assert code == 0, said
        lines = (tmp_path / name / "issues.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["row"] for line in lines) == list(range(20))


def test_rank_by_is_refused_for_regression(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "numbers.jsonl", [{"text": f"a{at}", "score": at / 8} for at in range(8)]
    )
    words = folds_args(
        tiny_model,
        tmp_path / "out",
        Files(path),
        folds=2,
        num_train_epochs=1,
        rank_by="self_confidence",
    )
    ((code, said, steps),) = run_ranks(1, run_check, words, timeout=300)
    assert (
        code == 1
        and "--rank_by self_confidence is for classification" in said.splitlines()[-1]
        and not steps
    )
