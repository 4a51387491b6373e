"""Many samples of a MegaByte that make their patches in lockstep: fixed shapes, positions on the device, no waiting.

A byte is one run of a *phase*: it wakes every level whose next element begins there, draws, and appends. Where the rows
stand, what is drawn from, and what was drawn are tensors, so a phase is the same sequence of kernels every time. On a GPU
it is captured once as a CUDA graph, and the host only queues one graph per byte and reads the bytes patch by patch.

Rows share the place inside a patch and nothing else. A prompt's whole patches are read at once; what remains of it is
forced upon the first patch that its row makes. At the end of a patch a row that is done takes the next job.

The seed promise: matrix products always have the same shape, `num_rows`, so a row's numbers do not depend on its
neighbours. The number of slots that attention reads follows the longest row; the slots beyond a row's own end get weight
zero, and adding zeros at the end of a sum changes no bit of it.
"""

# Shapes: B rows, P bytes of a patch, S slots, V = 256.

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from core.cache import LevelCache
from core.config import NUM_BYTE_VALUES
from core.law import Chunk, SampleConfig
from core.models import MegaByte
from core.models.layers import Slots
from core.models.megabyte import Level
from core.native import fingerprint

_FEWEST_SLOTS = 64  # of the first level that are read; doubled as the rows grow

_bf16_models: WeakKeyDictionary[MegaByte, tuple[tuple, MegaByte]] = WeakKeyDictionary()


@dataclass
class Job:
    """One sample: its prefix, uint8, how many bytes to make, how they are drawn and the stream of uniforms."""

    prefix: np.ndarray
    num_bytes: int
    config: SampleConfig
    noise: np.random.Generator
    made: list[np.ndarray] = field(default_factory=list)

    @property
    def num_made(self) -> int:
        return sum(len(chunk) for chunk in self.made)

    def history(self) -> np.ndarray:
        return np.concatenate([self.prefix, *self.made])


