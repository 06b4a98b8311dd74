"""`bertdist train --dry_run`: describe a run without loading weights, using a GPU or writing files.

`dry_run` shows the findings on the data, one line each, the steps, what each rank gets, real tokens
and the padding saved, and an estimate of memory. Everything is computed by training's own functions
(`epoch_order`, `balance_by_length`, `create_dataset`, the task).

The memory estimate, in bytes (https://arxiv.org/abs/2205.05198 section 4.1, without what attention
over short texts need not keep):

- per parameter: weight 4, gradient 4, AdamW 8; in bf16 and fp16 2 more for a half-precision copy;
  a frozen one (--freeze) has neither gradient nor AdamW state, and frozen layers keep no
  activations;
- activations per token and layer: e (8 hidden + 2 intermediate) + 2 hidden, where e is 4 in float32
  and 2 in half precision (each layer's input and its copy after the norm, Q, K, V, the attention
  output, and the feed-forward layer before and after its activation; the last term is two dropout
  masks). With --gradient_checkpointing each layer keeps only its input, e hidden.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from bertdist.core.config import TrainConfig, count_steps
from bertdist.core.output_files import check_run_folder
from bertdist.core.terminal import (
    byte_size,
    count_in_words,
    excerpt,
    process_rank,
    show,
    show_table,
)
from bertdist.core.types import Array
from bertdist.data.load_data import load_test
from bertdist.data.sharding import balance_by_length, epoch_order
from bertdist.data.stats import pretrained_digests
from bertdist.data.tokenization import create_dataset, load_tokenizer
from bertdist.data_quality.findings import counts, percent, summary
from bertdist.data_quality.length_checks import Lengths
from bertdist.data_quality.report import DataReport, check_data
from bertdist.distributed.launch import choose_precision, installed_trackers
from bertdist.distributed.launcher import check_launcher, check_world
from bertdist.models.classifier import check_before_loading, load_model_config, pretrained_labels
from bertdist.models.freezing import count_parameters, freeze
from bertdist.models.model_config import check_vocabulary
from bertdist.tasks.tasks import Task, create_task
from bertdist.training.checkpoint import check_named
from bertdist.training.evaluation import Scorer
from bertdist.training.optimizer import create_lr_schedule
from bertdist.training.resume_check import (
    ResumeSignature,
    check_checkpoint,
    resume_signature,
    settings_that_must_match,
)

OTHER_WORLD_SIZE = 8  # shown beside the current one
BALANCED_STEPS = 200  # of the first epoch, to measure the load balance


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a rank needs."""

    num_parameters: int  # that are trained
    bytes_per_parameter: int
    num_frozen: int
    bytes_per_token: int  # activations; 0 if unknown

    @property
    def fixed_bytes(self) -> int:
        """Weights, gradient and optimizer state."""
        return self.num_parameters * self.bytes_per_parameter + self.frozen_bytes

    @property
    def frozen_bytes(self) -> int:
        """Of frozen weights."""
        return self.num_frozen * (self.bytes_per_parameter - 12)


