"""The watchdog on a shared disk that is slow, hangs, and shows files of other machines late: no false alarm, and a dead rank is
named all the same. Time is simulated: an hour of four ranks takes milliseconds, and --rank_timeout is what users have.
"""

import heapq
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from bertdist.distributed import watchdog
from bertdist.distributed.watchdog import FailureReport, Heartbeat, HeartbeatFiles, Watchdog

STALE, DELAY, HANG = 60.0, 2.0, 90.0  # seconds: the longest cache of NFS, a busy server, a restart
HANGS = range(300, 2400, 127)  # at other moments of what is cached for 60 s
Progress = Callable[[int, float], float]  # rank, now -> when it last made progress


@dataclass
class Ended:
    """A rank that its watchdog has ended."""

    seconds: float
    rank: int
    report: FailureReport


@dataclass
class Cluster:
    """Ranks, `per_machine` on each, and the disk between them."""

    folder: Path
    timeout: float
    ranks: int = 4
    per_machine: int = 2
    stale: float = STALE
    delay: float = DELAY
    hanging: tuple[int, ...] = ()  # machines whose disk hangs for HANG seconds, in HANGS
    lost: dict[int, float] = field(default_factory=dict)  # rank -> when it dies
    now: float = 0.0
    reader: int = 0  # rank
    in_pool: bool = False
    versions: dict[str, list[tuple[float, bytes]]] = field(default_factory=dict)
    cache: dict[tuple[int, str], tuple[float, bytes | None]] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)  # files that can be read half only

    def machine(self, rank: int) -> int:
        return rank // self.per_machine

    def wait_for_disk(self, times: int = 1) -> None:
        if self.machine(self.reader) in self.hanging:
            ends = [start + HANG for start in HANGS if start <= self.now < start + HANG]
            self.now = max([self.now, *ends])
        self.now += self.delay * times

    def keep(self, name: str) -> None:
        """What a rank has written, for those who read it late."""
        path = self.folder / ".ranks" / name
        if path.exists():
            self.versions.setdefault(name, []).append((self.now, path.read_bytes()))

    def read(self, path: Path) -> bytes:
        if not self.in_pool:
            self.wait_for_disk()
        name = path.name
        writer = int(name[5:-5]) if name.startswith("rank_") else self.reader
        machine = self.machine(self.reader)
        if self.now >= self.cache.get((machine, name), (0.0, None))[0]:
            seen = [content for time, content in self.versions.get(name, []) if time <= self.now]
            valid = 0.0 if self.machine(writer) == machine else self.stale
            self.cache[machine, name] = self.now + valid, seen[-1] if seen else None
        content = self.cache[machine, name][1]
        if content is None:  # that too is kept for a while
            raise FileNotFoundError(name)
        return content[:99] if name in self.torn else content

    def run(self, progress: Progress, seconds: float) -> list[Ended]:
        """Who is ended by its watchdog within `seconds`."""
        accelerator = SimpleNamespace(num_processes=self.ranks, device=torch.device("cpu"))
        dogs, ended = {}, list[Ended]()
        for rank in range(self.ranks):
            accelerator.process_index = rank
            dog: Any = Watchdog(self.folder, accelerator, self.timeout, "this start")
            dog.files.own = replace(
                dog.files.own, pid=100 + rank, host=f"machine{self.machine(rank)} x"
            )
            dogs[rank] = dog
        queue = [(0.1 * rank, rank, 0.0) for rank in dogs]
        while queue:
            self.now, rank, previous = heapq.heappop(queue)
            if self.now > seconds or self.now >= self.lost.get(rank, seconds + 1):
                continue
            self.reader, dog, start = rank, dogs[rank], self.now

            def check_progress(now: float, elapsed: float, rank: int = rank) -> None:
                dogs[rank]._progress_at = progress(rank, now)

            def exit_process(report: FailureReport, rank: int = rank) -> None:
                ended.append(Ended(self.now, rank, report))
                self.lost[rank] = self.now
                raise SystemExit

            dog._check_progress, dog._exit_process = check_progress, exit_process
            try:
                dog._heartbeat(start, start - previous)
            except SystemExit:
                continue
            heapq.heappush(queue, (self.now + dog.interval, rank, start))
        return ended


