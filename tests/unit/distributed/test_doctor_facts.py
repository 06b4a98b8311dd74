"""What a task sees of its host."""

import json
import os
from pathlib import Path

import pytest

from bertdist.distributed import doctor_facts
from bertdist.distributed.doctor_facts import (
    facts_of,
    interface_to,
    link_mbits,
    processes_of,
    rdma_gbits,
    read_gpus,
    visible_gpus,
)

CARDS = read_gpus(
    "0, GPU-aa11, NVIDIA A100-SXM4-80GB, 550.54.15\n1, GPU-bb22, NVIDIA A100, 550.54.15\n"
)


def test_lines_of_nvidia_smi() -> None:
    assert CARDS[0] == {
        "index": "0",
        "uuid": "GPU-aa11",
        "name": "NVIDIA A100-SXM4-80GB",
        "driver": "550.54.15",
    }
    assert len(CARDS) == 2 and read_gpus("No devices were found\n") == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("", []),
        ("0,1", ["GPU-aa11", "GPU-bb22"]),
        ("1", ["GPU-bb22"]),
        ("GPU-bb", ["GPU-bb22"]),
        ("GPU-zz", ["GPU-zz"]),
        ("MIG-123", ["MIG-123"]),
        ("0,7,1", ["GPU-aa11"]),  # CUDA stops at the first that is not there
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_gpus(given: str | None, expected: list[str] | None) -> None:
    assert visible_gpus(given, CARDS) == expected


def test_without_nvidia_smi_indices_stay() -> None:
    assert visible_gpus("0,3", []) == ["0", "3"]


def test_speeds_of_links(tmp_path: Path) -> None:
    for name, text in {"eth0": "25000\n", "veth": "-1\n", "wifi": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(text)
    found = [link_mbits(name, tmp_path) for name in ("eth0", "veth", "wifi", "none", "")]
    assert found == [25000, None, None, None, None]


def test_infiniband_counts_active_ports(tmp_path: Path) -> None:
    for i, (state, rate) in enumerate(
        [("4: ACTIVE", "200 Gb/sec (4X HDR)"), ("1: DOWN", "10 Gb/sec (4X)")]
    ):
        port = tmp_path / f"mlx5_{i}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text(rate + "\n")
    assert rdma_gbits(tmp_path) == 200.0 and rdma_gbits(tmp_path / "none") == 0.0


def test_the_interface_to_a_host() -> None:
    assert interface_to("127.0.0.1") == {"name": "lo", "address": "127.0.0.1", "mbits": None}
    assert interface_to("no.such.host.invalid")["name"] == ""


def test_processes_of_a_node() -> None:
    assert processes_of({"environ": {}, "gpus": None}) == 1
    assert processes_of({"environ": {}, "gpus": ["0", "1"]}) == 2
    assert processes_of({"environ": {"NPROC_PER_NODE": "3"}, "gpus": ["0"]}) == 3


def test_facts_are_json_and_of_this_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_facts, "installed_gpus", lambda: CARDS)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    facts = facts_of(3, str(tmp_path), "127.0.0.1")
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["rank"], facts["node"], facts["gpus"]) == (3, "node7", ["GPU-bb22"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")  # SLURM with AMD's GPUs
    assert facts_of(3, str(tmp_path), "127.0.0.1")["gpus"] == ["GPU-aa11"]
    assert facts["cpus"] == sorted(os.sched_getaffinity(0))
    assert facts["versions"]["torch"] and facts["versions"]["driver"] == "550.54.15"
    assert " on /" in facts["file_system"]
