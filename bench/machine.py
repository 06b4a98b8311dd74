"""A description of machine, its load and versions, without host name, users or paths."""

import os
import platform
import re
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MATRIX_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f")
CPU_INFO, STATISTICS = Path("/proc/cpuinfo"), Path("/proc/stat")


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: str, threads: int, packages: Sequence[str]) -> str:
    """One sentence. device: "cpu", or the GPU's name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = [
        f"{cpu()} ({describe_flags()}), {cores()} cores, {threads} used, {memory:.0f} GiB memory",
        f"{platform.system()} {platform.machine()}",
    ]
    found += [
        f"Python {platform.python_version()}",
        *(f"{name} {number}" for name in packages if (number := package_version(name))),
    ]
    return (f"{device}; " if device != "cpu" else "CPU only, not run on a GPU; ") + ", ".join(found)


def kind(device: str) -> str:
    """What figures of this machine stand for: "GPU", "CPU with AMX", "CPU with AVX512_BF16" or
    "CPU". device: as above.
    """
    if device != "cpu":
        return "GPU"
    flags = cpu_flags()
    with_bf16 = {"amx_bf16": "CPU with AMX", "avx512_bf16": "CPU with AVX512_BF16"}
    return next((name for flag, name in with_bf16.items() if flag in flags), "CPU")


def describe_flags() -> str:
    """What decides how fast products are: `no amx_bf16, no avx512_bf16, avx512f`."""
    flags = cpu_flags()
    return ", ".join(flag if flag in flags else f"no {flag}" for flag in MATRIX_FLAGS)


def cpu_flags() -> set[str]:
    """The processor's instruction sets, as Linux names them; empty on other systems."""
    return set(_of_cpu("flags").split())


def cpu() -> str:
    """The processor's model name."""
    return _of_cpu("model name") or platform.processor() or platform.machine()


def _of_cpu(name: str) -> str:
    try:
        text = CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""


class Load:
    """How busy the machine was with other work, from now on."""

    def __init__(self) -> None:
        self._average = os.getloadavg()[0]
        self._began, self._busy, self._own = time.monotonic(), busy_seconds(), own_seconds()

    def describe(self) -> str:
        """`Load average 0.1 at the start; other work took 3% of the cores meanwhile.`"""
        text = f"Load average {self._average:.1f} at the start"
        if (busy := busy_seconds()) is None or self._busy is None:
            return f"{text}, {os.getloadavg()[0]:.1f} at the end."
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        other = max(0.0, busy - self._busy - (own_seconds() - self._own))
        return f"{text}; other work took {other / max(seconds, 0.01):.0%} of the cores meanwhile."


def busy_seconds() -> float | None:
    """Seconds that all processors have worked since the system started; None if not known."""
    try:
        first = STATISTICS.read_text(encoding="utf-8").split("\n", 1)[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of the first two
    user, nice, system, _, _, *others = map(int, first.split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


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
