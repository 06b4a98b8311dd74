"""--ddp_comm_hook bf16: ranks exchange rounded gradients. The rows stay the same, the same ranks learn the same bits, resumed or not."""

import os
from pathlib import Path

import pytest
import torch
from forked import RankError, run_ranks
from rows import assert_same_run, at_step, json_of, last_checkpoint, run_train, step_log, tensors_of
from undisturbed import Runs

from bertdist.core.errors import CheckpointError


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("hook"))


@pytest.fixture(scope="module")
def rounded(runs: Runs) -> Path:
    """Three ranks: with two, DDP's order of the buckets would not show."""
    out = runs.folder / "rounded"
    run_ranks(3, run_train, runs.words(out, ddp_comm_hook="bf16"))
    return out


def test_gradients_are_rounded_and_rows_are_the_same(runs: Runs, rounded: Path) -> None:
    exact = runs.undisturbed(3)
    losses, others = (step_log(out) for out in (rounded, exact))
    assert len(losses) == len(others)
    first, second = (tensors_of(last_checkpoint(out)) for out in (rounded, exact))
    far = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert 1e-5 < far < 3e-2, "rounded, and no further away than 15 steps of 1e-3 can be"
    lines = [json_of(out / "metrics.jsonl") for out in (rounded, exact)]
    pairs = [
        (one["loss"], two["loss"])
        for one, two in zip(*lines, strict=True)
        if one["kind"] == two["kind"] == "train"
    ]
    assert len(pairs) > 3 and torch.allclose(
        *map(torch.tensor, zip(*pairs, strict=True)), rtol=0.01
    )
    with pytest.raises(AssertionError):
        assert_same_run(rounded, exact)


def test_a_killed_run_ends_with_the_same_bits(runs: Runs, rounded: Path, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "out", ddp_comm_hook="bf16")
    with pytest.raises(RankError, match="ended with status 9"):
        run_ranks(3, run_train, words, at_step(7, lambda: os._exit(9)))
    with pytest.raises(RankError, match=rf"(?s){CheckpointError.__name__}.*ddp_comm_hook .*bf16"):
        run_ranks(1, run_train, runs.words(tmp_path / "out"))
    run_ranks(3, run_train, words)
    assert_same_run(tmp_path / "out", rounded)


def test_on_one_rank_it_does_nothing_and_says_so(runs: Runs, tmp_path: Path) -> None:
    words = runs.words(tmp_path / "out", ddp_comm_hook="bf16")
    ((_, _, said),) = run_ranks(1, run_train, words)
    assert "--ddp_comm_hook bf16 has no effect: one process exchanges no gradients." in said
    assert_same_run(tmp_path / "out", runs.undisturbed(1))
