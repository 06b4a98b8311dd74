"""Trained models whose outputs cannot be told apart, or are several numbers, are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bertdist import Predictor
from bertdist.core.errors import ConfigError, ModelError
from bertdist.models.classifier import load_trained_classifier


def model_with(tiny_model: Path, folder: Path, **changes: Any) -> str:
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "1": "a"}, "label2id": {"a": 1}}, "id2label names 'a' twice."),
        (
            {"id2label": {"0": "a", "1": "b"}, "problem_type": "regression"},
            "predicts 2 numbers; bertdist has regression of one.",
        ),
    ],
)
def test_outputs_that_cannot_be_used_are_one_line(
    changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "m", **changes)
    with pytest.raises(ModelError) as caught:
        load_trained_classifier(folder)
    assert str(caught.value) == f"--model {folder} {message}".replace(" id2label", ": id2label")


@pytest.mark.parametrize("max_length", [2, 0, -1, 5.5, "5", True])
def test_a_maximum_length_that_is_none_is_one_line(max_length: Any, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^max_length is .*; expected a number of at least 3\.$"):
        Predictor(tiny_model, max_length=max_length)
