"""Each family without padding is its padded Hugging Face self: logits, loss and every gradient, with dropout and checkpoints too.

Legend: T tokens, N texts, L tokens of one text.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from bertdist.core.config import ModelConfig
from bertdist.core.errors import ConfigError
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import attention, classifier, deberta
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.attention import padded_layout
from bertdist.models.classifier import Classifier, load_classifier, load_model_config
from bertdist.models.dropout import Dropout, DropoutMasks, seed_dropout
from bertdist.tasks.tasks import SingleLabel

TASK = SingleLabel(("bad", "fine", "good"))
LENGTHS = [
    24,
    19,
    18,
    12,
    7,
    7,
    3,
    1,
]  # two of a length, one token alone, more and less than a multiple of 16
VOCABULARY, POSITIONS = 60, 32

# initializer_range 0.2, not 0.02: at this width attention would be all but uniform, and a wrong mask hard to see.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SIZES |= {"max_position_embeddings": POSITIONS, "initializer_range": 0.2}
OFFSET = {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1}  # positions begin at 2
MODERN = {
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {"relative_attention": True, "max_relative_positions": -1, "layer_norm_eps": 1e-7}
DEBERTA_V3 = DEBERTA | {
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
}
DEBERTA_V3 |= {"position_biased_input": False, "type_vocab_size": 0}
KINDS: dict[str, dict[str, Any]] = {  # what differs from SIZES; a name begins with its model_type
    "bert": {},
    "ernie": {},
    "roberta": OFFSET,
    "xlm-roberta": OFFSET,
    "camembert": OFFSET,
    "data2vec-text": OFFSET,
    "distilbert": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "albert, two groups of two layers": {
        "embedding_size": 16,
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
    },
    "modernbert": {
        **MODERN,
        "global_attn_every_n_layers": 3,
        "classifier_pooling": "cls",
    },  # local: layers 2 and 3
    "modernbert, last layer local": {
        **MODERN,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "cls",
    },
    "modernbert, with biases": {
        **MODERN,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "classifier_pooling": "cls",
    },
    "modernbert, mean": {**MODERN, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"},
    "deberta-v2, as v3": DEBERTA_V3,
    "deberta-v2, as xlarge": {
        **DEBERTA_V3,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "embedding_size": 16,
    },
    "deberta-v2, one layer and a convolution": {
        **DEBERTA_V3,
        "conv_kernel_size": 5,
        "num_hidden_layers": 1,
    },
    "deberta-v2, own projections": {
        **DEBERTA,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 2,
        "max_relative_positions": 8,
    },
    "deberta-v2, one way": {
        **DEBERTA,
        "pos_att_type": ["c2p"],
        "position_buckets": 5,
        "type_vocab_size": 2,
    },
    "deberta-v2, absolute": {
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 2,
        "relative_attention": False,
    },
}
ONE_TYPE = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "distilbert", "modernbert")
PAIRED = [
    kind
    for kind, change in KINDS.items()
    if kind.split(",")[0] not in ONE_TYPE and change.get("type_vocab_size", 2)
]
ROTATED = [
    kind for kind in KINDS if kind.startswith("modernbert")
]  # only the distance of two positions matters
TABLED = [
    kind for kind, change in KINDS.items() if change.get("relative_attention")
]  # as there, of their own
UNPLACED = [
    kind for kind, change in KINDS.items() if change.get("position_biased_input") is False
]  # that read no positions
FIRST = [kind for kind in KINDS if "mean" not in kind]  # whose head reads the first token
FIRST_ONLY = [
    kind for kind in FIRST if "one layer" not in kind
]  # and so only that leaves the last layer
FEED_FORWARD = {
    "distilbert": "lin1",
    "albert": "ffn",
    "modernbert": "Wi",
}  # its first layer, else `intermediate.dense`


def kind_of(kind: str) -> str:
    return kind.split(",")[0]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        config = AutoConfig.for_model(kind_of(kind), **(SIZES | KINDS[kind]), num_labels=3)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config.id2label = dict(enumerate(TASK.labels))
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder

    return made


Loader = Callable[..., Classifier]


@pytest.fixture
def load(folder_of: Callable[[str], Path]) -> Loader:
    """kind -> what `load_classifier` makes of it, in float64 and without training."""

    def load_kind(kind: str, change: dict[str, float] | None = None, **settings: Any) -> Classifier:
        config = ModelConfig(
            model_name_or_path=str(folder_of(kind)), **{"max_length": POSITIONS, **settings}
        )
        found = load_model_config(config)
        found.update(change or {})
        model, notes = load_classifier(config, TASK, found)
        assert notes == [] or not model.packed  # a trained head, and no word of padding
        return model.eval().double()

    return load_kind


@cache
def plain_model(folder: Path, how: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=how)


def padded_twin(model: Classifier, folder: Path) -> Any:
    """The same weights as a plain Hugging Face model, its attention written out in Python.

    ModernBERT's must be SDPA: written out, transformers 5.23 gives NaN for a padded text longer than a window.
    """
    how = "sdpa" if model.model.config.model_type == "modernbert" else "eager"
    plain = deepcopy(plain_model(folder, how))
    plain.load_state_dict(model.model.state_dict())  # all names, and no others
    return plain.eval().to(model.model.dtype)


def batch_of(
    lengths: list[int] = LENGTHS, paired: bool = False, rows: list[int] | None = None
) -> PackedBatch:
    """Texts by rule: text i of LENGTHS is the same in any batch."""
    examples = []
    for row in rows or range(len(lengths)):
        ids = torch.randint(
            5, VOCABULARY, (lengths[row],), generator=torch.Generator().manual_seed(row)
        ).tolist()
        examples.append(
            Example(
                row, ids, [int(paired and i > len(ids) // 2) for i in range(len(ids))], row % 3, 1.0
            )
        )
    return collate(examples)


def padded(model: Classifier, batch: PackedBatch) -> dict[str, Tensor]:
    places, real = (torch.from_numpy(array) for array in padded_layout(batch.lengths))
    pad = model.model.config.pad_token_id
    found = {"input_ids": batch.ids[places].masked_fill(~real, pad), "attention_mask": real.long()}
    return found | (
        {"token_type_ids": batch.token_type_ids[places].masked_fill(~real, 0)}
        if batch.token_type_ids.any()
        else {}
    )


def loss_of(logits: Tensor, batch: PackedBatch) -> Tensor:
    return F.cross_entropy(logits, batch.targets, reduction="sum")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def all_gradients(model: Classifier, batch: PackedBatch) -> dict[str, Tensor]:
    return gradients(model.model, loss_of(model(batch), batch))


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the size of its tensor.

    A tensor counts as no smaller than a thousandth of the largest: a bias of the keys moves all scores of a softmax alike, so its
    gradient is zero but for rounding.
    """
    assert a.keys() == b.keys()
    size = max(gradient.abs().max() for gradient in b.values()) / 1000
    return max(
        ((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=size)).item() for name in a
    )


