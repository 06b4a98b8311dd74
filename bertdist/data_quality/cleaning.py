"""`check --fix out.parquet`: the training rows without the problems that the data report found.

`write_cleaned` writes a parquet file with text, pair and label columns under their original names,
and out.dropped.jsonl with one JSON line per row that was dropped or changed. Encodings are repaired
first; the first kind of DROP_ORDER that applies to a row drops it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bertdist.core.args import DROPPED
from bertdist.core.atomic_io import to_json
from bertdist.core.errors import DataError
from bertdist.core.output_files import write_output
from bertdist.core.terminal import excerpt
from bertdist.core.types import Array, BoolArray, IntArray
from bertdist.data.records import Records
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
from bertdist.data_quality.text_checks import empty_rows, repair_rows
from bertdist.tasks.labels import is_integer, is_number

DROP_ORDER = ("empty", "conflicts", "duplicates", "leaks", "near_leaks", "near_duplicates")


def write_cleaned(
    report: DataReport,
    kinds: list[str],
    path: Path,
    near_threshold: float,
) -> dict[str, int]:
    """Write both files; returns the rows per kind, and the rows that are left under "rows".

    kinds: of FIX_KINDS. near_threshold: as the report was made.
    Raises DataError if no row is left, or if near duplicates are to be dropped without rensa.
    """
    original = records = report.splits["train"]
    labels, groups = report.labels["train"], report.groups
    assert labels is not None
    before: dict[int, str] = {}
    if "encoding" in kinds:
        records, before = _repair_encoding(records)
    if before:
        near = any(kind.startswith("near") for kind in kinds)
        splits = {**report.splits, "train": records}
        groups = group_texts(splits, near_threshold if near else 0.0)
    reason = np.full(len(records), "", dtype=object)  # (rows,) why a row is dropped
    for kind in DROP_ORDER:
        if kind in kinds:
            reason[_rows_to_drop(kind, records, labels, groups) & (reason == "")] = kind
    remaining_rows = np.flatnonzero(reason == "")
    if not len(remaining_rows):
        raise DataError(
            f"--fix would leave none of the {len(records):,} rows; choose fewer --fix_kinds."
        )
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(_to_table(records, remaining_rows), sink)
    write_output(path, sink.getvalue().to_pybytes())
    write_output(dropped_path(path), _changes_as_jsonl(original, records, reason, before))
    changed = {"encoding": len(before)} if "encoding" in kinds else {}
    dropped = {kind: int((reason == kind).sum()) for kind in kinds if kind != "encoding"}
    return {**changed, **dropped, "rows": len(remaining_rows)}


def dropped_path(path: Path) -> Path:
    """out.parquet -> out.dropped.jsonl."""
    return path.with_suffix(DROPPED)


def _repair_encoding(records: Records) -> tuple[Records, dict[int, str]]:
    """The records with repaired texts and pairs, and row -> text before the repair."""
    before: dict[int, str] = {}
    columns = {}
    for name, column in (("texts", records.texts), ("pairs", records.pairs)):
        if column is None:
            continue
        texts = column.to_pylist()
        for row, text in repair_rows(column).items():
            before.setdefault(row, texts[row])
            texts[row] = text
        columns[name] = pa.array(texts, pa.large_string())
    return replace(records, **columns), before


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


def _to_table(records: Records, rows: IntArray) -> pa.Table:
    """The columns of the source; several labels as a list, whatever joined them."""
    columns: dict[str, Any] = {records.text_column: records.texts.take(rows)}
    if records.pair_column is not None and records.pairs is not None:
        columns[records.pair_column] = records.pairs.take(rows)
    assert records.label_codes is not None
    codes = records.label_codes[rows]
    sets = [value for value in records.label_values if isinstance(value, tuple)]
    values: list[Any] = list(records.label_values)
    if records.label_column is None:  # one 0/1 column per label
        for name in records.class_names or ():
            columns[name] = np.array([name in value for value in sets], np.int8)[codes]
        return pa.table(columns)
    if records.label_kind == "set":
        labels = pa.array(map(list, sets), pa.list_(pa.string()))
    else:
        labels = pa.array(_as_numbers(values))
    columns[records.label_column] = labels.take(codes)
    return pa.table(columns)


def _as_numbers(labels: list[str]) -> list[Any]:
    """Labels as integers or floats, where these are spelled like them."""
    if all(is_integer(label) and len(label) < 19 for label in labels):
        return [int(label) for label in labels]
    if all(is_number(label) and repr(float(label)) == label for label in labels):
        return [float(label) for label in labels]
    return labels


def _changes_as_jsonl(
    original: Records, records: Records, reason: Array, before: dict[int, str]
) -> bytes:
    """One JSON line per row that was dropped or changed, in row order."""
    lines = []
    for row in sorted({*np.flatnonzero(reason != "").tolist(), *before}):
        line = records.location(row).line
        entry: dict[str, Any] = {"file": records.name, "line": line, "row": row}
        if row in before:
            change = {"action": "changed", "kind": "encoding", "text": excerpt(before[row])}
            lines.append({**entry, **change, "now": excerpt(records.texts[row].as_py())})
        if reason[row]:
            text = excerpt(original.texts[row].as_py())
            lines.append({**entry, "action": "dropped", "kind": reason[row], "text": text})
    return b"".join(map(to_json, lines))
