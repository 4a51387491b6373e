"""Frozen configurations of a model, its codec and its training, with a strict JSON round trip.

Everything needed to rebuild a model is one `Config`; it is saved as `config.json` beside the weights.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError

FORMAT_VERSION = 1
NUM_BYTE_VALUES = 256

# Far beyond any use: larger numbers are mistakes, or meant to exhaust the memory of whoever opens the file.
_LARGEST = {
    "dim": 1 << 16,
    "num_layers": 256,
    "ffn_dim": 1 << 18,
    "patch_size": 1 << 16,
    "byte_dim": 1 << 16,
    "max_seq_len": 1 << 24,
    "side": 1 << 14,
}
_MOST_LEVELS = 8
_MOST_CONVS = 8
_LONGEST_KERNEL = 256
_MAX_JSON_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of the hierarchy; level 0 is the coarsest (the paper's Global), the last one reads bytes (its Local)."""

    dim: int  # D, width of this level
    num_layers: int  # 0 leaves the level without a Transformer: it hands on what it reads
    num_heads: int
    ffn_dim: int = 0  # inner width of the feed-forward layer; 0 stands for 4 * dim
    patch_size: int = 1  # P, children per element; 1 on the last level
    byte_dim: int = 0  # width of one byte embedding; 0 stands for dim / span, the paper's concatenation
    conv_kernels: tuple[int, ...] = ()  # causal convolutional patch encoder; the paper uses 3, 5, 7
    cross_patch: int = 0  # r, elements of the previous patch whose keys and values are attended

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "patch_size"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_layers", "ffn_dim", "byte_dim", "cross_patch"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        _require_usual_size(self)
        _require(self.dim % self.num_heads == 0, f"dim={self.dim} must be divisible by num_heads={self.num_heads}")
        _require(
            all(2 <= k <= _LONGEST_KERNEL for k in self.conv_kernels) and len(self.conv_kernels) <= _MOST_CONVS,
            f"conv_kernels={self.conv_kernels} must be at most {_MOST_CONVS}, each in 2..{_LONGEST_KERNEL}",
        )
        if self.ffn_dim == 0:
            object.__setattr__(self, "ffn_dim", 4 * self.dim)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class MegaByteConfig:
    """A MegaByte of one or more levels. One level is the flat byte Transformer."""

    kind: Literal["megabyte"] = "megabyte"
    levels: tuple[LevelConfig, ...]
    max_seq_len: int  # context in bytes, a multiple of the coarsest patch
    positions: Literal["learned", "rotary", "both"] = "learned"  # learned vectors are added, rotary turns queries and keys
    unembedder: Literal["slices", "full"] = "slices"  # "slices" is the paper's; "full" maps D to P * D_child at once
    real_previous: bool = False  # the real previous element at the start of a patch instead of the trainable pad
    activation: Literal["relu", "relu2"] = "relu"  # relu2 is its square (arXiv 2109.08668)
    qk_norm: bool = False  # queries and keys at unit root mean square, per head (arXiv 2010.04245)
    residual_scalars: bool = False  # each layer reads a * x + b * (the level's input), with learned a and b
    logit_softcap: float = 0.0  # logits bounded to +-cap by cap * tanh(logits / cap); 0 turns it off
    dropout: float = 0.0
    init_std: float = 0.02
    zero_init: bool = False  # what each layer adds starts at zero
    smooth_init: bool = False  # embeddings of neighbouring byte values start close to each other

    def __post_init__(self) -> None:
        _require(1 <= len(self.levels) <= _MOST_LEVELS, f"{len(self.levels)} levels are given; give 1 to {_MOST_LEVELS}")
        _require_usual_size(self)
        _require(self.levels[-1].patch_size == 1, f"patch_size={self.levels[-1].patch_size} on the last level must be 1")
        for level in self.levels[:-1]:
            _require(level.patch_size >= 2, f"patch_size={level.patch_size} above the last level must be at least 2")
        _require(
            self.max_seq_len >= 1 and self.max_seq_len % self.patch_size == 0,
            f"max_seq_len={self.max_seq_len} must be a positive multiple of the patch size {self.patch_size}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout={self.dropout} must lie in [0, 1)")
        _require(self.logit_softcap >= 0.0, f"logit_softcap={self.logit_softcap} must not be negative; 0 turns it off")
        _require(self.levels[0].cross_patch == 0, "cross_patch on level 0 has no previous patch to attend to; set it to 0")
        _require(
            self.levels[-1].byte_dim in (0, self.levels[-1].dim) and not self.levels[-1].conv_kernels,
            "the last level embeds single bytes: byte_dim and conv_kernels do not apply there",
        )
        for index, level in enumerate(self.levels):
            span = self.span(index)
            _require(
                level.byte_dim > 0 or level.dim % span == 0,
                f"dim={level.dim} of level {index} is no multiple of its {span} bytes; set byte_dim to project instead",
            )
            if index:
                siblings = self.levels[index - 1].patch_size
                _require(
                    level.cross_patch <= siblings,
                    f"cross_patch={level.cross_patch} of level {index} exceeds the {siblings} elements of a patch",
                )
            _require(
                not self.is_rotary or level.head_dim % 2 == 0,
                f"rotary positions need an even head_dim, level {index} has {level.head_dim}",
            )
            _require(
                self.unembedder == "full" or level.dim % level.patch_size == 0,
                f"dim={level.dim} of level {index} does not split into {level.patch_size} slices; use unembedder='full'",
            )

    @property
    def has_learned_positions(self) -> bool:
        return self.positions in ("learned", "both")

    @property
    def is_rotary(self) -> bool:
        return self.positions in ("rotary", "both")

    def span(self, level: int) -> int:
        """Bytes covered by one element of `level`: the product of the patch sizes from there down."""
        span = 1
        for config in self.levels[level:]:
            span *= config.patch_size
        return span

    @property
    def patch_size(self) -> int:
        """Bytes in one coarsest patch (the paper's P when there are two levels)."""
        return self.span(0)

    def num_predicted(self, num_bytes: int) -> int:
        """How many of `num_bytes` bytes one forward pass predicts: all of them."""
        return num_bytes


