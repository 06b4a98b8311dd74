"""A Hugging Face classifier that reads padding-free batches; its weights, its config and its folder stay plain Hugging Face.

In: a model's name and a Task. Out: `Classifier`, a Batch -> logits. The encoder sees one row of T tokens; its last layer gives
the first token of each text (families.py), so that the model's own head believes it was given N texts of one token.

An architecture that is no family of families.py is given texts padded to the longest of the micro-batch, if that changes no
answer: this is tried, not believed. Where it does (FNet mixes all places, XLNet's head reads the last), texts of one length run
together, and nothing is padded.

Legend: T tokens, N texts, O outputs.
"""

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ConfigError, ModelError, did_you_mean
from bertdist.core.hub import explain_hub_error, probe_hub, warn_if_offline
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import attention
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.cpu_layers import reuse_embedding_gradient, use_onednn
from bertdist.models.dropout import DropoutMasks, hold, replace_dropouts
from bertdist.tasks.tasks import Task, task_of_model

_NEW = "New weights"

OFFLINE_HELP = (
    "Without a network, give a folder that holds config.json, model.safetensors and the tokenizer; "
    "`hf download NAME --local-dir FOLDER` makes one where there is a network."
)


class Classifier(nn.Module):
    """batch -> logits (N, O)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.gradient_checkpointing = False
        self._noise: DropoutMasks | None = None  # dropout's masks of the texts in hand
        self._takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        family = ARCHITECTURES.get(model.config.model_type)
        self.packed = family is not None
        self._first_position = family.first_position(model.config) if family else 0
        positions = int(getattr(model.config, "max_position_embeddings", 512))
        self.max_positions = (
            positions - self._first_position if positions > 0 else sys.maxsize
        )  # XLNet's -1: no table of them
        replace_dropouts(model, lambda: self._noise)
        reuse_embedding_gradient(model)
        use_onednn(model)
        if family is not None:
            family.prepare(model)
        pooling = getattr(model.config, "classifier_pooling", "cls")  # ModernBERT's
        self.first_tokens_only = self.packed and pooling == "cls"  # what leaves the last layer
        self.padding_changes_logits = not self.packed and self._changes_when_padded()

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (N, O) of the texts of a micro-batch."""
        if not self.packed:
            return self._unpacked(batch)
        self._noise = self._noise_of(batch, slice(None))
        hold(self._noise)
        inputs = {
            "input_ids": batch.ids[None],
            "position_ids": batch.positions[None] + self._first_position,
        }
        if self._takes_segments:
            inputs["token_type_ids"] = batch.segments[None]
        heads = self.model.config.num_attention_heads
        packing = attention.build_packing(
            batch.lengths,
            batch.starts[:-1],
            heads,
            self.attention_kernel(batch.ids.device),
            self._noise,
        )
        logits: Tensor = self.model(**inputs, packing=packing).logits
        return logits

    def enable_gradient_checkpointing(self) -> None:
        """Keep a layer's input only, and compute the layer again in the backward, with the same dropout; raises ConfigError."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return (
                self._noise.replayed()
                if self._noise is not None
                else (nullcontext(), nullcontext())
            )

        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"--gradient_checkpointing cannot take effect: transformers has none for {self.model.config.model_type}."
            )
        # transformers 5.23 has the new name and warns of the old one; both take the same first argument
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None)
            or self.model.gradient_checkpointing_enable
        )
        self.gradient_checkpointing = True
        enable({"use_reentrant": False, "context_fn": contexts})

    def attention_kernel(self, device: torch.device) -> attention.Kernel:
        """How attention is computed there, in the precision of the moment (inside or outside of autocast)."""
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else self.model.dtype
        )
        return attention.select_kernel(
            device, dtype, self.model.config.hidden_size // self.model.config.num_attention_heads
        )

    def _noise_of(self, batch: PackedBatch, texts: Any) -> DropoutMasks | None:
        """Dropout's masks for some texts of a batch (an index), where they belong to the rows."""
        on_cpu = batch.ids.device.type == "cpu"
        return (
            DropoutMasks(batch.rows[texts].tolist(), np.asarray(batch.lengths)[texts].tolist())
            if self.training and on_cpu
            else None
        )

    def _unpacked(self, batch: PackedBatch) -> Tensor:
        lengths = np.asarray(batch.lengths)
        groups = (
            [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
            if self.padding_changes_logits
            else [np.arange(len(lengths))]
        )
        logits = torch.cat([self._padded(batch, texts) for texts in groups])
        return logits[torch.from_numpy(np.concatenate(groups).argsort()).to(logits.device)]

    def _padded(self, batch: PackedBatch, texts: "np.ndarray[Any, Any]") -> Tensor:
        """Logits of some texts, laid out as long as the longest of them."""
        self._noise = self._noise_of(batch, texts)
        longest = max(batch.lengths[i] for i in texts)
        places, real = (
            torch.from_numpy(array[texts, :longest]).to(batch.ids.device)
            for array in attention.grid(batch.lengths)
        )
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        inputs = {
            "input_ids": batch.ids[places].masked_fill(~real, pad),
            "attention_mask": real.long(),
        }
        if self._takes_segments:
            inputs["token_type_ids"] = batch.segments[places].masked_fill(~real, 0)
        logits: Tensor = self.model(**inputs).logits
        return logits

    @torch.no_grad()
    def _changes_when_padded(self) -> bool:
        """Whether texts get other answers together than alone, by more than a thousandth, which is rounding; raises ModelError."""
        config, was_training, self.padding_changes_logits = self.model.config, self.training, False
        pad, begin, end = (
            getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")
        )
        ids = [id for id in range(20) if id not in (pad, begin, end)]
        end = [end] if isinstance(end, int) and end < config.vocab_size else []  # BART looks for it
        parts = [[*ids[:length], *end] for length in (12, 5, 4, 3, 7)]
        texts = [Example(0, part, [0] * len(part), 0, 1.0) for part in parts]
        self.eval()
        try:
            alone, batched = (
                torch.cat([self(collate([text])) for text in texts]),
                self(collate(texts)),
            )
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"A model of type {config.model_type!r} does not classify plain texts: {_first_line(error)}"
            ) from error
        self.train(was_training)
        return not bool((batched - alone).abs().max() <= 1e-3 * alone.abs().max())


