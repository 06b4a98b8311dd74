"""Tables that were read without an error and yet not as they were meant -> findings.

In: Records, how their file was read, and the labels. Out: findings on rows that a quote swallowed, on quotes read as text, on columns
without a name that hold something, on columns that look swapped, and on headers read as rows or rows read as headers.
One module, because all of it is told from the table's form and not from what its texts say.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.core.terminal import excerpt
from bertdist.data.readers.file_reader import inspect_file, open_file
from bertdist.data.records import LABEL_COLUMNS, PAIRS, TEXT_COLUMNS, Records
from bertdist.data_quality.findings import Example, Finding, Severity
from bertdist.data_quality.label_checks import SplitLabels

HEADER_WORDS = {
    *TEXT_COLUMNS,
    *LABEL_COLUMNS,
    *(name for pair in PAIRS for name in pair),
    "text_a",
    "text_b",
    "id",
    "idx",
    "index",
    "qid",
}

ENOUGH = 20  # rows from which the form of a column says something

SENTENCE_WORDS = 5  # a column's name with so many words is no name


def check_table(
    split: str,
    path: str | None,
    records: Records,
    labels: SplitLabels | None,
    train: SplitLabels,
    data: DataConfig,
    num_examples: int,
) -> list[Finding]:
    """All findings on one split's table. path: its file, None for data of the hub."""

    def finding(
        kind: str,
        severity: Severity,
        title: str,
        rows: Any,
        meaning: str,
        advice: str,
        notes: Mapping[int, str] | None = None,
    ) -> Finding:
        examples = tuple(
            Example(
                split=split,
                row=int(row),
                text=excerpt(records.texts[int(row)].as_py()),
                note=(notes or {}).get(int(row), ""),
            )
            for row in rows[:num_examples]
        )
        return Finding(
            kind=kind, severity=severity, split=split, title=title, count=len(rows), total=len(records), meaning=meaning, advice=advice,
            examples=examples,
        )  # fmt: skip

    found: list[Finding] = []
    kind = getattr(getattr(records.source, "form", None), "kind", "")
    if kind in ("csv", "tsv"):
        found += _quotes(records, train, finding)
        if path is not None:
            found += _overflow(path, data, records, finding, num_examples)
    if labels is not None and labels.numbers is None:
        found += _swapped(split, records, labels, train, finding)
        found += _headers(split, records, labels, finding)
    return found


def _quotes(records: Records, train: SplitLabels, finding: Any) -> list[Finding]:
    texts, found = records.texts, []
    known = {name for names in train.names for name in names}
    delimiter = str(getattr(getattr(records.source, "form", None), "delimiter", ","))
    swallowed: dict[int, str] = {}
    for row in np.flatnonzero(
        pc.match_substring(texts, "\n").to_numpy(zero_copy_only=False)
    ).tolist():
        lines = texts[row].as_py().rstrip("\n").split("\n")
        like = sum(
            _is_like_a_row(line, delimiter, known, train.numbers is not None) for line in lines
        )
        if like >= 2 and like >= len(lines) / 2:
            swallowed[row] = f"{like} of its {len(lines)} lines look like rows"
    if swallowed:
        found.append(
            finding(
                "swallowed_rows", "error", "texts that hold rows of the table", list(swallowed),
                "A quote that nobody meant opened a field, and the rows up to the next quote became one text.",
                "Read the file with --quoting none, or write the quotes as the format wants them.", swallowed,
            )
        )  # fmt: skip
    quoted = bool(getattr(getattr(records.source, "form", None), "quoted", False))
    begins = pc.starts_with(texts, '"').to_numpy(zero_copy_only=False)
    if begins.any() and not quoted:
        some = texts.filter(begins)
        whole = int(pc.sum(pc.match_substring_regex(some, r'(?s)^"(?:[^"]|"")*"$')).as_py())
        doubled = int(pc.sum(pc.match_substring_regex(some, r'(?s)^".*[^"]""[^"].*"$')).as_py())
        if whole == len(some) and (doubled or whole >= 0.2 * len(texts)):
            found.append(
                finding(
                    "quotes_as_text", "warning", "texts that stand in quotes", np.flatnonzero(begins),
                    "Each text that begins with a quote ends with one: the file seems to be written with quotes and read without.",
                    "Pass --quoting double.",
                )
            )  # fmt: skip
            return found
    odd = np.flatnonzero(pc.count_substring(texts, '"').to_numpy(zero_copy_only=False) % 2)
    if len(odd):
        found.append(
            finding(
                "odd_quotes", "note", "an odd number of quotes", odd,
                f"The file is read {'with quotes, and these stand inside of fields' if quoted else 'without quotes, so nothing is lost'}. "
                "Another reader may swallow rows here: pandas and datasets do.",
                "Nothing, as long as the number of rows is right.",
            )
        )  # fmt: skip
    return found


def _is_like_a_row(line: str, delimiter: str, known: set[str], numbers: bool) -> bool:
    fields = [field.strip().strip('"').strip() for field in line.split(delimiter)]
    ends = (fields[0], fields[-1])
    return len(fields) > 1 and any(
        field in known or (numbers and field.replace(".", "", 1).isdecimal()) for field in ends
    )


