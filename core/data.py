"""Training data: files become one flat memory-mapped array of bytes; batches are a pure function of seed and step."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import lzma
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from core.codecs import Codec, atomic_file, open_regular, read_open, shown, sniff_open
from core.errors import UserError

if TYPE_CHECKING:
    import torch

_FORMAT = 1  # of the shard files; part of their digest
_MAX_SECONDS = 3600  # of one training sound
_XZ_SIGNATURE = b"\xfd7zXZ\x00"
_PREFETCH_BATCHES = 4
_BLOCK_BYTES = 2**20
_LONG_LINE = 60  # bytes; a line of so many hardly occurs twice by chance

Log = Callable[[str], Any]
Skipped = list[tuple[Path, str]]


@dataclass(frozen=True, eq=False)
class ByteData:
    """The streams of many files, one after another."""

    bytes: np.ndarray  # uint8 (T,), memory-mapped
    document_offsets: np.ndarray  # int64 (num_documents + 1,); document i is bytes[offsets[i]:offsets[i + 1]]
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return self.bytes.size


def collect_files(paths: list[Path], codec: Codec) -> tuple[list[Path], Skipped]:
    """The files of the codec's modality, in sorted order within each folder, and those left out with the reason.

    Raises:
        UserError: if a path does not exist.
    """
    files: list[Path] = []
    skipped: Skipped = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{shown(path)} does not exist; check the name")
        for file in _walk(path, skipped):
            reason = _reason_to_skip(file, codec)
            if reason:
                skipped.append((file, reason))
            else:
                files.append(file)
    return files, skipped


def build_shards(paths: list[Path], codec: Codec, cache_dir: Path, log: Log) -> ByteData:
    """The streams of all files of the codec's modality, built once and found again by a digest of the files and the codec.

    Pictures give all their whole tiles; sounds are resampled to the codec's rate; .xz files are unpacked.

    Args:
        paths: Files and folders; folders are searched through.
        codec: Turns each file into a stream.
        cache_dir: Where the shard lies.
        log: Takes one line for each file that is skipped and for each kind of change made to files.

    Raises:
        UserError: if no file can be used.
    """
    files, skipped = collect_files(paths, codec)
    shard = cache_dir / f"{_digest(files, codec)}.bin"
    index = _read_index(shard)
    if index is None:
        index = _build_shard(files, codec, shard)
    for path, reason in [*skipped, *index["skipped"]]:
        log(f"skipped {shown(path)}: {reason}")
    for note, count in index["notes"].items():
        log(f"{count} of {len(files)} files {note}")
    if index["num_bytes"] == 0:
        raise UserError(
            f"no {codec.modality} data in {', '.join(shown(path) for path in paths)}: "
            f"{len(skipped) + len(index['skipped'])} files were skipped; give files that a {codec.modality} model reads"
        )
    stream = np.memmap(shard, np.uint8, mode="r")
    return ByteData(stream, np.array(index["document_offsets"], np.int64), tuple(files))


class Loader:
    """Shuffled batches of windows; each is a pure function of the seed and the step, so resuming needs the step alone.

    An epoch visits every window once, in an order drawn from (seed, epoch). Aligned windows lie side by side
    from the beginning of each document. Others lie side by side from an offset that is drawn from (seed, epoch) too, so
    later epochs cut the data elsewhere, but never inside one of its units.
    Augmentation is drawn from (seed, window), so it too is the same after a restart and with any number of ranks.
    Of the windows of a step as many bytes are read as one of `lengths` says: each has its turn, in an order drawn from
    (seed, cycle).
    """

    def __init__(
        self,
        data: ByteData,
        seq_len: int,
        batch_size: int,
        seed: int,
        *,
        aligned: bool,
        lengths: tuple[int, ...] = (),
        unit: int = 1,
        augment: "Callable[[np.ndarray, np.random.Generator], np.ndarray] | None" = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} must be divisible by the {world_size} processes")
        self._data = data
        self._seq_len = seq_len
        self._lengths = lengths or (seq_len,)
        self._batch_size = batch_size
        self._seed = seed
        rows = batch_size // world_size
        self._unit = unit
        self._augment = augment
        self._own_rows = range(rank * rows, (rank + 1) * rows)
        _require_enough(data, seq_len)
        self._aligned_starts = _document_starts(data, seq_len) if aligned else None
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._draw_epoch_starts)

    @property
    def windows_per_epoch(self) -> int:
        if self._aligned_starts is not None:
            return self._aligned_starts.size
        # One window less than would fit leaves room for every offset.
        return max(1, len(self._data) // self._seq_len - 1)

    def batch(self, step: int) -> np.ndarray:
        """This rank's rows of the batch of `step`, uint8 (batch_size / world_size, length)."""
        cycle, place = divmod(step, len(self._lengths))
        # The third number keeps these draws apart from those of epochs and windows.
        length = self._lengths[np.random.default_rng([self._seed, cycle, 2]).permutation(len(self._lengths))[place]]
        return np.stack([self._window(step * self._batch_size + row)[:length] for row in self._own_rows])

    def iterate(self, start_step: int, num_steps: int, *, pin: bool = False) -> "Iterator[torch.Tensor]":
        """The batches of `num_steps` steps as uint8 tensors, read ahead by one background thread.

        Args:
            start_step: The first step.
            num_steps: How many batches.
            pin: Whether to put them into page-locked memory, for copies to a GPU that do not block.
        """
        with ThreadPoolExecutor(max_workers=1) as executor:
            read = functools.partial(executor.submit, self._tensor, pin=pin)
            steps = iter(range(start_step, start_step + num_steps))
            pending = deque(map(read, itertools.islice(steps, _PREFETCH_BATCHES)))
            while pending:
                yield pending.popleft().result()
                pending.extend(map(read, itertools.islice(steps, 1)))

    def _tensor(self, step: int, pin: bool) -> "torch.Tensor":
        import torch

        batch = torch.from_numpy(self.batch(step))
        return batch.pin_memory() if pin else batch

    def _window(self, number: int) -> np.ndarray:
        start = self._start(number)
        window = self._data.bytes[start : start + self._seq_len]
        return window if self._augment is None else self._augment(window, np.random.default_rng([self._seed, number, 1]))

    def _start(self, window: int) -> int:
        epoch, index = divmod(window, self.windows_per_epoch)
        return int(self._epoch_starts(epoch)[index])

    def _draw_epoch_starts(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(self.windows_per_epoch)
        if self._aligned_starts is not None:
            return self._aligned_starts[order]
        spare = len(self._data) - self.windows_per_epoch * self._seq_len
        return order * self._seq_len + self._unit * generator.integers(spare // self._unit + 1)


def evaluation_windows(data: ByteData, seq_len: int, num_sequences: int, *, aligned: bool) -> np.ndarray:
    """At most `num_sequences` windows, uint8 (n, seq_len), spread evenly over the data; the same ones every time."""
    _require_enough(data, seq_len)
    starts = _document_starts(data, seq_len) if aligned else np.arange(0, len(data) - seq_len + 1, seq_len)
    chosen = np.linspace(0, starts.size - 1, min(num_sequences, starts.size)).round().astype(np.int64)
    return np.stack([data.bytes[start : start + seq_len] for start in starts[chosen]])


def shared_files(data: ByteData, other: ByteData) -> list[Path]:
    """The files of `data` that are in `other` as well, under whatever name."""
    theirs = {path.resolve() for path in other.files}
    return [path for path in data.files if path.resolve() in theirs]


def shared_items(data: ByteData, other: ByteData, *, by_line: bool) -> int:
    """How many items of `data` are in `other` as well, by their digests: whole documents, or the long lines of texts."""
    theirs = set(_item_digests(other, by_line))
    return sum(digest in theirs for digest in _item_digests(data, by_line))


def _item_digests(data: ByteData, by_line: bool) -> Iterator[bytes]:
    for start, end in itertools.pairwise(data.document_offsets.tolist()):
        document = data.bytes[start:end].tobytes()
        items = [line for line in document.split(b"\n") if len(line) >= _LONG_LINE] if by_line else [document]
        yield from (hashlib.sha256(item).digest() for item in items)


def _walk(path: Path, skipped: Skipped) -> Iterator[Path]:
    """The files below a folder, or the file itself; below a folder, dot names and links to folders are skipped."""
    if not path.is_dir():
        yield path
        return
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        skipped.append((path, f"it cannot be listed ({error.strerror})"))
        return
    for child in children:
        if child.name.startswith("."):
            skipped.append((child, "its name starts with a dot"))
        elif child.is_symlink() and child.is_dir():
            skipped.append((child, "it is a link to a folder"))
        else:
            yield from _walk(child, skipped)


def _reason_to_skip(path: Path, codec: Codec) -> str:
    try:
        with _open_unpacked(path) as file:
            modality = sniff_open(file, shown(path)).modality
    except UserError as error:
        return str(error)
    return "" if modality == codec.modality else f"it is {modality}, the model reads {codec.modality}"


@contextlib.contextmanager
def _open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file, or what is inside an xz file, open for reading."""
    with open_regular(path) as file:
        is_xz = file.read(len(_XZ_SIGNATURE)) == _XZ_SIGNATURE
        file.seek(0)
        if not is_xz:
            yield file
            return
        try:
            with lzma.open(file) as unpacked:
                yield unpacked
        except (lzma.LZMAError, EOFError):
            raise UserError(f"{shown(path)} is a damaged xz file; get it again") from None


def _blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes. Read by a generator, so that a full disk where they are written is not taken for trouble in this file."""
    with _open_unpacked(path) as file:
        yield from iter(functools.partial(file.read, _BLOCK_BYTES), b"")


def _digest(files: list[Path], codec: Codec) -> str:
    facts: list[Any] = [_FORMAT, dataclasses.asdict(codec.config)]
    for path in files:
        status = path.stat()
        facts.append([os.fsdecode(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _index_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _read_index(shard: Path) -> dict[str, Any] | None:
    """The index of a shard that is there and whole. It is written last, so without it there is no shard."""
    try:
        index = json.loads(_index_path(shard).read_bytes())
        return index if shard.stat().st_size == index["num_bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_shard(files: list[Path], codec: Codec, shard: Path) -> dict[str, Any]:
    """Writes the shard and its index, and returns the index."""
    offsets, skipped, notes = [0], [], Counter()
    try:
        shard.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown(shard.parent)} cannot be made ({error.strerror}); choose another folder") from None
    with atomic_file(shard) as target:
        for path in files:
            try:
                lengths, file_notes = _append_file(path, codec, target)
            except UserError as error:
                target.seek(offsets[-1])
                target.truncate()
                skipped.append((os.fsdecode(path), str(error)))
                continue
            offsets.extend((offsets[-1] + np.cumsum(lengths)).tolist())
            notes.update(file_notes)
    index = {"num_bytes": offsets[-1], "document_offsets": offsets, "skipped": skipped, "notes": dict(notes)}
    with atomic_file(_index_path(shard)) as target:
        target.write(json.dumps(index).encode())
    return index


def _append_file(path: Path, codec: Codec, target: BinaryIO) -> tuple[list[int], tuple[str, ...]]:
    """Writes a file's stream at the end of `target`; the lengths of its documents and the notes of its media."""
    if codec.modality == "text":
        start = target.tell()
        target.writelines(_blocks(path))
        return [target.tell() - start], ()
    with _open_unpacked(path) as file:
        media = read_open(file, shown(path), _MAX_SECONDS)
    options = {"rule": "grid"} if codec.modality == "image" else {"resample": True}
    stream, layout = codec.encode(media, **options)
    target.write(stream.data)
    return [layout.document_bytes] * layout.num_documents, layout.notes


def _document_starts(data: ByteData, seq_len: int) -> np.ndarray:
    """Where the whole windows of each document begin, side by side from its beginning."""
    counts = np.diff(data.document_offsets) // seq_len
    if counts.sum() == 0:
        raise UserError(f"none of the {len(counts)} documents has {seq_len} bytes; give larger ones")
    number_in_document = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(data.document_offsets[:-1], counts) + seq_len * number_in_document


def _require_enough(data: ByteData, seq_len: int) -> None:
    if len(data) < seq_len:
        raise UserError(f"the data has {len(data):,} bytes, one sequence needs {seq_len:,}; give more data or lower seq_len")
