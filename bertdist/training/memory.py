"""How many tokens fit into memory: found from what is free, halved where that was too much.

In: a device and a way to compute a micro-batch. Out: a number of tokens (`find_tokens`), or what was computed, in smaller pieces
where memory ran out (`fitting`, for forward passes; `Room` in room.py does the same for the steps of several ranks). It is one module
because nothing else in the package may have to know what a device has, or what it says when it has no more.

`find_tokens` on a GPU: micro-batches of texts of --max_length tokens are computed and thrown away, each twice as large as the one
before, until free memory or MAX_TOKENS is reached. On a CPU, where that would take minutes, and where too much memory may end the
process instead of raising: the bytes that three small texts keep for a backward pass are counted. Counted, not measured: so two
starts agree.
"""

import ctypes
import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bertdist.core.errors import DataError
from bertdist.data.batch import PackedBatch, collate, split_batch
from bertdist.data.loader import DEFAULT_TOKEN_BUDGET, Loader
from bertdist.data.source import ReaderState

MAX_TOKENS = {"cuda": 65_536}  # where a larger micro-batch is no faster; other devices: PLENTY

FREE_SHARE = {
    "cuda": 0.9
}  # of the free memory; other devices share theirs with the backward pass and with other programs: 0.5

T = TypeVar("T")

# What a device says that has no memory left, besides torch.OutOfMemoryError and MemoryError (torch 2.13; oneDNN's on a CPU too).
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "ALLOC_FAILED",
)


