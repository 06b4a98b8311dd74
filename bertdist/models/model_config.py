"""What the files of a model may hold (config.json, weights), and whether the tokenizer fits them.

Checked before a model is built.

Settings that change the arithmetic and that bertdist does not compute are refused in one line;
settings that only change what a model returns are reset (`reset_outputs`).

An embedding may have more rows than the tokenizer has ids: many are padded to a multiple of 64. An
id without a row would be an IndexError in the middle of an epoch, and a device assert on a GPU
(`missing_tokens`).
"""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from bertdist.core.atomic_io import (
    MANIFEST,
    find_damage,
    read_json_object,
    safetensors_problem,
)
from bertdist.core.errors import ModelError, did_you_mean, listed
from bertdist.core.hub import MAX_CONFIG_BYTES
from bertdist.core.terminal import excerpt_of

MAX_LABELS = 1_000_000
MAX_NUM_LABELS = (
    100_000  # without names: transformers makes and prints a name for each, 14 s per million
)
MAX_LAYERS = 1_000

# Sizes that every encoder has, under the names that PreTrainedConfig gives them.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")

# Settings of what a model returns or how it computes, none of which changes a logit.
NEUTRAL = {
    "chunk_size_feed_forward": 0,  # chunks must divide the number of tokens
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}

SHOWN_TOKENS = 3