def dry_run(config: TrainConfig) -> int:
    """Describe the run. Returns the exit code: 1 if there are errors in the data, else 0.

    Under a launcher only rank 0 does anything. Raises BertdistError where training would before it
    loads weights; --mixed_precision fp16 may be planned without a GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_launcher(config.run.mixed_precision)
    check_world(world_size)
    if process_rank() != 0:
        return 0
    run = config.run
    on_cpu = run.use_cpu or not torch.cuda.is_available()
    precision, note = choose_precision(run, torch.device("cpu" if on_cpu else "cuda"))
    if run.mixed_precision == "auto":
        config = replace(config, run=replace(run, mixed_precision=precision))
        show(note)
    installed_trackers(run.report_to or [])
    check_run_folder(Path(run.output_dir))
    if config.run.resume_from_checkpoint is not None:
        check_named(Path(config.run.resume_from_checkpoint))
    settings = load_model_config(config.model)
    check_before_loading(config.model, settings)
    tokenizer = load_tokenizer(config.model)
    show(*check_vocabulary(settings, tokenizer, config.model.model_name_or_path))
    digests = pretrained_digests(settings, tokenizer)
    report = check_data(
        config.data,
        tokenizer=tokenizer,
        max_length=config.model.max_length,
        task=config.task,
        num_examples=1,
        seed=config.run.seed,
    )
    for finding in report.findings:
        share = f" ({percent(finding.share)})" if finding.share is not None else ""
        line = f"{finding.severity}: {finding.split}: {finding.title}: {finding.quantity}{share}"
        show(", ".join([line, *(example.where for example in finding.examples[:1])]))
    show(*report.notes)
    show(f"{summary(report.findings)}; details: bertdist check.")
    train = report.splits["train"]
    task = create_task(config.task, train.label_stats(), pretrained_labels(settings))
    test = None if "test" in report.splits else load_test(config.data, config.task, train)
    scored = [*report.splits.values(), *filter(None, [test])]
    for records in scored:
        create_dataset(records, tokenizer, task, config.model.max_length)
    if len(scored) > 1:
        Scorer(config.task, task, config.data.task_name)
    _show_steps(config, report, task)
    _show_ranks(config, report, world_size)
    memory = estimate_memory(settings, task, config)
    _show_memory(config, report.lengths["train"], memory, world_size)
    started = replace(config, run=replace(run, mixed_precision=precision))
    show(*check_checkpoint(started, _signature(started, report, task, digests)))
    return 1 if counts(report.findings)["error"] else 0


def _signature(
    config: TrainConfig, report: DataReport, task: Task, digests: dict[str, str]
) -> ResumeSignature:
    """That of a start; of a stream only the settings."""
    if config.data.streaming:
        return ResumeSignature(settings_that_must_match(config))
    train = report.splits["train"]
    total = count_steps(config.run, -(-len(train) // config.batch.train_batch_size))
    return resume_signature(config, train, report.splits.get("validation"), task, total, digests)


def _show_steps(config: TrainConfig, report: DataReport, task: Task) -> None:
    num_rows, lengths = len(report.splits["train"]), report.lengths["train"]
    batch_size, max_length = config.batch.train_batch_size, config.model.max_length
    per_epoch = -(-num_rows // batch_size)
    total = count_steps(config.run, per_epoch)
    create_lr_schedule(config.optim, total)
    per_row = lengths.kept / num_rows
    batched = padding_ratio(np.minimum(lengths.counted, max_length), batch_size, config.run.seed)
    shown = ", ".join(excerpt(name, 40) for name in task.labels[:10])
    shown += ", ..." * (len(task.labels) > 10)
    epochs = total / per_epoch
    outputs = f"{len(task.labels)} output{'s' * (len(task.labels) != 1)}"
    about = "" if lengths.rows == num_rows else "about "
    show(
        f"Task: {task.problem_type}, {outputs}: {shown}{'.' * (len(task.labels) <= 10)}",
        *filter(None, [task.reason]),
        f"{per_epoch:,} steps per epoch of {batch_size} rows, {total:,} steps in total "
        f"({epochs:.3g} epoch{'s' * (epochs != 1)}).",
        f"An epoch has {about}{lengths.kept:,} real tokens, {per_row:.1f} per row; "
        f"{lengths.truncated:.1%} of the rows are truncated.",
        f"Padding saved: padding to {max_length} would compute {max_length / per_row:.1f} times as "
        f"many tokens, padding to the longest row of each step {batched:.2f} times.",
    )


def _show_ranks(config: TrainConfig, report: DataReport, world_size: int) -> None:
    lengths, num_bytes = report.lengths["train"], report.splits["train"].lengths()
    batch_size, seed = config.batch.train_batch_size, config.run.seed
    kept = np.minimum(lengths.counted, config.model.max_length)
    tokens = batch_size * lengths.kept / len(num_bytes)  # per step
    rows = []
    for ranks in dict.fromkeys((world_size, OTHER_WORLD_SIZE)):
        imbalance, idle = load_balance(num_bytes, kept, batch_size, ranks, seed)
        name = f"{ranks} (now)" if ranks == world_size else f"{ranks}"
        per_rank = f"{batch_size / ranks:.4g}", f"{tokens / ranks:,.0f}"
        rows.append([name, *per_rank, f"{imbalance:.3f}", f"{idle:.0%}"])
    header = ["ranks", "rows", "tokens", "load max/mean", "idle"]
    show_table("Per rank and step", header, rows, right=range(5))


def padding_ratio(lengths: Array, batch_size: int, seed: int) -> float:
    """Computed / real tokens if each step's rows were padded to the longest. lengths: (rows,)."""
    order = epoch_order(len(lengths), seed, 0)
    starts = np.arange(0, len(order), batch_size)
    longest = np.maximum.reduceat(lengths[order], starts)
    rows = np.diff(np.append(starts, len(order)))
    return float((longest * rows).sum() / lengths.sum())


