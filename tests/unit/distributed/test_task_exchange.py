"""Questions to tasks, which are threads here: all answers, and the names of those that are silent."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from bertdist.distributed import task_exchange
from bertdist.distributed.task_exchange import (
    PORT_STEP,
    Answer,
    Exchange,
    NotReached,
    Place,
    connect,
    create_server,
    serve,
)

HANDLERS: dict[str, Callable[..., Any]] = {
    "double": lambda number: 2 * number,
    "fail": lambda: [][0],
    "hang": lambda: time.sleep(5),
}


@pytest.fixture
def place() -> Place:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return Place(0, 3, "127.0.0.1", min(port, 65000), "job 7")


def start(*places: Place) -> list[threading.Thread]:
    tasks = [threading.Thread(target=serve, args=(x, HANDLERS, 10.0), daemon=True) for x in places]
    for task in tasks:
        task.start()
    return tasks


def test_every_task_answers_by_its_rank(place: Place) -> None:
    others = start(place._replace(rank=2), place._replace(rank=1))
    with Exchange(place, HANDLERS, 10.0) as tasks:
        assert tasks.ranks == [0, 1, 2] and tasks.taken == []
        assert tasks.ask("double", number=4) == dict.fromkeys(range(3), Answer(8))
        each = tasks.ask_each("double", {1: {"number": 1}, 2: {"number": 2}})
        assert each == {1: Answer(2), 2: Answer(4)}
        failed = tasks.ask("fail")
        assert failed[1] == Answer(None, "IndexError: list index out of range") == failed[0]
    for task in others:
        task.join(10)
        assert not task.is_alive()


def test_a_task_that_never_comes_is_missing(place: Place) -> None:
    start(place._replace(rank=2))
    with Exchange(place, HANDLERS, 0.5) as tasks:
        assert set(tasks.ask("double", number=1)) == {0, 2}


def test_a_task_that_becomes_silent_is_left_out_from_then_on(place: Place) -> None:
    start(place._replace(rank=1), place._replace(rank=2))
    with Exchange(place, HANDLERS, 10.0) as tasks:
        begin = time.monotonic()
        assert tasks.ask_each("hang", {1: {}}, 0.2) == {}
        assert time.monotonic() - begin < 4
        assert set(tasks.ask("double", number=1)) == {0, 2}


def test_strangers_are_no_tasks(place: Place) -> None:
    stranger = place._replace(rank=1, token="job 8")
    failed: list[str] = []

    def come() -> None:
        with pytest.raises(NotReached) as caught:
            connect(stranger, 0.3)
        failed.append(str(caught.value))

    thread = threading.Thread(target=come)
    thread.start()
    with Exchange(place, HANDLERS, 0.6) as tasks:
        assert tasks.ranks == [0]
    thread.join(10)
    assert failed and f"at 127.0.0.1, port {place.port}, within 0.3 s" in failed[0]


def test_a_port_that_is_taken_is_named_and_the_next_one_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_exchange, "CONNECT_SECONDS", 0.3)  # who listens says nothing
    start(place._replace(rank=1), place._replace(rank=2))
    with create_server(place.port), Exchange(place, HANDLERS, 10.0) as tasks:
        assert tasks.taken == [place.port] and tasks.ranks == [0, 1, 2]


def test_all_ports_taken_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_exchange, "PORTS", 2)
    with (
        create_server(place.port),
        create_server(place.port + PORT_STEP),
        pytest.raises(
            NotReached, match=f"listen on ports {place.port}, {place.port + PORT_STEP} of"
        ),
    ):
        Exchange(place, HANDLERS, 1.0)


def test_nobody_listens(place: Place) -> None:
    with pytest.raises(NotReached, match=r"^Task 5 on .* cannot reach .*: Connection refused"):
        connect(place._replace(rank=5), 0.1)
    with pytest.raises(NotReached, match=r"no\.such\.host\.invalid"):
        connect(place._replace(address="no.such.host.invalid"), 0.1)
