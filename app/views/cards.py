"""Completions as the plain values that the prompt, the results and the alternatives views draw."""

import base64
from typing import Any

import numpy as np

from app.gallery import Gallery, Made
from app.provenance import sidecar_of
from app.service import CompletionJob, Progress
from app.views.score_values import file_value
from core.codecs import Media, Picture, Raw, Sound, utf8_decoder

WAVE_COLUMNS = 1024
SHOWN_KEPT = 600  # characters of a text's kept part that a card shows
SHOWN_MADE = 20_000  # and about as many of the new part; the file has all of it
SHOWN_AT_ONCE = 2_000  # of them at most in one update while they are made, which is more than fits into a card
SHOWN_TEXT_BYTES = 20_000  # of a text in the prompt view
SHOWN_SIDE = 1024  # pixels of a picture in the prompt view


def message(title: str, text: str, state: str = "empty") -> dict[str, Any]:
    """A view without content; `state` is empty or error."""
    return {"state": state, "title": title, "text": text}


def prompt(job: CompletionJob) -> dict[str, Any]:
    """The source as the model reads it, with the place where the kept part ends."""
    given = job.given
    value = {
        "state": "done",
        "kind": job.codec.modality,
        "count": given.num_there,
        "whole": max(1, given.num_whole),
        "unit": given.unit,
        "upside_down": given.upside_down,
        "media": _source_media(job),
    }
    return value | cut(job)


def cut(job: CompletionJob) -> dict[str, Any]:
    """Where the kept part ends: all that changes in a prompt when the line is moved."""
    kept = job.plan.num_bytes_kept
    return {"cut": kept, "says": job.given.says(kept, job.codec) if kept else "nothing is kept"}


