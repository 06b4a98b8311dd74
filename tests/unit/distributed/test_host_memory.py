"""The free memory is that of the tightest control group, and shared by the ranks of a machine."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertdist.distributed import host_memory
from bertdist.distributed.host_memory import control_group_bytes, free_host_bytes


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=900)
    )
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(host_memory, "control_group_bytes", lambda: math.inf)
    assert free_host_bytes() == 900
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_host_bytes() == 300
    monkeypatch.setattr(host_memory, "control_group_bytes", lambda: 60.0)
    assert free_host_bytes() == 20


def group(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    """Version 2: the group itself has no limit, the job above it has; the kernel can give back 30
    of the 700 in use.
    """
    process, root = tmp_path / "cgroup", tmp_path / "sys"
    process.write_text("0::/slurm/job_7/step_0\n")
    group(root, memory__stat="inactive_file 5")  # the root has no limit
    group(root / "slurm", memory__max="5000", memory__current="1000")
    group(
        root / "slurm/job_7",
        memory__max="1000",
        memory__current="700",
        memory__stat="anon 600\ninactive_file 30",
    )
    group(root / "slurm/job_7/step_0", memory__max="max", memory__current="700")
    assert control_group_bytes(process, root) == 330
    group(root / "slurm/job_7", memory__current="1100", memory__stat="anon 600")
    assert control_group_bytes(process, root) == 0, "a group above its limit has nothing left"


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "sys"
    process.write_text("9:name=systemd:/\n4:cpu,memory:/job_7\n3:cpuset:/other\n0::/\n")
    group(root / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=10)
    group(
        root / "memory/job_7",
        memory__limit_in_bytes=500,
        memory__usage_in_bytes=100,
        memory__stat="total_inactive_file 7",
    )
    group(root / "cpuset/other", memory__limit_in_bytes=1, memory__usage_in_bytes=1)
    assert control_group_bytes(process, root) == 407


def test_a_container_sees_its_limit_at_the_root(tmp_path: Path) -> None:
    """Its groups have names of the host, and there is nothing under them."""
    process, root = tmp_path / "cgroup", tmp_path / "sys"
    process.write_text("4:memory:/docker/0a0b\n")
    group(root / "memory", memory__limit_in_bytes=500, memory__usage_in_bytes=100)
    assert control_group_bytes(process, root) == 400


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert control_group_bytes(tmp_path / "nothing", tmp_path) == math.inf
    (tmp_path / "cgroup").write_text("0::/\n")
    assert control_group_bytes(tmp_path / "cgroup", tmp_path) == math.inf
    assert control_group_bytes() > 0  # this machine's own, whatever it is
