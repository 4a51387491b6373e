"""MegaByte, the multiscale byte Transformer (Yu et al., arXiv 2305.07185).

A large *global* model reads patches of P bytes, a small *local* model predicts the bytes inside each patch:

    h_embed[t]      = E_global[x_t] + E_pos[t]                                              (Eq. 1, patch embedder)
    h_global_in[k]  = E_global_pad if k = 0 else concat(h_embed[(k-1)P : kP])               (Eq. 2)
    h_global_out    = Transformer_global(h_global_in)                                       (Eq. 3)
    h_local_in[k,p] = W_GL h_global_out[k, slice p] + (E_local_pad if p = 0 else E_local[x_(kP+p-1)])   (Eq. 4)
    h_local_out[k]  = Transformer_local(h_local_in[k])                                      (Eq. 5)
    p(x_t | x_<t)   = softmax(E_local h_local_out[k, p]),  t = kP + p                       (Eq. 6)

The same three steps (shift the own elements by one, add what the parent says, run a causal Transformer) make any number
of levels. `levels[0]` is the paper's Global, `levels[-1]` its Local; with a single level this is the flat byte Transformer.

Where the paper leaves a choice: pads are trainable (as in its Fig. 2), levels below the first have learned positions
inside the patch, Transformers are pre-norm with a final norm. Its section 2.3 gives the options: a causal convolutional
patch encoder and cross-patch attention. Ours: rotary positions, a projecting patch embedder and a full un-embedder for
widths that do not divide by P, the real previous byte (instead of the pad) at the start of a patch, and what later
Transformers found worth its cost: squared ReLU, normalised queries and keys, residual scalars, softly capped logits.
"""

# Shapes: B batch, T bytes, N elements of a level (T / span), K rows, L elements of a row, P children, D width, V = 256.

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.arena import zeros
from core.cache import Cache, LevelCache
from core.config import NUM_BYTE_VALUES, CodecConfig, MegaByteConfig
from core.models.layers import Slots, Transformer, cpu_kernels, init_matrices, truncated_normal
from core.models.loss import Chunk, Measure, chunk_bytes, plan_chunks
from core.models.patches import PatchEmbedder, Unembedder


