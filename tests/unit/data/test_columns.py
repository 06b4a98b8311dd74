"""Rows whose text or label is none can be left out: the same rows from the whole and from pieces, and the others exactly as they are."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertdist.core.config import FileConfig
from bertdist.core.errors import DataError
from bertdist.data.bad_rows import BadRow
from bertdist.data.columns import (
    Problems,
    as_array,
    filter_labels,
    filter_rows,
    read_label_columns,
    read_labels,
    read_texts,
    valid_rows,
)
from bertdist.data.readers.file_reader import FileReader, inspect_file
from bertdist.data.source import Chunk, bad_rows_of

where = "a.csv line {}".format


def test_texts_that_are_none_are_told_and_the_others_stay() -> None:
    column: list[Any] = ["a", None, "\ud800", 3, "b"]
    problems: Problems = {3: "known already"}
    texts = read_texts(column, "text", where, problems)
    assert problems == {
        1: "column 'text' is null; expected a text",
        2: "column 'text' has a lone surrogate; expected a text",
        3: "known already",
    }
    assert filter_rows(texts, valid_rows(problems, 5)).to_pylist() == ["a", "b"]
    with pytest.raises(
        DataError, match=r"^a\.csv line 1: column 'text' is null; expected a text\.$"
    ):  # the twin: without problems
        read_texts(column, "text", where)


def test_null_texts_of_arrow_are_told() -> None:
    problems: Problems = {}
    texts = read_texts(
        as_array(pa.chunked_array([["a", None], ["b", None]])), "text", where, problems
    )
    assert sorted(problems) == [1, 3] and filter_rows(
        texts, valid_rows(problems, 4)
    ).to_pylist() == [
        "a",
        "b",
    ]
    with pytest.raises(
        DataError, match="is of type int64; expected text"
    ):  # no row can be left out of that
        read_texts(as_array(pa.chunked_array([[1, 2]])), "text", where, {})


@pytest.mark.parametrize(
    ("column", "before", "kind", "labels", "wrong"),
    [
        (["x", "", "y", " ", "x"], {}, "text", ["x", "y", "x"], [1, 3]),
        ([1, "1", 2, None], {}, "text", ["1", "1", "2"], [3]),
        (
            [1, "1", "2", None],
            {0: "bad text"},
            "text",
            ["1", "2"],
            [0, 3],
        ),  # what is left out decides nothing
        ([0.5, float("nan"), 1, 2**60], {}, "text", ["0.5", "1", str(2**60)], [1]),
        ([["a"], ["a", "a"], [], "a"], {}, "set", [("a",), ()], [1, 3]),
        ([None, None], {}, "text", [], [0, 1]),
        (["z", "x", "z"], {0: "bad text"}, "text", ["x", "z"], [0]),
    ],
)
def test_labels_that_are_none_are_told(
    column: list[Any], before: Problems, kind: str, labels: list[Any], wrong: list[int]
) -> None:
    for given in (
        column,
        pa.array(column)
        if len({type(value) for value in column if value is not None}) == 1
        else column,
    ):
        problems = dict(before)
        found, values, codes = read_labels(given, "label", where, problems=problems)
        values, codes = filter_labels(values, codes, valid_rows(problems, len(column)))
        assert (found, [values[code] for code in codes], sorted(problems)) == (kind, labels, wrong)
        assert values == list(dict.fromkeys(labels))  # in the order of the rows that stay


def test_a_label_above_says_what_kind_it_must_be() -> None:
    problems: Problems = {}
    read_labels(["x", ["x"]], "label", where, problems=problems, first_label="7")
    assert list(problems) == [1]
    with pytest.raises(
        DataError,
        match="label 'x' is a single label, each of the labels above it is a list of labels",
    ):
        read_labels(["x"], "label", where, first_label=("x",))


@pytest.mark.parametrize(
    ("labels", "above", "expected"),
    [
        ([1, "03", ["1"], " x"], "7", ["1", "03", "x"]),
        ([True, "no", 1], "x", ["true", "no", "1"]),
        ([["a"], "a", [1]], ("b",), [("a",), ("1",)]),
    ],
    ids=["numbers", "truth", "sets"],
)
def test_what_stays_below_a_label_is_of_its_kind(
    labels: list[Any], above: Any, expected: list[Any]
) -> None:
    problems: Problems = {}
    _, values, codes = read_labels(labels, "label", where, problems=problems, first_label=above)
    kept = valid_rows(problems, len(labels))
    values, codes = filter_labels(values, codes, kept)
    assert [values[code] for code in codes] == expected
    assert len(problems) == len(labels) - len(expected)
    if problems:  # the control
        with pytest.raises(DataError):
            read_labels(labels, "label", where, first_label=above)


def test_label_columns_tell_their_rows() -> None:
    problems: Problems = {0: "bad text"}
    values, codes, _ = read_label_columns(
        {"x": ["?", "1", "2", "0"], "y": ["1", "1", "1", ""]}, where, problems, "error"
    )
    values, codes = filter_labels(values, codes, valid_rows(problems, 4))
    assert (sorted(problems), [values[code] for code in codes]) == ([0, 2, 3], [("x", "y")])
    assert problems[2] == "column 'x' holds '2'; expected 0 or 1"
    with pytest.raises(DataError, match=r"line 0: column 'x' holds '\?'"):
        read_label_columns({"x": ["?"]}, where)


def test_without_problems_nothing_changes() -> None:
    column = ["b", "a", "b"]
    plain = read_labels(column, "label", where)
    asked = read_labels(column, "label", where, problems={})
    assert plain[:2] == asked[:2] and np.array_equal(plain[2], asked[2])
    assert valid_rows({}, 3) is None and filter_labels(plain[1], plain[2], None) == plain[1:]


def read(piece: Chunk, above: Any) -> tuple[list[tuple[str, Any]], list[BadRow], Any]:
    """What a reader that leaves rows out does with a piece: (text, label) of the rows that stay, and all that were left out."""
    problems: Problems = {}
    columns = {name: as_array(column) for name, column in piece.columns.items()}
    texts = read_texts(columns["text"], "text", piece.location, problems)
    _, values, codes = read_labels(
        columns["label"], "label", piece.location, problems=problems, first_label=above
    )
    kept = valid_rows(problems, piece.num_rows)
    texts, (values, codes) = filter_rows(texts, kept), filter_labels(values, codes, kept)
    labels = [values[code] for code in codes]
    return (
        list(zip(texts.to_pylist(), labels, strict=True)),
        [*piece.bad_rows, *bad_rows_of(piece, problems)],
        labels[:1],
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_same_rows_are_left_out_of_pieces_and_of_the_whole(tmp_path: Path, kind: str) -> None:
    chance, path = random.Random(3), tmp_path / f"a.{kind}"
    texts = [chance.choice([f"text {row}", f'"quoted\n{row}"', "é"]) for row in range(200)]
    labels: list[Any] = [chance.choice(["x", "y", "z"]) for _ in texts]
    good = [chance.random() > 0.2 for _ in texts]
    good[0] = True
    if kind == "csv":
        wrong = [",", "a", "a,b,c", '"a" b,x', '"a\nb', "\ud800,x", "a, "]
        lines = [
            '"' + text.replace('"', '""') + f'",{label}'
            for text, label in zip(texts, labels, strict=True)
        ]
        content = "text,label\n" + "".join(
            (line if fine else chance.choice(wrong)) + "\n"
            for line, fine in zip(lines, good, strict=True)
        )
        path.write_bytes(content.encode(errors="surrogatepass"))
    elif kind == "jsonl":
        wrong = [
            "{",
            "7",
            '{"text": "a"}',
            '{"text": null, "label": "x"}',
            '{"text": "a", "label": ["x"]}',
            '{"text": "\\ud800", "label": "x"}',
        ]
        lines = [
            json.dumps({"text": text, "label": label})
            for text, label in zip(texts, labels, strict=True)
        ]
        path.write_text(
            "".join(
                (line if fine else chance.choice(wrong)) + "\n"
                for line, fine in zip(lines, good, strict=True)
            )
        )
    else:
        columns = {
            name: [v if fine else None for v, fine in zip(c, good, strict=True)]
            for name, c in (("text", texts), ("label", labels))
        }
        pq.write_table(pa.table(columns), path, row_group_size=70)
    file = inspect_file(str(path), FileConfig())
    rows, bad, _ = read(FileReader(file, on_bad_row="skip").read(["text", "label"]), None)
    if (
        kind == "csv"
    ):  # an open quote takes nothing but its own line with it; what "b" begins is told as a row of its own
        assert (
            set(zip(texts, labels, strict=True)) >= set(rows)
            and [row for row in rows if row[1] in "xyz"] == rows
        )
    assert rows == [
        pair
        for *pair, fine in zip(texts, labels, good, strict=True)
        for pair in [tuple(pair)]
        if fine
    ]
    assert len(bad) >= good.count(False) > 20 and len({row[:2] for row in bad}) == len(bad)
    for size in (64, 1000):
        found: list[Any] = []
        left: list[BadRow] = []
        first: Any = []
        for piece in FileReader(file, on_bad_row="skip", chunk_bytes=size).chunks(
            ["text", "label"]
        ):
            some, some_bad, labels_of = read(piece, first[0] if first else None)
            found, left, first = found + some, left + some_bad, first or labels_of
        assert found == rows
        assert sorted(left, key=lambda row: row.line or 0) == sorted(
            bad, key=lambda row: row.line or 0
        )
    assert all(row.file == file.name and row.line is not None for row in bad)
    if kind == "parquet":
        assert [row.line for row in bad] == [row for row, fine in enumerate(good) if not fine]
        assert bad[0].text == '{"text": null, "label": null}'


def test_a_million_rows_with_a_thousand_bad_ones_need_no_look_at_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No timing: every check runs over distinct values, so that what is called per row is called for bad rows only.
    from bertdist.data import columns

    calls = [0]
    plain = columns._label

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return plain(*args)

    monkeypatch.setattr(columns, "_label", counted)
    labels = pa.array(["x", "y"] * 5_000 + [""] * 100)
    problems: Problems = {}
    _, values, codes = read_labels(labels, "label", where, problems=problems)
    assert (
        len(problems) == 100
        and calls[0] == 3
        and values == ["x", "y"]
        and np.bincount(codes[:-100]).tolist() == [5_000] * 2
    )
