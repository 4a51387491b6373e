"""Completions: one prefix continued any number of times, or many requests at once, by the engine that suits the machine.

A sample is a function of the model, its prefix, its settings, (seed, sample number) and the engine alone: no neighbour
and no batch size can change a byte of it. The engine follows from model, machine and `MEGABYTE_ENGINE`:

    native-bf16   on a CPU with a compiler, for models that `core.native` takes; several samples read the weights once
    native-int8   the same with MEGABYTE_ENGINE=native-int8: faster, and its law is not quite the model's
    torch-fp32    on a CPU otherwise, or with MEGABYTE_ENGINE=torch (cuda-fp32 on a GPU)
    torch-bf16    on a CPU with MEGABYTE_ENGINE=torch-bf16: 16 samples in lockstep, whose rows fill up with the next ones;
                  its bytes also depend on whether the kernels of `core.kernels` and the library of `core.native` could be built
    cuda-bf16-fused     on a GPU for which Triton can build kernels: one sample, a captured graph per byte of few kernels
    cuda-bf16-64-fused  the same with MEGABYTE_ENGINE=cuda-bf16-64-fused: 64 samples in lockstep
    cuda-bf16 and cuda-bf16-64  the same by torch's own kernels: slower, and ready some seconds sooner
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from core import native
from core.config import ImageCodecConfig
from core.errors import UserError
from core.kernels import in_background
from core.kernels.gpu import can_fuse
from core.law import Chunk, SampleConfig, sampling_law, uniforms
from core.likelihood import as_stream, engine_name
from core.lockstep import Job, borrowed_lockstep
from core.models import ByteModel, MegaByte
from core.rows import Draw, NativeRow, Row, TorchRow, lay_out

__all__ = ["Chunk", "Request", "SampleConfig", "Sampler", "generate", "next_byte_law", "num_at_once", "prepare", "stream_batch"]

MAX_NUM_BYTES = 1 << 24  # of one sample, as many as the longest context
MAX_SAMPLES = 1 << 16  # of one prefix

# Bytes of the first chunk and of the longest, rounded up to whole patches: handing it over should cost little beside making it.
_CHUNK_BYTES = 16, 64
_CHUNK_S = 0.02  # chunks grow while they take less, and shrink: somebody waits for the bytes, or for the work to stop

# Rows for which a team of threads reads the weights once, at most, and bytes of their keys and values; and how many rows one
# thread takes as long to compute as to read the weights for.
_ROWS_OF_TEAM = 8
_BYTES_OF_TEAM = 400_000_000
_ROWS_OF_THREAD = 4

_NATIVE = (native.ENGINE_NAME, native.INT8_ENGINE_NAME)

# Lockstep engines, which work at one padded shape: the type of device they run on and the rows of that shape.
_LOCKSTEP = {"torch-bf16": ("cpu", 16), "cuda-bf16": ("cuda", 1), "cuda-bf16-64": ("cuda", 64)}
_LOCKSTEP |= {f"{name}-fused": shape for name, shape in _LOCKSTEP.items() if name.startswith("cuda")}
_CACHE_STEP = 2048  # bytes by which a lockstep's rows grow: kernels see whole tiles of slots however long the longest row is


@dataclass(frozen=True)
class Request:
    """One sample to make: `num_bytes` bytes after a prefix, with the random numbers of (config.seed, sample_number)."""

    prefix: np.ndarray | bytes
    num_bytes: int
    config: SampleConfig
    sample_number: int = 0


class Sampler:
    """Completes one prefix, any number of times; the prefix is read once.

    When the context is full, its last half is read again as a new prefix and sampling goes on; a prefix longer than
    the context starts the same way.

    Args:
        model: a model; a picture model refuses to go beyond its one picture.
        prefix: bytes to continue, any number of them.
        num_bytes: bytes to make.
        config: how they are chosen.

    Raises:
        UserError: if the prefix is no bytes, num_bytes is not in 1..MAX_NUM_BYTES, both together exceed a picture model's
            picture, or MEGABYTE_ENGINE names no engine of this machine.
    """

    def __init__(self, model: ByteModel, prefix: np.ndarray | bytes, num_bytes: int, config: SampleConfig) -> None:
        self.model = model
        self.prefix = as_stream(prefix)
        self.num_bytes = num_bytes
        self.config = config
        _wanted_engine(model)
        context = model.config.max_seq_len
        _require_count("num_bytes", num_bytes, MAX_NUM_BYTES)
        if isinstance(model.codec_config, ImageCodecConfig) and len(self.prefix) + num_bytes > context:
            raise UserError(
                f"{num_bytes} bytes after the first {len(self.prefix)} exceed the picture of {context} bytes; "
                f"ask for at most {max(context - len(self.prefix), 0)}"
            )
        patch_size = model.config.patch_size
        self._cache_len = min(context, -(-(len(self.prefix) + num_bytes) // patch_size) * patch_size)
        self.num_waiting = 0  # samples of a batch that have not begun
        self._after_prefix: Row | None = None
        self._reading = threading.Lock()  # samples made side by side share it

    @cached_property
    def engine(self) -> str:
        """What makes the bytes; looked for at first use, which may take the seconds of `prepare`."""
        return _choose_engine(self.model)

    def stream(self, sample_number: int = 0) -> Iterator[Chunk]:
        """The new bytes of one sample, in chunks that end with the model's patches. Closing it ends the work."""
        if self.engine in _LOCKSTEP:
            request = Request(self.prefix, self.num_bytes, self.config, sample_number)
            chunks = _in_lockstep(self.model, self.engine, [request])
        else:
            chunks = _in_groups(self.model, self.engine, deque([_Making(self, sample_number, 0)]), most_rows=1)
        with closing(chunks):
            yield from (chunk for _, chunk in chunks)

    def _start(self, new_row: Callable[[int], Row]) -> tuple[Row, int]:
        """A row of one sample's own that has read the prefix, and its position."""
        start = _context_of(self.prefix, self._cache_len, self.model)
        with self._reading:
            if self._after_prefix is None:
                row = new_row(self._cache_len)
                row.read(start)
                self._after_prefix = row
            self.num_waiting -= 1
            row = self._after_prefix
            if self.num_waiting != 0:
                row = row.copy()
            else:  # the last of a batch needs no copy of it
                self._after_prefix = None
        return row, len(start)


