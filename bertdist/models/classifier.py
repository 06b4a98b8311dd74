"""A Hugging Face text classifier that reads packed batches, without padding.

    classifier, notes = load_classifier(ModelConfig(model_name_or_path="..."), task)
    logits = classifier(batch)                           # PackedBatch -> (N, O)
    save_classifier(classifier, tokenizer, folder, {})   # a plain Hugging Face folder
    classifier, task, metadata = load_trained_classifier(folder)

The encoder reads one row of T tokens; its last layer computes the first token of each text only
(architectures.py), so that the model's own head reads N texts of one token. Weights, config and
saved folder stay plain Hugging Face.

An architecture that architectures.py does not know is given texts padded to the longest of the
micro-batch, if that changes no logits: this is tried when it is loaded. Where it does (FNet mixes
all positions, XLNet's head reads the last), only texts of equal length run together, unpadded.

Legend: T tokens, N texts, O outputs of the task.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ConfigError, ModelError, listed
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example, save_tokenizer
from bertdist.distributed.launch import reset_torch_modes
from bertdist.models import attention, bf16
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.cpu_layers import reuse_embedding_gradient, use_onednn
from bertdist.models.dropout import DropoutMasks, replace_dropouts, set_current_masks
from bertdist.models.freezing import freeze
from bertdist.models.head import last_linear, output_layer
from bertdist.tasks.calibration import check_calibration
from bertdist.tasks.labels import REGRESSION, match_labels
from bertdist.tasks.tasks import Task, task_of_model

_NEW_WEIGHTS = "New weights, to be trained"


class Classifier(nn.Module):
    """A Hugging Face classifier as a module PackedBatch -> logits (N, O); see `load_classifier`."""

    def __init__(self, model: Any) -> None:
        """model: any AutoModelForSequenceClassification, changed in place. Raises ModelError."""
        super().__init__()
        self.model = model
        self.gradient_checkpointing = False
        self._dropout_masks: DropoutMasks | None = None  # of the current micro-batch
        self._takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self._num_segments = getattr(model.config, "type_vocab_size", None) or sys.maxsize
        architecture = ARCHITECTURES.get(model.config.model_type)
        self.packed = architecture is not None
        counts_from_pad = architecture is not None and architecture.counts_from_pad
        self._pad: int | None = model.config.pad_token_id if counts_from_pad else None
        self._first_position = _first_position(model.config)
        self.max_positions = _max_positions(model.config)
        replace_dropouts(model, lambda: self._dropout_masks)
        self.train(model.training)  # the new dropouts too
        reuse_embedding_gradient(model)
        use_onednn(model)
        if architecture is not None:
            expected = self._logits_of_transformers()
            architecture.prepare(model)
            bf16.keep_bf16(model)
        pooling = getattr(model.config, "classifier_pooling", "cls")  # ModernBERT's
        self.first_tokens_only = self.packed and pooling == "cls"  # what leaves the last layer
        self.padding_changes_logits = not self.packed and self._padding_changes_logits()
        if architecture is not None:
            self._compare(expected)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits (N, O) of the texts of a micro-batch, on its device."""
        if not self.packed:
            return self._forward_padded(batch)
        texts = len(batch.lengths)
        if bf16.in_use(batch.ids.device):
            batch = bf16.round_up(batch)
        masks = self._dropout_masks = self._make_masks(batch, slice(None))
        set_current_masks(masks)
        inputs = {"input_ids": batch.ids[None], "position_ids": self._positions(batch)[None]}
        if self._takes_segments:
            inputs["token_type_ids"] = self._segments(batch)[None]
        heads = self.model.config.num_attention_heads
        kernel = self.attention_kernel(batch.ids.device)
        packing = attention.build_packing(
            batch.lengths, batch.cu_seqlens[:-1], heads, kernel, masks
        )
        logits: Tensor = self.model(**inputs, packing=packing).logits
        return logits[:texts]

    def enable_gradient_checkpointing(self) -> None:
        """Keep the input of a layer only, and compute the layer again in the backward.

        With the same dropout masks. Raises ConfigError where transformers does not support it.
        """

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            masks = self._dropout_masks
            return (nullcontext(), nullcontext()) if masks is None else masks.replay_contexts()

        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                "--gradient_checkpointing cannot take effect: transformers does not support it for "
                f"{self.model.config.model_type}."
            )
        # transformers 5.23 has the new name and warns of the old one; both take the same argument
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        enable = enable or self.model.gradient_checkpointing_enable
        self.gradient_checkpointing = True
        enable({"use_reentrant": False, "context_fn": contexts})

    def attention_kernel(self, device: torch.device) -> attention.Kernel:
        """The kernel for a device, in the current precision (inside or outside of autocast)."""
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.model.dtype
        config = self.model.config
        head_size = config.hidden_size // config.num_attention_heads
        return attention.select_kernel(device, dtype, head_size)

    def padding_notes(self) -> list[str]:
        """A sentence on how texts are padded, where they are."""
        kind = self.model.config.model_type
        if self.padding_changes_logits:
            return [
                f"Padding changes the predictions of models of type {kind!r}: only texts of equal "
                "length run together."
            ]
        if not self.packed:
            return [
                f"Models of type {kind!r} run padded to the longest text of a micro-batch; the "
                "results are the same."
            ]
        return []

    def _make_masks(self, batch: PackedBatch, texts: Any) -> DropoutMasks | None:
        """Dropout masks for some texts of a batch (an index); None in evaluation or on a GPU."""
        if not self.training or batch.ids.device.type != "cpu":
            return None
        return DropoutMasks(
            batch.row_numbers[texts].tolist(), np.asarray(batch.lengths)[texts].tolist()
        )

    def _positions(self, batch: PackedBatch) -> Tensor:
        """(T,) int64: the position ids that transformers gives each text."""
        positions = batch.positions + self._first_position
        if self._pad is None:
            return positions
        is_pad = batch.ids == self._pad
        seen = F.pad(is_pad.cumsum(0), (1, 0))  # pads before each token
        starts = torch.arange(len(batch.ids), device=seen.device) - batch.positions
        return (positions - seen[:-1] + seen[starts]).masked_fill(is_pad, self._pad)

    def _segments(self, batch: PackedBatch) -> Tensor:
        """(T,) int64: 0 for segment ids that the model has no embedding for."""
        return batch.token_type_ids.masked_fill(batch.token_type_ids >= self._num_segments, 0)

    def _forward_padded(self, batch: PackedBatch) -> Tensor:
        lengths = np.asarray(batch.lengths)
        groups = [np.arange(len(lengths))]
        if self.padding_changes_logits:
            groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        logits = torch.cat([self._padded_logits(batch, texts) for texts in groups])
        order = torch.from_numpy(np.concatenate(groups).argsort())
        return logits[order.to(logits.device)]

    def _padded_logits(self, batch: PackedBatch, texts: "np.ndarray[Any, Any]") -> Tensor:
        """Logits of some texts, padded to the longest of them."""
        self._dropout_masks = self._make_masks(batch, texts)
        longest = max(batch.lengths[i] for i in texts)
        index, mask = (  # (texts, longest)
            torch.from_numpy(array[texts, :longest]).to(batch.ids.device)
            for array in attention.padded_layout(batch.lengths)
        )
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        ids = batch.ids[index].masked_fill(~mask, pad)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self._takes_segments:
            inputs["token_type_ids"] = self._segments(batch)[index].masked_fill(~mask, 0)
        try:
            logits: Tensor = self.model(**inputs).logits
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._error(error, "these texts") from error  # such as T5, without </s>
        return logits

    def _error(self, error: Exception, texts: str) -> ModelError:
        """Of the model's own code."""
        kind = self.model.config.model_type
        return ModelError(f"A model of type {kind!r} does not classify {texts}: {_reason(error)}")

    def probes(self, lengths: Sequence[int]) -> list[Example]:
        """Texts of about these lengths of the first ids of the vocabulary."""
        config = self.model.config
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        pad, begin, end = (getattr(config, name, None) for name in names)
        size = min(20, getattr(config, "vocab_size", None) or 20)
        ids = [id for id in range(size) if id not in (pad, begin, end)] or [0]
        end = [end] if isinstance(end, int) and end < config.vocab_size else []  # BART looks for it
        longest = self.max_positions - len(end)
        texts = [
            [*(ids[(i + start) % len(ids)] for i in range(min(length, longest))), *end]
            for start, length in enumerate(lengths)
        ]
        return [Example(0, ids, [0] * len(ids), 0, 1.0) for ids in texts]

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """In evaluation mode, without gradients; an error of the model becomes a ModelError."""
        was_training = self.training
        try:
            with torch.no_grad():
                self.eval()
                yield
        except Exception as error:
            own = error.__cause__ if isinstance(error, ModelError) else None
            reason = own if isinstance(own, Exception) else error
            raise self._error(reason, "plain texts") from error
        self.train(was_training)

    def _padding_changes_logits(self) -> bool:
        """Whether logits change by more than rounding, a thousandth, in a padded batch.

        Raises ModelError.
        """
        texts, self.padding_changes_logits = self.probes((12, 5, 4, 3, 7)), False
        with self._probing():
            alone = torch.cat([self(collate([text])) for text in texts])
            batched = self(collate(texts))
        return not bool((batched - alone).abs().max() <= 1e-3 * alone.abs().max())

    def _logits_of_transformers(self) -> Tensor:
        """Of two probes of one length, before anything is changed. Raises ModelError."""
        config = self.model.config
        kernel, config._attn_implementation = config._attn_implementation, "eager"
        with self._probing():
            ids = torch.tensor([text.ids for text in self.probes((12, 12))])
            logits: Tensor = self.model(input_ids=ids).logits
        config._attn_implementation = kernel
        return logits

    def probe_logits(self) -> Tensor:
        """(2, O) of two probes of one length, in evaluation mode, on the model's device."""
        with self._probing():
            logits: Tensor = self(collate(self.probes((12, 12))).to(self.model.device))
        return logits

    def output_layer(self) -> nn.Linear:
        """The linear layer that makes the logits; raises ModelError where there is none."""
        return output_layer(self.model, self.probe_logits)

    def _compare(self, expected: Tensor) -> None:
        """Raise ModelError if the logits are not those of transformers: by a setting of config.json
        that this version does not know.
        """
        found = self.probe_logits()
        difference, size = (found - expected).abs().max(), expected.abs().max()
        if difference > 1e-3 * size:  # not for NaN: broken weights are reported with their rows
            raise ModelError(
                f"A setting in the config.json of this {self.model.config.model_type!r} model is "
                f"not supported: its logits differ from those of transformers by {difference:.2g}."
            )


