"""What a file turned out to hold: the kind of model that reads it, the view that shows it, and its form that fits a model."""

import numpy as np

from core.codecs import Codec, Media, Picture, Raw, Sound, resample

_SEEN_BYTES = 1 << 16  # of a file, to tell whether it is text


def modality_of(media: Media) -> str:
    """Which kind of model reads it: image, audio or text."""
    if isinstance(media, Picture):
        return "image"
    return "audio" if isinstance(media, Sound) else "text"


def kind_of(media: Media) -> str:
    """Which view shows it: that of its modality, or raw for bytes that only a hex dump can show."""
    return "raw" if isinstance(media, Raw) and not _is_readable(media.data) else modality_of(media)


def fitted(media: Media, codec: Codec) -> Media:
    """The media in the form that a model was trained on, which its notes say: a picture at its size, a sound at its rate."""
    if isinstance(media, Picture):
        return codec.fit(media)
    return resample(media, codec.config.sample_rate) if isinstance(media, Sound) else media


def _is_readable(data: np.ndarray) -> bool:
    """Whether bytes are best shown as text: hardly any of them is a control code or no UTF-8."""
    text = data[:_SEEN_BYTES].tobytes().decode("utf-8", "replace")
    unreadable = sum(char == "\ufffd" or (char < " " and char not in "\t\n\r") for char in text)
    return unreadable <= 0.05 * len(text)
