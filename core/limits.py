"""What this machine can do at best, measured: how fast it reads memory and how fast it multiplies; and what work takes."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from core.arena import zeros
from core.kernels import read as native

# (rows, columns, inner) of matrix products as models make them, and larger ones; the fastest counts.
_MATMULS = {
    "cpu": [(2048, 2048, 2048), (8192, 1024, 256), (8192, 256, 1024), (8192, 2048, 512)],
    "cuda": [(8192, 8192, 8192), (16384, 4096, 4096), (65536, 2048, 2048)],
}
_SECONDS = 0.1  # of one measurement, after two runs that do not count


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of some matrix products, two per multiply-add."""
    best = 0.0
    for rows, columns, inner in _MATMULS[device.type]:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)
        seconds = _seconds_of(lambda a=left, b=right: torch.nn.functional.linear(a, b), device)
        best = max(best, 2 * rows * columns * inner / seconds)
    return best


def seconds_to_read(parts: Sequence[tuple[float, int]], device: torch.device) -> float:
    """How long it takes to read some blocks of memory, each so many times, and nothing else.

    Args:
        parts: (bytes of a block, times it is read one after another).
    """
    # In large pages, as weights and keys are, which take an eighth less. Written to: pages that never were are all the same one.
    blocks = [(zeros((max(1, round(num_bytes) // 8),), torch.int64, device).fill_(1), times) for num_bytes, times in parts]

    def read(look: Callable[[torch.Tensor], object]) -> None:
        for block, times in blocks:
            for _ in range(times):
                look(block)

    def read_natively() -> None:
        for block, times in blocks:
            native.read(block, times)

    looks = (torch.sum, torch.amax, lambda block: block.view(torch.float32).sum())
    ways = [partial(read, look) for look in looks]
    if device.type == "cpu" and native.library() is not None:
        ways.append(read_natively)
    return min(_seconds_of(way, device) for way in ways)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of some runs, after one that does not count: a limit is what can be reached. Short work is repeated."""
    timed(work, device)
    once = timed(work, device)
    started = time.perf_counter()
    repeats = max(1, int(0.02 / max(once, 1e-6)))

    def run() -> None:
        for _ in range(repeats):
            work()

    seconds = []
    while len(seconds) < 3 or time.perf_counter() - started < _SECONDS:
        seconds.append(timed(run, device) / repeats)
    return min(seconds)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds from the call until the device has done its part."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use between `start` and `read`, of this process or of a GPU, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        # Forgets the old peak, see proc(5); where that cannot be done the peak is that of the whole process so far.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS") or _peak_of_process()

    def read(self) -> tuple[int, int]:
        """(the peak, how far it lies above what was in use at the start)."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status("VmHWM") or _peak_of_process()
        return peak, max(0, peak - self._before)


def _status(key: str) -> int | None:
    """A size in Linux's account of this process, in bytes."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
