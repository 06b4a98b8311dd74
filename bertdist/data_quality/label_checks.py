"""The labels of all splits in one numbering, and what is wrong with them -> findings.

In: Records with labels. Out: `Labels` of each split, and findings on counts, on labels that one split has and another lacks, on rows
without a label, and on numbers. One module, because "the same label" must mean the same in all splits, as it does in training, where
a label is its name: 1, "1" and a class named 1 are one.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bertdist.core.errors import did_you_mean
from bertdist.core.terminal import excerpt
from bertdist.data.records import Records
from bertdist.data_quality.findings import Example, Finding, Severity

FEW_ROWS = 10  # a label of the training rows with fewer is told

IMBALANCE = 10.0  # rows of the most frequent label / rows of the rarest: from here on told

OUTLIER = 5.0  # so many interquartile ranges outside the quartiles

SHOWN = 12  # labels of which a sentence tells the counts


@dataclass(frozen=True, kw_only=True)
class SplitLabels:
    """The labels of one split. Names are sets (of one name each, but in multi-label tasks)."""

    names: Sequence[frozenset[str]]  # distinct
    codes: npt.NDArray[np.int64]  # (rows,) index into names
    numbers: npt.NDArray[np.float64] | None  # (rows,) of a regression
    several: bool  # a multi-label task

    def name(self, row: int) -> str:
        """A row's label in words."""
        return "label " + (
            ", ".join(repr(excerpt(name, 40)) for name in sorted(self.names[self.codes[row]]))
            or "none"
        )

    def names_of(self, rows: npt.NDArray[np.int64]) -> list[frozenset[str]]:
        """The labels of some rows."""
        return [self.names[code] for code in self.codes[rows]]

    def sizes(self) -> npt.NDArray[np.int64]:
        """(rows,): how many labels each row has."""
        return np.array([len(names) for names in self.names], np.int64)[self.codes]

    def range(self) -> dict[str, float]:
        """Of a regression: the least, the quartiles, the most, and the mean."""
        assert self.numbers is not None
        quantiles = np.quantile(self.numbers, [0, 0.25, 0.5, 0.75, 1]).tolist()
        return dict(zip(("least", "25%", "median", "75%", "most"), quantiles, strict=True)) | {
            "mean": float(self.numbers.mean())
        }

    def counts(self) -> dict[str, int]:
        """Rows of each label, most first."""
        of_code = np.bincount(self.codes, minlength=len(self.names))
        found: dict[str, int] = {}
        for names, count in zip(self.names, of_code.tolist(), strict=True):
            for name in names:
                found[name] = found.get(name, 0) + count
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def labels_of_records(records: Records, problem_type: str) -> SplitLabels | None:
    """None where the split has no labels. problem_type: of the training rows; numbers are read where it is a regression."""
    if records.label_codes is None:
        return None
    names = [
        frozenset(map(str, value)) if isinstance(value, tuple) else frozenset((str(value),))
        for value in records.label_values
    ]
    places: dict[frozenset[str], int] = {}
    merged = np.array([places.setdefault(name, len(places)) for name in names], np.int64)
    numbers = None
    if problem_type == "regression":
        # labels of another kind than those of train: `check_labels` tells them
        with suppress(TypeError, ValueError):
            values = [float(value) for value in records.label_values]  # type: ignore[arg-type]
            numbers = np.array(values)[records.label_codes]
    return SplitLabels(
        names=list(places),
        codes=merged[records.label_codes],
        numbers=numbers,
        several=records.label_kind == "set",
    )


def check_labels(
    splits: Mapping[str, Records], labels: Mapping[str, SplitLabels | None], num_examples: int
) -> list[Finding]:
    """All findings on labels. Splits are by name, train first."""
    train = labels["train"]
    assert train is not None
    found: list[Finding] = []
    for name, records in splits.items():
        given = labels[name]
        if given is None:
            found.append(_unlabelled(name, records))
        elif given.numbers is not None:
            found += _numbers(name, records, given, train, num_examples)
        else:
            found += (
                _between(name, records, given, train, num_examples)
                if name != "train"
                else _of_training(records, given, num_examples)
            )
        if given is not None and given.several:
            found += _sets(name, records, given, num_examples)
    return found


