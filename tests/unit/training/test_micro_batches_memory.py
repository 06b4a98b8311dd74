"""How many tokens fit: chosen from what is free, halved where it was too much, the same on every
start.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bertdist.core.config import ModelConfig
from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.in_memory import records_from_texts
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, MapLoader
from bertdist.data.tokenization import Example, create_dataset, load_tokenizer
from bertdist.models.classifier import load_classifier
from bertdist.tasks.tasks import SingleLabel
from bertdist.training import micro_batches
from bertdist.training.micro_batches import (
    attempt,
    bytes_per_token,
    compute_in_micro_batches,
    find_tokens,
    halve_tokens,
    is_out_of_memory,
    largest_fitting_tokens,
    power_of_two,
    saved_activation_bytes,
)

CPU = torch.device("cpu")
QUICK = settings(max_examples=50, deadline=None)


class Rows:
    """Examples without a tokenizer: row r is lengths[r] times the id r."""

    def __init__(self, lengths: Sequence[int], max_length: int = 64) -> None:
        self.sizes, self.max_length = lengths, max_length
        self.records = SimpleNamespace(
            lengths=lambda: np.array(lengths), location=lambda row: f"x.tsv line {row + 2}"
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        return [
            Example(int(row), [int(row)] * self.sizes[row], [0] * self.sizes[row], 0, 1.0)
            for row in rows
        ]


def batches(lengths: Sequence[int] = (7, 3, 5, 2), **changes: Any) -> MapLoader:
    given: dict[str, Any] = {
        "dataset": Rows(lengths),
        "rows_per_step": 4,
        "tokens_per_micro_batch": 100,
        **changes,
    }
    return MapLoader(**given)


# --- Powers of two


@QUICK
@given(number=st.integers(-100, 10**9))
@example(number=-5)
def test_a_power_of_two_is_the_largest_that_is_not_above(number: int) -> None:
    found = power_of_two(number)
    assert math.log2(found).is_integer()
    assert found <= max(1, number) < 2 * found


@QUICK
@given(tokens=st.integers(1, 10**6), lengths=st.lists(st.integers(1, 200), min_size=2, max_size=20))
@example(tokens=150, lengths=[1, 74])
def test_half_of_the_tokens_cut_the_batch_that_did_not_fit(tokens: int, lengths: list[int]) -> None:
    found = halve_tokens(
        tokens, collate([Example(0, [1] * length, [0] * length, 0, 1.0) for length in lengths])
    )
    assert 1 <= found <= max(1, tokens // 2) and found < sum(lengths)
    assert found == 1 or 2 * found + 1 >= min(tokens, sum(lengths)), "no more halvings than needed"


# --- What an error says


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to ..."
            ),
            True,
        ),
        (RuntimeError("could not create a primitive"), True),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one

    def fail() -> Tensor:
        raise error

    if is_one:
        assert attempt(fail) == (str(error) or "MemoryError")
    else:
        with pytest.raises(RuntimeError, match="^" + str(error)[:20]):
            attempt(fail)


def test_the_allocator_of_this_machine_says_it_so() -> None:
    """2^50 bytes, for real."""
    assert "DefaultCPUAllocator: can't allocate memory" in str(
        attempt(lambda: torch.empty(2**50, dtype=torch.uint8))
    )


def test_an_attempt_lets_go_of_what_it_held() -> None:
    """Before it returns; an exception that is still in hand would hold its frames, and these the
    activations.
    """
    held: list[Callable[[], Any]] = []

    def fail(x: Tensor) -> Tensor:
        import weakref

        y = (x * 2).exp()  # its graph holds y
        held.append(weakref.ref(y))
        raise torch.OutOfMemoryError("out")

    assert attempt(fail, torch.ones(3, requires_grad=True)) == "out"
    assert held[0]() is None
    try:
        fail(torch.ones(3, requires_grad=True))
    except torch.OutOfMemoryError:
        assert held[1]() is not None  # the control
    assert attempt(lambda x, y: x + y, 1, 2) == 3


# --- Doubling, on a GPU


@QUICK
@given(
    fixed=st.integers(0, 10**6),
    each=st.integers(1, 1000),
    most=st.integers(6, 16).map(lambda n: 1 << n),
    budget=st.integers(0, 10**8),
    first=st.integers(3, 64),
)
def test_doubling_ends_at_the_largest_that_fits(
    fixed: int, each: int, most: int, budget: int, first: int
) -> None:
    tried: list[int] = []

    def peak(tokens: int) -> int:
        tried.append(tokens)
        return fixed + each * tokens

    found = largest_fitting_tokens(peak, first, most, budget)
    assert (
        tried == [tried[0] << i for i in range(len(tried))]
        and first <= tried[0] < 2 * first
        and tried[-1] <= most
    )
    assert all(2 * (fixed + each * tokens) <= budget for tokens in tried[:-1])
    if found in tried:
        assert peak(found) <= budget and (found == most or 2 * peak(found) > budget)
    else:
        assert found == max(1, tried[0] // 2) and peak(tried[0]) > budget


@pytest.mark.parametrize(
    ("fits", "found"), [(64, 64), (1023, 512), (4096, 4096), (10**6, 8192), (10, 16)]
)
def test_doubling_ends_where_memory_does(fits: int, found: int) -> None:
    """Where free memory promised more than there is, as beside another program."""
    assert (
        largest_fitting_tokens(lambda tokens: tokens if tokens <= fits else None, 32, 8192, 10**9)
        == found
    )


# --- Counting, on a CPU


@QUICK
@given(
    a=st.integers(1, 10**6),
    b=st.integers(0, 10**4),
    c=st.integers(0, 10**9),
    unit=st.integers(1, 16),
    longest=st.integers(1, 512),
)
def test_bytes_a_token_are_those_of_a_text_of_full_length(
    a: int, b: int, c: int, unit: int, longest: int
) -> None:
    kept = [c + a * length + b * length**2 for length in (unit, 2 * unit, 4 * unit)]
    assert bytes_per_token(kept, unit, longest) == pytest.approx(a + b * longest)


def test_kept_bytes_are_counted_once_and_by_hand() -> None:
    weight = torch.ones(4, 4, requires_grad=True)

    def compute(batch: PackedBatch) -> Tensor:
        x = torch.ones(len(batch.ids), 4)  # 16 bytes a token
        y = x @ weight  # keeps x
        return (y.exp() * y).sum()  # exp keeps its result; the product keeps both, y anew

    batch = collate(Rows([5])[[0]])
    assert saved_activation_bytes(compute, batch) == 3 * 5 * 16
    with torch.no_grad():
        assert saved_activation_bytes(compute, batch) == 3 * 5 * 16, (
            "also where nobody wants gradients"
        )


def linear(each: int) -> Callable[[PackedBatch], Tensor]:
    """A model that keeps `each` bytes a token."""
    assert each % 4 == 0
    return lambda batch: torch.ones(len(batch.ids), each // 4, requires_grad=True).exp().sum()


@pytest.mark.parametrize(
    ("free", "needed", "tokens"),
    [
        (10**12, 0, DEFAULT_TOKEN_BUDGET),  # plenty of memory: always the same
        (2 * 400 * 8192, 0, 8192),
        (2 * 400 * 8192 - 1, 0, 4096),
        (2 * 400 * 8192, 2, 4096),
        (2 * 400 * 8192 + 2, 2, 8192),
        (2 * 400 * 1000, 0, 512),
        (800, 0, 1),
        (0, 0, 1),
        (5, 10**9, 1),
    ],
)
def test_half_of_what_is_free_decides_on_a_cpu(
    free: int, needed: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 bytes a token, by a power of two."""
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: free)
    assert find_tokens(linear(400), batches(), CPU, needed) == tokens


