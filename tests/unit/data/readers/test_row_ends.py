"""Where rows end is known without reading them, by the same rules as reading them; tests/unit/test_file_rows.py has the random files."""

import pytest

from bertdist.data.readers.csv_reader import (
    find_row_end,
    is_well_formed,
    scan_rows,
    well_formed_rows,
)
from bertdist.data.readers.text_lines import FileFormat, Lines

CSV = FileFormat(name="a.csv", kind="csv", quoted=True, column_names=("a", "b"))
TSV = FileFormat(name="a.tsv", kind="tsv", delimiter="\t", column_names=("a", "b"))


def lines_of(text: str) -> Lines:
    return Lines(text.encode(), 1, {})


@pytest.mark.parametrize("form", [CSV, TSV])
@pytest.mark.parametrize("text", ['a,b\n\n"c\n\n""d",e\r\n\r\nf,"g"', "a\tb\n\nc\td\r\n", ""])
def test_rows_of_clean_lines_are_the_rows_that_are_judged(form: FileFormat, text: str) -> None:
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
        part.tolist() for part in judged.rows
    ]


def test_a_cut_is_the_last_end_of_a_row_within_the_soft_limit_else_the_first() -> None:
    lines = lines_of('a,b\n"c\n",d\ne,f\n')
    ends = [4, 11, 15]
    for soft in range(1, 20):
        expected = max([end for end in ends if end <= soft], default=4)
        assert find_row_end(CSV, lines, 2, False, soft, 99) == (expected, None)
    assert find_row_end(CSV, lines_of('"a\nb\n'), 2, False, 99, 1 << 20)[0] == 0  # it may go on
    assert find_row_end(CSV, lines_of('"a\nb\n'), 2, True, 99, 1 << 20)[0] == 5  # it does not


def test_faults_are_told_with_their_lines_and_reading_goes_on() -> None:
    text = 'a,b\n"c\nx"y,d\ne\n"f\n","g\nh,i\n'
    found = scan_rows(CSV, lines_of(text), 2, 1 << 20)
    assert [(bad.line, bad.reason.split(";")[0]) for bad in found.bad] == [
        (1, "text follows the quote closed on line 3"),
        (3, "1 field, expected 2 as in --column_names"),
        (5, "a quote opens here and never closes"),
    ]
    rows = [text[start:end] for start, end in zip(found.rows.starts, found.rows.ends, strict=True)]
    assert rows == [
        "a,b\n",
        'x"y,d\n',
        "h,i\n",
    ]  # the second is what is left of the row that is none
    assert found.rows.lines.tolist() == [0, 2, 6]


def test_a_quote_within_a_field_is_text_and_makes_counting_useless() -> None:
    text = '5" pipe,a\n"b\n",c\n'
    assert not is_well_formed(CSV, text.encode(), 99) and is_well_formed(
        CSV, text.replace('5"', "5").encode(), 99
    )
    assert scan_rows(CSV, lines_of(text), 2, 99).rows.lines.tolist() == [0, 1]
    assert find_row_end(CSV, lines_of(text), 2, False, 12, 99)[0] == 10


def test_a_quote_may_be_open_for_so_many_bytes() -> None:
    text = 'a,"' + "x\n" * 30 + '"\n'
    assert scan_rows(CSV, lines_of(text), 2, 100).bad == []
    found = scan_rows(CSV, lines_of(text), 2, 50).bad
    assert found[0].reason.startswith("a quote opens here and does not close within 50 bytes")
    assert not is_well_formed(CSV, text.encode(), 50)
