"""Findings are ranked by importance; shares and excerpts are short."""

from typing import Any

from bertdist.core.terminal import excerpt
from bertdist.data_quality.findings import (
    IMPORTANCE,
    Finding,
    counts,
    percent,
    ranked,
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


def test_findings_are_ranked_by_severity_importance_and_share() -> None:
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


def test_share_is_none_without_a_total() -> None:
    assert finding("a", "note", 1, 4).share == 0.25 and finding("a", "note", 1, 0).share is None


def test_percent_is_never_0_or_100_for_another_share() -> None:
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


def test_an_excerpt_is_one_line_of_the_requested_width() -> None:
    assert excerpt("a\nb\tc\x1b[31m\0\u202e") == "a\\nb\\tc\\x1b[31m\\x00\\u202e"
    assert (
        excerpt("abcdef", 4) == "abcd..." and excerpt("abcd", 4) == "abcd" and excerpt("", 4) == ""
    )
    assert excerpt("中文字", 4) == "中文..."  # two columns each
