"""Every field of the config classes: honoured as transformers does, reset and named, or refused in one line.

Legend: T tokens, N texts.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, logging

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ModelError
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import model_config
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.attention import padded_layout
from bertdist.models.classifier import (
    Classifier,
    load_classifier,
    load_model_config,
    load_trained_classifier,
    pretrained_labels,
)
from bertdist.tasks.tasks import SingleLabel

logging.disable_progress_bar()
TASK = SingleLabel(("bad", "fine", "good"))
LENGTHS = (24, 19, 7, 3)
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 6}
FAMILY = {  # what a family adds to COMMON
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    "deberta-v2": DEBERTA,
}
BERT_LIKE = [kind for kind, family in ARCHITECTURES.items() if family.attention is not None]
BERT_LIKE = [kind for kind in BERT_LIKE if kind not in ("distilbert", "albert", "modernbert")]


def rope(**change: Any) -> dict[str, Any]:
    return {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), change)}


def of_families(*families: str, **change: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(family, change) for family in families]


# Fields that change the logits of the same weights.
EFFECTIVE = [
    *of_families(*BERT_LIKE, "albert", "deberta-v2", hidden_act="relu"),
    *of_families(*BERT_LIKE, "albert", "deberta-v2", layer_norm_eps=1.0),
    *of_families(*ARCHITECTURES, num_attention_heads=4),
    *of_families("distilbert", activation="relu"),
    *of_families("modernbert", hidden_activation="relu"),
    *of_families("modernbert", norm_eps=1.0),
    *of_families("modernbert", classifier_pooling="mean"),
    *of_families("modernbert", classifier_activation="tanh"),
    *of_families("modernbert", local_attention=3),
    *of_families("modernbert", local_attention=2),
    *of_families("modernbert", layer_types=["full_attention"] * 2),
    *of_families("modernbert", **rope(rope_type="default", rope_theta=50.0)),
    *of_families("modernbert", **rope(rope_type="linear", factor=4.0, rope_theta=50.0)),
    *of_families(
        "modernbert",
        **rope(
            rope_type="yarn",
            factor=4.0,
            rope_theta=50.0,
            original_max_position_embeddings=10,
        ),
    ),
    *of_families("deberta-v2", pooler_hidden_act="relu"),
    *of_families("deberta-v2", max_relative_positions=12),
]
# Fields with weights of their own, or with other shapes of them.
SHAPING = [
    *of_families("electra", embedding_size=32),
    *of_families("ernie", use_task_id=True),
    *of_families("albert", num_hidden_groups=2, inner_group_num=2),
    *of_families("distilbert", sinusoidal_pos_embds=True),
    *of_families("modernbert", norm_bias=True, attention_bias=True, mlp_bias=True),
    *of_families("modernbert", classifier_bias=True),
    *of_families(*BERT_LIKE, "albert", "deberta-v2", type_vocab_size=3),
    *of_families("deberta-v2", pos_att_type=None),
    *of_families("deberta-v2", pos_att_type="c2p"),
    *of_families("deberta-v2", share_att_key=True, norm_rel_ebd="layer_norm"),
    *of_families("deberta-v2", conv_kernel_size=3, conv_groups=2, conv_act="gelu"),
    *of_families("deberta-v2", position_biased_input=False),
    *of_families("deberta-v2", embedding_size=16),
    *of_families("deberta-v2", relative_attention=False),
]
# Fields that change no logit.
INERT = [
    *of_families(
        *ARCHITECTURES,
        tie_word_embeddings=False,
        is_encoder_decoder=True,
        attn_implementation="flash_attention_2",
    ),
    *of_families(*BERT_LIKE, use_cache=False, classifier_dropout=0.5),
    *of_families("electra", summary_type="mean", summary_use_proj=False, summary_activation="tanh"),
    *of_families("distilbert", qa_dropout=0.9, seq_classif_dropout=0.9),
    *of_families("albert", classifier_dropout_prob=0.9),
    *of_families("modernbert", deterministic_flash_attn=True, sparse_prediction=True),
    *of_families("modernbert", decoder_bias=False, classifier_dropout=0.5),
    *of_families("modernbert", **rope(rope_type="dynamic", factor=4.0)),
    *of_families("deberta-v2", legacy=False, pooler_dropout=0.9, pos_att_type="P2C | c2p|none"),
]
RESET = {"chunk_size_feed_forward": 5, "output_attentions": True, "output_hidden_states": True}
RESET |= {"return_dict": False}
REFUSED = [
    *of_families(*BERT_LIKE, is_decoder=True),
    *of_families(*BERT_LIKE, add_cross_attention=True),
    *of_families(*BERT_LIKE, "albert", position_embedding_type="relative_key"),
    *of_families(*BERT_LIKE, "distilbert", pruned_heads={"0": [1]}),
    *of_families(*BERT_LIKE, per_layer_config={"0": {"intermediate_size": 24}}),
    *of_families(
        "modernbert",
        **rope(
            rope_type="longrope",
            rope_theta=50.0,
            factor=4.0,
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            original_max_position_embeddings=10,
        ),
    ),
    *of_families("roberta", "xlm-roberta", "camembert", "data2vec-text", pad_token_id=None),
]


def make_folder(folder: Path, kind: str, **change: Any) -> Path:
    """A model with random weights, of COMMON with these changes."""
    written = {"attn_implementation", "output_attentions", "return_dict"} & set(change)
    settings = COMMON | FAMILY.get(kind, {}) | change
    config = AutoConfig.for_model(
        kind,
        **{k: v for k, v in settings.items() if k not in written},
        id2label=dict(enumerate(TASK.labels)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    edit(folder, **{name: change[name] for name in written})
    return folder


def edit(folder: Path, **change: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def load(folder: Path) -> tuple[Classifier, list[str]]:
    model, notes = load_classifier(ModelConfig(model_name_or_path=str(folder), max_length=32), TASK)
    return model.eval().double(), notes


def batch_of(*ids: list[int]) -> PackedBatch:
    return collate([Example(i, row, [0] * len(row), 0, 1.0) for i, row in enumerate(ids)])


def texts() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    return batch_of(
        *(torch.randint(5, 60, (length,), generator=generator).tolist() for length in LENGTHS)
    )


@torch.no_grad()
def padded_logits(folder: Path, batch: PackedBatch, **change: Any) -> Tensor:
    """Of Hugging Face's model, padded. change: of its config."""
    reset = {"chunk_size_feed_forward": 0, "return_dict": True} | change
    plain = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="sdpa" if "ModernBert" in read(folder) else "eager", **reset
    )
    index, real = (torch.from_numpy(array) for array in padded_layout(batch.lengths))
    ids = batch.ids[index].masked_fill(~real, COMMON["pad_token_id"])
    logits: Tensor = plain.eval().double()(input_ids=ids, attention_mask=real.long()).logits
    return logits