def check_file(folder: Path, where: str) -> None:
    """Check what transformers would take for granted in a config.json: its size and labels.

    Raises ModelError. A file that is missing or no JSON is left to transformers.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise ModelError(f"{where}: config.json has {size:,} bytes, more than any model's.")
    with suppress(ValueError, RecursionError):
        raw = json.loads(path.read_bytes())
        problem = next(_label_problems(raw), None) if isinstance(raw, dict) else None
        if problem is not None:
            raise ModelError(f"{where}: config.json: {problem}.")


def _label_problems(raw: dict[str, Any]) -> Iterator[str]:
    number, names = raw.get("num_labels"), raw.get("id2label")
    if number is not None and not (type(number) is int and 1 <= number <= MAX_NUM_LABELS):
        yield f"num_labels is {excerpt_of(number)}; expected 1 to {MAX_NUM_LABELS:,}"
    if not isinstance(kind := raw.get("problem_type"), str | None):
        yield f"problem_type is {excerpt_of(kind)}; expected a string"
    if names is None:
        return
    if not isinstance(names, dict) or not names or len(names) > MAX_LABELS:
        yield f'id2label is {excerpt_of(names)}; expected {{"0": "name", "1": "name", ...}}'
    elif missing := [i for i in range(len(names)) if str(i) not in names]:
        yield f"id2label has {len(names):,} names, and none for {missing[0]}"
    elif wrong := [v for v in names.values() if not isinstance(v, str | int | float)]:
        yield f"id2label has the name {excerpt_of(wrong[0])}; expected a string"


def check_values(config: PretrainedConfig, packed: bool, where: str) -> None:
    """Raise ModelError for a value that no model can have. transformers has checked the types.

    packed: the model runs without padding, and all its fields are checked; else `SIZES`.
    """
    defaults = {field.name: field.default for field in fields(type(config))}
    sizes = {config.attribute_map.get(name, name) for name in SIZES}
    for name, value in vars(config).items():
        default = defaults.get(name) if packed or name in sizes else None
        if problem := _problem(name, value, default):
            raise ModelError(f"{where}: config.json: {name} is {excerpt_of(value)}; {problem}")
    pad, size = (getattr(config, name, None) for name in ("pad_token_id", "vocab_size"))
    if isinstance(pad, int) and isinstance(size, int) and pad >= size:
        raise ModelError(f"{where}: config.json: pad_token_id is {pad}, vocab_size {size}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{where}: config.json: quantized weights cannot be used.")


def _problem(name: str, value: Any, default: Any) -> str | None:
    if isinstance(value, str) and name.endswith(("_act", "activation")) and value not in ACT2FN:
        return f"unknown activation function.{did_you_mean(value, list(ACT2FN))}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "expected a finite number."
    if ("dropout" in name or "pdrop" in name) and not 0 <= value <= 1:
        return "expected 0 to 1."
    if isinstance(default, bool) or not isinstance(default, int | float) or name.endswith("_id"):
        return None
    lowest = 1 if isinstance(default, int) and default > 0 and name != "type_vocab_size" else 0
    is_count = isinstance(default, int) and ("layer" in name or "group" in name)
    if default >= 0 and value < lowest:
        return f"expected {lowest} or more."
    return f"expected {MAX_LAYERS:,} at most." if is_count and value > MAX_LAYERS else None


def check_size(config: PretrainedConfig, folder: Path, where: str) -> None:
    """Raise ModelError if the model would have more weights than its files have bytes.

    Weights that do not fit are initialized by transformers, whatever their size.
    """
    files = list(folder.glob("*.safetensors"))
    num_bytes = sum(path.stat().st_size for path in files)
    if not files:
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(
            copy.deepcopy(config), attn_implementation="eager"
        )
    weights = sum(weight.numel() for weight in model.base_model.parameters())
    if weights > num_bytes + (1 << 24):  # the pooler may be new
        raise ModelError(
            f"{where}: config.json describes a model of {weights:,} weights, and "
            f"{', '.join(path.name for path in files[:3])} can hold {num_bytes:,} at most."
        )


def check_weight_files(folder: Path, where: str) -> None:
    """Raise ModelError for weights that only other programs can read, with what to do."""
    files = sorted(folder.glob("*.safetensors"))
    shards = read_json_object(folder / "model.safetensors.index.json").get("weight_map")
    for name in shards.values() if isinstance(shards, dict) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{where}: model.safetensors.index.json names {excerpt_of(name)}, which is not in "
                "this folder."
            )
    for path in files:
        with suppress(OSError), path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ModelError(
                    f"{where}: {path.name} is a Git LFS pointer, not the weights: run `git lfs "
                    "pull` in that folder."
                )
        with suppress(OSError):
            if problem := safetensors_problem(path):
                raise ModelError(f"{where}: {problem}. Use an intact copy.")
        # MemoryError: of a limit of address space, into which the file is mapped
        with suppress(OSError, SafetensorError, MemoryError), safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                dtype = weights.get_slice(name).get_dtype()
                if name.endswith(".weight") and dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(
                        f"{where}: {name} in {path.name} is {dtype}: quantized weights cannot be "
                        "used. Give the folder of the model before it was quantized."
                    )
    if not files and (pickles := sorted(folder.glob("pytorch_model*.bin"))):
        raise ModelError(
            f"{where}: {pickles[0].name} is a pickle, which is not read: load it in transformers "
            "and save it with save_pretrained, which writes model.safetensors."
        )
    if not files and folder.is_dir():
        what = "an export for ONNX Runtime; give the folder that was exported"
        of = f": it is {what}" if (folder / "model.onnx").exists() else ""
        raise ModelError(f"{where}: the folder holds no weights (model.safetensors){of}.")


def check_manifest(folder: Path, is_own: bool, where: str) -> None:
    """Raise ModelError for a folder that `save_classifier` wrote, if a file has changed since.

    is_own: by its config.json.
    """
    manifest = folder / MANIFEST
    with suppress(OSError):
        if is_own or b"xxh3_128" in manifest.read_bytes():
            damage = find_damage(folder, required=()) if manifest.exists() else None
            if damage is not None:
                raise ModelError(
                    f"{where}: {damage}. Use an intact copy; if the file was changed on purpose, "
                    f"remove {manifest}."
                )


def check_arithmetic(config: PretrainedConfig, counts_from_pad: bool, where: str) -> None:
    """Raise ModelError for a setting that changes the logits of a model that runs without padding,
    and that is not computed here.

    counts_from_pad: the model's positions begin after pad_token_id.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in rope.values() if isinstance(each, dict)}
    position = getattr(config, "position_embedding_type", None) or "absolute"
    problem = None
    if getattr(config, "is_decoder", False):
        problem = "is_decoder: the first token, which the classifier reads, would see no other"
        problem += " token; set it to false"
    elif getattr(config, "add_cross_attention", False):
        problem = "add_cross_attention: a classifier has no second input; set it to false"
    elif position != "absolute":
        problem = f"position_embedding_type {position!r} is not supported"
    elif getattr(config, "pruned_heads", None):
        problem = "pruned_heads is not supported"
    elif getattr(config, "is_heterogeneous", False):
        problem = "per_layer_config is not supported"
    elif "longrope" in kinds:
        problem = "rope_type 'longrope' makes a text depend on the others of its batch"
    elif counts_from_pad and config.pad_token_id is None:
        problem = "pad_token_id is null; positions are counted from it"
    if problem is not None:
        raise ModelError(f"{where}: config.json: {problem}.")


