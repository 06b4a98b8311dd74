"""Scores are of each row once, in float64, whatever the batches; and the one that picks the best
weights knows its direction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from bertdist.core.args import read_config
from bertdist.core.config import ModelConfig, TaskConfig
from bertdist.core.errors import ConfigError
from bertdist.data import sharding as batching
from bertdist.data.batch import PackedBatch
from bertdist.data.in_memory import records_from_texts
from bertdist.data.load_data import load_splits
from bertdist.data.loader import MapLoader
from bertdist.data.records import Records
from bertdist.data.tokenization import Example, create_dataset
from bertdist.models.classifier import Classifier, load_classifier
from bertdist.tasks import tasks as tasks_module
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task
from bertdist.training.evaluation import (
    Evaluation,
    Scorer,
    assert_each_row_once,
    describe_nonfinite_rows,
    evaluate_split,
    nonfinite_rows,
    predict_rows,
)

ONE_RANK: Any = SimpleNamespace(
    num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu")
)
LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]
# Row -> logits of two labels; the last rows are confident, and wrong where the target says so.
LOGITS = torch.tensor(
    [
        [1.0, 0.0],
        [0.0, 1.0],
        [2.0, -1.0],
        [0.5, 0.25],
        [-3.0, 3.0],
        [0.0, 0.0],
        [8.0, -8.0],
        [-8.0, 8.0],
    ]
)
TARGETS = np.array([0, 1, 1, 0, 1, 0, 1, 1])


class Rows:
    """Examples without a tokenizer."""

    def __init__(self, targets: Any = TARGETS) -> None:
        self.targets = targets
        self.records = SimpleNamespace(lengths=lambda: np.array(LENGTHS))

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, rows: Sequence[int]) -> list[Example]:
        return [
            Example(row, [1] * LENGTHS[row], [0] * LENGTHS[row], self.targets[row], 1.0)
            for row in rows
        ]


class DatasetStats(nn.Module):
    """Answers LOGITS, and remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.asked: list[tuple[bool, bool, int]] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled(), len(batch.lengths)))
        return (LOGITS[batch.row_numbers] * self.scale).double()


def batches(**changes: Any) -> MapLoader:
    return MapLoader(
        **{"dataset": Rows(), "rows_per_step": 3, "tokens_per_micro_batch": 7, **changes}
    )


# ---- Each row once


@pytest.mark.parametrize("rows_per_step", [1, 3, 8, 100])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_logits_come_in_row_order_whatever_the_batches(rows_per_step: int, tokens: int) -> None:
    found = predict_rows(
        DatasetStats(),
        batches(rows_per_step=rows_per_step, tokens_per_micro_batch=tokens),
        ONE_RANK,
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, LOGITS)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_asked_without_dropout_and_left_as_it_was(training: bool) -> None:
    model = DatasetStats().train(training)
    predict_rows(model, batches(), ONE_RANK)
    assert {asked[:2] for asked in model.asked} == {(False, False)}
    assert sum(asked[2] for asked in model.asked) == len(LENGTHS)
    assert model.training is training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("rows", "total", "lost", "repeated"),
    [
        ([0, 2], 3, 1, 0),
        ([], 2, 2, 0),
        ([0, 1, 1, 2], 3, 0, 1),
        ([0, 0, 0, 2, 2], 3, 1, 2),
        ([0, 1, 2, 3], 3, 0, 0),
        ([0, 2], 2, 1, 0),
    ],
)
def test_a_lost_or_repeated_row_is_seen(
    rows: list[int], total: int, lost: int, repeated: int
) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_each_row_once(torch.tensor(rows, dtype=torch.int64), total)
    assert (
        str(caught.value)
        == f"each of {total} rows must be evaluated once; {lost} are missing, {repeated} repeated"
    )


@pytest.mark.parametrize("rows", [[], [0], [2, 0, 1]])
def test_each_row_once_is_accepted_in_any_order(rows: list[int]) -> None:
    assert_each_row_once(torch.tensor(rows, dtype=torch.int64), len(rows))


