"""The meter's numbers: worked out by hand, and beside what torch itself counts.

No rate and no second is compared with a wish.
"""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
)

from bertdist.core.config import ALL_LAYERS
from bertdist.data.batch import collate
from bertdist.data.tokenization import Example
from bertdist.models import attention
from bertdist.models.classifier import Classifier
from bertdist.models.freezing import freeze
from bertdist.training import throughput
from bertdist.training.throughput import (
    MEASURED,
    ModelFlops,
    ThroughputMeter,
    matmul_rate,
    model_flops,
)

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 5,
}
LINEAR = 4 * 32 * 32 + 2 * 32 * 48  # weights of one layer


def model_of(config: Any, implementation: str = "eager") -> Any:
    return AutoModelForSequenceClassification.from_config(
        config, attn_implementation=implementation
    )


def counted(call: Any) -> float:
    """What torch counts of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    return counter.get_total_flops()


def batch_of(lengths: Sequence[int]) -> Any:
    return collate(
        [
            Example(row, [5 + row] * length, [0] * length, 1, 1.0)
            for row, length in enumerate(lengths)
        ]
    )


# ---- FLOPs


def test_flops_of_bert_by_hand() -> None:
    flops = model_flops(model_of(BertConfig(**SIZES)))
    layers = 6 * LINEAR * 3 * (7 + 4) + 12 * 32 * 3 * (7 * 7 + 4 * 4)
    assert flops([7, 4]) == layers + 2 * 6 * (
        32 * 32 + 32 * 5
    )  # pooler and head see one vector a text
    assert flops([]) == 0


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SIZES),
        RobertaConfig(**SIZES, pad_token_id=1),
        ElectraConfig(**SIZES, embedding_size=24),  # a projection between embeddings and encoder
        AlbertConfig(
            **SIZES, embedding_size=24, num_hidden_groups=1
        ),  # one layer that runs three times
        AlbertConfig(**{**SIZES, "num_hidden_layers": 4}, embedding_size=24, num_hidden_groups=2),
        DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48, num_labels=5),
        ModernBertConfig(
            **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_flops_are_what_torch_counts(config: Any) -> None:
    """Texts of one length, so that the padded model computes nothing in vain."""
    model = model_of(config).train()
    found = counted(
        lambda: (
            model(
                input_ids=torch.randint(5, 99, (3, 20)),
                attention_mask=torch.ones(3, 20, dtype=torch.long),
            ).logits
        )
    )
    expected = model_flops(model)([20, 20, 20])
    assert found == pytest.approx(expected, rel=0.01)
    layers = (
        len(model.base_model.encoder.layer)
        if config.model_type in ("bert", "roberta", "electra")
        else config.num_hidden_layers
    )
    for wrong in (
        layers - 1,
        layers + 1,
    ):  # the control: one layer more or less is not within a hundredth
        assert found != pytest.approx(expected * wrong / layers, rel=0.01)


def test_frozen_layers_cost_their_forward_pass() -> None:
    model = model_of(BertConfig(**SIZES))
    freeze(model, 2)
    layers = (6 + 2 + 2) * LINEAR * (7 + 4) + (12 + 4 + 4) * 32 * (7 * 7 + 4 * 4)
    assert model_flops(model)([7, 4]) == layers + 2 * 6 * (32 * 32 + 32 * 5)
    freeze(model, ALL_LAYERS)
    found = counted(lambda: model(input_ids=torch.randint(5, 99, (3, 20))).logits)
    assert found == pytest.approx(model_flops(model)([20] * 3), rel=0.02)
    for weight in model.parameters():  # the control
        weight.requires_grad_(True)
    assert found < 0.5 * model_flops(model)([20] * 3)


def test_flops_of_a_packed_batch_are_what_torch_counts() -> None:
    attention.register()
    model, lengths = (
        Classifier(model_of(BertConfig(**SIZES), attention.NAME)),
        [32, 32, 16],
    )  # whole buckets of attention's
    assert model.first_tokens_only
    found = counted(lambda: model(batch_of(lengths)))
    assert found == pytest.approx(model_flops(model.model, "first tokens")(lengths), rel=0.01)
    assert found != pytest.approx(
        model_flops(model.model)(lengths), rel=0.01
    )  # the controls: all tokens in the last layer, and padding
    assert found != pytest.approx(model_flops(model.model, "first tokens")([32] * 3), rel=0.01)


def first_tokens_only(model: Any, ids: Tensor) -> Tensor:
    """BERT with a last layer that computes K and V for all tokens, and everything else for the
    first one: logits (N, outputs).
    """
    hidden = model.bert.embeddings(input_ids=ids)
    for layer in model.bert.encoder.layer[:-1]:
        output = layer(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
    last = model.bert.encoder.layer[-1]
    first, own = hidden[:, :1], last.attention.self
    q, k, v = (
        part(x).unflatten(-1, (4, 8)).transpose(1, 2)
        for part, x in ((own.query, first), (own.key, hidden), (own.value, hidden))
    )
    context = ((q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(-2)
    attended = last.attention.output(context, first)
    logits: Tensor = model.classifier(
        model.bert.pooler(last.output(last.intermediate(attended), attended))
    )
    return logits


def test_flops_of_a_last_layer_for_first_tokens_are_what_torch_counts() -> None:
    model, ids = model_of(BertConfig(**SIZES)).eval(), torch.randint(5, 99, (3, 20))
    torch.testing.assert_close(
        first_tokens_only(model, ids), model(input_ids=ids).logits
    )  # it is the same model
    found = counted(lambda: first_tokens_only(model, ids))
    assert found == pytest.approx(model_flops(model, last_layer="first tokens")([20] * 3), rel=0.01)
    assert found != pytest.approx(model_flops(model)([20] * 3), rel=0.01)  # the control


def test_a_model_that_is_not_understood_has_no_flops() -> None:
    odd = SimpleNamespace(config=SimpleNamespace(), base_model=torch.nn.Linear(2, 2))
    assert math.isnan(model_flops(odd)([3, 4]))


# ---- The rate of matrix products


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_rate_is_measured_and_draws_from_no_generator(precision: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert 0 < matmul_rate(torch.device("cpu"), precision, seconds=0.0) < math.inf
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(1)
    assert not torch.equal(torch.get_rng_state(), before)  # the control


# ---- Meter

Given = Sequence[Sequence[Sequence[int]]]  # lengths of the texts of each micro-batch of each step


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def slow(given: Given, clock: Clock, seconds: float) -> Iterator[Any]:
    """Steps that are waited for."""
    for lengths in given:
        clock.now += seconds
        yield SimpleNamespace(lengths=lengths)


def meter_of(packed: bool = True) -> ThroughputMeter:
    return ThroughputMeter(ModelFlops(per_token=100, per_pair=0, per_text=0), packed, rate=1000)


def run(
    meter: ThroughputMeter, given: Given, clock: Clock, wait: float = 0.5, work: float = 1.0
) -> None:
    """One rank's steps, brought together."""
    for _ in meter.watch(slow(given, clock, wait)):
        clock.now += work
    meter.add(meter.take()[None].double())


