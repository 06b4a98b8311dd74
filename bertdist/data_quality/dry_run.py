"""train.py --dry_run: what a run would be, told without weights, without a GPU, and without writing anything.

In: a TrainConfig. Out: on standard output the findings of `inspection` in one line each, the steps, what each rank would get, real
tokens and the padding that is saved, and an estimate of memory; and an exit code. One module, because it promises what `train` will do,
from the same functions: `plan`, `deal`, `open_examples` and the task are training's own.

The estimate of memory, in bytes (https://arxiv.org/abs/2205.05198 section 4.1, without what attention over short texts need not keep):
- weights 4, their gradient 4, AdamW 8 for each parameter, and 2 more in bf16 and fp16 for its copy in half precision;
- activations that the backward pass needs, for each token and layer: e (8 hidden + 2 intermediate) + 2 hidden, where e is 4 in float32
  and 2 in half precision (each layer's input and its copy after the norm, Q, K, V, what attention gives, and the feed-forward layer before
  and after its activation; the last term is two dropout masks). With --gradient_checkpointing each layer keeps its input, e x hidden.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from bertdist.core.config import TrainConfig
from bertdist.core.terminal import process_rank, show, show_table
from bertdist.core.types import Array
from bertdist.data.sharding import balance_by_length, epoch_order
from bertdist.data.stats import create_task, label_stats_of
from bertdist.data.tokenization import load_tokenizer, open_examples
from bertdist.data_quality.findings import counts, percent
from bertdist.data_quality.length_checks import Lengths
from bertdist.data_quality.report import DataReport, check_data
from bertdist.distributed.launch import check_world
from bertdist.models.classifier import load_model_config, pretrained_labels
from bertdist.tasks.tasks import Task

OTHER_WORLD = 8  # ranks of the second plan that is shown

STEPS_DEALT = 200  # steps of the first epoch whose balance is measured


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs."""

    parameters: int  # their number
    per_parameter: int
    per_token: int  # activations

    @property
    def fixed(self) -> int:
        """What is there whatever the texts are."""
        return self.parameters * self.per_parameter


