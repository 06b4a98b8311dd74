"""The checks of `bertdist slurm doctor`: facts of all tasks -> findings. No torch, no SLURM.

Each is a function of values, so that what a cluster does wrong can be planted in a test.
"""

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from bertdist.core.errors import listed
from bertdist.distributed.doctor_facts import processes_of
from bertdist.distributed.shared_folder import FolderResult

Facts = Mapping[str, Any]  # of `doctor_facts.facts_of`
Level = Literal["ok", "warning", "error"]

MOST_SKEW, WRONG_CLOCK = 2.0, 60.0  # seconds
SLOW_FILE, SLOW_FLUSH = 2.0, 0.5  # seconds
GOOD_SHARE = 0.3  # of a link's speed that an all-reduce should have
BERT_BASE_GBITS = 8 * 0.438  # its gradients in float32
SCRIPT = "srun --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_PER_TASK"


class Finding(NamedTuple):
    """A line of the table."""

    check: str
    result: str
    level: Level = "ok"
    advice: str = ""


class Layout(NamedTuple):
    """What the job asked for."""

    nodes: int
    tasks: int  # of the step
    tasks_per_node: int  # expected


def name_of(facts: Facts) -> str:
    """`task 3 (node2)`."""
    return f"task {facts['rank']} ({facts['node']})"


def check_tasks(tasks: Sequence[Facts], layout: Layout) -> Iterable[Finding]:
    """Tasks on each node, against what is expected."""
    counts: dict[str, int] = defaultdict(int)
    for facts in tasks:
        counts[facts["node"]] += 1
    shown = listed([f"{node}: {count}" for node, count in counts.items()])
    if len(counts) < layout.nodes:
        some = "all tasks are" if len(counts) == 1 else "tasks are only"
        yield Finding(
            "nodes",
            f"the job has {layout.nodes} nodes, and {some} on {listed(list(counts))}",
            "error",
            f"Start tasks on every node: srun --nodes={layout.nodes} "
            f"--ntasks-per-node={layout.tasks_per_node}.",
        )
    else:
        yield Finding("nodes", f"{len(counts)}: {listed(list(counts))}")
    wrong = {node: n for node, n in counts.items() if n != layout.tasks_per_node}
    if wrong:
        node, count = next(iter(wrong.items()))
        more = count > layout.tasks_per_node
        why = (
            "each would start all processes of its node"
            if layout.tasks_per_node == 1 and more
            else "ranks would be missing or too many"
        )
        yield Finding(
            "tasks per node",
            f"{count} on {node}, expected {layout.tasks_per_node}: {why} ({shown})",
            "error",
            f"#SBATCH --ntasks-per-node={layout.tasks_per_node}"
            + (", or doctor --tasks_per_node where srun starts each rank" if more else ""),
        )
    else:
        yield Finding("tasks per node", str(layout.tasks_per_node))


def check_variables(tasks: Sequence[Facts]) -> Iterable[Finding]:
    """Numbers that launch/slurm_job.sh reads, and refuses where they are none."""
    bounds = {"NPROC_PER_NODE": (1, 1 << 15), "MAIN_PROCESS_PORT": (1, (1 << 16) - 1)}
    for name, (low, high) in {**bounds, "MAX_RESTARTS": (0, 1 << 31)}.items():
        for facts in tasks:
            given = facts["environ"].get(name, "1")
            if not (given.isascii() and given.isdecimal() and low <= int(given) <= high):
                yield Finding(
                    "variables",
                    f"{name} is {given!r} in {name_of(facts)}; the launch expects a number",
                    "error",
                    f"Unset {name}, or correct it.",
                )
                break


def check_gpus(tasks: Sequence[Facts]) -> Iterable[Finding]:
    """GPUs of each task: set, its own, the same number on all nodes."""
    if not any(x["gpus"] or x["cards"] or _asked_gpus(x) for x in tasks):
        yield Finding("GPUs", "none: training is on the CPU")
        return
    found = [*_hidden_gpus(tasks), *_shared_gpus(tasks), *_numbers_of_gpus(tasks)]
    names = sorted({card["name"] for x in tasks for card in x["cards"]})
    if len(names) > 1:
        found.append(
            Finding(
                "GPUs",
                f"of different models: {listed(names)}; the slowest decides",
                "warning",
                "Ask for one model: --gpus-per-node=MODEL:N, or --constraint.",
            )
        )
    what = f", {names[0]}" if names else ""
    number = len(tasks[0]["gpus"] or ())
    yield from found or [Finding("GPUs", f"{number} per task{what}, none shared between tasks")]


