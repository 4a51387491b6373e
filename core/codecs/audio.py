"""Sound as bytes: safe reading down to mono 16-bit samples, mu-law and PCM streams, resampling, WAV writing."""

import math
import os
import re
import struct
import wave
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from core.codecs.comments import info_list
from core.codecs.files import FileKind, atomic_file, require_size
from core.config import AudioCodecConfig
from core.errors import UserError

MAX_SECONDS = 600
MAX_RATE_HZ = 384_000
MAX_CHANNELS = 8
# Above this rate a file may last correspondingly shorter, so that memory is bounded by MAX_SECONDS.
_FULL_LENGTH_RATE_HZ = 48_000
_OPUS_SHARE = 0.8  # of that length, divided among its channels: decoding takes 4 ms a second of each, and 2 s are a long wait
_BLOCK_FRAMES = 4096  # damage in a compressed file costs at most one block
_FRAMES_AT_ONCE = 16 * _BLOCK_FRAMES  # are mixed down and rounded together
_RIFF_SIZE_PLACE = 4
_MAX_WAV_CHUNKS = 1000
_OGG_HEADER_BYTES = 27  # before a page's segment lengths
_MAX_OGG_PAGE_BYTES = _OGG_HEADER_BYTES + 255 + 255 * 255
_MAX_OGG_BYTES = 64 * 2**20  # more than MAX_SECONDS at any rate; in a larger file the way to its last page is long
_UNKNOWN_WAV_LENGTH = b"\xff\xff\xff\xff"
_UNKNOWN_FRAMES = 2**62
_MISTAKEN_SAMPLES = (b"OggS", b"wvpk")  # by which libsndfile knows other formats inside a WAV file, and refuses them
_CHUNK_NAME = re.compile(rb"[A-Za-z0-9 ]{4}")

_MAX_GAIN_DB = 6.0  # of augmentation, either way
_ZERO_CROSSINGS = 64  # of the resampling filter, on each side
_CUTOFF = 0.955  # of the lower Nyquist frequency
_KAISER_BETA = 9.0


@dataclass(frozen=True, eq=False)
class Sound:
    """A mono 16-bit sound."""

    samples: np.ndarray  # int16 (N,)
    sample_rate: int  # Hz
    notes: tuple[str, ...] = ()  # what was done to the file to get here, for a person
    is_truncated: bool = False  # whether the file promised more samples than it holds
    num_missing: int = 0  # samples that it promised in vain, where it said how many

    @property
    def seconds(self) -> float:
        return self.samples.size / self.sample_rate


@dataclass(frozen=True)
class AudioLayout:
    """The time axis of a stream."""

    num_samples: int
    sample_rate: int  # Hz
    num_bytes: int
    notes: tuple[str, ...] = ()
    is_truncated: bool = False
    num_documents = 1
    counted = None

    @property
    def document_bytes(self) -> int:
        return self.num_bytes


def read_sound(file: BinaryIO, name: str, kind: FileKind, max_seconds: float = MAX_SECONDS) -> Sound:
    """An open sound file, mixed down to mono and rounded to 16 bits, as far as its data reaches.

    Raises:
        UserError: if it is too long, or damaged so that nothing can be read.
    """
    if kind.name == "ogg":
        require_size(file, name, _MAX_OGG_BYTES)
    try:
        fraction = 1.0  # of its sound that is there
        if kind.name == "wav":
            file, fraction = _check_wav(file)
        elif kind.name == "ogg" and not _reaches_last_page(file):
            fraction = None
        with _ForwardSoundFile(file) as source:
            if isinstance(file, _Replaced):
                file.reveal()
            _require_readable(source, name)
            # The length that a file claims is true where its data is all there; a FLAC file does not tell that before its end.
            if kind.name != "flac" and fraction == 1.0:
                _require_length(source.frames, source, name, max_seconds)
            sound = _read_samples(source, name, max_seconds)
            if kind.name == "flac" and 0 < source.frames < _UNKNOWN_FRAMES:
                fraction = sound.samples.size / source.frames
    except UserError:
        raise
    # The library answers damage with its own errors, with RuntimeError, TypeError or AssertionError.
    except Exception:
        raise UserError(f"{name} is damaged, no sound can be read from it; score its raw bytes with --bytes file") from None
    if sound.samples.size == 0:
        raise UserError(f"{name} holds no sound, only a header; score its raw bytes with --bytes file")
    return sound if fraction == 1.0 else _cut_short(sound, fraction)