class Pool:
    """ThreadPoolExecutor, in simulated time."""

    cluster: Cluster

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[[int], Heartbeat | None], ranks: Any) -> list[Any]:
        self.cluster.wait_for_disk(-(-len(ranks) // self.threads))
        self.cluster.in_pool = True
        found = [function(rank) for rank in ranks]
        self.cluster.in_pool = False
        return found


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made = Cluster(tmp_path, 600.0)
    Pool.cluster = made
    write, report_once = HeartbeatFiles.write, HeartbeatFiles.report_once

    def write_late(self: HeartbeatFiles, **changes: Any) -> None:
        write(self, **changes)
        made.wait_for_disk()
        made.keep(f"rank_{self.own.rank}.json")

    def report_late(self: HeartbeatFiles, kind: str, text: str) -> FailureReport:
        report = report_once(self, kind, text)
        made.wait_for_disk()
        if report.should_print:
            made.keep("failure.json")
        return report

    monkeypatch.setattr(HeartbeatFiles, "write", write_late)
    monkeypatch.setattr(HeartbeatFiles, "report_once", report_late)
    monkeypatch.setattr(watchdog, "read_bytes", made.read)
    monkeypatch.setattr(watchdog, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(
        watchdog, "is_alive", lambda pid, start: made.now < made.lost.get(pid - 100, 1e9)
    )
    clock = SimpleNamespace(monotonic=lambda: made.now, time=lambda: -made.now, sleep=None)
    monkeypatch.setattr(watchdog, "time", clock)
    yield made


def wait_for_rank_3(rank: int, now: float) -> float:
    """All wait for rank 3, which computes: no collective ends."""
    return now if rank == 3 else 0.0


def hang_at_100(rank: int, now: float) -> float:
    return min(now, 100.0)


def one_message(ended: list[Ended]) -> FailureReport:
    (printed,) = {x.rank: x.report for x in ended if x.report.should_print}.values()
    return printed


# --- no false alarm


@pytest.mark.parametrize("timeout", [130.0, 200.0, 600.0])
@pytest.mark.parametrize("hanging", [(), (0,), (1,), (0, 1)])
def test_a_slow_disk_is_no_dead_rank(
    cluster: Cluster, timeout: float, hanging: tuple[int, ...]
) -> None:
    cluster.timeout, cluster.hanging = timeout, hanging
    assert cluster.run(wait_for_rank_3, 2400) == []


def test_half_of_rank_timeout_would_not_be_enough(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule that was there before."""
    cluster.timeout, cluster.hanging = 130.0, (1,)
    monkeypatch.setattr(watchdog, "silence_limit", lambda timeout: timeout / 2)
    ended = cluster.run(wait_for_rank_3, 2400)
    assert "has sent no heartbeat for" in one_message(ended).text


@pytest.mark.parametrize("seconds", [60.0, 110.0])
def test_a_rank_that_was_blocked_and_moves_again_is_no_hang(
    cluster: Cluster, seconds: float
) -> None:
    """It is seen as it was a minute ago: blocked for more than half of --rank_timeout."""
    cluster.timeout = 120.0

    def progress(rank: int, now: float) -> float:
        return 0.0 if rank != 3 else 0.0 if now < seconds else now

    assert cluster.run(progress, 1200) == []


def test_a_heartbeat_that_cannot_be_read_is_the_last_one_that_could(cluster: Cluster) -> None:
    """Not no rank at all: then `all` of none would make no progress."""
    cluster.timeout, cluster.stale = 60.0, 0.0

    def progress(rank: int, now: float) -> float:
        cluster.torn = {"rank_3.json"} if 55 < now < 90 else set()
        return wait_for_rank_3(rank, now)

    assert cluster.run(progress, 600) == []


def test_files_of_an_earlier_start_are_not_this_run_s(cluster: Cluster) -> None:
    """They were removed on another machine, and are still shown here."""
    old = HeartbeatFiles(cluster.folder, 2, 4, "earlier start")
    old.own = replace(old.own, host="machine1 x")
    old.write(final_error="KeyError: 'x'")
    old.report_once("lost", "rank 2 is gone")
    for name in ("rank_2.json", "failure.json"):
        path = cluster.folder / ".ranks" / name
        cluster.cache[0, name] = STALE, path.read_bytes()
    assert cluster.run(wait_for_rank_3, 600) == []


@pytest.mark.parametrize("name", ["rank_2.json", "failure.json"])
def test_files_of_this_start_are(cluster: Cluster, name: str) -> None:
    """The control of the one above."""
    own = HeartbeatFiles(cluster.folder, 2, 4, "this start")
    own.own = replace(own.own, host="machine1 x")
    own.write(final_error="KeyError: 'x'")
    own.report_once("lost", "rank 2 is gone")
    cluster.cache[0, name] = STALE, (cluster.folder / ".ranks" / name).read_bytes()
    cluster.lost[2] = 0.0
    ended = cluster.run(wait_for_rank_3, 600)
    assert ended and ("KeyError" in ended[0].report.text or "is gone" in ended[0].report.text)


# --- a dead rank is named, a hang is one


@pytest.mark.parametrize("timeout", [130.0, 600.0])
def test_a_lost_machine_is_named_once(cluster: Cluster, timeout: float) -> None:
    cluster.timeout, cluster.lost = timeout, {2: 100.0, 3: 100.0}
    ended = cluster.run(hang_at_100, 4000)
    assert {x.rank for x in ended} == {0, 1} and {x.report.kind for x in ended} == {"lost"}
    text = one_message(ended).text
    assert "rank 2 (process 102 on machine1) has sent no heartbeat for" in text and "rank 3" in text
    # Each look at the others counts at most two intervals; it takes up to 11 s here.
    limit = watchdog.silence_limit(timeout)
    assert limit < ended[0].seconds - 100 < 1.5 * limit + STALE + 30


def test_a_killed_rank_is_named_on_its_machine_soon(cluster: Cluster) -> None:
    cluster.lost = {1: 100.0}
    ended = cluster.run(hang_at_100, 2000)
    assert {x.rank for x in ended} == {0, 2, 3} and ended[0].rank == 0
    assert one_message(ended).text.startswith("rank 1 (process 101 on machine0) is gone")
    assert ended[0].seconds < 150, "its machine knows at once"
    assert ended[-1].seconds < ended[0].seconds + STALE + 20, "the others when they see the report"


def test_a_hang_is_reported_once(cluster: Cluster) -> None:
    ended = cluster.run(hang_at_100, 2000)
    assert {x.rank for x in ended} == {0, 1, 2, 3} and {x.report.kind for x in ended} == {"hang"}
    assert "No rank has made progress for 600 s" in one_message(ended).text
    assert 700 <= ended[0].seconds <= ended[-1].seconds < 700 + STALE + 30


# --- how others are read, and told


@pytest.mark.parametrize(("readers", "seconds"), [(32, 32.0), (1, 1022.0)])
def test_heartbeats_of_many_ranks_are_read_side_by_side(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, readers: int, seconds: float
) -> None:
    """511 in half a minute, where one after the other takes 17."""
    monkeypatch.setattr(watchdog, "READERS", readers)
    HeartbeatFiles(cluster.folder, 0, 512).others()
    assert cluster.now == seconds


def test_a_link_whose_answer_was_lost_is_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats the request, and the second one finds the file there: else no rank would print."""
    first, second = (HeartbeatFiles(tmp_path, rank, 2) for rank in range(2))
    link = os.link

    def linked_twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    first.write()
    monkeypatch.setattr(watchdog.os, "link", linked_twice)
    assert first.report_once("lost", "rank 1 is gone").should_print
    monkeypatch.setattr(watchdog.os, "link", link)
    assert not second.report_once("lost", "rank 0 is gone").should_print


def test_a_clock_that_is_set_kills_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """create_time() is a time of day, which moves with the clock; so does the time of the boot."""
    own = psutil.Process()
    start, created, booted = watchdog.start_of(own), own.create_time(), psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: booted + 5)
    assert abs(psutil.Process().create_time() - created) > 4, "the control"
    assert watchdog.is_alive(own.pid, start) and not watchdog.is_alive(own.pid, start - 5)


@pytest.mark.parametrize("silent", [True, False])
def test_of_ranks_elsewhere_the_silent_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """A connection broke, and no rank has said why."""
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=3, device=torch.device("cpu"))
    dog = Watchdog(tmp_path, accelerator, 0.1)
    others = [HeartbeatFiles(tmp_path, rank, 3) for rank in (1, 2)]
    for each in others:
        each.own = replace(each.own, host=f"machine{each.own.rank} x", pid=7)
        each.write()
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 1.0
        for each in others[silent:]:
            each.write()

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(watchdog, "time", clock)
    text = str(dog._explain_lost_connection("Connection closed by peer"))
    rank_1, rank_2 = (f"rank {rank} (process 7 on machine{rank}), after step 0" for rank in (1, 2))
    alone = f"without a heartbeat since then: {rank_1}."
    assert (alone if silent else f"on other machines: {rank_1}, {rank_2}.") in text
