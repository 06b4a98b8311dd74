"""Labels and texts that could break or reorder lines of the terminal are escaped in predictions."""

import json

import pytest

from bertdist.core.atomic_io import to_json
from bertdist.core.terminal import excerpt, write_to_stdout
from bertdist.predict import _as_text

LABELS = ["a\u202eb", "two\nlines", "tab\there", "plain"]
SHOWN = ["a\\u202eb", "two\\nlines", "tab\\there", "plain"]


def test_a_prediction_is_one_line_with_its_text() -> None:
    lines = [_as_text({"label": label, "score": 0.5}, excerpt("a\nfilm")) for label in LABELS]
    assert lines == [f"{label}\t0.5000\ta\\nfilm" for label in SHOWN]


def test_several_labels_are_lines_of_which_the_first_has_the_text() -> None:
    answer = {"labels": [{"label": label, "score": 0.5} for label in LABELS]}
    first, *others = _as_text(answer, "a film").split("\n")
    assert first == f"{SHOWN[0]}\t0.5000\ta film" and others == [f"{x}\t0.5000" for x in SHOWN[1:]]
    assert _as_text({"labels": []}, "a film") == "(no label)\t\ta film"
    assert _as_text({"label": None, "score": 0.25}, "x") == "(no label)\t0.2500\tx"


def test_json_on_standard_output_is_escaped_with_the_same_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = b"".join(to_json({"label": label}) for label in LABELS)
    write_to_stdout(lines, is_json=True)
    out = capsys.readouterr().out
    assert [json.loads(line)["label"] for line in out.split("\n")[:-1]] == LABELS
    assert "\u202e" not in out and "\u202e" in lines.decode()
