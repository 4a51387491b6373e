"""Byte-level generation with MegaByte: load or build a model, score any bytes, complete any bytes."""

from core.checkpoint import load_model
from core.likelihood import Score, score
from core.models import ByteModel, build_model
from core.presets import preset, preset_names
from core.sample import SampleConfig, Sampler, generate

__all__ = [
    "ByteModel",
    "SampleConfig",
    "Sampler",
    "Score",
    "build_model",
    "generate",
    "load_model",
    "preset",
    "preset_names",
    "score",
]
