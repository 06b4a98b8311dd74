"""One row a line, whatever stands in it: objects, and lines of text."""

from dataclasses import replace
from typing import Any

import pytest

from bertdist.core.errors import DataError
from bertdist.data.readers.jsonl_reader import (
    document_items,
    document_keys,
    parse_document,
    parse_json,
    parse_txt,
    read_keys,
)
from bertdist.data.readers.text_lines import FileFormat, Lines

JSON = FileFormat(name="a.jsonl", kind="jsonl")
LINES = Lines(
    '\n{"a": 1, "b": "\u2028"}\nno\n{"a": 2}\n{"b": 3, "a": null}\n{"a": 4, "b": 4}'.encode(),
    5,
    {5: "byte 0xFF is not utf-8"},
)


def test_lines_that_are_not_rows_are_skipped_and_reported() -> None:
    found = parse_json(JSON, LINES, ["a", "b"], skip=True)
    assert found.columns == {"a": [1, None], "b": ["\u2028", 3]} and found.num_rows == 2
    assert [
        (row.line, row.reason.split(":")[0].split(".")[0], row.text) for row in found.bad_rows
    ] == [
        (7, "not JSON", "no"),
        (8, "the key 'b' is missing", '{"a": 2}'),
        (10, "byte 0xFF is not utf-8", '{"a": 4, "b": 4}'),
    ]
    rows = found.row_spans()
    assert (
        rows.lines.tolist() == [1, 4]
        and LINES.data[rows.starts[1] : rows.ends[1]] == b'{"b": 3, "a": null}\n'
    )
    with pytest.raises(DataError, match=r"^a\.jsonl line 7: not JSON: "):
        parse_json(JSON, LINES, ["a"], skip=False)


def test_no_more_rows_are_read_than_requested() -> None:
    found = parse_json(JSON, LINES, ["a"], skip=False, num_rows=1)
    assert found.columns == {"a": [1]} and found.bad_rows == []


def test_keys_are_those_of_the_first_object() -> None:
    assert read_keys(JSON, LINES, True, False) == ["a", "b"]
    assert (
        read_keys(JSON, Lines(b"no\n{'a'\n", 1, {}), False, True) is None
    )  # it may stand further down
    assert read_keys(JSON, Lines(b"\n", 1, {}), True, False) == []
    with pytest.raises(DataError, match="expected a JSON object with keys, found"):
        read_keys(JSON, Lines(b" \n[1]\n", 1, {}), True, False)


def test_keys_that_most_of_the_first_objects_have_are_columns_too() -> None:
    """A key that the first row lacks is a column, and that row is wrong; a rare key is not."""
    rows = b'{"t": 1}\n{"t": 1, "l": {"x": 2}}\n{"t": 1, "l": {"x": 3}, "rare": 0}\n{"t": 1}\n'
    names = read_keys(JSON, Lines(rows + b'{"l": {"x": 4}}\nno\n', 1, {}), True, False)
    assert names == ["t", "l", "l.x"]
    found = parse_json(JSON, Lines(rows, 1, {}), ["t", "l.x"], skip=True)
    assert found.columns == {"t": [1, 1], "l.x": [2, 3]}
    assert [row.line for row in found.bad_rows] == [1, 4]


def test_a_key_that_occurs_twice_matters_where_it_is_read() -> None:
    lines = Lines(b'{"t": "a", "id": 1, "id": 2, "m": {"x": 1, "x": 1}}\n', 1, {})
    assert parse_json(JSON, lines, ["t"], skip=False).columns == {"t": ["a"]}
    for name in ("id", "m.x"):
        with pytest.raises(DataError, match=rf"^a\.jsonl line 1: the key '{name}' occurs twice"):
            parse_json(JSON, lines, [name], skip=False)


DOCUMENT = FileFormat(name="a.json", kind="json")
OBJECTS = '{"t": "é", "m": {"x": [1]}}, {"t": "]}", "m": {"x": []}}'


