"""Rows that runs answer differently: which turned right, which turned wrong, how far runs agree.

    changes = changed_rows(matched, 0, 1)
    changes.gained, changes.lost            # rows that only run 1, or only run 0, has right
    changes.gained_rows[0].row              # the surest first, LISTED at most

Of numbers there is no right: a row is gained where run 1 is nearer to the truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bertdist.core.types import Array, BoolArray, IntArray
from bertdist.reporting.matched_rows import MatchedRows, all_equal
from bertdist.reporting.score_differences import mcnemar
from bertdist.tasks.labels import REGRESSION, SINGLE_LABEL

LISTED = 20  # rows of a list
LISTED_LABELS = 12

Texts = Callable[[Sequence[int]], Sequence[str]]  # rows of the first run -> their texts


@dataclass(frozen=True)
class ChangedRow:
    """A row, and what some runs answer."""

    row: int  # its number in the file of the first run of the comparison, from 0
    truth: Any  # a label, a list of labels, or a number
    answers: tuple[dict[str, Any], ...]  # as in predictions.jsonl
    text: str = ""


@dataclass(frozen=True)
class Changes:
    """What changes from run a to run b."""

    a: int
    b: int
    gained: int  # wrong in a and right in b; of numbers: nearer in b
    lost: int
    otherwise: int  # wrong in both, with different answers
    p_value: float | None  # McNemar's exact test; None for numbers
    gained_rows: tuple[ChangedRow, ...]
    lost_rows: tuple[ChangedRow, ...]


@dataclass(frozen=True)
class LabelScores:
    """F1 of a label in each run."""

    label: str
    rows: int  # that have it
    f1: tuple[float, ...]


def changed_rows(matched: MatchedRows, a: int, b: int, texts: Texts | None = None) -> Changes:
    """From run a to run b. texts: see `with_texts`."""
    if matched.problem_type == REGRESSION:
        errors = [np.abs(matched.predictions[run] - matched.truth) for run in (a, b)]
        change = errors[0] - errors[1]  # > 0: nearer in b
        gained, lost, p_value = change > 0, change < 0, None
        otherwise = 0
        sureness = np.abs(change)
    else:
        right = matched.is_right(a), matched.is_right(b)
        gained, lost = right[1] & ~right[0], right[0] & ~right[1]
        differ = _differ(matched, a, b)
        otherwise = int((differ & ~right[0] & ~right[1]).sum())
        p_value = mcnemar(*right)
        sureness = _sureness(matched, a, b, gained | lost)
    return Changes(
        a=a,
        b=b,
        gained=int(gained.sum()),
        lost=int(lost.sum()),
        otherwise=otherwise,
        p_value=p_value,
        gained_rows=_listed(matched, (a, b), gained, sureness, texts),
        lost_rows=_listed(matched, (a, b), lost, sureness, texts),
    )


def never_right(
    matched: MatchedRows, texts: Texts | None = None
) -> tuple[int, tuple[ChangedRow, ...]]:
    """How many rows no run has right; and those to which all runs give one answer, the surest
    first: they are hard, or their label is wrong. Of numbers none.
    """
    if matched.problem_type == REGRESSION:
        return 0, ()
    runs = range(len(matched.rows))
    wrong = ~np.any([matched.is_right(run) for run in runs], axis=0)
    same = wrong & ~np.any([_differ(matched, 0, run) for run in runs[1:]], axis=0)
    confidence = np.min([_confidence(matched, run, same) for run in runs], axis=0)
    return int(wrong.sum()), _listed(matched, tuple(runs), same, confidence, texts)


def agreement(matched: MatchedRows) -> tuple[tuple[float, ...], ...]:
    """(R, R) the share of rows to which two runs give the same answer; of numbers the correlation
    of their answers, nan where one is constant.
    """
    number = len(matched.rows)
    table = np.ones((number, number))
    for a in range(number):
        for b in range(a):
            if matched.problem_type == REGRESSION:
                with np.errstate(divide="ignore", invalid="ignore"):
                    values = np.corrcoef(matched.predictions[a], matched.predictions[b])
                table[a, b] = table[b, a] = values[0, 1]
            else:
                table[a, b] = table[b, a] = 1 - _differ(matched, a, b).mean()
    return tuple(tuple(map(float, row)) for row in table)


def label_scores(matched: MatchedRows) -> tuple[LabelScores, ...]:
    """The labels whose F1 differs most between runs, LISTED_LABELS at most; of numbers none."""
    if matched.problem_type == REGRESSION:
        return ()
    rows = _counts(matched.truth, matched)
    f1 = []
    for predictions in matched.predictions:
        if matched.problem_type == SINGLE_LABEL:
            both = _counts(matched.truth[predictions == matched.truth], matched)
        else:
            both = (predictions & matched.truth).sum(0)
        sums = rows + _counts(predictions, matched)
        f1.append(np.divide(2 * both, sums, out=np.zeros(len(rows)), where=sums > 0))
    spread = np.ptp(f1, axis=0)
    order = np.argsort(-spread, kind="stable")[:LISTED_LABELS]
    return tuple(
        LabelScores(matched.labels[i], int(rows[i]), tuple(float(run[i]) for run in f1))
        for i in order
        if spread[i] > 0
    )


def _counts(labels: Array, matched: MatchedRows) -> IntArray:
    """(O,) rows that have each label."""
    if labels.ndim == 2:
        counts: IntArray = labels.sum(0)
        return counts
    return np.bincount(labels, minlength=len(matched.labels))


def _differ(matched: MatchedRows, a: int, b: int) -> BoolArray:
    """(N,) whether two runs give different answers."""
    return ~all_equal(matched.predictions[a], matched.predictions[b])


def _sureness(matched: MatchedRows, a: int, b: int, wanted: BoolArray) -> Array:
    """(N,) how far the probability of what both answer differently moves: both sure, in opposite
    ways, is 1. Only of the wanted rows; 0 elsewhere.
    """
    found = np.zeros(len(matched))
    rows = np.flatnonzero(wanted)
    first, second = (matched.probabilities[run][rows] for run in (a, b))
    if matched.problem_type == SINGLE_LABEL:
        at, truth = np.arange(len(rows)), matched.truth[rows]
        found[rows] = np.abs(first[at, truth] - second[at, truth])
    else:
        differ = matched.predictions[a][rows] != matched.predictions[b][rows]
        found[rows] = np.where(differ, np.abs(first - second), 0).max(1, initial=0)
    return found


def _confidence(matched: MatchedRows, run: int, wanted: BoolArray) -> Array:
    """(N,) the probability of a wrong answer: of several labels that of the surest wrong one."""
    found = np.zeros(len(matched))
    rows = np.flatnonzero(wanted)
    probabilities, answers = matched.probabilities[run][rows], matched.predictions[run][rows]
    if matched.problem_type == SINGLE_LABEL:
        found[rows] = probabilities[np.arange(len(rows)), answers]
    else:
        sure = np.where(answers, probabilities, 1 - probabilities)
        found[rows] = np.where(answers != matched.truth[rows], sure, 0).max(1, initial=0)
    return found


def _listed(
    matched: MatchedRows,
    runs: Sequence[int],
    wanted: BoolArray,
    size: Array,
    texts: Texts | None,
) -> tuple[ChangedRow, ...]:
    """The wanted rows of the largest size, LISTED at most."""
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(-size[rows], kind="stable")[:LISTED]]
    found = tuple(
        ChangedRow(
            row=int(matched.rows[0][row]),
            truth=_names(matched, matched.truth[row]),
            answers=tuple(_answer(matched, run, int(row)) for run in runs),
        )
        for row in rows
    )
    return found if texts is None else with_texts(found, texts)


def with_texts(rows: Sequence[ChangedRow], texts: Texts) -> tuple[ChangedRow, ...]:
    """The rows with their texts."""
    found = texts([row.row for row in rows]) if rows else []
    return tuple(replace(row, text=text) for row, text in zip(rows, found, strict=True))


def _names(matched: MatchedRows, target: Any) -> Any:
    if matched.problem_type == REGRESSION:
        return float(target)
    if matched.problem_type == SINGLE_LABEL:
        return matched.labels[int(target)]
    return [matched.labels[i] for i in np.flatnonzero(target)]


def _answer(matched: MatchedRows, run: int, row: int) -> dict[str, Any]:
    """As `Task.to_records` gives it."""
    probabilities, answer = matched.probabilities[run][row], matched.predictions[run][row]
    if matched.problem_type == REGRESSION:
        return {"score": float(answer)}
    if matched.problem_type == SINGLE_LABEL:
        return {"label": matched.labels[int(answer)], "score": float(probabilities[int(answer)])}
    scores = [(float(probabilities[i]), matched.labels[i]) for i in np.flatnonzero(answer)]
    return {"labels": [{"label": label, "score": score} for score, label in sorted(scores)[::-1]]}
