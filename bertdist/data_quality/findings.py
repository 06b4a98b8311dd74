"""Findings: what the data checks report, one problem in one split each.

A check calls a `FindingBuilder` with the rows that have a problem and gets a `Finding`, with the
first of these rows as examples. `ranked` sorts findings by importance.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy.typing as npt
import pyarrow as pa

from bertdist.core.terminal import excerpt

Rows: TypeAlias = Sequence[int] | npt.NDArray[Any]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Errors make scores or training meaningless, then come biased scores, then rows that teach nothing.
IMPORTANCE = (
    "swallowed_rows row_as_header header_as_row columns_swapped labels_like_ids single_label "
    "skipped_rows unknown_labels leaks alike_leaks near_leaks conflicting_labels quotes_as_text "
    "overflow_columns mojibake c1_controls replacement_characters unknown_tokens truncated "
    "duplicates rare_labels labels_alike empty_texts outliers outside_range"
).split()

CONTEXT_CHARACTERS = 40  # shown before the match that an excerpt is about


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row that shows a finding."""

    split: str
    row: int  # of its split, from 0; -1: not a row, `note` says where it is
    text: str  # an excerpt
    note: str = ""  # what to look at: a label, a number, ...
    like: tuple[str, int] | None = None  # (split, row) of a row to compare it with


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
    examples: tuple[Example, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # further numbers, for check.json

    @property
    def share(self) -> float | None:
        """count / total, from 0 to 1."""
        return self.count / self.total if self.total else None

    @property
    def quantity(self) -> str:
        """Count and unit: `1 row`, `1,200 rows`."""
        return f"{self.count:,} {self.unit.removesuffix('s') if self.count == 1 else self.unit}"


@dataclass(frozen=True)
class FindingBuilder:
    """Builds the findings of one split."""

    split: str
    texts: pa.Array  # (rows,) large_string: examples are excerpts of these
    num_examples: int

    def __call__(
        self,
        kind: str,
        severity: Severity,
        title: str,
        rows: Rows,
        meaning: str,
        advice: str,
        *,
        note: Callable[[int], str] | None = None,
        pattern: str | None = None,
        **fields: Any,
    ) -> Finding:
        """A finding on `rows`, with the first of them as examples.

        note: row -> the note of its example. pattern: excerpts start shortly before its first
        match. fields: further fields of Finding; count and total default to these and all rows.
        """
        fields = {"count": len(rows), "total": len(self.texts), **fields}
        if "examples" not in fields:
            fields["examples"] = self.examples(rows, note, pattern)
        return Finding(
            kind=kind,
            severity=severity,
            split=self.split,
            title=title,
            meaning=meaning,
            advice=advice,
            **fields,
        )

    def examples(
        self,
        rows: Rows,
        note: Callable[[int], str] | None = None,
        pattern: str | None = None,
    ) -> tuple[Example, ...]:
        """The first `num_examples` of `rows`."""
        examples = []
        for row in map(int, rows[: self.num_examples]):
            text = excerpt(_context(self.texts[row].as_py(), pattern))
            note_text = note(row) if note else ""
            examples.append(Example(split=self.split, row=row, text=text, note=note_text))
        return tuple(examples)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by severity, then by IMPORTANCE of the kind, then the larger share first.

    Kinds that IMPORTANCE does not list are last among those of their severity.
    """

    def key(finding: Finding) -> tuple[int, int, float]:
        listed = finding.kind in IMPORTANCE
        rank = IMPORTANCE.index(finding.kind) if listed else len(IMPORTANCE)
        return SEVERITIES.index(finding.severity), rank, -(finding.share or 0.0)

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


def _context(text: str, pattern: str | None) -> str:
    """The text from shortly before the first match of `pattern`."""
    match = re.search(pattern, text) if pattern else None
    if match is None or match.start() < CONTEXT_CHARACTERS:
        return text
    return "..." + text[match.start() - CONTEXT_CHARACTERS // 2 :]
