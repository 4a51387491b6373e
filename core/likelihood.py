"""How likely every byte of a stream is, in bits: windows, hop, strided inference, totals.

The only place where nats become bits. A stream longer than the context is read in windows. They start every `hop` bytes;
each byte is scored once, by the first window that holds it, so a hop below the window gives every later byte at
least window - hop bytes of context. A model that predicts only the last bytes of what it reads, a Perceiver AR, reads a window
once for each such part, with all of the window before it; its hop is that part unless it is said otherwise.

Strided inference (arXiv 2305.07185, section 2.3) reads each window a second time, half a patch later, and takes each byte
from the pass in which it lies in the first half of its patch, because loss rises towards the end of a patch.

Matrix products run in bf16 on a GPU, and on a CPU that has instructions for it if the model is wide enough to gain, and bf16
goes from layer to layer; sums inside them, logits and what follows are float32. On the shipped models this moves the bits per
byte by at most 0.03%. `MEGABYTE_ENGINE=torch` keeps a CPU at float32. The choice follows from machine, model and this setting
alone; the last bits of a CPU's bf16 also depend on whether the kernels of `core.kernels` could be built.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import ImageCodecConfig
from core.errors import UserError
from core.kernels import attention, in_background, multiplies_bf16, training_cpu
from core.models import ByteModel
from core.models.layers import before_layer
from core.models.loss import nll, nll_of_logits
from core.models.packed import products_of

# Small on a CPU: what one layer writes should still be in its cache when the next one reads it.
_BYTES_PER_BATCH = {"cpu": 1 << 13, "cuda": 1 << 20}

# Columns of the widest matrix from which on bf16 is faster on a CPU that multiplies it, 1.7 times at 512 to 2048; below,
# conversions cost what the products save.
_WIDE = 256

NUM_LIKELIEST = 5


@dataclass(frozen=True)
class Expectation:
    """What a model expected at every byte of a stream, before it saw the byte.

    Attributes:
        rank: how many byte values it thought likelier than the one that came, uint8 `(T,)`.
        entropy: bits that it expected to need, float16 `(T,)`, 0 to 8.
        likeliest: the byte values that it thought likeliest, in order, uint8 `(T, 5)`.
        likeliest_bits: -log2 p of each of them, float16 `(T, 5)`.
    """

    rank: np.ndarray
    entropy: np.ndarray
    likeliest: np.ndarray
    likeliest_bits: np.ndarray


@dataclass(frozen=True)
class Score:
    """Information content of a stream under a model.

    Attributes:
        bits: -log2 p(byte | bytes before it) of every byte, float32 `(T,)`.
        expected: None unless it was asked for.
        num_bytes: bytes counted; fewer than T where tiles of a picture overlap.
        total_bits: their sum, in float64.
        window, hop: bytes; strided: whether a second pass was made.
        engine: what computed it.
    """

    bits: np.ndarray
    expected: Expectation | None
    num_bytes: int
    total_bits: float
    window: int
    hop: int
    strided: bool
    engine: str

    @property
    def bits_per_byte(self) -> float | None:
        """Uniform bytes give 8.0; None for an empty stream."""
        return self.total_bits / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True)
class Window:
    """Bytes `start` to `end` of stream number `stream`, of which those from `first_scored` on are scored here."""

    stream: int
    start: int
    end: int
    first_scored: int


def score(
    model: ByteModel,
    streams: np.ndarray | bytes | Sequence[np.ndarray | bytes],
    *,
    window: int = 0,
    hop: int = 0,
    strided: bool = False,
    counted: np.ndarray | Sequence[np.ndarray | None] | None = None,
    detailed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Score | list[Score]:
    """Scores one stream of bytes, or many together.

    Args:
        streams: uint8 `(T,)` or bytes; or a sequence of them, for a list of scores.
        window: bytes read at once; 0 stands for the model's context.
        hop: bytes from one window's start to the next; 0 stands for what one forward pass predicts: for most models the
            whole window, so that windows are disjoint.
        strided: read everything twice, half a patch apart.
        counted: for each stream a bool mask `(T,)` of the bytes that enter its totals; None counts all.
        detailed: keep rank, entropy and the likeliest bytes too: 18 bytes a byte.
        progress: called with the number of bytes done since the last call, before each layer of a model with 0; what it
            raises ends the scoring.

    Raises:
        UserError: if a stream is no bytes, or window, hop or strided do not fit the model.
    """
    if isinstance(streams, (np.ndarray, bytes, bytearray, str)):
        masks = None if counted is None else [counted]
        options = {"window": window, "hop": hop, "strided": strided, "detailed": detailed, "progress": progress}
        return score(model, [streams], counted=masks, **options)[0]
    window, hop = checked_windows(model, window, hop, strided)
    arrays = [as_stream(stream) for stream in streams]
    measures = [_empty_measures(len(array), detailed) for array in arrays]
    windows = (w for index, array in enumerate(arrays) for w in split_windows(len(array), window, hop, index))
    todo = [part for w in windows for part in predicted_parts(w, model)]
    only_equal_lengths = model.config.num_predicted(window) < window
    device = next(model.parameters()).device
    measured = measures_of if detailed else _bits_alone
    is_on_cpu, is_bf16 = device.type == "cpu", scores_in_bf16(model)
    products: AbstractContextManager = products_of(model, is_bf16) if is_on_cpu else nullcontext()
    if is_on_cpu and is_bf16:
        for _ in in_background(_build_kernels):  # once
            if progress is not None:
                progress(0)
    for batch in _batches(todo, _BYTES_PER_BATCH.get(device.type, 1 << 13), only_equal_lengths):
        byte_ids_BT = _stack(arrays, batch).to(device)
        with _looking_up(progress), products:
            found = measured(model, byte_ids_BT)
            second = measured(model, byte_ids_BT[:, model.config.patch_size // 2 :]) if strided else None
        if second is not None:
            found = {name: _take_first_halves(first, second[name], model) for name, first in found.items()}
        for name, values in found.items():
            num_unpredicted = byte_ids_BT.shape[1] - values.shape[1]
            for row, w in zip(values.cpu().numpy(), batch, strict=True):
                first = w.start + num_unpredicted
                measures[w.stream][name][w.first_scored : w.end] = row[w.first_scored - first : w.end - first]
        if progress is not None:
            progress(sum(w.end - w.first_scored for w in batch))
    masks = counted if counted is not None else [None] * len(arrays)
    return [
        _score(own, mask, window=window, hop=hop, strided=strided, engine=scoring_engine(model))
        for own, mask in zip(measures, masks, strict=True)
    ]


def _build_kernels() -> None:
    """Builds what scores in bf16 build at first use."""
    for kernels in (attention, training_cpu):
        kernels.library()


@contextmanager
def _looking_up(progress: Callable[[int], None] | None) -> Iterator[None]:
    """Inside the block `progress` is called before each layer."""
    token = before_layer.set(progress and (lambda: progress(0)))
    try:
        yield
    finally:
        before_layer.reset(token)


def as_stream(values: np.ndarray | bytes) -> np.ndarray:
    """Bytes as a stream, uint8 `(T,)`.

    Raises:
        UserError: if they are anything else; numbers above 255 or fractions would otherwise be cut silently.
    """
    if isinstance(values, (bytes, bytearray)):
        return np.frombuffer(values, dtype=np.uint8)
    if not (isinstance(values, np.ndarray) and values.dtype == np.uint8 and values.ndim == 1):
        what = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"a stream must be bytes or a one-dimensional uint8 array, not {what}")
    return values


@torch.inference_mode()
def bits_of(model: ByteModel, byte_ids_BT: Tensor) -> Tensor:
    """-log2 p of the last S bytes `(B, S)` that the model predicts, float32, each row of `(B, T)` read from its beginning."""
    with _autocast(model):
        return nats_to_bits(nll(model, byte_ids_BT))


@torch.inference_mode()
def measures_of(model: ByteModel, byte_ids_BT: Tensor) -> dict[str, Tensor]:
    """`bits` of the last S bytes `(B, S)` that the model predicts, and the fields of `Expectation`; rows as in `bits_of`."""
    with _autocast(model):
        return model.measure(byte_ids_BT, _measures_of_logits)


def _measures_of_logits(logits_BSV: Tensor, byte_ids_BS: Tensor) -> dict[str, Tensor]:
    log_p_BSV = logits_BSV.log_softmax(-1)
    p_BSV = log_p_BSV.exp()
    own_BS1 = log_p_BSV.gather(-1, byte_ids_BS[..., None])
    likeliest = log_p_BSV.topk(NUM_LIKELIEST)
    return {
        "bits": nats_to_bits(nll_of_logits(logits_BSV, byte_ids_BS)),
        "rank": (log_p_BSV > own_BS1).sum(-1).to(torch.uint8),
        # A probability that underflows to 0 counts for nothing, whatever its logarithm.
        "entropy": nats_to_bits(-torch.special.xlogy(p_BSV, p_BSV).sum(-1)).half(),
        "likeliest": likeliest.indices.to(torch.uint8),
        "likeliest_bits": nats_to_bits(-likeliest.values).half(),
    }


def _bits_alone(model: ByteModel, byte_ids_BT: Tensor) -> dict[str, Tensor]:
    return {"bits": bits_of(model, byte_ids_BT)}


def _autocast(model: ByteModel) -> torch.autocast:
    device = next(model.parameters()).device
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=scores_in_bf16(model))


def scores_in_bf16(model: ByteModel) -> bool:
    """Whether the matrix products of a score run in bf16; see this module's beginning."""
    if next(model.parameters()).is_cuda:
        return True
    if os.environ.get("MEGABYTE_ENGINE") == "torch" or not multiplies_bf16():
        return False
    return max(parameter.shape[-1] for parameter in model.parameters() if parameter.ndim == 2) >= _WIDE


