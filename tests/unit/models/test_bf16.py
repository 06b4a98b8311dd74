"""A bf16 step on a CPU: the added texts change nothing, and the rest is autocast's to bf16 rounding."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from bertdist.data.batch import PackedBatch, collate, split_batch
from bertdist.data.tokenization import Example
from bertdist.models import attention, bf16
from bertdist.models.bf16 import MANY_TOKENS, TEXTS, TOKENS, TOKENS_OF_MANY, round_up
from bertdist.models.classifier import Classifier
from bertdist.models.dropout import seed_dropout

LENGTHS = [31, 20, 19, 12, 7, 7, 3, 1]


def batch_of(lengths: list[int] = LENGTHS) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in lengths]
    return collate(
        [Example(row, each, [0] * len(each), row % 3, 1.0) for row, each in enumerate(ids)]
    )


def model_of(kind: str = "bert", dropout: float = 0.0, activation: str = "gelu") -> Classifier:
    attention.register()
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    settings = {"cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind,
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=40,
        initializer_range=0.2,
        num_labels=3,
        hidden_act=activation,
        attn_implementation=attention.NAME,
        **dict.fromkeys(names, dropout),
        **(settings if kind == "modernbert" else {}),
    )
    torch.manual_seed(0)
    return Classifier(AutoModelForSequenceClassification.from_config(config)).train()


def run(model: Classifier, batches: list[PackedBatch], step: int = 0) -> dict[str, Tensor]:
    """Logits and gradients under bf16 autocast; float64 for a model of that type."""
    model.zero_grad()
    seed_dropout(1, step, 0)
    logits = []
    for batch in batches:
        enabled = next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits.append(model(batch))
        F.cross_entropy(logits[-1].to(torch.float64), batch.targets, reduction="sum").backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": torch.cat(logits).detach(), **found}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of all tensors, relative to the size of its tensor.

    A bias of the keys moves all scores of a softmax alike: its gradient is rounding, and left out.
    """
    assert a.keys() == b.keys()
    names = [name for name in a if "key.bias" not in name and "key_proj.bias" not in name]
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in names)


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [5], [1], [40] * 3 + [2] * 9, [32] * 4, [8] * 300, [1] * (TEXTS - 1)]
)
def test_tokens_and_texts_are_round(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    more = round_up(batch)
    tokens, texts = sum(lengths), len(lengths)
    assert len(more.ids) == len(more.positions) == len(more.token_type_ids) == sum(more.lengths)
    assert len(more.ids) % (TOKENS if tokens < MANY_TOKENS else TOKENS_OF_MANY) == 0
    assert len(more.lengths) % TEXTS == 0 and min(more.lengths) > 0
    assert 0 < len(more.lengths) - texts <= TEXTS
    assert len(more.ids) - tokens < TEXTS + (TOKENS if tokens < MANY_TOKENS else TOKENS_OF_MANY)
    for name in ("ids", "positions", "token_type_ids"):
        assert torch.equal(getattr(more, name)[:tokens], getattr(batch, name))
    assert more.positions.max() < max(lengths) and more.lengths[:texts] == batch.lengths
    assert more.cu_seqlens.diff().tolist() == list(more.lengths)
    assert more.row_numbers[texts:].eq(-1).all() and more.targets is batch.targets


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_added_texts_change_no_logit_and_no_gradient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of(kind, dropout=0.2).double(), batch_of()
    plain = run(model, [batch])
    monkeypatch.setattr(bf16, "in_use", lambda device: True)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)  # what the embeddings are cast to
    assert far(run(model, [batch]), plain) < 1e-12
    monkeypatch.setattr(bf16, "round_up", lambda batch: round_up(batch_of(LENGTHS[::-1])))
    assert far(run(model, [batch]), plain) > 1e-3  # the control: other texts


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "deberta-v2"])
def test_layers_hand_on_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = model_of(kind), batch_of(), set()
    body = model.model.base_model
    layers = body.layers if kind == "modernbert" else getattr(body, "encoder", None)
    layers = layers if layers is not None else body.transformer
    for layer in getattr(layers, "layer", layers):
        layer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    run(model, [batch])
    assert seen == {torch.bfloat16}
    monkeypatch.setattr(bf16, "in_use", lambda device: False)
    run(model, [batch])
    assert torch.float32 in seen  # the control: what autocast does by itself


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_results_are_those_of_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(kind, dropout=0.2), batch_of()
    ours = run(model, [batch])
    monkeypatch.setattr(bf16, "in_use", lambda device: False)
    autocast = run(model, [batch])
    exact = run(model.double(), [batch])
    assert far(autocast, exact) > 0 and far(ours, exact) < 3 * far(autocast, exact)
    with torch.no_grad():
        next(model.float().parameters()).neg_()  # the control: other embeddings
    assert far(run(model, [batch]), exact) > 3 * far(autocast, exact)


