"""How many tokens this rank computes at once while it trains, and what happens when that was too much: no step notices.

In: this rank's share of a step, and a way to compute one micro-batch of it. Out: the gradient of the whole step, whatever ran out of
memory on the way. `Room.accumulate`, on each rank:

1. A micro-batch that runs out of memory ends the attempt. What it held is freed, and the rank halves its tokens.
2. If it was not the last of the share, the ranks have exchanged nothing yet. The rank throws away its gradients, cuts its share
   anew and begins it again, with the same dropout; the others wait in their exchange without knowing why.
3. If it was the last, DDP was exchanging gradients beside it. The rank sends zeros for all that it has not sent, so that nobody
   waits for it.
4. After the exchange, before anything is updated, the ranks agree on the least tokens of any rank, and on whether the exchange was
   whole. If not, all throw it away and begin the step again.
5. A text that does not fit alone ends all ranks with one message.

So a step that was halved has the rows, the gradient and the schedule of one that was cut so from the start; on CPUs, its bits. While
all goes well it costs one exchange of two numbers a step, in host memory, and saves DDP's of the buffers. DDP's own way is untouched.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bertdist.data.batch import PackedBatch, Step, single_token_batch, split_batch
from bertdist.data.streaming import AnyLoader, LoaderT
from bertdist.distributed.collectives import all_reduce_min, host_group, raise_on_all_ranks
from bertdist.training.checkpoint import TrainState
from bertdist.training.memory import attempt, find_tokens, halved, too_long

Backward = Callable[
    [PackedBatch, bool], Tensor
]  # (micro-batch, whether it is the share's last) -> its loss sum (), after its backward pass


class Failure(NamedTuple):
    """A micro-batch that ran out of memory."""

    batch: PackedBatch
    reason: str  # what the device said
    final: bool  # the last of the share
    places: list[
        int
    ]  # `gradient_places` before it, where it is the last; none where it is also the first: there were no gradients

    @property
    def alone(self) -> bool:
        """Whether it has one text: then there is nothing left to cut."""
        return len(self.batch.lengths) == 1


class MicroBatcher:
    """How many tokens this rank computes at once while it trains; progress remembers it. It never grows; between steps all ranks agree."""

    def __init__(
        self,
        model: nn.Module,
        batches: AnyLoader,
        asked: int | None,
        progress: TrainState,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        """model: as accelerate has prepared it. asked: --tokens_per_micro_batch; where it was asked for before, progress knows what came
        of it, and the same command goes on with that. A collective."""
        if isinstance(model, DistributedDataParallel):
            # Buffers are constants here. Sent around they make the first forward pass of a step a collective, which a rank could not
            # repeat by itself. By attribute: torch 2.13 has renamed the argument.
            model.broadcast_buffers = False
        else:
            assert accelerator.num_processes == 1, f"several ranks, and no DDP: {type(model)}"
        self.progress, self.accelerator, self.say = progress, accelerator, say
        self._batches, self._group = batches, host_group(accelerator)
        if asked and asked != progress.tokens_requested:
            progress.tokens_per_micro_batch = progress.tokens_requested = asked
        self._loaded = (
            progress.tokens_per_micro_batch
        )  # what the loader's workers cut by: they are ahead, and go on with it

    def find(
        self,
        loss: Callable[[PackedBatch], Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Find the tokens, where neither a flag nor a checkpoint told them. loss: of a micro-batch; no collective in it."""
        if not self.progress.tokens_per_micro_batch:
            # A gradient and AdamW's two averages for each weight; averages that a checkpoint brought are in memory already.
            needed = sum(
                p.nbytes * (1 if optimizer.state.get(p) else 3)
                for p in model.parameters()
                if p.requires_grad
            )
            with raise_on_all_ranks(self.accelerator):
                found = find_tokens(loss, self._batches, self.accelerator.device, needed)
            throw_away(model)
            (self.progress.tokens_per_micro_batch,) = all_reduce_min(
                self.accelerator, [found], self._group
            )
            self.say(
                f"Micro-batches of at most {self.progress.tokens_per_micro_batch:,} tokens: found from free memory."
            )
        self._loaded = self.progress.tokens_per_micro_batch

    def rebatch(self, batches: LoaderT) -> LoaderT:
        """The same batches, cut so that they fit."""
        return replace(batches, tokens_per_micro_batch=self.progress.tokens_per_micro_batch)

    def accumulate(self, model: nn.Module, step: Step, backward: Backward) -> Tensor:
        """A step's gradient, summed over ranks, in the parameters; returns the loss sum () of this rank's share.

        backward: with several ranks, DDP exchanges in the share's last one only. Raises DataError on all ranks where a text does not
        fit alone on one of them.
        """
        tokens = self.progress.tokens_per_micro_batch
        while True:
            found = self._attempt(model, self._cut(step, tokens), backward)
            failure = found if isinstance(found, Failure) else None
            if failure is not None:
                tokens = 0 if failure.alone else halved(tokens, failure.batch)
            if (
                failure is None or failure.final or failure.alone
            ):  # else the others have not noticed
                if failure is not None:
                    self._finish_exchange(model, failure, step, backward)
                if self._agreed(tokens, failure, step) and isinstance(found, Tensor):
                    return found
                tokens = self.progress.tokens_per_micro_batch
            throw_away(model)
            reseed()

    def _cut(self, step: Step, tokens: int) -> list[PackedBatch]:
        if tokens >= self._loaded:
            return step.share
        return split_batch(step.share, tokens)

    def _attempt(
        self, model: nn.Module, share: list[PackedBatch], backward: Backward
    ) -> Tensor | Failure:
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(share):
            final = i == len(share) - 1
            places = (
                gradient_places(model) if final and i and self.accelerator.num_processes > 1 else []
            )
            loss = attempt(backward, batch, final)
            if isinstance(loss, str):
                return Failure(batch, loss, final, places)
            total += loss
        return total

    def _agreed(self, tokens: int, failure: Failure | None, step: Step) -> bool:
        """Whether the gradients of all ranks are whole. The least tokens of any rank become everybody's; 0: it cannot go on."""
        least, whole = all_reduce_min(self.accelerator, [tokens, int(failure is None)], self._group)
        if least == 0:
            with raise_on_all_ranks(self.accelerator):
                if tokens == 0 and failure is not None:
                    raise too_long(
                        failure.batch,
                        failure.reason,
                        self._batches,
                        step.place,
                        "--gradient_checkpointing, ",
                    )
        if least < self.progress.tokens_per_micro_batch:
            self.progress.tokens_per_micro_batch = least
            self.progress.oom_retries += 1
            self.say(
                f"Out of memory in step {step.number + 1}; taken again. Micro-batches of at most {least:,} tokens from here on."
            )
        return bool(whole)

    def _finish_exchange(
        self, model: nn.Module, failure: Failure, step: Step, backward: Backward
    ) -> None:
        """Give the other ranks what they wait for: zeros, in an exchange that all will throw away."""
        if self.accelerator.num_processes == 1:
            return
        weights = [p for p in model.parameters() if p.requires_grad]
        before = failure.places or [0] * len(weights)
        unsent = (
            [p for p, place in zip(weights, before, strict=True) if _place(p) == place]
            if failure.final
            else weights
        )
        if len(unsent) == len(
            weights
        ):  # DDP has not begun: a text of one token that counts nothing goes the whole way
            reason = attempt(backward, single_token_batch(failure.batch), True)
            if isinstance(reason, str):  # not even that: the others will see this rank go
                raise too_long(failure.batch, reason, self._batches, step.place)
        elif unsent:  # DDP's hooks on these weights have not run: a gradient of zeros runs them, and they send what is left
            torch.autograd.backward(unsent, [p.new_zeros(()).expand_as(p) for p in unsent])


def throw_away(model: nn.Module) -> None:
    """The gradients of an attempt that was not whole."""
    model.zero_grad(set_to_none=True)


def reseed() -> None:
    """Dropout of a repeated step is drawn as it was: torch's generators get again the seed that they were given last, for this step.

    The CPU's masks need nothing: they are a function of (seed, step, row), see dropout.py.
    """
    torch.manual_seed(torch.initial_seed())


def gradient_places(model: nn.Module) -> list[int]:
    """Where each weight's gradient lies, 0 for none. DDP puts it elsewhere (gradient_as_bucket_view) at the moment that it takes it."""
    return [_place(p) for p in model.parameters() if p.requires_grad]


def _place(weight: Tensor) -> int:
    return 0 if weight.grad is None else weight.grad.data_ptr()
