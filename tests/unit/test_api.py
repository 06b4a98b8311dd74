"""`bertdist.train(...)`: keywords as flags, rows in memory, and what it returns."""

import json
import pickle
import random
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from rows import assert_same_tensors, make_rows, tensors_of, write_rows
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import bertdist
from bertdist import api
from bertdist.api import _write_rows, as_keywords
from bertdist.core.args import read_config, read_settings
from bertdist.core.config import DataConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError, ModelError
from bertdist.data.in_memory import as_table
from bertdist.data.load_data import load_records

TEXTS, LABELS = ["a film", "a\nfilm, dull", "😀"], ["good", "bad", "good"]
EXPECTED = {"text": TEXTS, "label": LABELS}
NEEDED = {"model_name_or_path": "m", "train_file": "t.tsv", "output_dir": "o"}


# ---- Settings


def test_keywords_are_the_flags() -> None:
    settings = read_settings(
        {
            **NEEDED,
            "train_file": ["a.tsv", "b.tsv"],
            "learning_rate": 1e-4,
            "use_cpu": True,
            "label_names": ("-1", "0"),
            "max_train_steps": None,
            "eval_every": "10 steps",
            "validation_file": Path("d.tsv"),
            "train_weights": [0.5, 2],
            "metrics": [],
        }
    )
    words = "--model_name_or_path m --train_file a.tsv b.tsv --output_dir o --use_cpu"
    words += " --learning_rate 1e-4 --validation_file d.tsv --train_weights .5 2"
    assert settings == read_config(
        [*words.split(), "--eval_every=10 steps", "--label_names", "-1", "0"]
    )


def test_numbers_and_arrays_of_numpy_are_values() -> None:
    found = read_settings(
        {
            **NEEDED,
            "max_train_steps": np.float64(3.0),
            "seed": np.int64(7),
            "label_names": np.array(["a", "b"]),
        }
    )
    assert (found.run.max_train_steps, found.run.seed) == (3, 7)
    assert found.task.label_names == ["a", "b"]


def test_one_run_at_a_time_in_a_process() -> None:
    second = pytest.raises(ConfigError, match="Another thread of this process trains")
    with api._only_run(), second, api._only_run():
        pass
    with api._only_run():
        pass


def test_keywords_win_over_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nmetrics: [accuracy]\nlearning_rate: 1\n")
    config = read_settings(
        {
            **NEEDED,
            "config": tmp_path / "run.yaml",
            "seed": 2,
            "train_file": ["x"],
            "metrics": ["f1"],
            "validation_file": "d",
        }
    )
    assert (config.run.seed, config.task.metrics, config.optim.learning_rate) == (2, ["f1"], 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_lenght": 3}, "Unknown setting max_lenght. Did you mean max_length?"),
        ({"max_lenght": [3]}, "Unknown setting max_lenght. Did you mean max_length?"),
        ({"learning_rate": "fast"}, "learning_rate: invalid float value: 'fast'"),
        ({"max_length": 1.5}, "max_length: invalid int value: '1.5'"),
        ({"seed": [1]}, "seed takes one value, not a list."),
        ({"train_weights": ["x"]}, "train_weights is 'x'; expected numbers."),
        ({"metrics": {"f1"}}, "metrics is a set; expected one value or a list."),
        ({"dry_run": True}, "dry_run is for the command: bertdist train --dry_run."),
        ({"processes": 0}, "processes is 0; expected a whole number of at least 1."),
        ({"processes": "2"}, "processes is '2'; expected a whole number of at least 1."),
        ({"dropout": 2}, "dropout is 2.0; expected from 0 to 1."),
    ],
)
def test_a_wrong_keyword_is_the_error_of_the_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bertdist.train(**{**NEEDED, **settings})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "a.csv line 3: label is missing. --on_bad_row skip leaves such rows out.",
            'a.csv line 3: label is missing. on_bad_row="skip" leaves such rows out.',
        ),
        ("--quoting double (or --max_bad_rows).", 'quoting="double" (or max_bad_rows).'),
        ("Pass --label_column, or --metrics f1.", "Pass label_column, or metrics f1."),
        ("--seed: invalid. --help says it.", "seed: invalid. bertdist train --help says it."),
        (
            "Use bertdist train --dry_run, or `hf download --local-dir x`, and --seed.",
            "Use bertdist train --dry_run, or `hf download --local-dir x`, and seed.",
        ),
        ("the label '--seed' is new", "the label '--seed' is new"),
        (
            "train_rows row 2: column 'my text' is null; expected a text. --on_bad_row skip helps.",
            "train_rows row 2: column 'my text' is null; expected a text. In a DataFrame: "
            "frame.fillna({'my text': ''}). on_bad_row=\"skip\" helps.",
        ),
        (
            "a.parquet row 2: column 'text' is null; expected a text.",
            "a.parquet row 2: column 'text' is null; expected a text.",
        ),
    ],
)
def test_messages_name_keywords(message: str, expected: str) -> None:
    assert as_keywords(message, "train") == expected


