"""The data report: `check_data` runs every data check on every split of a data set.

    report = check_data(DataConfig(train_file=["train.tsv"], validation_file="dev.tsv"))
    report.findings[0].title, report.lengths["train"].percentiles, report.as_dict()

`bertdist check` shows all of it, `bertdist train --dry_run` one line per finding.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertdist.core.config import DataConfig, RunConfig, TaskConfig
from bertdist.core.errors import BertdistError, DataError, RowError
from bertdist.core.terminal import excerpt
from bertdist.data.load_data import load_parts, load_records, load_texts, needs_numbers, open_files
from bertdist.data.records import ColumnNames, Records
from bertdist.data_quality.duplicates import TextGroups, check_duplicates, group_texts, has_rensa
from bertdist.data_quality.findings import ExampleRow, Finding, FindingBuilder, counts, ranked
from bertdist.data_quality.label_checks import SplitLabels, check_labels, split_labels
from bertdist.data_quality.length_checks import Lengths, measure_lengths
from bertdist.data_quality.table_checks import check_table
from bertdist.data_quality.text_checks import check_texts, has_ftfy
from bertdist.tasks.tasks import Task, create_task

SHOWN_REASONS = 5  # for rows that were skipped
REFUSED_ROWS = "refused_rows"  # the kind of a finding: training ends at such a row


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """All splits of a data set and all findings on them."""

    data: DataConfig  # where they are
    splits: Mapping[str, Records]  # by name, train first
    labels: Mapping[str, SplitLabels | None]
    lengths: Mapping[str, Lengths]
    groups: TextGroups
    problem_type: str | None  # None: training refuses the labels
    findings: list[Finding]  # ranked
    notes: list[str]  # which checks could not run, and why

    def as_dict(self) -> dict[str, Any]:
        """The contents of check.json."""
        return {
            "problem_type": self.problem_type,
            "counts": counts(self.findings),
            "findings": [finding.as_dict() for finding in self.findings],
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
    task: TaskConfig = TaskConfig(),  # noqa: B008  frozen
    test_file: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 128,
    near_threshold: float = 0.8,
    num_examples: int = 3,
    seed: int = RunConfig.seed,
    without_refused: bool = False,
) -> DataReport:
    """Run all checks on all splits.

    tokenizer: None counts characters and words instead of tokens. near_threshold: Jaccard
    similarity from which texts are near duplicates; 0 skips that check. without_refused: rows that
    training refuses (--on_bad_row fail) are an error in the report, which is about the others.
    Raises DataError if train or validation cannot be read, ConfigError as training would.
    """
    findings: list[Finding] = []
    refuses = False
    try:
        splits = load_all_splits(data, test_file, findings, task, seed)
    except RowError as error:
        if not without_refused:
            raise
        refuses, skipping = True, replace(data, on_bad_row="skip")
        try:
            splits = load_all_splits(skipping, test_file, findings, task, seed)
        except DataError:  # such as: no row is left
            raise error from None
    builders = {
        name: FindingBuilder(name, records, num_examples, findings)
        for name, records in splits.items()
    }
    trained, refusal = _task_of_training(splits["train"], task)
    labels = {name: split_labels(records, trained) for name, records in splits.items()}
    train_labels = labels["train"]
    assert train_labels is not None
    skipped = sum(len(records.bad_rows) for records in splits.values())
    for name, build in builders.items():
        records = build.records
        _add_bad_rows(build, skipped > data.max_bad_rows, data.max_bad_rows, refuses)
        check_table(build, labels[name], train_labels)
        check_texts(build, records.texts, records.text_column)
        if records.pairs is not None and records.pair_column is not None:
            check_texts(build, records.pairs, records.pair_column)
    check_labels(builders, labels, refusal)
    notes = [f"{note}." for records in splits.values() for note in records.format_notes]
    notes += _missing_packages(near_threshold)
    groups = group_texts(splits, near_threshold if has_rensa() else 0.0)
    check_duplicates(builders, labels, groups)
    lengths = {}
    for name, build in builders.items():
        lengths[name] = measure_lengths(build, tokenizer, max_length)
        counted, of = lengths[name].rows, lengths[name].of
        if counted < of:
            notes.append(f"Tokens of {name} were counted in {counted:,} of its {of:,} rows.")
    return DataReport(
        data=data,
        splits=splits,
        labels=labels,
        lengths=lengths,
        groups=groups,
        problem_type=trained.problem_type if trained else None,
        findings=ranked(findings),
        notes=notes,
    )


def _task_of_training(train: Records, config: TaskConfig) -> tuple[Task | None, str]:
    """The task of training; or None, and why training refuses these labels."""
    try:
        return create_task(config, train.label_stats(), None), ""
    except DataError as error:
        return None, str(error)


def _missing_packages(near_threshold: float) -> list[str]:
    """Notes on the checks that need a package which is not installed."""
    notes = []
    if near_threshold and not has_rensa():
        notes.append(
            "Near duplicates were not checked: rensa is not installed "
            "(pip install 'bertdist[check]')."
        )
    if not has_ftfy():
        notes.append(
            "Wrong encodings were checked with three patterns only: ftfy is not installed "
            "(pip install 'bertdist[check]')."
        )
    return notes


def load_all_splits(
    data: DataConfig,
    test_file: str | None,
    findings: list[Finding],
    task: TaskConfig = TaskConfig(),  # noqa: B008  frozen
    seed: int = RunConfig.seed,
) -> dict[str, Records]:
    """Splits by name, train first. Adds a finding if the labels of the test file are unreadable."""
    splits = load_parts(data, task, seed)
    if test_file is None:
        return splits
    numbers_only = needs_numbers(task, splits["train"])
    as_validation = replace(
        data, validation_file=test_file, validation_split=None, max_eval_samples=None
    )
    try:
        test = load_records(as_validation, "validation", numbers_only)
        assert test is not None
        splits["test"] = test
    except BertdistError as error:
        train = splits["train"]
        try:
            splits["test"] = test = load_texts(
                test_file,
                replace(data, text_column=None, text_pair_column=None),
                ColumnNames(train.text_columns, train.pair_column, None, []),
            )
        except DataError:
            raise error from None
        if _has_label_columns(test_file, data, train):
            build, count = FindingBuilder("test", test, 0, findings), len(test)
            title = "the labels cannot be read"
            advice = "Nothing to do if these rows are to be predicted; else correct the file."
            build.add("unreadable_labels", "warning", title, [], str(error), advice, count=count)
    return splits


def _has_label_columns(path: str, data: DataConfig, train: Records) -> bool:
    """Whether a file has the label columns of the training rows."""
    names = next(open_files(path, data)).column_names()
    if data.label_columns is None:
        return train.label_column in names
    return set(data.label_columns) <= set(names)


def _add_bad_rows(build: FindingBuilder, too_many: bool, limit: int, refuses: bool) -> None:
    """Rows that cannot be read, which were skipped: how many, and why.

    too_many: of all splits together, as training counts them. refuses: training ends at
    the first of them (--on_bad_row fail).
    """
    bad = build.records.bad_rows
    # Without the part of a reason that differs from row to row.
    reasons = Counter(re.split(r" ?[;(]", row.reason)[0] for row in bad).most_common()
    listed = "; ".join(f"{reason} ({count:,})" for reason, count in reasons[:SHOWN_REASONS])
    if len(reasons) > SHOWN_REASONS:
        listed += f"; and {len(reasons) - SHOWN_REASONS:,} other reasons"
    advice = "Correct them in the source file"
    if refuses:
        listed = f"Training ends at the first of them, and no other check has them: {listed}"
        advice += ", or leave them out of training with --on_bad_row skip"
    if too_many:
        advice += f"; training fails at more than {limit:,} in all its files (--max_bad_rows)"
    build.add(
        REFUSED_ROWS if refuses else "skipped_rows",
        "error" if too_many or refuses else "warning",
        "rows that cannot be read" if refuses else "bad rows, which are skipped",
        [],
        f"{listed}.",
        f"{advice}.",
        examples=[
            ExampleRow(
                where=build.split,
                row=-1,
                text=excerpt(row.text),
                note=f"{row.location}: {row.reason}",
            )
            for row in bad[: build.num_examples]
        ],
        count=len(bad),
        total=len(build.records) + len(bad),
    )
