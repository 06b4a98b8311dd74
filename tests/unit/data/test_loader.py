"""Which rows make a step, who computes them, in which pieces: each row once, the same steps however they are dealt, cut or loaded."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import labelled_records
from torch.utils.data import DataLoader

from bertdist.core.args import read_config
from bertdist.core.config import BatchConfig, ModelConfig
from bertdist.core.errors import DataError
from bertdist.data import sharding as batching
from bertdist.data.batch import (
    PackedBatch,
    RankStep,
    collate,
    single_token_batch,
    split_batch,
    split_by_tokens,
)
from bertdist.data.loader import (
    EVALUATION_ROWS,
    MapLoader,
    create_eval_loader,
    create_train_loader,
    loader_settings,
)
from bertdist.data.sharding import (
    balance_by_length,
    epoch_order,
    iterate_loader,
    prefetch_to_device,
)
from bertdist.data.stats import DatasetStats
from bertdist.data.tokenization import Example, load_tokenizer
from bertdist.tasks.labels import LabelStats
from bertdist.tasks.tasks import SingleLabel

pytestmark = [
    # Loader workers are forked, also where a test before this one has started threads (Python 3.12 warns of it).
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Two workers on a machine with one core are slow, and that is all.
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]
QUICK = settings(max_examples=30, deadline=None)


class Rows:
    """Examples without a tokenizer: row r is `lengths[r]` times the id r. Row `bad` cannot be encoded."""

    def __init__(self, lengths: Sequence[int], bad: int | None = None) -> None:
        self.sizes, self.bad = np.array(lengths, dtype=np.int64), bad
        self.records = SimpleNamespace(lengths=lambda: self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        if self.bad in rows:
            raise DataError(f"dev.tsv line {self.bad}: no text")
        return [
            Example(row, [row] * int(self.sizes[row]), [0] * int(self.sizes[row]), row % 2, 1.0)
            for row in rows
        ]


LENGTHS = [
    3,
    1,
    4,
    1,
    5,
    9,
    2,
    6,
    5,
    3,
    5,
]  # eleven rows: three steps of four, the last one smaller


def batches(lengths: Sequence[int] = LENGTHS, **changes: Any) -> MapLoader:
    given = {"rows_per_step": 4, "tokens_per_micro_batch": 9, "shuffle": True, "seed": 7, **changes}
    return MapLoader(dataset=given.pop("dataset", None) or Rows(lengths), **given)


def rows_of(step: RankStep) -> list[int]:
    return [row for batch in step.micro_batches for row in batch.row_numbers.tolist()]


def content(step: RankStep) -> Any:
    """All of a step, as plain values: number and kind of every tensor."""
    values = [
        [(f.name, getattr(batch, f.name)) for f in fields(batch)] for batch in step.micro_batches
    ]
    plain = [
        [(name, v if isinstance(v, tuple) else (v.dtype, v.tolist())) for name, v in batch]
        for batch in values
    ]
    return step.number, step.rows, plain


# ---- plan


@QUICK
@given(rows=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 100))
def test_a_plan_has_each_row_once_and_is_a_pure_function(rows: int, seed: int, epoch: int) -> None:
    first = epoch_order(rows, seed, epoch)
    assert sorted(first.tolist()) == list(range(rows))
    np.random.seed(1)
    torch.manual_seed(1)
    assert epoch_order(rows, seed, epoch).tolist() == first.tolist()


def test_a_plan_differs_by_epoch_and_by_seed() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_a_plan_is_the_same_in_every_release() -> None:
    # numpy promises PCG64's bits for ever, but not permutation()'s: a change would change every resumed run.
    assert epoch_order(8, 42, 0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    assert epoch_order(8, 42, 1).tolist() != epoch_order(8, 42, 0).tolist()


# ---- deal


def test_a_deal_by_hand() -> None:
    # 11 (5 tokens) to rank 0, 12 (3) to rank 1, 13 (3) to rank 1 with 3, 10 (1) to rank 0 with 5.
    shares = balance_by_length(np.array([10, 11, 12, 13]), np.array([1, 5, 3, 3]), 2)
    assert [share.tolist() for share in shares] == [[11, 10], [12, 13]]
    assert [share.dtype for share in shares] == [np.int64, np.int64]
    assert [share.tolist() for share in balance_by_length(np.array([4]), np.array([2]), 3)] == [
        [4],
        [],
        [],
    ]


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@QUICK
@given(lengths=SIZES, ranks=st.integers(1, 9))
def test_a_deal_has_each_row_once_on_any_number_of_ranks(lengths: list[int], ranks: int) -> None:
    rows = np.arange(len(lengths)) * 3 + 1
    shares = balance_by_length(rows, np.array(lengths), ranks)
    assert len(shares) == ranks
    assert sorted(row for share in shares for row in share.tolist()) == rows.tolist()
    again = balance_by_length(rows, np.array(lengths), ranks)
    assert [share.tolist() for share in again] == [share.tolist() for share in shares]
    if len(lengths) >= ranks:
        assert all(len(share) for share in shares)  # no rank is idle that need not be


def slowest(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[row] for row in share) for share in shares)


def best_possible(lengths: Sequence[int], ranks: int) -> int:
    """The slowest rank's load of the best of all ways to deal."""
    ways = itertools.product(range(ranks), repeat=len(lengths))
    return min(
        max(sum(n for n, rank in zip(lengths, way, strict=True) if rank == r) for r in range(ranks))
        for way in ways
    )


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), ranks=st.integers(1, 3))
def test_a_deal_is_as_even_as_longest_first_promises(lengths: list[int], ranks: int) -> None:
    # At most 4/3 - 1/(3 ranks) of the best possible (https://doi.org/10.1137/0117039).
    shares = [
        share.tolist()
        for share in balance_by_length(np.arange(len(lengths)), np.array(lengths), ranks)
    ]
    assert slowest(shares, lengths) * 3 * ranks <= (4 * ranks - 1) * best_possible(lengths, ranks)


