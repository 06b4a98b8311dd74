"""What a column of labels means: one table of columns and of what is taken, and the spellings that are one label."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError, DataError
from bertdist.tasks.labels import (
    MOST_CLASSES_WITH_POINT,
    LabelIndex,
    LabelStats,
    LabelValue,
    canonical,
    describe_alike,
    describe_near_miss,
    find_joined,
    infer_problem_type,
    is_multi_hot,
    is_number,
    label_names,
    match_labels,
    match_to_model,
    non_numeric_labels,
)
from bertdist.tasks.tasks import MultiLabel, create_task, task_of_model

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def inferred(labels: Sequence[Any], **settings: Any) -> str:
    return infer_problem_type("auto", Counter(labels), **settings).problem_type


# ---- Numbers and their spellings


@pytest.mark.parametrize("label", ["0", "007", "+1", "-2.50", "1.", ".5", "1e3", "2E-4"])
def test_numbers(label: str) -> None:
    assert is_number(label)


@pytest.mark.parametrize(
    "label", ["1_000", "inf", "nan", "Infinity", "١٢", "²", "1,5", "1 ", "0x1", "", ".", "1e999"]
)
def test_what_only_python_reads_as_a_number_is_a_name(label: str) -> None:
    assert not is_number(label)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("1", "1"),
        ("1.0", "1"),
        ("1.", "1"),
        ("-3.00", "-3"),
        ("-0.0", "0"),
        ("True", "true"),
        ("FALSE", "false"),
        ("0.5", "0.5"),
        ("01", "01"),
        ("01.0", "01.0"),
        ("+1", "+1"),
        ("Yes", "Yes"),
        ("9" * 5_000 + ".0", "9" * 5_000 + ".0"),
    ],
)
def test_one_spelling_for_what_is_the_same_label(label: str, expected: str) -> None:
    assert canonical(label) == expected


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1.0", "0.0"], ["1", "0"]),
        (["1", "1.0", "0"], ["1", "1", "0"]),
        (["True", "False"], ["True", "False"]),  # one spelling each: as it is
        (["True", "true", "False"], ["true", "true", "False"]),
        (["1.0", "1.1-beta"], ["1.0", "1.1-beta"]),  # versions: not all are numbers
        (["x", "1", "1.0"], ["x", "1", "1"]),
    ],
)
def test_the_names_of_classes(labels: list[str], names: list[str]) -> None:
    assert label_names(labels) == dict(zip(labels, names, strict=True))


def test_a_label_is_found_by_its_spelling_before_its_canonical_one() -> None:
    index = LabelIndex(["1.0", "1", "True"])
    found = [index.find(label) for label in ("1.0", "1", "1.00", "true", "TRUE", "yes", "01")]
    assert found == [0, 1, found[2], 2, 2, None, None] and found[2] in (0, 1)


# ---- The table of the guide


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "0", "1"], SINGLE),
        (["1.0", "0.0", "1"], SINGLE),
        (["0.5", "1"], REGRESSION),
        (["1e3", "2"], REGRESSION),
        ([f"{i}.0" for i in range(MOST_CLASSES_WITH_POINT)], SINGLE),
        ([f"{i}.0" for i in range(MOST_CLASSES_WITH_POINT + 1)], REGRESSION),
        ([f"{i}" for i in range(100)], SINGLE),
        (["1_000", "2_000"], SINGLE),
        (["a", "b"], SINGLE),
        (["1", "2", "x"], SINGLE),
        ([("a",), ("a", "b"), ()], MULTI),
        ([("0", "1"), ("1", "0")], MULTI),
    ],
)
def test_what_is_taken(labels: list[Any], expected: str) -> None:
    assert inferred(labels) == inferred(labels[::-1]) == expected


def test_what_was_taken_is_said_and_how_to_overrule_it() -> None:
    for labels, kind, words in (
        (["0", "1"], SINGLE, "--problem_type regression overrules this"),
        (["0.5", "1"], REGRESSION, "--problem_type single_label_classification overrules this"),
        ([("0", "1"), ("1", "1")], MULTI, "lists of 2 zeros and ones"),
    ):
        found = infer_problem_type("auto", Counter(labels))
        assert found.problem_type == kind and words in found.reason
        assert infer_problem_type(kind, Counter(labels)).reason == ""  # as asked: nothing to say


@pytest.mark.parametrize("names", [["0.5", "1"], ["1.0", "0.50", "0.5", "more"]])
def test_given_names_are_stronger_than_numbers(names: list[str]) -> None:
    assert inferred(["0.5", "1"], names=names) == SINGLE
    assert inferred(["0.5", "2"], names=names) == REGRESSION  # the control: not all are among them


def test_one_label_in_each_list_may_be_single_labels() -> None:
    lists = Counter([("a",), ("b",)])
    assert infer_problem_type(SINGLE, lists).problem_type == SINGLE
    with pytest.raises(ConfigError, match="holds lists of labels"):
        infer_problem_type(SINGLE, Counter([("a",), ("a", "b")]))


# ---- Nearly all numbers


def test_a_few_labels_among_scores_are_an_error_that_names_them() -> None:
    rows = Counter([str(i % 27 / 2) for i in range(117)] + ["n/a", "?", "n/a"])
    with pytest.raises(DataError) as caught:
        infer_problem_type("auto", rows, locate={"n/a": "t.csv line 9", "?": "t.csv line 12"}.get)
    assert str(caught.value) == (
        "t.csv line 9: label 'n/a' is not a number, as those of 117 of 120 rows are; also '?' (t.csv "
        "line 12). Correct these labels, or leave their rows out with --on_bad_row skip, or keep all "
        "labels as classes with --problem_type single_label_classification."
    )
    assert infer_problem_type(SINGLE, rows).problem_type == SINGLE
    assert inferred(list(rows), names=list(rows)) == SINGLE


@pytest.mark.parametrize(
    ("rows", "odd"),
    [
        ({"0": 60, "1": 59, "n/a": 1}, ["n/a"]),
        ({"0": 60, "1": 59, "unknown": 30}, []),  # a class as large as the others
        ({**{str(i): 10 for i in range(50)}, "oos": 10}, []),
        ({**{str(i): 10 for i in range(50)}, "oos": 4}, ["oos"]),
        ({"0.5": 1, "1": 1, "x": 1}, ["x"]),  # fractions are no names
        ({"0.5": 1, "x": 1}, []),
        ({"a": 5, "b": 1}, []),
        ({"1": 5, "2": 1}, []),
    ],
)
def test_non_numeric_labels(rows: dict[str, int], odd: list[str]) -> None:
    assert non_numeric_labels(rows) == odd


# ---- Joined labels


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        (["2,5", "2", "5", "27", "5,27,2"], ","),
        (["joy, love", "joy", "love"], ","),
        (["a;b", "b;c", "a;c"], ";"),  # none alone, all in others
        (["a|b", "a", "b"], "|"),
        (["a/b", "a", "b"], "/"),
        (["2 5", "2", "5"], " "),
        (["Paris, France", "Lyon, France", "Rome, Italy", "Rome"], None),
        (["a/x", "a/y", "b/x", "b/y"], None),  # a hierarchy
        (["not good", "good", "not"], None),
        (["C", "C++", "A+", "A"], None),
        (["yes, really", "yes", "no"], None),
        (["a,b", "c"], None),
        (["a,a", "a"], None),
        (["a, b", "a", "b", "a, b, c"], ","),  # c is in one label only
        (["Austin, Texas, USA", "Dallas, Texas, USA", "USA"], None),
        (["1 0 0", "0 1 0", "0 0 0"], " "),
        (["1,0", "1,1"], ","),
        (["1 0 0", "0 1 0", "0 0"], None),  # not all of one length
        (["1 0 0", "0 2 0"], None),
        (["3,14", "2,71", "-1,4", "2"], ","),  # a decimal comma
        (["0,0", "1,1"], ","),
        (["3,14", "2,71", "1,4b"], None),
    ],
)
def test_joined_labels_are_told_by_their_parts(labels: list[str], separator: str | None) -> None:
    found = find_joined(labels)
    assert (found and found[0]) == separator
    if separator:
        with pytest.raises(DataError, match="looks like several labels joined by") as caught:
            inferred(labels)
        shown = {" ": "space"}.get(separator, separator)
        assert f"--label_delimiter {shown!r} to split them" in str(caught.value)
        assert infer_problem_type(SINGLE, Counter(labels)).problem_type == SINGLE


def test_lists_whose_labels_are_joined_by_another_separator_are_told() -> None:
    lists = [("joy;anger",), ("joy",), ("anger",), ("joy", "fear")]
    with pytest.raises(DataError, match=r"label 'joy;anger' looks like several .* joined by ';'"):
        inferred(lists)
    assert infer_problem_type(MULTI, Counter(lists)).problem_type == MULTI
    assert inferred([("joy", "anger"), ("joy",), ("a;b",)]) == MULTI  # the control


def test_a_decimal_comma_is_told() -> None:
    for labels, told in ((["0,5", "1,25"], True), (["a,b", "a", "b"], False)):
        with pytest.raises(DataError) as caught:
            inferred(labels)
        assert ("Numbers must have a decimal point." in str(caught.value)) is told


# ---- Zeros and ones


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([("0", "1"), ("1", "0")], True),
        ([("0", "0", "0"), ("1", "1", "0")], True),
        ([("0",), ("1",)], False),
        ([("0",), ("0", "1")], False),
        ([("0", "1"), ("1", "2")], False),
        ([], False),
    ],
)
def test_lists_of_one_length_of_zeros_and_ones(labels: list[Any], expected: bool) -> None:
    assert is_multi_hot(labels) is expected


def test_zeros_and_ones_are_targets() -> None:
    values: list[LabelValue] = [("0", "1", "0"), ("1", "1", "0")]
    task = create_task(TaskConfig(class_weights=["balanced"]), LabelStats("set", values, [1, 1]))
    assert isinstance(task, MultiLabel) and task.labels == ("0", "1", "2")
    assert [task.encode_label(value) for value in values] == [[0, 1, 0], [1, 1, 0]]
    assert task.encode_label(("2",)) == [0, 0, 1]  # names are names still
    assert task.positive_weights == (1.0, 0.0, 2.0)
    with pytest.raises(DataError, match="a list of 2 zeros and ones; expected 3"):
        task.encode_label(("0", "0"))
    trained = task_of_model(MULTI, ["x", "y", "z"])
    assert trained.encode_label(("0", "1", "0")) == [0, 1, 0] == trained.encode_label(("y",))
    # the control: where lists have other lengths, 0 and 1 are the names of labels
    ids = create_task(TaskConfig(), LabelStats("set", [("0",), ("0", "1")], [1, 1]))
    assert ids.encode_label(("0", "1")) == [1, 1] and ids.encode_label(("1",)) == [0, 1]


def test_zeros_and_ones_get_their_names_from_a_flag() -> None:
    labels = LabelStats("set", [("0", "1"), ("1", "1")], [1, 1])
    assert create_task(TaskConfig(label_names=["b", "a"]), labels).labels == ("b", "a")
    with pytest.raises(ConfigError, match="has 3 names; the lists of zeros and ones have 2"):
        create_task(TaskConfig(label_names=["a", "b", "c"]), labels)


def test_a_list_of_fractions_is_no_list_of_names() -> None:
    labels = [("1", "0"), ("0.1", "0.9")]
    with pytest.raises(
        DataError, match=r"^b line 2: a list of numbers with fractions \(0\.1, 0\.9"
    ):
        inferred(labels, locate=lambda label: f"b line {labels.index(label) + 1}")
    assert infer_problem_type(MULTI, Counter(labels)).problem_type == MULTI
    # the controls: names beside the numbers, and whole numbers
    assert inferred([("0.1", "0.9"), ("a",)]) == inferred([("1", "2"), ("10",)]) == MULTI


def test_zeros_and_ones_of_two_lengths_are_an_error() -> None:
    with pytest.raises(
        DataError, match=r"^a\.jsonl line 2: a list of 3 zeros and ones \(0, 1, 0\)"
    ):
        inferred([("1", "0"), ("0", "1", "0")], locate=lambda label: "a.jsonl line 2")


# ---- Labels alike


def test_labels_alike_are_one_line() -> None:
    assert describe_alike(["yes", "no", "maybe"]) == ""
    assert describe_alike(["Yes", "yes", "a  b", "a b", "caf\u00e9", "cafe\u0301"]) == (
        "Labels that differ only in case or blanks or Unicode form (NFC and NFD) are trained as "
        r"different labels: 'Yes' and 'yes'; 'a  b' and 'a b'; 'caf\xe9' and 'cafe\u0301'."
    )


@pytest.mark.parametrize(
    ("label", "name", "difference"),
    [
        ("cafe\u0301", "caf\u00e9", "Unicode form (NFC and NFD)"),
        ("\ufb01n", "fin", "Unicode form (NFKC and not NFKC)"),
        ("Yes", "yes", "case"),
        ("a  b", "a b", "blanks"),
        ("A  b", "a b", "case, blanks, invisible characters or Unicode form"),
        ("x", "\u200bx", "invisible characters"),
        ("x", "x\u00ad", "invisible characters"),
        ("x", "\ufeffx", "invisible characters"),
    ],
)
def test_a_near_miss_says_what_differs(label: str, name: str, difference: str) -> None:
    told = describe_near_miss(label, ["other", name])
    assert told == f" Did you mean {name!a}? It differs from {label!a} only in {difference}."
    assert describe_near_miss("quite", [name]) == ""


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (("a", "b"), ("B", "A"), ("b", "a")),
        (("0", "1"), ("1.0", "0.0"), ("1", "0")),
        (("A", "a"), ("a", "A"), ("a", "A")),
        (("A", "a"), ("a", "b"), None),
        (("a",), ("a", "b"), None),
    ],
)
def test_the_same_labels_in_another_order(names: Any, others: Any, expected: Any) -> None:
    assert match_labels(names, others) == expected


# ---- Labels of a file and of a model


@pytest.mark.parametrize(
    ("names", "model", "expected"),
    [
        (["a", "b"], ["b", "a"], {"a": "a", "b": "b"}),
        (["A", " b"], ["b", "a"], {"A": "a", " b": "b"}),
        (["a", "A"], ["a", "A"], {"a": "a", "A": "A"}),  # exact spellings come first
        (["ä"], ["a", "A"], {}),
        (["aA"], ["aa", "AA"], {}),  # both are alike
        (["1", "0.0", "TRUE"], ["0", "1", "true"], {"1": "1", "0.0": "0", "TRUE": "true"}),
        (["0", "1.0", "label_1"], ["LABEL_0", "LABEL_1"], {"0": "LABEL_0", "1.0": "LABEL_1", "label_1": "LABEL_1"}),
        (["0", "2"], ["LABEL_0", "LABEL_1"], {"0": "LABEL_0"}),
        (["0", "1"], ["no", "LABEL_1"], {}),  # not only default names
        (["0"], ["LABEL_1", "LABEL_0"], {}),  # not the default order
        (["x"], [], {}),
    ],
)  # fmt: skip
def test_labels_are_matched_to_those_of_a_model(
    names: list[str], model: list[str], expected: dict[str, str]
) -> None:
    assert match_to_model(names, model) == expected


def test_codes_of_the_training_are_the_names_they_stand_for() -> None:
    assert match_to_model(["0", "No", "7"], ["no", "yes"], ["0", "1"]) == {"0": "no", "No": "no"}
