"""Encoder architectures that run without padding: where each keeps its layers and its attention.

`ARCHITECTURES[model_type].prepare(model)` changes a Hugging Face classifier in place: its last
layer computes the first token of each text only, (N, 1, hidden), so that the model's own head works
on it unchanged. Weights, their names and all other layers stay Hugging Face's. Keys and values are
computed for all tokens, everything else of the last layer for N: exact, and 13% less arithmetic for
MiniLM-L6, 6% for BERT-base. Where the head reads the mean of a text (ModernBERT can), all tokens
leave the last layer, and their mean takes the place of the first token.

A family that is not here is trained too, padded (classifier.py). To run it without padding:
1. models/architectures.py: one entry in ARCHITECTURES, by the `model_type` of its config.json, with
   one layer written as two functions over its own submodules: attention, and what follows it.
2. models/<family>.py, only where transformers has no attention interface for it, as deberta.py.
3. models/classifier.py, `first_tokens_only`: of a head that reads other than the first token, as
   ModernBERT's does with the setting `classifier_pooling`.
4. models/model_config.py: settings of its config.json that change the arithmetic and are not
   computed here are refused, those that change only what is returned are reset.
5. `layer_index` below: the names of its layers' weights have to match, for --layerwise_lr_decay and
   --freeze. They do where the list of layers is called layer, layers, block, blocks or h; ALBERT's,
   which share weights, are not numbered. Weights beside the layers that these read, such as
   DeBERTa's table of positions: `layer_of` of its entry.
6. tests/unit/models/test_architectures.py: one entry in KINDS; a family without one fails there.
   docs/guides/models.md: the table of model types.

Legend: T tokens, N texts; Q is T, or N where only first tokens are computed; D head size.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from bertdist.models.attention import Packing, packed_attention
from bertdist.models.bf16 import use_bf16_layer

# (layer, hidden states of queries (1, Q, hidden) and of all tokens (1, T, hidden), packing)
# -> attention output (1, Q, hidden)
Attention = Callable[..., Tensor]

# (layer, attention output, layer input) -> layer output, each (1, Q, hidden)
AfterAttention = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of models."""

    prepare: Callable[[Any], None]  # changes a classifier of this family in place
    # Positions are counted from pad_token_id + 1, and a pad token in a text has the position
    # pad_token_id and is not counted; else from 0.
    counts_from_pad: bool = False
    # For --torch_compile: the layers that run over all T tokens, and a layer in two parts. The
    # second part, of which each token is computed by itself, is compiled.
    compilable_layers: Callable[[Any], list[Any]] = lambda model: []
    attention: Attention | None = None
    after_attention: AfterAttention | None = None
    # For --freeze: weights of the encoder outside its numbered layers, by the beginning of their
    # names, and the layer that they go with; -1: the embeddings.
    layer_of: Mapping[str, int] = field(default_factory=dict)


