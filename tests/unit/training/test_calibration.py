"""--calibrate and --tune_thresholds of a run: folded into best/ once, whatever interrupts it; the training does not change."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from rows import (
    Files,
    assert_same_tensors,
    json_of,
    last_checkpoint,
    make_rows,
    run_train,
    tensors_of,
    words_of,
    write_rows,
    write_split,
)
from transformers import pipeline

import bertdist
import bertdist.predict
from bertdist.core.args import read_predict_config
from bertdist.core.atomic_io import find_damage
from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import REPORT_MARKER
from bertdist.predict import Predictor
from bertdist.training import best_model, evaluation
from bertdist.training.calibration import (
    Fits,
    due_fits,
    public_name,
    stays_fitted,
    wanted_fits,
)

RESULTS = ("evaluation.json", "predictions.jsonl", "errors.jsonl")
FLAGS: dict[str, Any] = {"calibrate": True, "tune_thresholds": True}
Train = Callable[..., str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files, Path]:
    folder = tmp_path_factory.mktemp("runs")
    rows = make_rows(60, seed=2)
    for row in rows[::5]:  # wrong labels, so that there is a best temperature
        row["label"] = "positive" if row["label"] == "negative" else "negative"
    dev = write_rows(folder / "dev.tsv", rows)
    test = write_rows(folder / "test.tsv", make_rows(40, seed=9))
    return folder, Files(write_split(folder, 120).train, dev), test


@pytest.fixture(scope="module")
def train(tiny_model: Path, files: tuple[Path, Files, Path]) -> Train:
    folder, split, _ = files

    def run(out: str, ranks: int = 1, breaking: Any = None, **settings: Any) -> str:
        words = words_of(tiny_model, folder / out, split, num_train_epochs=2, **settings)
        return run_ranks(ranks, run_train, words, breaking)[0][2]  # type: ignore[no-any-return]

    return run


@pytest.fixture(scope="module")
def plain(train: Train, files: tuple[Path, Files, Path]) -> Path:
    train("plain")
    return files[0] / "plain"


@pytest.fixture(scope="module")
def fitted(train: Train, files: tuple[Path, Files, Path]) -> tuple[Path, str]:
    said = train("fitted", **FLAGS, test_file=files[2])
    return files[0] / "fitted", said


def written(out: Path) -> dict[str, bytes]:
    paths = [*(out / name for name in RESULTS), *(x for x in (out / "best").iterdir())]
    return {path.name: path.read_bytes() for path in paths}


def test_best_has_divided_outputs_and_the_checkpoints_have_what_was_trained(
    plain: Path, fitted: tuple[Path, str]
) -> None:
    out, _ = fitted
    assert_same_tensors(tensors_of(last_checkpoint(plain)), tensors_of(last_checkpoint(out)))
    before, after = tensors_of(plain / "best"), tensors_of(out / "best")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {f"model.safetensors: classifier.{x}" for x in ("weight", "bias")}
    entry = json_of(out / "best" / "config.json")["bertdist"]["calibration"]
    for name in differ:
        assert torch.equal(after[name], (before[name].double() / entry["temperature"]).float())
    assert entry["temperature"] != 1 and list(entry["thresholds"]) == ["positive"]
    assert find_damage(out / "best", required=()) is None


def test_loss_and_calibration_error_change_and_evaluation_json_says_how(
    plain: Path, fitted: tuple[Path, str]
) -> None:
    out, said = fitted
    before, after = json_of(plain / "evaluation.json"), json_of(out / "evaluation.json")
    entry = after["calibration"]
    assert entry == json_of(out / "best" / "config.json")["bertdist"]["calibration"]
    assert entry["before"]["nll"] == pytest.approx(before["scores"]["loss"], abs=1e-6)
    assert entry["after"]["nll"] == after["scores"]["loss"] < before["scores"]["loss"]
    assert entry["after"]["f1"] == pytest.approx(after["per_class"][1]["f1"])
    assert entry["fitted_on"] == {"data": "dev.tsv", "rows": 60} and entry["in_sample"]
    assert "calibration" not in before
    test = json_of(out / "test_evaluation.json")
    assert test["calibration"]["temperature"] == entry["temperature"]
    assert not test["calibration"]["in_sample"]
    assert test["calibration"]["after"]["nll"] == test["scores"]["loss"]
    said = " ".join(said.split())
    assert f"temperature {entry['temperature']:.3g}, folded into the output layer" in said
    assert "flatter" in said and "on these rows" in said


def test_predict_evaluate_and_pipeline_give_the_numbers_of_the_run(
    fitted: tuple[Path, str], files: tuple[Path, Files, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out, _ = fitted
    rows, lines = json_of_tsv(files[2]), json_of(out / "test_predictions.jsonl")
    texts = [row["text"] for row in rows]
    predictor = Predictor(out / "best")
    answers = predictor(texts)
    assert [x["label"] for x in answers] == [x["label"] for x in lines]
    classify: Any = pipeline("text-classification", model=str(out / "best"), device="cpu")
    probabilities = predictor.probabilities(texts)
    for row, found in zip(probabilities, classify(texts, top_k=None), strict=True):
        for each in found:
            position = predictor.labels.index(each["label"])
            assert each["score"] == pytest.approx(row[position], abs=1e-6)
    threshold = predictor.task.thresholds[1]
    usual = predictor(texts, threshold={"positive": 0.5})
    assert [x["label"] for x in usual] == [
        ("negative", "positive")[int(p > 0.5)] for p in probabilities[:, 1]
    ]
    given: dict[str, Any] = {"input": str(files[2]), "use_cpu": True}
    capfd.readouterr()
    report = bertdist.evaluate(out, **given).report
    said = " ".join(capfd.readouterr().err.split())
    assert f"The answer is 'positive' above a probability of {threshold:.3g}, as stored" in said
    assert report["scores"] == pytest.approx(json_of(out / "test_evaluation.json")["scores"])
    assert report["calibration"]["after"] == pytest.approx(
        json_of(out / "test_evaluation.json")["calibration"]["after"]
    )
    other = bertdist.evaluate(out, **given, threshold={"positive": 0.0})
    assert {x["label"] for x in other.predictions} == {"positive"}
    assert other.report["evaluated"]["threshold"] == {"positive": 0.0}
    assert other.report["calibration"]["thresholds"] == {}
    with pytest.raises(ConfigError, match="needs the label that is given above it"):
        bertdist.evaluate(out, **given, threshold=0.4)
    for more, words in {
        "": "as stored in the model (--tune_thresholds of its training); --threshold replaces it.",
        "--top_k 1": "the model's thresholds are not used",
    }.items():
        flags = ["--model", str(out), "--text", "good", "--use_cpu", *more.split()]
        capfd.readouterr()
        assert bertdist.predict.run(read_predict_config(flags)) == 0
        assert words in " ".join(capfd.readouterr().err.split())


def json_of_tsv(path: Path) -> list[dict[str, str]]:
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


# ---- Once, whatever happens


def copied(plain: Path, name: str) -> Path:
    out = plain.parent / name
    shutil.copytree(plain, out)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_finished_run_is_fitted_later_with_the_same_bytes_and_once(
    ranks: int, plain: Path, fitted: tuple[Path, str], train: Train
) -> None:
    out = copied(plain, f"later_{ranks}")
    assert "temperature" in train(out.name, ranks, **FLAGS)
    assert written(out) == written(fitted[0])
    moments = {path: path.stat().st_mtime_ns for path in (out / "best").iterdir()}
    said = train(out.name, ranks, **FLAGS)
    assert "temperature" in said and "keeps" not in said
    said = train(out.name, ranks)
    assert "best/ keeps its temperature (--calibrate) and its thresholds" in " ".join(said.split())
    assert {path: path.stat().st_mtime_ns for path in moments} == moments
    settings = (out / "config.yaml").read_text()
    assert "calibrate: true" in settings and "threshold_for: f1" in settings


def kill_in(module: Any, name: str, before: bool) -> Callable[[Any], None]:
    """The first call of a function ends the process, before or after it has worked."""

    def breaking(accelerator: Any) -> None:
        function = getattr(module, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if not before:
                function(*args, **kwargs)
            raise SystemExit(9)

        setattr(module, name, dying)

    return breaking


@pytest.mark.parametrize(
    ("module", "name", "before"),
    [
        (best_model, "save_classifier", False),  # while best/ is written
        (evaluation, "write_results", True),  # best/ is written, its results are not
    ],
)
def test_a_run_that_is_killed_while_it_fits_ends_with_the_same_bytes(
    module: Any, name: str, before: bool, plain: Path, fitted: tuple[Path, str], train: Train
) -> None:
    out = copied(plain, f"killed_in_{name}")
    with pytest.raises(Exception):  # noqa: B017  # of the rank
        train(out.name, 1, kill_in(module, name, before), **FLAGS)
    assert find_damage(out / "best", required=()) is None, "whole"
    is_fitted = "calibration" in json_of(out / "best" / "config.json")["bertdist"]
    assert is_fitted is (name == "write_results")
    train(out.name, **FLAGS)
    assert written(out) == written(fitted[0])


def test_a_later_fit_removes_results_and_a_report_of_the_model_before(
    plain: Path, files: tuple[Path, Files, Path], train: Train
) -> None:
    out = copied(plain, "stale")
    train(out.name, test_file=files[2])
    test = sorted(out.glob("test_*"))
    (out / "report.html").write_bytes(REPORT_MARKER)
    train(out.name)
    assert len(test) == 4 and sorted(out.glob("test_*")) == test, "still of this model"
    assert (out / "report.html").exists()
    said = " ".join(train(out.name, report=False, **FLAGS).split())
    assert not [*out.glob("test_*")] and not (out / "report.html").exists()
    assert "Removed test_evaluation.json, test_predictions.jsonl" in said


def test_a_lost_best_is_written_again_and_fitted(
    fitted: tuple[Path, str], plain: Path, train: Train
) -> None:
    out = copied(fitted[0], "lost")
    best = json_of(plain / "evaluation.json")["step"]
    assert (out / "checkpoints" / f"step_{best:06d}").exists()
    shutil.rmtree(out / "best")
    (out / "evaluation.json").unlink()
    assert "was not there: written again" in train(out.name, **FLAGS)
    assert written(out) == written(fitted[0])


# ---- What is asked for


def test_what_best_has_not_is_fitted_and_a_new_temperature_renews_thresholds() -> None:
    both = {"temperature": 1.5, "threshold_for": "f1", "thresholds": {"a": 0.4}}
    only = {**both, "temperature": None}
    for wanted, fitted, due in (
        (Fits(), {}, Fits()),
        (Fits(True), {}, Fits(True)),
        (Fits(True, "f1"), both, Fits()),
        (Fits(), both, Fits()),
        (Fits(True, "accuracy"), both, Fits(False, "accuracy")),
        (Fits(True), only, Fits(True, "f1")),
        (Fits(False, "f1"), only, Fits()),
    ):
        assert due_fits(wanted, fitted) == due, (wanted, fitted)
    assert stays_fitted(Fits(True, "f1"), both) == stays_fitted(Fits(), {}) == ""
    assert "its thresholds (--tune" in stays_fitted(Fits(True), both)


def test_flags_without_rows_are_refused() -> None:
    assert wanted_fits(TaskConfig(), has_rows=False) == Fits()
    assert wanted_fits(TaskConfig(tune_thresholds=True), has_rows=True) == Fits(False, "f1")
    for config in (TaskConfig(calibrate=True), TaskConfig(tune_thresholds=True)):
        with pytest.raises(ConfigError, match="needs rows to evaluate on"):
            wanted_fits(config, has_rows=False)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/home/anna/reviews", "reviews"),
        ("dev.tsv", "dev.tsv"),
        ("glue sst2 validation", "glue sst2 validation"),
        ("anna/reviews", "anna/reviews"),
    ],
)
def test_no_folder_of_this_machine_is_in_config_json(data: str, name: str) -> None:
    assert public_name(data) == name
