"""A call ends in time, with what it returns or raises."""

import threading
import time

import pytest

from bertdist.core.time_limit import call_within


def test_a_call_that_ends_in_time_is_a_plain_call() -> None:
    assert call_within(10, lambda: None) is None
    with pytest.raises(KeyError, match="missing"):
        call_within(10, lambda: {}["missing"])


def test_a_call_that_does_not_end_is_an_error() -> None:
    end = threading.Event()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^no answer within 0\.05 s$"):
        call_within(0.05, end.wait)
    assert time.monotonic() - start < 5
    end.set()
    assert call_within(10, end.wait) is True
