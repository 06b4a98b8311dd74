"""Texts that --max_length truncates: said once, in training and prediction; a saved tokenizer truncates alike."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import train_module
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline

from bertdist import cli
from bertdist.core.config import ModelConfig
from bertdist.core.errors import ConfigError
from bertdist.data import tokenization
from bertdist.data.in_memory import records_from_texts
from bertdist.data.records import Records
from bertdist.data.tokenization import load_tokenizer, save_tokenizer, truncation_notes
from bertdist.models.classifier import load_classifier, save_classifier
from bertdist.predict import Predictor
from bertdist.tasks.tasks import SingleLabel

TASK = SingleLabel(("bad", "good"))


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def records(short: int, long: int, words: int = 30) -> Records:
    return records_from_texts(["good film"] * short + ["good " * words] * long)


# ---- The line


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (records(98, 2), ["--max_length 16 truncates 2.0% of the rows; the longest has 32 tokens."]),
        (records(99, 1), []),  # 1% is not more than 1%
        (records(0, 3, 14), []),  # just fits, though it has many bytes
        (records(0, 3, 15), ["--max_length 16 truncates 100.0% of the rows; the longest has 17 tokens."]),
        (records(0, 0), []),
        (
            records_from_texts(["good " * 8] * 2, ["bad " * 8, "bad"]),
            ["--max_length 16 truncates 50.0% of the rows; the longest has 19 tokens."],
        ),
        (
            records_from_texts(["good " * 10_000]),
            ["--max_length 16 truncates 100.0% of the rows; the longest has more than 4,002 tokens."],
        ),
    ],
    ids=range(7),
)  # fmt: skip
def test_more_than_a_hundredth_is_said(
    rows: Records, expected: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert truncation_notes({"rows": rows}, tokenizer, 16) == expected


def test_a_short_split_is_not_tokenized(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_count_tokens", lambda *unused: 1 / 0)
    assert truncation_notes({"rows": records(500, 5)}, tokenizer, 16) == []
    with pytest.raises(ZeroDivisionError):  # the control
        truncation_notes({"rows": records(500, 6)}, tokenizer, 16)


def test_of_many_long_rows_some_are_counted(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = tokenization._count_tokens
    monkeypatch.setattr(
        tokenization, "_count_tokens", lambda rows, *rest: counted.append(len(rows)) or real(rows, *rest)
    )  # fmt: skip
    monkeypatch.setattr(tokenization, "COUNTED_ROWS", 100)
    rows = records_from_texts(["good " * 30, "good " * 13, "good film"] * 400 + ["good " * 90])
    (line,) = truncation_notes({"rows": rows}, tokenizer, 16)
    share = float(line.partition("about ")[2].partition("%")[0])
    assert abs(share - 100 / 3) < 8 and line.endswith("the longest has 92 tokens.")
    assert counted[0] == 101
    monkeypatch.setattr(tokenization, "COUNTED_BYTES", 1_000)
    truncation_notes({"rows": rows}, tokenizer, 16)
    assert counted[1] < 25


def test_where_none_of_the_first_is_truncated_no_more_are_counted(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = tokenization._count_tokens
    monkeypatch.setattr(
        tokenization, "_count_tokens", lambda rows, *rest: counted.append(len(rows)) or real(rows, *rest)
    )  # fmt: skip
    many_bytes = records_from_texts(["good"] * 4_500 + ["字" * 5] * 500)  # 15 bytes, 7 tokens
    assert truncation_notes({"rows": many_bytes}, tokenizer, 16) == []
    assert counted == [141]
    truncated = records_from_texts(["good"] * 4_500 + ["字" * 5] * 400 + ["good " * 30] * 100)
    assert "truncates 2.0% of the rows" in truncation_notes({"rows": truncated}, tokenizer, 16)[0]
    assert counted == [141, 141, 501]


# ---- In training and prediction


def test_training_says_it_of_both_splits(tiny_model: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model), max_length=16)
    rows = records(1, 1), records(3, 1), None
    inputs = train_module.Inputs(load_tokenizer(config), None, *rows, {})
    assert truncation_notes(inputs.splits, inputs.tokenizer, 16) == [
        "--max_length 16 truncates 50.0% of the training rows; the longest has 32 tokens.",
        "--max_length 16 truncates 25.0% of the validation rows; the longest has 32 tokens.",
    ]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    config = ModelConfig(model_name_or_path=str(tiny_model), max_length=16)
    torch.manual_seed(0)
    model, _ = load_classifier(config, TASK)
    save_classifier(model, load_tokenizer(config), folder, {"max_length": 16})
    return folder


LONG = "good film " * 20 + "bad " * 20


def test_a_predictor_warns_once(trained: Path) -> None:
    predictor = Predictor(trained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predictor(["good"])
        assert caught == []
        predictor([LONG, "good"])
        predictor([LONG])
    (warning,) = caught
    expected = "--max_length 16 truncates 50.0% of the texts; the longest has 62 tokens."
    assert str(warning.message) == expected and warning.filename == __file__


def test_the_command_says_it_on_standard_error(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", "--model", str(trained), "--use_cpu", "--text", LONG])
    out, error = capsys.readouterr()
    assert not caught.value.code and len(out.splitlines()) == 1
    assert error == "--max_length 16 truncates 100.0% of the texts; the longest has 62 tokens.\n"


# ---- The saved tokenizer


def test_the_pipeline_truncates_as_training_did(trained: Path) -> None:
    texts = [LONG, "good"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Predictor(trained)(texts)
    classify: Any = pipeline("text-classification", model=str(trained))
    expected = classify(texts, truncation=True)
    assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
    scores = [answer["score"] for answer in expected]
    assert [answer["score"] for answer in found] == pytest.approx(scores, abs=1e-6)
    classify.tokenizer.model_max_length = 512  # the control: the whole text
    (whole,) = classify([LONG], truncation=True)
    assert abs(whole["score"] - scores[0]) > 1e-4


def test_a_saved_tokenizer_keeps_the_limit_of_the_pretrained_one(
    trained: Path, tmp_path: Path
) -> None:
    assert AutoTokenizer.from_pretrained(trained).model_max_length == 16
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(trained), max_length=512))
    assert tokenizer.model_max_length == 512  # a second training may take longer texts
    save_tokenizer(tokenizer, tmp_path, 64)
    assert tokenizer.model_max_length == 512
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["model_max_length"], saved["pretrained_max_length"]) == (64, 512)
    assert Predictor(trained, max_length=512).max_length == 512
    with pytest.raises(ConfigError, match="supports at most 512 tokens"):
        Predictor(trained, max_length=513)


def test_a_tokenizer_without_a_limit_does_not_exceed_the_positions(
    trained: Path, tmp_path: Path
) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"pretrained_max_length": 10**30}
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="--max_length is 600; this model has 512 positions"):
        Predictor(tmp_path, max_length=600)


def test_a_tokenizer_of_a_model_with_one_segment_gives_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert "token_type_ids" in tokenizer(["a"], ["b"])
    save_tokenizer(tokenizer, tmp_path, None, has_token_types=False)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert "token_type_ids" not in saved(["a"], ["b"]) and saved.model_max_length == 512
    assert "token_type_ids" in tokenizer(["a"], ["b"])
