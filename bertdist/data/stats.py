"""What training must know of its rows before the first step: their number and labels, which define
the task, and digests by which ranks and a resumed run compare their inputs.

Rows in memory are counted. A stream is read once (data/stream_scan.py), unless flags make this
unnecessary.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bertdist.core.config import TaskConfig, TrainConfig
from bertdist.data.bad_rows import BadRow
from bertdist.data.load_data import needs_numbers
from bertdist.data.records import Records
from bertdist.distributed.collectives import raise_on_all_ranks
from bertdist.distributed.preemption import StopSignal
from bertdist.tasks.labels import (
    REGRESSION,
    LabelStats,
    describe_differing,
    has_fractions,
    is_multi_hot,
    is_number,
    read_label_names,
)

if TYPE_CHECKING:  # --streaming only
    from bertdist.data.streaming import Stream


class DatasetStats(NamedTuple):
    """Statistics of the training rows."""

    labels: LabelStats
    num_rows_per_source: list[int]  # empty: not counted
    bad_rows: Sequence[BadRow] = ()
    numbers_only: bool = False  # of a stream, see columns.LabelRules
    notes: Sequence[str] = ()


def collect_stats(
    rows: "Records | Stream",
    config: TrainConfig,
    accelerator: Accelerator,
    say: Callable[[str], None],
    stop: StopSignal | None = None,
) -> DatasetStats | None:
    """Statistics of the training rows: their labels, which define the task, and their number.

    A collective: every rank calls it; for a stream that must be read first, each reads some files.

    rows: `Splits.train` of `load_splits`. config: the settings of the run. say: is called with a
    line when a stream is read. stop: a request to end, such as a signal, that is looked at while a
    stream is read.

    Returns None, on all ranks, if `stop` was requested meanwhile. Raises DataError for rows that
    cannot be read, on all ranks.
    """
    if isinstance(rows, Records):
        return DatasetStats(rows.label_stats(), [len(rows)], rows.bad_rows)
    with raise_on_all_ranks(accelerator):
        head = rows.head()
    undecided = rows.on_bad_row == "skip" and needs_numbers(config.task) is None
    skips_non_numeric = undecided and head.has_non_numeric_labels()
    labels = head.label_stats()
    if reasons := _reasons_to_scan(config, labels, skips_non_numeric):
        from bertdist.data.stream_scan import MOST_LOCATIONS, scan_stream

        say(f"Reading {rows.name} once, for {', '.join(reasons)}.")
        path = Path(config.run.output_dir) / "survey.json"
        scan = scan_stream(rows, accelerator, path, stop, undecided)
        if scan is None:
            return None
        assert scan.kind is not None
        values, counts = list(scan.labels), list(scan.labels.values())
        labels = labels._replace(
            kind=scan.kind,
            values=values,
            counts=counts,
            locate=lambda label: scan.first.get(label, rows.name),
            limit=rows.limit,
        )
        counts = [scan.rows[source] for source in sorted(scan.rows)]
        of_file = [(rows.sources[at].name, scan.of_file[at]) for at in sorted(scan.of_file)]
        is_all = all(len(of) < MOST_LOCATIONS for _, of in of_file)
        notes = list(filter(None, [describe_differing(of_file) if is_all else ""]))
        return DatasetStats(labels, counts, scan.bad, scan.numbers_only, notes)
    numbers_only = _are_numbers(config.task, labels, skips_non_numeric)
    if skips_non_numeric:
        with raise_on_all_ranks(accelerator):
            rules = rows.rules._replace(numbers_only=True)
            labels = replace(rows, rules=rules).head().label_stats()
    names, values = labels.class_names, labels.values
    if (given := config.task.label_names) is not None:
        distinct = [x for value in values for x in (value if isinstance(value, tuple) else [value])]
        names = tuple(given)
        if not is_multi_hot(values):
            names = tuple(read_label_names(given, distinct).names)
    if names and not is_multi_hot(values, len(names)):
        values = [(name,) if labels.kind == "set" else name for name in names]
    labels = labels._replace(values=values, counts=[len(head)] * len(values))
    return DatasetStats(labels, [], (), numbers_only)


def _reasons_to_scan(config: TrainConfig, labels: LabelStats, skips_non_numeric: bool) -> list[str]:
    """Why a stream must be read before its first step; empty: it need not be."""
    task, run = config.task, config.run
    reasons = []
    if not (
        task.label_names or labels.class_names or _are_numbers(task, labels, skips_non_numeric)
    ):
        reasons.append("its labels (or pass --label_names)")
    if task.class_weights == ["balanced"]:
        reasons.append("the rows of each label (--class_weights balanced)")
    if run.max_train_steps is None:
        reasons.append("its length (--max_train_steps instead of --num_train_epochs)")
    for name in ("eval_every", "save_every", "log_every"):
        if "epoch" in (every := getattr(run, name)):
            reasons.append(f"--{name} {every!r} (in steps it needs no length)")
    return reasons


def _are_numbers(task: TaskConfig, labels: LabelStats, skips_non_numeric: bool) -> bool:
    """Whether the first labels say already that the task is regression.

    skips_non_numeric: --on_bad_row skip leaves out those that are no numbers.
    """
    if task.problem_type != "auto":
        return task.problem_type == REGRESSION
    names = [value for value in labels.values if isinstance(value, str)]
    is_text = labels.kind == "text"
    return is_text and has_fractions(names) and (skips_non_numeric or all(map(is_number, names)))


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
    digests: dict[str, str], train_rows: "Records | Stream", *scored: Records | None
) -> dict[str, object]:
    """What must be the same on all ranks: rows, and `pretrained_digests`."""
    rows = [train_rows, *(split for split in scored if split)]
    return {
        **{f"{split.name} (digest of the rows)": split.fingerprint for split in rows},
        "the tokenizer": digests["tokenizer"],
        "the model's config": digests["model_config"],
    }


def _digest(value: object, *ignored: str) -> str:
    if isinstance(value, dict):
        value = {name: entry for name, entry in value.items() if name not in ignored}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
