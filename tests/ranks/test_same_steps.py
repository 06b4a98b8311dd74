"""I1: optimizer step k of epoch e uses the same rows for any world size, worker count and micro-batch size."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import Breaking, rows_by_step, run_train, words_of, write_split

from bertdist.data import loader as loader_module
from bertdist.data.sharding import epoch_order

ROWS, STEP, EPOCHS = 23, 8, 2  # steps of 8, 8 and 7 rows


@pytest.fixture(scope="module")
def rows_of_one_rank(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[int]]:
    return train_and_look(tiny_model, tmp_path_factory.mktemp("one"), 1, 0, 8192)


def train_and_look(
    model: Path, folder: Path, n: int, workers: int, tokens: int, breaking: Breaking | None = None
) -> dict[int, list[int]]:
    settings = {
        "train_batch_size": STEP,
        "num_train_epochs": EPOCHS,
        "dataloader_num_workers": workers,
        "tokens_per_micro_batch": tokens,
    }
    words = words_of(model, folder / "out", write_split(folder, ROWS), **settings)
    return rows_by_step([seen for _, seen, _ in run_ranks(n, run_train, words, breaking)])


@pytest.mark.parametrize(
    ("n", "workers", "tokens"), [(1, 2, 30), (2, 0, 8192), (2, 2, 30), (3, 0, 30), (4, 1, 8192)]
)
def test_every_step_has_the_same_rows(
    tiny_model: Path,
    tmp_path: Path,
    rows_of_one_rank: dict[int, list[int]],
    n: int,
    workers: int,
    tokens: int,
) -> None:
    assert train_and_look(tiny_model, tmp_path, n, workers, tokens) == rows_of_one_rank


def test_the_rows_are_those_of_the_plan(rows_of_one_rank: dict[int, list[int]]) -> None:
    assert [len(rows) for rows in rows_of_one_rank.values()] == [8, 8, 7] * EPOCHS
    first, second = list(rows_of_one_rank.values())[:3], list(rows_of_one_rank.values())[3:]
    assert first != second, "each epoch has its own order"
    for epoch, steps in enumerate((first, second)):
        order = epoch_order(ROWS, 42, epoch).tolist()
        assert steps == [sorted(order[at : at + STEP]) for at in range(0, ROWS, STEP)]


def test_an_order_that_depends_on_the_rank_is_seen(
    tiny_model: Path, tmp_path: Path, rows_of_one_rank: dict[int, list[int]]
) -> None:
    def order_by_rank(accelerator: Accelerator) -> None:
        loader_module.epoch_order = lambda rows, seed, epoch: epoch_order(
            rows, seed + accelerator.process_index, epoch
        )

    assert train_and_look(tiny_model, tmp_path, 2, 0, 8192, order_by_rank) != rows_of_one_rank


def test_an_epoch_without_its_last_step_is_seen(
    tiny_model: Path, tmp_path: Path, rows_of_one_rank: dict[int, list[int]]
) -> None:
    def drop_the_ragged_step(accelerator: Accelerator) -> None:
        loader_module.MapLoader.steps_per_epoch = property(
            lambda self: len(self.dataset) // self.rows_per_step
        )

    assert (
        train_and_look(tiny_model, tmp_path, 1, 0, 8192, drop_the_ragged_step) != rows_of_one_rank
    )
