"""A bf16 step on a CPU: activations stay bf16 from layer to layer, and products have few shapes.

Under `torch.autocast("cpu", torch.bfloat16)` products are bf16, and what follows them takes the
type of its inputs. Two things cost more there than the products:

1. Embeddings leave their norm in float32, so every residual sum, norm and input of a product is
   float32 again, and is cast before each product. `keep_bf16` casts once, behind the embeddings.
   Norms, softmax and the sum of a loss are still computed in float32, and weights and their
   gradients stay float32.
2. oneDNN generates code for each new number of rows of a product, 3 to 10 ms each time, where the
   product takes 0.3 to 1 ms; micro-batches without padding have a new number of tokens in almost
   every step. `round_up` adds texts that nobody reads, so that the numbers of tokens and of texts
   are round. Texts do not see each other, and the added ones have no gradient: exact.

`use_bf16_layer` makes a layer of BERT one operation, with its backward written out; equal to the
layer's own modules under autocast, to bf16 rounding, with the same dropout. In a layer of 400
tokens the products take a third of the time, and what is around them the rest: so weights are cast
once, queries, keys and values are one product, dropout and residual sums are in place, and autograd
sees one node instead of 60. Norms, softmax and attention are computed in float32, and the gradients
of weights are cast to float32, as autocast does.

Legend: T tokens, N texts, W width.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertdist.data.batch import PackedBatch
from bertdist.models.attention import (
    BucketLayout,
    Packing,
    at_least_float32,
    attend_padded,
    attend_padded_backward,
)

# tokens and texts are rounded up to a multiple; from MANY_TOKENS on to a coarser one
TOKENS, MANY_TOKENS, TOKENS_OF_MANY, TEXTS = 32, 2048, 128, 4


def in_use(device: torch.device) -> bool:
    """Whether the CPU computes under bf16 autocast now."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16


def keep_bf16(model: Any) -> None:
    """Let the embeddings of a packed classifier leave as bf16 where the CPU computes in bf16."""

    def cast(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(torch.bfloat16) if in_use(output.device) else output

    model.base_model.embeddings.register_forward_hook(cast)


def round_up(batch: PackedBatch) -> PackedBatch:
    """The batch with 1 to TEXTS more texts behind its own; targets and weights stay the same."""
    tokens, texts = len(batch.ids), len(batch.lengths)
    more_texts = TEXTS - texts % TEXTS
    multiple = TOKENS if tokens < MANY_TOKENS else TOKENS_OF_MANY
    more = -(tokens + more_texts) % multiple + more_texts
    lengths = np.full(more_texts, more // more_texts)
    lengths[: more % more_texts] += 1
    ends = lengths.cumsum()
    # positions that a text of this batch has, too
    positions = (np.arange(more) - np.repeat(ends - lengths, lengths)) % max(batch.lengths)
    return replace(
        batch,
        ids=torch.cat([batch.ids, batch.ids[:1].expand(more)]),
        positions=torch.cat([batch.positions, torch.from_numpy(positions)]),
        token_type_ids=F.pad(batch.token_type_ids, (0, more)),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.from_numpy(ends) + tokens]),
        row_numbers=F.pad(batch.row_numbers, (0, more_texts), value=-1),
        lengths=(*batch.lengths, *lengths.tolist()),
    )


class _Constants(NamedTuple):
    """What a layer's operation reads besides tensors with gradients."""

    layout: BucketLayout
    scale: float  # of the scores
    keep: list[Tensor] | None  # dropout of attention weights, see BucketLayout.draw_masks
    epsilons: tuple[float, float]  # of the norms there