@pytest.mark.parametrize(
    "text",
    [
        f"[{OBJECTS}]",
        f"[\n{OBJECTS.replace('}, ', '},' + chr(10))}\n]\n",
        f'{{"version": "1", "data": [{OBJECTS}], "tags": ["a"], "empty": []}}',
        f'{{"a": {{"n": 1, "rows": [{OBJECTS}]}}}}',
        OBJECTS.replace("}, ", "}\n\n "),
    ],
)
def test_a_json_document_has_one_list_of_rows(text: str) -> None:
    items, _ = document_items(DOCUMENT, text)
    assert document_keys(DOCUMENT, items, False) == ["t", "m", "m.x"]
    found = parse_document(DOCUMENT, items, ["t", "m.x"], skip=False)
    assert found.columns == {"t": ["é", "]}"], "m.x": [[1], []]}
    assert [str(found.location(row)) for row in (0, 1)] == ["a.json row 0", "a.json row 1"]
    assert found.excerpts([1, 0]) == ['{"t": "]}", "m.x": []}', '{"t": "é", "m.x": [1]}']


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ('{"train": [{"t": 1}], "dev": [{"t": 2}, {"t": 3}]}', None, "has several lists of rows"),
        ('{"train": [{"t": 1}]}', "trian", "is no list. Did you mean 'train'"),
        ('{"t": {"0": "a"}}', None, "expected a list of objects, or one object per line"),
        ('[{"t": 1}', None, "a.json line 1: not JSON: Expecting ',' delimiter"),
        ('[{"t": 1},\n{"t" 1}]', None, "a.json line 2: not JSON: "),
        ('[{"t": 1},]', None, "a.json line 1: not JSON: "),
        ('[{"t": 1},', None, "a.json line 1: not JSON: "),
        ('{"data": [{"t": 1}', None, "a.json line 1: not JSON: "),
        ('{"data"', None, "a.json line 1: not JSON: Expecting ':' delimiter"),
        ("[" * 100_000, None, "a.json: not JSON: "),
        ('{"a":' * 100_000, None, "a.json: not JSON: "),
        ('[{"t": NaN}]', None, "a.json: not JSON: NaN is not a JSON number"),
        ('[{"t": 1}, 7]', None, "a.json row 1: expected a JSON object with keys, found 7"),
        ('[{"t": 1}, {"u": 1}]', None, "a.json row 1: the key 't' is missing"),
    ],
)
def test_a_json_document_that_is_not_rows_is_refused(
    text: str, field: str | None, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        fmt = replace(DOCUMENT, json_field=field)
        parse_document(fmt, document_items(fmt, text)[0], ["t"], skip=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field", "texts", "which"),
    [
        ('{"text": "a", "spans": [{"text": "b"}]}', None, ["a"], "one row, the object itself; --json_field spans reads a list in it"),
        ('{\n"id": 1,\n"text": "a"\n}', None, ["a"], "one row, the object itself"),
        ('{"text": "a", "spans": [{"text": "b"}]}', "spans", ["b"], ""),
        ('{"note": "a", "spans": [{"text": "b"}]}', None, ["b"], "the rows are its list 'spans'"),
        ('[{"text": "a", "spans": [{"text": "b"}]}]', None, ["a"], ""),
    ],
)  # fmt: skip
def test_an_object_with_a_text_is_the_row_and_not_the_lists_in_it(
    text: str, field: str | None, texts: list[str], which: str
) -> None:
    items, said = document_items(replace(DOCUMENT, json_field=field), text)
    assert ([item["text"] for item in items], said) == (texts, which)


def test_a_list_is_chosen_and_its_bad_items_are_skipped() -> None:
    text = '{"train": [{"t": 1}], "dev": [{"t": 2}, 7, {"t": 3}]}'
    fmt = replace(DOCUMENT, json_field="dev")
    found = parse_document(fmt, document_items(fmt, text)[0], ["t"], skip=True)
    assert found.columns == {"t": [2, 3]} and str(found.location(1)) == "a.json row 2"
    assert [(row.location, row.text) for row in found.bad_rows] == [("a.json row 1", "7")]


def test_every_line_of_a_txt_is_a_row() -> None:
    for text, expected in [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\n\n", ["a", ""]),
        ("\r\nb\rc\r\n", ["", "b\rc"]),
    ]:
        found = parse_txt(JSON, Lines(text.encode(), 1, {}), ["text"])
        assert (
            found.columns["text"].to_pylist() == expected
            and len(found.row_spans().lines) == found.num_rows
        )  # type: ignore[union-attr]
    found = parse_txt(JSON, Lines(b"a\nb\nc\n", 3, {1: "broken"}), ["text"])
    assert found.columns["text"].to_pylist() == ["a", "c"] and [
        (row.line, row.text) for row in found.bad_rows
    ] == [(4, "b")]  # type: ignore[union-attr]
    assert found.row_spans().lines.tolist() == [0, 2]


def test_rows_of_a_document_may_be_lists_whose_items_are_named() -> None:
    """As CLINC150 and pandas (orient='split') write them."""
    text = '{"columns": ["t", "l"], "data": [["a", 1], ["b"], ["c", 2]]}'
    fmt = replace(DOCUMENT, column_names=("t", "_", "l"))
    items, _ = document_items(fmt, text.replace("[[", "[[7, 8, 9], ["))
    found = parse_document(replace(fmt, column_names=("t", "l")), items, ["t", "l"], skip=True)
    assert found.columns == {"t": ["a", "c"], "l": [1, 2]}
    assert [(row.location, row.text) for row in found.bad_rows] == [
        ("a.json row 0", "[7, 8, 9]"),
        ("a.json row 2", '["b"]'),
    ]
    with pytest.raises(DataError, match=r"row 0: a list of 2 items, expected 3 as in --column_n"):
        parse_document(fmt, items[1:], ["t", "l"], skip=False)
    with pytest.raises(DataError, match=r"found \[7, 8, 9\]; --column_names names the items of"):
        parse_document(DOCUMENT, items, ["t"], skip=False)


def test_columns_and_data_of_pandas_are_rows() -> None:
    """df.to_json(orient="split")"""
    text = '{"columns": ["t", "l"], "index": [0, 1, 2], "data": [["a", 1], ["b"], ["c", 2]]}'
    items, _ = document_items(DOCUMENT, text)
    assert document_keys(DOCUMENT, items, False) == ["t", "l"]
    found = parse_document(DOCUMENT, items, ["l", "t"], skip=True)
    assert found.columns == {"l": [1, 2], "t": ["a", "c"]}
    assert [row.location for row in found.bad_rows] == ["a.json row 1"]
    for other in (text.replace("columns", "names"), text.replace('"l"', "3")):
        with pytest.raises(DataError, match="expected a list of objects"):
            document_items(DOCUMENT, other)


def test_two_lists_under_one_key_are_refused() -> None:
    for text in ('{"a": [{"t": 1}], "a": [{"t": 2}]}', '{"a.b": [], "a": {"b": [{"t": 2}]}}'):
        with pytest.raises(DataError, match=r"^a\.json: not JSON: the key '.*' occurs twice"):
            document_items(DOCUMENT, text)


def test_a_deeply_nested_item_is_one_line() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(DataError, match="row 0: expected a JSON object with keys, found a nested"):
        parse_document(DOCUMENT, [nested], ["t"], skip=False)
