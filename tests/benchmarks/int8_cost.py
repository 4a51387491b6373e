"""What the int8 matrices of the native-int8 engine cost in bits per byte.

python -m tests.benchmarks.int8_cost MODEL FILE... [--bytes N]
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from core.checkpoint import load_model
from core.codecs import build_codec, read_media
from core.likelihood import score
from core.models import MegaByte
from core.native import quantize


@torch.no_grad()
def round_to_int8(model: MegaByte) -> None:
    """The engine's matrices. Unlike the engine it rounds the last level's embedding too, which is the output matrix."""
    embedding = model.levels[-1].embedder.embedding
    for module in (embedding, *(module for module in model.modules() if isinstance(module, nn.Linear))):
        whole_RC, scales_R = quantize(module.weight)
        module.weight.copy_(whole_RC * scales_R[:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bytes", type=int, default=100_000, help="at most so many of each file")
    options = parser.parse_args()
    model = load_model(options.model)
    codec = build_codec(model.codec_config)
    streams = [codec.encode(read_media(path))[0][: options.bytes] for path in options.files]
    before = [score(model, stream).bits_per_byte for stream in streams]
    round_to_int8(model)
    for path, stream, exact in zip(options.files, streams, before, strict=True):
        rounded = score(model, stream).bits_per_byte
        print(f"{path.name}: {len(stream)} bytes, {exact:.4f} bits per byte, int8 {rounded:.4f}, {rounded / exact - 1:+.4%}")


if __name__ == "__main__":
    main()
