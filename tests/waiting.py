"""Waiting for something that another thread or process does, never for ever."""

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], limit_s: float = 10.0, every_s: float = 0.001) -> None:
    """Returns once `is_so` says so.

    Raises:
        AssertionError: if it does not within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s:.0f} s"
        time.sleep(every_s)