def dry_run(config: TrainConfig) -> int:
    """Tell the plan; the exit code: 1 where there are errors in the data, else 0. Raises BertdistError where training would.

    Under a launcher rank 0 does it, and the others leave.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(world)
    if process_rank() != 0:
        return 0
    settings = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model)
    found = check_data(
        config.data,
        tokenizer=tokenizer,
        max_length=config.model.max_length,
        problem_type=config.task.problem_type,
        num_examples=1,
    )
    for finding in found.findings:
        share = f" ({percent(finding.share)})" if finding.share is not None else ""
        place = next((found.where[example.split, example.row] for example in finding.examples), "")
        unit = finding.unit.removesuffix("s") if finding.count == 1 else finding.unit
        show(
            f"{finding.severity}: {finding.split}: {finding.title}: {finding.count:,} {unit}{share}{', ' * bool(place)}{place}"
        )
    show(*found.notes)
    number = counts(found.findings)
    show(
        ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in number.items())
        + "; python -m bertdist.check says more."
    )
    task = create_task(
        config.task, label_stats_of(found.splits["train"]), pretrained_labels(settings)
    )
    for records in found.splits.values():
        open_examples(records, tokenizer, task, config.model.max_length)
    _show_plan(config, found, task, world)
    _show_memory(config, found.lengths["train"], memory_of(settings, task, config), world)
    return 1 if number["error"] else 0


def _show_plan(config: TrainConfig, found: DataReport, task: Task, world: int) -> None:
    train, lengths = found.splits["train"], found.lengths["train"]
    size, limit = config.batch.train_batch_size, config.model.max_length
    per_epoch = -(-len(train) // size)
    total = config.run.max_train_steps or max(1, math.ceil(config.run.num_train_epochs * per_epoch))
    about = "" if lengths.rows == len(train) else "about "
    show(
        f"Task: {task.problem_type}, {len(task.labels)} output{'s' * (len(task.labels) != 1)}: {', '.join(task.labels[:10])}."
    )
    show(
        f"{per_epoch:,} steps an epoch of {size} rows, {total:,} steps in all, {total * size / len(train):.4g} epochs."
    )
    a_row = lengths.kept / len(train)
    show(
        f"An epoch has {about}{lengths.kept:,} real tokens, {a_row:.1f} a row; {lengths.truncated:.1%} of the rows are truncated."
    )
    padded = padded_together(np.minimum(lengths.counted, limit), size, config.run.seed)
    show(
        f"No padding is computed: padded to {limit} {limit / a_row:.1f} times as many, to the longest of a step {padded:.2f} times."
    )
    rows = []
    for ranks in dict.fromkeys((world, OTHER_WORLD)):
        fullest, idle = balance(
            train.lengths(), np.minimum(lengths.counted, limit), size, ranks, config.run.seed
        )
        name = f"{ranks} (now)" if ranks == world else f"{ranks}"
        rows.append(
            [
                name,
                f"{size / ranks:.4g}",
                f"{size * a_row / ranks:,.0f}",
                f"{fullest:.3f}",
                f"{idle:.0%}",
            ]
        )
    show_table(
        "What a rank gets in a step",
        ["ranks", "rows", "tokens", "fullest / mean", "idle"],
        rows,
        right=range(5),
    )


def padded_together(lengths: Array, size: int, seed: int) -> float:
    """Cells / tokens if the rows of each step were padded to the longest of them. lengths: (rows,) tokens."""
    order = epoch_order(len(lengths), seed, 0)
    starts = np.arange(0, len(order), size)
    longest = np.maximum.reduceat(lengths[order], starts)
    rows = np.diff(np.append(starts, len(order)))
    return float((longest * rows).sum() / lengths.sum())


def balance(
    lengths_in_bytes: Array, lengths: Array, size: int, ranks: int, seed: int
) -> tuple[float, float]:
    """(tokens of the fullest rank / mean, share of ranks without a row), as `deal` deals the first steps of the first epoch.

    lengths: (counted rows,) tokens; where not every row was counted they stand for every k-th row.
    """
    every = -(-len(lengths_in_bytes) // len(lengths))
    in_bytes = lengths_in_bytes[::every][: len(lengths)]
    order = epoch_order(len(lengths), seed, 0)
    fullest, idle, steps = 0.0, 0, 0
    for start in range(0, min(len(order), STEPS_DEALT * size), size):
        rows = order[start : start + size]
        loads = [
            int(lengths[share].sum()) for share in balance_by_length(rows, in_bytes[rows], ranks)
        ]
        fullest, idle, steps = (
            fullest + max(loads) * ranks / sum(loads),
            idle + loads.count(0),
            steps + 1,
        )
    return fullest / steps, idle / (steps * ranks)


def memory_of(settings: PretrainedConfig, task: Task, config: TrainConfig) -> Memory:
    """The estimate of the module's head. The model is built without memory for its weights."""
    settings.num_labels = len(task.labels)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    half = config.run.mixed_precision in ("bf16", "fp16")
    layers, hidden, inner = (_size(settings, *names) for names in (_LAYERS, _HIDDEN, _INNER))
    number = 2 if half else 4
    per_layer = (
        number * hidden
        if config.model.gradient_checkpointing
        else number * (8 * hidden + 2 * inner) + 2 * hidden
    )
    return Memory(
        sum(weight.numel() for weight in model.parameters()), 18 if half else 16, layers * per_layer
    )


_LAYERS, _HIDDEN, _INNER = (
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "dim"),
    ("intermediate_size", "hidden_dim"),
)  # DistilBERT's


def _size(settings: Any, *names: str) -> int:
    return int(
        next((value for name in names if (value := getattr(settings, name, None)) is not None), 0)
    )


def _show_memory(config: TrainConfig, lengths: Lengths, memory: Memory, world: int) -> None:
    tokens = config.batch.train_batch_size * lengths.kept / lengths.of / world
    longest = min(lengths.longest, config.model.max_length)
    states, share = f"{memory.fixed / 1e9:.2f} GB", f"{tokens * memory.per_token / 1e9:.2f} GB"
    if not memory.per_token:
        show(
            f"Memory of a rank: {states} for weights, gradient and AdamW; activations unknown, the config does not name its layers."
        )
        return
    show(
        f"Memory of a rank, estimated for --mixed_precision {config.run.mixed_precision or 'no'}:",
        f"  {states}  {memory.parameters / 1e6:,.1f} million parameters x {memory.per_parameter} bytes (weights, gradient, AdamW)",
        f"  {share}  a mean share of {tokens:,.0f} tokens x {memory.per_token / 1e3:,.0f} kB of activations, if computed at once",
        f"At least {(memory.fixed + longest * memory.per_token) / 1e9:.2f} GB, in micro-batches of one text of {longest} tokens.",
    )