@dataclass(frozen=True, kw_only=True)
class PerceiverArConfig:
    """A Perceiver AR: the last `num_latents` positions look at the whole context, and only their bytes are predicted."""

    kind: Literal["perceiver_ar"] = "perceiver_ar"
    dim: int  # D
    num_layers: int  # on the latents, after the cross-attention
    num_heads: int
    ffn_dim: int = 0  # inner width of the feed-forward layer; 0 stands for 4 * dim
    num_latents: int  # N, bytes
    max_seq_len: int  # context in bytes, a multiple of num_latents
    positions: Literal["rotary", "both"] = "rotary"  # "both" adds learned vectors, which pictures need
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "num_latents", "max_seq_len"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _require(self.ffn_dim >= 0, f"ffn_dim={self.ffn_dim} must not be negative")
        _require_usual_size(self)
        _require(
            self.dim % (2 * self.num_heads) == 0,
            f"dim={self.dim} must be divisible by twice num_heads={self.num_heads}; rotary positions need an even head_dim",
        )
        _require(self.num_latents % 2 == 0, f"num_latents={self.num_latents} must be even; decoding drops half of them at a time")
        _require(
            self.max_seq_len % self.num_latents == 0,
            f"max_seq_len={self.max_seq_len} must be a multiple of num_latents={self.num_latents}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout={self.dropout} must lie in [0, 1)")
        if self.ffn_dim == 0:
            object.__setattr__(self, "ffn_dim", 4 * self.dim)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_size(self) -> int:
        """It reads bytes one by one."""
        return 1

    def num_predicted(self, num_bytes: int) -> int:
        """How many of `num_bytes` bytes, the last ones, one forward pass predicts."""
        return min(num_bytes, self.num_latents)


ModelConfig = MegaByteConfig | PerceiverArConfig


@dataclass(frozen=True, kw_only=True)
class ImageCodecConfig:
    """Square RGB pictures as bytes, 3 * side * side of them."""

    modality: Literal["image"] = "image"
    side: int = 32  # pixels
    scan: Literal["raster", "patch"] = "patch"
    scan_patch: int = 4  # side of one block of the patch scan, pixels

    def __post_init__(self) -> None:
        _require(self.side >= 1, f"side={self.side} must be at least 1 pixel")
        _require_usual_size(self)
        _require(
            self.scan == "raster" or (self.scan_patch >= 1 and self.side % self.scan_patch == 0),
            f"scan_patch={self.scan_patch} must divide side={self.side}",
        )


