"""Steps that are filled up to a fixed shape learn what they learned before; so do replays, as far
as a CPU can show it.

A recording of torch's operators stands in for the graph here. Like a graph it runs no Python when
it is replayed, works on the tensors of the capture, knows only what the host knew then, and refuses
a look at a tensor's value. What it cannot show is CUDA's own part: streams, memory pools and the
state of the generator; that is for tests/gpu.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from forked import RankError, run_ranks
from rows import assert_same_run, run_train, step_log, words_of, write_split
from rows import train_module as train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
)

from bertdist.core.config import ModelConfig, OptimConfig
from bertdist.data.batch import PackedBatch, RankStep, collate
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import Example
from bertdist.models import attention
from bertdist.models.attention import Packing
from bertdist.models.classifier import Classifier, load_classifier
from bertdist.models.cpu_layers import ReusedGradientEmbedding, zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import MultiLabel, Regression, SingleLabel, Task
from bertdist.training import cuda_graph as graphed
from bertdist.training import nonfinite, optimizer
from bertdist.training.cuda_graph import (
    Budget,
    GraphedStep,
    StepResult,
    choose_budget,
    create_graphed_step,
    pad_batch,
)
from bertdist.training.optimizer import create_optimizer

TASKS: dict[str, tuple[Task, list[Any]]] = {
    "single_label": (
        SingleLabel(("bad", "fine", "good"), class_weights=(1.0, 2.0, 0.5), smoothing=0.1),
        [2, 0, 1],
    ),
    "multi_label": (
        MultiLabel(("bad", "fine", "good")),
        [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ),
    "regression": (Regression(("score",)), [0.5, -2.0, 3.25]),
}


def batch_of(lengths: Sequence[int], targets: Sequence[Any] = (2, 0, 1, 0)) -> PackedBatch:
    given = zip(lengths, targets, strict=False)
    return collate(
        [
            Example(i, [5 + (7 * i + k) % 30 for k in range(length)], [0] * length, to, 1.0)
            for i, (length, to) in enumerate(given)
        ]
    )


def step_of(*lengths: int) -> RankStep:
    return RankStep(number=0, micro_batches=[batch_of(lengths)], rows=len(lengths))


def load(folder: Path, task: Task, **settings: Any) -> Classifier:
    config = ModelConfig(model_name_or_path=str(folder), **settings)
    torch.manual_seed(0)
    return load_classifier(config, task)[0].train()


# ---- Texts of weight 0


@pytest.mark.parametrize(("kind", "p"), [*((kind, 0.0) for kind in TASKS), ("single_label", 0.3)])
def test_pads_change_neither_loss_nor_gradients(kind: str, p: float, tiny_model: Path) -> None:
    """On the CPU with dropout too: what a row loses to it does not depend on its company."""
    task, targets = TASKS[kind]
    model = load(tiny_model, task, dropout=p).double()
    batch = batch_of([9, 5, 3], targets)
    padded = pad_batch(batch, 40, 6, 16)
    assert padded is not None and padded.lengths == (9, 5, 3, 8, 8, 7)
    found = []
    for each in (batch, padded, replace(padded, weights=torch.ones(6))):
        seed_dropout(1, 2, 0)
        zero_grad(model)
        loss = task.loss(model(each), each.targets, each.weights)
        loss.backward()
        found.append(
            (
                loss.detach(),
                {
                    name: weight.grad.clone()
                    for name, weight in model.named_parameters()
                    if weight.grad is not None
                },
            )
        )
    (loss, gradients), (same_loss, same), (other_loss, other) = found
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=0)  # a sum in float32
    size = max(gradient.abs().max().item() for gradient in gradients.values())
    assert all((same[name] - gradients[name]).abs().max() < 1e-6 * size for name in gradients)
    assert (other_loss - loss).abs() > 1e-4 * loss  # the control: pads that count
    assert (
        max((other[name] - gradients[name]).abs().max().item() for name in gradients) > 1e-3 * size
    )


def test_pads_are_texts_of_their_own(tiny_model: Path) -> None:
    """Numbers by hand; logits of the real texts stay as they were, attention included."""
    batch = batch_of([3, 2])
    padded = pad_batch(batch, 10, 4, 3)
    assert padded is not None
    assert padded.ids.tolist() == [5, 6, 7, 12, 13, *[0] * 5]
    assert (
        padded.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
        and padded.token_type_ids.tolist() == [0] * 10
    )
    assert padded.cu_seqlens.tolist() == [0, 3, 5, 8, 10] and padded.lengths == (3, 2, 3, 2)
    assert (
        padded.targets.tolist() == [2, 0, 0, 0]
        and padded.weights.tolist() == [1, 1, 0, 0]
        and padded.row_numbers.tolist() == [0, 1, -1, -1]
    )
    assert all(
        getattr(padded, name).dtype == getattr(batch, name).dtype
        for name in vars(batch)
        if name != "lengths"
    )
    model = load(tiny_model, TASKS["single_label"][0]).eval().double()
    torch.testing.assert_close(model(padded)[:2], model(batch), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("tokens", "texts", "longest"), [(5, 2, 3), (6, 3, 3), (8, 3, 3)])
def test_the_ends_of_what_fits(tokens: int, texts: int, longest: int) -> None:
    """Nothing to add, one text of one token, one as long as can be."""
    padded = pad_batch(batch_of([3, 2]), tokens, texts, longest)
    assert padded is not None and (len(padded.ids), len(padded.lengths)) == (tokens, texts)


@pytest.mark.parametrize(
    ("tokens", "texts", "longest"),
    [(4, 2, 3), (6, 2, 3), (5, 1, 3), (5, 3, 3), (9, 3, 3), (7, 5, 3)],
)
def test_what_cannot_be_padded_is_none(tokens: int, texts: int, longest: int) -> None:
    assert pad_batch(batch_of([3, 2]), tokens, texts, longest) is None


# ---- The budget

BUDGET = Budget(tokens=20, texts=5, rows=3, max_length=6)


def test_a_budget_fills_a_step_up() -> None:
    filled = BUDGET.fill(step_of(5, 4, 2))
    assert filled is not None and filled.lengths == (5, 4, 2, 5, 4)
    filled = BUDGET.fill(step_of(6, 6, 6))
    assert filled is not None and filled.lengths == (6, 6, 6, 1, 1)


@pytest.mark.parametrize(
    "step",
    [
        step_of(7, 6, 6),  # one token for two texts
        step_of(2, 2, 2),  # 14 tokens, more than two texts of 6
        step_of(5, 4),  # the smaller last step of an epoch: its gradient has another divisor
        RankStep(number=0, micro_batches=[batch_of([5]), batch_of([4, 2])], rows=3),
    ],
)
def test_what_does_not_fit_is_not_filled_up(step: RankStep) -> None:
    assert BUDGET.fill(step) is None


@pytest.mark.parametrize(
    ("tokens", "texts", "longest"), [(20, 5, 6), (20, 5, 128), (640, 37, 128), (5, 5, 3)]
)
def test_the_host_believes_in_texts_as_long_as_any_can_be(
    tokens: int, texts: int, longest: int
) -> None:
    lengths = (
        Budget(tokens=tokens, texts=texts, rows=1, max_length=longest).blank(batch_of([3])).lengths
    )
    assert (len(lengths), sum(lengths)) == (texts, tokens)
    assert max(lengths) == lengths[0] == min(longest, tokens - texts + 1)


@pytest.mark.parametrize("kind", TASKS)
def test_a_blank_batch_has_the_shapes_of_a_filled_up_one(kind: str) -> None:
    batch = batch_of([5, 4, 2], TASKS[kind][1])
    filled, blank = (
        BUDGET.fill(RankStep(number=0, micro_batches=[batch], rows=3)),
        BUDGET.blank(batch),
    )
    assert filled is not None and not blank.weights.any()
    for name, tensor in vars(filled).items():
        if isinstance(tensor, Tensor):
            there = getattr(blank, name)
            assert (there.shape, there.dtype) == (tensor.shape, tensor.dtype), name


def batches_of(lengths: Sequence[int], **settings: Any) -> MapLoader:
    """Row i has lengths[i] tokens."""

    class Rows:
        records = SimpleNamespace(lengths=lambda: torch.tensor(lengths).numpy())

        def __len__(self) -> int:
            return len(lengths)

        def __getitem__(self, rows: Sequence[int]) -> list[Example]:
            return [Example(row, [1] * lengths[row], [0] * lengths[row], 0, 1.0) for row in rows]

    usual: dict[str, Any] = {
        "rows_per_step": 4,
        "tokens_per_micro_batch": 100,
        "shuffle": True,
        "seed": 7,
    }
    return MapLoader(dataset=Rows(), **{**usual, **settings})  # type: ignore[arg-type]


def test_a_budget_holds_all_steps_that_it_was_made_of() -> None:
    batches = batches_of([1 + 3 * i % 17 for i in range(43)])
    budget = choose_budget(batches, 17)
    assert budget == choose_budget(
        replace(batches, workers=2, pin=True), 17
    )  # of rows and seed alone
    assert budget is not None and budget.rows == 4 and budget.tokens % 64 == 0
    fitting = [budget.fill(step) is not None for step in batches.steps(0, 22)]
    assert fitting == ([True] * 10 + [False]) * 2  # all but the smaller last ones


def test_steps_of_several_micro_batches_have_no_budget() -> None:
    assert choose_budget(batches_of([30] * 12), 30) is None
    assert choose_budget(batches_of([25] * 12), 30) is not None


# ---- Where it cannot be


def refusals() -> Iterator[Any]:
    here: dict[str, Any] = {
        "device": torch.device("cuda"),
        "num_processes": 1,
        "mixed_precision": "bf16",
    }
    yield pytest.param(
        {**here, "device": torch.device("cpu")},
        {},
        "it needs a CUDA GPU, and this run is on cpu.",
        id="cpu",
    )
    yield pytest.param(
        {**here, "num_processes": 2}, {}, "it is for one process, and there are 2.", id="ranks"
    )
    for precision in ("no", "fp16"):
        said = f"it needs --mixed_precision bf16, and this run has '{precision}'."
        yield pytest.param({**here, "mixed_precision": precision}, {}, said, id=precision)
    said = "--gradient_checkpointing sets random states from the host."
    yield pytest.param(here, {"gradient_checkpointing": True}, said, id="checkpointing")
    said = "this model, GPU or torch has no flash attention for packed texts."
    yield pytest.param(here, {"type": "deberta-v2"}, said, id="attention_of_its_own")
    yield pytest.param(here, {"type": "gpt2"}, said, id="unpacked")
    yield pytest.param(here, {"attention_kernel": lambda device: "padded"}, said, id="kernel")


def ask(about: dict[str, Any], model: dict[str, Any], batches: MapLoader) -> tuple[Any, list[str]]:
    said: list[str] = []
    usual = {"gradient_checkpointing": False, "attention_kernel": lambda device: "varlen"}
    config = SimpleNamespace(model_type=model.pop("type", "bert"))
    classifier: Any = SimpleNamespace(**{**usual, **model}, model=SimpleNamespace(config=config))
    accelerator: Any = SimpleNamespace(**about, autocast=nullcontext)
    micro_batcher: Any = SimpleNamespace(
        accelerator=accelerator, say=said.append, rebatch=lambda: batches
    )
    return create_graphed_step(train.train_step, classifier, micro_batcher, 30), said


@pytest.mark.parametrize(("about", "model", "why"), list(refusals()))
def test_where_it_cannot_be_steps_are_taken_eagerly(
    about: dict[str, Any], model: dict[str, Any], why: str
) -> None:
    stepper, said = ask(about, model, batches_of([5] * 12))
    assert stepper is train.train_step and said == [
        f"--cuda_graphs cannot take effect, steps run eagerly: {why}"
    ]


def test_steps_of_several_micro_batches_are_taken_eagerly() -> None:
    fine = {"device": torch.device("cuda"), "num_processes": 1, "mixed_precision": "bf16"}
    stepper, said = ask(fine, {}, batches_of([30] * 12))
    assert stepper is train.train_step
    assert said[0].endswith(
        "a graph has one micro-batch, and steps have more than --tokens_per_micro_batch 100 tokens."
    )
    stepper, said = ask(fine, {}, batches_of([5] * 12))  # the control
    assert isinstance(stepper, GraphedStep)
    assert said == [
        "--cuda_graphs: steps are padded to 64 tokens in 6 texts; "
        "steps that do not fit run eagerly."
    ]


# ---- Replays, rehearsed


def attend_by_starts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    dropout: float,
    scale: float,
    window: int | None,
) -> Tensor:
    """What flash attention does: it looks at `starts` on the device, and not at what the host
    believes of the lengths.
    """
    assert packing.cu_seqlens is not None
    place = torch.arange(len(k))
    text = torch.searchsorted(packing.cu_seqlens, place, right=True) - 1
    asking = place if len(q) == len(k) else packing.cu_seqlens[:-1]
    hidden = text[asking][:, None] != text
    if window is not None:
        hidden = hidden | ((asking[:, None] - place).abs() >= window)
    weights = (
        (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    )
    return torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout), v)


def recorded(
    take: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """A capture: torch's operators with the tensors that they worked on; each result is written to
    where it was.
    """
    calls: list[tuple[Any, Any, Any, Any]] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("operation not permitted when stream is capturing")
            out = func(*args, **(kwargs or {}))
            calls.append((func, args, kwargs or {}, out))
            return out

    for _ in range(3):
        take()
    with Recording():
        results = take()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, out in calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if (
                    isinstance(old, Tensor) and old.data_ptr() != new.data_ptr()
                ):  # else a view, or in place
                    old.copy_(new)

    return replay, results


def as_on_a_gpu(patch: Callable[[Any, str, Any], None]) -> None:
    patch(attention, "select_kernel", lambda *args: "varlen")
    patch(attention, "_varlen", attend_by_starts)
    patch(Classifier, "_make_masks", lambda *args: None)  # dropout is torch's
    patch(ReusedGradientEmbedding, "forward", nn.Embedding.forward)
    for module in (nonfinite, optimizer):
        patch(module, "is_on_cpu", lambda tensor: False)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(max_position_embeddings=140, **SIZES),
    "electra": lambda: ElectraConfig(embedding_size=16, **SIZES),
    "albert": lambda: AlbertConfig(embedding_size=16, **SIZES),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=40, dim=32, n_layers=4, n_heads=2, hidden_dim=48
    ),
    "modernbert": lambda: ModernBertConfig(local_attention=4, classifier_pooling="cls", **SIZES),
    "modernbert, means": lambda: ModernBertConfig(
        local_attention=4, classifier_pooling="mean", **SIZES
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_reads_a_step_from_the_device(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded on a blank batch, the gradients of other lengths are found; nothing on the way looks
    at a tensor's value.
    """
    as_on_a_gpu(monkeypatch.setattr)
    torch.manual_seed(1)
    config = KINDS[kind]()
    config.initializer_range = 0.2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    task, budget = TASKS["single_label"][0], Budget(tokens=30, texts=6, rows=3, max_length=12)
    model = load(tmp_path, task, dropout=0).double()
    weights = list(model.parameters())
    fixed = budget.blank(batch_of([3]))

    def take(batch: PackedBatch) -> StepResult:
        loss = task.loss(model(batch), batch.targets, batch.weights)
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([gradient.flatten() for gradient in found])

    replay, (loss, gradients) = recorded(lambda: take(fixed), torch.device("cpu"))
    for lengths, bad_rows in (
        ((12, 9, 5), ""),
        ((3, 6, 4), ""),
        ((7, 2, 1), "cu_seqlens"),
        ((8, 1, 1), "positions"),
    ):
        batch = budget.fill(step_of(*lengths))
        assert batch is not None
        for name, tensor in vars(batch).items():
            if isinstance(tensor, Tensor) and name != bad_rows:
                getattr(fixed, name).copy_(tensor)
        replay()
        expected_loss, expected = take(batch)
        far = ((gradients - expected).norm() / expected.norm()).item()
        if bad_rows:  # the controls
            assert far > 1e-3
        else:
            assert far < 1e-6 and torch.isclose(loss, expected_loss)  # the loss is float32