class _Making:
    """A sample that is being made; `index` is that of its request."""

    def __init__(self, sampler: Sampler, sample_number: int, index: int) -> None:
        self._sampler, self._sample_number = sampler, sample_number
        self.index = index
        self._row: Row | None = None
        self._done = len(sampler.prefix)

    @property
    def is_done(self) -> bool:
        return self._done == len(self._sampler.prefix) + self._sampler.num_bytes

    @property
    def has_to_read(self) -> bool:
        """Whether its row is still to be made, or is full."""
        return self._row is None or self._position == self._sampler._cache_len

    def read(self, new_row: Callable[[int], Row]) -> None:
        """Reads the prefix, or takes over what was read of it; or reads the last half of a full context again."""
        sampler = self._sampler
        if self._row is None:
            self._noise = uniforms(sampler.config.seed, self._sample_number)
            self._history = np.concatenate((sampler.prefix, np.zeros(sampler.num_bytes, dtype=np.uint8)))
            self._row, self._position = sampler._start(new_row)
        if self._position == sampler._cache_len:
            context = _context_of(self._history[: self._done], sampler._cache_len, sampler.model)
            self._row.read(context)
            self._position = len(context)

    def next_draw(self, size: int) -> Draw:
        """What is drawn to go on by about `size` bytes."""
        model, cache_len = self._sampler.model, self._sampler._cache_len
        count = min(_chunk_end(model, self._position, size), cache_len) - self._position
        return self._row, self._noise.random(min(count, len(self._history) - self._done)), self._sampler.config

    def take(self, chunk: Chunk) -> None:
        count = len(chunk.byte_values)
        self._history[self._done : self._done + count] = chunk.byte_values
        self._done, self._position = self._done + count, self._position + count


