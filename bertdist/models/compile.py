"""Layers that torch.compile has compiled (--torch_compile): the same losses as without it, to rounding.

In: a classifier before its first step. Out: the same classifier, its layers compiled in training; or as it was, and the reason.

1. Compiled is what follows attention in a layer (`rest` in families.py): there each token is by itself, so one number differs from
   call to call, T, and it is left open. One compilation serves all layers and all steps. Attention, which groups texts by length,
   the last layer, of which only the first tokens are computed, embeddings, head and all of evaluation run as they are.
2. Dropout's masks are made outside, from the rows' own bits (CPU) or by torch's own operator (elsewhere): they are the eager ones.
3. It is compiled before the first step, forward and backward, on made-up texts of always the same size: the compiler decides some
   things by size and keeps what it made for later runs, and a resumed run is bit-identical only where both come to the same.
   Another size is tried at once, and must not compile again.
4. From then on nothing is compiled: a size that would need it (a single token) runs eagerly.
5. Whatever raises in 3, on any rank, the layers of all ranks run eagerly, and the run goes on.

Legend: T tokens.
"""

import textwrap
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from bertdist.data.batch import collate
from bertdist.data.tokenization import Example
from bertdist.models.architectures import ARCHITECTURES, Attend, Rest
from bertdist.models.attention import Packing
from bertdist.models.classifier import Classifier
from bertdist.models.cpu_layers import zero_grad

TOKENS = (
    512  # of the batch that is compiled on: about a small step's, and few enough for any device
)

LONGEST = 64  # of its texts

Backend = str | Callable[..., Any]


def compile_layers(
    classifier: Classifier, accelerator: Accelerator, backend: Backend = "inductor"
) -> str:
    """Compile the layers of a classifier, prepared and in training mode, in place; the line to say about it. Every rank calls it.

    backend: torch.compile's. Never raises: what cannot be compiled runs as it is. What was compiled before in this process is forgotten.
    """
    began, family = perf_counter(), ARCHITECTURES.get(classifier.model.config.model_type)
    layers: list[Any] = family.layers(classifier.model) if family else []
    trouble = None
    if family is None or family.attend is None or family.rest is None:
        trouble = f"families.py does not say what follows attention in models of type {classifier.model.config.model_type!r}."
    elif not layers:
        trouble = "the model has one layer, and the last layer is not compiled."
    elif classifier.gradient_checkpointing:
        trouble = "--gradient_checkpointing computes the layers again in the backward pass."
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.13 warns of what its own compiler does
                compiled = _compiled(family.rest, backend)
                for layer in layers:
                    _put_in(layer, family.attend, family.rest, compiled)
                _try_out(classifier, accelerator.device)
        except Exception as error:
            said = str(error).partition("\n\nSet TORCH")[
                0
            ]  # advice on how to read the compiler's own log
            trouble = textwrap.shorten(
                f"{type(error).__name__}: {said or 'no message'}", 300, placeholder=" ..."
            )
    troubles = [trouble] if accelerator.num_processes == 1 else gather_object([trouble])
    found = {rank: each for rank, each in enumerate(troubles) if each is not None}
    if not found:
        return f"--torch_compile: the layers are compiled ({perf_counter() - began:.0f} s)."
    for layer in layers:
        vars(layer).pop("forward", None)
    zero_grad(classifier)
    rank, first = next(iter(found.items()))
    where = f" (rank {rank})" if len(found) < len(troubles) else ""
    return f"--torch_compile cannot take effect{where}, the layers run eagerly: {first}"


def _compiled(rest: Rest, backend: Backend) -> Rest:
    import torch._inductor.config  # here, because it takes a second that nobody else should wait for

    torch.compiler.reset()
    torch.compiler.set_stance("default")
    torch._inductor.config.compile_threads = (
        1  # no pool of processes that outlives a signal: there are only a few kernels
    )
    options: Any = (
        {"fallback_random": True} if backend == "inductor" else None
    )  # torch's own random numbers, not inductor's
    quick = torch.compile(rest, backend=backend, options=options)

    def compiled(layer: Any, context: Tensor, asking: Tensor) -> Tensor:
        for x in (context, asking):
            torch._dynamo.mark_dynamic(
                x, 1
            )  # T, and nothing else; also where it happens to be as many as the hidden size
        out: Tensor = quick(layer, context, asking)
        return out

    return compiled


def _put_in(layer: Any, attend: Attend, rest: Rest, compiled: Rest) -> None:
    def forward(hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        context = attend(layer, hidden_states, hidden_states, packing, **kwargs)
        return (compiled if layer.training and torch.is_grad_enabled() else rest)(
            layer, context, hidden_states
        )

    layer.forward = forward


def _try_out(classifier: Classifier, device: torch.device) -> None:
    """Compile, forward and backward; then try one token more. Raises whatever goes wrong."""
    longest = min(LONGEST, classifier.max_positions)
    lengths = [longest] * (TOKENS // longest)
    _backward(classifier, lengths, device)
    with torch.compiler.set_stance("fail_on_recompile"):
        _backward(classifier, [*lengths, 1], device)
    torch.compiler.set_stance("eager_on_recompile")
    zero_grad(classifier)


def _backward(classifier: Classifier, lengths: list[int], device: torch.device) -> None:
    examples = [
        Example(row=-1, ids=[0] * length, segments=[0] * length, target=0, weight=0.0)
        for length in lengths
    ]
    classifier(collate(examples).to(device)).sum().backward()
