"""Many samples of a MegaByte that make their patches in lockstep: fixed shapes, positions on the device, no waiting.

A byte is one run of a *phase*: it wakes every level whose next element begins there, draws, and appends. Where the rows
stand, what is drawn from, and what was drawn are tensors, so a phase is the same sequence of kernels every time. On a GPU
it is captured once as a CUDA graph, and the host only queues one graph per byte. It reads the bytes after every *round* of
one or more patches. On a CPU that multiplies bf16 a byte is one call of our kernel.

Rows share the place inside a patch and nothing else. A prompt's whole patches are read at once, and once for all jobs that
begin with them, into a cache from which the rows copy; what remains of it is forced upon the first bytes that its row makes.
Between two rounds a row that is done takes the next job.

The seed promise: matrix products always have the same shape, `num_rows`, so a row's numbers do not depend on its
neighbours. The number of slots that attention reads follows the longest row; the slots beyond a row's own end get weight
zero, and adding zeros at the end of a sum changes no bit of it.
"""

# Shapes: B rows, R bytes of a round, S slots, V = 256.

import copy
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core import native
from core.cache import Cache, LevelCache
from core.config import NUM_BYTE_VALUES
from core.law import Chunk, SampleConfig
from core.likelihood import nats_to_bits
from core.models import MegaByte
from core.models.layers import Slots
from core.models.megabyte import Level
from core.models.packed import PackedMegaByte, PackedRows, fingerprint, fused, packed

_FEWEST_SLOTS = 64  # of the first level that are read; doubled as the rows grow
# The first and the longest, rounded up to whole patches: what the host does between two rounds should cost little beside them.
_ROUND_BYTES = {"cpu": (16, 16), "cuda": (64, 256)}
_ROUND_S = 0.2  # rounds grow while they take less: somebody waits for the bytes, or for the work to stop

# Those that sum the slots in their order; others split them by their number, and then neighbours would change a row.
_ATTENTION = {
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "cuda": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}

_bf16_models: WeakKeyDictionary[MegaByte, tuple[tuple, MegaByte]] = WeakKeyDictionary()
_idle: WeakKeyDictionary[MegaByte, "Lockstep"] = WeakKeyDictionary()  # by the model that was asked for, not its copy


@dataclass
class Job:
    """One sample: its prefix, uint8, how many bytes to make, how they are drawn and the stream of uniforms."""

    prefix: np.ndarray
    num_bytes: int
    config: SampleConfig
    noise: np.random.Generator
    made: list[np.ndarray] = field(default_factory=list)
    num_made: int = 0

    def add(self, byte_values: np.ndarray) -> None:
        self.made.append(byte_values)
        self.num_made += len(byte_values)

    def history(self) -> np.ndarray:
        return np.concatenate([self.prefix, *self.made])


