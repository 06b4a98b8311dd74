"""Checks of a table's structure: files that were read without an error, but not as intended.

Rows swallowed by a stray quote, quotes read as text, unnamed columns with content, text and label
columns that look swapped, and headers read as rows or rows read as headers.
"""

import csv
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from bertdist.core.config import DataConfig
from bertdist.core.errors import DataError
from bertdist.core.terminal import excerpt
from bertdist.data.readers.file_reader import FileReader, inspect_file
from bertdist.data.records import LABEL_COLUMNS, TEXT_COLUMNS, TEXT_PAIR_COLUMNS, Records
from bertdist.data_quality.findings import Finding, FindingBuilder, Rows
from bertdist.data_quality.label_checks import SplitLabels

HEADER_WORDS = {
    *TEXT_COLUMNS,
    *LABEL_COLUMNS,
    *(name for pair in TEXT_PAIR_COLUMNS for name in pair),
    *("text_a", "text_b", "id", "idx", "index", "qid"),
}
MIN_ROWS = 20  # of a table whose columns may be called swapped
SENTENCE_WORDS = 5  # a column name with this many words is a sentence


def check_table(
    build: FindingBuilder,
    path: str | None,
    records: Records,
    labels: SplitLabels | None,
    train: SplitLabels,
    data: DataConfig,
) -> list[Finding]:
    """All findings on the table of one split. path: its file, None unless it is one local file."""
    findings: list[Finding] = []
    kind = getattr(records.file, "kind", "")
    if kind in ("csv", "tsv"):
        findings += _check_quotes(build, records, train)
        if path is not None and not data.column_names:
            findings += _check_unnamed_columns(build, path, data, len(records))
    if labels is not None and labels.numbers is None:
        findings += _check_swapped(build, records, labels, train)
        findings += _check_header(build, records, labels)
    return findings


def _check_quotes(build: FindingBuilder, records: Records, train: SplitLabels) -> list[Finding]:
    """Quotes that were read as text, or opened a field by mistake."""
    texts, findings = records.texts, []
    form = records.file
    delimiter, quoted = str(getattr(form, "delimiter", ",")), bool(getattr(form, "quoted", False))
    train_names = {name for names in train.names for name in names}
    swallowed: dict[int, str] = {}
    multiline = pc.match_substring(texts, "\n").to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(multiline).tolist():
        lines = texts[row].as_py().rstrip("\n").split("\n")
        like = sum(
            _like_a_row(line, delimiter, train_names, train.numbers is not None) for line in lines
        )
        if like >= 2 and like >= len(lines) / 2:
            swallowed[row] = f"{like} of its {len(lines)} lines look like rows"
    if swallowed:
        title = "texts that contain rows of the table"
        meaning = "A stray quote opened a field: all rows up to the next quote became one text."
        advice = "Read the file with --quoting none, or escape the quotes as the format requires."
        rows: Rows = list(swallowed)
        note = swallowed.__getitem__
        findings.append(build("swallowed_rows", "error", title, rows, meaning, advice, note=note))
    opening = pc.starts_with(texts, '"').to_numpy(zero_copy_only=False)
    if opening.any() and not quoted:
        candidates = texts.filter(opening)
        enclosed, doubled = (
            int(pc.sum(pc.match_substring_regex(candidates, pattern)).as_py())
            for pattern in (r'(?s)^"(?:[^"]|"")*"$', r'(?s)^".*[^"]""[^"].*"$')
        )
        if enclosed == len(candidates) and (doubled or enclosed >= 0.2 * len(texts)):
            title, advice = "texts enclosed in quotes", "Pass --quoting double."
            meaning = (
                "Every text that begins with a quote ends with one: the file seems to be written "
                "with quoting and read without."
            )
            rows = np.flatnonzero(opening)
            return [*findings, build("quotes_as_text", "warning", title, rows, meaning, advice)]
    odd = np.flatnonzero(pc.count_substring(texts, '"').to_numpy(zero_copy_only=False) % 2)
    if len(odd):
        how = (
            "with quoting, and these are inside fields"
            if quoted
            else "without quoting, so nothing is lost"
        )
        meaning = f"The file is read {how}. Other readers (pandas, datasets) may swallow rows here."
        title, advice = "an odd number of quotes", "None needed if the number of rows is right."
        findings.append(build("odd_quotes", "note", title, odd, meaning, advice))
    return findings


def _like_a_row(line: str, delimiter: str, train_names: set[str], numeric: bool) -> bool:
    """Whether a line has several fields, and a label at either end."""
    fields = [field.strip().strip('"').strip() for field in line.split(delimiter)]
    return len(fields) > 1 and any(
        field in train_names or (numeric and field.replace(".", "", 1).isdecimal())
        for field in (fields[0], fields[-1])
    )


