"""Labels -> task: the order of the outputs, the kind, the loss against a formula written by hand, and how logits are read."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertdist.core.config import TaskConfig
from bertdist.core.errors import ConfigError, DataError, ModelError
from bertdist.tasks.labels import LabelKind, LabelStats
from bertdist.tasks.tasks import (
    MultiLabel,
    Regression,
    SingleLabel,
    Task,
    create_task,
    task_of_model,
)

ONE = torch.ones(1)


def task_of(values: Sequence[Any], counts: Sequence[int] | None = None, **settings: Any) -> Task:
    """The task of these distinct labels, one row each unless counts say otherwise."""
    words = {
        name: settings.pop(name)
        for name in ("class_names", "column", "locate", "limit")
        if name in settings
    }
    values = [value if isinstance(value, tuple) else str(value) for value in values]
    kind: LabelKind = "set" if any(isinstance(value, tuple) for value in values) else "text"
    labels = LabelStats(kind, values, list(counts or [1] * len(values)), **words)
    model_labels = settings.pop("model_labels", None)
    return create_task(TaskConfig(**settings), labels, model_labels)


# ---- The order of the outputs


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),  # not all are whole numbers: by code point
        (
            ["1", "01", "2"],
            ("01", "1", "2"),
        ),  # '01' is a name: it would not come back from a number
        (["1", "1.0", "2.0"], ("1", "2")),  # two spellings of one label
        (["1", "1.5"], None),  # fractions: regression
        (["b", "B", "a", "é", "Z"], ("B", "Z", "a", "b", "é")),
        (["+1", "-1", "0"], ("+1", "-1", "0")),  # '+1' is a name
        (["²", "1"], ("1", "²")),  # a digit that int() refuses
        (["positive", "negative"], ("negative", "positive")),
    ],
)
def test_labels_are_sorted_whole_numbers_by_value_others_by_code_point(
    values: list[Any], labels: tuple[str, ...] | None
) -> None:
    for order in (values, values[::-1]):  # not the order in which the rows show them
        task = task_of(order)
        assert isinstance(task, Regression) if labels is None else task.labels == labels


@pytest.mark.parametrize(
    ("stated", "labels"),
    [
        (
            {
                "label_names": ["c", "a", "b"],
                "class_names": ("b", "c", "a"),
                "model_labels": ("a", "c", "b"),
            },
            ("c", "a", "b"),
        ),
        ({"class_names": ("b", "c", "a"), "model_labels": ("a", "c", "b")}, ("b", "c", "a")),
        ({"model_labels": ("a", "c", "b")}, ("a", "c", "b")),
        (
            {"model_labels": ("a", "c", "b", "d")},
            ("a", "b", "c"),
        ),  # a head of other labels says nothing
        ({"model_labels": ("a", "c")}, ("a", "b", "c")),
        (
            {"label_names": ["d", "c", "b", "a"]},
            ("d", "c", "b", "a"),
        ),  # a name that no row has is an output too
        ({"class_names": ("d", "c", "b", "a")}, ("d", "c", "b", "a")),
        ({}, ("a", "b", "c")),
    ],
)
def test_stated_orders_win_in_their_order(stated: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert task_of(["b", "a", "c"], **stated).labels == labels


def test_a_target_is_the_index_of_its_label() -> None:
    task = task_of(["10", "9", "2"])
    assert [task.encode_label(label) for label in ("2", "9", "10", 10)] == [0, 1, 2, 2]
    assert [task.decode_target(target) for target in (0, 1, np.int64(2))] == ["2", "9", "10"]


# ---- The kind


@pytest.mark.parametrize(
    ("values", "kind_of_task"),
    [
        (["a", "b"], SingleLabel),
        (["0", "1"], SingleLabel),
        ([0, 1], SingleLabel),
        (["0.5", "1"], Regression),
        (["1e3", "2"], Regression),
        (["0.5", "x"], SingleLabel),
        (["0.5", "nan"], SingleLabel),  # 'nan' is no number to learn, so these are names
        (["01", "02"], SingleLabel),  # codes, not fractions
        ([0.5, 1.0], Regression),
        ([("a",), ("a", "b"), ()], MultiLabel),
    ],
)
def test_the_labels_determine_the_task(values: list[Any], kind_of_task: type) -> None:
    assert type(task_of(values)) is kind_of_task


@pytest.mark.parametrize(
    ("asked", "values", "kind_of_task"),
    [
        ("regression", [0, 1], Regression),
        ("regression", ["0", "1"], Regression),
        ("single_label_classification", ["0.5", "1.0"], SingleLabel),
        ("single_label_classification", [0.5, 1.0], SingleLabel),
        ("multi_label_classification", [("a",), ("b",)], MultiLabel),
    ],
)
def test_problem_type_overrides_the_labels(
    asked: Any, values: list[Any], kind_of_task: type
) -> None:
    assert type(task_of(values, problem_type=asked)) is kind_of_task


# ---- Losses, by hand

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 2.0, 2.0]])
TARGETS = [0, 1, 2]
WEIGHTS = torch.tensor([1.0, 0.5, 0.0])


def log_share(row: list[float], place: int) -> float:
    """log softmax, in Python's floats."""
    return row[place] - math.log(sum(math.exp(logit) for logit in row))


