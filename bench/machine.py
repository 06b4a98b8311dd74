"""The machine and the versions in words, without its name, its users or its paths."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def described(device: str, threads: int, packages: Sequence[str]) -> str:
    """One sentence. device: "cpu", or the GPU's name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = [
        f"{cpu()}, {cores()} cores, {threads} used, {memory:.0f} GiB memory",
        f"{platform.system()} {platform.machine()}",
    ]
    found += [
        f"Python {platform.python_version()}",
        *(f"{name} {number}" for name in packages if (number := installed(name))),
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


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(module: str, words: Sequence[str] | None = None) -> str:
    """The command line that was given, with what leads to a file outside of this folder cut to its last two names."""
    words = sys.argv[1:] if words is None else words
    return shlex.join(["python", "-m", module, *(shown(word) for word in words)])


def shown(word: str) -> str:
    """`/home/me/data/sst2/train.tsv` -> `sst2/train.tsv`, also behind `--train_file=`; what is not such a path stays."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{'/'.join(Path(value).parts[-2:]).lstrip('/') if value.startswith(('/', '~', '..')) else value}"
