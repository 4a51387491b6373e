"""How fast models generate, score and learn, beside the limits of the machine and beside a flat byte Transformer.

Cases take turns: one round of each that does not count, then several that do; medians are compared. The flat Transformer
is a MegaByte of one level, so it runs in the same engine, and has the same FLOPs per byte where FLOPs do not depend on
the length: in matrices. What attention adds is the architecture's own affair and part of what is measured.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from core.checkpoint import load_model
from core.config import LevelConfig, MegaByteConfig
from core.distributed import usable_device
from core.errors import UserError
from core.learner import MeanNll, learning_precision, trains_in_bf16
from core.likelihood import engine_name, score, scoring_engine
from core.limits import PeakMemory, matmul_rate, seconds_to_read, timed
from core.models import MegaByte
from core.presets import preset
from core.sample import Request, SampleConfig, Sampler, num_at_once, stream_batch

DEFAULT_LENGTH = {"generate": 2048, "score": 8192, "train": 1024}
_TRAIN_BYTES = 8192  # of a step, where no batch size is given
_QUEUED_PASSES = 10  # of training on a GPU
_TIMED_BYTES = 256  # generated per sample and round, at the end of the context

Work = Callable[[], tuple[int, float]]  # (bytes done, seconds)


@dataclass(frozen=True)
class Measured:
    """What one case took. Rates are medians over the rounds; sizes are bytes.

    Attributes:
        shape: width x layers of each level, coarsest first.
        flops_per_byte: of the forward pass at this length, attention included.
        bytes_read_per_byte: memory that generating a byte has to read; None for other work.
        spread: of the rounds' times.
        fraction_of_limit: the time that reading the memory, or multiplying at the measured ceiling, takes alone, over
            the time taken; median of the rounds' own fractions.
        limit: what limits, "bandwidth" or "matmul".
    """

    what: str
    preset: str
    shape: str
    num_parameters: int
    device: str
    engine: str
    dtype: str
    batch_size: int
    length: int
    flops_per_byte: float
    bytes_per_s: float
    spread: float
    bytes_read_per_byte: float | None
    fraction_of_limit: float
    limit: str
    peak_memory_bytes: int
    extra_peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """Work on one model.

    Attributes:
        run: does it once.
    """

    what: str
    name: str
    model: MegaByte
    engine: str
    batch_size: int
    length: int
    run: Work

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def bench(
    what: str,
    *,
    preset_name: str = "bench-tiny",
    model: str | Path | None = None,
    against_flat: bool = False,
    batch_size: int = 0,
    length: int = 0,
    device: torch.device | str = "cpu",
    engine: str = "",
    rounds: int = 5,
) -> dict[str, Any]:
    """Measures "generate", "score" or "train", alone or against the flat Transformer.

    Args:
        preset_name: a model with random weights, whose context is widened to `length` if need be.
        model: name or folder of a model with weights of its own, instead of a preset.
        batch_size: samples or sequences at a time; 0 for one, in training for 8192 bytes.
        length: bytes of context; 0 for the usual one, or the model's if that is shorter.
        engine: that makes the samples; empty for the fastest.
        rounds: that count.

    Returns:
        The facts of `Measured`, and with `against_flat` those of the other as "against" and the "ratio" of their speeds.

    Raises:
        UserError: if there is no such model, engine or device, or the model cannot hold the length.
    """
    device = usable_device(str(device))
    if model is None:
        length = length or DEFAULT_LENGTH[what]
        name, own = preset_name, random_model(widened(preset(preset_name).model, length), device)
    else:
        own = load_model(model, str(device))
        name, length = own.name, length or min(DEFAULT_LENGTH[what], own.config.max_seq_len)
    if not isinstance(own, MegaByte):
        raise UserError(f"{name} is no MegaByte, and bench measures those")
    if length > own.config.max_seq_len:
        raise UserError(f"--length {length} exceeds the model's context of {own.config.max_seq_len} bytes")
    models = {name: own}
    if against_flat:
        models["flat"] = random_model(flat_counterpart(own.config), device)
    with engine_of_samples(engine):
        cases = [_CASES[what](name, each, batch_size, length) for name, each in models.items()]
        result, *others = measure(cases, rounds)
    facts = result.to_dict()
    if others:
        facts |= {"against": others[0].to_dict(), "ratio": result.bytes_per_s / others[0].bytes_per_s}
    return facts


def measure(cases: Sequence[Case], rounds: int) -> list[Measured]:
    """Runs the cases in turns, and after each what limits it: other users of the machine then slow both down."""
    peaks = []
    for case in cases:
        memory = PeakMemory(case.device)
        memory.start()
        case.run()
        peaks.append(memory.read())
    runs: list[list[tuple[float, dict[str, float]]]] = [[] for _ in cases]
    for index, seconds in in_turns([case.run for case in cases], rounds):
        runs[index].append((seconds, limits_of(cases[index])))
    return [_measured(case, peak, done) for case, peak, done in zip(cases, peaks, runs, strict=True)]


def in_turns(works: Sequence[Work], rounds: int) -> Iterator[tuple[int, float]]:
    """(index of the work, seconds per byte) of every run, one round of all works after another."""
    for _ in range(rounds):
        for index, work in enumerate(works):
            num_bytes, seconds = work()
            yield index, seconds / num_bytes


def spread(seconds: Sequence[float]) -> float:
    """(slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / median(seconds)


def limits_of(case: Case) -> dict[str, float]:
    """Seconds per byte that multiplying at the ceiling takes, and for samples also what reading the memory takes."""
    limits = {}
    if case.what == "generate":  # first, beside the work: other users of the machine take bandwidth by the second
        made = case.batch_size * case.model.config.patch_size
        limits["bandwidth"] = seconds_to_read(bytes_read_per_patch(case), case.device) / made
    flops = case.model.flops_per_byte(case.length) * (3 if case.what == "train" else 1)  # backward: twice the forward pass
    # The native kernel multiplies in float32, whatever its weights are.
    dtype = torch.float32 if case.engine.startswith("native") else _DTYPES[dtype_of(case.engine)]
    return limits | {"matmul": flops / matmul_rate(case.device, dtype)}


def _measured(case: Case, peak: tuple[int, int], runs: list[tuple[float, dict[str, float]]]) -> Measured:
    seconds = [taken for taken, _ in runs]
    typical = median(seconds)
    fractions = {name: median(limits[name] / taken for taken, limits in runs) for name in runs[0][1]}
    limit = max(fractions, key=fractions.__getitem__)
    bytes_read = None
    if case.what == "generate":
        bytes_read = sum(num_bytes * times for num_bytes, times in bytes_read_per_patch(case))
        bytes_read /= case.batch_size * case.model.config.patch_size
    return Measured(
        what=case.what,
        preset=case.name,
        shape=shape_of(case.model.config),
        num_parameters=case.model.num_parameters(),
        device=device_name(case.device),
        engine=case.engine,
        dtype=dtype_of(case.engine),
        batch_size=case.batch_size,
        length=case.length,
        flops_per_byte=case.model.flops_per_byte(case.length),
        bytes_per_s=1 / typical,
        spread=spread(seconds),
        bytes_read_per_byte=bytes_read,
        fraction_of_limit=fractions[limit],
        limit=limit,
        peak_memory_bytes=peak[0],
        extra_peak_memory_bytes=peak[1],
    )


def generation(name: str, model: MegaByte, batch_size: int, length: int) -> Case:
    """The last bytes of a context of `length`; the reading of what is before them does not count."""
    batch_size = batch_size or 1
    num_bytes = min(_TIMED_BYTES, length // 2)
    prefix = random_stream(length - num_bytes)
    requests = [Request(prefix, num_bytes, SampleConfig(), number) for number in range(batch_size)]
    device, at_once = next(model.parameters()).device, num_at_once(model)

    def run() -> tuple[int, float]:
        chunks = stream_batch(model, requests)
        made = {False: 0, True: 0}  # bytes, by whether all samples that are made at once have begun and read the prefix
        begun: set[int] = set()

        def make(is_rest: bool) -> None:
            for index, chunk in chunks:
                begun.add(index)
                made[is_rest] += len(chunk.byte_values)
                if not is_rest and len(begun) == min(batch_size, at_once):
                    return

        before, after = (timed(partial(make, is_rest), device) for is_rest in (False, True))
        # Few bytes may all have been made before the last sample began.
        return (made[True], after) if made[True] else (made[False], before)

    return Case("generate", name, model, Sampler(model, b"", 1, SampleConfig()).engine, batch_size, length, run)


def scoring(name: str, model: MegaByte, batch_size: int, length: int) -> Case:
    """Streams of `length` bytes, each in one window."""
    batch_size = batch_size or 1
    streams = [random_stream(length, seed) for seed in range(batch_size)]
    device = next(model.parameters()).device
    return Case(
        "score",
        name,
        model,
        scoring_engine(model),
        batch_size,
        length,
        lambda: (batch_size * length, timed(lambda: score(model, streams, window=length), device)),
    )


def training(
    name: str,
    model: MegaByte,
    batch_size: int,
    length: int,
    *,
    precision: str = "bf16",
    compiled: bool = False,
    recompute: bool = False,
) -> Case:
    """Forward and backward of a batch; the optimizer's step does not count.

    On a GPU several passes are queued before the host waits, as in training.
    """
    batch_size = batch_size or max(1, _TRAIN_BYTES // length)
    device = next(model.parameters()).device
    byte_ids = torch.from_numpy(random_stream(batch_size * length).astype(np.int64)).view(batch_size, length).to(device)
    model.train()
    objective = MeanNll(model, precision, recompute)
    if compiled:
        objective = torch.compile(objective)

    num_passes = _QUEUED_PASSES if device.type == "cuda" else 1

    def passes() -> None:
        with learning_precision(device, precision):
            for _ in range(num_passes):
                model.zero_grad(set_to_none=True)
                objective(byte_ids).backward()

    num_bytes = num_passes * byte_ids.numel()
    engine = engine_name(device, trains_in_bf16(device, precision))
    return Case("train", name, model, engine, batch_size, length, lambda: (num_bytes, timed(passes, device)))


_CASES = {"generate": generation, "score": scoring, "train": training}


def bytes_read_per_patch(case: Case) -> list[tuple[float, int]]:
    """(bytes, times) of the memory that making one coarsest patch of every sample reads: weights once for all, keys and values.

    A level's matrices are read once for each of its elements; of keys and values what an average element attends to.
    """
    config = case.model.config
    weight_size = {"fp32": 4, "bf16": 2, "int8": 1}[dtype_of(case.engine)]
    # The native kernel keeps keys and values in float32.
    kept_size = 2 if weight_size == 2 and not case.engine.startswith("native") else 4
    parts = []
    for level, own in zip(case.model.levels, config.levels, strict=True):
        times = config.patch_size // level.span
        modules = (level.transformer, level.embedder.project, level.unembedder)
        matrices = sum(p.numel() for module in modules for p in module.parameters() if p.ndim == 2)
        slots = case.length / level.span if level.is_top else level.row_length / 2 + own.cross_patch
        parts.append((weight_size * matrices, times))
        parts.append((kept_size * 2 * own.num_layers * own.dim * slots * case.batch_size, times))
    output_matrix = case.model.levels[-1].embedder.embedding.weight
    return [*parts, (weight_size * output_matrix.numel(), config.patch_size)]


def flat_counterpart(config: MegaByteConfig) -> MegaByteConfig:
    """The flat byte Transformer with the same context and, within 2%, the same FLOPs per byte in matrices.

    Heads of the same width; of the fitting shapes the one nearest to 64 channels of width for each layer, as GPT-2's.
    """
    head_dim = config.levels[-1].head_dim
    wanted = _meta(config).flops_per_byte(1)
    fitting = []
    for num_heads in range(1, 129):
        for num_layers in range(1, 97):
            level = LevelConfig(dim=head_dim * num_heads, num_layers=num_layers, num_heads=num_heads)
            # As `flops_per_byte(1)` of a single level: its matrices, one key, the output matrix.
            flops = 2 * (num_layers * (12 * level.dim**2 + 2 * level.dim) + 256 * level.dim)
            if abs(flops / wanted - 1) <= 0.02:
                fitting.append((abs(np.log(level.dim / num_layers / 64)), level))
    if not fitting:
        raise UserError("no flat Transformer has the same FLOPs per byte within 2%; leave out --against flat")
    level = min(fitting, key=lambda pair: pair[0])[1]
    positions = "learned" if config.has_learned_positions else "rotary"
    return MegaByteConfig(levels=(level,), max_seq_len=config.max_seq_len, positions=positions)


def widened(config: MegaByteConfig, length: int) -> MegaByteConfig:
    """The same model with a context of at least `length` bytes."""
    return replace(config, max_seq_len=max(config.max_seq_len, -(-length // config.patch_size) * config.patch_size))


def random_model(config: MegaByteConfig, device: torch.device | str) -> MegaByte:
    """A model with random weights, rounded to bf16 as those of exported models are."""
    torch.manual_seed(0)
    model = MegaByte(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model.to(device)


def shape_of(config: MegaByteConfig) -> str:
    return " + ".join(f"{level.dim}x{level.num_layers}" for level in config.levels)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def random_stream(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def dtype_of(engine: str) -> str:
    """The weights' number format in an engine's name, such as bf16 in `cuda-bf16-64`."""
    return next(name for name in _DTYPES if name in engine)


@contextmanager
def engine_of_samples(name: str) -> Iterator[None]:
    """Samples are made by this engine inside the block; by the fastest one if the name is empty."""
    before = os.environ.get("MEGABYTE_ENGINE")
    if name:
        os.environ["MEGABYTE_ENGINE"] = name
    try:
        yield
    finally:
        os.environ.pop("MEGABYTE_ENGINE", None)
        if before is not None:
            os.environ["MEGABYTE_ENGINE"] = before


def _meta(config: MegaByteConfig) -> MegaByte:
    with torch.device("meta"):
        return MegaByte(config)


# By the name of the weights' format, what the matrix products of the ceiling are made of: int8 weights meet floats.
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.float32}
