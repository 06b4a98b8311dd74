"""`pipeline`, `Predictor` and the command line give the same predictions."""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from forked import run_ranks
from rows import make_rows, run_main, run_train, words_of, write_rows, write_split
from safetensors.torch import load_file, save_file
from transformers import pipeline

from bertdist import predict
from bertdist.core.errors import BertdistError, DataError
from bertdist.predict import Predictor

ROOT = Path(__file__).resolve().parents[2]

# The long ones of the texts are truncated, also by the pipeline.
pytestmark = pytest.mark.filterwarnings("ignore:--max_length 24 truncates")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a short run on one label per row."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(
        1,
        run_train,
        words_of(
            tiny_model,
            folder / "out",
            write_split(folder, 40, 8),
            num_train_epochs=3,
            max_length=24,
        ),
    )
    return folder / "out" / "best"


@pytest.fixture(scope="module")
def trained_on_pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a short regression on pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"sentence1": row["text"], "sentence2": "it is so", "score": f"{len(row['text']) / 30:.2f}"}
        for row in make_rows(24, seed=7)
    ]
    files = write_split(folder, 8)
    write_rows(files.train, rows)
    run_ranks(
        1,
        run_train,
        words_of(
            tiny_model, folder / "out", files, text_pair_column="sentence2", num_train_epochs=2
        ),
    )
    return folder / "out" / "best"


@pytest.fixture(scope="module")
def trained_on_sets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a short multi-label run."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [
        {
            "text": row["text"],
            "labels": [row["label"], "short"] if len(row["text"]) < 40 else [row["label"]],
        }
        for row in make_rows(24)
    ]
    files = write_split(folder, 8, kind="jsonl")
    write_rows(files.train, rows)
    run_ranks(1, run_train, words_of(tiny_model, folder / "out", files, num_train_epochs=3))
    return folder / "out" / "best"