def load_model_config(config: ModelConfig, flag: str = "--model_name_or_path") -> PretrainedConfig:
    """The model's config.json, without its weights. flag: for error messages. Raises ModelError."""
    from bertdist.core.hub import (
        adapter_error,
        check_model_folder,
        from_cache,
        probe_hub,
        run_folder_hint,
        unknown_model,
        warn_if_offline,
    )
    from bertdist.models.model_config import check_arithmetic, check_file, check_values

    name = config.model_name_or_path
    folder, where = Path(name).expanduser(), f"{flag} {name}"
    check_model_folder(name, where)
    check_file(folder, where)
    probe_hub(name)
    adapter, cached = None, from_cache()
    with suppress(Exception):  # of the hub: the next request has the same error, and explains it
        adapter = find_adapter_config_file(
            name, revision=config.model_revision, local_files_only=cached
        )
    if adapter is not None:
        raise adapter_error(where)
    try:
        # False, not None: None asks at the terminal whether to run code of the folder, and takes a
        # "y" from a pipe (transformers 5.23)
        model_config: PretrainedConfig = AutoConfig.from_pretrained(
            name,
            revision=config.model_revision,
            trust_remote_code=False,
            local_files_only=cached,
        )
    except Exception as error:  # wrong values raise a dozen kinds
        if folder.is_dir():
            raise ModelError(
                f"{where}: the folder holds no config.json that can be read ({_reason(error)})"
                f"{run_folder_hint(folder)}"
            ) from None
        if not isinstance(error, OSError | ValueError):
            raise ModelError(f"{where}: config.json: {_reason(error)}") from None
        raise unknown_model(error, name, where) from None
    warn_if_offline(name)
    architecture = ARCHITECTURES.get(model_config.model_type)
    if architecture is not None:
        check_arithmetic(model_config, architecture.counts_from_pad, where)
    check_values(model_config, architecture is not None, where)
    return model_config


