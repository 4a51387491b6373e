"""Memory in one piece, of large pages where the system has them."""

import errno
import mmap

import torch

from core import arena
from core.arena import Arena, zeros


class PlainMemory(mmap.mmap):
    """That of a kernel without large pages."""

    def madvise(self, *_) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_kernel_without_large_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(arena.mmap, "mmap", PlainMemory)
    assert Arena(100).take((5, 5), torch.float32).fill_(1).sum() == 25


def test_parts_lie_one_after_another_and_end_with_the_memory():
    memory = Arena(1 << 21)
    parts = [memory.take((1 << 18,), torch.float32).fill_(number) for number in range(2)]
    assert memory.take((0, 4), torch.int8).shape == (0, 4)
    assert [part.unique().item() for part in parts] == [0, 1]


def test_zeros_of_any_size_can_be_written_to():
    for num_values in (1, (1 << 19) + 1):  # less than a large page, and more
        values = zeros((num_values,), torch.float32, torch.device("cpu"))
        assert not values.any()
        assert values.add_(1).sum() == num_values