def nats_to_bits(nats):
    return nats / log(2)


def checked_windows(model: ByteModel, window: int, hop: int, strided: bool) -> tuple[int, int]:
    """`window` and `hop` with their defaults filled in.

    Raises:
        UserError: if they do not fit the model.
    """
    context = model.config.max_seq_len
    window = window or context
    is_picture = isinstance(model.codec_config, ImageCodecConfig)
    hop = hop or (window if is_picture else model.config.num_predicted(window))
    if not 1 <= window <= context:
        raise UserError(f"window={window} bytes must lie in 1..{context}, the model's context")
    if not 1 <= hop <= window:
        raise UserError(f"hop={hop} bytes must lie in 1..{window}, the window")
    if is_picture and (hop, window) != (context, context):
        raise UserError(f"a picture model reads whole pictures of {context} bytes; leave out the window and the hop")
    if strided and (is_picture or model.config.patch_size % 2):
        raise UserError("strided inference needs text or sound and an even patch size; leave it out for this model")
    return window, hop


def split_windows(num_bytes: int, window: int, hop: int, stream: int = 0) -> Iterator[Window]:
    """The windows of a stream: every byte is scored exactly once, by the first window that holds it."""
    scored = 0
    for start in range(0, num_bytes, hop):
        end = min(start + window, num_bytes)
        yield Window(stream, start, end, scored)
        scored = end
        if scored == num_bytes:
            return


