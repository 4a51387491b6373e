"""A run small enough for a test: its configuration, its data and what it left behind."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from core.config import Config, LevelConfig, MegaByteConfig, TextCodecConfig, TrainConfig
from core.distributed import Ranks
from core.train import TrainResult, train

SEQ_LEN = 32

ALONE = Ranks(0, 1, torch.device("cpu"))

TINY_MODEL = MegaByteConfig(
    levels=(
        LevelConfig(dim=32, num_layers=1, num_heads=2, patch_size=4),
        LevelConfig(dim=16, num_layers=1, num_heads=2),
    ),
    max_seq_len=SEQ_LEN,
    dropout=0.1,
)


def tiny_config(model: MegaByteConfig = TINY_MODEL, **settings) -> Config:
    """Twelve steps with everything on that a restart could forget."""
    defaults = {
        "num_steps": 12,
        "batch_size": 4,
        "micro_batch_size": 2,
        "lr": 3e-3,
        "warmup_steps": 3,
        "ema_decay": 0.9,
        "precision": "fp32",
        "eval_every": 6,
        "eval_sequences": 5,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    return Config(name="tiny", model=model, codec=TextCodecConfig(), train=TrainConfig(**defaults | settings))


def tiny_data(folder: Path, num_bytes: int = 2000, num_values: int = 256) -> list[Path]:
    """A training and a validation file of uniform random bytes below `num_values`, made on the first call."""
    paths = [folder / "train.bin", folder / "valid.bin"]
    for seed, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(np.random.default_rng(seed).integers(0, num_values, num_bytes, dtype=np.uint8).tobytes())
    return paths


def run_tiny(folder: Path, out: str = "run", config: Config | None = None, num_values: int = 256, **arguments) -> TrainResult:
    train_path, valid_path = tiny_data(folder, num_values=num_values)
    return train(config or tiny_config(), [train_path], [valid_path], folder / out, **arguments)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "bytes_per_s")} for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file below `folder`."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
