"""Ranks meet before they form a group: whoever does not come, and a port that is taken, are named within --rank_timeout.

In: what the launcher wrote into the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Out: the store in which all have signed, to
be kept until the group stands; or a ConfigError. torch itself says only how many are missing, or a host and a port. Each rank remembers
whom it has met: where a connection breaks and no watchdog looks (in the first seconds of a run, in prediction), `left` says who is gone.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from bertdist.core.errors import ConfigError
from bertdist.distributed.heartbeat import Heartbeat, is_alive, this_host, this_rank

_met: list[Heartbeat] = []  # the ranks of the last meeting, in order, this one among them


def wait_for_all_ranks(limit: timedelta) -> TCPStore | None:
    """Sign, and wait for the others to sign; None where there are none, or where a group stands already. Raises ConfigError."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    host = os.environ.get("MASTER_ADDR", "")
    if not host or not all(word.isdecimal() for word in words) or dist.is_initialized():
        return None
    rank, ranks, port = map(int, words)
    if ranks == 1:
        return None
    agents = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )  # torchrun's agent keeps the store, not rank 0
    seconds = limit.total_seconds()
    signed = [
        f"bertdist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{other}"
        for other in range(ranks)
    ]
    keeps = rank == 0 and not agents
    if not keeps and not _is_open(host, port, seconds):
        who = "torchrun's agent is not" if agents else "rank 0 has not arrived"
        found = ConfigError(
            f"rank {rank} of {ranks} (on {socket.gethostname()}): {who} at {host}:{port} within {seconds:g} s (--rank_timeout). "
            "Its own message, or the launcher's, says more."
        )
        found.on_all_ranks, found.already_printed = False, rank > (0 if agents else 1)
        raise found
    store = _in_time(
        lambda: TCPStore(host, port, None, keeps, limit, wait_for_workers=False, multi_tenant=True),
        host,
        port,
        seconds,
    )
    store.set(signed[rank], json.dumps(asdict(this_rank(rank))))
    try:
        store.wait(signed, limit)
        _met[:] = [Heartbeat(**json.loads(card)) for card in store.multi_get(signed)]
    except (dist.DistError, RuntimeError):
        raise _absent(store, signed, f"{host}:{port}", seconds, rank) from None
    return store


def left(seconds: float) -> tuple[list[Heartbeat], bool]:
    """Those of this machine that have met and ended since, looked for during so many seconds; and whether this rank should tell it."""
    here = [beat for beat in _met if beat.host == this_host()]
    deadline = time.monotonic() + seconds
    while (
        not (gone := [beat for beat in here if not is_alive(beat.pid, beat.born)])
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    first = next((beat.pid for beat in here if beat not in gone), os.getpid())
    return gone, not gone or first == os.getpid()


def _is_open(host: str, port: int, seconds: float) -> bool:
    """Whether somebody listens there within so many seconds. torch asks too, for twice as long and with a page of C++ frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(
                (host, port), timeout=max(0.1, deadline - time.monotonic())
            ).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def _in_time(open_store: Callable[[], TCPStore], host: str, port: int, seconds: float) -> TCPStore:
    """The store, or a ConfigError: torch waits for ever for the answer of a program that takes the connection and says nothing."""
    found: list[TCPStore | Exception] = []

    def try_it() -> None:
        try:
            found.append(open_store())
        except (dist.DistError, RuntimeError) as error:
            found.append(error)

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(seconds)
    store = found[0] if found else TimeoutError("what listens there does not answer")
    if not isinstance(store, Exception):
        return store
    raise ConfigError(
        f"Ranks cannot meet at {host}:{port}: {str(store).splitlines()[0]}. The port may be in use, by another run perhaps: give "
        "another one (--main_process_port to `accelerate launch`, --master_port to torchrun, or MASTER_PORT)."
    ) from None


def _absent(
    store: TCPStore, signed: list[str], address: str, seconds: float, rank: int
) -> ConfigError:
    """Who has not signed. The lowest rank that has tells it."""
    try:
        missing = [other for other, key in enumerate(signed) if not store.check([key])]
        cards = [
            Heartbeat(**json.loads(store.get(key)))
            for other, key in enumerate(signed)
            if other not in missing
        ]
        here = [f"rank {beat.rank} (on {beat.host.split(' ')[0]})" for beat in cards]
    except (
        dist.DistError,
        RuntimeError,
    ):  # rank 0, which keeps the store, was killed, or has told it and left
        found = ConfigError(
            f"rank {rank} of {len(signed)}: rank 0 has left before all had met at {address}; its own message says more."
        )
        found.on_all_ranks, found.already_printed = False, rank != 1
        return found
    who = ", ".join(map(str, missing[:20])) + (
        f", ... ({len(missing)} in all)" if len(missing) > 20 else ""
    )
    where = f"{address} within {seconds:g} s (--rank_timeout)"
    found = ConfigError(
        f"Rank {who} of {len(signed)} did not arrive at {where}. Here are: {', '.join(here[:20])}."
    )
    found.on_all_ranks, found.already_printed = (
        False,
        rank in missing or any(other not in missing for other in range(rank)),
    )
    return found
