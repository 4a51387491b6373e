"""C++ that is built where it runs: at first use, if there is a compiler, and for the processor at hand.

Libraries are kept in `$XDG_CACHE_HOME/megabyte` (`~/.cache/megabyte`) by source, compiler, its flags and processor.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread")
_LINK_FLAGS = ("-shared", "-fPIC")

# Of a ReLU for what is negative: oneDNN's own makes 0 of what is not a number. Far below the rounding of what is positive; and
# products by it, and most of their squares, are no numbers that lose digits, with which Intel's processors take a hundred times
# as long.
RELU_SLOPE = 1e-15

_building: dict[Path, threading.Lock] = {}  # by source: whoever needs a library that is being built waits for it

_logger = logging.getLogger(__name__)


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions that multiply bf16: AVX512-BF16, or AMX, which comes with them."""
    return torch.cpu._is_avx512_bf16_supported()


@cache
def multiplies_tiles() -> bool:
    """Whether it multiplies whole tiles of bf16 (AMX), as libraries then do: several times as fast as by vectors."""
    return torch.cpu._is_amx_tile_supported()


@cache
def has_onednn(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether oneDNN multiplies bf16 on this processor, or float32, where it has been tried."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return platform.machine().lower() in ("x86_64", "amd64")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def load_library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The library of a source file, or None if this machine cannot build it, where torch does the work."""
    try:
        with _building.setdefault(source, threading.Lock()):
            return ctypes.CDLL(str(build_library(source, *flags)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _logger.info("no library of %s, torch does its work instead: %s", source.name, error)
        return None


def load_tiled_library(source: Path) -> ctypes.CDLL | None:
    """As `load_library`, of what multiplies bf16: by tiles, unless the system refuses them, or by vectors.

    None too if the processor does neither. The library answers `is_supported` and `uses_tiles`.
    """
    found = load_library(source, "-fopenmp") if multiplies_bf16() else None
    if found is not None and found.uses_tiles() and not found.is_supported():
        found = load_library(source, "-fopenmp", "-mno-amx-tile")
    return found if found is not None and found.is_supported() else None


def in_background(build: Callable[[], object]) -> Iterator[None]:
    """Runs this in a thread and yields ten times a second until it is done; closing the iterator leaves it at work."""
    thread = threading.Thread(target=build, name="build", daemon=True)
    thread.start()
    thread.join(0.1)
    while thread.is_alive():
        yield
        thread.join(0.1)


def build_library(source: Path, *flags: str) -> Path:
    """The shared library of a source file, from the cache folder or built into it.

    Raises:
        OSError: if there is no compiler or no place for the result.
        RuntimeError: if the user has no home folder.
        subprocess.SubprocessError: if the compiler fails.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (c++, g++ or clang++)")
    folder = cache_folder()
    library = folder / f"{source.stem}-{_cache_key(compiler, source, flags)}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Built beside its place and renamed: whoever looks meanwhile sees a whole library or none.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / library.name
        command = [compiler, *_FLAGS, *flags, str(source), *_LINK_FLAGS, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.replace(library)
    return library


def cache_folder() -> Path:
    """Where built libraries are kept, one folder per user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megabyte"


def _cache_key(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    """What the machine code depends on: source, compiler and its flags, processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    sources = b"".join(path.read_bytes() for path in (source, *sorted(source.parents[1].glob("*/*.h"))))
    parts = (sources, compiler.encode(), version, " ".join((*_FLAGS, *flags, *_LINK_FLAGS)).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _processor() -> str:
    """What `-march=native` follows: the model of the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.partition(":")[0].strip() in names}))
