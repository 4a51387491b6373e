"""Memory in one piece for weights that are walked through again and again."""

import mmap

import torch
from torch import Tensor


class Arena:
    """`num_bytes` of memory, of large pages where the system has them: looking up small ones costs a third of the time."""

    def __init__(self, num_bytes: int) -> None:
        # Shared memory, which mmap gives otherwise, has no large pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, max(num_bytes, 1), **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
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
