"""A limit on the time that a call of a library may take which has none of its own."""

import threading
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
