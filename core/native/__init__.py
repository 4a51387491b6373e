"""Native decoding on a CPU: whole patches of rows of a MegaByte in one call of C++, several times as fast as torch.

Every weight is read once per byte, so a byte of one row costs what reading the weights costs, and those of several rows
that are made together little more: each has the bits that it has alone. `decode.cpp` reads the weights as bf16 and
computes in float32; only models whose matrices are exactly representable in bf16 are taken, which exported models are,
so its logits differ from torch's by the order of summation alone. The bytes are drawn there as well, and so
are those of many rows whose logits torch makes (`draw_rows`).

The library is built at first use, see `core.kernels`. Without a compiler, on an x86 processor without AVX2, on a GPU and
for a model that is not supported `compile_model` gives None and torch does the work.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from core.arena import Arena
from core.cache import Cache
from core.config import NUM_BYTE_VALUES, LevelConfig
from core.kernels import attention, load_library, step, training_cpu
from core.models import ByteModel, MegaByte
from core.models.layers import QK_EPSILON, Block
from core.models.megabyte import Level
from core.models.packed import fingerprint
from core.native import structures

ENGINE_NAME = "native-bf16"
INT8_ENGINE_NAME = "native-int8"

_SOURCE = Path(__file__).with_name("decode.cpp")
_PANEL_VECTORS = 4  # of rows

# The newest decoder of each model, so that every completion does not pack the weights again.
_decoders: WeakKeyDictionary[MegaByte, tuple[tuple, "NativeDecoder | None"]] = WeakKeyDictionary()


def compile_model(model: ByteModel, engine: str = ENGINE_NAME) -> "NativeDecoder | None":
    """A decoder with the model's present weights; None where torch has to do the work."""
    if not has_supported_form(model):
        return None
    found = library()
    if found is None:
        return None
    now = engine, *fingerprint(model)
    known, decoder = _decoders.get(model, (None, None))
    if known != now:
        is_int8 = engine == INT8_ENGINE_NAME
        decoder = NativeDecoder(model, found, is_int8) if is_int8 or _is_exact_in_bf16(model) else None
        _decoders[model] = now, decoder
    return decoder