@pytest.mark.parametrize("max_length", [3, 16, 100, 512])
def test_any_max_length_can_be_probed(max_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: 2 * 400 * 600)
    seen: list[tuple[int, ...]] = []

    def compute(batch: PackedBatch) -> Tensor:
        seen.append(batch.lengths)
        return linear(400)(batch)

    assert find_tokens(compute, batches(dataset=Rows([2, 4], max_length)), CPU) == 512
    assert [lengths[0] for lengths in seen] == [seen[0][0] << i for i in range(3)], (
        "three texts, each twice as long"
    )
    assert seen[-1][0] <= max(max_length, 4)


def test_a_probe_that_runs_out_of_memory_ends_nothing() -> None:
    def compute(batch: PackedBatch) -> Tensor:
        raise MemoryError

    assert find_tokens(compute, batches(), CPU) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_three_small_texts_tell_what_full_ones_keep(tiny_model: Path, dropout: float) -> None:
    """Also with dropout, where attention on a CPU keeps its scores: bytes that grow with the square
    of the length.
    """
    config = ModelConfig(model_name_or_path=str(tiny_model), dropout=dropout)
    task = SingleLabel(("no", "yes"))
    model = load_classifier(config, task)[0].train()
    examples = create_dataset(
        records_from_texts(["a good film"]), load_tokenizer(config), None, 256
    )
    (example,) = examples[[0]]

    def kept(texts: int, length: int) -> int:
        batch = collate([example._replace(ids=[7] * length, token_type_ids=[0] * length)] * texts)
        return saved_activation_bytes(
            lambda batch: task.loss(model(batch), batch.targets, batch.weights), batch
        )

    told = bytes_per_token([kept(1, 16), kept(1, 32), kept(1, 64)], 16, 256)
    assert told == pytest.approx((kept(3, 256) - kept(1, 256)) / 512, rel=0.01)
    assert (told > 1.5 * (kept(1, 64) - kept(1, 32)) / 32) is (
        dropout > 0
    )  # the control: a straight line would not do


