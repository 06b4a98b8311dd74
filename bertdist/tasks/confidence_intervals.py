"""95% intervals of the built-in scores, by the percentile bootstrap over rows.

    bootstrap_intervals(names, arrays, losses, positive=1)    # {"accuracy": (0.89, 0.92), ...}

RESAMPLES times, N rows are drawn with replacement and the scores computed of them; the interval is
from the 2.5th to the 97.5th percentile (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13). It covers the choice of the rows, not that of the training seed. The seed is
fixed, so that a command gives the same file again.

Nothing is drawn row by row: a resample is the number of times that each row comes, and scores are
computed of many resamples at once, from sums of rows with these weights:

- counts of labels (true, predicted, both) -> accuracy, f1, matthews_correlation, ...
- means of row values -> loss, mse, ece, pearson, ...
- rows in the order of their probability, sorted once -> roc_auc, average_precision, spearman

Cost on one idle CPU core, 100,000 rows: 1 to 2 s for the usual scores, 2 to 4 s for all
scores of a task. Scores that sort rows (roc_auc, average_precision, spearman) take fewer resamples,
down to 100, where rows x labels exceed 300,000. A resample in which a score is undefined, as
roc_auc without a row of a label, does not count; an interval of which half do not is left out.

Legend: N rows, O outputs, B resamples that are computed at once. Weights are (N, B), the number of
times that a row comes; scores are (B,).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import sparse

from bertdist.core.types import Array
from bertdist.tasks.metric_names import TOP_K
from bertdist.tasks.row_scores import (
    CALIBRATION_BINS,
    calibration_gaps,
    log_losses,
    one_vs_rest,
    set_overlaps,
    top_hits,
)

RESAMPLES, LEAST_RESAMPLES = 1_000, 100
SEED = 0
PERCENTILES = (2.5, 97.5)
CELLS = 1 << 21  # of the weights that are in memory at a time
SORTED_ROWS = 3e8  # rows x labels x resamples of a score that sorts rows
DIGITS = 6  # significant ones of an interval: the number of threads cannot change them

Interval: TypeAlias = tuple[float, float]


class Arrays(NamedTuple):
    """What metrics read: see tasks/metrics.py. probabilities are not read for numbers."""

    predictions: Array
    probabilities: Array
    references: Array


class Resamples:
    """Some resamples of the rows, and sums over them that several scores need."""

    def __init__(self, data: "_Data", weights: Array) -> None:
        self.data, self.weights = data, weights
        self.rows = len(weights)

    def sum(self, matrix: sparse.csr_matrix) -> Array:
        """(K, N) -> (K, B)."""
        return np.asarray(matrix @ self.weights, dtype=np.float64)

    @cached_property
    def _weights64(self) -> Array:
        return self.weights.astype(np.float64)

    def mean(self, values: Array) -> Array:
        """(N,) values of rows -> (B,), or (K, N) -> (K, B)."""
        means: Array = np.asarray(values, dtype=np.float64) @ self._weights64 / self.rows
        return means

    @cached_property
    def true(self) -> Array:
        """(O, B) rows that have the label."""
        return self.sum(self.data.true)

    @cached_property
    def predicted(self) -> Array:
        """(O, B) rows that are predicted to have it."""
        return self.sum(self.data.predicted)

    @cached_property
    def both(self) -> Array:
        """(O, B) rows of both."""
        return self.sum(self.data.both)

    @cached_property
    def moments(self) -> Array:
        """(5, B) means of prediction, reference, both squares and the product, of centred ones."""
        return self.mean(self.data.moments)

    @cached_property
    def curves(self) -> Array:
        """(2, O, B) ROC AUC and average precision of each label, of two labels the positive one."""
        return np.array([curve(self.weights) for curve in self.data.curves]).swapaxes(0, 1)


Score: TypeAlias = Callable[[Resamples], Array]


class _Data:
    """The arrays of all rows, in the forms that are summed; each made when it is first used."""

    def __init__(self, arrays: Arrays, losses: Array, positive: int) -> None:
        self.predictions, self.probabilities, self.references = arrays
        self.losses, self.positive = losses, positive
        self.single = self.references.ndim == 1
        self.outputs = self.probabilities.shape[1] if self.probabilities.ndim == 2 else 1

    @cached_property
    def true(self) -> sparse.csr_matrix:
        """(O, N) whether a row has the label."""
        return self._indicator(self.references)

    @cached_property
    def predicted(self) -> sparse.csr_matrix:
        """(O, N) whether it is predicted."""
        return self._indicator(self.predictions)

    @cached_property
    def both(self) -> sparse.csr_matrix:
        """(O, N) true and predicted."""
        return self.true.multiply(self.predicted).tocsr()

    @cached_property
    def curves(self) -> "list[_Curve]":
        columns = one_vs_rest(self.references, self.probabilities, self.positive)
        return [_Curve(truth, probabilities) for truth, probabilities in columns]

    @cached_property
    def ranks(self) -> "tuple[_Ranks, _Ranks]":
        return _Ranks(self.predictions), _Ranks(self.references)

    def _indicator(self, labels: Array) -> sparse.csr_matrix:
        if self.single:
            return group_sums(labels, self.outputs)
        return sparse.csr_matrix(labels.T, dtype=np.float32)

    @cached_property
    def moments(self) -> Array:
        """(5, N)."""
        x, y = (
            v - v.mean() for v in (self.predictions.astype(float), self.references.astype(float))
        )
        return np.stack([x, y, x * x, y * y, x * y])


def group_sums(groups: Array, count: int, values: Array | None = None) -> sparse.csr_matrix:
    """(count, N): times weights, the sums of the values (1) of each group. groups: (N,) ids."""
    data = np.ones(len(groups), np.float32) if values is None else values
    columns = np.arange(len(groups))
    return sparse.csr_matrix((data, (groups, columns)), shape=(count, len(groups)))


def bootstrap_intervals(
    names: Sequence[str],
    arrays: Arrays,
    losses: Array,
    positive: int = 1,
    resamples: int = RESAMPLES,
) -> dict[str, Interval | None]:
    """The interval of each score that is built in; None where it is undefined.

    arrays: of N rows, as metrics read them; losses: (N,). names: "loss" and names of metrics, of
    which others than the built-in ones are left out.
    """
    data, rows = _Data(arrays, losses, positive), len(arrays.references)
    scores = {name: score for name in names if (score := _score_of(name, data)) is not None}
    if rows < 2 or not all(np.isfinite(array).all() for array in (*arrays, losses)):
        return dict.fromkeys(scores)
    found: dict[str, list[Array]] = {name: [] for name in scores}
    wanted = dict.fromkeys(scores, resamples)
    columns = data.outputs if not data.single or data.outputs > 2 else 1
    for name in _SORTED.keys() & scores:
        wanted[name] = int(np.clip(SORTED_ROWS / (rows * columns), LEAST_RESAMPLES, resamples))
    done = 0
    for weights in _weights(rows, resamples):
        chunk = Resamples(data, weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            for name, score in scores.items():
                if done < wanted[name]:
                    found[name].append(score(chunk))
        done += weights.shape[1]
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def _percentiles(scores: Array) -> Interval | None:
    defined = scores[np.isfinite(scores)]
    if len(defined) * 2 <= len(scores):
        return None
    low, high = np.percentile(defined, PERCENTILES)
    return float(f"{low:.{DIGITS}g}"), float(f"{high:.{DIGITS}g}")


def _weights(rows: int, resamples: int) -> Iterator[Array]:
    """(N, B) float32 weights of resamples: multinomial, N draws of N rows.

    Weights that are Poisson distributed are multinomial given their sum. So most draws are made as
    Poisson numbers, by a table, four standard deviations fewer than N on average; the rest, row by
    row. Where more than N came, which happens once in 30,000 times, the resample is drawn again.
    """
    rng = np.random.default_rng(SEED)
    rate = max(0.0, 1 - 4 / np.sqrt(rows))
    table = _poisson_table(rate)
    # Sums of weights, and halves of them, must be exact.
    table = table.astype(np.float32 if rows < 1 << 23 else np.float64)
    size = max(1, min(resamples, 64, CELLS // rows))
    for start in range(0, resamples, size):
        width = min(size, resamples - start)
        weights = table.take(rng.integers(1 << 16, size=(rows, width), dtype=np.uint16))
        missing = rows - np.ones(rows, weights.dtype) @ weights
        one = weights.dtype.type(1)
        for column, number in enumerate(missing.astype(np.int64)):
            while number < 0:
                weights[:, column] = table.take(rng.integers(1 << 16, size=rows, dtype=np.uint16))
                number = rows - int(weights[:, column].sum(dtype=np.float64))
            # Of one type, and contiguous: ten times as quick.
            np.add.at(weights.ravel(), rng.integers(rows, size=number) * width + column, one)
        yield weights


def _poisson_table(rate: float) -> Array:
    """(65,536,) numbers, so that an entry drawn at random is Poisson distributed."""
    numbers = np.arange(20)
    terms = np.cumprod(np.r_[np.exp(-rate), rate / numbers[1:]])
    quantiles = (np.arange(1 << 16) + 0.5) / (1 << 16)
    return np.searchsorted(np.cumsum(terms), quantiles).astype(np.int64)


# ---- Scores of counts


def _ratio(over: Array, under: Array) -> Array:
    """0 / 0 is 0."""
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)


def _counts(r: Resamples, name: str) -> tuple[Array, Array]:
    """The fraction of which f1 and its like are the value: (O, B) above, (O, B) below."""
    if name == "precision":
        return r.both, r.predicted
    if name == "recall":
        return r.both, r.true
    return 2 * r.both, r.true + r.predicted


def _averaged(r: Resamples, name: str, average: str) -> Array:
    over, under = _counts(r, name)
    if average == "micro":
        return _ratio(over.sum(0), under.sum(0))
    values = _ratio(over, under)
    if average == "weighted":
        return _ratio((values * r.true).sum(0), r.true.sum(0))
    return _mean(values)


def _mean(values: Array) -> Array:
    """(O, B) -> (B,)."""
    mean: Array = np.mean(values, axis=0)
    return mean


def _of_positive(r: Resamples, name: str) -> Array:
    over, under = _counts(r, name)
    return _ratio(over[r.data.positive], under[r.data.positive])


def _balanced_accuracy(r: Resamples) -> Array:
    present = r.true > 0
    means: Array = np.where(present, r.both / r.true, 0).sum(0) / present.sum(0)
    return means


def _jaccard_macro(r: Resamples) -> Array:
    return _mean(_ratio(r.both, r.true + r.predicted - r.both))


def _matthews(r: Resamples) -> Array:
    """Gorodkin 2004, as in scikit-learn; 0 where one factor of the root is."""
    n, right = r.rows, r.both.sum(0)
    true, predicted = (n * n - (x * x).sum(0) for x in (r.true, r.predicted))
    return _ratio(n * right - (r.true * r.predicted).sum(0), np.sqrt(true * predicted))


def _kappa(r: Resamples) -> Array:
    chance: Array = (r.true * r.predicted).sum(0) / r.rows**2
    kappa: Array = (r.both.sum(0) / r.rows - chance) / (1 - chance)
    return kappa


# ---- Scores of means


def _ece(r: Resamples, gaps: sparse.csr_matrix) -> Array:
    sums: Array = np.abs(gaps @ r._weights64).sum(0)
    return sums / r.rows


def _pearson(r: Resamples) -> Array:
    x, y, xx, yy, xy = r.moments
    return _correlation(xx - x * x, yy - y * y, xy - x * y)


def _correlation(xx: Array, yy: Array, xy: Array) -> Array:
    """Of central moments; nan where one variance is 0, or near to it by rounding."""
    product = np.maximum(xx, 0) * np.maximum(yy, 0)
    quotient: Array = np.where(product > 0, xy / np.sqrt(product), np.nan)
    return quotient.clip(-1, 1)


def _r2(r: Resamples, squares: Array) -> Array:
    _, y, _, yy, _ = r.moments
    error, variance = r.mean(squares), yy - y * y
    constant = variance <= 1e-12 * np.maximum(yy, np.finfo(float).tiny)
    quotient: Array = np.where(constant, np.where(error == 0, 1.0, 0.0), 1 - error / variance)
    return quotient


# ---- Scores of sorted rows


def _running_sums(weights: Array) -> Array:
    """(M, B) -> (M + 1, B): the sums of the first 0, 1, ..., M rows.

    In blocks, because `np.cumsum` along the first axis takes ten times as long.
    """
    rows, block = len(weights), 64
    sums = np.zeros((-(-rows // block) * block + 1, weights.shape[1]), weights.dtype)
    sums[1 : rows + 1] = weights
    blocks = sums[1:].reshape(-1, block, weights.shape[1])
    for row in range(1, block):
        blocks[:, row] += blocks[:, row - 1]
    blocks[1:] += np.cumsum(blocks[:-1, -1], axis=0)[:, None]
    return sums[: rows + 1]


def _dot(x: Array, y: Array) -> Array:
    """(M, B) and (M, B) -> (B,), in double precision: float32 cannot count all pairs of rows."""
    products: Array = np.einsum("nb,nb->b", x, y, dtype=np.float64)
    return products


class _Curve:
    """The true rows and the others of a label, in the order of its probability."""

    def __init__(self, truth: Array, probabilities: Array) -> None:
        order = np.argsort(probabilities, kind="stable")
        self.true, self.other = order[truth[order]], order[~truth[order]]
        values, others = probabilities[self.true], probabilities[self.other]
        self.first = np.searchsorted(values, values)  # of the true rows with the same value
        self.below, self.upto = (np.searchsorted(others, values, x) for x in ("left", "right"))

    def __call__(self, weights: Array) -> tuple[Array, Array]:
        """(N, B) weights -> (B,) ROC AUC, the share of the pairs of both groups that are in order,
        equal ones half; and (B,) average precision, the sum over thresholds of precision x increase
        of recall, 0 without true rows.
        """
        mine = weights.take(self.true, axis=0)
        true, other = _running_sums(mine), _running_sums(weights.take(self.other, axis=0))
        lower = other.take(self.below, axis=0)
        above, others = true[-1] - true.take(self.first, axis=0), other[-1] - lower
        hits = _dot(mine, above / np.maximum(above + others, 1))
        if (self.below != self.upto).any():
            lower = (lower + other.take(self.upto, axis=0)) / 2
        number = true[-1].astype(np.float64)
        return _dot(mine, lower) / (number * (len(weights) - number)), _ratio(hits, number)


class _Ranks:
    """The ranks of rows by a value, of equal ones the mean rank."""

    def __init__(self, values: Array) -> None:
        _, self.group, sizes = np.unique(values, return_inverse=True, return_counts=True)
        self.order = np.argsort(self.group, kind="stable")
        self.ends = np.r_[0, np.cumsum(sizes)]

    def __call__(self, weights: Array) -> tuple[Array, Array]:
        """(N, B) weights -> (N, B) twice the ranks, 0 on average; (B,) their variance x N."""
        sums = _running_sums(weights.take(self.order, axis=0)).take(self.ends, axis=0)
        ranks = (sums[1:] + sums[:-1] - len(weights)).take(self.group, axis=0)
        sizes = np.diff(sums, axis=0)  # of the groups of equal values
        cubes = np.einsum("gb,gb,gb->b", sizes, sizes, sizes, dtype=np.float64)
        return ranks, (float(len(weights)) ** 3 - cubes) / 3


def _spearman(r: Resamples) -> Array:
    """Pearson correlation of ranks."""
    (x, xx), (y, yy) = (ranks(r.weights) for ranks in r.data.ranks)
    return _correlation(xx, yy, _dot(x * r.weights, y))


# ---- Names


_COUNTED: dict[str, Score] = {
    "balanced_accuracy": _balanced_accuracy,
    "cohen_kappa": _kappa,
    "matthews_correlation": _matthews,
    "jaccard_macro": _jaccard_macro,
    **{name: partial(_of_positive, name=name) for name in ("f1", "precision", "recall")},
    **{
        f"{name}_{average}": partial(_averaged, name=name, average=average)
        for name in ("f1", "precision", "recall")
        for average in ("macro", "micro", "weighted")
    },
    "pearson": _pearson,
}
# name -> the values of rows of which it is the mean
_MEANS: dict[str, Callable[[_Data], Array]] = {
    "loss": lambda data: data.losses,
    "accuracy": lambda data: _all_right(data),
    "log_loss": lambda data: log_losses(data.references, data.probabilities),
    "f1_samples": lambda data: set_overlaps(data.references, data.predictions)[0],
    "jaccard_samples": lambda data: set_overlaps(data.references, data.predictions)[1],
    "mse": lambda data: _errors(data) ** 2,
    "mae": lambda data: np.abs(_errors(data)),
}
_SORTED: dict[str, Score] = {
    "roc_auc": lambda r: _mean(r.curves[0]),
    "average_precision": lambda r: _mean(r.curves[1]),
    "spearman": _spearman,
}


def _score_of(name: str, data: _Data) -> Score | None:
    """None for a score that is not built in."""
    if name in _COUNTED:
        return _COUNTED[name]
    if name in _SORTED:
        return _SORTED[name]
    if name == "ece":
        bins, gaps = calibration_gaps(data.references, data.probabilities)
        return partial(_ece, gaps=group_sums(bins, CALIBRATION_BINS, gaps))
    if name == "r2":
        return partial(_r2, squares=_errors(data) ** 2)
    if name == "rmse":
        squares = _errors(data) ** 2
        return lambda r: np.sqrt(r.mean(squares))
    if top := TOP_K.fullmatch(name):
        values = top_hits(data.references, data.probabilities, int(top[1]))
    elif name in _MEANS:
        values = _MEANS[name](data)
    else:
        return None
    return lambda r: r.mean(values)


def _all_right(data: _Data) -> Array:
    right: Array = data.predictions == data.references
    return right if data.single else np.all(right, axis=1)


def _errors(data: _Data) -> Array:
    errors: Array = data.predictions.astype(np.float64) - data.references
    return errors
