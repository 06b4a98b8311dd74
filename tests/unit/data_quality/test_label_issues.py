"""Label issues: folds, predictions out of fold, the ranking of cleanlab, and the output."""

import builtins
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from rows import be_quick, make_rows, words_of, write_rows, write_split

from bertdist import Predictor
from bertdist.core.args import read_config
from bertdist.core.config import DataConfig, TaskConfig
from bertdist.core.errors import ConfigError, DataError
from bertdist.data.load_data import load_records
from bertdist.data.records import Records
from bertdist.data_quality import label_issues
from bertdist.data_quality.config import RANKINGS, read_label_issue_config
from bertdist.data_quality.duplicates import group_texts
from bertdist.data_quality.label_issues import (
    SHOWN_ROWS,
    LabelIssues,
    import_cleanlab,
    label_changes,
    label_issue_entries,
    rank_label_issues,
    select_rows,
    show_label_issues,
)
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task, create_task
from bertdist.train import train
from bertdist.training import cross_validation
from bertdist.training.cross_validation import assign_folds
from bertdist.training.run_logger import RunLogger

ALONE = np.arange(300)  # every row a text of its own


def spread(labels: Any, fold_of_row: Any, k: int) -> int:
    """The largest difference between two folds in rows of one label."""
    counts = [np.bincount(fold_of_row[labels == label], minlength=k) for label in np.unique(labels)]
    return max(int(count.max() - count.min()) for count in counts)


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=80), st.integers(2, 10), st.integers(0, 1000)
)
def test_folds_are_a_partition_and_have_equally_many_rows_of_every_label(
    labels: list[int], k: int, seed: int
) -> None:
    given_labels = np.array(labels)
    found = assign_folds(given_labels, np.arange(len(labels)), k, seed)
    sizes = np.bincount(found, minlength=k)
    assert len(found) == len(labels) and len(sizes) == k and sizes.max() - sizes.min() <= 1
    assert spread(given_labels, found, k) <= 1


def test_folds_by_chance_would_not_be_stratified() -> None:
    labels = ALONE % 3
    assert spread(labels, np.random.default_rng(0).integers(5, size=300), 5) > 1
    assert spread(labels, assign_folds(labels, ALONE, 5, 0), 5) <= 1


def test_folds_are_a_pure_function_of_the_seed() -> None:
    labels = ALONE % 3
    assert assign_folds(labels, ALONE, 4, 1).tolist() == assign_folds(labels, ALONE, 4, 1).tolist()
    assert assign_folds(labels, ALONE, 4, 1).tolist() != assign_folds(labels, ALONE, 4, 2).tolist()


def test_rows_of_one_group_stay_together() -> None:
    groups = ALONE // 3
    found = assign_folds(ALONE % 2, groups, 4, 0)
    assert all(len(set(found[groups == group])) == 1 for group in set(groups))
    apart = assign_folds(ALONE % 2, ALONE, 4, 0)
    assert any(len(set(apart[groups == group])) > 1 for group in set(groups))


def test_the_rarest_of_several_labels_is_in_every_fold() -> None:
    labels = np.random.default_rng(0).random((300, 6)) < np.array(
        [0.6, 0.5, 0.4, 0.1, 0.05, 0.0167]
    )
    found = assign_folds(labels.astype(float), ALONE, 5, 0)
    for column in labels.T:
        counts = np.bincount(found[column], minlength=5)
        assert counts.max() - counts.min() <= 8
    rarest = labels[:, labels.sum(0).argmin()]
    counts = np.bincount(found[rarest], minlength=5)
    assert counts.max() - counts.min() <= 1


def test_every_fold_has_numbers_of_the_full_range() -> None:
    numbers = np.random.default_rng(0).normal(size=300)
    found = assign_folds(numbers, ALONE, 3, 0)
    means = [numbers[found == fold].mean() for fold in range(3)]
    assert max(means) - min(means) < 0.05
    by_chance = [
        numbers[part].mean()
        for part in np.array_split(np.random.default_rng(1).permutation(300), 3)
    ]
    assert max(by_chance) - min(by_chance) > max(means) - min(means)