def test_a_lap_by_hand(clock: Clock) -> None:
    meter = meter_of()
    run(meter, [[[3, 2], [1]], [[4]]], clock)
    assert meter.lap() == {
        "tokens_per_second": 10 / 3,  # two steps of 0.5 s of waiting and 1 s of work
        "data_wait_seconds": 1.0,
        "padding_factor": 1.0,
        "model_tflops": pytest.approx(1000 / 3 / 1e12),
        "flop_utilization": pytest.approx(1 / 3),
        "slowest_rank": 1.0,
    }
    run(meter, [[[6]]], clock, wait=0.25)
    assert meter.lap()["tokens_per_second"] == pytest.approx(
        6 / 1.25
    )  # of the steps since the last lap only
    summary = meter.summary()
    assert (
        summary["train_steps"] == 3
        and summary["train_seconds"] == 4.25
        and summary["data_wait_seconds"] == 1.25
    )
    assert (
        summary["tokens_per_second"] == pytest.approx(16 / 4.25)
        and summary["matmul_tflops"] == 1e-9
    )


def test_no_load_makes_a_utilization_above_1(clock: Clock) -> None:
    """1000 FLOP/s were measured while something else used the machine."""
    meter = meter_of()
    run(meter, [[[30]]], clock, wait=0.0, work=1.0)  # 3000 FLOP/s
    assert (meter.lap()["flop_utilization"], meter.rate) == (1.0, 3000)
    run(meter, [[[10]]], clock, wait=0.0, work=1.0)
    lap = meter.lap()
    assert lap["flop_utilization"] == pytest.approx(1 / 3)  # of what the run itself has reached
    summary = meter.summary()
    assert summary["flop_utilization"] == pytest.approx(2 / 3)
    assert summary["matmul_tflops"] == pytest.approx(3000 / 1e12)
    slow = meter_of()  # the control: a machine that was idle
    slow.rate = 10_000
    run(slow, [[[30]]], clock, wait=0.0, work=1.0)
    assert slow.lap()["flop_utilization"] == pytest.approx(0.3)


