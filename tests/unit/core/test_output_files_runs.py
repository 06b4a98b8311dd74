"""Files of a run, which no output of a user may replace."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.args import read_predict_config
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import WRITTEN, run_that_wrote
from bertdist.data_quality.config import read_check_config

STEP = "checkpoints/step_000008/model.safetensors"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, below the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("text,label\na,b\n")
    for name in ("run.lock", "metrics.jsonl", "best/config.json", STEP, "best/mine.jsonl"):
        (tmp_path / "k" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "k" / name).write_text("{}")
    return tmp_path / "k"


def problem(read: Callable[[Sequence[str]], Any], *words: str) -> str:
    try:
        read(words)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_files_of_a_run_are_known_by_any_path(run: Path) -> None:
    Path("link").symlink_to("k")
    for name in (*WRITTEN, "best/config.json", STEP, "best.kept/x"):
        (run / "best.kept").mkdir(exist_ok=True)
        (run / "best.kept" / "x").touch()
        assert run_that_wrote(Path("k") / name) == run_that_wrote(Path("link") / name) == run
    others = ("new.jsonl", "best", "best.json", "best/new.json", "best/mine.jsonl", "other/x.json")
    for name in others:
        assert run_that_wrote(run / name) is None, name
    (run / "run.lock").unlink()  # the control: no run's folder
    assert run_that_wrote(run / "metrics.jsonl") is None


@pytest.mark.parametrize("model", ["m", "k"])  # another model, and that of the run
def test_an_output_replaces_no_file_of_a_run(run: Path, model: str) -> None:
    words = [f"--model={model}", "--input=in.csv", "--output"]
    for name in ("predictions.jsonl", "metrics.jsonl", "config.yaml", STEP):
        assert problem(read_predict_config, *words, f"k/{name}") == (
            f"--output k/{name} would replace a file of the run in {run}: name another file."
        )
    assert "would replace a file of" in problem(read_predict_config, *words, "k/best/config.json")
    for name in ("predictions.jsonl", "k/answers.jsonl", "k/best/mine.jsonl"):
        assert problem(read_predict_config, *words, name) == ""
    assert problem(read_predict_config, *words, "k") == "--output k: it is a folder; name a file."
    check = ["--train_file=in.csv", "--output"]
    assert "of the run in" in problem(read_check_config, *check, "k/metrics.jsonl")
    assert "of the run in" in problem(
        read_check_config, "--train_file=in.csv", "--fix=k/survey.json"
    )


def test_a_list_of_dropped_rows_that_fix_did_not_write_is_kept(run: Path) -> None:
    words = ("--train_file=in.csv", "--fix=f.parquet")
    assert problem(read_check_config, *words) == ""
    Path("f.parquet.dropped.jsonl").touch()
    assert problem(read_check_config, *words) == (
        "--fix f.parquet would replace f.parquet.dropped.jsonl, which it did not write: name "
        "another file, or remove that one."
    )
    Path("f.parquet").touch()  # the same command again
    assert problem(read_check_config, *words) == ""