@pytest.mark.parametrize(
    "change", [lambda rows: rows[:-1], lambda rows: np.concatenate([rows, rows[:1]])]
)
def test_a_deal_that_loses_or_repeats_a_row_cannot_be_scored(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batching.balance_by_length
    monkeypatch.setattr(
        batching, "balance_by_length", lambda *args: [change(share) for share in real(*args)]
    )
    with pytest.raises(AssertionError, match="each of 8 rows must be evaluated once"):
        predict_rows(DatasetStats(), batches(), ONE_RANK)


# ---- The loss


def by_hand(row: int) -> float:
    """Cross-entropy of one row, in Python's floats."""
    logits = LOGITS[row].tolist()
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[TARGETS[row]]


@pytest.mark.parametrize("rows_per_step", [1, 3, 8])
def test_the_loss_is_the_mean_over_rows_taken_one_by_one(rows_per_step: int) -> None:
    task = SingleLabel(
        ("no", "yes"), class_weights=(3.0, 0.5), smoothing=0.1
    )  # which count in training only
    split = batches(rows_per_step=rows_per_step)
    found = evaluate_split(DatasetStats(), split, Scorer(TaskConfig(), task, None), ONE_RANK)
    assert found.scores["loss"] == pytest.approx(math.fsum(map(by_hand, range(8))) / 8, rel=1e-15)
    assert list(found.scores) == ["loss", "accuracy", "f1_macro"]
    assert (
        found.scores["accuracy"] == 6 / 8
    )  # rows 2 and 6 are wrong, and row 5 is a tie, which the first label takes: right
    means = [
        math.fsum(by_hand(row) for row in part) / len(part)
        for part in ([0, 1, 2], [3, 4, 5], [6, 7])
    ]
    assert (
        abs(math.fsum(means) / 3 - found.scores["loss"]) > 0.1
    )  # the control: a mean of means is another number


def test_the_loss_of_a_real_model_is_that_of_its_rows_alone(tiny_model: Path) -> None:
    texts = ["good", "a bad movie", "so dull and so poor a film, the worst", "it was fun"]
    config = ModelConfig(model_name_or_path=str(tiny_model))
    task = SingleLabel(("no", "yes"))
    torch.manual_seed(0)
    model: Classifier = load_classifier(config, task)[0].double().eval()
    examples = create_dataset(
        records_from_texts(texts), AutoTokenizer.from_pretrained(tiny_model), None, 64
    )
    scorer = Scorer(TaskConfig(), task, None)
    found = evaluate_split(
        model,
        MapLoader(dataset=examples, rows_per_step=4, tokens_per_micro_batch=16),
        scorer,
        ONE_RANK,
    )
    with torch.no_grad():
        alone = [
            task.eval_loss(
                model(batching.collate(examples[[row]])), torch.zeros(1, dtype=torch.int64)
            ).item()
            for row in range(4)
        ]
    assert found.scores["loss"] == pytest.approx(
        math.fsum(alone) / 4, rel=1e-6
    )  # logits travel as float32


# ---- The scorer


@pytest.mark.parametrize(
    ("task", "logits", "references", "loss", "first"),
    [
        (
            SingleLabel(("no", "yes")),
            [[0.0, 0.0], [0.0, 0.0]],
            np.array([0, 1]),
            math.log(2),
            ("accuracy", 0.5),
        ),
        (
            MultiLabel(("a", "b")),
            [[0.0, 0.0], [0.0, 0.0]],
            np.array([[0, 1], [0, 0]], dtype=np.float32),
            math.log(2),
            ("f1_micro", 0.0),
        ),
        (
            Regression(("score",)),
            [[1.0], [3.0]],
            np.array([2.0, 5.0], dtype=np.float32),
            2.5,
            ("pearson", 1.0),
        ),
    ],
)
def test_scores_by_hand(
    task: Task, logits: list[Any], references: Any, loss: float, first: tuple[str, float]
) -> None:
    found = Scorer(TaskConfig(), task, None).score(torch.tensor(logits), references)
    assert found.scores["loss"] == pytest.approx(loss, rel=1e-15)
    assert (next(name for name in found.scores if name != "loss"), found.selection_score) == (
        first[0],
        pytest.approx(first[1]),
    )
    records = task.to_records(torch.tensor(logits))
    assert list(found.predictions) == [
        {"row": row, **record, "truth": task.decode_target(references[row])}
        for row, record in enumerate(records)
    ]
    assert (found.classes == {}) is isinstance(task, Regression)


@pytest.mark.parametrize(
    ("metric", "sign"), [("loss", -1), ("accuracy", 1), ("f1_macro", 1), (None, 1)]
)
def test_merit_is_more_where_the_weights_are_better(metric: str | None, sign: int) -> None:
    scorer = Scorer(TaskConfig(metric_for_best_model=metric), SingleLabel(("no", "yes")), None)
    right, wrong = (
        scorer.score(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), np.array(targets))
        for targets in ([0, 1], [1, 0])
    )
    assert right.selection_score == sign * right.scores[metric or "accuracy"]
    assert right.selection_score > wrong.selection_score


