"""Rows of several sources in given shares (--train_weights), as pure functions of the seed.

Every source is an endless sequence of passes, and a window (of a stream; else an epoch) takes the next rows of each: as many as its weight
says. What is left of rounding is drawn, so that a source of the smallest weight has its share in the long run.
"""

from collections.abc import Sequence

import numpy as np

from bertdist.tasks import Array


def shares(weights: Sequence[float], rows: int, *key: int) -> list[int]:
    """How many of `rows` rows each source gives; they add up. key: of the generator that draws what rounding leaves."""
    exact = np.asarray(weights, np.float64) / sum(weights) * rows
    counts = np.floor(exact + 1e-9).astype(np.int64)
    left = rows - int(counts.sum())
    if left:
        fractions = np.maximum(exact - counts, 0.0)
        drawn = np.random.Generator(np.random.PCG64([*key, 1])).choice(
            len(counts), left, replace=False, p=fractions / fractions.sum()
        )
        counts[drawn] += 1
    return [int(count) for count in counts]


def mixed_plan(parts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Array:
    """(sum of parts,) int64: the rows of an epoch. parts: rows of each source, which lie one behind the other.

    A source's rows come in passes, each a permutation of it, that go on from epoch to epoch: none comes a second time before all
    have come once.
    """
    total = sum(parts)
    counts = [shares(weights, total, seed, before) for before in range(epoch + 1)]
    chosen = []
    for part, rows in enumerate(parts):
        begin = sum(of[part] for of in counts[:-1])
        end = begin + counts[-1][part]
        passes = range(begin // rows, -(-end // rows)) if end > begin else range(0)
        orders = [
            np.random.Generator(np.random.PCG64([seed, number, 2, part])).permutation(rows)
            for number in passes
        ]
        if orders:
            first = passes.start * rows
            chosen.append(sum(parts[:part]) + np.concatenate(orders)[begin - first : end - first])
    rows_of_epoch = np.concatenate(chosen)
    return rows_of_epoch[np.random.Generator(np.random.PCG64([seed, epoch])).permutation(total)]
