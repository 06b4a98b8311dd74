"""What a GPU would see of each family, without one: forward and backward with fake tensors, which have a device, a shape and a type,
and no values. Two tensors of different devices in one operator raise.

Backward passes need a device that torch has here: one for Python backends stands in for CUDA ("gpu"). It has no autocast: weights are
bf16 where attention has to get that. What autocast makes of float32 weights is looked at where torch is built with CUDA, also without a GPU.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoConfig, AutoModelForSequenceClassification

from bench.gpu_jobs import FAMILIES
from bertdist.core.config import OptimConfig
from bertdist.data.batch import PackedBatch, collate
from bertdist.data.tokenization import Example
from bertdist.models import attention, deberta
from bertdist.models.classifier import Classifier
from bertdist.tasks.tasks import SingleLabel
from bertdist.training.cuda_graph import pad_batch
from bertdist.training.optimizer import create_optimizer, fused_step_if_finite

LENGTHS = (19, 7, 7, 3, 1)
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 34}
TASK = SingleLabel(("bad", "fine", "good"))
# its last layer is local too, and it can have a mean instead of a first token
KINDS = FAMILIES | {
    f"modernbert, {pooling}": {**FAMILIES["modernbert"], "classifier_pooling": pooling, **layers}
    for pooling, layers in (("mean", {}), ("cls", {"num_hidden_layers": 4}))
}
WAYS = [(kind, kernel) for kind in KINDS for kernel in ("varlen", "padded")]


def classifier_of(kind: str) -> Classifier:
    name = kind.split(",")[0]
    config = AutoConfig.for_model(name, **{**SIZES, **KINDS[kind]}, num_labels=3)
    how = attention.NAME if name != "deberta-v2" else "eager"
    attention.register()
    return Classifier(
        AutoModelForSequenceClassification.from_config(config, attn_implementation=how)
    )


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    return collate([Example(i, [5] * n, [0] * n, i % 3, 1.0) for i, n in enumerate(lengths)])


def fake(tensor: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=device)


def move(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Fake weights in place of real ones."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(fake(weight, device, dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, device)


def real_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeBERTa's table of distances has values that decide shapes: made on the CPU, then faked."""
    rows = deberta._RelativePositions.rows

    def rows_of(self: Any, longest: int, device: torch.device) -> tuple[Tensor, int, int]:
        if device.type == "cpu":
            return rows(self, longest, device)
        with unset_fake_temporarily():
            real, low, high = rows(self, longest, torch.device("cpu"))
        return fake(real, str(device)), low, high

    monkeypatch.setattr(deberta._RelativePositions, "rows", rows_of)


def train_once(classifier: Classifier, batch: PackedBatch, kernel: str) -> dict[str, Any]:
    """A step as on a GPU: forward, backward, and fused AdamW that skips itself on the device."""
    half = torch.bfloat16 if kernel == "varlen" else None
    with FakeTensorMode():
        move(classifier, "gpu:0", half)
        batch = batch._map(lambda tensor: fake(tensor, "gpu:0"))
        adamw = create_optimizer(classifier.train(), OptimConfig())
        logits = classifier(batch)
        loss = TASK.loss(logits, batch.targets, batch.weights)
        loss.backward()
        gradients = [weight.grad for weight in classifier.parameters() if weight.grad is not None]
        norm = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        fused_step_if_finite(adamw, norm)
        state = [value for one in adamw.state.values() for value in one.values()]
        tensors = [logits, loss, norm, *gradients, *state]
        return {
            "logits": [*logits.shape],
            "gradients": len(gradients),
            "weights": sum(1 for _ in classifier.parameters()),
            "devices": sorted({str(tensor.device) for tensor in tensors}),
        }


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """The answers of `WORKS`, by name, in one new process, where the device "gpu" exists.

    Not of a fork: torch counts the devices at its first backward pass.
    """
    root = Path(__file__).parents[3]
    command = [sys.executable, __file__]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def choose(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention,
        "select_kernel",
        lambda device, *unused: "buckets" if device.type == "cpu" else kernel,
    )