def stream_batch(model: ByteModel, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
    """Makes many samples at once: (index of the request, its next bytes), in the order in which they come.

    The samples of a request are those that `Sampler` makes, byte for byte. Lengths, prefixes and settings may differ;
    requests with the same prefix share its reading. Closing the iterator ends the work.

    Raises:
        UserError: as `Sampler`, before anything is made.
    """
    samplers: dict[tuple, Sampler] = {}
    makings: deque[_Making] = deque()
    for index, request in enumerate(requests):
        key = as_stream(request.prefix).tobytes(), request.num_bytes, request.config
        if key not in samplers:
            samplers[key] = Sampler(model, request.prefix, request.num_bytes, request.config)
        samplers[key].num_waiting += 1
        makings.append(_Making(samplers[key], request.sample_number, index))
    engine = _choose_engine(model)
    if engine in _LOCKSTEP:
        return _in_lockstep(model, engine, requests)
    return _in_groups(model, engine, makings, _rows_of_team(model, engine))


def num_at_once(model: ByteModel) -> int:
    """How many samples `stream_batch` works on at a time on this machine; the others wait."""
    engine = _choose_engine(model)
    if engine in _LOCKSTEP:
        return _LOCKSTEP[engine][1]
    return _rows_of_team(model, engine) * (native.num_cores() if engine in _NATIVE else 1)


def generate(
    model: ByteModel,
    prefix: np.ndarray | bytes | Sequence[np.ndarray | bytes],
    num_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
) -> list[np.ndarray]:
    """The new bytes, uint8 `(num_bytes,)`, of `num_samples` completions of a prefix, or of each of several prefixes.

    Raises:
        UserError: if a setting is out of range.
    """
    config = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    prefixes = prefix if isinstance(prefix, (list, tuple)) else [prefix]
    _require_count("num_samples", num_samples, MAX_SAMPLES)
    requests = [Request(each, num_bytes, config, number) for each in prefixes for number in range(num_samples)]
    made: list[list[np.ndarray]] = [[] for _ in requests]
    for index, chunk in stream_batch(model, requests):
        made[index].append(chunk.byte_values)
    return [np.concatenate(chunks) for chunks in made]


def next_byte_law(model: ByteModel, prefix: np.ndarray | bytes) -> np.ndarray:
    """The model's own probabilities, float64 `(256,)`, of the byte after a prefix of any length."""
    stream = as_stream(prefix)
    cache_len = min(model.config.max_seq_len, len(stream) + 1)
    row = TorchRow(model, cache_len)
    row.read(_context_of(stream, cache_len, model))
    return sampling_law(row.logits_V, SampleConfig())


def _require_count(name: str, number: int, most: int) -> None:
    if not (isinstance(number, int | np.integer) and 1 <= number <= most):
        raise UserError(f"{name}={number} must lie in 1..{most}")


def prepare(model: ByteModel) -> Iterator[None]:
    """Builds what makes the samples of a model, which takes seconds once on a machine, and yields now and then meanwhile."""
    if next(model.parameters()).device.type != "cpu":
        return
    wanted = _wanted_engine(model)
    if wanted in _LOCKSTEP:
        yield from in_background(native.build)
    elif wanted != "torch" and native.has_supported_form(model):
        yield from in_background(native.library)


def _wanted_engine(model: ByteModel) -> str:
    """The engine that the environment names, or an empty text.

    Raises:
        UserError: if the machine has none of that name.
    """
    device = next(model.parameters()).device
    wanted = os.environ.get("MEGABYTE_ENGINE", "")
    names = sorted(name for name, (kind, _) in _LOCKSTEP.items() if kind == device.type)
    names += _NATIVE if device.type == "cpu" else ()
    if wanted not in ("", "torch", *names):
        raise UserError(f"MEGABYTE_ENGINE={wanted} must be torch or {' or '.join(names)}, or unset for the fastest engine")
    return wanted


def _choose_engine(model: ByteModel) -> str:
    device, wanted = next(model.parameters()).device, _wanted_engine(model)
    if wanted in _LOCKSTEP and isinstance(model, MegaByte):
        return wanted
    if wanted == "" and device.type == "cuda" and isinstance(model, MegaByte):
        return "cuda-bf16-fused" if can_fuse(device) else "cuda-bf16"
    engine = wanted or native.ENGINE_NAME
    if engine in _NATIVE and native.compile_model(model, engine) is not None:
        return engine
    return engine_name(device, is_bf16=False)


def _maker_of_rows(model: ByteModel, engine: str) -> Callable[[int], Row]:
    """Makes rows for so many bytes, which can be drawn together: they step by the same weights whatever becomes of the model."""
    if engine in _NATIVE:
        return partial(NativeRow, model, native.compile_model(model, engine))
    lay_out(model)
    return partial(TorchRow, model)


def _rows_of_team(model: ByteModel, engine: str) -> int:
    """How many rows share one walk through the weights; fewer of long ones, whose keys and values take much memory."""
    if engine not in _NATIVE:  # torch steps at batch size 1 and shares its products itself
        return 1
    slots = ((level.config, level.config.cross_patch + level.row_length) for level in model.levels)
    num_bytes = sum(8 * config.num_layers * config.dim * num_slots for config, num_slots in slots)  # keys and values, float32
    return max(1, min(_ROWS_OF_TEAM, _BYTES_OF_TEAM // max(num_bytes, 1)))


def _teams(num_samples: int, most_rows: int) -> list[bool]:
    """The teams of threads that make samples together, one for each group of rows: whether a team has a second thread.

    Two threads read the weights once for both. With rows enough that computing takes longer than reading, a thread of its
    own for each group does not have to wait for another.
    """
    num_cores = native.num_cores()
    pairs = [core + 1 < num_cores for core in range(0, num_cores, 2)]
    if num_samples >= _ROWS_OF_THREAD * num_cores or num_samples > most_rows * len(pairs):
        return [False] * num_cores
    return pairs[:num_samples]


def _context_of(history: np.ndarray, cache_len: int, model: ByteModel) -> np.ndarray:
    """What a row of `cache_len` bytes reads of a history: all of it, or half a context of whole patches if that is too much."""
    if len(history) < cache_len:
        return history
    patch_size = model.config.patch_size
    return history[len(history) - cache_len // 2 // patch_size * patch_size :]


def _chunk_end(model: ByteModel, position: int, size: int) -> int:
    """Where the chunk that begins at a position ends, unless the sample does before: after as many patches from anywhere."""
    patch_size = model.config.patch_size
    return position - position % patch_size + -(-size // patch_size) * patch_size


def _next_size(size: int, seconds: float) -> int:
    """The bytes of the chunk after one that took so long. A byte costs more and more as a long context fills up."""
    first, longest = _CHUNK_BYTES
    if seconds < _CHUNK_S:
        return min(2 * size, longest)
    return max(size // 2, first) if seconds > 2 * _CHUNK_S else size


def _in_groups(model: ByteModel, engine: str, waiting: deque[_Making], most_rows: int) -> Iterator[tuple[int, Chunk]]:
    """The chunks of samples that are worked on in groups of up to `most_rows`, first come first served."""
    teams, new_row = _teams(len(waiting), most_rows) if engine in _NATIVE else [False], _maker_of_rows(model, engine)
    draws = [partial(NativeRow.draw, native.Team(has_helper)) if engine in _NATIVE else TorchRow.draw for has_helper in teams]
    groups = [_in_group(draw, new_row, waiting, most_rows, len(teams)) for draw in draws]
    if len(groups) == 1:  # a thread more would take time from those that make the bytes
        for chunks in groups[0]:
            yield from chunks
        return
    with ThreadPoolExecutor(max(len(groups), 1)) as pool:
        running = {pool.submit(next, group, None): group for group in groups}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group = running.pop(future)
                if (chunks := future.result()) is not None:
                    running[pool.submit(next, group, None)] = group
                    yield from chunks


def _in_group(
    draw: Callable[[list[Draw]], list[Chunk]],
    new_row: Callable[[int], Row],
    waiting: deque[_Making],
    most_rows: int,
    num_groups: int,
) -> Iterator[list[tuple[int, Chunk]]]:
    """The next chunk of each of up to `most_rows` samples; what waits takes the place of those that have ended."""
    group: list[_Making] = []
    size = _CHUNK_BYTES[0]
    while True:
        group += _first_of(waiting, min(most_rows - len(group), -(-len(waiting) // num_groups)))
        if not group:
            return
        ready = _ready_of(group, new_row)
        started = time.perf_counter()
        chunks = _drawn(draw, ready, size)
        size = _next_size(size, time.perf_counter() - started)
        yield chunks
        # Those that waited read first.
        group = [making for making in group if making not in ready] + [making for making in ready if not making.is_done]
        del ready  # with the rows of those that are done: the next ones need their memory


def _drawn(draw: Callable[[list[Draw]], list[Chunk]], ready: list[_Making], size: int) -> list[tuple[int, Chunk]]:
    chunks = draw([making.next_draw(size) for making in ready])
    for making, chunk in zip(ready, chunks, strict=True):
        making.take(chunk)
    return [(making.index, chunk) for making, chunk in zip(ready, chunks, strict=True)]


def _first_of(waiting: deque[_Making], most: int) -> list[_Making]:
    found = []
    with suppress(IndexError):  # another group was faster
        while len(found) < most:
            found.append(waiting.popleft())
    return found


def _ready_of(group: list[_Making], new_row: Callable[[int], Row]) -> list[_Making]:
    """Those that can go on, one of them at least. Whoever looks at them waits while others read, so not for all at once."""
    ready = [making for making in group if not making.has_to_read]
    started = time.perf_counter()
    for making in group:
        if making.has_to_read and (not ready or time.perf_counter() - started < _CHUNK_S):
            making.read(new_row)
            ready.append(making)
    return ready


def _in_lockstep(model: MegaByte, engine: str, requests: Sequence[Request]) -> Iterator[tuple[int, Chunk]]:
    """All requests by a lockstep engine: a row that has finished one takes the next."""
    num_rows = _LOCKSTEP[engine][1]
    jobs = [Job(as_stream(r.prefix), r.num_bytes, r.config, uniforms(r.config.seed, r.sample_number)) for r in requests]
    longest = max((len(job.prefix) + job.num_bytes for job in jobs), default=1)
    has_filters = any(job.config.top_k is not None or job.config.top_p < 1.0 for job in jobs)
    cache_len = min(model.config.max_seq_len, -(-longest // _CACHE_STEP) * _CACHE_STEP)
    borrowed = borrowed_lockstep(model, num_rows, cache_len, has_filters=has_filters, is_fused=engine.endswith("-fused"))
    with borrowed as batch, closing(batch.run(jobs)) as chunks:
        yield from chunks
