"""ReusedGradientEmbedding has nn.Embedding's gradient; OneDnnLinear has nn.Linear's output and gradients to rounding.

Legend: R rows.
"""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import run_ranks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate

from bertdist.models import cpu_layers
from bertdist.models.cpu_layers import (
    OneDnnLinear,
    ReusedGradientEmbedding,
    parameters_of,
    reuse_embedding_gradient,
    use_onednn,
    zero_grad,
)

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


def test_parameters_are_looked_up_once_and_forgotten_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late, plain = pair()
    late.table.__class__ = nn.Embedding
    walks: list[nn.Module] = []
    modules = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(self) or modules(self))
    for _ in range(2):
        backward(late, BATCHES[0])
        zero_grad(late)
    assert len(walks) == 1
    assert all(a is b for a, b in zip(parameters_of(late), late.parameters(), strict=True))
    reuse_embedding_gradient(late)  # after they were looked up: right, if not faster
    for ids in BATCHES[1:]:
        for model in (late, plain):
            backward(model, ids)
        assert torch.equal(gradient(late), gradient(plain))
        zero_grad(late)
        plain.zero_grad()
    walks.clear()
    alive = weakref.ref(late)
    del late, model
    gc.collect()
    assert alive() is None


def test_rows_that_are_not_recorded_are_detected() -> None:
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
def test_other_ways_to_zero_gradients_work(clear: Callable[[nn.Module], None]) -> None:
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
def test_an_embedding_with_options_is_not_replaced(settings: dict[str, Any]) -> None:
    model = Model(**settings)
    reuse_embedding_gradient(model)
    assert type(model.table) is nn.Embedding


def test_a_shared_embedding_is_not_replaced() -> None:
    model = Model()
    model.other = nn.Embedding(ROWS, WIDTH)
    model.other.weight = model.table.weight
    reuse_embedding_gradient(model)
    assert type(model.table) is nn.Embedding


def test_a_subclass_and_a_model_without_an_embedding_are_not_replaced() -> None:
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


def test_weights_of_embeddings_keep_their_names() -> None:
    kept, plain = pair()
    assert list(kept.state_dict()) == list(plain.state_dict())


# ---- OneDnnLinear

needs_onednn = pytest.mark.skipif(
    not cpu_layers.onednn_available(),
    reason="this CPU or this torch has no faster product than nn.Linear's",
)


def layers(bias: bool = True, sizes: tuple[int, int] = (256, 512)) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice: prepared, and plain."""
    torch.manual_seed(0)
    plain = nn.Linear(*sizes, bias=bias)
    ours = nn.Sequential(copy.deepcopy(plain))
    use_onednn(ours)
    return ours[0], plain  # type: ignore[return-value]


def run(layer: nn.Linear, rows: int, **settings: Any) -> list[Tensor]:
    """Output, and gradients of the input and of each parameter."""
    torch.manual_seed(1)
    x = torch.randn(1, rows, layer.in_features, requires_grad=True)
    out = layer(x)
    out.backward(torch.randn(out.shape))
    return [out, *(p.grad for p in (x, *layer.parameters()))]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("sizes", "rows"), [((256, 512), 64), ((256, 512), 434), ((512, 256), 77), ((256, 256), 1030)]
)
def test_output_and_gradients_are_those_of_nn_linear(
    rows: int, sizes: tuple[int, int], bias: bool
) -> None:
    ours, plain = layers(bias, sizes)
    assert type(ours) is OneDnnLinear
    for found, wanted in zip(run(ours, rows), run(plain, rows), strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(
            found, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item() + 1e-6
        )
    with torch.no_grad():
        plain.weight[0, 0] += 0.01  # the control: one weight of 131,072
    assert (run(ours, rows)[0] - run(plain, rows)[0]).abs().max() > 1e-3


@needs_onednn
def test_the_product_is_computed_in_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, plain), (square, _) = layers(), layers(sizes=(256, 256))
    monkeypatch.setattr(
        cpu_layers, "_product", lambda x, weight, bias: torch.zeros(len(x), len(weight))
    )
    assert (run(ours, 64)[0] == 0).all() and (run(plain, 64)[0] != 0).any()
    assert (run(ours, 63)[0] != 0).any()  # too few rows to gain
    assert (run(square, 1023)[0] != 0).any() and (run(square, 1024)[0] == 0).all()


@needs_onednn
def test_other_types_run_in_nn_linear() -> None:
    ours, plain = layers()
    x = torch.randn(100, 256)
    torch.testing.assert_close(
        ours.double()(x.double()), plain.double()(x.double()), rtol=0, atol=0
    )
    ours, plain = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
    strided = torch.randn(256, 100).t()
    torch.testing.assert_close(ours(strided), plain(strided), rtol=0, atol=0)


@needs_onednn
def test_gelu_is_fused_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = BertIntermediate(BertConfig(hidden_size=128, intermediate_size=512))
    x = torch.randn(1, 100, 128)
    with torch.no_grad():
        expected = layer(x)
        use_onednn(layer)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-6)
    product = cpu_layers._product
    monkeypatch.setattr(
        cpu_layers,
        "_product",
        lambda x, weight, bias, gelu=False: product(x, weight, bias, gelu) * 2,
    )
    with torch.no_grad():
        assert torch.allclose(
            layer(x), 2 * expected, atol=1e-5
        )  # the control: it is this product that is used, with its GELU
    assert layer(x).requires_grad and not torch.allclose(
        layer(x), 2 * expected, atol=1e-5
    )  # with gradients GELU comes after


@needs_onednn
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_other_activations_are_not_fused(activation: str) -> None:
    torch.manual_seed(0)
    layer = BertIntermediate(
        BertConfig(hidden_size=128, intermediate_size=512, hidden_act=activation)
    )
    x = torch.randn(1, 100, 128)
    with torch.no_grad():
        expected = layer(x)
        use_onednn(layer)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-6)


def test_small_layers_and_other_machines_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Linear(8, 16))
    use_onednn(small)
    assert type(small[0]) is nn.Linear
    monkeypatch.setattr(cpu_layers, "onednn_available", lambda: False)
    assert type(layers()[0]) is nn.Linear


def test_a_torch_without_the_operator_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(cpu_layers, "_product", missing)
    assert not cpu_layers.onednn_available()


@needs_onednn
def test_weights_of_linear_layers_keep_their_names() -> None:
    ours, plain = layers()
    assert ours.state_dict().keys() == plain.state_dict().keys()


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
def test_mkl_is_used_where_onednn_cannot_allocate(
    gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(message: str) -> Any:
        def product(*args: Any) -> Tensor:
            raise RuntimeError(message)

        return product

    x, weight, bias = torch.randn(70, 256), torch.randn(512, 256), torch.randn(512)
    expected = cpu_layers._product(x, weight, bias, gelu)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", full("could not create a primitive"))
    torch.testing.assert_close(
        cpu_layers._product(x, weight, bias, gelu), expected, rtol=1e-5, atol=1e-4
    )
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", full("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        cpu_layers._product(x, weight, bias, gelu)