def load_model_config(config: ModelConfig, flag: str = "--model_name_or_path") -> PretrainedConfig:
    """The model's config.json, before any weights; raises ModelError."""
    name = config.model_name_or_path
    folder, where = Path(name).expanduser(), f"{flag} {name}"
    looks_like_a_folder = (
        name.startswith((".", "~", "/"))
        or name.count("/") > 1
        or ("/" in name and folder.parent.is_dir())
    )
    if looks_like_a_folder and not folder.is_dir():
        beside = (
            [str(path) for path in folder.parent.iterdir() if path.is_dir() and path.name[0] != "."]
            if folder.parent.is_dir()
            else []
        )
        raise ModelError(f"{where}: there is no such folder.{did_you_mean(name, beside)}")
    probe_hub(name)
    try:
        # False, not None: None asks at the terminal whether to run code of the folder, and takes a "y" from a pipe (transformers 5.23)
        settings: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=False
        )
    except (OSError, TypeError, ValueError) as error:  # TypeError: a list, in transformers 5.17
        if folder.is_dir():
            raise ModelError(
                f"{where}: the folder holds no config.json that can be read ({_first_line(error)})"
            ) from None
        raise ModelError(
            f"{where} is neither a folder here nor a model that the hub gave. {explain_hub_error(error, name)} {OFFLINE_HELP}"
        ) from None
    warn_if_offline(name)
    return settings


