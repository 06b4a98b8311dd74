"""95% intervals of the built-in scores, by the percentile bootstrap over rows.

    bootstrap_intervals(names, arrays, losses, positive=1)    # {"accuracy": (0.89, 0.92), ...}
    resampled_scores(names, [(arrays, losses), ...])    # of several models, for paired differences

RESAMPLES times, N rows are drawn with replacement and the scores computed of them; the interval is
from the 2.5th to the 97.5th percentile (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13). It covers the choice of the rows, not that of the training seed. The seed is
fixed, so that a command gives the same file again.

Nothing is drawn row by row: a resample is the number of times that each row comes, and scores are
computed of many resamples at once, from sums of rows with these weights:

- counts of labels (true, predicted, both) -> accuracy, f1, matthews_correlation, ...
- means of row values -> loss, mse, ece, pearson, ...
- rows in the order of their probability, sorted once -> roc_auc, average_precision, spearman

The counts of all labels are one product of matrices, the means of all scores another. Sums of
sorted rows are made BLOCK groups of rows at a time, in the cache of a core.

Cost on one CPU core, 100,000 rows: 0.6 to 1 s for the usual scores, 1.2 to 2.2 s for all scores of
a task of up to 11 labels, 4 s of 150 labels. Scores that sort rows (roc_auc, average_precision,
spearman) take fewer resamples, down to 100, where rows x labels exceed 300,000. A resample in which
a score is undefined, as roc_auc without a row of a label, does not count; an interval of which half
do not is left out.

Legend: N rows, O outputs, B resamples that are computed at once, G groups of rows. Weights are
(N, B), the number of times that a row comes; scores are (B,).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch.nn.functional import embedding_bag

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
CELLS = 1 << 23  # of the weights that are in memory at a time
BLOCK, STEP = 1024, 32  # rows that are computed at a time, and in one product
DENSE_LABELS = 16  # labels up to which the product with a dense matrix is the quicker one
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

    @cached_property
    def means(self) -> Array:
        """(K, B) of the K columns of `_Data.mean_of`, in double precision, BLOCK rows at a time."""
        columns = self.data.columns
        sums = np.zeros((len(columns), self.weights.shape[1]))
        for start in range(0, self.rows, BLOCK):
            part = slice(start, start + BLOCK)
            sums += columns[:, part] @ self.weights[part].astype(np.float64)
        return sums / self.rows

    @cached_property
    def _counts(self) -> tuple[Array, Array, Array]:
        counts = np.asarray(self.data.indicators @ self.weights, dtype=np.float64)
        true, predicted, both = counts.reshape(3, -1, self.weights.shape[1])
        return true, predicted, both

    @property
    def true(self) -> Array:
        """(O, B) rows that have the label."""
        return self._counts[0]

    @property
    def predicted(self) -> Array:
        """(O, B) rows that are predicted to have it."""
        return self._counts[1]

    @property
    def both(self) -> Array:
        """(O, B) rows of both."""
        return self._counts[2]

    @cached_property
    def curves(self) -> Array:
        """(2, O, B) ROC AUC and average precision of each label, of two labels the positive one."""
        return np.array([curve(self.weights) for curve in self.data.curves]).swapaxes(0, 1)


Score: TypeAlias = Callable[[Resamples], Array]


class _Data:
    """The arrays of all rows, in the forms that are summed; each made when it is first used."""

    def __init__(self, arrays: Arrays, losses: Array, positive: int, names: Sequence[str]) -> None:
        self.predictions, self.probabilities, self.references = arrays
        self.losses, self.positive, self.names = losses, positive, names
        self.single = self.references.ndim == 1
        self.outputs = self.probabilities.shape[1] if self.probabilities.ndim == 2 else 1
        self._columns: list[Array] = []

    def mean_of(self, *values: Array) -> slice:
        """Values of rows, (N,) each, of which `Resamples.means` has the means, and where there."""
        first = len(self._columns)
        self._columns += values
        return slice(first, len(self._columns))

    @cached_property
    def columns(self) -> Array:
        """(K, N) all values given to `mean_of`."""
        return np.array(self._columns, dtype=np.float64)

    @cached_property
    def indicators(self) -> Any:
        """(3 x O, N) 0/1: whether a row has each label, is predicted to have it, and both.

        Of few labels a dense matrix, whose product is the quicker one, else a sparse matrix.
        """
        true, predicted = self._indicator(self.references), self._indicator(self.predictions)
        stacked = sparse.vstack([true, predicted, true.multiply(predicted)]).tocsr()
        return stacked.toarray() if self.outputs <= DENSE_LABELS else stacked

    @cached_property
    def curves(self) -> "list[_Curve]":
        columns = one_vs_rest(self.references, self.probabilities, self.positive)
        precise = "average_precision" in self.names
        return [_Curve(truth, probabilities, precise) for truth, probabilities in columns]

    @cached_property
    def ranks(self) -> "_RankPairs":
        return _RankPairs(self.predictions, self.references)

    def _indicator(self, labels: Array) -> sparse.csr_matrix:
        """(O, N)."""
        if not self.single:
            return sparse.csr_matrix(labels.T, dtype=np.float32)
        ones, columns = np.ones(len(labels), np.float32), np.arange(len(labels))
        return sparse.csr_matrix((ones, (labels, columns)), shape=(self.outputs, len(labels)))


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
    (scores,) = resampled_scores(names, [(arrays, losses)], positive, resamples)
    return {name: percentile_interval(values) for name, values in scores.items()}


def resampled_scores(
    names: Sequence[str],
    samples: Sequence[tuple[Arrays, Array]],
    positive: int = 1,
    resamples: int = RESAMPLES,
) -> list[dict[str, Array]]:
    """Of each sample the scores of each resample, {name: (B,)}; (0,) where they are undefined.

    samples: arrays and losses as in `bootstrap_intervals`, of the same rows, such as the answers of
    several models. A resample draws the same rows of all samples: differences are paired.
    """
    rows = len(samples[0][1])
    found: list[dict[str, list[Array]]] = []
    scored = []  # data, score by name, and number of resamples by name
    for arrays, losses in samples:
        assert len(losses) == rows, "samples of the same rows"
        data = _Data(arrays, losses, positive, names)
        scores = {name: score for name in names if (score := _score_of(name, data)) is not None}
        found.append({name: [np.zeros(0)] for name in scores})
        if rows < 2 or not all(np.isfinite(array).all() for array in (*arrays, losses)):
            scores = {}
        wanted = dict.fromkeys(scores, resamples)
        columns = data.outputs if not data.single or data.outputs > 2 else 1
        for name in _SORTED.keys() & scores:
            wanted[name] = int(np.clip(SORTED_ROWS / (rows * columns), LEAST_RESAMPLES, resamples))
        scored.append((data, scores, wanted))
    done = 0
    for weights in _weights(rows, resamples) if any(scores for _, scores, _ in scored) else ():
        for (data, scores, wanted), values in zip(scored, found, strict=True):
            chunk = Resamples(data, weights)
            with np.errstate(divide="ignore", invalid="ignore"):
                for name, score in scores.items():
                    if done < wanted[name]:
                        values[name].append(score(chunk))
        done += weights.shape[1]
    return [{name: np.concatenate(parts) for name, parts in values.items()} for values in found]


def exact_scores(
    names: Sequence[str], arrays: Arrays, losses: Array, positive: int = 1
) -> dict[str, float]:
    """The scores of the rows themselves, by the same arithmetic; nan where they are undefined."""
    data = _Data(arrays, losses, positive, names)
    scores = {name: score for name in names if (score := _score_of(name, data)) is not None}
    if not len(losses) or not all(np.isfinite(array).all() for array in (*arrays, losses)):
        return dict.fromkeys(scores, float("nan"))
    once = Resamples(data, np.ones((len(losses), 1), np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(score(once)[0]) for name, score in scores.items()}


def percentile_interval(scores: Array) -> Interval | None:
    """From the 2.5th to the 97.5th percentile; None where half of the scores, or all, are not
    numbers.
    """
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
    # Sums of weights, and halves of them, must be exact.
    table = _poisson_pairs(rate).astype(np.complex64 if rows < 1 << 23 else np.complex128)
    size = max(1, min(resamples, 64, CELLS // rows))
    for start in range(0, resamples, size):
        width = min(size, resamples - start)
        weights = _draw(rng, table, rows * width).reshape(rows, width)
        missing = rows - np.ones(rows, weights.dtype) @ weights
        one = weights.dtype.type(1)
        for column, number in enumerate(missing.astype(np.int64)):
            while number < 0:
                weights[:, column] = drawn = _draw(rng, table, rows)
                number = rows - int(drawn.sum(dtype=np.float64))
            # Of one type, and contiguous: ten times as quick.
            np.add.at(weights.ravel(), rng.integers(rows, size=number) * width + column, one)
        yield weights


def _draw(rng: np.random.Generator, table: Array, count: int) -> Array:
    """(count,) real and imaginary parts of random entries of the table of 65,536.

    In parts that stay in the cache of a core.
    """
    pairs = np.empty(-(-count // 2), table.dtype)
    for start in range(0, len(pairs), 1 << 13):
        part = pairs[start : start + (1 << 13)]
        numbers = rng.integers(1 << 16, size=len(part), dtype=np.uint16)
        table.take(numbers, out=part, mode="clip")
    return pairs.view(pairs.real.dtype)[:count]


def _poisson_pairs(rate: float) -> Array:
    """(65,536,) complex: both parts of an entry drawn at random are Poisson distributed,
    independently of each other, but for steps of 1 / 65,536: variances are right to one thousandth,
    and the parts correlate by less than that.
    """
    numbers = np.arange(20)
    terms = np.cumprod(np.r_[np.exp(-rate), rate / numbers[1:]])
    quantiles = (np.arange(1 << 16) + 0.5) / (1 << 16)
    pairs = np.searchsorted(np.cumsum(np.outer(terms, terms)), quantiles)
    first, second = np.divmod(pairs, len(numbers))
    table: Array = first + 1j * second
    return table


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


def _ece(r: Resamples, gaps: slice) -> Array:
    return np.asarray(np.abs(r.means[gaps]).sum(0))


def _pearson(r: Resamples, moments: slice) -> Array:
    x, y, xx, yy, xy = r.means[moments]
    return _correlation(xx - x * x, yy - y * y, xy - x * y)


def _correlation(xx: Array, yy: Array, xy: Array) -> Array:
    """Of central moments; nan where one variance is 0, or near to it by rounding."""
    product = np.maximum(xx, 0) * np.maximum(yy, 0)
    quotient: Array = np.where(product > 0, xy / np.sqrt(product), np.nan)
    return quotient.clip(-1, 1)


def _r2(r: Resamples, columns: slice) -> Array:
    error, y, yy = r.means[columns]
    variance = yy - y * y
    constant = variance <= 1e-12 * np.maximum(yy, np.finfo(float).tiny)
    quotient: Array = np.where(constant, np.where(error == 0, 1.0, 0.0), 1 - error / variance)
    return quotient


# ---- Scores of sorted rows


class _Groups:
    """Groups of rows in an order, whose weights are summed, and the sums of all groups up to each.

    Everything is done BLOCK groups at a time, which stay in the cache of a core.
    """

    def __init__(self, rows: Array, starts: Array) -> None:
        """rows: indices of rows, group after group; starts: (G,) where in them each group starts.

        Empty groups are added, so that their number is a multiple of STEP.
        """
        starts = np.r_[starts, np.full(-len(starts) % STEP, len(rows))].astype(np.int64)
        bounds = [*starts[::BLOCK], len(rows)]
        self.number = len(starts)
        self._blocks = [
            (
                torch.from_numpy(rows[bounds[i] : bounds[i + 1]]),
                torch.from_numpy(starts[i * BLOCK : (i + 1) * BLOCK] - bounds[i]),
            )
            for i in range(len(bounds) - 1)
        ]

    def sums(self, weights: Array) -> Iterator[tuple[slice, Array]]:
        """Of each block: which groups, and (G, B) their sums."""
        tensor, first = torch.from_numpy(weights), 0
        for rows, starts in self._blocks:
            part = slice(first, first + len(starts))
            sums: Array = embedding_bag(rows, tensor, starts, mode="sum").numpy()
            yield part, sums
            first = part.stop

    def running_sums(self, weights: Array) -> Iterator[tuple[slice, Array, Array]]:
        """Also (G, B) the sum of all groups up to and with each.

        By products with a triangle of ones, which takes a sixth of the time of `np.cumsum`; exact,
        because these are whole numbers.
        """
        triangle = np.tril(np.ones((STEP, STEP), weights.dtype))
        before = np.zeros(weights.shape[1], weights.dtype)
        for part, sums in self.sums(weights):
            running = np.matmul(triangle, sums.reshape(-1, STEP, sums.shape[1]))
            ends = before + np.cumsum(running[:, -1], axis=0)
            running[0] += before
            running[1:] += ends[:-1, None]
            before = ends[-1]
            yield part, sums, running.reshape(sums.shape)


def _padded(indices: Array) -> Array:
    """With zeros for the empty groups of `_Groups`."""
    padded: Array = np.r_[indices, np.zeros(-len(indices) % STEP, indices.dtype)]
    return padded


def _dot(x: Array, y: Array) -> Array:
    """(G, B) and (G, B) -> (B,): of STEP groups in the precision of x, the rest in double."""
    shape = (-1, STEP, x.shape[1])
    parts: Array = np.einsum("snb,snb->sb", x.reshape(shape), y.reshape(shape))
    return np.asarray(parts.sum(0, dtype=np.float64))


class _Curve:
    """The true rows and the others of a label, in the order of its probability.

    Others between which no true row stands are one group, and so are true rows of the same others.
    """

    def __init__(self, truth: Array, probabilities: Array, precise: bool) -> None:
        """precise: whether average precision is asked for."""
        order = np.argsort(probabilities)
        values, true = probabilities[order], truth[order]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])  # of equal probabilities
        sizes = np.diff(np.r_[starts, len(order)])
        others = np.r_[0, np.cumsum(~true)]  # among the first 0, 1, ..., N rows
        # For each true row: the number of others below it, and of those not above it
        below = np.repeat(others[starts], sizes)[true]
        upto = np.repeat(others[starts + sizes], sizes)[true]
        cuts = np.unique(np.r_[below, upto])
        self.others = _Groups(order[~true][: cuts.max(initial=0)], np.r_[0, cuts[:-1]])
        lower, upper = np.searchsorted(cuts, below), np.searchsorted(cuts, upto)
        first = np.flatnonzero(np.diff(lower, prepend=-1) | np.diff(upper, prepend=-1))
        self.true, self.ties = _Groups(order[true], first), (below != upto).any()
        self.lower, self.upper = _padded(lower[first]), _padded(upper[first])
        self.precise = precise
        if precise:  # from the highest probability on, equal ones together
            down = values[true][::-1]
            first = np.flatnonzero(np.r_[down[:1] == down[:1], down[1:] != down[:-1]])
            self.thresholds = _Groups(order[true][::-1].copy(), first)
            self.below = _padded(lower[::-1][first])

    def __call__(self, weights: Array) -> tuple[Array, Array]:
        """(N, B) weights -> (B,) ROC AUC, the share of the pairs of both groups that are in order,
        equal ones half; and (B,) average precision, the sum over thresholds of precision x increase
        of recall, 0 without true rows.
        """
        width = weights.shape[1]
        others = np.empty((self.others.number, width), weights.dtype)
        for part, _, running in self.others.running_sums(weights):
            others[part] = running
        ordered, positives, precisions = np.zeros((3, width))
        for part, true in self.true.sums(weights):
            lower = others.take(self.lower[part], axis=0)
            if self.ties:
                lower = (lower + others.take(self.upper[part], axis=0)) / 2
            ordered += _dot(true, lower)
            positives += true.sum(0)
        negatives = len(weights) - positives
        if self.precise:
            # Those that are not below; instead of 0 what vanishes in all other sums
            above = negatives.astype(weights.dtype) - others + weights.dtype.type(1e-30)
            for part, true, running in self.thresholds.running_sums(weights):
                chosen = above.take(self.below[part], axis=0)
                chosen += running
                precisions += _dot(true, np.divide(running, chosen, out=running))
        return ordered / (positives * negatives), _ratio(precisions, positives)


class _RankPairs:
    """Rows in the order of two values; equal values have their mean rank."""

    def __init__(self, x: Array, y: Array) -> None:
        groups, self._of_value = [], []
        for values in (x, y):
            _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
            starts = np.r_[0, np.cumsum(sizes)[:-1]]
            self._of_value.append(_Groups(np.argsort(group, kind="stable"), starts))
            groups.append(group)
        # Rows of which both are equal are summed as one group.
        order = np.lexsort(groups[::-1])
        x, y = groups[0][order], groups[1][order]
        first = np.flatnonzero(np.diff(x, prepend=-1) | np.diff(y, prepend=-1))
        self._pairs = _Groups(order, first)
        self._x, self._y = _padded(x[first]), _padded(y[first])

    def __call__(self, weights: Array) -> Array:
        """(N, B) weights -> (B,) Pearson correlation of ranks."""
        (x, xx), (y, yy) = (self._ranks(groups, weights) for groups in self._of_value)
        product = np.zeros(weights.shape[1])
        for part, sums in self._pairs.sums(weights):
            sums *= x.take(self._x[part], axis=0)
            product += _dot(sums, y.take(self._y[part], axis=0))
        return _correlation(xx, yy, product)

    @staticmethod
    def _ranks(groups: _Groups, weights: Array) -> tuple[Array, Array]:
        """(G, B) twice the ranks, 0 on average; (B,) the sum of their squares over rows."""
        rows = len(weights)
        ranks = np.empty((groups.number, weights.shape[1]), weights.dtype)
        cubes = np.zeros(weights.shape[1])
        for part, sums, running in groups.running_sums(weights):
            running *= 2
            running -= sums
            np.subtract(running, rows, out=ranks[part])
            cubes += _dot(sums * sums, sums)
        return ranks, (float(rows) ** 3 - cubes) / 3


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
}
# name -> the values of rows of which it is the mean
_MEANS: dict[str, Callable[[_Data], Array]] = {
    "loss": lambda data: data.losses,
    "accuracy": lambda data: _all_right(data),
    "log_loss": lambda data: log_losses(data.references, data.probabilities),
    "f1_samples": lambda data: set_overlaps(data.references, data.predictions)[0],
    "jaccard_samples": lambda data: set_overlaps(data.references, data.predictions)[1],
    "mse": lambda data: _errors(data) ** 2,
    "rmse": lambda data: _errors(data) ** 2,
    "mae": lambda data: np.abs(_errors(data)),
}
_SORTED: dict[str, Score] = {
    "roc_auc": lambda r: _mean(r.curves[0]),
    "average_precision": lambda r: _mean(r.curves[1]),
    "spearman": lambda r: r.data.ranks(r.weights),
}


def _score_of(name: str, data: _Data) -> Score | None:
    """None for a score that is not built in."""
    if name in _COUNTED:
        return _COUNTED[name]
    if name in _SORTED:
        return _SORTED[name]
    if name == "ece":
        bins, gaps = calibration_gaps(data.references, data.probabilities)
        of_bins = np.zeros((CALIBRATION_BINS, len(gaps)))
        of_bins[bins, np.arange(len(gaps))] = gaps
        return partial(_ece, gaps=data.mean_of(*of_bins))
    if name in ("pearson", "r2"):
        x, y = (v.astype(float) - v.mean() for v in (data.predictions, data.references))
        if name == "pearson":
            return partial(_pearson, moments=data.mean_of(x, y, x * x, y * y, x * y))
        return partial(_r2, columns=data.mean_of(_errors(data) ** 2, y, y * y))
    if top := TOP_K.fullmatch(name):
        values = top_hits(data.references, data.probabilities, int(top[1]))
    elif name in _MEANS:
        values = _MEANS[name](data)
    else:
        return None
    column = data.mean_of(values).start
    return lambda r: np.sqrt(r.means[column]) if name == "rmse" else r.means[column]


def _all_right(data: _Data) -> Array:
    right: Array = data.predictions == data.references
    return right if data.single else np.all(right, axis=1)


def _errors(data: _Data) -> Array:
    errors: Array = data.predictions.astype(np.float64) - data.references
    return errors