def test_selected_rows_keep_their_location_in_the_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.tsv", make_rows(6))
    records = load_records(DataConfig(train_file=[str(path)]), "train")
    some = select_rows(records, np.array([4, 1]))
    assert [some[0].text, some[1].text] == [records[4].text, records[1].text] and len(some) == 2
    assert str(some.location(0)) == "rows.tsv line 6" and some.lengths().tolist() == [
        len(records[4].text),
        len(records[1].text),
    ]


KINDS = {  # of labels: rows of a file, what a fold's file must hold of the first
    "text": ([{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(12)], "a"),
    "integer": ([{"text": f"text {at}", "label": at % 2} for at in range(12)], "0"),
    "number": ([{"text": f"text {at}", "label": at / 4} for at in range(12)], "0.0"),
    "set": ([{"text": f"text {at}", "label": ["a", "b"][: at % 3]} for at in range(12)], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folds_rows_have_the_labels_of_the_source_and_make_its_task(
    kind: str, tmp_path: Path
) -> None:
    rows, first = KINDS[kind]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        "--model_name_or_path",
        "M",
        "--train_file",
        str(path),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    config = read_config(words)
    records = load_records(config.data, "train")
    task = create_task(TaskConfig(), records.label_stats(), None)
    run = cross_validation._fold_config(
        config, tmp_path / "out" / "folds" / "0", task, records, scored=False
    )
    folder = tmp_path / "out" / "folds" / "0"
    folder.mkdir(parents=True)
    cross_validation._write_rows(folder / "train.jsonl", records, np.array([0, 1, 2, 5]))
    again = load_records(run.data, "train")
    assert again[0].label == (tuple(first) if isinstance(first, list) else first)
    assert [again[at].label for at in range(4)] == [records[at].label for at in (0, 1, 2, 5)]
    assert again.label_kind == records.label_kind == ("set" if kind == "set" else "text")
    one = create_task(run.task, again.label_stats(), None)
    assert one.problem_type == task.problem_type and (kind == "number" or one.labels == task.labels)


def test_a_fold_without_a_rare_label_still_has_all_outputs(tmp_path: Path) -> None:
    rows = [*make_rows(9), {"text": "rare", "label": "odd"}]
    config = read_config(
        words_of(
            tmp_path,
            tmp_path / "out",
            write_split(tmp_path, 2),
            train_file=write_rows(tmp_path / "rare.tsv", rows),
        )
    )
    records = load_records(config.data, "train")
    task = create_task(TaskConfig(), records.label_stats(), None)
    run = cross_validation._fold_config(config, tmp_path / "out", task, records, scored=False)
    (tmp_path / "out").mkdir()
    cross_validation._write_rows(tmp_path / "out" / "train.jsonl", records, np.arange(9))
    assert (
        create_task(run.task, load_records(run.data, "train").label_stats(), None).labels
        == task.labels
        == ("negative", "odd", "positive")
    )


def predict_rows(
    accelerator: Accelerator, words: list[str], k: int, breaking: Any = None
) -> tuple[Any, Any, list[str]]:
    """Logits of all rows, their folds, and the lines that were shown, on this rank."""
    be_quick()
    if breaking is not None:
        breaking()
    config = read_config(words)
    records = load_records(config.data, "train")
    task = create_task(config.task, records.label_stats(), None)
    assert records.label_indices is not None
    targets = np.array([task.encode_label(value) for value in records.label_values])[
        records.label_indices
    ]
    lines: list[str] = []
    log: Any = SimpleNamespace(say=lines.append)
    commands = label_issues.Commands(
        lambda run: train(run).finished,
        lambda folder: Predictor(folder, accelerator=accelerator),
        accelerator,
        log,
    )
    config = replace(config, run=replace(config.run, folds=k))
    rows = cross_validation.Rows(records, task, targets)
    logits = label_issues.predict_out_of_fold(config, rows, commands)
    texts = group_texts({"train": records}, 0).normalized["train"]
    return (
        None if logits is None else logits.numpy(),
        assign_folds(targets, texts, k, config.run.seed),
        lines,
    )


def count_leaked_rows(records: Records, fold_of_row: Any, out: Path, k: int) -> int:
    """How many texts of a fold its run was trained on, over all folds."""
    found = 0
    for fold in range(k):
        lines = (out / "folds" / str(fold) / "train.jsonl").read_text(encoding="utf-8").splitlines()
        learned = {" ".join(json.loads(line)["text"].lower().split()) for line in lines}
        found += sum(
            " ".join(records[int(row)].text.lower().split()) in learned
            for row in np.flatnonzero(fold_of_row == fold)
        )
    return found


def test_no_row_is_predicted_by_a_model_trained_on_it(tiny_model: Path, tmp_path: Path) -> None:
    rows = make_rows(26, seed=3)
    rows += [
        {**row, "text": row["text"].upper()} for row in rows[:4]
    ]  # the same texts again, as a reader sees them
    files = write_split(tmp_path, 2)
    path = write_rows(tmp_path / "rows.tsv", rows)
    words = words_of(
        tiny_model, tmp_path / "out", files, train_file=path, num_train_epochs=1, max_length=24
    )
    ((logits, fold_of_row, said),) = run_ranks(1, predict_rows, words, 3, timeout=300)
    records = load_records(read_config(words).data, "train")
    assert logits.shape == (30, 2) and np.abs(logits).min() > 0
    assert count_leaked_rows(records, fold_of_row, tmp_path / "out", 3) == 0
    sizes = [int((fold_of_row == fold).sum()) for fold in range(3)]
    assert [line.split(":")[0] for line in said] == ["Fold 1 of 3", "Fold 2 of 3", "Fold 3 of 3"]
    assert [
        f"the other {30 - size} rows" in line for size, line in zip(sizes, said, strict=True)
    ] == [True] * 3

    def groupless() -> None:
        cross_validation.text_numbers = lambda records: np.arange(len(records))

    words = words_of(
        tiny_model, tmp_path / "broken", files, train_file=path, num_train_epochs=1, max_length=24
    )
    run_ranks(1, predict_rows, words, 3, groupless, timeout=300)
    by_row = assign_folds((records.label_indices == 1).astype(int), np.arange(30), 3, 42)
    assert count_leaked_rows(records, by_row, tmp_path / "broken", 3) > 0


def test_a_fold_s_folder_of_somebody_else_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.tsv", make_rows(12, seed=3))
    theirs = tmp_path / "out" / "folds" / "1" / "train.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("their own folds")
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 2), train_file=path)

    def tell(accelerator: Accelerator) -> str:
        with pytest.raises(ConfigError) as error:
            predict_rows(accelerator, words, 3)
        return str(error.value)

    (told, again) = run_ranks(2, tell)
    assert told == again and f"{theirs.parent} holds 'train.jsonl', which no run wrote" in told
    assert theirs.read_text() == "their own folds"
    assert not (tmp_path / "out" / "folds" / "0" / "train.jsonl").exists()


def test_too_few_texts_for_the_folds_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.tsv",
        [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "A", "label": "y"}],
    )
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 2), train_file=path)

    def tell(accelerator: Accelerator) -> str:
        with pytest.raises(DataError) as error:
            predict_rows(accelerator, words, 3)
        return str(error.value)

    assert run_ranks(1, tell) == [
        "rows.tsv has 2 different texts, too few for --folds 3; expected at least one per fold."
    ]


