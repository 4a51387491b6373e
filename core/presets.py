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
    return Config(
        name=name,
        model=MegaByteConfig(
            levels=(
                LevelConfig(dim=256, num_layers=4, num_heads=4, patch_size=4),
                LevelConfig(dim=256, num_layers=3, num_heads=4),
            ),
            max_seq_len=8192,
            positions="rotary",
            unembedder="full",
            real_previous=True,
        ),
        codec=TextCodecConfig(),
        train=_shipped_training(num_steps=5700, batch_size=32),
    )


def _image32(name: str) -> Config:
    return Config(
        name=name,
        model=MegaByteConfig(
            levels=(
                LevelConfig(dim=288, num_layers=3, num_heads=4, patch_size=48),
                LevelConfig(dim=256, num_layers=3, num_heads=4, cross_patch=48),
            ),
            max_seq_len=3 * 32 * 32,
            positions="both",
            real_previous=True,
        ),
        codec=ImageCodecConfig(side=32, scan="patch", scan_patch=4),
        train=_shipped_training(num_steps=2400, batch_size=96),
    )


def _audio(name: str) -> Config:
    return Config(
        name=name,
        model=MegaByteConfig(
            levels=(
                LevelConfig(dim=320, num_layers=4, num_heads=5, patch_size=8),
                LevelConfig(dim=192, num_layers=2, num_heads=3, cross_patch=8),
            ),
            max_seq_len=8192,
            positions="rotary",
            real_previous=True,
            dropout=0.1,
        ),
        codec=AudioCodecConfig(sample_rate=16000, encoding="mulaw8"),
        train=_shipped_training(num_steps=1200, batch_size=32),
    )


def _shipped_training(num_steps: int, batch_size: int) -> TrainConfig:
    return TrainConfig(
        num_steps=num_steps,
        batch_size=batch_size,
        lr=2e-3,
        warmup_steps=200,
        ema_decay=0.998,
        eval_every=200,
        eval_sequences=128,
        checkpoint_every=1000,
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


_PRESETS: dict[str, Callable[[str], Config]] = {
    "text": _text,
    "image32": _image32,
    "audio": _audio,
    "paper-text": _paper(
        global_model=LevelConfig(dim=2048, num_layers=14, num_heads=16, ffn_dim=9088, patch_size=8),
        local_model=LevelConfig(dim=1024, num_layers=18, num_heads=8, ffn_dim=5056),
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
}