def test_an_error_of_numbers_is_less_where_the_weights_are_better() -> None:
    scorer = Scorer(TaskConfig(metrics=["mse", "pearson"]), Regression(("score",)), None)
    near, far = (
        scorer.score(torch.tensor([[1.0], [2.0]]), np.array(targets, dtype=np.float32))
        for targets in ([1.0, 2.5], [5.0, 7.0])
    )
    assert (near.scores["mse"], near.selection_score) == (0.125, -0.125)
    assert near.selection_score > far.selection_score


@pytest.mark.parametrize(
    ("config", "glue", "main"),
    [
        ({}, None, "accuracy"),
        ({}, "mrpc", "accuracy"),
        ({}, "cola", "matthews_correlation"),
        ({"metrics": ["f1", "accuracy"]}, "cola", "f1"),
        ({"metrics": ["f1", "accuracy"], "metric_for_best_model": "accuracy"}, None, "accuracy"),
        ({"metric_for_best_model": "loss"}, None, "loss"),
    ],
)
def test_the_first_metric_picks_the_best_weights_unless_one_is_named(
    config: dict[str, Any], glue: str | None, main: str
) -> None:
    assert Scorer(TaskConfig(**config), SingleLabel(("no", "yes")), glue).selection_metric == main


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"metric_for_best_model": "acuracy"},
            "--metric_for_best_model acuracy: not among the scores that are computed. "
            "Did you mean 'accuracy'?",
        ),
        (
            {"metric_for_best_model": "f1"},
            "--metric_for_best_model f1: not among the scores that are computed. "
            "Known: 'loss', 'accuracy', 'f1_macro'.",
        ),
        ({"metrics": ["acuracy"]}, "--metrics acuracy: "),
        ({"metrics": ["pearson"]}, "--metrics pearson: "),
    ],
)
def test_a_metric_that_is_not_computed_is_told_before_training(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Scorer(TaskConfig(**config), SingleLabel(("no", "yes")), None)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [SingleLabel(("a", "b", "c")), MultiLabel(("a", "b", "c"))])
def test_the_loss_of_many_logits_is_summed_in_parts(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    single = isinstance(task, SingleLabel)
    targets = np.arange(11) % 3 if single else np.eye(3, dtype=np.float32)[np.arange(11) % 3]
    scorer, sizes, whole = Scorer(TaskConfig(), task, None), list[int](), type(task).eval_loss

    def watched(self: Any, part: Tensor, target: Tensor) -> Tensor:
        sizes.append(len(part))
        return whole(self, part, target)

    monkeypatch.setattr(type(task), "eval_loss", watched)
    expected = scorer.score(logits, targets).scores
    monkeypatch.setattr(tasks_module, "LOSS_CHUNK", 13)
    assert scorer.score(logits, targets).scores == pytest.approx(expected, rel=1e-14)
    assert sizes == [11, 4, 4, 3]


OWN_METRIC = """
import datasets
import evaluate

class Mine(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int64")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": kind, "references": kind}))

    def _compute(self, predictions, references):
        if len(predictions) < ROWS:
            raise ValueError("too few")
        right = sum(a == b for a, b in zip(predictions, references))
        return {"wrong": -right, "right_rows": right, "label_" + str(max(references)): 1.0}
"""


@pytest.fixture
def own_metric(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN_METRIC.replace("ROWS", "1"))
    return str(path)


def scorer_by(metric: str, *names: str, outputs: int = 2) -> Scorer:
    labels = tuple(f"label {i}" for i in range(outputs))
    config = TaskConfig(metrics=list(names), metric_for_best_model=metric)
    return Scorer(config, SingleLabel(labels), None)


OWN_LOGITS, OWN_TARGETS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), np.array([0, 0, 0])


