"""Differences of scores between runs on the same rows, with intervals.

    scores, differences = compare_scores(names, matched, positive)
    differences["accuracy"][0].interval     # (0.003, 0.021): of run 1 less run 0

The interval is by the paired bootstrap: a resample draws the same rows of all runs
(tasks/confidence_intervals.py). It covers the choice of the rows, not that of the training seed.

- Of two runs it is from the 2.5th to the 97.5th percentile of the differences.
- Of more, every two runs are compared, and one of many intervals would miss by chance. So they are
  simultaneous: difference -+ q x standard error, where q is the 95th percentile, over resamples, of
  the largest |difference of the resample - difference| / standard error of all pairs. Where no two
  runs differ, all intervals contain 0 in 95 of 100 cases (Hothorn et al. 2008; the single-step
  maxT of Westfall and Young 1993). Holm's correction would need p-values far below 1 / resamples.

Scores are not corrected for one another: the main score decides, the others explain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from bertdist.core.types import Array, BoolArray
from bertdist.reporting.matched_rows import MatchedRows
from bertdist.tasks.confidence_intervals import (
    RESAMPLES,
    Arrays,
    Interval,
    exact_scores,
    percentile_interval,
    resampled_scores,
)
from bertdist.tasks.metric_names import LOWER_IS_BETTER

LEVEL = 95  # percent


@dataclass(frozen=True)
class Score:
    """A score of all runs on the rows that they share."""

    name: str
    values: tuple[float, ...]  # of each run; nan where it is undefined
    intervals: tuple[Interval | None, ...]

    @property
    def sign(self) -> int:
        """-1 where lower is better."""
        return -1 if self.name in LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class Difference:
    """A score of run b less that of run a."""

    a: int
    b: int
    value: float
    interval: Interval | None  # 95%, of several pairs simultaneous; None where it is undefined
    # Share of resamples in which b is better than a, equal ones half: of this pair alone
    probability: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def compare_scores(
    names: Sequence[str], matched: MatchedRows, positive: int = 1, resamples: int = RESAMPLES
) -> tuple[tuple[Score, ...], dict[str, tuple[Difference, ...]]]:
    """Scores that are built in, and of each the differences of every two runs.

    positive: the positive one of two labels, in matched.labels.
    """
    runs = range(len(matched.rows))
    samples = [
        (
            Arrays(matched.predictions[run], matched.probabilities[run], matched.truth),
            matched.losses(run),
        )
        for run in runs
    ]
    exact = [exact_scores(names, *sample, positive) for sample in samples]
    drawn = resampled_scores(names, samples, positive, resamples)
    scores, differences = [], {}
    for name in exact[0]:
        values = tuple(each[name] for each in exact)
        draws = [each[name] for each in drawn]
        scores.append(Score(name, values, tuple(map(percentile_interval, draws))))
        differences[name] = pairwise_differences(values, draws, scores[-1].sign)
    return tuple(scores), differences


def pairwise_differences(
    values: Sequence[float], draws: Sequence[Array], sign: int = 1
) -> tuple[Difference, ...]:
    """Of every two runs. values: a score of each run; draws: (B,) of resamples of the same rows.

    sign: -1 where lower is better.
    """
    pairs = list(combinations(range(len(values)), 2))
    found = [_draws_of(draws, a, b) for a, b in pairs]
    observed = [values[b] - values[a] for a, b in pairs]
    defined = [i for i in range(len(pairs)) if found[i] is not None and math.isfinite(observed[i])]
    intervals = dict(
        zip(
            defined,
            _intervals([observed[i] for i in defined], [found[i] for i in defined]),
            strict=True,
        )
    )
    return tuple(
        Difference(
            a,
            b,
            observed[i],
            intervals.get(i),
            None if (drawn := found[i]) is None else _share_above(sign * drawn),
        )
        for i, (a, b) in enumerate(pairs)
    )


def _draws_of(draws: Sequence[Array], a: int, b: int) -> Array | None:
    """(B,) the differences of the resamples; None where most, or all, are undefined."""
    if len(draws[a]) != len(draws[b]) or not len(draws[a]):
        return None
    difference: Array = draws[b] - draws[a]
    defined = np.isfinite(difference)
    return difference if defined.mean() > 0.5 else None


def _share_above(differences: Array) -> float:
    defined = differences[np.isfinite(differences)]
    return float((defined > 0).mean() + (defined == 0).mean() / 2)


def _intervals(observed: Sequence[float], draws: Sequence[Array | None]) -> list[Interval | None]:
    """Of one difference by percentiles, of several simultaneous. draws: (B,) of each."""
    if len(observed) < 2:
        return [percentile_interval(drawn) for drawn in draws if drawn is not None]
    table = np.array(draws)
    table = table[:, np.isfinite(table).all(0)]
    if table.shape[1] < 2:
        return [None] * len(observed)
    errors = table.std(1)
    centre = np.array(observed)
    varied = errors > 0
    if not varied.any():
        return [(float(value), float(value)) for value in observed]
    deviations = np.abs(table[varied] - centre[varied, None]) / errors[varied, None]
    width = np.percentile(deviations.max(0), LEVEL) * errors
    return [
        (float(f"{low:.6g}"), float(f"{high:.6g}"))
        for low, high in zip(centre - width, centre + width, strict=True)
    ]


def mcnemar(a_right: BoolArray, b_right: BoolArray) -> float:
    """p-value of McNemar's exact test: as many rows turn right as turn wrong. (N,) each."""
    gained, lost = int((b_right & ~a_right).sum()), int((a_right & ~b_right).sum())
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


def rows_needed(difference: Difference, rows: int) -> int | None:
    """About how many rows an interval needs to exclude 0, if the difference stays; None where it
    does already, or there is none.
    """
    if difference.interval is None or difference.is_sure or not difference.value:
        return None
    half = (difference.interval[1] - difference.interval[0]) / 2
    needed = rows * (half / difference.value) ** 2
    digits = max(0, len(str(int(needed))) - 2)
    return int(math.ceil(needed / 10**digits) * 10**digits)
