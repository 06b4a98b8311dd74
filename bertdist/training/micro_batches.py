"""Micro-batches: how many tokens a rank computes at once, and automatic recovery when that was
too many. Only this module knows how much memory a device has, and how its out-of-memory errors
read.

    micro_batcher = MicroBatcher(model, loader, task, state, config.batch, accelerator, say)
    micro_batcher.warm_up_ddp(model)                                   # before the first step
    micro_batcher.find_token_budget(classifier, optimizer)             # the same
    loss = micro_batcher.accumulate_gradients(model, step, backward)   # in every step

A `MicroBatcher` owns the token budget (--tokens_per_micro_batch). It comes from the flag, from the
checkpoint, or from free memory (`find_tokens`), and is halved when memory runs out.
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

`find_tokens` chooses a budget from free memory. On a GPU micro-batches of texts of --max_length
tokens are computed and discarded, each twice as large as the one before, until free memory or
MAX_TOKENS is reached. On a CPU that would take minutes, and too much memory may end the process
instead of raising: there the bytes that three small texts keep for a backward pass are counted.
Counted, not measured: so two starts agree.

`compute_in_micro_batches` is for evaluation and prediction: a rank splits alone what does not fit.
"""

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bertdist.core.config import BatchConfig
from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, RankStep, collate, single_token_batch, split_batch
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, Loader
from bertdist.data.sharding import prefetch_to_device
from bertdist.data.source import ReaderState
from bertdist.distributed.collectives import all_reduce_min, host_group, raise_on_all_ranks
from bertdist.models.cpu_layers import zero_grad
from bertdist.models.dropout import seed_torch
from bertdist.tasks.tasks import Task
from bertdist.training.checkpoint import TrainState

# A larger micro-batch is no faster. Other devices: DEFAULT_TOKEN_BUDGET.
MAX_TOKENS = {"cuda": 65_536}

# Of the free memory. Other devices share theirs with the backward pass and other programs: 0.5.
FREE_SHARE = {"cuda": 0.9}

T = TypeVar("T")

# Messages of out-of-memory errors, besides torch.OutOfMemoryError and MemoryError (torch 2.13; some
# are oneDNN's on a CPU).
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "ALLOC_FAILED",
)

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

    def warm_up_ddp(self, model: nn.Module) -> None:
        """With several ranks, one backward pass that is discarded, before the first step of every
        start, fresh or resumed.

        DDP reorders its gradient buckets after its first backward pass, and sums are rounded in
        that order: without this a resumed run of 3 ranks or more differs from an uninterrupted one.
        One token is enough: any text causes the reordering. model: in training mode, as accelerate
        has prepared it; nothing is done if that is without DDP.
        """
        if not isinstance(model, DistributedDataParallel):
            return
        loader, state = replace(self.loader, workers=0), self.state
        for first in loader.steps(state.step, state.step + 1, state.reader_state):
            batch = single_token_batch(first.micro_batches[0]).to(self.accelerator.device)
            self.accelerator.backward(self.task.loss(model(batch), batch.targets, batch.weights))
        zero_grad(model)

    def find_token_budget(self, classifier: nn.Module, optimizer: Optimizer) -> None:
        """Measure the budget by probes of memory, unless the flag or the checkpoint gives it.

        Before the first step of every start; a collective. classifier: in training mode, without
        DDP, so no collective in it.
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

    def rebatch(self) -> Loader:
        """The training rows in micro-batches of the present budget."""
        self._loader_tokens = self.state.tokens_per_micro_batch
        return replace(self.loader, tokens_per_micro_batch=self._loader_tokens)

    def steps(self, total_steps: int) -> Iterator[RankStep]:
        """This rank's share of each of the remaining steps, on the device."""
        state, device = self.state, self.accelerator.device
        steps = self.rebatch().steps(state.step, total_steps, state.reader_state)
        yield from prefetch_to_device(steps, device)

    def accumulate_gradients(self, model: nn.Module, step: RankStep, backward: Backward) -> Tensor:
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

    def _agree(self, tokens: int, failure: Failure | None, step: RankStep) -> bool:
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
        self, model: nn.Module, failure: Failure, step: RankStep, backward: Backward
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

    def _too_long(self, batch: PackedBatch, reason: str, step: RankStep) -> DataError:
        advice = "--gradient_checkpointing, "
        return text_too_long(batch, reason, self.loader, step.window_state, advice)


