"""What the last level reads, and the bytes that its rows draw, on a GPU in one kernel each (Triton)."""

# Shapes: B rows, P bytes of a patch, D width, L elements of a row, R bytes of a round, V = 256.

import triton
import triton.language as tl
from torch import Tensor, empty_like
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from core.kernels.fused import launch


def begin(
    positions_B: Tensor, patch_bytes_BP: Tensor, embedding: Tensor, pad: Tensor, learned: Tensor | None,
    parent_BLD: Tensor | None, row_length: int, shows_pad_once: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the Transformer of the last level reads at these positions, `(B, D)`, and its slots, int64 `(B,)`."""
    num_rows, dim = len(positions_B), len(pad)
    x_BD, slots_B = pad.new_empty(num_rows, dim), empty_like(positions_B)
    _begin[(num_rows,)](
        positions_B,
        patch_bytes_BP,
        embedding,
        pad,
        pad if learned is None else learned,
        pad if parent_BLD is None else parent_BLD,
        x_BD,
        slots_B,
        patch_bytes_BP.shape[1],
        row_length,
        dim,
        HAS_LEARNED=learned is not None,
        HAS_PARENT=parent_BLD is not None,
        SHOWS_PAD_ONCE=shows_pad_once,
        COLUMNS=triton.next_power_of_2(dim),
        **launch(pad.device),
    )
    return x_BD, slots_B


def draw(
    parts: Tensor, softcap: float, logits_BV: Tensor, positions_B: Tensor, patch_bytes_BP: Tensor, started_B: Tensor,
    uniforms_BR: Tensor, given_BR: Tensor, temperature_B1: Tensor, bytes_BR: Tensor, bits_BR: Tensor,
) -> None:  # fmt: skip
    """Draws and appends a byte of every row by the law of its logits, the sum of the parts `(parts, B, V)`, without filters."""
    num_parts, num_rows, num_values = parts.shape
    _draw[(num_rows,)](
        parts,
        softcap,
        logits_BV,
        positions_B,
        patch_bytes_BP,
        started_B,
        uniforms_BR,
        given_BR,
        temperature_B1,
        bytes_BR,
        bits_BR,
        num_rows,
        patch_bytes_BP.shape[1],
        given_BR.shape[1],
        HAS_CAP=softcap > 0,
        NUM_PARTS=num_parts,
        VALUES=num_values,
        **launch(parts.device),
    )


@triton.jit
def _begin(
    positions_ptr, bytes_ptr, embedding_ptr, pad_ptr, learned_ptr, parent_ptr, out_ptr, slots_ptr,
    patch_size, row_length, dim,
    HAS_LEARNED: tl.constexpr, HAS_PARENT: tl.constexpr, SHOWS_PAD_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    element = out_ptr.dtype.element_ty
    column = tl.arange(0, COLUMNS)
    is_column = column < dim
    position = tl.load(positions_ptr + row)
    in_row = position % row_length
    byte = tl.load(bytes_ptr + row * patch_size + (position + patch_size - 1) % patch_size)
    shows_pad = position == 0 if SHOWS_PAD_ONCE else in_row == 0
    pad = tl.load(pad_ptr + column, mask=is_column, other=0.0)
    x = tl.where(shows_pad, pad, tl.load(embedding_ptr + byte * dim + column, mask=is_column, other=0.0)).to(tl.float32)
    if HAS_LEARNED:
        x += tl.load(learned_ptr + in_row * dim + column, mask=is_column, other=0.0).to(tl.float32)
        x = x.to(element).to(tl.float32)
    if HAS_PARENT:
        x += tl.load(parent_ptr + (row * row_length + in_row) * dim + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * dim + column, x.to(element), mask=is_column)
    tl.store(slots_ptr + row, in_row)


@triton.jit
def _draw(
    parts_ptr, softcap, logits_ptr, positions_ptr, patch_bytes_ptr, started_ptr,
    uniforms_ptr, given_ptr, temperature_ptr, bytes_ptr, bits_ptr, num_rows, patch_size, round_size,
    HAS_CAP: tl.constexpr, NUM_PARTS: tl.constexpr, VALUES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    value = tl.arange(0, VALUES)
    logits = tl.load(parts_ptr + row * VALUES + value)
    for part in tl.static_range(1, NUM_PARTS):
        logits += tl.load(parts_ptr + (part * num_rows + row) * VALUES + value)
    if HAS_CAP:
        logits = softcap * (2.0 / (1.0 + tl.exp(-2.0 * (logits / softcap))) - 1.0)
    tl.store(logits_ptr + row * VALUES + value, logits)
    wide = logits.to(tl.float64)
    highest = tl.max(wide, axis=0)
    temperature = tl.load(temperature_ptr + row)
    weights = tl.exp((wide - highest) / temperature)
    cumulated = tl.cumsum(weights, axis=0)
    position = tl.load(positions_ptr + row)
    place = row * round_size + position - tl.load(started_ptr + row)
    threshold = tl.load(uniforms_ptr + place) * tl.max(cumulated, axis=0)
    drawn = tl.sum((cumulated <= threshold).to(tl.int32), axis=0)
    drawn = tl.minimum(drawn, tl.max(tl.where(weights > 0, value, 0), axis=0))
    likeliest = tl.min(tl.where(wide == highest, value, VALUES), axis=0)
    given = tl.load(given_ptr + place).to(tl.int32)
    chosen = tl.where(given >= 0, given, tl.where(temperature == 0, likeliest, drawn))
    nats = tl.log(tl.sum(tl.exp(wide - highest), axis=0)) + highest - tl.sum(tl.where(value == chosen, wide, 0.0), axis=0)
    tl.store(bytes_ptr + place, chosen.to(tl.int64))
    tl.store(bits_ptr + place, (nats * 1.4426950408889634).to(tl.float32))
    tl.store(patch_bytes_ptr + row * patch_size + position % patch_size, chosen.to(tl.int64))
    tl.store(positions_ptr + row, position + 1)
