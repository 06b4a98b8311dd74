"""Several records as one: rows, places and labels stay what they were."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from bertdist.core.errors import DataError
from bertdist.data.records import Records, join, records_of


def labelled(name: str, labels: list[Any], kind: str, pairs: list[str] | None = None) -> Records:
    values = list(dict.fromkeys(labels))
    plain = records_of([f"{name} {i}" for i in range(len(labels))], pairs)
    codes = np.array([values.index(label) for label in labels], np.int32)
    return dataclasses.replace(
        plain, label_kind=kind, label_values=values, label_codes=codes, label_column="label"
    )


def test_rows_places_and_labels_stay_what_they_were() -> None:
    one, other = labelled("a", ["x", "y", "x"], "text"), labelled("b", ["y", "z"], "text")
    whole = join([one, other.some(1, 2), one.some(1, 3)], "both")
    assert [
        (record.text, record.label) for record in map(whole.__getitem__, range(len(whole)))
    ] == [
        ("a 0", "x"),
        ("a 1", "y"),
        ("a 2", "x"),
        ("b 1", "z"),
        ("a 1", "y"),
        ("a 2", "x"),
    ]
    assert [whole.where(row) for row in range(6)] == [
        f"texts row {row}" for row in (0, 1, 2, 1, 1, 2)
    ]
    assert (
        whole.name == "both" and whole.lengths().tolist() == [3] * 6 and join([one], "one") is one
    )
    assert whole.some(3, 5)[0].text == "b 1" and whole.some(3, 5).where(1) == "texts row 1"


@pytest.mark.parametrize(
    ("kinds", "labels", "expected"),
    [
        (("integer", "number"), ([1, 2], [0.5, 1.0]), ("number", [1.0, 2.0, 0.5, 1.0])),
        (("text", "integer"), (["1", "0"], [0, 1]), ("text", ["1", "0", "0", "1"])),
        (("integer", "integer"), ([3, 4], [4, 5]), ("integer", [3, 4, 4, 5])),
        (("set", "set"), ([("a",), ()], [("a", "b"), ()]), ("set", [("a",), (), ("a", "b"), ()])),
    ],
)
def test_kinds_that_have_one_in_common(kinds: Any, labels: Any, expected: Any) -> None:
    whole = join([labelled("a", labels[0], kinds[0]), labelled("b", labels[1], kinds[1])], "both")
    found = [whole[row].label for row in range(4)]
    assert (whole.label_kind, found) == expected and [type(label) for label in found] == [
        type(label) for label in expected[1]
    ]


def test_kinds_that_have_none_in_common() -> None:
    told = "texts row 0: the labels are of kind 'integer', those before of kind 'text'; expected one kind in all rows."
    with pytest.raises(DataError, match=told):
        join([labelled("a", ["x"], "text"), labelled("b", [1], "integer")], "both")
    with pytest.raises(DataError, match="one has pairs"):
        join([labelled("a", ["x"], "text"), labelled("b", ["x"], "text", ["pair"])], "both")


def test_the_fingerprint_is_that_of_all() -> None:
    one, other = (
        labelled("a", ["x"], "text"),
        dataclasses.replace(labelled("b", ["x"], "text"), fingerprint="b"),
    )
    assert (
        len({join(parts, "n").fingerprint for parts in ([one, other], [other, one], [one, one])})
        == 3
    )
