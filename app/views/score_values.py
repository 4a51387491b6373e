"""Scores as the plain values that the summary and the linked views draw. Nothing here knows Gradio or a model."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np

from app.service import FileScore
from core.codecs import Picture, Sound

# The sidecar stores bits as integers of 1/1024 bit: 64 bits is the largest, far beyond the scale's 8.
BITS_UNIT = 1024
WORSE_THAN_A_GUESS = "More than 8 bits a byte is worse than a blind guess: the model was trained on nothing like this."


def message(state: str, title: str, text: str) -> dict[str, Any]:
    """A summary without numbers: `state` is empty or error."""
    return {"state": state, "title": title, "text": text}


def working(title: str, text: str, done: float = 0.0) -> dict[str, Any]:
    """A summary of work that goes on; `done` is the share that is behind it."""
    return {"state": "working", "title": title, "text": text, "done": done}


def summary(score: FileScore, reference_sizes: dict[str, float]) -> dict[str, Any]:
    """Totals of a score; `reference_sizes` are bits per byte of other ways to store the same bytes."""
    if score.bits_per_byte is None:
        return message("empty", "Nothing to score", f"{Path(score.file).name} holds no bytes.")
    what = f"{score.num_bytes:,} bytes of {_scored_bytes(score)}"
    window = f"windows of {score.window:,} bytes" + (f", a hop of {score.hop:,}" if score.hop != score.window else "")
    return {
        "state": "done",
        "headline": f"{score.bits_per_byte:.3f}",
        "unit": "bits per byte",
        "subtitle": f"{Path(score.file).name}: {what}",
        "facts": f"{score.total_bits / 8:,.0f} bytes if coded with model {score.model}; scored in {window} ({score.engine})",
        "bars": [
            {"label": score.model, "bits": score.bits_per_byte, "is_model": True},
            *({"label": name, "bits": bits, "is_model": False} for name, bits in reference_sizes.items()),
            {"label": "random bytes", "bits": 8.0, "is_model": False},
        ],
        "notes": [*score.notes, *([WORSE_THAN_A_GUESS] if score.bits_per_byte > 8 else [])],
    }


def document(score: FileScore, folder: Path) -> dict[str, Any]:
    """Writes bytes and bits of a score into `folder` and returns the value that all linked views open.

    Both are in media order (pixel rows, samples, characters), so one offset means the same place in every view.
    The file holds `count` bytes, one byte of padding if `count` is odd, `count` uint16 of 1/1024 bit, and for a sound
    its int16 samples, all little-endian.
    """
    media = score.media
    values, bits = _in_media_order(score)
    units = np.clip(np.round(bits * BITS_UNIT), 0, 65535).astype("<u2")
    samples = media.samples if isinstance(media, Sound) else np.zeros(0, dtype=np.int16)
    path = folder / "scores.bin"
    path.write_bytes(values.tobytes() + bytes(values.size % 2) + units.tobytes() + samples.astype("<i2").tobytes())
    value = {
        "id": secrets.token_hex(8),
        "kind": score.kind,
        "count": int(values.size),
        "num_samples": int(samples.size),
        "file": file_value(path),
    }
    if isinstance(media, Picture):
        value["height"], value["width"] = media.pixels.shape[:2]
    if isinstance(media, Sound):
        value |= {"sample_rate": media.sample_rate, "bytes_per_sample": values.size // max(1, samples.size)}
    return value


def file_value(path: Path) -> dict[str, Any]:
    """A file inside a view's value: Gradio copies it into its cache and adds the `url` that a browser may open."""
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def _scored_bytes(score: FileScore) -> str:
    if score.scored_as == "file":
        return "the file itself"
    return {"image": "decoded pixels", "audio": "decoded sound", "text": "text"}[score.modality]


def _in_media_order(score: FileScore) -> tuple[np.ndarray, np.ndarray]:
    """Byte values and bits, both (T,). Only pictures are scored in another order than they are shown in."""
    if isinstance(score.media, Picture):
        return score.media.pixels.reshape(-1), score.media_bits.reshape(-1)
    stream, _ = score.codec.encode(score.media)
    return stream, score.bits
