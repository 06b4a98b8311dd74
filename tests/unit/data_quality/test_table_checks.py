"""Tables that are read without an error, but not as intended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_checks import check_rows, clean_rows, get_finding, kinds

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.data_quality.report import DataReport, check_data

Lines = list[str]


def tsv(rows: list[dict[str, str]]) -> Lines:
    return [f"{row['text']}\t{row['label']}" for row in rows]


@pytest.fixture
def see(tmp_path: Path) -> Callable[..., DataReport]:
    """see("a.tsv", lines, **settings): a report on a file of these lines."""

    def see(name: str, lines: Lines, other: Lines | None = None, **settings: Any) -> DataReport:
        path, beside = tmp_path / name, tmp_path / f"dev_{name}"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if other is not None:
            beside.write_text("".join(line + "\n" for line in other), encoding="utf-8")
        return check_data(
            DataConfig(
                train_file=[str(path)],
                validation_file=str(beside) if other is not None else None,
                **settings,
            )
        )

    return see


def swallowing(ending: str) -> Lines:
    """A quote opens on line 11 and the next one ends line 15: four rows become part of a text."""
    delimiter = {"tsv": "\t", "csv": ","}[ending]
    rows = clean_rows(60)
    lines = [f"label{delimiter}text", *(f"{row['label']}{delimiter}{row['text']}" for row in rows)]
    lines[10] = lines[10].replace(delimiter, f'{delimiter}"', 1)
    lines[14] += '"'
    return lines


def test_rows_that_a_quote_swallowed_are_refused_unless_quoting_is_given(
    see: Callable[..., DataReport],
) -> None:
    lines = swallowing("tsv")
    assert kinds(see("a.tsv", lines)) == [
        ("odd_quotes", "note", "train", 2)
    ]  # read without quotes: nothing is lost
    found = see("a.tsv", lines, quoting="double")
    assert (
        kinds(found) == [("swallowed_rows", "warning", "train", 1)]
        and len(found.splits["train"]) == 56
    )
    assert get_finding(found, "swallowed_rows").examples[0].where == "a.tsv line 11"
    with pytest.raises(DataError) as refused:
        see("a.csv", swallowing("csv"))
    assert str(refused.value) == (
        "a.csv line 11: column 'text' holds 4 other rows of the table, from a quote that opened by "
        "mistake to the next one; pass --quoting none to read every line as a row, or --quoting "
        "double to keep such texts. --on_bad_row skip leaves such rows out."
    )
    skipped = see("a.csv", swallowing("csv"), on_bad_row="skip")
    assert kinds(skipped) == [("skipped_rows", "warning", "train", 1)]
    assert len(see("a.csv", swallowing("csv"), quoting="none").splits["train"]) == 60


def test_texts_of_many_lines_are_no_swallowed_rows(see: Callable[..., DataReport]) -> None:
    lines = [
        "text,label",
        *(
            f'"{row["text"]}\nso, it is good\nand\nmore, of it",{row["label"]}'
            for row in clean_rows(40)
        ),
    ]
    assert kinds(see("a.csv", lines)) == []


def test_a_quoted_file_read_without_quoting(see: Callable[..., DataReport]) -> None:
    lines = ["text\tlabel", *(f'"{row["text"]}"\t{row["label"]}' for row in clean_rows(40))]
    assert kinds(see("a.tsv", lines)) == [("quotes_as_text", "warning", "train", 40)]
    assert kinds(see("a.tsv", lines, quoting="double")) == []
    some = [
        "text\tlabel",
        *tsv(clean_rows(40)),
        '"a whole sentence of somebody else that is quoted"\tbad',
    ]
    assert kinds(see("a.tsv", some)) == []


def test_unnamed_columns_with_content(see: Callable[..., DataReport]) -> None:
    lines = ["text,label,,", *(f"{row['text']},{row['label']},," for row in clean_rows(60))]
    assert kinds(see("a.csv", lines)) == []
    lines[7] = lines[7][:-2] + ', the rest of it,"and, more"'
    found = see("a.csv", lines)
    assert kinds(found) == [("overflow_columns", "warning", "train", 1)]
    assert (
        get_finding(found, "overflow_columns").examples[0].row,
        "the rest of it,and, more" in get_finding(found, "overflow_columns").examples[0].note,
    ) == (
        6,
        True,
    )
    index = [
        ",text,label",
        *(f"{number},{row['text']},{row['label']}" for number, row in enumerate(clean_rows(60))),
    ]
    assert kinds(see("b.csv", index)) == []  # a number in front of every row, as pandas writes


def test_swapped_columns_within_a_split_and_between_splits(see: Callable[..., DataReport]) -> None:
    lines = tsv(clean_rows(60))
    found = see("a.tsv", ["label\ttext", *lines])
    assert ("columns_swapped", "warning", "train", 60) in kinds(found)
    swapped = [f"{row['label']}\t{row['text']}" for row in clean_rows(30, 1)]
    found = see("b.tsv", ["text\tlabel", *lines], ["text\tlabel", *swapped])
    assert kinds(found)[:2] == [
        ("unknown_labels", "error", "validation", 30),
        ("columns_swapped", "warning", "validation", 30),
    ]
    assert kinds(see("c.tsv", ["text\tlabel", *lines], ["label\ttext", *swapped])) == []


def test_a_header_read_as_a_row(see: Callable[..., DataReport]) -> None:
    lines = tsv(clean_rows(60))
    found = see("a.tsv", ["sentence\tmood", *lines], column_names=["text", "label"])
    assert kinds(found)[0] == ("header_as_row", "warning", "train", 1)
    assert get_finding(found, "header_as_row").examples[0].row == 0
    assert kinds(see("a.tsv", lines, column_names=["text", "label"])) == []


def test_a_row_read_as_the_header(see: Callable[..., DataReport]) -> None:
    lines = tsv(clean_rows(60))
    text, label = lines[0].split("\t")
    found = see("a.tsv", lines, text_column=text, label_column=label)
    assert kinds(found) == [("row_as_header", "warning", "train", 1)]


def test_jsonl_has_no_table_findings(tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[3]["text"] = '"' + rows[3]["text"]
    assert kinds(check_rows(tmp_path, rows)) == []
