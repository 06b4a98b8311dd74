"""Which of several runs is better, and whether that is sure, in words.

verdict(("a", "b"), score, differences, rows=872, split="test")
# ("b is better than a: accuracy is 1.2 points higher (95% interval 0.3 to 2.1 points), ...",)
"""

import math
from collections.abc import Sequence

from bertdist.reporting.score_differences import Difference, Score, rows_needed

# Scores that are shares: their differences are said in points, hundredths.
_SHARES = ("accuracy", "f1", "precision", "recall", "jaccard", "top_", "balanced_accuracy")


def verdict(
    names: Sequence[str], score: Score, pairs: Sequence[Difference], rows: int, split: str
) -> tuple[str, ...]:
    """Sentences, of which the first is the answer.

    names: of the runs; pairs: the differences of every two runs; rows: that all share; split: which
    rows these are.
    """
    where = f"the same {rows:,} {split} rows"
    if any(not math.isfinite(pair.value) or pair.interval is None for pair in pairs):
        return (f"No answer: {score.name} is undefined for a run on {where}.",)
    if len(names) == 2:
        return _of_two(names, score, pairs[0], rows, where)
    return _of_many(names, score, pairs, where)


def seeds_verdict(
    score: str, mean: float, deviation: float | None, ends: tuple[float, float], seeds: int
) -> str:
    """The answer for runs that differ by their seed only. ends: the lowest and the highest."""
    spread = f", with a standard deviation of {shown(deviation)}" if deviation is not None else ""
    return (
        f"The {seeds} runs differ by their seed only, so none is a better setting: {score} is "
        f"{shown(mean)} on average{spread} ({shown(ends[0])} to {shown(ends[1])})."
    )


def _of_two(
    names: Sequence[str], score: Score, pair: Difference, rows: int, where: str
) -> tuple[str, ...]:
    better, worse = pair.b, pair.a
    if pair.value * score.sign < 0:
        better, worse = worse, better
    size = describe_difference(score.name, abs(pair.value))
    sides = f"{shown(score.values[better])} against {shown(score.values[worse])}"
    ends = describe_interval(score.name, towards(pair, better, score.sign))
    direction = "higher" if score.sign > 0 else "lower"
    if pair.value == 0:
        return (
            f"No difference: both have {score.name} {shown(score.values[0])} on {where}; the 95% "
            f"interval of the difference is {ends}.",
        )
    if pair.is_sure:
        return (
            f"{names[better]} is better than {names[worse]}: {score.name} is {size} {direction} "
            f"(95% interval {ends}), {sides} on {where}.",
        )
    needed = rows_needed(pair, rows)
    answer = (
        f"Not sure: {score.name} of {names[better]} is {size} {direction} than that of "
        f"{names[worse]}, {sides} on {where}, but the 95% interval ({ends}) contains 0."
    )
    if needed is None:
        return (answer,)
    return answer, f"To be sure of a difference of this size, about {needed:,} rows are needed."


def _of_many(
    names: Sequence[str], score: Score, pairs: Sequence[Difference], where: str
) -> tuple[str, ...]:
    best = max(range(len(names)), key=lambda run: score.sign * score.values[run])
    others = [pair for pair in pairs if best in (pair.a, pair.b)]
    sure, unsure = (
        [names[pair.a if pair.b == best else pair.b] for pair in others if pair.is_sure is wanted]
        for wanted in (True, False)
    )
    extreme = "highest" if score.sign > 0 else "lowest"
    value = f"the {extreme} {score.name}, {shown(score.values[best])} on {where}"
    made = (
        f"{len(pairs)} comparisons of two runs were made; their 95% intervals are widened for that."
    )
    if not unsure:
        return (
            f"{names[best]} is better than each of the other {len(sure)} runs: it has {value}.",
            made,
        )
    also = f" It is better than {_and(sure)}." if sure else ""
    return (
        f"Not sure which of {len(names)} runs is the best: {names[best]} has {value}, but the "
        f"interval{'s' * (len(unsure) > 1)} of its difference to {_and(unsure)} "
        f"contain{'s' * (len(unsure) == 1)} 0.{also}",
        made,
    )


def towards(pair: Difference, better: int, sign: int) -> tuple[float, float]:
    """The interval as the lead of run `better`: positive where it is better. sign: -1 where lower
    scores are better.
    """
    assert pair.interval is not None
    low, high = pair.interval
    if (better == pair.a) != (sign < 0):
        return -high + 0.0, -low + 0.0  # + 0.0: no -0
    return low, high


def is_share(score: str) -> bool:
    """Whether a score is a share of rows or labels, whose differences are said in points."""
    return score.startswith(_SHARES)


def describe_difference(score: str, value: float) -> str:
    """`1.2 points`, or `0.0123` for scores that are no shares."""
    return _plain(score, value) + (" points" if is_share(score) else "")


def describe_interval(score: str, ends: tuple[float, float]) -> str:
    """`0.3 to 2.1 points`."""
    low, high = (_plain(score, end) for end in ends)
    return f"{low} to {high}" + (" points" if is_share(score) else "")


def shown(value: float | None) -> str:
    """A score with four digits."""
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _plain(score: str, value: float) -> str:
    if is_share(score):
        points = 100 * value
        return f"{points:.2f}" if abs(points) < 0.95 else f"{points:.1f}"
    return f"{value:.3g}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
