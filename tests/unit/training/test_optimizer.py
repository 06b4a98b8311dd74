"""Weight decay and learning rate of each parameter; the learning rate as a function of the step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification, get_scheduler

from bertdist.core.config import OptimConfig
from bertdist.core.errors import ConfigError
from bertdist.models.cpu_layers import reuse_embedding_gradient
from bertdist.training.optimizer import (
    clip_gradients,
    create_lr_schedule,
    create_optimizer,
    set_learning_rate,
)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """Three layers of two units, wrapped as in `Classifier`."""
    config = BertConfig(
        vocab_size=5,
        hidden_size=2,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=2,
        max_position_embeddings=4,
    )
    wrapper = nn.Module()
    wrapper.model = BertForSequenceClassification(config)
    return wrapper


def settings_by_weight(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Name of each weight -> its group's settings."""
    of_weight = {
        id(weight): group for group in optimizer.param_groups for weight in group["params"]
    }
    return {name: of_weight[id(weight)] for name, weight in model.named_parameters()}


def test_biases_and_norm_weights_do_not_decay(bert: nn.Module) -> None:
    groups = settings_by_weight(bert, create_optimizer(bert, OptimConfig(weight_decay=0.1)))
    plain = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert plain == {name for name in groups if name.endswith(".bias") or "LayerNorm" in name}
    assert len(plain) > 20
    assert {group["weight_decay"] for name, group in groups.items() if name not in plain} == {0.1}
    assert "model.classifier.weight" not in plain


def test_every_parameter_is_in_one_group(bert: nn.Module) -> None:
    optimizer = create_optimizer(bert, OptimConfig(layerwise_lr_decay=0.5))
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in bert.parameters())


def test_frozen_weights_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = create_optimizer(model, OptimConfig()).param_groups
    assert group["params"] == [model.weight]


def test_without_layerwise_decay_all_rates_are_equal(bert: nn.Module) -> None:
    optimizer = create_optimizer(bert, OptimConfig(learning_rate=2e-5))
    assert len(optimizer.param_groups) == 2
    assert {(group["lr"], group["peak_lr"]) for group in optimizer.param_groups} == {(2e-5, 2e-5)}


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("model.classifier.weight", 1.0),
        ("model.classifier.bias", 1.0),
        ("model.bert.pooler.dense.weight", 1.0),
        ("model.bert.encoder.layer.2.output.dense.weight", 0.5),
        ("model.bert.encoder.layer.1.attention.self.query.bias", 0.25),
        ("model.bert.encoder.layer.0.output.LayerNorm.weight", 0.125),
        ("model.bert.embeddings.word_embeddings.weight", 0.0625),
        ("model.bert.embeddings.LayerNorm.weight", 0.0625),
    ],
)
def test_each_layer_has_half_the_rate_of_the_layer_above(
    name: str, rate: float, bert: nn.Module
) -> None:
    group = settings_by_weight(
        bert, create_optimizer(bert, OptimConfig(learning_rate=8.0, layerwise_lr_decay=0.5))
    )[name]
    assert (group["lr"], group["peak_lr"]) == (8 * rate, 8 * rate)


@pytest.mark.parametrize(
    "path",
    [
        "transformer.layer.{}.ffn.lin1",
        "encoder.layers.{}.mlp.Wo",
        "model.layers.{}.attn.Wqkv",
        "h.{}.mlp.c_fc",
    ],
)
def test_layers_of_other_model_families_are_recognized(path: str) -> None:
    model = nn.Module()
    for layer in range(3):
        *modules, last = path.format(layer).split(".")
        parent: nn.Module = model
        for name in ("base", *modules):
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, nn.Linear(2, 2))
    groups = settings_by_weight(
        model, create_optimizer(model, OptimConfig(learning_rate=1.0, layerwise_lr_decay=0.5))
    )
    assert [groups[f"base.{path.format(layer)}.weight"]["lr"] for layer in range(3)] == [
        0.125,
        0.25,
        0.5,
    ]


