"""The data report: `check_data` runs every data check on every split of a data set.

    report = check_data(DataConfig(train_file=["train.tsv"], validation_file="dev.tsv"))
    report.findings[0].title, report.lengths["train"].percentiles, report.as_dict()

`python -m bertdist.check` shows all of it, `train.py --dry_run` one line per finding.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError, DataError
from bertdist.core.terminal import excerpt
from bertdist.data.loading import load_records, load_texts
from bertdist.data.readers.file_reader import FileReader, inspect_file
from bertdist.data.records import Records
from bertdist.data.source import LocateRow, RowLocation
from bertdist.data_quality.duplicates import (
    TextGroups,
    check_duplicates,
    group_texts,
    has_rensa,
)
from bertdist.data_quality.findings import (
    Example,
    Finding,
    FindingBuilder,
    counts,
    ranked,
)
from bertdist.data_quality.label_checks import SplitLabels, check_labels, split_labels
from bertdist.data_quality.length_checks import Lengths, measure_lengths
from bertdist.data_quality.table_checks import check_table
from bertdist.data_quality.text_checks import check_texts, has_ftfy
from bertdist.tasks.tasks import problem_type_of

SHOWN_REASONS = 5  # for rows that were skipped
MAX_ROWS_READ = 20_000_000  # to find the lines of examples; about 20 s


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """All splits of a data set and all findings on them."""

    splits: Mapping[str, Records]  # by name, train first
    labels: Mapping[str, SplitLabels | None]
    lengths: Mapping[str, Lengths]
    groups: TextGroups
    problem_type: str
    findings: list[Finding]  # ranked
    locations: Mapping[tuple[str, int], str]  # (split, row) -> "dev.tsv line 12", of all examples
    notes: list[str]  # which checks could not run, and why

    def location(self, example: Example) -> str:
        """`dev.tsv line 12`; the name of the split for an example that is not a row."""
        return self.locations.get((example.split, example.row), example.split)

    def as_dict(self) -> dict[str, Any]:
        """The contents of check.json."""
        return {
            "problem_type": self.problem_type,
            "counts": counts(self.findings),
            "findings": findings_as_dicts(self.findings, self.locations),
            "splits": {name: self._split_as_dict(name) for name in self.splits},
            "notes": self.notes,
        }

    def _split_as_dict(self, name: str) -> dict[str, Any]:
        records, labels = self.splits[name], self.labels[name]
        numeric = labels is not None and labels.numbers is not None
        multi = labels is not None and labels.multi
        return {
            "source": records.name,
            "rows": len(records),
            "text_column": records.text_column,
            "text_pair_column": records.pair_column,
            "label_column": records.label_column,
            "fingerprint": records.fingerprint,
            "label_counts": labels.counts() if labels is not None and not numeric else None,
            "label_range": labels.summary() if labels is not None and numeric else None,
            "labels_a_row": float(labels.sizes().mean()) if labels is not None and multi else None,
            "lengths": self.lengths[name].as_dict(),
        }


def check_data(
    data: DataConfig,
    *,
    test_file: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 128,
    problem_type: str = "auto",
    near_threshold: float = 0.8,
    num_examples: int = 3,
) -> DataReport:
    """Run all checks on all splits.

    tokenizer: None counts characters and words instead of tokens. near_threshold: Jaccard
    similarity from which texts are near duplicates; 0 skips that check.
    Raises DataError if train or validation cannot be read, ConfigError as training would.
    """
    splits, findings = load_all_splits(data, test_file)
    train = splits["train"]
    problem_type = problem_type_of(problem_type, train.label_kind or "text", train.label_values)
    labels = {name: split_labels(records, problem_type) for name, records in splits.items()}
    train_labels = labels["train"]
    assert train_labels is not None
    paths = _table_paths(data, test_file)
    for name, records in splits.items():
        build = FindingBuilder(name, records.texts, num_examples)
        findings += _skipped_rows(build, records, data.max_bad_rows)
        findings += check_table(build, paths[name], records, labels[name], train_labels, data)
        findings += check_texts(build, records.text_column)
        if records.pairs is not None and records.pair_column is not None:
            build = replace(build, texts=records.pairs)
            findings += check_texts(build, records.pair_column)
    findings += check_labels(splits, labels, num_examples)
    notes = _missing_packages(near_threshold)
    near_threshold = near_threshold if has_rensa() else 0.0
    groups = group_texts(splits, near_threshold)
    findings += check_duplicates(splits, labels, groups, num_examples)
    lengths = {}
    for name, records in splits.items():
        build = FindingBuilder(name, records.texts, num_examples)
        lengths[name], more = measure_lengths(build, records, tokenizer, max_length)
        findings += more
        if lengths[name].rows < len(records):
            notes.append(
                f"Tokens of {name} were counted in {lengths[name].rows:,} of its {len(records):,} "
                "rows."
            )
    findings = ranked(findings)
    return DataReport(
        splits=splits,
        labels=labels,
        lengths=lengths,
        groups=groups,
        problem_type=problem_type,
        findings=findings,
        locations=locate_examples(findings, splits),
        notes=notes,
    )


def _missing_packages(near_threshold: float) -> list[str]:
    """Notes on the checks that need a package which is not installed."""
    notes = []
    if near_threshold and not has_rensa():
        notes.append(
            "Near duplicates were not checked: rensa is not installed (pip install 'rensa<0.6')."
        )
    if not has_ftfy():
        notes.append(
            "Wrong encodings were checked with three patterns only: ftfy is not installed "
            "(pip install ftfy)."
        )
    return notes


def load_all_splits(
    data: DataConfig, test_file: str | None
) -> tuple[dict[str, Records], list[Finding]]:
    """Splits by name, train first; and a finding if the labels of the test file cannot be read."""
    splits = {"train": load_records(data, "train")}
    if (validation := load_records(data, "validation")) is not None:
        splits["validation"] = validation
    if test_file is None:
        return splits, []
    as_validation = replace(data, validation_file=test_file, max_eval_samples=None)
    try:
        test = load_records(as_validation, "validation")
        assert test is not None
        return {**splits, "test": test}, []
    except BertdistError as error:
        train = splits["train"]
        try:
            splits["test"] = test = load_texts(
                test_file,
                text_column=train.text_column,
                text_pair_column=train.pair_column,
                column_names=data.column_names,
                delimiter=data.delimiter,
                quoting=data.quoting,
                encoding=data.encoding,
            )
        except DataError:
            raise error from None
        if not _has_label_columns(test_file, data, train):
            return splits, []
        build, rows = FindingBuilder("test", test.texts, 0), range(len(test))
        title = "the labels cannot be read"
        advice = "None needed if these rows are to be predicted; else correct the file."
        kind = "unreadable_labels"
        return splits, [build(kind, "warning", title, rows, str(error), advice)]


def _has_label_columns(path: str, data: DataConfig, train: Records) -> bool:
    """Whether a file has the label columns of the training rows."""
    file = inspect_file(
        path,
        delimiter=data.delimiter,
        quoting=data.quoting,
        encoding=data.encoding,
        column_names=data.column_names,
    )
    names = ["text"] if file.kind == "txt" else FileReader(file).column_names()
    if data.label_columns is None:
        return train.label_column in names
    return set(data.label_columns) <= set(names)


def _table_paths(data: DataConfig, test_file: str | None) -> dict[str, str | None]:
    """The file of each split that consists of one local file."""
    files: dict[str, list[str | None]] = {
        "train": [*(data.train_file or ())],
        "validation": [data.validation_file],
        "test": [test_file],
    }
    return {
        name: paths[0] if len(paths) == 1 and paths[0] and Path(paths[0]).is_file() else None
        for name, paths in files.items()
    }


def _skipped_rows(build: FindingBuilder, records: Records, limit: int) -> list[Finding]:
    """Rows that were skipped (--on_bad_row skip): how many, and why."""
    bad = records.skipped_rows
    if not bad:
        return []
    # Without the part of a reason that differs from row to row.
    reasons = Counter(re.split(r" ?[;(]", row.reason)[0] for row in bad).most_common()
    listed = "; ".join(f"{reason} ({count:,})" for reason, count in reasons[:SHOWN_REASONS])
    if len(reasons) > SHOWN_REASONS:
        listed += f"; and {len(reasons) - SHOWN_REASONS:,} other reasons"
    advice = "Correct them in the source file"
    too_many = len(bad) > limit
    if too_many:
        advice += f"; training fails at more than {limit:,} (--max_bad_rows)"
    examples = []
    for row in bad[: build.num_examples]:
        note = f"{row.location}: {row.reason}"
        examples.append(Example(split=build.split, row=-1, text=excerpt(row.text), note=note))
    return [
        build(
            "skipped_rows",
            "error" if too_many else "warning",
            "skipped rows that cannot be read",
            [],
            f"{listed}.",
            f"{advice}.",
            examples=tuple(examples),
            count=len(bad),
            total=len(records) + len(bad),
        )
    ]


def row_locations(where: LocateRow, rows: Iterable[int], num_rows: int) -> dict[int, str]:
    """Row -> its location in the source, for many rows, with few calls of `where`.

    where: row -> "dev.tsv line 12"; every call reads the file from its start. num_rows: rows of
    the split. Rows are in file order and take one line or more each, so if two rows are as many
    lines apart as they are rows apart, every row between them takes one line: bisect until that
    holds. After about MAX_ROWS_READ rows a location is just `train.csv row 7 (from 0)`.
    """
    wanted = sorted(set(rows))
    locations: dict[int, str] = {}
    row_location: dict[int, RowLocation] = {}
    calls_left = max(8, MAX_ROWS_READ // max(1, num_rows))

    def find(row: int) -> tuple[str, int] | None:
        """(file, line), None if the source has no lines."""
        nonlocal calls_left
        if row not in locations:
            calls_left -= 1
            row_location[row] = where(row)
            locations[row] = str(row_location[row])
        file, line, _ = row_location[row]
        return None if line is None else (file, line)

    def fill(low: int, high: int) -> None:
        between = [row for row in wanted if low < row < high]
        if not between:
            return
        first, last = find(low), find(high)
        if first is None or last is None:
            name = locations[low].rsplit(" row ", 1)[0]
            locations.update({row: f"{name} row {row}" for row in between})
        elif last[1] - first[1] == high - low:
            locations.update({row: f"{first[0]} line {first[1] + row - low}" for row in between})
        elif calls_left <= 0:
            locations.update({row: f"{first[0]} row {row} (from 0)" for row in between})
        else:
            middle = between[len(between) // 2]
            find(middle)
            fill(low, middle)
            fill(middle, high)

    if wanted:
        find(wanted[0])
        find(wanted[-1])
        fill(wanted[0], wanted[-1])
    return {row: locations[row] for row in wanted}


def locate_examples(
    findings: Sequence[Finding], splits: Mapping[str, Records]
) -> dict[tuple[str, int], str]:
    """(split, row) -> location, of all examples and the rows they are compared with."""
    shown = set()
    for example in (example for finding in findings for example in finding.examples):
        shown |= {(example.split, example.row), example.like or (example.split, example.row)}
    locations: dict[tuple[str, int], str] = {}
    for name, records in splits.items():
        rows = [row for split, row in shown if split == name and row >= 0]
        for row, location in row_locations(records.location, rows, len(records)).items():
            locations[name, row] = location
    return locations


def findings_as_dicts(
    findings: Sequence[Finding], locations: Mapping[tuple[str, int], str]
) -> list[dict[str, Any]]:
    """The findings as plain data for check.json, in the given order."""
    entries = []
    for finding in findings:
        examples = []
        for example in finding.examples:
            location = locations.get((example.split, example.row), example.split)
            entry = {"where": location, "row": example.row, "text": example.text}
            entry["note"] = example.note
            if example.like is not None:
                entry["like"] = locations[example.like]
            examples.append(entry)
        computed = {"share": finding.share, "details": dict(finding.details), "examples": examples}
        entries.append({**vars(finding), **computed})
    return entries