def pretrained_labels(model_config: PretrainedConfig) -> tuple[str, ...] | None:
    """The label names a model was trained with; None where it has only numbered placeholders."""
    names = _label_names(model_config)
    return None if all(name.startswith("LABEL_") for name in names) else names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and the report of transformers: bertdist says it in fewer words."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@reset_torch_modes()
def load_classifier(
    config: ModelConfig,
    task: Task,
    model_config: PretrainedConfig | None = None,
    flag: str = "--model_name_or_path",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Classifier, list[str]]:
    """A pretrained model in float32 with a head for the task, and notes on how it was loaded.

    For a training loop of your own:

        config = ModelConfig(model_name_or_path="google-bert/bert-base-uncased")
        task = SingleLabel(("negative", "positive"))
        tokenizer, rows = load_tokenizer(config), records_from_texts(["good", "bad"])
        classifier, notes = load_classifier(config, task, tokenizer=tokenizer)
        dataset = create_dataset(rows, tokenizer, None, 128)
        seed_dropout(seed=42, step=0, rank=0)  # before every step: masks are a function of these
        logits = classifier.train()(collate(dataset[[0, 1]]))  # (2, 2)
        loss = task.loss(logits, torch.tensor([1, 0]), torch.ones(2)) / 2

    config: name or folder, revision, dropout, freeze, gradient_checkpointing; max_length in tokens
    is checked against the model's positions. task: its labels are the outputs. model_config: from
    `load_model_config` if it is loaded already; changed in place. flag: for error messages.
    tokenizer: its added tokens get rows in the embedding if they have none.

    The classifier is on the CPU and in evaluation mode, as from_pretrained returns it. Its `model`
    is the Hugging Face model, with its own names of weights. New weights are drawn from torch's
    generator: seed it before. Only safetensors are read, never a pickle, and no code of the Hub is
    run.

    Raises ModelError where the model is not found, weights other than the head's do not fit, or the
    tokenizer is another model's, and ConfigError for a setting that cannot take effect.
    """
    from bertdist.models.model_config import resize_embedding, segment_notes

    where = f"{flag} {config.model_name_or_path}"
    model_config = model_config or load_model_config(config, flag)
    old_labels, was_regression = _label_names(model_config), _is_regression(model_config)
    settings = _adapt_config(model_config, task, config.dropout)
    check_before_loading(config, model_config, flag)
    model, missing, notes = _load_weights(config, model_config, where)
    if not (task.problem_type == REGRESSION and was_regression):
        notes += _assign_outputs(model, task.labels, old_labels, missing)
    notes += settings
    if tokenizer is not None:
        resized = resize_embedding(model, tokenizer, where)
        notes += resized
        if resized and config.freeze:
            notes.append("These rows are frozen (--freeze): training leaves them as drawn.")
        notes += segment_notes(model_config, tokenizer)
    if config.frozen_layers is not None:
        freeze(model, config.frozen_layers)
    classifier = Classifier(model)
    notes += classifier.padding_notes()
    if config.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    return classifier, notes


