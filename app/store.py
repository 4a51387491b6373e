"""Models for the use cases: found by name or folder, loaded once, used by one job at a time in turns."""

import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from app.media import modality_of
from app.turns import FairLock
from core.checkpoint import WEIGHTS_FOLDER, load_checkpoint, load_model, resolve_model
from core.codecs import Codec, Media, build_codec
from core.config import AudioCodecConfig, CodecConfig, ImageCodecConfig
from core.distributed import usable_device
from core.errors import UserError, shortened, shown
from core.folder import MANIFEST_NAME
from core.likelihood import scoring_engine
from core.models import ByteModel
from core.sample import Request, SampleConfig, num_at_once, stream_batch

# The shipped models of each modality that are taken unasked, the first that fits; the last fits everything.
DEFAULT_MODELS = {"image": ("image64", "image32"), "audio": ("audio",), "text": ("text",)}
SPEED_TEST_S = 0.2  # work that takes less says little about the speed


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a person wants to know about a model before using it."""

    name: str
    modality: str
    num_parameters: int
    bits_per_byte: float | None  # on the test split, or else the validation split; None if never measured
    measured: dict[str, Any]  # split -> value, protocol, window, hop, num_bytes
    digest: str  # SHA-256 of the weights in hex
    codec: str  # in words
    data: str
    max_seq_len: int  # bytes
    patch_size: int  # bytes
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(eq=False)
class LoadedModel:
    """A model in memory with its codec. Whoever computes with it takes turns at `lock`."""

    model: ByteModel
    codec: Codec
    info: ModelInfo
    lock: FairLock = field(default_factory=FairLock)
    _paces: dict[int, float] = field(default_factory=dict)  # seconds a byte of each, by the samples that are made at once

    @property
    def modality(self) -> str:
        return self.info.modality

    @property
    def scoring_engine(self) -> str:
        """What computes its scores."""
        return scoring_engine(self.model)

    def estimate_seconds(self, num_samples: int, num_bytes: int) -> float:
        """About how long samples of `num_bytes` new bytes each take here, in turns with all who work with this model now.

        The pace is measured at first and then follows the work that is done; other work on the machine is in it.
        """
        return num_bytes * self._seconds_of_byte(num_samples) * (1 + self.lock.num_parties)

    def note_seconds(self, num_samples: int, num_bytes: int, seconds: float) -> None:
        """Notes how long samples took that had this model for themselves."""
        if seconds < SPEED_TEST_S:
            return
        rounds = self._rounds(num_samples)
        if len(rounds) == 1:
            [(at_once, num_rounds)] = rounds
            self._paces[at_once] = seconds / (num_rounds * num_bytes)
        elif all(at_once in self._paces for at_once, _ in rounds):  # else nothing says which of them took how much
            ratio = seconds / (num_bytes * self._seconds_of_byte(num_samples))
            for at_once, _ in rounds:
                self._paces[at_once] *= ratio

    def _seconds_of_byte(self, num_samples: int) -> float:
        """How long one byte of each of the samples takes."""
        rounds = self._rounds(num_samples)
        for at_once, _ in rounds:
            if at_once not in self._paces:
                self._paces[at_once] = self._measure_pace(at_once)
        return sum(num_rounds * self._paces[at_once] for at_once, num_rounds in rounds)

    def _rounds(self, num_samples: int) -> list[tuple[int, int]]:
        """(samples that are made at once, how many times that is done): as many as there can be, then the rest."""
        most = num_at_once(self.model)
        rounds = [(most, num_samples // most), (num_samples % most, 1)]
        return [(at_once, num_rounds) for at_once, num_rounds in rounds if at_once and num_rounds]

    def _measure_pace(self, at_once: int) -> float:
        """Makes a few bytes in the middle of the context, where a byte costs about what it does on average."""
        half = self.info.max_seq_len // 2 // self.info.patch_size * self.info.patch_size
        requests = [Request(bytes(half), self.info.max_seq_len - half, SampleConfig(), number) for number in range(at_once)]
        asked = time.perf_counter()
        begun: dict[int, float] = {}  # when each had its first bytes, which wait for what is read before them
        made: Counter[int] = Counter()  # bytes of each after those
        paces: dict[int, float] = {}
        with closing(stream_batch(self.model, requests)) as chunks:
            for index, chunk in chunks:
                now = time.perf_counter()
                if index not in begun:
                    begun[index] = now
                    continue
                made[index] += len(chunk.byte_values)
                paces[index] = (now - begun[index]) / made[index]
                if len(paces) == at_once and now - max(begun.values()) > SPEED_TEST_S:
                    break
        # In a short context there are no bytes but the first.
        return mean(paces.values()) if paces else (max(begun.values()) - asked) / requests[0].num_bytes


class ModelStore:
    """Shipped models in `weights`, local ones in `runs`, and any other by its folder unless only those are `listed_only`."""

    def __init__(
        self, device: str, weights: Path = WEIGHTS_FOLDER, runs: Path = Path("runs"), *, listed_only: bool = False
    ) -> None:
        self.device = str(usable_device(device))
        self._listed_only = listed_only
        self._weights = weights
        self._runs = runs
        self._loaded: dict[tuple[Path, str], LoadedModel] = {}
        self._infos: dict[tuple[Path, int], ModelInfo] = {}
        self._lock = threading.Lock()

    def folders(self) -> list[Path]:
        """Every shipped and local model, whether or not it is intact."""
        shipped = sorted(path.parent for path in self._weights.glob(f"*/{MANIFEST_NAME}"))
        exports = sorted(path.parent for path in self._runs.glob(f"*/export/{MANIFEST_NAME}"))
        return shipped + exports

    def info(self, name_or_dir: str | Path) -> ModelInfo:
        """The facts about a model; read again only if its folder was written anew.

        Raises:
            UserError: if there is no such model or it is damaged.
        """
        return self.info_of(self._resolve(name_or_dir))

    def info_of(self, folder: Path) -> ModelInfo:
        """The facts about the model in a folder.

        Raises:
            UserError: if it is damaged.
        """
        key = (folder, (folder / MANIFEST_NAME).stat().st_mtime_ns)
        if key not in self._infos:
            info = _describe(folder)
            self._infos[key] = replace(info, name=self._name_of(folder)) if self._is_local(folder) else info
        return self._infos[key]

    def load(self, name_or_dir: str | Path) -> LoadedModel:
        """The model, loaded by the first who asks.

        Raises:
            UserError: if there is no such model or it is damaged.
        """
        with self._lock:
            info = self.info(name_or_dir)
            key = (info.path, info.digest)
            if key not in self._loaded:
                model = load_model(info.path, self.device)
                self._loaded[key] = LoadedModel(model, build_codec(model.codec_config), info)
            return self._loaded[key]

    def load_for(self, media: Media, name_or_dir: str | Path | None) -> LoadedModel:
        """The model asked for, or else the shipped one that suits the media.

        Raises:
            UserError: if there is no such model, it is damaged, or it reads another modality.
        """
        modality = modality_of(media)
        loaded = self.load(name_or_dir or self._default_for(media))
        if loaded.modality != modality:
            raise UserError(
                f"the model {loaded.info.name} reads {loaded.modality}, not {modality}; "
                f"leave out the model to use the one for {modality}"
            )
        return loaded

    def _is_local(self, folder: Path) -> bool:
        return folder.parent.parent == self._runs and folder.parent != self._weights

    def _name_of(self, folder: Path) -> str:
        """What `load` calls a shipped model, or one in `runs`, where several may have the name of their preset."""
        return str(folder.parent) if self._is_local(folder) else folder.name

    def _default_for(self, media: Media) -> str:
        """The largest picture model that is no larger than the picture; the one model of other modalities."""
        *larger, smallest = DEFAULT_MODELS[modality_of(media)]
        for name in larger:
            is_shipped = (self._weights / name / MANIFEST_NAME).exists()
            if is_shipped and self.info(name).max_seq_len <= 3 * min(media.height, media.width) ** 2:
                return name
        return smallest

    def _resolve(self, name_or_dir: str | Path) -> Path:
        if self._listed_only:
            listed = {self._name_of(folder): folder for folder in self.folders()}
            if str(name_or_dir) not in listed:
                name = shown(shortened(str(name_or_dir)))
                raise UserError(f"there is no model {name} on this page; it has {', '.join(listed) or 'none'}")
            return listed[str(name_or_dir)]
        shipped = self._weights / str(name_or_dir)
        if Path(name_or_dir).name == str(name_or_dir) and (shipped / MANIFEST_NAME).exists():
            return shipped
        return resolve_model(name_or_dir)


def _describe(folder: Path) -> ModelInfo:
    checkpoint = load_checkpoint(folder, averaged=True)
    config, card = checkpoint.config, checkpoint.card
    measured = card.get("bits_per_byte", {})
    if not (_is_measured(measured) and all(isinstance(card.get(name, ""), str) for name in ("name", "data"))):
        raise UserError(f"the card of {folder} is damaged: it needs texts, and a number for each rate; export the model anew")
    return ModelInfo(
        name=card.get("name", config.name),
        modality=config.codec.modality,
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        bits_per_byte=measured.get("test", measured.get("valid", {})).get("value"),
        measured=measured,
        digest=checkpoint.digest,
        codec=_codec_in_words(config.codec),
        data=card.get("data", ""),
        max_seq_len=config.model.max_seq_len,
        patch_size=config.model.patch_size,
        path=folder,
    )


def _is_measured(rates: Any) -> bool:
    """Whether each entry of a card's rates, by their split, has a number."""
    entries = rates.values() if isinstance(rates, dict) else [None]
    values = [entry.get("value") if isinstance(entry, dict) else None for entry in entries]
    return all(type(value) in (int, float) and 0 <= value < 1e9 for value in values)


def _codec_in_words(config: CodecConfig) -> str:
    if isinstance(config, ImageCodecConfig):
        scan = "raster scan" if config.scan == "raster" else f"patch scan of {config.scan_patch}x{config.scan_patch} blocks"
        return f"{config.side}x{config.side} RGB, {scan}"
    if isinstance(config, AudioCodecConfig):
        encodings = {
            "mulaw8": "8-bit mu-law",
            "pcm16le": "16-bit PCM, low byte first",
            "pcm16be": "16-bit PCM, high byte first",
        }
        return f"{config.sample_rate} Hz mono, {encodings[config.encoding]}"
    return "bytes as they are"
