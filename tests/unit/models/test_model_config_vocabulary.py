"""Tokens and segments that a model has no row for: resized, set to 0, or one line with both numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from bertdist.core.config import ModelConfig
from bertdist.core.errors import DataError, ModelError
from bertdist.data.batch import collate
from bertdist.data.in_memory import records_from_texts
from bertdist.data.tokenization import create_dataset, load_tokenizer
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import Classifier, load_classifier, save_classifier
from bertdist.models.model_config import missing_tokens
from bertdist.predict import Predictor
from bertdist.tasks.tasks import SingleLabel

TASK = SingleLabel(("bad", "good"))
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
TEXTS = ["covid is bad", "good"]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def make_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str = "bert", **change: Any
) -> ModelConfig:
    """A folder with a random model and this tokenizer."""
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    sizes = SIZES | special | {"vocab_size": 133} | change
    if kind in ("electra", "albert"):
        sizes["embedding_size"] = 8
    config = AutoConfig.for_model(kind, id2label=dict(enumerate(TASK.labels)), **sizes)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder), max_length=32)


def load(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[Classifier, list[str]]:
    torch.manual_seed(seed)
    return load_classifier(config, TASK, tokenizer=tokenizer)


def logits_of(model: Classifier, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Any:
    dataset = create_dataset(records_from_texts(texts), tokenizer, None, 32)
    with torch.no_grad():
        return model(collate(dataset[list(range(len(texts)))]))


# ---- Added tokens


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_added_tokens_get_rows_that_transformers_draws(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_tokens(["covid", "[E1]"])
    config = make_model(tmp_path, tokenizer, kind)
    model, notes = load(config, tokenizer)
    assert notes[-1] == (
        "The tokenizer has 2 added tokens (covid, [E1]) that the model's embedding of 133 rows "
        "lacks: resized to 135, the new rows drawn at random."
    )
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    table = plain.get_input_embeddings().weight.detach().clone()
    plain.resize_token_embeddings(135)
    expected = plain.get_input_embeddings().weight
    found = model.model.get_input_embeddings().weight
    assert torch.equal(found, expected) and torch.equal(found[:133], table)
    assert model.model.config.vocab_size == 135
    other = load(config, tokenizer, seed=1)[0].model.get_input_embeddings().weight
    assert not torch.equal(found[133:], other[133:])  # the control: the seed is what draws
    assert torch.isfinite(logits_of(model, tokenizer, TEXTS)).all()


def test_a_text_without_added_tokens_has_the_same_logits(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = make_model(tmp_path, tokenizer)
    before = logits_of(load(config, tokenizer)[0], tokenizer, TEXTS)
    tokenizer.add_tokens(["covid"])
    after = logits_of(load(config, tokenizer)[0], tokenizer, TEXTS)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])  # the control: it has the token


def test_an_embedding_with_more_rows_is_left_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_tokens(["covid"])
    model, notes = load(make_model(tmp_path, tokenizer, vocab_size=192), tokenizer)
    assert notes == [] and model.model.get_input_embeddings().num_embeddings == 192


def test_a_resized_model_is_saved_and_predicts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_tokens(["covid"])
    model, _ = load(make_model(tmp_path / "base", tokenizer), tokenizer)
    save_classifier(model, tokenizer, tmp_path / "best", {"max_length": 32})
    expected = logits_of(model, tokenizer, TEXTS).softmax(-1).amax(-1)
    found = [answer["score"] for answer in Predictor(tmp_path / "best")(TEXTS)]
    assert found == pytest.approx(expected.tolist())


def test_a_model_that_cannot_be_resized_is_one_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_tokens(["covid"])
    config = make_model(tmp_path, tokenizer)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelError) as caught:
        patch.setattr(
            "transformers.BertForSequenceClassification.get_input_embeddings",
            lambda self: (_ for _ in ()).throw(NotImplementedError),
        )
        load(config, tokenizer)
    assert "cannot resize a model of type 'bert'" in str(caught.value)


def test_a_token_added_after_the_training_is_named_with_its_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_model(tmp_path, tokenizer)
    expected = Predictor(tmp_path)(TEXTS)
    tokenizer.add_tokens(["covid"])
    tokenizer.save_pretrained(tmp_path)
    predictor = Predictor(tmp_path)
    assert predictor(["good"]) == [pytest.approx(expected[1])]
    with pytest.raises(DataError) as caught:
        predictor(["good", "covid"])
    assert str(caught.value) == (
        "texts row 1: the tokenizer gives 'covid' the id 133; the model was trained with 133 ids, "
        "without it."
    )


# ---- Another model's tokenizer


def test_a_larger_vocabulary_is_one_line_with_both_numbers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = make_model(tmp_path, tokenizer, vocab_size=100)
    with pytest.raises(ModelError) as caught:
        load(config, tokenizer)
    assert str(caught.value) == (
        f"--model_name_or_path {tmp_path}: the tokenizer has 133 tokens with ids up to 132, the "
        "model's embedding has 100 rows. Use the model's own tokenizer (without --tokenizer_name), "
        "or the model that belongs to this tokenizer."
    )


def test_a_model_without_a_vocabulary_lacks_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert missing_tokens(AutoConfig.for_model("canine"), tokenizer, "it") == []


def save_vocabulary(folder: Path, words: list[str]) -> None:
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: id for id, word in enumerate([*special, *words])}
    BertTokenizerFast(vocab=vocabulary, model_max_length=512).save_pretrained(folder)


def test_a_tokenizer_with_other_ids_is_one_line_with_both_numbers(tmp_path: Path) -> None:
    save_vocabulary(tmp_path / "own", ["good", "bad", "film"])
    save_vocabulary(tmp_path / "other", ["bad", "good"])
    names = {"model_name_or_path": str(tmp_path / "own"), "max_length": 32}
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(**names, tokenizer_name=str(tmp_path / "other")))
    assert str(caught.value) == (
        f"--tokenizer_name {tmp_path / 'other'} (7 tokens) is not a tokenizer of "
        f"{tmp_path / 'own'} (8 tokens): 2 tokens that both have differ in their ids, 'good' is 6 "
        "and 5."
    )


@pytest.mark.parametrize("words", [["good", "bad", "film", "covid"], ["good", "new", "film"]])
def test_a_tokenizer_with_other_words_and_the_same_ids_is_taken(
    words: list[str], tmp_path: Path
) -> None:
    save_vocabulary(tmp_path / "own", ["good", "bad", "film"])
    save_vocabulary(tmp_path / "other", words)
    names = {"model_name_or_path": str(tmp_path / "own"), "max_length": 32}
    found = load_tokenizer(ModelConfig(**names, tokenizer_name=str(tmp_path / "other")))
    assert set(words) < set(found.get_vocab())


# ---- Segments


@pytest.mark.parametrize("packed", [True, False])
def test_segments_that_a_model_lacks_are_0(
    packed: bool,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_model(tmp_path, tokenizer, type_vocab_size=1)
    if not packed:
        monkeypatch.delitem(ARCHITECTURES, "bert")
    model, notes = load(config, tokenizer)
    assert model.packed is packed
    assert notes[0] == (
        "Pairs: the tokenizer gives segment ids up to 1, the model has type_vocab_size 1: the ids "
        "that it lacks are set to 0."
    )
    dataset = create_dataset(records_from_texts(["good"], ["bad film"]), tokenizer, None, 32)
    batch = collate(dataset[[0]])
    assert batch.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = plain(input_ids=batch.ids[None]).logits  # all segments 0
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-6)
    with pytest.raises(IndexError):  # the control: what Hugging Face does with these segments
        plain(input_ids=batch.ids[None], token_type_ids=batch.token_type_ids[None])


@pytest.mark.parametrize(("kind", "change"), [("bert", {}), ("deberta-v2", {"type_vocab_size": 0})])
def test_segments_that_a_model_has_or_never_reads_get_no_note(
    kind: str, change: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, notes = load(make_model(tmp_path, tokenizer, kind, **change), tokenizer)
    assert notes == []
    logits = [
        model(collate(create_dataset(records_from_texts(["a"], ["b"]), tokenizer, None, 32)[[0]]))
    ]
    assert torch.isfinite(logits[0]).all()
