"""Settings of `bertdist export`: flags and YAML -> a checked config, before torch is imported."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bertdist.core.args import parse_arguments, read_evaluate_settings
from bertdist.core.config import EvaluateConfig, LabelledConfig, setting
from bertdist.core.errors import ConfigError, NoLabelsError
from bertdist.core.output_files import check_export_folder
from bertdist.data import preflight

PROGRAM = "bertdist export"
ABOUT = """Export a trained classifier: to ONNX, also in int8, or to weights of half the size.
It is compared with the model on validation texts before it is kept.

  bertdist export --model out
  bertdist export --model out --int8 --input dev.tsv --output_dir exported_int8"""

LIBRARIES = ("onnx", "onnxruntime")
# Flags that are not about the rows to compare on.
_OWN = ("model", "to", "int8", "output_dir", "max_score_loss", "max_eval_samples", "max_length")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(LabelledConfig):
    """The settings of `bertdist export`."""

    _argument_group_name = "export"

    model: str = setting(
        "",
        "Trained classifier: a folder of Hugging Face files, such as out/best, or that of a run. "
        "Required.",
        brief="Trained classifier, such as out",
    )
    to: Literal["onnx", "safetensors-bf16"] = setting(
        "onnx",
        "Format. onnx: a graph for ONNX Runtime in float32. safetensors-bf16: a folder for "
        "transformers and bertdist whose weights are rounded to bf16, half the size.",
        brief="onnx (default) or safetensors-bf16",
    )
    int8: bool = setting(
        False,
        "Quantize the weights of the ONNX graph to int8: a quarter of the size, and other answers "
        "for some texts (see --max_score_loss).",
        brief="Quantize to int8: a quarter of the size",
    )
    output_dir: str = setting(
        "exported",
        "Folder to write: new, empty or of an earlier export, which is replaced as a whole.",
        brief="Folder to write, default exported",
    )
    input: str | None = setting(
        None,
        "Rows to compare on: a file, glob or URL as in training, with labels (then scores are "
        "compared too) or without. Default: the validation rows of the run, if they are as they "
        "were, else built-in texts.",
        brief="Rows to compare on, default: the run's",
    )
    split: str | None = setting(None, "Split of the hub data set (--dataset_name), such as test.")
    label_names: list[str] | None = setting(
        None,
        "Names of the model's outputs in their order, as the file has them. Default: the model's.",
    )
    max_eval_samples: int = setting(1000, "Compare on the first N rows only.")
    max_length: int | None = setting(
        None, "Maximum length of a text in tokens. Default: that of the training."
    )
    max_score_loss: float = setting(
        0.01,
        "With --int8 and safetensors-bf16: how much lower the score may be, such as 0.01 of "
        "accuracy, on the labelled rows; an export that loses more is not kept. Without labels at "
        "least 90% of the answers must be the same.",
    )


def read_export_config(arguments: Sequence[str]) -> ExportConfig:
    """The arguments of `bertdist export`. Raises ConfigError with one line per problem."""
    (config,) = parse_arguments(PROGRAM, [ExportConfig], arguments, ABOUT)
    assert isinstance(config, ExportConfig)
    if problems := list(_problems(config)):
        raise ConfigError("\n".join(problems))
    return config


def _problems(config: ExportConfig) -> Iterable[str]:
    if not config.model:
        yield "--model is missing: the folder of a trained classifier, such as out."
    if config.int8 and config.to != "onnx":
        yield f"--int8 goes with --to onnx, not with --to {config.to}."
    if not config.output_dir:
        yield "--output_dir has an empty value; name a folder."
    if config.max_eval_samples < 1:
        yield f"--max_eval_samples is {config.max_eval_samples}; expected at least 1."
    if config.max_length is not None and config.max_length < 3:
        yield f"--max_length is {config.max_length}; expected at least 3."
    if not 0 <= config.max_score_loss <= 1:
        yield f"--max_score_loss is {config.max_score_loss}; expected from 0 to 1."
    if not has_rows(config):
        for name in _given(config):
            yield f"--{name} is for the rows to compare on: give --input."
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        yield "export runs in one process: start it without --processes and without a launcher."


def has_rows(config: ExportConfig) -> bool:
    """Whether flags name the rows to compare on."""
    return any((config.input, config.dataset_name, config.task_name))


def _given(config: ExportConfig) -> list[str]:
    """Flags about rows that are not at their defaults."""
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _OWN and getattr(config, field.name) != field.default
    ]


def rows_to_evaluate(config: ExportConfig) -> EvaluateConfig:
    """What `bertdist evaluate` would be given for these rows. Raises ConfigError."""
    shared = {field.name for field in dataclasses.fields(EvaluateConfig)} - {"output_dir"}
    names = [*_given(config), "model", "max_eval_samples", "max_length"]
    return read_evaluate_settings({name: getattr(config, name) for name in names if name in shared})


def check_export(config: ExportConfig) -> None:
    """Raise BertdistError for what can be seen before torch is imported."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if config.to == "onnx" and missing:
        raise ConfigError(f"--to onnx needs {' and '.join(missing)}: pip install 'bertdist[onnx]'.")
    check_export_folder(Path(config.output_dir))
    if has_rows(config):
        with suppress(NoLabelsError):  # texts without labels are compared too
            preflight.check_evaluate(rows_to_evaluate(config))
    else:
        preflight.check_model(config.model, "--model")
