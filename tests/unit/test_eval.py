"""The files of an evaluation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertdist import eval as evaluation
from bertdist.core.config import EvaluateConfig
from bertdist.core.errors import ConfigError
from bertdist.core.output_files import check_evaluation_folder


def test_the_folder_of_an_evaluation_that_was_killed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scores"

    def killed(folder: Path, results: Any) -> None:
        (folder / "predictions.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_results", killed)
    results: Any = SimpleNamespace(report={"evaluated": {"model": "out", "rows": 1}, "scores": {}})
    records: Any = SimpleNamespace(bad_rows=())
    with pytest.raises(KeyboardInterrupt):
        evaluation._write(folder, results, records, EvaluateConfig(model="out"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluation.json",
        "predictions.jsonl",
    ]
    check_evaluation_folder(folder)
    (folder / "evaluation.json").unlink()  # the control: predictions of whom?
    with pytest.raises(ConfigError, match=r"holds 'predictions\.jsonl', which no evaluation wrote"):
        check_evaluation_folder(folder)
