"""Collectives by which ranks agree before they act; on one rank they cost nothing.

with raise_on_all_ranks(accelerator): ...    # an error on one rank is raised on all
assert_same_on_all_ranks(accelerator, {"--seed": 42})
broadcast_from_rank0(accelerator, value); all_reduce_min(accelerator, [3]); all_reduce_sum(...)
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from bertdist.core.errors import BertdistError, ConfigError

# A process group's own timeout once the watchdog runs: the group cannot tell a rank that works for
# long from one that has died.
NO_TIMEOUT = timedelta(days=7)

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """If the block raises a BertdistError on any rank, raise the same one on all ranks.

    All ranks must run the block. It must contain no collective, which a failed rank would not join.
    """
    error: BertdistError | None = None
    try:
        yield
    except BertdistError as caught:
        error = caught
    errors = gather_from_all_ranks(accelerator, [error])
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) < len(errors) or len(set(map(str, failed.values()))) > 1:
        lines = (f"rank {rank}: {error}" for rank, error in failed.items())
        first = type(first)("\n".join(lines))
    first.on_all_ranks = True
    raise first from first.__cause__


def broadcast_from_rank0(accelerator: Accelerator, value: T | None) -> T:
    """Rank 0's value, on every rank; the others pass anything."""
    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values, from_process=0)
    return values[0]  # type: ignore[return-value]  # rank 0 passes a T


def gather_from_all_ranks(accelerator: Accelerator | PartialState, values: Sequence[T]) -> list[T]:
    """The values of all ranks, rank by rank. A collective."""
    own = list(values)
    return own if accelerator.num_processes == 1 else gather_object(own)


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """A gloo group for collectives in host memory, which wait for no GPU.

    None stands for the default group, where that is gloo already. The first call is a collective.
    """
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return None
    return _gloo_group(dist.group.WORLD)


@lru_cache(maxsize=1)  # a process that trains again has another world
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
    return group


def assert_same_on_all_ranks(accelerator: Accelerator, values: Mapping[str, object]) -> None:
    """Raise a ConfigError on all ranks that names every value whose text differs from rank 0's."""
    if accelerator.num_processes == 1:
        return
    texts = {name: str(value) for name, value in values.items()}
    (host_0, expected), *others = gather_object([(socket.gethostname(), texts)])
    problems = []
    for rank, (host, received) in enumerate(others, start=1):
        differing = [x for x in {**expected, **received} if expected.get(x) != received.get(x)]
        if differing:
            listed = "; ".join(
                f"{name} is {_short(received.get(name))} instead of {_short(expected.get(name))}"
                for name in differing
            )
            problems.append(f"rank {rank} (on {host}) differs from rank 0 (on {host_0}): {listed}.")
    if problems:
        problems.append("Every rank must be started with the same command, data and packages.")
        raise ConfigError("\n".join(problems))


def _short(value: str | None, limit: int = 80) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= limit else f"{value[:limit]}..."


def all_reduce_min(
    accelerator: Accelerator, values: Sequence[int], group: dist.ProcessGroup | None = None
) -> list[int]:
    """The element-wise minimum over all ranks. group: that of `host_group`. About 1 ms on gloo."""
    return _all_reduce(accelerator, values, dist.ReduceOp.MIN, group)


def all_reduce_sum(
    accelerator: Accelerator, values: Sequence[int], group: dist.ProcessGroup | None = None
) -> list[int]:
    """The element-wise sum over all ranks. group: that of `host_group`."""
    return _all_reduce(accelerator, values, dist.ReduceOp.SUM, group)


def _all_reduce(
    accelerator: Accelerator,
    values: Sequence[int],
    op: dist.ReduceOp.RedOpType,
    group: dist.ProcessGroup | None,
) -> list[int]:
    if accelerator.num_processes == 1:
        return list(values)
    reduced = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(reduced, op=op, group=group)
    return [int(value) for value in reduced.tolist()]
