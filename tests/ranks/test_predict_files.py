"""Files of predictions: the same bytes on any number of ranks, and after any number of kills."""

import gzip
import json
import os
from itertools import product
from pathlib import Path

import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Breaking,
    make_rows,
    run_main,
    run_train,
    some_of,
    words_of,
    write_rows,
    write_split,
)

from bertdist import predict
from bertdist.core import partial_file
from bertdist.core.partial_file import PartialFile
from bertdist.data import sharding

ROWS = 40
KINDS = ("jsonl", "csv", "csv.gz", "parquet")


@pytest.fixture(scope="module")
def words(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command without its output: 40 rows in two files."""
    folder = tmp_path_factory.mktemp("predict")
    run_ranks(
        1,
        run_train,
        words_of(tiny_model, folder / "out", write_split(folder, 40), num_train_epochs=1),
    )
    rows = [{"id": f"00{row}", **x} for row, x in enumerate(make_rows(ROWS, seed=9))]
    write_rows(folder / "a.tsv", rows[:25])
    write_rows(folder / "b.tsv", rows[25:])
    inputs = [str(folder / "a.tsv"), str(folder / "b.tsv")]
    command = ["--model", str(folder / "out" / "best"), "--input", *inputs, "--use_cpu"]
    return [*command, "--keep_columns", "id,label", "--top_k", "all"]


def small_windows(accelerator: Accelerator) -> None:
    """Windows of 4 rows, in blocks of one or a few texts; everything is saved at once."""
    predict.ROWS_PER_WINDOW = 4
    sharding.BLOCK_TOKENS = 30
    partial_file.SAVE_SECONDS = 0.0


def killed_at(part: int) -> Breaking:
    """Rank 0 is killed before it has written this part of its output (header: 0)."""

    def breaking(accelerator: Accelerator) -> None:
        small_windows(accelerator)
        append, count = PartialFile.append, [0]

        def counted(self: PartialFile, data: bytes) -> None:
            if count[0] == part:
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                os._exit(9)
            count[0] += 1
            append(self, data)

        PartialFile.append = counted  # type: ignore[method-assign]

    return breaking


def written(
    words: list[str], output: Path, n: int = 1, breaking: Breaking = small_windows
) -> bytes:
    results = run_ranks(n, run_main, [*words, "--output", str(output)], breaking, predict)
    assert [code for code, *_ in results] == [0] * n, results
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return output.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Format -> the file of one rank."""
    folders = {kind: tmp_path_factory.mktemp("one") for kind in KINDS}
    return {kind: written(words, folders[kind] / f"x.{kind}") for kind in KINDS}


def test_every_format_has_every_row(undisturbed: dict[str, bytes], words: list[str]) -> None:
    lines = [json.loads(line) for line in undisturbed["jsonl"].splitlines()]
    at = words.index("--input")
    assert [(line["file"], line["row"]) for line in lines] == [
        *((words[at + 1], row) for row in range(25)),
        *((words[at + 2], row) for row in range(15)),
    ]
    assert [line["id"] for line in lines] == [f"00{row}" for row in range(ROWS)]
    assert {line["input_label"] for line in lines} == {"negative", "positive"}
    assert all(len(line["labels"]) == 2 for line in lines)
    table = undisturbed["csv"].splitlines()
    assert table[0] == b"file,row,id,input_label,label,score_negative,score_positive"
    assert len(table) == 1 + ROWS
    assert gzip.decompress(undisturbed["csv.gz"]) == undisturbed["csv"]


@pytest.mark.parametrize(
    ("kind", "n"),
    some_of([("csv.gz", 2), ("parquet", 3)], product(("csv.gz", "parquet"), (2, 3))),
)
def test_the_same_bytes_on_any_number_of_ranks(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path, kind: str, n: int
) -> None:
    assert written(words, tmp_path / f"x.{kind}", n) == undisturbed[kind]


def test_other_micro_batches_give_other_bits(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The control: without blocks the bits depend on what is computed together."""

    def other(accelerator: Accelerator) -> None:
        small_windows(accelerator)
        sharding.BLOCK_TOKENS = 60

    assert written(words, tmp_path / "x.csv", breaking=other) != undisturbed["csv"]


@pytest.mark.parametrize(
    ("kind", "n", "kills"),
    [
        ("jsonl", 1, (3, 2, 4)),
        ("csv", 3, (4, 3, 1)),
        ("csv.gz", 1, (3, 2, 4)),
        ("parquet", 1, (3, 2, 4)),
    ],
)
def test_killed_three_times_and_continued_the_file_is_the_same(
    words: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    kind: str,
    n: int,
    kills: tuple[int, ...],
) -> None:
    output = tmp_path / f"x.{kind}"
    command = [*words, "--output", str(output)]
    saved = []
    for part in kills:
        with pytest.raises(RankError, match="ended with status 9"):
            run_ranks(n, run_main, command, killed_at(part), predict)
        assert not output.exists()
        state = json.loads((tmp_path / f".x.{kind}.partial.json").read_text())
        saved.append(state["state"]["rows"])
    assert saved == sorted(set(saved)) and saved[0] > 0 and saved[-1] < ROWS
    (code, said, _), *_ = run_ranks(n, run_main, command, small_windows, predict)
    assert code == 0 and f"Continuing after {saved[-1]} rows." in said
    assert output.read_bytes() == undisturbed[kind]
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_a_changed_command_begins_again(
    words: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "x.csv"
    command = [*words, "--output", str(output)]
    with pytest.raises(RankError):
        run_ranks(1, run_main, [*command, "--max_length", "4"], killed_at(3), predict)
    ((code, said, _),) = run_ranks(1, run_main, command, small_windows, predict)
    assert code == 0 and "is of another command (settings differ): beginning again." in said
    assert output.read_bytes() == undisturbed["csv"]


def test_a_row_that_cannot_be_read_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in make_rows(10)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    path.write_text(path.read_text() + "not json\n")
    output = tmp_path / "x.jsonl"
    command = [*words[:2], "--input", str(path), "--use_cpu", "--output", str(output)]
    ((code, said, _),) = run_ranks(1, run_main, command, None, predict)
    assert code == 1 and "in.jsonl line 11: not JSON" in said and not output.exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in.jsonl"]
