"""csv and tsv lines become columns; the header and skipped rows.

tests/unit/data/test_records.py has the grammar.
"""

from typing import Any

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.csv_reader import (
    find_row_end,
    is_well_formed,
    parse_csv,
    read_header,
    scan_rows,
    well_formed_rows,
)
from bertdist.data.readers.text_lines import FileFormat, Lines, Parsed, escape_carriage_returns

CSV = FileFormat(name="a.csv", kind="csv", quoted=True)


def lines_of(text: str, first: int = 1, **broken: str) -> Lines:
    return escape_carriage_returns(
        Lines(text.encode(), first, {int(line[1:]): reason for line, reason in broken.items()})
    )


def parsed(lines: Lines, skip: bool = False, form: FileFormat = CSV) -> Parsed:
    return parse_csv(form, lines, ["a", "b"], ["b", "a"], skip=skip, limit=1 << 20)


def values(found: Parsed) -> dict[str, Any]:
    return {name: column.to_pylist() for name, column in found.columns.items()}  # type: ignore[union-attr]


def test_a_header_may_continue_beyond_the_lines() -> None:
    for text, is_eof, expected in [
        ('\n\r\na,"b\nc"\nd,e\n', False, (["a", "b\nc"], 4)),
        ('a,"b\n', False, None),
        ("\n\n", False, None),
        ("\n\n", True, ([], 2)),
        ("a,b", True, (["a", "b"], 1)),
        ('"a\r",b\r\n', True, (["a\r", "b"], 1)),
    ]:
        assert read_header(CSV, lines_of(text), is_eof, 1 << 20) == expected
    with pytest.raises(DataError, match="line 1: a quote opens here and never closes"):
        read_header(CSV, lines_of('a,"b\n'), True, 1 << 20)
    with pytest.raises(DataError, match="line 2: no utf-8"):
        read_header(CSV, lines_of("\na,b\n", l1="no utf-8"), True, 1 << 20)


def test_a_bad_first_row_is_skipped() -> None:
    form = FileFormat(name="a.csv", kind="csv", quoted=True, column_names=("a", "b"))
    lines = lines_of('"x" y,1\nz,2\n')
    assert read_header(form, lines, True, 1 << 20) == (["a", "b"], 0)
    assert values(parsed(lines, True, form)) == {"b": ["2"], "a": ["z"]}
    with pytest.raises(DataError, match="line 1: text follows"):
        parsed(lines, False, form)


def test_rows_around_skipped_rows_are_unchanged() -> None:
    lines = lines_of('1,"x\ny"\nbad\n\n2,\ue000\r\r\nworse,,\n3,"z"', 10, l0="broken")
    found = parsed(lines, True)
    assert values(found) == {"b": ["\ue000\r", "z"], "a": ["2", "3"]} and found.num_rows == 2
    assert [(row.line, row.text) for row in found.bad_rows] == [
        (10, r'1,"x\ny"'),
        (12, "bad"),
        (15, "worse,,"),
    ]
    assert found.row_spans().lines.tolist() == [4, 6]
    with pytest.raises(DataError, match=r"^a\.csv line 10: broken\.$"):
        parsed(lines)
    with pytest.raises(DataError, match=r"^a\.csv line 12: 1 field, expected 2 as in the header"):
        parsed(lines._replace(broken={}))


def test_no_lines_are_no_rows_and_a_byte_order_mark_further_down_is_text() -> None:
    assert values(parsed(lines_of(""))) == {"b": [], "a": []}
    assert values(parsed(lines_of("\n\n"))) == {"b": [], "a": []}
    assert values(parsed(lines_of("\ufeffx,y\n"))) == {"b": ["y"], "a": ["\ufeffx"]}


# Where rows end, by the same rules but without parsing them; random files: test_file_reader.py

QUOTED = FileFormat(name="a.csv", kind="csv", quoted=True, column_names=("a", "b"))
UNQUOTED = FileFormat(name="a.tsv", kind="tsv", delimiter="\t", column_names=("a", "b"))


@pytest.mark.parametrize("form", [QUOTED, UNQUOTED])
@pytest.mark.parametrize("text", ['a,b\n\n"c\n\n""d",e\r\n\r\nf,"g"', "a\tb\n\nc\td\r\n", ""])
def test_well_formed_rows_equal_scanned_rows(form: FileFormat, text: str) -> None:
    text = (
        text.replace("\t", ",")
        if form.quoted
        else text.replace(",", "\t").replace('"c\n\n""d"', "cd").replace('"', "")
    )
    clean, judged = (
        well_formed_rows(form, text.encode(), 2),
        scan_rows(form, lines_of(text), 2, 1 << 20),
    )
    assert not judged.bad and [part.tolist() for part in clean] == [
        part.tolist() for part in judged.row_spans
    ]


def test_the_last_row_end_within_the_soft_limit_else_the_first() -> None:
    lines = lines_of('a,b\n"c\n",d\ne,f\n')
    ends = [4, 11, 15]
    for soft in range(1, 20):
        expected = max([end for end in ends if end <= soft], default=4)
        assert find_row_end(QUOTED, lines, 2, False, soft, 99) == (expected, None)
    assert find_row_end(QUOTED, lines_of('"a\nb\n'), 2, False, 99, 1 << 20)[0] == 0  # it may go on
    assert find_row_end(QUOTED, lines_of('"a\nb\n'), 2, True, 99, 1 << 20)[0] == 5  # it does not


def test_bad_rows_have_their_lines_and_scanning_continues() -> None:
    text = 'a,b\n"c\nx"y,d\ne\n"f\n","g\nh,i\n'
    found = scan_rows(QUOTED, lines_of(text), 2, 1 << 20)
    assert [(bad.line, bad.reason.split(";")[0]) for bad in found.bad] == [
        (1, "text follows the quote closed on line 3"),
        (3, "1 field, expected 2 as in --column_names"),
        (5, "a quote opens here and never closes"),
    ]
    rows = [
        text[start:end]
        for start, end in zip(found.row_spans.starts, found.row_spans.ends, strict=True)
    ]
    assert rows == [
        "a,b\n",
        'x"y,d\n',
        "h,i\n",
    ]  # the second is what is left of the row that is none
    assert found.row_spans.lines.tolist() == [0, 2, 6]


def test_a_quote_within_a_field_is_text_and_makes_counting_wrong() -> None:
    text = '5" pipe,a\n"b\n",c\n'
    assert not is_well_formed(QUOTED, text.encode(), 99) and is_well_formed(
        QUOTED, text.replace('5"', "5").encode(), 99
    )
    assert scan_rows(QUOTED, lines_of(text), 2, 99).row_spans.lines.tolist() == [0, 1]
    assert find_row_end(QUOTED, lines_of(text), 2, False, 12, 99)[0] == 10


def test_a_quote_may_be_open_for_so_many_bytes() -> None:
    text = 'a,"' + "x\n" * 30 + '"\n'
    assert scan_rows(QUOTED, lines_of(text), 2, 100).bad == []
    found = scan_rows(QUOTED, lines_of(text), 2, 50).bad
    assert found[0].reason.startswith("a quote opens here and does not close within 50 bytes")
    assert not is_well_formed(QUOTED, text.encode(), 50)
