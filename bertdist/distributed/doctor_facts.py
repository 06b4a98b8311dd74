"""What a task of SLURM sees of its host: CPUs, GPUs, network, versions, as JSON. No torch.

The GPUs of a task are those of CUDA_VISIBLE_DEVICES, by UUID where nvidia-smi says it: where SLURM
confines devices, every task counts its own from 0.
"""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import bertdist
from bertdist.distributed.shared_folder import file_system

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")
VARIABLES = (
    *("NPROC_PER_NODE", "MAIN_PROCESS_PORT", "MAX_RESTARTS", "OMP_NUM_THREADS"),
    *("MAIN_PROCESS_IP", "NCCL_SOCKET_IFNAME"),
    *("GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"),
)
SMI_SECONDS = 30.0


def facts_of(rank: int, folder: str, address: str) -> dict[str, Any]:
    """folder: to examine. address: of the first task's host."""
    environ = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    cards = installed_gpus()
    return {
        "rank": rank,
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "host": socket.gethostname(),
        "environ": environ,
        "cpus": sorted(os.sched_getaffinity(0)),
        "cores": os.cpu_count() or 1,
        "cards": cards,
        # ROCm reads both; SLURM may set the second one only.
        "gpus": visible_gpus(
            environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES")), cards
        ),
        "interface": interface_to(address),
        "interfaces": sorted(psutil.net_if_addrs()),
        "rdma": rdma_gbits(Path("/sys/class/infiniband")),
        "versions": versions(cards),
        "file_system": file_system(folder),
    }


def installed_gpus() -> list[dict[str, str]]:
    """index, uuid, name and driver of the GPUs that nvidia-smi shows here; [] without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "index,uuid,name,driver_version"
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            check=True,
        )
        return read_gpus(done.stdout)
    return []


def read_gpus(text: str) -> list[dict[str, str]]:
    """Lines of nvidia-smi: `0, GPU-5f3a..., NVIDIA H100 80GB HBM3, 550.54.15`."""
    names = ("index", "uuid", "name", "driver")
    lines = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    return [dict(zip(names, words, strict=True)) for words in lines if len(words) == len(names)]


def visible_gpus(given: str | None, cards: list[dict[str, str]]) -> list[str] | None:
    """The ids of CUDA_VISIBLE_DEVICES, as CUDA reads it: up to the first that is none.

    UUIDs where they are known, also for indices; None where the variable is not set.
    """
    if given is None:
        return None
    by_index = {card["index"]: card["uuid"] for card in cards}
    found = []
    for word in given.split(","):
        word = word.strip()
        whole = [card["uuid"] for card in cards if word and card["uuid"].startswith(word)]
        if word.isdecimal():
            if cards and word not in by_index:
                break
            found.append(by_index.get(word, word))
        elif word.startswith(("GPU-", "MIG-")):
            found.append(whole[0] if len(whole) == 1 else word)
        else:
            break
    return found


def interface_to(address: str) -> dict[str, Any]:
    """Name, own address and speed (Mbit per second, None if unknown) of the way to a host."""
    own = ""
    with suppress(OSError):
        kind, *_, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = str(probe.getsockname()[0])
    names = [n for n, ways in psutil.net_if_addrs().items() if own in (x.address for x in ways)]
    name = names[0] if names else ""
    return {"name": name, "address": own, "mbits": link_mbits(name)}


def link_mbits(name: str, root: Path = Path("/sys/class/net")) -> int | None:
    """Speed of an interface; None where the driver does not say it (-1), and for loopback."""
    with suppress(OSError, ValueError):
        speed = int((root / name / "speed").read_text())
        return speed if name and speed > 0 else None
    return None


def rdma_gbits(root: Path) -> float:
    """Sum over the active ports of InfiniBand and RoCE, Gbit per second; 0 without any."""
    total = 0.0
    for port in sorted(root.glob("*/ports/*")):
        with suppress(OSError, ValueError, IndexError):
            if "ACTIVE" in (port / "state").read_text():  # "4: ACTIVE"
                total += float((port / "rate").read_text().split()[0])  # "200 Gb/sec (4X HDR)"
    return total


def versions(cards: list[dict[str, str]]) -> dict[str, str]:
    """Of Python, packages and the GPUs' driver."""
    found = {
        "Python": platform.python_version(),
        "bertdist": bertdist.__version__,
        **dict(_installed()),
    }
    return found | {"driver": cards[0]["driver"]} if cards else found


def _installed() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def processes_of(facts: Mapping[str, Any]) -> int:
    """Of a node, as launch/train.slurm counts them: NPROC_PER_NODE, else its GPUs, else one."""
    given = facts["environ"].get("NPROC_PER_NODE", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(facts["gpus"] or ()) or 1
