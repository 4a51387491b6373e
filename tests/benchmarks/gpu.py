"""Everything that is claimed of a GPU: one table, then one JSON line a result.

python -m tests.benchmarks.gpu [PART ...] [--ways eager fused] [--batch-sizes 1 64] [--profile]

Each part has a process of its own, so that one that fails says why and does not stop the others, and leaves no memory
behind. `--ways` and `--batch-sizes` are of the part generate.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from core.bench import measure, random_model, random_stream, scoring, training
from core.config import LevelConfig, MegaByteConfig
from core.law import SampleConfig, uniforms
from core.learner import MeanNll
from core.limits import PeakMemory, matmul_rate, seconds_to_read, timed
from core.lockstep import Job, Lockstep
from core.models import MegaByte
from core.presets import preset

CUDA = torch.device("cuda")
ROUNDS = 3
WAYS = ("eager", "compiled", "fused")
# The byte Transformer of 350M parameters of the paper's section 6.2.
FLAT = MegaByteConfig(levels=(LevelConfig(dim=1024, num_layers=24, num_heads=16, ffn_dim=5056),), max_seq_len=8192)

Facts = dict[str, Any]
Case = tuple[str, Callable[[], Facts]]  # what it is, and the work


def generate(options: argparse.Namespace) -> Iterator[Case]:
    """Whole contexts from nothing by MEGABYTE 1.3B + 218M, P = 8, and by the flat 350M, in bf16."""
    own = preset("paper-generation").model
    for way in options.ways:
        model = bf16_model(own)
        for batch_size in options.batch_sizes:
            what = f"paper-generation, {way}"
            yield what, partial(generation, what, model, batch_size, own.max_seq_len, way)
            if options.profile:
                yield f"{what}, profile", partial(profile, model, batch_size, way)
        del model
    model = bf16_model(FLAT)
    yield "flat 350M", partial(generation, "flat 350M", model, 1, FLAT.max_seq_len, "eager")
    # The first quarter only, the cheapest one: a whole sample at 16 rows takes long.
    yield "flat 350M", partial(generation, "flat 350M, 1st quarter", model, 16, FLAT.max_seq_len // 4, "eager")


def bf16_model(config: MegaByteConfig) -> MegaByte:
    free()
    with CUDA:
        return MegaByte(config).bfloat16().eval()


def generation(name: str, model: MegaByte, batch_size: int, num_bytes: int, way: str) -> Facts:
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    batch = lockstep(model, batch_size, way)
    torch.cuda.synchronize()
    ready = time.perf_counter()
    jobs = [Job(np.zeros(0, np.uint8), num_bytes, SampleConfig(), uniforms(0, number)) for number in range(batch_size)]
    made = sum(len(chunk.byte_values) for _, chunk in batch.run(jobs))
    seconds = time.perf_counter() - ready
    return {
        "what": "generate",
        "preset": name,
        "device": torch.cuda.get_device_name(),
        "batch_size": batch_size,
        "length": num_bytes,
        "seconds": seconds,
        "bytes_per_s": made / seconds,
        "preparation_s": ready - started,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


def lockstep(model: MegaByte, num_rows: int, way: str) -> Lockstep:
    context = model.config.max_seq_len
    return Lockstep(model, num_rows, context, has_filters=False, compiled=way == "compiled", is_fused=way == "fused")


def profile(model: MegaByte, batch_size: int, way: str) -> Facts:
    """Prints the kernels of some rounds in the middle of the context."""
    middle = model.config.max_seq_len // 2
    batch = lockstep(model, batch_size, way)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found, torch.inference_mode():
        started = time.perf_counter()
        for start in range(middle, middle + 8 * batch.round_size, batch.round_size):
            batch._load([start] * batch_size, np.full((batch_size, batch.round_size), -1), [], batch.round_size)
            for phase in batch.phases(start, batch.round_size):
                batch.make_byte(phase)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70), flush=True)
    made = 8 * batch.round_size * batch_size
    return {"what": "profile", "batch_size": batch_size, "seconds": seconds, "bytes_per_s": made / seconds}


def train(options: argparse.Namespace) -> Iterator[Case]:
    """Forward and backward of the text preset and of the paper's text model, beside the measured matmul ceiling."""
    for name, batch_size, way in (("text", 32, "eager"), ("text", 32, "compiled"), ("paper-text", 4, "eager")):
        yield f"{name}, {way}", partial(training_pass, name, batch_size, way)
        if options.profile:
            yield f"{name}, {way}, profile", partial(training_profile, name, batch_size, way)


def training_pass(name: str, batch_size: int, way: str) -> Facts:
    free()
    model = random_model(without_dropout(preset(name).model), CUDA)
    [result] = measure([training(f"{name}, {way}", model, batch_size, 8192, compiled=way == "compiled")], ROUNDS)
    return result.to_dict()


