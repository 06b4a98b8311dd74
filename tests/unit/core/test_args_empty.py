"""An empty value, as of an unset shell variable, is an error in every command; only texts may be
empty.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bertdist.core.args import (
    TRAIN_SECTIONS,
    read_config,
    read_evaluate_config,
    read_predict_config,
    read_settings,
)
from bertdist.core.config import DataConfig, EvaluateConfig, PredictConfig
from bertdist.core.errors import ConfigError
from bertdist.core.flags import flags_of
from bertdist.data_quality.config import CheckConfig, read_check_arguments

EMPTY = "has an empty value: give one, or leave the flag out (is a shell variable unset?)."
READERS: dict[str, tuple[Callable[[Sequence[str]], Any], list[Any]]] = {
    "train": (read_config, TRAIN_SECTIONS),
    "predict": (read_predict_config, [PredictConfig]),
    "evaluate": (read_evaluate_config, [EvaluateConfig]),
    "check": (read_check_arguments, [CheckConfig, DataConfig]),
}


@pytest.mark.parametrize("command", READERS)
def test_every_flag_of_a_command_refuses_an_empty_value(command: str) -> None:
    read, sections = READERS[command]
    flags = [flag for section in sections for flag in flags_of(section)]
    texts = [flag for flag in flags if flag.type is str and not flag.choices]
    assert len(texts) > 10
    for flag in texts:
        if flag.name in ("text", "text_pair"):
            continue
        with pytest.raises(ConfigError) as caught:
            read([f"--{flag.name}", ""])
        # Without a default it is as if it were not given, which is an error too.
        what = "is missing" if flag.default == "" else EMPTY
        assert f"--{flag.name} {what}" in str(caught.value)


def test_an_empty_text_is_a_text() -> None:
    config = read_predict_config(["--model", "m", "--text", "", "--text_pair", ""])
    assert (config.text, config.text_pair) == ([""], [""])


@pytest.mark.parametrize(
    "words",
    [
        ["--train_file", "a.tsv", ""],
        ["--train_file="],
        ["--config", ""],
        ["--config="],
        ["--label_names", "", "b"],
    ],
)
def test_also_one_of_several_values_and_the_file_of_settings(words: list[str]) -> None:
    needed = ["--model_name_or_path=m", "--output_dir=o", "--train_file=t"]
    with pytest.raises(ConfigError) as caught:
        read_config([*needed, *words])
    assert str(caught.value) == f"{words[0].rstrip('=')} {EMPTY}"


def test_also_in_yaml_and_python(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('validation_file: ""\ntrain_file: [a.tsv, ""]\n', encoding="utf-8")
    needed = {"model_name_or_path": "m", "output_dir": "o"}
    expected = f"--train_file {EMPTY}\n--validation_file {EMPTY}"
    with pytest.raises(ConfigError) as caught:
        read_settings({**needed, "config": str(file)})
    assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        read_settings({**needed, "train_file": ["a.tsv", ""], "validation_file": ""})
    assert str(caught.value) == expected
    # Without a value, YAML has none: the default.
    file.write_text("validation_file:\ntrain_file: a.tsv\n", encoding="utf-8")
    assert read_settings({**needed, "config": str(file)}).data.validation_file is None
