"""What a run is made of before its first step: ranks, task, batches, and what it says of itself.

Small functions that `train` calls once, in their order there; nothing here is called again while a run goes on.
"""

import ctypes
import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.arrival import meet
from bertdist.batch import Step
from bertdist.batching import PLENTY, Batches
from bertdist.config import BatchConfig, RunConfig, TaskConfig, TrainConfig
from bertdist.console import RunLog
from bertdist.encoding import Examples, open_examples
from bertdist.errors import ConfigError, did_you_mean
from bertdist.known import Known, Labels, agreement, files_of_ranks
from bertdist.pieces import BadRows, read_bad_rows
from bertdist.ranks import together
from bertdist.records import Records
from bertdist.same_run import ACCEPTED, Settings
from bertdist.sources import open_source, open_stream
from bertdist.stream import Stream
from bertdist.stream_batches import AnyBatches, StreamBatches
from bertdist.tasks import Task, open_task
from bertdist.watchdog import Watchdog

EVALUATION_ROWS = (
    256  # rows dealt at once in evaluation; it decides nothing but how even the ranks' loads are
)


def open_accelerator(run: RunConfig) -> Accelerator:
    """Device, precision and ranks are what `accelerate launch` said; without a GPU, or with --use_cpu, the CPU."""
    keep_freed_memory()
    trackers = run.report_to or []
    known = [str(tracker) for tracker in get_available_trackers()]
    for name in trackers:
        if name not in known:
            raise ConfigError(
                f"--report_to {name}: not a tracker that is installed here.{did_you_mean(name, known)}"
            )
    limit = timedelta(seconds=run.rank_timeout)
    meeting = meet(limit)
    try:
        accelerator = Accelerator(
            cpu=run.use_cpu or not torch.accelerator.is_available(),
            mixed_precision=run.mixed_precision,
            log_with=trackers or None,
            project_dir=run.output_dir or None,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=limit),
            ],
        )
    except ValueError as error:
        raise ConfigError(
            f"{str(error).splitlines()[0]} (--mixed_precision {run.mixed_precision})"
        ) from None
    del meeting
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerate was told gradient_accumulation_steps {accelerator.gradient_accumulation_steps}; leave it at 1: "
            "--train_batch_size is the whole step, and --tokens_per_micro_batch cuts it."
        )
    if (
        accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate 1.15 would compute in float32
        raise ConfigError(
            "--mixed_precision fp16 needs a GPU, and this run is on the CPU; take bf16 or no."
        )
    if trackers:
        accelerator.init_trackers("bertdist")
    return accelerator


def open_log(folder: Path, accelerator: Accelerator) -> RunLog:
    """The run's voice; a line that cannot be written ends all ranks."""
    return RunLog(
        folder, accelerator.is_main_process, accelerator.log, partial(together, accelerator)
    )


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step, where it can (glibc).

    By default it hands large blocks back to the system and takes them again, page by page zeroed: 12,000 page faults in a step of
    MiniLM-L6 on a CPU, 6% of its time.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def open_rows(config: TrainConfig) -> tuple[Records | Stream, Records | None]:
    """The rows to learn from and those to score, if any. Raises DataError."""
    rows = (
        open_stream(config.data, config.run.seed)
        if config.data.streaming
        else open_source(config.data, "train")
    )
    return rows, open_source(config.data, "validation")


def rows_left_out(
    known: Known, dev_rows: Records | None, config: TrainConfig, accelerator: Accelerator
) -> BadRows:
    """The rows that were left out, by an earlier start too; rank 0 writes them down. Raises DataError where they are too many."""
    path = Path(config.run.output_dir) / "bad_rows.jsonl"
    found = BadRows(
        config.data.on_bad_row,
        config.data.max_bad_rows,
        path if accelerator.is_main_process else None,
    )
    if config.data.on_bad_row == "skip":
        found.add(read_bad_rows(path))
    found.take([*known.bad, *(dev_rows.bad if dev_rows else ())])
    return found


def open_watchdog(log: RunLog, accelerator: Accelerator, run: RunConfig) -> Watchdog:
    """Made before the ranks meet here: rank 0 clears away the beats of an earlier run, and only then anyone writes."""
    with together(accelerator):
        return Watchdog(log, accelerator, run.rank_timeout)


def note_bad_rows(found: BadRows, step: Step, accelerator: Accelerator) -> None:
    """Rows that a stream left out on the way to a step; all ranks know them, rank 0 writes. Raises DataError on all ranks."""
    if step.bad:
        with together(accelerator):
            found.take(step.bad)


def task_of_rows(config: TaskConfig, labels: Labels, model_labels: tuple[str, ...] | None) -> Task:
    """The task that the labels of the training rows make."""
    return open_task(
        config,
        labels.kind,
        labels.values,
        np.array(labels.counts),
        labels.class_names,
        labels.column,
        model_labels,
    )


def validation_batches(
    rows: Records | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Batches | None:
    """The rows to score in steps for this rank, in row order; None where there are none. Raises DataError."""
    return (
        batches_of(
            open_examples(rows, tokenizer, task, config.model.max_length), config.batch, accelerator
        )
        if rows
        else None
    )


def batches_of(examples: Examples, config: BatchConfig, accelerator: Accelerator) -> Batches:
    """A split in steps for this rank, in row order."""
    return Batches(
        examples=examples, rows_per_step=EVALUATION_ROWS, **_share_of(config, accelerator)
    )


def training_batches(
    rows: Records | Stream,
    known: Known,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainConfig,
    accelerator: Accelerator,
) -> AnyBatches:
    """The training rows in steps for this rank, in training order. Raises DataError and ConfigError."""
    size, seed, max_length = config.batch.train_batch_size, config.run.seed, config.model.max_length
    fields = _share_of(config.batch, accelerator)
    if isinstance(rows, Records):
        examples = open_examples(rows, tokenizer, task, max_length)
        weights = tuple(config.data.train_weights or ())
        return Batches(
            examples=examples,
            rows_per_step=size,
            shuffle=True,
            seed=seed,
            weights=weights,
            **fields,
        )
    first = open_examples(rows.head(), tokenizer, task, max_length)
    agree, steps = None, -(-sum(known.rows) // size)
    if config.data.stream_split == "files":
        rank, ranks = accelerator.process_index, accelerator.num_processes
        if size < ranks:
            raise ConfigError(
                f"--train_batch_size is {size}, and there are {ranks} processes, each of which reads files of its own "
                "(--stream_split files); expected at least one row each. --stream_split rows takes any number."
            )
        sources, files = rows.sources, files_of_ranks(rows, ranks)
        if len(sources) < ranks:
            raise ConfigError(
                f"{rows.name}: {len(sources)} source(s) for {ranks} processes, each of which reads its own (--stream_split files); "
                "expected at least one each, or steps lack the rows of those without. --stream_split rows takes any number."
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
    return StreamBatches(
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
        "tokens_per_micro_batch": config.tokens_per_micro_batch or PLENTY,  # until it is found
        "rank": accelerator.process_index,
        "ranks": accelerator.num_processes,
        "workers": workers,
        "pin": accelerator.device.type == "cuda",
    }


def told_of_data(
    rows: Records | Stream,
    known: Known,
    dev_rows: Records | None,
    task: Task,
    per_epoch: int,
    total_steps: int,
) -> list[str]:
    """What a person should see before any time is spent."""
    pair = f" and {rows.pair_column!r}" if rows.pair_column else ""
    names = ", ".join(task.labels[:10]) + (
        f", ... ({len(task.labels)} in all)" if len(task.labels) > 10 else ""
    )
    dev = (
        f"{len(dev_rows):,} of {dev_rows.name}"
        if dev_rows
        else "none: the last weights count as the best"
    )
    many = f"{sum(known.rows):,} of" if known.rows else "as many as there are in"
    stream = ", read as they are needed" if isinstance(rows, Stream) else ""
    return [
        *(f"{told}." for told in (*rows.guessed, *(dev_rows.guessed if dev_rows else ()))),
        f"Training rows: {many} {rows.name}{stream}, text in {rows.text_column!r}{pair}; validation rows: {dev}.",
        f"Task: {task.problem_type}; outputs in order: {names}.",
        f"{total_steps:,} steps{f', {per_epoch:,} an epoch' if per_epoch else ''}.",
    ]


def notes_of(config: TrainConfig, rows: Records | Stream) -> dict[str, Any]:
    """What `Predictor` wants to know of the training."""
    return {
        "max_length": config.model.max_length,
        "text_column": rows.text_column,
        "text_pair_column": rows.pair_column,
    }


def identity_of(
    config: TrainConfig, rows: Records | Stream, task: Task, total_steps: int
) -> dict[str, Any]:
    """All that decides what a run learns, and nothing else: devices, micro-batches, workers and cadences are not in it."""
    settled = {**asdict(config.optim), **asdict(config.task)}
    for name in ("metrics", "metric_for_best_model", "label_names", "class_weights"):
        settled.pop(name)
    return {
        **settled,
        "labels": list(task.labels),
        "class_weights": config.task.class_weights,
        "max_length": config.model.max_length,
        "dropout": config.model.dropout,
        "tokenizer_name": config.model.tokenizer_name,
        "mixed_precision": config.run.mixed_precision,
        "train_batch_size": config.batch.train_batch_size,
        "seed": config.run.seed,
        "total_steps": total_steps,
        "training_rows": f"{len(rows)} rows, {rows.fingerprint}"
        if isinstance(rows, Records)
        else f"a stream, {rows.fingerprint}",
        "train_weights": config.data.train_weights,
        **(
            {name: getattr(config.data, name) for name in ("stream_window", "stream_split")}
            if isinstance(rows, Stream)
            else {}
        ),
    }


PACKAGES = (
    "bertdist",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "safetensors",
)


def facts_of_launch(config: TrainConfig) -> dict[str, object]:
    """What must be the same on all ranks before they do anything together: settings and versions."""
    settings = {
        f"--{name}": value for section in asdict(config).values() for name, value in section.items()
    }
    return {
        **settings,
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def facts_of_data(
    settings: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Records | Stream,
    dev_rows: Records | None,
) -> dict[str, object]:
    """What must be the same on all ranks before the model is built: rows (as digests), tokenizer, model config."""
    vocabulary = hashlib.sha256(
        json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    ).hexdigest()
    return {
        f"{train_rows.name} (digest of the rows)": train_rows.fingerprint,
        **({f"{dev_rows.name} (digest of the rows)": dev_rows.fingerprint} if dev_rows else {}),
        "the tokenizer (digest of its vocabulary)": vocabulary,
        "the model's config": hashlib.sha256(settings.to_json_string().encode()).hexdigest(),
    }


def settings_of(
    config: TrainConfig,
    rows: Records | Stream,
    dev_rows: Records | None,
    task: Task,
    total_steps: int,
) -> Settings:
    """What a checkpoint must agree with, and what else it remembers."""
    besides = {name: getattr(config.run, name) for name in ACCEPTED if hasattr(config.run, name)}
    besides |= {
        "metric_for_best_model": config.task.metric_for_best_model
        or next(iter(config.task.metrics or []), None),
        "validation_rows": f"{len(dev_rows)} rows, {dev_rows.fingerprint}" if dev_rows else None,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    return Settings(
        identity_of(config, rows, task, total_steps), besides, config.run.accept_changed_data
    )


def environment(accelerator: Accelerator) -> str:
    """What a run was made with, as JSON."""
    cuda = accelerator.device.type == "cuda"
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(accelerator.device)
        if cuda
        else accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "command": sys.argv,
    }
    return json.dumps(found, indent=1) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
