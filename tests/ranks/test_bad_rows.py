"""--on_bad_row: a row that cannot be read never loses another one, in memory or in a stream, on any ranks, over restarts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import RankError, run_ranks
from rows import (
    Files,
    assert_same_tensors,
    at_step,
    die,
    json_of,
    last_checkpoint,
    make_rows,
    not_utf8,
    rows_by_step,
    run_main,
    run_train,
    tensors_of,
    words_of,
)

from bertdist.data import records

BROKEN = ["a row of one field", "three\tfields\tin a row", "no label\t"]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """20 rows, and three that are none behind rows 4, 9 and 14: lines 7, 13 and 19."""
    lines = ["text\tlabel"]
    for number, row in enumerate(make_rows(20)):
        lines += [BROKEN[number // 5 - 1]] if number and number % 5 == 0 else []
        lines.append(f"{row['text']}\t{'good' if number % 2 else 'bad'}")
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines) + "\n")
    return Files(path)


@pytest.fixture
def parquet(tmp_path: Path) -> Files:
    """The same 20 rows, and three whose text is not UTF-8: rows 5, 11 and 17."""
    rows = make_rows(20)
    texts, labels = (
        [row["text"] for row in rows],
        [("bad", "good")[number % 2] for number in range(20)],
    )
    for row in (5, 11, 17):
        texts.insert(row, "broken")
        labels.insert(row, "good")
    path = tmp_path / "train.parquet"
    pq.write_table(
        pa.table({"text": not_utf8(texts, [5, 11, 17]), "label": labels}), path, row_group_size=4
    )
    return Files(path)


def told(out: Path) -> list[tuple[str, int]]:
    return [(row["file"], row["line"]) for row in json_of(out / "bad_rows.jsonl")]


def words(model: Path, out: Path, files: Files, **settings: Any) -> list[str]:
    given = words_of(
        model,
        out,
        files,
        **{"on_bad_row": "skip", "num_train_epochs": 2, "save_every": "1 steps", **settings},
    )
    return [word for word in given if word != "False"]


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (1, {}),
        (2, {}),
        (1, {"streaming": True, "stream_window": 8}),
        (2, {"streaming": True, "dataloader_num_workers": 2}),
    ],
)
def test_the_others_are_learned_once_an_epoch_and_these_are_told_once(
    tiny_model: Path, tmp_path: Path, files: Files, n: int, settings: dict[str, Any]
) -> None:
    found = run_ranks(n, run_train, words(tiny_model, tmp_path / "out", files, **settings))
    steps = rows_by_step([seen for _, seen, _ in found])
    assert [
        sorted(row for number in of for row in steps[number]) for of in ((0, 1, 2), (3, 4, 5))
    ] == [list(range(20))] * 2
    assert told(tmp_path / "out") == [("train.tsv", 7), ("train.tsv", 13), ("train.tsv", 19)]
    reasons = [row["reason"] for row in json_of(tmp_path / "out" / "bad_rows.jsonl")]
    assert (
        "1 field, expected 2" in reasons[0]
        and "3 fields, expected 2" in reasons[1]
        and "label is missing" in reasons[2]
    )


@pytest.mark.parametrize("kind", ["files", "parquet"])
def test_a_run_that_was_killed_tells_them_once(
    tiny_model: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    files: Files = request.getfixturevalue(kind)
    settings = {
        "streaming": True,
        "stream_window": 8,
        "label_names": ["bad", "good"],
        "max_train_steps": 6,
        "save_every": "1 steps",
    }
    settings |= {"eval_every": None, "log_every": "1 steps"}
    run_ranks(1, run_train, words(tiny_model, tmp_path / "straight", files, **settings))
    for step in (2, 5):
        with pytest.raises(RankError):
            run_ranks(
                1,
                run_train,
                words(tiny_model, tmp_path / "out", files, **settings),
                at_step(step, die),
            )
    run_ranks(1, run_train, words(tiny_model, tmp_path / "out", files, **settings))
    assert [line for _, line in told(tmp_path / "out")] == (
        [5, 11, 17] if kind == "parquet" else [7, 13, 19]
    )
    assert (tmp_path / "out" / "bad_rows.jsonl").read_bytes() == (
        tmp_path / "straight" / "bad_rows.jsonl"
    ).read_bytes()
    assert_same_tensors(
        tensors_of(last_checkpoint(tmp_path / "out")),
        tensors_of(last_checkpoint(tmp_path / "straight")),
    )


def test_a_rank_whose_file_has_no_other_rows_tells_them(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("text\tlabel\n" + "a row of one field\n" * 5)
    settings = {
        "streaming": True,
        "stream_sharding": "by_file",
        "label_names": ["bad", "good"],
        "train_file": [files.train, other],
    }
    settings |= {"max_train_steps": 6, "num_train_epochs": None}
    ranks = run_ranks(2, run_train, words(tiny_model, tmp_path / "out", files, **settings))
    steps = rows_by_step([seen for _, seen, _ in ranks])
    assert sorted(row for number in range(5) for row in steps[number]) == list(range(20)), (
        "one rank has rows, 4 a step"
    )
    assert sorted(told(tmp_path / "out")) == [
        *(("other.tsv", line) for line in range(2, 7)),
        *(("train.tsv", line) for line in (7, 13, 19)),
    ]
    found = run_ranks(
        2, run_main, words(tiny_model, tmp_path / "few", files, max_bad_rows=7, **settings)
    )
    assert [code for code, _, _ in found] == [
        1,
        1,
    ] and "More than 7 rows cannot be read (--max_bad_rows)." in found[0][1]


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
def test_too_many_end_the_run_on_all_ranks_with_one_line(
    tiny_model: Path, tmp_path: Path, files: Files, streaming: dict[str, Any]
) -> None:
    found = run_ranks(
        2, run_main, words(tiny_model, tmp_path / "out", files, max_bad_rows=2, **streaming)
    )
    assert [code for code, _, _ in found] == [1, 1]
    assert "More than 2 rows cannot be read (--max_bad_rows)." in found[0][1]


def test_without_the_flag_the_first_one_is_named(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    for streaming in ({}, {"streaming": True}):
        (code, said, _), *_ = run_ranks(
            1, run_main, words(tiny_model, tmp_path / "out", files, on_bad_row="fail", **streaming)
        )
        assert code == 1 and "train.tsv line 7: 1 field, expected 2 as in the header" in said


def test_a_row_that_is_lost_beside_a_bad_one_is_seen(
    tiny_model: Path, tmp_path: Path, files: Files
) -> None:
    def careless(accelerator: Any) -> None:
        valid_rows = records.valid_rows

        def fewer(problems: Any, rows: int) -> Any:
            kept = valid_rows(problems, rows)
            if kept is not None:
                kept[0] = False
            return kept

        records.valid_rows = fewer

    found = run_ranks(1, run_train, words(tiny_model, tmp_path / "out", files), careless)
    steps = rows_by_step([seen for _, seen, _ in found])
    assert sorted(row for number in (0, 1, 2) for row in steps[number]) != list(range(20))
