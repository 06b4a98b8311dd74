"""Folds are a partition, stratified, a pure function of the seed; what a run learns from is not in the fold that it is asked about."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from rows import make_rows, words_of, write_rows, write_split

from bertdist.core.args import read_config
from bertdist.core.config import DataConfig, TaskConfig
from bertdist.core.errors import DataError
from bertdist.data.loading import load_records
from bertdist.data.records import Records, records_of
from bertdist.data.stats import create_task, label_stats_of
from bertdist.data_quality import label_issues as folds
from bertdist.data_quality.label_issues import cut, groups_of, subset

ALONE = np.arange(300)  # every row a text of its own


def spread(labels: Any, fold_of_row: Any, k: int) -> int:
    """Of a label's rows, the most that a fold has more than another, over all labels."""
    counts = [np.bincount(fold_of_row[labels == label], minlength=k) for label in np.unique(labels)]
    return max(int(count.max() - count.min()) for count in counts)


@given(
    st.lists(st.integers(0, 4), min_size=10, max_size=80), st.integers(2, 10), st.integers(0, 1000)
)
def test_folds_are_a_partition_and_have_equally_many_rows_of_every_label(
    labels: list[int], k: int, seed: int
) -> None:
    given_labels = np.array(labels)
    found = cut(given_labels, np.arange(len(labels)), k, seed)
    sizes = np.bincount(found, minlength=k)
    assert len(found) == len(labels) and len(sizes) == k and sizes.max() - sizes.min() <= 1
    assert spread(given_labels, found, k) <= 1


def test_folds_by_chance_would_not_be_stratified() -> None:
    labels = ALONE % 3
    assert spread(labels, np.random.default_rng(0).integers(5, size=300), 5) > 1
    assert spread(labels, cut(labels, ALONE, 5, 0), 5) <= 1


def test_folds_are_a_pure_function_of_the_seed() -> None:
    labels = ALONE % 3
    assert cut(labels, ALONE, 4, 1).tolist() == cut(labels, ALONE, 4, 1).tolist()
    assert cut(labels, ALONE, 4, 1).tolist() != cut(labels, ALONE, 4, 2).tolist()


def test_rows_of_one_group_stay_together() -> None:
    groups = ALONE // 3
    found = cut(ALONE % 2, groups, 4, 0)
    assert all(len(set(found[groups == group])) == 1 for group in set(groups))
    apart = cut(ALONE % 2, ALONE, 4, 0)
    assert any(len(set(apart[groups == group])) > 1 for group in set(groups))


def test_the_rarest_of_several_labels_is_in_every_fold() -> None:
    labels = np.random.default_rng(0).random((300, 6)) < np.array(
        [0.6, 0.5, 0.4, 0.1, 0.05, 0.0167]
    )
    found = cut(labels.astype(float), ALONE, 5, 0)
    for column in labels.T:
        counts = np.bincount(found[column], minlength=5)
        assert counts.max() - counts.min() <= 8
    rarest = labels[:, labels.sum(0).argmin()]
    counts = np.bincount(found[rarest], minlength=5)
    assert counts.max() - counts.min() <= 1


def test_numbers_are_dealt_over_their_whole_range() -> None:
    numbers = np.random.default_rng(0).normal(size=300)
    found = cut(numbers, ALONE, 3, 0)
    means = [numbers[found == fold].mean() for fold in range(3)]
    assert max(means) - min(means) < 0.05
    by_chance = [
        numbers[part].mean()
        for part in np.array_split(np.random.default_rng(1).permutation(300), 3)
    ]
    assert max(by_chance) - min(by_chance) > max(means) - min(means)


def test_texts_that_differ_in_case_and_white_space_only_are_one_group() -> None:
    records = records_of(["A film.", "another", "a  FILM. ", "A film"])
    assert groups_of(records).tolist() == [0, 1, 0, 2]
    pairs = records_of(["a", "a", "A"], ["b", "c", "b "])
    assert groups_of(pairs).tolist() == [0, 1, 0]


def test_some_rows_of_a_source_are_told_by_their_place_in_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.tsv", make_rows(6))
    records = load_records(DataConfig(train_file=[str(path)]), "train")
    some = subset(records, np.array([4, 1]))
    assert [some[0].text, some[1].text] == [records[4].text, records[1].text] and len(some) == 2
    assert some.where(0) == "rows.tsv line 6" and some.lengths().tolist() == [
        len(records[4].text),
        len(records[1].text),
    ]