class Level(nn.Module):
    """One level: embeds its own elements, shifts them by one, adds the parent's word and runs a causal Transformer."""

    has_kernels = False  # as attention's

    def __init__(self, config: MegaByteConfig, index: int) -> None:
        super().__init__()
        own = config.levels[index]
        self.config = own
        self.is_top = index == 0
        self.span = config.span(index)
        # Level 0 is a single row, the whole sequence; below, a row is the children of one parent element.
        self.row_length = config.max_seq_len // self.span if self.is_top else config.levels[index - 1].patch_size
        self.real_previous = config.real_previous
        learned = config.has_learned_positions
        self.embedder = PatchEmbedder(own, self.span, config.max_seq_len if learned and self.is_top else 0)
        self.pad = nn.Parameter(torch.empty(own.dim))
        self.positions = nn.Parameter(torch.empty(self.row_length, own.dim)) if learned and not self.is_top else None
        self.transformer = Transformer(own, self.row_length, config)
        children = config.levels[index + 1 : index + 2]
        self.unembedder = Unembedder(own, children[0].dim, config.unembedder) if children else nn.Identity()

    @property
    def rows_of_past(self) -> int:
        """How many rows before its own a row depends on, by its memory in every layer and by its previous element."""
        return (self.config.num_layers if self.transformer.memory else 0) + int(self.real_previous)

    def forward(
        self, byte_ids_BT: Tensor, from_parent_BND: Tensor | None, cache: LevelCache | None = None, recompute: bool = False
    ) -> Tensor:
        """The level's elements `(B, N, D)`; each has seen the elements before it, nothing of itself.

        With `recompute` the backward pass runs each layer again instead of keeping what is inside it.
        """
        row_length = self.row_length if not self.is_top else byte_ids_BT.shape[1] // self.span
        x_BND = self._read_by_kernels(byte_ids_BT, from_parent_BND) if cache is None else None
        if x_BND is None:
            x_BND = self._read(byte_ids_BT, from_parent_BND, cache, row_length)
        x_BKLD = rearrange(x_BND, "b (k l) d -> b k l d", l=row_length)
        return rearrange(self.transformer(x_BKLD, cache, recompute), "b k l d -> b (k l) d")

    def _read(self, byte_ids_BT: Tensor, from_parent_BND: Tensor | None, cache: LevelCache | None, row_length: int) -> Tensor:
        """What goes into the Transformer, `(B, N, D)`: the elements before, positions and what parents say (Eq. 2, 4)."""
        x_BKLD = rearrange(self._shifted_elements(byte_ids_BT, cache), "b (k l) d -> b k l d", l=row_length)
        if not self.is_top and not self.real_previous:
            pads = self.pad.expand(*x_BKLD.shape[:2], 1, -1).to(x_BKLD.dtype)
            x_BKLD = torch.cat((pads, x_BKLD[:, :, 1:]), dim=2)
        if self.positions is not None:
            x_BKLD = x_BKLD + self.positions
        x_BND = rearrange(x_BKLD, "b k l d -> b (k l) d")
        return x_BND if from_parent_BND is None else x_BND + from_parent_BND

    def _read_by_kernels(self, byte_ids_BT: Tensor, from_parent_BND: Tensor | None) -> Tensor | None:
        """The same in one pass and rounded, where elements are bytes and a kernel takes them; None elsewhere.

        Raises:
            IndexError: if there is no such byte.
        """
        kernels = cpu_kernels(self, from_parent_BND) if self.span == 1 and from_parent_BND is not None else None
        if kernels is None:
            return None
        if byte_ids_BT.numel() and (byte_ids_BT.min() < 0 or byte_ids_BT.max() >= NUM_BYTE_VALUES):
            raise IndexError(f"byte values lie in 0..{NUM_BYTE_VALUES - 1}, not in {byte_ids_BT.min()}..{byte_ids_BT.max()}")
        before_BT = F.pad(byte_ids_BT[:, :-1].long(), (1, 0), value=-1)
        if not self.real_previous:
            before_BT[:, :: self.row_length] = -1
        return kernels.embedded(
            before_BT, self.embedder.embedding.weight, self.pad, self.positions, from_parent_BND, self.row_length
        )

    def _shifted_elements(self, byte_ids_BT: Tensor, cache: LevelCache | None) -> Tensor:
        """The pad, then the embedded elements but the last one, which is nobody's past (Eq. 2)."""
        past_BT = byte_ids_BT[:, : byte_ids_BT.shape[1] - self.span]
        elements_BND = self.embedder(past_BT, conv_tails=None if cache is None else cache.conv_tails)
        return torch.cat((self.pad.expand(len(byte_ids_BT), 1, -1).to(elements_BND.dtype), elements_BND), dim=1)

    def step(self, cache: Cache, level_cache: LevelCache, positions: list[int]) -> Tensor:
        """What the element that begins at `positions` (of all rows, with one phase) says to its children `(B, P, D_child)`."""
        in_row = max(positions) // self.span % self.row_length
        if not self.is_top and in_row == 0 and max(positions) > 0:
            self.transformer.begin_row(level_cache)
        x_BD = self._element_before(cache, level_cache, positions, in_row)
        if self.positions is not None:
            x_BD = x_BD + self.positions[in_row]
        if level_cache.from_parent_BLD is not None:
            x_BD = x_BD + level_cache.from_parent_BLD[:, in_row]
        x_BD = self.transformer.step(x_BD, level_cache, self._slots(level_cache, positions, in_row))
        return self.unembedder(x_BD[:, None])

    def new_cache(self, batch_size: int, max_seq_len: int, device: torch.device) -> LevelCache:
        own, dtype = self.config, self.pad.dtype
        num_elements = max_seq_len // self.span if self.is_top else self.row_length
        shape = (own.num_layers, batch_size, own.num_heads, own.cross_patch + num_elements, own.head_dim)
        byte_dim = self.embedder.embedding.embedding_dim
        # Zeros: a masked slot still enters a product with weight 0, so it must be finite.
        keys, values = zeros((2, *shape), dtype, device)
        return LevelCache(
            keys=keys,
            values=values,
            from_parent_BLD=None
            if self.is_top
            else torch.zeros(batch_size, self.row_length, own.dim, dtype=dtype, device=device),
            conv_tails=[
                torch.zeros(batch_size, conv.tail_length, byte_dim, dtype=dtype, device=device) for conv in self.embedder.convs
            ],
            memory=own.cross_patch,
        )

    def flops_per_element(self, num_elements: int) -> float:
        """Forward FLOPs (two per multiply-add) of one element, averaged over a row or a sequence of `num_elements`."""
        own = self.config
        keys = (num_elements + 1) / 2 if self.is_top else (self.row_length + 1) / 2 + own.cross_patch
        multiplies = own.num_layers * (4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * own.dim * keys)
        matrices = (parameter for parameter in self.embedder.project.parameters() if parameter.ndim > 1)
        multiplies += sum(matrix.numel() for matrix in matrices)
        multiplies += self.span * sum(conv.conv.weight.numel() for conv in self.embedder.convs)
        if isinstance(self.unembedder, Unembedder):
            times = own.patch_size if self.unembedder.slices else 1
            multiplies += times * self.unembedder.project.weight.numel()
        return 2 * multiplies

    def _element_before(self, cache: Cache, level_cache: LevelCache, positions: list[int], in_row: int) -> Tensor:
        """The shifted own input: the embedding of the element before, or the pad where there is none to show."""
        newest = max(positions)
        pad_BD = self.pad.expand(len(positions), -1)
        at_patch_start = not self.is_top and in_row == 0 and not self.real_previous
        if newest == 0 or (at_patch_start and not self.embedder.convs):
            return pad_BD
        end = newest % cache.patch_size or cache.patch_size
        last_bytes = cache.patch_bytes_BP[:, end - self.span : end]
        start: int | Tensor = newest - self.span
        if min(positions) < newest:
            start = (cache.positions_B - self.span).clamp(min=0).to(last_bytes.device)
        x_BD = self.embedder(last_bytes, start, level_cache.conv_tails)[:, 0]
        if min(positions) == 0:
            is_empty_B = (cache.positions_B == 0).to(x_BD.device)
            x_BD = torch.where(is_empty_B[:, None], pad_BD, x_BD)
            for tail in level_cache.conv_tails:
                tail[is_empty_B] = 0
        return pad_BD if at_patch_start else x_BD

    def _slots(self, level_cache: LevelCache, positions: list[int], in_row: int) -> Slots:
        """Where the new element is kept and what it attends to; a mask only if the rows differ."""
        oldest, newest = min(positions), max(positions)
        if self.is_top:
            if oldest == newest:
                return Slots.same(in_row)
            return Slots.per_row(torch.tensor(positions, device=level_cache.keys.device) // self.span)
        slot, patch = level_cache.memory + in_row, self.span * self.row_length
        if newest < patch:
            return Slots.same(slot, first=level_cache.memory)
        if oldest >= patch:
            return Slots.same(slot)
        has_memory_B = torch.tensor(positions, device=level_cache.keys.device) >= patch
        slots_S = torch.arange(slot + 1, device=has_memory_B.device)
        return Slots.same(slot, mask_BS=(slots_S >= level_cache.memory) | has_memory_B[:, None])


class MegaByte(nn.Module):
    """A `core.models.ByteModel`: `logits[:, t]` is the law of byte t given the bytes before t."""

    has_kernels = False  # as attention's

    def __init__(self, config: MegaByteConfig) -> None:
        super().__init__()
        self.config = config
        self.codec_config: CodecConfig | None = None
        self.levels = nn.ModuleList(Level(config, index) for index in range(len(config.levels)))
        has_memory = [bool(level.cross_patch or level.conv_kernels) for level in config.levels]
        # Deeper levels begin each patch afresh unless they look across patches or convolve.
        self._num_levels_with_past = max([1] + [index + 1 for index, memory in enumerate(has_memory) if memory])
        init_matrices(self, config.init_std)
        for level in self.levels:
            self._init_level(level)

    def forward(self, byte_ids_BT: Tensor) -> Tensor:
        """Logits `(B, T, V)` in float32 of byte values `(B, T)`, any T from 0 to the context.

        Raises:
            ValueError: if T exceeds the context.
        """
        num_bytes = byte_ids_BT.shape[1]
        whole_BT = self._whole_patches(byte_ids_BT)
        if num_bytes == 0:
            return self.levels[-1].pad.new_zeros(len(byte_ids_BT), 0, NUM_BYTE_VALUES, dtype=torch.float32)
        h_BND = None
        for level in self.levels:
            h_BND = level.unembedder(level(whole_BT, h_BND))
        return self.to_logits(h_BND[:, :num_bytes])

    def measure(self, byte_ids_BT: Tensor, of_logits: Measure, recompute: bool = False) -> dict[str, Tensor]:
        """What `of_logits` says of every byte, from `forward`'s logits, but never with all of them at once.

        The coarse levels run once over the whole sequence, the last level and `of_logits` chunk by chunk, so that memory
        grows with the patches rather than with the bytes.

        Args:
            byte_ids_BT: byte values, any T from 0 to the context.
            of_logits: takes logits `(B, L, V)` and the byte values `(B, L)` they predict; gives tensors `(B, L, ...)` by name.
            recompute: keep for the backward pass only what goes into each coarse layer and each chunk, and run them again.

        Raises:
            ValueError: if T exceeds the context.
        """
        whole_BT = self._whole_patches(byte_ids_BT)
        if byte_ids_BT.numel() == 0:
            return of_logits(self.forward(byte_ids_BT), byte_ids_BT)
        *coarse, finest = self.levels
        h_BND = None
        for index, level in enumerate(coarse):
            h_BND = level(whole_BT, coarse[index - 1].unembedder(h_BND) if index else None, recompute=recompute)
        if not coarse:
            h_BND = finest(whole_BT, None, recompute=recompute)
        row = finest.row_length if coarse else 1
        past = row * finest.rows_of_past if coarse else 0

        def measure_chunk(chunk: Chunk) -> dict[str, Tensor]:
            out_BLD = h_BND[chunk.sequences, chunk.first // row : chunk.end // row]
            if coarse:
                out_BLD = finest(whole_BT[chunk.sequences, chunk.first : chunk.end], coarse[-1].unembedder(out_BLD))
            logits_BLV = self.to_logits(out_BLD[:, chunk.start - chunk.first :])
            return of_logits(logits_BLV, whole_BT[chunk.sequences, chunk.start : chunk.end])

        run = partial(checkpoint, measure_chunk, use_reentrant=False) if recompute else measure_chunk
        plan = plan_chunks(*whole_BT.shape, row, past, chunk_bytes(whole_BT.device, recompute))
        found: dict[str, Tensor] = {}
        for chunk in (chunk for group in plan for chunk in group):
            for name, values in run(chunk).items():
                # Room for all: what a chunk leaves behind would lie between the memory of the next ones and keep it apart.
                if name not in found:
                    found[name] = values.new_empty(*whole_BT.shape, *values.shape[2:])
                found[name][chunk.sequences, chunk.start : chunk.end] = values
        return {name: values[:, : byte_ids_BT.shape[1]] for name, values in found.items()}

    def new_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """Buffers for `batch_size` sequences of up to `max_seq_len` bytes (rounded up to whole coarsest patches).

        Raises:
            ValueError: if batch_size < 1 or max_seq_len exceeds the context.
        """
        return self._new_cache(batch_size, max_seq_len, self.levels[-1].pad.device)

    @torch.no_grad()
    def prefill(self, byte_ids_BT: Tensor, cache: Cache) -> Tensor:
        """Starts the cache's sequences with byte values `(B, T)`, T >= 0; logits `(B, V)` of the byte after them.

        Whole patches are read in parallel, the rest byte by byte.

        Raises:
            ValueError: if B is not the cache's, or no room is left for a byte after them.
        """
        num_bytes = byte_ids_BT.shape[1]
        cache.require_room(byte_ids_BT)
        num_whole = num_bytes - num_bytes % self.config.patch_size
        self.read_patches(byte_ids_BT[:, :num_whole], cache)
        logits_BV = self._predict(cache)
        for t in range(num_whole, num_bytes):
            logits_BV = self.step(byte_ids_BT[:, t], cache)
        return logits_BV

    @torch.no_grad()
    def read_patches(self, byte_ids_BT: Tensor, cache: Cache) -> None:
        """Starts the cache's sequences with whole patches, T >= 0, and predicts nothing: an engine that steps itself does."""
        cache.reset()
        if byte_ids_BT.shape[1]:
            self._read_patches(byte_ids_BT, cache)

    @torch.no_grad()
    def step(self, byte_ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one byte to each row; logits `(B, V)` of the next one.

        Raises:
            ValueError: if the cache is full, or its rows stand at different places inside a patch.
        """
        cache.append(byte_ids_B)
        return self._predict(cache)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_byte(self, num_bytes: int) -> float:
        """Forward FLOPs per byte of a sequence of `num_bytes`, two per multiply-add, attention included."""
        total = 2.0 * NUM_BYTE_VALUES * self.levels[-1].config.dim
        for level in self.levels:
            total += level.flops_per_element(-(-num_bytes // level.span)) / level.span
        return total

    def cache_bytes(self, batch_size: int, max_seq_len: int) -> int:
        """Memory of `new_cache(batch_size, max_seq_len)`, without making it."""
        return self._new_cache(batch_size, max_seq_len, torch.device("meta")).num_bytes

    def _new_cache(self, batch_size: int, max_seq_len: int, device: torch.device) -> Cache:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 1 <= max_seq_len <= self.config.max_seq_len:
            raise ValueError(f"max_seq_len={max_seq_len} must lie in 1..{self.config.max_seq_len}, the model's context")
        patch_size = self.config.patch_size
        max_seq_len = -(-max_seq_len // patch_size) * patch_size
        return Cache(
            levels=[level.new_cache(batch_size, max_seq_len, device) for level in self.levels],
            patch_bytes_BP=torch.zeros(batch_size, patch_size, dtype=torch.int64, device=device),
            positions_B=torch.zeros(batch_size, dtype=torch.int64),
            woken_B=torch.full((batch_size,), -1),
            max_seq_len=max_seq_len,
        )

    def _whole_patches(self, byte_ids_BT: Tensor) -> Tensor:
        """The bytes and what fills their last patch: it comes after all others, so no prediction that is kept can see it.

        Raises:
            ValueError: if there are more bytes than the context holds.
        """
        num_bytes = byte_ids_BT.shape[1]
        if num_bytes > self.config.max_seq_len:
            raise ValueError(f"{num_bytes} bytes exceed the model's context of {self.config.max_seq_len}; score them in windows")
        return F.pad(byte_ids_BT, (0, -num_bytes % self.config.patch_size))

    def _read_patches(self, byte_ids_BT: Tensor, cache: Cache) -> None:
        """Leaves the cache as after stepping through these whole patches, just before the next one begins."""
        h_BND, read_BT = None, byte_ids_BT
        for index, (level, level_cache) in enumerate(zip(self.levels[: self._num_levels_with_past], cache.levels, strict=False)):
            if index and level is self.levels[-1]:
                # The cache keeps the last row alone.
                num_rows = 1 + level.rows_of_past
                h_BND, read_BT = h_BND[:, -num_rows:], byte_ids_BT[:, -num_rows * level.row_length :]
            from_parent_BND = self.levels[index - 1].unembedder(h_BND) if index else None
            h_BND = level(read_BT, from_parent_BND, level_cache)
        cache.patch_bytes_BP.copy_(byte_ids_BT[:, -self.config.patch_size :])
        cache.positions_B.fill_(byte_ids_BT.shape[1])

    def _predict(self, cache: Cache) -> Tensor:
        """Wakes every level whose next element begins at the cache's positions; logits `(B, V)` of that byte."""
        positions = cache.positions_B.tolist()
        children = [*cache.levels[1:], None]
        for level, level_cache, child_cache in zip(self.levels, cache.levels, children, strict=True):
            if positions[0] % level.span:
                continue
            to_children_BLD = level.step(cache, level_cache, positions)
            if child_cache is not None:
                child_cache.from_parent_BLD.copy_(to_children_BLD)
        cache.woken_B.copy_(cache.positions_B)
        return self.to_logits(to_children_BLD[:, 0])

    def to_logits(self, h: Tensor) -> Tensor:
        """Eq. 6: the output matrix is the last level's byte embedding."""
        # fp32: bf16 keeps 8 significant bits, too few for a per-byte likelihood that is summed over a whole file.
        is_mixed = torch.is_autocast_enabled(h.device.type)  # entering it for nothing takes as long as a layer's norm
        kernels = cpu_kernels(self, h)
        with torch.autocast(h.device.type, enabled=False) if is_mixed else nullcontext():
            weight = self.levels[-1].embedder.embedding.weight.float()
            logits = F.linear(h.float(), weight) if kernels is None else kernels.logits(h, weight)
            cap = self.config.logit_softcap
            return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def _init_level(self, level: Level) -> None:
        """What lies outside the matrices, and the options that begin some of them otherwise than the paper's A.1 does."""
        config = self.config
        for parameter in (level.pad, level.positions):
            if parameter is not None:
                truncated_normal(parameter, config.init_std)
        for block in level.transformer.blocks if config.zero_init else ():
            for linear in (block.attention.out, block.ffn_out):
                nn.init.zeros_(linear.weight)
        if level.transformer.residual_scalars is not None:
            level.transformer.residual_scalars.copy_(torch.tensor([1.0, 0.0]))
        embedding = level.embedder.embedding.weight
        if config.smooth_init and not embedding.is_meta:
            embedding.copy_(config.init_std * _smooth_functions(NUM_BYTE_VALUES, embedding.shape[1]))


def _smooth_functions(num_values: int, num_functions: int) -> Tensor:
    """Random functions `(num_values, num_functions)` of a number, of unit variance, most of it in low frequencies.

    Pixels and samples are numbers: 127 and 128 should not have to be found alike.
    """
    phase = torch.arange(num_values) / num_values * math.pi
    waves = torch.stack([torch.cos(k * phase) / k**0.5 for k in range(1, num_values // 4 + 1)], dim=1)
    functions = waves @ torch.randn(waves.shape[1], num_functions)
    return functions / functions.std(dim=0, keepdim=True)
