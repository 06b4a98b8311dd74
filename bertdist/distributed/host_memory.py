"""How much memory of this machine a process may still use."""

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def free_host_bytes() -> int:
    """The free memory of the machine, or of its control group; the ranks of a machine share it."""
    free = min(psutil.virtual_memory().available, control_group_bytes())
    return int(free / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def limited_memory(most: int) -> Iterator[None]:
    """Raises MemoryError where the process allocates more than `most` bytes inside.

    By the limit of its address space, on Linux; elsewhere, and where that has a lower limit
    already, nothing changes. What an allocator has reserved before does not count.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + most
        if limits[0] == resource.RLIM_INFINITY or limit < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def control_group_bytes(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Free bytes under the tightest memory limit of this process's control groups.

    SLURM and containers set such limits. Infinity if there is none.
    https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html: a group is bound
    by all groups above it, and `inactive_file` is memory that the kernel gives back when asked.
    """
    free = math.inf
    version_1 = ("limit_in_bytes", "usage_in_bytes", "stat")
    for line in process.read_text().splitlines() if process.exists() else []:
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        names = version_1 if kinds else ("max", "current", "stat")
        lowest = top / group.lstrip("/")
        for folder in (lowest, *lowest.parents):
            limit, used, stat = (_words(folder / f"memory.{name}") for name in names)
            if limit and used and limit != ["max"]:
                counts = dict(zip(stat[::2], stat[1::2], strict=False))
                inactive = counts.get("total_inactive_file", counts.get("inactive_file", 0))
                free = min(free, int(limit[0]) - int(used[0]) + int(inactive))
            if folder == top:
                break
    return max(0.0, free)


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []
