"""Completing a file: keep its first part, make the rest byte by byte, and put the whole back into media."""

import time
from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.canvas import Canvas, PictureCanvas, StreamCanvas
from app.framing import source_of
from app.settings import MAX_NUM_BYTES, CompletionSettings
from app.store import LoadedModel
from app.turns import Turn
from core.codecs import Codec, Media, Picture, Raw
from core.errors import UserError
from core.sample import Chunk, Request, SampleConfig, Sampler, next_byte_law, prepare, stream_batch

MAX_RESTORED_TEXT = 4_500_000  # bytes; longer ones make settings that are too long to be read back
MAX_TOGETHER = 32  # samples that are made together; few enough to see results come
_DEFAULT_TEXT_BYTES = 500


@dataclass(frozen=True, kw_only=True)
class CompletionPlan:
    """What a job is going to do, known before it starts."""

    num_bytes_kept: int
    num_bytes_to_generate: int  # of each sample
    says: str  # the same in words


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a job is.

    Attributes:
        sample: number of the sample at work, from 0.
        done_bytes, bytes_per_s: of that sample; `job.plan.num_bytes_to_generate` are wanted.
        chunk: the newest bytes and their bits.
        completion: the finished sample, on its last `Progress`.
        waits_for: what must be done first, in words; empty while bytes are made.
    """

    job: "CompletionJob" = field(repr=False)
    making: "_Making" = field(repr=False)  # it goes on changing
    sample: int = 0
    done_bytes: int = 0
    bytes_per_s: float | None = None
    chunk: Chunk | None = None
    completion: "Completion | None" = None
    waits_for: str = ""

    @property
    def total_bytes(self) -> int:
        return self.job.plan.num_bytes_to_generate

    @property
    def partial(self) -> Media:
        """The media as far as it is made."""
        return self.making.canvas.media()

    def stopped(self) -> "Completion | None":
        """The sample as far as it is made; None if nothing was drawn yet."""
        return self.making.completion() if self.making.num_drawn else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One sample, finished or stopped: the kept part and the new bytes as media.

    Attributes:
        job: what it is a sample of.
        source: the file it began with; None if there was none.
        bits_per_byte: of the new bytes, under the model's own unfiltered law.
        sample: its number in the job, from 0; with the seed it fixes every random choice.
    """

    job: "CompletionJob" = field(repr=False)
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
    made: np.ndarray  # the new bytes in the order in which they were made, uint8
    bits: np.ndarray  # of those that were drawn, float32
    codec: Codec

    @property
    def is_whole(self) -> bool:
        """Whether all bytes that were asked for are made."""
        return self.num_bytes_generated == self.job.plan.num_bytes_to_generate

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
        given: the media as the model reads it.
        results: the samples finished so far, in the order of their numbers.
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
        self._media = media
        self.given = source_of(media, loaded.codec, settings.framing, settings.upside_down)
        wanted = 0 if media is None else self._num_bytes_to_keep()
        self._num_kept = wanted - wanted % self.given.unit
        self._untouched = self._new_canvas(0)  # shows the kept part and is never written to
        self._first_bytes = np.frombuffer(bytes.fromhex(settings.first_bytes), np.uint8)
        num_bytes = self._num_bytes_to_generate()
        self._config = SampleConfig(**{name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "seed")})
        canvas = self._new_canvas(num_bytes)
        self._sampler = Sampler(loaded.model, canvas.prefix(0), min(canvas.stretches[0], num_bytes), self._config)
        self.plan = self._make_plan(num_bytes)
        self.notes = (
            *self.given.media.notes,
            *self._says_what_is_rounded(wanted),
            *self._says_how_tiles_are_made(),
            *self._says_what_stays_grey(num_bytes),
            *self._says_what_is_too_long(),
        )

    @property
    def engine(self) -> str:
        """What makes the bytes: within one engine a seed gives the same ones. Not to be asked before the work has begun."""
        return self._sampler.engine

    @property
    def estimate_seconds(self) -> float:
        """About how long all samples would take from now on."""
        num_drawn = self.plan.num_bytes_to_generate - self._first_bytes.size
        return self.loaded.estimate_seconds(self.settings.samples, num_drawn)

    @property
    def kept(self) -> Media:
        """The part of the media that is kept."""
        return self._untouched.media()

    def run(self) -> Iterator[Progress]:
        """Makes the samples, many at once where the engine can, one `Progress` a chunk, in turns with other jobs.

        Closing the iterator frees the model.
        """
        samples = range(self.settings.samples)
        for first in samples[::MAX_TOGETHER]:
            yield from run_together([(self, sample) for sample in samples[first : first + MAX_TOGETHER]])

    def alternatives(self, made: np.ndarray, number: int, count: int = 5) -> list[tuple[int, float]]:
        """The likeliest bytes, each with its probability under the model's own law, in place of new byte `number`.

        Args:
            made: the new bytes of a sample of this job, at least those before `number`.
            number: which of them, from 0.
            count: how many are asked for.
        """
        canvas = self.canvas_of(made[:number])
        for index, start, end in self._stretches(canvas):
            if number < end:
                with self.loaded.lock:
                    law = next_byte_law(self.loaded.model, np.concatenate((canvas.prefix(index), made[start:number])))
                return [(int(value), float(law[value])) for value in np.argsort(-law, kind="stable")[:count]]
        raise ValueError(f"byte {number} is none of the {self.plan.num_bytes_to_generate} new ones")

    def branched(self, made: np.ndarray, number: int, byte_value: int) -> "CompletionJob":
        """A job that begins with the new bytes before `number` and then `byte_value`, and makes what comes behind them."""
        first_bytes = made[:number].tobytes() + bytes([byte_value])
        num_bytes = self.plan.num_bytes_to_generate
        settings = replace(self.settings, first_bytes=first_bytes.hex(), num_bytes=num_bytes, samples=1)
        return CompletionJob(self.loaded, self._media, settings, self.source)

    def canvas_of(self, made: np.ndarray) -> Canvas:
        """The canvas of a sample whose first new bytes are given."""
        canvas = self._new_canvas(self.plan.num_bytes_to_generate)
        for index, start, end in self._stretches(canvas):
            canvas.put(index, 0, made[start:end])
        return canvas

    def _new_canvas(self, num_bytes: int) -> Canvas:
        media = self.given.media
        if isinstance(media, Picture):
            num_rows = self._num_kept // (3 * media.width)
            return PictureCanvas(self.codec, media, num_rows, upside_down=self.given.upside_down)
        return StreamCanvas(self.codec, media, self._num_kept, num_bytes)

    def _num_bytes_to_keep(self) -> int:
        asked, there = self.settings.keep_bytes, self.given.num_there
        if asked is None:
            default = 1.0 if self.given.is_cut else 0.5
            fraction = default if self.settings.keep is None else self.settings.keep
            asked = int(round(there * fraction, 6))  # so that 0.29 of 100 bytes are 29
        if asked > there:
            raise UserError(f"keep_bytes={asked} exceeds the {there} bytes that are there; keep fewer")
        return asked

    def _num_bytes_to_generate(self) -> int:
        """The bytes of each sample, at least one more than are given."""
        num_bytes = self.settings.num_bytes or self._num_bytes_missing()
        if isinstance(self.given.media, Picture) and num_bytes > (most := self._num_bytes_missing()):
            raise UserError(
                f"{num_bytes} bytes after the first {self._num_kept} exceed the picture of {self.given.num_whole} bytes; "
                f"ask for at most {most}"
            )
        if num_bytes == 0:
            raise UserError("everything is kept and nothing is left to make; keep less, or say how many bytes to make")
        if num_bytes > MAX_NUM_BYTES:
            raise UserError(
                f"{num_bytes:,} bytes are to be made, at most {MAX_NUM_BYTES:,} are; keep more, give num_bytes, "
                "or choose the framing fit, which scales a picture to the model's size"
            )
        if num_bytes <= self._first_bytes.size:
            raise UserError(f"first_bytes gives {self._first_bytes.size} of {num_bytes} bytes, so none is left to make")
        return num_bytes

    def _num_bytes_missing(self) -> int:
        if isinstance(self.given.media, Raw):
            return _DEFAULT_TEXT_BYTES + self._first_bytes.size
        if isinstance(self.given.media, Picture):
            return sum(self._untouched.stretches)
        return self.given.num_whole - self._num_kept

    def _make_plan(self, num_bytes: int) -> CompletionPlan:
        kept = self._num_kept
        keeps = f"keeps {self.given.says(kept, self.codec)}" if kept else "starts from nothing"
        begins = f", of which {self._first_bytes.size} are given" if self._first_bytes.size else ""
        return CompletionPlan(
            num_bytes_kept=kept,
            num_bytes_to_generate=num_bytes,
            says=f"{keeps}, makes {num_bytes} bytes{begins} with {self.loaded.info.name}",
        )

    def _says_what_is_rounded(self, wanted: int) -> tuple[str, ...]:
        kept = self._num_kept
        if kept == wanted:
            return ()
        return (f"the kept part is rounded down from {wanted} to {kept} bytes, {self.given.says(kept, self.codec)}",)

    def _says_how_tiles_are_made(self) -> tuple[str, ...]:
        if not self.given.is_tiled:
            return ()
        canvas, side = self._untouched, self.codec.config.side
        way = "below" if self.given.upside_down else "above"
        context = f"reads up to {canvas.context_rows} rows {way} it" if canvas.context_rows else "starts from nothing"
        return (
            f"larger than the model's {side}x{side}, so it is made at its own size in {len(canvas.stretches)} tiles: "
            f"each {context} and nothing at its sides",
        )

    def _says_what_stays_grey(self, num_bytes: int) -> tuple[str, ...]:
        num_grey = self._num_bytes_missing() - num_bytes if isinstance(self.given.media, Picture) else 0
        return (f"the last {num_grey} bytes of the picture are not made and stay grey",) if num_grey else ()

    def _says_what_is_too_long(self) -> tuple[str, ...]:
        if not isinstance(self.given.media, Raw) or self._num_kept <= MAX_RESTORED_TEXT:
            return ()
        return (f"more than {MAX_RESTORED_TEXT:,} bytes are kept, so the settings of a result are too long to restore",)

    def _stretches(self, canvas: Canvas) -> Iterator[tuple[int, int, int]]:
        """Number, first and last but one byte of each stretch that is to be made."""
        start, num_bytes = 0, self.plan.num_bytes_to_generate
        for index, length in enumerate(canvas.stretches):
            if start < num_bytes:
                yield index, start, min(start + length, num_bytes)
            start += length

    def _completion(self, sample: int, canvas: Canvas, made: np.ndarray, bits: np.ndarray, seconds: float) -> Completion:
        return Completion(
            job=self,
            source=self.source,
            media=canvas.media(),
            model=self.loaded.info.name,
            modality=self.loaded.modality,
            num_bytes_kept=self._num_kept,
            num_bytes_generated=len(made),
            bits_per_byte=float(bits.mean(dtype=np.float64)),
            made=made,
            bits=bits,
            seed=self.settings.seed,
            sample=sample,
            engine=self.engine,
            seconds=round(seconds, 3),
            notes=self.notes,
            codec=self.codec,
        )