def compute_in_micro_batches(
    compute: Callable[[PackedBatch], Tensor],
    micro_batches: Iterable[PackedBatch],
    batches: Loader,
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """(micro-batch, compute(micro-batch)) of each; those that do not fit, and all that come after, in halves.

    Without gradients a rank can do this by itself: nobody is told. Raises DataError for a text that does not fit alone.
    """
    tokens = batches.tokens_per_micro_batch
    for micro_batch in micro_batches:
        waiting = (
            [micro_batch]
            if tokens == batches.tokens_per_micro_batch
            else split_batch([micro_batch], tokens)
        )
        while waiting:
            batch = waiting.pop(0)
            found = attempt(compute, batch)
            if isinstance(found, Tensor):
                yield batch, found
            elif len(batch.lengths) == 1:
                raise text_too_long(batch, found, batches, None)
            else:
                tokens = halve_tokens(tokens, batch)
                waiting = split_batch([batch, *waiting], tokens)


def find_tokens(
    compute: Callable[[PackedBatch], Tensor],
    batches: Loader,
    device: torch.device,
    needed: int = 0,
) -> int:
    """The most tokens, a power of two, that fit into what `needed` bytes leave of the free memory, in texts of --max_length tokens.

    compute: what is to be done with a micro-batch on the device; where its result has a gradient, that is computed too, and left in
    the parameters.
    """
    most = min(
        MAX_TOKENS.get(device.type, DEFAULT_TOKEN_BUDGET),
        max(
            DEFAULT_TOKEN_BUDGET,
            power_of_two(2 * batches.rows_per_step * batches.dataset.max_length - 1),
        ),
    )
    budget = int(FREE_SHARE.get(device.type, 0.5) * (free_bytes(device) - needed))
    longest = batches.dataset.max_length
    (example,) = batches.dataset[[0]]

    def probe(texts: int, length: int) -> PackedBatch:
        ids = (example.ids * length)[:length]
        return collate([example._replace(ids=ids, segments=[0] * length)] * texts).to(device)

    if device.type == "cuda":
        return largest_fitting_tokens(
            lambda tokens: peak_bytes(compute, probe(max(1, tokens // longest), longest), device),
            longest,
            most,
            budget,
        )
    unit = max(1, min(16, longest // 4))
    kept = attempt(
        lambda: [
            saved_activation_bytes(compute, probe(1, length))
            for length in (unit, 2 * unit, 4 * unit)
        ]
    )
    if isinstance(kept, str):
        return 1
    return min(most, power_of_two(int(budget / bytes_per_token(kept, unit, longest))))


def largest_fitting_tokens(
    peak: Callable[[int], int | None], first: int, most: int, budget: int
) -> int:
    """The largest power of two up to `most` whose peak (bytes; None: out of memory) is within budget, trying from about `first` tokens on.

    What is sure not to fit, because half as much took more than half of the budget, is not tried.
    """
    tokens = min(most, power_of_two(2 * first - 1))
    while (bytes_ := peak(tokens)) is not None and bytes_ <= budget:
        if tokens == most or 2 * bytes_ > budget:
            return tokens
        tokens *= 2
    return max(1, tokens // 2)


def bytes_per_token(kept: list[int], unit: int, longest: int) -> float:
    """Bytes that a token of a text of `longest` tokens keeps, from those of whole texts of unit, 2 x unit and 4 x unit tokens.

    A text keeps c + a L + b L^2: weights that are kept once, activations, and attention scores where the kernel keeps them.
    """
    first, second = kept[1] - kept[0], kept[2] - kept[1]
    b = max(0.0, (second - 2 * first) / (6 * unit**2))
    a = first / unit - 3 * b * unit
    return max(1.0, a + b * longest)


def saved_activation_bytes(compute: Callable[[PackedBatch], Tensor], batch: PackedBatch) -> int:
    """Bytes of the tensors that compute(batch) keeps for a backward pass."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = compute(batch)
    del kept
    return sum(found.values())


def peak_bytes(
    compute: Callable[[PackedBatch], Tensor], batch: PackedBatch, device: torch.device
) -> int | None:
    """Most bytes that compute(batch), and the backward pass where there is one, take at once on a GPU; None: more than there are."""

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
    """Bytes that this rank may still take. On a CPU the ranks of a machine share what it, or its control group, has left."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    free = min(psutil.virtual_memory().available, control_group_bytes())
    return int(free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def control_group_bytes(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Bytes left under the tightest memory limit of this process's control groups (SLURM, containers); infinity where there is none.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html: a group is bound by all groups above it, and
    `inactive_file` is memory that the kernel gives back when asked.
    """
    free = math.inf
    for line in process.read_text().splitlines() if process.exists() else []:
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = (
            (root / "memory", ("limit_in_bytes", "usage_in_bytes", "stat"))
            if kinds
            else (root, ("max", "current", "stat"))
        )
        folder = top / group.lstrip("/")
        for place in (folder, *folder.parents):
            limit, used, stat = (_words(place / f"memory.{name}") for name in names)
            if limit and used and limit != ["max"]:
                counts = dict(zip(stat[::2], stat[1::2], strict=False))
                given_back = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
                free = min(free, int(limit[0]) - int(used[0]) + given_back)
            if place == top:
                break
    return max(0.0, free)


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def attempt(compute: Callable[..., T], *args: object) -> T | str:
    """compute(*args); or, where memory ran out, what was said of it, when all that the attempt held is free again."""
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
    """Undo `launch.keep_freed_memory` from here on, where it can be: other programs, and oneDNN for its code, may need what is free."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 128 << 10)  # glibc's own default, like the next
        library.mallopt(trim_threshold, 128 << 10)
        library.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


def halve_tokens(tokens: int, batch: PackedBatch) -> int:
    """Half as many tokens, and again until the batch that did not fit is cut by it."""
    tokens //= 2
    while tokens >= sum(batch.lengths):
        tokens //= 2
    return max(1, tokens)


def power_of_two(number: int) -> int:
    """The largest that is not above number; at least 1."""
    return 1 << max(1, number).bit_length() - 1


def text_too_long(
    batch: PackedBatch, reason: str, batches: Loader, place: ReaderState | None, cure: str = ""
) -> DataError:
    """What to say of a text that does not fit alone. place: that of its step."""
    row, limit = int(batch.rows[0]), batches.dataset.max_length
    where = batches.locations([row], place)[0] if row >= 0 else "A rank without rows"
    return DataError(
        f"{where}: a text of {batch.lengths[0]} tokens (--max_length {limit}) does not fit into memory, not even alone ({reason}). "
        f"Take a smaller --max_length, {cure}or more memory."
    )
