"""One rank by itself: what a step is after memory ran out in it.

Several ranks: tests/ranks/test_out_of_memory.py.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked import run_ranks
from torch import Tensor, nn

from bertdist.core.config import BatchConfig
from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, RankStep
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import Example
from bertdist.distributed.collectives import all_reduce_min, host_group
from bertdist.training import micro_batches as step_module
from bertdist.training.checkpoint import TrainState
from bertdist.training.micro_batches import MicroBatcher

ONE_RANK: Any = SimpleNamespace(
    num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu")
)
LENGTHS = [6, 5, 4, 3, 2]


class Rows:
    """Examples without a tokenizer: row r is LENGTHS[r] times the id r."""

    max_length = 8
    records = SimpleNamespace(
        lengths=lambda: np.array(LENGTHS), location=lambda row: f"x.tsv line {row + 2}"
    )

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, rows: Any) -> list[Example]:
        return [
            Example(int(row), [int(row)] * LENGTHS[row], [0] * LENGTHS[row], 0, 1.0) for row in rows
        ]


class Model(nn.Module):
    """Its loss is weight x the sum of ids, times a random number a text; it has room for so many
    tokens.
    """

    def __init__(self, fits: int, texts: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fits, self.texts = fits, texts
        self.asked: list[tuple[list[int], bool]] = []

    def backward(self, batch: PackedBatch, final: bool) -> Tensor:
        self.asked.append((batch.row_numbers.tolist(), final))
        loss = (self.weight * batch.ids.sum()).float() * torch.rand(len(batch.row_numbers)).sum()
        loss.backward()  # half of the work is done when memory runs out
        if sum(batch.lengths) > self.fits and len(batch.lengths) >= self.texts:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return loss.detach()


def open_with(
    model: nn.Module, requested: int | None, state: TrainState, said: list[str], loader: Any = None
) -> MicroBatcher:
    config = BatchConfig(tokens_per_micro_batch=requested)
    return MicroBatcher(model, loader, None, state, config, ONE_RANK, said.append)  # type: ignore[arg-type]


def open_batcher(
    tokens: int, model: nn.Module, state: TrainState | None = None
) -> tuple[MicroBatcher, RankStep, list[str]]:
    said: list[str] = []
    batches: Any = MapLoader(dataset=Rows(), rows_per_step=5, tokens_per_micro_batch=tokens)  # type: ignore[arg-type]
    batcher = open_with(model, tokens, state or TrainState(), said, batches)
    (step,) = batcher.rebatch().steps(0, 1)
    return batcher, step, said


def gradient_and_loss(
    tokens: int, fits: int
) -> tuple[float, float, Model, MicroBatcher, list[str]]:
    model = Model(fits)
    batcher, step, said = open_batcher(tokens, model)
    torch.manual_seed(3)
    loss = batcher.accumulate_gradients(model, step, model.backward).item()
    assert model.weight.grad is not None
    return model.weight.grad.item(), loss, model, batcher, said


def test_a_step_with_room_is_taken_as_it_comes() -> None:
    gradient, loss, model, batcher, said = gradient_and_loss(11, 100)
    assert model.asked == [([0, 1], False), ([2, 3, 4], True)] and said == []
    assert (
        batcher.state.tokens_per_micro_batch,
        batcher.state.tokens_requested,
        batcher.state.oom_retries,
    ) == (11, 11, 0)
    assert gradient == pytest.approx(loss)  # the weight is 1


@pytest.mark.parametrize(
    ("tokens", "fits", "least"),
    [(20, 12, 10), (20, 9, 10), (20, 5, 5), (11, 10, 5), (1000, 12, 15), (20, 1, 1)],
)
def test_a_halved_step_is_the_step_that_was_cut_so_from_the_start(
    tokens: int, fits: int, least: int
) -> None:
    """Rows, gradient, loss and random numbers, to the bit."""
    gradient, loss, model, batcher, said = gradient_and_loss(tokens, fits)
    least = batcher.state.tokens_per_micro_batch
    calm = gradient_and_loss(least, 10**9)
    assert (gradient, loss) == calm[:2]
    assert model.asked[-len(calm[2].asked) :] == calm[2].asked
    assert batcher.state.oom_retries == len(said) >= 1
    assert (
        said[-1] == f"Out of memory in step 1; the step is repeated. "
        f"Micro-batch size from here on: up to {least} tokens."
    )


@pytest.mark.parametrize("forgotten", ["discard_gradients", "restore_random_state"])
def test_half_a_gradient_and_other_random_numbers_would_be_seen(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, forgotten, lambda *args: None)
    gradient, *_, batcher, _ = gradient_and_loss(20, 12)
    assert gradient != gradient_and_loss(batcher.state.tokens_per_micro_batch, 10**9)[0]


def test_the_next_step_of_the_loader_is_cut_by_the_new_size() -> None:
    """Workers are ahead and cut by the old one."""
    _, _, model, batcher, said = gradient_and_loss(20, 12)
    (step,) = MapLoader(dataset=Rows(), rows_per_step=5, tokens_per_micro_batch=20).steps(0, 1)  # type: ignore[arg-type]
    model.asked.clear()
    batcher.accumulate_gradients(model, step, model.backward)
    assert len(said) == 1 and model.asked == [([0], False), ([1, 2], False), ([3, 4], True)]


def test_a_text_that_does_not_fit_alone_is_an_error() -> None:
    model = Model(4, texts=1)
    batcher, step, _ = open_batcher(20, model)
    with pytest.raises(DataError) as caught:
        batcher.accumulate_gradients(model, step, model.backward)
    assert str(caught.value) == (
        "x.tsv line 2: a text of 6 tokens (--max_length 8) does not fit into memory, "
        "not even alone (CUDA out of memory.). "
        "Use a smaller --max_length, --gradient_checkpointing, or more memory."
    )


def test_other_errors_stay_what_they_are() -> None:
    def broken(batch: PackedBatch, final: bool) -> Tensor:
        raise RuntimeError("shapes differ")

    batcher, step, _ = open_batcher(20, Model(1))
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        batcher.accumulate_gradients(Model(1), step, broken)


@pytest.mark.parametrize(
    ("asked", "before", "tokens"),
    [
        (64, TrainState(), 64),
        (64, TrainState(tokens_per_micro_batch=512), 64),  # found before, asked for now
        (
            64,
            TrainState(tokens_per_micro_batch=32, tokens_requested=64),
            32,
        ),  # the same command goes on with what came of it
        (128, TrainState(tokens_per_micro_batch=32, tokens_requested=64), 128),
        (None, TrainState(tokens_per_micro_batch=32, tokens_requested=64), 32),
        (None, TrainState(), 0),  # to be found
    ],
)
def test_what_is_asked_for_wins_and_progress_remembers(
    asked: int | None, before: TrainState, tokens: int
) -> None:
    open_with(Model(1), asked, before, [])
    assert before.tokens_per_micro_batch == tokens


def test_what_is_found_leaves_room_for_gradients_and_averages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of 400 bytes: a gradient and AdamW's two averages; with averages in memory, the
    gradient.
    """
    model = nn.Linear(100, 1, bias=False)
    adamw = torch.optim.AdamW(model.parameters())
    needs: list[int] = []
    monkeypatch.setattr(
        step_module,
        "find_tokens",
        lambda loss, batches, device, needed: needs.append(needed) or 256,
    )
    said: list[str] = []
    for _ in range(2):
        batcher = open_with(model, None, TrainState(), said)
        model(torch.ones(1, 100)).sum().backward()
        batcher.find_token_budget(model, adamw)
        assert batcher.state.tokens_per_micro_batch == 256 and model.weight.grad is None
        model(torch.ones(1, 100)).sum().backward()
        adamw.step()
    assert needs == [1200, 400]
    assert said == []


def test_the_smallest_of_all_ranks_is_known_to_all() -> None:
    def told(accelerator: Any) -> list[int]:
        rank = accelerator.process_index
        return all_reduce_min(accelerator, [rank, 10 - rank, 2**40], host_group(accelerator))

    assert [run_ranks(n, told) for n in (1, 3)] == [[[0, 10, 2**40]], [[0, 8, 2**40]] * 3]
