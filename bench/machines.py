"""Two machines on one: network namespaces with a wire between them, for forked ranks (root only).

    with two_machines(relay=True) as machines:
        machines.set_network(Network(delay_ms=1, loss=0.01))
        machines.enter(rank)        # in a forked process, before it opens a connection

The wire is a veth pair, of a rate by `tc tbf`. Delay and loss are those of `relay`, a process that
passes IP packets of 1,500 bytes from one tun device to the other: not each kernel has `tc netem`.
"""

import ctypes
import fcntl
import heapq
import mmap
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.jobs import BenchError

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
WIRE, MTU = "wire", 1500
TOOLS = ("ip", "tc")


@dataclass(frozen=True)
class Network:
    """What a wire does to packets, in each direction."""

    mbit: float = 0.0  # rate; 0: as fast as the processors
    delay_ms: float = 0.0
    loss: float = 0.0  # share of packets

    def __str__(self) -> str:
        rate = f"{self.mbit / 1000:g} Gbit/s" if self.mbit >= 1000 else f"{self.mbit:g} Mbit/s"
        delay, loss = f"{self.delay_ms:g} ms", f"{self.loss:.0%} loss"
        words = [rate] * bool(self.mbit) + [delay] * bool(self.delay_ms) + [loss] * bool(self.loss)
        return ", ".join(words) or "as fast as the processors"


def run_tool(*words: str) -> None:
    """`ip` or `tc`; raises BenchError with its message."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


class Machines:
    """Two namespaces; their names carry the process number, so several pairs can exist."""

    def __init__(self, relay: bool) -> None:
        self.names = [f"bd{os.getpid()}{letter}" for letter in "ab"]
        self.has_relay, self._relay = relay, 0
        self._shared = memoryview(mmap.mmap(-1, 32)).cast("d")  # delay, loss, passed, dropped

    @property
    def passed(self) -> int:
        """Packets that the relay has passed on."""
        return int(self._shared[2])

    @property
    def dropped(self) -> int:
        """Packets that the relay has dropped."""
        return int(self._shared[3])

    def make(self) -> None:
        """Raises BenchError where that cannot be done here."""
        if os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
            raise BenchError("network namespaces need root, and `ip` and `tc` (package iproute2)")
        for name in self.names:
            run_tool("ip", "netns", "add", name)
        first, second = self.names
        if self.has_relay:
            self._start_relay()
        else:
            end = ["netns", first, "type", "veth", "peer", "name", WIRE, "netns", second]
            run_tool("ip", "link", "add", WIRE, *end)
        for number, name in enumerate(self.names):
            run_tool("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", WIRE)
            run_tool("ip", "-n", name, "link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        """Connect the wire."""
        for name in self.names:
            run_tool("ip", "-n", name, "link", "set", WIRE, "up")

    def cut(self) -> None:
        """No packet passes any more, in neither direction, and nobody is told."""
        run_tool("ip", "-n", self.names[0], "link", "set", WIRE, "down")

    def set_network(self, network: Network) -> None:
        """From now on. Delay and loss need the relay."""
        if (network.delay_ms or network.loss) and not self.has_relay:
            raise BenchError("a delay or loss needs the relay")
        self._shared[0], self._shared[1] = network.delay_ms / 1000, network.loss
        for name in self.names:
            with suppress(BenchError):  # there was none
                run_tool("tc", "-n", name, "qdisc", "del", "dev", WIRE, "root")
            if network.mbit:
                rate = ["rate", f"{network.mbit:g}mbit", "burst", "128kb", "latency", "50ms"]
                run_tool("tc", "-n", name, "qdisc", "add", "dev", WIRE, "root", "tbf", *rate)

    def enter(self, rank: int) -> None:
        """Move this process, which has one thread, to machine `rank`, with a host name of its own
        and gloo on the wire.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"/var/run/netns/{self.names[rank]}", os.O_RDONLY)
        if libc.setns(descriptor, CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise BenchError(f"cannot enter a namespace: {os.strerror(ctypes.get_errno())}")
        os.close(descriptor)
        socket.sethostname(f"machine{rank}")
        os.environ["GLOO_SOCKET_IFNAME"] = WIRE

    def remove(self) -> None:
        """Namespaces, wire and relay."""
        if self._relay:
            os.kill(self._relay, signal.SIGKILL)
            os.waitpid(self._relay, 0)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def _start_relay(self) -> None:
        ends = []
        for name in self.names:
            try:
                ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                flags = struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI)
                fcntl.ioctl(ends[-1], TUNSETIFF, flags)
            except OSError as error:
                raise BenchError(f"/dev/net/tun: {error.strerror}") from None
            run_tool("ip", "link", "set", name, "netns", name, "name", WIRE, "mtu", str(MTU))
        self._relay = os.fork()
        if not self._relay:
            with suppress(BaseException):
                relay(ends, self._shared)
            os._exit(1)
        for end in ends:
            os.close(end)


def relay(ends: list[int], shared: "memoryview[float]") -> None:
    """Pass packets between two tun devices until killed, late and not all.

    shared: (4,) delay in seconds, loss; packets passed, dropped.
    """
    waiting: list[tuple[float, int, int, bytes]] = []  # when, number, to, packet
    number, chance = 0, random.Random(0)
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], timeout)[0]:
            with suppress(BlockingIOError, OSError):
                while True:
                    packet = os.read(end, 65_536)
                    if chance.random() < shared[1]:
                        shared[3] += 1
                        continue
                    number += 1
                    target = ends[1 - ends.index(end)]
                    heapq.heappush(waiting, (time.monotonic() + shared[0], number, target, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(waiting)
            with suppress(OSError):  # the wire is cut
                os.write(target, packet)
                shared[2] += 1


@contextmanager
def two_machines(relay: bool = False) -> Iterator[Machines]:
    """Machines for the block; raises BenchError where they cannot be made."""
    machines = Machines(relay)
    try:
        machines.make()
        yield machines
    finally:
        machines.remove()
