"""Decoding speed on a GPU: MEGABYTE 1.3B + 218M at P = 8 and the flat 350M of the paper, random weights, bfloat16.

python -m tests.benchmarks.sample_gpu [--compiled] [--profile]
"""

import argparse
import json
import time

import numpy as np
import torch

from core.config import LevelConfig, MegaByteConfig
from core.law import SampleConfig, uniforms
from core.lockstep import Job, Lockstep
from core.models import MegaByte

NUM_BYTES = 8192
MEGABYTE = MegaByteConfig(
    levels=(
        LevelConfig(dim=2048, num_layers=24, num_heads=16, patch_size=8),
        LevelConfig(dim=1024, num_layers=15, num_heads=8, ffn_dim=5056),
    ),
    max_seq_len=NUM_BYTES,
)
FLAT = MegaByteConfig(levels=(LevelConfig(dim=1024, num_layers=24, num_heads=16, ffn_dim=5056),), max_seq_len=NUM_BYTES)


def build(config: MegaByteConfig) -> MegaByte:
    with torch.device("cuda"):
        return MegaByte(config).bfloat16().eval()


def jobs(num_rows: int, num_bytes: int) -> list[Job]:
    config = SampleConfig()
    return [Job(np.zeros(0, np.uint8), num_bytes, config, uniforms(0, number)) for number in range(num_rows)]


def measure(name: str, model: MegaByte, num_rows: int, compiled: bool, num_bytes: int = NUM_BYTES) -> None:
    started = time.perf_counter()
    batch = Lockstep(model, num_rows, NUM_BYTES, has_filters=False, compiled=compiled)
    torch.cuda.synchronize()
    ready = time.perf_counter()
    made = sum(len(chunk.byte_values) for _, chunk in batch.run(jobs(num_rows, num_bytes)))
    seconds = time.perf_counter() - ready
    result = {
        "what": "generate",
        "model": name,
        "device": torch.cuda.get_device_name(),
        "batch_size": num_rows,
        "compiled": compiled,
        "bytes_per_sample": num_bytes,
        "preparation_s": round(ready - started, 2),
        "seconds": round(seconds, 3),
        "bytes_per_s": round(made / seconds),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(result), flush=True)


def profile(model: MegaByte, num_rows: int, compiled: bool) -> None:
    """The kernels of 128 bytes after the first 4096."""
    batch = Lockstep(model, num_rows, NUM_BYTES, has_filters=False, compiled=compiled)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for start in range(4096, 4096 + 8 * batch.round_size, batch.round_size):
            batch._load([start] * num_rows, np.full((num_rows, batch.round_size), -1), [], batch.round_size)
            for phase in batch.phases(start, batch.round_size):
                batch.make_byte(phase)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="also with the last level compiled")
    parser.add_argument("--profile", action="store_true", help="also the kernels of some patches")
    options = parser.parse_args()
    ways = [False, True] if options.compiled else [False]
    model = build(MEGABYTE)
    print(f"{model.num_parameters_per_level()} parameters", flush=True)
    for compiled in ways:
        measure("megabyte 1.3B + 218M, P = 8", model, 1, compiled)
        measure("megabyte 1.3B + 218M, P = 8", model, 64, compiled)
        if options.profile:
            profile(model, 1, compiled)
    model = build(FLAT)
    # The first 2048 bytes only, the cheapest quarter: a whole sample at 16 rows takes long.
    measure("flat 350M", model, 1, False)
    measure("flat 350M", model, 16, False, num_bytes=NUM_BYTES // 4)


if __name__ == "__main__":
    main()
