"""A real SLURM cluster on this machine: munged, slurmctld and two slurmd from Debian's packages.

    with Cluster(folder) as cluster:                        # both nodes are idle
        job = cluster.sbatch("train.slurm", "--config", "run.yaml", cwd=folder)
        job.wait_until_running()
        cluster.kill_node("node2")
        assert job.wait() == "COMPLETED", job.log()

Root on Linux gets a network namespace and a host name per node, as two machines have; others get two
nodes on 127.0.0.1. Nothing is measured by time: tests wait for what is to happen.
"""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("node1", "node2")
SECONDS = 240.0  # for anything to happen; a start of Python with torch takes 5 on an idle core
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()
)
NOT_OURS = (  # of another job or launch
    *("SLURM", "SBATCH", "SALLOC", "ACCELERATE_", "TORCHELASTIC_", "PET_", "RANK", "LOCAL_"),
    *("WORLD_SIZE", "MASTER_", "GLOO_", "NCCL_", "MAIN_PROCESS_", "NPROC_PER_NODE", "PYTEST_"),
    *("MAX_RESTARTS", "LOG_DIR", "SETUP", "CONTAINER_", "APPTAINER_"),
)
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # Debian: not a user's

# cred_expire: a requeued job waits that long before it starts again (5 s is the least; the default is
# 120 s). Nothing here needs systemd or a control group.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={sockets}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={sockets}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=5,sched_min_interval=0
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
KillWait=30
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
BatchStartTimeout=60
InactiveLimit=0
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def until(
    happened: Callable[[], Any], said: Callable[[], str] = str, within: float = SECONDS
) -> None:
    """Wait for it; what was `said` is shown where it does not happen."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, f"not within {within:g} s:\n{said()}"
        time.sleep(0.3)


def missing_commands() -> list[str]:
    """Commands of SLURM that are not installed."""
    return [name for name in COMMANDS if not shutil.which(name, path=PATH)]


class Job:
    """A job, or one task of an array (`12_3`)."""

    def __init__(self, cluster: "Cluster", number: str) -> None:
        self.cluster, self.id = cluster, number

    def show(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ExitCode, StdOut ..."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split(" ") if "=" in word)

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT ..."""
        return self.show()["JobState"]

    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.show()["Restarts"])

    def minutes(self) -> int:
        """How long it has been running, rounded down."""
        days, _, clock = self.show()["RunTime"].rpartition("-")
        hours, minutes, _ = map(int, clock.split(":"))
        return int(days or 0) * 1440 + hours * 60 + minutes

    def log(self) -> str:
        """Its log: what the batch script and its steps have printed, of all attempts."""
        path = Path(self.show()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self, prefix: str = "bertdist: ") -> list[str]:
        """Lines of the log that start so, without the prefix."""
        lines = self.log().splitlines()
        return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

    def wait_until_running(self, attempt: int = 0) -> None:
        """Until it runs, after so many restarts."""
        until(lambda: self.has_ended() or self._runs(attempt), self.story)
        assert self._runs(attempt), self.story()

    def wait_for_log(self, words: str) -> None:
        """Until its log has these words; the job must not end without them."""
        until(lambda: words in self.log() or self.has_ended(), self.story)
        assert words in self.log(), self.story()

    def wait(self, within: float = SECONDS) -> str:
        """Its last state, once it has ended and is not queued again."""
        until(self.has_ended, self.story, within)
        return self.state()

    def signal(self, number: str = "USR1") -> None:
        """To the batch script, as SLURM does near the time limit (`sbatch --signal=B:USR1@120`)."""
        self.cluster.run("scancel", f"--signal={number}", "--batch", self.id)

    def cancel(self) -> None:
        """Plain `scancel`."""
        self.cluster.run("scancel", self.id)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those of it whose command line has all the words, on all nodes."""
        number = self.show()["JobId"]
        found = []
        for process, environ in self.cluster.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if environ.get("SLURM_JOB_ID") == number and all(word in line for word in words):
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of its run, by rank: those that a launcher has started, without loader workers."""
        found = {}
        for process in self.processes("python"):
            with contextlib.suppress(psutil.Error):
                environ, parent = process.environ(), process.parent()
                if "RANK" in environ and (not parent or "RANK" not in parent.environ()):
                    found[int(environ["RANK"])] = process
        return found

    def story(self) -> str:
        """For a test that fails."""
        return f"{self.show()}\n{self.log()}"

    def _runs(self, attempt: int) -> bool:
        shown = self.show()
        return shown["JobState"] == "RUNNING" and int(shown["Restarts"]) >= attempt

    def has_ended(self) -> bool:
        """Whether it has, and is not queued again."""
        return self.state() in ENDED