class Lockstep:
    """B rows of a model and their cache, for one run after another; `borrowed_lockstep` keeps it between them.

    Args:
        model: in the precision in which it is to run.
        num_rows: B, the padded shape.
        cache_len: bytes that a row holds.
        has_filters: whether any job uses top-k or top-p, which take a sort per byte where torch draws.
        compiled: fuse the small kernels of the last level with `torch.compile`, which takes a minute at first.
        is_fused: step on a GPU in few kernels and, without filters, draw in one, which take seconds to compile once.

    Raises:
        UserError: if steps are to be fused and this machine cannot build the kernels.
    """

    def __init__(
        self,
        model: MegaByte,
        num_rows: int,
        cache_len: int,
        *,
        has_filters: bool = True,
        compiled: bool = False,
        is_fused: bool = False,
    ) -> None:
        self.plain_model, self.is_fused = model, is_fused
        self.model = fused(model) if is_fused else model
        self.num_rows = num_rows
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(num_rows, cache_len)
        # The newest prefix that was read for a new job: its whole patches, and one row that has read them.
        self._prefix: bytes | None = None
        self._after_prefix = model.new_cache(1, cache_len)
        self.patch_size = self.cache.patch_size
        self.positions_B = self._zeros(torch.int64)
        self._rows_B = torch.arange(num_rows, device=self.device)
        self.has_filters = has_filters
        self.draws_natively = self.device.type == "cpu" and native.can_draw()  # on a GPU the host must not look at the logits
        self._finest = torch.compile(self._finish_byte, dynamic=False) if compiled else self._finish_byte
        self.first_round, self.round_size = (self._whole(num_bytes) for num_bytes in _ROUND_BYTES[self.device.type])
        # What a round is made from, written by the host before it: numbers, given bytes (-1: none), and each row's law.
        self._uniforms_BR = self._zeros(torch.float64, self.round_size)
        self._given_BR = self._zeros(torch.int64, self.round_size)
        # What comes out of it, and where the rows stood when it began.
        self._bytes_BR = self._zeros(torch.int64, self.round_size)
        self._bits_BR = self._zeros(torch.float32, self.round_size)
        self._started_B = self._zeros(torch.int64)
        self.logits_BV = self._zeros(torch.float32, NUM_BYTE_VALUES)  # of the newest byte; parity tests look at them
        self._temperature_B1 = self._zeros(torch.float64, 1)
        self._top_k_B1 = self._zeros(torch.int64, 1)
        self._top_p_B1 = self._zeros(torch.float64, 1)
        self._packed_rows = None
        if isinstance(model, PackedMegaByte):
            buffers = {"positions": self.positions_B, "started": self._started_B, "uniforms": self._uniforms_BR}
            buffers |= {"given": self._given_BR, "bytes": self._bytes_BR, "bits": self._bits_BR, "logits": self.logits_BV}
            buffers |= {"temperatures": self._temperature_B1, "top_ks": self._top_k_B1, "top_ps": self._top_p_B1}
            self._packed_rows = PackedRows(model, self.cache, buffers)
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            with self._on_device():
                self._capture_all()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Chunk]]:
        """(index of the job, its next bytes), round by round; jobs with one prefix begin one after another."""
        waiting = deque(_by_prefix(jobs))
        rows: list[tuple[int, Job] | None] = [None] * self.num_rows
        positions = [0] * self.num_rows  # an idle row makes its first bytes over and over
        most = self.first_round
        while waiting or any(rows):
            started = time.perf_counter()
            # Left before the chunks are: what the caller does between rounds is its own.
            with torch.inference_mode(), self._on_device():
                given_BR = np.full((self.num_rows, self.round_size), -1, dtype=np.int64)
                for row in range(self.num_rows):
                    if rows[row] is None:
                        positions[row] = 0
                        if waiting:
                            rows[row], most = waiting.popleft(), self.first_round
                            positions[row] = self._begin(row, rows[row][1], given_BR)
                    elif positions[row] == self.cache.max_seq_len:
                        positions[row] = self._read(self.cache.rows(slice(row, row + 1)), self._context(rows[row][1])[0])
                num_given = (given_BR >= 0).sum(1).tolist()
                working = [(row, *found, num_given[row]) for row, found in enumerate(rows) if found is not None]
                needed = [first + job.num_bytes - job.num_made for _, _, job, first in working]
                # Up to where a row is free for the next job, or the last one is done.
                num_needed = self._whole(max(1, (min if waiting else max)(needed)))
                num_bytes = min(most, self.cache.max_seq_len - max(positions), num_needed)
                self._load(positions, given_BR, working, num_bytes)
                for phase in self.phases(max(positions), num_bytes):
                    self.make_byte(phase)
                bytes_BR, bits_BR = self._bytes_BR.cpu().numpy().astype(np.uint8), self._bits_BR.cpu().numpy()
                chunks = []
                for row, index, job, first in working:
                    positions[row] += num_bytes
                    new = slice(first, min(num_bytes, first + job.num_bytes - job.num_made))
                    chunk = Chunk(bytes_BR[row, new].copy(), bits_BR[row, new].copy())
                    job.add(chunk.byte_values)
                    if job.num_made == job.num_bytes:
                        rows[row] = None
                    chunks.append((index, chunk))
                if time.perf_counter() - started < _ROUND_S:
                    most = min(2 * most, self.round_size)
            yield from chunks

    def phases(self, longest: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """For each byte of a round before which no row has more than `longest`: the first level that wakes, its slots."""
        for offset in range(num_bytes):
            first = next(index for index, level in enumerate(self.model.levels) if offset % level.span == 0)
            yield first, self._num_slots(longest + num_bytes - 1) if first == 0 else 0

    def make_byte(self, phase: tuple[int, int]) -> None:
        """The next byte of every row, by its graph or in one call of our kernel if there is one."""
        if phase in self._graphs:
            self._graphs[phase].replay()
        elif self._packed_rows is not None:
            self._packed_rows.make_byte(phase[0])
        else:
            self._run(*phase)

    # --- What the host does between rounds ---

    def _begin(self, row: int, job: Job, given_BR: np.ndarray) -> int:
        """Has a row read the whole patches of a job's prefix and leaves the rest to be forced; the row's position."""
        whole, rest = self._context(job)
        if self._prefix != whole.tobytes():
            self._prefix = None  # until it is read: an error or a closed run leaves it half read
            self._read(self._after_prefix, whole)
            self._prefix = whole.tobytes()
        self.cache.rows(slice(row, row + 1)).copy_from(self._after_prefix)
        given_BR[row, : len(rest)] = rest
        return len(whole)

    def _read(self, cache: Cache, whole: np.ndarray) -> int:
        """Starts a cache of one row again from whole patches; their length."""
        self.model.read_patches(torch.from_numpy(whole.astype(np.int64))[None].to(self.device), cache)
        return len(whole)

    def _context(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """What a row reads of a job's history, its half if it is too long: the whole patches, and the bytes after them."""
        history = job.history()
        if len(history) >= self.cache.max_seq_len:
            half = self.cache.max_seq_len // 2 // self.patch_size * self.patch_size
            history = history[len(history) - half :]
        num_whole = len(history) - len(history) % self.patch_size
        return history[:num_whole], history[num_whole:]

    def _load(self, positions: list[int], given_BR: np.ndarray, working: list[tuple[int, int, Job, int]], num_bytes: int) -> None:
        """Writes what a round is made from. Of a row at work: its number, its job's index, the job, how many bytes are given."""
        uniforms_BR = np.zeros((self.num_rows, self.round_size))
        law_B3 = np.tile([1.0, NUM_BYTE_VALUES, 1.0], (self.num_rows, 1))
        for row, _, job, first in working:
            end = min(num_bytes, first + job.num_bytes - job.num_made)
            uniforms_BR[row, first:end] = job.noise.random(end - first)
            law_B3[row] = job.config.temperature, job.config.top_k or NUM_BYTE_VALUES, job.config.top_p
        self.positions_B.copy_(torch.tensor(positions))
        self._started_B.copy_(self.positions_B)
        self._uniforms_BR.copy_(torch.from_numpy(uniforms_BR))
        self._given_BR.copy_(torch.from_numpy(given_BR))
        for target, column in zip((self._temperature_B1, self._top_k_B1, self._top_p_B1), law_B3.T, strict=True):
            target.copy_(torch.from_numpy(column.copy())[:, None])

    def _num_slots(self, longest: int) -> int:
        """Slots of the first level that are read: powers of two, so that few graphs are needed."""
        power = 1 << (longest // self.patch_size).bit_length()
        return min(max(_FEWEST_SLOTS, power), self.cache.levels[0].keys.shape[3])

    def _capture_all(self) -> None:
        """Captures every phase that can come up; the buffers end as they began."""
        lengths = range(0, self.cache.max_seq_len, self.patch_size)
        phases = sorted({phase for longest in lengths for phase in self.phases(longest, self.patch_size)})
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            self._given_BR.fill_(-1)
            self._temperature_B1.fill_(1.0)
            for phase in phases:
                self.positions_B.zero_()
                # Libraries choose their kernels and compilers compile before anything is recorded.
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self._run(*phase)
                torch.cuda.current_stream().wait_stream(stream)
                self._graphs[phase] = torch.cuda.CUDAGraph()
                # On a stream of this GPU: torch's own one for captures stays on the GPU of the process's first capture.
                # Other models may be at work in other threads.
                with torch.cuda.graph(self._graphs[phase], pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._run(*phase)
            for tensor in (tensor for level_cache in self.cache.levels for tensor in level_cache.tensors()):
                tensor.zero_()

    # --- What a graph holds: no value of a tensor is looked at by the host ---

    def _run(self, first: int, num_slots: int) -> None:
        """One byte of every row, at a place where the levels from `first` on wake."""
        *coarse, finest = range(len(self.model.levels))
        with sdpa_kernel(_ATTENTION[self.device.type]):
            for index in coarse[first:]:
                self._begin_row(index, first)
                self.cache.levels[index + 1].from_parent_BLD.copy_(self._wake(index, num_slots))
            self._begin_row(finest, first)
            self._finest(num_slots)

    def _begin_row(self, index: int, first: int) -> None:
        if index > first:
            self.model.levels[index].transformer.begin_row(self.cache.levels[index])

    def _finish_byte(self, num_slots: int) -> None:
        """Wakes the last level, draws a byte of every row and appends it."""
        if self.is_fused and not self.has_filters:
            self._finish_fused(num_slots)
            return
        logits_BV = self.model.to_logits(self._wake(len(self.model.levels) - 1, num_slots)[:, 0])
        self.logits_BV.copy_(logits_BV)
        place_1 = (self.positions_B - self._started_B)[:1]
        uniforms_B1, given_B1 = self._uniforms_BR.index_select(1, place_1), self._given_BR.index_select(1, place_1)
        chosen_B1, bits_B1 = self._choose(logits_BV, uniforms_B1, given_B1)
        self._bytes_BR.index_copy_(1, place_1, chosen_B1)
        self._bits_BR.index_copy_(1, place_1, bits_B1)
        self.cache.patch_bytes_BP.index_copy_(1, self.positions_B[:1] % self.patch_size, chosen_B1)
        self.positions_B.add_(1)

    def _finish_fused(self, num_slots: int) -> None:
        level, level_cache = self.model.levels[-1], self.cache.levels[-1]
        transformer, embedder = level.transformer, level.embedder
        if embedder.convs or embedder.positions is not None or transformer.memory:
            x_BD, slots = self._entered(len(self.model.levels) - 1, num_slots)
        else:
            x_BD, slots_B = transformer.byte_kernels.begin(
                self.positions_B,
                self.cache.patch_bytes_BP,
                embedder.embedding.weight,
                level.pad,
                level.positions,
                level_cache.from_parent_BLD,
                level.row_length,
                shows_pad_once=level.is_top or level.real_previous,
            )
            slots = Slots(slots_B, (self._rows_B, slice(None), slots_B), slice(0, num_slots))
        transformer.byte_kernels.draw(
            transformer.logits(x_BD, level_cache, slots, embedder.embedding),
            self.model.config.logit_softcap,
            self.logits_BV,
            self.positions_B,
            self.cache.patch_bytes_BP,
            self._started_B,
            self._uniforms_BR,
            self._given_BR,
            self._temperature_B1,
            self._bytes_BR,
            self._bits_BR,
        )

    def _wake(self, index: int, num_slots: int) -> Tensor:
        """`Level.step` with positions on the device: what the element says to its children, `(B, P, D_child)`."""
        level = self.model.levels[index]
        x_BD, slots = self._entered(index, num_slots)
        return level.unembedder(level.transformer.step(x_BD, self.cache.levels[index], slots)[:, None])

    def _entered(self, index: int, num_slots: int) -> tuple[Tensor, Slots]:
        """What the Transformer of a level reads, `(B, D)`, and its slots."""
        level, level_cache = self.model.levels[index], self.cache.levels[index]
        in_row_B = self.positions_B // level.span % level.row_length
        x_BD = self._element_before(level, level_cache, in_row_B)
        if level.positions is not None:
            x_BD = x_BD + level.positions[in_row_B]
        if level_cache.from_parent_BLD is not None:
            x_BD = x_BD + level_cache.from_parent_BLD[self._rows_B, in_row_B]
        return x_BD, self._slots(level, level_cache, in_row_B, num_slots)

    def _element_before(self, level: Level, level_cache: LevelCache, in_row_B: Tensor) -> Tensor:
        """The shifted own input: the embedding of the element before, or the pad where there is none to show."""
        start_B = self.positions_B - level.span
        places_BS = (start_B[:, None] + torch.arange(level.span, device=self.device)) % self.patch_size
        last_bytes_BS = self.cache.patch_bytes_BP.gather(1, places_BS)
        x_BD = level.embedder(last_bytes_BS, start_B.clamp(min=0), level_cache.conv_tails)[:, 0]
        is_empty_B = self.positions_B == 0
        for tail in level_cache.conv_tails:
            tail.masked_fill_(is_empty_B[:, None, None], 0)
        shows_pad_B = is_empty_B if level.is_top or level.real_previous else in_row_B == 0
        return torch.where(shows_pad_B[:, None], level.pad, x_BD)

    def _slots(self, level: Level, level_cache: LevelCache, in_row_B: Tensor, num_slots: int) -> Slots:
        slots_B = level_cache.memory + in_row_B
        read = slice(0, num_slots if level.is_top else level_cache.keys.shape[3])
        slots_S = torch.arange(read.stop, device=self.device)
        mask_BS = slots_S <= slots_B[:, None]
        if level_cache.memory:
            has_memory_B1 = self.positions_B[:, None] >= level.span * level.row_length
            mask_BS = mask_BS & ((slots_S >= level_cache.memory) | has_memory_B1)
        # Added to the scores; from a mask of booleans every layer would make this anew.
        bias_BS = torch.zeros_like(mask_BS, dtype=level_cache.keys.dtype).masked_fill_(~mask_BS, float("-inf"))
        return Slots(slots_B[:, None, None], (self._rows_B, slice(None), slots_B), read, bias_BS)

    def _choose(self, logits_BV: Tensor, uniforms_B1: Tensor, given_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes `(B, 1)`, the given ones or drawn, and their surprisals."""
        if self.draws_natively:
            laws = (self._temperature_B1, self._top_k_B1, self._top_p_B1)
            return native.draw_rows(logits_BV, laws, uniforms_B1, given_B1)
        drawn_B1 = self._draw(logits_BV, uniforms_B1)
        chosen_B1 = torch.where(given_B1 >= 0, given_B1, drawn_B1)
        wide_BV = logits_BV.double()
        return chosen_B1, nats_to_bits(wide_BV.logsumexp(1, keepdim=True) - wide_BV.gather(1, chosen_B1)).float()

    def _draw(self, logits_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
        """`core.law.sampling_law` and `core.law.draw` of every row, `(B, 1)`."""
        wide_BV = logits_BV.double()
        highest_B1 = wide_BV.amax(1, keepdim=True)
        values_V = torch.arange(NUM_BYTE_VALUES, device=self.device)
        likeliest_B1 = torch.where(wide_BV == highest_B1, values_V, NUM_BYTE_VALUES).amin(1, keepdim=True)
        weights_BV = ((wide_BV - highest_B1) / self._temperature_B1).exp()  # not a number at 0, where nothing is drawn
        if self.has_filters:
            order_BV = logits_BV.argsort(dim=1, descending=True, stable=True)
            ranked_BV = weights_BV.gather(1, order_BV) * (values_V < self._top_k_B1)
            mass_BV = ranked_BV.cumsum(1)
            mass_before_BV = F.pad(mass_BV[:, :-1], (1, 0))
            is_kept_BV = (mass_before_BV < self._top_p_B1 * mass_BV[:, -1:]) | (self._top_p_B1 == 1)
            weights_BV = torch.zeros_like(weights_BV).scatter(1, order_BV, ranked_BV * is_kept_BV)
        cumulated_BV = weights_BV.cumsum(1)
        drawn_B1 = (cumulated_BV <= uniforms_B1 * cumulated_BV[:, -1:]).sum(1, keepdim=True)
        last_possible_B1 = (values_V * (weights_BV > 0)).amax(1, keepdim=True)
        return torch.where(self._temperature_B1 == 0, likeliest_B1, drawn_B1.minimum(last_possible_B1))

    def _whole(self, num_bytes: int) -> int:
        """Rounded up to whole patches."""
        return -(-num_bytes // self.patch_size) * self.patch_size

    def _on_device(self) -> AbstractContextManager:
        """Streams and graphs are those of the current GPU, which need not be the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self.num_rows, *shape, dtype=dtype, device=self.device)


@contextmanager
def borrowed_lockstep(model: MegaByte, num_rows: int, cache_len: int, *, has_filters: bool, is_fused: bool) -> Iterator[Lockstep]:
    """A lockstep of the model's bfloat16 copy for the time of the block, nobody else's meanwhile.

    The newest one of each model is kept until its weights change, because its graphs take seconds to capture. One with
    longer rows serves as well: their length changes no bit.
    """
    rounded = bf16_copy(model)
    batch = _idle.pop(model, None)
    wanted = (rounded, num_rows, is_fused)
    is_fit = batch is not None and (batch.plain_model, batch.num_rows, batch.is_fused) == wanted
    is_fit = is_fit and batch.cache.max_seq_len >= cache_len
    if not is_fit or (batch.has_filters != has_filters and not batch.draws_natively):
        batch = None  # before memory is taken for another one
        batch = Lockstep(rounded, num_rows, cache_len, has_filters=has_filters, is_fused=is_fused)
    try:
        yield batch
    finally:
        _idle[model] = batch


def bf16_copy(model: MegaByte) -> MegaByte:
    """A copy with its parameters rounded to bfloat16, shared if they were; tables of angles stay in float32.

    Kept while the model is."""
    now = fingerprint(model)
    known, rounded = _bf16_models.get(model, (None, None))
    if known != now:
        parameters = {id(p): nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model.parameters()}
        rounded = packed(copy.deepcopy(model, parameters))
        _bf16_models[model] = now, rounded
    return rounded


def _by_prefix(jobs: Sequence[Job]) -> list[tuple[int, Job]]:
    """The jobs and their indices, those with the same prefix one after another."""
    first: dict[bytes, int] = {}
    return sorted(enumerate(jobs), key=lambda pair: first.setdefault(pair[1].prefix.tobytes(), pair[0]))
