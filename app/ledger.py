"""What lies in a folder of results and what each result was made from, so that a call that was ended can go on.

One JSON line for each name that is going to be written, and one when it is there with its SHA-256. A line comes to the disk
before the file it allows, so that whatever a killed call left is known to be its own.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import shown
from core.folder import clear_leftovers

LEDGER_NAME = "ledger.jsonl"


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
            ValueError: if one of them exists and is not an unfinished result of the same key, unless it may be overwritten.
        """
        is_own = self._resume and self._lines.get(name, {}).get("key") == key
        for path in paths:
            if path.exists() and not (self._force or is_own):
                instead = (
                    "it was made with other settings or from another file; " if self._resume else "--resume goes on with it, "
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
        content = (self._folder / LEDGER_NAME).read_bytes()
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                self._lines[entry["name"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill
        if content and not content.endswith(b"\n"):
            os.write(self._descriptor, b"\n")

    def _write(self, line: dict[str, Any]) -> None:
        self._lines[line["name"]] = line
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")
        os.fsync(self._descriptor)


@contextmanager
def open_ledger(folder: Path, *, resume: bool, force: bool) -> Iterator[Ledger]:
    """The ledger of a folder, which is made if need be; the folder belongs to this process until the block ends.

    Raises:
        ValueError: if the folder cannot be made or written to, or another process writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LEDGER_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise ValueError(f"{shown(folder)} is no folder to write to ({error.strerror}); choose another with --out") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if resume:
            clear_leftovers(folder)
        yield Ledger(folder, descriptor, resume=resume, force=force)
    except BlockingIOError:
        raise ValueError(f"another process writes to {shown(folder)}; wait for it or choose another folder") from None
    finally:
        os.close(descriptor)
