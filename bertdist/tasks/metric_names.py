"""The names of the built-in scores, without what computes them, which takes seconds to import.

check_metric_names(["accuracy", "f1_macro"])     # before torch is imported
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertdist.core.errors import ConfigError, did_you_mean

METRIC_NAMES = (
    *("accuracy", "f1", "precision", "recall"),
    *("f1_macro", "f1_micro", "f1_weighted"),
    *("precision_macro", "precision_micro", "precision_weighted"),
    *("recall_macro", "recall_micro", "recall_weighted"),
    *("f1_samples", "matthews_correlation", "balanced_accuracy", "cohen_kappa", "roc_auc"),
    *("average_precision", "log_loss", "ece", "jaccard_samples", "jaccard_macro"),
    *("pearson", "spearman", "mse", "rmse", "mae", "r2"),
)
# By the name of the score, also of a user's metric (hub:mse computes mse); higher is better for
# all others.
LOWER_IS_BETTER = frozenset({"loss", "log_loss", "ece", "mse", "rmse", "mae"})
TOP_K = re.compile(r"top_([1-9][0-9]*)_accuracy")


def check_metric_names(names: Sequence[str]) -> None:
    """Raise ConfigError for names of no score; a user's own are left to `load_metrics`."""
    unknown = [name for name in dict.fromkeys(names) if not (_is_own(name) or _is_known(name))]
    if unknown:
        candidates = (*METRIC_NAMES, "top_3_accuracy")
        problems = (f"--metrics {name}: {unknown_metric(name, candidates)}" for name in unknown)
        raise ConfigError("\n".join(problems))


def selected_score(scores: Mapping[str, Any], named: str | None) -> tuple[str, float | None]:
    """The name of the score that compares runs, and its value, negated where lower is better.

    It is the one that selects a run's best weights: --metric_for_best_model (`named`), else the
    first of --metrics. scores: in the order of --metrics. None for one that is undefined.
    """
    first = next((name for name in scores if name != "loss"), "loss")
    name = named if named is not None and named in scores else first
    value = scores.get(name)
    if value is None:
        return name, None
    return name, -value if name in LOWER_IS_BETTER else value


def own_selection_problem(metrics: Sequence[str] | None, named: str | None) -> str | None:
    """Why runs cannot be compared by --metric_for_best_model: it names a user's metric by its file,
    and what its first score is called shows only when it is computed.
    """
    if named is None or not _is_own(named) or named == next(iter(metrics or []), None):
        return None
    return (
        f"--metric_for_best_model {named}: to compare runs, give the name of the score that it "
        "computes (as metrics.jsonl has it), or name it first in --metrics."
    )


def unknown_metric(name: str, candidates: Sequence[str]) -> ConfigError:
    """The message about a name of no score. candidates: the names that fit."""
    own = f" For your own metric in this folder write ./{name}." if Path(name).exists() else ""
    return ConfigError(f"unknown score.{did_you_mean(name, candidates)}{own}")


def _is_known(name: str) -> bool:
    return name in METRIC_NAMES or TOP_K.fullmatch(name) is not None


def _is_own(name: str) -> bool:
    return name.startswith("hub:") or "/" in name or name.endswith(".py")