def read(folder: Path) -> str:
    return (folder / "config.json").read_text()


def name_of(value: Any) -> str | None:
    return value if isinstance(value, str) else ",".join(f"{k}={v}"[:30] for k, v in value.items())


# ---- What changes the arithmetic


@pytest.mark.parametrize(("kind", "change"), EFFECTIVE, ids=name_of)
def test_a_field_is_honoured_as_transformers_does(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder, batch = make_folder(tmp_path, kind, **change), texts()
    model, notes = load(folder)
    assert model.packed and notes == []
    expected = padded_logits(folder, batch)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-11)
    # The control: the same weights with the field as it was give other logits.
    defaults = AutoConfig.for_model(kind, **(COMMON | FAMILY.get(kind, {})))
    before = {name: getattr(defaults, name) for name in change}
    assert (padded_logits(folder, batch, **before) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(("kind", "change"), SHAPING, ids=name_of)
def test_a_field_with_weights_of_its_own_is_honoured(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder, batch = make_folder(tmp_path / "model", kind, **change), texts()
    model, notes = load(folder)
    assert model.packed and notes == []
    expected = padded_logits(folder, batch)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-11)
    assert expected.std() > 0.01


@pytest.mark.parametrize(("kind", "change"), INERT, ids=name_of)
def test_a_field_that_changes_no_logit_changes_none(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder, batch = make_folder(tmp_path, kind), texts()
    expected = padded_logits(folder, batch)
    model, notes = load(edit(folder, **change))
    assert model.packed and notes == []
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, RESET) for kind in [*ARCHITECTURES, "mpnet"]),
        *(("bert", {name: value}) for name, value in RESET.items()),
    ],
    ids=name_of,
)
def test_fields_of_outputs_are_reset_and_named(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder, batch = make_folder(tmp_path, kind), texts()
    expected = padded_logits(folder, batch)
    model, notes = load(edit(folder, **change))
    names = ", ".join(f"{name} {value}" for name, value in change.items())
    assert f"Settings of config.json that change no logit are reset: {names}." in notes
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "change"), REFUSED, ids=name_of)
def test_a_field_that_is_not_computed_is_refused(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = edit(make_folder(tmp_path, kind), **change)
    config = ModelConfig(model_name_or_path=str(folder), max_length=32)
    with pytest.raises(ModelError) as caught:
        load_model_config(config)
    (name, _), *_ = change.items()
    shown = "rope_type 'longrope'" if name == "rope_parameters" else name
    assert f"config.json: {shown}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_decoder_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The control of the refusals: a setting that nobody has listed is found by its logits.
    monkeypatch.setattr("bertdist.models.model_config.check_arithmetic", lambda *unused: None)
    folder = edit(make_folder(tmp_path, "bert"), is_decoder=True)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "is not supported: its logits differ from those of transformers by" in str(caught.value)


def test_a_model_that_cannot_run_is_one_line(tmp_path: Path) -> None:
    # heads that do not divide the hidden size: transformers checks this where there is no embedding_size
    folder = make_folder(tmp_path, "albert", num_attention_heads=3)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert str(caught.value).startswith("A model of type 'albert' does not classify plain texts: ")


COUNTING = [kind for kind, family in ARCHITECTURES.items() if family.counts_from_pad]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_pad_token_in_a_text_has_the_position_that_transformers_gives_it(
    kind: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, kind)
    model, _ = load(folder)
    batch = batch_of([2, 7, 1, 8, 9, 1, 1, 10, 3], [2, 1, 3], [1, 7, 1], [2, 7, 8, 3])
    logits, expected = model(batch), padded_logits(folder, batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    if kind in COUNTING:
        model._pad = None  # the control: pad tokens counted like others
        assert (model(batch) - expected).abs().amax(1)[:2].min() > 1e-3
        assert torch.equal(model(batch)[3], logits[3])


# ---- Values that nobody should have


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str (value: '64')"),
    ({"hidden_size": True}, "Field 'hidden_size' expected int, got bool (value: True)"),
    ({"hidden_size": [32]}, "Field 'hidden_size' expected int, got list (value: [32])"),
    ({"hidden_size": -32}, "hidden_size is -32; expected 1 or more."),
    ({"num_attention_heads": 0}, "num_attention_heads is 0; expected 1 or more."),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected 1 or more."),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected 1,000 at most."),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected 1 or more."),
    ({"chunk_size_feed_forward": -3}, "chunk_size_feed_forward is -3; expected 0 or more."),
    ({"initializer_range": -1.0}, "initializer_range is -1.0; expected 0 or more."),
    ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan; expected a finite number"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5; expected 0 to 1."),
    ({"hidden_dropout_prob": "0.1"}, "Field 'hidden_dropout_prob' with value '0.1' doesn't match"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf; expected a finite number."),
    ({"hidden_act": "gleu"}, "hidden_act is 'gleu'; unknown activation function. Did you mean"),
    ({"pad_token_id": 60}, "pad_token_id is 60, vocab_size 60."),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights cannot be"),
    ({"id2label": ["a", "b"]}, "id2label is ['a', 'b']; expected {\"0\": \"name\""),
    ({"id2label": {"0": "a", "7": "b"}}, "id2label has 2 names, and none for 1."),
    ({"id2label": {}}, "id2label is {}; expected"),
    ({"id2label": {"0": None, "1": "b"}}, "id2label has the name None; expected a string."),
    ({"id2label": None, "num_labels": -3}, "num_labels is -3; expected 1 to 100,000."),
    ({"id2label": None, "num_labels": "2"}, "num_labels is '2'; expected 1 to 100,000."),
    ({"id2label": None, "num_labels": 10**8}, "num_labels is 100000000; expected 1 to 100,000."),
    ({"problem_type": 3}, "problem_type is 3; expected a string."),
    ({"problem_type": ["regression"]}, "problem_type is ['regression']; expected a string."),
    ({"model_type": "gpt7"}, "model type `gpt7`"),
    ({"model_type": ["bert"]}, "unhashable type: 'list'"),
    ({"dtype": "float7"}, "has no attribute 'float7'"),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bert"), "bert")


@pytest.mark.parametrize(("change", "message"), BAD_VALUES, ids=str)
def test_a_wrong_value_is_one_line_before_weights_are_read(
    change: dict[str, Any], message: str, bert: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(read(bert))  # and no weights
    folder = edit(tmp_path, **change)
    with pytest.raises(ModelError) as caught:
        load_model_config(ModelConfig(model_name_or_path=str(folder), max_length=32))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change"), [{"hidden_size": 10**9}, {"vocab_size": 10**11}])
def test_a_model_larger_than_its_file_is_never_made(
    change: dict[str, int], bert: Path, tmp_path: Path
) -> None:
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    folder = edit(tmp_path, **change)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "weights, and model.safetensors can hold" in str(caught.value)


def test_a_config_larger_than_any_is_not_read(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_config, "MAX_CONFIG_BYTES", 1000)
    (tmp_path / "config.json").write_text(read(bert))
    with pytest.raises(ModelError, match="more than any model's"):
        load_model_config(ModelConfig(model_name_or_path=str(edit(tmp_path, more="x" * 1000))))


def test_label_names_that_are_numbers_are_their_digits(bert: Path, tmp_path: Path) -> None:
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    folder = edit(tmp_path, id2label={"0": 3, "1": 5, "2": 7})
    _, task, _ = load_trained_classifier(str(folder))
    assert task.labels == ("3", "5", "7")
    config = load_model_config(ModelConfig(model_name_or_path=str(folder)))
    assert pretrained_labels(config) == ("3", "5", "7")


def test_weights_of_another_type_are_named(bert: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, "roberta")
    edit(tmp_path, architectures=["BertForSequenceClassification"])
    _, notes = load(tmp_path)
    assert notes == [
        "config.json names the architecture BertForSequenceClassification, a model of type 'bert', "
        "and model_type 'roberta': the weights are read as the latter."
    ]
