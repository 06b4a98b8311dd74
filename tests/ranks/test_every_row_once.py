"""I3: every row once an epoch in training, and exactly once in evaluation and prediction, for any world size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Breaking,
    json_of,
    make_rows,
    rows_by_step,
    run_main,
    run_train,
    some_of,
    step_log,
    words_of,
    write_rows,
    write_split,
)
from transformers import AutoTokenizer, BertForSequenceClassification

from bertdist import predict
from bertdist.data import sharding as batching
from bertdist.predict import Predictor
from bertdist.training.evaluation import assert_each_row_once


def lose_a_row(accelerator: Accelerator) -> None:
    """The last rank's first row is not computed."""
    balance_by_length = batching.balance_by_length

    def broken(rows: Any, lengths: Any, ranks: int) -> list[Any]:
        shares = balance_by_length(rows, lengths, ranks)
        return [*shares[:-1], shares[-1][1:]]

    batching.balance_by_length = broken


def double_a_row(accelerator: Accelerator) -> None:
    """Ranks of equal load are made by repeating rows, as samplers do."""
    balance_by_length = batching.balance_by_length

    def broken(rows: Any, lengths: Any, ranks: int) -> list[Any]:
        shares = balance_by_length(rows, lengths, ranks)
        return [*shares[:-1], np.concatenate([shares[-1], rows[:1]])]

    batching.balance_by_length = broken


# --- Training