def _asked_gpus(facts: Facts) -> int:
    """How many the job has on this node, as SLURM says; 0 for none."""
    given = facts["environ"].get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdecimal() else 0


def _hidden_gpus(tasks: Sequence[Facts]) -> Iterable[Finding]:
    unset = [x for x in tasks if x["gpus"] is None and _asked_gpus(x)]
    if unset:
        yield Finding(
            "GPUs",
            f"CUDA_VISIBLE_DEVICES is not set in {listed(list(map(name_of, unset)))}, although the "
            "job has GPUs",
            "error",
            "Do not unset it in a profile or container; gres.conf and GresTypes=gpu make SLURM "
            "set it.",
        )
    idle = [x for x in tasks if x["cards"] and not x["gpus"] and not _asked_gpus(x)]
    if idle:
        yield Finding(
            "GPUs",
            f"{idle[0]['node']} has {len(idle[0]['cards'])} GPUs, and the job asked for none",
            "warning",
            "#SBATCH --gpus-per-node=N",
        )
    empty = [x for x in tasks if x["gpus"] == [] and _asked_gpus(x)]
    if empty:
        given = empty[0]["environ"].get("CUDA_VISIBLE_DEVICES", "")
        yield Finding(
            "GPUs",
            f"CUDA_VISIBLE_DEVICES={given!r} names no GPU that {name_of(empty[0])} has",
            "error",
            "Leave it as SLURM sets it.",
        )


def _shared_gpus(tasks: Sequence[Facts]) -> Iterable[Finding]:
    """Two tasks of a node that each see the same GPU: both would compute on it."""
    for one, other in combinations(tasks, 2):
        common = [gpu for gpu in one["gpus"] or () if gpu in (other["gpus"] or ())]
        if one["node"] == other["node"] and common:
            yield Finding(
                "GPUs",
                f"tasks {one['rank']} and {other['rank']} on {one['node']} both see GPU "
                f"{listed(common)} (CUDA_VISIBLE_DEVICES="
                f"{other['environ'].get('CUDA_VISIBLE_DEVICES')})",
                "error",
                "One task per node with all its GPUs (--ntasks-per-node=1), or --gpus-per-task=1.",
            )
            return


def _numbers_of_gpus(tasks: Sequence[Facts]) -> Iterable[Finding]:
    counts = {x["node"]: len(x["gpus"] or ()) for x in tasks}
    if len(set(counts.values())) > 1:
        shown = listed([f"{node}: {count}" for node, count in counts.items()])
        yield Finding(
            "GPUs",
            f"not the same number on all nodes ({shown}); the launch expects it",
            "error",
            "--gpus-per-node=N gives every node as many; --gpus=N does not.",
        )
    for facts in tasks:
        processes, gpus = processes_of(facts), len(facts["gpus"] or ())
        if gpus and processes > gpus:
            yield Finding(
                "GPUs",
                f"NPROC_PER_NODE is {processes}, and {name_of(facts)} has {gpus} GPUs",
                "error",
                f"NPROC_PER_NODE={gpus}, or unset it: a process per GPU.",
            )
            return


