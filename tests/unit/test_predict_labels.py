"""Labels that could break or reorder lines of the terminal are escaped in predictions."""

import json
from pathlib import Path
from typing import Any

import pytest

from bertdist import cli, predict

LABELS = ["a\u202eb", "two\nlines", "tab\there", "plain"]
SHOWN = ["a\\u202eb", "two\\nlines", "tab\\there", "plain"]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = [{"label": label, "score": 0.5} for label in LABELS]
    monkeypatch.setattr(predict, "predict", lambda config: answers)
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", "--model", "m", *words])
    assert left.value.code == 0


def test_a_prediction_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["--text", "x"], monkeypatch)
    assert capsys.readouterr().out.split("\n") == [*(f"{label}\t0.5000" for label in SHOWN), ""]


def test_json_on_the_terminal_is_escaped_and_in_a_file_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("x\n")
    run(["--input", str(tmp_path / "in.txt")], monkeypatch)
    out = capsys.readouterr().out
    lines = out.split("\n")[:-1]
    assert [json.loads(line)["label"] for line in lines] == LABELS and "\u202e" not in out
    output = tmp_path / "out.jsonl"
    run(["--input", str(tmp_path / "in.txt"), "--output", str(output)], monkeypatch)
    assert "\u202e" in output.read_text(encoding="utf-8")  # the control
