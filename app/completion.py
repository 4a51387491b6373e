"""Completing a file: keep its first part, make the rest byte by byte, and put the whole back into media."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.media import fitted
from app.settings import CompletionSettings
from app.store import LoadedModel
from app.turns import Turn
from core.codecs import Codec, Media, Picture, Raw, Sound
from core.config import AudioCodecConfig, ImageCodecConfig
from core.errors import UserError
from core.sample import Chunk, SampleConfig, Sampler

_DEFAULT_TEXT_BYTES = 500
_DEFAULT_SOUND_S = 1.0  # of sound made from nothing
_NOT_MADE = 128  # what stands in a picture where no byte was made: middle grey


@dataclass(frozen=True, kw_only=True)
class CompletionPlan:
    """What a job is going to do, known before it starts."""

    num_bytes_kept: int
    num_bytes_to_generate: int  # of each sample
    says: str  # the same in words
    estimate_seconds: float  # for all samples


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a job is.

    Attributes:
        sample: number of the sample at work, from 0.
        done_bytes, bytes_per_s: of that sample; `job.plan.num_bytes_to_generate` are wanted.
        chunk: the newest bytes and their bits.
        completion: the finished sample, on its last `Progress`.
        is_waiting: other jobs have their turn at the model.
    """

    job: "CompletionJob" = field(repr=False)
    stream: np.ndarray = field(repr=False)  # kept and new bytes; only the first num_bytes_kept + done_bytes mean something
    sample: int = 0
    done_bytes: int = 0
    bytes_per_s: float | None = None
    chunk: Chunk | None = None
    completion: "Completion | None" = None
    is_waiting: bool = False

    @property
    def total_bytes(self) -> int:
        return self.job.plan.num_bytes_to_generate

    @property
    def partial(self) -> Media:
        """The media as far as it is made."""
        return self.job.media_of(self.stream, self.done_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One finished sample: the kept part and the new bytes as media.

    Attributes:
        source: the file it began with; None if there was none.
        bits_per_byte: of the new bytes, under the model's own unfiltered law.
        sample: its number in the job, from 0; with the seed it fixes every random choice.
    """

    source: Path | None
    media: Media
    model: str
    modality: str
    num_bytes_kept: int
    num_bytes_generated: int
    bits_per_byte: float
    seed: int
    sample: int
    engine: str
    seconds: float
    notes: tuple[str, ...]
    bits: np.ndarray  # of each new byte, float32
    codec: Codec

    def to_dict(self, output: Path | None = None) -> dict[str, Any]:
        """The JSON object of the command line and of the page's endpoint."""
        names = ("model", "seed", "num_bytes_kept", "num_bytes_generated", "bits_per_byte", "engine", "seconds")
        return {
            "source": None if self.source is None else str(self.source),
            "output": None if output is None else str(output),
            **{name: getattr(self, name) for name in names},
        }


class CompletionJob:
    """Some completions of one file (or of typed text, or of nothing).

    Attributes:
        plan: what is going to be done.
        notes: what was done to the file before its first part was kept, in words.
        results: the samples finished so far.
    """

    def __init__(
        self, loaded: LoadedModel, media: Media | None, settings: CompletionSettings, source: Path | None = None
    ) -> None:
        """Prepares everything and makes nothing yet. `media` None starts from nothing.

        Raises:
            UserError: if the media or the settings do not fit the model.
        """
        self.loaded = loaded
        self.source = source
        self.settings = settings
        self.codec = loaded.codec
        self.results: list[Completion] = []
        self._media = _blank_media(self.codec) if media is None else fitted(media, self.codec)
        self._stream, self._layout = self.codec.encode(self._media)
        num_bytes_wanted = 0 if media is None else self._num_bytes_to_keep()
        self._prefix = self._stream[: self.codec.round_prefix(num_bytes_wanted)]
        num_bytes = self._num_bytes_to_generate()
        config = SampleConfig(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed)
        self._sampler = Sampler(loaded.model, self._prefix, num_bytes, config)
        self.plan = self._make_plan(num_bytes)
        self.notes = (
            *self._layout.notes,
            *self._says_what_is_rounded(num_bytes_wanted),
            *self._says_what_stays_grey(num_bytes),
        )

    @property
    def kept(self) -> Media:
        """The part of the media that is kept."""
        return self.media_of(self._prefix, 0)

    @property
    def engine(self) -> str:
        """What makes the bytes: within one engine a seed gives the same ones."""
        return self._sampler.engine

    def run(self, samples: Sequence[int] | None = None) -> Iterator[Progress]:
        """Makes the samples, or those of these numbers, one `Progress` a model patch, in turns with other jobs.

        Closing the iterator frees the model.
        """
        with Turn(self.loaded.lock) as turn:
            for sample in range(self.settings.samples) if samples is None else samples:
                yield from self._run_sample(sample, turn)

    def media_of(self, stream: np.ndarray, num_made: int) -> Media:
        """The kept part and the first `num_made` new bytes as media; what is not made of a picture is grey."""
        made = stream[: len(self._prefix) + num_made]
        if isinstance(self._media, Picture):
            made = np.concatenate((made, np.full(len(self._stream) - len(made), _NOT_MADE, dtype=np.uint8)))
        if isinstance(self._media, Sound):
            made = made[: self.codec.round_prefix(len(made))]
            num_kept = len(self._prefix) // self.codec.config.bytes_per_sample
            return self.codec.splice(self._media, num_kept, self.codec.decode(made, self._layout))
        return self.codec.decode(made, self._layout)

    def _num_bytes_to_keep(self) -> int:
        asked, available = self.settings.keep_bytes, len(self._stream)
        if asked is None:
            fraction = 0.5 if self.settings.keep is None else self.settings.keep
            asked = int(round(available * fraction, 6))  # so that 0.29 of 100 bytes are 29
        if asked > available:
            raise UserError(f"keep_bytes={asked} exceeds the {available} bytes that are there; keep fewer")
        return asked

    def _num_bytes_to_generate(self) -> int:
        if self.settings.num_bytes is not None:
            return self.settings.num_bytes
        if isinstance(self._media, Raw):
            return _DEFAULT_TEXT_BYTES
        num_cut = len(self._stream) - len(self._prefix)
        if isinstance(self._media, Sound) and len(self._stream) == 0:
            num_cut = int(_DEFAULT_SOUND_S * self.codec.config.sample_rate) * self.codec.config.bytes_per_sample
        if num_cut == 0:
            raise UserError("everything is kept and nothing is left to make; keep less, or say how many bytes to make")
        return num_cut

    def _make_plan(self, num_bytes: int) -> CompletionPlan:
        kept = len(self._prefix)
        keeps = f"keeps {self.codec.prefix_says(kept)}" if kept else "starts from nothing"
        return CompletionPlan(
            num_bytes_kept=kept,
            num_bytes_to_generate=num_bytes,
            says=f"{keeps}, makes {num_bytes} bytes with {self.loaded.info.name}",
            estimate_seconds=self.settings.samples * num_bytes / self.loaded.bytes_per_s(),
        )

    def _says_what_is_rounded(self, num_bytes_wanted: int) -> tuple[str, ...]:
        kept = len(self._prefix)
        if kept == num_bytes_wanted:
            return ()
        return (f"the kept part is rounded down from {num_bytes_wanted} to {kept} bytes, {self.codec.prefix_says(kept)}",)

    def _says_what_stays_grey(self, num_bytes: int) -> tuple[str, ...]:
        num_grey = len(self._stream) - len(self._prefix) - num_bytes if isinstance(self._media, Picture) else 0
        return (f"the last {num_grey} bytes of the picture are not made and stay grey",) if num_grey else ()

    def _run_sample(self, sample: int, turn: Turn) -> Iterator[Progress]:
        started, kept, num_bytes = time.perf_counter(), len(self._prefix), self.plan.num_bytes_to_generate
        stream = np.concatenate((self._prefix, np.zeros(num_bytes, dtype=np.uint8)))
        bits = np.empty(num_bytes, dtype=np.float32)
        done, completion = 0, None
        with closing(self._sampler.stream(sample)) as chunks:
            while done < num_bytes:
                while not turn.take():
                    yield Progress(self, stream, sample, done, is_waiting=True)
                chunk = next(chunks)
                end = done + len(chunk.byte_values)
                stream[kept + done : kept + end], bits[done:end] = chunk.byte_values, chunk.bits
                done, seconds = end, time.perf_counter() - started
                if done == num_bytes:
                    self.loaded.note_speed(done / seconds)
                    completion = self._completion(sample, stream, bits, seconds)
                    self.results.append(completion)
                yield Progress(self, stream, sample, done, done / seconds, chunk, completion)

    def _completion(self, sample: int, stream: np.ndarray, bits: np.ndarray, seconds: float) -> Completion:
        return Completion(
            source=self.source,
            media=self.media_of(stream, len(bits)),
            model=self.loaded.info.name,
            modality=self.loaded.modality,
            num_bytes_kept=len(self._prefix),
            num_bytes_generated=len(bits),
            bits_per_byte=float(bits.mean(dtype=np.float64)),
            bits=bits,
            seed=self.settings.seed,
            sample=sample,
            engine=self.engine,
            seconds=round(seconds, 3),
            notes=self.notes,
            codec=self.codec,
        )


def run_together(tasks: Sequence[tuple[CompletionJob, int]]) -> Iterator[Progress]:
    """Makes some samples, each a job and its number, of jobs that share a model."""
    for job, sample in tasks:
        yield from job.run([sample])


def _blank_media(codec: Codec) -> Media:
    """What a completion of nothing begins with."""
    config = codec.config
    if isinstance(config, ImageCodecConfig):
        return Picture(np.zeros((config.side, config.side, 3), dtype=np.uint8))
    if isinstance(config, AudioCodecConfig):
        return Sound(np.zeros(0, dtype=np.int16), config.sample_rate)
    return Raw(np.zeros(0, dtype=np.uint8))