# --- Control groups


# --- Forward passes


class Echo(nn.Module):
    """Answers each text with its row; does not fit above `room` tokens, or where a text of the row
    `stuck` is in it.
    """

    def __init__(self, room: int, stuck: int = -1) -> None:
        super().__init__()
        self.room, self.stuck = room, stuck
        self.asked: list[int] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.asked.append(sum(batch.lengths))
        if (
            self.asked[-1] > self.room and len(batch.lengths) > 1
        ) or self.stuck in batch.row_numbers.tolist():
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return batch.row_numbers.float()


@QUICK
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    tokens=st.integers(1, 200),
    room=st.integers(1, 200),
    rows_per_step=st.integers(1, 8),
)
def test_what_does_not_fit_is_computed_in_pieces_each_text_once(
    lengths: list[int], tokens: int, room: int, rows_per_step: int
) -> None:
    split = batches(lengths, tokens_per_micro_batch=tokens, rows_per_step=rows_per_step)
    cut = [batch for step in split.steps(0, split.steps_per_epoch) for batch in step.micro_batches]
    model = Echo(room)
    found = list(compute_in_micro_batches(model, cut, split))
    assert all(torch.equal(answer, batch.row_numbers.float()) for batch, answer in found)
    assert [row for batch, _ in found for row in batch.row_numbers.tolist()] == [
        row for batch in cut for row in batch.row_numbers.tolist()
    ]
    too_much = [asked for asked in model.asked if asked > room and asked > max(lengths)]
    assert too_much == sorted(set(too_much), reverse=True), (
        "what was too much once is not tried again"
    )
    if room >= tokens:
        assert [batch for batch, _ in found] == cut, "what fits is left as it is"


def test_a_text_that_does_not_fit_alone_is_named() -> None:
    split = batches([7, 3, 5, 2])
    (step,) = split.steps(0, 1)
    with pytest.raises(DataError) as caught:
        list(compute_in_micro_batches(Echo(100, stuck=2), step.micro_batches, split))
    assert str(caught.value) == (
        "x.tsv line 4: a text of 5 tokens (--max_length 64) does not fit into memory, "
        "not even alone (CUDA out of memory.). "
        "Use a smaller --max_length, or more memory."
    )
