"""The room for uploads, and the files of those that break off."""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

MIN_AGE_S = 600.0  # a younger file may still be in use
begun_files: ContextVar[list[Path]] = ContextVar("begun_files")  # of the upload that is being read


@contextlib.contextmanager
def leftovers_removed() -> Iterator[None]:
    """Removes at its end those of `begun_files` that have been given no other name."""
    begun: list[Path] = []
    token = begun_files.set(begun)
    try:
        yield
    finally:
        begun_files.reset(token)
        for path in begun:
            path.unlink(missing_ok=True)


def make_room(folder: Path, max_bytes: int, min_age_s: float = MIN_AGE_S) -> int:
    """How many bytes the files of a folder have, after the oldest were removed if there were more than `max_bytes`."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            if not path.is_dir():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total, oldest_in_use = sum(size for _, size, _ in found), time.time() - min_age_s
    for changed, size, path in sorted(found):
        if total <= max_bytes or changed > oldest_in_use:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
    return total