def all_steps(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A step of each kind with each kernel: what came of it, or the error."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for kernel in ("varlen", "padded"):
            choose(kernel, patch)
            try:
                found[f"{kind} {kernel}"] = train_once(classifier_of(kind), batch_of(), kernel)
            except Exception:
                found[f"{kind} {kernel}"] = traceback.format_exc()
    return found


@pytest.mark.parametrize(("kind", "kernel"), WAYS)
def test_a_step_is_on_one_device(kind: str, kernel: str, seen: dict[str, Any]) -> None:
    found = seen["all_steps"][f"{kind} {kernel}"]
    assert isinstance(found, dict), found
    assert found["logits"] == [len(LENGTHS), 3] and found["devices"] == ["gpu:0"]
    assert found["gradients"] == found["weights"] > 10


def steps_with_a_tensor_left_behind(patch: pytest.MonkeyPatch) -> dict[str, str]:
    choose("varlen", patch)
    found = {}
    for left in ("positions", "token_type_ids", "targets", "weights"):
        classifier = classifier_of("bert")
        with FakeTensorMode():
            move(classifier, "gpu:0", torch.bfloat16)
            batch = batch_of()._map(lambda tensor: fake(tensor, "gpu:0"))
            there = fake(getattr(batch, left), "cpu")
            batch = replace(batch, **{left: there})
            try:
                TASK.loss(classifier(batch), batch.targets, batch.weights).backward()
                found[left] = "nothing"
            except RuntimeError as error:
                found[left] = str(error)
    return found


def test_a_tensor_on_another_device_is_seen(seen: dict[str, Any]) -> None:
    """The control: a tensor of the batch that is left on the CPU."""
    found = seen["steps_with_a_tensor_left_behind"]
    assert all("device" in error for error in found.values()), found


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a torch that is built with CUDA; no GPU"
)
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_attention_gets_half_precision(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What flash attention takes, though norms and rotations compute in float32; the ends of texts are int32."""
    real_rows(monkeypatch)
    asked, given = [], []
    classifier = classifier_of(kind)

    def choose_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
        asked.append((device.type, dtype))
        return "varlen"

    def watched(q: Tensor, k: Tensor, v: Tensor, packing: Any, *rest: Any) -> Tensor:
        assert packing.cu_seqlens.dtype == torch.int32
        given.append({(x.device.type, x.dtype) for x in (q, k, v)})
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "select_kernel", choose_varlen)
    monkeypatch.setattr(attention, "_varlen", watched)
    enabled = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda")
    try:
        # not torch.autocast, which asks for a GPU
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with FakeTensorMode(), torch.no_grad():
            move(classifier, "cuda:0")
            batch = batch_of()._map(lambda tensor: fake(tensor, "cuda:0"))
            loss = TASK.loss(classifier.eval()(batch), batch.targets, batch.weights)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
    assert asked == [("cuda", torch.bfloat16)] and loss.dtype == torch.float32
    layers = 0 if kind == "deberta-v2" else classifier.model.config.num_hidden_layers
    assert given == [{("cuda", torch.bfloat16)}] * layers


def devices_of_a_graph_s_batch(patch: pytest.MonkeyPatch) -> list[str]:
    with FakeTensorMode():
        batch = batch_of()._map(lambda tensor: fake(tensor, "gpu:0"))
        patch.setattr(
            torch, "from_numpy", lambda array: fake(torch.ones(len(array)), "gpu:0").long()
        )
        padded = pad_batch(batch, 64, 8, 32)
        assert padded is not None
        return sorted({str(x.device) for x in vars(padded).values() if isinstance(x, Tensor)})


def test_a_graph_s_batch_stays_on_its_device(seen: dict[str, Any]) -> None:
    assert seen["devices_of_a_graph_s_batch"] == ["gpu:0"]


WORKS: list[Callable[[pytest.MonkeyPatch], Any]] = [
    all_steps,
    steps_with_a_tensor_left_behind,
    devices_of_a_graph_s_batch,
]


def answer_of(work: Callable[[pytest.MonkeyPatch], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        real_rows(patch)
        return work(patch)


if __name__ == "__main__":  # `seen`
    _setup_privateuseone_for_python_backend("gpu")
    print(json.dumps({work.__name__: answer_of(work) for work in WORKS}))
