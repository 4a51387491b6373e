"""The use cases that the page and the command line share: models, scoring, completing, training. Plain values in and out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from app.completion import Completion, CompletionJob, CompletionPlan, Progress
from app.messages import Failure
from app.outputs import write_completion
from app.provenance import read_provenance
from app.scoring import FileScore, ProgressCallback, ScoredAs, Scorer, ScoreTotal
from app.settings import CompletionSettings
from app.sources import list_files
from app.store import LoadedModel, ModelInfo, ModelStore
from core.checkpoint import WEIGHTS_FOLDER
from core.codecs import Raw, read_partial, shown
from core.errors import UserError
from core.presets import preset
from core.train import TrainResult, train

__all__ = [
    "Completion",
    "CompletionJob",
    "CompletionPlan",
    "CompletionSettings",
    "Failure",
    "FileScore",
    "LoadedModel",
    "ModelInfo",
    "Progress",
    "ScoreTotal",
    "Service",
    "list_files",
    "train_model",
]

logger = logging.getLogger(__name__)


class Service:
    """Everything a person can ask for. One object serves all of them; a model works for one job at a time."""

    write_completion = staticmethod(write_completion)

    def __init__(
        self,
        device: str = "cpu",
        *,
        weights: Path = WEIGHTS_FOLDER,
        runs: Path = Path("runs"),
        listed_only: bool = False,
    ) -> None:
        """Loads nothing yet. Shipped models lie in `weights`, exports of local training in the folders of `runs`.

        With `listed_only` no model is taken from elsewhere: whoever asks may not be who owns this machine.

        Raises:
            UserError: if `device` (cpu, cuda, or auto for a GPU if there is one) is not there.
        """
        self._store = ModelStore(device, weights, runs, listed_only=listed_only)

    @property
    def is_on_cpu(self) -> bool:
        """Whether models work on the CPU."""
        return self._store.device == "cpu"

    def models(self) -> list[ModelInfo]:
        """The shipped and local models, shipped ones first; damaged ones are named on the logger and left out."""
        infos = []
        for folder in self._store.folders():
            try:
                infos.append(self._store.info_of(folder))
            except (ValueError, OSError) as error:
                logger.warning("%s", error)
        return infos

    def model_info(self, name_or_dir: str | Path) -> ModelInfo:
        """The facts about one model.

        Raises:
            UserError: if there is no such model or it is damaged.
        """
        return self._store.info(name_or_dir)

    def model(self, name_or_dir: str | Path) -> LoadedModel:
        """A model in memory, loaded once.

        Raises:
            UserError: if there is no such model or it is damaged.
        """
        return self._store.load(name_or_dir)

    def score_file(self, path: Path, **options: Any) -> FileScore:
        """How likely each byte of a file is; the options are those of `score_files`.

        Raises:
            ValueError: if the file, the model or the options cannot be used; the text is one plain sentence.
        """
        [result] = self.score_files([path], **options)
        if isinstance(result, Failure):
            raise ValueError(result.message)
        return result

    def score_files(
        self,
        paths: Sequence[Path],
        *,
        model: str | Path | None = None,
        scored_as: ScoredAs = "media",
        hop: int = 0,
        strided: bool = False,
        adapt: bool = False,
        detailed: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Iterator[FileScore | Failure]:
        """How likely each byte of some files is, in their order; small ones share batches, a bad one stops nothing.

        Args:
            paths: the files; what each is, is read from its content.
            model: name or folder; None for the one of each file's modality.
            scored_as: "media" for its pixels, samples or text, "file" for the bytes of the file itself.
            hop: bytes from one window to the next; 0 for the window.
            strided: strided inference, two passes.
            adapt: resample a sound of another rate and enlarge a picture smaller than the model's, and note it;
                they are refused otherwise.
            detailed: keep rank, entropy and the likeliest bytes of every place too, 18 bytes a byte.
            progress: called with bytes scored and bytes known, both so far; what it raises ends the scoring.
        """
        scorer = Scorer(
            store=self._store, model=model, scored_as=scored_as, hop=hop, strided=strided, adapt=adapt,
            detailed=detailed, progress=progress,
        )  # fmt: skip
        return scorer.score(Path(path) for path in paths)

    def complete(
        self,
        path: Path | None,
        *,
        model: str | Path | None = None,
        text: bytes | None = None,
        keep: float | None = None,
        keep_bytes: int | None = None,
        num_bytes: int | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        framing: str = "tiles",
        upside_down: bool = False,
        first_bytes: str = "",
    ) -> CompletionJob:
        """Prepares completions of a file, of typed `text`, or (with neither) of nothing; `run` on the result makes them.

        The other arguments are those of `CompletionSettings`; typed text is kept whole unless it is said otherwise.

        Raises:
            ValueError: if the file, the model or a setting cannot be used; the text is one plain sentence.
        """
        if text is not None and keep is None and keep_bytes is None:
            keep = 1.0
        settings = CompletionSettings(
            keep=keep,
            keep_bytes=keep_bytes,
            num_bytes=num_bytes,
            samples=samples,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            framing=framing,
            upside_down=upside_down,
            first_bytes=first_bytes,
        )
        source = None if path is None else Path(path)
        media = Raw(np.frombuffer(text, dtype=np.uint8)) if text is not None else source and read_partial(source)
        loaded = self.model(model or "text") if media is None else self._store.load_for(media, model)
        return CompletionJob(loaded, media, settings, source)

    def repeat(self, path: Path) -> CompletionJob:
        """Prepares the completions that a result is one of, by the settings inside it or in its sidecar.

        Raises:
            ValueError: if it holds none, or was made with a model that is not here.
        """
        made = read_provenance(path)
        if made is None:
            raise UserError(f"{shown(path)} holds no settings of a completion; give a result that was written here")
        digest = self.model_info(made.model).digest
        if digest != made.model_sha256:
            raise UserError(
                f"{shown(path)} was made with another version of the model {made.model} ({made.model_sha256[:16]}, here is "
                f"{digest[:16]}), so it cannot be made again"
            )
        source = path if made.text is None else None
        return self.complete(source, text=made.text, model=made.model, **asdict(made.settings))


def train_model(
    preset_name: str,
    data_paths: list[Path],
    valid_paths: list[Path],
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    log: Callable[[str], None] | None = None,
) -> TrainResult:
    """Trains a preset, with settings such as "train.lr=1e-3" replaced, in the folder `out`.

    Raises:
        ValueError: if a setting, the data or the folder cannot be used.
    """
    config = preset(preset_name).with_overrides(list(overrides))
    return train(config, data_paths, valid_paths, out, resume=resume, device=device, log=log)
