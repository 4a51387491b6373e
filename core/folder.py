"""Folders that are whole or not there: written beside their place, synced, then renamed; every file known by its SHA-256."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from core.config import FORMAT_VERSION, check_format_version, require_small
from core.errors import UserError

MANIFEST_NAME = "manifest.json"
PARTIAL_NAME = re.compile(r"\.[0-9a-f]{16}\.partial")  # of a file that `core.codecs.atomic_file` is writing

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `target`, manifest included, if the block ends without an error.

    Whatever goes wrong at whatever moment, `target` is the old folder or the new one. One exception: where two names cannot be
    exchanged at once, a kill between two renames leaves the old one aside, where `present_folder` finds it; the next
    `atomic_folder` or `clear_leftovers` puts it back.

    Raises:
        UserError: if the disk is full or does not take the files.
    """
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_back(target)  # what a process that was killed here has left
        partial.mkdir()
        yield partial
        write_json(partial / MANIFEST_NAME, _make_manifest(partial))
        for path in partial.iterdir():
            # safetensors makes files that nobody but their owner may read.
            shutil.copymode(partial / MANIFEST_NAME, path)
            sync(path)
        sync(partial)
        _replace_folder(partial, target)
    except (OSError, SafetensorError) as error:
        _take_back(target)
        raise UserError(f"{target} could not be written ({_reason(error)}); make room or choose another folder") from error
    except BaseException:
        _take_back(target)
        raise


def clear_leftovers(parent: Path, folders: str = "") -> None:
    """Removes what a killed `atomic_file` left in `parent`, and a killed `atomic_folder` whose name fits the pattern `folders`.

    A folder that was only moved aside comes back. Whatever else has such a name is somebody's own and stays.
    """
    for leftover in list(parent.glob(".*")):
        folder = re.fullmatch(r"\.(.+)\.(?:partial|replaced)", leftover.name)
        if folder and re.fullmatch(folders, folder[1]):
            _take_back(leftover.with_name(folder[1]))
        elif PARTIAL_NAME.fullmatch(leftover.name) and stat.S_ISREG(leftover.lstat().st_mode):
            leftover.unlink()


def present_folder(target: Path) -> Path:
    """Where the files of `target` are: there, or aside if a writer was killed, or is at work, between its two renames."""
    is_aside = os.path.exists(_replaced(target)) and not os.path.exists(target)  # Path.exists raises where it may not look
    return _replaced(target) if is_aside else target


def verify_folder(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of each file in the manifest of `folder`, every one of them just computed and found right.

    Raises:
        UserError: if the manifest or a file it lists is missing, cut, changed or not a regular file.
    """
    manifest = read_json(folder / MANIFEST_NAME)
    files = manifest.get("files")
    if set(manifest) != {"format_version", "files"} or not isinstance(files, dict):
        raise UserError(f"{folder / MANIFEST_NAME} is damaged: it must list the format version and the files")
    digests = {}
    for name, expected in files.items():
        if Path(name).name != name:
            raise UserError(f"{folder / MANIFEST_NAME} is damaged: {name!r} is not a plain file name")
        found = {"num_bytes": _size(folder / name)}
        if isinstance(expected, dict) and found["num_bytes"] == expected.get("num_bytes"):
            found = _describe(folder / name)  # which takes long for a file that is not what it should be
        if found != expected:
            raise UserError(f"{folder / name} is damaged: the manifest says {expected}, the file is {found}")
        digests[name] = found["sha256"]
    if (folder / MANIFEST_NAME).read_text(encoding="utf-8") != _json_text({"files": files}):
        raise UserError(f"{folder / MANIFEST_NAME} is damaged: it is not laid out as it was written")
    return digests


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file, its format version checked.

    Raises:
        UserError: if there is no such file or it holds anything else.
    """
    _require_regular_file(path)
    try:
        require_small(path)
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it must be a JSON object")
        check_format_version(content.get("format_version"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with this program's format version."""
    path.write_text(_json_text(content), encoding="utf-8")


def sync(path: Path) -> None:
    """Returns once a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2, allow_nan=False) + "\n"


def _make_manifest(folder: Path) -> dict[str, Any]:
    return {"files": {path.name: _describe(path) for path in sorted(folder.iterdir())}}


def _describe(path: Path) -> dict[str, Any]:
    num_bytes = _size(path)
    with path.open("rb") as file:
        return {"num_bytes": num_bytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _size(path: Path) -> int:
    _require_regular_file(path)
    return path.stat().st_size


def _reason(error: OSError | SafetensorError) -> str:
    """What the system said, also where safetensors passes it on in words of its own."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else str(error))


def _require_regular_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _take_back(target: Path) -> None:
    """Undoes an `atomic_folder` that came to no end."""
    if os.path.exists(_replaced(target)) and not os.path.exists(target):  # Path.exists raises where it may not look
        _replaced(target).rename(target)
    for leftover in (_partial(target), _replaced(target)):
        shutil.rmtree(leftover, ignore_errors=True)


def _replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`. A full folder cannot be renamed over: it changes places with the new one, or steps aside."""
    old = source if target.exists() and _exchange(source, target) else _replaced(target)
    if old != source:
        if target.exists():
            target.rename(old)
        source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Gives two folders each other's names at one moment; False where the system or the disk cannot, and nothing is done."""
    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux, glibc 2.28 or newer
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
