"""`bertdist evaluate`: the same files on 1, 2 and 3 ranks, for all kinds of tasks; what cannot be evaluated is one line."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import run_ranks
from rows import json_of, make_rows, run_main, write_rows
from sklearn import metrics
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

predict: Any = importlib.import_module("bertdist.predict")
EVALUATE: Any = SimpleNamespace(__name__="bertdist.evaluate")
FILES = ("evaluation.json", "predictions.jsonl", "errors.jsonl", "probabilities.parquet")
MODELS: dict[str, dict[str, Any]] = {
    "named": {"id2label": {0: "negative", 1: "positive"}},
    "default": {"num_labels": 2},
    "multi": {"id2label": {0: "joy", 1: "anger", 2: "fear"}, "problem_type": "multi_label_classification"},
    "bits": {"id2label": {0: "0", 1: "1"}, "problem_type": "multi_label_classification"},
    "number": {"num_labels": 1, "problem_type": "regression"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers with random heads, as other programs save them, and files of rows."""
    folder, rows = tmp_path_factory.mktemp("evaluate"), make_rows(23, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    for name, settings in MODELS.items():
        shutil.copytree(tiny_model, folder / name)
        config = AutoConfig.from_pretrained(tiny_model, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = AutoModelForSequenceClassification.from_pretrained(tiny_model, config=config)
            torch.nn.init.normal_(model.classifier.weight, std=4.0)
        with torch.no_grad():  # so that each output is above and below 0 in some rows
            model.classifier.bias -= model(**inputs).logits.mean(0)
        model.save_pretrained(folder / name)
    write_rows(folder / "rows.tsv", rows)
    write_rows(folder / "upper.tsv", [{**row, "label": row["label"].upper()} for row in rows])
    ids = {"negative": "0", "positive": "1"}
    write_rows(folder / "ids.tsv", [{**row, "label": ids[row["label"]]} for row in rows])
    sets = [["joy"], ["Anger", "fear"], []]
    write_rows(folder / "multi.jsonl", [{"text": row["text"], "label": sets[i % 3]} for i, row in enumerate(rows)])  # fmt: skip
    for name, bits in (("names", [[0], [1], [0, 1], []]), ("vectors", [[0, 1], [1, 1]])):
        some = [{"text": row["text"], "label": bits[i % len(bits)]} for i, row in enumerate(rows)]
        write_rows(folder / f"{name}.jsonl", some)
    columns = [{"text": row["text"], "joy": str(i % 2), "Fear": "1"} for i, row in enumerate(rows)]
    write_rows(folder / "columns.tsv", columns)
    write_rows(folder / "twice.jsonl", [{"text": "a", "label": ["Joy", "joy"]}])
    numbers = [{"text": row["text"], "label": len(row["text"]) / 8} for row in rows]
    write_rows(folder / "number.tsv", numbers)
    return folder


def evaluate(folder: Path, n: int, model: str, file: str, *flags: str) -> tuple[int, str, str]:
    """(exit code, standard error, standard output) of rank 0; flags: {} is the folder."""
    words = [f"--model={folder / model}", f"--input={folder / file}", "--use_cpu"]
    words += ["--report=no", *(flag.format(folder) for flag in flags)]
    results = run_ranks(n, run_main, words, None, EVALUATE)
    assert all(code == results[0][0] and shown == "" for code, _, shown in results[1:])
    return results[0]  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def steps_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 23 rows are several windows, and the last round has an idle rank."""
    monkeypatch.setattr(predict, "ROWS_PER_WINDOW", 5)


@pytest.mark.parametrize(
    ("model", "file", "flags"),
    [
        ("named", "rows.tsv", ["--metrics", "accuracy", "f1", "roc_auc", "ece"]),
        ("multi", "multi.jsonl", ["--metrics", "f1_macro", "average_precision"]),
        ("number", "number.tsv", []),
    ],
)
def test_the_files_are_the_same_on_any_number_of_ranks(
    model: str, file: str, flags: list[str], folder: Path
) -> None:
    written, shown = [], []
    for n in (1, 2, 3):
        out = folder / f"{model}{n}"
        code, _, text = evaluate(folder, n, model, file, f"--output_dir={out}", *flags)
        assert code == 0
        shown.append(text.replace(str(out), "OUT"))
        written.append({name: (out / name).read_bytes() for name in FILES})
    assert written[0] == written[1] == written[2] and shown[0] == shown[1] == shown[2]
    report = json_of(folder / f"{model}1" / "evaluation.json")
    assert "95% interval" in shown[0] and all(name in shown[0] for name in report["scores"])
    assert all(low < high for low, high in report["intervals"].values())


def test_scores_and_errors_are_those_of_the_rows(folder: Path) -> None:
    out = folder / "checked"
    code, said, _ = evaluate(
        folder, 1, "named", "rows.tsv", "--output_dir={}/checked", "--metrics", "accuracy", "f1",
        "--positive_label", "negative",
    )  # fmt: skip
    assert code == 0 and "The positive label of f1 is 'negative'" in said
    rows, lines = make_rows(23, seed=5), json_of(out / "predictions.jsonl")
    truth, answers = [row["label"] for row in rows], [line["label"] for line in lines]
    scores = json_of(out / "evaluation.json")["scores"]
    assert [line["truth"] for line in lines] == truth and len(set(answers)) == 2
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, answers, pos_label="negative"))
    assert scores["f1"] != pytest.approx(metrics.f1_score(truth, answers, pos_label="positive"))
    errors = json_of(out / "errors.jsonl")
    assert len(errors) == sum(a != b for a, b in zip(truth, answers, strict=True)) > 1
    assert [x["error"] for x in errors] == sorted((x["score"] for x in errors), reverse=True)
    assert all((x["text"], x["line"]) == (rows[x["row"]]["text"], x["row"] + 2) for x in errors)
    # Its own files are replaced.
    assert evaluate(folder, 1, "named", "rows.tsv", "--output_dir={}/checked")[0] == 0
    assert list(json_of(out / "evaluation.json")["scores"]) == ["loss", "accuracy", "f1_macro"]


@pytest.mark.parametrize(
    ("model", "file", "flags", "note"),
    [
        ("named", "upper.tsv", [], "'POSITIVE' is 'positive'"),
        ("default", "ids.tsv", [], "'0' is 'LABEL_0'"),
        ("default", "rows.tsv", ["--label_names", "negative", "positive"], ""),
        ("multi", "multi.jsonl", [], "'Anger' is 'anger'"),
        (
            "multi",
            "columns.tsv",
            ["--label_columns", "joy", "Fear"],
            "Labels of columns.tsv and of the model: 'Fear' is 'fear'.\n--label_columns lacks 'anger' of the model's labels: all rows count as rows without.",
        ),
    ],
)
def test_labels_are_matched_by_name(
    model: str, file: str, flags: list[str], note: str, folder: Path
) -> None:
    code, said, _ = evaluate(folder, 1, model, file, *flags, "--output_dir={}/matched")
    assert code == 0 and note in said and ("Labels of" in said) == bool(note)
    lines, rows = json_of(folder / "matched" / "predictions.jsonl"), make_rows(23, seed=5)
    if model != "multi":
        known = {"0": "negative", "LABEL_0": "negative", "LABEL_1": "positive"}
        names = [known.get(line["truth"], line["truth"]) for line in lines]
        assert names == [row["label"] for row in rows]
    elif file == "multi.jsonl":
        assert [line["truth"] for line in lines[:3]] == [["joy"], ["anger", "fear"], []]
    else:
        assert [line["truth"] for line in lines[:2]] == [["fear"], ["joy", "fear"]]


@pytest.mark.parametrize(
    ("file", "truths"),
    [("names", [["0"], ["1"], ["0", "1"], []]), ("vectors", [["1"], ["0", "1"]])],
)
def test_lists_of_zeros_and_ones_are_names_if_one_row_is_no_vector(
    file: str, truths: list[list[str]], folder: Path
) -> None:
    code, said, _ = evaluate(folder, 1, "bits", f"{file}.jsonl", "--output_dir={}/bits_scores")
    note = "Labels of vectors.jsonl: lists of 2 zeros and ones, in the order of the model's labels"
    assert code == 0 and (note in said) == (file == "vectors")
    lines = json_of(folder / "bits_scores" / "predictions.jsonl")
    assert [line["truth"] for line in lines[: len(truths)]] == truths


@pytest.mark.parametrize(
    ("model", "file", "flags", "message"),
    [
        ("named", "ids.tsv", [], "2 of 2 labels of ids.tsv are none of the model's: '"),
        ("default", "rows.tsv", [], "(rows.tsv line 2)"),
        ("multi", "twice.jsonl", [], "twice.jsonl line 1: the label 'joy' occurs twice in one row."),
        ("named", "rows.tsv", ["--label_names", "positive", "negative"], "--label_names has the model's own names in another order, which would rename its outputs (negative, positive): leave it out, labels are matched by name."),
        ("named", "multi.jsonl", [], "multi.jsonl line 2: 2 labels; the model gives one label per text"),
        ("number", "rows.tsv", [], "rows.tsv line 2: expected a number, found"),
        ("named", "rows.tsv", ["--output_dir={}/named"], "is the folder of a model; name another"),
        ("named", "rows.tsv", ["--output_dir={}/stranger"], "holds 'errors.jsonl', which no evaluation wrote"),
        ("named", "rows.tsv", ["--label_names", "a"], "has 1 names; the model has 2 outputs"),
        ("named", "rows.tsv", ["--label_column", "mood"], "there is no column 'mood'"),
        ("named", "rows.tsv", ["--metrics", "mse"], "--metrics mse: is for regression"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    model: str, file: str, flags: list[str], message: str, folder: Path
) -> None:
    (folder / "stranger").mkdir(exist_ok=True)
    (folder / "stranger" / "errors.jsonl").write_text("{}\n")
    code, said, shown = evaluate(folder, 1, model, file, *flags)
    lines = [line for line in said.splitlines() if line.startswith("bertdist: ")]
    assert (code, len(lines), shown) == (1, 1, "") and message in lines[0]
    assert (folder / "stranger" / "errors.jsonl").read_text() == "{}\n"


def test_the_label_column_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "named", tmp_path / "best")
    rows = [{"text": row["text"], "mood": row["label"]} for row in make_rows(7, seed=5)]
    write_rows(folder / "mood.tsv", rows)
    code, said, _ = evaluate(folder, 1, str(tmp_path / "best"), "mood.tsv")
    assert code == 1 and "Pass --label_column" in said  # the control: nothing names the column
    (tmp_path / "config.yaml").write_text("label_column: mood\n")
    assert evaluate(folder, 1, str(tmp_path / "best"), "mood.tsv")[0] == 0
