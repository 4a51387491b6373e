"""Scores as the plain values that the message and the linked views draw. Nothing here knows Gradio or a model."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np

from app.service import FileScore
from core.codecs import Picture, Sound
from core.likelihood import context_sizes

# The sidecar stores bits as integers of 1/1024 bit, up to 64 bits, and those of the likeliest bytes as 1/16 bit, up to 16.
BITS_UNIT = 1024
LIKELIEST_UNIT = 16
WORSE_THAN_A_GUESS = "More than 8 bits a byte is worse than a blind guess: the model was trained on nothing like this."


def message(state: str, title: str, text: str) -> dict[str, Any]:
    """What the page says instead of a result: `state` is empty or error."""
    return {"state": state, "title": title, "text": text}


def working(title: str, text: str, done: float = 0.0) -> dict[str, Any]:
    """Work that goes on; `done` is the share that is behind it."""
    return {"state": "working", "title": title, "text": text, "done": done}


def done() -> dict[str, Any]:
    """Nothing to say: the results speak."""
    return {"state": "done"}


def item(score: FileScore, folder: Path) -> dict[str, Any]:
    """A line of the list of files, and with `document` all that the views need; files are written into `folder`."""
    value = {
        "id": secrets.token_hex(8),
        "state": "done",
        "name": Path(score.file).name,
        "kind": score.kind,
        "model": score.model,
        "num_bytes": score.num_bytes,
        "total_bits": score.total_bits,
        "bits_per_byte": score.bits_per_byte,
        "what": f"{score.num_bytes:,} bytes of {scored_bytes(score)}",
        "facts": window_rule(score),
        "notes": [*score.notes, *([WORSE_THAN_A_GUESS] if (score.bits_per_byte or 0) > 8 else [])],
        "references": None,
    }
    own = folder / value["id"]
    own.mkdir()
    return value | {"document": document(score, own) | {"id": value["id"]}}


def failed_item(file: Path, sentence: str) -> dict[str, Any]:
    """A line of the list for a file that could not be scored."""
    return {"id": secrets.token_hex(8), "state": "error", "name": Path(file).name, "message": sentence, "document": None}


def with_references(value: dict[str, Any], sizes: dict[str, float]) -> dict[str, Any]:
    """An item with what everyday compressors make of the same bytes; `sizes` are bits per byte."""
    references = [{"name": name, "bytes": round(bits * value["num_bytes"] / 8)} for name, bits in sizes.items()]
    return value | {"references": references}


def scored_bytes(score: FileScore) -> str:
    """Which bytes of a file were scored, in words."""
    if score.scored_as == "file":
        return "the file itself, as it is stored"
    if isinstance(score.media, Picture):
        return f"decoded pixels, {score.media.width}x{score.media.height}, red, green and blue"
    if isinstance(score.media, Sound):
        per_sample = "8-bit mu-law" if score.codec.config.bytes_per_sample == 1 else "16-bit"
        return f"decoded sound, {score.media.seconds:.2f} s of {per_sample} samples at {score.media.sample_rate:,} Hz"
    return "text" if score.kind == "text" else "unknown format"


def window_rule(score: FileScore) -> str:
    """What each byte was predicted from, and what coding the file so would cost, in words."""
    coded = f"Coded with this model: {score.total_bits / 8:,.0f} bytes ({score.engine}). "
    tiles = score.layout.num_documents
    if isinstance(score.media, Picture):
        one = "Each byte is predicted from all pixels before it in the model's order"
        return coded + (f"{one}, in {tiles:,} tiles that know nothing of each other." if tiles > 1 else f"{one}.")
    if len(score.bits) <= score.window:
        return f"{coded}Each byte is predicted from all bytes before it: the file fits into the model's {score.window:,} bytes."
    least = score.window - score.hop
    windows = f"windows of {score.window:,} bytes, one every {score.hop:,}"
    rule = f"The file is longer than the model's context, so it is read in {windows}"
    begin = f"after the first window each byte has at least {least:,} before it" if least else "each begins without context"
    return f"{coded}{rule}; {begin}." + (" Two passes, half a patch apart." if score.strided else "")


def document(score: FileScore, folder: Path) -> dict[str, Any]:
    """Writes a detailed score into `folder` and returns the value that the linked views open.

    Everything is in media order (pixel rows, samples, characters), so one offset means the same place in every view, and
    little-endian. `scores.bin` holds, for `count` bytes, bits and entropy (uint16 of 1/1024 bit), the number of bytes of
    context (uint16, 65535 for more), then for a sound its int16 samples, then byte values and ranks (uint8).
    `likeliest.bin`, of which the page reads parts, has ten bytes a place: five values and their -log2 p (uint8 of 1/16 bit).
    """
    media, expected = score.media, score.expected
    context = context_sizes(len(score.bits), score.window, score.hop)
    values = media.pixels.reshape(-1) if isinstance(media, Picture) else score.codec.encode(media)[0]
    samples = media.samples if isinstance(media, Sound) else np.zeros(0, dtype=np.int16)
    scores = [
        _fixed_point(in_media_order(score, score.bits), BITS_UNIT, np.uint16),
        _fixed_point(in_media_order(score, expected.entropy), BITS_UNIT, np.uint16),
        in_media_order(score, np.minimum(context, 65535).astype("<u2")),
        samples.astype("<i2"),
        values,
        in_media_order(score, expected.rank),
    ]
    (folder / "scores.bin").write_bytes(b"".join(part.tobytes() for part in scores))
    likeliest_bits = _fixed_point(in_media_order(score, expected.likeliest_bits), LIKELIEST_UNIT, np.uint8)
    likeliest = np.concatenate((in_media_order(score, expected.likeliest), likeliest_bits), axis=1)
    (folder / "likeliest.bin").write_bytes(likeliest.tobytes())
    value = {
        "kind": score.kind,
        "count": int(values.size),
        "num_samples": int(samples.size),
        "file": file_value(folder / "scores.bin"),
        "likeliest_file": file_value(folder / "likeliest.bin"),
    }
    if isinstance(media, Picture):
        value["height"], value["width"] = media.pixels.shape[:2]
    if isinstance(media, Sound):
        value |= {"sample_rate": media.sample_rate, "bytes_per_sample": score.codec.config.bytes_per_sample}
    return value


def in_media_order(score: FileScore, values: np.ndarray) -> np.ndarray:
    """Values of the stream's bytes, (T, ...), as the media has them; only pictures are scored in another order than shown."""
    if not isinstance(score.media, Picture):
        return values
    return score.codec.unscan(values, score.layout).reshape(-1, *values.shape[1:])


def file_value(path: Path) -> dict[str, Any]:
    """A file inside a view's value: Gradio copies it into its cache and adds the `url` that a browser may open."""
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def _fixed_point(values: np.ndarray, unit: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    scaled = np.rint(values.astype(np.float32) * unit)
    return np.clip(scaled, 0, np.iinfo(dtype).max).astype(np.dtype(dtype).newbyteorder("<"))