def set_comm_hook(model: nn.Module, hook: str) -> None:
    """How DDP exchanges gradients. hook: --ddp_comm_hook; before the first backward pass."""
    if hook == "bf16" and isinstance(model, DistributedDataParallel):
        model.register_comm_hook(model.process_group, _exchange_in_bf16)


def _exchange_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP compares the annotation
) -> Future[Tensor]:
    """torch's hook under another name: by its own, DDP refuses it with gloo, which reduces bf16
    as well (torch 2.13).
    """
    return bf16_compress_hook(group, bucket)


def discard_gradients(model: nn.Module) -> None:
    """Drop the gradients of an incomplete attempt."""
    model.zero_grad(set_to_none=True)


def restore_random_state() -> None:
    """Make a repeated step draw the same dropout: torch's generators get the seed that they got
    last, for this step.

    The CPU's masks need nothing: they are a function of (seed, step, row), see models/dropout.py.
    """
    seed_torch(torch.initial_seed())


def gradient_addresses(model: nn.Module) -> list[int]:
    """The address of each weight's gradient, 0 for none.

    DDP moves it (gradient_as_bucket_view) when it takes it.
    """
    return [_gradient_address(p) for p in model.parameters() if p.requires_grad]


def _gradient_address(weight: Tensor) -> int:
    return 0 if weight.grad is None else weight.grad.data_ptr()


