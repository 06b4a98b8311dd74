"""Lines of csv and tsv become columns; the header and what is left out. tests/unit/test_records.py has the grammar."""

from typing import Any

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.csv_reader import parse_csv, read_header
from bertdist.data.readers.text_lines import FileFormat, Lines, Parsed, hide_returns

CSV = FileFormat(name="a.csv", kind="csv", quoted=True)


def lines_of(text: str, first: int = 1, **broken: str) -> Lines:
    return hide_returns(
        Lines(text.encode(), first, {int(line[1:]): reason for line, reason in broken.items()})
    )


def parsed(lines: Lines, skip: bool = False, form: FileFormat = CSV) -> Parsed:
    return parse_csv(
        form, lines, ["a", "b"], ["b", "a"], skip=skip, limit=1 << 20, block_bytes=1 << 20
    )


def values(found: Parsed) -> dict[str, Any]:
    return {name: column.to_pylist() for name, column in found.columns.items()}  # type: ignore[union-attr]


def test_a_header_may_go_on_beyond_the_lines() -> None:
    for text, is_all, expected in [
        ('\n\r\na,"b\nc"\nd,e\n', False, (["a", "b\nc"], 4)),
        ('a,"b\n', False, None),
        ("\n\n", False, None),
        ("\n\n", True, ([], 2)),
        ("a,b", True, (["a", "b"], 1)),
        ('"a\r",b\r\n', True, (["a\r", "b"], 1)),
    ]:
        assert read_header(CSV, lines_of(text), is_all, 1 << 20) == expected
    with pytest.raises(DataError, match="line 1: a quote opens here and never closes"):
        read_header(CSV, lines_of('a,"b\n'), True, 1 << 20)
    with pytest.raises(DataError, match="line 2: no utf-8"):
        read_header(CSV, lines_of("\na,b\n", l1="no utf-8"), True, 1 << 20)


def test_a_first_row_that_is_none_is_no_reason_to_read_nothing() -> None:
    form = FileFormat(name="a.csv", kind="csv", quoted=True, column_names=("a", "b"))
    lines = lines_of('"x" y,1\nz,2\n')
    assert read_header(form, lines, True, 1 << 20) == (["a", "b"], 0)
    assert values(parsed(lines, True, form)) == {"b": ["2"], "a": ["z"]}
    with pytest.raises(DataError, match="line 1: text follows"):
        parsed(lines, False, form)


def test_rows_around_what_is_left_out_arrive_as_they_are() -> None:
    lines = lines_of('1,"x\ny"\nbad\n\n2,\ue000\r\r\nworse,,\n3,"z"', 10, l0="broken")
    found = parsed(lines, True)
    assert values(found) == {"b": ["\ue000\r", "z"], "a": ["2", "3"]} and found.num_rows == 2
    assert [(row.line, row.text) for row in found.bad] == [
        (10, r'1,"x\ny"'),
        (12, "bad"),
        (15, "worse,,"),
    ]
    assert found.rows().lines.tolist() == [4, 6]
    with pytest.raises(DataError, match=r"^a\.csv line 10: broken\.$"):
        parsed(lines)
    with pytest.raises(DataError, match=r"^a\.csv line 12: 1 field, expected 2 as in the header"):
        parsed(lines._replace(broken={}))


def test_no_lines_are_no_rows_and_a_byte_order_mark_further_down_is_text() -> None:
    assert values(parsed(lines_of(""))) == {"b": [], "a": []}
    assert values(parsed(lines_of("\n\n"))) == {"b": [], "a": []}
    assert values(parsed(lines_of("\ufeffx,y\n"))) == {"b": ["y"], "a": ["\ufeffx"]}
