"""Rows that hold the same text -> findings: duplicates, contradicting labels, and rows of one split that stand in another.

In: `Sameness` and the labels of the splits. Out: findings. How they count: `duplicates` are rows beyond the first of their text,
`conflicting_labels` are texts, leaks are rows of the split that is scored.
One module beside `duplicates.py`, which tells what is the same and nothing about what that does to training.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from bertdist.duplicates import Ints, Sameness, repeated
from bertdist.findings import Example, Finding, Severity, excerpt
from bertdist.labels import Labels
from bertdist.records import Records

LEAK_IS_ERROR = (
    0.01  # share of a split: from there on its score says something else than it seems to
)
SPREAD = 0.25  # of the range of a regression's numbers: rows of one text that differ more contradict each other


def check_overlap(
    splits: Mapping[str, Records],
    labels: Mapping[str, Labels | None],
    same: Sameness,
    num_examples: int,
) -> list[Finding]:
    """All findings on texts that occur more than once. splits, labels: by name, train first."""
    found: list[Finding] = []
    for name, records in splits.items():
        found += _duplicates(name, records, same, num_examples)
        if (given := labels[name]) is not None:
            found += _conflicts(name, records, same.texts[name], given, num_examples)
    names = list(splits)
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            found += _leaks(first, second, splits, same, num_examples)
    if same.pairs is not None:
        found += _near(splits, labels, same, num_examples)
    return found


def _example(
    split: str, records: Records, row: int, note: str = "", like: tuple[str, int] | None = None
) -> Example:
    text, pair = (
        records.texts[row].as_py(),
        None if records.pairs is None else records.pairs[row].as_py(),
    )
    return Example(
        split=split,
        row=int(row),
        text=excerpt(text if pair is None else f"{text} | {pair}"),
        note=note,
        like=like,
    )


def _duplicates(split: str, records: Records, same: Sameness, num_examples: int) -> list[Finding]:
    found = []
    later = repeated(same.texts[split])
    alike = repeated(same.plain[split]) & ~later
    for kind, rows, title, meaning in (
        (
            "duplicates",
            later,
            "the same text again",
            "Rows beyond the first of their text: these texts count several times.",
        ),
        (
            "alike_texts",
            alike,
            "the same text up to case and blanks",
            "An uncased model reads them as the same text.",
        ),
    ):
        if rows.any():
            numbers = same.texts[split] if kind == "duplicates" else same.plain[split]
            values, times = np.unique(numbers[rows], return_counts=True)
            often = values[np.argsort(-times, kind="stable")][:num_examples]
            examples = []
            for value in often:
                holders = np.flatnonzero(numbers == value)
                examples.append(_example(split, records, holders[0], f"{len(holders)} times"))
            found.append(
                Finding(
                    kind=kind,
                    severity="warning" if kind == "duplicates" and rows.mean() >= 0.01 else "note",
                    split=split,
                    title=title,
                    count=int(rows.sum()),
                    total=len(records),
                    meaning=meaning,
                    advice="Keep one of each (--fix does) unless the data really come so often."
                    if kind == "duplicates"
                    else "Nothing for a cased model; for an uncased one make them one before --fix.",
                    examples=tuple(examples),
                    details={"texts": len(values), "most_times": int(times.max()) + 1},
                )
            )
    return found


def conflicting(numbers: Ints, labels: Labels) -> Ints:
    """Numbers of the texts that have contradicting labels, those of most rows first. numbers: (rows,) each row's text."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(numbers[order]) != 0]))
    values = labels.numbers[order] if labels.numbers is not None else labels.codes[order]
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    apart = SPREAD * (values.max() - values.min()) if labels.numbers is not None else 0
    times = np.diff(np.append(starts, len(order)))
    hit = np.flatnonzero(high - low > apart)
    found: Ints = numbers[order][starts[hit]][np.argsort(-times[hit], kind="stable")]
    return found


def _conflicts(
    split: str, records: Records, numbers: Ints, labels: Labels, num_examples: int
) -> list[Finding]:
    texts = conflicting(numbers, labels)
    if not len(texts):
        return []
    examples: list[Example] = []
    for text in texts[:num_examples]:
        rows = np.flatnonzero(numbers == text)
        _, firsts = np.unique(labels.codes[rows], return_index=True)
        examples += [
            _example(split, records, row, labels.name(row)) for row in rows[np.sort(firsts)][:2]
        ]
    severity: Severity = "warning"
    return [
        Finding(
            kind="conflicting_labels",
            severity=severity,
            split=split,
            title="texts with contradicting labels",
            count=len(texts),
            total=len(np.unique(numbers)),
            unit="texts",
            meaning="What one row teaches another one takes back, and no model can score both."
            if labels.numbers is None
            else "Numbers of one text that are more than a quarter of the whole range apart.",
            advice="Settle them by hand; --fix drops all their rows.",
            examples=tuple(examples),
            details={"rows": int(np.isin(numbers, texts).sum())},
        )
    ]


