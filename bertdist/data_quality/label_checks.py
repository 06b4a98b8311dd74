"""The labels of all splits as the task of training names them, and checks on them.

Checked are labels that training refuses, label frequencies, labels that only some splits have, rows
without a label, and numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bertdist.core.errors import DataError, listed
from bertdist.core.terminal import excerpt
from bertdist.core.types import IntArray
from bertdist.data.records import Records
from bertdist.data_quality.findings import MIN_ROWS, FindingBuilder, Severity
from bertdist.tasks.labels import LIKENESS, alike_labels, describe_alike
from bertdist.tasks.tasks import Task

RARE_ROWS = 10  # a label with fewer training rows is reported
IMBALANCE = 10.0  # rows of the most frequent label / rows of the rarest
OUTLIER = 5.0  # interquartile ranges outside the quartiles
LISTED_LABELS = 12  # in one sentence

REFUSED_TITLE = "labels that training refuses"
REFUSED_ADVICE = "Correct the labels, or the flags that say how they are read."


@dataclass(frozen=True, kw_only=True)
class SplitLabels:
    """The labels of one split. A label is a set of names: one, or any number if multi-label."""

    names: Sequence[frozenset[str]]  # distinct
    refusals: Sequence[str]  # of each: why training refuses it, or ""
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


def split_labels(records: Records, task: Task | None) -> SplitLabels | None:
    """The labels of one split, None if it has none.

    task: of the training rows, None if training refuses them: then labels are named as they are.
    """
    if records.label_indices is None:
        return None
    decoded: list[Any] = list(records.label_values)
    refusals = [""] * len(decoded)
    if task is not None:
        for code, value in enumerate(records.label_values):
            try:
                decoded[code] = task.decode_target(task.encode_label(value))
            except DataError as error:
                refusals[code] = str(error)
    index: dict[tuple[frozenset[str], str], int] = {}
    codes = []
    for value, refusal in zip(decoded, refusals, strict=True):
        names = frozenset(map(str, value if isinstance(value, list | tuple) else [value]))
        codes.append(index.setdefault((names, refusal), len(index)))
    numbers = None
    if task is not None and task.problem_type == "regression" and not any(refusals):
        numbers = np.array(decoded, np.float64)[records.label_indices]
    return SplitLabels(
        names=[names for names, _ in index],
        refusals=[refusal for _, refusal in index],
        codes=np.array(codes, np.int64)[records.label_indices],
        numbers=numbers,
        multi=records.label_kind == "set",
    )


def check_labels(
    builders: Mapping[str, FindingBuilder],
    labels: Mapping[str, SplitLabels | None],
    refusal: str,
) -> None:
    """Add all findings on labels. Splits are by name, train first.

    refusal: why training refuses the training labels, or "".
    """
    train = labels["train"]
    assert train is not None
    for name, build in builders.items():
        own = labels[name]
        if own is None:
            title, advice = "rows without labels", "Nothing to do for rows to predict."
            meaning, rows = "They were not compared with the labels of train.", len(build.records)
            build.add("no_labels", "note", title, [], meaning, advice, count=rows)
            continue
        _add_refused(build, own, train)
        if own.numbers is not None:
            _check_numbers(build, own.numbers, train)
        elif name == "train":
            if not any(own.refusals):
                _check_train_labels(build, own, refusal)
        else:
            _compare_with_train(build, own, train)
        if own.multi:
            _check_unlabeled(build, own)


def _check_train_labels(build: FindingBuilder, labels: SplitLabels, refusal: str) -> None:
    """Findings on the labels of the training rows alone."""
    counts, num_rows = labels.counts(), len(labels.codes)
    names = list(counts)
    like_ids = not labels.multi and num_rows >= MIN_ROWS and len(names) > num_rows / 2
    if refusal or like_ids:
        kind, title, advice = "refused_labels", REFUSED_TITLE, REFUSED_ADVICE
        if len(names) < 2:
            kind, title = "single_label", "all rows have one label"
            if not names:
                title = "no row has a label"
            advice = "Check --label_column, and whether the file is sorted and was truncated."
        elif like_ids:
            kind, title = "labels_like_ids", "nearly every row has its own label"
            advice = "Check --label_column; numeric targets need --problem_type regression."
        severity: Severity = "error" if refusal else "warning"
        meaning = refusal or "This is what a column of numbers, names or texts looks like."
        rows = labels.first_rows(names[: build.num_examples])
        if refusal:  # the row that it names comes first
            firsts = np.unique(labels.codes, return_index=True)[1].tolist()
            place = build.records.location
            named = [row for row in firsts if refusal.startswith(f"{place(row)}: ")]
            rows = [*named, *(row for row in rows if row not in named)][: build.num_examples]
        shown: dict[str, Any] = {"note": labels.name, "count": num_rows}
        build.add(kind, severity, title, rows, meaning, advice, **shown)
        return
    rare = [name for name in reversed(names) if counts[name] < RARE_ROWS]
    counted = [f"{excerpt(name, 30)!r} {counts[name]}" for name in rare]
    build.add(
        "rare_labels",
        "warning",
        f"labels with fewer than {RARE_ROWS} rows",
        labels.first_rows(rare[: build.num_examples]),
        f"Too few to learn from or to score: {listed(counted, LISTED_LABELS)}.",
        "Collect more, or merge labels.",
        note=labels.name,
        count=len(rare),
        total=len(names),
        unit="labels",
    )
    most, least = max(counts.values()), max(1, min(counts.values()))
    if most / least >= IMBALANCE:
        build.add(
            "imbalance",
            "note",
            f"the most frequent label has {most / least:,.0f} times the rows of the rarest",
            [],
            f"Always predicting {excerpt(names[0], 30)!r} is right in {most / num_rows:.1%} of the "
            "rows: accuracy means little.",
            "Use --metrics f1_macro, and try --class_weights balanced.",
            count=most,
        )
    for variants in alike_labels(names):
        build.add(
            "labels_alike",
            "warning",
            f"labels that differ only in {LIKENESS}",
            labels.first_rows(variants[: build.num_examples]),
            describe_alike(variants),
            "Use one spelling.",
            count=sum(counts[name] for name in variants[1:]),
            note=labels.name,
        )


def _add_refused(build: FindingBuilder, labels: SplitLabels, train: SplitLabels) -> None:
    """Labels that the task of training does not have, or cannot read."""
    refused = [code for code, refusal in enumerate(labels.refusals) if refusal]
    if not refused:
        return
    rows = np.flatnonzero(np.isin(labels.codes, refused))  # in file order, as training reads
    _, firsts = np.unique(labels.codes[rows], return_index=True)
    known = {} if labels is train else train.counts()
    names = {name for code in refused for name in labels.names[code]} - known.keys()
    unknown = [name for name in labels.counts() if name in names]
    counts = labels.counts()
    counted = [f"{excerpt(name, 30)!r} {counts[name]:,}" for name in unknown]
    all_unknown = f" All: {listed(counted, LISTED_LABELS)}." if unknown else ""
    of_first = labels.refusals[labels.codes[rows[0]]]
    kind, title = "unknown_labels", "labels that train does not have"
    advice = "Spell them as in train, or remove the rows."
    if labels is train:
        kind, title, advice = "refused_labels", REFUSED_TITLE, REFUSED_ADVICE
    build.add(
        kind,
        "error",
        title,
        rows[np.sort(firsts)],
        f"Training stops at the first: {of_first}{all_unknown}",
        advice,
        note=labels.name,
        count=len(rows),
        details={"labels": unknown[:100]},
    )


def _compare_with_train(build: FindingBuilder, labels: SplitLabels, train: SplitLabels) -> None:
    """Findings on the labels of another split against those of train."""
    counts, train_counts = labels.counts(), train.counts()
    missing = [] if train.numbers is not None else [n for n in train_counts if not counts.get(n)]
    named = listed([repr(excerpt(name, 30)) for name in missing], LISTED_LABELS)
    build.add(
        "missing_labels",
        "note",
        f"labels of train that {build.split} does not have",
        [],
        f"The score on {build.split} says nothing about {named}.",
        "Check whether the split was made at random.",
        count=len(missing),
        total=len(train_counts),
        unit="labels",
        details={"labels": missing[:100]},
    )


def _check_unlabeled(build: FindingBuilder, labels: SplitLabels) -> None:
    sizes = labels.sizes()
    rows, mean, most = np.flatnonzero(sizes == 0), float(sizes.mean()), int(sizes.max())
    severity: Severity = "warning" if len(rows) > len(sizes) / 2 else "note"
    title = "rows that have none of the labels"
    meaning = f"A multi-label row may have none; labels per row: mean {mean:.2f}, maximum {most}."
    advice = "Nothing to do if no label is a valid answer; else these rows were never labeled."
    details = {"mean_labels": mean, "most_labels": most}
    build.add("rows_without_a_label", severity, title, rows, meaning, advice, details=details)


def _check_numbers(
    build: FindingBuilder, numbers: npt.NDArray[np.float64], train: SplitLabels
) -> None:
    def note(row: int) -> str:
        return f"label {numbers[row]:g}"

    least, low, middle, high, most = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1])
    if build.split == "train" and least == most:
        title, meaning = "all rows have one number", "There is nothing to learn."
        rows, advice = range(len(numbers)), "Check --label_column."
        build.add("single_label", "warning", title, rows, meaning, advice, note=note)
    meaning = (
        f"Labels range from {least:g} to {most:g}, quartiles {low:g} and {high:g} (median "
        f"{middle:g})."
    )
    reach = OUTLIER * (high - low)
    outliers = np.flatnonzero((numbers < low - reach) | (numbers > high + reach))
    if reach:
        outliers = outliers[np.argsort(-np.abs(numbers[outliers] - middle), kind="stable")]
        title, advice = "numbers far from all others", "They dominate a squared error: clip them."
        build.add("outliers", "warning", title, outliers, meaning, advice, note=note)
    if train.numbers is not None:  # of train itself none is outside
        outside = np.flatnonzero((numbers < train.numbers.min()) | (numbers > train.numbers.max()))
        title = "numbers outside the range of train"
        advice = "Check whether both have the same scale."
        build.add("outside_range", "warning", title, outside, meaning, advice, note=note)
