"""Scores: what the ranks gathered, as whole arrays on rank 0, goes in; named numbers come out.

One module, because `import evaluate` costs more than all our other imports together: whoever needs a score imports this lazily.
Each score is an `evaluate.Metric` built from one line of a table, with scikit-learn and scipy inside: no script is downloaded, no
network, file or lock is used. `evaluate.load("accuracy")` is never called: it runs ./accuracy/accuracy.py of the current folder.

What the names mean
- macro is the mean over all labels of the model, weighted the mean weighted by rows, micro counts all decisions together. A label
  that is absent from the rows counts, and 0 / 0 is 0 (scikit-learn's `labels=range(n), zero_division=0`).
- f1, precision, recall are those of the second of two labels. accuracy of a multi-label row: all its labels are right.
- f1_samples and jaccard_samples are means over rows; a row with neither truth nor prediction counts 0 in the first (0 / 0 is 0, as
  above) and 1 in the second (nothing was to be found, and nothing was).
- matthews_correlation is 0 where all predictions are one label, as in scikit-learn and GLUE.
- roc_auc: two labels: of P(second label); more, or multi-label: mean over labels of label against rest. A label with no row, or
  with all rows, has no curve, and then the mean is nan: a mean over fewer labels would be another score.
- pearson and spearman of constant values are nan; so is everything that reads a probability or a number that is not finite.

Cost, one CPU core: accuracy and f1_macro of 1,000,000 rows x 2 labels 0.2 s, and roc_auc 0.4 s more; of 100,000 x 150 labels
0.03 s and 3.3 s; multi-label 100,000 x 150 1.6 s for its four usual scores (twice that on a machine with other work). Through
evaluate's Arrow table the same arrays cost 1.6 s a score, and 10 s and 1.2 GB a score for multi-label: see `Score.compute`.

Shapes: n rows, k labels. Single-label: predictions (n,) and references (n,) are label numbers, probabilities (n, k).
Multi-label: predictions and references (n, k) of 0 and 1, probabilities (n, k). Regression: predictions and references (n,) floats.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from scipy import stats
from sklearn import metrics

from bertdist.core.errors import ConfigError, DataError, did_you_mean
from bertdist.core.types import Array

NAN = float("nan")

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)

LOWER_IS_BETTER = frozenset(
    {"loss", "mse", "mae"}
)  # of all other scores, and of a user's own, more is better


def _matthews(truth: Array, answers: Array) -> float:
    # scikit-learn says 0.0 as well, with a warning where truth is that one label too
    return (
        0.0 if (answers == answers[0]).all() else float(metrics.matthews_corrcoef(truth, answers))
    )


def _roc_auc(truth: Array, probabilities: Array) -> float:
    # Label by label, because roc_auc_score(multi_class="ovr") refuses rows whose sum is not 1 to 1e-5: those of half precision.
    labels = probabilities.shape[1]
    columns = [truth == label for label in range(labels)] if truth.ndim == 1 else list(truth.T)
    asked = [1] if truth.ndim == 1 and labels == 2 else range(labels)
    if any((columns[label] == columns[label][0]).all() for label in asked):
        return NAN
    return float(
        np.mean([metrics.roc_auc_score(columns[label], probabilities[:, label]) for label in asked])
    )


def _correlation(function: Callable[..., Any]) -> Callable[[Array, Array], float]:
    def correlation(truth: Array, answers: Array) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", stats.DegenerateDataWarning
            )  # constant, or so near to it that no digit is right
            try:
                return float(function(truth, answers).statistic) if len(truth) > 1 else NAN
            except stats.DegenerateDataWarning:
                return NAN

    return correlation


@dataclass(frozen=True)
class _Kind:
    source: str
    function: Callable[..., Any]  # (references, what it reads) -> float
    fits: tuple[str, ...]
    average: str | None = None  # given to `function`, with `labels` and `zero_division`
    zero: float = 0.0  # what 0 / 0 is
    binary: bool = False  # of the second of two labels
    reads: str = "predictions"


_F1_LIKE = {
    "f1": metrics.f1_score,
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
}

_SCORES: dict[str, _Kind] = {
    "accuracy": _Kind("sklearn.metrics.accuracy_score", metrics.accuracy_score, (SINGLE, MULTI)),
    **{
        name: _Kind(f"sklearn.metrics.{name}_score", function, (SINGLE,), "macro", binary=True)
        for name, function in _F1_LIKE.items()
    },
    **{
        f"{name}_{average}": _Kind(
            f"sklearn.metrics.{name}_score", function, (SINGLE, MULTI), average
        )
        for name, function in _F1_LIKE.items()
        for average in ("macro", "micro", "weighted")
    },
    "f1_samples": _Kind("sklearn.metrics.f1_score", metrics.f1_score, (MULTI,), "samples"),
    "matthews_correlation": _Kind("sklearn.metrics.matthews_corrcoef", _matthews, (SINGLE,)),
    "roc_auc": _Kind(
        "sklearn.metrics.roc_auc_score", _roc_auc, (SINGLE, MULTI), reads="probabilities"
    ),
    "jaccard_samples": _Kind(
        "sklearn.metrics.jaccard_score", metrics.jaccard_score, (MULTI,), "samples", zero=1.0
    ),
    "jaccard_macro": _Kind(
        "sklearn.metrics.jaccard_score", metrics.jaccard_score, (MULTI,), "macro"
    ),
    "pearson": _Kind("scipy.stats.pearsonr", _correlation(stats.pearsonr), (REGRESSION,)),
    "spearman": _Kind("scipy.stats.spearmanr", _correlation(stats.spearmanr), (REGRESSION,)),
    "mse": _Kind("sklearn.metrics.mean_squared_error", metrics.mean_squared_error, (REGRESSION,)),
    "mae": _Kind("sklearn.metrics.mean_absolute_error", metrics.mean_absolute_error, (REGRESSION,)),
}

_PAGES = {
    "sklearn": "https://scikit-learn.org/stable/modules/generated",
    "scipy": "https://docs.scipy.org/doc/scipy/reference/generated",
}

_CITATION = (
    "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, pp. 2825-2830, 2011."
)


class Score(evaluate.Metric):  # type: ignore[misc]
    """One line of the table as an `evaluate.Metric`, in memory and in one process; `.info` has its features and its source."""

    def __init__(self, name: str, problem_type: str, labels: int) -> None:
        self.kind, self.problem_type, self.labels = _SCORES[name], problem_type, labels
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        answer = Value("float64" if self.problem_type == REGRESSION else "int64")
        truth = List(answer) if self.problem_type == MULTI else answer
        given = List(Value("float64")) if self.kind.reads == "probabilities" else truth
        return evaluate.MetricInfo(
            description=f"{self.config_name} of {self.problem_type}, by {self.kind.source}. What the names mean: bertdist.scores.",
            citation=_CITATION,
            inputs_description=f"{self.kind.reads}, references: one entry a row.",
            features=Features({self.kind.reads: given, "references": truth}),
            reference_urls=[f"{_PAGES[self.kind.source.split('.')[0]]}/{self.kind.source}.html"],
        )

    def _build_data_dir(self) -> str:
        """None: evaluate 0.4.6 makes a folder in the user's cache even for keep_in_memory=True."""
        return ""

    def compute(
        self, *, predictions: Any = None, references: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """Whole arrays go straight to `_compute`, with no copy; lists, and rows from `add` or `add_batch`, go evaluate's way.

        evaluate writes every row into an Arrow table and reads it back: 1.6 s for 1,000,000 rows whose accuracy takes 0.05 s.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        arrays = {name: given.get(name) for name in self.features}
        if self.writer is None and all(isinstance(array, np.ndarray) for array in arrays.values()):
            return self._compute(**arrays)
        return dict(super().compute(**given))

    def _compute(self, **inputs: Any) -> dict[str, float]:
        kind, options = self.kind, {}
        truth, answers = (np.asarray(inputs[name]) for name in ("references", kind.reads))
        assert len(truth) == len(answers), (len(truth), len(answers))
        if not np.isfinite(answers).all() or not np.isfinite(truth).all():
            return {self.config_name: NAN}
        truth, answers = (
            _shaped(truth),
            _shaped(answers) if kind.reads == "predictions" else answers,
        )
        if kind.average:
            options = {
                "labels": [1] if kind.binary else range(self.labels),
                "average": kind.average,
                "zero_division": kind.zero,
            }
        return {self.config_name: float(kind.function(truth, answers, **options))}


def _shaped(answers: Array) -> Array:
    """Numbers become float64. (n, k) becomes int8, a third of the time of int64; (n, 1) becomes (n, 2) with zeros that
    `labels=range(1)` leaves out, because scikit-learn reads one column as two classes."""
    if answers.ndim == 1:
        return answers.astype(np.float64) if answers.dtype.kind == "f" else answers
    return np.pad(answers.astype(np.int8), ((0, 0), (0, answers.shape[1] == 1)))


class MetricSet:
    """The scores of a run; `compute` may be called any number of times."""

    def __init__(self, opened: dict[str, Any], problem_type: str, labels: int) -> None:
        self.names: tuple[str, ...] = tuple(opened)
        self._opened, self._problem_type, self._labels = opened, problem_type, labels

    def compute(
        self, predictions: Array, probabilities: Array, references: Array
    ) -> dict[str, float]:
        """Arrays of all rows (shapes: top of the module; regression reads no probabilities) -> {name: float}, in the order of the names.

        A user's metric gives its own keys; one that is taken, as loss is, gets the metric's name in front. The first key is that of
        the main score. An undefined value is nan. Raises DataError without rows, ConfigError where a user's metric fails.
        """
        _check(predictions, references, None if self._problem_type == REGRESSION else self._labels)
        given = {
            "predictions": predictions,
            "probabilities": probabilities,
            "references": references,
        }
        result: dict[str, float] = {}
        for name, metric in self._opened.items():
            inputs = {feature: given[feature] for feature in _inputs(metric)}
            if isinstance(metric, Score):
                result |= metric.compute(**inputs)
                continue
            try:
                own = {str(key): float(value) for key, value in metric.compute(**inputs).items()}
            except Exception as error:
                raise ConfigError(
                    f"--metrics {name}: failed on {len(references)} rows: {_said(error)}"
                ) from error
            taken = {"loss", *self.names, *result}
            result |= {
                f"{metric.name}_{key}" if key in taken else key: value for key, value in own.items()
            }
        return result


def default_metrics(problem_type: str, labels: int) -> list[str]:
    """The usual scores of a task, the main one first. They are the same for any number of labels, so far."""
    usual = {
        SINGLE: "accuracy f1_macro",
        MULTI: "f1_micro f1_macro accuracy jaccard_samples",
        REGRESSION: "pearson spearman",
    }
    return usual[problem_type].split()


def load_metrics(names: Sequence[str], problem_type: str, labels: Sequence[str]) -> MetricSet:
    """Names of the table, paths of a user's own evaluate metric (./mine.py, or ./mine/ with mine.py inside), or hub:NAME -> Scores.

    A metric of a user's own may read `predictions`, `probabilities` and `references`. It runs in this process, with seed 0.
    Raises ConfigError, with one line for each name that is unknown, does not fit the task or cannot be loaded.
    """
    opened: dict[str, Any] = {}
    problems = [] if names else ["--metrics names no score."]
    for name in dict.fromkeys(names):
        try:
            opened[name] = _open(name, problem_type, len(labels))
        except ConfigError as error:
            problems.append(f"--metrics {name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return MetricSet(opened, problem_type, len(labels))


def classification_report(
    predictions: Array, references: Array, labels: Sequence[str]
) -> dict[str, Any]:
    """Label by label, JSON-able: {"labels", "per_class": [{"label", "precision", "recall", "f1", "rows"}], "confusion"}.

    confusion[i][j] counts rows of label i that were answered j; multi-label tasks have none. rows is how many rows have the label;
    0 / 0 is 0. Source: https://scikit-learn.org/stable/modules/generated/sklearn.metrics.precision_recall_fscore_support.html
    """
    _check(predictions, references, len(labels))
    truth, answers, ids = _shaped(references), _shaped(predictions), range(len(labels))
    numbers = metrics.precision_recall_fscore_support(
        truth, answers, labels=ids, average=None, zero_division=0.0
    )
    keys = ("label", "precision", "recall", "f1", "rows")
    rows = zip(labels, *(number.tolist() for number in numbers), strict=True)
    table: dict[str, Any] = {
        "labels": list(labels),
        "per_class": [dict(zip(keys, row, strict=True)) for row in rows],
    }
    if references.ndim == 1:
        table["confusion"] = metrics.confusion_matrix(truth, answers, labels=ids).tolist()
    return table


def _check(predictions: Array, references: Array, labels: int | None) -> None:
    if len(references) == 0:
        raise DataError("There are no rows to score: the split is empty.")
    assert predictions.shape == references.shape, (predictions.shape, references.shape)
    if labels is not None:  # None for numbers
        assert references.shape[1:] in ((), (labels,)), (references.shape, labels)
        top = labels if references.ndim == 1 else 2
        assert all(array.min() >= 0 and array.max() < top for array in (predictions, references)), (
            f"an answer is not in 0..{top - 1}"
        )


def _inputs(metric: Any) -> list[str]:
    """The names of what a metric reads; evaluate allows a list of alternative features, all of the same names."""
    return list(metric.features[0] if isinstance(metric.features, list) else metric.features)


def _open(name: str, problem_type: str, labels: int) -> Any:
    if name.startswith("hub:"):
        return _load(_hub_path(name.removeprefix("hub:")))
    if "/" in name or name.endswith(".py"):
        path = Path(os.path.abspath(Path(name).expanduser()))
        script = path if path.suffix == ".py" else path / f"{path.name}.py"
        if not script.is_file():
            raise ConfigError(f"there is no file {script}.")
        return _load(str(script))
    fitting = [
        known
        for known, kind in _SCORES.items()
        if problem_type in kind.fits and (labels == 2 or not kind.binary)
    ]
    if name in fitting:
        return Score(name, problem_type, labels)
    if name not in _SCORES:
        own = f" Your own metric in this folder is written ./{name}." if Path(name).exists() else ""
        raise ConfigError(f"unknown score.{did_you_mean(name, fitting)}{own}")
    two = " with two labels" if _SCORES[name].binary else ""
    wanted = [known for known in fitting if known.startswith(f"{name}_")] or fitting
    here = (
        f"{problem_type} with {labels} labels"
        if two and problem_type != REGRESSION
        else problem_type
    )
    raise ConfigError(
        f"is for {' and '.join(_SCORES[name].fits)}{two}; this task is {here}, which has {', '.join(wanted)}."
    )


def _hub_path(name: str) -> str:
    """What makes evaluate ask the hub. It looks in the current folder first, so a file that stands there in the way is an error."""
    path = name if "/" in name else f"evaluate-metric/{name}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.py)", path):
        raise ConfigError("expected hub:NAME or hub:OWNER/NAME.")
    if (in_the_way := Path(path, Path(path).name + ".py")).exists():
        raise ConfigError(f"./{in_the_way} stands in the way; for that file write ./{in_the_way}.")
    return path


def _load(path: str) -> Any:
    """`path` is an absolute path of a script, or a hub path that names nothing here. Runs the script, copied into HF_MODULES_CACHE."""
    try:
        metric = evaluate.load(path, module_type="metric", keep_in_memory=True, seed=0)
        unknown = [
            name
            for name in _inputs(metric)
            if name not in ("predictions", "probabilities", "references")
        ]
    except Exception as error:
        wrong_class = isinstance(
            error, NotImplementedError | TypeError
        )  # evaluate takes the file's first, an imported one too, or None
        expected = " Expected `import evaluate`, not `from evaluate import Metric`, and one `class Name(evaluate.Metric)`."
        raise ConfigError(
            f"cannot be loaded: {_said(error)}.{expected if wrong_class else ''}"
        ) from error
    if unknown:
        raise ConfigError(
            f"reads {', '.join(unknown)}; a metric here may read predictions, probabilities and references."
        )
    return metric


def _said(error: Exception) -> str:
    """One line of an error, 300 characters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(" .:")
