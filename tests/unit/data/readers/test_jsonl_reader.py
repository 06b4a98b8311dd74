"""One row a line, whatever stands in it: objects, and lines of text."""

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.jsonl_reader import parse_json, parse_txt, read_keys
from bertdist.data.readers.text_lines import FileFormat, Lines

JSON = FileFormat(name="a.jsonl", kind="jsonl")
LINES = Lines(
    '\n{"a": 1, "b": "\u2028"}\nno\n{"a": 2}\n{"b": 3, "a": null}\n{"a": 4, "b": 4}'.encode(),
    5,
    {5: "byte 0xFF is not utf-8"},
)


def test_lines_that_are_not_rows_are_skipped_and_reported() -> None:
    found = parse_json(JSON, LINES, ["a", "b"], skip=True)
    assert found.columns == {"a": [1, None], "b": ["\u2028", 3]} and found.num_rows == 2
    assert [
        (row.line, row.reason.split(":")[0].split(".")[0], row.text) for row in found.skipped
    ] == [
        (7, "not JSON", "no"),
        (8, "the key 'b' is missing", '{"a": 2}'),
        (10, "byte 0xFF is not utf-8", '{"a": 4, "b": 4}'),
    ]
    rows = found.rows()
    assert (
        rows.lines.tolist() == [1, 4]
        and LINES.data[rows.starts[1] : rows.ends[1]] == b'{"b": 3, "a": null}\n'
    )
    with pytest.raises(DataError, match=r"^a\.jsonl line 7: not JSON: "):
        parse_json(JSON, LINES, ["a"], skip=False)


def test_no_more_rows_are_read_than_requested() -> None:
    found = parse_json(JSON, LINES, ["a"], skip=False, num_rows=1)
    assert found.columns == {"a": [1]} and found.skipped == []


def test_keys_are_those_of_the_first_object() -> None:
    assert read_keys(JSON, LINES, True, False) == ["a", "b"]
    assert (
        read_keys(JSON, Lines(b"no\n{'a'\n", 1, {}), False, True) is None
    )  # it may stand further down
    assert read_keys(JSON, Lines(b"\n", 1, {}), True, False) == []
    with pytest.raises(DataError, match="starts with"):
        read_keys(JSON, Lines(b" \n[1]\n", 1, {}), True, True)


def test_every_line_of_a_txt_is_a_row() -> None:
    for text, expected in [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\n\n", ["a", ""]),
        ("\r\nb\rc\r\n", ["", "b\rc"]),
    ]:
        found = parse_txt(JSON, Lines(text.encode(), 1, {}), ["text"])
        assert (
            found.columns["text"].to_pylist() == expected
            and len(found.rows().lines) == found.num_rows
        )  # type: ignore[union-attr]
    found = parse_txt(JSON, Lines(b"a\nb\nc\n", 3, {1: "broken"}), ["text"])
    assert found.columns["text"].to_pylist() == ["a", "c"] and [
        (row.line, row.text) for row in found.skipped
    ] == [(4, "b")]  # type: ignore[union-attr]
    assert found.rows().lines.tolist() == [0, 2]
