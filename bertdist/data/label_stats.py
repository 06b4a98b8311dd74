"""The labels of rows in memory: their distinct values and counts, and whether they are numbers."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bertdist.core.config import TaskConfig
from bertdist.data.columns import LabelKind, LabelValue
from bertdist.data.records import Records
from bertdist.tasks.labels import REGRESSION, SINGLE_LABEL, is_number, non_numeric_labels


class LabelStats(NamedTuple):
    """The labels of a training split, which define its task."""

    kind: LabelKind
    values: list[LabelValue]  # distinct
    counts: list[int]  # rows of each
    class_names: tuple[str, ...] | None  # label names that the source defines, in its order
    column: str
    first: Callable[[LabelValue], str] = repr  # file and line of a label's first row
    limit: int | None = None  # --max_train_samples, where it left rows out


def label_stats_of(rows: Records) -> LabelStats:
    """The labels of rows in memory."""
    assert rows.label_indices is not None and rows.label_kind is not None
    counts = np.bincount(rows.label_indices, minlength=len(rows.label_values)).tolist()
    # Without the labels of rows that --max_train_samples leaves out, but with those held out.
    counted = zip(rows.label_values, counts, strict=True)
    used = {value: n for value, n in counted if n or rows.all_labels}
    return LabelStats(
        rows.label_kind,
        list(used),
        list(used.values()),
        rows.class_names,
        rows.label_column or "labels",
        rows.locate_label,
        rows.limit,
    )


def has_non_numeric_labels(rows: Records) -> bool:
    """Whether nearly all labels are numbers, and some are not."""
    if rows.label_kind != "text" or rows.class_names is not None:
        return False
    stats = label_stats_of(rows)
    return bool(non_numeric_labels(dict(zip(stats.values, stats.counts, strict=True))))


def needs_numbers(task: TaskConfig, train_rows: Records | None = None) -> bool | None:
    """Whether labels must be numbers: as flags or training rows say. None: to be decided."""
    if task.label_names is not None or task.problem_type == SINGLE_LABEL:
        return False
    if task.problem_type == REGRESSION:
        return True
    if train_rows is None or train_rows.label_kind != "text" or has_non_numeric_labels(train_rows):
        return None
    values = label_stats_of(train_rows).values
    return None if all(is_number(str(value)) for value in values) else False
