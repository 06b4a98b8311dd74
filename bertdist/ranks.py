"""Ranks agree before they act: an error on one rank ends the block on all, with one message."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from bertdist.errors import BertdistError

T = TypeVar("T")


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Every rank runs the block; where it raises a BertdistError on any rank, it raises the same one on all.

    Inside the block there must be no collective: a rank that has failed does not join it.
    """
    error: BertdistError | None = None
    try:
        yield
    except BertdistError as caught:
        error = caught
    errors: list[BertdistError | None] = [error] if accelerator.num_processes == 1 else gather_object([error])
    failed = {rank: found for rank, found in enumerate(errors) if found is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    texts = {str(found) for found in failed.values()}
    if len(failed) < len(errors) or len(texts) > 1:
        first = type(first)("\n".join(f"rank {rank}: {found}" for rank, found in failed.items()))
    first.shared = True
    raise first from None


def from_main(accelerator: Accelerator, value: T | None) -> T:
    """What rank 0 holds, on every rank."""
    held = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(held, from_process=0)
    (got,) = held
    return got  # type: ignore[return-value]  # rank 0 passes a T


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Ranks that talk from host memory, so that no GPU is waited for; None: they do already. A collective, once a run."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def smallest(accelerator: Accelerator, values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """The smallest of all ranks, value by value. group: that of `host_group`. Costs nothing on one rank, about 1 ms on gloo."""
    return _reduced(accelerator, values, dist.ReduceOp.MIN, group)


def summed(accelerator: Accelerator, values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """The sum over all ranks, value by value; otherwise like `smallest`."""
    return _reduced(accelerator, values, dist.ReduceOp.SUM, group)


def _reduced(accelerator: Accelerator, values: Sequence[int], how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> list[int]:
    if accelerator.num_processes == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(told, op=how, group=group)
    return [int(value) for value in told.tolist()]
