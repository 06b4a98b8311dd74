"""What --threshold and --threshold_for may say, read without torch."""

from collections.abc import Iterable
from typing import NamedTuple

from bertdist.core.errors import ConfigError, did_you_mean

# Scores of one label; f1 of a multi-label task is f1_macro, as the labels are tuned one by one.
THRESHOLD_SCORES = (
    *("f1", "f1_macro", "f1_micro", "accuracy", "balanced_accuracy", "matthews_correlation"),
    *("precision_at_recall", "recall_at_precision"),
)
_MULTI_LABEL_ONLY = ("f1_macro", "f1_micro")
_TWO_LABELS_ONLY = ("accuracy",)  # of a multi-label row: all labels right, not one by one


class ThresholdScore(NamedTuple):
    """A score that thresholds maximise."""

    name: str
    least: float = 0.0  # of the recall or precision after _at_

    def problem(self, is_multi_label: bool) -> str:
        """Why it is not for a task; "" if it is."""
        others = _TWO_LABELS_ONLY if is_multi_label else _MULTI_LABEL_ONLY
        if self.name not in others:
            return ""
        fitting = [name for name in THRESHOLD_SCORES if name not in others]
        kind = "several labels per text" if is_multi_label else "two labels"
        return f"--threshold_for {self.name}: a task with {kind} has {', '.join(fitting)}."


def parse_threshold_score(text: str) -> ThresholdScore:
    """`f1`, or `precision_at_recall=0.9`. Raises ConfigError."""
    name, is_named, number = text.partition("=")
    if name not in THRESHOLD_SCORES:
        hint = did_you_mean(name, THRESHOLD_SCORES)
        raise ConfigError(f"--threshold_for {text}: no such score.{hint}")
    if "_at_" not in name:
        if is_named:
            raise ConfigError(f"--threshold_for {text}: {name} takes no number.")
        return ThresholdScore(name)
    least = _probability(number)
    if not least:
        raise ConfigError(
            f"--threshold_for {text}: expected the least {name.rpartition('_')[2]}, above 0 and "
            f"at most 1, as {name}=0.9."
        )
    return ThresholdScore(name, least)


def parse_threshold(words: Iterable[str] | None) -> float | dict[str, float] | None:
    """`0.3`, or `joy=0.2 anger=0.4`: one threshold, or one of each label that is named.

    Raises ConfigError.
    """
    given = list(words or ())
    if not given:
        return None
    pairs = [word.rpartition("=") for word in given]
    numbers = [_probability(number) for _, _, number in pairs]
    for word, number in zip(given, numbers, strict=True):
        if number is None:
            raise ConfigError(
                f"--threshold is {word}; expected a probability from 0 to 1, or LABEL=0.3."
            )
    names = [name for name, _, _ in pairs if name]
    if len(names) < len(given) and len(given) > 1:
        raise ConfigError(
            f"--threshold is {' '.join(given)}; expected one number, or LABEL=NUMBER for each."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--threshold names {twice[0]!r} twice.")
    values = [number for number in numbers if number is not None]
    return dict(zip(names, values, strict=True)) if names else values[0]


def _probability(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= 1 else None