def _adapt_config(model_config: PretrainedConfig, task: Task, dropout: float | None) -> list[str]:
    """Set labels, problem type and dropout of a model's config; returns notes on what else was
    changed. Raises ConfigError.
    """
    from bertdist.models.model_config import reset_outputs, type_notes

    model_config.num_labels = len(task.labels)
    model_config.id2label = dict(enumerate(task.labels))
    model_config.label2id = {label: i for i, label in enumerate(task.labels)}
    model_config.problem_type = task.problem_type  # type: ignore[assignment]  # a Literal
    if dropout is not None:
        _set_dropout(model_config, dropout)
    return [*reset_outputs(model_config), *type_notes(model_config)]


def _load_weights(
    config: ModelConfig, model_config: PretrainedConfig, where: str
) -> tuple[Any, list[str], list[str]]:
    """The Hugging Face model, the names of its new weights, and a note on these.

    Raises ModelError.
    """
    from bertdist.core.hub import from_cache
    from bertdist.models.model_config import check_size

    attention.register()
    packed = model_config.model_type in ARCHITECTURES
    try:
        check_size(model_config, Path(config.model_name_or_path).expanduser(), where)
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                config.model_name_or_path,
                config=model_config,
                revision=config.model_revision,
                dtype=torch.float32,
                attn_implementation=attention.NAME if packed else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=from_cache(),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:  # wrong values raise a dozen kinds
        raise ModelError(f"{where}: {_reason(error)}") from None
    _check_weights(model, info, where)
    missing = _new_weights(model, info, where)
    notes = [f"{_NEW_WEIGHTS}: {', '.join(missing)}.{_other_shapes(info)}"] if missing else []
    return model, missing, notes