def resample(sound: Sound, sample_rate: int) -> Sound:
    """The sound at another rate, by a polyphase filter with linear phase and unit gain at 0 Hz.

    A sinc windowed by Kaiser's window (beta 9, 64 zero crossings on each side): flat up to 0.91 of the lower Nyquist frequency,
    and at least 85 dB down from that frequency on.
    """
    if sample_rate == sound.sample_rate:
        return sound
    common = math.gcd(sample_rate, sound.sample_rate)
    up, down = sample_rate // common, sound.sample_rate // common
    cutoff = _CUTOFF * min(1.0, up / down)
    reach = math.ceil(_ZERO_CROSSINGS / cutoff)  # samples that count on each side
    padded = np.pad(sound.samples.astype(np.float32), reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach)[1:]
    resampled = np.empty(math.ceil(sound.samples.size * up / down), np.float32)
    # Output n lies at input n * down / up: the outputs phase, phase + up, ... share one filter.
    for phase in range(min(up, resampled.size)):
        centre, remainder = divmod(phase * down, up)
        distances = np.arange(1 - reach, reach + 1) - remainder / up
        outputs = resampled[phase::up]
        outputs[...] = windows[centre::down][: outputs.size] @ _filter(distances, cutoff, reach)
    note = f"resampled from {sound.sample_rate} Hz to {sample_rate} Hz"
    num_missing = round(sound.num_missing * up / down)
    return Sound(_to_int16(resampled), sample_rate, (*sound.notes, note), sound.is_truncated, num_missing)


