"""Two machines whose network breaks: network namespaces with a wire between them, a host name each, and one folder that both see.

A process that is killed on one machine closes its connections; a machine that is lost, or a wire that is cut, does not. Needs the right to
make network namespaces (root) and `ip`; skipped elsewhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import run_ranks
from rows import EVERY_FAULT, assert_same_run, run_train, words_of, write_split

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(500)  # interpreters that start on a busy machine
SECONDS, PORT = 150, 29611  # of a namespace of our own: nobody else listens there
CADENCE = {
    "max_train_steps": 40,
    "save_every": "2 steps",
    "eval_every": "20 steps",
    "log_every": "2 steps",
}
SLOW = "1.0"  # seconds a step: the run is still there when the wire is cut, on any machine


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machines:
    """Two machines with a wire between them; their names carry the process number, so that tests can run side by side."""

    def __init__(self) -> None:
        self.names = [f"bd{os.getpid()}{letter}" for letter in "ab"]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip(
            "link",
            "add",
            "wire",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            second,
        )
        for number, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "lo", "up")
        self.plug()
        ip("netns", "exec", first, "unshare", "--uts", "hostname", "machine0")

    def plug(self) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "wire", "up")

    def cut(self) -> None:
        """No packet passes any more, in neither direction, and nobody is told."""
        ip("-n", self.names[0], "link", "set", "wire", "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Ranks:
    """A rank on each machine, as `srun` starts them."""

    def __init__(self, machines: Machines, words: list[str], folder: Path) -> None:
        self.pace = folder / "pace.txt"
        self.pace.write_text(SLOW)
        self.errors = [folder / f"error_{rank}.txt" for rank in range(2)]
        self.processes = []
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "ACCELERATE_", "RANK", "WORLD_SIZE"))
        }
        kept |= {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": "/nonexistent",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "wire",
        }
        kept |= {
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(PORT),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        for rank, name in enumerate(machines.names):
            command = [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "sh",
                "-c",
                f'hostname machine{rank} && exec "$@"',
                "sh",
            ]
            with open(self.errors[rank], "w") as error:
                command += [
                    sys.executable,
                    str(ROOT / "tests" / "slowed.py"),
                    str(self.pace),
                    "",
                    "--",
                    *words,
                ]
                # `ip netns exec`, unshare and sh all become the command: this process is the rank itself
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**kept, "RANK": str(rank)},
                        stdout=error,
                        stderr=error,
                        cwd=folder,
                        start_new_session=True,
                    )
                )

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, self.said()
            assert self.running(), self.said()
            time.sleep(0.05)

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def ended(self) -> list[int]:
        """Exit codes; from here on steps take no longer than they must."""
        self.pace.write_text("0")
        return [process.wait(SECONDS) for process in self.processes]

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.errors)

    def told(self) -> list[str]:
        """The lines for a person that say why the run has ended."""
        return [
            line
            for path in self.errors
            for line in path.read_text().splitlines()
            if line.startswith("bertdist: ")
        ]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, `ip` and `unshare` to make machines with a network of their own")
    made = Machines()
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        pytest.skip(f"no network namespaces can be made here: {error}")
    yield made
    made.remove()


@pytest.fixture
def start(machines: Machines, tiny_model: Path, tmp_path: Path) -> Iterator[Callable[[int], Ranks]]:
    """Starts a run in `out` with this --rank_timeout, and waits for its first checkpoint; none outlives the test."""
    all_started: list[Ranks] = []

    def started(rank_timeout: int) -> Ranks:
        ranks = Ranks(
            machines,
            words_of(
                tiny_model,
                tmp_path / "out",
                write_split(tmp_path, 40, 8),
                rank_timeout=rank_timeout,
                **CADENCE,
            ),
            tmp_path,
        )
        all_started.append(ranks)
        ranks.until(lambda: any((tmp_path / "out" / "checkpoints").glob("step_*")))
        return ranks

    yield started
    for ranks in all_started:
        ranks.kill()


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(
        2, run_train, words_of(tiny_model, folder / "out", write_split(folder, 40, 8), **CADENCE)
    )
    return folder / "out"


def test_a_machine_that_is_lost_is_named_and_nothing_is_lost(
    tiny_model: Path,
    tmp_path: Path,
    machines: Machines,
    start: Callable[[int], Ranks],
    straight: Path,
) -> None:
    """The other one hears nothing of it: it waits in a collective, and what it goes by is the silence of the lost rank's beat."""
    ranks = start(20)
    machines.cut()
    ranks.processes[1].kill()
    assert ranks.ended() == [1, -signal.SIGKILL]
    assert len(ranks.told()) == 1 and "rank 1 (process " in ranks.told()[0], ranks.said()
    assert "on machine1) has sent no heartbeat for " in ranks.told()[0]

    words = words_of(tiny_model, tmp_path / "out", write_split(tmp_path, 40, 8), **CADENCE)
    run_ranks(2, run_train, [*words, "--rank_timeout", "20"])  # on one machine now
    assert_same_run(tmp_path / "out", straight)


@pytest.mark.skipif(not EVERY_FAULT, reason="half a minute: with BERTDIST_EVERY_FAULT=1 only")
def test_a_wire_that_is_cut_ends_both_ranks(
    tmp_path: Path, machines: Machines, start: Callable[[int], Ranks]
) -> None:
    """Both machines are there and say so, and both wait: a collective that hangs."""
    ranks = start(8)
    machines.cut()
    assert ranks.ended() == [1, 1]
    assert (
        len(ranks.told()) == 1
        and "No rank has made progress for 8 s (--rank_timeout)" in ranks.told()[0]
    ), ranks.said()
    assert {path.name for path in (tmp_path / "out" / "stacks").iterdir()} == {
        "rank_0.txt",
        "rank_1.txt",
    }


@pytest.mark.skipif(not EVERY_FAULT, reason="half a minute: with BERTDIST_EVERY_FAULT=1 only")
def test_a_wire_that_is_mended_soon_changes_nothing(
    tmp_path: Path, machines: Machines, start: Callable[[int], Ranks], straight: Path
) -> None:
    ranks = start(60)
    machines.cut()
    time.sleep(3)
    assert ranks.running(), ranks.said()
    machines.plug()
    assert ranks.ended() == [0, 0], ranks.said()
    assert_same_run(tmp_path / "out", straight)
