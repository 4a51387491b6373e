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
        made: its new bytes, uint8, as many as there are.
        completion: None if it was stopped.
        path: its file; beside a text lies the file of its settings.
    """

    id: str
    title: str
    job: CompletionJob
    made: np.ndarray
    media: Media
    path: Path
    completion: Completion | None = None

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
        made: samples that are there, those of an earlier gallery first.
        job, progress: what is at work, and how far; no progress before the first byte.
        id: begins the names of its own samples.
    """

    def __init__(self, job: CompletionJob, title: str, earlier: Sequence[Made] = ()) -> None:
        self.job = job
        self.title = title
        self.made = tuple(earlier)
        self.progress: Progress | None = None
        self.id = secrets.token_hex(4)

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
        completion = progress.completion
        if completion is not None:
            self._add(completion.sample, completion.made, completion.media, write_completion(completion, folder), completion)
        self.progress = None if completion is not None else progress

    def stop(self, folder: Path) -> None:
        """Keeps of a sample at work what is there."""
        progress = self.progress
        self.progress = None
        if progress is None or progress.done_bytes == 0:
            return
        media = progress.partial
        path = folder / f"stopped-s{self.job.settings.seed}-{progress.sample + 1}{self.job.codec.suffix}"
        self.job.codec.write(media, path)
        self._add(progress.sample, progress.made[: progress.done_bytes].copy(), media, path)

    def _add(self, sample: int, made: np.ndarray, media: Media, path: Path, completion: Completion | None = None) -> None:
        new = Made(self.name_of(sample), self.title_of(sample), self.job, made, media, path, completion)
        self.made = (*self.made, new)


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
        if made.completion is not None and isinstance(made.media, Raw):
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