def layer_index(name: str) -> int | None:
    """'bert.encoder.layer.3.output.dense.weight' -> 3; None for weights outside the layers."""
    match = re.search(r"(?:^|\.)(?:layer|layers|block|blocks|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


def _bert_attention(layer: Any, query: Tensor, x: Tensor, packing: Packing, **_: Any) -> Tensor:
    """BERT's layer, also RoBERTa's and ELECTRA's."""
    module = layer.attention.self
    q, k, v = module.query(query), module.key(x), module.value(x)
    return _attend(module, q, k, v, module.dropout.p, packing)


def _bert_after_attention(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.attention.output(context, residual)
    out: Tensor = layer.output(layer.intermediate(attended), attended)
    return out


def _distilbert_attention(
    layer: Any, query: Tensor, x: Tensor, packing: Packing, **_: Any
) -> Tensor:
    module = layer.attention
    q, k, v = module.q_lin(query), module.k_lin(x), module.v_lin(x)
    return _attend(module, q, k, v, module.dropout.p, packing)


def _distilbert_after_attention(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + residual)
    out: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return out


def _albert_attention(layer: Any, query: Tensor, x: Tensor, packing: Packing, **_: Any) -> Tensor:
    module = layer.attention
    q, k, v = module.query(query), module.key(x), module.value(x)
    return _attend(module, q, k, v, module.attention_dropout.p, packing)


def _albert_after_attention(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    module = layer.attention
    attended = module.LayerNorm(residual + module.output_dropout(module.dense(context)))
    out: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(attended) + attended)
    return out


def _modernbert_attention(
    layer: Any,
    queries: Tensor,
    x: Tensor,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    """position_embeddings: cosines and sines of the positions, each (1, T, D)."""
    module, normed = layer.attn, layer.attn_norm(x)
    rows = packing.first_tokens if queries.shape[1] != x.shape[1] else slice(None)
    sizes = [x.shape[-1], 2 * x.shape[-1]]  # Wqkv is one matrix for queries, keys and values
    weights, bias = module.Wqkv.weight.split(sizes), module.Wqkv.bias
    biases = [None, None] if bias is None else bias.split(sizes)
    query = F.linear(normed[:, rows], weights[0], biases[0])
    key, value = F.linear(normed, weights[1], biases[1]).chunk(2, -1)
    query = _rotated(query, packing, *(angle[:, rows] for angle in position_embeddings))
    key = _rotated(key, packing, *position_embeddings)
    p, window = module.attention_dropout, module.sliding_window
    return _attend(module, query, key, value, p, packing, window)


def _modernbert_after_attention(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    attended = residual + layer.attn.out_drop(layer.attn.Wo(context))
    out: Tensor = attended + layer.mlp(layer.mlp_norm(attended))
    return out


def _rotated(x: Tensor, packing: Packing, cos: Tensor, sin: Tensor) -> Tensor:
    """ModernBERT's apply_rotary_pos_emb, with its roundings to float32, of x (1, Q, hidden)."""
    heads = x.unflatten(-1, (packing.heads, -1))  # (1, Q, heads, D)
    left, right = heads.float().chunk(2, -1)
    turned = torch.cat((-right, left), -1)
    rotated: Tensor = heads.float() * cos[:, :, None] + turned * sin[:, :, None]
    return rotated.to(x.dtype).flatten(-2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    packing: Packing,
    window: int | None = None,
) -> Tensor:
    """Queries (1, Q, hidden), keys and values (1, T, hidden) -> (1, Q, hidden)."""
    q, k, v = (x.unflatten(-1, (packing.heads, -1)).transpose(1, 2) for x in (query, key, value))
    p = dropout if module.training else 0.0
    context, _ = packed_attention(
        module, q, k, v, None, packing=packing, dropout=p, sliding_window=window
    )
    return context.flatten(-2)


def _last_layer(
    attention: Attention,
    after_attention: AfterAttention,
    layer: Any,
    x: Tensor,
    packing: Packing,
    **kwargs: Any,
) -> Tensor:
    """A layer for the first tokens. x (1, T, hidden) -> (N, 1, hidden): N texts of one token."""
    first = x[:, packing.first_tokens]  # (1, N, hidden)
    context = attention(layer, first, x, packing, **kwargs)
    return after_attention(layer, context, first).transpose(0, 1)


def _replace_last(layer: Any, attention: Attention, after_attention: AfterAttention) -> None:
    def forward(hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        return _last_layer(attention, after_attention, layer, hidden_states, packing, **kwargs)

    layer.forward = forward


def _prepare_bert(model: Any) -> None:
    *layers, last = model.base_model.encoder.layer
    _replace_last(last, _bert_attention, _bert_after_attention)
    for layer in layers:
        use_bf16_layer(layer)


def _prepare_distilbert(model: Any) -> None:
    last = model.base_model.transformer.layer[-1]
    _replace_last(last, _distilbert_attention, _distilbert_after_attention)


def _prepare_albert(model: Any) -> None:
    """ALBERT runs the same layers repeatedly, so the loop is replaced and not the last layer."""
    encoder = model.base_model.encoder
    config = encoder.config
    # transformers 5.23 supports no gradient checkpointing for ALBERT; the loop below does.
    encoder.gradient_checkpointing, model.supports_gradient_checkpointing = False, True
    layers_per_group = config.num_hidden_layers / config.num_hidden_groups

    def forward(
        hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any
    ) -> BaseModelOutput:
        x = encoder.embedding_hidden_mapping_in(hidden_states)
        for i in range(config.num_hidden_layers):
            group = encoder.albert_layer_groups[int(i / layers_per_group)]
            for j, layer in enumerate(group.albert_layers):
                run = partial(layer, attention_mask=None, packing=packing)
                if i == config.num_hidden_layers - 1 and j == config.inner_group_num - 1:
                    x = _last_layer(_albert_attention, _albert_after_attention, layer, x, packing)
                elif encoder.gradient_checkpointing and encoder.training:
                    x = encoder._gradient_checkpointing_func(run, x)
                else:
                    x = run(x)
        return BaseModelOutput(last_hidden_state=x)

    encoder.forward = forward


def _prepare_modernbert(model: Any) -> None:
    body = model.base_model

    def mean_of_texts(
        module: nn.Module, args: Any, kwargs: Any, output: BaseModelOutput
    ) -> BaseModelOutput:
        x = output[0][0]  # (T, hidden)
        lengths = F.pad(kwargs["packing"].first_tokens, (0, 1), value=len(x)).diff()
        # unsafe: without a check of the lengths, which would wait for the device
        mean = torch.segment_reduce(x, "mean", lengths=lengths, axis=0, unsafe=True)  # (N, hidden)
        return BaseModelOutput(last_hidden_state=mean[:, None])

    if model.config.classifier_pooling == "mean":
        body.register_forward_hook(mean_of_texts, with_kwargs=True)
    else:
        _replace_last(body.layers[-1], _modernbert_attention, _modernbert_after_attention)


def _prepare_deberta(model: Any) -> None:
    # Imported when used: other families do not need it.
    from bertdist.models.deberta import prepare

    prepare(model)


def _albert_layers(model: Any) -> list[Any]:
    """All: the last one runs earlier too, and its last run does not call its forward."""
    groups = model.base_model.encoder.albert_layer_groups
    return [layer for group in groups for layer in group.albert_layers]


def _modernbert_layers(model: Any) -> list[Any]:
    layers = list(model.base_model.layers)
    return layers if model.config.classifier_pooling == "mean" else layers[:-1]


BERT = Architecture(
    prepare=_prepare_bert,
    compilable_layers=lambda model: list(model.base_model.encoder.layer)[:-1],
    attention=_bert_attention,
    after_attention=_bert_after_attention,
)
ROBERTA = replace(BERT, counts_from_pad=True)

ARCHITECTURES = {  # by model_type
    "bert": BERT,
    "electra": BERT,
    "ernie": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "distilbert": Architecture(
        prepare=_prepare_distilbert,
        compilable_layers=lambda model: list(model.base_model.transformer.layer)[:-1],
        attention=_distilbert_attention,
        after_attention=_distilbert_after_attention,
    ),
    "albert": Architecture(
        prepare=_prepare_albert,
        compilable_layers=_albert_layers,
        attention=_albert_attention,
        after_attention=_albert_after_attention,
    ),
    "modernbert": Architecture(
        prepare=_prepare_modernbert,
        compilable_layers=_modernbert_layers,
        attention=_modernbert_attention,
        after_attention=_modernbert_after_attention,
    ),
    "deberta-v2": Architecture(  # and -v3
        prepare=_prepare_deberta,
        # the table of positions and its norm; the convolution is part of the first layer
        layer_of={"encoder.rel_embeddings": -1, "encoder.LayerNorm": -1, "encoder.conv": 0},
    ),
}