def test_layerwise_decay_without_layers_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--layerwise_lr_decay: this model has no numbered layers; leave it at 1\.$",
    ):
        create_optimizer(nn.Linear(2, 2), OptimConfig(layerwise_lr_decay=0.9))
    create_optimizer(nn.Linear(2, 2), OptimConfig())  # 1 needs no layers


def test_adam_settings_are_used() -> None:
    optimizer = create_optimizer(
        nn.Linear(2, 2), OptimConfig(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    )
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-6, True)


def test_first_step_equals_the_hand_computed_one() -> None:
    # After one step Adam's direction is g / (|g| + eps) whatever the betas, and the decay subtracts
    # lr x decay of the weight (https://arxiv.org/abs/1711.05101, algorithm 2).
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(3.0), model.bias.fill_(5.0)
    optimizer = create_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.01))
    set_learning_rate(optimizer, 0.5)
    model.weight.grad, model.bias.grad = (
        torch.full_like(model.weight, 4.0),
        torch.full_like(model.bias, -4.0),
    )
    optimizer.step()
    assert model.weight.item() == pytest.approx(
        3 - 0.05 * 0.01 * 3 - 0.05, abs=1e-9
    )  # eps / |g| is 2.5e-9 of 0.05
    assert model.bias.item() == pytest.approx(5 + 0.05, abs=1e-9)


def test_a_factor_scales_every_group_from_its_own_peak(bert: nn.Module) -> None:
    optimizer = create_optimizer(bert, OptimConfig(learning_rate=8.0, layerwise_lr_decay=0.5))
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    for factor in (0.25, 0.0, 0.5):  # twice in a row: a factor is not multiplied onto the last one
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [
            factor * peak for peak in peaks
        ]


# ---- Schedules

NAMES = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


def rates_of_transformers(name: Any, learning_rate: float, warmup: int) -> list[float]:
    """Of its scheduler on an AdamW of two groups, stepped 10 times as in run_glue_no_trainer.py."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [
        {"params": [weight], "weight_decay": x} for weight, x in zip(weights, (0, 0.1), strict=True)
    ]
    optimizer = AdamW(groups, lr=learning_rate)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    rates = []
    for step in range(10):
        if step:
            optimizer.step()
            scheduler.step()
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        rates.append(rate)
    return rates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 3, 10])
@pytest.mark.parametrize("learning_rate", [5e-5, 2e-7, 1.0])
def test_learning_rates_equal_those_of_transformers(
    name: Any, warmup: int, learning_rate: float
) -> None:
    rates = rates_of_transformers(name, learning_rate, warmup)
    config = OptimConfig(lr_scheduler_type=name, warmup_steps=warmup, learning_rate=learning_rate)
    optimizer = create_optimizer(nn.Linear(1, 1), config)
    schedule = create_lr_schedule(config, 10)
    ours = [set_learning_rate(optimizer, schedule(step)) for step in range(10)]
    assert ours == pytest.approx(rates, rel=1e-15, abs=0)
    if warmup < 10 and (name not in ("constant", "constant_with_warmup") or warmup == 3):
        if name == "constant":
            return
        # Negative control: an offset of one step is seen.
        shifted = [set_learning_rate(optimizer, schedule(step + 1)) for step in range(10)]
        assert shifted != pytest.approx(rates, rel=1e-15, abs=0)


def test_polynomial_ends_at_an_absolute_rate() -> None:
    """transformers' lr_end is 1e-7 whatever the peak is: negative control for a relative one."""
    for learning_rate in (5e-5, 2e-7):
        config = OptimConfig(lr_scheduler_type="polynomial", learning_rate=learning_rate)
        end = learning_rate * create_lr_schedule(config, 10)(10)
        assert end == pytest.approx(1e-7, rel=1e-12)
        relative = create_lr_schedule(replace(config, learning_rate=1.0), 10)
        assert learning_rate * relative(10) != pytest.approx(1e-7, rel=0.1)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-7])