@dataclass(frozen=True, kw_only=True)
class AudioCodecConfig:
    """Mono sound as bytes: one mu-law byte a sample, or two bytes of 16-bit PCM."""

    modality: Literal["audio"] = "audio"
    sample_rate: int = 16000  # Hz
    encoding: Literal["mulaw8", "pcm16le", "pcm16be"] = "mulaw8"  # le: low byte first; be: high byte first

    def __post_init__(self) -> None:
        _require(1000 <= self.sample_rate <= 384000, f"sample_rate={self.sample_rate} Hz must lie in 1000..384000")

    @property
    def bytes_per_sample(self) -> int:
        return 1 if self.encoding == "mulaw8" else 2


@dataclass(frozen=True, kw_only=True)
class TextCodecConfig:
    """Text, or any raw file: its bytes as they are."""

    modality: Literal["text"] = "text"


CodecConfig = ImageCodecConfig | AudioCodecConfig | TextCodecConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Sizes are in sequences unless a name says otherwise."""

    num_steps: int = 1000
    seq_len: int = 0  # bytes of one training sequence; 0 stands for the model's context
    batch_size: int = 16  # sequences of one optimizer step, over all ranks
    micro_batch_size: int = 0  # sequences of one forward pass on one rank; 0 stands for all, on a CPU for few
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon moves the matrices inside layers, adamw the rest
    lr: float = 1e-3  # of adamw
    muon_lr: float = 0.02  # of muon
    warmup_steps: int = 100
    schedule: Literal["linear", "cosine", "constant", "trapezoid"] = "linear"
    decay_fraction: float = 0.5  # last part of the steps, in which the trapezoid falls
    final_lr_fraction: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    ema_decay: float = 0.0  # decay per step of the averaged weights that are evaluated and exported; 0 turns it off
    precision: Literal["bf16", "fp32"] = "bf16"  # of matrix products; a CPU that cannot multiply bf16 stays at fp32
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each holds all weights (ddp) or a share of them (fsdp)
    compile: bool = True  # on a GPU: a minute's wait, then more than twice as fast; a CPU and sharded weights go without
    checkpoint_activations: bool = False  # run layers again in the backward pass instead of keeping what is inside them
    deterministic: bool = True  # on a GPU, needed for a bit-identical resume; training is faster without
    eval_every: int = 200  # steps
    eval_sequences: int = 64
    checkpoint_every: int = 200  # steps
    log_every: int = 10  # steps
    keep_checkpoints: int = 2
    augment: bool = False  # mirrored pictures; sounds louder, softer and with their polarity turned
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("num_steps", "batch_size", "eval_every", "eval_sequences", "checkpoint_every", "log_every", "keep_checkpoints")
        for name in counts:
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("seq_len", "micro_batch_size", "warmup_steps", "weight_decay", "final_lr_fraction", "seed"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        _require(self.seed < 2**63, f"seed={self.seed} must be below {2**63}")
        for name in ("lr", "muon_lr"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        _require(0.0 < self.decay_fraction <= 1.0, f"decay_fraction={self.decay_fraction} must lie above 0 and up to 1")
        _require(all(0.0 <= beta < 1.0 for beta in self.betas), f"betas={self.betas} must both lie in [0, 1)")
        _require(self.grad_clip > 0, f"grad_clip={self.grad_clip} must be positive")
        _require(0.0 <= self.ema_decay < 1.0, f"ema_decay={self.ema_decay} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One checkpoint's whole description: what the model is, what its bytes mean and how it is trained."""

    name: str
    model: ModelConfig
    codec: CodecConfig
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if isinstance(self.codec, ImageCodecConfig):
            num_bytes = 3 * self.codec.side**2
            _require(
                num_bytes % self.model.max_seq_len == 0,
                f"max_seq_len={self.model.max_seq_len} must equal the picture's {num_bytes} bytes, or be a whole part of them",
            )
            patch = 3 * self.codec.scan_patch**2
            _require(
                self.codec.scan == "raster" or patch % self.model.patch_size == 0 or self.model.patch_size % patch == 0,
                f"the patch scan's blocks of {patch} bytes and the model's patches of {self.model.patch_size} do not align",
            )
        _require(
            self.train.seq_len <= self.model.max_seq_len,
            f"seq_len={self.train.seq_len} exceeds the model's context of {self.model.max_seq_len} bytes",
        )

    def to_json(self) -> str:
        """Indented JSON with `format_version`; `from_json` gives back an equal configuration."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Reads `to_json`'s text.

        Raises:
            ValueError: on a newer format, an unknown or missing key, or a value of the wrong type or range.
        """
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the configuration is not valid JSON: {error}") from None
        _require(isinstance(raw, dict), "the configuration must be a JSON object")
        check_format_version(raw.pop("format_version", None))
        return _build(cls, raw, "config")

    def with_overrides(self, assignments: list[str]) -> "Config":
        """A copy with settings such as `train.lr=1e-3` or `model.levels.0.dim=512` replaced.

        Raises:
            ValueError: if an assignment names no setting or its value does not fit.
        """
        raw = json.loads(self.to_json())
        del raw["format_version"]
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            _require(bool(equals), f"--set {assignment!r} must look like train.lr=1e-3")
            _assign(raw, key, value)
        return _build(type(self), raw, "config")


