"""The labels of all splits in one numbering, and checks on them.

As in training, a label is its name: 1, "1" and a class named 1 are the same label. Checked are label
frequencies, labels that one split has and another lacks, rows without a label, and numbers.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bertdist.core.errors import did_you_mean
from bertdist.core.terminal import excerpt
from bertdist.core.types import IntArray
from bertdist.data.records import Records
from bertdist.data_quality.findings import Finding, FindingBuilder

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

    def range(self) -> dict[str, float]:
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
            findings.append(
                build(
                    "no_labels",
                    "note",
                    "rows without labels",
                    range(len(records)),
                    "They were not compared with the labels of train.",
                    "None needed for rows to predict.",
                    examples=(),
                )
            )
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
    counts, num_rows = labels.counts(), len(labels.codes)

    if not counts or (len(counts) < 2 and not labels.multi):
        title, advice = "no row has a label", "--label_column, --label_columns, --label_delimiter"
        if counts:
            title = "all rows have one label"
            advice = "--label_column, and whether the file is sorted and was truncated"
        return [
            build(
                "single_label",
                "error",
                title,
                labels.first_rows(list(counts)[: build.num_examples]),
                "There is nothing to learn.",
                f"Check {advice}.",
                note=labels.name,
                count=num_rows,
            )
        ]
    if not labels.multi and num_rows >= 20 and len(counts) > 0.5 * num_rows:
        return [
            build(
                "labels_like_ids",
                "error",
                "nearly every row has its own label",
                labels.first_rows(list(counts)[: build.num_examples]),
                f"{len(counts):,} labels in {num_rows:,} rows: this is what a column of numbers, "
                "names or texts looks like.",
                "Check --label_column; numeric targets need --problem_type regression.",
                note=labels.name,
                count=len(counts),
                unit="labels",
            )
        ]
    findings = []
    rare = [name for name in reversed(counts) if counts[name] < RARE_ROWS]
    if rare:
        findings.append(
            build(
                "rare_labels",
                "warning",
                f"labels with fewer than {RARE_ROWS} rows",
                labels.first_rows(rare[: build.num_examples]),
                "Too few to learn from or to score: "
                f"{_list_labels([f'{excerpt(name, 30)!r} {counts[name]}' for name in rare])}.",
                "Collect more, or merge labels.",
                note=labels.name,
                count=len(rare),
                total=len(counts),
                unit="labels",
            )
        )
    most, least = max(counts.values()), max(1, min(counts.values()))
    if most / least >= IMBALANCE:
        findings.append(
            build(
                "imbalance",
                "note",
                f"the most frequent label has {most / least:,.0f} times the rows of the rarest",
                [],
                f"Always predicting {excerpt(next(iter(counts)), 30)!r} is right in "
                f"{most / num_rows:.1%} of the rows: accuracy means little.",
                "Use --metrics f1_macro, and try --class_weights balanced.",
                count=most,
            )
        )
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(" ".join(name.lower().split()), []).append(name)
    for names in (names for names in spellings.values() if len(names) > 1):
        listed = ", ".join(repr(excerpt(name, 30)) for name in names[:3])
        findings.append(
            build(
                "labels_alike",
                "warning",
                f"labels that differ only in case or white space: {listed}",
                labels.first_rows(names[: build.num_examples]),
                "They are trained as different labels.",
                "Use one spelling.",
                note=labels.name,
                count=sum(counts[name] for name in names[1:]),
            )
        )
    return findings


def _compare_with_train(
    build: FindingBuilder, labels: SplitLabels, train: SplitLabels
) -> list[Finding]:
    counts, known = labels.counts(), train.counts()
    numeric = train.numbers is not None
    findings = []
    unknown = [name for name in counts if (not _is_number(name) if numeric else name not in known)]
    if unknown:
        listed = _list_labels([f"{excerpt(name, 30)!r} {counts[name]:,}" for name in unknown])
        findings.append(
            build(
                "unknown_labels",
                "error",
                "labels that train does not have",
                labels.first_rows(unknown[: build.num_examples]),
                "No model trained on these rows can predict them, and training refuses them: "
                f"{listed}.",
                f"Spell them as in train, or remove the rows.{did_you_mean(unknown[0], known)}",
                note=labels.name,
                count=sum(counts[name] for name in unknown),
                details={"labels": unknown[:100]},
            )
        )
    missing = [] if numeric else [name for name in known if name not in counts]
    if missing:
        listed = _list_labels([repr(excerpt(name, 30)) for name in missing])
        findings.append(
            build(
                "missing_labels",
                "note",
                f"labels of train that {build.split} does not have",
                [],
                f"The score on {build.split} says nothing about {listed}.",
                "Check whether the split was made at random.",
                count=len(missing),
                total=len(known),
                unit="labels",
                details={"labels": missing[:100]},
            )
        )
    return findings


def _check_unlabeled(build: FindingBuilder, labels: SplitLabels) -> list[Finding]:
    sizes = labels.sizes()
    rows = np.flatnonzero(sizes == 0)
    if not len(rows):
        return []
    return [
        build(
            "rows_without_a_label",
            "warning" if len(rows) > len(sizes) / 2 else "note",
            "rows that have none of the labels",
            rows,
            "A multi-label row may have none; labels per row: mean "
            f"{sizes.mean():.2f}, maximum {sizes.max()}.",
            "None needed if no label is a valid answer; else these rows were never labeled.",
            details={"mean_labels": float(sizes.mean()), "most_labels": int(sizes.max())},
        )
    ]


def _check_numbers(
    build: FindingBuilder, numbers: npt.NDArray[np.float64], train: SplitLabels
) -> list[Finding]:
    def note(row: int) -> str:
        return f"label {numbers[row]:g}"

    least, low, middle, high, most = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1])
    if build.split == "train" and least == most:
        return [
            build(
                "single_label",
                "error",
                "all rows have one number",
                range(len(numbers)),
                "There is nothing to learn.",
                "Check --label_column.",
                note=note,
            )
        ]
    findings = []
    meaning = (
        f"Labels range from {least:g} to {most:g}, quartiles {low:g} and {high:g} (median "
        f"{middle:g})."
    )
    reach = OUTLIER * (high - low)
    outliers = np.flatnonzero((numbers < low - reach) | (numbers > high + reach))
    if len(outliers) and reach:
        outliers = outliers[np.argsort(-np.abs(numbers[outliers] - middle), kind="stable")]
        advice = "They dominate a squared error: correct or clip them."
        title = "numbers far from all others"
        findings.append(build("outliers", "warning", title, outliers, meaning, advice, note=note))
    if build.split != "train" and train.numbers is not None:
        outside = np.flatnonzero((numbers < train.numbers.min()) | (numbers > train.numbers.max()))
        if len(outside):
            advice = "Check whether both have the same scale."
            title = "numbers outside the range of train"
            findings.append(
                build("outside_range", "warning", title, outside, meaning, advice, note=note)
            )
    return findings


def _list_labels(labels: Sequence[str]) -> str:
    return ", ".join(labels[:LISTED_LABELS]) + (", ..." if len(labels) > LISTED_LABELS else "")


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