def _leaks(
    first: str, second: str, splits: Mapping[str, Records], same: Sameness, num_examples: int
) -> list[Finding]:
    exact = np.isin(same.texts[second], same.texts[first])
    alike = np.isin(same.plain[second], same.plain[first]) & ~exact
    found = []
    for kind, rows, what in (
        ("leaks", exact, ""),
        ("alike_leaks", alike, " up to case and blanks"),
    ):
        if rows.any():
            found.append(
                Finding(
                    kind=kind,
                    severity="error"
                    if first == "train" and rows.mean() >= LEAK_IS_ERROR
                    else "warning",
                    split=f"{first}/{second}",
                    title=f"rows of {second} that stand in {first}{what}",
                    count=int(rows.sum()),
                    total=len(rows),
                    meaning=f"{second.capitalize()} rows that were seen before: the score of {second} is too good. "
                    f"From {LEAK_IS_ERROR:.0%} of the rows on it is an error."
                    if first == "train"
                    else f"What picks the best weights on {first} has seen these rows of {second}.",
                    advice=f"Take them out of {first} (--fix does)."
                    if first == "train"
                    else f"Take them out of {first}.",
                    examples=_both(first, second, rows, same, splits, kind, num_examples),
                )
            )
    return found


def _both(
    first: str,
    second: str,
    rows: np.ndarray,
    same: Sameness,
    splits: Mapping[str, Records],
    kind: str,
    num: int,
) -> tuple[Example, ...]:
    numbers = same.texts if kind == "leaks" else same.plain
    examples = []
    for row in np.flatnonzero(rows)[:num]:
        other = int(np.argmax(numbers[first] == numbers[second][row]))
        examples.append(_example(second, splits[second], row, like=(first, other)))
    return tuple(examples)


def near_rows(same: Sameness, split: str, other: str) -> Ints:
    """(rows of split,): the row of `other` whose text is nearly the same, -1 where there is none."""
    assert same.pairs is not None
    holder = np.full(len(same.plain_texts), -1, np.int64)  # a row of `other` for each plain text
    numbers = same.plain[other]
    holder[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the first of them
    partner = np.full(len(same.plain_texts), -1, np.int64)
    for one, two in ((same.pairs.left, same.pairs.right), (same.pairs.right, same.pairs.left)):
        known = holder[two] >= 0
        partner[one[known]] = holder[two[known]]
    rows: Ints = partner[same.plain[split]]
    return rows


def _near(
    splits: Mapping[str, Records],
    labels: Mapping[str, Labels | None],
    same: Sameness,
    num_examples: int,
) -> list[Finding]:
    found = []
    names = list(splits)
    for at, first in enumerate(names):
        for second in names[at:]:
            partner = near_rows(same, second, first)
            if first != second:  # rows that are told as leaks already
                partner[np.isin(same.plain[second], same.plain[first])] = -1
            rows = np.flatnonzero(partner >= 0)
            if not len(rows):
                continue
            mine, theirs = labels[second], labels[first]
            details = {}
            if mine is not None and theirs is not None and mine.numbers is None:
                ours, other = mine.names_of(rows), theirs.names_of(partner[rows])
                details["with_another_label"] = sum(
                    one != two for one, two in zip(ours, other, strict=True)
                )
            examples = _near_examples(first, second, rows, partner, splits, num_examples)
            within = first == second
            found.append(
                Finding(
                    kind="near_duplicates" if within else "near_leaks",
                    severity="note" if within else "warning",
                    split=first if within else f"{first}/{second}",
                    title="rows that are nearly another row"
                    if within
                    else f"rows of {second} that are nearly a row of {first}",
                    count=len(rows),
                    total=len(partner),
                    meaning="Their runs of 5 bytes, in lower case, are nearly the same set (Jaccard similarity at least the threshold)"
                    + (
                        f"; {details['with_another_label']:,} have another label than the row they are like."
                        if details
                        else "."
                    ),
                    advice="See whether they are templates or copies; --fix_kinds near_duplicates keeps one of each."
                    if within
                    else f"See whether {second} still asks something new; --fix_kinds near_leaks drops such rows of {first}.",
                    examples=examples,
                    details=details,
                )
            )
    return found


def _near_examples(
    first: str,
    second: str,
    rows: Ints,
    partner: Ints,
    splits: Mapping[str, Records],
    num_examples: int,
) -> tuple[Example, ...]:
    examples: list[Example] = []
    told: set[int] = set()
    for row in rows.tolist():
        other = int(partner[row])
        if len(examples) >= 2 * num_examples:
            break
        if first == second and {row, other} & told:
            continue
        told |= {row, other}
        examples += [
            _example(second, splits[second], row, like=(first, other)),
            _example(first, splits[first], other),
        ]
    return tuple(examples)


def first_of_near(same: Sameness, split: str) -> Sequence[bool]:
    """(rows,): whether no earlier row that is kept is nearly this one; rows that are not kept keep nobody out."""
    assert same.pairs is not None
    numbers = same.plain[split]
    first = np.full(len(same.plain_texts), len(numbers), np.int64)
    np.minimum.at(first, numbers, np.arange(len(numbers)))
    neighbours: dict[int, list[int]] = {}
    for one, two in zip(same.pairs.left.tolist(), same.pairs.right.tolist(), strict=True):
        neighbours.setdefault(one, []).append(two)
        neighbours.setdefault(two, []).append(one)
    dropped: set[int] = set()
    for text in sorted(neighbours, key=lambda number: int(first[number])):
        if first[text] < len(numbers) and text not in dropped:
            dropped.update(other for other in neighbours[text] if first[other] > first[text])
    return [number not in dropped for number in numbers.tolist()]
