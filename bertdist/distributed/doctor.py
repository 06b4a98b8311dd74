"""`bertdist slurm doctor`: is this allocation as training on several nodes needs it?

Every task of a step of SLURM runs `examine`; the first one asks the others (task_exchange.py) and
prints the table. Outside a step it starts one with srun. No wait is without a limit, and a task
that does not answer is named. No torch is imported in these processes: the all-reduce runs in
others (all_reduce.py).
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bertdist.core.errors import ConfigError, listed
from bertdist.core.slurm import SlurmError, call_slurm
from bertdist.core.terminal import Cell, print_error, show, show_table
from bertdist.distributed import doctor_checks, shared_folder
from bertdist.distributed.all_reduce import measure
from bertdist.distributed.doctor_checks import AllReduce, Facts, Finding, Layout
from bertdist.distributed.doctor_facts import SMI_SECONDS, facts_of, processes_of
from bertdist.distributed.slurm_config import DoctorConfig
from bertdist.distributed.task_exchange import Exchange, NotReached, Place, serve

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # of SLURM: the batch script, the shell of salloc
OWN_STEP = "BERTDIST_DOCTOR_STEP"  # in the environment of a step that `start_step` has started
END = "\x1e"  # what the first task prints then, before its exit code
LEAVE_SECONDS = 5.0  # for all tasks to end after the table
CLOCK_ROUNDS = 3
TORCH_SECONDS = 120.0  # for all processes to import it and to reduce
LATE = "RuntimeError: no answer"  # of `measure`, of a process that waits for another one
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examine(config: DoctorConfig) -> int:
    """Check, and print; returns the exit code: 1 where there is an error."""
    if not in_step(os.environ):
        return start_step(config)
    place = place_in_step(os.environ)
    handlers: dict[str, Callable[..., Any]] = {
        **shared_folder.HANDLERS,
        "facts": lambda: facts_of(place.rank, config.folder, place.address),
        "clock": time.time,
        "all_reduce": measure,
    }
    try:
        if place.rank:
            serve(place, handlers, config.wait)
            return 0
        with Exchange(place, handlers, config.wait) as tasks:
            findings = list(find(tasks, config))
    except NotReached as error:
        print_error(error)
        return 1
    code = print_table(findings, place)
    if OWN_STEP not in os.environ:
        return code
    print(f"{END}{code}", flush=True)
    return 0  # else srun writes a line about it into the table


# ---- The step


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process, not the batch script or the shell of salloc."""
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def start_step(config: DoctorConfig) -> int:
    """srun with the job's own tasks; returns 1 where a task has failed. Raises ConfigError."""
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    limit = 10 * config.wait + 2 * TORCH_SECONDS
    command = [
        # Tasks that end at once, such as without Python, do not end the first one before its table.
        *("srun", "--kill-on-bad-exit=0", f"--wait={round(limit)}"),
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        *(sys.executable, "-m", "bertdist", "slurm", "doctor"),
        *(f"--folder={config.folder}", f"--tasks_per_node={config.tasks_per_node}"),
        *(f"--bandwidth={config.bandwidth}", f"--wait={config.wait}"),
    ]
    columns = str(shutil.get_terminal_size().columns)  # behind srun is no terminal
    environment = {**os.environ, "COLUMNS": columns, OWN_STEP: "1"}
    sys.stdout.flush()
    try:
        srun = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        raise ConfigError("There is no command srun here: load the module of SLURM.") from None
    timer = threading.Timer(limit, srun.terminate)
    timer.start()
    code, is_in_time = None, True
    with srun:
        try:
            for line in srun.stdout or ():
                if line.startswith(END):  # of the first task; others may hang
                    code = int(line.removeprefix(END))
                    break
                print(line, end="", flush=True)
            with suppress(subprocess.TimeoutExpired):
                srun.wait(LEAVE_SECONDS)
            is_in_time = timer.is_alive()
        finally:  # also where nobody reads the table any more
            timer.cancel()
            srun.terminate()
    if code is None and not is_in_time:
        raise ConfigError(
            f"srun did not end within {limit:g} s: a node may not respond (sinfo, squeue)."
        )
    return 1 if code is None else code


