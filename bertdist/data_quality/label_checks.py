"""The labels of all splits in one numbering, and checks on them.

As in training, a label is its name: 1, "1" and a class named 1 are the same label. Checked are
label frequencies, labels that only some splits have, rows without a label, and numbers.
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
from bertdist.core.types import IntArray
from bertdist.data.records import Records
from bertdist.data_quality.findings import Finding, FindingBuilder, Rows, Severity

RARE_ROWS = 10  # a label with fewer training rows is reported
IMBALANCE = 10.0  # rows of the most frequent label / rows of the rarest
OUTLIER = 5.0  # interquartile ranges outside the quartiles
LISTED_LABELS = 12  # in one sentence


@dataclass(frozen=True, kw_only=True)
class SplitLabels:
    """The labels of one split. A label is a set of names: one, or any number if multi-label."""

    names: Sequence[frozenset[str]]  # distinct
    codes: IntArray  # (rows,) index into names
    numbers: npt.NDArray[np.float64] | None  # (rows,) regression targets
    multi: bool  # a multi-label task

    def name(self, row: int) -> str:
        """`label 'good'`, for messages about a row."""
        names = sorted(self.names[self.codes[row]])
        return "label " + (", ".join(repr(excerpt(name, 40)) for name in names) or "none")

    def names_of(self, rows: IntArray) -> list[frozenset[str]]:
        """The labels of some rows."""
        return [self.names[code] for code in self.codes[rows]]

    def first_rows(self, names: Sequence[str]) -> list[int]:
        """The first row of each of some labels; a label may have none."""
        rows: list[int] = []
        for name in names:
            codes = [code for code, own in enumerate(self.names) if name in own]
            rows += np.flatnonzero(np.isin(self.codes, codes))[:1].tolist()
        return rows

    def sizes(self) -> IntArray:
        """(rows,): the number of labels of each row."""
        return np.array([len(names) for names in self.names], np.int64)[self.codes]

    def summary(self) -> dict[str, float]:
        """Minimum, quartiles, maximum and mean of regression targets."""
        assert self.numbers is not None
        quantiles = np.quantile(self.numbers, [0, 0.25, 0.5, 0.75, 1]).tolist()
        statistics = dict(zip(("least", "25%", "median", "75%", "most"), quantiles, strict=True))
        return {**statistics, "mean": float(self.numbers.mean())}

    def counts(self) -> dict[str, int]:
        """Rows per label, the most frequent first."""
        rows_of_code = np.bincount(self.codes, minlength=len(self.names))
        rows_of_name: dict[str, int] = {}
        for names, count in zip(self.names, rows_of_code.tolist(), strict=True):
            for name in names:
                rows_of_name[name] = rows_of_name.get(name, 0) + count
        return dict(sorted(rows_of_name.items(), key=lambda item: (-item[1], item[0])))


def split_labels(records: Records, problem_type: str) -> SplitLabels | None:
    """The labels of one split, None if it has none. problem_type: that of the training rows."""
    if records.label_codes is None:
        return None
    names = [
        frozenset(map(str, value)) if isinstance(value, tuple) else frozenset((str(value),))
        for value in records.label_values
    ]
    index: dict[frozenset[str], int] = {}
    merged = np.array([index.setdefault(name, len(index)) for name in names], np.int64)
    numbers = None
    if problem_type == "regression":
        # Labels of another kind than those of train are reported by `check_labels`.
        with suppress(TypeError, ValueError):
            values = [float(value) for value in records.label_values]  # type: ignore[arg-type]
            numbers = np.array(values)[records.label_codes]
    return SplitLabels(
        names=list(index),
        codes=merged[records.label_codes],
        numbers=numbers,
        multi=records.label_kind == "set",
    )


def check_labels(
    splits: Mapping[str, Records], labels: Mapping[str, SplitLabels | None], num_examples: int
) -> list[Finding]:
    """All findings on labels. Splits are by name, train first."""
    train = labels["train"]
    assert train is not None
    findings: list[Finding] = []
    for name, records in splits.items():
        build, own = FindingBuilder(name, records.texts, num_examples), labels[name]
        if own is None:
            title, advice = "rows without labels", "None needed for rows to predict."
            meaning, rows = "They were not compared with the labels of train.", range(len(records))
            findings.append(build("no_labels", "note", title, rows, meaning, advice, examples=()))
            continue
        if own.numbers is not None:
            findings += _check_numbers(build, own.numbers, train)
        elif name == "train":
            findings += _check_train_labels(build, own)
        else:
            findings += _compare_with_train(build, own, train)
        if own.multi:
            findings += _check_unlabeled(build, own)
    return findings


def _check_train_labels(build: FindingBuilder, labels: SplitLabels) -> list[Finding]:
    """Findings on the labels of the training rows alone."""
    counts, num_rows = labels.counts(), len(labels.codes)

    def finding(
        kind: str,
        severity: Severity,
        title: str,
        names: Sequence[str],
        meaning: str,
        advice: str,
        **fields: Any,
    ) -> Finding:
        """With the first row of each of some labels as examples."""
        rows = labels.first_rows(names[: build.num_examples])
        return build(kind, severity, title, rows, meaning, advice, note=labels.name, **fields)

    names = list(counts)
    if not names or (len(names) < 2 and not labels.multi):
        title, advice = "no row has a label", "--label_column, --label_columns, --label_delimiter"
        if names:
            title = "all rows have one label"
            advice = "--label_column, and whether the file is sorted and was truncated"
        meaning, advice = "There is nothing to learn.", f"Check {advice}."
        return [finding("single_label", "error", title, names, meaning, advice, count=num_rows)]
    if not labels.multi and num_rows >= 20 and len(names) > 0.5 * num_rows:
        title = "nearly every row has its own label"
        meaning = "This is what a column of numbers, names or texts looks like."
        advice = "Check --label_column; numeric targets need --problem_type regression."
        count = {"count": len(names), "unit": "labels"}
        return [finding("labels_like_ids", "error", title, names, meaning, advice, **count)]
    findings = []
    rare = [name for name in reversed(names) if counts[name] < RARE_ROWS]
    if rare:
        title = f"labels with fewer than {RARE_ROWS} rows"
        listed = _list_labels([f"{excerpt(name, 30)!r} {counts[name]}" for name in rare])
        meaning = f"Too few to learn from or to score: {listed}."
        advice = "Collect more, or merge labels."
        count = {"count": len(rare), "total": len(names), "unit": "labels"}
        findings.append(finding("rare_labels", "warning", title, rare, meaning, advice, **count))
    most, least = max(counts.values()), max(1, min(counts.values()))
    if most / least >= IMBALANCE:
        title = f"the most frequent label has {most / least:,.0f} times the rows of the rarest"
        meaning = (
            f"Always predicting {excerpt(names[0], 30)!r} is right in {most / num_rows:.1%} of the "
            "rows: accuracy means little."
        )
        advice = "Use --metrics f1_macro, and try --class_weights balanced."
        findings.append(finding("imbalance", "note", title, [], meaning, advice, count=most))
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(" ".join(name.lower().split()), []).append(name)
    for variants in (names for names in spellings.values() if len(names) > 1):
        listed = ", ".join(repr(excerpt(name, 30)) for name in variants[:3])
        title = f"labels that differ only in case or white space: {listed}"
        meaning, advice = "They are trained as different labels.", "Use one spelling."
        rows = sum(counts[name] for name in variants[1:])
        findings.append(
            finding("labels_alike", "warning", title, variants, meaning, advice, count=rows)
        )
    return findings


def _compare_with_train(
    build: FindingBuilder, labels: SplitLabels, train: SplitLabels
) -> list[Finding]:
    """Findings on the labels of another split against those of train."""
    split, counts, train_counts = build.split, labels.counts(), train.counts()
    numeric = train.numbers is not None
    findings = []
    unknown = [
        name for name in counts if (not _is_number(name) if numeric else name not in train_counts)
    ]
    if unknown:
        listed = _list_labels([f"{excerpt(name, 30)!r} {counts[name]:,}" for name in unknown])
        suggestion = did_you_mean(unknown[0], train_counts)
        findings.append(
            build(
                "unknown_labels",
                "error",
                "labels that train does not have",
                labels.first_rows(unknown[: build.num_examples]),
                "No model trained on these rows can predict them, and training refuses them: "
                f"{listed}.",
                f"Spell them as in train, or remove the rows.{suggestion}",
                note=labels.name,
                count=sum(counts[name] for name in unknown),
                details={"labels": unknown[:100]},
            )
        )
    missing = [] if numeric else [name for name in train_counts if name not in counts]
    if missing:
        title = f"labels of train that {split} does not have"
        listed = _list_labels([repr(excerpt(name, 30)) for name in missing])
        meaning = f"The score on {split} says nothing about {listed}."
        advice = "Check whether the split was made at random."
        fields: dict[str, Any] = {
            "count": len(missing),
            "total": len(train_counts),
            "unit": "labels",
        }
        details = {"labels": missing[:100]}
        findings.append(
            build("missing_labels", "note", title, [], meaning, advice, details=details, **fields)
        )
    return findings


def _check_unlabeled(build: FindingBuilder, labels: SplitLabels) -> list[Finding]:
    sizes = labels.sizes()
    rows = np.flatnonzero(sizes == 0)
    if not len(rows):
        return []
    severity: Severity = "warning" if len(rows) > len(sizes) / 2 else "note"
    title, mean, most = "rows that have none of the labels", float(sizes.mean()), int(sizes.max())
    meaning = f"A multi-label row may have none; labels per row: mean {mean:.2f}, maximum {most}."
    advice = "None needed if no label is a valid answer; else these rows were never labeled."
    details = {"mean_labels": mean, "most_labels": most}
    kind = "rows_without_a_label"
    return [build(kind, severity, title, rows, meaning, advice, details=details)]


def _check_numbers(
    build: FindingBuilder, numbers: npt.NDArray[np.float64], train: SplitLabels
) -> list[Finding]:
    findings = []

    def add(
        kind: str, severity: Severity, title: str, rows: Rows, meaning: str, advice: str
    ) -> None:
        def note(row: int) -> str:
            return f"label {numbers[row]:g}"

        findings.append(build(kind, severity, title, rows, meaning, advice, note=note))

    least, low, middle, high, most = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1])
    if build.split == "train" and least == most:
        title, meaning = "all rows have one number", "There is nothing to learn."
        add("single_label", "error", title, range(len(numbers)), meaning, "Check --label_column.")
        return findings
    meaning = (
        f"Labels range from {least:g} to {most:g}, quartiles {low:g} and {high:g} (median "
        f"{middle:g})."
    )
    reach = OUTLIER * (high - low)
    outliers = np.flatnonzero((numbers < low - reach) | (numbers > high + reach))
    if len(outliers) and reach:
        outliers = outliers[np.argsort(-np.abs(numbers[outliers] - middle), kind="stable")]
        advice = "They dominate a squared error: correct or clip them."
        add("outliers", "warning", "numbers far from all others", outliers, meaning, advice)
    if build.split != "train" and train.numbers is not None:
        outside = np.flatnonzero((numbers < train.numbers.min()) | (numbers > train.numbers.max()))
        if len(outside):
            title, advice = (
                "numbers outside the range of train",
                "Check whether both have the same scale.",
            )
            add("outside_range", "warning", title, outside, meaning, advice)
    return findings


def _list_labels(labels: Sequence[str]) -> str:
    return ", ".join(labels[:LISTED_LABELS]) + (", ..." if len(labels) > LISTED_LABELS else "")


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
