"""Which words an answer rests on: how much its probability falls when a word is left out.

    found = explain_mistakes(rows, 10, predictor.probabilities)
    found[17].words, found[17].summary

Leave-one-out (Li et al. 2016, https://arxiv.org/abs/1612.08220): one more prediction per word, of
any model that predicts. docs/decisions/0026-reports.md says why not by gradients.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertdist.core.terminal import excerpt
from bertdist.core.types import Array
from bertdist.reporting.run_folder import ScoredRows

MOST_WORDS = 200  # of a text; those after them are not left out
SHOWN_WORDS = 5
ROUNDING = 0.02  # of another precision or device
_WORD = re.compile(r"\S+")

# texts, second texts or None -> (texts, labels)
Probabilities = Callable[[list[str], list[str] | None], Array]


@dataclass(frozen=True)
class Word:
    """A word, with the blanks before it."""

    space: str
    text: str
    effect: float  # on the probability, or the number, that is explained
    share: float  # of the largest effect, from 0 to 1


@dataclass(frozen=True)
class Words:
    """The explanation of one answer."""

    about: str  # what is explained
    words: list[Word]
    summary: str


def explain_mistakes(
    rows: ScoredRows, number: int, probabilities: Probabilities
) -> dict[int, Words]:
    """Row -> the words of the `number` surest mistakes (the first lines of errors.jsonl)."""
    return {int(line["row"]): explain(rows, line, probabilities) for line in rows.errors(number)}


def explain(rows: ScoredRows, line: dict[str, Any], probabilities: Probabilities) -> Words:
    """The words of one line of errors.jsonl."""
    fields = [str(line["text"]), *([str(line["text_pair"])] if "text_pair" in line else [])]
    label, about = _explained(rows, int(line["row"]))
    places = [(i, word.span()) for i, text in enumerate(fields) for word in _words_of(text)]
    variants = [fields]
    for field, (start, stop) in places[:MOST_WORDS]:
        without = list(fields)
        text = fields[field]
        without[field] = f"{text[:start].rstrip()} {text[stop:].lstrip()}".strip()
        variants.append(without)
    texts = [variant[0] for variant in variants]
    pairs = [variant[1] for variant in variants] if len(fields) > 1 else None
    found = probabilities(texts, pairs)[:, label].astype(np.float64)
    effects = [*(found[0] - found[1:]).tolist(), *[0.0] * (len(places) - len(found) + 1)]
    evaluated = float(rows.probabilities[int(line["row"]), label])
    summary = _summary(fields, places, effects) + _difference(found[0], evaluated)
    return Words(about, _as_words(fields, places, effects), summary)


def _difference(now: float, evaluated: float) -> str:
    """A sentence where the model does not give what it gave when the row was evaluated."""
    if not abs(now - evaluated) > ROUNDING * max(1.0, abs(evaluated)):
        return ""
    return (
        f" The model gives {now:.3g} now, {evaluated:.3g} when the row was evaluated: the model, "
        "or a setting (--max_length), is another one."
    )


def _words_of(text: str) -> list[re.Match[str]]:
    """The words between blanks; of a text without any (Chinese) its characters."""
    words = list(_WORD.finditer(text))
    return words if len(words) > 1 or text.isascii() else list(re.finditer(r"\S", text))


def _explained(rows: ScoredRows, row: int) -> tuple[int, str]:
    """The output that is explained, and a sentence on it."""
    if rows.is_regression:
        return 0, "How much the number changes by each word:"
    label = int(rows.predicted[row]) if not rows.is_multi_label else _wrong_label(rows, row)
    name = excerpt(rows.labels[label], 40)
    return label, (
        f"Words that raise the probability of {name!r} (blue), or lower it (orange), by leaving "
        "each out in turn:"
    )


def _wrong_label(rows: ScoredRows, row: int) -> int:
    """The label of a multi-label row that is wrong with most confidence."""
    predicted, probability = rows.predicted[row], rows.probabilities[row]
    sureness = np.where(predicted, probability, 1 - probability)
    return int(np.where(predicted != rows.truth[row], sureness, -1).argmax())


def _as_words(
    fields: Sequence[str], places: Sequence[tuple[int, tuple[int, int]]], effects: Sequence[float]
) -> list[Word]:
    largest = max(map(abs, effects), default=0.0) or 1.0
    words, end, last = [], 0, 0
    for (field, (start, stop)), effect in zip(places, effects, strict=True):
        space = fields[field][end:start] if field == last else "\n"
        words.append(Word(space, fields[field][start:stop], effect, abs(effect) / largest))
        end, last = stop, field
    return words


def _summary(
    fields: Sequence[str], places: Sequence[tuple[int, tuple[int, int]]], effects: Sequence[float]
) -> str:
    order = np.argsort(-np.abs(effects), kind="stable")[:SHOWN_WORDS]
    named = [
        f"{excerpt(fields[places[i][0]][slice(*places[i][1])], 30)!r} {effects[i]:+.3f}"
        for i in order
    ]
    more = f"; only the first {MOST_WORDS} words were left out" * (len(places) > MOST_WORDS)
    return f"Most: {', '.join(named)}{more}." if named else "There are no words."