def check_before_loading(
    config: ModelConfig, model_config: PretrainedConfig, flag: str = "--model_name_or_path"
) -> None:
    """Raise ModelError for files of weights that cannot be used, and ConfigError for a max_length
    above the model's positions; no weights are loaded.
    """
    from bertdist.models.model_config import check_manifest, check_weight_files

    folder, where = Path(config.model_name_or_path), f"{flag} {config.model_name_or_path}"
    is_own = bool(saved_metadata(model_config))
    check_manifest(folder, is_own, where)
    check_weight_files(folder.expanduser(), where)
    positions = _max_positions(model_config)
    if config.max_length > positions:
        raise ConfigError(
            f"--max_length is {config.max_length}; this model has {positions} positions."
        )


def _first_position(model_config: PretrainedConfig) -> int:
    """The position id of a text's first token: some models count from pad_token_id."""
    architecture = ARCHITECTURES.get(model_config.model_type)
    counts_from_pad = architecture is not None and architecture.counts_from_pad
    return 1 + int(model_config.pad_token_id) if counts_from_pad else 0


def _max_positions(model_config: PretrainedConfig) -> int:
    """Tokens of the longest text."""
    positions = int(getattr(model_config, "max_position_embeddings", 512))
    # XLNet's -1: it has no table of positions
    return positions - _first_position(model_config) if positions > 0 else sys.maxsize


def _set_dropout(model_config: PretrainedConfig, p: float) -> None:
    """Set every dropout of a config; raises ConfigError where it has none."""
    names = [
        name
        for name, value in vars(model_config).items()
        if ("dropout" in name or "pdrop" in name) and not isinstance(value, bool)  # GPT-2: pdrop
    ]
    if not names:
        raise ConfigError(
            "--dropout cannot take effect: the config of "
            f"{model_config.model_type} names no dropout."
        )
    model_config.update(dict.fromkeys(names, p))


def _check_weights(model: Any, info: dict[str, Any], where: str) -> None:
    """Raise ModelError for weights that are not finite, and for layers that are in the file and not
    in the model.
    """
    if broken := first_nonfinite(model):
        raise ModelError(
            f"{where}: {broken} holds NaN or infinite numbers: the file is broken. Use an intact "
            "copy."
        )

    def any_layer(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name.removeprefix(f"{model.base_model_prefix}."))

    kinds = {any_layer(name) for name in model.base_model.state_dict()}
    if left := sorted(name for name in info["unexpected_keys"] if any_layer(name) in kinds):
        raise ModelError(
            f"{where}: the weights have more layers than config.json says, the first that would be "
            f"left out is {left[0]}: correct num_hidden_layers in config.json. For a model of "
            "fewer layers, save one with save_pretrained."
        )


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or an infinite number."""
    for name, weight in model.named_parameters():
        if weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
            return name
    return None


def _new_weights(model: Any, info: dict[str, Any], where: str) -> list[str]:
    """Names of the weights that were not loaded; raises ModelError if some are not the head's."""
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    missing = sorted({*info["missing_keys"], *mismatched})
    body = f"{model.base_model_prefix}."
    if lost := [key for key in missing if key.startswith(body) and ".pooler." not in key]:
        wrong_shape = "do not have the shape that config.json says"
        problem = wrong_shape if lost[0] in mismatched else "are missing"
        raise ModelError(
            f"{where}: {len(lost)} weights of the model {problem}, the first is {lost[0]}."
        )
    return missing


def _other_shapes(info: dict[str, Any]) -> str:
    """A sentence on the first weight whose shape in the file is not that of the model."""
    for name, *shapes in sorted(key for key in info["mismatched_keys"] if len(key) == 3):
        loaded, expected = map(tuple, shapes)
        return f" {name} has the shape {loaded} in the file, {expected} in this model."
    return ""


