"""A complete training step as one CUDA graph (--cuda_graphs): captured once, then replayed with the
rows of each step.

    take_step = create_graphed_step(train_step, classifier, micro_batcher, max_length)

A step of a small model is a thousand kernels, each finished before the host has launched the next
one; a graph is launched at once. What it reads and writes lies at fixed addresses in fixed shapes:

1. T tokens and N texts are fixed before the first step, from the lengths of the first steps of
   epoch 0: the same after a restart.
2. A step's only micro-batch is padded to them with texts of weight 0 (`pad_batch`): loss and
   gradients do not change.
3. It is copied into fixed tensors, and so are the learning rates; forward, backward, clipping and
   AdamW are the captured `train_step`.
4. `train_step` itself runs what does not fit (more tokens, several micro-batches, the smaller last
   step of an epoch), and the first step of a run, which creates AdamW's state.
5. The graph is captured on a blank batch at learning rates of 0, and its first replay is a trial:
   loss, gradient norm and the change of all weights must be those of the eager step. Anything that
   the capture left out would show. If they differ, or if anything raises on the way, weights and
   AdamW's state are restored, the run continues eagerly, and a message says so.
6. Dropout stays a function of (seed, step, rank): before a replay torch writes the generator's
   present seed and offset to where the graph's kernels read them (torch 2.11 to 2.13:
   CUDAGeneratorState::replay_prologue), so `seed_dropout` seeds a replay too. The masks are those
   of the padded batch, so with dropout they are not the ones of a run without --cuda_graphs.

Not run on a GPU yet. On the CPU a recording of torch's operators replaces the graph
(tests/unit/training/test_cuda_graph.py).

Legend: T tokens, N texts.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bertdist.core.types import Array
from bertdist.data.batch import PackedBatch, RankStep, collate
from bertdist.data.loader import MapLoader
from bertdist.data.tokenization import Example
from bertdist.models.architectures import ARCHITECTURES
from bertdist.models.classifier import Classifier
from bertdist.models.cpu_layers import zero_grad
from bertdist.training.micro_batches import MicroBatcher

R = TypeVar("R")

StepResult = tuple[Tensor, Tensor]  # loss sum (), gradient norm ()

TrainStep = Callable[
    ..., StepResult
]  # train.train_step: (model, optimizer, step, micro_batcher, ...)

# (run_step, device) -> replay, and the tensors in which it leaves its results
Capture = Callable[[Callable[[], StepResult], torch.device], tuple[Callable[[], None], StepResult]]

# whose lengths fix the budget: with 32 rows of SST-2 per step the longest has 1.3 times the mean
# tokens
STEPS = 32

ROUND = 64  # tokens; products of odd sizes are slower

WARM_UPS = 3  # before the capture, as https://docs.pytorch.org/docs/stable/notes/cuda.html has it

# What a trial may differ by: the same kernels on the same numbers, added in any order. A change of
# weights more, because AdamW takes a step of full size also where a gradient is zero but for
# rounding (the biases of keys).
TOLERANCE, CHANGE_TOLERANCE = 0.01, 0.1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The fixed shape of a captured step."""

    tokens: int
    texts: int
    rows: int  # of a step that is captured
    max_length: int  # most tokens of a text

    def fill(self, step: RankStep) -> PackedBatch | None:
        """The step's micro-batch in this shape; None where it does not fit."""
        if len(step.micro_batches) != 1 or step.rows != self.rows:
            return None
        return pad_batch(step.micro_batches[0], self.tokens, self.texts, self.max_length)

    def blank(self, like: PackedBatch) -> PackedBatch:
        """A batch in this shape, of texts that count nothing, on the same device and with targets
        of the same kind.

        Its lengths add up to T, with one text of the greatest possible length: all that the host
        may assume of every padded batch.
        """
        first = min(self.max_length, self.tokens - self.texts + 1)
        lengths = [first, *_evenly(self.tokens - first, self.texts - 1)]
        batch = collate(
            [
                Example(row=-1, ids=[0] * n, token_type_ids=[0] * n, target=0, weight=0.0)
                for n in lengths
            ]
        ).to(like.ids.device)
        return replace(batch, targets=like.targets.new_zeros(self.texts, *like.targets.shape[1:]))


