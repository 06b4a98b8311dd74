"""Training and evaluation loaders: records -> this rank's micro-batches of every optimizer step.

    loader = create_train_loader(rows, stats, tokenizer, task, config, accelerator)
    for step in loader.steps(start, stop, reader_state):
        step.micro_batches

For rows in memory this is a `MapLoader`, for a stream (--streaming) a `streaming.StreamLoader`.
How rows become steps: data/sharding.py.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from bertdist.core.config import BatchConfig, TrainConfig
from bertdist.core.cores import usable_cores
from bertdist.core.errors import BertdistError
from bertdist.core.terminal import print_to_stderr
from bertdist.core.types import Array
from bertdist.data.batch import RankStep
from bertdist.data.records import Records
from bertdist.data.sharding import (
    RankShard,
    WorkerItem,
    epoch_order,
    iterate_loader,
    mixed_epoch_order,
    steps_per_item,
)
from bertdist.data.source import ReaderState
from bertdist.data.stats import DatasetStats
from bertdist.data.tokenization import TokenizedDataset, create_dataset
from bertdist.tasks.tasks import Task

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream, StreamLoader

Loader: TypeAlias = "MapLoader | StreamLoader"

WORKERS_PER_CORE = 4  # at most: more only take memory
# Tokens of a micro-batch that keep any CPU busy; more would only take memory.
DEFAULT_TOKEN_BUDGET = 8_192

# Rows per step of an evaluation; affects nothing but how balanced the ranks' loads are.
EVALUATION_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class MapLoader:
    """One rank's part of the steps of a split. Stateless: `steps(k, ...)` begins at step k.

    shuffle: training, in the order of `epoch_order`, epoch after epoch; else one pass in row order.
    """

    dataset: TokenizedDataset
    rows_per_step: int
    tokens_per_micro_batch: int
    rank: int = 0
    ranks: int = 1
    shuffle: bool = False
    seed: int = 0
    workers: int = 0  # processes that tokenize ahead; 0: this process does
    pin: bool = False  # page-locked memory, for asynchronous copies to a GPU
    source_weights: tuple[float, ...] = ()  # of each --train_file; none: every row once per epoch
    window: int = 0  # of prediction, see RankShard

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer rows; it is a step like any other."""
        return -(-len(self.dataset) // self.rows_per_step)

    def steps(
        self, start: int, stop: int, reader_state: ReaderState | None = None
    ) -> Iterator[RankStep]:
        """This rank's part of steps start, ..., stop - 1 of the run.

        reader_state: unused, see StreamLoader.
        """
        step_dataset = _MapStepDataset(self, stop)
        sampler = range(start, stop, step_dataset.steps_per_item)
        return iterate_loader(step_dataset, self.workers, self.pin, sampler)

    def order(self, epoch: int) -> Array:
        """(rows,) int64: the rows of an epoch in their order."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        if self.source_weights:
            sizes = self.dataset.records.rows_per_file
            return mixed_epoch_order(sizes, self.source_weights, self.seed, epoch)
        return epoch_order(len(self.dataset), self.seed, epoch)

    def locations(self, rows: Sequence[int], window_state: ReaderState | None) -> list[str]:
        """The file and line of each row. window_state: unused, see StreamLoader."""
        return [str(self.dataset.records.location(row)) for row in rows]


class _MapStepDataset(Dataset[WorkerItem]):
    """Step number -> this rank's part of this step and of some after it."""

    def __init__(self, loader: MapLoader, stop: int) -> None:
        self.loader, self.stop = loader, stop
        lengths = loader.dataset.records.lengths()
        self.steps_per_item = 1
        if loader.workers:
            self.steps_per_item = steps_per_item(lengths, loader.rows_per_step, loader.ranks)
        self.shard = RankShard(
            loader.dataset,
            loader.tokens_per_micro_batch,
            loader.rank,
            loader.ranks,
            lengths,
            loader.window,
        )
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def __getitem__(self, first: int) -> WorkerItem:
        last = min(first + self.steps_per_item, self.stop)
        return [self._step(number) for number in range(first, last)]

    def _step(self, number: int) -> RankStep | BertdistError:
        size = self.loader.rows_per_step
        epoch, step = divmod(number, self.loader.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.loader.order(epoch)
        return self.shard.step(self.order[step * size : (step + 1) * size], number)


def create_train_loader(
    rows: "Records | Stream",
    stats: DatasetStats,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Loader:
    """This rank's loader of the training rows.

    rows: `Splits.train` of `load_splits`; stats: of the same rows, by `collect_stats`. tokenizer:
    of the model. task: of `create_task`. config: its batch, model, data and run sections are read.
    accelerator: gives the rank and the number of ranks.

    Returns a MapLoader, or a StreamLoader for a stream. `loader.steps(start, stop)` yields one
    RankStep per optimizer step: `micro_batches`, PackedBatches with input_ids (1, T), and `rows`,
    the rows of the step on all ranks.

    Raises DataError for rows that cannot be encoded as the task needs, ConfigError where a stream
    has too few files or rows for the ranks.
    """
    settings = loader_settings(config.batch, accelerator)
    asked, workers = config.batch.dataloader_num_workers, settings["workers"]
    if asked and asked > workers and accelerator.is_main_process:
        print_to_stderr(
            f"--dataloader_num_workers {asked}: using {workers}, {WORKERS_PER_CORE} for each of "
            f"the {usable_cores()} cores."
        )
    if not isinstance(rows, Records):
        from bertdist.data.streaming import create_stream_loader

        counts = stats.num_rows_per_source
        if stats.numbers_only:
            rows = replace(rows, rules=rows.rules._replace(numbers_only=True))
        return create_stream_loader(rows, counts, tokenizer, task, config, settings, accelerator)
    return MapLoader(
        dataset=create_dataset(rows, tokenizer, task, config.model.max_length),
        rows_per_step=config.batch.train_batch_size,
        shuffle=True,
        seed=config.run.seed,
        source_weights=tuple(config.data.train_weights or ()),
        **settings,
    )


def create_eval_loader(
    rows: Records | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> MapLoader | None:
    """This rank's loader of validation or test rows, for `Evaluator`: one pass, in row order.

    rows: `Splits.validation` or `Splits.test` of `load_splits`; the rest as for
    `create_train_loader`. Returns None without rows. Raises DataError, with file and line, for a
    label that is not one of the task's.
    """
    if not rows:
        return None
    dataset = create_dataset(rows, tokenizer, task, config.model.max_length)
    settings = loader_settings(config.batch, accelerator)
    return MapLoader(dataset=dataset, rows_per_step=EVALUATION_ROWS, **settings)


def loader_settings(config: BatchConfig, accelerator: Accelerator) -> dict[str, Any]:
    """The fields of a loader that follow from the launch, and a first tokens_per_micro_batch."""
    workers, cores = config.dataloader_num_workers, usable_cores()
    if workers is None:
        workers = 1 if cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) >= 2 else 0
    return {
        "tokens_per_micro_batch": config.tokens_per_micro_batch or DEFAULT_TOKEN_BUDGET,
        "rank": accelerator.process_index,
        "ranks": accelerator.num_processes,
        "workers": min(workers, WORKERS_PER_CORE * cores),
        "pin": accelerator.device.type == "cuda",
    }