@torch.no_grad()
def _assign_outputs(
    model: Any, labels: tuple[str, ...], loaded: tuple[str, ...], missing: list[str]
) -> list[str]:
    """Make row i of the output layer that of label i; draw it anew if its labels are others.

    loaded: the labels of the loaded rows; LABEL_2, which is no name, is the label 2. missing: names
    of weights that were not loaded. Returns notes. Raises ModelError where the layer is unknown.
    """
    order = match_labels(labels, loaded) or match_labels(  # the label of each loaded row
        labels, [name.removeprefix("LABEL_") for name in loaded]
    )
    if labels in (order, loaded):
        return []
    name, layer = last_linear(model)
    if f"{name}.weight" in missing or (layer is None and missing):
        return []  # drawn already
    if layer is None or layer.out_features != len(labels):
        raise ModelError(
            f"The labels of the model are {listed(loaded, 5)}; its type "
            f"{model.config.model_type!r} has no output layer that could be replaced."
        )
    weights = dict(layer.named_parameters())
    shown = listed(loaded, 5)
    if order is None:
        for key, weight in weights.items():  # new ones: transformers draws no loaded weight
            setattr(layer, key, nn.Parameter(torch.empty_like(weight)))
        model._init_weights(layer)
        return [f"{_NEW_WEIGHTS}: {name}, as the labels of the model are others: {shown}."]
    rows = torch.tensor([order.index(label) for label in labels])
    for weight in weights.values():
        weight.copy_(weight[rows])
    return [
        f"The model has its labels in another order ({shown}): the rows of {name} are reordered."
    ]


def load_trained_classifier(folder: str) -> tuple[Classifier, Task, dict[str, Any]]:
    """A trained classifier, its task, and the metadata of `save_classifier`; raises ModelError."""
    config = ModelConfig(model_name_or_path=folder, max_length=0)
    model_config = load_model_config(config, "--model")
    task = trained_task(model_config, f"--model {folder}")
    model, notes = load_classifier(config, task, model_config, "--model")
    if notes and notes[0].startswith(_NEW_WEIGHTS):
        new, _, other_shape = notes[0].partition(". ")
        if other_shape:
            raise ModelError(
                f"--model {folder}: the output layer is not that of config.json, which has "
                f"{len(task.labels)} labels (id2label): {other_shape}"
            )
        raise ModelError(f"--model {folder} is not a trained classifier. {new}")
    return model, task, saved_metadata(model_config)


def trained_task(model_config: PretrainedConfig, where: str) -> Task:
    """The task that the config.json of a trained classifier states. where: for error messages.

    Raises ModelError.
    """
    names = _label_names(model_config)
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ModelError(f"{where}: id2label names {repeated!r} twice.")
    if model_config.problem_type == REGRESSION and len(names) > 1:
        raise ModelError(f"{where} predicts {len(names)} numbers; bertdist has regression of one.")
    metadata = saved_metadata(model_config)
    try:
        fitted = check_calibration(metadata.get("calibration"))
    except ConfigError as error:
        raise ModelError(f"{where}: config.json: bertdist.calibration: {error}") from None
    codes, thresholds = metadata.get("label_codes") or (), fitted.get("thresholds")
    return task_of_model(model_config.problem_type, names, codes, thresholds)


def saved_metadata(model_config: PretrainedConfig) -> dict[str, Any]:
    """The metadata of `save_classifier`; empty where another program wrote the model."""
    return dict(getattr(model_config, "bertdist", None) or {})


def save_classifier(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, folder: Path, metadata: dict[str, Any]
) -> None:
    """Write a Hugging Face folder that `pipeline("text-classification")` loads.

    metadata: JSON-able, saved in config.json under "bertdist"; its max_length becomes the
    tokenizer's model_max_length, so that the pipeline truncates as training did. Raises ModelError
    for weights that are not finite.
    """
    from bertdist.models.model_config import segment_notes

    if broken := first_nonfinite(model.model):
        raise ModelError(f"{broken} has become NaN or infinite: the weights are not saved.")
    model.model.config.bertdist = metadata
    model.model.save_pretrained(folder)
    segments = not segment_notes(model.model.config, tokenizer)
    save_tokenizer(tokenizer, folder, metadata.get("max_length"), segments)


def _is_regression(model_config: PretrainedConfig) -> bool:
    """As `task_of_model` says."""
    one_output = len(_label_names(model_config)) == 1
    return model_config.problem_type == REGRESSION or (
        model_config.problem_type is None and one_output
    )


def _label_names(model_config: Any) -> tuple[str, ...]:
    names = model_config.id2label
    return tuple(str(names[i]) for i in sorted(names))


def _reason(error: Exception) -> str:
    """An error in one line. Of a StrictDataclassError the first line names only the field."""
    lines = str(error).strip().splitlines() or [""]
    if len(lines) > 1 and lines[0].endswith(":"):
        return lines[1].strip().removeprefix("TypeError: ").partition(". Errors: ")[0]
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0].rstrip()}"
