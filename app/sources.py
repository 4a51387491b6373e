"""Which files are meant by the paths, folders and patterns that a person gives. Imports nothing heavy."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path


def list_files(paths: Sequence[Path]) -> list[Path]:
    """The files given, and those in the folders given: all levels, sorted, names starting with a dot left out.

    Raises:
        ValueError: if the folders hold no file.
    """
    files: list[Path] = []
    for path in paths:
        # os.path.isdir answers False where Path.is_dir raises; what is wrong is then said when the file is opened.
        files.extend(_files_in(path) if os.path.isdir(path) else [path])
    if not files:
        raise ValueError("there is no file in the folder given; names that start with a dot do not count")
    return files


def find_files(pattern: str, folder: Path) -> list[Path]:
    """The files that a name, a folder or a pattern such as `photos/**/*.png` means, relative to `folder`, sorted.

    A name without a pattern is answered even if there is no such file: what is wrong is said when it is opened.

    Raises:
        ValueError: if a pattern fits no file, or a folder holds none.
    """
    path = folder / pattern
    if not glob.has_magic(pattern) or os.path.exists(path):
        return list_files([path])
    found = [folder / name for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
    files = [path for path in found if os.path.isfile(path)]
    if not files:
        raise ValueError(f"no file fits {pattern}; patterns are relative to the folder of the recipe")
    return files


def _files_in(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if os.path.isfile(path))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
