"""I2: a step's gradient is (sum of row losses over all ranks) / (rows of the step), however the step is cut and dealt.

Loss and gradient norm are compared as the product computes them, in float32, with the 1e-5 of the promise. Weights are compared
in float64: where a gradient is zero but for rounding (the bias of the keys), Adam makes steps of the rounding itself.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from rows import (
    Breaking,
    last_checkpoint,
    make_rows,
    run_train,
    step_log,
    tensors_of,
    words_of,
    write_split,
)
from rows import train_module as train
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForSequenceClassification

from bertdist.data.batch import RankStep
from bertdist.data.sharding import epoch_order
from bertdist.models.dropout import DropoutMasks

ROWS, STEP, EPOCHS = (
    22,
    10,
    2,
)  # steps of 10, 10 and 2 rows: in the last one a rank of three has none
ONE_TEXT = 1  # tokens_per_micro_batch: every text alone


def in_float64(accelerator: Accelerator) -> None:
    """The same run in double precision: weights, and what `task.loss` makes float32."""
    load = train.load_classifier

    def load_in_float64(*args: Any, **more: Any) -> Any:
        classifier, notes = load(*args, **more)
        return classifier.double(), notes

    train.load_classifier = load_in_float64
    torch.Tensor.float = lambda self: self


def with_steps(change: Callable[[RankStep, Accelerator], RankStep]) -> Breaking:
    """Break train_step by showing it another step."""

    def breaking(accelerator: Accelerator) -> None:
        train_step = train.train_step
        train.train_step = lambda model, optimizer, step, *rest: train_step(
            model, optimizer, change(step, accelerator), *rest
        )

    return breaking


def mean_over_ranks(step: RankStep, accelerator: Accelerator) -> RankStep:
    """Each rank divides by its own rows, and DDP averages: what happens when nobody thinks of it."""
    own = sum(len(batch.row_numbers) for batch in step.micro_batches if batch.row_numbers[0] >= 0)
    return replace(step, rows=max(own, 1) * accelerator.num_processes)


def mean_over_micro_batches(step: RankStep, accelerator: Accelerator) -> RankStep:
    """The mean of the micro-batches' means: gradient accumulation as it is usually written."""
    parts = len(step.micro_batches) * accelerator.num_processes
    return replace(
        step,
        micro_batches=[
            replace(batch, weights=batch.weights * step.rows / (parts * len(batch.row_numbers)))
            for batch in step.micro_batches
        ],
    )


def idle_rows_count(step: RankStep, accelerator: Accelerator) -> RankStep:
    """The text that keeps a rank without rows busy is learned from."""
    return replace(
        step,
        micro_batches=[
            replace(batch, weights=torch.ones_like(batch.weights)) for batch in step.micro_batches
        ],
    )


