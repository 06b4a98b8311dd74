"""Metrics: arrays of all rows -> named scores, with scikit-learn and scipy inside.

    metrics = load_metrics(default_metrics(problem_type), problem_type, labels)
    metrics.compute(predictions, probabilities, references)  # {"accuracy": 0.91, "f1_macro": 0.9}

Intervals of the same scores: tasks/confidence_intervals.py.

Import it on rank 0 only, and only when scores are needed: `evaluate` takes longer to import than
all our other imports together. Each built-in metric is an `evaluate.Metric` made from one line of a
table: no script is downloaded, no network, file or lock is used. `evaluate.load("accuracy")` is
never called: it runs ./accuracy/accuracy.py of the current folder.

What the names mean
- macro is the mean over all labels of the model, weighted the mean weighted by rows, micro counts
  all decisions together. A label that is absent from the rows counts, and 0 / 0 is 0
  (scikit-learn's `labels=range(O), zero_division=0`).
- f1, precision, recall are those of the positive one of two labels: the second, unless
  --positive_label names the first. accuracy of a multi-label row: all its labels are right.
- balanced_accuracy is the mean recall of the labels that have rows (scikit-learn's rule).
- top_3_accuracy, with any number below that of the labels: the true label is among the three most
  probable ones.
- f1_samples and jaccard_samples are means over rows; a row with neither true nor predicted labels
  counts 0 in the first (0 / 0 is 0, as above) and 1 in the second (nothing was to be found, and
  nothing was).
- matthews_correlation is 0 where all predictions are one label, as in scikit-learn and GLUE.
- roc_auc and average_precision: of two labels, those of P(positive label), where roc_auc is the
  same for either; of more, or multi-label, the mean over labels of label against rest. A label with
  no row, or with all rows, has no curve, and then roc_auc is nan: a mean over fewer labels would be
  another score. average_precision of a label without rows is 0, as in scikit-learn.
- log_loss is the mean of -ln P(true label), P at least the smallest step of its number type (1.2e-7
  for float32); of a multi-label row the mean over labels of the binary log loss. `loss` is the same
  from logits, without that bound.
- ece, the expected calibration error: rows in 15 bins of equal width by the probability of the
  predicted label; the sum over bins of (rows of the bin / rows) x |accuracy - mean probability|.
  Naeini et al. 2015; Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
- cohen_kappa is nan where all rows have, and are given, one label; pearson and spearman of constant
  values are nan, and so are r2 of one row and every score of a number that is not finite. r2 of
  equal labels is 1 if all are right, else 0.

Cost, one CPU core: accuracy and f1_macro of 1,000,000 rows x 2 labels 0.2 s, and roc_auc 0.4 s
more; of 100,000 x 150 labels 0.03 s and 3.3 s; multi-label 100,000 x 150 1.6 s for its four default
scores (twice that on a busy machine). Through evaluate's Arrow table the same arrays cost 1.6 s per
score, and 10 s and 1.2 GB per score for multi-label: see `BuiltinMetric.compute`.

A new metric touches four places:
1. tasks/metrics.py: one entry in `_METRICS`, which --metrics and its messages know it by; the
   function is scikit-learn's or scipy's, or one above the table where theirs warns or raises. Its
   name also goes into LOWER_IS_BETTER (of tasks/metric_names.py), `UNDEFINED` (when it is nan) and
   `OF_POSITIVE` (it depends on --positive_label), where they hold. A mean over rows: its rows in
   tasks/row_scores.py.
2. tasks/confidence_intervals.py: the score of many resamples at once, one entry in `_COUNTED` (from
   counts or sums), `_MEANS` (a mean over rows) or `_SORTED` (rows must be sorted). Without one
   tests/unit/tasks/test_confidence_intervals.py fails, which compares it with step 1.
3. tests/unit/tasks/test_metrics_sklearn.py: the expected value, of an independent computation.
4. docs/guides/imbalance.md: the table of `--metrics`. What its name means: the list above.

Legend: N rows, O outputs. Single-label: predictions (N,) and references (N,) are label ids,
probabilities (N, O). Multi-label: predictions and references (N, O) of 0 and 1, probabilities (N,
O). Regression: predictions and references (N,) floats.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from scipy import sparse, stats
from sklearn import metrics

from bertdist.core.errors import ConfigError, DataError, did_you_mean, listed
from bertdist.core.terminal import excerpt_of
from bertdist.core.types import Array
from bertdist.tasks.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelIndex
from bertdist.tasks.metric_names import TOP_K, unknown_metric
from bertdist.tasks.row_scores import calibration_gaps, log_losses, one_vs_rest, top_hits

NAN = float("nan")
# When a score of the table is not a number
UNDEFINED = {
    "roc_auc": "a label has no row, or has all rows",
    "cohen_kappa": "all labels and all predictions are one label",
    "r2": "there is one row",
    "pearson": "all labels, or all predictions, are the same number",
    "spearman": "all labels, or all predictions, are the same number",
}
MATRIX_LABELS, CONFUSIONS = 200, 1000  # of `classification_report`


def _matthews(references: Array, predictions: Array) -> float:
    # scikit-learn gives 0.0 as well, with a warning where all references are that label too
    if (predictions == predictions[0]).all():
        return 0.0
    return float(metrics.matthews_corrcoef(references, predictions))


def _roc_auc(references: Array, probabilities: Array) -> float:
    columns = list(one_vs_rest(references, probabilities))  # of two labels both have the same
    if any(truth.all() or not truth.any() for truth, _ in columns):
        return NAN
    return float(np.mean([metrics.roc_auc_score(*column) for column in columns]))


def _average_precision(references: Array, probabilities: Array, positive: int) -> float:
    columns = one_vs_rest(references, probabilities, positive)
    scores = [  # scikit-learn gives 0.0 without true rows as well, with a warning
        metrics.average_precision_score(*column) if column[0].any() else 0.0 for column in columns
    ]
    return float(np.mean(scores))


def _balanced_accuracy(references: Array, predictions: Array) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a predicted label has no row
        return float(metrics.balanced_accuracy_score(references, predictions))


def _cohen_kappa(references: Array, predictions: Array) -> float:
    if (references == references[0]).all() and (predictions == references[0]).all():
        return NAN
    return float(metrics.cohen_kappa_score(references, predictions))


def _r2(references: Array, predictions: Array) -> float:
    return float(metrics.r2_score(references, predictions)) if len(references) > 1 else NAN


def _ece(references: Array, probabilities: Array) -> float:
    bins, gaps = calibration_gaps(references, probabilities)
    return float(np.abs(np.bincount(bins, gaps)).sum() / len(gaps))


def _mean_of(rows: Callable[..., Array]) -> Callable[..., float]:
    def mean(*arrays: Any, **options: Any) -> float:
        return float(rows(*arrays, **options).mean())

    return mean


def _correlation(function: Callable[..., Any]) -> Callable[[Array, Array], float]:
    def correlation(references: Array, predictions: Array) -> float:
        with warnings.catch_warnings():
            # constant, or so near to it that no digit is right
            warnings.simplefilter("error", stats.DegenerateDataWarning)
            try:
                enough = len(references) > 1
                return float(function(references, predictions).statistic) if enough else NAN
            except stats.DegenerateDataWarning:
                return NAN

    return correlation


@dataclass(frozen=True)
class _Spec:
    source: str  # the function that documents it
    function: Callable[..., Any]  # (references, what it reads) -> float
    problem_types: tuple[str, ...]
    average: str | None = None  # given to `function`, with `labels` and `zero_division`
    zero_division: float = 0.0
    binary: bool = False  # of the positive one of two labels
    reads: str = "predictions"
    options: Mapping[str, Any] = field(default_factory=dict)  # given to `function`


_F1_LIKE = ("f1", "precision", "recall")
OF_POSITIVE = (*_F1_LIKE, "average_precision")  # of two labels, those of the positive one


def _sklearn(function: str, *problem_types: str, **options: Any) -> _Spec:
    return _Spec(
        f"sklearn.metrics.{function}", getattr(metrics, function), problem_types, **options
    )


def _of_probabilities(
    function: str, own: Callable[..., float], *problem_types: str, **options: Any
) -> _Spec:
    return _Spec(
        f"sklearn.metrics.{function}", own, problem_types, reads="probabilities", options=options
    )


_METRICS: dict[str, _Spec] = {
    "accuracy": _sklearn("accuracy_score", SINGLE_LABEL, MULTI_LABEL),
    **{
        name: _sklearn(f"{name}_score", SINGLE_LABEL, average="macro", binary=True)
        for name in _F1_LIKE
    },
    **{
        f"{name}_{average}": _sklearn(f"{name}_score", SINGLE_LABEL, MULTI_LABEL, average=average)
        for name in _F1_LIKE
        for average in ("macro", "micro", "weighted")
    },
    "f1_samples": _sklearn("f1_score", MULTI_LABEL, average="samples"),
    "matthews_correlation": _Spec("sklearn.metrics.matthews_corrcoef", _matthews, (SINGLE_LABEL,)),
    "balanced_accuracy": _Spec(
        "sklearn.metrics.balanced_accuracy_score", _balanced_accuracy, (SINGLE_LABEL,)
    ),
    "cohen_kappa": _Spec("sklearn.metrics.cohen_kappa_score", _cohen_kappa, (SINGLE_LABEL,)),
    "roc_auc": _of_probabilities("roc_auc_score", _roc_auc, SINGLE_LABEL, MULTI_LABEL),
    "average_precision": _of_probabilities(
        "average_precision_score", _average_precision, SINGLE_LABEL, MULTI_LABEL
    ),
    "log_loss": _of_probabilities("log_loss", _mean_of(log_losses), SINGLE_LABEL, MULTI_LABEL),
    "ece": _Spec("arxiv.1706.04599", _ece, (SINGLE_LABEL,), reads="probabilities"),
    "jaccard_samples": _sklearn("jaccard_score", MULTI_LABEL, average="samples", zero_division=1.0),
    "jaccard_macro": _sklearn("jaccard_score", MULTI_LABEL, average="macro"),
    "pearson": _Spec("scipy.stats.pearsonr", _correlation(stats.pearsonr), (REGRESSION,)),
    "spearman": _Spec("scipy.stats.spearmanr", _correlation(stats.spearmanr), (REGRESSION,)),
    "mse": _sklearn("mean_squared_error", REGRESSION),
    "rmse": _sklearn("root_mean_squared_error", REGRESSION),
    "mae": _sklearn("mean_absolute_error", REGRESSION),
    "r2": _Spec("sklearn.metrics.r2_score", _r2, (REGRESSION,)),
}

_PAGES = {
    "sklearn": "https://scikit-learn.org/stable/modules/generated",
    "scipy": "https://docs.scipy.org/doc/scipy/reference/generated",
}


def _spec_of(name: str) -> _Spec | None:
    """What computes a built-in metric; None for an unknown name."""
    if top := TOP_K.fullmatch(name):
        hits, k = _mean_of(top_hits), int(top[1])
        return _of_probabilities("top_k_accuracy_score", hits, SINGLE_LABEL, k=k)
    return _METRICS.get(name)


_CITATION = (
    "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, pp. 2825-2830, 2011."
)


class BuiltinMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of the table as an `evaluate.Metric`, in memory and in one process.

    `.info` has its features and its source.
    """

    def __init__(
        self, name: str, problem_type: str, num_labels: int, positive: int | None = None
    ) -> None:
        """positive: the positive one of two labels; None: the second."""
        spec = _spec_of(name)
        assert spec is not None, name
        self.spec, self.problem_type, self.num_labels = spec, problem_type, num_labels
        self.positive = 1 if positive is None else positive
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        source, reads = self.spec.source, self.spec.reads
        value = Value("float64" if self.problem_type == REGRESSION else "int64")
        references = List(value) if self.problem_type == MULTI_LABEL else value
        inputs = List(Value("float64")) if reads == "probabilities" else references
        return evaluate.MetricInfo(
            description=f"{self.config_name} of {self.problem_type}, by {source}. "
            "What the names mean: bertdist.tasks.metrics.",
            citation=_CITATION,
            inputs_description=f"{reads}, references: one entry per row.",
            features=Features({reads: inputs, "references": references}),
            reference_urls=[_page_of(source)],
        )

    def _build_data_dir(self) -> str:
        """None: evaluate 0.4.6 makes a folder in the user's cache even for keep_in_memory=True."""
        return ""

    def compute(
        self, *, predictions: Any = None, references: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        """Arrays go straight to `_compute`; lists, and rows from `add` or `add_batch`, to evaluate.

        evaluate writes every row into an Arrow table and reads it back: 1.6 s for 1,000,000 rows
        whose accuracy takes 0.05 s.
        """
        inputs = {"predictions": predictions, "references": references, **kwargs}
        arrays = {name: inputs.get(name) for name in self.features}
        if self.writer is None and all(isinstance(array, np.ndarray) for array in arrays.values()):
            return self._compute(**arrays)
        return dict(super().compute(**inputs))

    def _compute(self, **inputs: Any) -> dict[str, float]:
        spec, options = self.spec, dict(self.spec.options)
        references, values = (np.asarray(inputs[name]) for name in ("references", spec.reads))
        assert len(references) == len(values), (len(references), len(values))
        if not np.isfinite(values).all() or not np.isfinite(references).all():
            return {self.config_name: NAN}
        if spec.average:
            labels = [self.positive] if spec.binary else range(self.num_labels)
            options = {
                "labels": labels,
                "average": spec.average,
                "zero_division": spec.zero_division,
            }
        if self.config_name == "average_precision":
            options["positive"] = self.positive
        if spec.reads == "predictions":
            references, values = _for_sklearn(references), _for_sklearn(values)
        return {self.config_name: float(spec.function(references, values, **options))}


def _page_of(source: str) -> str:
    library, _, name = source.partition(".")
    return (
        f"https://arxiv.org/abs/{name}"
        if library == "arxiv"
        else f"{_PAGES[library]}/{source}.html"
    )


def _for_sklearn(array: Array) -> Any:
    """Numbers become float64; (N, O) becomes sparse, as inside scikit-learn: its checks of an
    array cost several times the scores.

    (N, 1) becomes (N, 2) with zeros that `labels=range(1)` leaves out, because scikit-learn reads
    one column as two classes.
    """
    if array.ndim == 1:
        return array.astype(np.float64) if array.dtype.kind == "f" else array
    return sparse.csr_matrix(np.pad(array.astype(np.int8), ((0, 0), (0, array.shape[1] == 1))))


class MetricSet:
    """The metrics of a run; `compute` may be called any number of times."""

    def __init__(
        self, metrics: dict[str, Any], problem_type: str, labels: Sequence[str], positive: int
    ) -> None:
        """positive: the positive one of two labels."""
        self.names: tuple[str, ...] = tuple(metrics)
        self._metrics, self._problem_type, self._num_labels = metrics, problem_type, len(labels)
        self.positive, self.positive_note = positive, ""  # which label it is, in a sentence
        affected = [name for name in metrics if name in OF_POSITIVE]
        if affected and problem_type == SINGLE_LABEL and len(labels) == 2:
            self.positive_note = (
                f"The positive label of {listed(affected, 5)} is {labels[positive]!r} "
                f"(--positive_label {labels[1 - positive]} changes it)."
            )
        # Of the last `compute`: a user's metric -> its first score; score -> what it was instead.
        self.main_scores: dict[str, str] = {}
        self.not_numbers: dict[str, str] = {}

    def compute(
        self, predictions: Array, probabilities: Array, references: Array
    ) -> dict[str, float]:
        """Arrays of all rows (shapes: top of the module) -> {name: score}, in the order of the
        names.

        Regression reads no probabilities. A user's metric gives its own keys; one that exists
        already, or is "loss", gets the metric's name in front. The first key is the main score's.
        An undefined value is nan, and so is one of a user's metric that is not a number. Raises
        DataError without rows, ConfigError where a user's metric fails.
        """
        labels = None if self._problem_type == REGRESSION else self._num_labels
        _check_arrays(predictions, references, labels)
        arrays = {
            "predictions": predictions,
            "probabilities": probabilities,
            "references": references,
        }
        self.main_scores, self.not_numbers = {}, {}
        scores: dict[str, float] = {}
        for name, metric in self._metrics.items():
            inputs = {feature: arrays[feature] for feature in _features(metric)}
            if isinstance(metric, BuiltinMetric):
                scores |= metric.compute(**inputs)
                continue
            try:
                own = metric.compute(**inputs)
                if not isinstance(own, Mapping):
                    raise TypeError(f"expected a dict of scores, found {_describe(own)}")
            except Exception as error:
                raise ConfigError(
                    f"--metrics {name}: failed on {len(references)} rows: {_one_line(error)}"
                ) from error
            used = {"loss", *self.names, *scores}
            for key, value in own.items():
                score = f"{metric.name}_{key}" if key in used else str(key)
                scores[score] = _as_number(value)
                self.main_scores.setdefault(name, score)
                if math.isnan(scores[score]):
                    self.not_numbers[score] = _describe(value)
        return scores


def default_metrics(problem_type: str) -> list[str]:
    """Names of the usual metrics of a task, the main one first."""
    usual = {
        SINGLE_LABEL: "accuracy f1_macro",
        MULTI_LABEL: "f1_micro f1_macro accuracy jaccard_samples",
        REGRESSION: "pearson spearman",
    }
    return usual[problem_type].split()


def load_metrics(
    names: Sequence[str],
    problem_type: str,
    labels: Sequence[str],
    positive_label: str | None = None,
    tunes: bool = False,
) -> MetricSet:
    """Metrics by name. positive_label: the positive one of two labels; None: the second. tunes:
    whether thresholds will be tuned, which depend on it too.

    names: of the table above, paths of a user's own evaluate metric (./mine.py, or ./mine/ with
    mine.py inside), or hub:NAME. A user's metric may read `predictions`, `probabilities` and
    `references`; it runs in this process, with seed 0. Raises ConfigError, with one line for each
    name that is unknown, does not fit the task or cannot be loaded.
    """
    loaded: dict[str, Any] = {}
    problems = [] if names else ["--metrics names no score."]
    positive = 1
    try:
        positive = _find_positive(positive_label, names, problem_type, labels, tunes)
    except ConfigError as error:
        problems.append(f"--positive_label {positive_label}: {error}")
    for name in dict.fromkeys(names):
        try:
            loaded[name] = _load_metric(name, problem_type, len(labels), positive)
        except ConfigError as error:
            problems.append(f"--metrics {name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return MetricSet(loaded, problem_type, labels, positive)


def _find_positive(
    label: str | None, names: Sequence[str], problem_type: str, labels: Sequence[str], tunes: bool
) -> int:
    """The output of --positive_label. Raises ConfigError where it cannot take effect."""
    if label is None:
        return 1
    if problem_type != SINGLE_LABEL or len(labels) != 2:
        how = f" with {len(labels)} labels" if problem_type != REGRESSION else ""
        raise ConfigError(f"it is for tasks with two labels; this one is {problem_type}{how}.")
    if (found := LabelIndex(labels).find(label)) is None:
        raise ConfigError(f"no such label.{did_you_mean(label, labels)}")
    if not (tunes or set(names) & set(OF_POSITIVE)):
        raise ConfigError(
            f"no score depends on it; --metrics has {', '.join(names)}, and "
            f"{', '.join(OF_POSITIVE)} do."
        )
    return found


def classification_report(
    predictions: Array, references: Array, labels: Sequence[str]
) -> dict[str, Any]:
    """Scores per label, and the confusion matrix; JSON-able.

    {"labels", "per_class": [{"label", "precision", "recall", "f1", "rows"}], "confusion"}: rows
    counts those that have the label, 0 / 0 is 0, confusion[i][j] counts rows of label i predicted
    as j. With more than MATRIX_LABELS labels, instead of "confusion": "confusions", the most
    frequent ones as [{"label", "predicted", "rows"}]. Multi-label tasks have neither. Source:
    https://scikit-learn.org/stable/modules/generated/sklearn.metrics.precision_recall_fscore_support.html
    """
    _check_arrays(predictions, references, len(labels))
    true, predicted, ids = _for_sklearn(references), _for_sklearn(predictions), range(len(labels))
    columns = metrics.precision_recall_fscore_support(
        true, predicted, labels=ids, average=None, zero_division=0.0
    )
    keys = ("label", "precision", "recall", "f1", "rows")
    *scores, counts = columns  # counts are floats where there is only one row
    columns = (*scores, counts.astype(np.int64))
    rows = zip(labels, *(column.tolist() for column in columns), strict=True)
    per_class = [dict(zip(keys, row, strict=True)) for row in rows]
    report: dict[str, Any] = {"labels": list(labels), "per_class": per_class}
    if references.ndim == 1 and len(labels) <= MATRIX_LABELS:
        report["confusion"] = metrics.confusion_matrix(true, predicted, labels=ids).tolist()
    elif references.ndim == 1:
        report["confusions"] = _confusions(true, predicted, labels)
    return report


def _confusions(true: Array, predicted: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent pairs of a label and another that was predicted, of CONFUSIONS at most."""
    wrong = true != predicted
    pairs = true[wrong].astype(np.int64) * len(labels) + predicted[wrong]
    distinct, counts = np.unique(pairs, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:CONFUSIONS]  # of equals the first labels
    rows = zip(*np.divmod(distinct[most], len(labels)), counts[most].tolist(), strict=True)
    return [{"label": labels[i], "predicted": labels[j], "rows": n} for i, j, n in rows]


def _check_arrays(predictions: Array, references: Array, num_labels: int | None) -> None:
    """num_labels: None for numbers."""
    if len(references) == 0:
        raise DataError("There are no rows to score: the split is empty.")
    assert predictions.shape == references.shape, (predictions.shape, references.shape)
    if num_labels is not None:
        assert references.shape[1:] in ((), (num_labels,)), (references.shape, num_labels)
        stop = num_labels if references.ndim == 1 else 2
        for array in (predictions, references):
            assert array.min() >= 0 and array.max() < stop, f"a label id is not in 0..{stop - 1}"


def _features(metric: Any) -> list[str]:
    """What a metric reads; evaluate allows a list of alternatives, all of the same names."""
    return list(metric.features[0] if isinstance(metric.features, list) else metric.features)


def _load_metric(name: str, problem_type: str, num_labels: int, positive: int) -> Any:
    if name.startswith("hub:"):
        return _load_evaluate_metric(_hub_path(name.removeprefix("hub:")))
    if "/" in name or name.endswith(".py"):
        path = Path(os.path.abspath(Path(name).expanduser()))
        script = path if path.suffix == ".py" else path / f"{path.name}.py"
        if not script.is_file():
            raise ConfigError(f"there is no file {script}.")
        return _load_evaluate_metric(str(script))
    fitting = [
        candidate
        for candidate, spec in _METRICS.items()
        if problem_type in spec.problem_types and (num_labels == 2 or not spec.binary)
    ]
    if problem_type == SINGLE_LABEL:
        fitting.append("top_3_accuracy")
    top = TOP_K.fullmatch(name) if problem_type == SINGLE_LABEL else None
    if top and int(top[1]) >= num_labels:
        raise ConfigError(f"is 1 for any predictions of {num_labels} labels; expected fewer.")
    if name in fitting or top:
        return BuiltinMetric(name, problem_type, num_labels, positive)
    spec = _spec_of(name)
    if spec is None:
        raise unknown_metric(name, fitting)
    this = problem_type
    two = " with two labels" if spec.binary else ""
    if two and problem_type != REGRESSION:
        this = f"{problem_type} with {num_labels} labels"
    usable = [x for x in fitting if x.startswith(f"{name}_")] or fitting
    raise ConfigError(
        f"is for {' and '.join(spec.problem_types)}{two}; this task is {this}, "
        f"which has {', '.join(usable)}."
    )


def _hub_path(name: str) -> str:
    """The path for `evaluate.load`; the current folder comes first, so a file there is an error."""
    path = name if "/" in name else f"evaluate-metric/{name}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.py)", path):
        raise ConfigError("expected hub:NAME or hub:OWNER/NAME.")
    if (local := Path(path, Path(path).name + ".py")).exists():
        raise ConfigError(f"./{local} would be loaded instead; for that file write ./{local}.")
    return path


def _load_evaluate_metric(path: str) -> Any:
    """Run the script at an absolute or a Hub path; evaluate copies it into HF_MODULES_CACHE."""
    try:
        metric = evaluate.load(path, module_type="metric", keep_in_memory=True, seed=0)
        supported = ("predictions", "probabilities", "references")
        unsupported = [name for name in _features(metric) if name not in supported]
    except Exception as error:
        # evaluate takes the file's first class, an imported one too, or None
        wrong_class = isinstance(error, NotImplementedError | TypeError)
        expected = (
            " Expected `import evaluate`, not `from evaluate import Metric`, and one "
            "`class Name(evaluate.Metric)`."
        )
        hint = expected if wrong_class else ""
        raise ConfigError(f"cannot be loaded: {_one_line(error)}.{hint}") from error
    if unsupported:
        raise ConfigError(
            f"reads {', '.join(unsupported)}; a metric here may read predictions, probabilities "
            "and references."
        )
    return metric


def _as_number(value: Any) -> float:
    """A score of a user's metric; nan where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NAN


def _describe(value: Any) -> str:
    return f"{excerpt_of(value)} ({type(value).__name__})"


def _one_line(error: Exception) -> str:
    """An error in one line of 300 characters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(" .:")
