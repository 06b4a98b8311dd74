"""`check --fix clean.csv`: the training rows without the problems that the data report found.

`write_cleaned` writes the rows that are left with all columns of their files, in the format of the
file's ending, reads the file again, and writes clean.csv.dropped.jsonl with one JSON line per row
that was dropped, changed or skipped. Encodings are repaired first; the first kind of DROP_ORDER
that applies to a row drops it.
"""

import csv
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from bertdist.core.args import DROPPED
from bertdist.core.atomic_io import to_json
from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError, DataError
from bertdist.core.output_files import OutputFormat, output_format, write_output
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array, BoolArray
from bertdist.data.all_columns import SourceRows, read_source
from bertdist.data.load_data import load_records
from bertdist.data.prediction_input import START, InputWindow, Kept
from bertdist.data.records import Records
from bertdist.data.writers import KEEP_FEWER, create_row_writer
from bertdist.data_quality.duplicates import (
    TextGroups,
    conflicting_texts,
    group_texts,
    is_repeat,
    near_duplicate_rows,
    near_duplicates_to_drop,
)
from bertdist.data_quality.label_checks import SplitLabels
from bertdist.data_quality.report import DataReport
from bertdist.data_quality.text_checks import empty_rows, repair, repair_rows
from bertdist.tasks.labels import is_multi_hot

DROP_ORDER = ("empty", "conflicts", "duplicates", "leaks", "near_leaks", "near_duplicates")


class Cleaned(NamedTuple):
    """What `write_cleaned` has done."""

    rows: int  # that are left
    dropped: dict[str, int]  # kind -> rows
    repaired: int  # rows whose encoding was
    skipped: int  # by --on_bad_row skip
    columns: int
    flags: str  # of the training on the new file
    notes: tuple[str, ...]


def write_cleaned(
    report: DataReport, kinds: list[str], path: Path, near_threshold: float
) -> Cleaned:
    """Write both files. kinds: of FIX_KINDS; near_threshold: as the report was made.

    Raises DataError if no row is left, if near duplicates are to be dropped without rensa, or if
    the format does not have these rows.
    """
    original = records = report.splits["train"]
    labels, groups = report.labels["train"], report.groups
    assert labels is not None
    source, before = read_source(report.data, original), dict[int, str]()
    if "encoding" in kinds:
        records, source, before = _repair_encoding(records, source)
    if before:
        near = any(kind.startswith("near") for kind in kinds)
        splits = {**report.splits, "train": records}
        groups = group_texts(splits, near_threshold if near else 0.0)
    reason = np.full(len(records), "", dtype=object)  # (rows,) why a row is dropped
    for kind in DROP_ORDER:
        if kind in kinds:
            reason[_rows_to_drop(kind, records, labels, groups) & (reason == "")] = kind
    left = np.flatnonzero(reason == "")
    if not len(left):
        raise DataError(
            f"--fix would leave none of the {len(records):,} rows; choose fewer --fix_kinds."
        )
    assert records.label_indices is not None
    present = [records.label_values[code] for code in np.unique(records.label_indices[left])]
    if is_multi_hot(present) and not (records.class_names or is_multi_hot(records.label_values)):
        raise DataError(
            "--fix: the labels 0 and 1 are names in all rows together; of those that are left "
            "each has a list of as many items, which training would read as zeros and ones, "
            "one for each label. Give the labels other names first."
        )
    expected = replace(
        records,
        texts=records.texts.take(pa.array(left)),
        pairs=None if records.pairs is None else records.pairs.take(pa.array(left)),
        label_indices=records.label_indices[left],
    )
    source = source.take(left.tolist())
    flags = _write_rows(source, expected, path, report.data)
    write_output(dropped_path(path), _changes_as_jsonl(original, records, reason, before))
    dropped = {kind: int((reason == kind).sum()) for kind in kinds if kind != "encoding"}
    skipped, columns = len(original.bad_rows), len(source.names)
    return Cleaned(len(left), dropped, len(before), skipped, columns, flags, source.notes)


def dropped_path(path: Path) -> Path:
    """clean.csv -> clean.csv.dropped.jsonl."""
    return Path(f"{path}{DROPPED}")


def _write_rows(source: SourceRows, expected: Records, path: Path, data: DataConfig) -> str:
    """Write the rows so that they are read again as expected; returns the flags that it takes.

    Raises DataError where the format cannot hold them.
    """
    fmt = output_format(str(path))
    assert fmt is not None  # read_check_config has checked it
    columns = ("text_column", "text_pair_column", "label_column", "label_columns")
    given = {name: getattr(data, name) for name in (*columns, "label_delimiter")}
    problem = ""
    with tempfile.TemporaryDirectory(prefix="bertdist-") as folder:
        file = Path(folder, path.name)
        # In tsv, fields with quotes around them are read as such by a flag only.
        for is_quoted in (False, True) if fmt.kind == "tsv" else (True,):
            try:
                file.write_bytes(_encode(source, fmt, expected, is_quoted))
            except csv.Error:  # a line break in a field
                continue
            is_table = fmt.kind in ("csv", "tsv")
            quotings: list[Literal["auto", "none", "double"]]
            quotings = ["auto", "double" if is_quoted else "none"]
            for quoting in quotings if is_table else quotings[:1]:
                flags = DataConfig(train_file=[str(file)], **given, quoting=quoting)
                problem = _difference(flags, expected)
                if not problem:
                    write_output(path, file.read_bytes())
                    return _as_flags(path, {**given, "quoting": quoting})
    raise DataError(
        f"--fix {path}: read again, these rows would not be the same ({problem}). Name a file "
        "that ends in .parquet or .jsonl."
    )


