"""Prediction packs the same micro-batches on any number of ranks, so that the bits are the same."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from bertdist.data import sharding
from bertdist.data.in_memory import records_from_texts
from bertdist.data.loader import MapLoader
from bertdist.data.sharding import length_blocks
from bertdist.data.tokenization import create_dataset


def packed(model: Path, ranks: int, window: int, tokens: int) -> list[tuple[int, ...]]:
    """The rows of all micro-batches of all ranks, sorted."""
    rng = np.random.default_rng(3)
    texts = ["film " * int(length) for length in rng.integers(0, 40, 50)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = create_dataset(records_from_texts(texts), tokenizer, None, 64)
    found = []
    for rank in range(ranks):
        loader = MapLoader(
            dataset=dataset,
            rows_per_step=16 * ranks,
            tokens_per_micro_batch=tokens,
            rank=rank,
            ranks=ranks,
            window=window,
        )
        for step in loader.steps(0, loader.steps_per_epoch):
            found += [
                tuple(x.row_numbers.tolist()) for x in step.micro_batches if x.row_numbers[0] >= 0
            ]
    return sorted(found)


@pytest.mark.parametrize("tokens", [30, 10_000])
def test_the_same_micro_batches_on_any_number_of_ranks(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(sharding, "BLOCK_TOKENS", 100)
    one = packed(tiny_model, 1, 16, tokens)
    assert sorted(row for batch in one for row in batch) == list(range(50))
    assert len(one) > 8 and any(len(batch) > 1 for batch in one)
    for ranks in (2, 3, 7):
        assert packed(tiny_model, ranks, 16, tokens) == one
    assert packed(tiny_model, 2, 0, tokens) != one, "the control: rows dealt one by one"


def test_blocks_hold_all_rows_longest_first_and_about_as_many_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharding, "BLOCK_TOKENS", 100)
    lengths = np.random.default_rng(0).integers(0, 400, 200)
    blocks = length_blocks(np.arange(200) + 7, lengths, 64)
    rows = np.concatenate(blocks)
    assert sorted(rows) == list(range(7, 207)) and (np.diff(lengths[rows - 7]) <= 0).all()
    tokens = [np.minimum(lengths[block - 7] // 4 + 2, 64).sum() for block in blocks]
    assert max(tokens) <= 100 + 64 and len(blocks) > 10
    assert [block.tolist() for block in length_blocks(np.array([5]), np.array([0]), 64)] == [[5]]