@pytest.mark.parametrize(
    ("metric", "score"), [("right_rows", 2.0), ("wrong", -2.0), ("accuracy", 2 / 3)]
)
def test_a_score_of_a_metric_of_one_s_own_selects(
    metric: str, score: float, own_metric: str
) -> None:
    found = scorer_by(metric, "accuracy", own_metric).score(OWN_LOGITS, OWN_TARGETS)
    assert found.selection_score == score


def test_lower_is_better_by_the_name_of_the_score(tmp_path: Path) -> None:
    """As of hub:mse, also where the metric is named by its file."""
    path = tmp_path / "mine.py"
    path.write_text(OWN_METRIC.replace("ROWS", "1").replace('"wrong": -right', '"mse": right'))
    for named in (str(path), "mse"):
        found = scorer_by(named, "accuracy", str(path)).score(OWN_LOGITS, OWN_TARGETS)
        assert (found.selected, found.selection_score) == ("mse", -2.0)


def test_the_name_of_a_metric_of_one_s_own_is_its_first_score(own_metric: str) -> None:
    """Not the first score of all, which is the accuracy."""
    scorer = scorer_by(own_metric, "accuracy", own_metric)
    assert scorer.score(OWN_LOGITS, OWN_TARGETS).selection_score == -2.0


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("right_row", "Did you mean 'right_rows'?"),
        ("acuracy", "Did you mean 'accuracy'?"),
        ("label_1", None),
        ("f1_macro", "Known: 'loss', 'accuracy', 'wrong', 'right_rows', 'label_1'."),
    ],
)
def test_a_misspelt_score_beside_a_metric_of_one_s_own_is_told_before_training(
    metric: str, hint: str | None, own_metric: str
) -> None:
    if hint is None:  # the control
        scorer_by(metric, "accuracy", own_metric)
        return
    with pytest.raises(ConfigError) as caught:
        scorer_by(metric, "accuracy", own_metric)
    assert str(caught.value) == (
        f"--metric_for_best_model {metric}: not among the scores that are computed. {hint}"
    )


@pytest.mark.parametrize("why", ["it needs more rows", "too many labels"])
def test_a_misspelt_score_is_told_by_the_first_evaluation_at_the_latest(
    why: str, tmp_path: Path, own_metric: str
) -> None:
    if why == "it needs more rows":
        Path(own_metric).write_text(OWN_METRIC.replace("ROWS", "3"))
    outputs = 2 if why == "it needs more rows" else 65
    scorer = scorer_by("right_row", own_metric, outputs=outputs)
    logits = torch.zeros(3, outputs)
    with pytest.raises(ConfigError, match=r"computed\. Did you mean 'right_rows'\?$"):
        scorer.score(logits, OWN_TARGETS)


