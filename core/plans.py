"""What `core.compare` trains: for each plan its data, its models and how much computing each of them gets.

Models of one group take steps of the same number of bytes, at least about 50 of them. In the plans of one modality they
cost about the same per predicted byte, so that with the same FLOPs they learn from about the same number of bytes; in
`scaling` and `ablation` cheaper models learn from more. All have the optimizer and the schedule of the shipped model of
their modality; "ours" has its architecture, too, in other sizes. The plain ones are as published: ReLU, no
norm of queries and keys, no scalars, no softcap.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from core.config import (
    CodecConfig,
    Config,
    ImageCodecConfig,
    LevelConfig,
    MegaByteConfig,
    ModelConfig,
    PerceiverArConfig,
)
from core.presets import preset

Size = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One data set. Names are below the data root; one that ends in * stands for all that begin so.

    Attributes:
        test_items: as many pictures or sounds of the test set are scored, spread evenly; 0 stands for all.
        segment_bytes: a test text is cut into pieces of this size, each scored on its own.
    """

    train: str
    valid: str
    test: str
    test_items: int
    segment_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of a plan. Its training steps follow from the FLOPs it is given."""

    group: str  # members of one group see the same data and are compared with each other
    config: Config
    split: Split

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Models to compare, each trained with `budget` FLOPs, forward and backward together."""

    name: str
    size: Size
    budget: float
    members: tuple[Member, ...]


def build_plan(name: str, size: Size) -> Plan:
    """The plan of that name in that size.

    Raises:
        ValueError: if there is none.
    """
    if name not in _PLANS:
        raise ValueError(f"there is no plan {name!r}; choose one of {', '.join(plan_names())}")
    members, budgets = _PLANS[name]
    return Plan(name=name, size=size, budget=budgets[size], members=tuple(members(size)))


def plan_names() -> list[str]:
    return list(_PLANS)


def split_of(modality: str, size: Size) -> Split:
    """The data of text, image32, image64 or audio in a size."""
    on_gpu = size == "gpu"
    if modality == "text":
        return Split(
            train="text/novels_train.txt*",  # or .txt.xz
            valid="text/novels_valid.txt*",
            test="text/novels_test.txt*",
            test_items=0 if on_gpu else 16,
            segment_bytes=65536 if on_gpu else 16384,
        )
    if modality == "audio":
        return _folders("audio/wake16k", test_items=0 if on_gpu else 24)
    if modality == "image64":
        return _folders("image/photos64", test_items=0 if on_gpu else 32)
    return _folders("image/cifar10", test_items=2000 if on_gpu else 128)


def _folders(prefix: str, test_items: int) -> Split:
    return Split(train=f"{prefix}_train*", valid=f"{prefix}_valid", test=f"{prefix}_test", test_items=test_items)


