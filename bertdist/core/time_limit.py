"""Limits on time: of a call of a library that has none of its own, of a SLURM job."""

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_within(seconds: float, action: Callable[[], Result]) -> Result:
    """What `action` returns or raises. Raises TimeoutError after `seconds`.

    It runs in a thread, which nothing can end: after a TimeoutError it waits on, for no one.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def slurm_seconds_left() -> float | None:
    """Seconds until SLURM ends this job; None outside SLURM, or where the end is unknown."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time()  # epoch seconds
    except (KeyError, ValueError):
        return None