def _rows(
    split: str, records: Records, labels: SplitLabels, name: str, num_examples: int
) -> tuple[Example, ...]:
    codes = [code for code, names in enumerate(labels.names) if name in names]
    rows = np.flatnonzero(np.isin(labels.codes, codes))[:num_examples]
    return tuple(
        Example(
            split=split,
            row=int(row),
            text=excerpt(records.texts[int(row)].as_py()),
            note=labels.name(row),
        )
        for row in rows
    )


def _unlabelled(split: str, records: Records) -> Finding:
    return Finding(
        kind="no_labels",
        severity="note",
        split=split,
        title="rows without labels",
        count=len(records),
        total=len(records),
        meaning="Nothing was compared with the labels of train.",
        advice="Rows to predict need none.",
    )


def _of_training(records: Records, labels: SplitLabels, num_examples: int) -> list[Finding]:
    counts = labels.counts()

    def finding(
        kind: str,
        severity: Severity,
        title: str,
        count: int,
        meaning: str,
        advice: str,
        names: Sequence[str],
        **more: Any,
    ) -> Finding:
        examples = tuple(
            example
            for name in names[:num_examples]
            for example in _rows("train", records, labels, name, 1)
        )
        return Finding(
            kind=kind, severity=severity, split="train", title=title, count=count, meaning=meaning, advice=advice, examples=examples,
            **{"total": len(records), "unit": "rows", **more},
        )  # fmt: skip

    found = []
    if not counts:
        found.append(
            finding(
                "single_label", "error", "no row has a label", len(records), "There is nothing to learn.",
                "See --label_column, --label_columns and --label_delimiter.", [],
            )
        )  # fmt: skip
        return found
    if len(counts) < 2 and not labels.several:
        found.append(
            finding(
                "single_label", "error", "all rows have one label", len(records), "There is nothing to learn.",
                "See whether --label_column names the right column, and whether the file is sorted and was cut.", list(counts),
            )
        )  # fmt: skip
        return found
    if not labels.several and len(records) >= 20 and len(counts) > 0.5 * len(records):
        found.append(
            finding(
                "labels_like_ids", "error", "nearly every row has a label of its own", len(counts),
                "That is what a column of numbers, names or texts looks like.",
                "See whether --label_column names the right column; numbers to be predicted want --problem_type regression.",
                list(counts), unit="labels",
            )
        )  # fmt: skip
        return found
    few = [name for name in reversed(counts) if counts[name] < FEW_ROWS]
    if few:
        told = ", ".join(f"{excerpt(name, 30)!r} {counts[name]}" for name in few[:SHOWN])
        found.append(
            finding(
                "rare_labels", "warning", f"labels with fewer than {FEW_ROWS} rows", len(few),
                f"Too few to learn from or to score: {told}{', ...' if len(few) > SHOWN else ''}.", "Collect more, or merge labels.", few,
                unit="labels", total=len(counts),
            )
        )  # fmt: skip
    most, least = max(counts.values()), max(1, min(counts.values()))
    if most / least >= IMBALANCE:
        top = next(iter(counts))
        found.append(
            finding(
                "imbalance", "note", f"the most frequent label has {most / least:,.0f} times the rows of the rarest", most,
                f"Always answering {excerpt(top, 30)!r} is right in {most / len(records):.1%} of the rows: accuracy says little.",
                "Look at --metrics f1_macro, and try --class_weights balanced.", [],
            )
        )  # fmt: skip
    return found + _alike(counts, finding)


def _alike(counts: dict[str, int], finding: Any) -> list[Finding]:
    """Labels that differ in nothing a person would see."""
    found = []
    same: dict[str, list[str]] = {}
    for name in counts:
        same.setdefault(" ".join(name.lower().split()), []).append(name)
    for names in (names for names in same.values() if len(names) > 1):
        told = ", ".join(repr(excerpt(name, 30)) for name in names[:3])
        found.append(
            finding(
                "labels_alike", "warning", f"labels that differ in case or blanks only: {told}",
                sum(counts[name] for name in names[1:]), "They are trained as different labels.", "Write them the same way.", names,
            )
        )  # fmt: skip
    return found