def pretrained_labels(settings: PretrainedConfig) -> tuple[str, ...] | None:
    """The label names a model was trained with; None where it has only numbered place-holders."""
    names = _names(settings)
    return None if all(name.startswith("LABEL_") for name in names) else names


def load_classifier(
    config: ModelConfig,
    task: Task,
    settings: PretrainedConfig | None = None,
    flag: str = "--model_name_or_path",
) -> tuple[Classifier, list[str]]:
    """The model in float32 with a head for the task, and what a person should know of how it was loaded.

    New weights are drawn from torch's generator: seed it before. Only safetensors are read, never a pickle. Raises ModelError
    where weights other than the head's do not fit.
    """
    attention.register()
    settings = settings or load_model_config(config, flag)
    settings.num_labels = len(task.labels)
    settings.id2label = dict(enumerate(task.labels))
    settings.label2id = {label: i for i, label in enumerate(task.labels)}
    settings.problem_type = task.problem_type  # type: ignore[assignment]  # a Literal of the same words
    if config.dropout is not None:
        named = {
            name: value
            for name, value in vars(settings).items()
            if "dropout" in name or "pdrop" in name
        }  # GPT-2's end in pdrop
        known = [name for name, value in named.items() if not isinstance(value, bool)]
        if not known:
            raise ConfigError(
                f"--dropout cannot take effect: the config of {settings.model_type} names no dropout."
            )
        settings.update(dict.fromkeys(known, config.dropout))
    packed, where = settings.model_type in ARCHITECTURES, f"{flag} {config.model_name_or_path}"
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.model_name_or_path,
            config=settings,
            revision=config.model_revision,
            dtype=torch.float32,
            attn_implementation=attention.NAME if packed else None,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{where}: {_first_line(error)}") from None
    body = f"{model.base_model_prefix}."
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    missing = sorted({*info["missing_keys"], *mismatched})
    if lost := [key for key in missing if key.startswith(body) and ".pooler." not in key]:
        trouble = (
            "do not have the shape that config.json says"
            if lost[0] in mismatched
            else "are missing"
        )
        raise ModelError(
            f"{where}: {len(lost)} weights of the model {trouble}, the first is {lost[0]}."
        )
    notes = [f"{_NEW}, to be trained: {', '.join(missing)}."] if missing else []
    classifier, kind = Classifier(model), f"Models of type {settings.model_type!r}"
    if classifier.padding_changes_logits:
        notes.append(
            f"{kind} give other answers when they are padded, so only texts of one length run together."
        )
    elif not packed:
        notes.append(
            f"{kind} run padded to the longest text of a micro-batch; the results are the same."
        )
    if config.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    if config.max_length > classifier.max_positions:
        raise ConfigError(
            f"--max_length is {config.max_length}; this model has {classifier.max_positions} positions."
        )
    return classifier, notes


def load_trained_classifier(folder: str) -> tuple[Classifier, Task, dict[str, Any]]:
    """A trained classifier, its task, and what `save_classifier` noted beside it; raises ModelError."""
    config = ModelConfig(model_name_or_path=folder, max_length=0)
    settings = load_model_config(config, "--model")
    task = task_of_model(settings.problem_type, _names(settings))
    model, said = load_classifier(config, task, settings, "--model")
    if said and said[0].startswith(_NEW):
        raise ModelError(f"--model {folder} is not a trained classifier. {said[0]}")
    return model, task, saved_metadata(settings)


def saved_metadata(settings: PretrainedConfig) -> dict[str, Any]:
    """What `save_classifier` noted beside a model; nothing, where another program wrote it."""
    return dict(getattr(settings, "bertdist", None) or {})


def save_classifier(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, folder: Path, notes: dict[str, Any]
) -> None:
    """Write a plain Hugging Face folder that `pipeline("text-classification")` loads. notes go to config.json under "bertdist"."""
    model.model.config.bertdist = notes
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _names(settings: Any) -> tuple[str, ...]:
    return tuple(settings.id2label[i] for i in sorted(settings.id2label))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip()
