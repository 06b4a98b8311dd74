"""Labels of every file format come to one text: numbers, truth values, lists written into a cell, columns of marks."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertdist.core.config import DataConfig, TaskConfig
from bertdist.core.errors import DataError
from bertdist.data.columns import Problems, read_label_columns, read_labels
from bertdist.data.load_data import load_records, open_stream
from bertdist.data.records import Records
from bertdist.tasks.tasks import create_task

where = "a.csv line {}".format


def write(folder: Path, kind: str, labels: list[Any]) -> Records:
    """The rows of a file of one kind with these labels."""
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"text": "t", "label": label}) + "\n" for label in labels]
        path.write_text("".join(lines))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": ["t"] * len(labels), "label": labels}), path)
    else:
        path.write_text("text,label\n" + "".join(f't,"{label}"\n' for label in labels))
    return load_records(DataConfig(train_file=[str(path)]), "train")


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("csv", [" 1", "0 ", "1.0"]),
        ("jsonl", [1, "0", 1.0]),
        ("jsonl", ["1", 0, "1.0 "]),
        ("parquet", [1.0, 0.0, 1.0]),
        ("parquet", [Decimal("1.00"), Decimal("0.00"), Decimal("1.00")]),
        ("parquet", [Decimal("1.00000000"), Decimal("0E-8"), Decimal("1.00000000")]),
        ("csv", ["TRUE", "false", "True"]),
        ("jsonl", [True, False, "true"]),
        ("parquet", [True, False, True]),
    ],
)
def test_a_label_is_the_same_in_every_format(tmp_path: Path, kind: str, labels: list[Any]) -> None:
    rows = write(tmp_path, kind, labels)
    task = create_task(TaskConfig(), rows.label_stats(), None)
    assert rows.label_indices is not None and len(task.labels) == 2
    targets = [task.encode_label(rows.label_values[code]) for code in rows.label_indices]
    assert targets == [1, 0, 1]
    word = "t" in task.labels[1].lower()
    for other in ("true", "TRUE") if word else ("1", "1.0", "1."):
        assert task.encode_label(other) == 1
    with pytest.raises(DataError, match="unknown label"):  # the control
        task.encode_label("1" if word else "true")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['joy', 'love']", ("joy", "love")),
        ('["joy", "caf\\u00e9"]', ("joy", "caf\u00e9")),
        ("(0, 1)", ("0", "1")),
        ("(1,)", ("1",)),
        ("{0, 2}", ("0", "2")),
        ("()", ()),
        ("set()", ()),
        ("frozenset({'joy'})", ("joy",)),
        ("array(['joy', 'a)'], dtype=object)", ("joy", "a)")),
        ("list(['joy'])", ("joy",)),
        ("[1e-05, .5]", ("1e-05", ".5")),
        ("list(joy)", "list(joy)"),
        ("(joy, love)", "(joy, love)"),
        ("[[joy]]", "[[joy]]"),
        ("{joy: 1}", "{joy: 1}"),
        ("['joy' 'love']", ("joy", "love")),  # as numpy prints it: two labels, not 'joylove'
        ("[\"it's\", 'a \\'b\\'']", ("it's", "a 'b'")),
        ("('joy',)", ("joy",)),
        ("{'joy', 'love'}", ("joy", "love")),
        ("[2, 5]", ("2", "5")),
        ("[2. 5.]", ("2", "5")),
        (" [] ", ()),
        ("[0, 1, 0]", ("0", "1", "0")),
        ("[True, False]", ("1", "0")),
        ("[spam]", "[spam]"),
        ("(1)", "(1)"),
        ("{a}", "{a}"),
        ("['a', b]", "['a', b]"),
        ("['a'", "['a'"),
        ("joy, love", "joy, love"),
    ],
)
def test_a_list_written_into_a_cell_is_read(cell: str, expected: Any) -> None:
    assert read_labels([cell], "label", where)[1] == [expected]
    if isinstance(expected, tuple):  # a delimiter does not split the brackets
        assert read_labels([cell], "label", where, ",")[1] == [expected]


@pytest.mark.parametrize(
    "label",
    ["a\nb", "\U0001f468\u200d\U0001f469", "x\xa0y", "it's\xa0x", "'\"\x00\\", "a\\d", "a\\\\nb"],
)
def test_escapes_are_read_as_python_writes_them(label: str) -> None:
    assert read_labels([repr([label])], "label", where)[1] == [(label,)]
    assert read_labels([json.dumps([label])], "label", where)[1] == [(label,)]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        ("{'joy': 1, 'sad': 0}", "dict"),
        ('{"joy": 1}', "dict"),
        ("[[1, 0]]", "list of lists"),
        ("[('a', 'b'), ('c',)]", "list of lists"),
    ],
)
def test_what_is_no_list_of_labels_is_an_error(cell: str, kind: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.csv line 1: label .* is a {kind}; expected text, a"):
        read_labels(["['a']", cell], "label", where)


def test_a_list_stays_a_list_beside_a_delimiter() -> None:
    labels = [["joy", "a|b"], "joy|sad", "", ["sad"]]
    expected = [("joy", "a|b"), ("joy", "sad"), (), ("sad",)]
    assert read_labels(labels, "label", where, "|")[1] == expected
    with pytest.raises(DataError, match=r"label 'joy\|sad' is a single label"):  # the control
        read_labels(labels, "label", where)


@pytest.mark.parametrize(
    ("flag", "label"), [("tab", "a\tb"), ("\\t", "a\tb"), ("space", "a b"), ("ab", "aabb")]
)
def test_names_of_delimiters(flag: str, label: str) -> None:
    delimiter = DataConfig(label_delimiter=flag).label_delimiter
    assert read_labels([label], "label", where, delimiter)[1] == [("a", "b")]


def test_probabilities_that_are_equal_are_no_repeated_label() -> None:
    with pytest.raises(DataError, match=r"a list of numbers with fractions \(\['0.5', '0.5'\]\)"):
        read_labels(["[0.1, 0.9]", "[0.5, 0.5]"], "label", where)


def test_the_label_that_a_list_repeats_is_told() -> None:
    with pytest.raises(DataError, match=r"^a\.csv line 1: label 'a' occurs twice in one row"):
        read_labels(["['b']", "['a', 'a']"], "label", where)
    with pytest.raises(DataError, match="label 'b' is a single label, each of the labels above it"):
        read_labels(["['b']", "b"], "label", where)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "0"], [1, 0]),
        (["1.0", "0.0"], [1, 0]),
        ([1.0, 0], [1, 0]),
        (["TRUE", "False"], [1, 0]),
        ([True, False], [1, 0]),
        (["Yes", "no "], [1, 0]),
        (["x", ""], [1, 0]),
        (["X", None], [1, 0]),
        ([1, float("nan")], [1, 0]),
    ],
)
def test_marks_of_label_columns(cells: list[Any], expected: list[int]) -> None:
    values, codes, _ = read_label_columns({"a": cells, "b": cells[:1] * 2}, where)
    assert [int("a" in values[code]) for code in codes] == expected


def test_an_empty_cell_beside_zeros_is_missing() -> None:
    with pytest.raises(DataError, match=r"^a\.csv line 1: column 'a' holds ''; expected 0 or 1"):
        read_label_columns({"a": ["1", ""], "b": ["0", "1"]}, where, empty="error")
    with pytest.raises(DataError, match="column 'a' holds no value; expected 0 or 1"):
        read_label_columns({"a": ["1", None], "b": ["no", "1"]}, where, empty="error")
    with pytest.raises(DataError, match="column 'a' holds 'no'; expected 1 or no value"):
        read_label_columns({"a": ["1", "no"]}, where, empty="zero")
    assert read_label_columns({"a": ["1", ""], "b": ["0", "1"]}, where)[2] == {0, 1, None}


def test_a_few_labels_among_numbers_can_be_skipped(tmp_path: Path) -> None:
    column = [str(i / 2) for i in range(30)] + ["n/a"]
    problems: Problems = {}
    read_labels(column, "label", where, problems=problems, numbers_only=True)
    assert problems == {30: "label 'n/a' is not a number, as most are (column 'label')"}
    kept: Problems = {}
    read_labels(column, "label", where, problems=kept)
    assert not kept
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t,{label}\n" for label in column))
    data = DataConfig(train_file=[str(path)], on_bad_row="skip")
    (window,) = open_stream(data, 0, numbers_only=True).windows()
    for rows in (load_records(data, "train"), window.records):
        assert len(rows) == 30
    assert [row.line for row in window.bad_rows] == [32]
    with pytest.raises(DataError, match="line 32: label 'n/a' is not a number"):  # the control
        whole = load_records(DataConfig(train_file=[str(path)]), "train")
        create_task(TaskConfig(), whole.label_stats(), None)


def test_the_first_rows_of_a_sorted_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "t,a\n" * 3 + "t,b\n" * 3)
    for limit, told in ((2, "--max_train_samples takes the first 2 rows"), (4, "")):
        data = DataConfig(train_file=[str(path)], max_train_samples=limit)
        stats = load_records(data, "train").label_stats()
        if told:
            with pytest.raises(DataError, match=told):
                create_task(TaskConfig(), stats, None)
        else:
            assert create_task(TaskConfig(), stats, None).labels == ("a", "b")
    path.write_text("text,label\n" + "t,a\n" * 3)
    with pytest.raises(DataError, match=r"expected at least two\.$"):  # nothing was left out
        create_task(
            TaskConfig(),
            load_records(DataConfig(train_file=[str(path)]), "train").label_stats(),
            None,
        )


def test_arrow_types_without_a_dictionary_are_labels(tmp_path: Path) -> None:
    bits = pa.array([1, 0], pa.int8())
    bool8 = pa.ExtensionArray.from_storage(pa.bool8(), bits)
    pq.write_table(pa.table({"text": ["a", "b"], "label": bool8}), tmp_path / "a.parquet")
    data = DataConfig(train_file=[str(tmp_path / "a.parquet")])
    for records in (load_records(data, "train"), open_stream(data, 0).head()):
        assert records.label_values == ["true", "false"]  # as of a column of bool
    assert read_labels(bits, "label", where)[1] == ["1", "0"]
    short = pa.array([Decimal("1.50"), Decimal("0.25")], pa.decimal32(5, 2))
    assert read_labels(short, "label", where)[1] == ["1.50", "0.25"]
    json_texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"a"']))
    with pytest.raises(DataError, match=r"column 'label' is of type extension<arrow\.json>"):
        read_labels(json_texts, "label", where)