class NativeDecoder:
    """The packed weights of one model, by which sequences step."""

    def __init__(self, model: MegaByte, library: ctypes.CDLL, is_int8: bool) -> None:
        self.library = library
        self._is_int8 = is_int8
        self._lanes = library.num_lanes()  # rows of such a vector
        self._kept: list = []  # what the structures point into
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        # Halves of a matrix are filled up to whole panels each.
        most_padding = 2 * _PANEL_VECTORS * self._lanes
        self._arena = Arena(sum(2 * (matrix.shape[0] + most_padding) * matrix.shape[1] for matrix in matrices))
        self.structure = self._model(model)

    def _model(self, model: MegaByte) -> structures.Model:
        levels, config = list(model.levels), model.config
        return structures.Model(
            levels=self._array(structures.Level, [self._level(level) for level in levels]),
            num_levels=len(levels),
            patch_size=config.patch_size,
            real_previous=config.real_previous,
            slices=config.unembedder == "slices",
            relu_squared=config.activation == "relu2",
            qk_epsilon=QK_EPSILON if config.qk_norm else 0.0,
            logit_softcap=config.logit_softcap,
            unembedder=self._matrix(levels[0].unembedder.project if len(levels) > 1 else None),
            head=self._matrix(levels[-1].embedder.embedding),
        )

    def _level(self, level: Level) -> structures.Level:
        own, embedder, rotary = level.config, level.embedder, level.transformer.rotary
        cos, sin = rotary.tables() if rotary else (None, None)
        # One half after the other: what a thread reads lies side by side.
        halves = [[self._half(block, own, index) for block in level.transformer.blocks] for index in range(2)]
        return structures.Level(
            dim=own.dim,
            num_layers=own.num_layers,
            num_heads=own.num_heads,
            head_dim=own.head_dim,
            ffn_dim=own.ffn_dim,
            span=level.span,
            row_length=level.row_length,
            memory=own.cross_patch,
            embedding=self._vector(embedder.embedding.weight),
            byte_dim=embedder.embedding.embedding_dim,
            byte_positions=self._vector(embedder.positions and embedder.positions.weight),
            pad=self._vector(level.pad),
            row_positions=self._vector(level.positions),
            cos=self._vector(cos),
            sin=self._vector(sin),
            project=self._matrix(embedder.project if isinstance(embedder.project, nn.Linear) else None),
            blocks=self._array(structures.Block, list(map(self._block, level.transformer.blocks, *halves))),
            residual_scalars=self._vector(level.transformer.residual_scalars),
            norm=self._norm(level.transformer.norm),
        )

    def _block(self, block: Block, *halves: structures.Half) -> structures.Block:
        return structures.Block(self._norm(block.attention_norm), self._norm(block.ffn_norm), halves)

    def _half(self, block: Block, level: LevelConfig, index: int) -> structures.Half:
        heads, channels = (_half_of(count, index) for count in (level.num_heads, level.ffn_dim))
        of_heads = slice(heads.start * level.head_dim, heads.stop * level.head_dim)
        rows_of_qkv = torch.arange(3 * level.dim).view(3, -1)[:, of_heads].flatten()
        attention, is_first = block.attention, index == 0
        return structures.Half(
            first_head=heads.start,
            num_heads=heads.stop - heads.start,
            first_channel=channels.start,
            qkv=self._matrix(attention.qkv, rows=rows_of_qkv),
            out=self._matrix(attention.out, columns=of_heads, has_bias=is_first),
            ffn_in=self._matrix(block.ffn_in, rows=channels),
            ffn_out=self._matrix(block.ffn_out, columns=channels, has_bias=is_first),
        )

    def _norm(self, norm: nn.LayerNorm) -> structures.Norm:
        return structures.Norm(self._vector(norm.weight), self._vector(norm.bias), norm.eps)

    def _matrix(
        self,
        module: nn.Linear | nn.Embedding | None,
        *,
        rows: slice | Tensor = slice(None),
        columns: slice = slice(None),
        has_bias: bool = True,
    ) -> structures.Matrix:
        if module is None:
            return structures.Matrix()
        weight_RC, scales_R = module.weight.detach()[rows], None
        if self._is_int8:
            quantized_RC, scales_R = quantize(weight_RC)  # by whole rows, whichever columns are kept
            weight_RC = (quantized_RC[:, columns] + 128).to(torch.uint8)
        else:
            weight_RC = weight_RC[:, columns].bfloat16()
        panels = self._arena.take(_panels_shape(weight_RC, self._lanes), weight_RC.dtype)
        pack(weight_RC, panels)
        bias_R = getattr(module, "bias", None) if has_bias else None
        bias_R = None if bias_R is None else bias_R[rows]
        return structures.Matrix(panels.data_ptr(), self._vector(scales_R), self._vector(bias_R), *weight_RC.shape)

    def _vector(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        values = values.detach().contiguous()
        self._kept.append(values)
        return values.data_ptr()

    def _array(self, kind: type[Structure], items: list[Structure]) -> ctypes.Array:
        array = (kind * len(items))(*items)
        self._kept.append(array)
        return array


class NativeSequence:
    """One cache of one row being filled, in place. Prefilling the cache again is allowed at any time.

    Raises:
        ValueError: if the cache has more rows.
        MemoryError: if there is no memory for what is computed with.
    """

    def __init__(self, decoder: NativeDecoder, cache: Cache) -> None:
        if cache.batch_size != 1:
            raise ValueError(f"a native sequence has one row, the cache has {cache.batch_size}")
        self.decoder, self._cache = decoder, cache  # their memory is used by every step
        self._logits_V = np.zeros(NUM_BYTE_VALUES, dtype=np.float32)
        self._position = cache.positions_B.numpy()
        self._last = cache.max_seq_len - 1
        library = decoder.library
        state = structures.State(
            levels=tuple(
                structures.LevelState(
                    _pointer(level.keys), _pointer(level.values), level.keys.shape[3], _pointer(level.from_parent_BLD)
                )
                for level in cache.levels
            ),
            patch_bytes=_pointer(cache.patch_bytes_BP),
            position=_pointer(cache.positions_B),
            woken=_pointer(cache.woken_B),
            logits=self._logits_V.ctypes.data,
        )
        self._library = library
        self.handle = library.sequence_open(byref(decoder.structure), byref(state))
        if not self.handle:
            raise MemoryError("out of memory for what a sequence is computed with; make fewer at once")

    def __del__(self) -> None:
        if handle := self.__dict__.pop("handle", None):
            self._library.sequence_close(handle)

    def step(self, byte_value: int) -> np.ndarray:
        """Appends a byte; logits `(256,)`, float32, of the next one. The array is overwritten by the next step.

        Raises:
            ValueError: if the cache is full.
        """
        if self._position[0] >= self._last:
            raise ValueError(f"the cache holds {self._last + 1} bytes and no byte can follow the last; start a new one")
        self._library.sequence_step(self.handle, byte_value)
        return self._logits_V

    def require_room(self, num_bytes: int) -> None:
        """Refuses more bytes than the cache has room for.

        Raises:
            ValueError: if there are.
        """
        if self._position[0] + num_bytes > self._last + 1:
            raise ValueError(f"the cache holds {self._last + 1} bytes and has no room for {num_bytes} more; start a new one")


@dataclass(frozen=True)
class Part:
    """What is to be made of a sequence at a time.

    Attributes:
        forced: the first bytes, taken as given, uint8.
        uniforms: float64, one for each further byte, which is drawn as `core.law.draw` does.
    """

    sequence: NativeSequence
    forced: np.ndarray
    uniforms: np.ndarray
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __len__(self) -> int:
        return len(self.forced) + len(self.uniforms)


class Team:
    """The threads that work on some sequences, one call at a time: that of the caller and, if it `has_helper`, another.

    The other one sleeps between the calls, and its part is the caller's if it has none of the machine's time.
    """

    def __init__(self, has_helper: bool) -> None:
        self._library = library()
        self._handle = self._library.team_open(has_helper)
        if not self._handle:
            raise MemoryError("out of memory for the threads that make bytes; make fewer at once")

    def __del__(self) -> None:
        if handle := self.__dict__.pop("_handle", None):
            self._library.team_close(handle)

    def draw(self, parts: Sequence[Part]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Appends bytes to different sequences of one decoder; of each they, uint8 `(n,)`, and their surprisals, float32 bits.

        What `prefill` or `step` predicted before is predicted again here. Nothing of a sequence depends on the others.

        Raises:
            ValueError: if a cache has no room for them.
        """
        assert len({id(part.sequence) for part in parts}) == len(parts)
        assert len({id(part.sequence.decoder) for part in parts}) <= 1
        made = []
        most = self._library.most_parts()
        for first in range(0, len(parts), most):
            made += self._draw(parts[first : first + most])
        return made

    def _draw(self, parts: Sequence[Part]) -> list[tuple[np.ndarray, np.ndarray]]:
        made, told = [], (structures.Part * len(parts))()
        noises = [np.concatenate((np.zeros(len(part.forced)), part.uniforms)) for part in parts]
        for each, part, noise in zip(told, parts, noises, strict=True):
            part.sequence.require_room(len(part))
            byte_values, bits = np.zeros(len(part), dtype=np.int64), np.empty(len(part), dtype=np.float32)
            byte_values[: len(part.forced)] = part.forced
            made.append((byte_values, bits))
            each.sequence, each.count, each.num_forced = part.sequence.handle, len(part), len(part.forced)
            each.law = structures.Law(part.temperature, NUM_BYTE_VALUES if part.top_k is None else part.top_k, part.top_p)
            each.uniforms, each.bytes, each.bits = (array.ctypes.data for array in (noise, byte_values, bits))
        self._library.team_draw(self._handle, told, len(parts))
        return [(byte_values.astype(np.uint8), bits) for byte_values, bits in made]


def can_draw() -> bool:
    """Whether `draw_rows` may be called on this machine."""
    return library() is not None


def draw_rows(logits_BV: Tensor, laws: Sequence[Tensor], uniforms_B1: Tensor, given_B1: Tensor) -> tuple[Tensor, Tensor]:
    """A byte of every row, int64 `(B, 1)`, drawn as `core.law.draw` does, and its surprisal in bits, float32 `(B, 1)`.

    Args:
        logits_BV: float32.
        laws: temperature, float64, top-k, int64, and top-p, float64, each `(B, 1)`.
        uniforms_B1: float64.
        given_B1: bytes to be taken instead, int64; -1 for none.
    """
    assert logits_BV.shape == (len(given_B1), NUM_BYTE_VALUES)
    assert logits_BV.dtype == torch.float32
    assert all(each.shape == given_B1.shape and each.is_contiguous() for each in (*laws, uniforms_B1))
    bytes_B1, bits_B1 = given_B1.clone(), torch.empty(given_B1.shape)
    numbers = logits_BV, *laws, uniforms_B1, bytes_B1, bits_B1
    library().draw_rows(len(given_B1), *map(_pointer, numbers))
    return bytes_B1, bits_B1


def pack(weight_RC: Tensor, panels: Tensor) -> None:
    """Writes a matrix of bfloat16 or uint8 in the layout of `vectors.h` into memory of `_panels_shape`."""
    num_panels, num_columns, num_vectors, lanes, per_word = panels.shape
    num_rows = num_panels * num_vectors * per_word * lanes
    padded = nn.functional.pad(weight_RC, (0, 0, 0, num_rows - len(weight_RC)))
    # (panel, vector, part, lane, column) to (panel, column, vector, lane, part): the parts of a word lie side by side.
    rows = padded.reshape(num_panels, num_vectors, per_word, lanes, num_columns)
    panels.copy_(rows.permute(0, 4, 1, 3, 2))


def _half_of(count: int, index: int) -> slice:
    """The first or the second half of a range; the first one has one more of an odd number."""
    middle = (count + 1) // 2
    return slice(middle, count) if index else slice(0, middle)


def _panels_shape(weight_RC: Tensor, lanes: int) -> tuple[int, ...]:
    num_rows, num_columns = weight_RC.shape
    per_word = 4 // weight_RC.dtype.itemsize
    return -(-num_rows // (_PANEL_VECTORS * lanes)), num_columns, _PANEL_VECTORS // per_word, lanes, per_word


def quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, float32, and the scale of each row `(R,)` that makes them nearly the weights."""
    scales_R = weight_RC.abs().amax(dim=1).clamp(min=1e-30) / 127
    return (weight_RC / scales_R[:, None]).round(), scales_R


def num_cores() -> int:
    """Cores that this process may use: those it may run on, or the whole ones that its container's share of time amounts to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((cores, *map(int, _quotas()))))


def _quotas(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Cores' worth of time that each Linux control group of this process has, those without a limit left out."""
    for line in process.read_text(encoding="utf-8").splitlines() if process.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root  # version 1 names the controllers of a line, version 2 has one line
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):  # in a container the group's own name may not be there, only the top
            if folder.is_relative_to(top):
                yield from _quota(folder)


def _quota(group: Path) -> Iterator[float]:
    names = ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for files in names:
        with contextlib.suppress(OSError, ValueError):  # none there, or "max": no limit
            quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
            if quota > 0:
                yield quota / period


def has_supported_form(model: ByteModel) -> bool:
    """One or two levels without convolutions, in float32 on a CPU."""
    if not isinstance(model, MegaByte) or len(model.levels) > 2 or any(level.config.conv_kernels for level in model.levels):
        return False
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in model.parameters())