def ask(
    accelerator: Accelerator, folder: Path, texts: list[str], pairs: list[str] | None = None
) -> tuple[list[Any], list[Any]]:
    """The predictions of `Predictor` and of `pipeline`, in one child."""
    mine = Predictor(folder, accelerator=accelerator)
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    inputs: Any = (
        texts
        if pairs is None
        else [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
    )
    options = {"truncation": True}
    if mine.task.problem_type == "multi_label_classification":
        return mine(texts), [classify(text, top_k=None, **options) for text in inputs]
    return mine(texts, pairs), [classify(text, **options) for text in inputs]


def as_one(answers: list[Any]) -> list[tuple[str, Any]]:
    answers = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    return [(answer["label"], pytest.approx(answer["score"], abs=1e-6)) for answer in answers]


TEXTS = [row["text"] for row in make_rows(15, seed=4)] + [
    "",
    "x",
    "an unknown-word: Ünïcode 北京 🙂",
    "dull " * 100,
]


def test_pipeline_gives_the_same_predictions(trained: Path) -> None:
    ((mine, theirs),) = run_ranks(1, ask, trained, TEXTS)
    assert as_one(mine) == as_one(theirs)
    assert {answer["label"] for answer in mine} <= {"negative", "positive"} and all(
        0.5 <= answer["score"] <= 1 for answer in mine
    )


def test_other_weights_give_other_predictions(
    trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The same comparison; one weight of the copy that pipeline reads is changed."""
    shutil.copytree(trained, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["classifier.bias"][0] += 0.01
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "other" / "manifest.json").unlink()
    ((mine, _),), ((_, theirs),) = (
        run_ranks(1, ask, trained, TEXTS),
        run_ranks(1, ask, tmp_path / "other", TEXTS),
    )
    assert as_one(mine) != as_one(theirs)


def test_pipeline_gives_the_same_predictions_for_pairs(trained_on_pairs: Path) -> None:
    pairs = [row["text"] for row in make_rows(len(TEXTS), seed=6)]
    ((mine, theirs),) = run_ranks(1, ask, trained_on_pairs, TEXTS, pairs)
    assert as_one(mine) == as_one(theirs)
    assert {answer["label"] for answer in mine} == {"score"}


def test_pipeline_gives_the_same_predictions_for_multi_label(trained_on_sets: Path) -> None:
    ((mine, theirs),) = run_ranks(1, ask, trained_on_sets, TEXTS)
    above = [
        [
            (entry["label"], pytest.approx(entry["score"], abs=1e-6))
            for entry in entries
            if entry["score"] > 0.5
        ]
        for entries in theirs
    ]
    assert [
        [(entry["label"], entry["score"]) for entry in answer["labels"]] for answer in mine
    ] == above
    assert any(above) and {entry["label"] for entries in theirs for entry in entries} == {
        "negative",
        "positive",
        "short",
    }


def predict_with_memory(
    accelerator: Accelerator, folder: Path, fits: int
) -> tuple[list[Any], int | None, list[int]]:
    """Predictions if memory fits `fits` tokens; the chosen size, and the sizes that were tried."""
    predict.MEASURED_FROM = 0
    mine = Predictor(folder, accelerator=accelerator)
    forward, tried = mine.model.forward, []

    def limited(batch: Any) -> Any:
        if len(batch.lengths) > 1:
            tried.append(sum(batch.lengths))
            if tried[-1] > fits:
                raise MemoryError
        return forward(batch)

    mine.model.forward = limited
    return mine(TEXTS), mine.tokens_per_micro_batch, tried


def test_predictions_are_the_same_after_out_of_memory(trained: Path) -> None:
    """The size is chosen at the first call; what is still too large is computed in halves."""
    ((plenty, found, tried),) = run_ranks(1, predict_with_memory, trained, 10**9)
    assert found == 8192 and len(tried) == 1
    ((little, found, tried),) = run_ranks(1, predict_with_memory, trained, 70)
    assert found == 8192 and max(tried) > 70 and min(tried) <= 70
    assert as_one(little) == as_one(plenty)


def test_the_command_line_gives_the_same_predictions(trained: Path, tmp_path: Path) -> None:
    """Texts of a file, rows in its order, the column that the training read. The pipe below is a real process."""
    write_rows(tmp_path / "in.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    words = ["--model", str(trained), "--input", str(tmp_path / "in.jsonl"), "--use_cpu"]
    ((code, said, answered),) = run_ranks(1, run_main, words, None, predict)
    truncated = r"--max_length 24 truncates \S+ of the texts; the longest has 102 tokens.\n"
    assert code == 0 and re.fullmatch(truncated, said)
    lines = [json.loads(line) for line in answered.splitlines()]
    ((mine, _),) = run_ranks(1, ask, trained, TEXTS)
    assert lines == [{"row": row, **answer} for row, answer in enumerate(mine)]


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet", "txt"])
def test_every_file_format_gives_the_same_predictions(
    trained: Path, tmp_path: Path, kind: str
) -> None:
    texts = [text for text in TEXTS if text]
    path = tmp_path / f"in.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    else:
        write_rows(path, [{"text": text} for text in texts])
    words = [
        "--model",
        str(trained),
        "--input",
        str(path),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--use_cpu",
    ]
    ((code, said, answered),) = run_ranks(1, run_main, words, None, predict)
    assert (code, answered) == (0, "") and said.startswith("--max_length 24 truncates ")
    ((mine, _),) = run_ranks(1, ask, trained, texts)
    written = [
        json.loads(line)
        for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert written == [{"row": row, **answer} for row, answer in enumerate(mine)]


def test_texts_on_the_command_line_are_printed_beside_label_and_score(trained: Path) -> None:
    words = ["--model", str(trained), "--use_cpu", "--text", "fun and great", "so dull"]
    ((code, said, answered),) = run_ranks(1, run_main, words, None, predict)
    ((mine, _),) = run_ranks(1, ask, trained, ["fun and great", "so dull"])
    assert (code, said) == (0, "") and answered == "".join(
        f"{answer['label']}\t{answer['score']:.4f}\t{text}\n"
        for answer, text in zip(mine, ["fun and great", "so dull"], strict=True)
    )
    words += ["--top_k", "all"]
    ((code, said, answered),) = run_ranks(1, run_main, words, None, predict)
    assert code == 0 and [line.count("\t") for line in answered.splitlines()] == [2, 1, 2, 1]


def test_a_pipe_is_read_and_a_closed_one_ends_quietly(trained: Path) -> None:
    """Standard input without an end, into a program that reads one line."""
    command = f"{sys.executable} -m bertdist.predict --model {trained} --use_cpu --input -"
    done = subprocess.run(
        ["bash", "-c", f"yes 'fun and great' | {command} | head -1; echo ${{PIPESTATUS[1]}}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,  # of a crowded machine
        check=True,
    )
    line, code = done.stdout.splitlines()
    ((mine, _),) = run_ranks(1, ask, trained, ["fun and great"])
    label, score = json.loads(line)["label"], json.loads(line)["score"]
    assert (label, score) == as_one(mine)[0] and (code, done.stderr) == ("0", "")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_input_without_rows_gives_an_output_without_rows(
    trained: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "in.tsv").write_text("text\tid\n")
    (tmp_path / "zero.csv").touch()
    for name in ("in.tsv", "zero.csv"):
        output = tmp_path / f"out.{kind}"
        words = ["--model", str(trained), "--use_cpu", "--input", str(tmp_path / name)]
        words += ["--output", str(output)]
        said = f"Written: {output}, 0 rows.\n"
        assert run_ranks(1, run_main, words, None, predict) == [(0, said, "")]
        assert output.read_text() == ("row,label,score\n" if kind == "csv" else "")


class Column(list[str]):
    """A column of a table."""


class Table:
    """As pandas and polars have it."""

    columns = ("review", "text", "other")

    def __getitem__(self, name: str) -> Column:
        return Column([f"{name} fun", f"{name} dull and bad"])


def test_predictor_in_python(trained: Path) -> None:
    """Probabilities, several labels, tables and the name of a predictor."""

    def all_answers(accelerator: Accelerator) -> Any:
        predictor = Predictor(trained, accelerator=accelerator)
        texts = ["text fun", "text dull and bad"]
        frames: list[Any] = [Table()]
        for library in ("pandas", "polars"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(library)
                frames.append(module.DataFrame({"text": texts, "other": ["a", "b"]}))
        frames.append(datasets.Dataset.from_dict({"text": texts, "other": ["a", "b"]}))
        problems = []
        for arguments, options in (
            ((Table(), ["a", "b"]), {}),
            ((texts,), {"text_column": "text"}),
            ((Table(),), {"text_column": "txt"}),
            ((texts,), {"top_k": 0}),
        ):
            with pytest.raises(BertdistError) as caught:
                predictor(*arguments, **options)  # type: ignore[arg-type]
            problems.append(str(caught.value))
        return (
            predictor.labels,
            repr(predictor),
            predictor.probabilities(texts),
            predictor.probabilities([]).shape,
            predictor(texts),
            predictor(texts, top_k="all"),
            [predictor(frame) for frame in frames],
            [x["label"] for x in predictor(texts, threshold=1.0)],
            predictor(Table(), text_column="review")
            == predictor(["review fun", "review dull and bad"]),
            problems,
        )

    ((labels, name, p, empty, plain, ranked, of_tables, unsure, same, problems),) = run_ranks(
        1, all_answers
    )
    assert labels == ("negative", "positive") and empty == (0, 2)
    assert name == (
        f"Predictor({str(trained)!r}, single_label_classification, labels: 'negative', 'positive';"
        " device cpu, max_length 24)"
    )
    assert p.shape == (2, 2) and p.dtype == np.float32 and p.sum(1) == pytest.approx([1, 1])
    assert [x["score"] for x in plain] == p.max(1).tolist()
    assert [x["label"] for x in plain] == [labels[i] for i in p.argmax(1)]
    assert [x["labels"][0] for x in ranked] == plain
    assert [sorted(y["score"] for y in x["labels"]) for x in ranked] == [
        sorted(x) for x in p.tolist()
    ]
    assert len(of_tables) >= 2 and all(answers == plain for answers in of_tables)
    assert unsure == [None, None] and same is True
    assert [problem[:30] for problem in problems] == [
        "The texts are a table: name it",
        "text_column and text_pair_colu",
        "Table: there is no column 'txt",
        "top_k is 0; expected a number ",
    ]


def test_a_text_alone_or_in_a_batch_has_the_same_prediction(trained: Path) -> None:
    """Rows of one batch do not affect each other."""

    def alone(accelerator: Accelerator) -> list[Any]:
        predictor = Predictor(trained, accelerator=accelerator)
        return [predictor([text])[0] for text in TEXTS]

    ((together, _),), (one_by_one,) = (
        run_ranks(1, ask, trained, TEXTS),
        run_ranks(1, alone),
    )
    assert as_one(together) == as_one(one_by_one)


def test_a_model_of_pairs_needs_pairs_and_one_of_single_texts_refuses_them(
    trained: Path, trained_on_pairs: Path, tmp_path: Path
) -> None:
    def ask_each(accelerator: Accelerator, folder: Path) -> list[Any]:
        predictor, answers = Predictor(folder, accelerator=accelerator), []
        for arguments in ((["it is"],), ("it is", "so"), (iter(["it is"]), ("so",)), ("it is",)):
            try:
                answers.append(as_one(predictor(*arguments)))
            except DataError as error:
                answers.append(str(error))
        return answers

    (single,), (pairs,) = (run_ranks(1, ask_each, folder) for folder in (trained, trained_on_pairs))
    unexpected = (
        "The model was trained on single texts, not on pairs: remove pairs=, --text_pair or "
        "--text_pair_column."
    )
    missing = (
        "The model was trained on pairs of texts (columns 'sentence1' and 'sentence2'), and the "
        "second texts are missing: give pairs=, --text_pair or --text_pair_column."
    )
    assert single[1:3] == [unexpected] * 2 and single[0] == single[3] and len(single[0]) == 1
    assert pairs[0] == pairs[3] == missing and pairs[1] == pairs[2] and len(pairs[1]) == 1
    rows = [{"text": "it is", "sentence1": "it is", "sentence2": "so"}]
    table = str(write_rows(tmp_path / "in.tsv", rows))
    lines = str(write_rows(tmp_path / "in.jsonl", [{"sentence1": "it is"}]))
    for folder, words, told in (
        (trained, ["--text", "a", "--text_pair", "b"], unexpected),
        (trained, ["--input", table, "--text_pair_column", "sentence2"], unexpected),
        (trained_on_pairs, ["--text", "a"], missing),
        (trained_on_pairs, ["--input", lines], "there is no column 'sentence2'"),
        (trained_on_pairs, ["--input", table], None),  # the controls
        (trained, ["--input", table], None),
    ):
        words = ["--model", str(folder), "--use_cpu", *words]
        ((code, said, _),) = run_ranks(1, run_main, words, None, predict)
        assert (code, said.count("\n")) == ((1, 1) if told else (0, 0)), said
        assert (told or "") in said


def test_no_texts_have_no_predictions(trained: Path) -> None:
    assert run_ranks(1, lambda accelerator: Predictor(trained, accelerator=accelerator)([])) == [[]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "{best}", "--input", "nowhere.tsv"], "nowhere.tsv: no such file"),
        (["--model", "{best}"], "Give the texts with either --text or --input."),
        (["--model", "{tiny}", "--text", "a film"], "is not a trained classifier"),
        (
            ["--model", "./nowhere", "--text", "a film"],
            "--model ./nowhere: there is no such folder",
        ),
        (
            ["--model", "{best}", "--text", "a film", "--texts", "b"],
            "Unknown setting --texts: the name is --text.",
        ),
        (
            ["--model", "{best}", "--input", "{in}", "--output", "no/folder/out.jsonl"],
            "there is no folder no/folder",
        ),
        (
            ["--model", "{best}", "--input", "{in}", "--text_column", "txet"],
            "in.tsv line 1: there is no column 'txet'",
        ),
    ],
)
def test_mistakes_are_one_line(
    trained: Path, tiny_model: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    path = write_rows(tmp_path / "in.tsv", make_rows(3))
    words = [word.format_map({"best": trained, "tiny": tiny_model, "in": path}) for word in words]
    ((code, said, answered),) = run_ranks(1, run_main, [*words, "--use_cpu"], None, predict)
    assert (
        (code, answered) == (1, "")
        and said.startswith("bertdist: ")
        and said.count("\n") == 1
        and told in said
    ), said
