"""Memory in one piece for what is walked through again and again: weights, and the keys and values of long contexts."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21  # bytes, on most processors


class Arena:
    """`num_bytes` of memory, of large pages where the system has them: looking up small ones costs a third of the time."""

    def __init__(self, num_bytes: int) -> None:
        # Shared memory, which mmap gives otherwise, has no large pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        # Linux lets a piece begin with a large page only if it is made of whole ones.
        self._memory = mmap.mmap(-1, -(-max(num_bytes, 1) // _LARGE_PAGE) * _LARGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel that was built without large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of it as a tensor, which keeps the whole alive."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        self._used += count * dtype.itemsize
        offset = self._used - count * dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that are walked through again and again, on a CPU in an arena of their own if they fill a large page."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or num_bytes < _LARGE_PAGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return Arena(num_bytes).take(shape, dtype)
