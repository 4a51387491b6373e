"""Files that results are written to: names that stay inside their folder, never collide and overwrite no source."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.completion import Completion, CompletionJob
from app.provenance import provenance_of, sidecar_of
from core.codecs import Raw, atomic_file, shown

_MAX_STEM_BYTES = 180  # a name has at most 255 bytes, and a seed, a number and a suffix follow


class OutputNames:
    """Names for the results of some sources. A source of None stands for a completion of nothing."""

    def __init__(self, sources: Sequence[Path | None]) -> None:
        self._sources = sources
        self._source_files = {os.path.realpath(source) for source in sources if source is not None}

    def stems(self) -> Iterator[tuple[Path | None, str]]:
        """Each source with the name, without suffix, of its results; no two names are equal."""
        taken: set[str] = set()
        for source in self._sources:
            stem = unique = _safe_stem(source)
            number = 1
            while unique in taken:
                number += 1
                unique = f"{stem}-{number}"
            taken.add(unique)
            yield source, unique

    def protect_sources(self, paths: Sequence[Path]) -> None:
        """Makes sure that no source is overwritten.

        Raises:
            ValueError: if one of the files must not be written.
        """
        for path in paths:
            if os.path.realpath(path) in self._source_files:
                raise ValueError(f"{shown(path)} is one of the files given and is not overwritten; choose another folder")


def completion_paths(job: CompletionJob, out_dir: Path, stem: str) -> list[Path]:
    """The files of a job's samples, which are numbered from 1 in the names."""
    seed, suffix = job.settings.seed, job.codec.suffix
    return [_completion_path(out_dir, stem, seed, sample, suffix) for sample in range(job.settings.samples)]


def with_sidecar(job: CompletionJob, path: Path) -> list[Path]:
    """A sample's file, and the one of its settings if that lies beside it."""
    return [path, sidecar_of(path)] if isinstance(job.given.media, Raw) else [path]


def score_paths(out_dir: Path, stem: str) -> list[Path]:
    """The files of a score: its bits and its heatmap."""
    return [out_dir / f"{stem}.npz", out_dir / f"{stem}.png"]


def write_completion(completion: Completion, out_dir: Path, force: bool = False, stem: str | None = None) -> Path:
    """Writes a sample as PNG, 16-bit WAV or text, and says where; `stem` None takes the source's name.

    Its settings are inside it, or beside a text in a file of the same name with .json behind it.

    Raises:
        ValueError: if the file exists and `force` is off, or it cannot be written.
    """
    name = stem or _safe_stem(completion.source)
    path = _completion_path(out_dir, name, completion.seed, completion.sample, completion.codec.suffix)
    refuse_existing([path], force)
    settings = provenance_of(completion).to_json()
    completion.codec.write(completion.media, path, settings)
    if isinstance(completion.media, Raw):
        with atomic_file(sidecar_of(path)) as file:
            file.write(settings.encode("ascii"))
    return path


def refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """Makes sure that nothing is overwritten unasked.

    Raises:
        ValueError: if one of the files exists and `force` is off.
    """
    for path in paths:
        if not force and path.exists():
            raise ValueError(f"{shown(path)} exists; use --force to overwrite it, or another folder")


def _completion_path(out_dir: Path, stem: str, seed: int, sample: int, suffix: str) -> Path:
    return out_dir / f"{stem}-s{seed}-{sample + 1}{suffix}"


def _safe_stem(source: Path | None) -> str:
    """A source's name without its suffix: nothing unprintable, no separators, not too long, never a hidden file."""
    stem = "new" if source is None else source.stem
    plain = "".join(char if char.isprintable() and char not in "/\\" else "_" for char in stem).strip(". ")
    return plain.encode("utf-8")[:_MAX_STEM_BYTES].decode("utf-8", "ignore") or "unnamed"