def _is_exact_in_bf16(model: MegaByte) -> bool:
    """Whether packing loses nothing, for the low halves of all values are 0; vectors stay in float32."""
    return not any(p.detach().contiguous().view(torch.int16)[:, ::2].any() for p in model.parameters() if p.ndim == 2)


def build() -> None:
    """Builds what a CPU's work builds at first use, so that no completion and no score has to wait for it."""
    library()
    for kernels in (attention, step, training_cpu):
        kernels.library()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The built library, or None where this machine cannot build it or torch is faster; looked for once per process."""
    found = load_library(_SOURCE)
    if found is None or not found.num_lanes():
        return None
    found.sequence_open.argtypes = (POINTER(structures.Model), POINTER(structures.State))
    found.sequence_open.restype = c_void_p
    found.team_open.argtypes = (c_int64,)
    found.team_open.restype = c_void_p
    found.sequence_step.argtypes = (c_void_p, c_int64)
    found.sequence_step.restype = None
    found.team_draw.argtypes = (c_void_p, POINTER(structures.Part), c_int64)
    found.team_draw.restype = None
    found.most_parts.restype = c_int64
    found.draw_rows.argtypes = (c_int64, *(c_void_p for _ in range(7)))
    found.draw_rows.restype = None
    found.sequence_close.argtypes = (c_void_p,)
    found.sequence_close.restype = None
    found.team_close.argtypes = (c_void_p,)
    found.team_close.restype = None
    return found


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
