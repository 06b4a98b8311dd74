"""Raw columns -> checked texts (Arrow large_string) and labels (distinct values, one code per row).

Columns are Arrow arrays or Python lists; `location` maps a row to its file and line, for messages.
Which texts and labels are valid or missing is decided here, for every kind of source.

Labels are dictionary-encoded first, so that every check runs over the distinct values and not over
the rows: 1,000,000 rows of two labels cost 0.05 s from Arrow and 0.2 s from a list (1,000,000
different numbers: 1.3 s). The first row with the first invalid value is the first bad row.

To skip bad rows instead of failing, pass `problems`, {row: reason}. Rows that are in it already
are not checked; invalid ones are added. The arrays still have all rows (an invalid one with any
value): compute `valid_rows` once for texts, pairs and labels, then `filter_rows` and
`filter_labels`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bertdist.core.errors import DataError, RowError
from bertdist.core.terminal import excerpt, excerpt_of
from bertdist.data.source import LocateRow
from bertdist.tasks.labels import LabelKind, LabelValue, canonical, has_fractions, is_number

Codes = npt.NDArray[np.int32]  # of rows: numbers of distinct values, as pandas.Categorical.codes
Raw: TypeAlias = "pa.Array | list[Any]"
Problems = dict[int, str]  # rows to skip -> reason
Sample: TypeAlias = Callable[[], Mapping[str, Any]]  # the first rows: column -> values


class LabelRules(NamedTuple):
    """What is decided over all rows of a split: which labels and cells are not valid."""

    numbers_only: bool = False  # with --on_bad_row skip: skip labels that are no numbers
    # --label_columns: an empty cell means 0 ("zero": and no cell may hold a 0), or is an error.
    empty: Literal["undecided", "zero", "error"] = "undecided"


_BITS = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1, "x": 1}

# A list written into a cell by Python, JSON or numpy: ['a', 'b'], ["a"], [0, 1], [0. 1.], ('a',),
# {0, 1}, (), set(), array(['a'], dtype=object). Neither (1) nor {a}.
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_NUMERIC = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_ITEM = rf"(?:{_QUOTED}|{_NUMERIC}|[Tt]rue|[Ff]alse)"
_COMMAS = rf"{_ITEM}(?:\s*,\s*{_ITEM})*"
_SQUARE = rf"\[\s*(?:{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*)?\s*,?\s*\]"
_TUPLE = rf"\(\s*(?:{_COMMAS}\s*,|{_ITEM}\s*,\s*{_COMMAS}|{_QUOTED}|)\s*\)"
_LIST = re.compile(rf"{_SQUARE}|{_TUPLE}|\{{\s*{_COMMAS}\s*,?\s*\}}")
_CALL = re.compile(r"(?:array|list|set|frozenset)\((.*?)(?:,\s*dtype=[^)]*)?\)", re.DOTALL)
_NESTED = re.compile(rf"\[\s*(?:{_SQUARE}|{_TUPLE}).*\]|\{{\s*{_ITEM}\s*:.*\}}", re.DOTALL)
_ITEMS = re.compile(_ITEM)
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|['\"\\abfnrtv])"
)


def as_array(column: Any) -> Raw:
    """A column as one array, for random access. Lists stay lists.

    Strings become large_string, whose offsets are not limited to 2 GiB.
    """
    if isinstance(column, list):
        return column
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        kind = pa.large_string()
    return column.cast(kind).combine_chunks()


def valid_rows(problems: Problems, rows: int) -> npt.NDArray[np.bool_] | None:
    """(rows,) bool: True without a problem; None if no row has one."""
    if not problems:
        return None
    valid = np.ones(rows, bool)
    valid[np.fromiter(problems, np.int64, len(problems))] = False
    return valid


def filter_rows(column: pa.Array, valid: npt.NDArray[np.bool_] | None) -> pa.Array:
    """The valid rows of an Arrow array."""
    return column if valid is None else column.filter(pa.array(valid))


def filter_labels(
    values: list[LabelValue], codes: Codes, valid: npt.NDArray[np.bool_] | None
) -> tuple[list[LabelValue], Codes]:
    """The codes of the valid rows, and their distinct values in order of first appearance."""
    if valid is None:
        return values, codes
    codes = codes[valid]
    order = _first_appearance(codes)
    new_codes = np.full(len(values), -1, np.int32)
    new_codes[order] = np.arange(len(order), dtype=np.int32)
    return [values[code] for code in order], new_codes[codes]


def read_slices(column: Any) -> pa.Array:
    """(rows,) large_string of any column, for --slice_column: text as it is, other values as JSON,
    null where there is none.
    """
    if not isinstance(column, list):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind):
            return as_array(column.cast(kind).cast(pa.large_string()))
        column = column.to_pylist()
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, default=str)
        for value in column
    ]
    return pa.array(texts, pa.large_string())


def read_texts(
    column: Raw, name: str, location: LocateRow, problems: Problems | None = None
) -> pa.Array:
    """(rows,) large_string. Raises DataError at the first row whose text is missing or not text."""
    if isinstance(column, list):
        return _read_text_list(column, name, location, problems)
    if column.null_count:
        rows = np.flatnonzero(column.is_null()).tolist()
        reject(problems, rows, f"column {name!r} is null; expected a text", location)
        if pa.types.is_large_string(column.type):
            column = column.fill_null("")
    if not pa.types.is_large_string(column.type):
        raise DataError(f"{location(0)}: column {name!r} is of type {column.type}; expected text.")
    return column


def _read_text_list(
    column: list[Any], name: str, location: LocateRow, problems: Problems | None
) -> pa.Array:
    try:
        if set(map(type, column)) <= {str}:
            return text_array(column)
    except UnicodeEncodeError:
        pass
    texts = []
    for row, value in enumerate(column):
        is_text = type(value) is str and not _has_surrogate(value)
        if not is_text and (problems is None or row not in problems):
            content = "is null" if value is None else f"holds {excerpt_of(value, 40)}"
            content = "has a lone surrogate" if type(value) is str else content
            expected = "expected a text"
            if type(value) is dict and type(value.get("0")) is str:  # to_json's default
                expected += ". With pandas, write df.to_json(path, orient='records', lines=True)"
            reject(problems, [row], f"column {name!r} {content}; {expected}", location)
        texts.append(value if is_text else "")
    return text_array(texts)


def text_array(texts: Sequence[str]) -> pa.Array:
    """(texts,) large_string. Not by `pa.array`, which imports pandas: 0.3 s of a start."""
    parts = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    buffers = pa.py_buffer(ends), pa.py_buffer(b"".join(parts))
    return pa.LargeStringArray.from_buffers(len(parts), *buffers)


def read_labels(
    column: Raw,
    name: str,
    location: LocateRow,
    delimiter: str | None = None,
    class_names: tuple[str, ...] | None = None,
    problems: Problems | None = None,
    first_label: LabelValue | None = None,
    numbers_only: bool = False,
) -> tuple[LabelKind, list[LabelValue], Codes]:
    """The labels of one column: their kind, the distinct values, and (rows,) codes.

    Kind "set": every label is a tuple of names, from lists (also written into a cell of text) or by
    splitting at `delimiter`. class_names: names of labels that the source stores as numbers; -1
    means missing. first_label: if these rows follow others, the first label of those: all must be
    of its kind. numbers_only: with `problems`, a label that is no number is one. Raises DataError
    at the first row whose label is missing, of another kind than those above it, or not a label.
    """
    if isinstance(column, pa.Array) and str(column.type) == "extension<arrow.json>":
        raise DataError(f"{location(0)}: column {name!r} is of type {column.type}; expected text.")
    distinct, codes = _encode(column)
    used = _used_codes(codes, len(distinct), problems)
    values: list[Any] = [None] * len(distinct)
    wrong: dict[int, str] = {}
    first = first_label
    for code in used:
        raw = distinct[code]
        try:
            value = _label(raw, delimiter, class_names)
            first = value if first is None else first
            if isinstance(value, tuple) != isinstance(first, tuple):
                raise ValueError(
                    f"label {excerpt_of(raw)} is {_content(value)}, "
                    f"each of the labels above it is {_content(first)}"
                )
            is_name = isinstance(value, str) and not is_number(value)
            if numbers_only and problems is not None and is_name:
                raise ValueError(f"label {excerpt_of(value)} is not a number, as most are")
        except ValueError as error:
            _reject_value(problems, wrong, codes, code, f"{error} (column {name!r})", location)
        else:
            values[code] = value
    good = [code for code in used if code not in wrong]
    kind: LabelKind = "set" if isinstance(first, tuple) else "text"
    code_of: dict[LabelValue, int] = {}  # "a|b" and "a | b" are one
    merged = np.full(len(distinct), -1, np.int32)
    for code in good:
        merged[code] = code_of.setdefault(values[code], len(code_of))
    return kind, list(code_of), _mark_wrong(merged[codes], codes, wrong, problems)


def read_label_columns(
    columns: dict[str, Raw],
    location: LocateRow,
    problems: Problems | None = None,
    empty: Literal["undecided", "zero", "error"] = "undecided",
) -> tuple[list[LabelValue], Codes, frozenset[int | None]]:
    """The labels of several 0/1 columns: each is a tuple of the names of the columns with a 1.

    Also true and false, yes and no, or x and empty cells. empty: see `LabelRules`; undecided: as 0.
    Also returns which of 0, 1 and None (an empty cell) occur.
    """
    names = list(columns)
    bits = np.zeros((len(columns[names[0]]), len(names)), np.uint8)  # (rows, labels)
    encoded = {name: _encode(column) for name, column in columns.items()}
    found: set[int | None] = set()
    for index, (name, (distinct, codes)) in enumerate(encoded.items()):
        wrong: dict[int, str] = {}
        bit_of = [_bit(value) for value in distinct]
        for code in _used_codes(codes, len(distinct), problems):
            is_empty = bit_of[code] is None and _is_empty(distinct[code])
            expected = "1 or no value, as above" if empty == "zero" else "0 or 1"
            if (empty, bit_of[code]) == ("zero", 0) or (
                bit_of[code] is None and not (is_empty and empty != "error")
            ):
                shown = excerpt_of(distinct[code]) if distinct[code] is not None else "no value"
                reason = f"column {name!r} holds {shown}; expected {expected}"
                _reject_value(problems, wrong, codes, code, reason, location)
            else:
                found.add(bit_of[code])
        bits[:, index] = np.array([bit or 0 for bit in bit_of], np.uint8)[codes]
        _mark_wrong(codes, codes, wrong, problems)
    packed = np.packbits(bits, axis=1)
    _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    values: list[LabelValue] = [tuple(compress(names, bits[first[index]])) for index in order]
    return values, np.argsort(order).astype(np.int32)[inverse.reshape(-1)], frozenset(found)


def _bit(value: Any) -> int | None:
    """0, 1, or None for anything else."""
    return _BITS.get(str(value).strip().lower())


def _is_empty(cell: Any) -> bool:
    is_nan = isinstance(cell, float) and math.isnan(cell)
    return cell is None or is_nan or (isinstance(cell, str) and not cell.strip())


def _content(label: LabelValue) -> str:
    return "a list of labels" if isinstance(label, tuple) else "a single label"


def reject(problems: Problems | None, rows: list[int], reason: str, location: LocateRow) -> None:
    """Add a problem for each of these rows that has none; raise DataError if `problems` is None."""
    if problems is None:
        raise RowError(f"{location(rows[0])}: {reason}.")
    for row in rows:
        problems.setdefault(row, reason)


def _reject_value(
    problems: Problems | None,
    wrong: dict[int, str],
    codes: Codes,
    code: int,
    reason: str,
    location: LocateRow,
) -> None:
    """The same for all rows with distinct value `code`; `_mark_wrong` adds the problems."""
    if problems is None:
        raise RowError(f"{location(int(np.argmax(codes == code)))}: {reason}.") from None
    wrong[code] = reason


def _mark_wrong(
    marked: Codes, codes: Codes, wrong: dict[int, str], problems: Problems | None
) -> Codes:
    """`marked`, with -1 in rows that have a problem, those with a wrong value included."""
    if problems is None:
        return marked
    for row in np.flatnonzero(np.isin(codes, list(wrong))).tolist() if wrong else ():
        problems.setdefault(row, wrong[int(codes[row])])
    if problems:
        marked = marked.copy()
        marked[np.fromiter(problems, np.int64, len(problems))] = -1
    return marked


def _used_codes(codes: Codes, num_values: int, problems: Problems | None) -> list[int]:
    """Codes of the distinct values in rows without a problem, in order of first appearance."""
    if not problems:
        return list(range(num_values))
    return _first_appearance(codes[valid_rows(problems, len(codes))])


def _first_appearance(codes: Codes) -> list[int]:
    """The distinct codes in the order in which rows first have them."""
    used, first = np.unique(codes, return_index=True)
    order: list[int] = used[np.argsort(first)].tolist()
    return order


def _encode(column: Raw) -> tuple[list[Any], Codes]:
    """Distinct values in order of first appearance, None included, and (rows,) codes."""
    if (
        isinstance(column, pa.Array)
        and not pa.types.is_nested(column.type)
        and not pa.types.is_null(column.type)
    ):
        with suppress(pa.ArrowNotImplementedError):  # of extension types and short decimals
            encoded = column.dictionary_encode("encode")
            # to_numpy would import pandas
            return encoded.dictionary.to_pylist(), np.from_dlpack(encoded.indices).astype(np.int32)
    rows = column if isinstance(column, list) else column.to_pylist()
    keys = list(map(repr, rows))  # 1, 1.0, True and [1] differ, and lists are hashable
    seen: dict[str, Any] = {}
    for key, value in zip(keys, rows, strict=True):
        seen.setdefault(key, value)
    code_of = {key: code for code, key in enumerate(seen)}
    return list(seen.values()), np.fromiter(map(code_of.__getitem__, keys), np.int32, len(keys))


def _label(raw: Any, delimiter: str | None, class_names: tuple[str, ...] | None) -> LabelValue:
    """One raw value as a label. Raises ValueError with the reason if it is not one."""
    if raw is None or (isinstance(raw, str) and delimiter is None and not raw.strip()):
        raise ValueError("label is missing, expected one in every row")
    if class_names is not None:
        is_list = isinstance(raw, list)
        names = [_class_name(item, class_names) for item in (raw if is_list else [raw])]
        raw = names if is_list else names[0]
    if isinstance(raw, str) and (found := _list_in_cell(raw.strip())) is not None:
        raw = found
    elif delimiter is not None and not isinstance(raw, list):
        if not isinstance(raw, str):
            raise ValueError(
                f"label {excerpt_of(raw)} is not text, and --label_delimiter splits text"
            )
        raw = [part.strip() for part in raw.split(delimiter)] if raw.strip() else []
    return _label_set(raw) if isinstance(raw, list) else _name(raw)


def _name(raw: Any) -> str:
    """A label as text without blanks around it; numbers as Python writes them."""
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ValueError(f"label {raw} is not a finite number")
    if not isinstance(raw, int | float | str | Decimal):
        raise ValueError(
            f"label is a {type(raw).__name__}; expected text, a number or a list of labels"
        )
    if isinstance(raw, str) and _has_surrogate(raw):
        raise ValueError(f"label {excerpt(ascii(raw), 60)} has a lone surrogate")
    return f"{raw:f}" if isinstance(raw, Decimal) else str(raw).strip()  # not 0E-8


def _list_in_cell(cell: str) -> list[Any] | None:
    """The list that Python, JSON or numpy wrote into a cell of text; None: it is not one.

    Raises ValueError for a dict and a list of lists.
    """
    if call := _CALL.fullmatch(cell):
        cell = call[1] or "[]"
    if cell[:1] not in ("[", "(", "{"):
        return None
    if _LIST.fullmatch(cell):
        return [_item(item) for item in _ITEMS.findall(cell)]
    if _NESTED.fullmatch(cell):
        kind = "dict" if cell[0] == "{" else "list of lists"
        raise ValueError(
            f"label {excerpt_of(cell)} is a {kind}; expected text, a number or a list of labels"
        )
    return None


def _item(item: str) -> Any:
    if item[0] == '"':
        try:
            return json.loads(item, strict=False)
        except ValueError:  # as Python writes it: "it's\xa0x"
            pass
    if item[0] in "'\"":
        return _ESCAPE.sub(lambda x: x[0].encode().decode("unicode_escape"), item[1:-1])
    return item.lower() == "true" if item[0] in "tTfF" else canonical(item)


def _label_set(parts: list[Any]) -> tuple[str, ...]:
    names = []
    for part in parts:
        try:
            name = str(int(part)) if isinstance(part, bool) else _name(part)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(
                f"{excerpt(ascii(part), 60)} in the list of labels; expected the name of a label"
            )
        names.append(name if isinstance(part, str) else canonical(name))
    bits = [canonical(name) for name in names]
    if len(bits) > 1 and set(bits) <= {"0", "1"}:  # maybe one zero or one for each label
        return tuple(bits)
    if repeated := [name for name in names if names.count(name) > 1]:
        if has_fractions(bits) and all(map(is_number, bits)):  # probabilities
            shown = excerpt_of(parts, 40)
            raise ValueError(
                f"a list of numbers with fractions ({shown}); expected names of labels, or a 0 or "
                "1 for each label"
            )
        raise ValueError(f"label {excerpt_of(repeated[0])} occurs twice in one row")
    return tuple(names)


def _class_name(number: Any, class_names: tuple[str, ...]) -> str:
    if number is None or number == -1:
        raise ValueError("label is missing; some test splits on the Hub have no labels")
    if type(number) is not int or not 0 <= number < len(class_names):
        raise ValueError(f"label {number!r}; expected a number from 0 to {len(class_names) - 1}")
    return class_names[number]


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