def _member(
    name: str,
    model: ModelConfig,
    modality: str,
    size: Size,
    group: str = "",
    codec: CodecConfig | None = None,
    context: int = 0,
    cpu_bytes_per_step: int = 1 << 14,
    **training: Any,
) -> Member:
    """A model with the shipped recipe's training and, unless it is given, codec.

    A step has as many bytes as whole windows of `context` come nearest to, from below: the group's longest, by default the
    model's own.
    """
    shipped = preset(modality)
    context = context or model.max_seq_len
    num_windows = max(1, (1 << 16 if size == "gpu" else cpu_bytes_per_step) // context)
    batch_size = num_windows * context // model.num_predicted(model.max_seq_len)
    most = max(1, (1 << 16) // model.max_seq_len)
    train = replace(
        shipped.train,
        batch_size=batch_size,
        micro_batch_size=next(n for n in range(min(batch_size, most), 0, -1) if batch_size % n == 0),
        seq_len=0,
        augment=False,
        weight_decay=0.05,  # enough for bytes that are seen once; the shipped model of text sees them forty times
        **{"eval_sequences": max(1, (1 << 19 if size == "gpu" else 1 << 16) // model.max_seq_len), **training},
    )
    return Member(
        group=group or modality,
        config=Config(name=name, model=model, codec=codec or shipped.codec, train=train),
        split=split_of(modality, size),
    )


def _level(dim: int, num_layers: int, num_heads: int, **options) -> LevelConfig:
    return LevelConfig(dim=dim, num_layers=num_layers, num_heads=num_heads, **options)


def _paper_form(coarse: LevelConfig, fine: LevelConfig, context: int) -> MegaByteConfig:
    """MEGABYTE as published: learned positions, rotary ones where it looks across patches (section 2.3).

    Only its weights begin as wide as those of the others: A.1's 0.006 is for layers ten times as wide.
    """
    positions = "both" if fine.cross_patch else "learned"
    return MegaByteConfig(levels=(coarse, fine), max_seq_len=context, positions=positions)


def _ours(modality: str, coarse: tuple[int, int, int], fine: tuple[int, int, int], context: int) -> MegaByteConfig:
    """The shipped model of a modality with other widths, depths and context."""
    shipped = preset(modality).model
    levels = tuple(
        replace(level, dim=dim, num_layers=num_layers, num_heads=num_heads, ffn_dim=0)
        for level, (dim, num_layers, num_heads) in zip(shipped.levels, (coarse, fine), strict=True)
    )
    return replace(shipped, levels=levels, max_seq_len=context, dropout=0.0)


def _flat(dim: int, num_layers: int, num_heads: int, context: int, positions: str = "rotary") -> MegaByteConfig:
    return MegaByteConfig(levels=(_level(dim, num_layers, num_heads),), max_seq_len=context, positions=positions)


def _perceiver(dim: int, num_layers: int, num_heads: int, context: int, positions: str = "rotary") -> PerceiverArConfig:
    return PerceiverArConfig(
        dim=dim, num_layers=num_layers, num_heads=num_heads, num_latents=1024, max_seq_len=context, positions=positions
    )


_Width = tuple[int, int, int]  # width, layers, heads


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """The models of a comparison, chosen so that a predicted byte costs each of them about the same."""

    context: int
    published: tuple[_Width, _Width]  # global and local
    ours: tuple[_Width, _Width]
    short: _Width  # the flat Transformer with a short window
    flat: _Width  # with the full context
    perceiver: _Width


_SIZES: dict[tuple[str, Size], _Sizes] = {
    ("text", "cpu"): _Sizes(
        context=4096,
        published=((256, 6, 4), (128, 2, 2)),
        ours=((192, 4, 3), (128, 2, 2)),
        short=(128, 6, 2),
        flat=(96, 4, 2),
        perceiver=(112, 4, 2),
    ),
    ("text", "gpu"): _Sizes(
        context=8192,
        published=((512, 6, 8), (192, 2, 3)),
        ours=((384, 4, 6), (192, 2, 3)),
        short=(256, 6, 4),
        flat=(160, 4, 2),
        perceiver=(192, 5, 3),
    ),
    ("image32", "cpu"): _Sizes(
        context=3072,
        published=((384, 4, 6), (160, 4, 2)),
        ours=((192, 6, 3), (128, 3, 2)),
        short=(128, 6, 2),
        flat=(112, 4, 2),
        perceiver=(112, 6, 2),
    ),
    ("image32", "gpu"): _Sizes(
        context=3072,
        published=((768, 6, 12), (256, 5, 4)),
        ours=((384, 6, 6), (256, 3, 4)),
        short=(256, 7, 4),
        flat=(192, 7, 3),
        perceiver=(192, 9, 3),
    ),
    ("image64", "cpu"): _Sizes(
        context=12288,
        published=((384, 4, 6), (160, 4, 2)),
        ours=((192, 4, 3), (96, 2, 2)),
        short=(128, 6, 2),
        flat=(64, 2, 1),
        perceiver=(96, 4, 2),
    ),
    ("image64", "gpu"): _Sizes(
        context=12288,
        published=((768, 6, 12), (256, 5, 4)),
        ours=((384, 5, 6), (192, 2, 3)),
        short=(256, 7, 4),
        flat=(160, 3, 2),
        perceiver=(192, 5, 3),
    ),
    ("audio", "cpu"): _Sizes(
        context=8192,
        published=((384, 6, 6), (128, 2, 2)),
        ours=((256, 5, 4), (128, 2, 2)),
        short=(128, 6, 2),
        flat=(80, 3, 2),
        perceiver=(96, 3, 2),
    ),
    ("audio", "gpu"): _Sizes(
        context=8192,
        published=((768, 6, 12), (192, 2, 3)),
        ours=((512, 6, 8), (192, 2, 3)),
        short=(256, 6, 4),
        flat=(160, 4, 2),
        perceiver=(192, 5, 3),
    ),
}
_PATCH_SIZES = {"text": 4, "image32": 12, "image64": 12, "audio": 8}  # of the published form


def _published_levels(modality: str, size: Size) -> tuple[LevelConfig, LevelConfig]:
    """Both levels, with cross-patch attention where the paper has it: not for text."""
    coarse, fine = _SIZES[modality, size].published
    patch_size = _PATCH_SIZES[modality]
    return _level(*coarse, patch_size=patch_size), _level(*fine, cross_patch=0 if modality == "text" else patch_size)


def _published_codec(modality: str) -> CodecConfig:
    """Pictures in patch scan, whose blocks are the patches."""
    codec = preset(modality).codec
    return replace(codec, scan="patch", scan_patch=2) if isinstance(codec, ImageCodecConfig) else codec


def _comparison(modality: str) -> Callable[[Size], list[Member]]:
    """The paper's Tables 2 and 5: MEGABYTE, ours, flat Transformers with a short window and the full context, Perceiver AR."""

    def members(size: Size) -> list[Member]:
        sizes = _SIZES[modality, size]
        context = sizes.context
        is_picture = modality.startswith("image")
        positions = "both" if is_picture else "rotary"
        window = 1536 if is_picture else 1024  # whole pixels, and a whole number of windows in a picture
        published = _paper_form(*_published_levels(modality, size), context)
        models = {
            "ours": _ours(modality, *sizes.ours, context),
            f"transformer-{window}": _flat(*sizes.short, window, positions),
            f"transformer-{context}": _flat(*sizes.flat, context, positions),
            "perceiver-ar": _perceiver(*sizes.perceiver, context, positions),
        }
        return [
            _member("megabyte", published, modality, size, codec=_published_codec(modality)),
            *(_member(name, model, modality, size, context=context) for name, model in models.items()),
        ]

    return members


def _scaling(size: Size) -> list[Member]:
    """The three kinds with contexts from 2k bytes of text up; only the context grows, so longer ones learn from fewer bytes.

    Up to 64k on a GPU. On a CPU up to 8k: of longer ones the FLOPs pay for too few steps.
    """
    members = []
    for context in (2048, 8192, 32768, 65536) if size == "gpu" else (2048, 8192):
        if size == "gpu":
            coarse, fine = _level(512, 4, 8, patch_size=8), _level(192, 2, 3)
            flat, perceiver = _flat(160, 4, 2, context), _perceiver(160, 4, 2, context)
        else:
            coarse, fine = _level(256, 4, 4, patch_size=8), _level(96, 2, 2)
            flat, perceiver = _flat(80, 3, 2, context), _perceiver(80, 3, 2, context)
        models = {"megabyte": _paper_form(coarse, fine, context), "transformer": flat, "perceiver-ar": perceiver}
        group = f"{context // 1024}k"
        members += [
            _member(f"{name}-{group}", model, "text", size, group, cpu_bytes_per_step=1 << 13) for name, model in models.items()
        ]
    test_items = 16 if size == "gpu" else 4
    return [replace(member, split=replace(member.split, segment_bytes=65536, test_items=test_items)) for member in members]


def _ablation(size: Size) -> list[Member]:
    """The paper's Table 10, for text and for pictures: the published form without a part, or with one more."""
    members = []
    for modality in ("text", "image32"):
        coarse, fine = _published_levels(modality, size)
        across = replace(fine, cross_patch=coarse.patch_size)
        variants = {
            "megabyte": (coarse, across),
            "without-local": (coarse, replace(across, num_layers=0)),
            "without-global": (replace(coarse, num_layers=0), across),
            "without-cross-patch": (coarse, replace(fine, cross_patch=0)),
            "with-conv": (replace(coarse, conv_kernels=(3, 5, 7)), across),
        }
        for name, levels in variants.items():
            model, codec = _paper_form(*levels, _SIZES[modality, size].context), _published_codec(modality)
            members.append(_member(f"{name}-{modality}", model, modality, size, codec=codec, cpu_bytes_per_step=1 << 13))
    return members


# Sizes and what has no place in an ablation: they change what a model costs, not how it is made.
_NO_OPTION = {"kind", "levels", "max_seq_len", "dropout", "init_std", "dim", "num_layers", "num_heads", "ffn_dim", "patch_size"}
# Adam wants smaller steps for matrices than beside Muon for the rest.
_PLAIN_TRAINING = {
    "optimizer=adamw": {"optimizer": "adamw", "lr": 1.5e-3},
    "schedule=linear": {"schedule": "linear"},
    "ema=0": {"ema_decay": 0.0},
}


def _ablation_recipe(size: Size) -> list[Member]:
    """Ours, and ours with one option after another set back to its plain value."""
    members = []
    for modality in ("text", "image32"):
        sizes = _SIZES[modality, size]
        ours = _ours(modality, *sizes.ours, sizes.context)
        changes = [("ours", ours, {}), *((name, model, {}) for name, model in _single_changes(ours))]
        changes += [(name, ours, training) for name, training in _PLAIN_TRAINING.items()]
        for name, model, training in changes:
            members.append(_member(f"{name}-{modality}", model, modality, size, cpu_bytes_per_step=1 << 12, **training))
    return members


def _single_changes(model: MegaByteConfig) -> list[tuple[str, MegaByteConfig]]:
    """For each option that is on, its name with the plain value and the model with that value."""
    changes = []
    for option in fields(MegaByteConfig):
        if option.name not in _NO_OPTION and getattr(model, option.name) != option.default:
            changes.append((f"{option.name}={option.default}", replace(model, **{option.name: option.default})))
    for index, level in enumerate(model.levels):
        for option in fields(LevelConfig):
            if option.name not in _NO_OPTION and getattr(level, option.name) != option.default:
                levels = list(model.levels)
                levels[index] = replace(level, **{option.name: option.default})
                plain = option.default or 0
                changes.append((f"{option.name}={plain}", replace(model, levels=tuple(levels))))
    return changes


# FLOPs of each model: a plan takes 10 to 30 minutes on two cores and 5 to 20 minutes on an H100.
_PLANS: dict[str, tuple[Callable[[Size], list[Member]], dict[Size, float]]] = {
    "text": (_comparison("text"), {"cpu": 1e13, "gpu": 1.5e15}),
    "image32": (_comparison("image32"), {"cpu": 1e13, "gpu": 1.5e15}),
    "image64": (_comparison("image64"), {"cpu": 1e13, "gpu": 1.5e15}),
    "audio": (_comparison("audio"), {"cpu": 1e13, "gpu": 1.5e15}),
    "scaling": (_scaling, {"cpu": 6e12, "gpu": 1e15}),
    "ablation": (_ablation, {"cpu": 5e12, "gpu": 6e14}),
    "ablation-recipe": (_ablation_recipe, {"cpu": 2.5e12, "gpu": 5e14}),
}
