"""The same work here and in MEGABYTE-pytorch 0.3.6 (lucidrains), in one process, in turns; prints the ratios.

pip install MEGABYTE-pytorch==0.3.6 beartype
python -m tests.benchmarks.peers [generate] [score] [train] [--rounds N] [--json]

Both have the shape of `bench-tiny`: P = 8, global 512x6, local 256x3, heads of 64 channels, learned positions. The peer
does 1.3 times the FLOPs per byte there: its one number of heads makes the local model's attention twice as wide, it adds
a start token to every row, and its patch embedding projects P times the local width.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core import bench
from core.allocator import keep_freed_memory
from core.bench import Work, engine_of_samples, flat_counterpart, random_model, random_stream, widened
from core.learner import learning_precision, trains_in_bf16
from core.likelihood import score, scoring_engine
from core.limits import timed
from core.presets import preset

CPU = torch.device("cpu")
PATCH = 8
CONTEXT = 2048  # of generation


@dataclass(frozen=True)
class Part:
    """Works to be done in turns, by name, and the names of those whose speeds are divided."""

    what: str
    works: dict[str, Work]
    ratios: list[tuple[str, str]]

    def measure(self, rounds: int) -> dict[str, Any]:
        """Medians of the rounds after one that does not count, with their spread."""
        for work in self.works.values():
            work()
        seconds: list[list[float]] = [[] for _ in self.works]
        for index, taken in bench.in_turns(list(self.works.values()), rounds):
            seconds[index].append(taken)
        rates = {name: 1 / median(taken) for name, taken in zip(self.works, seconds, strict=True)}
        return {
            "what": self.what,
            "bytes_per_s": rates,
            "spread": {name: bench.spread(taken) for name, taken in zip(self.works, seconds, strict=True)},
            "ratios": {f"{fast} / {slow}": rates[fast] / rates[slow] for fast, slow in self.ratios},
        }


def peer(num_bytes: int) -> nn.Module:
    """Their model with a context of `num_bytes`."""
    try:
        from MEGABYTE_pytorch import MEGABYTE
    except ImportError as error:
        sys.exit(f"{error}; this comparison needs: pip install MEGABYTE-pytorch==0.3.6 beartype")
    torch.manual_seed(0)
    model = MEGABYTE(
        num_tokens=256,
        dim=(512, 256),
        depth=(6, 3),
        max_seq_len=(num_bytes // PATCH, PATCH),
        dim_head=64,
        heads=8,
        pos_emb=True,
    )
    return model.eval()


def generate() -> Part:
    """One byte at a context of 2048: their loop runs the whole model for it, ours steps."""
    own, other = random_model(preset("bench-tiny").model, CPU), peer(CONTEXT)
    flat = random_model(flat_counterpart(own.config), CPU)
    byte_ids = torch.from_numpy(random_stream(CONTEXT - 1)).long()[None]

    def theirs() -> tuple[int, float]:
        with torch.inference_mode():
            return 1, timed(lambda: F.softmax(other(byte_ids)[:, -1], -1).multinomial(1), CPU)

    def ours(model: nn.Module, engine: str, batch_size: int) -> Work:
        with engine_of_samples(engine):
            case = bench.generation("", model, batch_size, CONTEXT)

        def run() -> tuple[int, float]:
            with engine_of_samples(engine):
                return case.run()

        return run

    works = {
        "peer": theirs,
        "kernel": ours(own, "", 1),
        "torch": ours(own, "torch", 1),
        "batch 16": ours(own, "torch-bf16", 16),
        "batch 16, flat": ours(flat, "torch-bf16", 16),
    }
    ratios = [("kernel", "peer"), ("torch", "peer"), ("batch 16", "batch 16, flat")]
    return Part(f"generate at context {CONTEXT}", works, ratios)


def scoring() -> Part:
    """Windows of 8192 bytes: ours as `score` does it, theirs in fp32."""
    length = 8192
    own, other = random_model(preset("bench-tiny").model, CPU), peer(length)
    flat = random_model(flat_counterpart(own.config), CPU)
    stream = random_stream(length)
    byte_ids = torch.from_numpy(stream).long()[None]

    def theirs() -> tuple[int, float]:
        with torch.inference_mode():
            return length, timed(lambda: F.cross_entropy(other(byte_ids)[0], byte_ids[0]), CPU)

    works = {
        "peer fp32": theirs,
        "ours": bench.scoring("", own, 1, length).run,
        "ours strided": lambda: (length, timed(lambda: score(own, stream, strided=True), CPU)),
        "flat": bench.scoring("", flat, 1, length).run,
    }
    ratios = [("ours", "peer fp32"), ("ours", "flat"), ("ours", "ours strided")]
    return Part(f"score {length} bytes, {scoring_engine(own)}", works, ratios)


def training() -> Part:
    """Forward and backward of 8192 bytes, as 8 x 1024 and as one; under bf16 autocast if the processor multiplies bf16."""
    config = widened(replace(preset("bench-tiny").model, dropout=0.0), 8192)
    own, flat = random_model(config, CPU).train(), random_model(flat_counterpart(config), CPU).train()
    works: dict[str, Work] = {}
    for length in (1024, 8192):
        works[f"peer, T = {length}"] = _peer_step(peer(length).train(), length)
        works[f"ours, T = {length}"] = bench.training("", own, 0, length).run
        works[f"flat, T = {length}"] = bench.training("", flat, 0, length).run
    ratios = [(f"ours, T = {length}", f"{name}, T = {length}") for length in (1024, 8192) for name in ("peer", "flat")]
    return Part(f"train, {'bf16 autocast' if trains_in_bf16(CPU, 'bf16') else 'fp32'}", works, ratios)


def _peer_step(model: nn.Module, length: int) -> Work:
    """As `core.bench.training`: forward and backward of 8192 bytes in sequences of `length`."""
    byte_ids = torch.from_numpy(random_stream(8192)).long().view(-1, length)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with learning_precision(CPU, "bf16"):
            loss = model(byte_ids, return_loss=True)
        loss.backward()

    return lambda: (byte_ids.numel(), timed(step, CPU))


PARTS = {"generate": generate, "score": scoring, "train": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a part")
    options = parser.parse_args()
    keep_freed_memory()  # as `python -m app` does
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        found = PARTS[name]().measure(options.rounds)
        if options.json:
            print(json.dumps(found), flush=True)
            continue
        print(found["what"])
        for case, rate in found["bytes_per_s"].items():
            print(f"  {case:<26} {rate:12.1f} bytes/s (spread {found['spread'][case]:.0%})")
        for ratio, value in found["ratios"].items():
            print(f"  {ratio:<26} {value:12.2f}", flush=True)


if __name__ == "__main__":
    main()
