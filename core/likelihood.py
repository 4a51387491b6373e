"""How likely every byte of a stream is, in bits: windows, hop, strided inference, totals.

The only place where nats become bits. A stream longer than the context is read in windows. They start every `hop` bytes;
each byte is scored once, by the first window that holds it, so a hop below the window gives every later byte at
least window - hop bytes of context.

Strided inference (arXiv 2305.07185, section 2.3) reads each window a second time, half a patch later, and takes each byte
from the pass in which it lies in the first half of its patch, because loss rises towards the end of a patch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import ImageCodecConfig
from core.errors import UserError
from core.models import ByteModel

# Small on a CPU: what one layer writes should still be in its cache when the next one reads it.
_BYTES_PER_BATCH = {"cpu": 1 << 13, "cuda": 1 << 20}


@dataclass(frozen=True)
class Score:
    """Information content of a stream under a model.

    Attributes:
        bits: -log2 p(byte | bytes before it) of every byte, float32 `(T,)`.
        num_bytes: bytes counted; fewer than T where tiles of a picture overlap.
        total_bits: their sum, in float64.
        window, hop: bytes; strided: whether a second pass was made.
        engine: what computed it.
    """

    bits: np.ndarray
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
    progress: Callable[[int], None] | None = None,
) -> Score | list[Score]:
    """Scores one stream of bytes, or many together.

    Args:
        streams: uint8 `(T,)` or bytes; or a sequence of them, for a list of scores.
        window: bytes read at once; 0 stands for the model's context.
        hop: bytes from one window's start to the next; 0 stands for `window`, disjoint windows.
        strided: read everything twice, half a patch apart.
        counted: for each stream a bool mask `(T,)` of the bytes that enter its totals; None counts all.
        progress: called with the number of bytes done since the last call.

    Raises:
        UserError: if a stream is no bytes, or window, hop or strided do not fit the model.
    """
    if isinstance(streams, (np.ndarray, bytes, bytearray, str)):
        masks = None if counted is None else [counted]
        return score(model, [streams], window=window, hop=hop, strided=strided, counted=masks, progress=progress)[0]
    window, hop = checked_windows(model, window, hop, strided)
    arrays = [as_stream(stream) for stream in streams]
    bits = [np.zeros(len(array), dtype=np.float32) for array in arrays]
    todo = [w for index, array in enumerate(arrays) for w in split_windows(len(array), window, hop, index)]
    device = next(model.parameters()).device
    for batch in _batches(todo, _BYTES_PER_BATCH.get(device.type, 1 << 13)):
        byte_ids_BT = _stack(arrays, batch).to(device)
        bits_BT = bits_of(model, byte_ids_BT)
        if strided:
            bits_BT = _take_first_halves(bits_BT, bits_of(model, byte_ids_BT[:, model.config.patch_size // 2 :]), model)
        bits_BT = bits_BT.cpu().numpy()
        for row, w in zip(bits_BT, batch, strict=True):
            bits[w.stream][w.first_scored : w.end] = row[w.first_scored - w.start : w.end - w.start]
        if progress is not None:
            progress(sum(w.end - w.first_scored for w in batch))
    masks = counted if counted is not None else [None] * len(arrays)
    kept = [values if mask is None else values[mask] for values, mask in zip(bits, masks, strict=True)]
    return [
        Score(
            bits=values,
            num_bytes=len(kept_values),
            total_bits=float(kept_values.sum(dtype=np.float64)),
            window=window,
            hop=hop,
            strided=strided,
            engine=engine_name(device, autocast=True),
        )
        for values, kept_values in zip(bits, kept, strict=True)
    ]


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
    """-log2 p of every byte `(B, T)`, float32, each row read from its beginning."""
    with torch.autocast(byte_ids_BT.device.type, dtype=torch.bfloat16, enabled=byte_ids_BT.is_cuda):
        logits_BTV = model(byte_ids_BT)
    return nats_to_bits(nll(logits_BTV, byte_ids_BT))


def nll(logits_BTV: Tensor, byte_ids_BT: Tensor) -> Tensor:
    """-ln p of every byte `(B, T)`, float32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), byte_ids_BT.flatten(), reduction="none").view_as(byte_ids_BT)


def nats_to_bits(nats):
    return nats / log(2)


def checked_windows(model: ByteModel, window: int, hop: int, strided: bool) -> tuple[int, int]:
    """`window` and `hop` with their defaults filled in.

    Raises:
        UserError: if they do not fit the model.
    """
    context = model.config.max_seq_len
    window = window or context
    hop = hop or window
    if not 1 <= window <= context:
        raise UserError(f"window={window} bytes must lie in 1..{context}, the model's context")
    if not 1 <= hop <= window:
        raise UserError(f"hop={hop} bytes must lie in 1..{window}, the window")
    is_picture = isinstance(model.codec_config, ImageCodecConfig)
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


def engine_name(device: torch.device, autocast: bool) -> str:
    """What a result was computed with: `torch-fp32` on a CPU, `cuda-bf16` or `cuda-fp32` on a GPU."""
    if device.type == "cpu":
        return "torch-fp32"
    return f"{device.type}-{'bf16' if autocast else 'fp32'}"


def _batches(windows: list[Window], bytes_per_batch: int) -> Iterator[list[Window]]:
    """Windows of about one length together, longest first, so that little is padding."""
    batch: list[Window] = []
    for w in sorted(windows, key=lambda w: w.start - w.end):
        if batch and (len(batch) + 1) * (batch[0].end - batch[0].start) > bytes_per_batch:
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