def _check_unnamed_columns(
    build: FindingBuilder, path: str, data: DataConfig, num_rows: int
) -> list[Finding]:
    """Columns after the last named one. They are read by naming all, with the header as a row."""
    try:
        file = inspect_file(
            path,
            delimiter=data.delimiter,
            quoting=data.quoting,
            encoding=data.encoding,
            column_names=None,
        )
        utf8 = file.encoding.lower() in ("utf-8", "utf8")
        with Path(path).open(encoding="utf-8-sig" if utf8 else file.encoding, newline="") as lines:
            reader = csv.reader(
                lines,
                delimiter=file.delimiter,
                quoting=csv.QUOTE_MINIMAL if file.quoted else csv.QUOTE_NONE,
            )
            header = next((row for row in reader if row), [])
        named = [index for index, name in enumerate(header) if name.strip()]
        names = [f"column {index}" for index in range(len(header))]
        unnamed = names[named[-1] + 1 :] if named else []
        if not unnamed:
            return []
        file = inspect_file(
            path,
            delimiter=file.delimiter,
            quoting="double" if file.quoted else "none",
            encoding=file.encoding,
            column_names=names,
        )
        columns = FileReader(file).read(unnamed).columns
    except (DataError, OSError, UnicodeError, csv.Error):  # reported when the split was loaded
        return []
    stripped = [pc.utf8_trim_whitespace(columns[name]).to_pylist() for name in unnamed]
    values = list(zip(*(column[1 : num_rows + 1] for column in stripped), strict=True))
    rows = np.flatnonzero([any(value) for value in values])
    if not len(rows):
        return []
    title, plural = "unnamed columns with content", "s" * (len(unnamed) > 1)
    meaning = (
        f"The header ends with {len(unnamed)} unnamed column{plural} that are not empty: parts of "
        "texts that a spreadsheet split at a delimiter."
    )
    advice = "Join them to the text in the source file, or drop these rows."

    def note(row: int) -> str:
        return "unnamed: " + excerpt(file.delimiter.join(values[row]), 60)

    return [build("overflow_columns", "warning", title, rows, meaning, advice, note=note)]


def _check_swapped(
    build: FindingBuilder, records: Records, labels: SplitLabels, train: SplitLabels
) -> list[Finding]:
    num_rows = len(records)
    if num_rows < MIN_ROWS or labels.multi:
        return []
    meaning = ""
    names = [next(iter(names)) for names in labels.names]
    if build.split != "train":
        train_names = {name for names in train.names for name in names}
        label_texts = sum(text in train_names for text in records.texts.to_pylist())
        unknown_codes = [code for code, name in enumerate(names) if name not in train_names]
        unknown = np.isin(labels.codes, unknown_codes)
        if label_texts > num_rows / 2 and unknown.mean() > 0.5:
            meaning = (
                f"{label_texts:,} texts are labels of train, and {int(unknown.sum()):,} labels "
                "are not."
            )
    else:
        distinct = len(records.texts.dictionary_encode().dictionary)
        text_bytes = float(pc.mean(pc.binary_length(records.texts)).as_py())
        label_bytes = float(np.array([len(name.encode()) for name in names])[labels.codes].mean())
        many_labels = len(names) > num_rows / 2 and distinct <= max(2, num_rows / 10)
        if many_labels and label_bytes > text_bytes:
            meaning = (
                f"{distinct:,} distinct texts of {text_bytes:.0f} bytes, {len(names):,} distinct "
                f"labels of {label_bytes:.0f}."
            )
    if not meaning:
        return []
    title, advice = "text and label look swapped", "Set --text_column and --label_column."
    return [build("columns_swapped", "error", title, range(num_rows), meaning, advice)]


def _check_header(build: FindingBuilder, records: Records, labels: SplitLabels) -> list[Finding]:
    if records.has_header:
        names = {name for names in labels.names for name in names}
        label_like = records.label_column is not None and records.label_column in names
        if not label_like and len(records.text_column.split()) < SENTENCE_WORDS:
            return []
        name = str(records.label_column) if label_like else records.text_column
        title, advice = "the header looks like a row", "Name the columns with --column_names."
        meaning = (
            f"A column is named {excerpt(name, 60)!r}, which is also a label or a complete "
            "sentence: the file has no header, and its first row is lost."
        )
        return [build("row_as_header", "error", title, [0], meaning, advice)]
    first = labels.names[labels.codes[0]]
    label = next(iter(first)) if len(first) == 1 else ""
    unique = int((labels.codes == labels.codes[0]).sum()) == 1
    cells = {records.texts[0].as_py().strip().lower(), label.strip().lower()}
    if not unique or len(records) < 2 or not cells & HEADER_WORDS:
        return []
    title = "the first row looks like a header"
    meaning = "It would be trained on or scored as a text, with its own label."
    advice = "Remove --column_names for a file with a header."
    return [build("header_as_row", "error", title, [0], meaning, advice, note=labels.name)]
