"""The room for uploads, and the files of those that break off."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

MIN_FILE_BYTES = 1 << 16  # a smaller file counts as much: it has blocks, a folder and a place in lists as well
MIN_AGE_S = 600.0  # a younger file may still be in use
begun_files: ContextVar[list[Path]] = ContextVar("begun_files")  # of the upload that is being read


@contextlib.contextmanager
def leftovers_removed() -> Iterator[list[Path]]:
    """Gives `begun_files`, and removes at its end those that have been given no other name."""
    begun: list[Path] = []
    token = begun_files.set(begun)
    try:
        yield begun
    finally:
        begun_files.reset(token)
        for path in begun:
            path.unlink(missing_ok=True)


def make_room(folder: Path, max_bytes: int, min_age_s: float = MIN_AGE_S) -> int:
    """How many bytes the files of a folder have, after the oldest were removed if there were more than `max_bytes`."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                status = os.lstat(path := os.path.join(place, name))
                found.append((status.st_mtime, max(status.st_size, MIN_FILE_BYTES), path))
    total, oldest_in_use = sum(size for _, size, _ in found), time.time() - min_age_s
    for changed, size, path in sorted(found):
        if total <= max_bytes or changed > oldest_in_use:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            total -= size
            if (place := os.path.dirname(path)) != str(folder):
                os.rmdir(place)  # unless there are others in it
    return total