def test_a_deal_in_turn_breaks_that_promise() -> None:
    lengths = [9, 1, 9, 1]  # the control
    assert slowest([[0, 2], [1, 3]], lengths) * 6 > 7 * best_possible(lengths, 2)


# ---- cut


def test_a_cut_by_hand() -> None:
    assert split_by_tokens([3, 5, 2, 5, 1], 8) == [[1], [3, 0], [2, 4]]
    assert split_by_tokens([3, 9, 3], 6) == [[1], [0, 2]]  # longer than a micro-batch: alone
    assert split_by_tokens([2], 1) == [[0]]
    assert split_by_tokens([2, 2, 2], 100) == [[0, 1, 2]]


@QUICK
@given(lengths=SIZES, tokens=st.integers(1, 120))
def test_a_cut_has_each_place_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    parts = split_by_tokens(lengths, tokens)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in part) <= tokens or len(part) == 1 for part in parts)
    longest_first = [lengths[place] for part in parts for place in part]
    assert longest_first == sorted(lengths, reverse=True)  # texts of one length lie side by side


# ---- collate


def test_a_batch_by_hand() -> None:
    first = Example(7, [2, 30, 3], [0, 0, 0], 1, 0.5)
    second = Example(4, [2, 31, 3, 32, 3], [0, 0, 0, 1, 1], 0, 1.0)
    batch = collate([first, second])
    expected = {
        "ids": torch.tensor([2, 30, 3, 2, 31, 3, 32, 3]),
        "positions": torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]),
        "token_type_ids": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]),
        "cu_seqlens": torch.tensor([0, 3, 8]),
        "targets": torch.tensor([1, 0]),
        "weights": torch.tensor([0.5, 1.0]),
        "row_numbers": torch.tensor([7, 4]),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(
            getattr(batch, name), tensor, rtol=0, atol=0
        )  # checks the dtypes too
    assert batch.lengths == (3, 5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (np.int64(2), torch.tensor([2, 2])),
        (np.float32(0.1), torch.tensor([0.1, 0.1])),
        (np.array([1, 0], dtype=np.float32), torch.tensor([[1.0, 0.0], [1.0, 0.0]])),
    ],
)
def test_targets_keep_their_kind(target: Any, expected: torch.Tensor) -> None:
    batch = collate([Example(row, [2, 3], [0, 0], target, 1.0) for row in range(2)])
    torch.testing.assert_close(batch.targets, expected, rtol=0, atol=0)


# ---- recut