def taken_again(
    take: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """No capture: `take` itself, each time, on the tensors of the capture."""
    results = take()

    def replay() -> None:
        for into, new in zip(results, take(), strict=True):
            into.copy_(new)

    return replay, results


class Rehearsal:
    """Lets --cuda_graphs take effect on the CPU, and counts."""

    def __init__(
        self, capture: Any = recorded, before: Callable[[GraphedStep], None] = lambda stepper: None
    ) -> None:
        """before: what happens to the fixed tensors before each replay."""
        self.capture, self.before, self.replays, self.eager = capture, before, 0, 0

    def __call__(self, accelerator: Accelerator) -> None:
        as_on_a_gpu(setattr)
        train_step = train.train_step

        def eager(model: Any, optimizer: Any, step: RankStep, *rest: Any) -> StepResult:
            self.eager += -1 not in step.micro_batches[0].row_numbers.tolist()
            return train_step(model, optimizer, step, *rest)

        def capture(
            take: Callable[[], StepResult], device: torch.device
        ) -> tuple[Callable[[], None], StepResult]:
            replay, results = self.capture(take, device)

            def counted() -> None:
                self.replays += 1
                self.before(self.stepper)
                replay()

            return counted, results

        def graphed_here(
            train_step: Any, classifier: Any, micro_batcher: Any, max_length: int
        ) -> GraphedStep:
            budget = choose_budget(micro_batcher.rebatch(), max_length)
            assert budget is not None
            self.stepper = GraphedStep(train_step, budget, micro_batcher.say, capture)
            return self.stepper

        train.train_step, graphed.create_graphed_step = eager, graphed_here


Log = list[dict[str, Any]]
Run = Callable[..., tuple[Log, str, int, int]]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 2 epochs of 5 steps, the last of an epoch smaller; its log, what was said, replays,
    eager steps.
    """
    many, few = (
        write_split(tmp_path_factory.mktemp("rows"), 38, 6),
        write_split(tmp_path_factory.mktemp("few"), 8, 6),
    )
    usual = {
        "num_train_epochs": 2,
        "dropout": 0,
        "warmup_steps": 3,
        "layerwise_lr_decay": 0.9,
        "tokens_per_micro_batch": 8192,
    }

    def ran(
        out: Path,
        rehearsal: Rehearsal | None = None,
        *breakings: Callable[[], None],
        same_rows: bool = False,
        **settings: Any,
    ) -> Any:
        mine = rehearsal or Rehearsal()
        words = words_of(
            tiny_model,
            out,
            few if same_rows else many,
            **{**usual, "cuda_graphs": True, **settings},
        )

        def breaking(accelerator: Accelerator) -> None:
            mine(accelerator)
            for each in breakings:
                each()

        def child(accelerator: Accelerator) -> Any:
            said = run_train(accelerator, words, breaking)[2]
            return said, mine.replays, mine.eager

        ((said, replays, eager),) = run_ranks(1, child)
        return step_log(out, "train"), said, replays, eager

    return ran


def far(a: Log, b: Log) -> float:
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 11))
    assert [line["tokens"] for line in a] == [
        line["tokens"] for line in b
    ]  # of pads none is counted
    return max(
        abs(x[name] - y[name]) / y[name]
        for x, y in zip(a, b, strict=True)
        for name in ("loss", "grad_norm")
    )


@pytest.fixture(scope="module")
def eager(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Log:
    log, said, replays, steps = run(tmp_path_factory.mktemp("eager") / "out", cuda_graphs=None)
    assert "--cuda_graphs" not in said and (replays, steps) == (0, 10)
    return log


@pytest.fixture(scope="module")
def short(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Log:
    return run(tmp_path_factory.mktemp("short") / "out", cuda_graphs=None, **SHORT)[0]


SHORT = {"dropout": 0.3, "max_train_steps": 3}
TRIAL = 1  # replays before the first step that counts


def test_replays_learn_what_eager_steps_learn(run: Run, eager: Log, tmp_path: Path) -> None:
    log, said, replays, steps = run(tmp_path / "graphed")
    assert "--cuda_graphs" not in said and far(log, eager) < 1e-5
    assert (replays, steps) == (
        TRIAL + 7,
        3,
    )  # eager: the first step, which makes the state, and the two smaller ones
    assert (
        far(run(tmp_path / "counting", None, pads_count)[0], eager) > 1e-3
    )  # the control: pads that are learned from


def test_a_step_that_is_taken_eagerly_can_run_out_of_memory(
    run: Run, eager: Log, tmp_path: Path
) -> None:
    """It is halved as ever, and the steps after it are replayed."""

    def too_small() -> None:
        forward = Classifier.forward

        def running_out(self: Classifier, batch: PackedBatch) -> Tensor:
            if len(batch.lengths) == 6:  # only the smaller last steps have six texts
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, batch)

        Classifier.forward = running_out  # type: ignore[method-assign]

    log, said, replays, _ = run(tmp_path / "out", None, too_small)
    assert (
        "Out of memory in step 5; the step is repeated." in said
        and "cannot take effect" not in said
    )
    assert replays == TRIAL + 7 and far(log, eager) < 1e-5


def pads_count() -> None:
    real = graphed.pad_batch

    def counting(*args: Any) -> PackedBatch | None:
        batch = real(*args)
        return batch and replace(batch, weights=torch.ones_like(batch.weights))

    graphed.pad_batch = counting


def test_dropout_of_a_replay_is_a_function_of_seed_and_step(run: Run, tmp_path: Path) -> None:
    """Every step has the same rows and weights, so that only dropout tells them apart."""
    still = {"same_rows": True, "dropout": 0.3, "learning_rate": 0, "num_train_epochs": 10}
    log, _, replays, _ = run(tmp_path / "graphed", **still)
    losses = [line["loss"] for line in log]
    assert replays == TRIAL + 9 and len(set(losses)) == 10
    assert (
        far(log, run(tmp_path / "again", Rehearsal(taken_again), **still)[0]) < 1e-6
    )  # the masks of the same step without a recording
    assert far(log, run(tmp_path / "other", **still, seed=43)[0]) > 0.01  # the control


# ---- The trial


def same_rates(stepper: GraphedStep) -> None:
    for rate in stepper._rates:
        rate.zero_()  # those of the capture


def same_rows(stepper: GraphedStep) -> None:
    for name, tensor in vars(stepper.budget.blank(stepper._batch)).items():
        if isinstance(tensor, Tensor):
            getattr(stepper._batch, name).copy_(tensor)


def other_rows(stepper: GraphedStep) -> None:
    stepper._batch.ids.fill_(5)


def same_masks(stepper: GraphedStep) -> None:
    torch.manual_seed(0)


def nothing(
    take: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    return lambda: None, take()


def looks(
    take: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    return recorded(lambda: (take()[0], torch.tensor(take()[1].item())), device)


def raises(take: Callable[[], StepResult], device: torch.device) -> Any:
    """After steps were taken and numbers drawn."""
    take()
    torch.rand(3)
    raise torch.OutOfMemoryError("CUDA out of memory.\nmore")


@pytest.mark.parametrize(
    ("rehearsal", "why"),
    [
        (Rehearsal(before=same_rates), "changes the weights in another way"),
        (Rehearsal(before=same_rows), "has a loss of 0"),
        (Rehearsal(before=other_rows), "the replayed step has a "),
        (Rehearsal(before=same_masks), "the replayed step has a "),
        (Rehearsal(nothing), "has a loss of 0"),
        (Rehearsal(looks), "RuntimeError: operation not permitted when stream is capturing"),
        (Rehearsal(raises), "OutOfMemoryError: CUDA out of memory. more"),
    ],
)
def test_a_trial_that_differs_or_fails_leaves_an_eager_run(
    rehearsal: Rehearsal, why: str, run: Run, short: Log, tmp_path: Path
) -> None:
    """To the bit, dropout included, and said once."""
    log, said, replays, steps = run(tmp_path / "out", rehearsal, **SHORT)
    (line,) = (line for line in said.splitlines() if "--cuda_graphs" in line)
    assert line.startswith("--cuda_graphs cannot take effect, steps run eagerly: ") and why in line
    assert replays <= TRIAL and steps == 3
    assert log == short


def test_the_trial_is_what_finds_it(run: Run, eager: Log, tmp_path: Path) -> None:
    """The control: believed without a trial, rates of the capture make another curve."""

    def trusting() -> None:
        graphed.CHANGE_TOLERANCE = torch.inf

    log, said, replays, _ = run(tmp_path / "out", Rehearsal(before=same_rates), trusting)
    assert "--cuda_graphs" not in said and replays == TRIAL + 7 and far(log, eager) > 1e-3


def test_what_was_tried_is_undone(tiny_model: Path) -> None:
    """Weights, AdamW's state, learning rates and random numbers, to the bit; and the change is
    told.
    """
    task = TASKS["single_label"][0]
    model = load(tiny_model, task)
    adamw = create_optimizer(model, OptimConfig())

    def step() -> str:
        batch = batch_of([9, 5, 3])
        task.loss(model(batch), batch.targets, batch.weights).backward()
        adamw.step()
        zero_grad(model)
        torch.rand(1)
        adamw.param_groups[0].update(lr=torch.tensor(1.0), capturable=True)
        return "taken"

    def everything() -> list[Any]:
        rates = [(group["lr"], group["capturable"]) for group in adamw.param_groups]
        tensors = [
            *model.parameters(),
            *(x for state in adamw.state.values() for x in state.values()),
        ]
        return [rates, torch.get_rng_state().tolist(), *(tensor.tolist() for tensor in tensors)]

    step()
    adamw.param_groups[0].update(lr=5e-5, capturable=False)
    before, weights = everything(), nn.utils.parameters_to_vector(model.parameters()).detach()
    found, change = graphed._run_and_restore(step, model, adamw)
    assert (
        found == "taken"
        and everything() == before
        and change.shape == weights.shape
        and change.any()
    )
    with pytest.raises(ZeroDivisionError):
        graphed._run_and_restore(lambda: (step(), 1 / 0), model, adamw)
    assert everything() == before
    step()
    assert all(
        now != then for now, then in zip(everything()[:3], before, strict=False)
    )  # the control
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(change, after - weights, rtol=0, atol=0)


# ---- Restarts


def die_before_step_7() -> None:
    step = GraphedStep.__call__

    def dying(
        self: GraphedStep, model: Any, optimizer: Any, at: RankStep, *rest: Any
    ) -> StepResult:
        return step(self, model, optimizer, at, *rest) if at.number < 7 else os._exit(9)

    GraphedStep.__call__ = dying  # type: ignore[method-assign]


def test_a_run_with_replays_goes_on_to_the_bit(run: Run, tmp_path: Path) -> None:
    """The first run captures at its second step, the resumed one at its first: a restart is
    invisible all the same.
    """
    settings = {"save_every": "3 steps", "dropout": 0.3}
    run(tmp_path / "straight", **settings)
    with pytest.raises(RankError, match="ended with status 9"):
        run(tmp_path / "resumed", None, die_before_step_7, **settings)
    _, _, replays, steps = run(tmp_path / "resumed", **settings)
    assert (replays, steps) == (TRIAL + 3, 1)  # from step 6 on
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    with pytest.raises(AssertionError):  # the control
        run(tmp_path / "other", **settings, seed=43)
        assert_same_run(tmp_path / "other", tmp_path / "straight")