def log_sigmoid(logit: float) -> float:
    return -math.log1p(math.exp(-logit))


def by_hand(smoothing: float) -> list[float]:
    """Cross-entropy of each row: (1 - s) of it on the label, s spread evenly over all (https://arxiv.org/abs/1512.00567, 7)."""
    rows = LOGITS.tolist()
    return [
        -(1 - smoothing) * log_share(row, label)
        - smoothing / 3 * sum(log_share(row, i) for i in range(3))
        for row, label in zip(rows, TARGETS, strict=True)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_single_label_loss_is_the_weighted_sum_of_cross_entropies(smoothing: float) -> None:
    rows = by_hand(smoothing)
    loss = SingleLabel(("a", "b", "c"), smoothing=smoothing).loss(
        LOGITS, torch.tensor(TARGETS), WEIGHTS
    )
    # Three float32 rows of size 1: a few roundings of 6e-8.
    assert loss.item() == pytest.approx(rows[0] + 0.5 * rows[1], rel=3e-7)
    mean = F.cross_entropy(LOGITS, torch.tensor(TARGETS), label_smoothing=smoothing).item()
    whole = SingleLabel(("a", "b", "c"), smoothing=smoothing).loss(
        LOGITS, torch.tensor(TARGETS), torch.ones(3)
    )
    assert whole.item() / 3 == pytest.approx(
        mean, rel=3e-7
    )  # what the padded model of Hugging Face computes
    assert abs(whole.item() - mean) > 0.1  # the control: a mean in its place is seen
    if smoothing:
        assert abs(loss.item() - by_hand(0.0)[0] - 0.5 * by_hand(0.0)[1]) > 0.01


def test_the_multi_label_loss_is_the_sum_of_row_means() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    rows = []
    for logits, wanted in zip(LOGITS.tolist(), targets.tolist(), strict=True):
        rows.append(
            -sum(log_sigmoid(x if on else -x) for x, on in zip(logits, wanted, strict=True)) / 3
        )
    loss = MultiLabel(("a", "b", "c")).loss(LOGITS, targets, WEIGHTS)
    assert loss.item() == pytest.approx(rows[0] + 0.5 * rows[1], rel=3e-7)
    whole = MultiLabel(("a", "b", "c")).loss(LOGITS, targets, torch.ones(3)).item()
    assert whole / 3 == pytest.approx(
        F.binary_cross_entropy_with_logits(LOGITS, targets).item(), rel=3e-7
    )
    assert (
        abs(loss.item() - 3 * (rows[0] + 0.5 * rows[1])) > 0.1
    )  # the control: a sum over labels is another number


def test_positive_weights_count_what_is_on() -> None:
    logits, targets = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    loss = MultiLabel(("a", "b"), positive_weights=(3.0, 5.0)).loss(logits, targets, ONE)
    assert loss.item() == pytest.approx((-3 * log_sigmoid(1.0) - log_sigmoid(2.0)) / 2, rel=3e-7)


def test_the_regression_loss_is_the_weighted_sum_of_squares() -> None:
    task = Regression(("score",))
    logits, targets = torch.tensor([[1.5], [-1.0], [9.0]]), torch.tensor([1.0, 1.0, 0.0])
    assert task.loss(logits, targets, WEIGHTS).item() == 0.25 + 0.5 * 4
    assert task.loss(logits, targets, torch.ones(3)).item() / 3 == pytest.approx(
        F.mse_loss(logits[:, 0], targets).item(), rel=3e-7
    )


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (SingleLabel(("a", "b", "c"), (1.0, 2.0, 3.0), 0.1), torch.tensor(TARGETS)),
        (MultiLabel(("a", "b", "c"), (2.0, 3.0, 4.0)), torch.eye(3)),
        (Regression(("score",)), torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(task: Task, targets: Tensor) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0])
    whole = task.loss(LOGITS, targets, weights)
    parts = [task.loss(LOGITS[i : i + 1], targets[i : i + 1], weights[i : i + 1]) for i in range(3)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=3e-7)
    assert whole.dtype == torch.float32
    assert task.loss(LOGITS.bfloat16(), targets, weights).dtype == torch.float32
    assert task.loss(LOGITS, targets, torch.zeros(3)).item() == 0


