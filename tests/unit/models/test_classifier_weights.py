"""Weight files that are broken, quantized, or do not fit config.json are one line when they are loaded."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ModelError
from bertdist.distributed.host_memory import limited_memory
from bertdist.models.classifier import load_classifier, load_trained_classifier, save_classifier
from bertdist.tasks.tasks import SingleLabel

TASK = SingleLabel(("no", "yes"))
STORED = "encoder.layer.1.attention.self.query.weight"  # of a BertModel
QUERY = f"bert.{STORED}"
Weights = dict[str, Tensor]


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def load(folder: Path) -> None:
    load_classifier(ModelConfig(model_name_or_path=str(folder)), TASK)


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def with_number(value: float, name: str = STORED) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[name].view(-1)[3] = value
        return weights

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_when_it_is_loaded(value: float, copy: Path) -> None:
    rewrite(copy, with_number(value))
    message = f"{QUERY} holds NaN or infinite numbers: the file is broken. Use an intact copy."
    with pytest.raises(ModelError, match=f"^--model_name_or_path {copy}: {message}$"):
        load(copy)


@pytest.mark.parametrize(
    ("header", "size", "problem"),
    [
        (10 << 30, 100, "is no safetensors file: its header would have 10,737,418,240 bytes"),
        (10 << 30, 11 << 30, "is no safetensors file: its header would have 10,737,418,240 bytes"),
        (1 << 63, 100, "is no safetensors file: its header would have 9,223,372,036,854,775,808"),
        (0, 100, "is no safetensors file: it has no header"),
        (2, 0, "is no safetensors file: it has no header"),
        (2, 20 << 30, ""),  # as safetensors says it
    ],
)
def test_a_header_larger_than_any_is_one_line_and_not_read(
    header: int, size: int, problem: str, copy: Path
) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(header.to_bytes(8, "little") + b"{}")
    os.truncate(path, size)  # a hole: it takes no space
    with limited_memory(1 << 30), pytest.raises(ModelError) as caught:
        load(copy)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", 3])
def test_shards_outside_the_folder_are_not_read(name: object, copy: Path) -> None:
    other = copy.parent / "other"
    other.mkdir()
    (copy / "model.safetensors").rename(other / "model.safetensors")
    save_file({"x": torch.zeros(1)}, copy / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {STORED: name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json names .*, which is not in this folder"):
        load(copy)


@pytest.mark.parametrize("value", [0.0, -3e38, 1e-45])
def test_any_finite_weight_is_loaded(value: float, copy: Path) -> None:
    rewrite(copy, with_number(value))
    load(copy)


def test_a_broken_weight_that_is_not_used_is_no_error(copy: Path) -> None:
    rewrite(copy, lambda weights: weights | {"cls.predictions.bias": torch.tensor([math.nan])})
    load(copy)


def test_a_trained_folder_with_a_broken_head_is_refused_and_none_is_saved(
    copy: Path, tmp_path: Path
) -> None:
    classifier, _ = load_classifier(ModelConfig(model_name_or_path=str(copy)), TASK)
    tokenizer, folder = AutoTokenizer.from_pretrained(copy), tmp_path / "trained"
    save_classifier(classifier, tokenizer, folder, {})
    load_trained_classifier(str(folder))
    rewrite(folder, with_number(math.nan, "classifier.weight"))
    with pytest.raises(ModelError, match=r"--model .*: classifier\.weight holds NaN"):
        load_trained_classifier(str(folder))
    with torch.no_grad():
        classifier.model.classifier.bias[1] = math.inf
    with pytest.raises(ModelError, match=r"classifier\.bias has become NaN or infinite"):
        save_classifier(classifier, tokenizer, tmp_path / "broken", {})
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_layers_that_config_json_does_not_count_are_an_error(prefix: str, copy: Path) -> None:
    rewrite(copy, lambda weights: {f"{prefix}{k}": v for k, v in weights.items()})
    load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(
        ModelError, match=rf"more layers than .* left out is {prefix}encoder\.layer\.1\."
    ):
        load(copy)


def test_weights_of_another_head_or_without_a_place_are_no_layers(copy: Path) -> None:
    extra = {"cls.predictions.transform.dense.weight": torch.ones(2, 2), "foo": torch.ones(2)}
    rewrite(copy, lambda weights: weights | extra)
    load(copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_an_error(dtype: torch.dtype, copy: Path) -> None:
    rewrite(copy, lambda weights: weights | {STORED: weights[STORED].to(dtype)})
    with pytest.raises(ModelError, match=rf": {STORED} in model\.safetensors is \w+: quantized "):
        load(copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_dtype_are_loaded_as_float32(
    dtype: torch.dtype, copy: Path
) -> None:
    stored = load_file(copy / "model.safetensors")[STORED].to(dtype)
    rewrite(copy, lambda weights: {k: v.to(dtype) for k, v in weights.items()})
    classifier, _ = load_classifier(ModelConfig(model_name_or_path=str(copy)), TASK)
    assert torch.equal(classifier.model.get_parameter(QUERY), stored.float())


def test_an_adapter_beside_a_model_is_not_ignored(copy: Path) -> None:
    load(copy)
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\)"):
        load(copy)
