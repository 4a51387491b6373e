"""Byte-level generation with MegaByte: load or build a model, score any bytes, complete any bytes."""

from importlib import import_module
from typing import Any

# A name brings its module in when it is first used, so that config and codecs can be had without torch.
_HOMES = {
    "ByteModel": "core.models",
    "SampleConfig": "core.sample",
    "Sampler": "core.sample",
    "Score": "core.likelihood",
    "build_model": "core.models",
    "generate": "core.sample",
    "load_model": "core.checkpoint",
    "preset": "core.presets",
    "preset_names": "core.presets",
    "score": "core.likelihood",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