def test_an_error_has_a_short_traceback_and_its_own_class(tiny_model: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": ["a", None, "c"], "label": ["x", "y", "x"]})
    with pytest.raises(DataError, match=r"frame\.fillna\(\{'text': ''\}\)\. on_bad_row=") as caught:
        bertdist.train(model_name_or_path=tiny_model, output_dir=tmp_path / "out", train_rows=rows)
    assert len(caught.traceback) == 2  # this line, and what was called
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_a_config_and_settings_exclude_each_other() -> None:
    config = read_settings(NEEDED)
    with pytest.raises(ConfigError, match="a config or settings, not both: seed"):
        bertdist.train(config, seed=1)
    with pytest.raises(ConfigError, match="rows with settings, not with a config"):
        bertdist.train(config, train_rows=EXPECTED)
    with pytest.raises(ConfigError, match="need processes=1"):
        bertdist.train(config, processes=2, on_log=print)
    with pytest.raises(ConfigError, match="train_file and train_rows both name rows"):
        bertdist.train(**NEEDED, train_rows=EXPECTED)


# ---- Rows


@pytest.mark.parametrize(
    "rows",
    [
        EXPECTED,
        (TEXTS, LABELS),
        [dict(zip(EXPECTED, row, strict=True)) for row in zip(TEXTS, LABELS, strict=True)],
        pa.table(EXPECTED),
        pd.DataFrame(EXPECTED),
        pd.DataFrame(EXPECTED, index=[7, 7, 9]),
        (pd.Series(TEXTS), pd.Series(LABELS)),
        pl.DataFrame(EXPECTED),
        Dataset.from_dict(EXPECTED),
    ],
    ids=["columns", "lists", "dicts", "arrow", "pandas", "index", "series", "polars", "datasets"],
)
def test_every_kind_of_table_is_read(rows: Any) -> None:
    table, label_names = as_table(rows, "train_rows", DataConfig())
    assert table.to_pydict() == EXPECTED and label_names is None


def test_names_of_columns_for_lists() -> None:
    table, _ = as_table(
        (TEXTS, LABELS), "rows", DataConfig(text_column=["review"], label_column="mood")
    )
    assert table.to_pydict() == {"review": TEXTS, "mood": LABELS}


def test_periods_of_pandas_are_their_text() -> None:
    months = pd.period_range("2020-01", periods=2, freq="M")
    table, _ = as_table(pd.DataFrame({"text": ["a", "b"], "label": months}), "rows", DataConfig())
    assert table["label"].to_pylist() == ["2020-01", "2020-02"]


def test_class_labels_become_their_names_in_their_order() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    dataset = Dataset.from_dict({"text": TEXTS, "label": [1, -1, 0]}, features=features)
    table, label_names = as_table(dataset, "rows", DataConfig())
    assert table["label"].to_pylist() == ["neg", None, "pos"] and label_names == ["pos", "neg"]


def test_class_labels_of_another_usual_column_are_names_too() -> None:
    features = Features({"text": Value("string"), "Target": ClassLabel(names=["pos", "neg"])})
    dataset = Dataset.from_dict({"text": TEXTS, "Target": [1, 1, 0]}, features=features)
    assert as_table(dataset, "rows", DataConfig())[1] == ["pos", "neg"]
    other = DataConfig(label_column="score")
    assert as_table(dataset, "rows", other)[1] is None, "the control"


def test_lists_of_class_labels_become_their_names() -> None:
    label = Sequence(ClassLabel(names=["z", "a", "m"]))
    features = Features({"text": Value("string"), "label": label})
    dataset = Dataset.from_dict({"text": TEXTS, "label": [[0, 2], [], [1]]}, features=features)
    table, label_names = as_table(dataset, "rows", DataConfig())
    assert table["label"].to_pylist() == [["z", "m"], [], ["a"]]
    assert label_names == ["z", "a", "m"]
    numbers, label_names = as_table(dataset, "rows", DataConfig(), keep_codes=True)
    assert numbers["label"].to_pylist() == [[0, 2], [], [1]] and label_names is None


def test_names_of_a_config_file_win_over_those_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("label_names: [neg, pos]\ntext_column: review\n")
    features = Features({"review": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    rows = Dataset.from_dict({"review": TEXTS, "label": [1, 0, 0]}, features=features)
    settings = {"model_name_or_path": "m", "output_dir": "o", "config": file}
    found = _write_rows({"train_rows": rows}, tmp_path, settings)
    assert found.keys() == {"train_file"}
    assert _write_rows({"train_rows": (TEXTS, LABELS)}, tmp_path, settings).keys() == {"train_file"}
    assert pq.read_table(found["train_file"]).column_names == ["review", "label"]
    del settings["config"]
    found = _write_rows({"train_rows": rows}, tmp_path, {**settings, "text_column": "review"})
    assert found["label_names"] == ["pos", "neg"]  # the control


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.csv", "train_rows is of type str; expected a pandas or polars DataFrame"),
        ([1, 2], "train_rows is of type list; expected a pandas"),
        ([], "train_rows is of type list; expected a pandas"),
        ((["a"], ["b", "c"]), "train_rows has 1 texts and 2 labels."),
        ({"text": ["a", 1], "label": [1, 2]}, "Expected one type per column."),
        ({"text": ["a"], "label": [1, 2]}, "train_rows: "),
        (pd.DataFrame({"text": ["a", 1], "label": [0, 1]}), "Expected one type per column."),
        (("ab", "01"), "train_rows: a column is of type str; expected a list."),
        ((TEXTS, {0: "a", 1: "b", 2: "c"}), "train_rows: a column is of type dict; expected a"),
        (({"a", "b"}, ["x", "y"]), "train_rows: a column is of type set; expected a list."),
        ({"text": "ab", "label": "01"}, "train_rows: a column is of type str; expected a list."),
        ((pd.DataFrame(EXPECTED), pd.DataFrame(EXPECTED)), "a column is of type DataFrame"),
        (
            DatasetDict(train=Dataset.from_dict(EXPECTED)),
            "train_rows has splits: 'train'. Pass one of them, such as rows['train'].",
        ),
        (
            Dataset.from_dict(EXPECTED).to_iterable_dataset(),
            "train_rows is of type IterableDataset; expected",
        ),
    ],
)
def test_other_rows_are_one_line(rows: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        bertdist.train(model_name_or_path="m", output_dir="o", train_rows=rows)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_messages_name_the_keyword_of_the_rows(tmp_path: Path) -> None:
    rows = pd.DataFrame({**EXPECTED, "label": ["good", None, "bad"]})
    found = _write_rows({"train_rows": rows}, tmp_path, {**NEEDED, "train_file": None})
    data = DataConfig(train_file=[found["train_file"]])
    with pytest.raises(DataError, match=r"^train_rows row 1: label is missing"):
        load_records(data, "train")
    records = load_records(replace(data, on_bad_row="skip"), "train")
    assert records.name == "train_rows" and records.format_notes == ()
    (bad,) = records.bad_rows
    assert (bad.location, str(records.location(1))) == ("train_rows row 1", "train_rows row 2")
    parquet = tmp_path / "rows.csv"  # the control: a name that says something else is named
    parquet.write_bytes(Path(found["train_file"]).read_bytes())
    data = DataConfig(train_file=[str(parquet)], on_bad_row="skip")
    assert load_records(data, "train").format_notes == ("rows.csv: read as parquet",)


def test_lists_for_what_has_more_columns_are_one_line(tmp_path: Path) -> None:
    for settings in ({"text_column": ["a", "b"]}, {"text_pair_column": "b"}):
        with pytest.raises(
            DataError, match=r"^train_rows is .texts, labels., which has one column"
        ):
            as_table((TEXTS, LABELS), "train_rows", DataConfig(**settings))
    with pytest.raises(DataError, match=r"A file is given as train_file\.$"):
        as_table("a.csv", "train_rows", DataConfig())


# ---- Runs


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": tiny_model,
        "use_cpu": True,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "log_every": "1 steps",
        "eval_every": "2 steps",
        "dataloader_num_workers": 0,
        "report": False,
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bertdist.Run:
    """A run of rows in memory."""
    out = tmp_path_factory.mktemp("api") / "out"
    rows, dev = pd.DataFrame(make_rows(40)), make_rows(12, seed=1)
    with_report = {**settings, "report": True}
    return bertdist.train(**with_report, train_rows=rows, validation_rows=dev, output_dir=out)


def test_a_run_has_its_scores_history_and_predictor(run: bertdist.Run) -> None:
    assert run.finished and run.scores == run.evaluation["scores"]
    assert "<h1>Report of out</h1>" in (run.folder / "report.html").read_text()
    assert {"loss", "accuracy"} <= run.scores.keys()
    kinds = [line["kind"] for line in run.history]
    assert kinds.count("train") == 4 and kinds.count("eval") == 2
    (answer,) = run.predictor()("a film")
    assert answer["label"] in run.evaluation["labels"]
    assert repr(run).startswith(f"Run({str(run.folder)!r}, finished, loss ")
    assert repr(bertdist.Run(run.folder)) == repr(run)


def test_an_evaluation_shows_its_notes() -> None:
    report = {"evaluated": {"model": "out", "rows": 2, "data": "rows"}, "scores": {"loss": 0.5}}
    plain = bertdist.api.Evaluation({**report, "intervals": {}}, [], [])
    assert plain.notes == [] and repr(plain) == "Evaluation('out', 2 rows, loss 0.5)"
    notes = {"note": "All <b> alike.", "suggested_threshold": 0.25, "intervals": {}}
    noted = bertdist.api.Evaluation(report | notes, [], [])
    first, second = noted.notes
    assert first == "All <b> alike." and " With threshold 0.25 predict gives" in second
    assert repr(noted) == "\n".join([repr(plain), first, second])
    html = noted._repr_html_()
    assert html.startswith(plain._repr_html_()) and "<div>All &lt;b&gt; alike.</div>" in html


def test_a_predictor_can_be_pickled(
    run: bertdist.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(run.folder / "best", copy)
    monkeypatch.chdir(tmp_path)
    predictor = bertdist.Predictor("model", max_length=64, tokens_per_micro_batch=256)
    texts = [row["text"] for row in make_rows(30)]
    monkeypatch.chdir("/")  # from where its name is that of no folder
    pickled = pickle.dumps(predictor)
    assert len(pickled) < 2000 < sum(x.nbytes for x in predictor.model.state_dict().values())
    other = pickle.loads(pickled)
    assert (other.max_length, other.tokens_per_micro_batch) == (64, 256)
    assert (other.probabilities(texts) == predictor.probabilities(texts)).all()
    manifest = copy / "manifest.json"  # the control: other weights
    manifest.write_text(manifest.read_text().replace('"xxh3_128": "', '"xxh3_128": "0'))
    with pytest.raises(ModelError, match="model, which has other files since"):
        pickle.loads(pickled)
    with pytest.raises(ModelError, match="model has changed since this Predictor loaded it"):
        pickle.dumps(predictor)
    shutil.rmtree(copy)
    with pytest.raises(ModelError, match="model, which is not there"):
        pickle.loads(pickled)


def test_a_run_in_a_notebook_is_a_table(run: bertdist.Run) -> None:
    shown, low = run._repr_html_(), run.evaluation["intervals"]["loss"][0]
    assert f"<td>loss</td><td>{run.scores['loss']:.4g}</td><td>{low:.4g} to " in shown
    assert "<" not in api._html_scores("<b>", {}, None).replace("<div>", "").replace("</div>", "")


def test_a_run_of_folds_shows_their_mean(tmp_path: Path) -> None:
    (tmp_path / "folds").mkdir()
    scores = {"loss": {"mean": 0.5, "std": 0.1}, "roc_auc": {"mean": None, "std": None}}
    report = json.dumps({"folds": 5, "scores": scores})
    (tmp_path / "cross_validation.json").write_text(report)
    shown = bertdist.Run(tmp_path)
    assert repr(shown) == f"Run({str(tmp_path)!r}, mean of 5 folds, loss 0.5, roc_auc undefined)"
    assert "<td>roc_auc</td><td>undefined</td>" in shown._repr_html_()
    with pytest.raises(ConfigError, match=r"a model per fold, and none of all rows: .*/folds/0'"):
        shown.predictor()
    (tmp_path / "folds").rmdir()
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no best weights yet"):
        shown.evaluate(EXPECTED)


def test_the_files_of_a_run_name_the_rows(run: bertdist.Run) -> None:
    lines = (run.folder / "errors.jsonl").read_text().splitlines()
    assert {json.loads(line)["file"] for line in lines} == {"validation_rows"}


def test_rows_are_evaluated_as_at_the_end_of_the_run(run: bertdist.Run, tmp_path: Path) -> None:
    """In memory and as a file, and nothing is written without output_dir."""
    dev = make_rows(12, seed=1)
    before = sorted(run.folder.rglob("*"))
    found = run.evaluate(dev, use_cpu=True)
    assert sorted(run.folder.rglob("*")) == before and found.folder is None
    assert found.scores == run.scores and found.intervals == run.evaluation["intervals"]
    assert found.per_label == run.evaluation["per_class"]
    assert (found.labels, found.confusion) == (
        run.evaluation["labels"],
        run.evaluation["confusion"],
    )
    lines = (run.folder / "predictions.jsonl").read_text().splitlines()
    assert found.predictions == [json.loads(line) for line in lines]
    assert [row["truth"] for row in found.predictions] == [row["label"] for row in dev]
    errors = [json.loads(line) for line in (run.folder / "errors.jsonl").read_text().splitlines()]
    assert found.errors == [{**row, "file": "rows"} for row in errors]
    assert repr(found).startswith(f"Evaluation({str(run.folder / 'best')!r}, 12 rows, loss ")
    assert f"{run.folder / 'best'} on 12 rows</div>" in found._repr_html_()
    file = write_rows(tmp_path / "d.tsv", dev)
    to = {"output_dir": tmp_path / "out", "report": False}
    out = bertdist.evaluate(run.folder, input=file, use_cpu=True, **to)
    assert "on 12 rows of d.tsv</div>" in out._repr_html_()
    assert (out.folder, out.scores) == (tmp_path / "out", found.scores)
    assert out.predictions == found.predictions
    assert {row["file"] for row in out.errors} <= {"d.tsv"}
    other = run.evaluate(make_rows(12, seed=2), metrics="accuracy", use_cpu=True)
    assert other.scores.keys() == {"loss", "accuracy"} and other.scores != found.scores  # control


def test_lists_and_datasets_are_evaluated(run: bertdist.Run) -> None:
    dev = make_rows(12, seed=1)
    texts, labels = ([row[name] for row in dev] for name in ("text", "label"))
    names = sorted(set(labels), reverse=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    dataset = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    for rows in ((texts, labels), dataset):
        assert run.evaluate(rows, use_cpu=True).scores == run.scores


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "No rows to evaluate: give input"),
        ({"input": "x.tsv", "rows": EXPECTED}, ConfigError, "input and rows both name rows"),
        ({"rows": EXPECTED, "max_lenght": 3}, ConfigError, "Did you mean max_length?"),
        ({"rows": EXPECTED, "processes": 0}, ConfigError, "processes is 0; expected a whole"),
        ({"rows": {**EXPECTED, "label": ["x", "bad", "x"]}}, DataError, "'x' (rows row 0)"),
        ({"rows": {**EXPECTED, "label": ["bad", None, "x"]}}, DataError, "rows row 1: label is mi"),
        ({"rows": "a.csv"}, DataError, "A file is given as input."),
        (
            {"rows": (["a"], ["positive"]), "metrics": "acuracy"},
            ConfigError,
            "Did you mean 'accuracy'?",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: bertdist.Run, given: dict[str, Any], error: type[BertdistError], message: str
) -> None:
    with pytest.raises(error) as caught:
        bertdist.evaluate(run.folder, **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_loading_a_model_prints_nothing_and_changes_no_setting(
    run: bertdist.Run, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
    run.predictor()
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING
    AutoModelForSequenceClassification.from_pretrained(run.folder / "best")  # the control
    assert "Loading weights" in capfd.readouterr().err


def test_a_folder_of_something_else_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        bertdist.Run(tmp_path)
    for given in (None, ""):
        with pytest.raises(ConfigError, match="expected its folder"):
            bertdist.Run(given)  # type: ignore[arg-type]


def files(tmp_path: Path) -> dict[str, Any]:
    return {
        "train_file": str(write_rows(tmp_path / "t.tsv", make_rows(40))),
        "validation_file": str(write_rows(tmp_path / "d.tsv", make_rows(12, seed=1))),
    }


def test_rows_in_memory_train_as_rows_of_a_file(
    run: bertdist.Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    other = bertdist.train(**settings, **files(tmp_path), output_dir=tmp_path / "out")
    assert_same_tensors(tensors_of(other.folder / "best"), tensors_of(run.folder / "best"))
    seed = bertdist.train(**settings, **files(tmp_path), output_dir=tmp_path / "s", seed=1)
    with pytest.raises(AssertionError):  # the control
        assert_same_tensors(tensors_of(seed.folder / "best"), tensors_of(run.folder / "best"))


def test_hooks_see_every_line_and_change_nothing(
    run: bertdist.Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    logged: list[tuple[int, float]] = []
    scores: list[dict[str, Any]] = []

    def on_log(step: int, values: dict[str, Any]) -> None:
        logged.append((step, values["loss"]))
        values.clear()
        torch.manual_seed(step)
        torch.set_grad_enabled(False)
        random.seed(step)

    def on_evaluation(values: dict[str, Any]) -> None:
        scores.append(dict(values))
        values["loss"] = 0.0

    other = bertdist.train(
        **settings,
        **files(tmp_path),
        output_dir=tmp_path / "out",
        on_log=on_log,
        on_evaluation=on_evaluation,
    )
    assert torch.is_grad_enabled()
    history = [line for line in other.history if line["kind"] == "train"]
    assert logged == [(line["step"], line["loss"]) for line in history] and len(logged) == 4
    assert [value["step"] for value in scores] == [2, 4] and "accuracy" in scores[0]
    assert_same_tensors(tensors_of(other.folder / "best"), tensors_of(run.folder / "best"))


def test_an_exception_of_a_hook_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BertdistError, match="on_log: ZeroDivisionError") as caught:
        bertdist.train(
            **settings,
            **files(tmp_path),
            output_dir=tmp_path / "out",
            on_log=lambda step, values: 1 // 0,
        )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    state = bertdist.Run(tmp_path / "out")
    assert not state.finished and "not finished" in repr(state)


def test_an_error_of_several_processes_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Of the command that starts them: what it prints, and its exit code."""
    command, out = tmp_path / "python", tmp_path / "out"
    out.mkdir()
    (out / "status.json").write_text("{}")
    monkeypatch.setattr(sys, "executable", str(command))
    for code, said, error in (
        (1, "Device cpu\nbertdist: t.tsv: no such file.\n", "^t.tsv: no such file.$"),
        (3, "Killed\n", "^bertdist train: failed with exit code 3.$"),
        (75, "bertdist: stopped\n", None),
        (0, "", None),
    ):
        command.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/words\nprintf '{said}'; exit {code}")
        command.chmod(0o755)
        with pytest.raises(BertdistError, match=error) if error else nullcontext():
            bertdist.train(**{**NEEDED, "output_dir": out}, processes=2)
        assert capfd.readouterr().out == said
    words = (tmp_path / "words").read_text().split()
    assert words[:3] == ["-m", "bertdist", "train"] and words[-2:] == ["--processes", "2"]


def test_several_processes_evaluate_by_the_command(
    run: bertdist.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files are what is returned; without output_dir they are in a temporary folder."""
    command = tmp_path / "python"
    command.write_text(
        f"#!/bin/sh\necho $@ > {tmp_path}/words; cp $5 {tmp_path}/config.yaml\n"
        'out=$(sed -n "s/^output_dir: //p" $5); mkdir -p $out\n'
        f"cp {run.folder}/evaluation.json {run.folder}/*s.jsonl $out\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    found = run.evaluate(EXPECTED, processes=2, metrics=["accuracy"])
    assert found.folder is None and found.scores == run.scores and len(found.predictions) == 12
    words = (tmp_path / "words").read_text().split()
    assert words[:3] == ["-m", "bertdist", "evaluate"] and words[-2:] == ["--processes", "2"]
    config = (tmp_path / "config.yaml").read_text()
    assert "metrics:\n- accuracy\n" in config and f"model: {run.folder}/best\n" in config
    command.write_text("#!/bin/sh\nexit 75")
    with pytest.raises(BertdistError, match="Stopped on request: nothing was written"):
        run.evaluate(EXPECTED, processes=2)


def test_the_callers_accelerator_stays_as_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    bertdist.train(**settings, **files(tmp_path), output_dir=tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)  # nor does the random state change
    assert mine.mixed_precision == "bf16" and AcceleratorState().mixed_precision == "bf16"
    text = (tmp_path / "out" / "environment.json").read_text()
    assert '"mixed_precision": "no"' in text
    AcceleratorState._reset_state(True)


def test_history_leaves_out_a_line_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "step": 1}')
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert bertdist.Run(tmp_path).history == [{"kind": "train", "step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')  # of an editor
    assert bertdist.Run(tmp_path).history == [{"step": 1}, {"step": 2}]


def test_config_is_a_file_or_a_config(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train_file: gone.csv\nmodel_name_or_path: {tiny_model}\noutput_dir: o\n")
    for config in (file, str(file)):
        with pytest.raises(BertdistError, match=r"gone\.csv"):
            bertdist.train(config)
        with pytest.raises(BertdistError, match=r"lost\.csv"):
            bertdist.train(config, train_file="lost.csv")
    with pytest.raises(ConfigError, match="config is of type dict; expected the path of a YAML"):
        bertdist.train({"train_file": "a.csv"})  # type: ignore[arg-type]