def test_a_share_cut_again_by_hand(batch: PackedBatch) -> None:
    batch = collate(
        [
            Example(7, [2, 30, 3], [0, 0, 1], 1, 0.5),
            Example(4, [2, 3], [0, 1], 0, 1.0),
            Example(9, [5], [0], 1, 0.0),
        ]
    )
    first, second = split_batch([batch], 4)
    expected = {
        "ids": torch.tensor([2, 3, 5]),
        "positions": torch.tensor([0, 1, 0]),
        "token_type_ids": torch.tensor([0, 1, 0]),
        "cu_seqlens": torch.tensor([0, 2, 3]),
        "targets": torch.tensor([0, 1]),
        "weights": torch.tensor([1.0, 0.0]),
        "row_numbers": torch.tensor([4, 9]),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(second, name), tensor, rtol=0, atol=0)
    assert second.lengths == (2, 1) and first.lengths == (3,) and first.row_numbers.tolist() == [7]


@QUICK
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    before=st.integers(1, 60),
    after=st.integers(1, 60),
)
def test_a_share_cut_again_is_the_share_cut_so_at_once(
    lengths: list[int], before: int, after: int
) -> None:
    """To the bit: each text once, in the same micro-batches, with its target, weight, row and positions."""
    one, other = (
        next(batches(lengths, rows_per_step=99, tokens_per_micro_batch=tokens).steps(0, 1))
        for tokens in (before, after)
    )
    assert content(replace(one, micro_batches=split_batch(one.micro_batches, after))) == content(
        other
    )
    assert sorted(
        rows_of(replace(one, micro_batches=split_batch(one.micro_batches, after)))
    ) == list(range(len(lengths)))


@pytest.mark.parametrize("target", [np.float32(0.5), np.array([1, 0], dtype=np.float32)])
def test_targets_keep_their_kind_when_they_are_cut_again(target: Any) -> None:
    whole = collate(
        [Example(row, [2] * (5 - row), [0] * (5 - row), target * row, 1.0) for row in range(4)]
    )
    parts = split_batch([whole], 5)
    assert len(parts) == 3
    torch.testing.assert_close(
        torch.cat([part.targets for part in parts]), whole.targets, rtol=0, atol=0
    )


def test_the_text_of_an_idle_rank_stays_alone_and_counts_nothing() -> None:
    step = next(batches([5, 2], rank=2, ranks=4, shuffle=False).steps(0, 1))
    assert content(replace(step, micro_batches=split_batch(step.micro_batches, 1))) == content(step)


def test_a_share_that_is_not_longest_first_cannot_be_cut_again() -> None:
    with pytest.raises(AssertionError, match="not in order of length"):
        split_batch([collate(Rows([2, 5, 3])[[0, 1, 2]])], 5)


def test_one_token_of_a_batch_counts_nothing(batch: PackedBatch) -> None:
    token = single_token_batch(batch)
    assert token.ids.tolist() == batch.ids[
        :1
    ].tolist() and token.positions.tolist() == token.token_type_ids.tolist() == [0]
    assert (
        token.cu_seqlens.tolist(),
        token.lengths,
        token.weights.tolist(),
        token.row_numbers.tolist(),
    ) == (
        [0, 1],
        (1,),
        [0.0],
        [-1],
    )
    assert token.targets.tolist() == batch.targets[:1].tolist()


# ---- A batch travels


@pytest.fixture
def batch() -> PackedBatch:
    return collate(Rows(LENGTHS)[[2, 5, 1]])


@pytest.mark.parametrize("dumps", [pickle.dumps, lambda batch: bytes(ForkingPickler.dumps(batch))])
def test_a_batch_survives_its_journey(dumps: Any, batch: PackedBatch) -> None:
    found = pickle.loads(dumps(batch))
    assert content(RankStep(number=0, micro_batches=[found], rows=3)) == content(
        RankStep(number=0, micro_batches=[batch], rows=3)
    )
    found.weights.zero_()  # and it may be written to
    assert batch.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_batch_travels_as_bytes_not_as_open_files(batch: PackedBatch) -> None:
    assert b"rebuild_storage" not in bytes(ForkingPickler.dumps(batch))
    assert b"rebuild_storage" in bytes(ForkingPickler.dumps(batch.ids))  # the control


