"""Frozen weights have no gradient and end the backward pass; the others' gradients are bit for bit those without frozen weights.

Whole runs with --freeze: tests/unit/models/test_freezing_runs.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from bertdist.core.config import ALL_LAYERS, ModelConfig
from bertdist.core.errors import ConfigError
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import attention, cpu_layers
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import Classifier, load_classifier
from bertdist.models.cpu_layers import OneDnnLinear
from bertdist.models.dropout import seed_dropout
from bertdist.models.freezing import count_parameters, freeze
from bertdist.tasks.tasks import SingleLabel

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 34,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MARKS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["c2p", "p2c"],
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
MODERN = {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {  # one of each structure, the last two padded
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "distilbert": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "modernbert": {**MARKS, **MODERN, "local_attention": 8},
    "deberta-v2": DEBERTA,
    "mpnet": {},  # a table that all layers share
    "xlnet": {"vocab_size": 60, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 48},
}
CASES = [
    (kind, n, bf16)
    for kind in KINDS
    for n in (0, 2, ALL_LAYERS)
    for bf16 in (False, True)
    if (kind, n) != ("albert", 2) and not (bf16 and kind in ("mpnet", "xlnet", "electra"))
]
Gradients = dict[str, Tensor | None]


def model_of(kind: str, **settings: Any) -> Any:
    """A Hugging Face classifier of three layers, always of the same weights."""
    attention.register()
    sizes = {} if kind == "xlnet" else SIZES
    config = AutoConfig.for_model(kind, **{**sizes, **KINDS.get(kind, {}), **settings})
    packed = kind in ARCHITECTURES
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        config, attn_implementation=attention.NAME if packed else "eager"
    )


def batch_of(lengths: tuple[int, ...] = (24, 19, 18, 12, 7, 7, 3)) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in lengths]
    return collate([Example(i, x, [0] * len(x), i % 2, 1.0) for i, x in enumerate(ids)])


def gradients(model: Any, layers: int | None, step: int = 0, bf16: bool = False) -> Gradients:
    """Of a training step with dropout, by the names of Hugging Face."""
    if layers is not None:
        freeze(model, layers)
    classifier, batch = Classifier(model).train(), batch_of()
    seed_dropout(1, step, 0)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        logits = classifier(batch)
    F.cross_entropy(logits.float(), batch.targets).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def frozen_names(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def layer_inputs(model: Any) -> Iterator[list[bool]]:
    """Whether the input of each layer needs a gradient, in their order."""
    stack = next(x for x in model.base_model.modules() if isinstance(x, nn.ModuleList))
    seen: list[bool] = []
    for layer in stack:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    yield seen


@cache
def all_gradients(kind: str, bf16: bool) -> Gradients:
    """Of a model without frozen weights."""
    return gradients(model_of(kind), None, bf16=bf16)


@pytest.mark.parametrize(("kind", "layers", "bf16"), CASES)
def test_the_others_have_the_gradients_of_a_run_without_frozen_weights(
    kind: str, layers: int, bf16: bool
) -> None:
    expected, model = all_gradients(kind, bf16), model_of(kind)
    found = gradients(model, layers, bf16=bf16)
    frozen = frozen_names(model)
    trained = {name: x for name, x in expected.items() if name not in frozen and x is not None}
    # each of them has one, so that DDP need not look for unused ones
    assert {name for name, x in found.items() if x is not None} == set(trained)
    assert all(torch.equal(x, found[name]) for name, x in trained.items())  # type: ignore[arg-type]
    if layers == 0:  # the control: other dropout
        other = gradients(model_of(kind), layers, step=1, bf16=bf16)
        assert not all(torch.equal(x, other[name]) for name, x in trained.items())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "mpnet"]
)
def test_the_backward_pass_ends_above_the_frozen_layers(kind: str) -> None:
    for layers, expected in [(0, [False, True, True]), (2, [False] * 3), (1, [False, False, True])]:
        model = model_of(kind)
        seen = next(layer_inputs(model))
        gradients(model, layers)
        assert seen[-3:] == expected, layers  # before: probes at loading
    seen = next(layer_inputs(model := model_of(kind)))
    gradients(model, None)  # the control
    assert all(seen[-3:])


def test_what_is_frozen() -> None:
    def parts(kind: str, layers: int) -> set[str]:
        model = model_of(kind)
        freeze(model, layers)
        return {".".join(name.split(".")[1:4]) for name in frozen_names(model)}

    embeddings = {
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
    }
    layer = "encoder.layer."
    assert parts("bert", 0) == embeddings
    assert parts("bert", 2) == embeddings | {f"{layer}0", f"{layer}1"}
    assert parts("bert", ALL_LAYERS) == embeddings | {f"{layer}{i}" for i in range(3)}
    table = {"encoder.rel_embeddings.weight", "encoder.LayerNorm.weight", "encoder.LayerNorm.bias"}
    assert table < parts("deberta-v2", 0) and "encoder.conv.conv" not in parts("deberta-v2", 0)
    assert "encoder.conv.conv" in parts("deberta-v2", 1)
    assert "encoder.relative_attention_bias.weight" in parts("mpnet", 0)
    assert "final_norm.weight" not in parts("modernbert", 3)
    assert "final_norm.weight" in parts("modernbert", ALL_LAYERS)
    frozen, trained = count_parameters(model := model_of("bert"))
    assert frozen == 0 and trained == sum(x.numel() for x in model.parameters())
    freeze(model, ALL_LAYERS)
    head = 32 * 32 + 32 + 2 * 32 + 2  # pooler and output layer
    assert count_parameters(model) == (trained - head, head)


def test_frozen_layers_keep_no_activations() -> None:
    def kept(layers: int | None) -> int:
        model, batch = model_of("bert", num_hidden_layers=6), batch_of()
        if layers is not None:
            freeze(model, layers)
        classifier, sizes = Classifier(model).train(), {}
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = classifier(batch)
        assert logits.requires_grad
        return sum(sizes.values())

    everything = kept(None)
    assert kept(3) < 0.6 * everything and kept(ALL_LAYERS) < 0.05 * everything
    assert kept(0) > 0.9 * everything  # the control


def test_with_gradient_checkpointing_the_gradients_are_the_same() -> None:
    def checkpointed(layers: int | None) -> Gradients:
        model = model_of("bert")
        if layers is not None:
            freeze(model, layers)
        classifier, batch = Classifier(model).train(), batch_of()
        classifier.enable_gradient_checkpointing()
        seed_dropout(1, 0, 0)
        F.cross_entropy(classifier(batch), batch.targets).backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected, found = gradients(model_of("bert"), 1), checkpointed(1)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_any_weights_may_be_frozen_in_layers_written_by_hand(
    bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loop of one's own: each weight of a layer alone, as in BitFit, also above trained ones."""
    monkeypatch.setattr(cpu_layers, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(cpu_layers, "MIN_ROWS", 1)
    monkeypatch.setattr(cpu_layers, "MIN_ROWS_SQUARE", 1)
    expected = gradients(model_of("bert"), None, bf16=bf16)
    names = [name for name in expected if ".layer.1." in name]
    groups = [[name] for name in names] + [[n for n in expected if not n.endswith("bias")]]
    for group in groups:
        model = model_of("bert")
        for name, weight in model.named_parameters():
            weight.requires_grad_(name not in group)
        found = gradients(model, None, bf16=bf16)
        if not bf16 and cpu_layers.onednn_available():
            assert any(isinstance(module, OneDnnLinear) for module in model.modules())
        assert {name for name, x in found.items() if x is None} == set(group)
        for name, gradient in found.items():
            assert gradient is None or torch.equal(gradient, expected[name]), (group, name)  # type: ignore[arg-type]


REFUSED: list[tuple[str, int, str]] = [
    ("albert", 2, "--freeze 2: models of type 'albert' share the weights of their layers; use"),
    ("bert", 4, "--freeze is 4; this model has 3 layers."),
    ("bart", 1, "--freeze 1: models of type 'bart' have layers in an encoder and a decoder"),
    ("xlm", 1, "--freeze 1: models of type 'xlm' have no numbered layers; use --freeze embed"),
]
OTHER_SIZES = {
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, **MARKS},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "n_words": 60},
}


@pytest.mark.parametrize(("kind", "layers", "message"), REFUSED)
def test_layers_that_a_model_does_not_have_are_refused(
    kind: str, layers: int, message: str
) -> None:
    with torch.device("meta"):
        model = model_of(kind, **OTHER_SIZES.get(kind, {}))
    with pytest.raises(ConfigError) as error:
        freeze(model, layers)
    assert str(error.value).startswith(message)
    assert not frozen_names(model)
    freeze(model, 0)
    below = count_parameters(model)[0]
    freeze(model, ALL_LAYERS)
    frozen, trained = count_parameters(model)
    assert 0 < below < frozen and trained > 0


def test_new_rows_of_a_frozen_embedding_are_named(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["[PRODUCT]"])

    def notes(**settings: Any) -> str:
        config = ModelConfig(model_name_or_path=str(tiny_model), **settings)
        task = SingleLabel(("a", "b"))
        classifier, said = load_classifier(config, task, tokenizer=tokenizer)
        table = classifier.model.get_input_embeddings().weight
        assert table.requires_grad == ("freeze" not in settings)
        return " ".join(said)

    words = "These rows are frozen (--freeze): training leaves them as drawn."
    assert words in notes(freeze=["embeddings"]) and words not in notes()
