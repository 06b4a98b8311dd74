"""--test_file: evaluated once, with the best weights, at the end; nothing that is learned depends on it."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forked import run_ranks
from rows import (
    Files,
    assert_same_run,
    json_of,
    make_rows,
    run_train,
    words_of,
    write_rows,
    write_split,
)

from bertdist.predict import Predictor

NAMES = ("evaluation.json", "predictions.jsonl", "errors.jsonl", "probabilities.parquet")


class Runs(NamedTuple):
    folder: Path
    files: Files
    test: Path
    model: Path


def train(runs: Runs, out: str, **settings: Any) -> str:
    words = words_of(runs.model, runs.folder / out, runs.files, num_train_epochs=2, **settings)
    return run_ranks(2, run_train, words)[0][2]  # type: ignore[no-any-return]


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("test_*"))}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    files = write_split(folder, 40, 12)
    test = write_rows(folder / "test.jsonl", make_rows(17, seed=9))
    runs = Runs(folder, files, test, tiny_model)
    train(runs, "plain")
    said = train(runs, "with", test_file=test)
    assert "17 rows of test.jsonl" in said and "best weights, test rows" in said
    return runs


def test_the_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    assert_same_run(runs.folder / "plain", runs.folder / "with")
    assert list(written(runs.folder / "with")) == sorted(f"test_{name}" for name in NAMES)
    assert written(runs.folder / "plain") == {}


def test_the_scores_are_those_of_the_best_weights(runs: Runs) -> None:
    out = runs.folder / "with"
    report, lines = json_of(out / "test_evaluation.json"), json_of(out / "test_predictions.jsonl")
    rows = json_of(runs.test)
    answers = Predictor(out / "best")([row["text"] for row in rows])
    for line, row, answer in zip(lines, rows, answers, strict=True):
        assert (line["label"], line["truth"]) == (answer["label"], row["label"])
        assert line["score"] == pytest.approx(answer["score"], abs=1e-6)
    right = [line["label"] == line["truth"] for line in lines]
    assert report["scores"]["accuracy"] == pytest.approx(sum(right) / 17)
    low, high = report["intervals"]["accuracy"]
    assert low < report["scores"]["accuracy"] < high
    assert report["step"] == json_of(out / "evaluation.json")["step"]
    assert report["scores"] != json_of(out / "evaluation.json")["scores"]


def test_errors_are_sorted_by_confidence_and_name_their_lines(runs: Runs) -> None:
    for prefix, file in (("", runs.files.dev), ("test_", runs.test)):
        out = runs.folder / "with"
        errors = json_of(out / f"{prefix}errors.jsonl")
        lines = json_of(out / f"{prefix}predictions.jsonl")
        wrong = [line for line in lines if line["label"] != line["truth"]]
        assert errors and len(errors) == len(wrong)
        assert [error["error"] for error in errors] == sorted((x["score"] for x in wrong), reverse=True)  # fmt: skip
        assert file is not None
        for error in errors:
            assert (error["file"], error["score"]) == (file.name, error["error"])
            assert error["text"] in file.read_text().splitlines()[error["line"] - 1]
            assert error["truth"] == lines[error["row"]]["truth"] != error["label"]


def test_a_finished_run_evaluates_it_the_first_time_and_after_a_change(runs: Runs) -> None:
    out = runs.folder / "again"
    shutil.copytree(runs.folder / "plain", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.suffix in (".jsonl", ".safetensors")}  # fmt: skip
    assert "best weights, test rows" in train(runs, "again", test_file=runs.test)
    assert written(out) == written(runs.folder / "with")
    assert {path: path.read_bytes() for path in before} == before, "nothing is trained"
    moments = {path: path.stat().st_mtime_ns for path in out.glob("test_*")}
    assert "best weights, test rows" in train(runs, "again", test_file=runs.test)
    assert {path: path.stat().st_mtime_ns for path in moments} == moments
    other = write_rows(runs.folder / "other.jsonl", make_rows(11, seed=10))
    train(runs, "again", test_file=other)
    assert len(json_of(out / "test_predictions.jsonl")) == 11
    (out / "test_errors.jsonl").unlink()
    train(runs, "again", test_file=runs.test, metrics=["accuracy", "f1"], positive_label="negative")
    report = json_of(out / "test_evaluation.json")
    assert list(report["scores"]) == ["loss", "accuracy", "f1"]
    assert (out / "test_errors.jsonl").exists()


def test_without_validation_rows_the_last_weights_are_evaluated(runs: Runs) -> None:
    plain = runs._replace(files=Files(runs.files.train))
    train(plain, "alone", test_file=runs.test, metrics=["accuracy", "log_loss"])
    out = runs.folder / "alone"
    assert list(json_of(out / "test_evaluation.json")["scores"]) == ["loss", "accuracy", "log_loss"]
    assert not (out / "evaluation.json").exists()
