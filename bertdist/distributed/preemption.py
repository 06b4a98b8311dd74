"""When a run should stop early: signals, the SLURM time limit, a launcher that has died.

    with StopSignal(stop_before_time_limit) as stop:
        ...
        if stop.requested(accelerator): ...    # the same answer on every rank

Requeueing is done by launch/train.slurm, after this process has written `preempted` to status.json.
That script is for one node; launch/multi_node.slurm, for several, runs it too.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bertdist.core.terminal import close_broken
from bertdist.core.time_limit import slurm_seconds_left

# SIGHUP: a terminal was closed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# In the environment of a process whose parent is torchrun or `accelerate launch`. Killed, these
# leave their ranks behind, which nobody would end or restart. Any other parent may end: a shell,
# nohup. ACCELERATE_MIXED_PRECISION, which accelerate sets too, is also a setting of users.
LAUNCHER_VARIABLES = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"}
# Of a trial the process id of its sweep, which would end it, and starts it again.
TRIAL_VARIABLE = "BERTDIST_TRIAL"

# (this process, its parent) at import: a launcher may be killed before there is a StopSignal, while
# ranks start. A process that was forked later has another parent.
_AT_IMPORT = os.getpid(), os.getppid()


class StopSignal:
    """Requested by a signal, by the end of the launcher, or `margin_seconds` before a time limit.

    margin_seconds 0: no time limit. The handlers only set a flag, so no step is interrupted; a
    second SIGINT (Ctrl-C) raises KeyboardInterrupt at once. Handlers are installed in the main
    thread only, and `close`, or the end of the `with` block, restores the previous ones.
    """

    def __init__(self, margin_seconds: float = 0.0) -> None:
        parent = _AT_IMPORT[1] if _AT_IMPORT[0] == os.getpid() else os.getppid()
        sweep = os.environ.get(TRIAL_VARIABLE, "0")
        self._launcher = parent if LAUNCHER_VARIABLES & os.environ.keys() else int(sweep)
        # A job shorter than twice the margin keeps half of its time, or it would be requeued for
        # ever without a step.
        seconds_left = slurm_seconds_left()
        if seconds_left is not None:
            margin_seconds = min(margin_seconds, seconds_left / 2)
        self._margin_seconds = margin_seconds
        self._interrupts = 0
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None
        self.reason = (
            ""  # or "SIGTERM", "time limit in 95 s", "a stop was requested on another rank"
        )
        self._old_handlers: dict[signal.Signals, Any] = {}
        # Python allows handlers in the main thread only; in another thread none are installed.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not is_nohup:
                    self._old_handlers[number] = signal.signal(number, self._handle)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGHUP:  # no line can be printed to a closed terminal
            for descriptor in (1, 2):
                close_broken(descriptor)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt

    def requested_locally(self) -> bool:
        """Whether this rank should stop; the other ranks may not know."""
        seconds_left = slurm_seconds_left()
        near = seconds_left is not None and seconds_left < self._margin_seconds
        if not self.reason and near:
            self.reason = f"time limit in {seconds_left:.0f} s"
        if not self.reason and self._launcher and os.getppid() != self._launcher:
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank should stop: the same answer on every rank at the same call.

        A signal may reach only some ranks, and clocks differ: a rank that decided alone would leave
        the others waiting in a collective. Every rank must call this equally often. Costs nothing
        on one rank, 0.7 ms on gloo.
        """
        here = self.requested_locally()
        if accelerator.num_processes == 1:
            return here
        flag = torch.full((1,), int(here), dtype=torch.int32, device=accelerator.device)
        total = accelerator.reduce(flag, reduction="sum")
        on_cpu = total.device.type == "cpu"
        anywhere = bool(total.item()) if on_cpu else self._total_of_previous_call(total)
        # What the other rank saw may be visible here by now.
        if anywhere and not self.requested_locally():
            self.reason = "a stop was requested on another rank"
        return anywhere

    def _total_of_previous_call(self, total: Tensor) -> bool:
        """Read the previous call's sum, and start copying this one to the host.

        Reading this call's sum would wait for the step just queued, and the GPU would then idle
        while the host prepares the next one. The previous sum was queued behind the step before, so
        while the host waits for it the GPU has a whole step to do. All ranks read the sum of the
        same call, so they still agree; they stop one step later.
        """
        answer = False
        if self._sent is not None:
            previous, copied = self._sent
            copied.synchronize()
            answer = bool(previous.item())
        on_host = torch.empty(1, dtype=total.dtype, pin_memory=True)
        on_host.copy_(total, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._sent = on_host, copied
        return answer

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old_handlers.clear()


def ignore_stop_signals(worker: int = 0) -> None:
    """Ignore the STOP_SIGNALS from here on. A `worker_init_fn` of DataLoaders.

    SLURM and torchrun send SIGTERM to every process below them. A loader worker that dies of it
    makes its rank raise "DataLoader worker exited unexpectedly" before it can save (torch 2.13).
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
