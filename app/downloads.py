"""The exports of the Likelihood tab as files: what is known of every byte, a heatmap, or a page that opens offline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import exports
from app.palette import SEQUENTIAL
from app.render import MEASURES
from app.service import FileScore
from app.views import offline
from core.errors import UserError

_WRITERS = {"csv": exports.write_csv, "npz": exports.write_npz}
FORMS = ("npz", "csv", "png", "html")


@dataclass(frozen=True)
class Export:
    """What is wanted: a form, and for a picture the measure and the palette of its colours."""

    form: str
    measure: str = "bits"
    palette: str = "viridis"

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("measure", MEASURES), ("palette", tuple(SEQUENTIAL))):
            if getattr(self, name) not in known:
                raise UserError(f"there is no such export: {name} must be one of {', '.join(known)}")


def write_export(
    wanted: Export, folder: Path, scored: tuple[FileScore, dict[str, Any]], other: tuple[FileScore, dict[str, Any]] | None = None
) -> Path:
    """Writes a detailed score, and where it stands when it is compared with another, into a folder.

    Args:
        scored, other: scores with their items of `app.views.score_values`; only a page takes more of these than the name.
    """
    score, item = scored
    path = folder / f"{Path(item['name']).stem}.{wanted.form}"
    if wanted.form == "html":
        offline.write_page([scored, *([other] if other else [])], path)
    elif wanted.form == "png":
        exports.write_png(score, path, wanted.measure, wanted.palette, other and other[0])
    else:
        _WRITERS[wanted.form](score, path)
    return path