def use_bf16_layer(layer: Any) -> None:
    """Give a layer of BERT, RoBERTa or ELECTRA this forward, if it has their plain modules.

    Without gradients and with gradient checkpointing its own modules run.
    """
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    linear = [attention.self.query, attention.self.key, attention.self.value]
    linear += [attention.output.dense, intermediate.dense, output.dense]
    norms = [attention.output.LayerNorm, output.LayerNorm]
    weights = [part for x in (*linear, *norms) for part in (x.weight, x.bias)]
    exact_gelu = getattr(intermediate.intermediate_act_fn, "act", None) is F.gelu
    plain_norms = all(type(norm) is nn.LayerNorm for norm in norms)
    if not exact_gelu or not plain_norms or any(weight is None for weight in weights):
        return
    modules = layer.forward

    def forward(hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        x = hidden_states
        fits = torch.is_grad_enabled() and x.dtype == torch.bfloat16 and in_use(x.device)
        # transformers 5.23 checkpoints in the forward of the class, which this one replaces
        if not fits or layer.gradient_checkpointing:
            through_modules: Tensor = modules(x, *args, packing=packing, **kwargs)
            return through_modules
        layout, p = packing.buckets, attention.self.dropout.p if layer.training else 0.0
        assert layout is not None
        # in the order of the modules: the draws are theirs
        keep, dtype = None, at_least_float32(x[:0]).dtype
        if p:
            keep = layout.draw_masks(packing.dropout_masks, p, first_only=False, dtype=dtype)
        # (T, W), after attention and at the end
        masks = [part.dropout.scaled_mask(x) for part in (attention.output, output)]
        masks = [None if mask is None else mask[0] for mask in masks]
        constants = _Constants(
            layout,
            (x.shape[-1] // layout.heads) ** -0.5,
            keep,
            tuple(norm.eps for norm in norms),
        )
        tensors = (part for x in (*linear, *norms) for part in (x.weight, x.bias))
        out: Tensor = _Layer.apply(x[0], constants, *masks, *tensors)  # type: ignore[no-untyped-call]
        return out[None]

    layer.forward = forward


class _Layer(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        x: Tensor,
        constants: _Constants,
        mask1: Tensor | None,
        mask2: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        """x (T, W); parameters: weights and biases in the order of `use_bf16_layer`."""
        linear, (gain1, shift1, gain2, shift2) = parameters[:12], parameters[12:]
        wq, bq, wk, bk, wv, bv, wo, bo, w1, b1, w2, b2 = (each.to(x.dtype) for each in linear)
        qkv_w, qkv_b = torch.cat([wq, wk, wv]), torch.cat([bq, bk, bv])
        epsilon1, epsilon2 = constants.epsilons
        layout, shape, width = constants.layout, x.shape, x.shape[-1:]
        # attention
        qkv = torch.addmm(qkv_b, x, qkv_w.t())
        pad, _ = layout.joined_indices
        padded = qkv.view(-1, width[0] // layout.heads).index_select(0, pad)
        padded = at_least_float32(padded)
        q, k, v = padded.chunk(3)
        context, saved = attend_padded(q, k, v, layout, constants.scale, None, constants.keep)
        context = context.to(x.dtype).index_select(0, layout.unpad_index).view(shape)
        sum1 = _add(torch.addmm(bo, context, wo.t()), mask1, x)
        h, mean1, rstd1 = torch.native_layer_norm(sum1, width, gain1, shift1, epsilon1)
        # feed-forward
        inner = torch.addmm(b1, h, w1.t())
        activated = F.gelu(inner)
        sum2 = _add(torch.addmm(b2, activated, w2.t()), mask2, h)
        out, mean2, rstd2 = torch.native_layer_norm(sum2, width, gain2, shift2, epsilon2)
        ctx.save_for_backward(
            *(mask1, mask2, x, padded, context, sum1, h, inner, activated, sum2),
            *(qkv_w, wo, w1, w2, gain1, shift1, gain2, shift2, mean1, rstd1, mean2, rstd2),
            *saved,
        )
        ctx.layout, ctx.scale, ctx.dropped = layout, constants.scale, constants.keep is not None
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        mask1, mask2, x, padded, context, sum1, h, *saved = ctx.saved_tensors
        inner, activated, sum2, *saved = saved
        qkv_w, wo, w1, w2, gain1, shift1, gain2, shift2, mean1, rstd1, mean2, rstd2 = saved[:12]
        norm_backward = torch.ops.aten.native_layer_norm_backward
        width = x.shape[-1:]
        # False: frozen, and of x, that all below is
        of_x, _, _, _, *wanted = ctx.needs_input_grad
        of_qkv, of_o, of_1, of_2 = (
            any(wanted[i:j]) for i, j in ((0, 6), (6, 8), (8, 10), (10, 12))
        )
        # feed-forward
        d_sum, *d_norm2 = norm_backward(
            *(gradients[0].contiguous(), sum2, width, mean2, rstd2, gain2, shift2),
            [True, *wanted[14:]],
        )
        d = d_sum if mask2 is None else d_sum * mask2
        d_linear2 = _of_weight(d, activated, of_2)
        d = torch.ops.aten.gelu_backward(d @ w2, inner)
        d_linear1 = _of_weight(d, h, of_1)
        d_h = torch.addmm(d_sum, d, w1)
        d_sum, *d_norm1 = norm_backward(
            *(d_h, sum1, width, mean1, rstd1, gain1, shift1), [True, *wanted[12:14]]
        )
        # attention
        d = d_sum if mask1 is None else d_sum * mask1
        d_output = _of_weight(d, context, of_o)
        d_out = (d @ wo).view(-1, width[0] // layout.heads).index_select(0, layout.pad_index)
        if layout.padding is not None:
            d_out.index_fill_(0, layout.padding, 0)
        d_padded = torch.empty_like(padded)
        attend_padded_backward(
            *(at_least_float32(d_out), padded.chunk(3), saved[12:], layout, ctx.scale, ctx.dropped),
            found=d_padded.chunk(3),
        )
        _, unpad = layout.joined_indices
        d = d_padded.to(x.dtype).index_select(0, unpad).view(len(x), -1)
        d_weight, d_bias = _of_weight(d, x, of_qkv)
        d_qkv: list[Tensor | None] = [None] * 6
        if d_weight is not None and d_bias is not None:
            d_qkv[::2], d_qkv[1::2] = d_weight.chunk(3), d_bias.chunk(3)
        d_x = torch.addmm(d_sum, d, qkv_w) if of_x else None
        return d_x, None, None, None, *d_qkv, *d_output, *d_linear1, *d_linear2, *d_norm1, *d_norm2


def _add(x: Tensor, mask: Tensor | None, residual: Tensor) -> Tensor:
    """x x mask + residual, in x."""
    return x.add_(residual) if mask is None else x.mul_(mask).add_(residual)


def _of_weight(d: Tensor, x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's weight and bias, float32, if wanted. d (T, out), x (T, in)."""
    if not wanted:
        return None, None
    return at_least_float32(d.t() @ x), at_least_float32(d.sum(0))