def _overflow(
    path: str, data: DataConfig, records: Records, finding: Any, num_examples: int
) -> list[Finding]:
    """Columns behind the last one that has a name. They are read by giving every column a name, with the header as a row."""
    if data.column_names:
        return []
    try:
        file = inspect_file(
            path,
            delimiter=data.delimiter,
            quoting=data.quoting,
            encoding=data.encoding,
            column_names=None,
        )
        with Path(path).open(
            encoding="utf-8-sig" if file.encoding.lower() in ("utf-8", "utf8") else file.encoding,
            newline="",
        ) as opened:
            reader = csv.reader(
                opened,
                delimiter=file.delimiter,
                quoting=csv.QUOTE_MINIMAL if file.quoted else csv.QUOTE_NONE,
            )
            header = next((row for row in reader if row), [])
        last = max((at for at, name in enumerate(header) if name.strip()), default=len(header))
        behind = [f"column {at}" for at in range(last + 1, len(header))]
        if not behind:
            return []
        names = [f"column {at}" for at in range(len(header))]
        quoting = "double" if file.quoted else "none"
        file = inspect_file(
            path,
            delimiter=file.delimiter,
            quoting=quoting,
            encoding=file.encoding,
            column_names=names,
        )
        columns = open_file(file)[1](behind)
    except (
        DataError,
        OSError,
        UnicodeError,
        csv.Error,
    ):  # what cannot be read twice was told when it was read
        return []
    values = list(
        zip(
            *(
                pc.utf8_trim_whitespace(columns[name]).to_pylist()[1 : len(records) + 1]
                for name in behind
            ),
            strict=True,
        )
    )
    rows = np.flatnonzero([any(value) for value in values])
    if not len(rows):
        return []
    notes = {
        int(row): "behind it: " + excerpt(file.delimiter.join(values[row]), 60)
        for row in rows[:num_examples]
    }
    return [
        finding(
            "overflow_columns", "warning", "columns without a name that hold something", rows,
            f"The header ends with {len(behind)} column{'s' * (len(behind) > 1)} without a name, and they are not empty: parts of texts "
            "that were cut at a delimiter, as spreadsheets do.",
            "Join them to the text where the file is made, or drop these rows.", notes,
        )
    ]  # fmt: skip


def _swapped(
    split: str, records: Records, labels: SplitLabels, train: SplitLabels, finding: Any
) -> list[Finding]:
    rows, everything = len(records), np.arange(len(records))
    if rows < ENOUGH or labels.several:
        return []
    title, advice = (
        "text and label look swapped",
        "Name them with --text_column and --label_column.",
    )
    texts = records.texts.dictionary_encode().dictionary
    names = [next(iter(names)) for names in labels.names]
    if split != "train":
        known = {name for names in train.names for name in names}
        places = np.flatnonzero([text in known for text in records.texts.to_pylist()])
        unknown = np.isin(
            labels.codes, [code for code, name in enumerate(names) if name not in known]
        )
        if len(places) > rows / 2 and unknown.mean() > 0.5:
            told = f"{len(places):,} texts are labels of train, and {int(unknown.sum()):,} labels are none."
            return [finding("columns_swapped", "error", title, everything, told, advice)]
        return []
    text_length = float(pc.mean(pc.binary_length(records.texts)).as_py())
    label_length = float(np.array([len(name.encode()) for name in names])[labels.codes].mean())
    if len(names) > rows / 2 and len(texts) <= max(2, rows / 10) and label_length > text_length:
        told = f"{len(texts):,} different texts of {text_length:.0f} bytes, {len(names):,} different labels of {label_length:.0f}."
        return [finding("columns_swapped", "error", title, everything, told, advice)]
    return []


def _headers(split: str, records: Records, labels: SplitLabels, finding: Any) -> list[Finding]:
    found = []
    names = {name for names in labels.names for name in names}
    first = labels.names[labels.codes[0]]
    label = next(iter(first)) if len(first) == 1 else ""
    alone = int((labels.codes == labels.codes[0]).sum()) == 1
    text = records.texts[0].as_py().strip().lower()
    if (
        not records.source.has_header
        and alone
        and len(records) > 1
        and {text, label.strip().lower()} & HEADER_WORDS
    ):
        found.append(
            finding(
                "header_as_row", "error", "the first row looks like a header", [0],
                "It would be trained or scored as a text, with a label of its own.", "Leave out --column_names for a file with a header.",
                {0: labels.name(0)},
            )
        )  # fmt: skip
    if records.source.has_header:
        column, heading = records.label_column, records.text_column
        if (column is not None and column in names) or len(heading.split()) >= SENTENCE_WORDS:
            odd = column if column is not None and column in names else heading
            found.append(
                finding(
                    "row_as_header", "error", "the header looks like a row", [0],
                    f"A column is named {excerpt(odd, 60)!r}, which is also a label or a whole sentence: the file has no header, and its "
                    "first row is lost.",
                    "Name the columns with --column_names.",
                )
            )  # fmt: skip
    return found
