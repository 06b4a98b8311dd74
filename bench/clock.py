"""When each step ended and which rows it had: the same clock for every contender."""

import resource
import sys
import time

import torch

from bench.jobs import StepRows

MIB = 1 << 20
UNIT = 1 if sys.platform == "darwin" else 1 << 10  # bytes in a unit of ru_maxrss


def on_gpu(use_cpu: bool) -> bool:
    """Whether a run uses the GPU."""
    return torch.cuda.is_available() and not use_cpu


def device_name(use_cpu: bool) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(0) if on_gpu(use_cpu) else "cpu"


def peak_mib(who: int = resource.RUSAGE_SELF) -> float:
    """Peak resident memory of this process, or of the largest of its children that have ended."""
    return resource.getrusage(who).ru_maxrss * UNIT / MIB


class Clock:
    """Call `see` with the rows of each step, and `stamp` at its end."""

    def __init__(self, steps: int, untimed_steps: int, use_cpu: bool) -> None:
        assert 1 <= untimed_steps < steps, (untimed_steps, steps)
        self.steps, self.untimed_steps, self.cuda = steps, untimed_steps, on_gpu(use_cpu)
        self.stamps: list[float] = []
        self._seen: list[StepRows] = []
        self.process_mib = 0.0
        self.device_mib: float | None = None

    def see(self, rows: list[int], lengths: list[int], cells: int) -> None:
        """Record the rows of the next step; a loader may be some steps ahead.

        cells: tokens that the model computes, with padding.
        """
        self._seen.append(StepRows(rows, lengths, cells))

    def stamp(self) -> None:
        """Record the end of an optimizer step."""
        # A GPU runs behind the host. Waiting for it at every step would slow contenders that do not
        # wait; so only the two ends that count are exact.
        if self.cuda and len(self.stamps) + 1 in (self.untimed_steps, self.steps):
            torch.cuda.synchronize()
        if self.cuda and len(self.stamps) + 1 == self.untimed_steps:
            # Of the timed steps: before them bertdist tries how large a micro-batch fits.
            torch.cuda.reset_peak_memory_stats()
        self.stamps.append(time.perf_counter())
        # Measured here, so that saving after the last step does not count.
        if len(self.stamps) == self.steps:
            self.process_mib = peak_mib()
            self.device_mib = torch.cuda.max_memory_allocated() / MIB if self.cuda else None

    @property
    def seen(self) -> list[StepRows]:
        """One entry per step; asserts that every step was stamped."""
        assert len(self.stamps) == self.steps <= len(self._seen), (
            len(self.stamps),
            self.steps,
            len(self._seen),
        )
        return self._seen[: self.steps]