def check_cpus(tasks: Sequence[Facts]) -> Iterable[Finding]:
    """CPU cores bound to each task, against the threads that its processes start."""
    for facts in tasks:
        cpus, processes = len(facts["cpus"]), processes_of(facts)
        asked = facts["environ"].get("SLURM_CPUS_PER_TASK", "")
        threads = facts["environ"].get("OMP_NUM_THREADS", "")
        each = int(threads) if threads.isdecimal() else max(1, int(asked or cpus) // processes)
        wanted = processes * each
        if wanted > cpus and threads.isdecimal() and cpus >= processes:
            yield Finding(
                "CPUs",
                f"OMP_NUM_THREADS is {each}, and {name_of(facts)} may use {cpus} cores, for "
                f"{processes} process(es)",
                "warning",
                f"Unset OMP_NUM_THREADS, or set it to {cpus // processes}.",
            )
            return
        if wanted > cpus and cpus < facts["cores"]:
            yield Finding(
                "CPUs",
                f"{name_of(facts)} may use {cpus} of {facts['cores']} cores, for {processes} "
                f"process(es) x {each} thread(s)",
                "warning",
                f"srun does not take --cpus-per-task from sbatch: srun --cpus-per-task={wanted}.",
            )
            return
    shared = [
        (one, other)
        for one, other in combinations(tasks, 2)
        if one["node"] == other["node"] and len(one["cpus"]) < one["cores"]
        if {*one["cpus"]} & {*other["cpus"]}
    ]
    if shared:
        one, other = shared[0]
        yield Finding(
            "CPUs",
            f"tasks {one['rank']} and {other['rank']} on {one['node']} are bound to the same cores",
            "warning",
            "srun --cpu-bind=cores --exact",
        )
        return
    counts = sorted({len(x["cpus"]) for x in tasks})
    yield Finding("CPUs", f"{' or '.join(map(str, counts))} cores per task")


def check_network(tasks: Sequence[Facts], several_hosts: bool) -> Iterable[Finding]:
    """The interface to the first host, and the variables that name one."""
    for facts in tasks:
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            given = facts["environ"].get(variable, "")
            known = any(_names(variable, given, name) for name in facts["interfaces"])
            if given and not given.startswith("^") and not known:
                yield Finding(
                    "network interface",
                    f"{variable}={given}: {name_of(facts)} has {listed(facts['interfaces'])}",
                    "error",
                    f"Unset {variable}, or name one that every node has.",
                )
                return
    ways = {x["node"]: x["interface"] for x in tasks if x["rank"]}
    ways = ways or {x["node"]: x["interface"] for x in tasks}
    names = sorted({_shown_link(way) for way in ways.values()})
    loops = [node for node, way in ways.items() if way["address"].startswith("127.")]
    if several_hosts and loops:
        yield Finding(
            "network interface",
            f"on {listed(loops)} the name of the first host is 127.0.0.1 (/etc/hosts)",
            "error",
            "Correct /etc/hosts there, or set MAIN_PROCESS_IP to its address.",
        )
        return
    yield Finding("network interface", listed(names))


def _names(variable: str, given: str, name: str) -> bool:
    """NCCL takes prefixes, after a leading `=` exact names; gloo takes exact names."""
    if variable.startswith("GLOO") or given.startswith("="):
        return name in given.removeprefix("=").split(",")
    return name.startswith(tuple(given.split(",")))


def _shown_link(way: Mapping[str, Any]) -> str:
    speed = f"{way['mbits'] / 1000:g} Gbit/s" if way["mbits"] else "speed not known"
    return f"{way['name'] or 'not known'} ({speed})"


def check_versions(tasks: Sequence[Facts]) -> Iterable[Finding]:
    """The same Python, packages, driver and libraries on all."""
    first = tasks[0]
    for name in dict.fromkeys(name for x in tasks for name in x["versions"]):
        mine = first["versions"].get(name, "none")
        others = [x for x in tasks if x["versions"].get(name, "none") != mine]
        if others:
            theirs = others[0]["versions"].get(name, "none")
            yield Finding(
                "versions",
                f"{name} is {mine} on {first['node']} and {theirs} on "
                f"{listed(sorted({x['node'] for x in others}))}",
                "warning" if name == "driver" else "error",
                "Use one environment on a shared disk, or one container, for all nodes.",
            )
            return
    shown = ("bertdist", "torch", "transformers", "CUDA", "NCCL")
    names = [name for name in shown if name in first["versions"]]
    words = ", ".join(f"{name} {first['versions'][name]}" for name in names)
    yield Finding("versions", f"the same on all: {words}")


def check_clocks(skews: Mapping[str, float]) -> Iterable[Finding]:
    """skews: node -> seconds ahead of the first task's host."""
    node = max(skews, key=lambda name: abs(skews[name]), default="")
    if not node:
        return
    worst = skews[node]
    result = f"{node} is {abs(worst):.3g} s {'ahead' if worst > 0 else 'behind'}"
    if abs(worst) > MOST_SKEW:
        level: Level = "error" if abs(worst) > WRONG_CLOCK else "warning"
        yield Finding("clocks", result, level, f"Start chrony or ntpd on {node}.")
    else:
        yield Finding("clocks", f"within {max(0.001, abs(worst)):.2g} s")


def check_folder(
    found: FolderResult, tasks: Sequence[Facts], folder: str, wait: float
) -> Iterable[Finding]:
    """The shared folder, from what `examine_folder` found."""
    names = {x["rank"]: name_of(x) for x in tasks}

    def who(ranks: Iterable[int]) -> str:
        return listed([names.get(rank, f"task {rank}") for rank in ranks])

    other = "Give --output_dir a folder on a disk that all nodes share."
    if found.made:
        is_missing = found.made == os.strerror(errno.ENOENT)
        advice = f"Make {folder}, or check the folder above it." if is_missing else other
        yield Finding("folder", f"{names[0]} cannot write there: {found.made}", "error", advice)
        return
    if found.missing:
        yield Finding("folder", f"{who(found.missing)} has no {folder}", "error", other)
    if found.unseen or found.unseen_here:
        ranks = dict.fromkeys((*found.unseen, *found.unseen_here))
        mine, theirs = (_file_system(tasks, {rank}) for rank in (0, next(iter(ranks))))
        yield Finding(
            "folder",
            f"{folder} is not the same on {names[0]} ({mine}) and {who(ranks)} ({theirs}): a new "
            f"file was not seen within {wait:g} s",
            "error",
            other,
        )
    for rank, error in found.unwritable.items():
        yield Finding("folder", f"{who([rank])} cannot write to {folder}: {error}", "error", other)
        break
    if not (found.missing or found.unseen or found.unseen_here or found.unwritable):
        if len(tasks) > 1 and not found.compared:
            unknown = "not compared: no other task has answered"
            yield Finding("folder", unknown, "warning", "Correct the errors first.")
            return
        yield from _shared(found, tasks)
    if found.unlocked or found.lock_error:
        what = found.lock_error or f"{who(found.unlocked)} got a lock that {names[0]} holds"
        yield Finding(
            "locks (flock)",
            what,
            "warning",
            "Start no second run in a folder and no sweep with several tasks; mount NFS without "
            "nolock or local_lock.",
        )
    elif not found.unseen:
        yield Finding("locks (flock)", "work between nodes" if len(tasks) > 1 else "work")


def _file_system(tasks: Sequence[Facts], ranks: set[int]) -> str:
    return next((x["file_system"] for x in tasks if x["rank"] in ranks), "") or "not known"


def _shared(found: FolderResult, tasks: Sequence[Facts]) -> Iterable[Finding]:
    kind = _file_system(tasks, {0}).split(" on ")[0]
    if len(tasks) < 2:
        yield Finding("folder", f"{kind}; one task has answered, nothing to compare with")
        return
    cache = "Mount with lookupcache=none or a short actimeo, or expect late messages of failures."
    if found.replaced is None:
        yield Finding("folder", f"{kind}; a replaced file is still the old one", "warning", cache)
        return
    latest = max(found.seconds, found.replaced)
    slow = latest > SLOW_FILE
    yield Finding(
        "folder",
        f"{kind}, the same on all; a new file is seen after {latest:.2g} s",
        "warning" if slow else "ok",
        cache * slow,
    )
    slow = found.fsync > SLOW_FLUSH
    yield Finding(
        "flush (fsync)",
        f"{1000 * found.fsync:.3g} ms",
        "warning" if slow else "ok",
        "Checkpoints wait for it: a faster disk, or --save_every with a longer interval." * slow,
    )


class AllReduce(NamedTuple):
    """A measured all-reduce."""

    backend: str
    ranks: int
    megabytes: float
    seconds: float  # of the slowest rank's median


def check_bandwidth(
    measured: AllReduce, tasks: Sequence[Facts], several_hosts: bool
) -> Iterable[Finding]:
    """The bandwidth of each rank's link (bus bandwidth of nccl-tests) against its speed."""
    ranks = measured.ranks
    gbits = 8e-3 * measured.megabytes * 2 * (ranks - 1) / ranks / measured.seconds
    step = 2 * (ranks - 1) / ranks * BERT_BASE_GBITS / gbits
    result = (
        f"{measured.backend}, {ranks} ranks: {gbits:.3g} Gbit/s; {step:.2g} s for the gradients of "
        "a BERT base"
    )
    rdma = min(x["rdma"] for x in tasks) if measured.backend == "nccl" else 0.0
    speeds = [x["interface"]["mbits"] for x in tasks if x["rank"]]
    known = [speed / 1000 for speed in speeds if speed]
    link = rdma or min(known, default=0.0)
    if not several_hosts:
        yield Finding("all-reduce", f"{result}; inside one node, whose link speed is not known")
    elif not link:
        yield Finding("all-reduce", f"{result}; the speed of the link is not known")
    else:
        name = "InfiniBand" if rdma else "network"
        slow = gbits < GOOD_SHARE * link
        advice = (
            "NCCL_DEBUG=INFO shows which network NCCL uses; NCCL_IB_HCA and NCCL_SOCKET_IFNAME "
            "choose it."
            if measured.backend == "nccl"
            else "Other jobs may use the network or the cores; GLOO_SOCKET_IFNAME chooses the "
            "interface."
        )
        result = f"{result}; {gbits / link:.0%} of the {name}'s {link:g} Gbit/s"
        yield Finding("all-reduce", result, "warning" if slow else "ok", advice * slow)
