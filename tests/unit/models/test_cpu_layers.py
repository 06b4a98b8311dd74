"""A table that keeps its gradient has nn.Embedding's gradient, and after a step none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from bertdist.models.cpu_layers import ReusedGradientEmbedding, reuse_embedding_gradient, zero_grad

ROWS, WIDTH = 20, 4
BATCHES = [
    torch.tensor([3, 1, 3, 0, 7]),
    torch.tensor([[1, 19, 2], [0, 3, 3]]),
    torch.tensor([[5]]),
]


class Model(nn.Module):
    """A table and a matrix behind it, in the words of Hugging Face."""

    def __init__(self, padding_idx: int | None = None, **settings: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx, **settings)
        self.matrix = nn.Linear(WIDTH, 3)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.matrix(self.table(ids))
        return out


def pair(padding_idx: int | None = None) -> tuple[Model, Model]:
    """A model whose table keeps its gradient, and a plain one with the same weights: whole numbers, so that sums are exact in any order."""
    kept, plain = Model(padding_idx), Model(padding_idx)
    for weight in plain.parameters():
        weight.data = torch.randint(-4, 5, weight.shape).float()
    kept.load_state_dict(plain.state_dict())
    reuse_embedding_gradient(kept)
    assert type(kept.table) is ReusedGradientEmbedding and type(plain.table) is nn.Embedding
    return kept, plain


def backward(model: Model, ids: Tensor) -> None:
    out = model(ids)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()


def gradient(model: Model) -> Tensor:
    assert model.table.weight.grad is not None
    return model.table.weight.grad


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
def test_gradients_equal_those_of_a_plain_table(padding_idx: int | None) -> None:
    kept, plain = pair(padding_idx)
    for ids in BATCHES:
        assert torch.equal(kept(ids), plain(ids))
        for model in (kept, plain):
            backward(model, ids)
        assert torch.equal(gradient(kept), gradient(plain))  # all micro-batches so far
        assert torch.equal(kept.matrix.weight.grad, plain.matrix.weight.grad)  # type: ignore[arg-type]
    assert gradient(plain).any() and (padding_idx is None or not gradient(plain)[padding_idx].any())


def test_after_a_step_the_gradient_is_zero_and_the_same_tensor() -> None:
    kept, plain = pair()
    for ids in BATCHES:
        backward(kept, ids)
    place = gradient(kept).data_ptr()
    zero_grad(kept)
    assert (gradient(kept) == 0).all() and kept.matrix.weight.grad is None
    backward(kept, BATCHES[0])
    backward(plain, BATCHES[0])
    assert gradient(kept).data_ptr() == place
    assert torch.equal(gradient(kept), gradient(plain))


def test_rows_that_are_not_noted_are_seen() -> None:
    kept, _ = pair()
    backward(kept, BATCHES[0])
    kept.table.written.pop()  # type: ignore[operator, union-attr]
    backward(kept, BATCHES[2])
    zero_grad(kept)
    assert gradient(kept).any()  # the control


def zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def forget(model: nn.Module) -> None:
    model.zero_grad()


@pytest.mark.parametrize("clear", [zero_grad, zero, forget])
def test_gradients_may_be_cleared_by_hand(clear: Callable[[nn.Module], None]) -> None:
    kept, plain = pair(0)
    for ids in (*BATCHES, *BATCHES):
        for model in (kept, plain):
            backward(model, ids)
        assert torch.equal(gradient(kept), gradient(plain))
        clear(kept)
        assert kept.table.weight.grad is None or not kept.table.weight.grad.any()
        plain.zero_grad()
    backward(kept, BATCHES[1])
    zero_grad(kept)
    assert kept.table.weight.grad is None or not kept.table.weight.grad.any()


def test_an_optimizer_takes_the_same_steps() -> None:
    models = pair()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, BATCHES[step % 3])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if model is models[0]:
                zero_grad(model)
            else:
                optimizer.zero_grad(
                    set_to_none=step > 3
                )  # nn.Embedding's weight has a gradient wherever it has been used once
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    backward(models[0], BATCHES[0])  # the control: a step whose gradient is not cleared
    optimizers[0].step()
    optimizers[0].step()
    assert not torch.allclose(models[0].table.weight, models[1].table.weight, atol=1e-3)


def test_without_gradients_it_is_a_plain_table() -> None:
    kept, _ = pair()
    with torch.no_grad():
        assert not kept.table(BATCHES[0]).requires_grad
    with torch.inference_mode():
        assert torch.equal(kept.table(BATCHES[0]), kept.table.weight[BATCHES[0]])
    kept.table.weight.requires_grad_(False)
    backward(kept, BATCHES[0])
    assert kept.table.weight.grad is None and kept.matrix.weight.grad is not None
    zero_grad(kept)
    assert kept.matrix.weight.grad is None


@pytest.mark.parametrize("n", [1, 2])
def test_several_ranks_have_a_plain_table(n: int) -> None:
    def names(accelerator: Accelerator) -> str:
        kept, _ = pair()
        return str(kept.table(BATCHES[0]).grad_fn.name())

    assert run_ranks(n, names) == (["_LookupBackward"] if n == 1 else ["EmbeddingBackward0"] * 2)


@pytest.mark.parametrize(
    "settings", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_a_table_of_another_kind_stays_as_it_is(settings: dict[str, Any]) -> None:
    model = Model(**settings)
    reuse_embedding_gradient(model)
    assert type(model.table) is nn.Embedding


def test_a_table_that_others_use_stays_as_it_is() -> None:
    model = Model()
    model.other = nn.Embedding(ROWS, WIDTH)
    model.other.weight = model.table.weight
    reuse_embedding_gradient(model)
    assert type(model.table) is nn.Embedding


def test_a_subclass_and_a_model_without_a_table_stay_as_they_are() -> None:
    class Own(nn.Embedding):
        pass

    model = Model()
    model.table = Own(ROWS, WIDTH)
    reuse_embedding_gradient(model)
    assert type(model.table) is Own
    canine = AutoModel.from_config(
        AutoConfig.for_model("canine", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    reuse_embedding_gradient(canine)
    assert not any(isinstance(module, ReusedGradientEmbedding) for module in canine.modules())


def test_a_models_names_stay() -> None:
    kept, plain = pair()
    assert list(kept.state_dict()) == list(plain.state_dict())
