"""The CPU cores that this process may use, without torch."""

import os


def usable_cores() -> int:
    """The cores of its CPU affinity (SLURM, taskset, containers with a CPU set); where the system
    has none (macOS), all cores.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