def check_format_version(version: Any) -> None:
    """Refuses a file made by a newer program.

    Raises:
        ValueError: unless `version` is this program's FORMAT_VERSION or an older one.
    """
    _require(
        isinstance(version, int) and 1 <= version <= FORMAT_VERSION,
        f"format_version={version!r}, this program reads 1..{FORMAT_VERSION}; update the program or export the model again",
    )


def require_small(path: Path) -> None:
    """Refuses a file that is too large for a configuration or a list, before it is read.

    Raises:
        UserError: if it is larger than a megabyte.
    """
    size = path.stat().st_size
    _require(size <= _MAX_JSON_BYTES, f"it has {size} bytes, at most {_MAX_JSON_BYTES} are expected")


def load_config(path: Path) -> Config:
    """The configuration in a JSON file, with the file named in every refusal."""
    try:
        require_small(path)
        return Config.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_usual_size(config: Any) -> None:
    for name in _LARGEST.keys() & vars(config).keys():
        value = getattr(config, name)
        _require(value <= _LARGEST[name], f"{name}={value} must be at most {_LARGEST[name]}")


def _assign(raw: Any, key: str, value: str) -> None:
    *parents, last = key.split(".")
    try:
        for part in parents:
            raw = raw[int(part)] if isinstance(raw, list) else raw[part]
        index: Any = int(last) if isinstance(raw, list) else last
        raw[index]  # an unknown key is a mistake, not a new setting
        try:
            raw[index] = json.loads(value)
        except json.JSONDecodeError:
            raw[index] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"--set {key}: there is no such setting; config.json of a run lists them all") from None


def _chosen_option(options: tuple[type, ...], raw: dict[str, Any], where: str) -> type:
    """The class whose first field, its tag, has the value in `raw`. A model without a tag is a MegaByte: old files have none."""
    tag = dataclasses.fields(options[0])[0].name
    classes = {dataclasses.fields(option)[0].default: option for option in options}
    name = raw.get(tag, "megabyte" if tag == "kind" else None)
    *others, last = classes
    _require(name in [*others, last], f"{where}.{tag}={name!r} must be {', '.join(others)} or {last}")
    return classes[name]


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _build(kind: Any, raw: Any, where: str) -> Any:
    """`raw` JSON as a value of type `kind`, refusing unknown keys, missing keys and wrong types."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        _require(isinstance(raw, dict), f"{where} must be a JSON object")
        return _build(_chosen_option(typing.get_args(kind), raw, where), raw, where)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(raw, dict), f"{where} must be a JSON object")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for key in raw:
            _require(key in fields, f"{where}.{key} is not a known setting")
        for name, entry in fields.items():
            required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
            _require(not required or name in raw, f"{where}.{name} is missing")
        return kind(**{key: _build(hints[key], value, f"{where}.{key}") for key, value in raw.items()})
    if origin is tuple:
        _require(isinstance(raw, list), f"{where}={raw!r} must be a list")
        item, *rest = typing.get_args(kind)
        _require(rest == [...] or len(raw) == len(rest) + 1, f"{where}={raw!r} must have {len(rest) + 1} entries")
        return tuple(_build(item, value, f"{where}.{index}") for index, value in enumerate(raw))
    if origin is Literal:
        _require(raw in typing.get_args(kind), f"{where}={raw!r} must be one of {', '.join(map(str, typing.get_args(kind)))}")
        return raw
    if kind is float and type(raw) is int and abs(raw) < 2**64:
        return float(raw)
    _require(type(raw) is kind, f"{where}={raw!r} must be {_KIND_NAMES[kind]}")
    _require(kind is not float or math.isfinite(raw), f"{where}={raw!r} must be a finite number")
    return raw
