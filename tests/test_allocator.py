"""What the C library does with freed memory, seen from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FREED = """
from pathlib import Path
from core.allocator import trim_freed_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

blocks = [bytearray(100_000) for _ in range(1000)]
before = resident_mb()
del blocks[:-1]  # the last one keeps the others from being behind all that is in use
kept = resident_mb()
trim_freed_memory()
print(before - kept, before - resident_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is Linux's")
def test_free_memory_between_what_is_in_use_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, check=True, text=True)
    by_itself, trimmed = map(float, done.stdout.split())
    assert by_itself < 20 < 80 < trimmed
