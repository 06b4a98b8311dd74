"""Checks of a table's structure: files that were read without an error, but not as intended.

Rows swallowed by a stray quote, quotes read as text, unnamed columns with content, text and label
columns that look swapped, and headers read as rows or rows read as headers.
"""

import os

import numpy as np
import pyarrow.compute as pc

from bertdist.core.terminal import excerpt
from bertdist.data.readers.file_reader import DataFile, FileReader
from bertdist.data.records import HEADER_WORDS, ColumnNames, rows_with_stray_quotes
from bertdist.data.source import QuotedTable
from bertdist.data_quality.findings import MIN_ROWS, FindingBuilder
from bertdist.data_quality.label_checks import SplitLabels

SENTENCE_WORDS = 5  # a column name with this many words is a sentence


def check_table(build: FindingBuilder, labels: SplitLabels | None, train: SplitLabels) -> None:
    """Add all findings on the table of one split."""
    file = build.records.file  # None of several files
    if isinstance(file, DataFile) and file.is_table:
        if os.path.isfile(file.path):
            reader = FileReader(file)
            _check_swallowed(build, reader)
            if file.has_header:
                _check_unnamed_columns(build, reader)
        _check_quotes(build, file)
    if labels is not None and labels.numbers is None:
        _check_swapped(build, labels, train)
        _check_header(build, labels)


def _check_swallowed(build: FindingBuilder, reader: FileReader) -> None:
    """Texts that hold rows, kept because of --quoting double; else the reader refuses them."""
    records = build.records
    if reader.file.quoted and reader.quoted_table is None and records.label_indices is not None:
        names = None if records.label_column else list(records.class_names or ())
        columns = ColumnNames(
            records.text_columns, records.pair_column, records.label_column, names
        )
        table = QuotedTable(reader.file.delimiter, reader.header())
        args = records.text_columns[0], columns, table, records.label_values
        rows = [row for row, _ in rows_with_stray_quotes(records.texts, *args)]
        title = "texts that contain rows of the table"
        meaning = "A stray quote opened a field: all rows up to the next quote became one text."
        advice = "Read the file with --quoting none, or escape the quotes as the format requires."
        build.add("swallowed_rows", "warning", title, rows, meaning, advice)


def _check_quotes(build: FindingBuilder, file: DataFile) -> None:
    """Quotes that were read as text, or are odd."""
    texts = build.records.texts
    opening = pc.starts_with(texts, '"').to_numpy(zero_copy_only=False)
    if opening.any() and not file.quoted:
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
            build.add("quotes_as_text", "warning", title, rows, meaning, advice)
            return
    odd = np.flatnonzero(pc.count_substring(texts, '"').to_numpy(zero_copy_only=False) % 2)
    how = "without quoting, so nothing is lost"
    if file.quoted:
        how = "with quoting, and these are inside fields"
    meaning = f"The file is read {how}. Other readers (pandas, datasets) may swallow rows here."
    title, advice = "an odd number of quotes", "Nothing to do if the number of rows is right."
    build.add("odd_quotes", "note", title, odd, meaning, advice)


def _check_unnamed_columns(build: FindingBuilder, reader: FileReader) -> None:
    """Columns after the last named one. They are read by naming all."""
    header = reader.header()
    named = [index for index, name in enumerate(header) if name.strip()]
    names = [f"column {index}" for index in range(len(header))]
    unnamed = names[named[-1] + 1 :] if named else []
    if not unnamed:
        return
    reader.rename_columns(names)
    columns = reader.read(unnamed).columns
    stripped = [pc.utf8_trim_whitespace(columns[name]).to_pylist() for name in unnamed]
    values = list(zip(*(column[: len(build.records)] for column in stripped), strict=True))
    rows = np.flatnonzero([any(value) for value in values])
    title, plural = "unnamed columns with content", "s" * (len(unnamed) > 1)
    meaning = (
        f"The header ends with {len(unnamed)} unnamed column{plural} that are not empty: parts of "
        "texts that a spreadsheet split at a delimiter."
    )
    advice = "Join them to the text in the source file, or drop these rows."

    def note(row: int) -> str:
        return "unnamed: " + excerpt(reader.file.delimiter.join(values[row]), 60)

    build.add("overflow_columns", "warning", title, rows, meaning, advice, note=note)


def _check_swapped(build: FindingBuilder, labels: SplitLabels, train: SplitLabels) -> None:
    texts, num_rows = build.records.texts, len(build.records)
    if num_rows < MIN_ROWS or labels.multi:
        return
    meaning = ""
    names = [next(iter(names)) for names in labels.names]
    if build.split != "train":
        train_names = {name for names in train.names for name in names}
        label_texts = sum(text in train_names for text in texts.to_pylist())
        unknown_codes = [code for code, name in enumerate(names) if name not in train_names]
        unknown = np.isin(labels.codes, unknown_codes)
        if label_texts > num_rows / 2 and unknown.mean() > 0.5:
            meaning = (
                f"{label_texts:,} texts are labels of train, and {int(unknown.sum()):,} labels "
                "are not."
            )
    else:
        distinct = len(texts.dictionary_encode().dictionary)
        text_bytes = float(pc.mean(pc.binary_length(texts)).as_py())
        label_bytes = float(np.array([len(name.encode()) for name in names])[labels.codes].mean())
        many_labels = len(names) > num_rows / 2 and distinct <= max(2, num_rows / 10)
        if many_labels and label_bytes > text_bytes:
            meaning = (
                f"{distinct:,} distinct texts of {text_bytes:.0f} bytes, {len(names):,} distinct "
                f"labels of {label_bytes:.0f}."
            )
    if meaning:
        title, advice = "text and label look swapped", "Set --text_column and --label_column."
        build.add("columns_swapped", "warning", title, range(num_rows), meaning, advice)


def _check_header(build: FindingBuilder, labels: SplitLabels) -> None:
    """A header that may be a row, and a row that may be a header but is not surely one.

    Training refuses what surely is one (`csv_reader.read_header`).
    """
    records = build.records
    if records.has_header:
        names = {name for names in labels.names for name in names}
        label_like = records.label_column is not None and records.label_column in names
        if label_like or len(records.text_column.split()) >= SENTENCE_WORDS:
            name = str(records.label_column) if label_like else records.text_column
            title, advice = "the header looks like a row", "Name the columns with --column_names."
            meaning = (
                f"A column is named {excerpt(name, 60)!r}, which is also a label or a complete "
                "sentence: if the file has no header, its first row is lost."
            )
            build.add("row_as_header", "warning", title, [0], meaning, advice)
        return
    first = labels.names[labels.codes[0]]
    label = next(iter(first)) if len(first) == 1 else ""
    unique = int((labels.codes == labels.codes[0]).sum()) == 1
    cells = {records.texts[0].as_py().strip().lower(), label.strip().lower()}
    if unique and len(records) >= 2 and cells & HEADER_WORDS:
        title = "the first row looks like a header"
        meaning = "It would be trained on or scored as a text, with its own label."
        advice = "Remove --column_names for a file with a header."
        build.add("header_as_row", "warning", title, [0], meaning, advice, note=labels.name)
