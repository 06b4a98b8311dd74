"""Rows that several runs were evaluated on, matched by what they hold, not by their numbers.

    matched = match_rows([run_a.validation, run_b.validation], texts)   # None: no row is shared
    matched.predictions[1]                      # of run b, in the order of run a's rows

Rows are the same where text and truth are. Equal rows are matched in their order. Labels are
matched by name, whatever their order in each model; one that a model lacks has probability 0 there.
Each run's answers are those of its own thresholds.

Legend: N shared rows, O labels of all runs together; of regression O is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertdist.core.types import Array, BoolArray, IntArray
from bertdist.reporting.run_folder import ScoredRows
from bertdist.tasks.labels import REGRESSION, SINGLE_LABEL

TINY = float(np.finfo(np.float32).tiny)  # the least probability of which a logarithm is taken
HALF_STEP = 2.0**-25  # the least distance to 1: float32 rounds it to 1


@dataclass(frozen=True)
class MatchedRows:
    """The rows that all runs share, in the order of the first run."""

    problem_type: str
    labels: tuple[str, ...]  # of all runs
    lacking: tuple[tuple[str, ...], ...]  # of each run: labels that it does not know
    truth: Array  # single-label (N,) ids; multi-label (N, O) bool; regression (N,) floats
    probabilities: tuple[Array, ...]  # of each run (N, O)
    predictions: tuple[Array, ...]  # of each run, in the form of truth
    rows: tuple[IntArray, ...]  # of each run (N,): the number of the row in its file
    totals: tuple[int, ...]  # of each run: how many rows it was evaluated on
    relabelled: int  # rows of the first run whose text all runs have, with another truth only

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def all_shared(self) -> bool:
        """Whether every run was evaluated on these rows, and on no others."""
        return set(self.totals) == {len(self)}

    @property
    def in_order(self) -> bool:
        """Whether each run has them at the same numbers."""
        return all(np.array_equal(rows, self.rows[0]) for rows in self.rows)

    def losses(self, run: int) -> Array:
        """(N,) the loss of each row."""
        return row_losses(self.problem_type, self.truth, self.probabilities[run])

    def is_right(self, run: int) -> BoolArray:
        """(N,) all labels of the row are right; not for numbers."""
        return all_equal(self.predictions[run], self.truth)


def all_equal(a: Array, b: Array) -> BoolArray:
    """(N,) whether rows of (N,) or (N, O) are equal."""
    equal: BoolArray = a == b
    return np.asarray(equal.all(1)) if equal.ndim == 2 else equal


def read_texts(path: Path) -> pa.ChunkedArray:
    """(N,) the texts of a probabilities.parquet, of pairs both with a line between them."""
    table = pq.read_table(path, columns=_text_columns(path))
    columns = [column.cast(pa.large_string()) for column in table.columns]
    if len(columns) == 1:
        return columns[0]
    return pc.binary_join_element_wise(*columns, pa.scalar("\n", pa.large_string()))


def _text_columns(path: Path) -> list[str]:
    names = pq.read_schema(path).names
    return [name for name in ("text", "text_pair") if name in names]


def match_rows(runs: Sequence[ScoredRows], texts: Sequence[pa.ChunkedArray]) -> MatchedRows | None:
    """texts: of each run's rows. None where the tasks differ, or no row is shared."""
    problem_type = runs[0].problem_type
    if {run.problem_type for run in runs} != {problem_type}:
        return None
    labels = tuple(dict.fromkeys(label for run in runs for label in run.labels))
    if problem_type == REGRESSION:  # the name of the column
        labels = runs[0].labels
    truths, relabelled = [_by_name(run.truth, run, labels) for run in runs], 0
    if _are_equal(texts, truths) and _is_labelled(truths[0]).all():
        rows = [np.arange(len(truths[0]))] * len(runs)
    else:
        rows, relabelled = _shared_rows(texts, truths)
    if not len(rows[0]):
        return None
    pairs = list(zip(runs, rows, strict=True))
    return MatchedRows(
        problem_type=problem_type,
        labels=labels,
        lacking=tuple(_lacking(run, labels) for run in runs),
        truth=_select(truths[0], rows[0]),
        probabilities=tuple(_select(_by_name(x.probabilities, x, labels), i) for x, i in pairs),
        predictions=tuple(_select(_by_name(x.predicted, x, labels), i) for x, i in pairs),
        rows=tuple(rows),
        totals=tuple(map(len, truths)),
        relabelled=relabelled,
    )