def _encode(source: SourceRows, fmt: OutputFormat, records: Records, is_quoted: bool) -> bytes:
    """The content of the file."""
    writer = create_row_writer(fmt, source.names, is_quoted)
    parts, start = [writer.header()], 0
    try:
        for kept in source.parts:
            if fmt.kind != "jsonl" and kept.objects is None:  # other files have more columns
                nulls = pa.chunked_array([pa.nulls(kept.num_rows)])
                kept = Kept({name: kept.columns.get(name, nulls) for name in source.names})
            window = InputWindow(records, kept, None, start, START)
            parts.append(writer.rows(window, [{}] * kept.num_rows))
            start += kept.num_rows
    except DataError as error:
        raise DataError(f"--fix: {error}".replace(KEEP_FEWER, "")) from None
    content = b"".join(parts)
    if not writer.needs_conversion:
        return content
    sink = pa.BufferOutputStream()
    writer.convert(pa.BufferReader(content), sink)
    return bytes(sink.getvalue())


def _difference(data: DataConfig, expected: Records) -> str:
    """Why the rows of a file are not those expected, "" if they are."""
    try:
        found = load_records(data, "train")
    except BertdistError as error:
        return str(error).removesuffix(".")
    if len(found) != len(expected):
        return f"{len(found):,} rows instead of {len(expected):,}"
    columns = [("text", found.texts, expected.texts), ("second text", found.pairs, expected.pairs)]
    for name, column, wanted in columns:
        if (column is None) != (wanted is None) or (column is not None and column != wanted):
            return f"another {name}"
    same = zip(_labels(found), _labels(expected), strict=True)
    odd = next(((one, other) for one, other in same if one != other), None)
    return f"the label {odd[1]!r} as {odd[0]!r}" if odd else ""


def _labels(records: Records) -> Iterator[Any]:
    assert records.label_indices is not None
    return (records.label_values[code] for code in records.label_indices)


def _as_flags(path: Path, given: dict[str, Any]) -> str:
    """What the training on the file needs."""
    flags = [f"--train_file {shlex.quote(str(path))}"]
    named = {"\t": "tab", " ": "space"}
    for name, value in given.items():
        if value not in (None, "auto"):
            values = value if isinstance(value, list) else [named.get(value, value)]
            flags.append(f"--{name} {shlex.join(values)}")
    return " ".join(flags)


def _repair_encoding(
    records: Records, source: SourceRows
) -> tuple[Records, SourceRows, dict[int, str]]:
    """Both with repaired texts and pairs, and row -> text before the repair."""
    before: dict[int, str] = {}
    columns = {}
    for name, names, column in (
        ("texts", records.text_columns, records.texts),
        ("pairs", (records.pair_column,), records.pairs),
    ):
        if column is None:
            continue
        texts, repaired = column.to_pylist(), repair_rows(column)
        parts = []
        for part in filter(None, names):  # several are joined
            values = source.texts(part)
            found = {row: repair(values[row]) for row in repaired}
            changed = {row: text for row, text in found.items() if text is not None}
            source = source.with_texts(part, changed)
            parts.append((values, changed))
        for row in repaired:
            new = " ".join(changed.get(row, values[row]) for values, changed in parts)
            if new != texts[row]:
                before.setdefault(row, texts[row])
                texts[row] = new
        columns[name] = pa.array(texts, pa.large_string())
    return replace(records, **columns), source, before


def _rows_to_drop(
    kind: str, records: Records, labels: SplitLabels, groups: TextGroups
) -> BoolArray:
    """(rows,): whether a row has this kind of problem."""
    train, others = groups.exact["train"], [name for name in groups.exact if name != "train"]
    drop = np.zeros(len(records), bool)
    if kind == "empty":
        drop[empty_rows(records.texts)] = True
    elif kind == "conflicts":
        drop = np.isin(train, conflicting_texts(train, labels))
    elif kind == "duplicates":
        drop = is_repeat(train)
    elif kind == "leaks":
        for name in others:
            drop |= np.isin(groups.normalized["train"], groups.normalized[name])
    elif groups.near is None:
        raise DataError(
            f"--fix_kinds {kind}: near duplicates were not searched; pip install 'bertdist[check]'."
        )
    elif kind == "near_leaks":
        for name in others:
            drop |= near_duplicate_rows(groups, "train", name) >= 0
    else:
        drop = near_duplicates_to_drop(groups, "train")
    return drop


def _changes_as_jsonl(
    original: Records, records: Records, reason: Array, before: dict[int, str]
) -> bytes:
    """One JSON line per row that was dropped or changed, in row order, then the skipped ones."""
    lines = []
    for row in sorted({*np.flatnonzero(reason != "").tolist(), *before}):
        place = records.location(row)
        entry: dict[str, Any] = {"file": place.file, "line": place.line, "row": row}
        if row in before:
            change = {"action": "changed", "kind": "encoding", "text": excerpt(before[row])}
            lines.append({**entry, **change, "now": excerpt(records.texts[row].as_py())})
        if reason[row]:
            text = excerpt(original.texts[row].as_py())
            lines.append({**entry, "action": "dropped", "kind": reason[row], "text": text})
    for bad in original.bad_rows:
        about = {"action": "skipped", "kind": "bad_row", "text": bad.text, "reason": bad.reason}
        lines.append({"file": bad.file, "line": bad.line, **about})
    return b"".join(map(to_json, lines))