class Curve:
    """What a run learned."""

    def __init__(
        self, model: Path, folder: Path, n: int, tokens: int, *breakings: Breaking, **settings: Any
    ) -> None:
        def breaking(accelerator: Accelerator) -> None:
            for each in breakings:
                each(accelerator)

        usual = {
            "train_batch_size": STEP,
            "num_train_epochs": EPOCHS,
            "dropout": 0,
            "tokens_per_micro_batch": tokens,
            "weight_decay": 0.1,
        }
        words = words_of(model, folder / "out", write_split(folder, ROWS), **{**usual, **settings})
        run_ranks(n, run_train, words, breaking)
        lines = step_log(folder / "out", "train")
        self.loss = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
        self.grad_norm = torch.tensor([line["grad_norm"] for line in lines], dtype=torch.float64)
        self.weights = tensors_of(last_checkpoint(folder / "out"))

    def far_from(self, other: "Curve") -> dict[str, float]:
        """Largest differences."""
        assert (
            len(self.loss) == len(other.loss) == 6 and self.weights.keys() == other.weights.keys()
        )
        weights = max(
            (self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights
        )
        return {
            "loss": (self.loss - other.loss).abs().max().item(),
            "grad_norm": ((self.grad_norm - other.grad_norm) / other.grad_norm).abs().max().item(),
            "weights": weights,
        }


@pytest.fixture(scope="module")
def float32(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return Curve(tiny_model, tmp_path_factory.mktemp("float32"), 1, 8192)


@pytest.fixture(scope="module")
def float64(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return Curve(tiny_model, tmp_path_factory.mktemp("float64"), 1, 8192, in_float64)


@pytest.mark.parametrize(
    ("n", "tokens"), [(1, ONE_TEXT), (2, 8192), (2, 30), (3, 8192), (3, ONE_TEXT)]
)
def test_loss_and_gradient_norm_are_the_same_to_1e_5(
    tiny_model: Path, tmp_path: Path, float32: Curve, n: int, tokens: int
) -> None:
    far = Curve(tiny_model, tmp_path, n, tokens).far_from(float32)
    print(n, tokens, far)
    assert far["loss"] < 1e-5 and far["grad_norm"] < 1e-5, far


@pytest.fixture(scope="module")
def dropped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return Curve(tiny_model, tmp_path_factory.mktemp("dropped"), 1, 8192, dropout=0.3)


@pytest.mark.parametrize(("n", "tokens"), [(1, ONE_TEXT), (2, 30), (3, 8192), (3, ONE_TEXT)])
def test_with_dropout_too(
    tiny_model: Path, tmp_path: Path, dropped: Curve, float32: Curve, n: int, tokens: int
) -> None:
    """What a row loses to dropout is its own affair: not its rank's, and not its micro-batch's."""
    far = Curve(tiny_model, tmp_path, n, tokens, dropout=0.3).far_from(dropped)
    print(n, tokens, far)
    assert far["loss"] < 1e-5 and far["grad_norm"] < 1e-5, far
    assert dropped.far_from(float32)["loss"] > 1e-3  # dropout there was


@pytest.mark.parametrize(("n", "tokens"), [(1, 30), (2, 8192)])
def test_dropout_by_position_in_the_batch_is_detected(
    tiny_model: Path, tmp_path: Path, dropped: Curve, n: int, tokens: int
) -> None:
    def by_place(accelerator: Accelerator) -> None:
        begin = DropoutMasks.__init__
        DropoutMasks.__init__ = lambda self, rows, lengths: begin(
            self, range(len(lengths)), lengths
        )

    far = Curve(tiny_model, tmp_path, n, tokens, by_place, dropout=0.3).far_from(dropped)
    assert far["loss"] > 1e-3 and far["grad_norm"] > 1e-3, far


@pytest.mark.parametrize(("n", "tokens"), [(1, ONE_TEXT), (2, 30), (3, 30)])
def test_weights_are_the_same_to_1e_10_in_float64(
    tiny_model: Path, tmp_path: Path, float64: Curve, n: int, tokens: int
) -> None:
    far = Curve(tiny_model, tmp_path, n, tokens, in_float64).far_from(float64)
    print(n, tokens, far)
    assert far["weights"] < 1e-10 and far["grad_norm"] < 1e-6, far


@pytest.mark.parametrize(
    ("n", "tokens", "wrong"),
    [
        (2, 8192, mean_over_ranks),
        (3, 8192, mean_over_ranks),
        (1, 30, mean_over_micro_batches),
        (3, 8192, idle_rows_count),
    ],
)
def test_other_ways_to_average_are_detected(
    tiny_model: Path,
    tmp_path: Path,
    float64: Curve,
    n: int,
    tokens: int,
    wrong: Callable[[RankStep, Accelerator], RankStep],
) -> None:
    far = Curve(tiny_model, tmp_path, n, tokens, in_float64, with_steps(wrong)).far_from(float64)
    print(n, wrong.__name__, far)
    assert far["weights"] > 1e-6 and far["grad_norm"] > 1e-4 and far["loss"] > 1e-5, far


def test_the_gradient_is_that_of_one_padded_batch(
    tiny_model: Path, tmp_path: Path, float64: Curve
) -> None:
    """The whole run again with nothing of the product but its initial weights and its plan: transformers, cross-entropy, AdamW."""
    torch.manual_seed(42)
    model = (
        BertForSequenceClassification.from_pretrained(tiny_model, num_labels=2, dtype=torch.float32)
        .double()
        .eval()
    )
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    rows, tokenizer = make_rows(ROWS, seed=1), AutoTokenizer.from_pretrained(tiny_model)
    losses, norms = [], []
    for epoch in range(EPOCHS):
        order = epoch_order(ROWS, 42, epoch).tolist()
        for at in range(0, ROWS, STEP):
            step = [rows[row] for row in order[at : at + STEP]]
            for group in adamw.param_groups:
                group["lr"] = 1e-3 * (1 - len(losses) / 6)
            inputs = tokenizer([row["text"] for row in step], padding=True, return_tensors="pt")
            loss = F.cross_entropy(
                model(**inputs).logits,
                torch.tensor([int(row["label"] == "positive") for row in step]),
            )
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            adamw.step()
            adamw.zero_grad()
            losses.append(loss.item())
    assert torch.allclose(
        float64.loss, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert torch.allclose(
        float64.grad_norm, torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0
    )
    far = max(
        (float64.weights[f"model.safetensors: model.{name}"] - p).abs().max().item()
        for name, p in model.named_parameters()
    )
    assert far < 1e-9, far
