"""Rows in memory -> an Arrow table, for the Python API: the same columns as those of a file.

table, label_names = as_table(frame, "train_rows", config.data)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from bertdist.core.config import LabelledConfig
from bertdist.core.errors import DataError
from bertdist.data.records import LABEL_COLUMNS, TEXT_COLUMNS
from bertdist.data.source_rows import class_names, named_table

_ROWS = (
    "expected a pandas or polars DataFrame, a datasets.Dataset, a pyarrow.Table, a list of dicts, "
    "a dict of columns, or (texts, labels)"
)


def as_table(
    rows: Any, name: str, data: LabelledConfig, keep_codes: bool = False
) -> tuple[pa.Table, list[str] | None]:
    """A table, and the names of its labels in order where a datasets.Dataset has them.

    name: of the keyword, for messages. keep_codes: leave class labels as numbers. Raises DataError.
    """
    try:
        return _as_table(rows, name, data, keep_codes)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise DataError(f"{name}: {reason}. Expected one type per column.") from None


def _as_table(
    rows: Any, name: str, data: LabelledConfig, keep_codes: bool
) -> tuple[pa.Table, list[str] | None]:
    if isinstance(rows, tuple) and len(rows) == 2:
        texts, labels = (_as_list(part, name) for part in rows)
        if len(texts) != len(labels):
            raise DataError(f"{name} has {len(texts)} texts and {len(labels)} labels.")
        text, *others = data.text_column or [TEXT_COLUMNS[0]]
        if others or data.text_pair_column or data.label_columns:
            raise DataError(
                f"{name} is (texts, labels), which has one column of each: pass a DataFrame or a "
                "dict of columns."
            )
        return pa.table({text: texts, data.label_column or LABEL_COLUMNS[0]: labels}), None
    if isinstance(rows, pa.Table):
        return rows, None
    if isinstance(rows, Mapping) and any(hasattr(part, "features") for part in rows.values()):
        splits = ", ".join(map(repr, rows))
        raise DataError(f"{name} has splits: {splits}. Pass one of them, such as rows['train'].")
    if isinstance(rows, Mapping):
        return pa.table({key: _as_list(values, name) for key, values in rows.items()}), None
    if hasattr(rows, "to_arrow"):  # polars
        return rows.to_arrow(), None
    if hasattr(rows, "features") and hasattr(rows, "num_rows"):  # datasets
        return _table_of_dataset(rows, data, keep_codes)
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):  # pandas
        frame = rows.rename(columns=str)
        kinds = {name: str(kind).split("[")[0] for name, kind in frame.dtypes.items()}
        periods = [name for name, kind in kinds.items() if kind in ("period", "interval")]
        frame = frame.astype(dict.fromkeys(periods, str))  # Arrow has their numbers
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(), None
    if isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        columns = dict.fromkeys(key for row in rows for key in row)
        return pa.table({key: [row.get(key) for row in rows] for key in columns}), None
    file = "input" if name == "rows" else name.replace("_rows", "_file")
    hint = f" A file is given as {file}." if isinstance(rows, str | Path) else ""
    raise DataError(f"{name} is of type {type(rows).__name__}; {_ROWS}.{hint}")


def _as_list(column: Any, name: str) -> list[Any]:
    """A column in memory. Raises DataError for what has no order, or is one text."""
    wrong = isinstance(column, str | bytes | set | frozenset | Mapping)
    if wrong or hasattr(column, "columns") or not hasattr(column, "__iter__"):
        raise DataError(f"{name}: a column is of type {type(column).__name__}; expected a list.")
    return list(column.to_list() if hasattr(column, "to_list") else column)


def _table_of_dataset(
    dataset: Any, data: LabelledConfig, keep_codes: bool
) -> tuple[pa.Table, list[str] | None]:
    """A datasets.Dataset, and the names of its labels."""
    if keep_codes:
        return dataset.with_format("arrow")[:].replace_schema_metadata(), None
    names = class_names(dataset.features)
    columns = {name.lower(): name for name in reversed(dataset.column_names)}
    usual = next((columns[name] for name in LABEL_COLUMNS if name in columns), "")
    return named_table(dataset), names.get(data.label_column or usual)