def place_in_step(environ: Mapping[str, str]) -> Place:
    """This task, from SLURM's variables; the port is that of launch/train.slurm. ConfigError."""
    try:
        job, rank = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_PROCID"])
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"SLURM's variables of a task are not as expected: {error}.") from None
    attempt = environ.get("SLURM_RESTART_COUNT", "0")
    address = environ.get("MAIN_PROCESS_IP") or (hosts_of(environ) or [socket.gethostname()])[0]
    port = 20000 + (job + 131 * (int(attempt) if attempt.isdecimal() else 0)) % 10000
    given = environ.get("MAIN_PROCESS_PORT", "")
    port = int(given) if given.isdecimal() and 0 < int(given) < 1 << 16 else port
    return Place(rank, tasks, address, port, f"bertdist doctor {job}.{environ['SLURM_STEP_ID']}")


def hosts_of(environ: Mapping[str, str]) -> list[str]:
    """The nodes of the step, in order; [] where scontrol cannot say it."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    with suppress(SlurmError):
        return call_slurm("scontrol", "show", "hostnames", nodes)[0].split()
    return []


def silent_tasks(ranks: Iterable[int], environ: Mapping[str, str]) -> str:
    """`task 3 (node2)` of tasks that have not answered, as SLURM deals them by default."""
    hosts, counts = hosts_of(environ), environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    nodes: list[str] = []
    for host, count in zip(hosts, numbers_of_tasks(counts), strict=False):
        nodes += [host] * count
    return listed([f"task {x}" + (f" ({nodes[x]})" if x < len(nodes) else "") for x in ranks])


def numbers_of_tasks(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for word in filter(None, text.split(",")):
        count, _, times = word.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


# ---- The checks


def find(tasks: Exchange, config: DoctorConfig) -> Iterable[Finding]:
    """All findings, in the order of the table."""
    place, environ = tasks.place, os.environ
    # nvidia-smi may take long where no program uses the GPUs.
    answers = tasks.ask_each("facts", {x: {} for x in tasks.ranks}, config.wait + SMI_SECONDS)
    facts: list[Facts] = [answers[x].value for x in sorted(answers) if not answers[x].error]
    failed = {rank: x.error for rank, x in answers.items() if x.error}
    silent = [rank for rank in range(place.tasks) if rank not in answers]
    yield from check_port(tasks, silent, environ)
    for rank, error in failed.items():
        yield Finding("tasks", f"task {rank}: {error}", "error")
    if not facts:
        return
    # Tasks that are silent are missing there too, which need not be said twice.
    nodes = int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    layout = Layout(nodes, place.tasks, config.tasks_per_node)
    mapping = [] if silent else list(doctor_checks.check_tasks(facts, layout))
    mapping += [*doctor_checks.check_variables(facts), *doctor_checks.check_gpus(facts)]
    yield from mapping
    yield from doctor_checks.check_cpus(facts)
    several = len({x["host"] for x in facts}) > 1
    yield from doctor_checks.check_network(facts, several)
    yield from doctor_checks.check_clocks(clock_skews(tasks, facts))
    folder = os.path.abspath(config.folder)
    found = shared_folder.examine_folder(tasks, folder, config.wait)
    yield from doctor_checks.check_folder(found, facts, folder, config.wait)
    measured: list[Finding] = []
    if config.bandwidth:
        wrong = any(x.level == "error" for x in mapping) or len(tasks.ranks) < place.tasks
        measured = list(reduce_on_all(tasks, facts, several, wrong, config.wait))
    yield from doctor_checks.check_versions(facts)
    yield from measured
    if lost := [rank for rank in answers if rank not in tasks.ranks]:
        result = f"no answer any more of {silent_tasks(lost, environ)}"
        yield Finding("tasks", result, "error", "Did the task or its node end? See sinfo, dmesg.")


def check_port(
    tasks: Exchange, silent: Sequence[int], environ: Mapping[str, str]
) -> Iterable[Finding]:
    """Whether all tasks have reached the first one, and on which port."""
    place = tasks.place
    if silent:
        yield Finding(
            "port",
            f"no answer within {tasks.wait:g} s of {silent_tasks(silent, environ)} at "
            f"{place.address}, port {place.port}",
            "error",
            "Their own messages are above; a firewall, or a name that resolves to another address "
            "there (MAIN_PROCESS_IP).",
        )
    if tasks.taken:
        yield Finding(
            "port",
            f"another process listens on port {listed(list(map(str, tasks.taken)))} of "
            f"{place.address}, which a launch in this job would use",
            "error",
            "End it, or submit the job again: the port follows from the job's id.",
        )
    elif not silent:
        yield Finding("port", f"{place.address}, port {place.port}, reached by all")


def clock_skews(tasks: Exchange, facts: Sequence[Facts]) -> dict[str, float]:
    """Node -> seconds that its clock is ahead; of several questions the one answered soonest."""
    skews: dict[str, float] = {}
    for node, rank in {x["node"]: x["rank"] for x in facts if x["rank"]}.items():
        best = float("inf")
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            answer = tasks.ask_each("clock", {rank: {}}).get(rank)
            after = time.time()
            if answer is None or answer.error:
                break
            if after - before < best:
                best = after - before
                skews[node] = answer.value - (before + after) / 2
    return skews


def reduce_on_all(
    tasks: Exchange, facts: Sequence[Facts], several: bool, wrong: bool, wait: float
) -> Iterable[Finding]:
    """Measure the all-reduce; adds versions of CUDA and NCCL to the facts."""
    counts = {x["rank"]: processes_of(x) for x in facts}
    backend = "nccl" if all(x["gpus"] for x in facts) else "gloo"
    world = sum(counts.values())
    if wrong:
        yield Finding("all-reduce", "not measured: correct the errors first", "warning")
        return
    if world < 2:
        yield Finding("all-reduce", "not measured: there is one process")
        return
    options, first, port = dict[int, dict[str, Any]](), 0, free_port()
    for rank, count in sorted(counts.items()):
        options[rank] = {"ranks": list(range(first, first + count)), "backend": backend}
        options[rank] |= {"world": world, "address": tasks.place.address, "port": port}
        options[rank]["seconds"] = TORCH_SECONDS
        first += count
    answers = tasks.ask_each("all_reduce", options, TORCH_SECONDS + wait)
    failed = {rank: x.error for rank, x in answers.items() if x.error}
    missing = [rank for rank in options if rank not in answers]
    if failed or missing:
        names = {x["rank"]: doctor_checks.name_of(x) for x in facts}
        # Others wait for the one that has failed.
        rank = min(failed or missing, key=lambda x: failed.get(x, "").startswith(LATE))
        reason = failed.get(rank, "no answer").removeprefix("RuntimeError: ")
        advice = "GLOO_SOCKET_IFNAME chooses the interface."
        if backend == "nccl":
            advice = "NCCL_DEBUG=INFO shows the interface, and NCCL_SOCKET_IFNAME chooses it."
        if "ImportError" in reason or "ModuleNotFoundError" in reason:
            advice = "The environment there is not complete, or another one."
        result = f"{backend}: {names.get(rank, f'task {rank}')}: {reason}"
        yield Finding("all-reduce", result, "error", advice)
        return
    for x in facts:
        x["versions"].update(answers[x["rank"]].value["versions"])
    slowest = max(x.value["seconds"] for x in answers.values())
    measured = AllReduce(backend, world, answers[0].value["megabytes"], slowest)
    yield from doctor_checks.check_bandwidth(measured, facts, several)


def free_port() -> int:
    """One that no process of this host listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def print_table(findings: Sequence[Finding], place: Place) -> int:
    """Print the findings; returns 1 where one is an error."""
    rows: list[list[Cell]] = [
        [x.check, x.result, [(x.level, STYLES[x.level])], x.advice] for x in findings
    ]
    counts = {level: sum(x.level == level for x in findings) for level in ("error", "warning")}
    header = ["check", "result", "", "what to change"]
    if not any(x.advice for x in findings):
        header, rows = header[:3], [row[:3] for row in rows]
    show_table(
        f"{place.tasks} task{'s' * (place.tasks > 1)}; the first on {place.address}", header, rows
    )
    words = [f"{n} {level}{'s' * (n > 1)}" for level, n in counts.items() if n]
    show(f"{' and '.join(words) if words else 'All is as training needs it'}.")
    return 1 if counts["error"] else 0
