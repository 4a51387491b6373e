"""The gallery of a completion: samples as they are made, the branches that start from them, and their files."""

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.completion import Completion, CompletionJob, Progress
from app.jobs import Job, JobEndedError
from app.outputs import write_completion
from app.provenance import sidecar_of
from core.codecs import Media, Raw, utf8_decoder


@dataclass(frozen=True, eq=False)
class Made:
    """A sample that is finished, or was stopped.

    Attributes:
        id: its name in the gallery.
        path: its file; beside a text lies the file of its settings.
    """

    id: str
    title: str
    completion: Completion
    path: Path

    @property
    def job(self) -> CompletionJob:
        return self.completion.job

    @property
    def made(self) -> np.ndarray:
        """Its new bytes, uint8, as many as there are."""
        return self.completion.made

    @property
    def media(self) -> Media:
        return self.completion.media

    def number_at(self, place: float) -> int | None:
        """Which new byte stands at a place of the media; None where nothing new stands.

        Args:
            place: the number of a pixel in reading order, how many characters of a text are left from there on, or the part
                of a sound, 0 to 1, that lies before it; -1 for the first new byte.
        """
        if place == -1:
            return 0
        if isinstance(self.media, Raw):
            starts = character_starts(self.made.tobytes())
            return starts[-int(place)] if 1 <= place <= len(starts) else None
        numbers = self.job.canvas_of(self.made).numbers()
        if self.job.codec.modality == "image":
            numbers = numbers.reshape(-1, 3)[:, 0]
        index = int(place if self.job.codec.modality == "image" else place * numbers.size)
        number = int(numbers[index]) if 0 <= index < numbers.size else -1
        return number if 0 <= number < len(self.made) else None


class Gallery:
    """What one job of the page shows; it only grows, so that a page may read it at any time.

    Attributes:
        earlier: samples of an earlier gallery.
        own: those of its own job that are there, in the order of their numbers.
        at_work: how far the others are that have begun, by their numbers.
        waits_for: what must be done first, in words; empty while bytes are made.
        id: begins the names of its own samples.
    """

    def __init__(self, job: CompletionJob, title: str, earlier: Sequence[Made] = ()) -> None:
        self.job = job
        self.title = title
        self.earlier = tuple(earlier)
        self.own: tuple[Made, ...] = ()
        self.at_work: dict[int, Progress] = {}
        self.waits_for = ""
        self.id = secrets.token_hex(4)

    @property
    def made(self) -> tuple[Made, ...]:
        """All samples that are there."""
        return (*self.earlier, *self.own)

    def name_of(self, sample: int) -> str:
        """The name of one of its own samples."""
        return f"{self.id}-{sample}"

    def title_of(self, sample: int) -> str:
        """What a person calls one of its own samples."""
        return f"{self.title} {sample + 1}" if self.job.settings.samples > 1 else self.title

    def find(self, name: str) -> Made | None:
        """The sample of a name, if it is there."""
        return next((made for made in self.made if made.id == name), None)

    def take(self, progress: Progress, folder: Path) -> None:
        """Notes how far the job is, and writes the file of a sample that is finished."""
        others = {sample: known for sample, known in self.at_work.items() if sample != progress.sample}
        self.waits_for = progress.waits_for
        if progress.completion is None:
            self.at_work = others | {progress.sample: progress}
        else:
            self._add(progress.completion, folder)
            self.at_work = others

    def stop(self, folder: Path) -> None:
        """Keeps of the samples at work what is there."""
        for progress in self.at_work.values():
            if (completion := progress.stopped()) is not None:
                self._add(completion, folder)
        self.at_work = {}

    def _add(self, completion: Completion, folder: Path) -> None:
        stem = None if completion.is_whole else "stopped"
        path = write_completion(completion, folder, stem=stem)
        new = Made(self.name_of(completion.sample), self.title_of(completion.sample), completion, path)
        self.own = tuple(sorted((*self.own, new), key=lambda made: made.completion.sample))


def gallery_work(
    prepare: Callable[[], CompletionJob], title: str = "Sample", earlier: Sequence[Made] = ()
) -> Callable[[Job], Gallery]:
    """The work of a job that makes the samples which `prepare` has asked for; it reports and gives a gallery.

    Samples of an `earlier` job are copied, because its files go when that job is forgotten; those that went already are left out.
    """

    def work(job: Job) -> Any:
        folder = job.folder / secrets.token_hex(4)
        folder.mkdir()
        copies = (_copied(made, job.folder / made.id) for made in earlier)
        gallery = Gallery(prepare(), title, [made for made in copies if made is not None])
        job.report(gallery)
        try:
            with closing(gallery.job.run()) as steps:
                for progress in steps:
                    gallery.take(progress, folder)
                    job.report(gallery)
        except JobEndedError:
            gallery.stop(folder)
            raise
        return gallery

    return work


def _copied(made: Made, folder: Path) -> Made | None:
    """The sample with files of its own in a new folder; None if its files are gone."""
    folder.mkdir()
    try:
        path = shutil.copy(made.path, folder)
        if isinstance(made.media, Raw):
            shutil.copy(sidecar_of(made.path), folder)
    except FileNotFoundError:
        return None
    return replace(made, path=Path(path))


def character_starts(content: bytes) -> list[int]:
    """Where each character of `content.decode("utf-8", "replace")` begins."""
    decoder, starts, begun = utf8_decoder(), [], 0
    for end in range(1, len(content) + 1):
        num_new = len(decoder.decode(content[end - 1 : end]))
        if num_new:
            decoded = end - len(decoder.getstate()[0])
            # After a broken character, the byte that broke it may be one of its own.
            starts += [begun, *range(decoded - num_new + 1, decoded)]
            begun = decoded
    num_left = len(decoder.decode(b"", final=True))  # one broken character, or one for each byte
    return [*starts, *range(begun, begun + num_left)]