def compute_in_micro_batches(
    compute: Callable[[PackedBatch], Tensor],
    micro_batches: Iterable[PackedBatch],
    loader: Loader,
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """(micro-batch, compute(micro-batch)) of each micro-batch of a loader.

    One that does not fit, and all that follow, are split in halves. Without gradients a rank does
    this alone. Raises DataError if a single text does not fit.
    """
    tokens = loader.tokens_per_micro_batch
    for micro_batch in micro_batches:
        waiting = [micro_batch]
        if tokens != loader.tokens_per_micro_batch:
            waiting = split_batch(waiting, tokens)
        while waiting:
            batch = waiting.pop(0)
            result = attempt(compute, batch)
            if isinstance(result, Tensor):
                yield batch, result
            elif len(batch.lengths) == 1:
                raise text_too_long(batch, result, loader, None)
            else:
                tokens = halve_tokens(tokens, batch)
                waiting = split_batch([batch, *waiting], tokens)


def find_tokens(
    compute: Callable[[PackedBatch], Tensor],
    loader: Loader,
    device: torch.device,
    reserved: int = 0,
) -> int:
    """The most tokens per micro-batch that fit, a power of two, in texts of --max_length tokens.

    compute: what to do with a micro-batch on the device; if its result needs a gradient, that is
    computed too, and left in the parameters. reserved: bytes of the free memory to leave free.
    """
    max_length = loader.dataset.max_length
    step_tokens = power_of_two(2 * loader.rows_per_step * max_length - 1)
    most = MAX_TOKENS.get(device.type, DEFAULT_TOKEN_BUDGET)
    most = min(most, max(DEFAULT_TOKEN_BUDGET, step_tokens))
    budget = int(FREE_SHARE.get(device.type, 0.5) * (free_bytes(device) - reserved))
    (example,) = loader.dataset[[0]]

    def probe(texts: int, length: int) -> PackedBatch:
        ids = (example.ids * length)[:length]
        return collate([example._replace(ids=ids, token_type_ids=[0] * length)] * texts).to(device)

    def peak(tokens: int) -> int | None:
        return peak_bytes(compute, probe(max(1, tokens // max_length), max_length), device)

    if device.type == "cuda":
        return largest_fitting_tokens(peak, max_length, most, budget)
    unit = max(1, min(16, max_length // 4))
    lengths = (unit, 2 * unit, 4 * unit)
    kept = attempt(
        lambda: [saved_activation_bytes(compute, probe(1, length)) for length in lengths]
    )
    if isinstance(kept, str):
        return 1
    return min(most, power_of_two(int(budget / bytes_per_token(kept, unit, max_length))))


def largest_fitting_tokens(
    peak: Callable[[int], int | None], first: int, most: int, budget: int
) -> int:
    """The largest power of two up to `most` whose peak (bytes; None: out of memory) is in budget.

    Starts with about `first` tokens. What cannot fit, because half of it took more than half of the
    budget, is not tried.
    """
    tokens = min(most, power_of_two(2 * first - 1))
    while (bytes_ := peak(tokens)) is not None and bytes_ <= budget:
        if tokens == most or 2 * bytes_ > budget:
            return tokens
        tokens *= 2
    return max(1, tokens // 2)


def bytes_per_token(kept: list[int], unit: int, max_length: int) -> float:
    """Bytes kept per token of a text of `max_length` tokens.

    kept: bytes kept for texts of unit, 2 x unit and 4 x unit tokens. A text keeps c + a L + b L^2:
    weights that are kept once, activations, and attention scores where the kernel keeps them.
    """
    first, second = kept[1] - kept[0], kept[2] - kept[1]
    b = max(0.0, (second - 2 * first) / (6 * unit**2))
    a = first / unit - 3 * b * unit
    return max(1.0, a + b * max_length)


def saved_activation_bytes(compute: Callable[[PackedBatch], Tensor], batch: PackedBatch) -> int:
    """Bytes of the tensors that compute(batch) keeps for a backward pass."""
    storages: dict[int, int] = {}  # address -> bytes

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = compute(batch)
    del kept
    return sum(storages.values())


def peak_bytes(
    compute: Callable[[PackedBatch], Tensor], batch: PackedBatch, device: torch.device
) -> int | None:
    """Peak bytes of compute(batch), and its backward pass if there is one, on a GPU.

    None: out of memory.
    """

    def run() -> Tensor:
        out = compute(batch)
        if out.requires_grad:
            out.sum().backward()
        return out.detach()

    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fits = isinstance(attempt(run), Tensor)
    return torch.cuda.max_memory_allocated(device) - before if fits else None


def free_bytes(device: torch.device) -> int:
    """Bytes that this rank may still use.

    On a CPU the ranks of a machine share the free memory of it or of its control group.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    from bertdist.distributed.host_memory import free_host_bytes

    return free_host_bytes()


def attempt(compute: Callable[..., T], *args: object) -> T | str:
    """compute(*args); if memory ran out, the error's first line, after freeing all memory of it."""
    try:
        return compute(*args)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    gc.collect()  # here, behind the except clause: inside it the traceback holds every activation
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def release_freed_memory() -> None:
    """Undo `launch.keep_freed_memory` from here on, with glibc.

    Other programs, and oneDNN for its code, may need the free memory.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 128 << 10)  # glibc's own default, like the next
        library.mallopt(trim_threshold, 128 << 10)
        library.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        message in str(error) for message in _OUT_OF_MEMORY
    )


def halve_tokens(tokens: int, batch: PackedBatch) -> int:
    """Half as many tokens, and again until that splits the batch that did not fit."""
    tokens //= 2
    while tokens >= sum(batch.lengths):
        tokens //= 2
    return max(1, tokens)


def power_of_two(number: int) -> int:
    """The largest power of two up to number; at least 1."""
    return 1 << max(1, number).bit_length() - 1


def text_too_long(
    batch: PackedBatch,
    reason: str,
    loader: Loader,
    window_state: ReaderState | None,
    advice: str = "",
) -> DataError:
    """The error of a single text that does not fit. window_state: of its step."""
    row, limit = int(batch.row_numbers[0]), loader.dataset.max_length
    where = loader.locations([row], window_state)[0] if row >= 0 else "A rank without rows"
    return DataError(
        f"{where}: a text of {batch.lengths[0]} tokens (--max_length {limit}) does not fit into "
        f"memory, not even alone ({reason}). Use a smaller --max_length, {advice}or more memory."
    )
