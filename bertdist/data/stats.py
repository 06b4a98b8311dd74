"""Statistics of the training rows, needed before the first step: labels and number of rows.

Rows in memory are counted. A stream is read once (data/stream_scan.py), unless flags make this
unnecessary.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.core.config import TaskConfig, TrainConfig
from bertdist.data.bad_rows import BadRow
from bertdist.data.columns import LabelKind, LabelValue
from bertdist.data.records import Records
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.preemption import StopSignal
from bertdist.tasks.labels import REGRESSION, has_fractions, is_multi_hot, is_number
from bertdist.tasks.tasks import Task, infer_task

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream


class LabelStats(NamedTuple):
    """The labels of a training split, which define its task."""

    kind: LabelKind
    values: list[LabelValue]  # distinct
    counts: list[int]  # rows of each
    class_names: tuple[str, ...] | None  # label names that the source defines, in its order
    column: str
    first: Callable[[LabelValue], str] = repr  # file and line of a label's first row
    limit: int | None = None  # --max_train_samples, where it left rows out


class DatasetStats(NamedTuple):
    """Statistics of the training rows."""

    labels: LabelStats
    rows: list[int]  # number of rows of each source; empty: not counted
    bad_rows: Sequence[BadRow] = ()


def label_stats_of(rows: Records) -> LabelStats:
    """The labels of rows in memory."""
    assert rows.label_codes is not None and rows.label_kind is not None
    counts = np.bincount(rows.label_codes, minlength=len(rows.label_values)).tolist()
    # Without the labels of rows that --max_train_samples leaves out.
    used = {value: n for value, n in zip(rows.label_values, counts, strict=True) if n}
    return LabelStats(
        rows.label_kind,
        list(used),
        list(used.values()),
        rows.class_names,
        rows.label_column or "labels",
        rows.locate_label,
        rows.limit,
    )


def collect_stats(
    rows: "Records | Stream",
    config: TrainConfig,
    accelerator: Accelerator,
    say: Callable[[str], None],
    stop: StopSignal | None = None,
) -> DatasetStats | None:
    """A collective: of a stream, each rank reads some files. Raises DataError.

    Returns None if `stop` was requested meanwhile.
    """
    if isinstance(rows, Records):
        return DatasetStats(label_stats_of(rows), [len(rows)], rows.bad_rows)
    with raise_on_all_ranks(accelerator):
        head = rows.head()
    labels = label_stats_of(head)
    if reasons := _reasons_to_scan(config, labels):
        from bertdist.data.stream_scan import scan_stream

        say(f"Reading {rows.name} once, for {', '.join(reasons)}.")
        path = Path(config.run.output_dir) / "survey.json"
        scan = scan_stream(rows, accelerator, path, stop)
        if scan is None:
            return None
        assert scan.kind is not None
        values, counts = list(scan.labels), list(scan.labels.values())
        labels = labels._replace(
            kind=scan.kind,
            values=values,
            counts=counts,
            first=lambda label: scan.first.get(label, rows.name),
            limit=rows.limit,
        )
        return DatasetStats(labels, [scan.rows[source] for source in sorted(scan.rows)], scan.bad)
    names = config.task.label_names or labels.class_names
    values = labels.values
    if names and not is_multi_hot(values, len(names)):
        values = [(name,) if labels.kind == "set" else name for name in names]
    return DatasetStats(labels._replace(values=values, counts=[len(head)] * len(values)), [])


def _reasons_to_scan(config: TrainConfig, labels: LabelStats) -> list[str]:
    """Why a stream must be read before its first step; empty: it need not be."""
    task, run = config.task, config.run
    reasons = []
    if not (task.label_names or labels.class_names or _are_numbers(task, labels)):
        reasons.append("its labels (or pass --label_names)")
    if task.class_weights == ["balanced"]:
        reasons.append("the rows of each label (--class_weights balanced)")
    if run.max_train_steps is None:
        reasons.append("its length (--max_train_steps instead of --num_train_epochs)")
    for name in ("eval_every", "save_every", "log_every"):
        if "epoch" in (every := getattr(run, name)):
            reasons.append(f"--{name} {every!r} (in steps it needs no length)")
    return reasons


def _are_numbers(task: TaskConfig, labels: LabelStats) -> bool:
    """Whether the first labels say already that the task is regression."""
    if task.problem_type != "auto":
        return task.problem_type == REGRESSION
    names = [value for value in labels.values if isinstance(value, str)]
    return labels.kind == "text" and has_fractions(names) and all(map(is_number, names))


def create_task(
    config: TaskConfig, labels: LabelStats, model_labels: tuple[str, ...] | None
) -> Task:
    """The task that the labels of the training rows define."""
    return infer_task(
        config,
        labels.values,
        np.array(labels.counts),
        labels.class_names,
        labels.column,
        model_labels,
        labels.first,
        labels.limit,
    )


def pretrained_digests(
    model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Digests of a pretrained model's config and of its tokenizer: vocabulary, ids and rules, but
    not truncation and padding, which a text before may have set. Names and versions do not count.
    """
    settings = json.loads(model_config.to_json_string())
    rules: object = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "tokenizer": _digest(rules, "truncation", "padding"),
        "model_config": _digest(settings, "transformers_version"),
    }


def data_fingerprint(
    digests: dict[str, str], train_rows: "Records | Stream", eval_rows: Records | None
) -> dict[str, object]:
    """What must be the same on all ranks: rows, and `pretrained_digests`."""
    rows = [train_rows, *([eval_rows] if eval_rows else [])]
    return {
        **{f"{split.name} (digest of the rows)": split.fingerprint for split in rows},
        "the tokenizer": digests["tokenizer"],
        "the model's config": digests["model_config"],
    }


def _digest(value: object, *ignored: str) -> str:
    if isinstance(value, dict):
        value = {name: entry for name, entry in value.items() if name not in ignored}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
