"""Sets that are smaller than one thinks of: fewer rows than ranks, one row, only texts longer than --max_length, one class, no row.

What can be trained is trained as on one rank; what cannot is one line before the model is loaded.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import (
    Breaking,
    Files,
    json_of,
    rows_by_step,
    run_main,
    run_train,
    some_of,
    step_log,
    tensors_of,
    words_of,
    write_rows,
)
from rows import train_module as train
from torch.testing import assert_close

from bertdist import predict
from bertdist.data.sharding import RankShard

LABELS = ("no", "yes")
TEXTS = ["a good film", "dull and bad", "so so"]
LONG = [" ".join(["good", "dull", "film"] * (20 + row)) for row in range(3)]


def files_of(folder: Path, texts: list[str], dev: list[str] | None = None) -> Files:
    folder.mkdir(exist_ok=True)
    made = []
    for name, some in (("train", texts), ("dev", texts if dev is None else dev)):
        rows = [{"text": text, "label": LABELS[row % 2]} for row, text in enumerate(some)]
        made.append(write_rows(folder / f"{name}.jsonl", rows))
    return Files(*made)


SETS: dict[str, tuple[list[str], dict[str, Any]]] = {  # one row has one label: the names are told
    "1 row": (TEXTS[:1], {"label_names": LABELS}),
    "2 rows": (TEXTS[:2], {}),
    "all rows too long": (LONG, {"max_length": 8}),
    "1 row too long": (LONG[:1], {"max_length": 8, "label_names": LABELS}),
}
STREAM: dict[str, Any] = {"streaming": True, "stream_window": 4}


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("which", SETS)
def test_small_sets_are_trained_and_scored_as_on_one_rank(
    tiny_model: Path, tmp_path: Path, which: str, stream: bool
) -> None:
    texts, settings = SETS[which]
    files = files_of(tmp_path, texts)
    settings = {"num_train_epochs": 3, **settings, **(STREAM if stream else {})}
    found = {}
    for n in (1, 3):
        ranks = run_ranks(
            n, run_train, words_of(tiny_model, tmp_path / f"out{n}", files, **settings)
        )
        assert rows_by_step([seen for _, seen, _ in ranks]) == {
            step: list(range(len(texts))) for step in range(3)
        }, "each row once an epoch"
        assert all(progress.finished and progress.rows == 3 * len(texts) for progress, *_ in ranks)
        found[n] = step_log(tmp_path / f"out{n}")
        assert [
            line["row"] for line in json_of(tmp_path / f"out{n}" / "predictions.jsonl")
        ] == list(range(len(texts)))
    assert len(found[1]) == 6
    for one, three in zip(found[1], found[3], strict=True):
        assert three == pytest.approx(one, abs=2e-5), (one, three)
    one, three = (tensors_of(tmp_path / f"out{n}" / "best") for n in (1, 3))
    for name, tensor in one.items():
        if not name.endswith(
            "key.bias"
        ):  # its gradient is 0 but for rounding, which AdamW makes steps of
            assert_close(three[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", some_of([3], [1]))
def test_a_small_set_is_predicted(tiny_model: Path, tmp_path: Path, n: int) -> None:
    files = files_of(tmp_path, TEXTS)
    run_ranks(1, run_train, words_of(tiny_model, tmp_path / "out", files, num_train_epochs=1))
    for texts in (TEXTS[:1], TEXTS[:2], LONG[:1], LONG):
        path = tmp_path / "input.txt"
        path.write_text("".join(f"{text}\n" for text in texts))
        words = [
            "--model",
            str(tmp_path / "out" / "best"),
            "--input",
            str(path),
            "--use_cpu",
            "--max_length",
            "8",
        ]
        written = []
        for ranks in (1, n):
            answers = run_ranks(
                ranks,
                run_main,
                [*words, "--output", str(tmp_path / "answers.jsonl")],
                None,
                predict,
            )
            assert {code for code, *_ in answers} == {0}, answers
            written.append(json_of(tmp_path / "answers.jsonl"))
        assert [line["row"] for line in written[0]] == list(range(len(texts)))
        assert written[0] == [
            {**line, "score": pytest.approx(line["score"], abs=1e-6)} for line in written[1]
        ]


def forget_the_first_row_of_small_steps(accelerator: Accelerator) -> None:
    """A broken deal: with fewer rows than ranks, one row is nobody's."""
    step = RankShard.step

    def broken(self: RankShard, rows: Any, number: int) -> Any:
        return step(self, rows[1:] if 1 < len(rows) < self.ranks else rows, number)

    RankShard.step = broken  # type: ignore[method-assign]