def context_sizes(num_bytes: int, window: int, hop: int) -> np.ndarray:
    """How many bytes before each byte its window held, int64 `(T,)`; a strided score's second pass has half a patch less."""
    sizes = np.arange(num_bytes)
    for w in split_windows(num_bytes, window, hop):
        sizes[w.first_scored : w.end] -= w.start
    return sizes


def predicted_parts(w: Window, model: ByteModel) -> Iterator[Window]:
    """A window as shorter ones with the same beginning, of each of which one forward pass predicts all scored bytes."""
    num_predicted = model.config.num_predicted(w.end - w.start)
    for first_scored in range(w.first_scored, w.end, num_predicted):
        yield Window(w.stream, w.start, min(first_scored + num_predicted, w.end), first_scored)


def scoring_engine(model: ByteModel) -> str:
    """What computes the scores of a model."""
    return engine_name(next(model.parameters()).device, scores_in_bf16(model))


def engine_name(device: torch.device, is_bf16: bool) -> str:
    """What a result was computed with: `torch-fp32` or `torch-bf16` on a CPU, `cuda-bf16` or `cuda-fp32` on a GPU."""
    return f"{'torch' if device.type == 'cpu' else device.type}-{'bf16' if is_bf16 else 'fp32'}"


def _empty_measures(num_bytes: int, detailed: bool) -> dict[str, np.ndarray]:
    """Room for `bits` and, with `detailed`, for the fields of `Expectation`."""
    measures = {"bits": np.zeros(num_bytes, np.float32)}
    if detailed:
        measures["rank"] = np.zeros(num_bytes, np.uint8)
        measures["entropy"] = np.zeros(num_bytes, np.float16)
        measures["likeliest"] = np.zeros((num_bytes, NUM_LIKELIEST), np.uint8)
        measures["likeliest_bits"] = np.zeros((num_bytes, NUM_LIKELIEST), np.float16)
    return measures


def _score(measures: dict[str, np.ndarray], mask: np.ndarray | None, **protocol: Any) -> Score:
    bits = measures.pop("bits")
    kept = bits if mask is None else bits[mask]
    total_bits = float(kept.sum(dtype=np.float64))
    expected = Expectation(**measures) if measures else None
    return Score(bits=bits, expected=expected, num_bytes=len(kept), total_bits=total_bits, **protocol)


def _batches(windows: list[Window], bytes_per_batch: int, only_equal_lengths: bool) -> Iterator[list[Window]]:
    """Windows of about one length together, longest first, so that little is padding; or of exactly one, so that none is."""
    batch: list[Window] = []
    for w in sorted(windows, key=lambda w: w.start - w.end):
        length = batch[0].end - batch[0].start if batch else 0
        if batch and ((len(batch) + 1) * length > bytes_per_batch or (only_equal_lengths and w.end - w.start < length)):
            yield batch
            batch = []
        batch.append(w)
    if batch:
        yield batch


def _stack(arrays: list[np.ndarray], batch: list[Window]) -> Tensor:
    """The windows as rows `(B, T)`; what is added behind the shorter ones cannot be seen by their own bytes."""
    byte_ids_BT = np.zeros((len(batch), batch[0].end - batch[0].start), dtype=np.int64)
    for row, w in zip(byte_ids_BT, batch, strict=True):
        row[: w.end - w.start] = arrays[w.stream][w.start : w.end]
    return torch.from_numpy(byte_ids_BT)


def _take_first_halves(first_BT: Tensor, second_BT: Tensor, model: ByteModel) -> Tensor:
    """Each byte from the pass that has it in the first half of a patch; `second_BT` began half a patch later."""
    patch_size = model.config.patch_size
    half = patch_size // 2
    position_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    # The second pass knows nothing before its first byte, so the first patch is the first pass's.
    from_second_T = (position_T >= patch_size) & (position_T % patch_size >= half)
    merged_BT = first_BT.clone()
    merged_BT[:, from_second_T] = second_BT[:, position_T[from_second_T] - half]
    return merged_BT
