"""How likely a file is under a model: read, encode, score, and put the bits back into the shape of the media."""

import hashlib
import io
import lzma
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from PIL import Image

from app.media import fitted, kind_of, modality_of
from app.messages import Failure, plain_sentence
from app.store import LoadedModel, ModelStore
from app.turns import Turn
from core.codecs import Codec, Layout, Media, Picture, Sound, build_codec, read_media, read_raw
from core.config import TextCodecConfig
from core.likelihood import Expectation, Score, score

ScoredAs = Literal["media", "file"]
ProgressCallback = Callable[[int, int], None]  # bytes scored, bytes read so far

_JSON_FIELDS = (
    "model",
    "modality",
    "scored_as",
    "num_bytes",
    "total_bits",
    "bits_per_byte",
    "window",
    "hop",
    "strided",
    "engine",
)

# Small files share batches: enough of them to fill the processor, few enough to see results come.
_MAX_GROUP_BYTES = 1 << 20
_MAX_GROUP_FILES = 256
_OUT_OF_MEMORY = "out of memory while it was scored; score fewer files at a time, or take a smaller model with --model"
_PIECE = 1 << 16  # bytes that xz is given at a time, a fraction of a second's work


@dataclass(frozen=True, kw_only=True, eq=False)
class FileScore:
    """The information content of one file.

    Attributes:
        file: the path as it was given.
        scored_as: "media" if the decoded pixels, samples or text were scored, "file" if the file's own bytes were.
        kind: which view fits its media: image, audio, text or raw.
        num_bytes: bytes counted; where the tiles of a picture overlap, each pixel counts once.
        notes: what was done to the file before scoring, in words.
        bits: float32 `(T,)` in stream order; `media_bits` has them in the shape of the media.
        expected: rank, entropy and the likeliest bytes in stream order; None unless they were asked for.
    """

    file: Path
    model: str
    modality: str
    scored_as: ScoredAs
    num_bytes: int
    total_bits: float
    bits_per_byte: float | None
    window: int
    hop: int
    strided: bool
    engine: str
    notes: tuple[str, ...]
    bits: np.ndarray
    expected: Expectation | None
    layout: Layout
    media: Media
    codec: Codec

    @property
    def kind(self) -> str:
        return kind_of(self.media)

    @property
    def media_bits(self) -> np.ndarray:
        """Bits as `(H, W, 3)` of a picture, `(N,)` of the samples of a sound, `(T,)` of other bytes."""
        return self.codec.unscan(self.bits, self.layout)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the command line and of the page's endpoint."""
        return {"file": str(self.file), **{name: getattr(self, name) for name in _JSON_FIELDS}}


@dataclass
class ScoreTotal:
    """The sums over some files, in float64, and the time since they were begun."""

    num_files: int = 0
    num_bytes: int = 0
    total_bits: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def add(self, result: FileScore) -> None:
        self.num_files += 1
        self.num_bytes += result.num_bytes
        self.total_bits += result.total_bits

    @property
    def bits_per_byte(self) -> float | None:
        return self.total_bits / self.num_bytes if self.num_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """The last JSON object of the command line."""
        return {
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "total_bits": self.total_bits,
            "bits_per_byte": self.bits_per_byte,
            "seconds": round(time.perf_counter() - self._started, 3),
        }