@pytest.mark.parametrize(
    ("task", "plain", "targets"),
    [
        (
            SingleLabel(("a", "b", "c"), (1.0, 2.0, 3.0), 0.1),
            SingleLabel(("a", "b", "c")),
            torch.tensor(TARGETS),
        ),
        (MultiLabel(("a", "b", "c"), (2.0, 3.0, 4.0)), MultiLabel(("a", "b", "c")), torch.eye(3)),
        (Regression(("score",)), Regression(("score",)), torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_eval_loss_has_no_weights_and_no_smoothing(
    task: Task, plain: Task, targets: Tensor
) -> None:
    found = task.eval_loss(LOGITS.double(), targets)
    assert found.dtype == torch.float64
    assert found.item() == plain.eval_loss(LOGITS.double(), targets).item()
    assert found.item() == pytest.approx(
        plain.loss(LOGITS, targets, torch.ones(3)).item(), rel=3e-7
    )
    if not isinstance(task, Regression):
        assert (
            abs(task.loss(LOGITS, targets, torch.ones(3)).item() - found.item()) > 0.01
        )  # the control: they would be seen


# ---- Weights of classes


def test_balanced_weights_are_rows_over_labels_times_rows_of_the_label() -> None:
    task = task_of(["b", "a", "c"], counts=[6, 3, 1], class_weights=["balanced"])
    assert isinstance(task, SingleLabel)
    assert task.class_weights == pytest.approx((10 / 9, 10 / 18, 10 / 3))
    targets = np.repeat([1, 0, 2], [6, 3, 1])
    weights = task.row_weights(targets)
    assert weights.dtype == np.float32
    assert weights.sum() == pytest.approx(
        10
    )  # so the size of the loss, and of the learning rate, stays
    for label in range(3):
        assert weights[targets == label].sum() == pytest.approx(
            10 / 3
        )  # every label counts the same


def test_numbers_are_weights_in_the_order_of_the_outputs() -> None:
    task = task_of(["10", "9"], class_weights=["2", "0.5"])
    assert task.labels == ("9", "10")
    assert task.row_weights(np.array([0, 1, 1])).tolist() == [2.0, 0.5, 0.5]


def test_a_weight_may_be_0_as_long_as_rows_of_another_label_count() -> None:
    task = task_of(["a", "b"], class_weights=["0", "1"])
    assert task.row_weights(np.array([0, 1, 1])).tolist() == [0.0, 1.0, 1.0]


def test_without_weights_every_row_counts_one() -> None:
    assert task_of(["a", "b"]).row_weights(np.array([0, 1, 1])).tolist() == [1.0, 1.0, 1.0]
    assert MultiLabel(("a",)).row_weights(np.zeros((2, 1))).tolist() == [1.0, 1.0]
    assert Regression(("a",)).row_weights(np.zeros(2)).tolist() == [1.0, 1.0]


def test_a_label_without_rows_has_a_finite_balanced_weight() -> None:
    task = task_of(
        ["a", "b"], counts=[3, 3], class_names=("a", "b", "never"), class_weights=["balanced"]
    )
    assert isinstance(task, SingleLabel)
    assert task.class_weights == (6 / 9, 6 / 9, 6 / 3)


def test_balanced_multi_label_weights_are_rows_off_over_rows_on() -> None:
    task = task_of([("a",), ("a", "b"), ()], [5, 1, 2], class_weights=["balanced"])
    assert isinstance(task, MultiLabel)
    assert task.positive_weights == (2 / 6, 7 / 1)
    # Then on and off weigh the same: 6 rows on x 1/3 = 2 rows off.


# ---- Reading logits


def test_a_single_label_record_is_the_most_probable_label() -> None:
    task = SingleLabel(("a", "b", "c"))
    predictions, probabilities = task.predict(LOGITS)
    assert predictions.tolist() == [0, 1, 0]
    assert probabilities[2] == pytest.approx([1 / 3] * 3)
    answers = list(task.to_records(LOGITS))
    assert [answer["label"] for answer in answers] == ["a", "b", "a"]
    assert [answer["score"] for answer in answers] == pytest.approx(
        [math.exp(log_share(row, i)) for row, i in zip(LOGITS.tolist(), [0, 1, 0], strict=True)]
    )


def test_multi_label_records_are_all_above_one_half_the_most_probable_first() -> None:
    task = MultiLabel(("a", "b", "c"))
    predictions, probabilities = task.predict(LOGITS)
    assert predictions.tolist() == [
        [1, 0, 1],
        [0, 1, 0],
        [1, 1, 1],
    ]  # a logit of 0 is one half: not above it
    assert probabilities[0].tolist() == pytest.approx(
        [math.exp(log_sigmoid(x)) for x in (1.0, -2.0, 0.5)]
    )
    first, second, _ = task.to_records(LOGITS)
    assert [entry["label"] for entry in first["labels"]] == ["a", "c"]
    assert [entry["label"] for entry in second["labels"]] == ["b"]
    assert list(task.to_records(torch.tensor([[-1.0, -1.0, -1.0]]))) == [{"labels": []}]
    assert task.encode_label(("c", "a")) == [1.0, 0.0, 1.0]
    assert task.encode_label(()) == [0.0, 0.0, 0.0]
    assert task.decode_target([1.0, 0.0, 1.0]) == ["a", "c"]


def test_records_of_many_labels_are_those_above_one_half_by_score_then_name() -> None:
    task = MultiLabel(tuple(f"l{i:03}" for i in range(300)))
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = list(task.to_records(logits))
    for row, record in zip(logits.sigmoid().tolist(), found, strict=True):
        pairs = zip(row, task.labels, strict=True)
        above = sorted(((score, label) for score, label in pairs if score > 0.5), reverse=True)
        assert record == {"labels": [{"label": label, "score": score} for score, label in above]}
        assert len({score for score, _ in above}) < len(above) < 300, "ties, and labels left out"
    target = np.zeros(300, np.float32)
    target[[7, 299]] = 1
    assert task.decode_target(target) == ["l007", "l299"]


def test_a_regression_record_is_the_number() -> None:
    task = Regression(("score",))
    predictions, _ = task.predict(torch.tensor([[1.5], [-2.0]]))
    assert predictions.tolist() == [1.5, -2.0]
    assert list(task.to_records(torch.tensor([[1.5], [-2.0]]))) == [
        {"label": "score", "score": 1.5},
        {"label": "score", "score": -2.0},
    ]
    assert task.encode_label("1e-1") == 0.1
    assert task.decode_target(np.float32(0.5)) == 0.5


# ---- A trained model's task


@pytest.mark.parametrize(
    ("problem_type", "labels", "task"),
    [
        ("single_label_classification", ["b", "a"], SingleLabel(("b", "a"))),
        ("multi_label_classification", ["b", "a"], MultiLabel(("b", "a"))),
        ("regression", ["score"], Regression(("score",))),
        (None, ["score"], Regression(("score",))),
        (None, ["b", "a"], SingleLabel(("b", "a"))),
    ],
)
def test_the_task_of_a_trained_model(
    problem_type: str | None, labels: list[str], task: Task
) -> None:
    found = task_of_model(problem_type, labels)
    assert found == task
    assert found.problem_type == (problem_type or task.problem_type)


def test_an_unknown_problem_type_is_an_error() -> None:
    with pytest.raises(
        ModelError, match=r"^The model's problem_type is 'regresion'\. Did you mean 'regression'\?$"
    ):
        task_of_model("regresion", ["a"])


# ---- Errors


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        (
            SingleLabel(("positive", "negative")),
            "positiv",
            "unknown label 'positiv'; expected one of the training labels. Did you mean 'positive'?",
        ),
        (
            SingleLabel(("0", "1")),
            7,
            "unknown label '7'; expected one of the training labels. Known: '0', '1'.",
        ),
        (
            SingleLabel(("01", "2")),
            "1",
            "unknown label '1'; expected one of the training labels. Did you mean '01'?",
        ),
        (
            MultiLabel(("red", "blue")),
            ("red", "bleu"),
            "unknown label 'bleu'; expected some of the training labels. Did you mean 'blue'?",
        ),
        (
            MultiLabel(("red", "blue")),
            "red",
            "expected a list of labels, found 'red'; --label_delimiter splits text.",
        ),
        (
            Regression(("score",)),
            "-1e20",
            "the square of '-1e20' overflows float32; expected up to 1e19.",
        ),
        (Regression(("score",)), "high", "expected a number, found 'high'."),
        (Regression(("score",)), "nan", "expected a number, found 'nan'."),
        (Regression(("score",)), float("inf"), "expected a number, found inf."),
        (Regression(("score",)), None, "expected a number, found None."),
    ],
)
def test_a_label_that_is_not_of_the_task_is_told(task: Task, label: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        task.encode_label(label)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "settings", "error", "message"),
    [
        (
            ["a"],
            {},
            DataError,
            "The training split has only the label 'a' in column 'label'; expected at least two.",
        ),
        (
            [()],
            {"column": "tags"},
            DataError,
            "No row of the training split has a label in 'tags'; expected at least one label.",
        ),
        (
            [("0", "0", "0")],
            {},
            DataError,
            "No row of the training split has one of the labels 0, 1, 2; expected at least one "
            "label.",
        ),
        (
            ["a", "b"],
            {"label_names": ["a", "a", "b"]},
            ConfigError,
            "--label_names repeats a name: a a b.",
        ),
        (
            ["a", "bee"],
            {"label_names": ["a", "be"]},
            ConfigError,
            "--label_names lacks 'bee', which the training split has. Did you mean 'be'?",
        ),
        (
            ["a", "caf\u00e9"],
            {"label_names": ["a", "cafe\u0301"]},
            ConfigError,
            "--label_names lacks 'caf\u00e9', which the training split has. Did you mean "
            "'cafe\\u0301'? It differs from 'caf\\xe9' only in Unicode form (NFD and NFC).",
        ),
        (
            [("0", "1"), ("1", "1")],
            {"label_names": ["1=a", "2=b"]},
            ConfigError,
            "--label_names has names for 1, 2; the positions in lists of zeros and ones are 0 to 1.",
        ),
        (
            ["a", "b"],
            {"class_weights": ["1", "2", "3"]},
            ConfigError,
            "--class_weights has 3 numbers for 2 labels; the order is: a, b.",
        ),
        (
            ["a", "b"],
            {"class_weights": ["0", "0", "1"], "label_names": ["a", "b", "c"]},
            ConfigError,
            "--class_weights 0 0 1: no training row has a label with a weight above 0, and nothing would be learned; the order is: a, b, c.",
        ),
        (
            [0.5, 1.5],
            {"class_weights": ["1"]},
            ConfigError,
            "--class_weights and --label_names are for classification; this is regression.",
        ),
        (
            [0.5, 1.5],
            {"label_names": ["x"]},
            ConfigError,
            "--class_weights and --label_names are for classification; this is regression.",
        ),
        (
            [0.5, 1.5],
            {"label_smoothing_factor": 0.1},
            ConfigError,
            "--label_smoothing_factor is for single-label tasks; this is regression.",
        ),
        (
            [("a",), ("b",)],
            {"label_smoothing_factor": 0.1},
            ConfigError,
            "--label_smoothing_factor is for single-label tasks; this is multi_label_classification.",
        ),
        (
            ["a", "b"],
            {"problem_type": "multi_label_classification"},
            ConfigError,
            "--problem_type is multi_label_classification, but the label column holds single values; --label_delimiter or "
            "--label_columns make lists of labels.",
        ),
        (
            [("a",)],
            {"problem_type": "regression"},
            ConfigError,
            "--problem_type is regression, but the label column holds lists of labels.",
        ),
    ],
)
def test_labels_that_make_no_task_are_an_error(
    values: list[Any], settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        task_of(values, **settings)
    assert str(caught.value) == message


def test_a_column_of_texts_is_not_a_label_column() -> None:
    texts = [f"text {i}" for i in range(26)]
    with pytest.raises(
        DataError,
        match=r"^Column 'id' has 26 different labels in 50 rows; is it the column of the labels\? If it is, .*--label_names",
    ):
        task_of(texts, counts=[25, *[1] * 25], column="id")
    assert (
        len(task_of(texts[:25], counts=[26, *[1] * 24]).labels) == 25
    )  # half of the rows may differ
    assert len(task_of(texts, counts=[24, *[1] * 25]).labels) == 26  # too few rows to tell
    listed = task_of(texts, counts=[25, *[1] * 25], label_names=texts)
    assert listed.labels == tuple(texts)  # one row of each, as in few-shot learning


@pytest.mark.parametrize(
    ("task", "logits", "targets", "expected"),
    [
        (SingleLabel(("a", "b")), [[0.0, 2.0], [0.0, 2.0], [1.0, 0.0]], [0, 1, 1], [1 / (1 + math.exp(-2)), 0, 1 / (1 + math.exp(-1))]),
        (MultiLabel(("a", "b")), [[3.0, -2.0], [1.0, -2.0], [1.0, -2.0]], [[0, 1], [0, 0], [1, 0]], [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1)), 0]),
        (Regression(("n",)), [[1.0], [-2.0], [4.0]], [1.0, 1.0, 1.5], [0, 3, 2.5]),
    ],
)  # fmt: skip
def test_an_error_is_as_big_as_the_model_is_sure_of_it(
    task: Task, logits: Any, targets: Any, expected: list[float]
) -> None:
    found = task.error_sizes(torch.tensor(logits), np.array(targets))
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("labels", ["single", "multi", "number"])
def test_eval_losses_of_rows_sum_to_that_of_all(labels: str) -> None:
    tasks: dict[str, tuple[Task, Tensor]] = {
        "single": (SingleLabel(("a", "b", "c")), torch.tensor([0, 2, 1])),
        "multi": (MultiLabel(("a", "b", "c")), torch.eye(3)),
        "number": (Regression(("score",)), torch.tensor([1.0, 2.0, 3.0])),
    }
    task, targets = tasks[labels]
    rows = task.eval_loss(LOGITS.double(), targets, "none")
    assert rows.shape == (3,) and rows.std() > 0
    assert rows.sum().item() == pytest.approx(task.eval_loss(LOGITS.double(), targets).item())
