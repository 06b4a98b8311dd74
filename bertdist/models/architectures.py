"""What each architecture needs to run without padding: where its layers are, what its positions count from, and its last layer.

In: a Hugging Face classifier. Out: the same module, prepared in place: its last layer gives one token a text, (N, 1, hidden), so
that the model's own head works on it unchanged. Weights, their names and all other layers stay Hugging Face's.

Only the first token of each text leaves the last layer, because that is all that the heads read: keys and values are computed for
all tokens, everything else for N. Exact, and 13% of MiniLM-L6's arithmetic saved, 6% of BERT-base's. Where the head reads the mean
of a text (ModernBERT can), all tokens leave the last layer, and their mean takes their place.

A family is one entry of FAMILIES. To add one: how its layers are found, and a layer in two parts in the terms of its own modules.

Legend: T tokens, N texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from bertdist.models import deberta
from bertdist.models.attention import Packing, packed_attention

Attend = Callable[
    ..., Tensor
]  # layer, what asks (1, T or N, hidden), x (1, T, hidden), packing, ... -> context, like what asks

Rest = Callable[
    [Any, Tensor, Tensor], Tensor
]  # layer, context, what asked -> what leaves the layer; each token by itself


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture, in the terms of its own modules."""

    prepare: Callable[[Any], None]  # changes a classifier of this family in place
    first_position: Callable[[Any], int] = lambda config: 0  # the position of a text's first token
    layers: Callable[[Any], list[Any]] = lambda model: []  # those that run over all tokens
    attend: Attend | None = None  # a layer in two parts: attention, up to its output,
    rest: Rest | None = None  # and all that follows, which a compiler can be given


def _bert_attend(layer: Any, asking: Tensor, x: Tensor, packing: Packing, **unused: Any) -> Tensor:
    """BERT's layer, also RoBERTa's and ELECTRA's."""
    attention = layer.attention.self
    return _attend(
        attention,
        attention.query(asking),
        attention.key(x),
        attention.value(x),
        attention.dropout.p,
        packing,
    )


def _bert_rest(layer: Any, context: Tensor, asking: Tensor) -> Tensor:
    attended = layer.attention.output(context, asking)
    out: Tensor = layer.output(layer.intermediate(attended), attended)
    return out


def _distilbert_attend(
    layer: Any, asking: Tensor, x: Tensor, packing: Packing, **unused: Any
) -> Tensor:
    attention = layer.attention
    return _attend(
        attention,
        attention.q_lin(asking),
        attention.k_lin(x),
        attention.v_lin(x),
        attention.dropout.p,
        packing,
    )


def _distilbert_rest(layer: Any, context: Tensor, asking: Tensor) -> Tensor:
    attended = layer.sa_layer_norm(layer.attention.out_lin(context) + asking)
    out: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return out


def _albert_attend(
    layer: Any, asking: Tensor, x: Tensor, packing: Packing, **unused: Any
) -> Tensor:
    attention = layer.attention
    dropout = attention.attention_dropout.p
    return _attend(
        attention, attention.query(asking), attention.key(x), attention.value(x), dropout, packing
    )


def _albert_rest(layer: Any, context: Tensor, asking: Tensor) -> Tensor:
    attention = layer.attention
    attended = attention.LayerNorm(asking + attention.output_dropout(attention.dense(context)))
    out: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(attended) + attended)
    return out


def _modernbert_attend(
    layer: Any,
    asking: Tensor,
    x: Tensor,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **unused: Any,
) -> Tensor:
    """position_embeddings: cosines and sines of the positions, each (1, T, D)."""
    attention, normed = layer.attn, layer.attn_norm(x)
    rows = packing.firsts if asking.shape[1] != x.shape[1] else slice(None)
    sizes = [x.shape[-1], 2 * x.shape[-1]]  # of one matrix for queries, keys and values
    weights, biases = (
        attention.Wqkv.weight.split(sizes),
        [None] * 2 if attention.Wqkv.bias is None else attention.Wqkv.bias.split(sizes),
    )
    query = F.linear(normed[:, rows], weights[0], biases[0])
    key, value = F.linear(normed, weights[1], biases[1]).chunk(2, -1)
    query = _rotated(query, packing, *(angle[:, rows] for angle in position_embeddings))
    key = _rotated(key, packing, *position_embeddings)
    return _attend(
        attention, query, key, value, attention.attention_dropout, packing, attention.sliding_window
    )


def _modernbert_rest(layer: Any, context: Tensor, asking: Tensor) -> Tensor:
    attended = asking + layer.attn.out_drop(layer.attn.Wo(context))
    out: Tensor = attended + layer.mlp(layer.mlp_norm(attended))
    return out


