"""What must be known of the training rows before the first step: their labels, and how many there are.

Of rows in memory that is at hand. A stream is read once for it (`survey`), unless flags tell it: what for is said.
"""

import heapq
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from bertdist.batch import Step
from bertdist.columns import LabelKind, LabelValue
from bertdist.config import TrainConfig
from bertdist.errors import BertdistError
from bertdist.pieces import BadRow
from bertdist.ranks import host_group, summed, together
from bertdist.records import Records
from bertdist.slurm import StopRequest
from bertdist.stream import Stream
from bertdist.stream_batches import Agree
from bertdist.survey import survey


class Labels(NamedTuple):
    """The labels of a training split: what a task is made of."""

    kind: LabelKind
    values: list[LabelValue]  # distinct
    counts: list[int]  # rows of each
    class_names: tuple[str, ...] | None  # that the source fixes, in its order
    column: str


class Known(NamedTuple):
    """What is known of the training rows."""

    labels: Labels
    rows: list[int]  # of each source; none: nobody has counted
    bad: Sequence[BadRow] = ()  # rows that were left out


def labels_in(rows: Records) -> Labels:
    """Of rows in memory."""
    assert rows.label_codes is not None and rows.label_kind is not None
    counts = np.bincount(rows.label_codes, minlength=len(rows.label_values)).tolist()
    return Labels(
        rows.label_kind, rows.label_values, counts, rows.class_names, rows.label_column or "labels"
    )


def known_of(
    rows: Records | Stream,
    config: TrainConfig,
    accelerator: Accelerator,
    say: Callable[[str], None],
    stop: StopRequest | None = None,
) -> Known | None:
    """A collective: of a stream, each rank reads some of the files. None where `stop` was asked for meanwhile. Raises DataError."""
    if isinstance(rows, Records):
        return Known(labels_in(rows), [len(rows)], rows.bad)
    with together(accelerator):
        head = rows.head()
    labels = labels_in(head)
    if reasons := list(_reasons(config, labels)):
        say(f"Reading {rows.name} once, for {', '.join(reasons)}.")
        found = survey(rows, accelerator, Path(config.run.output_dir) / "survey.json", stop)
        if found is None:
            return None
        assert found.kind is not None
        labels = labels._replace(
            kind=found.kind, values=list(found.labels), counts=list(found.labels.values())
        )
        return Known(labels, [found.rows[number] for number in sorted(found.rows)], found.bad)
    names = config.task.label_names or labels.class_names
    values: list[LabelValue] = (
        [(name,) if labels.kind == "set" else name for name in names] if names else labels.values
    )
    return Known(labels._replace(values=values, counts=[len(head)] * len(values)), [])


def _reasons(config: TrainConfig, labels: Labels) -> list[str]:
    """Why a stream must be read before its first step; none: flags say it all."""
    task, run = config.task, config.run
    reasons = []
    fixed = (
        task.label_names
        or labels.class_names
        or labels.kind == "number"
        or task.problem_type == "regression"
    )
    if not fixed:
        reasons.append("its labels (--label_names tells them)")
    if task.class_weights == ["balanced"]:
        reasons.append("the rows of each label (--class_weights balanced)")
    if run.max_train_steps is None:
        reasons.append("its length (--max_train_steps instead of --num_train_epochs)")
    for name in ("eval_every", "save_every", "log_every"):
        if "epoch" in (every := getattr(run, name)):
            reasons.append(f"--{name} {every!r} (in steps it needs no length)")
    return reasons


def files_of_ranks(stream: Stream, ranks: int) -> list[list[int]]:
    """Which sources each rank reads (--stream_split files): largest first, to the rank that has least to read."""
    told = [source.bytes for source in stream.sources]
    known = [size for size in told if size is not None]
    usual = sum(known) // max(1, len(known))  # where the size is not known
    sizes = [usual if size is None else size for size in told]
    files: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, 0, rank) for rank in range(ranks)]  # a heap: (bytes, files, rank)
    for source in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, count, rank = loads[0]
        files[rank].append(source)
        heapq.heapreplace(loads, (load + sizes[source], count + 1, rank))
    return [sorted(of_rank) for of_rank in files]


def agreement(accelerator: Accelerator) -> Agree:
    """How ranks that read own files agree on a step: its rows over all ranks, and what any of them left out. A collective at every call."""
    group = cache(lambda: host_group(accelerator))

    def agree(step: Step | BertdistError | None) -> tuple[int, tuple[BadRow, ...]]:
        told, failed = (step.bad, False) if isinstance(step, Step) else ((), step is not None)
        rows, failures, bad = summed(
            accelerator,
            [step.rows if isinstance(step, Step) else 0, int(failed), len(told)],
            group(),
        )
        if failures:
            with together(accelerator):
                if isinstance(step, BertdistError):
                    raise step
        return rows, tuple(gather_object(told) if bad and accelerator.num_processes > 1 else told)

    return agree
