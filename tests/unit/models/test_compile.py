"""Compiled layers learn what eager ones learn, are compiled once, and give way to eager ones, with a word, where they cannot be.

Backends here count and do not make C++; tests/ranks/test_compiled_runs.py has inductor and whole runs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PretrainedConfig,
)

from bertdist.core.config import ModelConfig
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import compile as compiled
from bertdist.models import dropout
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import Classifier, load_classifier
from bertdist.models.compile import compile_layers
from bertdist.models.cpu_layers import ReusedGradientEmbedding, zero_grad
from bertdist.models.dropout import seed_dropout
from bertdist.tasks.tasks import SingleLabel

TASK = SingleLabel(("bad", "good"))
HERE: Any = SimpleNamespace(
    num_processes=1, device=torch.device("cpu")
)  # what compile_layers asks an Accelerator
LENGTHS = [9, 7, 7, 3, 3]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
KINDS: dict[str, Callable[[], PretrainedConfig]] = {  # one of each kind of layer
    "bert": lambda: BertConfig(initializer_range=0.2, **SIZES),
    "albert": lambda: AlbertConfig(embedding_size=16, initializer_range=0.2, **SIZES),
    "modernbert": lambda: ModernBertConfig(
        pad_token_id=0,
        local_attention=4,
        global_attn_every_n_layers=2,
        attention_dropout=0.1,
        mlp_dropout=0.1,
        **SIZES,
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=40, dim=32, n_layers=3, n_heads=2, hidden_dim=48, initializer_range=0.2
    ),
}


class Counting:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.compiled, self.calls = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test compiled is nothing to the next one."""
    yield
    torch.compiler.reset()
    torch.compiler.set_stance("default")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Classifier]:
    def load_kind(
        kind: str = "bert", config: PretrainedConfig | None = None, **settings: Any
    ) -> Classifier:
        """Always the same weights, in training mode."""
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config or KINDS[kind]()).save_pretrained(
            tmp_path / kind
        )
        model = ModelConfig(model_name_or_path=str(tmp_path / kind), max_length=32, **settings)
        return load_classifier(model, TASK)[0].train()

    return load_kind


def batch_of(lengths: Sequence[int]) -> PackedBatch:
    return collate(
        [
            Example(i, [5 + (7 * i + k) % 30 for k in range(length)], [0] * length, i % 2, 1.0)
            for i, length in enumerate(lengths)
        ]
    )


def gradients(
    model: Classifier, lengths: Sequence[int] = LENGTHS, step: int = 3
) -> dict[str, Tensor]:
    batch = batch_of(lengths)
    seed_dropout(1, step, 0)
    zero_grad(model)
    TASK.loss(model(batch), batch.targets, batch.weights).backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a) / max(
        x.abs().max().item() for x in b.values()
    )


# ---- The same arithmetic


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_eager_ones(kind: str, load: Callable[..., Classifier]) -> None:
    """Dropout too: the same masks, drawn in the same order. This backend splits forward and backward as inductor does."""
    eager, model = load(kind, dropout=0.3).double(), load(kind, dropout=0.3).double()
    assert compile_layers(model, HERE, "aot_eager_decomp_partition").startswith(
        "--torch_compile: the layers are compiled ("
    )
    for lengths in (LENGTHS, [12, 2]):
        assert far(gradients(model, lengths), gradients(eager, lengths)) < 1e-14
    assert far(gradients(model), gradients(eager, step=4)) > 0.01  # other masks would be seen


