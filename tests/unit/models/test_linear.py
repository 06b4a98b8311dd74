"""A product in oneDNN is nn.Linear's product, to float32 rounding, with its gradients; where it cannot be, it is nn.Linear's own.

Legend: R rows.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate

from bertdist.models import cpu_layers as linear
from bertdist.models.cpu_layers import OneDnnLinear, use_onednn

needs_onednn = pytest.mark.skipif(
    not linear.onednn_available(),
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
def test_the_product_is_really_taken_from_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, plain), (square, _) = layers(), layers(sizes=(256, 256))
    monkeypatch.setattr(
        linear, "_product", lambda x, weight, bias: torch.zeros(len(x), len(weight))
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
def test_gelu_comes_with_the_product_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = BertIntermediate(BertConfig(hidden_size=128, intermediate_size=512))
    x = torch.randn(1, 100, 128)
    with torch.no_grad():
        expected = layer(x)
        use_onednn(layer)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-6)
    product = linear._product
    monkeypatch.setattr(
        linear, "_product", lambda x, weight, bias, gelu=False: product(x, weight, bias, gelu) * 2
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
def test_other_activations_stay(activation: str) -> None:
    torch.manual_seed(0)
    layer = BertIntermediate(
        BertConfig(hidden_size=128, intermediate_size=512, hidden_act=activation)
    )
    x = torch.randn(1, 100, 128)
    with torch.no_grad():
        expected = layer(x)
        use_onednn(layer)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-6)


def test_small_layers_and_other_machines_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Linear(8, 16))
    use_onednn(small)
    assert type(small[0]) is nn.Linear
    monkeypatch.setattr(linear, "onednn_available", lambda: False)
    assert type(layers()[0]) is nn.Linear


def test_a_torch_without_the_operator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(linear, "_product", missing)
    assert not linear.onednn_available()


@needs_onednn
def test_names_of_weights_stay() -> None:
    ours, plain = layers()
    assert ours.state_dict().keys() == plain.state_dict().keys()


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
def test_where_onednn_finds_no_memory_for_its_code_mkl_takes_over(
    gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(message: str) -> Any:
        def product(*args: Any) -> Tensor:
            raise RuntimeError(message)

        return product

    x, weight, bias = torch.randn(70, 256), torch.randn(512, 256), torch.randn(512)
    expected = linear._product(x, weight, bias, gelu)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", full("could not create a primitive"))
    torch.testing.assert_close(
        linear._product(x, weight, bias, gelu), expected, rtol=1e-5, atol=1e-4
    )
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", full("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        linear._product(x, weight, bias, gelu)
