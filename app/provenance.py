"""The settings of a result inside the result: written into a PNG or a WAV file, or beside a text, and read from there again.

A result holds its own prompt, as its kept rows or samples; for text the settings hold it. With them and the same model, the
same engine makes the same bytes again.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from app.completion import Completion
from app.settings import CompletionSettings
from core.codecs import Raw, open_regular, read_comment
from core.errors import UserError

FORMAT, VERSION = "megabyte-completion", 1
_MAX_SIDECAR_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a result was made.

    Attributes:
        settings: with every number resolved: what was kept, how much was made.
        sample: its number among the samples, from 0.
        text: the kept part of a text; None where the result itself holds it.
        model, model_sha256, engine: what made it.
        source_sha256: of the file that was completed; None if there was none.
        made_sha256: of the new bytes.
    """

    settings: CompletionSettings
    sample: int
    model: str
    model_sha256: str
    engine: str
    source_sha256: str | None
    made_sha256: str
    text: bytes | None = None

    def to_json(self) -> str:
        """ASCII, in one line."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        values["text"] = None if self.text is None else base64.b64encode(self.text).decode()
        return json.dumps(values, allow_nan=False)


def provenance_of(completion: Completion) -> Provenance:
    """How a sample was made."""
    job, kept = completion.job, completion.num_bytes_kept
    settings = replace(
        job.settings,
        keep=None,
        keep_bytes=kept,
        num_bytes=completion.num_bytes_generated,
        upside_down=job.given.upside_down,
    )
    return Provenance(
        settings=settings,
        sample=completion.sample,
        model=completion.model,
        model_sha256=job.loaded.info.digest,
        engine=completion.engine,
        source_sha256=_digest(completion.source),
        made_sha256=hashlib.sha256(completion.made.tobytes()).hexdigest(),
        text=completion.media.data[:kept].tobytes() if isinstance(completion.media, Raw) else None,
    )


def sidecar_of(path: Path) -> Path:
    """The file of settings beside a text."""
    return path.with_name(f"{path.name}.json")


def read_provenance(path: Path) -> Provenance | None:
    """How a file was made that we wrote, or whose sidecar it is; None for every other file.

    Raises:
        UserError: if the file cannot be opened.
    """
    text = read_comment(path) or _sidecar_text(path)
    if text is None:
        return None
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or (values.pop("format", None), values.pop("version", None)) != (FORMAT, VERSION):
            return None
        return _checked(values)
    # Somebody else's JSON, or ours after somebody has changed it: the file is taken as any other.
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checked(values: dict[str, Any]) -> Provenance:
    if set(values) != {field.name for field in fields(Provenance)} or type(values["sample"]) is not int:
        raise ValueError("not the fields of a provenance")
    for name in ("model", "model_sha256", "engine", "made_sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is no text")
    text = values.pop("text")
    settings = CompletionSettings(**values.pop("settings"))
    return Provenance(settings=settings, text=None if text is None else base64.b64decode(text, validate=True), **values)


def _sidecar_text(path: Path) -> str | None:
    with open_regular(path) as file:
        content = file.read(_MAX_SIDECAR_BYTES + 1)
    begins = f'{{"format": "{FORMAT}"'.encode()
    return content.decode("ascii", "replace") if content.startswith(begins) and len(content) <= _MAX_SIDECAR_BYTES else None


def _digest(source: Path | None) -> str | None:
    if source is None:
        return None
    try:
        with open_regular(source) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except UserError:
        return None  # the file has gone meanwhile