def test_an_undefined_score_is_told_once_with_its_reason() -> None:
    scorer, logits = (
        Scorer(TaskConfig(), Regression(("score",)), None),
        torch.tensor([[1.0], [2.0]]),
    )
    constant, other = np.array([3.0, 3.0], np.float32), np.array([1.0, 2.0], np.float32)
    assert scorer.score(logits, other).notes == ()  # the control
    found = scorer.score(logits, constant)
    assert math.isnan(found.selection_score) and found.scores["loss"] == 2.5
    assert found.notes == (
        "pearson is undefined (all labels, or all predictions, are the same number): such an "
        "evaluation neither selects the best weights nor counts for --early_stopping_patience. "
        "As long as it was never a number, the lowest loss selects.",
    )
    assert scorer.score(logits, constant).notes == ()


def test_a_metric_that_gives_no_scores_selects_by_the_loss() -> None:
    scorer = Scorer(TaskConfig(), SingleLabel(("no", "yes")), None)
    scorer._metrics = SimpleNamespace(compute=lambda *arrays: {}, not_numbers={}, main_scores={})  # type: ignore[assignment]
    found = scorer.score(torch.tensor([[0.0, 0.0]]), np.array([0]))
    assert found.selection_score == -found.scores["loss"] == pytest.approx(-math.log(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_number_have_no_scores(value: float) -> None:
    """The largest of NaNs is some label: without this a broken model has an accuracy."""
    scorer, logits = (
        Scorer(TaskConfig(), SingleLabel(("no", "yes")), None),
        torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 1.0]]),
    )
    assert (
        nonfinite_rows(logits) == ()
        and scorer.score(logits, np.array([0, 1, 1])).scores["accuracy"] == 1.0
    )
    logits[2, 1] = value
    found = scorer.score(logits, np.array([0, 1, 1]))
    assert nonfinite_rows(logits) == (2,) and all(
        math.isnan(score) for score in (*found.scores.values(), found.selection_score)
    )
    told = describe_nonfinite_rows((2, 5, 6, 9), 3_000, "row {}".format)
    assert told.startswith(
        "the model gives NaN or Inf for 4 of 3,000 rows: row 2, row 5, row 6, and more. "
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--validation_file={folder}/skip.csv", "--on_bad_row=skip"],
        ["--validation_split=0.3"],
        ["--validation_split=0.3", "--streaming", "--max_train_steps=2"],
        ["--validation_file={folder}/*e.csv"],
        ["--validation_file={folder}/*e.[cp]*"],
        ["--validation_file={folder}/none.csv"],
    ],
)
def test_predictions_name_their_line_where_the_row_does_not(
    words: list[str], tmp_path: Path
) -> None:
    lines = [f"text {number},{'pn'[number % 2]}" for number in range(40)]
    files = {"some": lines, "none": lines[:6], "skip": [*lines[:3], "a,b,c", *lines[3:]]}
    for name, rows in files.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows, ""]))
    table = pa.table({"text": ["text 7", "text 8"], "label": ["p", "n"]})
    pq.write_table(table, tmp_path / "some.parquet")
    run = ["--model_name_or_path=m", "--output_dir=o", f"--train_file={tmp_path}/some.csv"]
    config = read_config([*run, *(word.format(folder=tmp_path) for word in words)])
    records = load_splits(config).validation
    assert isinstance(records, Records)
    evaluation = Evaluation(
        scores={}, selection_score=0.0, predictions=[{"row": row} for row in range(len(records))]
    )
    rows: Any = SimpleNamespace(records=records)
    predictions = list(evaluation.results(rows).predictions)
    if words == ["--validation_file={folder}/none.csv"]:  # row n is the n-th of the file
        assert predictions == [{"row": row} for row in range(6)]
        return
    for row, line in enumerate(predictions):
        assert line["row"] == row
        if line["file"] == "some.parquet":
            assert table["text"][line["file_row"]].as_py() == records[row].text
        else:
            text = (tmp_path / line["file"]).read_text().splitlines()[line["line"] - 1]
            assert text.split(",")[0] == records[row].text
    assert predictions