def test_a_cut_batch_has_the_gradient_of_the_whole() -> None:
    model, batch = model_of(dropout=0.2), batch_of()
    whole, cut = run(model, [batch]), run(model, split_batch([batch], 40))
    assert 0 < far(cut, whole) < 0.03  # 8 bits of mantissa
    assert far(run(model, [batch], step=1), whole) > 0.3  # the control: other dropout
    assert far(run(model, [batch]), whole) == 0


def test_many_sizes_make_few_shapes() -> None:
    def shapes(change: Callable[[PackedBatch], PackedBatch]) -> int:
        generator = torch.Generator().manual_seed(0)
        lengths = [torch.randint(3, 30, (32,), generator=generator).tolist() for _ in range(50)]
        return len({len(change(batch_of(each)).ids) for each in lengths})

    assert shapes(round_up) < 10 and shapes(lambda batch: batch) > 30  # the control


# ---- BERT's layer as one operation


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each layer that runs as one operation."""
    calls, apply = [], bf16._Layer.apply

    def counted(x: Tensor, *rest: object) -> object:
        calls.append(len(x))
        return apply(x, *rest)

    monkeypatch.setattr(bf16._Layer, "apply", counted)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_the_operation_is_the_layer(
    kind: str, dropout: float, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of(kind, dropout).double(), batch_of()
    modules = run(model, [batch])
    assert layers == []
    monkeypatch.setattr(bf16, "in_use", lambda device: True)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    assert far(run(model, [batch]), modules) < 1e-12
    assert len(layers) == 2 and layers[0] % TOKENS == 0  # the last computes first tokens only
    of_weight = bf16._of_weight
    monkeypatch.setattr(bf16, "_of_weight", lambda d, x, wanted: of_weight(d * 1.001, x, wanted))
    assert far(run(model, [batch]), modules) > 1e-4  # the control


def test_the_operation_without_training_and_other_layers(
    layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model, relu, distilbert = (
        batch_of(),
        *(
            made.double()
            for made in (model_of(dropout=0.3), model_of(activation="relu"), model_of("distilbert"))
        ),
    )
    monkeypatch.setattr(bf16, "in_use", lambda device: True)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)
    run(model.eval(), [batch])  # gradients without dropout
    assert len(layers) == 2
    with torch.no_grad():
        model(batch)
    for other in (relu, distilbert):
        run(other, [batch])
    assert len(layers) == 2  # their own modules


def test_gradient_checkpointing_runs_the_modules_twice(layers: list[int]) -> None:
    model, batch, calls = model_of(dropout=0.3), batch_of(), []
    plain = run(model, [batch])
    model.enable_gradient_checkpointing()
    first = model.model.base_model.encoder.layer[0]
    first.intermediate.register_forward_hook(lambda *args: calls.append(1))
    assert 0 < far(run(model, [batch]), plain) < 0.03  # the same dropout
    assert len(layers) == 2 and len(calls) == 2
    first.output.dropout.p = 0.0
    assert far(run(model, [batch]), plain) > 0.05  # the control
