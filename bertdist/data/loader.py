"""Examples -> steps -> this rank's micro-batches: which rows make a step, who computes them, in which pieces.

1. plan: the rows of every step, a pure function of (rows, seed, epoch), the same on all ranks. So ranks need not talk, and
   resuming is nothing but starting at a later step.
2. deal: one step's rows over the ranks by length of text, longest first, to the least loaded.
3. this rank encodes its share only, in loader workers, while the steps before it run. Small steps travel several in a message.
4. cut: the share in micro-batches of at most `tokens_per_micro_batch` tokens, longest first, so that texts of one length lie
   side by side.
5. prefetch_to_device: on a GPU, a step's batches travel to the device while the step before it runs.
None of it changes what a step learns: its gradient is a sum over its rows, and the rows are the plan's.
"""

import os
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from bertdist.core.config import BatchConfig, TrainConfig
from bertdist.core.errors import ConfigError
from bertdist.data.records import Records
from bertdist.data.sharding import DEFAULT_TOKEN_BUDGET, MapLoader
from bertdist.data.stats import DatasetStats, agreement, assign_files_to_ranks
from bertdist.data.streaming import AnyLoader, Stream, StreamLoader
from bertdist.data.tokenization import Examples, open_examples
from bertdist.tasks.tasks import Task

EVALUATION_ROWS = (
    256  # rows dealt at once in evaluation; it decides nothing but how even the ranks' loads are
)


def create_eval_loader(
    rows: Records | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> MapLoader | None:
    """The rows to score in steps for this rank, in row order; None where there are none. Raises DataError."""
    return (
        batches_of(
            open_examples(rows, tokenizer, task, config.model.max_length), config.batch, accelerator
        )
        if rows
        else None
    )


def batches_of(examples: Examples, config: BatchConfig, accelerator: Accelerator) -> MapLoader:
    """A split in steps for this rank, in row order."""
    return MapLoader(
        examples=examples, rows_per_step=EVALUATION_ROWS, **_share_of(config, accelerator)
    )


def create_train_loader(
    rows: Records | Stream,
    known: DatasetStats,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> AnyLoader:
    """The training rows in steps for this rank, in training order. Raises DataError and ConfigError."""
    size, seed, max_length = config.batch.train_batch_size, config.run.seed, config.model.max_length
    fields = _share_of(config.batch, accelerator)
    if isinstance(rows, Records):
        examples = open_examples(rows, tokenizer, task, max_length)
        weights = tuple(config.data.train_weights or ())
        return MapLoader(
            examples=examples,
            rows_per_step=size,
            shuffle=True,
            seed=seed,
            weights=weights,
            **fields,
        )
    first = open_examples(rows.head(), tokenizer, task, max_length)
    agree, steps = None, -(-sum(known.rows) // size)
    if config.data.stream_sharding == "by_file":
        rank, ranks = accelerator.process_index, accelerator.num_processes
        if size < ranks:
            raise ConfigError(
                f"--train_batch_size is {size}, and there are {ranks} processes, each of which reads files of its own "
                "(--stream_sharding by_file); expected at least one row each. --stream_sharding by_row takes any number."
            )
        sources, files = rows.sources, assign_files_to_ranks(rows, ranks)
        if len(sources) < ranks:
            raise ConfigError(
                f"{rows.name}: {len(sources)} source(s) for {ranks} processes, each of which reads its own (--stream_sharding by_file); "
                "expected at least one each, or steps lack the rows of those without. --stream_sharding by_row takes any number."
            )
        sizes = [size // ranks + (other < size % ranks) for other in range(ranks)]
        agree, size = agreement(accelerator), sizes[rank]
        if known.rows:
            steps = max(
                -(-sum(known.rows[file] for file in files[other]) // sizes[other])
                for other in range(ranks)
            )
        rows = replace(
            rows, parts=(tuple(sources[file] for file in files[rank]),), first_row=rank << 40
        )
        fields |= {"rank": 0, "ranks": 1}
    rows = replace(rows, window_rows=-(-rows.window_rows // size) * size)
    return StreamLoader(
        stream=rows,
        task=task,
        examples=first,
        rows_per_step=size,
        seed=seed,
        steps_per_epoch=steps,
        agree=agree,
        **fields,
    )


def _share_of(config: BatchConfig, accelerator: Accelerator) -> dict[str, Any]:
    workers = config.dataloader_num_workers
    if workers is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        workers = 1 if cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) >= 2 else 0
    return {
        "tokens_per_micro_batch": config.tokens_per_micro_batch
        or DEFAULT_TOKEN_BUDGET,  # until it is found
        "rank": accelerator.process_index,
        "ranks": accelerator.num_processes,
        "workers": workers,
        "pin": accelerator.device.type == "cuda",
    }
