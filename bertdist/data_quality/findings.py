"""What a look at the data found, in a form that can be ranked, shown and written down.

Out: `Finding`, one kind of problem in one split, with its count, what it means, what to do, and examples; `ranked`, the order in
which a person should read them; `report`, the same as plain data for check.json; `places`, many rows' files and lines at once.
One module, because whoever looks (at labels, texts, tables, duplicates, a model's answers) says it in the same words.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bertdist.core.types import LocateRow

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


STEPS_OF_PLACES = 20_000_000  # rows that are walked over to find the lines of examples; about 20 s


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row that shows the finding. text is an excerpt; note says what to see in it (a label, another row, a number)."""

    split: str
    row: int  # of its split, from 0; -1: the example is no row, and text says what it is
    text: str
    note: str = ""
    like: tuple[str, int] | None = None  # (split, row) that it is to be seen beside


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem in one split (or between two, as `train/validation`)."""

    kind: str  # a word for scripts: "conflicting_labels"
    severity: Severity
    split: str
    title: str
    count: int  # of `unit`
    total: int  # of which count is a share; 0 where a share says nothing
    unit: str = "rows"
    meaning: str
    advice: str
    examples: tuple[Example, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # further numbers, for check.json

    @property
    def share(self) -> float | None:
        """count / total, from 0 to 1."""
        return self.count / self.total if self.total else None


# What a finding costs, most first: data that are not what they seem, then scores that are not, then rows that teach nothing or wrongly.
IMPORTANCE = (
    "swallowed_rows row_as_header header_as_row columns_swapped labels_like_ids single_label skipped_rows unknown_labels "
    "leaks alike_leaks near_leaks conflicting_labels quotes_as_text overflow_columns mojibake c1_controls replacement_characters "
    "unknown_tokens truncated duplicates rare_labels labels_alike empty_texts outliers outside_range"
).split()


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; of one severity in the order of IMPORTANCE, and of one kind the larger share first."""

    def key(finding: Finding) -> tuple[int, int, float]:
        place = IMPORTANCE.index(finding.kind) if finding.kind in IMPORTANCE else len(IMPORTANCE)
        return SEVERITIES.index(finding.severity), place, -(finding.share or 0.0)

    return sorted(findings, key=key)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each severity."""
    found = [finding.severity for finding in findings]
    return {severity: found.count(severity) for severity in SEVERITIES}


def percent(share: float) -> str:
    """Short, and never 0 or 100 for what is not."""
    return (
        "< 0.01%"
        if 0 < share < 0.0001
        else f"{share:.2%}"
        if share < 0.1
        else "> 99%"
        if 0.995 <= share < 1
        else f"{share:.0%}"
    )


def places(where: LocateRow, rows: Iterable[int], num_rows: int) -> dict[int, str]:
    """Row -> its place, for many rows of one split of num_rows rows, with few calls of `where`, which walks the file each time.

    Rows are in the order of the file and take a line or more each, so where two rows are as many lines apart as rows, every row between
    them stands where it should. Where too much would have to be walked, a place is `train.csv row 7 (from 0)`.
    """
    asked = sorted(set(rows))
    found: dict[int, str] = {}
    calls = max(8, STEPS_OF_PLACES // max(1, num_rows))

    def look(row: int) -> tuple[str, int] | None:
        nonlocal calls
        if row not in found:
            calls -= 1
            found[row] = where(row)
        match = re.fullmatch(r"(.*) line (\d+)", found[row], flags=re.DOTALL)
        return (match[1], int(match[2])) if match else None

    def fill(low: int, high: int) -> None:
        between = [row for row in asked if low < row < high]
        if not between:
            return
        first, last = look(low), look(high)
        if first is None or last is None:
            found.update({row: f"{found[low].rsplit(' row ', 1)[0]} row {row}" for row in between})
        elif last[1] - first[1] == high - low:
            found.update({row: f"{first[0]} line {first[1] + row - low}" for row in between})
        elif calls <= 0:
            found.update({row: f"{first[0]} row {row} (from 0)" for row in between})
        else:
            middle = between[len(between) // 2]
            look(middle)
            fill(low, middle)
            fill(middle, high)

    if asked:
        look(asked[0])
        look(asked[-1])
        fill(asked[0], asked[-1])
    return {row: found[row] for row in asked}


def located(
    findings: Sequence[Finding], splits: Mapping[str, tuple[LocateRow, int]]
) -> dict[tuple[str, int], str]:
    """(split, row) -> place of all examples. splits: name -> (where, number of rows)."""
    found: dict[tuple[str, int], str] = {}
    for name, (where, num_rows) in splits.items():
        examples = [example for finding in findings for example in finding.examples]
        shown = {(example.split, example.row) for example in examples} | {
            example.like for example in examples if example.like
        }
        rows = {row for split, row in shown if split == name and row >= 0}
        found |= {(name, row): place for row, place in places(where, rows, num_rows).items()}
    return found


def report(
    findings: Sequence[Finding], where: Mapping[tuple[str, int], str]
) -> list[dict[str, Any]]:
    """The findings as plain data, in their order."""
    written = []
    for finding in findings:
        entry = {
            name: value
            for name, value in vars(finding).items()
            if name not in ("examples", "details")
        }
        shown = []
        for example in finding.examples:
            place = where.get((example.split, example.row), example.split)
            shown.append(
                {"where": place, "row": example.row, "text": example.text, "note": example.note}
            )
            if example.like is not None:
                shown[-1]["like"] = where[example.like]
        written.append(
            {**entry, "share": finding.share, "details": dict(finding.details), "examples": shown}
        )
    return written