class Lockstep:
    """B rows of a model and their cache.

    Args:
        model: in the precision in which it is to run.
        num_rows: B, the padded shape.
        cache_len: bytes that a row holds.
        compile_steps: fuse the small kernels of the last level with `torch.compile`, which takes a minute at first.
    """

    @classmethod
    def of(cls, model: MegaByte, num_rows: int, cache_len: int) -> "Lockstep":
        """Rows of the model with its weights rounded to bfloat16."""
        return cls(bf16_copy(model), num_rows, cache_len)

    def __init__(self, model: MegaByte, num_rows: int, cache_len: int, *, compile_steps: bool = False) -> None:
        self.model = model
        self.num_rows = num_rows
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(num_rows, cache_len)
        self.patch_size = self.cache.patch_size
        self.positions_B = self._zeros(torch.int64)
        self._rows_B = torch.arange(num_rows, device=self.device)
        self._last_step = model.levels[-1].transformer.step
        if compile_steps:
            self._last_step = torch.compile(self._last_step, dynamic=False)
        # What a patch is made from, written by the host before it: numbers, given bytes (-1: none), and each row's law.
        self._uniforms_BP = self._zeros(torch.float64, self.patch_size)
        self._given_BP = self._zeros(torch.int64, self.patch_size)
        self._bits_BP = self._zeros(torch.float32, self.patch_size)
        self._temperature_B1 = self._zeros(torch.float64, 1)
        self._top_k_B1 = self._zeros(torch.int64, 1)
        self._top_p_B1 = self._zeros(torch.float64, 1)
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        if self.device.type == "cuda":
            self._capture_all()

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Chunk]]:
        """(index of the job, its next bytes), patch by patch."""
        waiting = deque(enumerate(jobs))
        rows: list[tuple[int, Job] | None] = [None] * self.num_rows
        positions = [0] * self.num_rows
        while True:
            given_BP = np.full((self.num_rows, self.patch_size), -1, dtype=np.int64)
            for row, working in enumerate(rows):
                if working is None and waiting:
                    working = rows[row] = waiting.popleft()
                    positions[row] = self._read(row, working[1], given_BP)
                elif working is not None and positions[row] == self.cache.max_seq_len:
                    positions[row] = self._read(row, working[1], given_BP)
                elif working is None:
                    positions[row] = 0  # an idle row makes its first patch over and over
            working_rows = [(row, *working) for row, working in enumerate(rows) if working is not None]
            if not working_rows:
                return
            self._load(positions, given_BP, working_rows)
            self._make_patch(max(positions), any(_filters(job.config) for _, _, job in working_rows))
            bytes_BP = self.cache.patch_bytes_BP.cpu().numpy().astype(np.uint8)
            bits_BP = self._bits_BP.cpu().numpy()
            positions = [position + self.patch_size for position in positions]
            chunks = []
            for row, index, job in working_rows:
                first = int((given_BP[row] >= 0).sum())
                new = slice(first, min(self.patch_size, first + job.num_bytes - job.num_made))
                chunk = Chunk(bytes_BP[row, new].copy(), bits_BP[row, new].copy())
                job.made.append(chunk.byte_values)
                if job.num_made == job.num_bytes:
                    rows[row] = None
                chunks.append((index, chunk))
            yield from chunks

    def logits(self) -> Tensor:
        """The logits `(B, V)` of the last byte that was drawn: what parity tests look at."""
        return self._logits_BV

    # --- What the host does between patches ---

    def _read(self, row: int, job: Job, given_BP: np.ndarray) -> int:
        """Reads the whole patches of a job's history into a row and leaves the rest to be forced; the row's position."""
        history = job.history()
        if len(history) >= self.cache.max_seq_len:
            half = self.cache.max_seq_len // 2 // self.patch_size * self.patch_size
            history = history[len(history) - half :]
        num_whole = len(history) - len(history) % self.patch_size
        byte_ids_BT = torch.from_numpy(history[:num_whole].astype(np.int64))[None].to(self.device)
        self.model.read_patches(byte_ids_BT, self.cache.rows(slice(row, row + 1)))
        given_BP[row, : len(history) - num_whole] = history[num_whole:]
        return num_whole

    def _load(self, positions: list[int], given_BP: np.ndarray, working_rows: list[tuple[int, int, Job]]) -> None:
        uniforms_BP = np.zeros((self.num_rows, self.patch_size))
        law_B3 = np.tile([1.0, NUM_BYTE_VALUES, 1.0], (self.num_rows, 1))
        for row, _, job in working_rows:
            first = int((given_BP[row] >= 0).sum())
            count = min(self.patch_size - first, job.num_bytes - job.num_made)
            uniforms_BP[row, first : first + count] = job.noise.random(count)
            law_B3[row] = job.config.temperature, job.config.top_k or NUM_BYTE_VALUES, job.config.top_p
        self.positions_B.copy_(torch.tensor(positions))
        self._uniforms_BP.copy_(torch.from_numpy(uniforms_BP))
        self._given_BP.copy_(torch.from_numpy(given_BP))
        for target, column in zip((self._temperature_B1, self._top_k_B1, self._top_p_B1), law_B3.T, strict=True):
            target.copy_(torch.from_numpy(column.copy())[:, None])

    def _make_patch(self, longest: int, has_filters: bool) -> None:
        for key in self._phases(longest, has_filters):
            if key in self._graphs:
                self._graphs[key].replay()
            else:
                self._phase(*key)

    def _phases(self, longest: int, has_filters: bool) -> Iterator[tuple[int, int, bool]]:
        """The arguments of `_phase` for each byte of a patch that no row begins after byte `longest`."""
        for offset in range(self.patch_size):
            first = next(index for index, level in enumerate(self.model.levels) if offset % level.span == 0)
            yield first, self._num_slots(longest) if first == 0 else 0, has_filters

    def _num_slots(self, longest: int) -> int:
        """Slots of the first level that are read: powers of two, so that few graphs are needed."""
        needed, all_slots = longest // self.patch_size + 1, self.cache.levels[0].keys.shape[3]
        num_slots = _FEWEST_SLOTS
        while num_slots < needed:
            num_slots *= 2
        return min(num_slots, all_slots)

    def _capture_all(self) -> None:
        """Captures every phase that can come up; the buffers end as they began."""
        sizes = sorted({self._num_slots(position) for position in range(0, self.cache.max_seq_len, self.patch_size)})
        firsts = range(1, len(self.model.levels))
        keys = [(0, size) for size in sizes] + [(first, 0) for first in firsts]
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for key in [(*key, has_filters) for has_filters in (False, True) for key in keys]:
                self._given_BP.fill_(-1)
                self._temperature_B1.fill_(1.0)
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self.positions_B.zero_()
                        self._phase(*key)
                torch.cuda.current_stream().wait_stream(stream)
                self._graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graphs[key], pool=pool):
                    self._phase(*key)
            for level_cache in self.cache.levels:
                for tensor in level_cache.tensors():
                    tensor.zero_()

    # --- What a graph holds: no value of a tensor is looked at by the host ---

    def _phase(self, first: int, num_slots: int, has_filters: bool) -> None:
        """One byte of every row, at a place where the levels from `first` on wake."""
        for index in range(first, len(self.model.levels)):
            x_BD = self._wake(index, num_slots, starts_row=index > first)
        self._logits_BV = self.model.to_logits(x_BD)
        place_1 = self.positions_B[:1] % self.patch_size
        uniforms_B1, given_B1 = self._uniforms_BP.index_select(1, place_1), self._given_BP.index_select(1, place_1)
        drawn_B1 = self._draw(self._logits_BV, uniforms_B1, has_filters)
        chosen_B1 = torch.where(given_B1 >= 0, given_B1, drawn_B1)
        self._bits_BP.index_copy_(1, place_1, self._surprisal(self._logits_BV, chosen_B1))
        self.cache.patch_bytes_BP.index_copy_(1, place_1, chosen_B1)
        self.positions_B.add_(1)

    def _wake(self, index: int, num_slots: int, starts_row: bool) -> Tensor:
        """`Level.step` with positions on the device; what the element says to its first child, `(B, D_child)`."""
        level, level_cache = self.model.levels[index], self.cache.levels[index]
        in_row_B = self.positions_B // level.span % level.row_length
        if starts_row:
            level.transformer.begin_row(level_cache)
        x_BD = self._element_before(level, level_cache, starts_row)
        if level.positions is not None:
            x_BD = x_BD + level.positions[in_row_B]
        if level_cache.from_parent_BLD is not None:
            x_BD = x_BD + level_cache.from_parent_BLD[self._rows_B, in_row_B]
        slots = self._slots(level, level_cache, in_row_B, num_slots)
        step = self._last_step if index == len(self.model.levels) - 1 else level.transformer.step
        to_children_BLD = level.unembedder(step(x_BD, level_cache, slots)[:, None])
        if index + 1 < len(self.model.levels):
            self.cache.levels[index + 1].from_parent_BLD.copy_(to_children_BLD)
        return to_children_BLD[:, 0]

    def _element_before(self, level: Level, level_cache: LevelCache, starts_row: bool) -> Tensor:
        pad_BD = level.pad.expand(self.num_rows, -1)
        shows_pad = starts_row and not level.real_previous
        if shows_pad and not level.embedder.convs:
            return pad_BD
        start_B = self.positions_B - level.span
        places_BS = (start_B[:, None] + torch.arange(level.span, device=self.device)) % self.patch_size
        last_bytes_BS = self.cache.patch_bytes_BP.gather(1, places_BS)
        x_BD = level.embedder(last_bytes_BS, start_B.clamp(min=0), level_cache.conv_tails)[:, 0]
        is_empty_B = self.positions_B == 0
        for tail in level_cache.conv_tails:
            tail.masked_fill_(is_empty_B[:, None, None], 0)
        return pad_BD if shows_pad else torch.where(is_empty_B[:, None], pad_BD, x_BD)

    def _slots(self, level: Level, level_cache: LevelCache, in_row_B: Tensor, num_slots: int) -> Slots:
        slots_B = level_cache.memory + in_row_B
        read = slice(0, num_slots if level.is_top else level_cache.keys.shape[3])
        slots_S = torch.arange(read.stop, device=self.device)
        mask_BS = slots_S <= slots_B[:, None]
        if level_cache.memory:
            has_memory_B1 = self.positions_B[:, None] >= level.span * level.row_length
            mask_BS = mask_BS & ((slots_S >= level_cache.memory) | has_memory_B1)
        return Slots(slots_B[:, None, None], (self._rows_B, slice(None), slots_B), read, mask_BS)

    def _draw(self, logits_BV: Tensor, uniforms_B1: Tensor, has_filters: bool) -> Tensor:
        """`core.law.sampling_law` and `core.law.draw` of every row, `(B, 1)`."""
        wide_BV = logits_BV.double()
        highest_B1 = wide_BV.amax(1, keepdim=True)
        values_V = torch.arange(NUM_BYTE_VALUES, device=self.device)
        likeliest_B1 = torch.where(wide_BV == highest_B1, values_V, NUM_BYTE_VALUES).amin(1, keepdim=True)
        weights_BV = ((wide_BV - highest_B1) / self._temperature_B1).exp()  # not a number at 0, where nothing is drawn
        if has_filters:
            order_BV = logits_BV.argsort(dim=1, descending=True, stable=True)
            ranked_BV = weights_BV.gather(1, order_BV) * (values_V < self._top_k_B1)
            mass_BV = ranked_BV.cumsum(1)
            is_kept_BV = (mass_BV - ranked_BV < self._top_p_B1 * mass_BV[:, -1:]) | (self._top_p_B1 == 1)
            weights_BV = torch.zeros_like(weights_BV).scatter(1, order_BV, ranked_BV * is_kept_BV)
        cumulated_BV = weights_BV.cumsum(1)
        drawn_B1 = (cumulated_BV <= uniforms_B1 * cumulated_BV[:, -1:]).sum(1, keepdim=True)
        last_possible_B1 = (values_V * (weights_BV > 0)).amax(1, keepdim=True)
        return torch.where(self._temperature_B1 == 0, likeliest_B1, drawn_B1.minimum(last_possible_B1))

    @staticmethod
    def _surprisal(logits_BV: Tensor, chosen_B1: Tensor) -> Tensor:
        wide_BV = logits_BV.double()
        return ((wide_BV.logsumexp(1, keepdim=True) - wide_BV.gather(1, chosen_B1)) / log(2)).float()

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self.num_rows, *shape, dtype=dtype, device=self.device)


def bf16_copy(model: MegaByte) -> MegaByte:
    """The model with its parameters rounded to bfloat16; tables of angles stay in float32. Kept while the model is."""
    if all(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return model
    now = fingerprint(model)
    known, rounded = _bf16_models.get(model, (None, None))
    if known != now:
        rounded = copy.deepcopy(model)
        for parameter in rounded.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.bfloat16()
        _bf16_models[model] = now, rounded
    return rounded


def _filters(config: SampleConfig) -> bool:
    return config.top_k is not None or config.top_p < 1.0
