"""When to stop, and whether the launch kept its promise: the only module that knows who started this process.

In: signals, the time limit of a SLURM job, and what SLURM, MPI or `accelerate launch` wrote into the environment or on
their command line. Out: one answer that is the same on every rank (`StopSignal.requested`), or a ConfigError (`check_world`).
It is one module because all of it is about the world outside: everything else in the package can be tested without it.

Requeueing is not here: launch/train.slurm does it, after this process has written `preempted` to status.json and left.
"""

import io
import os
import re
import signal
import threading
import time
from contextlib import redirect_stderr
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# One of these is in the environment where the parent is torchrun or `accelerate launch`: killed, it leaves its ranks behind, which nobody
# would end or start again. The parent of any other run may go: a shell, nohup.
LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}

# (this process, its parent) from the start: a launcher may be killed before there is a StopSignal. Ranks of torchrun need it when they
# meet, so from here on its end is seen; a process that was forked later has another parent, which is there.
_BORN = os.getpid(), os.getppid()


class StopSignal:
    """True once a signal came, the launcher is gone, or the SLURM time limit is nearer than `margin_seconds` (0: never for that reason).

    The handler only remembers, so a step is never cut in the middle; a second SIGINT (Ctrl-C) raises KeyboardInterrupt at
    once. Handlers can be installed in the main thread only; `close()` puts the old ones back.
    """

    def __init__(self, margin_seconds: float = 0.0) -> None:
        left = slurm_seconds_left()
        parent = _BORN[1] if _BORN[0] == os.getpid() else os.getppid()
        self._launcher = parent if LAUNCHED & os.environ.keys() else 0
        # A job shorter than twice the margin keeps half of its time, or it would be requeued for ever without a step.
        self._margin_seconds = margin_seconds if left is None else min(margin_seconds, left / 2)
        self._interrupts = 0
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None
        self.reason = ""  # or "SIGTERM", "time limit in 95 s", "another rank was asked to stop"
        self._old_handlers: dict[signal.Signals, Any] = {}
        # Python allows handlers in the main thread only; in another thread none are installed.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._remember)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt

    def requested_here(self) -> bool:
        """Whether this rank was asked to stop: by a signal, by its time limit, or by the launcher's end. Other ranks may not know."""
        left = slurm_seconds_left()
        if not self.reason and left is not None and left < self._margin_seconds:
            self.reason = f"time limit in {left:.0f} s"
        if not self.reason and self._launcher and os.getppid() != self._launcher:
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank at the same call.

        A signal may reach only some ranks, and clocks differ: a rank that decided alone would leave the others waiting in a
        collective. Every rank must call this equally often. Costs nothing on one rank, 0.7 ms on gloo.
        """
        mine = self.requested_here()
        if accelerator.num_processes == 1:
            return mine
        asked = torch.full((1,), int(mine), dtype=torch.int32, device=accelerator.device)
        ranks_asked = accelerator.reduce(asked, reduction="sum")
        answer = (
            bool(ranks_asked.item())
            if ranks_asked.device.type == "cpu"
            else self._answer_of_previous_call(ranks_asked)
        )
        if (
            answer and not self.requested_here()
        ):  # what the other rank saw may have come to this one since
            self.reason = "another rank was asked to stop"
        return answer

    def _answer_of_previous_call(self, ranks_asked: Tensor) -> bool:
        """Read the last call's sum, and start this one's on its way to the host.

        Reading this call's sum would wait for the step just queued, and the GPU would then idle while the host prepares the
        next one. The last call's sum was queued behind the step before, so while the host waits for it here, the GPU has a
        whole step to do. All ranks read the sum of the same call, so they still agree; they stop one step later.
        """
        answer = False
        if self._sent is not None:
            previous, arrived = self._sent
            arrived.synchronize()
            answer = bool(previous.item())
        on_host = torch.empty(1, dtype=ranks_asked.dtype, pin_memory=True)
        on_host.copy_(ranks_asked, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent = on_host, arrived
        return answer

    def close(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old_handlers.clear()


def ignore_stop_signals(worker: int = 0) -> None:
    """`worker_init_fn` of a DataLoader: a worker ignores what asks a rank to stop.

    SLURM and torchrun send SIGTERM to every process below them. A worker that dies of it makes its rank raise
    "DataLoader worker exited unexpectedly" before it can finish the step and save (torch 2.13).
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def slurm_seconds_left() -> float | None:
    """Seconds until SLURM ends this job; None outside SLURM, or where it does not say."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time()  # epoch seconds
    except (KeyError, ValueError):
        return None


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _asked_of_accelerate() -> int | None:
    """Processes that the `accelerate launch` right above this one was asked for, by flag or by config file.

    None where there is no such parent, where it did not say, or where we cannot look: a look must never end a run.
    """
    try:
        parent = psutil.Process().parent()
        # accelerate launch ..., accelerate-launch ..., python -m accelerate.commands.launch ...
        launch = r"(?:accelerate(?:_cli)?(?:\.py)?\0|accelerate-|accelerate[./]commands[./])launch(?:\.py)?\0(.*)"
        found = re.search(launch, "\0".join(parent.cmdline()), re.DOTALL)
        if not found:
            return None
        from accelerate.commands.config.config_args import (
            default_config_file,
            load_config_from_file,
        )
        from accelerate.commands.launch import launch_command_parser

        with redirect_stderr(
            io.StringIO()
        ):  # where we read it wrongly, argparse would print its usage
            args = launch_command_parser().parse_args(found[1].split("\0"))
        if args.num_processes is None and (
            args.config_file or (os.path.isfile(default_config_file) and not args.cpu)
        ):
            file = os.path.join(parent.cwd(), args.config_file or default_config_file)
            return int(load_config_from_file(file).num_processes)
        return None if args.num_processes is None else int(args.num_processes)
    except (Exception, SystemExit):  # argparse exits
        return None