@pytest.mark.parametrize(("again", "rate"), [(500.0, 1000), (4000.0, 4000)])
def test_the_higher_of_two_measurements_counts(again: float, rate: float, clock: Clock) -> None:
    flops = ModelFlops(per_token=100, per_pair=0, per_text=0)
    meter = ThroughputMeter(flops, True, 1000, lambda: again)
    run(meter, [[[4]]], clock, wait=0.0, work=1.0)
    assert meter.summary()["flop_utilization"] == pytest.approx(0.4)
    meter.measure_again()
    summary = meter.summary()
    assert summary["flop_utilization"] == pytest.approx(400 / rate)
    assert summary["matmul_tflops"] == pytest.approx(rate / 1e12)


def rates_of(accelerator: Accelerator) -> list[float]:
    """Before and after a run of two ranks, of which one has no memory left at the end."""
    found = iter([100.0, 300.0])

    def matmul_rate(device: Any, precision: str) -> float:
        rate = next(found) + accelerator.process_index
        if rate > 300:
            raise torch.OutOfMemoryError
        return rate

    throughput.matmul_rate = matmul_rate  # type: ignore[assignment]
    attention.register()
    classifier = Classifier(model_of(BertConfig(**SIZES), attention.NAME))
    meter = throughput.create_meter(classifier, accelerator)
    rates = [meter.rate]
    meter.measure_again()
    return [*rates, meter.rate]


def test_all_ranks_measure_before_and_after() -> None:
    assert run_ranks(2, rates_of) == [[201.0, 300.0]] * 2


def test_every_key_is_known_to_who_compares_runs(clock: Clock) -> None:
    meter = meter_of()
    run(meter, [[[3]]], clock)
    of_the_run = {"tokens_per_micro_batch", "evaluation_seconds", "saving_seconds"}
    assert meter.lap().keys() | meter.summary().keys() == set(MEASURED) - of_the_run


def test_pauses_do_not_count(clock: Clock) -> None:
    meter = meter_of()
    with meter.paused():
        clock.now += 100
    run(meter, [[[2]]], clock)
    with meter.paused():
        clock.now += 100
        assert meter.summary()["train_seconds"] == 1.5, "nor inside of one"
    assert meter.lap()["tokens_per_second"] == 2 / 1.5
    clock.now += 100  # the control: what is not a pause counts
    assert meter.summary()["train_seconds"] == 101.5