def _evenly(tokens: int, texts: int) -> list[int]:
    # Attention costs the squares of lengths.
    return [tokens // texts + (i < tokens % texts) for i in range(texts)]


def choose_budget(loader: MapLoader, max_length: int) -> Budget | None:
    """A shape that nearly every step fits in, a function of rows and seed alone; None if steps have
    several micro-batches.
    """
    loader = replace(loader, workers=0, pin=False)
    steps = list(loader.steps(0, min(STEPS, loader.steps_per_epoch)))
    if any(len(step.micro_batches) > 1 for step in steps):
        return None
    most = max(len(step.micro_batches[0].ids) for step in steps)
    # Enough for a step of very few tokens, each of one token at least.
    pads = most // max_length + 2
    return Budget(
        tokens=-(-(most + pads) // ROUND) * ROUND,
        texts=steps[0].rows + pads,
        rows=steps[0].rows,
        max_length=max_length,
    )


def pad_batch(batch: PackedBatch, tokens: int, texts: int, max_length: int) -> PackedBatch | None:
    """The same batch, followed by texts of weight 0 to exactly `tokens` tokens and `texts` texts;
    None if that is impossible.

    max_length: most tokens of a text. The content of the added texts does not matter. No GPU is
    waited for.
    """
    num_tokens, num_texts = tokens - len(batch.ids), texts - len(batch.lengths)
    if not 0 <= num_texts <= num_tokens <= num_texts * max_length:
        return None
    lengths = np.array(_evenly(num_tokens, num_texts), dtype=np.int64)
    positions = np.arange(num_tokens) - np.repeat(lengths.cumsum() - lengths, lengths)

    def fill(tensor: Tensor, value: int, count: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((count, *tensor.shape[1:]), value)])

    def append(tensor: Tensor, values: Array) -> Tensor:
        new = torch.from_numpy(values)
        if tensor.is_cuda:
            new = new.pin_memory().to(tensor.device, non_blocking=True)
        return torch.cat([tensor, new])

    return PackedBatch(
        ids=fill(batch.ids, 0, num_tokens),
        positions=append(batch.positions, positions),
        token_type_ids=fill(batch.token_type_ids, 0, num_tokens),
        cu_seqlens=append(batch.cu_seqlens, len(batch.ids) + lengths.cumsum()),
        targets=fill(batch.targets, 0, num_texts),
        weights=fill(batch.weights, 0, num_texts),
        row_numbers=fill(batch.row_numbers, -1, num_texts),
        lengths=(*batch.lengths, *lengths.tolist()),
    )


def create_graphed_step(
    train_step: TrainStep, classifier: Classifier, micro_batcher: MicroBatcher, max_length: int
) -> TrainStep:
    """train_step by replays; or itself, with a message, if that is not possible."""
    accelerator, say = micro_batcher.accelerator, micro_batcher.say
    loader = micro_batcher.rebatch()
    budget = None
    if accelerator.device.type != "cuda":
        reason = f"it needs a CUDA GPU, and this run is on {accelerator.device.type}."
    elif accelerator.num_processes > 1:
        reason = f"it is for one process, and there are {accelerator.num_processes}."
    elif accelerator.mixed_precision != "bf16":
        precision = accelerator.mixed_precision
        reason = f"it needs --mixed_precision bf16, and this run has {precision!r}."
    elif classifier.gradient_checkpointing:
        reason = "--gradient_checkpointing sets random states from the host."
    elif not isinstance(loader, MapLoader):
        reason = "the lengths of a stream are unknown before it is read."
    elif not _reads_starts(classifier, accelerator):
        reason = "this model, GPU or torch has no flash attention for packed texts."
    elif (budget := choose_budget(loader, max_length)) is None:
        tokens = loader.tokens_per_micro_batch
        reason = (
            "a graph has one micro-batch, and steps have more than "
            f"--tokens_per_micro_batch {tokens} tokens."
        )
    if budget is None:
        say(f"--cuda_graphs cannot take effect, steps run eagerly: {reason}")
        return train_step
    say(
        f"--cuda_graphs: steps are padded to {budget.tokens} tokens in {budget.texts} texts; "
        "steps that do not fit run eagerly."
    )
    return GraphedStep(train_step, budget, say)


def _reads_starts(classifier: Classifier, accelerator: Accelerator) -> bool:
    """Whether attention reads the lengths on the device, where a replay has those of its step."""
    family = ARCHITECTURES.get(classifier.model.config.model_type)
    with accelerator.autocast():
        return (
            family is not None
            and family.attention is not None
            and classifier.attention_kernel(accelerator.device) == "varlen"
        )


class _OneMicroBatch:
    """Replaces a MicroBatcher: the one micro-batch as it is; out of memory raises."""

    def __init__(self, micro_batcher: MicroBatcher) -> None:
        self.task, self.accelerator = micro_batcher.task, micro_batcher.accelerator

    def accumulate_gradients(
        self, model: nn.Module, step: RankStep, backward: Callable[[PackedBatch, bool], Tensor]
    ) -> Tensor:
        return backward(step.micro_batches[0], True)


class GraphedStep:
    """train_step, with its signature; see above."""

    def __init__(
        self,
        train_step: TrainStep,
        budget: Budget,
        say: Callable[[str], None],
        capture: Capture | None = None,
    ) -> None:
        """capture: `capture_on_cuda`, or what stands in for it where there is no GPU."""
        self.train_step, self.budget, self.say = train_step, budget, say
        self._capture = capture or capture_on_cuda
        self._replay: Callable[[], None] | None = None
        self._failed = False

    def __call__(self, model: nn.Module, optimizer: Any, step: RankStep, *rest: Any) -> StepResult:
        """See train.train_step."""
        batch = self.budget.fill(step) if optimizer.state and not self._failed else None
        if batch is not None and self._replay is None:
            self._prepare(model, optimizer, replace(step, micro_batches=[batch]), rest)
        if batch is None or self._replay is None:
            return self.train_step(model, optimizer, step, *rest)
        return self._replay_step(batch, optimizer)

    def _replay_step(self, batch: PackedBatch, optimizer: Any) -> StepResult:
        assert self._replay is not None
        for name, tensor in vars(batch).items():
            if isinstance(tensor, Tensor):
                getattr(self._batch, name).copy_(tensor)
        for rate, group in zip(self._rates, optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._replay()
        loss, grad_norm = (
            result.clone() for result in self._results
        )  # the next replay writes over them
        return loss, grad_norm

    def _prepare(
        self, model: nn.Module, optimizer: Any, step: RankStep, rest: tuple[Any, ...]
    ) -> None:
        """Capture, and try a replay of the filled-up step; leaves weights, optimizer and random
        numbers as they were.
        """
        batch = step.micro_batches[0]
        device, rest = batch.ids.device, (_OneMicroBatch(rest[0]), *rest[1:])
        self._batch = self.budget.blank(batch)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

        def blank_step() -> StepResult:
            for rate, group in zip(self._rates, optimizer.param_groups, strict=True):
                # torch asks for capturable in a capture, and warns of it elsewhere
                group.update(
                    lr=rate,
                    capturable=device.type == "cuda" and torch.cuda.is_current_stream_capturing(),
                )
            return self.train_step(
                model, optimizer, replace(step, micro_batches=[self._batch]), *rest
            )

        try:
            eager, change = _run_and_restore(
                lambda: self.train_step(model, optimizer, step, *rest), model, optimizer
            )
            (self._replay, self._results), _ = _run_and_restore(
                lambda: self._capture(blank_step, device), model, optimizer
            )
            replayed, same_change = _run_and_restore(
                lambda: self._replay_step(batch, optimizer), model, optimizer
            )
            for name, one, other in zip(("loss", "gradient norm"), eager, replayed, strict=True):
                if not torch.isclose(other, one, rtol=TOLERANCE):
                    raise ArithmeticError(
                        f"the replayed step has a {name} of {other.item():.6g}, "
                        f"the eager one {one.item():.6g}"
                    )
            if not (same_change - change).norm() <= CHANGE_TOLERANCE * change.norm():
                raise ArithmeticError(
                    "the replayed step changes the weights in another way than the eager one"
                )
        except Exception as error:
            self._replay, self._failed = None, True
            vars(self).pop("_results", None)
            zero_grad(model)
            why = textwrap.shorten(
                f"{type(error).__name__}: {str(error) or 'no message'}", 300, placeholder=" ..."
            )
            self.say(f"--cuda_graphs cannot take effect, steps run eagerly: {why}")


def _run_and_restore(run: Callable[[], R], model: nn.Module, optimizer: Any) -> tuple[R, Tensor]:
    """What `run` returns, and (weights,) how it changed the weights.

    Afterwards they, optimizer and random numbers are as they were.
    """
    weights = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    tensors = [
        *weights,
        *(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)),
    ]
    settings = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    with torch.random.fork_rng([weights[0].device] if weights[0].is_cuda else []):
        before = [tensor.clone() for tensor in tensors]
        try:
            result = run()
            return result, torch.cat(
                [(now - old).flatten() for now, old in zip(weights, before, strict=False)]
            )
        finally:
            torch._foreach_copy_(tensors, before)
            for group, (rate, capturable) in zip(optimizer.param_groups, settings, strict=True):
                group.update(lr=rate, capturable=capturable)


def capture_on_cuda(
    run_step: Callable[[], StepResult], device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """Run `run_step` a few times beside the main stream, then capture it; what waits for the device
    raises before the capture begins.

    Raises whatever `run_step` or CUDA raises, and leaves stream and generator usable.
    """
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    sync_debug_mode = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(side):
        for i in range(WARM_UPS):
            if i == WARM_UPS - 1:
                torch.cuda.set_sync_debug_mode("error")
            try:
                run_step()
            finally:
                torch.cuda.set_sync_debug_mode(sync_debug_mode)
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: the loader's pinning thread may ask CUDA for memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = run_step()
    except Exception:
        # a capture that broke off leaves the generator's state in the midst of it (torch 2.11 to
        # 2.13): give it a new one
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
        raise
    return graph.replay, results