def training_profile(name: str, batch_size: int, way: str) -> Facts:
    """Prints the kernels of ten passes."""
    free()
    model = random_model(without_dropout(preset(name).model), CUDA)
    case = training(f"{name}, {way}", model, batch_size, 8192, compiled=way == "compiled")
    case.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        num_bytes, seconds = case.run()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90), flush=True)
    return {"what": "profile", "batch_size": batch_size, "bytes_per_s": num_bytes / seconds}


def image640(_: argparse.Namespace) -> Iterator[Case]:
    """One training step, optimizer included, on one picture of 1,228,800 bytes, with activation checkpointing."""
    yield "paper-image640", picture_step


def picture_step() -> Facts:
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
    return {
        "what": "train step",
        "preset": "paper-image640",
        "device": torch.cuda.get_device_name(),
        "batch_size": 1,
        "length": config.max_seq_len,
        "seconds": min(seconds),
        "bytes_per_s": config.max_seq_len / min(seconds),
        "peak_memory_bytes": memory.read()[0],
        "losses_nats": [loss.item() for loss in losses],
    }


def score(_: argparse.Namespace) -> Iterator[Case]:
    """Windows of 8192 bytes in batches, and a million bytes in one context."""
    for name, batch_size, length in (("bench-tiny", 64, 8192), ("paper-text", 16, 8192), ("bench-tiny-p64", 1, 1 << 20)):
        yield name, partial(scoring_pass, name, batch_size, length)


def scoring_pass(name: str, batch_size: int, length: int) -> Facts:
    free()
    model = random_model(without_dropout(preset(name).model), CUDA)
    [result] = measure([scoring(name, model, batch_size, length)], ROUNDS)
    return result.to_dict()


def without_dropout(config: MegaByteConfig) -> MegaByteConfig:
    return replace(config, dropout=0.0)


def free() -> None:
    torch._dynamo.reset()
    torch.cuda.empty_cache()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "generate": generate,
    "train": train,
    "image640": image640,
    "score": score,
}


def run_part(options: argparse.Namespace) -> int:
    """The cases of one part; 1 if one of them failed."""
    failed, [name] = 0, options.parts
    for what, work in PARTS[name](options):
        started = time.perf_counter()
        try:
            facts = work()
        except Exception:  # whatever it is, the other cases still count
            failed = 1
            print(f"{name}, {what} failed after {time.perf_counter() - started:.0f} s:\n{traceback.format_exc()}", flush=True)
        else:
            print(json.dumps(facts), flush=True)
    return failed


def line(facts: Facts) -> str:
    work = f"{facts['what']:<10} {facts.get('preset', ''):<28} {facts['batch_size']:>3} x {facts.get('length', 0):<8}"
    took = f"{facts['seconds']:.2f} s" if "seconds" in facts else ""
    limit = f"{facts['fraction_of_limit']:6.1%} of {facts['limit']}" if "limit" in facts else ""
    ready = f"ready in {facts['preparation_s']:.0f} s" if "preparation_s" in facts else ""
    memory = f"{facts.get('peak_memory_bytes', 0) / 1e9:.1f} GB"
    return f"{work} {facts['bytes_per_s']:>12,.0f} bytes/s {took:>9} {memory:>8} {limit or ready}".rstrip()


def main() -> int:
    """Runs the parts named, or all; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="how samples are made (all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 64], help="samples at a time (1 64)")
    parser.add_argument("--profile", action="store_true", help="also the kernels of some patches and training passes")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # how a part is run
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device on this machine")
    if options.in_process:
        return run_part(options)
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Every part in a process, its results as lines of a table; 1 if one failed."""
    ceiling = matmul_rate(CUDA, torch.bfloat16)
    bandwidth = (1 << 32) / seconds_to_read([(1 << 32, 1)], CUDA)
    free()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {ceiling / 1e12:.0f} TFLOP/s bf16, "
        f"{bandwidth / 1e12:.2f} TB/s, both measured",
        flush=True,
    )
    settings = ["--ways", *options.ways, "--batch-sizes", *map(str, options.batch_sizes)]
    settings += ["--profile"] if options.profile else []
    results, failed = [], 0
    for name in options.parts or PARTS:
        started = time.perf_counter()
        program = [sys.executable, "-m", "tests.benchmarks.gpu", "--in-process", name, *settings]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for said in process.stdout:
                if said.startswith("{"):
                    results.append(json.loads(said))
                    print(line(results[-1]), flush=True)
                else:
                    print(said, end="", flush=True)
        failed |= process.returncode != 0
        print(f"[{name}: {time.perf_counter() - started:.0f} s{', failed' if process.returncode else ''}]", flush=True)
    for facts in results:
        print(json.dumps(facts))
    return failed


if __name__ == "__main__":
    sys.exit(main())
