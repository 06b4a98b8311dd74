"""The training rows without what `check` found wrong with them: --fix out.parquet, and out.dropped.jsonl beside it.

In: an Inspection and the kinds of trouble to mend. Out: a parquet file with text, pair and label columns under the names that they had,
and a JSON line for each row that was dropped or changed. One module, because a row has one fate, however much is wrong with it:
the kinds are gone through in the order of FIX_KINDS, and the first that drops a row is written down.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from bertdist.core.atomic_io import atomic_write
from bertdist.core.errors import DataError
from bertdist.core.terminal import excerpt
from bertdist.data.records import Records
from bertdist.data_quality.duplicates import (
    compare_texts,
    conflicting,
    first_of_near,
    near_rows,
    repeated,
)
from bertdist.data_quality.findings import places
from bertdist.data_quality.report import DataReport
from bertdist.data_quality.text_checks import empty_rows, other_than_ascii, repairs

Flags = npt.NDArray[np.bool_]


def write_fixed(
    found: DataReport,
    kinds: list[str],
    path: Path,
    label_delimiter: str | None,
    near_threshold: float,
) -> dict[str, int]:
    """Write both files; returns rows by kind, and "rows": how many are left. Raises DataError where none are."""
    records = found.splits["train"]
    changed: dict[int, str] = {}
    if "encoding" in kinds:
        records, changed = _repaired(records)
    splits = {**found.splits, "train": records}
    near = any(kind.startswith("near") for kind in kinds)
    same = found.same if not changed else compare_texts(splits, near_threshold if near else 0.0)
    labels = found.labels["train"]
    assert labels is not None
    others = [name for name in splits if name != "train"]

    def wrong(kind: str) -> Flags:
        if kind == "empty":
            return _flags(records, empty_rows(records.texts))
        if kind == "conflicts":
            return np.isin(same.texts["train"], conflicting(same.texts["train"], labels))
        if kind == "duplicates":
            return repeated(same.texts["train"])
        if kind == "leaks":
            return _any(
                records, [np.isin(same.plain["train"], same.plain[name]) for name in others]
            )
        if same.pairs is None:
            raise DataError(
                f"--fix_kinds {kind}: near duplicates were not looked for; pip install 'rensa<0.6'."
            )
        if kind == "near_leaks":
            return _any(records, [near_rows(same, "train", name) >= 0 for name in others])
        return ~np.array(first_of_near(same, "train"), bool)

    reason = np.full(len(records), "", dtype=object)
    for kind in ("empty", "conflicts", "duplicates", "leaks", "near_leaks", "near_duplicates"):
        if kind in kinds:
            reason[wrong(kind) & (reason == "")] = kind
    kept = np.flatnonzero(reason == "")
    if not len(kept):
        raise DataError(
            f"--fix would leave none of the {len(records):,} rows; choose fewer --fix_kinds."
        )
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(_table(records, kept, label_delimiter), sink)
    atomic_write(path, sink.getvalue().to_pybytes())
    atomic_write(dropped_path(path), _told(records, reason, changed, found.splits["train"]))
    counted = {kind: int((reason == kind).sum()) for kind in kinds if kind != "encoding"}
    return {
        **({"encoding": len(changed)} if "encoding" in kinds else {}),
        **counted,
        "rows": len(kept),
    }


def dropped_path(path: Path) -> Path:
    """out.parquet -> out.dropped.jsonl."""
    return path.with_suffix(".dropped.jsonl")


def _repaired(records: Records) -> tuple[Records, dict[int, str]]:
    """The records with texts and pairs as they were meant, and what the changed rows held before."""
    before: dict[int, str] = {}
    columns = {}
    for name, column in (("texts", records.texts), ("pairs", records.pairs)):
        if column is None:
            continue
        fixed = repairs(column, other_than_ascii(column).tolist())
        if fixed:
            whole = column.to_pylist()
            for row, text in fixed.items():
                before.setdefault(row, whole[row])
                whole[row] = text
            columns[name] = pa.array(whole, pa.large_string())
    return replace(records, **columns), before


def _flags(records: Records, rows: npt.NDArray[np.int64]) -> Flags:
    found = np.zeros(len(records), bool)
    found[rows] = True
    return found


def _any(records: Records, flags: list[Flags]) -> Flags:
    return np.any(flags, axis=0) if flags else np.zeros(len(records), bool)


def _table(records: Records, rows: npt.NDArray[np.int64], label_delimiter: str | None) -> pa.Table:
    """Columns under their own names; labels as training reads them with the same flags."""
    take = pa.array(rows)
    columns: dict[str, Any] = {records.text_column: records.texts.take(take)}
    if records.pair_column is not None and records.pairs is not None:
        columns[records.pair_column] = records.pairs.take(take)
    assert records.label_codes is not None
    codes = records.label_codes[rows]
    if records.label_column is None:
        for name in records.class_names or ():
            columns[name] = np.array(
                [name in value for value in records.label_values if isinstance(value, tuple)],
                np.int8,
            )[codes]
    elif records.label_kind == "set":
        values = [list(value) for value in records.label_values if isinstance(value, tuple)]
        joined = (
            values if label_delimiter is None else [label_delimiter.join(value) for value in values]
        )
        columns[records.label_column] = pa.array(joined).take(pa.array(codes))
    else:
        columns[records.label_column] = pa.array(records.label_values).take(pa.array(codes))
    return pa.table(columns)


def _told(
    records: Records, reason: npt.NDArray[Any], before: dict[int, str], original: Records
) -> bytes:
    """A JSON line a row that was dropped or changed, in the order of the rows."""
    rows = sorted({*np.flatnonzero(reason != "").tolist(), *before})
    where = places(records.where, rows, len(records))
    lines = []
    for row in rows:
        place = where[row]
        line = int(place.rsplit(" line ", 1)[1]) if " line " in place else None
        entry: dict[str, Any] = {"file": records.name, "line": line, "row": row}
        if row in before:
            now = excerpt(records.texts[row].as_py())
            lines.append(
                {
                    **entry,
                    "action": "changed",
                    "kind": "encoding",
                    "text": excerpt(before[row]),
                    "now": now,
                }
            )
        if reason[row]:
            lines.append(
                {
                    **entry,
                    "action": "dropped",
                    "kind": reason[row],
                    "text": excerpt(original.texts[row].as_py()),
                }
            )
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