def row_losses(problem_type: str, truth: Array, probabilities: Array) -> Array:
    """(N,) as `Task.eval_loss`, up to the rounding of probabilities to float32."""
    if problem_type == REGRESSION:
        return np.asarray((probabilities[:, 0].astype(np.float64) - truth) ** 2)
    if problem_type == SINGLE_LABEL:
        right = probabilities[np.arange(len(truth)), truth].astype(np.float64)
        return np.asarray(-np.log(np.maximum(right, TINY)))
    values = probabilities.astype(np.float64)
    right = np.where(truth > 0, np.maximum(values, TINY), np.maximum(1 - values, HALF_STEP))
    return np.asarray(-np.log(right).mean(1))


def _lacking(run: ScoredRows, labels: tuple[str, ...]) -> tuple[str, ...]:
    if run.problem_type == REGRESSION:
        return ()
    own = set(run.labels)
    return tuple(label for label in labels if label not in own)


def _by_name(values: Array, run: ScoredRows, labels: tuple[str, ...]) -> Array:
    """Ids, or columns, of the run's labels -> those of the labels of all runs."""
    if run.labels == labels or run.problem_type == REGRESSION:
        return values
    places = np.array([labels.index(label) for label in run.labels])
    if values.ndim == 1:
        return np.where(values >= 0, places[values], -1)
    columns = np.zeros((len(values), len(labels)), values.dtype)
    columns[:, places] = values
    return columns


def _select(values: Array, rows: IntArray) -> Array:
    """Rows of an array; the array itself where they are all of its rows in their order."""
    is_all = len(values) == len(rows) and bool((rows == np.arange(len(rows))).all())
    return values if is_all else values[rows]


# ---- Which rows are the same


def _are_equal(texts: Sequence[pa.ChunkedArray], truths: Sequence[Array]) -> bool:
    return all(
        np.array_equal(truth, truths[0]) and text.equals(texts[0])
        for text, truth in zip(texts, truths, strict=True)
    )


def _is_labelled(truth: Array) -> BoolArray:
    """(N,) bool."""
    if truth.dtype.kind == "f":
        return np.isfinite(truth)
    return truth >= 0 if truth.ndim == 1 else np.ones(len(truth), bool)


def _shared_rows(
    texts: Sequence[pa.ChunkedArray], truths: Sequence[Array]
) -> tuple[list[IntArray], int]:
    """Of each run the positions of the shared rows, in the order of the first run; and how many of
    the first run's rows all runs have with another truth only.
    """
    labelled = np.concatenate([_is_labelled(truth) for truth in truths])
    text, truth = _text_ids(texts), _row_ids(np.concatenate(truths))
    keys = _row_ids(text * (truth.max(initial=0) + 1) + truth)
    keys[~labelled] = -1
    cuts = np.cumsum([len(truth) for truth in truths])[:-1]
    keys_of, texts_of = np.split(keys, cuts), np.split(text, cuts)
    # Equal rows by their order: the second of one run is the second of the others.
    numbered = [np.where(ids < 0, -1, ids * len(keys) + _occurrences(ids)) for ids in keys_of]
    shared = reduce(np.intersect1d, numbered)
    shared = shared[shared >= 0]
    places = []
    for ids in numbered:
        order = np.argsort(ids, kind="stable")
        places.append(order[np.searchsorted(ids, shared, sorter=order)])
    order = np.argsort(places[0])
    has_text = np.isin(texts_of[0], reduce(np.intersect1d, texts_of))
    has_row = np.isin(keys_of[0], reduce(np.intersect1d, keys_of))
    relabelled = int((has_text & ~has_row & (keys_of[0] >= 0)).sum())
    return [place[order] for place in places], relabelled


def _text_ids(texts: Sequence[pa.ChunkedArray]) -> IntArray:
    """Of the texts of all runs, one after the other: equal numbers for equal texts."""
    chunks = [chunk.cast(pa.large_string()) for text in texts for chunk in text.chunks]
    encoded = pa.concat_arrays(chunks).dictionary_encode()
    ids: IntArray = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return ids


def _row_ids(values: Array) -> IntArray:
    """(N,) equal numbers for equal rows of values (N,) or of 0/1 (N, O)."""
    if values.ndim == 2:
        packed = np.ascontiguousarray(np.packbits(values > 0, axis=1))
        values = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    ids: IntArray = np.unique(values, return_inverse=True)[1].astype(np.int64)
    return ids


def _occurrences(ids: IntArray) -> IntArray:
    """(N,) how often each row's number came before: 0, 1, ..."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.empty(len(ids), np.int64)
    counts[order] = np.arange(len(ids)) - np.repeat(first, np.diff(np.r_[first, len(ids)]))
    return counts
