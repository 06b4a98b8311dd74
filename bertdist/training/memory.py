"""How many tokens fit into memory: chosen from free memory, halved where that was too many.

`find_tokens` chooses a budget. On a GPU micro-batches of texts of --max_length tokens are computed
and discarded, each twice as large as the one before, until free memory or MAX_TOKENS is reached. On
a CPU that would take minutes, and too much memory may end the process instead of raising: there the
bytes that three small texts keep for a backward pass are counted. Counted, not measured: so two
starts agree.

`compute_in_micro_batches` splits what does not fit, for forward passes of one rank; the training
steps of several ranks are in step.py. Only this module knows how much memory a device has, and how
its out-of-memory errors read.
"""

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, collate, split_batch
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, Loader
from bertdist.data.source import ReaderState

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
        return collate([example._replace(ids=ids, segments=[0] * length)] * texts).to(device)

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
    batch: PackedBatch, reason: str, loader: Loader, place: ReaderState | None, cure: str = ""
) -> DataError:
    """The error of a single text that does not fit. place: of its step. cure: more advice."""
    row, limit = int(batch.rows[0]), loader.dataset.max_length
    where = loader.locations([row], place)[0] if row >= 0 else "A rank without rows"
    return DataError(
        f"{where}: a text of {batch.lengths[0]} tokens (--max_length {limit}) does not fit into "
        f"memory, not even alone ({reason}). Use a smaller --max_length, {cure}or more memory."
    )