class Cluster:
    """Two nodes of four CPUs, in a folder. A job in the partition `urgent` preempts one in `main`."""

    def __init__(self, folder: Path) -> None:
        assert not set(str(folder)) & set(" #,=()[]"), f"slurm.conf cannot hold {folder}"
        self.folder = folder
        # a unix socket's path has at most 107 characters: munged's, and one for every step of a job
        self.sockets = Path(tempfile.mkdtemp(prefix="slurm"))
        self.config, self.net = folder / "slurm.conf", ""
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            for attempt in range(3):  # a port may have been taken by another process
                try:
                    self._start()
                    return self
                except AssertionError:
                    if attempt == 2:
                        raise
                    self._end_processes()
        except BaseException:
            self.stop()
            raise
        raise AssertionError

    def __exit__(self, *error: object) -> None:
        self.stop()

    # --- what tests do with it

    def environment(self, **more: str) -> dict[str, str]:
        """Of a user's shell: this Python first on PATH, this bertdist, no config of accelerate."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
        kept |= {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), PATH]),
            "PYTHONPATH": str(ROOT),
            "HF_HOME": "/nonexistent",
            "SLURM_CONF": str(self.config),
            "OMP_NUM_THREADS": "1",
        }
        here = {} if self.net else {"MAIN_PROCESS_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        return {**kept, **here, **more}

    def run(self, *words: str, cwd: Path | None = None, **more: str) -> str:
        """What a command prints, run beside the cluster as on a login node. It must succeed."""
        command = subprocess.run(
            words,
            cwd=cwd,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert command.returncode == 0, (words, command.stdout, command.stderr)
        return command.stdout

    def sbatch(
        self,
        script: str | Path,
        *args: str,
        cwd: Path,
        options: Sequence[str] = ("--cpus-per-task=1",),
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Queue a script: a path, or the name of one in launch/. Its log is written in `cwd`."""
        path = script if isinstance(script, Path) else ROOT / "launch" / script
        words = ["sbatch", "--parsable", *options, str(path), *args]
        return Job(self, self.run(*words, cwd=cwd, **(env or {})).strip())

    def nodes(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        return dict(line.split()[:2] for line in lines.splitlines())

    def processes(self, node: str | None = None) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """All of this cluster, or of one node, with their environments: daemons, steps, jobs."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environ = process.environ()
                ours = environ.get("SLURM_CONF") == str(self.config) and process.pid != os.getpid()
                if ours and (node is None or environ.get("SLURMD_NODENAME") == node):
                    yield process, environ

    def kill_node(self, node: str) -> None:
        """It loses power: its slurmd and all that runs there are gone at once."""
        self._end_processes(node)

    def start_node(self, node: str) -> None:
        """It comes back; returns when jobs can run there."""
        self._start_slurmd(node)
        until(lambda: self.nodes()[node] in ("idle", "mixed", "allocated"), self.said)

    def said(self) -> str:
        """The ends of the daemons' logs."""
        texts = {path.name: path.read_text(errors="replace") for path in self.folder.glob("*.log")}
        return "\n".join(f"--- {name}\n{text[-2000:]}" for name, text in sorted(texts.items()))

    def stop(self) -> None:
        """Everything, by the ids of its own processes: nothing of it is used again."""
        self._end_processes()
        if self.net:
            self._remove_network()
        shutil.rmtree(self.sockets, ignore_errors=True)

    # --- how it starts and ends

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        self.sockets.chmod(0o755)  # munged asks for it
        if not self.net and os.geteuid() == 0 and shutil.which("ip", path=PATH):
            self._make_network()
        self._write_config()
        self._start_munged()
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self._start_slurmd(node)
        until(self._is_idle, self.said, within=60)

    def _write_config(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(NODES))
        text = SLURM_CONF.format(
            host=host,
            address=f"{self.net}.1" if self.net else "127.0.0.1",
            port=ports[0],
            user=getpass.getuser(),
            sockets=self.sockets,
            folder=self.folder,
        )
        for number, (node, port) in enumerate(zip(NODES, ports[1:], strict=True)):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1"
            if self.net:
                where = f"NodeHostname={node} NodeAddr={self.net}.{11 + number}"
            text += f"NodeName={node} {where} Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN\n"
        self.config.write_text(text)
        # slurmd wants a plugin for control groups even where none is used: v1 touches nothing until
        # then, and from 24.05 on there is "disabled"
        version = subprocess.run(
            ["slurmctld", "-V"], env={"PATH": PATH}, capture_output=True, text=True, check=True
        ).stdout.split()[-1]
        new = tuple(map(int, version.split(".")[:2])) >= (24, 5)
        plugin = "disabled" if new else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start_munged(self) -> None:
        key = self.sockets / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(64))
        files = {
            "key-file": key,
            "socket": self.sockets / "munge",
            "pid-file": self.sockets / "pid",
        }
        files |= {"seed-file": self.sockets / "seed", "log-file": self.folder / "munged.log"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._spawn("munged", "munged", "--foreground", "--num-threads=2", *options)
        until((self.sockets / "munge").exists, self.said, within=20)

    def _start_slurmd(self, node: str) -> None:
        words = ["slurmd", "-D", "-N", node, "-f", str(self.config)]
        if self.net:  # with the name of the node, and addresses of the others
            inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
            enter = ["nsenter", f"--net=/run/netns/{self._namespace(node)}"]
            enter += ["unshare", "--uts", "--mount", "--propagation", "private"]
            words = [*enter, "sh", "-c", inside, "sh", node, str(self.folder / "hosts"), *words]
        self._spawn(node, *words, SLURMD_NODENAME=node)

    def _spawn(self, name: str, *words: str, **more: str) -> None:
        env = {"PATH": PATH, "HOME": "/", "LANG": "C.UTF-8", "SLURM_CONF": str(self.config), **more}
        with open(self.folder / f"{name}.out.log", "ab") as log:
            daemon = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        self._daemons.append(daemon)

    def _is_idle(self) -> bool:
        with contextlib.suppress(AssertionError):  # slurmctld does not listen yet
            return set(self.nodes().values()) == {"idle"}
        return False

    def _end_processes(self, node: str | None = None) -> None:
        """SIGKILL to those of the cluster or of a node, until none is left; daemons stop first, so
        that they start no more.
        """
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process, _ in self.processes(node):
                with contextlib.suppress(psutil.Error):
                    if number == signal.SIGKILL or process.name().startswith("slurm"):
                        process.send_signal(number)

        def nothing_left() -> bool:
            left = [process for process, _ in self.processes(node)]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            return not left

        until(nothing_left, within=30)
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10 if node is None else 0.1)  # no zombie remains

    # --- the network: a bridge on this machine, and a cable from it to each node

    def _namespace(self, node: str) -> str:
        return f"{self.sockets.name}-{node}"

    def _make_network(self) -> None:
        used = subprocess.run(
            ["ip", "-4", "addr"], env={"PATH": PATH}, capture_output=True, text=True
        )
        # 198.18.0.0/15 is for tests of networks (RFC 2544): no real one has it
        free = [f"198.{x}.{y}" for x in (18, 19) for y in range(256)]
        free = [net for net in free if f" {net}." not in used.stdout]
        self.net = random.SystemRandom().choice(free)
        bridge = self.sockets.name.removeprefix("slurm")  # names have at most 15 characters
        hosts = f"127.0.0.1 localhost\n{self.net}.1 {socket.gethostname().partition('.')[0]}\n"
        lines = [f"link add sl{bridge} type bridge", f"addr add {self.net}.1/24 dev sl{bridge}"]
        lines += [f"link set sl{bridge} up"]
        for number, node in enumerate(NODES):
            space, cable, address = (
                self._namespace(node),
                f"sl{bridge}{number}",
                f"{self.net}.{11 + number}",
            )
            lines += [
                f"netns add {space}",
                f"link add {cable} type veth peer name eth0 netns {space}",
                f"link set {cable} master sl{bridge} up",
                f"-n {space} link set lo up",
                f"-n {space} addr add {address}/24 dev eth0",
                f"-n {space} link set eth0 up",
            ]
            hosts += f"{address} {node}\n::ffff:{address} {node}\n"
        (self.folder / "hosts").write_text(hosts)
        try:
            for line in lines:
                _ip(line)
        except subprocess.CalledProcessError:  # a container may not
            self._remove_network()
            self.net = ""

    def _remove_network(self) -> None:
        for line in (
            *(f"netns del {self._namespace(node)}" for node in NODES),
            f"link del sl{self.sockets.name.removeprefix('slurm')}",
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(line)


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], env={"PATH": PATH}, check=True, capture_output=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