def times_trained(
    model: Path, folder: Path, n: int, rows: int, breaking: Breaking | None = None
) -> list[list[int]]:
    """Epoch -> how often each row was trained."""
    files = write_split(folder, rows)
    write_rows(files.train, [{**row, "label": str(i % 2)} for i, row in enumerate(make_rows(rows))])
    words = words_of(model, folder / "out", files, train_batch_size=4, num_train_epochs=2)
    per_epoch = -(-rows // 4)
    times = np.zeros((2, rows), dtype=int)
    for number, seen in rows_by_step(
        [seen for _, seen, _ in run_ranks(n, run_train, words, breaking)]
    ).items():
        np.add.at(times[number // per_epoch], seen, 1)
    return times.tolist()


@pytest.mark.parametrize(("n", "rows"), some_of([(2, 5), (3, 2)], [(1, 9), (3, 9)]))
def test_training_sees_every_row_once_an_epoch(
    tiny_model: Path, tmp_path: Path, n: int, rows: int
) -> None:
    assert times_trained(tiny_model, tmp_path, n, rows) == [[1] * rows] * 2


@pytest.mark.parametrize("breaking", [lose_a_row, double_a_row])
def test_a_row_lost_or_doubled_in_training_is_seen(
    tiny_model: Path, tmp_path: Path, breaking: Breaking
) -> None:
    assert times_trained(tiny_model, tmp_path, 2, 9, breaking) != [[1] * 9] * 2


# --- Prediction and evaluation


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(
        1,
        run_train,
        words_of(tiny_model, folder / "out", write_split(folder, 40), num_train_epochs=4),
    )
    return folder / "out" / "best"


def answers_of(
    folder: Path,
    texts: list[str],
    n: int,
    tokens: int = 60,
    at_once: int = 3,
    breaking: Breaking | None = None,
) -> list[Any]:
    """What every rank answers, with small steps and small micro-batches."""

    def answer(accelerator: Accelerator) -> list[dict[str, Any]]:
        if breaking is not None:
            breaking(accelerator)
        predict.ROWS_PER_WINDOW = at_once
        return Predictor(folder, tokens_per_micro_batch=tokens, accelerator=accelerator)(texts)

    return run_ranks(n, answer)


def one_by_one(folder: Path, texts: list[str]) -> list[tuple[str, float]]:
    """transformers alone, a text at a time."""
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    with torch.no_grad():
        for text in texts:
            score, label = (
                model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).max(-1)
            )
            found.append((model.config.id2label[int(label)], float(score)))
    return found


@pytest.mark.parametrize("n", some_of([3], [1, 2]))
@pytest.mark.parametrize("rows", some_of([2, 20], [1, 3]))
def test_predictions_are_the_same_in_the_same_order(trained: Path, n: int, rows: int) -> None:
    texts = [row["text"] for row in make_rows(rows, seed=3)]
    expected = one_by_one(trained, texts)
    for answers in answers_of(trained, texts, n):
        assert [answer["label"] for answer in answers] == [label for label, _ in expected]
        assert [answer["score"] for answer in answers] == pytest.approx(
            [score for _, score in expected], abs=1e-6
        )


@pytest.mark.parametrize("breaking", [lose_a_row, double_a_row])
def test_the_product_itself_notices_in_prediction(trained: Path, breaking: Breaking) -> None:
    with pytest.raises(RankError, match="AssertionError: each of 20 rows must be evaluated once; "):
        answers_of(trained, [row["text"] for row in make_rows(20, seed=3)], 2, breaking=breaking)


@pytest.mark.parametrize(
    ("rows", "total"), [([0, 1, 1], 3), ([0, 2], 3), ([0, 1, 2, 3], 3), ([], 1)]
)
def test_the_assertion_by_hand(rows: list[int], total: int) -> None:
    assert_each_row_once(torch.arange(3), 3)
    with pytest.raises(AssertionError, match=f"each of {total} rows must be evaluated once"):
        assert_each_row_once(torch.tensor(rows, dtype=torch.int64), total)


@pytest.mark.parametrize("rows", [2, 20])
def test_evaluation_is_the_same_on_any_number_of_ranks(
    tiny_model: Path, trained: Path, tmp_path: Path, rows: int
) -> None:
    found = {}
    for n in (1, 2, 3):
        files = write_split(tmp_path, 40, rows)
        settings = {
            "max_train_steps": 1,
            "learning_rate": 0,
            "tokens_per_micro_batch": 60,
            "metrics": ["accuracy", "f1"],
        }
        run_ranks(n, run_train, words_of(trained, tmp_path / f"out{n}", files, **settings))
        (found[n],) = step_log(tmp_path / f"out{n}", "eval")
    lines, expected = json_of(tmp_path / "out3" / "predictions.jsonl"), make_rows(rows, seed=2)
    assert [line["row"] for line in lines] == list(range(rows))
    assert [line["truth"] for line in lines] == [row["label"] for row in expected]
    assert [line["label"] for line in lines] == [
        label for label, _ in one_by_one(trained, [row["text"] for row in expected])
    ]
    right = sum(line["label"] == line["truth"] for line in lines)
    for n in (1, 2, 3):
        assert found[n] == pytest.approx(found[1], abs=1e-6)
        assert found[n]["accuracy"] == right / rows


@pytest.mark.parametrize("breaking", [lose_a_row, double_a_row])
def test_the_product_itself_notices_in_evaluation(
    trained: Path, tmp_path: Path, breaking: Breaking
) -> None:
    words = words_of(trained, tmp_path / "out", write_split(tmp_path, 8, 20), max_train_steps=1)
    with pytest.raises(RankError, match="AssertionError: each of 20 rows must be evaluated once; "):
        run_ranks(2, run_train, words, breaking)


def test_a_file_is_answered_in_its_order(trained: Path, tmp_path: Path) -> None:
    rows = make_rows(11, seed=5)
    write_rows(tmp_path / "in.tsv", rows)
    written = {}
    for n in (1, 3):
        words = [
            "--model",
            str(trained),
            "--input",
            str(tmp_path / "in.tsv"),
            "--output",
            str(tmp_path / f"{n}.jsonl"),
            "--use_cpu",
        ]
        said = f"Written: {tmp_path / f'{n}.jsonl'}, 11 rows.\n"
        others = [(0, "", "")] * (n - 1)
        assert run_ranks(n, run_main, words, None, predict) == [(0, said, ""), *others]
        written[n] = json_of(tmp_path / f"{n}.jsonl")
    assert [line["row"] for line in written[3]] == list(range(11))
    assert [line["label"] for line in written[3]] == [line["label"] for line in written[1]]
    assert [line["score"] for line in written[3]] == pytest.approx(
        [line["score"] for line in written[1]], abs=1e-6
    )
