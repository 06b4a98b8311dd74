"""The files of an evaluation."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertdist import eval as evaluation
from bertdist.core.config import EvaluateConfig
from bertdist.core.errors import CheckpointError, ConfigError
from bertdist.core.output_files import check_evaluation_folder
from bertdist.eval import names_in_files

RESULTS: Any = SimpleNamespace(
    report={"evaluated": {"model": "out", "rows": 1}, "scores": {}},
    predictions=[],
    errors=[],
    probabilities=None,
)
RECORDS: Any = SimpleNamespace(bad_rows=())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_of_an_evaluation_that_was_killed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "scores", EvaluateConfig(model="out")

    def killed(folder: Path, results: Any) -> None:
        (folder / "predictions.jsonl").write_text("")
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_results", killed)
        if not (child := os.fork()):
            evaluation._write(folder, RESULTS, RECORDS, config)
        os.waitpid(child, 0)
    assert names(folder) == [".evaluation.json.partial"]
    check_evaluation_folder(folder)
    (folder / "predictions.jsonl").touch()  # killed when it took the place of an earlier one
    check_evaluation_folder(folder)
    shutil.rmtree(folder / ".evaluation.json.partial")  # the control: predictions of whom?
    with pytest.raises(ConfigError, match=r"holds 'predictions\.jsonl', which no evaluation wrote"):
        check_evaluation_folder(folder)
    evaluation._write(folder, RESULTS, RECORDS, config)
    assert names(folder) == ["errors.jsonl", "evaluation.json", "predictions.jsonl"]


def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "scores", evaluation.write_results
    evaluation._write(folder, RESULTS, RECORDS, EvaluateConfig(model="out"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = RESULTS.__dict__ | {"predictions": [{"row": 0}]}
    others: Any = SimpleNamespace(**rows)

    def full(folder: Path, results: Any) -> None:
        write(folder, results)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_results", full)
        with pytest.raises(OSError, match="No space left"):
            evaluation._write(folder, others, RECORDS, EvaluateConfig(model="out"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    evaluation._write(folder, others, RECORDS, EvaluateConfig(model="out"))  # the control
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != before


def test_an_evaluation_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "scores", os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "evaluation.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"evaluation\.json: No space left .* needed, "):
        evaluation._write(folder, RESULTS, RECORDS, EvaluateConfig(model="out"))
    assert names(folder) == []


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("L R", ("L", "R")),
        ("L=neg R=pos", ("L", "R")),
        ("R=pos L=neg", ("L", "R")),
        ("1 = pos,0 = neg", ("0", "1")),
        ("a=0 a=1", ("a=0", "a=1")),  # of the model's own kind: not codes
        ("neg pos", ("neg", "pos")),
    ],
)
def test_label_names_are_in_order_or_by_code(given: str, names: tuple[str, ...]) -> None:
    words = given.split("," if "," in given else None)
    labels = ("0", "1") if given.startswith("a=") else ("neg", "pos")
    assert names_in_files(words, labels) == names


def test_a_code_for_a_label_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--label_names names bad, which the model does not"):
        names_in_files(["L=neg", "R=bad"], ("neg", "pos"))