def test_a_padded_model_is_given_more_cells_than_tokens(clock: Clock) -> None:
    given = [[[3, 2, 1], [1, 1]], [[4]]]
    for packed, factor in ((False, (9 + 2 + 4) / 12), (True, 1.0)):
        meter = meter_of(packed)
        run(meter, given, clock)
        assert meter.lap()["padding_factor"] == factor


def test_steps_pass_unchanged(clock: Clock) -> None:
    steps = [SimpleNamespace(lengths=[[n]]) for n in (1, 2, 3)]
    assert list(meter_of().watch(iter(steps))) == steps


def test_the_slowest_rank_is_found_step_by_step(clock: Clock) -> None:
    """Two ranks that take turns with the long texts are as slow as one that always has them."""
    meter, by_rank = meter_of(), []
    for given, wait in (([[[3]], [[1]]], 0.5), ([[[1]], [[3]]], 0.125)):
        list(meter.watch(slow(given, clock, wait)))
        by_rank.append(meter.take().double())
    meter.add(torch.stack(by_rank))
    clock.now += 0.75
    lap = meter.lap()
    assert lap["slowest_rank"] == (3 + 3) / (2 + 2)
    assert lap["data_wait_seconds"] == 1.0  # of the rank that waited longest, not of both
    assert lap["tokens_per_second"] == 4.0  # of both


def test_an_idle_rank_has_no_load(clock: Clock) -> None:
    meter, by_rank = meter_of(), []
    for lengths in ([[4]], []):
        list(meter.watch(slow([lengths], clock, 1.0)))
        by_rank.append(meter.take().double())
    meter.add(torch.stack(by_rank))
    lap = meter.lap()
    assert (lap["slowest_rank"], lap["padding_factor"], lap["tokens_per_second"]) == (2.0, 1.0, 2.0)


def test_what_came_together_for_a_checkpoint_stays_in_the_lap(clock: Clock) -> None:
    meter = meter_of()
    run(meter, [[[3]]], clock)
    run(meter, [[[5]]], clock)
    assert meter.lap()["tokens_per_second"] == 8 / 3.0


def test_nothing_is_brought_together_twice(clock: Clock) -> None:
    meter = meter_of()
    list(meter.watch(slow([[[3]]], clock, 0.5)))
    assert meter.take().tolist() == [[3.0, 3.0, 300.0, 0.5]]
    list(meter.watch(slow([[[4]]], clock, 0.5)))
    assert meter.take().tolist() == [[4.0, 4.0, 400.0, 0.5]]


def test_the_summary_in_words(clock: Clock) -> None:
    meter = ThroughputMeter(ModelFlops(per_token=1e12, per_pair=0, per_text=0), True, rate=1e13)
    run(meter, [[[3000]], [[1000]]], clock, wait=0.5, work=999.5)
    assert str(meter) == (
        "2 steps in 2,000.0 s: 2 real tokens per second, padding factor 1.00; "
        "1.0 s (0.1%) waiting for data."
        " The model did 2 TFLOP/s, 20% of the 10 of plain matrix products."
    )
    both = ThroughputMeter(meter.flops, True, rate=1e13)
    both.add(torch.tensor([[[3.0, 3, 3e12, 0.5]], [[1.0, 1, 1e12, 0.25]]], dtype=torch.float64))
    clock.now += 1
    assert str(both).endswith(
        "of the 10 of plain matrix products; load imbalance (max/mean) 1.500."
    )


def test_without_flops_the_rest_is_told(clock: Clock) -> None:
    meter = ThroughputMeter(ModelFlops(math.nan, math.nan, math.nan), True, rate=1e13)
    run(meter, [[[3]]], clock)
    assert str(meter).endswith("waiting for data.")
    unknown = {name for name, value in meter.summary().items() if math.isnan(value)}
    assert unknown == {"model_tflops", "flop_utilization", "slowest_rank"}
