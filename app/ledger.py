"""What lies in a folder of results and what each result was made from, so that a call that was ended can go on.

One JSON line for each name that is going to be written, and one when it is there with its SHA-256. A line comes to the disk
before the file it allows, so that whatever a killed call left is known to be its own. A line begins with its own SHA-256;
one that does not fit it was damaged, or written before lines had one, and is not believed.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import shown
from core.folder import clear_leftovers

LEDGER_NAME = "ledger.jsonl"
MAX_BYTES = 1 << 30
_BEGINS = b'{"line_sha256": "'
_OWN_LINE = re.compile(_BEGINS + rb'|\{"name": ".*", "key": "[0-9a-f]{64}"')  # the second as older ledgers have them


def digest_of(content: Path | bytes) -> str:
    """SHA-256 in hex of a file or of bytes.

    Raises:
        OSError: if the file cannot be read.
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(facts: dict[str, Any]) -> str:
    """One name for everything a result depends on."""
    return digest_of(json.dumps(facts, sort_keys=True, allow_nan=False).encode())


class Ledger:
    """The results of one folder, held by one process at a time; `open_ledger` makes it."""

    def __init__(self, folder: Path, descriptor: int, *, resume: bool, force: bool) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._resume = resume
        self._force = force
        self._lines: dict[str, dict[str, Any]] = {}  # name of the result -> its newest line
        self._read()

    def finished(self, name: str, key: str) -> dict[str, Any] | None:
        """The facts of a result that need not be made again: asked for, of this key, every file as it was written."""
        line = self._lines.get(name, {})
        if not self._resume or line.get("key") != key or "files" not in line:
            return None
        is_whole = all(self._is_intact(name, digest) for name, digest in line["files"].items())
        return line["facts"] if is_whole else None

    def claim(self, name: str, key: str, paths: Sequence[Path]) -> None:
        """Notes that the result `name` is going to be written to `paths`.

        Raises:
            ValueError: if one of them exists and is not an unfinished result of the same key, unless it may be overwritten, or if
            the disk is full.
        """
        is_own = self._resume and self._lines.get(name, {}).get("key") == key
        for path in paths:
            if path.exists() and not (self._force or is_own):
                instead = (
                    f"it was made with other settings or from another file, or {LEDGER_NAME} was damaged; "
                    if self._resume
                    else "--resume goes on with it, "
                )
                raise ValueError(f"{shown(path)} exists; {instead}--force overwrites it, or choose another folder")
        self._write({"name": name, "key": key})

    def finish(self, name: str, key: str, paths: Sequence[Path], facts: dict[str, Any]) -> None:
        """Notes that a result is there."""
        self._write({"name": name, "key": key, "files": {path.name: digest_of(path) for path in paths}, "facts": facts})

    def _is_intact(self, name: str, digest: str) -> bool:
        path = self._folder / name
        return path.is_file() and digest_of(path) == digest

    def _read(self) -> None:
        if os.fstat(self._descriptor).st_size > MAX_BYTES:
            raise ValueError(
                f"{shown(self._folder / LEDGER_NAME)} has more than {MAX_BYTES:,} bytes; choose another folder with --out"
            )
        with open(self._descriptor, "rb", closefd=False) as file:
            content = file.read()
        lines = content.splitlines()
        # A kill may have cut the very first line.
        if not any(map(_OWN_LINE.match, lines)) and not _BEGINS.startswith(content[: len(_BEGINS)]):
            raise ValueError(
                f"{shown(self._folder / LEDGER_NAME)} is not from here and is not written to; choose another folder with --out"
            )
        self._lines = {entry["name"]: entry for entry in map(_entry_or_none, lines) if entry is not None}
        if content and not content.endswith(b"\n"):
            os.write(self._descriptor, b"\n")

    def _write(self, line: dict[str, Any]) -> None:
        content = json.dumps({"line_sha256": key_of(line), **line}).encode() + b"\n"
        num_before = os.fstat(self._descriptor).st_size
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, num_before)
            name = shown(self._folder / LEDGER_NAME)
            raise ValueError(f"{name} could not be written ({error.strerror}); make room or choose another folder") from None
        self._lines[line["name"]] = line


def _entry_or_none(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is not as it was written."""
    try:
        entry = json.loads(line)
        return entry if entry.pop("line_sha256") == key_of(entry) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@contextmanager
def open_ledger(folder: Path, *, resume: bool, force: bool) -> Iterator[Ledger]:
    """The ledger of a folder, which is made if need be; the folder belongs to this process until the block ends.

    Raises:
        ValueError: if the folder cannot be made or written to, has another's ledger.jsonl, or another process writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without O_NONBLOCK, opening a FIFO could wait for ever.
        descriptor = os.open(folder / LEDGER_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise ValueError(f"{shown(folder)} is no folder to write to ({error.strerror}); choose another with --out") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{shown(folder / LEDGER_NAME)} is a device or a pipe; choose another folder with --out")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to {shown(folder)}; wait for it or choose another folder") from None
        ledger = Ledger(folder, descriptor, resume=resume, force=force)
        if resume:
            clear_leftovers(folder)
        yield ledger
    finally:
        os.close(descriptor)