def test_every_family_is_tested() -> None:
    assert {kind_of(kind) for kind in KINDS} == set(ARCHITECTURES)


# ---- Equal to the padded model


# Logits of size 1 after some forty sums of 32 to 48 products, and gradients relative to their size: five times what is measured.
TOLERANCES = {torch.float32: (5e-6, 2e-4), torch.float64: (1e-12, 1e-12)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("kind", "paired"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in PAIRED)]
)
def test_logits_loss_and_gradients_equal_the_padded_ones(
    kind: str, paired: bool, dtype: torch.dtype, load: Loader, folder_of: Callable[[str], Path]
) -> None:
    model, batch = load(kind).to(dtype), batch_of(paired=paired)
    plain = padded_twin(model, folder_of(kind))
    logits, expected = model(batch), plain(**padded(model, batch)).logits
    assert model.packed and logits.shape == (8, 3)
    assert expected.std() > 0.1  # the texts do not all get one answer
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCES[dtype][0])
    loss, wanted = loss_of(logits, batch), loss_of(expected, batch)
    torch.testing.assert_close(loss, wanted, rtol=TOLERANCES[dtype][0], atol=0)
    found, twin = gradients(model.model, loss), gradients(plain, wanted)
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    assert largest(found, twin) < TOLERANCES[dtype][1]