@dataclass(frozen=True, eq=False)
class _Reading:
    """A file that is ready to be scored."""

    file: Path
    loaded: LoadedModel
    codec: Codec
    media: Media
    stream: np.ndarray
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores files with one set of options.

    Attributes:
        model: name or folder; None takes each file's modality's own.
        scored_as, hop, strided: as in `FileScore`; a hop of 0 stands for the window.
        adapt: resample sounds of another rate and enlarge pictures smaller than the model's, instead of refusing them.
        detailed: keep what the model expected at each byte too.
        progress: called with the bytes scored and the bytes read, both so far; what it raises ends the scoring.
    """

    store: ModelStore
    model: str | Path | None = None
    scored_as: ScoredAs = "media"
    hop: int = 0
    strided: bool = False
    adapt: bool = False
    detailed: bool = False
    progress: ProgressCallback | None = None

    def score(self, files: Iterable[Path]) -> Iterator[FileScore | Failure]:
        """A result for each file, in their order; small ones are scored together."""
        done = 0
        for group in _groups(map(self._read_or_fail, files)):
            readings = [entry for entry in group if isinstance(entry, _Reading)]
            results = self._score_group(readings, done)
            done += sum(len(reading.stream) for reading in readings)
            yield from (entry if isinstance(entry, Failure) else results[id(entry)] for entry in group)

    def read(self, file: Path) -> _Reading:
        """The stream of a file and the model for it.

        Raises:
            ValueError: if the file or the model cannot be used.
            OSError: if the file cannot be read.
        """
        if self.scored_as == "file":
            media, codec = read_raw(file), build_codec(TextCodecConfig())
            loaded = self.store.load(self.model or "text")  # any model reads bytes
        else:
            media = read_media(file)
            loaded = self.store.load_for(media, self.model)
            codec = loaded.codec
            if self.adapt and not _fits_in_tiles(media, codec):
                media = fitted(media, codec)
        stream, layout = codec.encode(media)
        return _Reading(file, loaded, codec, media, stream, layout)

    def _read_or_fail(self, file: Path) -> "_Reading | Failure":
        try:
            return self.read(file)
        except (ValueError, OSError) as error:
            return Failure(file=file, message=plain_sentence(error, file))

    def _score_group(self, readings: list[_Reading], done: int) -> dict[int, FileScore | Failure]:
        results: dict[int, FileScore | Failure] = {}
        for loaded in {id(reading.loaded): reading.loaded for reading in readings}.values():
            own = [reading for reading in readings if reading.loaded is loaded]
            try:
                scores = self._score_streams(loaded, own, done)
                results |= {id(r): self._result(r, s) for r, s in zip(own, scores, strict=True)}
            except ValueError as error:
                results |= {id(r): Failure(file=r.file, message=plain_sentence(error, r.file)) for r in own}
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
                    raise
                results |= {id(r): Failure(file=r.file, message=_OUT_OF_MEMORY) for r in own}
            done += sum(len(reading.stream) for reading in own)
        return results

    def _score_streams(self, loaded: LoadedModel, readings: list[_Reading], done: int) -> list[Score]:
        known = done + sum(len(reading.stream) for reading in readings)

        def report(num_bytes: int = 0) -> None:
            nonlocal done
            done += num_bytes
            if self.progress is not None:
                self.progress(done, known)

        def advance(num_bytes: int) -> None:
            report(num_bytes)
            while done < known and not turn.take():
                report()  # so that whoever waits for other jobs can still give up

        with Turn(loaded.lock) as turn:
            advance(0)
            return score(
                loaded.model,
                [reading.stream for reading in readings],
                hop=self.hop,
                strided=self.strided,
                detailed=self.detailed,
                counted=[reading.layout.counted for reading in readings],
                progress=advance,
            )

    def _result(self, reading: _Reading, result: Score) -> FileScore:
        return FileScore(
            file=reading.file,
            model=reading.loaded.info.name,
            modality=modality_of(reading.media),
            scored_as=self.scored_as,
            num_bytes=result.num_bytes,
            total_bits=result.total_bits,
            bits_per_byte=result.bits_per_byte,
            window=result.window,
            hop=result.hop,
            strided=result.strided,
            engine=result.engine,
            notes=(*reading.layout.notes, *self._says_what_was_scored(reading.media)),
            bits=result.bits,
            expected=result.expected,
            layout=reading.layout,
            media=reading.media,
            codec=reading.codec,
        )

    def _says_what_was_scored(self, media: Media) -> tuple[str, ...]:
        if self.scored_as == "media" and kind_of(media) == "raw":
            return ("of no known format, so its bytes are scored as they are",)
        return ()


class ReferenceSizes:
    """What everyday compressors need for the bytes of scores, to compare with; the same bytes are compressed once."""

    def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
        """`pause` is called several times a second; what it raises ends the work."""
        self._pause = pause
        self._known: dict[bytes, dict[str, int]] = {}  # by a digest of the bytes and what they are

    def of(self, result: FileScore) -> dict[str, float]:
        """Bits per byte by the name of the compressor."""
        media = result.media
        values = media.pixels if isinstance(media, Picture) else result.codec.encode(media)[0]
        data = values.tobytes()
        key = hashlib.sha256(f"{result.kind} {values.shape} ".encode() + data).digest()
        if key not in self._known:
            self._known[key] = self._sizes(media, values, data)
        return {name: 8.0 * size / result.num_bytes for name, size in self._known[key].items()} if result.num_bytes else {}

    def _sizes(self, media: Media, values: np.ndarray, data: bytes) -> dict[str, int]:
        sizes = {"xz": self._xz_size(data)}
        if isinstance(media, Picture):
            sizes["PNG"] = _png_size(values)
        elif isinstance(media, Sound):
            sizes["FLAC"] = _flac_size(media, values)
        return sizes

    def _xz_size(self, data: bytes) -> int:
        compressor, size = lzma.LZMACompressor(preset=9), 0
        for start in range(0, len(data), _PIECE):
            self._pause()
            size += len(compressor.compress(data[start : start + _PIECE]))
        return size + len(compressor.flush())


def _fits_in_tiles(media: Media, codec: Codec) -> bool:
    return isinstance(media, Picture) and min(media.height, media.width) >= codec.config.side


def _groups(entries: Iterable[_Reading | Failure]) -> Iterator[list[_Reading | Failure]]:
    group, num_bytes = [], 0
    for entry in entries:
        group.append(entry)
        num_bytes += len(entry.stream) if isinstance(entry, _Reading) else 0
        if num_bytes >= _MAX_GROUP_BYTES or len(group) >= _MAX_GROUP_FILES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _png_size(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.tell()


def _flac_size(sound: Sound, stream: np.ndarray) -> int:
    """FLAC of exactly the scored values: 8-bit ones if there is one byte a sample, the 16-bit samples otherwise."""
    buffer = io.BytesIO()
    if len(stream) == len(sound.samples):
        # libsndfile takes the high bits of its 16-bit input.
        samples, subtype = (stream.astype(np.int16) - 128) * 256, "PCM_S8"
    else:
        samples, subtype = sound.samples, "PCM_16"
    soundfile.write(buffer, samples, sound.sample_rate, format="FLAC", subtype=subtype, compression_level=1.0)
    return len(buffer.getvalue())
