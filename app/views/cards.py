"""Completions as the plain values that the results view draws: one card for the source and one for each sample."""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from app.service import Completion, CompletionJob, Progress
from app.views.score_values import file_value
from core.codecs import Picture, Raw, Sound

WAVE_COLUMNS = 560
SHOWN_PROMPT = 600  # characters of a text's kept part that a card shows
SHOWN_MADE = 20_000  # and of the new part, which is sent again and again while it grows; the file has all of it


def empty(title: str, text: str) -> dict[str, Any]:
    """A results view without cards."""
    return {"state": "empty", "title": title, "text": text}


def results(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """A results view with its cards, in order."""
    return {"state": "done", "items": cards}


def kept_card(job: CompletionJob) -> dict[str, Any]:
    """What a job starts from: the kept part, and room for what will be made."""
    kept = job.plan.num_bytes_kept
    return {
        "id": "kept",
        "kind": job.codec.modality,
        "title": "Kept",
        "caption": f"{job.given.says(kept, job.codec)}, {kept:,} bytes" if job.codec.modality != "text" else f"{kept:,} bytes",
        "done": 1.0,
        "media": _media(job, job.kept),
    }


def progress_card(job: CompletionJob, progress: Progress, *, is_stopped: bool = False) -> dict[str, Any]:
    """An unfinished sample as far as it is made."""
    done = f"{progress.done_bytes:,} of {progress.total_bytes:,} bytes"
    speed = f", {progress.bytes_per_s:,.0f} bytes/s" if progress.bytes_per_s else ""
    caption = f"stopped after {done}" if is_stopped else done + speed
    return {
        "id": f"sample-{progress.sample}",
        "kind": job.codec.modality,
        "title": f"Sample {progress.sample + 1}",
        "caption": "waiting for another job to finish" if progress.is_waiting else caption,
        "done": 1.0 if is_stopped else progress.done_bytes / progress.total_bytes,
        "media": _media(job, progress.partial),
    }


def completion_card(job: CompletionJob, completion: Completion) -> dict[str, Any]:
    """A finished sample; `with_file` adds its download."""
    return {
        "id": f"sample-{completion.sample}",
        "kind": completion.modality,
        "title": f"Sample {completion.sample + 1}",
        "caption": f"{completion.bits_per_byte:.2f} bits/byte, seed {completion.seed}, {completion.seconds:.1f} s",
        "done": 1.0,
        "media": _media(job, completion.media),
    }


def with_file(card: dict[str, Any], path: Path) -> dict[str, Any]:
    """The card with a file to download, and to play if it is a sound."""
    return {**card, "name": path.name, "file": file_value(path)}


def _media(job: CompletionJob, media: Picture | Sound | Raw) -> dict[str, Any]:
    plan = job.plan
    if isinstance(media, Picture):
        return _picture(job, media)
    if isinstance(media, Sound):
        per_sample = job.codec.config.bytes_per_sample
        total = (plan.num_bytes_kept + plan.num_bytes_to_generate) // per_sample
        return _sound(media.samples, total, plan.num_bytes_kept / per_sample / max(1, total))
    stream = media.data.tobytes()
    return _text(stream[: plan.num_bytes_kept], stream[plan.num_bytes_kept :])


def _picture(job: CompletionJob, picture: Picture) -> dict[str, Any]:
    """RGB and opacity of a picture; pixels that are not made yet are see-through."""
    known = np.ones(picture.pixels.shape[:2], bool) if picture.known is None else picture.known
    return {
        "width": picture.width,
        "height": picture.height,
        "rgb": _base64(picture.pixels),
        "alpha": _base64(np.where(known, 255, 0).astype(np.uint8)),
        "kept": job.plan.num_bytes_kept / picture.pixels.size,
    }


def _sound(samples: np.ndarray, total_samples: int, kept: float) -> dict[str, Any]:
    """Lowest and highest sample in each column of a waveform that will be `total_samples` long."""
    edges = np.linspace(0, max(1, total_samples), WAVE_COLUMNS + 1).astype(np.int64)[:-1]
    edges = edges[edges < samples.size]
    coarse = (samples >> 8).astype(np.int8)
    low = np.minimum.reduceat(coarse, edges) if edges.size else coarse
    high = np.maximum.reduceat(coarse, edges) if edges.size else coarse
    return {"low": _base64(low), "high": _base64(high), "kept": kept}


def _text(kept: bytes, made: bytes) -> dict[str, Any]:
    """The ends of the given text and of the new one; bytes that are no UTF-8 are shown as U+FFFD."""
    return {"kept_text": _end_of(kept, SHOWN_PROMPT), "made_text": _end_of(made, SHOWN_MADE)}


def _end_of(text: bytes, num_chars: int) -> str:
    end = text[-4 * num_chars - 3 :].decode("utf-8", "replace")  # a character has at most four bytes
    return end if len(end) <= num_chars else "…" + end[-num_chars:]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