def test_a_row_that_is_nobody_s_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    """The control: the evaluation counts, and so does this file's own test."""
    files = files_of(tmp_path, TEXTS[:2])
    with pytest.raises(RankError, match="rows must be evaluated once; 1 are missing"):
        run_ranks(
            3,
            run_train,
            words_of(tiny_model, tmp_path / "a", files, num_train_epochs=1),
            forget_the_first_row_of_small_steps,
        )
    ranks = run_ranks(
        3,
        run_train,
        words_of(tiny_model, tmp_path / "b", Files(files.train), num_train_epochs=1),
        forget_the_first_row_of_small_steps,
    )
    assert len(rows_by_step([seen for _, seen, _ in ranks])[0]) == 1


# --- What cannot be trained is told before the model is loaded


def no_model(accelerator: Accelerator) -> None:
    def iterate_loader(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    train.load_classifier = iterate_loader
    predict.load_trained_classifier = iterate_loader


def told(
    words: list[str], n: int, breaking: Breaking | None = no_model, program: Any = train
) -> str:
    """The one complaint of a command, on all ranks together, without a traceback."""
    first, *others = run_ranks(n, run_main, words, breaking, program)
    assert first[0] == 1 and others == [(1, "", "")] * (n - 1), (first, others)
    *before, last = first[1].splitlines()
    assert last.startswith("bertdist: ") and not [
        line for line in before if line.startswith("bertdist: ")
    ], first[1]
    return last.removeprefix("bertdist: ")


NO_ROWS = {
    "empty.jsonl": "",
    "empty.tsv": "",
    "head.tsv": "text\tlabel\n",
    "blank.csv": "\n\n",
    "empty.parquet": None,
}


def no_rows(folder: Path, name: str) -> Path:
    content = NO_ROWS[name]
    if content is None:
        pyarrow.parquet.write_table(
            pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
            folder / name,
        )
        return folder / name
    (folder / name).write_text(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "n"), some_of([*zip(NO_ROWS, (1, 3, 3, 1, 3), strict=True)], product(NO_ROWS, (1, 3)))
)
def test_no_rows_are_one_line(tiny_model: Path, tmp_path: Path, name: str, n: int) -> None:
    files, empty = files_of(tmp_path, TEXTS), no_rows(tmp_path, name)
    for which in (Files(empty), files._replace(dev=empty)):
        assert f"{name} has no rows." in told(words_of(tiny_model, tmp_path / "out", which), n)
    assert f"{name} has no rows." in told(
        words_of(tiny_model, tmp_path / "out", Files(empty), **STREAM), n
    )


@pytest.mark.parametrize(
    ("n", "stream"), some_of([(1, True), (3, False)], product((1, 3), (False, True)))
)
def test_one_class_is_one_line(tiny_model: Path, tmp_path: Path, n: int, stream: bool) -> None:
    path = write_rows(tmp_path / "one.jsonl", [{"text": text, "label": "no"} for text in TEXTS])
    words = words_of(tiny_model, tmp_path / "out", Files(path), **(STREAM if stream else {}))
    assert (
        told(words, n)
        == "The training split has only the label 'no' in column 'label'; expected at least two."
    )


def test_one_class_of_two_that_are_named_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    """And a validation file of one class is scored: that is a set like another."""
    path = write_rows(tmp_path / "one.jsonl", [{"text": text, "label": "no"} for text in TEXTS])
    ((progress, *_),) = run_ranks(
        1,
        run_train,
        words_of(
            tiny_model, tmp_path / "a", Files(path, path), num_train_epochs=1, label_names=LABELS
        ),
    )
    assert progress.finished and step_log(tmp_path / "a", "eval")
    files = files_of(tmp_path, TEXTS)._replace(dev=path)
    for n in (1, 3):
        run_ranks(n, run_train, words_of(tiny_model, tmp_path / f"b{n}", files, num_train_epochs=1))
    assert step_log(tmp_path / "b3", "eval") == [
        pytest.approx(line, abs=2e-5) for line in step_log(tmp_path / "b1", "eval")
    ]
