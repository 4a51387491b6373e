"""Named configurations: the models of the paper's Table 15, and the ones this project trains and ships."""

from collections.abc import Callable

from core.config import (
    AudioCodecConfig,
    CodecConfig,
    Config,
    ImageCodecConfig,
    LevelConfig,
    MegaByteConfig,
    TextCodecConfig,
    TrainConfig,
)


def preset(name: str) -> Config:
    """The configuration called `name`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(preset_names())}")
    return _PRESETS[name](name)


def preset_names() -> list[str]:
    return list(_PRESETS)


def _text(name: str) -> Config:
    return _shipped(
        name,
        levels=(
            LevelConfig(dim=448, num_layers=7, num_heads=7, patch_size=2),
            LevelConfig(dim=256, num_layers=2, num_heads=4),
        ),
        max_seq_len=8192,
        dropout=0.15,
        codec=TextCodecConfig(),
        batch_size=32,
        num_steps=9000,
        weight_decay=0.15,
    )


def _image(name: str, side: int, batch_size: int, num_steps: int, dropout: float) -> Config:
    """A pixel is a patch: the global model attends to every pixel before it, the local one makes its three colours."""
    return _shipped(
        name,
        levels=(
            LevelConfig(dim=448, num_layers=6, num_heads=7, patch_size=3, byte_dim=64),
            LevelConfig(dim=320, num_layers=3, num_heads=5),
        ),
        max_seq_len=3 * side * side,
        positions="both",
        dropout=dropout,
        codec=ImageCodecConfig(side=side, scan="raster"),
        batch_size=batch_size,
        num_steps=num_steps,
    )


def _audio(name: str, encoding: str, widths: tuple[int, int], num_steps: int, dropout: float) -> Config:
    global_dim, local_dim = widths
    return _shipped(
        name,
        levels=(
            LevelConfig(dim=global_dim, num_layers=6, num_heads=global_dim // 64, patch_size=4),
            LevelConfig(dim=local_dim, num_layers=3, num_heads=local_dim // 64, cross_patch=4),
        ),
        max_seq_len=8192,
        dropout=dropout,
        codec=AudioCodecConfig(sample_rate=16000, encoding=encoding),
        batch_size=32,
        num_steps=num_steps,
    )


def _shipped(
    name: str,
    *,
    levels: tuple[LevelConfig, ...],
    max_seq_len: int,
    dropout: float,
    codec: CodecConfig,
    batch_size: int,
    num_steps: int,
    positions: str = "rotary",
    weight_decay: float = 0.05,
) -> Config:
    """About 20 million parameters and everything that was found to pay."""
    return Config(
        name=name,
        model=MegaByteConfig(
            levels=levels,
            max_seq_len=max_seq_len,
            positions=positions,
            unembedder="full",
            real_previous=True,
            activation="relu2",
            qk_norm=True,
            residual_scalars=True,
            logit_softcap=20.0,
            zero_init=True,
            smooth_init=codec.modality != "text",
            dropout=dropout,
        ),
        codec=codec,
        train=TrainConfig(
            num_steps=num_steps,
            batch_size=batch_size,
            optimizer="muon",
            lr=3e-3,
            muon_lr=0.02,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            warmup_steps=100,
            schedule="trapezoid",
            decay_fraction=0.6,
            ema_decay=0.997,
            deterministic=False,
            augment=codec.modality != "text",
            eval_every=500,
            eval_sequences=128,
            checkpoint_every=1000,
        ),
    )


def _paper(
    *, global_model: LevelConfig, local_model: LevelConfig, max_seq_len: int, codec: CodecConfig, batch_size: int, lr: float
) -> Callable[[str], Config]:
    """Appendix A.1 and Table 15 of arXiv 2305.07185.

    The table gives width, depth and parameters of each model but not the width of its feed-forward layers; it is set
    here so that the parameters agree.
    """
    exact = global_model.byte_dim == 0  # Image64's widths are no multiple of P = 12, so they project in and out
    return lambda name: Config(
        name=name,
        model=MegaByteConfig(
            levels=(global_model, local_model),
            max_seq_len=max_seq_len,
            positions="both" if local_model.cross_patch else "learned",  # section 2.3: rotary across patches
            unembedder="slices" if exact else "full",
            dropout=0.1,
            init_std=0.006,
        ),
        codec=codec,
        train=TrainConfig(batch_size=batch_size, lr=lr, warmup_steps=500),
    )


def _bench(name: str, patch_size: int, max_seq_len: int) -> Config:
    """For measuring speed: the paper's form at a size that a small machine runs in seconds."""
    return Config(
        name=name,
        model=MegaByteConfig(
            levels=(
                LevelConfig(dim=512, num_layers=6, num_heads=8, patch_size=patch_size),
                LevelConfig(dim=256, num_layers=3, num_heads=4),
            ),
            max_seq_len=max_seq_len,
        ),
        codec=TextCodecConfig(),
    )


