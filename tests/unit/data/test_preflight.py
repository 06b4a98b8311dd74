"""Mistakes that are answered before torch is imported, in the words of the command itself."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bertdist
from bertdist.core.args import read_config, read_evaluate_config, read_predict_config
from bertdist.core.config import ModelConfig
from bertdist.core.errors import BertdistError, ConfigError, DataError, ModelError
from bertdist.core.hub import constants
from bertdist.data import load_data, preflight
from bertdist.data.load_data import load_splits
from bertdist.data.tokenization import load_tokenizer
from bertdist.models.classifier import load_model_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("train.tsv").write_text("text\tlabel\na\t0\nb\t1\n")
    Path("wide.csv").write_text(",".join(f"c{i}" for i in range(20)) + ",lable\n" + "1," * 20 + "1")
    Path("rows.json").write_text('[{"text": "a", "kind": "0"}]')
    Path("lines.txt").write_text("one\ntwo\n")
    model = tmp_path / "model"
    model.mkdir()
    settings = {"model_type": "bert", "id2label": {"0": "n", "1": "p"}}
    settings["bertdist"] = {"text_column": "text", "text_pair_column": None}
    (model / "config.json").write_text(json.dumps(settings))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    return tmp_path


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(BertdistError) as caught:
        act()
    return str(caught.value)


TRAIN = ["--model_name_or_path=./model", "--output_dir=out", "--train_file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian.tsv"], "trian.tsv: no such file. Did you mean 'train.tsv'?"),
        (["model"], "model is a folder without .txt files"),
        (["*.parquet"], "*.parquet matches no file; "),
        (["lines.txt"], "lines.txt is read as one text per line, without labels"),
        (["train.tsv", "--label_column=lable"], "no column 'lable'. Did you mean 'label'?"),
        (["wide.csv", "--text_column=c0", "--label_column=label"], "Did you mean 'lable'? The 21"),
        (["rows.json"], "rows.json: no column has a usual name for the label. Pass"),
        (["train.tsv", "--validation_file=dev.tsv"], "dev.tsv: no such file."),
        (["train.tsv", "--delimiter=tab", "--file_format=jsonl"], "--delimiter"),
    ],
)
def test_files_and_columns(words: list[str], message: str, folder: Path) -> None:
    config = read_config([*TRAIN, *words])
    early = refusal(lambda: preflight.check_train(config))
    assert message in early and early == refusal(lambda: load_splits(config))


def test_a_test_file_is_looked_at(folder: Path) -> None:
    config = read_config([*TRAIN, "train.tsv", "--test_file=tets.tsv"])
    assert refusal(lambda: preflight.check_train(config)).startswith("tets.tsv: no such file.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modle", "--model ./modle: there is no such folder. Did you mean 'model'?"),
        ("no/such/modle", "--model no/such/modle: there is no such folder."),
        ("hollow", "--model hollow: the folder holds no config.json that can be read (there is"),
        ("train.tsv", "--model train.tsv is a file; give the folder of the model."),
        ("modle", "neither a folder here nor a model on the Hub. Did you mean 'model'? HF_HUB_OFF"),
    ],
)
def test_models(name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    early = refusal(lambda: preflight.check_model(name, "--model"))
    assert message in early
    config = ModelConfig(model_name_or_path=name)
    assert early == refusal(lambda: load_model_config(config, "--model"))


def test_tokenizers(folder: Path) -> None:
    """Their folders need no config.json."""
    preflight.check_tokenizer("hollow")
    preflight.check_tokenizer("somebody/model")
    message = "--tokenizer_name ./hollov: there is no such folder. Did you mean 'hollow'?"
    assert refusal(lambda: preflight.check_tokenizer("./hollov")) == message
    config = ModelConfig(model_name_or_path="model", tokenizer_name="./hollov")
    assert refusal(lambda: load_tokenizer(config)) == message


def test_a_config_json_that_is_none(folder: Path) -> None:
    (folder / "hollow" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"can be read \(Expecting property name .* line 1 column"):
        preflight.check_model("hollow", "--model")


def test_the_folder_of_somebody_else(folder: Path) -> None:
    config = read_config([*TRAIN[:1], "--output_dir=mine", "--train_file=train.tsv"])
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt', which no run wrote"):
        preflight.check_train(config)
    folds = read_config([*TRAIN[:1], "--output_dir=mine", "--train_file=train.tsv", "--folds=2"])
    preflight.check_train(folds)  # each fold has its own folder
    words = ["--model=./model", "--input=train.tsv", "--output_dir"]
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt', which no evaluation wrote"):
        read_evaluate_config([*words, "mine"])
    with pytest.raises(ConfigError, match="is the folder of a model"):
        read_evaluate_config([*words, "model"])
    Path("mine/evaluation.json").write_text('{"evaluated": {}}')  # an earlier evaluation
    preflight.check_evaluate(read_evaluate_config([*words, "mine"]))
    preflight.check_evaluate(read_evaluate_config([*words, "new"]))
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "tran.tsv"], "tran.tsv: no such file. Did you mean 'train.tsv'?"),
        (["--input", "train.tsv", "--text_column", "txt"], "no column 'txt'. Did you mean"),
        (["--input", "train.tsv", "--keep_columns", "lable"], "--keep_columns 'lable' is not one"),
        (["--text", "a", "--text_pair", "b"], "trained on single texts, not on pairs"),
    ],
)
def test_predictions(words: list[str], message: str, folder: Path) -> None:
    config = read_predict_config(["--model=./model", *words])
    assert message in refusal(lambda: preflight.check_predict(config))


def test_the_columns_of_an_evaluation_are_those_of_the_model(folder: Path) -> None:
    Path("other.csv").write_text("review,label\na,n\n")
    config = read_evaluate_config(["--model=./model", "--input=other.csv"])
    with pytest.raises(DataError, match="there is no column 'text'"):
        preflight.check_evaluate(config)


@pytest.mark.parametrize(
    ("words", "message", "suggests"),
    [
        (["rows.json"], "rows.json: no column has a usual name for the label.", True),
        (["train.tsv", "--label_column=lable"], "there is no column 'lable'.", True),
        (["lines.txt"], "lines.txt is read as one text per line, without labels", True),
        (["train.tsv", "--text_column=txt"], "there is no column 'txt'.", False),
    ],
)
def test_an_evaluation_of_rows_without_labels_names_predict(
    words: list[str], message: str, suggests: bool, folder: Path
) -> None:
    config = read_evaluate_config(["--model=./model", "--input", *words])
    found = refusal(lambda: preflight.check_evaluate(config))
    assert message in found
    assert ("Rows without labels are for bertdist predict" in found) == suggests
    assert "bertdist predict" not in refusal(
        lambda: preflight.check_train(read_config([*TRAIN, *words]))
    )


def test_good_ones_pass_and_say_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight.check_train(read_config([*TRAIN, "train.tsv", "--validation_split=0.5"]))
    for given in ("train.tsv", "lines.txt", "-"):
        config = read_predict_config(["--model=./model", "--input", given])
        preflight.check_predict(config)
    assert capsys.readouterr() == ("", "") and not Path("out").exists()


def test_what_costs_much_is_left_to_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """URLs, large JSON documents, and all of it where a launcher started the process."""
    preflight.check_rows(read_config([*TRAIN, "https://nowhere.invalid/a.csv"]).data)
    many = [f"{i}.tsv" for i in range(30)]
    for name in many:
        Path(name).write_text("text\tlabel\na\t0\n")
    opened: list[str] = []
    real = load_data.open_files

    def open_files(path: str, *args: Any) -> Any:
        opened.append(path)
        return real(path, *args)

    monkeypatch.setattr(load_data, "open_files", open_files)
    preflight.check_rows(read_config([*TRAIN, *many]).data)
    assert opened == many[: preflight.MOST_FILES]
    missing = read_config([*TRAIN, *many, "31.tsv"]).data
    assert "31.tsv: no such file." in refusal(lambda: preflight.check_rows(missing))
    config = read_config([*TRAIN, "rows.json"])
    refusal(lambda: preflight.check_train(config))
    monkeypatch.setattr(preflight, "MOST_JSON_BYTES", 3)
    preflight.check_train(config)
    monkeypatch.setenv("RANK", "0")
    refusal(lambda: preflight.check_train(read_config([*TRAIN, "trian.tsv"])))  # not a launcher's
    monkeypatch.setenv("WORLD_SIZE", "2")
    preflight.check_train(read_config([*TRAIN, "trian.tsv"]))
    preflight.check_predict(read_predict_config(["--model=./modle", "--text=a"]))


def test_torch_is_not_imported(folder: Path) -> None:
    """In a process that cannot import it; a start without mistakes needs it."""
    commands = [
        ["train", *TRAIN, "trian.tsv"],
        ["train", *TRAIN, "train.tsv", "--text_column=txt"],
        ["train", *TRAIN, "rows.json"],
        ["train", "--model_name_or_path=modle", "--output_dir=out", "--train_file=train.tsv"],
        ["check", "--train_file=trian.tsv"],
        ["evaluate", "--model=./model", "--input=train.tsv", "--output_dir=mine"],
        ["predict", "--model=./model", "--input=train.tsv", "--text_column=txt"],
        ["train", *TRAIN, "train.tsv", "--test_split=0.5", "--metrics=acuracy"],
        ["evaluate", "--model=./model", "--input=train.tsv", "--metrics=acuracy"],
        ["train", *TRAIN, "train.tsv"],
    ]
    script = (
        "import json, sys\nsys.modules['torch'] = None\nfrom bertdist.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        print(end.code)\n"
        "    except ImportError as error:\n        print(error.name)\n"
    )
    words = [sys.executable, "-c", script, json.dumps(commands)]
    root = str(Path(bertdist.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1"] * 9 + ["torch"], done.stderr
    assert len(done.stderr.splitlines()) == 9
