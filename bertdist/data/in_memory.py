"""Rows that a caller in Python has in memory already (DataFrame, Dataset, lists), not in files.

table, label_names = as_table(frame, "train_rows", config.data)  # to train or evaluate on
records = records_from_texts(["good", "bad"])  # to predict
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from bertdist.core.config import LabelledConfig
from bertdist.core.errors import DataError
from bertdist.core.terminal import excerpt_of
from bertdist.data.records import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    ColumnNames,
    Records,
    choose_columns,
    records_from_chunk,
)
from bertdist.data.source import Column, chunk_of_columns

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


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column -> the names of its class labels, of datasets.Features; lists of them too."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(x.names) for name, x in inner.items() if getattr(x, "names", None)}


def named_table(dataset: Any) -> pa.Table:
    """A datasets.Dataset with the names of its class labels in place of their numbers."""
    table = dataset.with_format("arrow")[:].replace_schema_metadata()
    for column, names in class_names(dataset.features).items():
        index = table.column_names.index(column)
        table = table.set_column(index, column, with_names(table.column(column), names))
    return table


def with_names(column: pa.ChunkedArray, names: list[str]) -> pa.ChunkedArray:
    """Class labels, or lists of them, by name."""

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        # -1 is "no label" in datasets.
        return None if value is None or value < 0 else names[value]

    kind = pa.list_(pa.string()) if pa.types.is_nested(column.type) else pa.string()
    return pa.chunked_array([pa.array(map(named, column.to_pylist()), kind)])


def records_from_texts(
    texts: str | Iterable[str], pairs: str | Iterable[str] | None = None
) -> Records:
    """Texts in memory, without labels. Raises DataError if one is not a text."""
    columns: dict[str, Column] = {"text": as_texts(texts, "texts")}
    rows = len(columns["text"])
    if pairs is not None:
        columns["pair"] = as_texts(pairs, "pairs")
        if len(columns["pair"]) != rows:
            raise DataError(
                f"There are {rows} texts and {len(columns['pair'])} second texts; they go together."
            )
    chunk = chunk_of_columns("texts", columns, rows, {"row": 0})
    chosen = ColumnNames("text", None if pairs is None else "pair", None, [])
    return records_from_chunk("texts", chunk, chosen)


def is_table(value: Any) -> bool:
    """Whether it is a table with named columns: pandas, polars, datasets or Arrow."""
    return _column_names(value) is not None and not isinstance(value, Mapping)


def _column_names(value: Any) -> Any:
    names = getattr(value, "column_names", None)  # datasets and Arrow
    return getattr(value, "columns", None) if names is None else names  # pandas and polars


def records_from_table(table: Any, requested: ColumnNames) -> Records:
    """The texts of a table in memory, without labels. Raises DataError."""
    name = type(table).__name__
    if name == "LazyFrame":  # polars
        raise DataError("A LazyFrame has no rows yet: pass its .collect().")
    names = [column for column in _column_names(table) if isinstance(column, str)]
    columns = choose_columns(name, names, requested)
    texts: dict[str, Column] = {
        column: as_texts(table[column], column) for column in columns.names()
    }
    rows = len(texts[columns.texts[0]])
    return records_from_chunk(name, chunk_of_columns(name, texts, rows, {"row": 0}), columns)


def as_texts(texts: Any, name: str) -> list[Any]:
    """A text, or any ordered iterable of texts, as a list of str. name: for messages.

    Lists, tuples, generators, arrays, columns of pandas, Arrow and datasets. Raises DataError for
    bytes, sets, dicts and tables, and at the first item that is not a str.
    """
    if isinstance(texts, str):
        texts = [texts]
    columns = _column_names(texts)
    reason = "expected a text or a list of texts"
    if isinstance(texts, Mapping):
        reason += ", and second texts as pairs"
    elif columns is not None:
        reason += "; pass one of its columns"
    elif isinstance(texts, set | frozenset):
        reason += "; a set has no order"
    elif isinstance(texts, bytes | bytearray | memoryview):
        reason += "; decode it first"
    else:
        try:
            items = list(texts.to_pylist() if hasattr(texts, "to_pylist") else texts)
        except TypeError:  # not iterable
            pass
        else:
            for row, item in enumerate(items):
                if not isinstance(item, str):
                    found = f"{excerpt_of(item, 40)} ({type(item).__name__})"
                    fill = " In pandas: .fillna('')." * _is_missing(item)
                    raise DataError(f"{name}[{row}] is {found}; expected a text.{fill}")
            return list(map(str.__str__, items))  # subclasses of str too
    raise DataError(f"{name} is of type {type(texts).__name__}: {reason}.")


def _is_missing(item: Any) -> bool:
    return item is None or (isinstance(item, float) and math.isnan(item))