def _rotated(x: Tensor, packing: Packing, cos: Tensor, sin: Tensor) -> Tensor:
    """ModernBERT's apply_rotary_pos_emb, with its roundings to float32, for x (1, T or N, hidden) alone."""
    heads = x.unflatten(-1, (packing.heads, -1))
    left, right = heads.float().chunk(2, -1)
    turned: Tensor = (
        heads.float() * cos[:, :, None] + torch.cat((-right, left), -1) * sin[:, :, None]
    )
    return turned.to(x.dtype).flatten(-2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    packing: Packing,
    window: int | None = None,
) -> Tensor:
    """Queries (1, T or N, hidden), keys and values (1, T, hidden) -> context, like the queries."""
    q, k, v = (x.unflatten(-1, (packing.heads, -1)).transpose(1, 2) for x in (query, key, value))
    p = dropout if module.training else 0.0
    context, _ = packed_attention(
        module, q, k, v, None, packing=packing, dropout=p, sliding_window=window
    )
    return context.flatten(-2)


def _last_layer(
    attend: Attend, rest: Rest, layer: Any, x: Tensor, packing: Packing, **more: Any
) -> Tensor:
    """A layer for the first tokens. x (1, T, hidden) -> (N, 1, hidden): N texts of one token."""
    first = x[:, packing.firsts]
    return rest(layer, attend(layer, first, x, packing, **more), first).transpose(0, 1)


def _replace_last(layer: Any, attend: Attend, rest: Rest) -> None:
    def forward(hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        return _last_layer(attend, rest, layer, hidden_states, packing, **kwargs)

    layer.forward = forward


def _prepare_bert(model: Any) -> None:
    _replace_last(model.base_model.encoder.layer[-1], _bert_attend, _bert_rest)


def _prepare_distilbert(model: Any) -> None:
    _replace_last(model.base_model.transformer.layer[-1], _distilbert_attend, _distilbert_rest)


def _prepare_albert(model: Any) -> None:
    """ALBERT runs the same layers again and again, so it is the loop that knows the last one."""
    encoder = model.base_model.encoder
    config = encoder.config
    encoder.gradient_checkpointing, model.supports_gradient_checkpointing = (
        False,
        True,
    )  # transformers 5.23 has none for ALBERT

    def forward(
        hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any
    ) -> BaseModelOutput:
        x = encoder.embedding_hidden_mapping_in(hidden_states)
        for i in range(config.num_hidden_layers):
            group = encoder.albert_layer_groups[
                int(i / (config.num_hidden_layers / config.num_hidden_groups))
            ]
            for j, layer in enumerate(group.albert_layers):
                run = partial(layer, attention_mask=None, packing=packing)
                if i == config.num_hidden_layers - 1 and j == config.inner_group_num - 1:
                    x = _last_layer(_albert_attend, _albert_rest, layer, x, packing)
                elif encoder.gradient_checkpointing and encoder.training:
                    x = encoder._gradient_checkpointing_func(run, x)
                else:
                    x = run(x)
        return BaseModelOutput(last_hidden_state=x)

    encoder.forward = forward


def _prepare_modernbert(model: Any) -> None:
    body = model.base_model

    def means(
        module: nn.Module, args: Any, kwargs: Any, output: BaseModelOutput
    ) -> BaseModelOutput:
        x = output[0][0]
        lengths = F.pad(kwargs["packing"].firsts, (0, 1), value=len(x)).diff()
        mean = torch.segment_reduce(
            x, "mean", lengths=lengths, axis=0, unsafe=True
        )  # unsafe: without a look at the lengths
        return BaseModelOutput(last_hidden_state=mean[:, None])

    if model.config.classifier_pooling == "mean":
        body.register_forward_hook(means, with_kwargs=True)
    else:
        _replace_last(body.layers[-1], _modernbert_attend, _modernbert_rest)


def _bert_layers(model: Any) -> list[Any]:
    return list(model.base_model.encoder.layer)[:-1]


def _distilbert_layers(model: Any) -> list[Any]:
    return list(model.base_model.transformer.layer)[:-1]


def _albert_layers(model: Any) -> list[Any]:
    """All: the last one is an earlier one too, and its last turn does not go through its forward."""
    return [
        layer
        for group in model.base_model.encoder.albert_layer_groups
        for layer in group.albert_layers
    ]


def _modernbert_layers(model: Any) -> list[Any]:
    layers = list(model.base_model.layers)
    return layers if model.config.classifier_pooling == "mean" else layers[:-1]


BERT = Architecture(
    prepare=_prepare_bert, layers=_bert_layers, attend=_bert_attend, rest=_bert_rest
)

ROBERTA = replace(BERT, first_position=lambda config: config.pad_token_id + 1)

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
        layers=_distilbert_layers,
        attend=_distilbert_attend,
        rest=_distilbert_rest,
    ),
    "albert": Architecture(
        prepare=_prepare_albert, layers=_albert_layers, attend=_albert_attend, rest=_albert_rest
    ),
    "modernbert": Architecture(
        prepare=_prepare_modernbert,
        layers=_modernbert_layers,
        attend=_modernbert_attend,
        rest=_modernbert_rest,
    ),
    "deberta-v2": Architecture(prepare=deberta.prepare),  # and -v3
}