KINDS = {  # of labels: rows of a file, what a fold's file must hold of the first
    "text": ([{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(12)], "a"),
    "integer": ([{"text": f"text {at}", "label": at % 2} for at in range(12)], 0),
    "number": ([{"text": f"text {at}", "label": at / 4} for at in range(12)], 0.0),
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
    task = create_task(TaskConfig(), label_stats_of(records), None)
    run = folds._run_of_fold(config, tmp_path / "out" / "folds" / "0", task, records)
    folds._write_rows(folds._file_of(run), records, np.array([0, 1, 2, 5]))
    again = load_records(run.data, "train")
    assert again[0].label == (tuple(first) if isinstance(first, list) else first)
    assert [again[at].label for at in range(4)] == [records[at].label for at in (0, 1, 2, 5)]
    assert again.label_kind == records.label_kind == kind
    one = create_task(run.task, label_stats_of(again), None)
    assert one.problem_type == task.problem_type and (kind == "number" or one.labels == task.labels)


def test_a_fold_without_a_rare_label_has_all_outputs_all_the_same(tmp_path: Path) -> None:
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
    task = create_task(TaskConfig(), label_stats_of(records), None)
    run = folds._run_of_fold(config, tmp_path / "out", task, records)
    folds._write_rows(tmp_path / "out" / "train.jsonl", records, np.arange(9))
    assert (
        create_task(run.task, label_stats_of(load_records(run.data, "train")), None).labels
        == task.labels
        == ("negative", "odd", "positive")
    )


def answer(
    accelerator: Accelerator, words: list[str], k: int, breaking: Any = None
) -> tuple[Any, Any, list[str]]:
    """Logits of all rows, their folds, and what was said, on this rank."""
    if breaking is not None:
        breaking()
    config = read_config(words)
    records = load_records(config.data, "train")
    task = create_task(config.task, label_stats_of(records), None)
    assert records.label_codes is not None
    targets = np.array([task.target(value) for value in records.label_values])[records.label_codes]
    said: list[str] = []
    found = folds.answers_out_of_fold(
        config, k, records, targets, task, accelerator, lambda *lines: said.extend(lines)
    )
    return (
        None if found is None else found.numpy(),
        cut(targets, groups_of(records), k, config.run.seed),
        said,
    )


def own_rows_learned(records: Records, fold_of_row: Any, out: Path, k: int) -> int:
    """How many texts of a fold stand in what its run learned from, over all folds."""
    found = 0
    for fold in range(k):
        lines = (out / "folds" / str(fold) / "train.jsonl").read_text(encoding="utf-8").splitlines()
        learned = {" ".join(json.loads(line)["text"].lower().split()) for line in lines}
        found += sum(
            " ".join(records[int(row)].text.lower().split()) in learned
            for row in np.flatnonzero(fold_of_row == fold)
        )
    return found


def test_no_row_is_judged_by_a_model_that_has_learned_it(tiny_model: Path, tmp_path: Path) -> None:
    rows = make_rows(26, seed=3)
    rows += [
        {**row, "text": row["text"].upper()} for row in rows[:4]
    ]  # the same texts again, as a reader sees them
    files = write_split(tmp_path, 2)
    path = write_rows(tmp_path / "rows.tsv", rows)
    words = words_of(
        tiny_model, tmp_path / "out", files, train_file=path, num_train_epochs=1, max_length=24
    )
    ((logits, fold_of_row, said),) = run_ranks(1, answer, words, 3, timeout=300)
    records = load_records(read_config(words).data, "train")
    assert logits.shape == (30, 2) and np.abs(logits).min() > 0
    assert own_rows_learned(records, fold_of_row, tmp_path / "out", 3) == 0
    sizes = [int((fold_of_row == fold).sum()) for fold in range(3)]
    assert [line.split(":")[0] for line in said] == ["Fold 1 of 3", "Fold 2 of 3", "Fold 3 of 3"]
    assert [
        f"the other {30 - size} rows" in line for size, line in zip(sizes, said, strict=True)
    ] == [True] * 3

    def groupless() -> None:
        folds.groups_of = lambda records: np.arange(len(records))

    words = words_of(
        tiny_model, tmp_path / "broken", files, train_file=path, num_train_epochs=1, max_length=24
    )
    run_ranks(1, answer, words, 3, groupless, timeout=300)
    by_row = cut((records.label_codes == 1).astype(int), np.arange(30), 3, 42)
    assert own_rows_learned(records, by_row, tmp_path / "broken", 3) > 0


def test_too_few_texts_for_the_folds_are_told(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.tsv",
        [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "A", "label": "y"}],
    )
    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 2), train_file=path)

    def tell(accelerator: Accelerator) -> str:
        with pytest.raises(DataError) as error:
            answer(accelerator, words, 3)
        return str(error.value)

    assert run_ranks(1, tell) == [
        "rows.tsv has 2 different texts, too few for --folds 3; expected at least one a fold."
    ]
