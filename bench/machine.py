"""A description of machine and versions, without host name, users or paths."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: str, threads: int, packages: Sequence[str]) -> str:
    """One sentence. device: "cpu", or the GPU's name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = [
        f"{cpu()}, {cores()} cores, {threads} used, {memory:.0f} GiB memory",
        f"{platform.system()} {platform.machine()}",
    ]
    found += [
        f"Python {platform.python_version()}",
        *(f"{name} {number}" for name in packages if (number := package_version(name))),
    ]
    return (f"{device}; " if device != "cpu" else "CPU only, not run on a GPU; ") + ", ".join(found)


def cpu() -> str:
    """The processor's model name."""
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$",
            Path("/proc/cpuinfo").read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(module: str, words: Sequence[str] | None = None) -> str:
    """The command line, with paths outside of this folder shortened to their last two names."""
    words = sys.argv[1:] if words is None else words
    return shlex.join(["python", "-m", module, *(shorten_path(word) for word in words)])


def shorten_path(word: str) -> str:
    """`/home/me/data/sst2/train.tsv` -> `sst2/train.tsv`, also in `--train_file=...`."""
    flag, equals, value = word.rpartition("=")
    if value.startswith(("/", "~", "..")):
        value = "/".join(Path(value).parts[-2:]).lstrip("/")
    return f"{flag}{equals}{value}"