def test_other_dropout_masks_are_detected(
    load: Callable[..., Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, model = load(dropout=0.3), load(dropout=0.3)
    expected = gradients(eager)
    compile_layers(model, HERE, "aot_eager")
    monkeypatch.setattr(dropout, "_keep_mask", lambda masks, shape, p: torch.rand(shape) >= p)
    assert far(gradients(model), expected) > 0.01


def test_in_bf16_too(load: Callable[..., Classifier]) -> None:
    eager, model = load(dropout=0.3), load(dropout=0.3)
    for layer in eager.model.base_model.encoder.layer[:-1]:
        del layer.forward  # `use_bf16_layer`'s: what is compiled is the modules
    with torch.autocast("cpu", torch.bfloat16):
        compile_layers(model, HERE, counting := Counting())
        calls = counting.calls
        assert (
            far(gradients(model), gradients(eager)) == 0
        )  # the same operators: nothing is fused here
    assert counting.calls == calls + 2


def test_the_embedding_gradient_is_reused(load: Callable[..., Classifier]) -> None:
    model = load()
    compile_layers(model, HERE, Counting())
    table = model.model.get_input_embeddings()
    assert isinstance(table, ReusedGradientEmbedding) and table.written == []
    assert all(
        not weight.grad.any() for weight in model.parameters() if weight.grad is not None
    )  # of the throw-away texts nothing is left
    gradients(model)
    kept = table.weight.grad
    gradients(model, step=4)
    assert table.weight.grad is kept is not None


def test_weights_keep_their_names(load: Callable[..., Classifier]) -> None:
    eager, model = load(), load()
    compile_layers(model, HERE, Counting())
    assert list(model.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in eager.named_modules()
    ]


def test_evaluation_runs_eagerly(load: Callable[..., Classifier]) -> None:
    eager, model = load().eval(), load()
    compile_layers(model, HERE, counting := Counting())
    calls = counting.calls
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(batch_of(LENGTHS)), eager(batch_of(LENGTHS)), rtol=0, atol=0
        )
    assert counting.calls == calls


# ---- Compiled once


def test_no_size_is_compiled_again(load: Callable[..., Classifier]) -> None:
    """One compilation for all layers and sizes, also for one text, for as many tokens as the hidden size, and after an evaluation."""
    model, eager = load(), load()
    compile_layers(model, HERE, counting := Counting())
    calls = counting.calls
    sizes = [[2], [32], [24, 24], *([12] * k + [3 + k] for k in range(1, 24))]
    for lengths in sizes:
        model.eval()
        model.train()
        assert far(gradients(model, lengths), gradients(eager, lengths)) < 1e-6
    assert (counting.compiled, counting.calls - calls) == (1, 2 * len(sizes))


def test_a_single_token_runs_eagerly(load: Callable[..., Classifier]) -> None:
    """A size of one is a constant to the compiler."""
    model, eager = load(), load()
    compile_layers(model, HERE, counting := Counting())
    calls = counting.calls
    assert far(gradients(model, [1]), gradients(eager, [1])) < 1e-6
    assert (counting.compiled, counting.calls) == (1, calls)


def test_a_compilation_per_size_is_not_used(
    load: Callable[..., Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda *args: None)
    model = load()
    said = compile_layers(model, HERE, counting := Counting())
    assert (
        said.startswith("--torch_compile cannot take effect, the layers run eagerly: ")
        and "recompile" in said
    )
    calls = counting.calls
    gradients(model)
    assert counting.calls == calls


def test_a_second_run_in_a_process_compiles_too(load: Callable[..., Classifier]) -> None:
    for _ in range(2):
        model = load()
        compile_layers(model, HERE, counting := Counting())
        gradients(model)
        assert counting.compiled == 1


# ---- Where it cannot be


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such thing\nand more")


def broken_backward(graph: Any, inputs: Any) -> Any:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise ValueError

    return lambda *args: [Raises.apply(out) for out in graph(*args)]


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (broken, "no such thing"),
        (broken_backward, "ValueError: no message"),
        ("no_backend", "no_backend"),
    ],
)
def test_a_compiler_error_leaves_layers_eager(
    backend: Any, why: str, load: Callable[..., Classifier]
) -> None:
    eager, model = load(dropout=0.3), load(dropout=0.3)
    said = compile_layers(model, HERE, backend)
    assert (
        said.startswith("--torch_compile cannot take effect, the layers run eagerly: ")
        and why in said
        and "\n" not in said
    )
    assert far(gradients(model), gradients(eager)) == 0
    assert (
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
    )  # nobody else is told not to compile


def test_a_family_without_compilable_layers_runs_eagerly(
    load: Callable[..., Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "bert", replace(ARCHITECTURES["bert"], after_attention=None))
    said = compile_layers(load(), HERE, counting := Counting())
    assert said == (
        "--torch_compile cannot take effect, the layers run eagerly: "
        "models of type 'bert' have no layers that can be compiled."
    )
    monkeypatch.delitem(ARCHITECTURES, "bert")
    assert compile_layers(load(), HERE, counting) == said
    assert counting.compiled == 0


def test_checkpointed_layers_run_eagerly(load: Callable[..., Classifier]) -> None:
    eager, model = (
        load(gradient_checkpointing=True, dropout=0.3),
        load(gradient_checkpointing=True, dropout=0.3),
    )
    said = compile_layers(model, HERE, counting := Counting())
    assert said.endswith(
        "eagerly: --gradient_checkpointing computes the layers again in the backward pass."
    )
    assert far(gradients(model), gradients(eager)) == 0 and counting.compiled == 0


def test_a_model_of_one_layer_runs_eagerly(load: Callable[..., Classifier]) -> None:
    config = BertConfig(initializer_range=0.2, **{**SIZES, "num_hidden_layers": 1})
    assert "the last layer is not compiled" in compile_layers(load(config=config), HERE, Counting())


def test_a_compiler_error_on_another_rank_leaves_layers_eager(
    load: Callable[..., Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    two: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(
        compiled, "gather_from_all_ranks", lambda _, mine: [*mine, "OSError: no disk"]
    )
    eager, model = load(dropout=0.3), load(dropout=0.3)
    said = compile_layers(model, two, counting := Counting())
    assert (
        said
        == "--torch_compile cannot take effect (rank 1), the layers run eagerly: OSError: no disk"
    )
    calls = counting.calls
    assert far(gradients(model), gradients(eager)) == 0 and counting.calls == calls
