"""Scores of files with their exports in one folder, where those of an earlier call are found again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.exports import export_score
from app.ledger import LEDGER_NAME, Ledger, digest_of, key_of, open_ledger
from app.messages import Failure, plain_sentence
from app.outputs import OutputNames, score_paths
from app.service import FileScore, Service


@dataclass(frozen=True)
class StoredScore:
    """The figures of a score that an earlier call made."""

    file: Path
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.facts["model"]

    @property
    def num_bytes(self) -> int:
        return self.facts["num_bytes"]

    @property
    def total_bits(self) -> float:
        return self.facts["total_bits"]

    @property
    def bits_per_byte(self) -> float | None:
        return self.facts["bits_per_byte"]

    def to_dict(self) -> dict[str, Any]:
        return self.facts | {"file": str(self.file)}


def score_into(
    service: Service, files: Sequence[Path], out: Path, options: dict[str, Any], *, resume: bool, force: bool
) -> Iterator[FileScore | StoredScore | Failure]:
    """A result for each file, in their order; its bits (NPZ) and heatmap (PNG) are in `out` when it comes.

    Args:
        options: those of `Service.score_files`.
        resume: leave out what an earlier call with these options made in `out` from the same bytes with the same model.
        force: overwrite other results.

    Raises:
        ValueError: if nothing can be written to the folder.
    """
    outputs = OutputNames(files)
    outputs.protect_sources([out / LEDGER_NAME])
    with open_ledger(out, resume=resume, force=force) as ledger:
        entries = [_Entry(service, file, score_paths(out, stem), options) for file, stem in outputs.stems()]
        early = [entry.begin(ledger, outputs) for entry in entries]
        todo = [entry.file for entry, result in zip(entries, early, strict=True) if result is None]
        results = service.score_files(todo, **options)
        for entry, result in zip(entries, early, strict=True):
            yield result or entry.finish(ledger, next(results))


class _Entry:
    """One file, what its score depends on, and the files it goes to."""

    def __init__(self, service: Service, file: Path, paths: list[Path], options: dict[str, Any]) -> None:
        self.file = file
        self._service = service
        self._paths = paths
        self._options = {name: value for name, value in options.items() if name != "progress"}
        self._key = ""

    def begin(self, ledger: Ledger, outputs: OutputNames) -> StoredScore | Failure | None:
        """The score if it is there; a failure if it must not be written; None if it is to be made."""
        try:
            outputs.protect_sources(self._paths)
            model = self._options["model"]
            given = self._options | {"model": None if model is None else self._service.model_info(model).digest}
            self._key = key_of({"input": _digest_or_none(self.file), "options": given})
            facts = ledger.finished(self._name, self._key)
            if facts is not None and self._maker(facts["score"]["model"]) == facts["made_by"]:
                return StoredScore(self.file, facts["score"])
            ledger.claim(self._name, self._key, self._paths)
        except (ValueError, OSError) as error:
            return Failure(file=self.file, message=plain_sentence(error, self.file))
        return None

    def finish(self, ledger: Ledger, result: FileScore | Failure) -> FileScore | Failure:
        """Writes what was scored; the failure if that cannot be done."""
        if isinstance(result, Failure):
            return result
        try:
            export_score(result, *self._paths)
            facts = {"score": result.to_dict(), "made_by": self._maker(result.model)}
            ledger.finish(self._name, self._key, self._paths, facts)
        except (ValueError, OSError) as error:
            return Failure(file=self.file, message=plain_sentence(error, self.file))
        return result

    @property
    def _name(self) -> str:
        return self._paths[0].name

    def _maker(self, model: str) -> list[str]:
        """The model and the engine that would make this score now."""
        loaded = self._service.model(self._options["model"] or model)
        return [loaded.info.digest, loaded.scoring_engine]


def _digest_or_none(file: Path) -> str | None:
    """What a file holds; None if it cannot be read as a file, which its scoring will say in words."""
    return digest_of(file) if file.is_file() else None