def reset_outputs(config: PretrainedConfig) -> list[str]:
    """Reset settings that change no logit; a note that names them."""
    changed = {
        name: value
        for name, neutral in NEUTRAL.items()
        if (value := getattr(config, name, neutral)) not in (neutral, None)
    }
    for name in changed:
        setattr(config, name, NEUTRAL[name])
    if not changed:
        return []
    names = ", ".join(f"{name} {value}" for name, value in changed.items())
    return [f"Settings of config.json that change no logit are reset: {names}."]


def type_notes(config: PretrainedConfig) -> list[str]:
    """A note where the weights are those of another type of model."""
    names = config.architectures if isinstance(config.architectures, list) else []
    for name in names[:1]:
        architecture = getattr(transformers, str(name), None)
        model_type = getattr(architecture, "config_class", config).model_type
        if model_type != config.model_type:
            return [
                f"config.json names the architecture {name}, a model of type {model_type!r}, and "
                f"model_type {config.model_type!r}: the weights are read as the latter."
            ]
    return []


def missing_tokens(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: str
) -> list[str]:
    """Tokens that were added to a tokenizer and have no row in the model's embedding, by id.

    model: for the error message. Raises ModelError where tokens of the vocabulary itself have none:
    it belongs to another model.
    """
    rows = getattr(model_config, "vocab_size", None)
    if rows is None:  # CANINE hashes characters
        return []
    ids = tokenizer.get_vocab()
    missing = sorted((token for token, id in ids.items() if id >= rows), key=ids.__getitem__)
    if set(missing) - set(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{model}: the tokenizer has {len(ids):,} tokens with ids up to {ids[missing[-1]]:,}, "
            f"the model's embedding has {rows:,} rows. Use the model's own tokenizer (without "
            "--tokenizer_name), or the model that belongs to this tokenizer."
        )
    return missing


def check_vocabulary(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model: str
) -> list[str]:
    """A note if training will resize the embedding. Raises ModelError as `missing_tokens` does."""
    missing = missing_tokens(model_config, tokenizer, model)
    return [f"{_describe(missing, model_config)}: training resizes it."] if missing else []


def _describe(missing: list[str], model_config: PretrainedConfig) -> str:
    """The missing tokens in words: the beginning of a sentence."""
    count = "1 added token" if len(missing) == 1 else f"{len(missing):,} added tokens"
    return (
        f"The tokenizer has {count} ({listed(missing, SHOWN_TOKENS)}) that the model's embedding "
        f"of {model_config.vocab_size:,} rows lacks"
    )


def resize_embedding(model: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """Give added tokens rows in the embedding, drawn from torch's generator, and return notes.

    Raises ModelError as `missing_tokens` does, and where transformers cannot resize the model.
    """
    missing = missing_tokens(model.config, tokenizer, where)
    if not missing:
        return []
    found, rows = _describe(missing, model.config), max(tokenizer.get_vocab().values()) + 1
    try:
        model.resize_token_embeddings(rows)
    except (RuntimeError, TypeError, ValueError):  # NotImplementedError is a RuntimeError
        raise ModelError(
            f"{where}: {found}, and transformers cannot resize a model of type "
            f"{model.config.model_type!r}."
        ) from None
    return [f"{found}: resized to {rows:,}, the new rows drawn at random."]


def segment_notes(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where the tokenizer gives pairs segment ids that the model has no row for."""
    rows: int = getattr(model_config, "type_vocab_size", 0)
    segments = tokenizer(["a"], ["b"]).get("token_type_ids") or [[0]]
    if not 0 < rows <= max(segments[0], default=0):
        return []
    return [
        f"Pairs: the tokenizer gives segment ids up to {max(segments[0])}, the model has "
        f"type_vocab_size {rows}: the ids that it lacks are set to 0."
    ]
