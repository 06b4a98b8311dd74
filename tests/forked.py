"""Real ranks, cheaply: forked processes of one gloo group, each with its own `Accelerator(cpu=True)`; 3 ranks take under a second.

    from forked import run_ranks

    def test_every_row_once(...):
        def rows_seen(accelerator: Accelerator) -> list[int]: ...
        assert run_ranks(2, rows_seen) == [[0, 2], [1, 3]]

The function runs in the children only; what it returns comes back by pickle, in rank order. A child is a fork of the test: it
sees the test's variables, and nothing that it changes is seen by the test. One rank runs in a child too, so that accelerate's
process-wide state never reaches the next test.

`Command(main, words)` is a command in a fork: subprocess.Popen without the seconds in which an interpreter imports torch.
`ForkedPython` is the same for what a launcher starts: `python SCRIPT WORDS`.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

LAUNCHER_WORDS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
GRACE_SECONDS = 3.0  # after one rank has failed, the others get so long to fail by themselves
TO_TELL = 60.0  # the same, where a test looks at what they have to say: on a crowded machine it takes long


class RankError(Exception):
    """A rank raised, was killed, or did not end in time; the text holds every failed rank's traceback, the first to fail first."""


def run_ranks(
    n: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 100.0,
    grace: float = GRACE_SECONDS,
    enter: Callable[[int], object] | None = None,
) -> list[Any]:
    """Call `function(accelerator, *args)` on `n` ranks; the results by rank. Raises RankError; returns within `timeout` seconds.

    Where a rank fails, the others have `grace` seconds to end. enter: called with the rank in each, before it opens a connection.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running: dict[int, int] = {}  # rank -> process id
        try:
            for rank in range(n):
                pid = _fork()
                if pid == 0:
                    _be_a_rank(rank, n, folder, function, args, timeout, enter)
                running[rank] = pid
            failures = _wait(running, folder, timeout, grace)
        finally:
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if failures:
            raise RankError(
                "\n".join(f"rank {rank} of {n}: {text}" for rank, text in failures.items())
            )
        return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(n)]


class Command:
    """`main()` with `words` as sys.argv, in a fork that is like a process of its own: another session, environment and folder, its
    output in files (errors=None: in the same), and the exit code that Python would have.
    """

    def __init__(
        self,
        main: Callable[[], Any],
        words: Sequence[str],
        output: Path,
        env: Mapping[str, str] = os.environ,
        errors: Path | None = None,
        cwd: Path | str = ".",
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = _fork()
        if self.pid == 0:
            os.setsid()
            wanted = dict(env)
            os.environ.clear()
            os.environ.update(wanted)
            sys.argv = list(words)
            _end_as_python_does(lambda: _run_as_command(main, output, errors or output, cwd))

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = 100.0) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout:g} s"
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkedPython(subprocess.Popen[bytes]):
    """subprocess.Popen, but `python SCRIPT WORDS` is a fork of this process; other commands are started as they are."""

    def __init__(self, args: Any, env: Mapping[str, str] | None = None, **settings: Any) -> None:
        self._env, self._session = env, settings.get("start_new_session", False)
        super().__init__(args, env=env, **settings)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words = [word for word in args if word != "-u"]
        if words[0] != sys.executable or not words[1].endswith(".py"):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self.pid = _fork()
        if self.pid == 0:
            _be_a_python(words[1:], self._env or os.environ, self._session)
        self._child_created = True


def _be_a_python(words: list[str], env: Mapping[str, str], new_session: bool) -> NoReturn:
    """What exec and the start of an interpreter would do; output goes where the parent's goes."""
    if new_session:
        os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # a handler of the launcher
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = dict(env)
    os.environ.clear()
    os.environ.update(wanted)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    _end_as_python_does(lambda: runpy.run_path(words[0], run_name="__main__"))


def _run_as_command(main: Callable[[], Any], output: Path, errors: Path, cwd: Path | str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [os.open(os.devnull, os.O_RDONLY), os.open(output, flags), os.open(errors, flags)]
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, 1, closefd=False) for number, mode in enumerate("rww")
    )
    os.chdir(cwd)
    main()


def _end_as_python_does(main: Callable[[], Any]) -> NoReturn:
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _fork() -> int:
    with warnings.catch_warnings():  # Python 3.12 warns of any fork of a process that has threads
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        gc.freeze()  # what the test has imported: each collection would walk it for half a second
    return pid


def _be_a_rank(
    rank: int,
    n: int,
    folder: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    enter: Callable[[int], object] | None,
) -> NoReturn:
    """The child's whole life. It ends by `os._exit`: pytest's own clean-up belongs to the parent."""
    code = 1
    with contextlib.suppress(BaseException), open(folder / f"stack_{rank}", "w") as stack:
        faulthandler.enable(
            file=stack
        )  # SIGABRT, which the parent sends to a rank that hangs, writes where it stands
        try:
            if enter is not None:
                enter(rank)
            result = pickle.dumps(function(_accelerator(rank, n, folder, timeout), *args))
            (folder / f"result_{rank}").write_bytes(result)
            code = 0
        except BaseException:  # SystemExit of a main() too: the parent must hear of everything
            (folder / f"error_{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _accelerator(rank: int, n: int, folder: Path, timeout: float) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for word in LAUNCHER_WORDS:
        os.environ.pop(word, None)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    if n > 1:  # one rank is what `python train.py` is: no group at all
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR="127.0.0.1",
        )
        if sys.platform == "linux":
            os.environ.setdefault(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # the machine's own name may not resolve
        # A file to meet at, not a port: two tests at once cannot take each other's.
        meeting = f"file://{folder / 'meeting'}"
        torch.distributed.init_process_group(
            "gloo", meeting, datetime.timedelta(seconds=timeout), world_size=n, rank=rank
        )
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == n and accelerator.process_index == rank, accelerator.state
    return accelerator


def _wait(running: dict[int, int], folder: Path, timeout: float, grace: float) -> dict[int, str]:
    """Reap the ranks, at the latest after `timeout`; what each failed one has to say, in the order of failing."""
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    late = f"did not end within {timeout:g} s"
    while running:
        if time.monotonic() > deadline:
            failures |= _abort(running, folder, late)
            break
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del running[rank]
            if status or not (folder / f"result_{rank}").exists():
                error, code = folder / f"error_{rank}", os.waitstatus_to_exitcode(status)
                failures[rank] = (
                    error.read_text(encoding="utf-8")
                    if error.exists()
                    else f"ended with status {code}"
                )
                if time.monotonic() + grace < deadline:
                    deadline, late = (
                        time.monotonic() + grace,
                        f"still ran {grace:g} s after rank {rank} had failed",
                    )
        time.sleep(0.002)
    return _in_order_of_failing(failures, folder)


def _abort(running: dict[int, int], folder: Path, why: str) -> dict[int, str]:
    for pid in running.values():
        os.kill(pid, signal.SIGABRT)
    for pid in running.values():
        for _ in range(100):  # a rank that ignores SIGABRT is killed after a second
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0.01)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    said = {
        rank: f"{why}; it stood at\n{(folder / f'stack_{rank}').read_text(encoding='utf-8')}"
        for rank in running
    }
    running.clear()
    return said


def _in_order_of_failing(failures: dict[int, str], folder: Path) -> dict[int, str]:
    def moment(rank: int) -> float:
        error = folder / f"error_{rank}"
        return error.stat().st_mtime if error.exists() else float("inf")

    killed = {rank: text for rank, text in failures.items() if text.startswith("ended with status")}
    return killed | dict(sorted(failures.items(), key=lambda item: moment(item[0])))
