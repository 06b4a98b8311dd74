"""`bertdist export`: what is exported is the model, or nothing is kept."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rows import make_rows, words_of, write_rows, write_split
from transformers import AutoConfig, AutoModel, AutoTokenizer

from bertdist import Predictor
from bertdist import export as script
from bertdist.core.args import read_config
from bertdist.core.config import ModelConfig, config_to_yaml
from bertdist.core.errors import ConfigError, DataError, ModelError
from bertdist.data.tokenization import load_tokenizer
from bertdist.models import onnx
from bertdist.models.classifier import load_classifier, save_classifier
from bertdist.models.export_config import ExportConfig, check_export, read_export_config
from bertdist.models.onnx import OnnxClassifier
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'bertdist[onnx]'")
pytest.importorskip("onnx", reason="pip install 'bertdist[onnx]'")

pytestmark = pytest.mark.filterwarnings("ignore:--max_length 24 truncates")
TEXTS = ["good", "", "a bad film and not the best " * 30, "so it was, was it"]
TWO = SingleLabel(("negative", "positive"))
MAX_LENGTH = 24

Export = Callable[..., tuple[Path, dict[str, Any]]]


def make_run(folder: Path, pretrained: Path, task: Task = TWO, pairs: bool = False) -> Path:
    """A run folder as training leaves it, with random weights; the validation rows are dev.tsv."""
    config = ModelConfig(model_name_or_path=str(pretrained), max_length=MAX_LENGTH)
    tokenizer = load_tokenizer(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = load_classifier(config, task, tokenizer=tokenizer)
        *_, head = (x for x in model.model.modules() if isinstance(x, torch.nn.Linear))
        torch.nn.init.normal_(head.weight)  # confident answers
    columns = {"text_column": "text", "text_pair_column": "pair" if pairs else None}
    best = folder / "out" / "best"
    best.mkdir(parents=True)
    save_classifier(model, tokenizer, best, {"max_length": MAX_LENGTH, **columns, "step": 1})
    files = write_split(folder, train=4, dev=40)
    settings = config_to_yaml(read_config(words_of(pretrained, folder / "out", files)))
    (folder / "out" / "config.yaml").write_text(settings)
    rows = make_rows(40, seed=2)
    lines = [json.dumps({"row": i, "truth": row["label"]}) for i, row in enumerate(rows)]
    (folder / "out" / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return best


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A RoBERTa, which has no token types, and whose positions count tokens that are no padding."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "roberta",
        **sizes,
        vocab_size=len(tokenizer),
        intermediate_size=64,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, best: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("export") / "exported"
    report = script.export(ExportConfig(model=str(best), output_dir=str(folder)))
    return folder, report


def by_hand(folder: Path, texts: Sequence[Any]) -> Any:
    """(texts, labels) logits, by ONNX Runtime and `tokenizers`, as in docs/serving.md."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(texts))
    tokens = {
        "input_ids": [encoding.ids for encoding in found],
        "attention_mask": [encoding.attention_mask for encoding in found],
        "token_type_ids": [encoding.type_ids for encoding in found],
    }
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: np.array(tokens[name]) for name in names})[0]


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_an_exported_folder_gives_the_answers_of_the_model(
    exported: tuple[Path, dict[str, Any]], best: Path
) -> None:
    folder, report = exported
    expected = Predictor(best).probabilities(TEXTS)
    np.testing.assert_allclose(softmax(by_hand(folder, TEXTS)), expected, atol=2e-6)
    assert np.ptp(expected[:, 0]) > 0.05  # the texts differ, so that a mistake is seen
    own = AutoTokenizer.from_pretrained(folder)
    tokens = own(TEXTS, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    np.testing.assert_allclose(softmax(session.run(None, dict(tokens))[0]), expected, atol=2e-6)
    assert {entry.type for entry in session.get_inputs()} == {"tensor(int64)"}
    assert len(own("good")["input_ids"]) == 3  # padded when asked only
    compared = report["compared"]
    assert (compared["data"], compared["rows"]) == ("dev.tsv", 40)
    assert compared["largest_difference"] < 1e-5 and compared["equal_answers"] == 1
    assert compared["scores"]["before"] == pytest.approx(compared["scores"]["after"], abs=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert json.loads((folder / "export.json").read_text())["exported"] == "float32"


def test_a_model_without_token_types_and_with_weights_beside_the_graph(
    roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "EXTERNAL_FROM", 0)  # as above 2 GB
    best, folder = make_run(tmp_path, roberta, SingleLabel(("a", "b", "c"))), tmp_path / "exported"
    report = script.export(ExportConfig(model=str(best), output_dir=str(folder)))
    expected = Predictor(best).probabilities(TEXTS)
    np.testing.assert_allclose(softmax(by_hand(folder, TEXTS)), expected, atol=2e-6)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert (folder / "model.onnx_data").stat().st_size > (folder / "model.onnx").stat().st_size
    # The labels of dev.tsv are not those of the model, so that no score can be compared.
    assert (
        report["compared"]["data"] != "dev.tsv" and report["compared"]["scores"]["before"] is None
    )


def test_an_exporter_that_drops_the_mask_is_refused(
    exported: tuple[Path, dict[str, Any]], best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = exported
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def forward(self: Any, ids: Any, mask: Any, types: Any) -> Any:
        mask = torch.ones_like(mask)
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    monkeypatch.setattr(onnx._Logits, "forward", forward)
    with pytest.raises(ModelError, match=r"is not the model: a probability of .* differs by 0\.\d"):
        script.export(ExportConfig(model=str(best), output_dir=str(folder)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_int8_is_smaller_and_kept_while_its_score_is(best: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    config = ExportConfig(model=str(best), output_dir=str(folder), int8=True, max_score_loss=1.0)
    report = script.export(config)
    assert report["exported"] == "int8" and set(report["files"]) >= {"model.onnx", "config.json"}
    assert 1e-5 < report["compared"]["largest_difference"] < 0.5  # it is another model
    again = OnnxClassifier(folder, load_tokenizer(ModelConfig(model_name_or_path=str(best))), 24)
    assert again.tokenizer is not None
    graph = (folder / "model.onnx").read_bytes()
    assert b"MatMulInteger" in graph


# ---- What is refused before torch is imported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model is missing"),
        (["--model=m", "--to=torchscript"], "--to: invalid choice: 'torchscript'"),
        (["--model=m", "--to=safetensors-bf16", "--int8"], "--int8 goes with --to onnx"),
        (["--model=m", "--max_eval_samples=0"], "--max_eval_samples is 0; expected at least 1"),
        (["--model=m", "--max_length=2"], "--max_length is 2; expected at least 3"),
        (["--model=m", "--max_score_loss=2"], "--max_score_loss is 2.0; expected from 0 to 1"),
        (["--model=m", "--label_column=x"], "--label_column is for the rows to compare on"),
        (["--model=m", "--output_dir="], "--output_dir has an empty value"),
    ],
)
def test_flags_that_make_no_export(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_export_config(words)
    assert message in str(error.value)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_export_config(["--model=m"]).output_dir == "exported"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="export runs in one process"):
        read_export_config(["--model=m"])


def test_a_missing_library_is_named_with_its_pip_command(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    config = ExportConfig(model=str(best), output_dir=str(tmp_path / "exported"))
    with pytest.raises(ConfigError, match=r"needs onnx: pip install 'bertdist\[onnx\]'"):
        check_export(config)
    check_export(ExportConfig(**{**vars(config), "to": "safetensors-bf16"}))  # needs none


def test_a_folder_that_no_export_wrote_is_left_alone(
    exported: tuple[Path, dict[str, Any]], best: Path, tmp_path: Path
) -> None:
    def check(folder: Path) -> None:
        check_export(ExportConfig(model=str(best), output_dir=str(folder)))

    for folder in (exported[0], tmp_path / "new" / "one", tmp_path):
        check(folder)  # of an earlier export, new, and empty
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds 'export\.json', which no export wrote"):
        check(tmp_path)
    for folder in (best, best.parent):
        with pytest.raises(ConfigError, match="which no export wrote"):
            check(folder)
    (tmp_path / "link").symlink_to(exported[0])
    with pytest.raises(ConfigError, match="is a symbolic link"):
        check(tmp_path / "link")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check(tmp_path / "export.json")


# ---- The rows to compare on


def rows_of(best: Path, **settings: Any) -> tuple[script.Rows, list[str]]:
    return script.find_rows(ExportConfig(model=str(best), **settings))


def test_the_rows_of_the_run_are_taken_while_they_are_what_they_were(
    tmp_path: Path, tiny_model: Path
) -> None:
    best = make_run(tmp_path, tiny_model)
    rows, notes = rows_of(best)
    assert (rows.name, notes) == ("40 rows of dev.tsv", []) and rows.scorer is not None
    assert rows_of(best, max_eval_samples=7)[0].name == "7 rows of dev.tsv"
    write_rows(tmp_path / "dev.tsv", make_rows(40, seed=3))
    rows, (note,) = rows_of(best)
    assert "The rows of dev.tsv are not those that the run was evaluated on" in note
    assert rows.targets is None and len(rows.records) == 12
    (tmp_path / "dev.tsv").unlink()
    assert "cannot be read (" in rows_of(best)[1][0] and "dev.tsv" in rows_of(best)[1][0]


def test_rows_with_and_without_labels(best: Path, tmp_path: Path) -> None:
    labelled = write_rows(tmp_path / "rows.csv", make_rows(9))
    assert rows_of(best, input=str(labelled))[0].scorer is not None
    texts = write_rows(tmp_path / "texts.csv", [{"text": row["text"]} for row in make_rows(9)])
    check_export(ExportConfig(model=str(best), input=str(texts), output_dir=str(tmp_path / "x")))
    rows, (note,) = rows_of(best, input=str(texts))
    assert rows.scorer is None and note.startswith("texts.csv has no labels")
    others = [{"text": row["text"], "label": "spam"} for row in make_rows(9)]
    with pytest.raises(DataError, match=r"1 of 1 labels of others\.csv are none of the model's"):
        rows_of(best, input=str(write_rows(tmp_path / "others.csv", others)))


# ---- The comparison, on logits made by hand


def compare(task: Task, before: Any, after: Any, targets: Any = None) -> script.Comparison:
    reference = object.__new__(script.Reference)
    reference.task, reference.of_rows = task, torch.tensor(before)
    reference.texts, reference.of_texts = script.built_in_texts(False), torch.zeros(12, 2)
    records = script.built_in_texts(False).slice(0, len(before))
    scorer = None if targets is None else script.Scorer(script.TaskConfig(), task, None)
    wanted = None if targets is None else np.array(targets)
    reference.rows = script.Rows("rows", records, task, wanted, scorer)
    reference.scores = reference._score(reference.of_rows)
    logits = iter([torch.tensor(after), torch.zeros(12, len(task.labels))])
    reference.of_texts = torch.zeros(12, len(task.labels))
    return reference.compare(lambda records, show: next(logits), None)


def test_differences_answers_and_scores() -> None:
    found = compare(TWO, [[0.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [4.0, 0.0]], [1, 0])
    assert found.largest == pytest.approx(1 / (1 + np.exp(-1)) - 0.5)
    assert (found.where, found.equal, found.loss) == ("texts row 0", 0.5, -0.5)
    multi = compare(MultiLabel(("a", "b")), [[0.1, -3.0]], [[-0.1, -3.0]])
    assert multi.equal == 0.5 and np.isnan(multi.loss)
    number = compare(Regression(("score",)), [[0.0], [10.0]], [[0.4], [11.0]])
    assert (number.largest, number.equal) == (1.0, 0.5)
    broken = compare(TWO, [[0.0, 1.0]], [[np.nan, 1.0]])
    assert broken.largest == np.inf


@pytest.mark.parametrize(
    ("after", "equal", "message"),
    [
        (0.895, 0.5, None),
        (0.95, 0.5, None),
        (0.88, 1.0, "int8 changes accuracy from 0.9000 to 0.8800 on 872 rows of dev.tsv, by more"),
        (None, 0.95, None),
        (None, 0.85, "int8 changes 15.0% of the answers to 872 rows of dev.tsv, more than 10%"),
        (np.nan, 0.85, "int8 changes 15.0% of the answers"),
    ],
)
def test_what_int8_may_cost(after: float | None, equal: float, message: str | None) -> None:
    def scored(value: float) -> Any:
        scores = {"accuracy": value}
        return SimpleNamespace(selection_score=value, selected="accuracy", scores=scores)

    reference: Any = SimpleNamespace(rows=SimpleNamespace(name="872 rows of dev.tsv"))
    pair = {} if after is None else {"before": scored(0.9), "after": scored(after)}
    comparison = script.Comparison(largest=0.2, where="", equal=equal, **pair)
    config = ExportConfig(model="m", int8=True)
    if message is None:
        script._check_loss(config, reference, comparison)
        return
    with pytest.raises(ModelError) as error:
        script._check_loss(config, reference, comparison)
    assert message in str(error.value) and "nothing was kept" in str(error.value)


def test_bf16_weights_are_half_the_size(best: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    settings = {"to": "safetensors-bf16", "max_score_loss": 1.0}
    report = script.export(ExportConfig(model=str(best), output_dir=str(folder), **settings))
    sizes = [(x / "model.safetensors").stat().st_size for x in (best, folder)]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    assert 1e-5 < report["compared"]["largest_difference"] < 0.1  # it is another model
    expected, found = (Predictor(x).probabilities(TEXTS) for x in (best, folder))
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").rename(folder / "model.onnx")
    with pytest.raises(ModelError, match="it is an export for ONNX Runtime; give the folder"):
        Predictor(folder)
