"""Which columns hold the texts and the labels by their values: for messages on columns that were
not found. Nothing is read as text or label because of it.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bertdist.core.errors import DataError, listed
from bertdist.core.terminal import excerpt
from bertdist.data.columns import Sample
from bertdist.tasks.labels import is_number

MOST_LABELS = 50  # distinct values of a label column
MOST_COLUMNS = 3  # in a message
LONGEST_LABEL = 40  # characters
# In the names of label columns
LABEL_WORDS = (
    *("label", "class", "target", "sentiment", "category", "polarity", "rating", "stars"),
    *("emotion", "intent", "topic", "gold", "tag", "type", "score"),
)


def describe_likely(sample: Sample, lacking: Sequence[str], taken: Collection[str] = ()) -> str:
    """` By their values: text in 'body'; label in 'mood' (bad, good).`, or "".

    lacking: "text", "label" or both; taken: columns that are neither.
    """
    with suppress(DataError, OSError, ValueError):  # what cannot be read is another error
        columns = {name: _values(column) for name, column in sample().items() if name not in taken}
        columns = {name: values for name, values in columns.items() if len(values) > 1}
        texts = _text_columns(columns)
        found = {"text": [repr(excerpt(name)) for name in texts[:1]]}
        others = {name: values for name, values in columns.items() if name not in texts[:1]}
        found["label"] = [
            f"{excerpt(name)!r} ({listed([excerpt(x, 20) for x in sorted(labels)], 4)})"
            for name, labels in _label_columns(others)[:MOST_COLUMNS]
        ]
        parts = [f"{what} in {' or '.join(found[what])}" for what in lacking if found[what]]
        return f" By their values: {'; '.join(parts)}." if parts else ""
    return ""


def _values(column: Any) -> list[Any]:
    return list(column.to_pylist() if hasattr(column, "to_pylist") else column)


def _text_columns(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Those of texts, the longest texts first."""
    lengths = {}
    for name, cells in columns.items():
        values = [x for x in cells if isinstance(x, str)]
        others = [x for x in cells if not isinstance(x, str | None) and x == x]  # NaN: no text
        if values and not others and not all(map(is_number, values)):
            lengths[name] = sum(map(len, values)) / len(values)
    return sorted(lengths, key=lambda name: -lengths[name])


def _label_columns(columns: Mapping[str, Sequence[Any]]) -> list[tuple[str, set[str]]]:
    """Those with few distinct values, and a value in every row; the likeliest first."""
    found = []
    for name, values in columns.items():
        if not all(isinstance(x, str | int) and str(x).strip() for x in values):
            continue
        distinct = set(map(str, values))
        few = min(MOST_LABELS, max(2, len(values) // 3))
        if 2 <= len(distinct) <= few and max(map(len, distinct)) <= LONGEST_LABEL:
            is_named = any(word in name.lower() for word in LABEL_WORDS)
            is_numeric = all(map(is_number, distinct))
            found.append(((not is_named, is_numeric, len(distinct)), name, distinct))
    return [(name, distinct) for _, name, distinct in sorted(found, key=lambda x: x[0])]