def wrong_ends(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    real = attention.build_packing  # texts see parts of others
    monkeypatch.setattr(
        attention, "build_packing", lambda lengths, *rest: real(lengths[::-1], *rest)
    )
    return batch


def no_restart(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    monkeypatch.setattr(model, "_first_position", 0)
    return replace(batch, positions=torch.arange(len(batch.ids)) % POSITIONS)


def next_position(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    monkeypatch.setattr(model, "_first_position", model._first_position + 1)
    return batch


def no_positions(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    return replace(batch, positions=torch.zeros_like(batch.positions))


def no_segments(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    return replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))


def last_tokens(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    return replace(batch, cu_seqlens=torch.cat([batch.cu_seqlens[1:], batch.cu_seqlens[-1:]]) - 1)


def no_windows(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    for layer in model.model.base_model.layers:
        monkeypatch.setattr(layer.attn, "sliding_window", None)
    return batch


def other_distances(
    model: Classifier, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> PackedBatch:
    real = deberta._RelativePositions.rows

    def halved(*args: Any) -> tuple[Tensor, int, int]:
        rows, low, high = real(*args)
        return rows // 2, low, high

    monkeypatch.setattr(deberta._RelativePositions, "rows", halved)
    return batch


Breaking = Callable[[Classifier, PackedBatch, pytest.MonkeyPatch], PackedBatch]
ABSOLUTE = [kind for kind in KINDS if kind not in ROTATED + UNPLACED]
BROKEN: list[tuple[Breaking, list[str]]] = [
    (wrong_ends, list(KINDS)),
    (no_positions, ABSOLUTE + ROTATED),
    (no_restart, ABSOLUTE),
    (next_position, ABSOLUTE),
    (no_segments, PAIRED),
    (last_tokens, FIRST),
    (no_windows, ROTATED),
    (other_distances, TABLED),
]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_packing_is_detected(
    kind: str, load: Loader, folder_of: Callable[[str], Path]
) -> None:
    """The control: texts that see each other, wrong positions, segments left out, wrong tokens kept, windows not honoured."""
    model, batch = load(kind), batch_of(paired=kind in PAIRED)
    plain = padded_twin(model, folder_of(kind))
    expected = plain(**padded(model, batch)).logits
    twin = gradients(plain, loss_of(expected, batch))
    for broken in (broken for broken, kinds in BROKEN if kind in kinds):
        with pytest.MonkeyPatch.context() as patch:
            logits = model(broken(model, batch, patch))
            assert (logits - expected).abs().max() > 0.01, broken
            assert largest(gradients(model.model, loss_of(logits, batch)), twin) > 0.01, broken
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-12)  # all is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_the_padded_kernel_of_other_devices_gives_the_same(
    kind: str, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = load(kind), batch_of()
    expected = model(batch)
    twin = gradients(model.model, loss_of(expected, batch))
    asked: list[str] = []
    monkeypatch.setattr(
        attention, "select_kernel", lambda *unused: asked.append("padded") or "padded"
    )
    logits = model(batch)
    assert asked == ["padded"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert largest(gradients(model.model, loss_of(logits, batch)), twin) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_answers_are_those_of_bfloat16(kind: str, load: Loader) -> None:
    model, batch = load(kind).float(), batch_of()
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
        loss = loss_of(logits, batch)
    difference = (logits - expected).abs().max()
    assert 0 < difference < 0.1, difference  # 8 bits of mantissa
    assert all(gradient.isfinite().all() for gradient in gradients(model.model, loss).values())


# ---- Only the first tokens leave the last layer


def layers_of(model: Classifier) -> Any:
    body = model.model.base_model
    return (
        body.layers
        if hasattr(body, "layers")
        else (getattr(body, "encoder", None) or body.transformer).layer
    )


def whole_last_layer(model: Classifier) -> None:
    """Let the last layer run on all tokens, and pick the first ones from what leaves it."""
    last = (
        model.model.base_model.encoder
        if model.model.config.model_type == "albert"
        else layers_of(model)[-1]
    )
    if (
        model.model.config.model_type == "deberta-v2"
    ):  # Hugging Face's layer already, told which tokens are asked for
        last.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"query_states": None}), with_kwargs=True
        )
        last.register_forward_hook(
            lambda module, args, output: (output[0][:, args[1].packing.first_tokens], None)
        )
        return
    del last.forward  # the instance's; the class's is Hugging Face's own

    def pick(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        firsts = kwargs["packing"].first_tokens
        if isinstance(output, Tensor):
            return output[:, firsts].transpose(0, 1)
        output.last_hidden_state = output.last_hidden_state[:, firsts].transpose(0, 1)
        return output

    last.register_forward_hook(pick, with_kwargs=True)


def feed_forward_rows(model: Classifier, batch: PackedBatch) -> list[int]:
    """Rows of each call of a feed-forward layer, in order."""
    rows: list[int] = []
    name = FEED_FORWARD.get(model.model.config.model_type, "intermediate.dense")
    found = [module for path, module in model.named_modules() if path.endswith(f".{name}")]
    hooks = [
        module.register_forward_hook(
            lambda module, args, out: rows.append(args[0].shape[:-1].numel())
        )
        for module in found
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize("kind", FIRST_ONLY)
def test_a_last_layer_of_first_tokens_equals_the_full_layer(kind: str, load: Loader) -> None:
    model, whole, batch = load(kind), load(kind), batch_of(paired=kind in PAIRED)
    whole_last_layer(whole)
    torch.testing.assert_close(model(batch), whole(batch), rtol=0, atol=1e-12)
    assert largest(all_gradients(model, batch), all_gradients(whole, batch)) < 1e-12
    tokens = sum(LENGTHS)
    assert set(feed_forward_rows(whole, batch)) == {tokens}
    calls = feed_forward_rows(model, batch)
    assert set(calls[:-1]) == {tokens} and calls[-1] == len(LENGTHS)


def test_a_mean_is_of_all_tokens(load: Loader) -> None:
    (kind,) = set(KINDS) - set(FIRST)
    assert set(feed_forward_rows(load(kind), batch_of())) == {sum(LENGTHS)}


# ---- Dropout and checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_text_does_not_depend_on_the_other_texts(kind: str, load: Loader) -> None:
    model = load(kind, dropout=0.3).train()
    seed_dropout(1, 2, 0)
    batched = model(batch_of())
    for rows in ([3], [5, 4, 0], [7, 1]):
        torch.testing.assert_close(model(batch_of(rows=rows)), batched[rows], rtol=0, atol=1e-12)
    assert (batched - model.eval()(batch_of())).abs().max() > 0.05  # dropout there was
    seed_dropout(1, 3, 0)
    assert ((model.train()(batch_of()) - batched).abs().amax(1) > 1e-3).all()  # another step


@pytest.mark.parametrize("kind", KINDS)
def test_with_dropout_too_packed_equals_padded(
    kind: str, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Attention itself aside, but for DeBERTa's: SDPA draws for padded models, from torch's generator. The whole last layer draws for
    # all its tokens.
    names = () if "deberta" in kind else ("attention_probs_dropout_prob", "attention_dropout")
    change = {name: 0.0 for name in names if hasattr(load(kind).model.config, name)}
    model = load(kind, dropout=0.3)
    change = {
        name: p
        for name, p in model.model.config.to_dict().items()
        if p == 0.3 and isinstance(p, float)
    } | change
    model, batch = load(kind, change).train(), batch_of(paired=kind in PAIRED)
    if kind in FIRST_ONLY:
        whole_last_layer(model)
    monkeypatch.delitem(classifier.ARCHITECTURES, kind_of(kind))
    other = load(kind, change).train()
    assert model.packed and not other.packed
    seed_dropout(4, 5, 6)
    logits = model(batch)
    torch.testing.assert_close(other(batch), logits, rtol=0, atol=1e-12)
    seed_dropout(4, 6, 6)
    assert (other(batch) - logits).abs().max() > 0.05  # the control


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(
    kind: str, dropout: float, load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**settings: Any) -> dict[str, Tensor]:
        model = load(kind, dropout=dropout, **settings).train()
        seed_dropout(1, 2, 3)
        calls.append(0)
        name = FEED_FORWARD.get(model.model.config.model_type, "intermediate.dense")
        for path, module in model.named_modules():
            if path.endswith(f".{name}"):
                module.register_forward_hook(lambda *unused: calls.append(calls.pop() + 1))
        return all_gradients(model, batch_of(paired=kind in PAIRED))

    calls: list[int] = []
    plain, kept = found(), found(gradient_checkpointing=True)
    assert calls[1] in (
        2 * calls[0] - (kind in FIRST_ONLY),
        2 * calls[0],
    )  # again in the backward; the last one in transformers 5.17 only
    assert largest(kept, plain) == 0  # the same operations in the same order, and the same dropout
    monkeypatch.setattr(
        DropoutMasks, "replay_contexts", lambda self: (nullcontext(), nullcontext())
    )
    if dropout:
        assert (
            largest(found(gradient_checkpointing=True), plain) > 0.01
        )  # the control: other masks the second time


# ---- Settings


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_takes_effect_everywhere(kind: str, load: Loader) -> None:
    model = load(kind, dropout=0.25)
    assert {module.p for module in model.modules() if isinstance(module, Dropout)} == {0.25}
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_positions_are_an_error(kind: str, load: Loader) -> None:
    assert load(kind)(batch_of([POSITIONS])).shape == (1, 3)  # so many it can
    with pytest.raises(ConfigError) as caught:
        load(kind, max_length=POSITIONS + 1)
    assert (
        str(caught.value)
        == f"--max_length is {POSITIONS + 1}; this model has {POSITIONS} positions."
    )
