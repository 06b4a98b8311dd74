"""Packed attention is attention: both kernels equal one softmax a text, written out, and no text sees another.

Legend: T tokens, H heads, D size of a head.
"""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertdist.models import attention
from bertdist.models.attention import (
    NAME,
    Kernel,
    Packing,
    build_packing,
    packed_attention,
    padded_layout,
    register,
    select_kernel,
)
from bertdist.models.dropout import DropoutMasks, seed_dropout

CPU = torch.device("cpu")
KERNELS: list[Kernel] = ["buckets", "padded"]
LENGTHS = [5, 3, 3, 1, 4, 3]  # equal neighbours, one alone, one that comes again
SIZES = (2, 4)  # H, D


def rows_of(tokens: int, seed: int = 0) -> list[Tensor]:
    """query, key and value, each (1, H, T, D) float64, that want gradients."""
    draw = torch.Generator().manual_seed(seed)
    heads, size = SIZES
    return [
        torch.randn(1, heads, tokens, size, dtype=torch.float64, generator=draw).requires_grad_()
        for _ in range(3)
    ]


def written_out(rows: list[Tensor], lengths: list[int], scaling: float | None) -> Tensor:
    """(1, T, H, D): softmax(q k' x scaling) v, text by text (https://arxiv.org/abs/1706.03762, 1)."""
    parts, scale = [], 1 / math.sqrt(SIZES[1]) if scaling is None else scaling
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in rows), strict=True):
        parts.append(((q @ k.transpose(2, 3) * scale).softmax(-1) @ v).transpose(1, 2))
    return torch.cat(parts, dim=1)


def masked(rows: list[Tensor], lengths: list[int]) -> Tensor:
    """(1, T, H, D): the padded model's way, all texts in one score matrix and a mask of blocks."""
    q, k, v = rows
    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = (q @ k.transpose(2, 3) / math.sqrt(SIZES[1])).masked_fill(
        text[:, None] != text, -math.inf
    )
    return (scores.softmax(-1) @ v).transpose(1, 2)


def packing(lengths: list[int], kernel: Kernel = "buckets", heads: int = SIZES[0]) -> Packing:
    return build_packing(lengths, torch.tensor([0, *lengths]).cumsum(0)[:-1], heads, kernel)


