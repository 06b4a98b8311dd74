"""Frozen weights (--freeze): embeddings and the first layers stay as they were loaded.

    freeze(model, config.frozen_layers)        # a Hugging Face classifier, in place
    frozen, trained = count_parameters(model)

A frozen weight has `requires_grad` False, before the optimizer and DDP are made: autograd records
nothing below the first trained layer, so there are no gradients, no AdamW state and no activations
to keep. What is frozen is always all that lies below: a trained embedding under frozen layers would
need the whole backward pass. Modules stay in training mode, so the forward pass, dropout included,
is that of a run without frozen weights, and so are the gradients of the others.

The head is what follows the last layer: the output layer, and a pooler, which BERT has inside its
body and RoBERTa, ELECTRA and DistilBERT in their heads. It may be new, and is always trained.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from bertdist.core.config import ALL_LAYERS
from bertdist.core.errors import ConfigError
from bertdist.models.architectures import ARCHITECTURES, layer_index


def freeze(model: Any, layers: int) -> None:
    """Freeze embeddings and so many layers of a Hugging Face classifier, in place.

    layers: 0 for the embeddings alone, ALL_LAYERS for all but the head. Raises ConfigError where
    the model does not have as many layers, or none that can be frozen alone.
    """
    kind, body = model.config.model_type, model.base_model
    if body is model:
        raise ConfigError(f"--freeze: models of type {kind!r} do not separate body and head.")
    if 0 < layers < ALL_LAYERS:
        indices = [layer_index(name) for name, _ in body.named_parameters()]
        found = max((index for index in indices if index is not None), default=-1) + 1
        problem = ""
        if getattr(model.config, "is_encoder_decoder", False):
            problem = "have layers in an encoder and a decoder"
        elif kind == "albert":
            problem = "share the weights of their layers"
        elif not found:
            problem = "have no numbered layers"
        if problem:
            raise ConfigError(
                f"--freeze {layers}: models of type {kind!r} {problem}; use --freeze embeddings, "
                "or encoder, which trains the head alone."
            )
        if layers > found:
            raise ConfigError(
                f"--freeze is {layers}; this model has {found} layers. --freeze encoder freezes "
                "all but the head."
            )
    for weight, layer in _weights(body, kind):
        if layer < layers:
            weight.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many are frozen, and how many are trained."""
    sizes = [(weight.requires_grad, weight.numel()) for weight in model.parameters()]
    frozen, trained = (sum(n for is_trained, n in sizes if is_trained == x) for x in (False, True))
    return frozen, trained


def _weights(body: nn.Module, kind: str) -> Iterator[tuple[nn.Parameter, int]]:
    """Each weight of a model without its head, and its layer from 0; -1: below the layers, a large
    number: above them.
    """
    family = ARCHITECTURES.get(kind)
    tables = {id(x.weight) for x in body.modules() if isinstance(x, nn.Embedding)}
    names = [name for name, _ in body.named_parameters()]
    first = next((i for i, name in enumerate(names) if layer_index(name) is not None), 0)
    for i, (name, weight) in enumerate(body.named_parameters()):
        stated = family.layer_of.items() if family else ()
        layer = next((of for start, of in stated if name.startswith(start)), layer_index(name))
        # of any family: what is made before the layers, and tables that they share
        is_below = i < first or "emb" in name or id(weight) in tables
        if "pooler" not in name.split("."):
            yield weight, (-1 if is_below else ALL_LAYERS - 1) if layer is None else layer
