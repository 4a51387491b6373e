"""The folder of a training run: one process at a time in it, and the signals that ask it to stop.

OUT/config.json  OUT/metrics.jsonl  OUT/data/  OUT/checkpoints/step-00000200/  OUT/export/
"""

import contextlib
import fcntl
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from core.errors import UserError
from core.folder import PARTIAL_NAME, clear_leftovers

_PID_NAME = "pid"
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.(bin|json)")  # as `core.data` makes them


@contextlib.contextmanager
def claim_run(out: Path, resume: bool) -> Iterator[None]:
    """Holds `out` for this process alone. The lock ends with the process, however that ends.

    Raises:
        UserError: if another process trains there, if a new run would mix with what lies there, or if there is no run to resume.
    """
    if resume and not (out / "config.json").is_file():
        raise UserError(f"{out} holds no training run to resume; leave out --resume to start one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give --out a folder")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        if not resume and any(map(_is_foreign, out.iterdir())):
            raise UserError(f"{out} exists and is not empty; resume its run with --resume or give --out another folder")
        (out / _PID_NAME).write_text(f"{os.getpid()}\n", encoding="ascii")
        clear_leftovers(out, "export")
        clear_leftovers(out / "data")
        clear_leftovers(out / "checkpoints", r"step-\d{8}")
        try:
            yield
        finally:
            (out / _PID_NAME).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_foreign(entry: Path) -> bool:
    """Whether a new run must not begin beside `entry`. Data of a run that was killed before its first step is used again."""
    if entry.name == "data" and entry.is_dir():
        return not all(_SHARD_NAME.fullmatch(path.name) or PARTIAL_NAME.fullmatch(path.name) for path in entry.iterdir())
    return entry.name != _PID_NAME and not entry.name.startswith(".")


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            process = (out / _PID_NAME).read_text(encoding="ascii").strip()
            raise UserError(f"{out} is being trained by process {process}; stop it or give --out another folder") from None
        raise UserError(f"{out} is being trained by another process; stop it or give --out another folder") from None


class StopSignals:
    """Notes Ctrl-C or SIGTERM, so that the loop can save before it leaves; a second signal ends the process at once.

    In another thread than the main one nothing is noted: Python hands signals to that one alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def leave(self) -> None:
        """Ends the program the way the signal asks for: exit code 130 or 143, which also stands for that of another rank."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(143)
