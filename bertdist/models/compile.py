"""torch.compile for the layers of a classifier (--torch_compile): the same losses, to rounding.

`compile_layers(classifier, accelerator)` before the first step compiles the layers for training, or
leaves them eager and says why.

1. Compiled is what follows attention in a layer (`after_attention` in architectures.py): there each
   token is by itself, so only T differs from call to call, and is dynamic. One compilation serves
   all layers and steps. Attention, which groups texts by length, the last layer, of which only
   first tokens are computed, embeddings, head and evaluation run eagerly.
2. Dropout masks are drawn outside, from the rows' own bits (CPU) or by torch's own operator
   (elsewhere): they are the eager ones.
3. Forward and backward are compiled before the first step, on synthetic texts of always the same
   size: the compiler decides some things by size and caches its output for later runs, and a
   resumed run is bit-identical only where both come to the same. Another size is then run, and must
   not recompile.
4. From then on nothing is compiled: a size that would need it (a single token) runs eagerly.
5. Whatever raises in 3, on any rank, the layers of all ranks run eagerly, and the run continues.

Legend: T tokens.
"""

import textwrap
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.data.batch import collate
from bertdist.data.tokenization import Example
from bertdist.distributed.collectives import gather_from_all_ranks
from bertdist.models.architectures import ARCHITECTURES, AfterAttention, Attention
from bertdist.models.attention import Packing
from bertdist.models.classifier import Classifier
from bertdist.models.cpu_layers import zero_grad

# of the batch that is compiled on: about a small step's, and few enough for any device
TOKENS = 512
TOKENS_PER_TEXT = 64

Backend = str | Callable[..., Any]


def compile_layers(
    classifier: Classifier, accelerator: Accelerator, backend: Backend = "inductor"
) -> str:
    """Compile the layers of a prepared classifier in training mode, in place. All ranks call it.

    backend: torch.compile's. Returns a one-line message; never raises: what cannot be compiled runs
    eagerly. What was compiled before in this process is discarded.
    """
    start, model_type = perf_counter(), classifier.model.config.model_type
    family = ARCHITECTURES.get(model_type)
    layers: list[Any] = family.compilable_layers(classifier.model) if family else []
    reason = None
    if family is None or family.attention is None or family.after_attention is None:
        reason = f"models of type {model_type!r} have no layers that can be compiled."
    elif not layers:
        reason = "the model has one layer, and the last layer is not compiled."
    elif classifier.gradient_checkpointing:
        reason = "--gradient_checkpointing computes the layers again in the backward pass."
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.13 warns of what its own compiler does
                compiled = _compile(family.after_attention, backend)
                for layer in layers:
                    _replace_forward(layer, family.attention, family.after_attention, compiled)
                _warm_up(classifier, accelerator.device)
        except Exception as error:
            # without the advice on how to read the compiler's own log
            message = str(error).partition("\n\nSet TORCH")[0] or "no message"
            line = f"{type(error).__name__}: {message}"
            reason = textwrap.shorten(line, 300, placeholder=" ...")
    reasons = gather_from_all_ranks(accelerator, [reason])
    failed = [(rank, each) for rank, each in enumerate(reasons) if each is not None]
    if not failed:
        return f"--torch_compile: the layers are compiled ({perf_counter() - start:.0f} s)."
    for layer in layers:
        vars(layer).pop("forward", None)
    zero_grad(classifier)
    rank, first = failed[0]
    where = f" (rank {rank})" if len(failed) < len(reasons) else ""
    return f"--torch_compile cannot take effect{where}, the layers run eagerly: {first}"


def _compile(after_attention: AfterAttention, backend: Backend) -> AfterAttention:
    # imported here, because it takes a second
    import torch._inductor.config

    torch.compiler.reset()
    torch.compiler.set_stance("default")
    # No pool of processes that outlives a signal: there are only a few kernels.
    torch._inductor.config.compile_threads = 1
    # torch's own random numbers, not inductor's
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    function = torch.compile(after_attention, backend=backend, options=options)

    def compiled(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
        for x in (context, residual):
            # T, and nothing else; also where it happens to be as many as the hidden size
            torch._dynamo.mark_dynamic(x, 1)
        out: Tensor = function(layer, context, residual)
        return out

    return compiled


def _replace_forward(
    layer: Any, attention: Attention, eager: AfterAttention, compiled: AfterAttention
) -> None:
    def forward(hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        context = attention(layer, hidden_states, hidden_states, packing, **kwargs)
        training = layer.training and torch.is_grad_enabled()
        return (compiled if training else eager)(layer, context, hidden_states)

    layer.forward = forward


def _warm_up(classifier: Classifier, device: torch.device) -> None:
    """Compile forward and backward; then run with one token more. Raises whatever goes wrong."""
    longest = min(TOKENS_PER_TEXT, classifier.max_positions)
    lengths = [longest] * (TOKENS // longest)
    _forward_backward(classifier, lengths, device)
    with torch.compiler.set_stance("fail_on_recompile"):
        _forward_backward(classifier, [*lengths, 1], device)
    torch.compiler.set_stance("eager_on_recompile")
    zero_grad(classifier)


def _forward_backward(classifier: Classifier, lengths: list[int], device: torch.device) -> None:
    examples = [
        Example(row=-1, ids=[0] * length, token_type_ids=[0] * length, target=0, weight=0.0)
        for length in lengths
    ]
    classifier(collate(examples).to(device)).sum().backward()