def attend(
    rows: list[Tensor],
    lengths: list[int],
    kernel: Kernel,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    q, k, v = rows
    here = packing(lengths, kernel, q.shape[1])
    return packed_attention(
        nn.Identity(),
        q,
        k,
        v,
        None,
        packing=here,
        scaling=scaling,
        dropout=dropout,
        sliding_window=window,
    )[0]


def gradients(rows: list[Tensor], out: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum(), rows
        )
    )


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_equals_one_softmax_per_text_with_its_gradients(
    kernel: Kernel, scaling: float | None
) -> None:
    rows = rows_of(sum(LENGTHS))
    out, expected = attend(rows, LENGTHS, kernel, scaling), written_out(rows, LENGTHS, scaling)
    assert out.shape == (1, sum(LENGTHS), *SIZES)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(gradients(rows, out), gradients(rows, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first_only", [False, True])
def test_without_gradients_too(first_only: bool) -> None:
    rows, firsts = rows_of(sum(LENGTHS)), torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
    asked = [rows[0][:, :, firsts] if first_only else rows[0], *rows[1:]]
    with torch.no_grad():
        out, expected = attend(asked, LENGTHS, "buckets"), written_out(rows, LENGTHS, None)
        wrong = attend(asked, [3, 5, 3, 1, 4, 3], "buckets") if not first_only else out + 1
    expected = expected[:, firsts] if first_only else expected
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert (wrong - expected).abs().max() > 0.1  # the control


def test_the_kernels_equal_one_masked_attention() -> None:
    rows = rows_of(sum(LENGTHS))
    for kernel in KERNELS:
        torch.testing.assert_close(
            attend(rows, LENGTHS, kernel), masked(rows, LENGTHS), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wrong", [[sum(LENGTHS)], [3, 5, 3, 1, 4, 3], [*LENGTHS[:-1], 2, 1]])
def test_attention_across_texts_is_detected(wrong: list[int], kernel: Kernel) -> None:
    # The control: all in one text, two lengths exchanged, one text cut in two.
    rows = rows_of(sum(LENGTHS))
    out, expected = attend(rows, wrong, kernel), written_out(rows, LENGTHS, None)
    assert (out - expected).abs().max() > 0.1
    assert (
        max(
            (a - b).abs().max()
            for a, b in zip(gradients(rows, out), gradients(rows, expected), strict=True)
        )
        > 0.01
    )


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=7), seed=st.integers(0, 1000))
def test_any_lengths_in_any_order_are_attended_alike(lengths: list[int], seed: int) -> None:
    rows = rows_of(sum(lengths), seed)
    expected = written_out(rows, lengths, None)
    for kernel in KERNELS:
        torch.testing.assert_close(attend(rows, lengths, kernel), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_equal_in_float32_to_its_rounding(kernel: Kernel) -> None:
    rows = rows_of(sum(LENGTHS))
    expected = written_out(rows, LENGTHS, None)
    out = attend([x.detach().float() for x in rows], LENGTHS, kernel)
    assert (
        out - expected
    ).abs().max() < 2e-6  # sums of 5 numbers of size 3: a few roundings of 2e-7


# ---- Dropout


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_text_attends_to_another_with_dropout_too(kernel: Kernel, dropout: float) -> None:
    rows, starts = rows_of(sum(LENGTHS)), np.cumsum([0, *LENGTHS])
    torch.manual_seed(0)
    out = attend(rows, LENGTHS, kernel, dropout=dropout)
    leaky = attend(rows, [sum(LENGTHS)], kernel, dropout=dropout)  # the control: one text
    for first, end in pairwise(starts):
        found = torch.autograd.grad(out[:, first:end].sum(), rows, retain_graph=True)
        control = torch.autograd.grad(leaky[:, first:end].sum(), rows, retain_graph=True)
        for gradient, leak in list(zip(found, control, strict=True))[
            1:
        ]:  # key and value: a query is its own token's only
            others = torch.ones(sum(LENGTHS), dtype=torch.bool)
            others[first:end] = False
            assert (gradient[:, :, others] == 0).all()  # exactly
            assert (leak[:, :, others] != 0).any()
        if not dropout:  # a text of one token may be dropped whole
            assert (found[2][:, :, first:end] != 0).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mean_over_dropout_masks_is_attention_without_dropout(kernel: Kernel) -> None:
    heads, lengths = 20_000, [3, 2, 2, 1]  # each head draws for itself: as many samples
    one = [x[:, :1].detach() for x in rows_of(sum(lengths))]
    torch.manual_seed(0)
    drawn = attend([x.expand(1, heads, -1, -1) for x in one], lengths, kernel, dropout=0.5)
    plain = attend(one, lengths, kernel)
    error = drawn.std(dim=2, keepdim=True) / math.sqrt(heads)
    assert ((drawn.mean(dim=2, keepdim=True) - plain).abs() < 5 * error).all()
    assert (
        (0.9 * drawn.mean(dim=2, keepdim=True) - plain).abs() > 5 * error
    ).any()  # the control: a tenth too little is seen
    assert (error > 1e-4).all()  # and dropout there was
    # A text of one token attends to itself with 1: dropped to 0 or doubled.
    ratios = (drawn[:, -1] / plain[:, -1]).round(decimals=9)
    assert set(ratios.unique().tolist()) == {0.0, 2.0}


# ---- What is said of a row


def test_padded_layout_by_hand() -> None:
    places, real = padded_layout([2, 3, 1])
    assert places.tolist() == [[0, 1, 0], [2, 3, 4], [5, 0, 0]]
    assert real.tolist() == [[True, True, False], [True, True, True], [True, False, False]]


def test_a_packing_by_hand() -> None:
    padded = packing([1, 2], "padded")
    assert (
        padded.pad_index is not None
        and padded.attention_mask is not None
        and padded.unpad_index is not None
    )
    assert padded.pad_index.tolist() == [[0, 0], [1, 2]]
    assert padded.attention_mask.tolist() == [[[[True, False]]], [[[True, True]]]]
    assert padded.unpad_index.tolist() == [0, 2, 3]
    varlen = packing([3, 1], "varlen")
    assert varlen.cu_seqlens is not None and (
        varlen.cu_seqlens.tolist(),
        varlen.cu_seqlens.dtype,
    ) == (
        [0, 3, 4],
        torch.int32,
    )


def test_buckets_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SIMD_WIDTH", 2)
    layout = attention.BucketLayout([4, 3, 2], heads=1)
    assert [(bucket.first, bucket.lengths, bucket.longest) for bucket in layout.buckets] == [
        (0, (4, 3), 4),
        (2, (2,), 2),
    ]
    assert layout.pad_index.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        4,
        7,
        8,
    ]  # the place behind the second text's end holds its first token
    assert layout.unpad_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert layout.padding is not None and layout.padding.tolist() == [7]
    monkeypatch.setattr(attention, "MAX_SCORES_PER_BUCKET", 20)
    assert [bucket.lengths for bucket in attention.BucketLayout([4, 3, 2], heads=1).buckets] == [
        (4,),
        (3,),
        (2,),
    ]  # 4 x 4 scores each


@pytest.mark.parametrize("scores", [1, 100, 1 << 20])
def test_the_size_of_buckets_changes_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES_PER_BUCKET", scores)
    rows = rows_of(sum(LENGTHS))
    torch.testing.assert_close(
        attend(rows, LENGTHS, "buckets"), written_out(rows, LENGTHS, None), rtol=0, atol=1e-12
    )


def test_the_device_and_the_type_choose_the_kernel() -> None:
    assert select_kernel(CPU, torch.float32, 64) == "buckets"
    assert (
        select_kernel(torch.device("meta"), torch.bfloat16, 64) == "padded"
    )  # stands for any device that is neither CPU nor CUDA


# ---- First tokens only, and windows


def seen(rows: list[Tensor], lengths: list[int], window: int) -> Tensor:
    """(1, T, H, D): text by text, and in it those less than `window` places away."""
    parts = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in rows), strict=True):
        place = torch.arange(q.shape[2])
        scores = (q @ k.transpose(2, 3) / math.sqrt(SIZES[1])).masked_fill(
            (place[:, None] - place).abs() >= window, -math.inf
        )
        parts.append((scores.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_windows_and_first_tokens_equal_masked_attention(
    kernel: Kernel, first_only: bool, window: int
) -> None:
    lengths = [40, 18, 17, 5, 1]
    rows, firsts = rows_of(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)[:-1]
    asked = [rows[0][:, :, firsts] if first_only else rows[0], *rows[1:]]
    out, expected = attend(asked, lengths, kernel, window=window), seen(rows, lengths, window)
    expected = expected[:, firsts] if first_only else expected
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(gradients(rows, out), gradients(rows, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    other = attend(asked, lengths, kernel, window=window + 1)  # the control
    assert window == 100 or (other - expected).abs().max() > 0.01


def documented_flash(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **reach: int
) -> tuple[Tensor]:
    """Attention as flash_attn_varlen_func documents it, where a window counts from the end (https://github.com/Dao-AILab/flash-attention)."""
    q_starts, k_starts, longest_q, longest_k, *others = rest
    assert others == [0.0, False, False] and q_starts.dtype == k_starts.dtype == torch.int32
    left, right, parts = reach.get("window_size_left"), reach.get("window_size_right"), []
    for (a, b), (c, d) in zip(
        pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True
    ):
        assert b - a <= longest_q and d - c <= longest_k
        place, key = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        if left is not None and right is not None:
            scores = scores.masked_fill((key < place - left) | (key > place + right), -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
    return (torch.cat(parts),)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("first_only", [False, True])
def test_flash_attention_is_called_as_documented(
    first_only: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It runs on CUDA only, tests/gpu: here are its words.
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", documented_flash)
    lengths = [8, 5, 3, 1]
    rows, firsts = rows_of(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)[:-1]
    asked = [rows[0][:, :, firsts] if first_only else rows[0], *rows[1:]]
    out, expected = (
        attend(asked, lengths, "varlen", window=window),
        seen(rows, lengths, window or 100),
    )
    expected = expected[:, firsts] if first_only else expected
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(gradients(rows, out), gradients(rows, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    if window in (1, 3):  # the control
        assert (attend(asked, lengths, "varlen", window=window + 1) - expected).abs().max() > 0.01


# ---- Dropout that belongs to the rows


def with_noise(rows: list[Tensor], lengths: list[int], numbers: list[int]) -> list[Tensor]:
    """(L, H, D) a text."""
    here = replace(packing(lengths), dropout_masks=DropoutMasks(numbers, lengths))
    return list(
        packed_attention(nn.Identity(), *rows, None, packing=here, dropout=0.4)[0][0].split(lengths)
    )


def test_dropout_of_a_text_does_not_depend_on_the_other_texts() -> None:
    lengths = [20, 17, 9, 3]
    rows = rows_of(sum(lengths))
    texts = list(zip(*(x.split(lengths, dim=2) for x in rows), strict=True))
    seed_dropout(1, 2, 3)
    batched = with_noise(rows, lengths, [7, 5, 8, 6])
    for order in ([3], [2, 1], [1, 0, 3]):
        some = [torch.cat([texts[i][j] for i in order], dim=2) for j in range(3)]
        alone = with_noise(some, [lengths[i] for i in order], [[7, 5, 8, 6][i] for i in order])
        for found, i in zip(alone, order, strict=True):
            torch.testing.assert_close(found, batched[i], rtol=0, atol=1e-14)
    other = with_noise(rows, lengths, [7, 5, 8, 9])  # the control: another row
    assert [bool((a - b).abs().max() > 0.1) for a, b in zip(batched, other, strict=True)] == [
        False,
        False,
        False,
        True,
    ]
    seed_dropout(1, 3, 3)
    assert all(
        (a - b).abs().max() > 0.1
        for a, b in zip(batched, with_noise(rows, lengths, [7, 5, 8, 6]), strict=True)
    )


# ---- The door to transformers


def test_attention_without_a_packing_is_refused() -> None:
    q, k, v = rows_of(4)
    for here, mask in (
        (None, None),
        (packing([4]), torch.ones(1, 1, 4, 4)),
        (None, torch.ones(1, 1, 4, 4)),
    ):
        with pytest.raises(
            AssertionError,
            match=r"^attention 'bertdist_packed' needs a packing and no mask: call the model through ",
        ):
            packed_attention(nn.Identity(), q, k, v, mask, packing=here)


def test_transformers_calls_our_function_and_makes_no_mask() -> None:
    register()
    assert ALL_ATTENTION_FUNCTIONS[NAME] is packed_attention
    assert ALL_MASK_ATTENTION_FUNCTIONS[NAME](attention_mask=torch.ones(1, 4), q_length=4) is None


def test_a_model_with_our_attention_cannot_be_called_padded_by_mistake(tiny_model: Path) -> None:
    register()
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, attn_implementation=NAME
    ).eval()
    ids, mask = torch.tensor([[2, 5, 3], [2, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(AssertionError, match="needs a packing and no mask"):
        model(input_ids=ids, attention_mask=mask)