def test_a_rate_below_the_last_one_of_polynomial_is_one_line(learning_rate: float) -> None:
    config = OptimConfig(lr_scheduler_type="polynomial", learning_rate=learning_rate)
    with pytest.raises(ConfigError) as caught:
        create_lr_schedule(config, 10)
    assert str(caught.value) == (
        "--lr_scheduler_type polynomial: lr_end (1e-07) must be smaller than initial lr "
        f"({learning_rate})."
    )


def test_linear_by_hand() -> None:
    schedule = create_lr_schedule(OptimConfig(warmup_ratio=0.2), 10)
    assert [schedule(step) for step in range(10)] == [
        0,
        0.5,
        1,
        7 / 8,
        6 / 8,
        5 / 8,
        4 / 8,
        3 / 8,
        2 / 8,
        1 / 8,
    ]


def test_cosine_by_hand() -> None:
    schedule = create_lr_schedule(OptimConfig(lr_scheduler_type="cosine"), 4)
    assert [schedule(step) for step in range(4)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)], abs=1e-15
    )


def test_the_first_step_without_warmup_has_the_full_rate() -> None:
    for name in NAMES:
        assert create_lr_schedule(OptimConfig(lr_scheduler_type=name), 10)(0) == 1  # type: ignore[arg-type]


def test_schedule_is_a_pure_function() -> None:
    schedule = create_lr_schedule(OptimConfig(lr_scheduler_type="cosine", warmup_steps=2), 10)
    forwards = [schedule(step) for step in range(10)]
    assert [schedule(step) for step in reversed(range(10))] == forwards[::-1]


def test_a_ratio_is_rounded_to_steps() -> None:
    by_ratio, by_steps = (
        create_lr_schedule(config, 15)
        for config in (OptimConfig(warmup_ratio=0.1), OptimConfig(warmup_steps=2))
    )
    assert [by_ratio(step) for step in range(15)] == [by_steps(step) for step in range(15)]


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^--warmup_steps is 11, but the run has 10 steps\.$"):
        create_lr_schedule(OptimConfig(warmup_steps=11), 10)
    assert create_lr_schedule(OptimConfig(warmup_steps=10), 10)(5) == 0.5


# ---- Clipping


class Table(nn.Module):
    """A word embedding and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.matrix = nn.Embedding(50, 8), nn.Linear(8, 3)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def backward(self) -> None:
        for ids in ([3, 1, 3], [7, 3]):
            self.matrix(self.table(torch.tensor(ids))).pow(2).sum().backward()


@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("max_norm", [0.1, 1e4, math.inf])
def test_clipped_gradients_are_those_of_torch(max_norm: float, reused: bool) -> None:
    ours, plain = Table(), Table()
    if reused:
        reuse_embedding_gradient(ours)
    for model in (ours, plain):
        model.backward()
    before = [weight.grad.clone() for weight in plain.parameters() if weight.grad is not None]
    norm = clip_gradients(ours, max_norm, Accelerator(cpu=True))
    expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b, c in zip(ours.parameters(), plain.parameters(), before, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
        assert torch.equal(a.grad, c) == (max_norm > 1)  # the control: they were scaled


def test_the_norm_of_many_gradients_is_exact_to_rounding() -> None:
    model = nn.Linear(1 << 11, 1 << 11)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-3
    exact = nn.utils.get_total_norm([weight.grad.double() for weight in model.parameters()])
    error = clip_gradients(model, math.inf, Accelerator(cpu=True)) / exact - 1
    assert error.abs() < 1e-5
    float32 = nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    assert (
        float32 / exact - 1
    ).abs() > 5e-5  # the control: torch 2.13 sums squares one after the other


def test_the_norm_of_no_gradients_is_zero() -> None:
    assert clip_gradients(Table(), 1.0, Accelerator(cpu=True)) == 0


def test_a_norm_that_is_not_finite_spreads_as_with_torch() -> None:
    model = Table()
    model.backward()
    assert model.matrix.bias.grad is not None and model.matrix.weight.grad is not None
    model.matrix.bias.grad[0] = math.nan
    assert clip_gradients(model, 1.0, Accelerator(cpu=True)).isnan()
    assert model.matrix.weight.grad.isnan().all()
