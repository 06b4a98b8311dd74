"""Micro-batches: how many tokens a rank computes at once while training, and automatic recovery
when that was too many.

    micro_batcher = MicroBatcher(model, loader, task, state, config.batch, accelerator, say)
    micro_batcher.prepare(model, classifier, optimizer)                # once, before the first step
    loss = micro_batcher.accumulate_gradients(model, step, backward)   # in every step

A `MicroBatcher` owns the token budget (--tokens_per_micro_batch). It comes from the flag, from the
checkpoint, or from free memory (memory.py), and is halved when memory runs out.
`accumulate_gradients`, on each rank:

1. A micro-batch that runs out of memory ends the attempt. Its memory is freed, and the rank halves
   its budget.
2. If it was not the last of the rank's share, the ranks have exchanged nothing yet. The rank
   discards its gradients, splits its share again and repeats it with the same dropout; the others
   wait in their all-reduce without noticing.
3. If it was the last, DDP was exchanging gradients during its backward pass. The rank sends zeros
   for all gradients that it has not sent, so that no rank waits for it.
4. After the exchange, before any weight is updated, the ranks take the smallest budget of any rank,
   and agree on whether the exchange was complete. If not, all discard it and repeat the step.
5. A single text that does not fit ends all ranks with one message.

So a repeated step has the rows, gradient and learning rate of a step that was split that way from
the start; on CPUs, its bits. Without out-of-memory errors it costs one exchange of two numbers per
step, in host memory, and saves DDP's broadcast of the buffers. DDP's gradient exchange is
unchanged.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bertdist.core.config import BatchConfig
from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, Step, single_token_batch, split_batch
from bertdist.data.loader import Loader
from bertdist.data.sharding import prefetch_to_device
from bertdist.distributed.collectives import all_reduce_min, host_group, raise_on_all_ranks
from bertdist.models.cpu_layers import zero_grad
from bertdist.tasks.tasks import Task
from bertdist.training.checkpoint import TrainState
from bertdist.training.memory import attempt, find_tokens, halve_tokens, text_too_long

# (micro-batch, whether it is the last of the share) -> its loss sum (), after its backward pass
Backward = Callable[[PackedBatch, bool], Tensor]


class Failure(NamedTuple):
    """A micro-batch that ran out of memory."""

    batch: PackedBatch
    reason: str  # the device's message
    final: bool  # the last of the share
    # `gradient_addresses` before it, where it is the last; empty where it is also the first: no
    # gradients yet
    addresses: list[int]

    @property
    def single_text(self) -> bool:
        """Whether it has one text, so that it cannot be split."""
        return len(self.batch.lengths) == 1


class MicroBatcher:
    """The token budget of this rank's micro-batches, kept in `state`.

    It never grows; between steps all ranks agree.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        task: Task,
        state: TrainState,
        config: BatchConfig,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        """model: as accelerate has prepared it; it is not kept here. A collective.

        If the checkpoint comes from the same --tokens_per_micro_batch, `state` holds what became of
        it, and that is used.
        """
        if isinstance(model, DistributedDataParallel):
            # Buffers are constants here. Their broadcast makes the first forward pass of a step a
            # collective, which a rank could not repeat alone. By attribute: torch 2.13 has renamed
            # the argument.
            model.broadcast_buffers = False
        else:
            assert accelerator.num_processes == 1, f"several ranks, and no DDP: {type(model)}"
        self.loader, self.task, self.state = loader, task, state
        self.accelerator, self.say = accelerator, say
        self._group = host_group(accelerator)
        self._loader_tokens = 0  # the budget of `rebatch`: loader workers are ahead and keep it
        requested = config.tokens_per_micro_batch
        if requested and requested != state.tokens_requested:
            state.tokens_per_micro_batch = state.tokens_requested = requested

    def prepare(self, model: nn.Module, classifier: nn.Module, optimizer: Optimizer) -> None:
        """Before the first step of every start. A collective. classifier: the model without DDP."""
        self.warm_up(model)
        self.find_budget(classifier, optimizer)

    def warm_up(self, model: nn.Module) -> None:
        """One backward pass that is discarded, before the first step of every start, fresh or
        resumed.

        DDP reorders its gradient buckets after its first backward pass, and sums are rounded in
        that order: without this a resumed run of 3 ranks or more differs from an uninterrupted one.
        One token is enough: any text causes the reordering.
        """
        model.train()
        loader, state = replace(self.loader, workers=0), self.state
        for first in loader.steps(state.step, state.step + 1, state.reader_state):
            batch = single_token_batch(first.micro_batches[0]).to(self.accelerator.device)
            self.accelerator.backward(self.task.loss(model(batch), batch.targets, batch.weights))
        zero_grad(model)

    def find_budget(self, classifier: nn.Module, optimizer: Optimizer) -> None:
        """Measure the budget, unless the flag or the checkpoint gives it. classifier: without DDP,
        so no collective in it.
        """
        if self.state.tokens_per_micro_batch:
            return

        def loss(batch: PackedBatch) -> Tensor:
            return self.task.loss(classifier(batch), batch.targets, batch.weights)

        # A gradient and AdamW's two averages per weight; averages that a checkpoint brought are in
        # memory already.
        weights = [p for p in classifier.parameters() if p.requires_grad]
        needed = sum(p.nbytes * (1 if optimizer.state.get(p) else 3) for p in weights)
        with raise_on_all_ranks(self.accelerator):
            tokens = find_tokens(loss, self.loader, self.accelerator.device, needed)
        discard_gradients(classifier)
        (tokens,) = all_reduce_min(self.accelerator, [tokens], self._group)
        self.state.tokens_per_micro_batch = tokens
        self.say(f"Micro-batch size: up to {tokens:,} tokens (chosen from free memory).")

    def rebatch(self) -> Loader:
        """The training rows in micro-batches of the present budget."""
        self._loader_tokens = self.state.tokens_per_micro_batch
        return replace(self.loader, tokens_per_micro_batch=self._loader_tokens)

    def steps(self, total_steps: int) -> Iterator[Step]:
        """This rank's share of each of the remaining steps, on the device."""
        state, device = self.state, self.accelerator.device
        steps = self.rebatch().steps(state.step, total_steps, state.reader_state)
        yield from prefetch_to_device(steps, device)

    def accumulate_gradients(self, model: nn.Module, step: Step, backward: Backward) -> Tensor:
        """The gradient of a step, summed over ranks, in the parameters; returns the loss sum () of
        this rank's share.

        backward: with several ranks, DDP exchanges gradients in the last micro-batch only. Raises
        DataError on all ranks if a single text does not fit on one of them.
        """
        tokens = self.state.tokens_per_micro_batch
        while True:
            loader_fits = tokens >= self._loader_tokens
            share = step.micro_batches if loader_fits else split_batch(step.micro_batches, tokens)
            result = self._try_share(model, share, backward)
            failure = result if isinstance(result, Failure) else None
            if failure is not None:
                tokens = 0 if failure.single_text else halve_tokens(tokens, failure.batch)
            # Otherwise the other ranks have not noticed.
            if failure is None or failure.final or failure.single_text:
                if failure is not None:
                    self._finish_exchange(model, failure, step, backward)
                if self._agree(tokens, failure, step) and isinstance(result, Tensor):
                    return result
                tokens = self.state.tokens_per_micro_batch
            discard_gradients(model)
            restore_random_state()

    def _try_share(
        self, model: nn.Module, share: list[PackedBatch], backward: Backward
    ) -> Tensor | Failure:
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(share):
            final = i == len(share) - 1
            distributed = self.accelerator.num_processes > 1
            addresses = gradient_addresses(model) if final and i and distributed else []
            loss = attempt(backward, batch, final)
            if isinstance(loss, str):
                return Failure(batch, loss, final, addresses)
            total += loss
        return total

    def _agree(self, tokens: int, failure: Failure | None, step: Step) -> bool:
        """Whether the gradients of all ranks are complete.

        All ranks take the smallest budget; 0: training cannot continue.
        """
        values = [tokens, int(failure is None)]
        smallest, complete = all_reduce_min(self.accelerator, values, self._group)
        if smallest == 0:
            with raise_on_all_ranks(self.accelerator):
                if tokens == 0 and failure is not None:
                    raise self._too_long(failure.batch, failure.reason, step)
        if smallest < self.state.tokens_per_micro_batch:
            self.state.tokens_per_micro_batch = smallest
            self.state.oom_retries += 1
            self.say(
                f"Out of memory in step {step.number + 1}; the step is repeated. "
                f"Micro-batch size from here on: up to {smallest:,} tokens."
            )
        return bool(complete)

    def _finish_exchange(
        self, model: nn.Module, failure: Failure, step: Step, backward: Backward
    ) -> None:
        """Send the other ranks what they wait for: zeros, in an exchange that all will discard."""
        if self.accelerator.num_processes == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad]
        unsent = weights
        if failure.final:
            before = failure.addresses or [0] * len(weights)
            pairs = zip(weights, before, strict=True)
            unsent = [p for p, address in pairs if _gradient_address(p) == address]
        if len(unsent) == len(weights):
            # DDP has not begun: one token of weight 0 makes a complete forward and backward pass.
            reason = attempt(backward, single_token_batch(failure.batch), True)
            if isinstance(reason, str):  # not even that: the other ranks will see this one end
                raise self._too_long(failure.batch, reason, step)
        elif unsent:
            # DDP's hooks on these weights have not run: gradients of zeros run them, and they send
            # the rest.
            torch.autograd.backward(unsent, [p.new_zeros(()).expand_as(p) for p in unsent])

    def _too_long(self, batch: PackedBatch, reason: str, step: Step) -> DataError:
        cure = "--gradient_checkpointing, "
        return text_too_long(batch, reason, self.loader, step.window_state, cure)


def discard_gradients(model: nn.Module) -> None:
    """Drop the gradients of an incomplete attempt."""
    model.zero_grad(set_to_none=True)


def restore_random_state() -> None:
    """Make a repeated step draw the same dropout: torch's generators get the seed that they got
    last, for this step.

    The CPU's masks need nothing: they are a function of (seed, step, row), see models/dropout.py.
    """
    torch.manual_seed(torch.initial_seed())


def gradient_addresses(model: nn.Module) -> list[int]:
    """The address of each weight's gradient, 0 for none.

    DDP moves it (gradient_as_bucket_view) when it takes it.
    """
    return [_gradient_address(p) for p in model.parameters() if p.requires_grad]


def _gradient_address(weight: Tensor) -> int:
    return 0 if weight.grad is None else weight.grad.data_ptr()