_PRESETS: dict[str, Callable[[str], Config]] = {
    "text": _text,
    "image32": lambda name: _image(name, side=32, batch_size=80, num_steps=11847, dropout=0.05),
    "image64": lambda name: _image(name, side=64, batch_size=20, num_steps=8500, dropout=0.1),
    "audio": lambda name: _audio(name, "mulaw8", widths=(448, 320), num_steps=729, dropout=0.1),
    "audio-pcm16": lambda name: _audio(name, "pcm16be", widths=(384, 256), num_steps=4500, dropout=0.15),
    "paper-text": _paper(
        global_model=LevelConfig(dim=2048, num_layers=14, num_heads=16, ffn_dim=9088, patch_size=8),
        local_model=LevelConfig(dim=1024, num_layers=18, num_heads=8, ffn_dim=5056),
        max_seq_len=8192,
        codec=TextCodecConfig(),
        batch_size=48,
        lr=2e-4,
    ),
    # Section 6.2's models of the generation speeds: 1.3B and 218M parameters against a byte Transformer of 350M.
    "paper-generation": _paper(
        global_model=LevelConfig(dim=2048, num_layers=24, num_heads=16, ffn_dim=8704, patch_size=8),
        local_model=LevelConfig(dim=1024, num_layers=15, num_heads=8, ffn_dim=5056),
        max_seq_len=8192,
        codec=TextCodecConfig(),
        batch_size=48,
        lr=2e-4,
    ),
    "paper-image64": _paper(
        global_model=LevelConfig(dim=2560, num_layers=32, num_heads=20, ffn_dim=11264, patch_size=12, byte_dim=214),
        local_model=LevelConfig(dim=1024, num_layers=24, num_heads=8, ffn_dim=5056, cross_patch=12),
        max_seq_len=3 * 64 * 64,
        codec=ImageCodecConfig(side=64, scan="patch", scan_patch=2),
        batch_size=2,
        lr=2e-4,
    ),
    "paper-image64-matched": _paper(
        global_model=LevelConfig(dim=2048, num_layers=24, num_heads=16, ffn_dim=8704, patch_size=12, byte_dim=171),
        local_model=LevelConfig(dim=2048, num_layers=24, num_heads=16, ffn_dim=9088, cross_patch=12),
        max_seq_len=3 * 64 * 64,
        codec=ImageCodecConfig(side=64, scan="patch", scan_patch=2),
        batch_size=256,
        lr=3e-4,
    ),
    "paper-image256": _paper(
        global_model=LevelConfig(dim=768, num_layers=12, num_heads=12, ffn_dim=5184, patch_size=192),
        local_model=LevelConfig(dim=768, num_layers=12, num_heads=12, ffn_dim=5184, cross_patch=192),
        max_seq_len=3 * 256 * 256,
        codec=ImageCodecConfig(side=256, scan="patch", scan_patch=8),
        batch_size=16,
        lr=2e-4,
    ),
    "paper-image640": _paper(
        global_model=LevelConfig(dim=768, num_layers=12, num_heads=12, ffn_dim=4864, patch_size=192),
        local_model=LevelConfig(dim=768, num_layers=8, num_heads=12, ffn_dim=5184, cross_patch=192),
        max_seq_len=3 * 640 * 640,
        codec=ImageCodecConfig(side=640, scan="patch", scan_patch=8),
        batch_size=32,
        lr=3e-4,
    ),
    "paper-audio": _paper(
        global_model=LevelConfig(dim=1024, num_layers=24, num_heads=8, ffn_dim=4672, patch_size=32),
        local_model=LevelConfig(dim=768, num_layers=12, num_heads=12, ffn_dim=5184, cross_patch=32),
        max_seq_len=524288,
        codec=AudioCodecConfig(sample_rate=16000, encoding="pcm16le"),
        batch_size=256,
        lr=2e-4,
    ),
    "bench-tiny": lambda name: _bench(name, patch_size=8, max_seq_len=8192),
    "bench-tiny-p64": lambda name: _bench(name, patch_size=64, max_seq_len=1 << 20),
}