def _between(
    split: str, records: Records, labels: SplitLabels, train: SplitLabels, num_examples: int
) -> list[Finding]:
    here, known = labels.counts(), train.counts()
    found = []
    unknown = [
        name
        for name in here
        if (name not in known if train.numbers is None else not _is_number(name))
    ]
    if unknown:
        told = ", ".join(f"{excerpt(name, 30)!r} {here[name]:,}" for name in unknown[:SHOWN])
        examples = [
            example
            for name in unknown[:num_examples]
            for example in _rows(split, records, labels, name, 1)
        ]
        found.append(
            Finding(
                kind="unknown_labels",
                severity="error",
                split=split,
                title="labels that train does not have",
                count=sum(here[name] for name in unknown),
                total=len(records),
                meaning=f"No model trained on these rows can answer them, and training refuses them: {told}"
                f"{', ...' if len(unknown) > SHOWN else ''}.",
                advice=f"Spell them as in train, or take the rows out.{did_you_mean(unknown[0], known)}",
                examples=tuple(examples),
                details={"labels": unknown[:100]},
            )
        )
    lacking = [name for name in known if name not in here] if train.numbers is None else []
    if lacking:
        told = ", ".join(repr(excerpt(name, 30)) for name in lacking[:SHOWN])
        found.append(
            Finding(
                kind="missing_labels",
                severity="note",
                split=split,
                title=f"labels of train that {split} does not have",
                count=len(lacking),
                total=len(known),
                unit="labels",
                meaning=f"The score of {split} says nothing about {told}{', ...' if len(lacking) > SHOWN else ''}.",
                advice="See whether the split was made at random.",
                details={"labels": lacking[:100]},
            )
        )
    return found


def _sets(split: str, records: Records, labels: SplitLabels, num_examples: int) -> list[Finding]:
    sizes = labels.sizes()
    none = np.flatnonzero(sizes == 0)
    if not len(none):
        return []
    return [
        Finding(
            kind="rows_without_a_label",
            severity="warning" if len(none) > len(sizes) / 2 else "note",
            split=split,
            title="rows that have none of the labels",
            count=len(none),
            total=len(sizes),
            meaning=f"A multi-label row may have none; the mean is {sizes.mean():.2f} labels a row, the most {sizes.max()}.",
            advice="Nothing, if none is an answer; else they are rows that nobody labelled.",
            examples=tuple(
                Example(split=split, row=int(row), text=excerpt(records.texts[int(row)].as_py()))
                for row in none[:num_examples]
            ),
            details={"mean_labels": float(sizes.mean()), "most_labels": int(sizes.max())},
        )
    ]


def _numbers(
    split: str, records: Records, labels: SplitLabels, train: SplitLabels, num_examples: int
) -> list[Finding]:
    numbers = labels.numbers
    assert numbers is not None
    found = []

    def finding(
        kind: str, severity: Severity, title: str, rows: Any, meaning: str, advice: str
    ) -> None:
        examples = tuple(
            Example(
                split=split,
                row=int(row),
                text=excerpt(records.texts[int(row)].as_py()),
                note=f"label {numbers[row]:g}",
            )
            for row in rows[:num_examples]
        )
        found.append(
            Finding(
                kind=kind, severity=severity, split=split, title=title, count=len(rows), total=len(numbers), meaning=meaning, advice=advice,
                examples=examples,
            )
        )  # fmt: skip

    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    told = f"Labels go from {numbers.min():g} to {numbers.max():g}, the middle half from {low:g} to {high:g} (median {middle:g})."
    if split == "train" and numbers.min() == numbers.max():
        everything = np.arange(len(numbers))
        finding(
            "single_label",
            "error",
            "all rows have one number",
            everything,
            "There is nothing to learn.",
            "See --label_column.",
        )
        return found
    reach = OUTLIER * (high - low)
    far = np.flatnonzero((numbers < low - reach) | (numbers > high + reach))
    if len(far) and reach:
        far = far[np.argsort(-np.abs(numbers[far] - middle), kind="stable")]
        finding(
            "outliers",
            "warning",
            "numbers far from all others",
            far,
            told,
            "A squared error follows them: correct or clip them.",
        )
    if split != "train" and train.numbers is not None:
        outside = np.flatnonzero((numbers < train.numbers.min()) | (numbers > train.numbers.max()))
        if len(outside):
            finding(
                "outside_range",
                "warning",
                "numbers outside the range of train",
                outside,
                told,
                "See whether both have one scale.",
            )
    return found


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
