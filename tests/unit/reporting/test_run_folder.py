"""What is read of a run's folder, and what is said of a folder that is none."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import random_rows, scored_rows, write_run

from bertdist.core.errors import ConfigError
from bertdist.reporting.run_folder import read_run


def test_a_run(tmp_path: Path) -> None:
    rows = scored_rows(
        ["good", "so bad", "not"],
        ("no", "yes"),
        [1, 0, 0],
        [[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]],
        pairs=["a", "b", "c"],
        slices=["en", None, "en"],
        truncated=[False, False, True],
    )
    test = random_rows(50, ("no", "yes"), seed=1)
    run = read_run(write_run(tmp_path / "out", rows, test, check={"findings": []}))
    found = run.validation
    assert found is not None and run.test is not None and [*run.scored] == ["validation", "test"]
    assert found.truth.tolist() == [1, 0, 0] and found.predicted.tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-6)
    assert found.tokens.tolist() == [3, 4, 3] and found.truncated.tolist() == [False, False, True]
    assert found.slice_values == ("en",) and found.slices.tolist() == [0, -1, 0]
    assert found.texts([2, 0]) == [
        {"text": "not", "text_pair": "c"},
        {"text": "good", "text_pair": "a"},
    ]
    (error,) = found.errors()
    assert (error["text"], error["line"], error["label"]) == ("not", 4, "yes")
    accuracy = (run.test.truth == run.test.predicted).mean()
    assert accuracy == run.test.report["scores"]["accuracy"] and len(run.test) == 50
    assert run.config["learning_rate"] == 0.001 and run.metrics[-1]["kind"] == "meter"
    assert run.check == {"findings": []} and not run.is_evaluation


def test_several_labels_and_numbers(tmp_path: Path) -> None:
    truth = [[1, 0, 1], [0, 0, 0]]
    rows = scored_rows(["a", "b"], ("x", "y", "z"), truth, [[2, -1, -2], [-1, 1, -1]], "multi")
    found = read_run(write_run(tmp_path / "multi", rows)).validation
    assert found is not None and found.truth.tolist() == [[True, False, True], [False] * 3]
    assert found.predicted.tolist() == [[True, False, False], [False, True, False]]
    assert found.threshold == 0.5
    rows = scored_rows(["a", "b"], ("score",), [1.5, -2], [[1.0], [0.25]], "regression")
    found = read_run(write_run(tmp_path / "numbers", rows)).validation
    assert found is not None and found.truth.tolist() == [1.5, -2]
    assert found.predicted.tolist() == [1.0, 0.25] and found.is_regression


def test_an_evaluation(tmp_path: Path) -> None:
    of = {"model": "out", "data": "dev.tsv", "rows": 9}
    run = read_run(write_run(tmp_path / "scores", random_rows(9, ("a", "b")), evaluated=of))
    assert run.is_evaluation and run.config == {} and run.metrics == []
    assert run.validation is not None and len(run.validation) == 9


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    def problem(folder: Path) -> str:
        with pytest.raises(ConfigError) as error:
            read_run(folder)
        return str(error.value).replace(str(tmp_path), "T")

    assert problem(tmp_path / "none") == (
        "T/none is not the folder of a run: there is no such folder."
    )
    (tmp_path / "other").mkdir()
    assert problem(tmp_path / "other") == (
        "T/other is not the folder of a run: it has neither status.json nor an evaluation.json."
    )
    (tmp_path / "other" / "config.json").write_text("{}")
    assert "T/other is a model, not the folder of a run" in problem(tmp_path / "other")
    out = write_run(tmp_path / "out", random_rows(9, ("a", "b")))
    (out / "best").mkdir()
    assert problem(out / "best") == "T/out/best is a part of the run in T/out: name that folder."
    probabilities = (out / "probabilities.parquet").read_bytes()
    (out / "probabilities.parquet").unlink()
    assert problem(out) == (
        "T/out/probabilities.parquet is missing: the run is of an earlier version. The same "
        "bertdist train command writes it again, without training: bertdist train --config "
        "T/out/config.yaml"
    )
    (out / "probabilities.parquet").write_bytes(probabilities[:-9])
    assert "T/out/probabilities.parquet cannot be read" in problem(out)
    (out / "probabilities.parquet").write_bytes(probabilities)
    assert len(read_run(out).scored) == 1  # the control
    report = json.loads((out / "evaluation.json").read_text())
    report["per_class"][0]["rows"] += 1
    (out / "evaluation.json").write_text(json.dumps(report))
    assert "its labels are not those of evaluation.json, which is of other rows" in problem(out)
    (out / "evaluation.json").write_text("{}")
    assert "T/out/evaluation.json is damaged: it holds no scores." in problem(out)
    (out / "status.json").write_text('{"state": "preempted", "step": 7, "reason": "SIGTERM"}')
    assert problem(out) == (
        "The run in T/out has not finished (preempted, step 7): start it again with the same "
        "command, which resumes it."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folds", "is a cross-validation: name the run of a fold, such as"),
        ("seeds", "is runs of several seeds: name these, as in bertdist report"),
        ("trials", "is a sweep, whose page is"),
    ],
)
def test_a_folder_of_several_runs_is_named_as_that(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path)