class AudioCodec:
    """Samples as mu-law bytes or as the two bytes of 16-bit PCM."""

    modality = "audio"
    suffix = ".wav"

    def __init__(self, config: AudioCodecConfig) -> None:
        self.config = config

    @property
    def unit_bytes(self) -> int:
        return self.config.bytes_per_sample

    def encode(self, media: Sound, resample: bool = False) -> tuple[np.ndarray, AudioLayout]:
        """The sound's bytes in time order.

        Raises:
            UserError: if the sound has another rate than the codec and is not to be resampled.
        """
        media = self._at_own_rate(media, resample)
        if self.config.encoding == "mulaw8":
            stream = _MULAW_BYTES[media.samples.view(np.uint16)]
        else:
            stream = media.samples.astype(self._sample_type).view(np.uint8)
        layout = AudioLayout(media.samples.size, media.sample_rate, stream.size, media.notes, media.is_truncated)
        return stream, layout

    def decode(self, stream: np.ndarray, layout: AudioLayout) -> Sound:
        if self.config.encoding == "mulaw8":
            samples = _MULAW_SAMPLES[stream]
        else:
            samples = np.ascontiguousarray(stream).view(self._sample_type).astype(np.int16)
        return Sound(samples, layout.sample_rate, layout.notes, layout.is_truncated)

    def unscan(self, values: np.ndarray, layout: AudioLayout) -> np.ndarray:
        """Values of a stream, (T, ...), summed over the bytes of each sample, (N, ...): bits add up."""
        return values.reshape(-1, self.config.bytes_per_sample, *values.shape[1:]).sum(axis=1, dtype=values.dtype)

    def round_prefix(self, num_bytes: int) -> int:
        """The bytes of the whole samples that `num_bytes` bytes complete."""
        return num_bytes - num_bytes % self.config.bytes_per_sample

    def prefix_says(self, num_bytes: int) -> str:
        return f"{num_bytes / self.config.bytes_per_sample / self.config.sample_rate:.2f} s"

    def splice(self, original: Sound, num_samples: int, decoded: Sound) -> Sound:
        """`decoded` with its first samples those of `original`, which mu-law has only approximated."""
        samples = np.concatenate([original.samples[:num_samples], decoded.samples[num_samples:]])
        return Sound(samples, decoded.sample_rate, decoded.notes, decoded.is_truncated)

    def augmented(self, stream: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Up to 6 dB louder or softer, and with the opposite polarity half of the time.

        A sample stands for all amplitudes that round to it; one of them is drawn before the gain, or louder sounds would
        have gaps between their values.
        """
        gain = 10.0 ** (generator.uniform(-_MAX_GAIN_DB, _MAX_GAIN_DB) / 20) * generator.choice((-1.0, 1.0))
        if self.config.encoding == "mulaw8":
            levels = stream + generator.uniform(-0.5, 0.5, stream.size)
            amplitudes = np.clip(gain * _mulaw_expand(levels / 127.5 - 1), -1.0, 1.0)
            return np.rint((_mulaw_compress(amplitudes) + 1) * 127.5).astype(np.uint8)
        samples = stream.view(self._sample_type) + generator.uniform(-0.5, 0.5, stream.size // 2)
        return _to_int16(gain * samples).astype(self._sample_type).view(np.uint8)

    def write(self, media: Sound, path: Path, comment: str | None = None) -> None:
        with atomic_file(path) as file:
            with wave.open(file, "wb") as target:
                target.setparams((1, 2, media.sample_rate, media.samples.size, "NONE", "not compressed"))
                target.writeframes(media.samples.astype("<i2").tobytes())
            if comment is not None:
                num_bytes = file.write(info_list(comment))
                file.seek(_RIFF_SIZE_PLACE)
                file.write(struct.pack("<I", 36 + 2 * media.samples.size + num_bytes))

    @property
    def _sample_type(self) -> str:
        return "<i2" if self.config.encoding == "pcm16le" else ">i2"

    def _at_own_rate(self, sound: Sound, may_resample: bool) -> Sound:
        if sound.sample_rate != self.config.sample_rate and not may_resample:
            raise UserError(
                f"the sound has {sound.sample_rate} Hz, the model expects {self.config.sample_rate} Hz; "
                "--adapt resamples it for scoring"
            )
        return resample(sound, self.config.sample_rate)


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(samples), -32768, 32767).astype(np.int16)


def _mulaw_samples() -> np.ndarray:
    """The 16-bit sample each byte stands for: the continuous formula with mu = 255 at 256 evenly spaced levels."""
    return _to_int16(_mulaw_expand(np.arange(256) / 127.5 - 1) * 32768)


def _mulaw_bytes() -> np.ndarray:
    """The nearest level's byte for each sample, indexed by the sample's bits as an unsigned number."""
    amplitudes = np.arange(65536, dtype=np.uint16).view(np.int16) / 32768
    return np.floor((_mulaw_compress(amplitudes) + 1) * 127.5 + 0.5).astype(np.uint8)


def _mulaw_expand(levels: np.ndarray) -> np.ndarray:
    """Levels in -1..1 as amplitudes."""
    return np.sign(levels) * (256 ** np.abs(levels) - 1) / 255


def _mulaw_compress(amplitudes: np.ndarray) -> np.ndarray:
    """Amplitudes in -1..1 as levels; the inverse of `_mulaw_expand`."""
    return np.sign(amplitudes) * np.log1p(255 * np.abs(amplitudes)) / math.log(256)


_MULAW_SAMPLES = _mulaw_samples()
_MULAW_BYTES = _mulaw_bytes()


def _filter(distances: np.ndarray, cutoff: float, reach: int) -> np.ndarray:
    window = np.i0(_KAISER_BETA * np.sqrt(np.maximum(0.0, 1 - (distances / reach) ** 2)))
    taps = np.sinc(cutoff * distances) * window
    return (taps / taps.sum()).astype(np.float32)


class _ForwardSoundFile(soundfile.SoundFile):
    """A sound file that is only read onwards; the seek after each block, which SoundFile makes, fails near a cut."""

    def seekable(self) -> bool:
        return False


class _Replaced:
    """An open file with some bytes replaced until it is revealed."""

    def __init__(self, file: BinaryIO, place: int, content: bytes) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self._file = file
        self._place = place
        self._content = content

    def read(self, size: int) -> bytes:
        start = self.tell()
        found = bytearray(self._file.read(size))
        for place, value in enumerate(self._content, self._place - start):
            if 0 <= place < len(found):
                found[place] = value
        return bytes(found)

    def reveal(self) -> None:
        self._content = b""


def _check_wav(file: BinaryIO) -> tuple[BinaryIO, float]:
    """A WAV file that can be read to its end, and how much of the sample data that its header promises is there."""
    size_format = ">4sI" if file.read(12).startswith(b"RIFX") else "<4sI"
    for _ in range(_MAX_WAV_CHUNKS):
        chunk, size = struct.unpack(size_format, file.read(8))
        start = file.tell()
        if chunk == b"data":
            break
        file.seek(start + size + size % 2)  # chunks begin at even places
    else:
        raise ValueError("there is no sample data among the first chunks")
    first = file.read(4)
    is_unfinished = size == 0 and not _CHUNK_NAME.match(first)
    present = file.seek(0, os.SEEK_END) - start
    file.seek(0)
    if is_unfinished:
        # A recorder that was killed never came back to fill in the length.
        return _Replaced(file, start - 4, _UNKNOWN_WAV_LENGTH), 1.0
    if first in _MISTAKEN_SAMPLES:
        file = _Replaced(file, start, bytes(4))
    return file, 1.0 if size in (0, 0xFFFFFFFF) else min(1.0, present / size)


def _reaches_last_page(file: BinaryIO) -> bool:
    """Whether an Ogg file, left at its beginning, holds all of the page that is marked as its last.

    Nothing else in it says how long it should be.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, num_bytes - _MAX_OGG_PAGE_BYTES))
    tail = file.read()
    file.seek(0)
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _OGG_HEADER_BYTES or not page[5] & 4:
        return False
    segments = page[_OGG_HEADER_BYTES : _OGG_HEADER_BYTES + page[26]]
    return len(page) >= _OGG_HEADER_BYTES + page[26] + sum(segments)


