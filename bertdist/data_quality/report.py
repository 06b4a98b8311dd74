"""A look at all splits of a data set before any time is spent on training: `check_data`.

In: a DataConfig, a tokenizer or None. Out: an `Inspection`: the splits, their labels and lengths, which texts are the same, and all
findings in the order in which they matter. One module below train, because `python -m bertdist.check` and `--dry_run` show the same.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError, DataError
from bertdist.core.terminal import excerpt
from bertdist.data.loading import load_records, open_texts
from bertdist.data.readers.file_reader import inspect_file, open_file
from bertdist.data.records import Records
from bertdist.data.source import location_of
from bertdist.data_quality.duplicates import (
    Sameness,
    can_find_near_duplicates,
    check_overlap,
    compare_texts,
)
from bertdist.data_quality.findings import Example, Finding, counts, located, ranked, report
from bertdist.data_quality.label_checks import SplitLabels, check_labels, labels_of_records
from bertdist.data_quality.length_checks import Lengths, measure
from bertdist.data_quality.table_checks import check_table
from bertdist.data_quality.text_checks import check_texts, has_ftfy
from bertdist.tasks.tasks import problem_type_of

SHOWN_REASONS = 5  # of rows that were left out


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was looked at, and what was found."""

    splits: Mapping[str, Records]  # by name, train first
    labels: Mapping[str, SplitLabels | None]
    lengths: Mapping[str, Lengths]
    same: Sameness
    problem_type: str
    findings: list[Finding]  # ranked
    where: Mapping[tuple[str, int], str]  # (split, row) -> place, of all examples
    notes: list[str]  # what could not be looked for, and why

    def as_dict(self) -> dict[str, Any]:
        """check.json."""
        splits = {}
        for name, records in self.splits.items():
            labels = self.labels[name]
            splits[name] = {
                "source": records.name,
                "rows": len(records),
                "text_column": records.text_column,
                "text_pair_column": records.pair_column,
                "label_column": records.label_column,
                "fingerprint": records.fingerprint,
                "label_counts": labels.counts()
                if labels is not None and labels.numbers is None
                else None,
                "label_range": labels.range()
                if labels is not None and labels.numbers is not None
                else None,
                "labels_a_row": float(labels.sizes().mean())
                if labels is not None and labels.several
                else None,
                "lengths": self.lengths[name].as_dict(),
            }
        return {
            "problem_type": self.problem_type,
            "counts": counts(self.findings),
            "findings": report(self.findings, self.where),
            "splits": splits,
            "notes": self.notes,
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
    """Look at every split. Raises DataError where train or validation cannot be read, and ConfigError as training would."""
    splits, findings, notes = open_splits(data, test_file)
    train = splits["train"]
    problem_type = problem_type_of(problem_type, train.label_kind or "text", train.label_values)
    labels = {name: labels_of_records(records, problem_type) for name, records in splits.items()}
    train_labels = labels["train"]
    assert train_labels is not None
    files: dict[str, list[str | None]] = {
        "train": [*(data.train_file or ())],
        "validation": [data.validation_file],
        "test": [test_file],
    }
    paths = {
        name: of[0] if len(of) == 1 and of[0] and Path(of[0]).is_file() else None
        for name, of in files.items()
    }  # tables read twice
    for name, records in splits.items():
        findings += _left_out(name, records, data.max_bad_rows, num_examples)
        findings += check_table(
            name, paths[name], records, labels[name], train_labels, data, num_examples
        )
        findings += check_texts(name, records.texts, records.text_column, num_examples)
        if records.pairs is not None and records.pair_column is not None:
            findings += check_texts(name, records.pairs, records.pair_column, num_examples)
    findings += check_labels(splits, labels, num_examples)
    if near_threshold and not can_find_near_duplicates():
        near_threshold = 0.0
        notes.append(
            "Near duplicates were not looked for: rensa is not installed (pip install 'rensa<0.6')."
        )
    if not has_ftfy():
        notes.append(
            "Wrong encodings were looked for with three patterns only: ftfy is not installed (pip install ftfy)."
        )
    same = compare_texts(splits, near_threshold)
    findings += check_overlap(splits, labels, same, num_examples)
    lengths = {}
    for name, records in splits.items():
        lengths[name], found = measure(name, records, tokenizer, max_length, num_examples)
        findings += found
        if lengths[name].rows < len(records):
            notes.append(
                f"Tokens of {name} were counted in {lengths[name].rows:,} of its {len(records):,} rows."
            )
    findings = ranked(findings)
    return DataReport(
        splits=splits,
        labels=labels,
        lengths=lengths,
        same=same,
        problem_type=problem_type,
        findings=findings,
        where=located(
            findings, {name: (records.where, len(records)) for name, records in splits.items()}
        ),
        notes=notes,
    )


def open_splits(
    data: DataConfig, test_file: str | None
) -> tuple[dict[str, Records], list[Finding], list[str]]:
    """Splits by name, train first; what is wrong with the labels of the test file; what was not read."""
    notes: list[str] = []
    opened = {"train": load_records(data, "train"), "validation": load_records(data, "validation")}
    found = {name: records for name, records in opened.items() if records is not None}
    if test_file is None:
        return found, [], notes
    findings = []
    try:
        test = load_records(
            replace(data, validation_file=test_file, max_eval_samples=None), "validation"
        )
        assert test is not None
        found["test"] = test
    except BertdistError as error:
        try:
            found["test"] = open_texts(
                test_file,
                text_column=found["train"].text_column,
                text_pair_column=found["train"].pair_column,
                column_names=data.column_names,
                delimiter=data.delimiter,
                quoting=data.quoting,
                encoding=data.encoding,
            )
        except DataError:
            raise error from None
        if not _has_labels(test_file, data, found["train"]):
            return found, [], notes
        findings.append(
            Finding(
                kind="unreadable_labels",
                severity="warning",
                split="test",
                title="the labels cannot be read",
                count=len(found["test"]),
                total=len(found["test"]),
                meaning=str(error),
                advice="Nothing, if these rows are to be predicted; else see the file.",
            )
        )
    return found, findings, notes


def _has_labels(path: str, data: DataConfig, train: Records) -> bool:
    """Whether a file has the label columns of the training rows."""
    file = inspect_file(
        path,
        delimiter=data.delimiter,
        quoting=data.quoting,
        encoding=data.encoding,
        column_names=data.column_names,
    )
    names = ["text"] if file.kind == "txt" else open_file(file)[0]
    return (
        train.label_column in names
        if data.label_columns is None
        else set(data.label_columns) <= set(names)
    )


def _left_out(split: str, records: Records, most: int, num_examples: int) -> list[Finding]:
    """Rows that were left out (--on_bad_row skip): how many, and why."""
    bad = records.bad
    if not bad:
        return []
    reasons = Counter(
        re.split(r" ?[;(]", row.reason)[0] for row in bad
    ).most_common()  # without what differs from row to row
    told = "; ".join(f"{reason} ({count:,})" for reason, count in reasons[:SHOWN_REASONS])
    more = (
        f"; and {len(reasons) - SHOWN_REASONS:,} other reasons"
        if len(reasons) > SHOWN_REASONS
        else ""
    )
    many = len(bad) > most
    return [
        Finding(
            kind="skipped_rows",
            severity="error" if many else "warning",
            split=split,
            title="left out, because they cannot be read",
            count=len(bad),
            total=len(records) + len(bad),
            meaning=f"{told}{more}.",
            advice=f"Mend them where the file is made{f'; training ends at more than {most:,} (--max_bad_rows)' if many else ''}.",
            examples=tuple(
                Example(
                    split=split,
                    row=-1,
                    text=excerpt(row.text),
                    note=f"{location_of(row)}: {row.reason}",
                )
                for row in bad[:num_examples]
            ),
        )
    ]
