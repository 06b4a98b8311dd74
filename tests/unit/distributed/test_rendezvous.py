"""Ranks meet within a stated time; who does not come, and a port that is taken, are named."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from bertdist.distributed import rendezvous as arrival
from bertdist.distributed.heartbeat import this_rank
from bertdist.distributed.rendezvous import left, wait_for_all_ranks

ROOT = Path(__file__).resolve().parents[3]
# In a process of its own: torch's stores leave threads behind.
MEET = """
import os, sys
from datetime import timedelta
from bertdist.distributed.rendezvous import wait_for_all_ranks
from bertdist.core.errors import BertdistError
try:
    store = wait_for_all_ranks(timedelta(seconds=float(sys.argv[1])))
    print("met" if store else "alone")
    sys.stdin.read()  # the store goes with this process
except BertdistError as error:
    print(error if not error.already_printed else "silent")
    sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def placed(rank: int, of: int, port: int) -> dict[str, str]:
    """The environment of a rank."""
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(of),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {**plain, "PYTHONPATH": str(ROOT), **place}


def said(ranks: list[int], of: int, port: int, seconds: float = 3) -> list[str]:
    """What these ranks have to say of their meeting."""
    pipe, words = subprocess.PIPE, [sys.executable, "-c", MEET, str(seconds)]
    running = []
    for rank in ranks:
        env = placed(rank, of, port)
        running.append(
            subprocess.Popen(
                words, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        )
    found = []
    for run in running:
        assert run.stdout is not None
        found.append(run.stdout.readline().strip())
    for run in running:
        run.communicate(timeout=60)
    return found


def test_ranks_that_all_come_meet() -> None:
    assert said([0, 1, 2], 3, free_port(), 60) == ["met"] * 3


def test_who_does_not_arrive_is_named_once() -> None:
    port, host = free_port(), socket.gethostname()
    first, third = said([0, 2], 4, port, 15)
    assert first == (
        f"Rank 1, 3 of 4 did not arrive at 127.0.0.1:{port} within 15 s (--rank_timeout). Here are: rank 0 (on {host}), rank 2 (on {host})."
    )
    assert third == "silent"


def test_a_missing_first_rank_is_named() -> None:
    port = free_port()
    (found,) = said([1], 2, port, 2)
    assert found.startswith(
        f"rank 1 of 2 (on {socket.gethostname()}): rank 0 has not arrived at 127.0.0.1:{port} within 2 s"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_is_taken_is_named(rank: int) -> None:
    """By a program that takes connections and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (found,) = said([rank], 2, port := other.getsockname()[1], 2)
    assert (
        found.startswith(f"Ranks cannot meet at 127.0.0.1:{port}: ")
        and "give another one (--main_process_port to" in found
    )


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {"RANK": "zero"},
    ],
)
def test_one_rank_meets_nobody(words: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert wait_for_all_ranks(timedelta(seconds=1)) is None


def test_a_first_rank_that_is_killed_before_all_have_met_is_told() -> None:
    port, pipe, words = free_port(), subprocess.PIPE, [sys.executable, "-c", MEET, "60"]
    first, second = (
        subprocess.Popen(
            words,
            env=placed(rank, 3, port),
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    )
    TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60)).wait(["bertdist/0/1"])
    first.kill()
    told, _ = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (
        told
        == f"rank 1 of 3: rank 0 has left before all had met at 127.0.0.1:{port}; its own message says more.\n"
    )


def test_who_is_gone_is_told_by_the_lowest_rank_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me, parent = this_rank(1), psutil.Process().parent()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = replace(me, rank=2, pid=child.pid)
    alive = replace(me, rank=0, pid=parent.pid, born=parent.create_time())
    elsewhere = replace(dead, rank=3, host="elsewhere")
    for met, found in (
        ([dead, me], ([dead], True)),
        ([alive, me, dead], ([dead], False)),
        ([me, elsewhere], ([], True)),
        ([], ([], True)),
    ):
        monkeypatch.setattr(arrival, "_met", met)
        assert left(0.2) == found
