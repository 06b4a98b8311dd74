"""What a cluster may do wrong, planted in made-up facts: each is named, and the right one is all ok."""

import errno
import os
from collections.abc import Iterable
from typing import Any

import pytest

from bertdist.distributed.doctor_checks import (
    AllReduce,
    Finding,
    Layout,
    check_bandwidth,
    check_clocks,
    check_cpus,
    check_folder,
    check_gpus,
    check_network,
    check_tasks,
    check_variables,
    check_versions,
)
from bertdist.distributed.shared_folder import FolderResult

CARDS = [
    {"index": str(i), "uuid": f"GPU-{i}", "name": "NVIDIA H100 80GB HBM3", "driver": "550.54"}
    for i in range(8)
]


def task(rank: int, node: str, gpus: list[str] | None = None, **other: Any) -> dict[str, Any]:
    environ = {"SLURM_CPUS_PER_TASK": "64"}
    if gpus is not None:
        environ |= {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    facts = {
        "rank": rank,
        "node": node,
        "host": node,
        "environ": environ | other.pop("environ", {}),
        "cpus": list(range(64)),
        "cores": 64,
        "cards": CARDS if gpus is not None else [],
        "gpus": gpus,
        "interface": {"name": "eth0", "address": f"10.0.0.{rank}", "mbits": 10000},
        "interfaces": ["eth0", "ib0", "lo"],
        "rdma": 0.0,
        "versions": {
            "Python": "3.12.3",
            "bertdist": "0.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        "file_system": "nfs4 on /shared",
    }
    return facts | other


ALL_GPUS = [f"GPU-{i}" for i in range(8)]
RIGHT = [task(0, "node1", ALL_GPUS), task(1, "node2", ALL_GPUS)]
PER_NODE = Layout(nodes=2, tasks=2, tasks_per_node=1)


def bad(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    """(check, result, level) of those that are not ok, each of which says what to change."""
    found = [x for x in findings if x.level != "ok"]
    assert all(x.advice for x in found)
    return [(x.check, x.result, x.level) for x in found]


def test_a_right_allocation_is_all_ok() -> None:
    for tasks in (RIGHT, [task(0, "node1"), task(1, "node2")]):
        findings = [
            *check_tasks(tasks, PER_NODE),
            *check_gpus(tasks),
            *check_cpus(tasks),
            *check_network(tasks, True),
            *check_versions(tasks),
            *check_clocks({"node2": -0.4}),
            *check_folder(FolderResult(compared=1, seconds=0.1, fsync=0.01), tasks, "/shared", 30),
        ]
        assert bad(findings) == [] and len(findings) == 10


# ---- Tasks


def test_a_folder_that_is_not_there_is_to_be_made() -> None:
    for made, advice in (
        (os.strerror(errno.ENOENT), "Make /a/b, or check the folder above it."),
        (os.strerror(errno.EROFS), "Give --output_dir a folder on a disk that all nodes share."),
    ):
        (found,) = check_folder(FolderResult(made=made), [task(0, "node1")], "/a/b", 30)
        assert (found.level, found.advice) == ("error", advice)


def test_two_tasks_where_one_is_expected() -> None:
    tasks = [task(rank, f"node{1 + rank // 2}") for rank in range(4)]
    ((check, result, level),) = bad(check_tasks(tasks, PER_NODE._replace(tasks=4)))
    assert (check, level) == ("tasks per node", "error")
    assert result == (
        "2 on node1, expected 1: each would start all processes of its node (node1: 2, node2: 2)"
    )
    assert bad(check_tasks(tasks, Layout(2, 4, 2))) == []
    assert "ranks would be missing" in bad(check_tasks(tasks, Layout(2, 4, 8)))[0][1]


def test_all_tasks_on_one_node_of_two() -> None:
    tasks = [task(0, "node1"), task(1, "node1")]
    assert ("nodes", "the job has 2 nodes, and all tasks are on node1", "error") in bad(
        check_tasks(tasks, PER_NODE)
    )
    three = [task(0, "node1"), task(1, "node2")]
    (only,) = bad(check_tasks(three, PER_NODE._replace(nodes=3)))
    assert only[1] == "the job has 3 nodes, and tasks are only on node1, node2"


# ---- GPUs: not run on a GPU; ids as CUDA_VISIBLE_DEVICES and nvidia-smi have them


def test_the_same_gpu_in_two_tasks_of_a_node() -> None:
    tasks = [task(0, "node1", ["GPU-0", "GPU-1"]), task(1, "node1", ["GPU-1"])]
    ((check, result, level),) = bad(check_gpus(tasks))
    assert (check, level) == ("GPUs", "error")
    assert result.startswith(
        "tasks 0 and 1 on node1 both see GPU GPU-1 (CUDA_VISIBLE_DEVICES=GPU-1)"
    )


def test_the_same_index_on_two_nodes_is_another_gpu() -> None:
    assert bad(check_gpus([task(0, "node1", ["0"]), task(1, "node2", ["0"])])) == []


def test_gpus_that_are_hidden() -> None:
    hidden = task(1, "node2", None, cards=CARDS, environ={"SLURM_GPUS_ON_NODE": "8"})
    found = bad(check_gpus([RIGHT[0], hidden]))
    assert "CUDA_VISIBLE_DEVICES is not set in task 1 (node2), although" in found[0][1]
    empty = task(1, "node2", [], environ={"CUDA_VISIBLE_DEVICES": "9"})
    assert (
        "CUDA_VISIBLE_DEVICES='9' names no GPU that task 1 (node2) has"
        in bad(check_gpus([empty]))[0][1]
    )


def test_gpus_that_were_not_asked_for() -> None:
    (found,) = bad(check_gpus([task(0, "node1", None, cards=CARDS)]))
    assert found == ("GPUs", "node1 has 8 GPUs, and the job asked for none", "warning")


def test_numbers_and_models_of_gpus() -> None:
    fewer = task(1, "node2", ALL_GPUS[:6])
    assert (
        "not the same number on all nodes (node1: 8, node2: 6)"
        in bad(check_gpus([RIGHT[0], fewer]))[0][1]
    )
    too_many = task(0, "node1", ALL_GPUS, environ={"NPROC_PER_NODE": "9"})
    assert "NPROC_PER_NODE is 9, and task 0 (node1) has 8 GPUs" in bad(check_gpus([too_many]))[0][1]
    other = task(1, "node2", ALL_GPUS, cards=[{**card, "name": "NVIDIA A100"} for card in CARDS])
    (found,) = bad(check_gpus([RIGHT[0], other]))
    assert found[2] == "warning" and "NVIDIA A100, NVIDIA H100 80GB HBM3" in found[1]


# ---- CPUs


def test_cpus_that_srun_did_not_take_over() -> None:
    bound = task(0, "node1", ALL_GPUS, cpus=[0], cores=64)
    (found,) = bad(check_cpus([bound]))
    assert found[2] == "warning"
    assert found[1] == "task 0 (node1) may use 1 of 64 cores, for 8 process(es) x 8 thread(s)"
    # an OMP_NUM_THREADS of one needs no more cores than processes
    few = task(0, "node1", ALL_GPUS, cpus=list(range(8)), environ={"OMP_NUM_THREADS": "1"})
    assert bad(check_cpus([few])) == []
    # of a shell that sets it for other programs
    many = task(0, "node1", ALL_GPUS, environ={"OMP_NUM_THREADS": "64"})
    (found,) = bad(check_cpus([many]))
    assert found[1].startswith("OMP_NUM_THREADS is 64, and task 0 (node1) may use 64 cores, for 8")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("NPROC_PER_NODE", ("1", "8"), ("0", "x", "", "-1", "\u0663")),
        ("MAIN_PROCESS_PORT", ("29500",), ("0", "99999", "abc")),
        ("MAX_RESTARTS", ("0", "100"), ("-1", "many")),
    ],
)
def test_numbers_that_a_launch_refuses(
    name: str, right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    for given in right:
        assert bad(check_variables([task(0, "node1", environ={name: given})])) == []
    for given in wrong:
        tasks = [task(0, "node1"), task(1, "node2", environ={name: given})]
        (found,) = bad(check_variables(tasks))
        assert found[1].startswith(f"{name} is {given!r} in task 1 (node2)")
    assert bad(check_variables([task(0, "node1")])) == []


def test_cores_of_two_tasks() -> None:
    one, other = (
        task(i, "node1", cpus=[0, 1], environ={"SLURM_CPUS_PER_TASK": "2"}) for i in (0, 1)
    )
    (found,) = bad(check_cpus([one, other]))
    assert found[1] == "tasks 0 and 1 on node1 are bound to the same cores"
    assert bad(check_cpus([one, {**other, "cpus": [2, 3]}])) == []
    assert bad(check_cpus([one, {**other, "node": "node2"}])) == []


# ---- Network, clocks, versions


@pytest.mark.parametrize(
    ("variable", "given", "is_right"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0,ib", True),
        ("NCCL_SOCKET_IFNAME", "=ens0,ib", False),
        ("NCCL_SOCKET_IFNAME", "ens,ib", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "ens", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
    ],
)
def test_variables_that_name_an_interface(variable: str, given: str, is_right: bool) -> None:
    found = bad(check_network([task(0, "node1", environ={variable: given})], False))
    assert (found == []) == is_right
    if found:
        assert found[0][1] == f"{variable}={given}: task 0 (node1) has eth0, ib0, lo"


def test_a_first_host_that_is_loopback_elsewhere() -> None:
    wrong = task(1, "node2", interface={"name": "lo", "address": "127.0.0.1", "mbits": None})
    (found,) = bad(check_network([RIGHT[0], wrong], True))
    assert found[1] == "on node2 the name of the first host is 127.0.0.1 (/etc/hosts)"
    assert bad(check_network([RIGHT[0], wrong], False)) == []


def test_clocks() -> None:
    assert bad(check_clocks({"node2": 1.9, "node3": -1.9})) == []
    assert bad(check_clocks({"node2": 3.0, "node3": -4.0})) == [
        ("clocks", "node3 is 4 s behind", "warning")
    ]
    assert bad(check_clocks({"node2": 300.0})) == [("clocks", "node2 is 300 s ahead", "error")]
    assert list(check_clocks({})) == []


def test_versions() -> None:
    other = {**RIGHT[1], "versions": {**RIGHT[1]["versions"], "torch": "2.12.0"}}
    (found,) = bad(check_versions([RIGHT[0], other]))
    assert found == ("versions", "torch is 2.13.0 on node1 and 2.12.0 on node2", "error")
    more = {**RIGHT[1], "versions": {**RIGHT[1]["versions"], "NCCL": "2.27"}}
    assert bad(check_versions([RIGHT[0], more]))[0][1] == "NCCL is none on node1 and 2.27 on node2"


# ---- The folder


@pytest.mark.parametrize(
    ("found", "level", "result"),
    [
        (
            FolderResult(made="Read-only file system"),
            "error",
            "task 0 (node1) cannot write there: Read-only",
        ),
        (FolderResult(missing=(1,)), "error", "task 1 (node2) has no /shared"),
        (
            FolderResult(unseen=(1,)),
            "error",
            "/shared is not the same on task 0 (node1) (nfs4 on /shared) and",
        ),
        (FolderResult(unseen_here=(1,)), "error", "/shared is not the same on task 0 (node1)"),
        (
            FolderResult(unwritable={1: "OSError: no"}),
            "error",
            "task 1 (node2) cannot write to /shared: OS",
        ),
        (
            FolderResult(compared=1, seconds=31.0),
            "warning",
            "nfs4, the same on all; a new file is seen after 31 s",
        ),
        (
            FolderResult(compared=1, replaced=None),
            "warning",
            "nfs4; a replaced file is still the old one",
        ),
        (FolderResult(compared=1, fsync=0.7), "warning", "700 ms"),
        (
            FolderResult(compared=1, unlocked=(1,)),
            "warning",
            "task 1 (node2) got a lock that task 0 (node1) holds",
        ),
        (
            FolderResult(compared=1, lock_error="No locks available"),
            "warning",
            "No locks available",
        ),
    ],
)
def test_folders(found: FolderResult, level: str, result: str) -> None:
    ((_, said, how),) = bad(check_folder(found, RIGHT, "/shared", 30))
    assert said.startswith(result) and how == level


# ---- Bandwidth


def test_bandwidth_is_compared_with_the_link() -> None:
    # two ranks: each sends and receives 100 MB in 0.1 s, 8 Gbit/s of 10
    (found,) = check_bandwidth(AllReduce("gloo", 2, 100, 0.1), RIGHT, True)
    assert found.level == "ok" and "gloo, 2 ranks: 8 Gbit/s" in found.result
    assert found.result.endswith("80% of the network's 10 Gbit/s")
    (slow,) = check_bandwidth(AllReduce("gloo", 2, 100, 0.4), RIGHT, True)
    assert slow.level == "warning" and slow.advice
    # sixteen: 15/16 of twice the bytes
    (many,) = check_bandwidth(AllReduce("gloo", 16, 100, 0.1), RIGHT, True)
    assert "gloo, 16 ranks: 15 Gbit/s; 0.44 s for the gradients" in many.result


def test_nccl_is_compared_with_infiniband() -> None:
    tasks = [{**x, "rdma": 400.0} for x in RIGHT]
    (found,) = check_bandwidth(AllReduce("nccl", 16, 100, 0.1), tasks, True)
    assert found.level == "warning" and "of the InfiniBand's 400 Gbit/s" in found.result
    assert "NCCL_IB_HCA" in found.advice
    (fast,) = check_bandwidth(AllReduce("nccl", 16, 100, 0.005), tasks, True)
    assert fast.level == "ok" and "300 Gbit/s" in fast.result


def test_a_link_that_is_not_known_is_said() -> None:
    (one,) = check_bandwidth(AllReduce("nccl", 8, 100, 0.001), RIGHT[:1], False)
    assert one.level == "ok" and "inside one node, whose link speed is not known" in one.result
    unknown = [{**x, "interface": {**x["interface"], "mbits": None}} for x in RIGHT]
    (other,) = check_bandwidth(AllReduce("gloo", 2, 100, 9.0), unknown, True)
    assert other.level == "ok" and "the speed of the link is not known" in other.result