def test_a_batch_moves_whole(batch: PackedBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert {f.name for f in fields(moved) if getattr(getattr(moved, f.name), "device", None) == torch.device("meta")} == {
        "ids", "positions", "token_type_ids", "cu_seqlens", "targets", "weights", "row_numbers",
    }  # fmt: skip
    assert moved.lengths == batch.lengths
    assert batch.ids.device.type == "cpu"


# ---- steps


def test_an_epoch_by_hand() -> None:
    steps = list(
        batches([3, 2, 5, 2, 4], rows_per_step=3, tokens_per_micro_batch=7, shuffle=False).steps(
            0, 2
        )
    )
    assert [(step.number, step.rows) for step in steps] == [
        (0, 3),
        (1, 2),
    ]  # the last one is smaller, and is a step
    assert [[batch.row_numbers.tolist() for batch in step.micro_batches] for step in steps] == [
        [[2], [0, 1]],
        [[4, 3]],
    ]
    assert [batch.lengths for batch in steps[0].micro_batches] == [(5,), (3, 2)]
    assert batches([3, 2, 5, 2, 4], rows_per_step=3).steps_per_epoch == 2
    assert batches([3] * 6, rows_per_step=3).steps_per_epoch == 2
    assert batches([3], rows_per_step=3).steps_per_epoch == 1


def test_every_step_takes_its_rows_from_the_plan() -> None:
    order = [epoch_order(11, 7, 0), epoch_order(11, 7, 1)]
    expected = [
        sorted(order[epoch][start : start + 4].tolist()) for epoch in (0, 1) for start in (0, 4, 8)
    ]
    steps = list(batches().steps(0, 6))
    assert [sorted(rows_of(step)) for step in steps] == expected
    assert [step.rows for step in steps] == [4, 4, 3, 4, 4, 3]
    assert [
        sorted(rows_of(step)) for step in batches(seed=8).steps(0, 6)
    ] != expected  # the control


@QUICK
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    rows_per_step=st.integers(1, 7),
    tokens=st.integers(1, 30),
    ranks=st.integers(1, 5),
    shuffle=st.booleans(),
)
def test_each_row_once_an_epoch_on_any_ranks_and_in_any_pieces(
    lengths: list[int], rows_per_step: int, tokens: int, ranks: int, shuffle: bool
) -> None:
    alone = batches(
        lengths, rows_per_step=rows_per_step, tokens_per_micro_batch=10**9, shuffle=shuffle
    )
    total = 2 * alone.steps_per_epoch
    dealt = [
        replace(alone, tokens_per_micro_batch=tokens, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    shares = [list(each.steps(0, total)) for each in dealt]
    for number, (step, *parts) in enumerate(zip(alone.steps(0, total), *shares, strict=True)):
        found = sorted(row for part in parts for row in rows_of(part) if row >= 0)
        assert found == sorted(rows_of(step))
        assert {(part.number, part.rows) for part in parts} == {(number, len(found))}
    epochs = [
        [row for step in list(alone.steps(0, total))[half] for row in rows_of(step)]
        for half in halves(total)
    ]
    assert [sorted(rows) for rows in epochs] == [list(range(len(lengths)))] * 2


def halves(total: int) -> tuple[slice, slice]:
    return slice(0, total // 2), slice(total // 2, total)


def test_a_row_keeps_its_tokens_target_and_weight_wherever_it_is_dealt() -> None:
    for rank in range(3):
        for step in batches(rank=rank, ranks=3).steps(0, 3):
            for batch in step.micro_batches:
                for i, row in enumerate(batch.row_numbers.tolist()):
                    assert (
                        batch.ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist()
                        == [row] * LENGTHS[row]
                    )
                    assert batch.targets[i] == row % 2


@pytest.mark.parametrize("start", [0, 1, 3, 5, 8])
def test_starting_in_the_middle_is_the_tail_of_the_whole(start: int) -> None:
    whole = [content(step) for step in batches().steps(0, 9)]
    assert [content(step) for step in batches().steps(start, 9)] == whole[start:]
    assert whole[0] != whole[3]  # the control: epochs differ
    same = batches()
    list(same.steps(0, 5))
    assert [content(step) for step in same.steps(start, 9)] == whole[start:]  # it has no state


def test_workers_change_nothing() -> None:
    for rank in range(2):
        here = [content(step) for step in batches(rank=rank, ranks=2).steps(2, 9)]
        for workers in (1, 2):
            assert [
                content(step) for step in batches(rank=rank, ranks=2, workers=workers).steps(2, 9)
            ] == here


def test_no_steps_are_none() -> None:
    assert list(batches().steps(4, 4)) == []
    assert list(batches(workers=2).steps(4, 4)) == []


def test_an_idle_rank_gets_one_text_that_counts_nothing() -> None:
    shares = [
        next(batches([5, 2], rank=rank, ranks=4, shuffle=False).steps(0, 1)) for rank in range(4)
    ]
    assert [rows_of(step) for step in shares] == [[0], [1], [-1], [-1]]
    assert [step.micro_batches[0].weights.tolist() for step in shares] == [
        [1.0],
        [1.0],
        [0.0],
        [0.0],
    ]
    assert [step.rows for step in shares] == [2, 2, 2, 2]
    for step in shares[2:]:
        assert step.micro_batches[0].ids.tolist() == [1, 1]  # the shortest text of the step


def test_a_step_knows_the_lengths_of_its_real_texts() -> None:
    first, idle = (
        next(batches([5, 2, 4], rank=rank, ranks=4, shuffle=False).steps(0, 1)) for rank in (0, 3)
    )
    assert (first.lengths, idle.lengths) == ([(5,)], [])
    (whole,) = batches([5, 2, 4], shuffle=False).steps(0, 1)
    assert whole.lengths == [(5, 4), (2,)]


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({}, [[0, 1], [2, 3], [4]]),
        ({"ranks": 2}, [[0, 1, 2, 3], [4]]),  # half a step a rank
        ({"rows_per_step": 20}, [[0]]),
        ({"rows_per_step": 10}, [[0], [1]]),
        ({"workers": 0}, [[0], [1], [2], [3], [4]]),
    ],
)
def test_small_steps_share_a_message(
    given: dict[str, int], messages: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of length 3 in steps of 4, with 25 to a message."""
    found = []

    def watched(*args: Any, **settings: Any) -> Iterator[Any]:
        for message in DataLoader(*args, **settings):
            found.append([step.number for step in message])
            yield message

    monkeypatch.setattr(batching, "DataLoader", watched)
    monkeypatch.setattr(batching, "BYTES_PER_ITEM", 25)
    some = batches([3] * 20, **{"workers": 1, **given})
    steps = list(some.steps(0, some.steps_per_epoch))
    assert found == messages
    assert [content(step) for step in steps] == [
        content(step) for step in replace(some, workers=0).steps(0, some.steps_per_epoch)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_row_arrives_as_it_was_said(workers: int) -> None:
    steps = batches(dataset=Rows(LENGTHS, bad=6), shuffle=False, workers=workers).steps(0, 3)
    assert rows_of(next(steps)) == [2, 0, 1, 3]
    with pytest.raises(DataError) as caught:
        next(steps)
    assert str(caught.value) == "dev.tsv line 6: no text"
    wait_for_no_children()


def wait_for_no_children() -> None:
    until = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def test_who_stops_early_leaves_no_workers_behind() -> None:
    steps: Iterator[RankStep] = batches(workers=2).steps(0, 9)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()  # type: ignore[attr-defined]  # a generator
    wait_for_no_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generator_of_dropout_alone(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    list(batches(workers=workers).steps(0, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == before_numpy  # type: ignore[index]

    def without(*args: Any, generator: Any, **settings: Any) -> Any:
        return DataLoader(*args, **settings)

    monkeypatch.setattr(batching, "DataLoader", without)
    list(batches(workers=workers).steps(0, 3))
    assert not torch.equal(
        torch.get_rng_state(), before
    )  # the control: a loader draws where it is let


# ---- prefetch_to_device


def test_off_the_gpu_steps_pass_unchanged() -> None:
    steps = list(batches().steps(0, 3))
    assert all(
        one is other
        for one, other in zip(
            prefetch_to_device(iter(steps), torch.device("cpu")), steps, strict=True
        )
    )


def test_on_a_gpu_the_next_step_is_sent_before_this_one_is_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of events, with streams that only write down what they are told; tests/gpu has the real ones."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            return f"event {len([event for event in events if event.startswith('sent')]) - 1}"

        def wait_event(self, event: str) -> None:
            events.append(f"{self.name} waits for {event}")

    class Sent:
        def __init__(self, number: int) -> None:
            self.number = number
            self.micro_batches = [
                SimpleNamespace(
                    record_stream=lambda stream: events.append(f"{stream.name} reads {number}")
                )
            ]

        def to(self, device: torch.device) -> "Sent":
            events.append(f"sent {self.number} {on[-1]}")
            return self

    on = ["running"]

    @contextlib.contextmanager
    def stream(side: Stream) -> Iterator[None]:
        on.append(side.name)
        yield
        on.pop()

    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("copies"))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("running"))
    monkeypatch.setattr("torch.cuda.stream", stream)
    for step in prefetch_to_device(map(Sent, range(3)), torch.device("cuda")):  # type: ignore[arg-type]
        events.append(f"step {step.number} on {on[-1]}")
    assert events == [
        "sent 0 copies", "sent 1 copies", "running waits for event 0", "running reads 0", "step 0 on running",
        "sent 2 copies", "running waits for event 1", "running reads 1", "step 1 on running",
        "running waits for event 2", "running reads 2", "step 2 on running",
    ]  # fmt: skip


# --- Loaders of a configuration


def rank_of(ranks: int = 1, rank: int = 0, device: str = "cpu") -> Any:
    """What `loader_settings` reads of an Accelerator."""
    return SimpleNamespace(
        num_processes=ranks, process_index=rank, device=torch.device(device), mixed_precision="no"
    )


def test_training_batches_are_shuffled_and_others_are_in_row_order(tiny_model: Path) -> None:
    words = [
        "--model_name_or_path=m",
        "--train_file=t.tsv",
        "--validation_file=d.tsv",
        "--output_dir=o",
        "--early_stopping_patience=9",
        "--train_batch_size=5",
        "--tokens_per_micro_batch=64",
        "--dataloader_num_workers=0",
        "--seed=3",
    ]
    config, rows = read_config(words), labelled_records(["no", "yes"], [0, 1])
    task = SingleLabel(("no", "yes"))
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny_model)))
    train = create_train_loader(
        rows,
        DatasetStats(LabelStats("text", ["no", "yes"], [1, 1], None, "label"), [2]),
        tokenizer,
        task,
        config,
        rank_of(3, 2),
    )
    dev = create_eval_loader(rows, tokenizer, task, config, rank_of(3, 2))
    assert isinstance(train, MapLoader) and dev is not None
    assert (train.shuffle, train.seed, train.rows_per_step) == (True, 3, 5)
    assert (dev.shuffle, dev.rows_per_step) == (False, EVALUATION_ROWS)
    for batches in (train, dev):
        assert (batches.rank, batches.ranks, batches.tokens_per_micro_batch, batches.workers) == (
            2,
            3,
            64,
            0,
        )
        assert not batches.pin
    assert loader_settings(config.batch, rank_of(device="cuda"))["pin"]


@pytest.mark.parametrize(
    ("cores", "ranks", "asked", "workers"),
    [
        (8, 1, None, 1),
        (2, 1, None, 1),
        (1, 1, None, 0),
        (2, 2, None, 0),
        (4, 2, None, 1),
        (1, 1, 3, 3),
        (8, 1, 0, 0),
        (2, 1, 8, 8),
        (2, 1, 1000, 8),  # the rest would take memory only
    ],
)
def test_a_worker_has_a_core_of_its_own_unless_asked_for(
    cores: int, ranks: int, asked: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = BatchConfig(dataloader_num_workers=asked)
    assert loader_settings(config, rank_of(ranks))["workers"] == workers


def test_more_workers_than_cores_warn_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's warning would be an error here: setup.cfg."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    items: Any = [["a"], ["b", "c"]]
    assert list(iterate_loader(items, workers=2, pin=False)) == ["a", "b", "c"]
    with pytest.warns(UserWarning, match="This DataLoader will create 2"):  # the control
        iter(DataLoader(items, num_workers=2, multiprocessing_context="fork"))
    wait_for_no_children()
