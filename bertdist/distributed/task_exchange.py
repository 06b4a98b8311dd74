"""Questions of the first task of a SLURM step to all tasks, over one TCP connection each. No torch.

    with open_exchange(place, handlers, wait=30) as tasks:      # on task 0
        answers = tasks.ask("facts")         # {rank: Answer}; a task that is silent is left out
    serve(place, handlers, wait=30)          # on all others, until task 0 has ended

Every wait has a limit, and a task that misses one is not asked again. Nothing here depends on a
shared folder or on torch, which are what is examined.
"""

import errno
import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any, NamedTuple

from bertdist.core.errors import BertdistError

PORT_STEP, PORTS = 7, 3  # what is tried where the port of a launch is taken
CONNECT_SECONDS, RETRY_SECONDS = 3.0, 0.2
LONGEST_SILENCE = 900.0  # of task 0, which has limits of its own
MOST_BYTES = 1 << 20  # of a line

Handlers = Mapping[str, Callable[..., Any]]


class Place(NamedTuple):
    """A task in its step, and where the first task listens."""

    rank: int
    tasks: int
    address: str  # of the first task's host
    port: int  # of a launch; the next ones are tried if it is taken
    token: str  # the same in all tasks of a step, and in no other

    @property
    def ports(self) -> list[int]:
        """In the order in which they are tried."""
        return [self.port + PORT_STEP * i for i in range(PORTS)]


class Answer(NamedTuple):
    """What a handler returned, or the sentence of its error."""

    value: Any
    error: str = ""


class NotReached(BertdistError):
    """The first task cannot be reached."""


class Channel:
    """JSON lines over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._file: IO[bytes] = connection.makefile("rb")

    def send(self, message: Any, seconds: float) -> None:
        """Raises OSError."""
        self.connection.settimeout(seconds)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """Raises OSError, also for the end of the connection, and ValueError for other bytes."""
        self.connection.settimeout(seconds)
        line = self._file.readline(MOST_BYTES)
        if not line:
            raise ConnectionError("the connection was closed")
        return json.loads(line)

    def close(self) -> None:
        """Of a connection that may be broken."""
        with suppress(OSError):
            self._file.close()  # which keeps the connection open
            self.connection.close()


def answer_of(handlers: Handlers, name: str, options: Mapping[str, Any]) -> Answer:
    """Call a handler; its errors are answers too."""
    try:
        return Answer(handlers[name](**options))
    except Exception as error:  # shown by task 0, in its table
        return Answer(None, f"{type(error).__name__}: {error}")


class Exchange:
    """Task 0: its own handlers, and the connections to the other tasks."""

    def __init__(self, place: Place, handlers: Handlers, wait: float) -> None:
        self.place, self.wait = place, wait
        self._handlers = handlers
        self._channels: dict[int, Channel] = {}
        self.taken: list[int] = []  # ports on which another process listens
        self._server = self._listen()

    def __enter__(self) -> "Exchange":
        self._accept()
        return self

    def __exit__(self, *error: object) -> None:
        for channel in self._channels.values():
            channel.close()
        self._server.close()

    def _listen(self) -> socket.socket:
        for port in self.place.ports:
            try:
                return create_server(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise NotReached(f"Cannot listen on port {port}: {error.strerror}.") from None
                self.taken.append(port)
        raise NotReached(
            f"Other processes listen on ports {', '.join(map(str, self.taken))} of this host: end "
            "them, or start the job again, which has other ports."
        )

    def _accept(self) -> None:
        deadline = time.monotonic() + self.wait
        while len(self._channels) < self.place.tasks - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._server.settimeout(left)
            with suppress(OSError):
                connection, _ = self._server.accept()
                self._greet(Channel(connection))

    def _greet(self, channel: Channel) -> None:
        """Take a task of this step, and no other caller."""
        try:
            hello = channel.receive(CONNECT_SECONDS)
            rank = int(hello["rank"])
            if hello["token"] != self.place.token or not 0 < rank < self.place.tasks:
                raise ValueError("of another job")
            channel.send({"token": self.place.token}, CONNECT_SECONDS)
            self._channels[rank] = channel
        except (OSError, ValueError, KeyError, TypeError):
            channel.close()

    @property
    def ranks(self) -> list[int]:
        """The tasks that still answer."""
        return sorted([0, *self._channels])

    def ask(self, name: str, **options: Any) -> dict[int, Answer]:
        """The answers by rank, of all tasks at the same time."""
        return self.ask_each(name, dict.fromkeys(self.ranks, options))

    def ask_each(
        self, name: str, options: Mapping[int, Mapping[str, Any]], limit: float | None = None
    ) -> dict[int, Answer]:
        """options: rank -> arguments of the handler, for the tasks to ask. limit: seconds, else
        `wait`.
        """
        limit = self.wait if limit is None else limit
        for rank in [rank for rank in options if rank in self._channels]:
            try:
                self._channels[rank].send({"do": name, "options": dict(options[rank])}, limit)
            except OSError:
                self._drop(rank)
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + limit
        if 0 in options:
            answers[0] = answer_of(self._handlers, name, options[0])
        for rank in [rank for rank in options if rank in self._channels]:
            try:
                left = max(0.1, deadline - time.monotonic())
                answers[rank] = Answer(*self._channels[rank].receive(left))
            except (OSError, ValueError, TypeError):
                self._drop(rank)
        return answers

    def _drop(self, rank: int) -> None:
        self._channels.pop(rank).close()


def create_server(port: int) -> socket.socket:
    """A socket that listens on a port of all interfaces, as the store of torch does."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=4096)


def serve(place: Place, handlers: Handlers, wait: float) -> None:
    """Answer the first task until it ends. Raises NotReached."""
    channel = connect(place, wait)
    try:
        with suppress(OSError, ValueError, KeyError):  # task 0 has ended, and said why
            while True:
                question = channel.receive(LONGEST_SILENCE)
                answer = answer_of(handlers, question["do"], question["options"])
                channel.send(list(answer), wait)
    finally:
        channel.close()


def _is_greeted(channel: Channel, place: Place) -> bool:
    """Whether the first task of this step is at the other end."""
    try:
        channel.send({"token": place.token, "rank": place.rank}, CONNECT_SECONDS)
        return bool(channel.receive(CONNECT_SECONDS)["token"] == place.token)
    except BaseException:
        channel.close()
        raise


def connect(place: Place, wait: float) -> Channel:
    """The connection to the first task. Raises NotReached, with the reason."""
    deadline, reason = time.monotonic() + wait, ""
    while True:
        for port in place.ports:
            try:
                channel = Channel(socket.create_connection((place.address, port), CONNECT_SECONDS))
                if _is_greeted(channel, place):
                    return channel
                channel.close()
            except (OSError, ValueError, KeyError, TypeError) as error:
                if port == place.port or not reason:
                    reason = getattr(error, "strerror", None) or str(error) or "no answer"
        if time.monotonic() >= deadline:
            raise NotReached(
                f"Task {place.rank} on {socket.gethostname()} cannot reach the first task at "
                f"{place.address}, port {place.port}, within {wait:g} s: {reason}. Check the name "
                "of that host here (getent hosts), and its firewall; MAIN_PROCESS_IP gives "
                "another address."
            )
        time.sleep(RETRY_SECONDS)