class Display:
    """What one page shows of a gallery. Of a picture or a text that it has shown in part, it sends only what is new."""

    def __init__(self) -> None:
        self._sent: dict[str, Any] = {}  # by name of a sample: what `_picture` or `_text` must know of it

    def results(self, gallery: Gallery, *, is_running: bool) -> dict[str, Any]:
        """The cards of everything that is made, and of what is at work."""
        at_work = gallery.at_work if is_running else {}  # before `own`, so that a sample that is finished meanwhile is in both
        own = {made.completion.sample: self._card(made) for made in gallery.own}
        own |= {sample: self._card_at_work(gallery, progress) for sample, progress in at_work.items() if sample not in own}
        cards = [*map(self._card, gallery.earlier), *(own[sample] for sample in sorted(own))]
        self._sent = {card["id"]: self._sent[card["id"]] for card in cards if card["id"] in self._sent}
        return {"state": "done", "items": cards}

    def _card_at_work(self, gallery: Gallery, progress: Progress) -> dict[str, Any]:
        done = f"{progress.done_bytes:,} of {progress.total_bytes:,} bytes"
        speed = f", {progress.bytes_per_s:,.0f} bytes/s" if progress.bytes_per_s else ""
        name = gallery.name_of(progress.sample)
        return {
            "id": name,
            "kind": gallery.job.codec.modality,
            "title": gallery.title_of(progress.sample),
            "caption": f"waiting for {gallery.waits_for}" if gallery.waits_for else done + speed,
            "done": progress.done_bytes / progress.total_bytes,
            "media": self._media(name, gallery.job, progress.partial, is_whole=False),
        }

    def _card(self, made: Made) -> dict[str, Any]:
        completion = made.completion
        caption = f"{completion.bits_per_byte:.2f} bits/byte, seed {completion.seed}, {completion.seconds:.1f} s"
        if not completion.is_whole:
            caption = f"stopped after {len(made.made):,} of {made.job.plan.num_bytes_to_generate:,} bytes, {caption}"
        files = [{"name": "Download", "file_name": made.path.name, "file": file_value(made.path)}]
        if isinstance(made.media, Raw):
            sidecar = sidecar_of(made.path)
            files.append({"name": "Settings", "file_name": sidecar.name, "file": file_value(sidecar)})
        return {
            "id": made.id,
            "kind": made.job.codec.modality,
            "title": made.title,
            "caption": caption,
            "done": 1.0,
            "media": self._media(made.id, made.job, made.media, is_whole=True),
            "files": files,
        }

    def _media(self, name: str, job: CompletionJob, media: Media, *, is_whole: bool) -> dict[str, Any] | None:
        if isinstance(media, Picture):
            return self._picture(name, job, media)
        kept = job.plan.num_bytes_kept
        if isinstance(media, Sound):
            per_sample = job.codec.config.bytes_per_sample
            total = (kept + job.plan.num_bytes_to_generate) // per_sample
            return _wave(media.samples, total) | {"kept": kept / per_sample / max(1, total)}
        return self._text(name, media.data[:kept], media.data[kept:], is_whole=is_whole)

    def _text(self, name: str, kept: np.ndarray, made: np.ndarray, *, is_whole: bool) -> dict[str, Any] | None:
        """What is new of a text since the last call, if anything is; bytes that are no UTF-8 are shown as U+FFFD.

        A character that is not whole yet waits for its rest. Of a text that grows faster than anybody reads only the end is
        sent, and at last the end of all of it.
        """
        is_first = name not in self._sent
        decoder, num_sent, is_gapless = self._sent.get(name, (utf8_decoder(), 0, True))
        if is_whole and not is_gapless:
            decoder, num_sent = utf8_decoder(), 0
        new = decoder.decode(made[num_sent:].tobytes(), final=is_whole)
        most = SHOWN_AT_ONCE if num_sent and not is_whole else SHOWN_MADE
        is_cut = len(new) > most
        self._sent[name] = decoder, made.size, not num_sent or (is_gapless and not is_cut)
        if not (new or is_first):
            return None
        value = {"is_anew": is_cut or not num_sent, "new_text": _end_of(new, most), "most": SHOWN_MADE}
        if is_first:
            value["kept_text"] = _end_of(kept[-4 * SHOWN_KEPT - 3 :].tobytes().decode("utf-8", "replace"), SHOWN_KEPT)
        return value

    def _picture(self, name: str, job: CompletionJob, picture: Picture) -> dict[str, Any]:
        """The smallest box around all pixels that are new since the last call, as RGBA; those not made are see-through."""
        known = np.ones(picture.pixels.shape[:2], bool) if picture.known is None else picture.known
        new = known & ~self._sent.get(name, np.zeros_like(known))
        self._sent[name] = known
        value = {
            "width": picture.width,
            "height": picture.height,
            "kept": job.plan.num_bytes_kept / picture.pixels.size,
            "upside_down": job.given.upside_down,
        }
        if not new.any():
            return value
        rows, columns = np.flatnonzero(new.any(axis=1)), np.flatnonzero(new.any(axis=0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        rgba = np.dstack((picture.pixels[box], np.where(known[box], 255, 0).astype(np.uint8)))
        return value | {"left": int(columns[0]), "top": int(rows[0]), "box_width": rgba.shape[1], "rgba": _base64(rgba)}


def alternatives(made: Made, number: int, found: list[tuple[int, float]]) -> dict[str, Any]:
    """The likeliest bytes in place of new byte `number`, each with its probability, and what stands there."""
    is_text = isinstance(made.media, Raw)
    return {
        "state": "done",
        "id": made.id,
        "number": number,
        "last": len(made.made) - 1,
        "title": f"Likeliest at new byte {number:,} of {made.title}",
        "stands": int(made.made[number]),
        "choices": [
            {"value": value, "label": _byte_name(value) if is_text else str(value), "probability": probability}
            for value, probability in found
        ],
    }


def _source_media(job: CompletionJob) -> dict[str, Any]:
    media = job.given.media
    if isinstance(media, Picture):
        step = -(-max(media.height, media.width) // SHOWN_SIDE)
        pixels = media.pixels[::step, ::step]
        known = np.ones(pixels.shape[:2], bool) if media.known is None else media.known[::step, ::step]
        rgba = np.dstack((pixels, np.where(known, 255, 0).astype(np.uint8)))
        return {"width": rgba.shape[1], "height": rgba.shape[0], "rgba": _base64(rgba)}
    if isinstance(media, Sound):
        return _wave(media.samples, job.given.num_whole // job.given.unit)
    shown = media.data[:SHOWN_TEXT_BYTES].tobytes()
    try:
        shown.decode("utf-8")
        is_utf8 = True
    except UnicodeDecodeError as error:
        is_utf8 = error.start > len(shown) - 4  # the last character may be cut
    return {"bytes": base64.b64encode(shown).decode(), "is_utf8": is_utf8, "is_all": len(shown) == media.data.size}


def _wave(samples: np.ndarray, total_samples: int) -> dict[str, Any]:
    """Lowest and highest sample in each column of a waveform that will be `total_samples` long, scaled to the peak."""
    edges = np.linspace(0, max(1, total_samples), WAVE_COLUMNS + 1).astype(np.int64)[:-1]
    edges = edges[edges < samples.size]
    coarse = (samples * (127 / max(1, np.abs(samples.astype(np.int32)).max(initial=0)))).astype(np.int8)
    low = np.minimum.reduceat(coarse, edges) if edges.size else coarse
    high = np.maximum.reduceat(coarse, edges) if edges.size else coarse
    return {"low": _base64(low), "high": _base64(high), "columns": WAVE_COLUMNS}


def _end_of(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else "…" + text[-num_chars:]


def _byte_name(value: int) -> str:
    names = {9: "tab", 10: "new line", 13: "return", 32: "space"}
    return names.get(value) or (chr(value) if 33 <= value < 127 else f"0x{value:02x}")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