def _require_readable(source: soundfile.SoundFile, name: str) -> None:
    if source.channels > MAX_CHANNELS:
        raise UserError(f"{name} has {source.channels} channels, at most {MAX_CHANNELS} are mixed down; give fewer")
    if not 1 <= source.samplerate <= MAX_RATE_HZ:
        raise UserError(f"{name} has {source.samplerate} Hz, 1 to {MAX_RATE_HZ} Hz are read; resample it")


def _require_length(num_samples: int, source: soundfile.SoundFile, name: str, max_seconds: float) -> None:
    max_samples = max_seconds * min(source.samplerate, _FULL_LENGTH_RATE_HZ)
    if source.subtype == "OPUS":
        max_samples *= _OPUS_SHARE / source.channels
    if num_samples > max_samples:
        seconds = max_samples / source.samplerate
        raise UserError(f"{name} is longer than {seconds:.0f} s, the most that is read of its kind; cut it into parts")


def _read_samples(source: soundfile.SoundFile, name: str, max_seconds: float) -> Sound:
    """The samples that can be read, counted while reading because headers lie about lengths."""
    blocks, num_samples, is_clipped = [], 0, False
    for block in _mono_blocks(source):
        num_samples += block.size
        _require_length(num_samples, source, name, max_seconds)
        if not (block.min() >= -1.0 and block.max() <= 1.0):  # also where there is what is not a number
            is_clipped, block = True, np.nan_to_num(block).clip(-1.0, 1.0)
        blocks.append(_to_int16(block * 32768))
    notes = []
    if source.channels > 1:
        notes.append(f"mixed down from {source.channels} channels")
    if source.subtype != "PCM_16":
        notes.append(f"turned into 16-bit samples from {source.subtype_info}")
    if is_clipped:
        notes.append("cut off at full scale")
    return Sound(np.concatenate([np.empty(0, np.int16), *blocks]), source.samplerate, tuple(notes))


def _mono_blocks(source: soundfile.SoundFile) -> Iterator[np.ndarray]:
    # A FLAC file is not read beyond its end: whatever lies behind it would be damage of the last block.
    left = source.frames if source.format == "FLAC" and source.frames else _UNKNOWN_FRAMES
    frames = np.empty((_FRAMES_AT_ONCE, source.channels), np.float32)
    is_at_end = False
    while left > 0 and not is_at_end:
        num_read = 0
        while num_read < min(left, _FRAMES_AT_ONCE) and not is_at_end:
            try:
                block = source.read(out=frames[num_read : num_read + min(left - num_read, _BLOCK_FRAMES)])
            except soundfile.LibsndfileError:
                block = ()
            num_read += len(block)
            is_at_end = len(block) == 0
        left -= num_read
        if num_read:
            yield _mixed_down(frames[:num_read])


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is far beyond full scale, and cut off as that
def _mixed_down(frames: np.ndarray) -> np.ndarray:
    """The mean of the channels, (N, C) to (N,)."""
    match frames.shape[1]:
        case 1:
            return frames[:, 0]
        case 2:
            return (frames[:, 0] + frames[:, 1]) / 2  # as `mean`, in a fraction of its time
    return frames.mean(axis=1)


def _cut_short(sound: Sound, fraction: float | None) -> Sound:
    promised = f" of {sound.seconds / fraction:.2f} s" if fraction else ""
    note = f"ends early: {sound.seconds:.2f} s{promised} are there"
    num_missing = round(sound.samples.size * (1 / fraction - 1)) if fraction else 0
    return replace(sound, notes=(*sound.notes, note), is_truncated=True, num_missing=num_missing)
