"""What the C library does with freed memory: Linux's, elsewhere nothing is changed."""

import ctypes
import sys
from collections.abc import Callable

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # malloc.h
_LARGE_BYTES = 4 << 20


def keep_freed_memory() -> None:
    """Keeps it for the next tensor: to get it from the system anew takes up to a fifth of a score."""
    # One arena: those of other threads cannot grow so far.
    if _set(_MMAP_THRESHOLD, 1 << 30) and _set(_TRIM_THRESHOLD, (1 << 31) - 1):
        _set(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Gives large tensors back one by one; else small things that live longer lie between their places and keep them apart.

    A step that learns from a million bytes, chunk by chunk, takes several times its memory without. It holds for the rest of
    the process; a score afterwards takes up to a fifth longer.
    """
    _set(_MMAP_THRESHOLD, _LARGE_BYTES)


def trim_freed_memory() -> None:
    """Gives back the whole pages that are free now; some milliseconds, tens on a busy machine.

    A process whose threads come and go keeps what they free in many arenas, in places that the next thread does not fill:
    more by the hour, though what is in use stays the same.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def _set(option: int, value: int) -> bool:
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(option, value))


def _function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