def test_with_a_trained_model_columns_and_labels_are_those_of_its_training(tmp_path: Path) -> None:
    labels = [*["1", "2"] * 15, "other"]
    rows = [{"a": "a", "b": f"b{i}", "c": "c", "label": x} for i, x in enumerate(labels)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    asked: list[Records] = []
    predictor = SimpleNamespace(
        task=SingleLabel(("1", "2", "other")),
        tokenizer=None,
        max_length=8,
        metadata={"text_column": "a", "text_pair_column": "b"},
        predict_logits=lambda records: asked.append(records) or torch.zeros(len(records), 3),
    )
    log: Any = SimpleNamespace(say=lambda *lines: None, enabled=False)
    alone: Any = SimpleNamespace(num_processes=1)
    commands = label_issues.Commands(lambda run: True, lambda folder: predictor, alone, log)
    for words, text in (([], "a"), (["--text_column", "c"], "c")):
        arguments = ["--model", "m", "--train_file", str(path), "--on_bad_row", "skip", *words]
        found = label_issues._predict_with_model(*read_label_issue_config(arguments), commands)
        assert asked[-1].texts.to_pylist() == [text] * 31
        assert asked[-1].pairs.to_pylist() == [f"b{i}" for i in range(31)]
        assert found.targets.tolist() == [*[0, 1] * 15, 2]


ROWS, WRONG = 400, 40


def noisy_labels(outputs: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Labels (ROWS,), of which a tenth is wrong, correct probabilities (ROWS, outputs), wrong."""
    random = np.random.default_rng(seed)
    truth = random.integers(outputs, size=ROWS)
    logits = random.normal(size=(ROWS, outputs)) + 4 * np.eye(outputs)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = np.zeros(ROWS, bool)
    wrong[random.permutation(ROWS)[:WRONG]] = True
    return np.where(wrong, (truth + 1) % outputs, truth), probabilities, wrong


def recall_at_top(order: Any, wrong: Any) -> float:
    """Of the wrong labels, how many are among the first WRONG."""
    return float(wrong[order[:WRONG]].sum() / wrong.sum())


@pytest.mark.parametrize("rank_by", RANKINGS)
@pytest.mark.parametrize("outputs", [2, 5])
def test_wrong_labels_rank_first(rank_by: str, outputs: int) -> None:
    labels, probabilities, wrong = noisy_labels(outputs)
    ranking = rank_label_issues(
        "single_label_classification", labels, probabilities.argmax(1), probabilities, rank_by
    )
    assert sorted(ranking.order) == list(range(ROWS))
    assert recall_at_top(ranking.order, wrong) > 0.8
    assert wrong[ranking.issues].mean() > 0.8 and ranking.issues[wrong].mean() > 0.6


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_shuffled_probabilities_do_not_rank_wrong_labels_first(rank_by: str) -> None:
    labels, probabilities, wrong = noisy_labels(3)
    other = np.random.default_rng(1).permutation(probabilities)
    ranking = rank_label_issues(
        "single_label_classification", labels, other.argmax(1), other, rank_by
    )
    assert recall_at_top(ranking.order, wrong) < 0.25  # a tenth is chance


def test_labels_that_the_model_predicts_are_not_issues() -> None:
    _, probabilities, _ = noisy_labels(3)
    ranking = rank_label_issues(
        "single_label_classification",
        probabilities.argmax(1),
        probabilities.argmax(1),
        probabilities,
    )
    assert not ranking.issues.any()


def test_only_confident_learning_ranks_all_issues_first() -> None:
    labels, probabilities, _ = noisy_labels(5)
    marked = {}
    for rank_by in RANKINGS:
        ranking = rank_label_issues(
            "single_label_classification", labels, probabilities.argmax(1), probabilities, rank_by
        )
        marked[rank_by] = ranking.issues[ranking.order].astype(int)
    assert (np.diff(marked["confident_learning"]) <= 0).all()
    assert any(
        (np.diff(order) > 0).any()
        for rank_by, order in marked.items()
        if rank_by != "confident_learning"
    )


def test_order_is_by_score_then_by_row() -> None:
    probabilities = np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    ranking = rank_label_issues(
        "single_label_classification",
        np.array([0, 1, 1, 1]),
        probabilities.argmax(1),
        probabilities,
    )
    assert ranking.order.tolist() == [1, 0, 2, 3]
    assert ranking.scores == pytest.approx([0.5, 0.1, 0.5, 0.8])


def test_a_single_label_is_compared_with_the_predictions() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    ranking = rank_label_issues(
        "single_label_classification", np.zeros(3, int), probabilities.argmax(1), probabilities
    )
    assert ranking.order.tolist() == [1, 2, 0] and ranking.issues.tolist() == [False, True, False]


def test_model_labels_without_rows_have_no_effect() -> None:
    labels, probabilities, wrong = noisy_labels(3)
    wider = np.concatenate([probabilities, np.full((ROWS, 1), 1e-6)], axis=1)
    ranking = rank_label_issues("single_label_classification", labels, wider.argmax(1), wider)
    assert recall_at_top(ranking.order, wrong) > 0.8


def noisy_multi_labels(seed: int = 0) -> tuple[Any, Any, Any]:
    """0/1 labels (ROWS, 4), the third always 0, the fourth always 1; probabilities; wrong rows."""
    random = np.random.default_rng(seed)
    truth = random.integers(2, size=(ROWS, 4))
    truth[:, 2:] = [0, 1]
    probabilities = 1 / (1 + np.exp(-(random.normal(size=(ROWS, 4)) + 8 * (truth - 0.5))))
    wrong = np.zeros(ROWS, bool)
    wrong[random.permutation(ROWS)[:WRONG]] = True
    labels = truth.astype(np.float32)
    labels[wrong, 0] = 1 - labels[wrong, 0]
    return labels, probabilities, wrong


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_wrong_multi_labels_rank_first(rank_by: str) -> None:
    labels, probabilities, wrong = noisy_multi_labels()
    ranking = rank_label_issues(
        "multi_label_classification",
        labels,
        (probabilities > 0.5).astype(int),
        probabilities,
        rank_by,
    )
    assert sorted(ranking.order) == list(range(ROWS))
    assert recall_at_top(ranking.order, wrong) > 0.8
    assert wrong[ranking.issues].mean() > 0.6


def test_shuffled_multi_label_probabilities_do_not_rank_wrong_labels_first() -> None:
    labels, probabilities, wrong = noisy_multi_labels()
    other = np.random.default_rng(1).permutation(probabilities)
    ranking = rank_label_issues(
        "multi_label_classification", labels, (other > 0.5).astype(int), other
    )
    assert recall_at_top(ranking.order, wrong) < 0.25


def test_some_rows_may_have_no_label_but_not_all() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.1], [0.3, 0.8]])
    predictions = (probabilities > 0.5).astype(int)
    ranking = rank_label_issues(
        "multi_label_classification", np.array([[0, 0], [0, 0], [0, 1]]), predictions, probabilities
    )
    assert ranking.order.tolist() == [0, 2, 1] and ranking.issues.tolist() == [True, False, False]
    with pytest.raises(DataError, match="No row has a label"):
        rank_label_issues(
            "multi_label_classification", np.zeros((3, 2)), predictions, probabilities
        )


def test_numbers_are_ranked_by_residual() -> None:
    random = np.random.default_rng(0)
    truth = random.uniform(0, 5, ROWS)
    said = (truth + random.normal(scale=0.2, size=ROWS) + 0.5).astype(
        np.float32
    )  # all a little too high: that is no doubt of any one
    given, wrong = truth.copy(), np.arange(ROWS) < WRONG
    given[wrong] += 2
    ranking = rank_label_issues("regression", given, said, said[:, None])
    assert recall_at_top(ranking.order, wrong) == 1 and (ranking.issues == wrong).mean() > 0.98
    assert ((ranking.scores >= 0) & (ranking.scores <= 1)).all()
    assert (
        recall_at_top(
            rank_label_issues("regression", given, random.permutation(said), said[:, None]).order,
            wrong,
        )
        < 0.4
    )


def test_exactly_predicted_numbers_are_not_issues() -> None:
    given = np.arange(10.0)
    assert (
        rank_label_issues("regression", given, given, given[:, None]).scores.tolist() == [1.0] * 10
    )
    one_off = np.where(np.arange(10) == 3, 7.0, given)
    ranking = rank_label_issues("regression", one_off, given, given[:, None])
    assert ranking.order[0] == 3 and ranking.issues.tolist() == (np.arange(10) == 3).tolist()


def test_a_prediction_that_is_not_finite_is_named() -> None:
    probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]])
    with pytest.raises(DataError, match="prediction for row 1 is not a number"):
        rank_label_issues(
            "single_label_classification", np.array([0, 1]), np.array([0, 0]), probabilities
        )


def test_a_missing_cleanlab_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return import_(name, *rest)

    import_cleanlab()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError,
        match=r"^Finding label issues needs cleanlab.*pip install 'bertdist\[noise\]'\.$",
    ):
        import_cleanlab()


def test_the_module_does_not_need_cleanlab_to_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import bertdist.data_quality.label_issues as module

    seen: Sequence[str] = [name for name in vars(importlib.reload(module)) if "cleanlab" in name]
    assert seen == ["import_cleanlab"]


ORDER = LabelIssues(np.array([2, 0, 1]), np.array([0.4, 0.9, 0.1]), np.array([False, False, True]))


def source(path: Path, **columns: Any) -> Records:
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return load_records(DataConfig(train_file=[str(write_rows(path, rows))]), "train")


def entries(
    records: Records, task: Task, targets: Any, predictions: Any, probabilities: Any
) -> list[dict[str, Any]]:
    found = list(
        label_issue_entries(
            records, task, np.array(targets), np.array(predictions), np.array(probabilities), ORDER
        )
    )
    return [json.loads(line) for line in map(json.dumps, found)]


def test_one_entry_per_row_lowest_label_quality_first(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.csv", text=["a\nb", "c", "d"], label=["bad", "good", "good"])
    found = entries(
        records,
        SingleLabel(("bad", "good")),
        [0, 1, 1],
        [1, 1, 0],
        [[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]],
    )
    assert found == [
        {
            "row": 2,
            "file": "rows.csv",
            "line": 5,
            "label": "good",
            "suggested": "bad",
            "probability": 0.9,
            "score": 0.1,
            "issue": True,
        },
        {
            "row": 0,
            "file": "rows.csv",
            "line": 2,
            "label": "bad",
            "suggested": "good",
            "probability": 0.6,
            "score": 0.4,
            "issue": False,
        },
        {
            "row": 1,
            "file": "rows.csv",
            "line": 4,
            "label": "good",
            "suggested": "good",
            "probability": 0.9,
            "score": 0.9,
            "issue": False,
        },
    ]


def test_rows_of_a_file_without_lines_have_none(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.parquet", text=["a", "b", "c"], label=["bad", "good", "good"])
    found = entries(
        records,
        SingleLabel(("bad", "good")),
        [0, 1, 1],
        [1, 1, 0],
        [[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]],
    )
    assert [entry["line"] for entry in found] == [None] * 3


def test_rows_of_several_files_have_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (
        write_rows(tmp_path / name, [{"text": name, "label": label} for label in ("bad", "good")])
        for name in ("a.csv", "b.csv")
    )
    records = load_records(DataConfig(train_file=[str(one), str(two)]), "train")
    ranking = LabelIssues(np.arange(4), np.full(4, 0.5), np.zeros(4, bool))
    answers = np.array([0, 0, 1, 0]), np.full((4, 2), 0.5)
    found = list(
        label_issue_entries(
            records, SingleLabel(("bad", "good")), np.array([0, 1, 0, 1]), *answers, ranking
        )
    )
    assert [(entry["row"], entry["file"], entry["line"]) for entry in found] == [
        (0, "a.csv", 2),
        (1, "a.csv", 3),
        (2, "b.csv", 2),
        (3, "b.csv", 3),
    ]
    assert re.search(r" b\.csv +3 ", shown(found, records, capsys))


def test_multi_label_probability_is_the_highest_against_a_label(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.jsonl", text=["a", "b", "c"], label=[["x"], [], ["x", "y"]])
    probabilities = [[0.9, 0.2], [0.1, 0.3], [0.8, 0.05]]
    found = entries(
        records,
        MultiLabel(("x", "y")),
        [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]],
        [[1, 0], [0, 0], [1, 0]],
        probabilities,
    )
    assert [(entry["label"], entry["suggested"], entry["probability"]) for entry in found] == [
        (["x", "y"], ["x"], 0.95),
        (["x"], ["x"], 0.2),
        ([], [], 0.3),
    ]


def test_numbers_have_no_probability(tmp_path: Path) -> None:
    records = source(tmp_path / "rows.jsonl", text=["a", "b", "c"], label=[0.5, 1.5, 2.5])
    found = entries(
        records,
        Regression(("label",)),
        [0.5, 1.5, 2.5],
        np.array([1, 2, 0], np.float32),
        [[1], [2], [0]],
    )
    assert found[0] == {
        "row": 2,
        "file": "rows.jsonl",
        "line": 3,
        "label": 2.5,
        "suggested": 0.0,
        "score": 0.1,
        "issue": True,
    }


@pytest.mark.parametrize(
    ("given", "suggested", "found"),
    [
        ("a", "b", [("a", "b")]),
        ("a", "a", []),
        (["x", "y"], ["y", "z"], [("x", "(none)"), ("(none)", "z")]),
        (["x"], ["x"], []),
        (1.0, 2.0, []),
    ],
)
def test_label_changes(given: Any, suggested: Any, found: list[tuple[str, str]]) -> None:
    assert label_changes(given, suggested) == found


def shown(
    found: list[dict[str, Any]],
    records: Records,
    capsys: pytest.CaptureFixture[str],
    width: str = "200",
) -> str:
    log = RunLogger(Path(), enabled=True)
    log.screen.console.width = int(width)
    show_label_issues(found, records, None, log)
    return capsys.readouterr().err


def test_the_table_escapes_texts_and_counts_label_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["[red]a[/red] \x1b[31m", "b " * 100, "c\td"]
    records = source(tmp_path / "rows.csv", text=texts, label=["bad", "[b]good", "[b]good"])
    found = entries(
        records,
        SingleLabel(("[b]good", "bad")),
        [1, 0, 0],
        [0, 0, 1],
        [[0.6, 0.4], [0.9, 0.1], [0.1, 0.9]],
    )
    said = shown(found, records, capsys)
    assert "[red]a[/red] \\x1b[31m" in said and "\x1b" not in said and "[b]good" in said
    assert "b b b ..." in said and "c d" in said and "0.900" in said
    assert (
        "1 of 3 labels (33.3%) are likely errors." in said and "--output label_issues.jsonl" in said
    )
    pairs = said[said.index("Likely label errors") :].splitlines()
    assert pairs[4].split() == ["[b]good", "bad", "1"]


def test_the_table_shows_the_first_rows_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = source(
        tmp_path / "rows.csv", text=[f"text-{at}" for at in range(50)], label=["a", "b"] * 25
    )
    found = [
        {
            "row": row,
            "file": "rows.csv",
            "line": row + 2,
            "label": "a",
            "suggested": "b",
            "probability": 0.9,
            "score": 0.1,
            "issue": True,
        }
        for row in range(50)
    ]
    said = shown(found, records, capsys)
    assert said.count("text-") == SHOWN_ROWS and "50 of 50 labels (100.0%)" in said