class _Making:
    """One sample while it is made, stretch by stretch.

    Attributes:
        canvas: what it fills.
        request: the stretch at work; each stretch of each sample has random numbers of its own.
    """

    def __init__(self, job: CompletionJob, sample: int) -> None:
        num_bytes, first = job.plan.num_bytes_to_generate, job._first_bytes
        self.canvas = job._new_canvas(num_bytes)
        self.request: Request | None = None
        self._job, self._sample = job, sample
        self._started = time.perf_counter()
        self._stretches = job._stretches(self.canvas)
        self._start = self._end = self._index = 0
        self._made = np.concatenate((first, np.zeros(num_bytes - first.size, np.uint8)))
        self._bits = np.empty(num_bytes - first.size, np.float32)
        self._done = self._num_given = first.size

    def next_stretch(self) -> bool:
        """Goes on to the next stretch; whether there is one of which something is to be drawn."""
        for index, start, end in self._stretches:
            self._index, self._start, self._end = index, start, end
            given = self._job._first_bytes[start:end]
            self.canvas.put(index, 0, given)
            if self.is_drawing:
                prefix = np.concatenate((self.canvas.prefix(index), given))
                number = self._sample * len(self.canvas.stretches) + index
                self.request = Request(prefix, end - start - given.size, self._job._config, number)
                return True
        return False

    @property
    def is_drawing(self) -> bool:
        """Whether something of the stretch is missing."""
        return self._done < self._end

    @property
    def num_drawn(self) -> int:
        """Bytes made so far, without those given."""
        return self._done - self._num_given

    def take(self, chunk: Chunk) -> Progress:
        """Puts new bytes where they belong and says how far the sample is."""
        new = slice(self._done, self._done + len(chunk.byte_values))
        self.canvas.put(self._index, self._done - self._start, chunk.byte_values)
        self._made[new] = chunk.byte_values
        self._bits[new.start - self._num_given : new.stop - self._num_given] = chunk.bits
        self._done = new.stop
        completion = None
        if self._done == len(self._made):
            completion = self.completion()
            insort(self._job.results, completion, key=lambda each: each.sample)
        return self.progress(chunk, completion)

    def completion(self) -> Completion:
        """The sample as far as it is made."""
        made, bits = self._made[: self._done].copy(), self._bits[: self.num_drawn].copy()
        return self._job._completion(self._sample, self.canvas, made, bits, time.perf_counter() - self._started)

    def progress(self, chunk: Chunk | None = None, completion: Completion | None = None, *, waits_for: str = "") -> Progress:
        """How far the sample is."""
        speed = self.num_drawn / (time.perf_counter() - self._started)
        return Progress(self._job, self, self._sample, self._done, speed or None, chunk, completion, waits_for)


def run_together(tasks: Sequence[tuple[CompletionJob, int]]) -> Iterator[Progress]:
    """Makes some samples, each a job and its number, of jobs that share a model, at once where the engine can.

    Their bytes are those that each job makes alone. Closing the iterator frees the model.
    """
    loaded = tasks[0][0].loaded
    for _ in prepare(loaded.model):
        yield _Making(*tasks[0]).progress(waits_for="the decoder to be built, once")
    makings = [_Making(job, sample) for job, sample in tasks]
    with Turn(loaded.lock) as turn:
        while makings := [making for making in makings if making.next_stretch()]:
            num_before, busy_s = sum(making.num_drawn for making in makings), 0.0
            with closing(stream_batch(loaded.model, [making.request for making in makings])) as chunks:
                while at_work := [making for making in makings if making.is_drawing]:
                    while not turn.take():
                        yield at_work[0].progress(waits_for="other work to give way")
                    started = time.perf_counter()
                    index, chunk = next(chunks)
                    busy_s += time.perf_counter() - started
                    yield makings[index].take(chunk)
            num_made = sum(making.num_drawn for making in makings) - num_before
            loaded.note_seconds(len(makings), num_made / len(makings), busy_s)
