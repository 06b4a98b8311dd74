"""Findings come in the order in which they matter, and their rows with the lines that the file has."""

from typing import Any

import numpy as np
import pytest

from bertdist.core.terminal import excerpt
from bertdist.data_quality.findings import (
    IMPORTANCE,
    Example,
    Finding,
    counts,
    located,
    percent,
    places,
    ranked,
    report,
)


def finding(kind: str, severity: Any, count: int = 1, total: int = 10, **more: Any) -> Finding:
    return Finding(
        kind=kind,
        severity=severity,
        split="train",
        title="t",
        count=count,
        total=total,
        meaning="m",
        advice="a",
        **more,
    )


def test_errors_come_first_then_what_costs_most_then_the_larger_share() -> None:
    found = [
        finding("odd", "note", 9),
        finding("truncated", "warning", 9),
        finding("leaks", "warning", 1),
        finding("duplicates", "warning", 1),
        finding("duplicates", "warning", 2),
        finding("unknown_labels", "error"),
    ]
    assert [(one.kind, one.count) for one in ranked(found)] == [
        ("unknown_labels", 1),
        ("leaks", 1),
        ("truncated", 9),
        ("duplicates", 2),
        ("duplicates", 1),
        ("odd", 9),
    ]
    assert counts(found) == {"error": 1, "warning": 4, "note": 1}
    assert len(IMPORTANCE) == len(set(IMPORTANCE))


def test_a_share_is_none_where_it_says_nothing() -> None:
    assert finding("a", "note", 1, 4).share == 0.25 and finding("a", "note", 1, 0).share is None


def test_a_percentage_is_short_and_never_0_or_100_for_what_is_not() -> None:
    shares = (0, 0.00001, 0.0001, 0.0123, 0.0999, 0.123, 0.994, 0.999, 1)
    assert [percent(share) for share in shares] == [
        "0.00%",
        "< 0.01%",
        "0.01%",
        "1.23%",
        "9.99%",
        "12%",
        "99%",
        "> 99%",
        "100%",
    ]


def test_an_excerpt_is_one_line_and_as_wide_as_asked() -> None:
    assert excerpt("a\nb\tc\x1b[31m\0\u202e") == "a\\nb\\tc\\x1b[31m\\x00\\u202e"
    assert (
        excerpt("abcdef", 4) == "abcd..." and excerpt("abcd", 4) == "abcd" and excerpt("", 4) == ""
    )
    assert excerpt("中文字", 4) == "中文..."  # two columns each


class File:
    """Says on which line a row starts, and counts how often it was asked."""

    def __init__(self, lines: list[int]) -> None:
        self.lines, self.asked = lines, 0

    def __call__(self, row: int) -> str:
        self.asked += 1
        return f"a line 2.tsv line {self.lines[row]}"


def test_places_are_those_of_where_with_two_questions_for_a_plain_file() -> None:
    plain = File([row + 2 for row in range(1000)])
    asked = list(range(0, 1000, 7))
    assert places(plain, asked, 1000) == {row: f"a line 2.tsv line {row + 2}" for row in asked}
    assert plain.asked == 2


@pytest.mark.parametrize("seed", range(5))
def test_places_are_those_of_where_in_a_file_of_long_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    lines = (2 + np.cumsum(random.choice([1, 1, 1, 1, 3], size=300))).tolist()
    file, asked = File(lines), random.choice(300, size=40, replace=False).tolist()
    found = places(file, asked, 300)
    assert found == {row: f"a line 2.tsv line {lines[row]}" for row in sorted(asked)}
    # The control: believing that rows are lines would have been wrong here.
    assert found != {
        row: f"a line 2.tsv line {lines[min(asked)] + row - min(asked)}" for row in sorted(asked)
    }


def test_places_without_lines_and_places_that_would_take_too_long() -> None:
    assert places(lambda row: f"x.parquet row {row}", [3, 5, 9], 10) == {
        row: f"x.parquet row {row}" for row in (3, 5, 9)
    }
    lines = (2 + np.cumsum(np.arange(200) % 2 + 1)).tolist()
    huge = places(File(lines), range(0, 200, 3), 10**9)
    assert "a line 2.tsv row 3 (from 0)" in huge.values() and list(huge) == list(range(0, 200, 3))
    assert places(File(lines), [], 200) == {}


def test_a_report_is_plain_data_with_the_places_of_its_examples() -> None:
    one = finding(
        "leaks",
        "error",
        examples=(Example(split="validation", row=4, text="x", note="n", like=("train", 7)),),
        details={"k": 1},
    )
    where = located(
        [one],
        {"train": (lambda row: f"t row {row}", 9), "validation": (lambda row: f"v row {row}", 9)},
    )
    (entry,) = report([one], where)
    assert entry["examples"] == [
        {"where": "v row 4", "row": 4, "text": "x", "note": "n", "like": "t row 7"}
    ]
    assert (entry["kind"], entry["share"], entry["details"], entry["unit"]) == (
        "leaks",
        0.1,
        {"k": 1},
        "rows",
    )
