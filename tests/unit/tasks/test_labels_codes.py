"""--label_names 0=negative 1=positive: names for the codes of the files."""

from typing import Any

import pytest

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError, DataError
from bertdist.tasks.labels import LabelNames, LabelStats, read_label_names
from bertdist.tasks.tasks import (
    MultiLabel,
    SingleLabel,
    Task,
    create_task,
    label_names_of,
    task_of_model,
)


def task_of(names: list[str], values: list[Any]) -> Task:
    return create_task(
        TaskConfig(label_names=names), LabelStats("text", values, [30] * len(values))
    )


@pytest.mark.parametrize(
    ("given", "labels", "names", "codes"),
    [
        (["0=negative", "1=positive"], ["0", "1"], ["negative", "positive"], ["0", "1"]),
        (["1=positive", "0=negative"], ["0.0", "1.0"], ["positive", "negative"], ["1", "0"]),
        (["0 = no = never", "1=yes"], ["0", "1"], ["no = never", "yes"], ["0", "1"]),
        (["a=b=X", "c=Y"], ["a=b", "c"], ["X", "Y"], ["a=b", "c"]),
        (["a=b=X", "c=Y"], ["a", "c"], ["b=X", "Y"], ["a", "c"]),
        (["0=0", "1=yes"], ["0", "1"], ["0", "yes"], ["0", "1"]),
        (["0=no", "1=yes"], ["no", "yes"], ["no", "yes"], ["0", "1"]),
        (["0=no", "1=yes"], ["no", "1", "yes"], ["no", "yes"], ["0", "1"]),
        # names that contain "=", and no codes
        (["a=b", "c=d"], ["a=b", "c=d"], ["a=b", "c=d"], []),
        (["a=b", "c", "d"], ["a=b", "c"], ["a=b", "c", "d"], []),
        (["no", "yes"], ["0", "1"], ["no", "yes"], []),
    ],
)
def test_codes_are_told_from_names_by_the_labels_of_the_files(
    given: list[str], labels: list[str], names: list[str], codes: list[str]
) -> None:
    assert read_label_names(given, labels) == LabelNames(names, codes)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            ["O=no", "1=yes"],
            "--label_names has no name for '0', which the training split has. No row has the label 'O'.",
        ),
        (["0=no"], "--label_names has no name for '1', which the training split has."),
        (["0=no", "1=no"], "--label_names has the name 'no' twice."),
        (["0=no", "0=yes"], "--label_names has the code '0' twice."),
        (["0=no", "1="], "--label_names has an empty name; expected CODE=NAME."),
        (
            ["0=no", "yes"],
            "--label_names has names for codes (0=no) and names alone (yes): give a code for all of "
            "them, or for none.",
        ),
        (
            ["0=1", "1=0"],
            "--label_names 0=1: '1' is the code of another label, and a file may have codes or "
            "names; choose another name.",
        ),
    ],
)
def test_wrong_names_are_one_line(given: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_of(given, ["0", "1"])
    assert str(caught.value) == problem


def test_a_code_that_two_labels_could_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="both 'a' and 'a=b' are labels of the files"):
        read_label_names(["a=b=X", "c=Y", "a=Z"], ["a", "a=b", "c"])


def test_a_code_without_rows_is_said() -> None:
    task = task_of(["0=no", "1=yes", "2=maybe"], ["0", "1"])
    assert task.labels == ("no", "yes", "maybe")
    assert task.reason == "No row has the label '2' of --label_names."
    assert task_of(["0=no", "1=yes"], ["0", "1"]).reason == ""


def test_files_may_have_codes_or_names() -> None:
    task = task_of(["1=positive", "0=negative"], ["0", "1"])
    again = task_of_model(task.problem_type, task.labels, task.codes)
    for each in (task, again):
        found = [each.encode_label(x) for x in ("1", "0", "1.0", "positive", "negative")]
        assert found == [0, 1, 0, 0, 1]
        assert each.decode_target(0) == "positive"
    plain = task_of_model(task.problem_type, task.labels)
    with pytest.raises(DataError, match="unknown label '1'"):
        plain.encode_label("1")


@pytest.mark.parametrize("values", [["no", "yes"], ["0", "yes", "1"], ["0", "yes", "1", "no"]])
def test_training_files_may_have_names_too(values: list[str]) -> None:
    task = task_of(["1=yes", "0=no"], values)
    assert (task.labels, task.reason) == (("yes", "no"), "")
    assert [task.encode_label(x) for x in ("1", "0", "yes", "no")] == [0, 1, 0, 1]
    with pytest.raises(ConfigError, match="has no name for 'nope', which the training split has"):
        task_of(["1=yes", "0=no"], [*values, "nope"])


def test_lists_of_codes_have_names() -> None:
    task = task_of(["0=a", "1=b", "5=c"], [("0",), ("1", "5"), ()])
    assert isinstance(task, MultiLabel) and task.labels == ("a", "b", "c")
    assert task.encode_label(("5", "a")) == [1.0, 0.0, 1.0]
    again = task_of_model(task.problem_type, task.labels, task.codes)
    assert again.encode_label(("0", "1")) == [1.0, 1.0, 0.0]


def test_positions_of_zeros_and_ones_have_names_in_any_order() -> None:
    values = [("0", "1"), ("1", "1")]
    assert task_of(["1=b", "0=a"], values).labels == ("a", "b")
    assert task_of(["x=a", "y=b"], values).labels == ("x=a", "y=b"), "names that contain ="


def test_a_run_with_the_same_outputs_gets_the_same_names() -> None:
    for names in (["0=no", "1=yes"], ["0", "1"]):
        task = task_of(names, ["0", "1"])
        assert isinstance(task, SingleLabel) and label_names_of(task) == names
        assert task_of(label_names_of(task), ["0", "1"]) == task
