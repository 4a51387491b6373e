"""Everything that is claimed of a GPU, measured in one go of under four minutes: a table, then one JSON line a result.

python -m tests.benchmarks.gpu [PART ...]     parts: generate, train, image640, score (all)

A part that fails says why and does not stop the others.
"""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from core.bench import measure, random_model, random_stream, scoring, training
from core.config import MegaByteConfig
from core.learner import MeanNll
from core.limits import PeakMemory, matmul_rate, seconds_to_read, timed
from core.presets import preset

CUDA = torch.device("cuda")
ROUNDS = 3


def generate() -> Iterator[dict[str, Any]]:
    """Decoding has a process of its own: its graphs hold memory as long as they live."""
    program = [sys.executable, "-m", "tests.benchmarks.sample_gpu"]
    found = subprocess.run(program, capture_output=True, text=True, timeout=150)
    for line in found.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    if found.returncode:
        raise RuntimeError(found.stderr[-2000:])


def train() -> Iterator[dict[str, Any]]:
    """Forward and backward of the text preset and of the paper's text model; MFU is against the measured matmul ceiling."""
    torch.set_float32_matmul_precision("high")
    for name, batch_size, compiled in (("text", 32, False), ("text", 32, True), ("paper-text", 4, False)):
        model = random_model(without_dropout(preset(name).model), CUDA)
        case = training(name, model, batch_size, 8192, compiled=compiled)
        [result] = measure([case], ROUNDS)
        yield result.to_dict() | {"compiled": compiled}
        del model, case
        free()


def image640() -> Iterator[dict[str, Any]]:
    """One training step, optimizer included, on one picture of 1,228,800 bytes, with activation checkpointing."""
    config = preset("paper-image640").model
    memory = PeakMemory(CUDA)
    memory.start()
    model = random_model(config, CUDA).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    objective = MeanNll(model, "bf16", recompute=True)
    byte_ids = torch.from_numpy(random_stream(config.max_seq_len)).to(CUDA).long()[None]
    losses = []

    def step() -> None:
        loss = objective(byte_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    seconds = [timed(step, CUDA) for _ in range(2)]
    if not all(torch.isfinite(loss) for loss in losses):
        raise RuntimeError(f"the loss is {losses}")
    yield {
        "what": "train step",
        "preset": "paper-image640",
        "device": torch.cuda.get_device_name(),
        "length": config.max_seq_len,
        "seconds": min(seconds),
        "bytes_per_s": config.max_seq_len / min(seconds),
        "peak_memory_bytes": memory.read()[0],
        "losses_nats": [loss.item() for loss in losses],
    }


def score() -> Iterator[dict[str, Any]]:
    """Windows of 8192 bytes in batches, and a million bytes in one context."""
    for name, batch_size, length in (("bench-tiny", 64, 8192), ("paper-text", 16, 8192), ("bench-tiny-p64", 1, 1 << 20)):
        model = random_model(without_dropout(preset(name).model), CUDA)
        [result] = measure([scoring(name, model, batch_size, length)], ROUNDS)
        yield result.to_dict()
        del model
        free()


def without_dropout(config: MegaByteConfig) -> MegaByteConfig:
    return replace(config, dropout=0.0)


def free() -> None:
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def line(facts: dict[str, Any]) -> str:
    name = facts.get("preset") or facts.get("model")
    limit = f"{facts['fraction_of_limit']:6.1%} of {facts['limit']}" if "limit" in facts else ""
    took = f"{facts['seconds']:.2f} s" if "seconds" in facts else ""
    memory = f"{facts['peak_memory_bytes'] / 1e9:.1f} GB"
    compiled = "compiled" if facts.get("compiled") else ""
    work = f"{facts['what']:<10} {name:<28} B={facts.get('batch_size', 1):<4} {facts['bytes_per_s']:>12,.0f} bytes/s"
    return f"{work} {took:>9} {limit:<20} {memory:>8} {compiled}"


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "image640": image640,
    "train": train,
    "score": score,
    "generate": generate,
}


def main(names: list[str]) -> int:
    """Runs the parts named, or all; 1 if one failed."""
    if not torch.cuda.is_available():
        print("there is no CUDA device on this machine", file=sys.stderr)
        return 1
    ceiling = matmul_rate(CUDA, torch.bfloat16)
    bandwidth = (1 << 32) / seconds_to_read([(1 << 32, 1)], CUDA)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {ceiling / 1e12:.0f} TFLOP/s bf16, "
        f"{bandwidth / 1e12:.2f} TB/s, both measured",
        flush=True,
    )
    results, failed = [], 0
    for name in names or PARTS:
        started = time.perf_counter()
        try:
            for facts in PARTS[name]():
                results.append(facts)
                print(line(facts), flush=True)
        except Exception:  # whatever it is, the other parts still count
            failed = 1
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        free()
        print(f"[{name}: {time.perf_counter() - started:.0f} s]", flush=True)
    for facts in results:
        print(json.dumps(facts))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