def load_balance(
    num_bytes: Array, lengths: Array, batch_size: int, ranks: int, seed: int
) -> tuple[float, float]:
    """(tokens of the fullest rank / mean, share of ranks without a row), over the first steps.

    num_bytes: (rows,). lengths: (counted rows,) tokens; if not all rows were counted, of every
    k-th row.
    """
    every = -(-len(num_bytes) // len(lengths))
    num_bytes = num_bytes[::every][: len(lengths)]
    order = epoch_order(len(lengths), seed, 0)
    starts = range(0, min(len(order), BALANCED_STEPS * batch_size), batch_size)
    imbalance, idle = 0.0, 0
    for start in starts:
        rows = order[start : start + batch_size]
        shares = balance_by_length(rows, num_bytes[rows], ranks)
        loads = [int(lengths[share].sum()) for share in shares]
        imbalance += max(loads) * ranks / sum(loads)
        idle += loads.count(0)
    return imbalance / len(starts), idle / (len(starts) * ranks)


def estimate_memory(settings: PretrainedConfig, task: Task, config: TrainConfig) -> MemoryEstimate:
    """The estimate described at the top. The model is built without memory for its weights."""
    settings.num_labels = len(task.labels)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    half = config.run.mixed_precision in ("bf16", "fp16")
    number = 2 if half else 4
    layers = _setting(settings, "num_hidden_layers", "n_layers")  # the second name is DistilBERT's
    hidden = _setting(settings, "hidden_size", "dim")
    inner = _setting(settings, "intermediate_size", "hidden_dim")
    per_layer = number * (8 * hidden + 2 * inner) + 2 * hidden
    if config.model.gradient_checkpointing:
        per_layer = number * hidden
    if config.model.frozen_layers is not None:
        # of the frozen ones one at a time, while it is computed
        layers = min(layers, max(1, layers - config.model.frozen_layers))
        freeze(model, config.model.frozen_layers)
    frozen, trained = count_parameters(model)
    return MemoryEstimate(trained, 18 if half else 16, frozen, layers * per_layer)


def _setting(settings: Any, *names: str) -> int:
    """The first of some settings that a model config has, else 0."""
    values = (getattr(settings, name, None) for name in names)
    return int(next((value for value in values if value is not None), 0))


def _show_memory(
    config: TrainConfig, lengths: Lengths, memory: MemoryEstimate, world_size: int
) -> None:
    fixed = byte_size(memory.fixed_bytes)
    if not memory.bytes_per_token:
        show(
            f"Memory per rank: {fixed} for weights, gradient and AdamW; activations unknown, the "
            "model's config does not name its layers."
        )
        return
    per_token = memory.bytes_per_token
    tokens = config.batch.train_batch_size * lengths.kept / lengths.of / world_size
    longest = min(lengths.longest, config.model.max_length)
    minimum = memory.fixed_bytes + longest * per_token
    frozen = [
        f"  of these {byte_size(memory.frozen_bytes)}  {count_in_words(memory.num_frozen)} frozen "
        f"parameters x {memory.bytes_per_parameter - 12} bytes (weights)"
    ] * bool(memory.num_frozen)
    trained = "trained parameters" if memory.num_frozen else "parameters"
    show(
        f"Memory per rank, estimated for --mixed_precision {config.run.mixed_precision or 'no'}:",
        f"  {fixed}  {count_in_words(memory.num_parameters)} {trained} x "
        f"{memory.bytes_per_parameter} bytes (weights, gradient, AdamW)",
        *frozen,
        f"  {byte_size(tokens * per_token)}  {tokens:,.0f} tokens (mean per rank and step) x "
        f"{byte_size(per_token)} of activations, if computed at once",
        f"At least {byte_size(minimum)}, with micro-batches of one text of {longest} tokens.",
    )
