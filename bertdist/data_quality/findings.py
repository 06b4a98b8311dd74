"""Findings: what the data checks report, one problem in one split each.

A check calls `FindingBuilder.add` with the rows that have a problem; the first of these rows are
the examples of the finding. `ranked` sorts findings by importance.

An error is what training refuses, in the same words, or a leak of training rows that makes a score
meaningless (LEAK_ERROR_SHARE in duplicates.py); all else is a warning or a note.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy.typing as npt
import pyarrow as pa

from bertdist.core.terminal import excerpt
from bertdist.data.records import Records

Rows: TypeAlias = Sequence[int] | npt.NDArray[Any]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# What makes training or scores meaningless, then biased scores, then rows that teach nothing.
IMPORTANCE = (
    "swallowed_rows row_as_header header_as_row columns_swapped refused_labels labels_like_ids "
    "single_label refused_rows unknown_labels leaks alike_leaks near_leaks conflicting_labels "
    "quotes_as_text overflow_columns mojibake c1_controls replacement_characters unknown_tokens "
    "truncated duplicates rare_labels labels_alike empty_texts outliers outside_range"
).split()

MIN_ROWS = 20  # fewer do not show what a column holds
CONTEXT_CHARACTERS = 40  # shown before the match that an excerpt is about


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """One row that shows a finding."""

    where: str  # `dev.tsv line 12`
    row: int  # of its split, from 0; -1: a row that was skipped
    text: str  # an excerpt
    note: str = ""  # what to look at: a label, a number, ...
    like: str = ""  # where the other row of a pair is, whose text is the same,
    like_text: str = ""  # or this one
    like_note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem in one split, or between two (`train/validation`)."""

    kind: str  # an identifier for scripts: "conflicting_labels"
    severity: Severity
    split: str
    title: str
    count: int  # of `unit`
    total: int  # that `share` refers to; 0 where a share is meaningless
    unit: str = "rows"
    meaning: str
    advice: str
    examples: Sequence[ExampleRow] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # further numbers, for check.json

    @property
    def share(self) -> float | None:
        """count / total, from 0 to 1."""
        return self.count / self.total if self.total else None

    @property
    def quantity(self) -> str:
        """Count and unit: `1 row`, `1,200 rows`."""
        return f"{self.count:,} {self.unit.removesuffix('s') if self.count == 1 else self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """The entry in check.json."""
        examples = [vars(example).copy() for example in self.examples]
        for example in examples:
            for name in ("like", "like_text", "like_note"):
                if not example[name]:
                    del example[name]
        return {**vars(self), "share": self.share, "examples": examples}


@dataclass(frozen=True)
class FindingBuilder:
    """Adds the findings of one split to `found`."""

    split: str
    records: Records
    num_examples: int
    found: list[Finding]

    def add(
        self,
        kind: str,
        severity: Severity,
        title: str,
        rows: Rows,
        meaning: str,
        advice: str,
        *,
        note: Callable[[int], str] = lambda row: "",
        **fields: Any,
    ) -> None:
        """Add a finding on `rows`, if there are any.

        note: row -> the note of its example. fields: further fields of Finding; count and total
        default to the number of `rows` and of all rows, examples to the first of `rows`.
        """
        fields = {"count": len(rows), "total": len(self.records), **fields}
        if not fields["count"]:
            return
        if "examples" not in fields:
            shown = map(int, rows[: self.num_examples])
            fields["examples"] = [self.example(row, note(row)) for row in shown]
        self.found.append(
            Finding(
                kind=kind,
                severity=severity,
                split=self.split,
                title=title,
                meaning=meaning,
                advice=advice,
                **fields,
            )
        )

    def example(self, row: int, note: str = "", text: str | None = None) -> ExampleRow:
        """A row as an example. text: that of the row if None."""
        text = self.records.texts[row].as_py() if text is None else text
        where = str(self.records.location(row))
        return ExampleRow(where=where, row=int(row), text=excerpt(text), note=note)

    def examples_of_match(self, column: pa.Array, rows: Rows, pattern: str) -> list[ExampleRow]:
        """The first rows, with their text from shortly before the first match of `pattern`."""
        examples = []
        for row in map(int, rows[: self.num_examples]):
            text = column[row].as_py()
            match = re.search(pattern, text)
            if match is not None and match.start() >= CONTEXT_CHARACTERS:
                text = "..." + text[match.start() - CONTEXT_CHARACTERS // 2 :]
            examples.append(self.example(row, text=text))
        return examples


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity, then by IMPORTANCE of the kind (others last), then the larger share."""

    def key(finding: Finding) -> tuple[int, int, float]:
        importance = [*IMPORTANCE, finding.kind].index(finding.kind)
        return SEVERITIES.index(finding.severity), importance, -(finding.share or 0.0)

    return sorted(findings, key=key)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """The number of findings per severity."""
    severities = [finding.severity for finding in findings]
    return {severity: severities.count(severity) for severity in SEVERITIES}


def summary(findings: Iterable[Finding]) -> str:
    """`1 error, 2 warnings, 0 notes`."""
    return ", ".join(
        f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts(findings).items()
    )


def percent(share: float) -> str:
    """A short percentage, never 0% or 100% for a share that is not 0 or 1."""
    if 0 < share < 0.0001:
        return "< 0.01%"
    if share < 0.1:
        return f"{share:.2%}"
    return "> 99%" if 0.995 <= share < 1 else f"{share:.0%}"
