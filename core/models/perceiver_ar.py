"""Perceiver AR (Hawthorne et al., arXiv 2202.07765): long context at the price of predicting only its last N bytes.

One causal cross-attention lets the last N positions, the *latents*, look at the whole context; a causal Transformer then
works on the latents alone. A sequence of T bytes costs O(T N) in the first layer and O(N^2) in all others, but a forward
pass gives the laws of its last S = min(T, N) bytes only.

    inputs[0] = pad,  inputs[t] = E[x_(t-1)]                      (the shift lives here)
    latents   = cross_attention(last S inputs -> all inputs)      (causal: a latent sees no input after its own)
    p(x_t)    = softmax(E Transformer(latents))                   (tied output)

Positions are rotary, by the place in the context for the cross-attention and by the place among the latents after it;
learned vectors may be added, for pictures. Departures: one norm serves queries and keys of the cross-attention, because
both are made from the same inputs, and inputs are not dropped at random in training.

Decoding. Latents are kept, so that a byte costs one latent. When N are in use, those of the newest N / 2 positions are
computed again and the others dropped; the keys and values of the cross-attention stay. Which position is the first latent
follows from the byte's position alone (`first_latent`), so a byte's law does not depend on where a prompt ended. Up to N
bytes it is the law of `forward`; after them it is that of the `forward` whose latents begin there.
"""

# Shapes: B batch, T bytes, S latents, D width, H heads, C channels per head, V = 256.

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.cache import Cache, LevelCache
from core.config import NUM_BYTE_VALUES, CodecConfig, LevelConfig, MegaByteConfig, PerceiverArConfig
from core.models.layers import Rotary, Rotation, Slots, Transformer, attend, init_matrices, linear_relu, rotate, truncated_normal
from core.models.loss import Measure


class CrossBlock(nn.Module):
    """The layer in which latents look at all inputs: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: PerceiverArConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, inputs_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their places, and values `(B, H, T, C)`."""
        normed_BTD = self.attention_norm(inputs_BTD)
        return rotate(self._heads(self.key(normed_BTD)), rotation), self._heads(self.value(normed_BTD))

    def forward(self, inputs_BSD: Tensor, keys_BHTC: Tensor, values_BHTC: Tensor, rotation: Rotation) -> Tensor:
        """Latents of the last S of T positions, each having seen the keys up to its own."""
        num_latents, num_keys = inputs_BSD.shape[1], keys_BHTC.shape[2]
        q_BHSC = self._heads(self.query(self.attention_norm(inputs_BSD)))
        mask = None  # attend's own causal mask, which takes as many keys as queries
        if num_latents < num_keys:
            mask = torch.ones(num_latents, num_keys, dtype=torch.bool, device=q_BHSC.device).tril(num_keys - num_latents)
        attended_BHSC = attend(rotate(q_BHSC, rotation), keys_BHTC, values_BHTC, mask)
        x_BSD = inputs_BSD + self.dropout(self.out(rearrange(attended_BHSC, "b h s c -> b s (h c)")))
        return x_BSD + self.dropout(self.ffn_out(linear_relu(self.ffn_norm(x_BSD), self.ffn_in)))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return rearrange(x_BTD, "b t (h c) -> b h t c", h=self.num_heads)


class PerceiverAr(nn.Module):
    """A `core.models.ByteModel` whose `forward` gives the laws of the last S = min(T, num_latents) bytes."""

    def __init__(self, config: PerceiverArConfig) -> None:
        super().__init__()
        self.config = config
        self.codec_config: CodecConfig | None = None
        self.embedding = nn.Embedding(NUM_BYTE_VALUES, config.dim)
        self.positions = nn.Embedding(config.max_seq_len, config.dim) if config.positions == "both" else None
        self.pad = nn.Parameter(torch.empty(config.dim))
        self.rotary = Rotary(config.head_dim, config.max_seq_len)
        self.cross = CrossBlock(config)
        level = LevelConfig(dim=config.dim, num_layers=config.num_layers, num_heads=config.num_heads, ffn_dim=config.ffn_dim)
        stack = MegaByteConfig(levels=(level,), max_seq_len=config.num_latents, positions="rotary", dropout=config.dropout)
        self.latent_transformer = Transformer(level, config.num_latents, stack)
        init_matrices(self, config.init_std)
        truncated_normal(self.pad, config.init_std)
        branches = [self.cross.out, self.cross.ffn_out]
        branches += [linear for block in self.latent_transformer.blocks for linear in (block.attention.out, block.ffn_out)]
        for linear in branches:
            truncated_normal(linear.weight, config.init_std / len(branches) ** 0.5)

    def forward(self, byte_ids_BT: Tensor, recompute: bool = False) -> Tensor:
        """Logits `(B, S, V)`, float32, of the last S = min(T, num_latents) of byte values `(B, T)`.

        With `recompute` the backward pass runs each layer on the latents again instead of keeping what is inside it.

        Raises:
            ValueError: if T exceeds the context.
        """
        num_bytes = byte_ids_BT.shape[1]
        if num_bytes > self.config.max_seq_len:
            raise ValueError(f"{num_bytes} bytes exceed the model's context of {self.config.max_seq_len}; score them in windows")
        if num_bytes == 0:
            return self.pad.new_zeros(len(byte_ids_BT), 0, NUM_BYTE_VALUES, dtype=torch.float32)
        inputs_BTD = self._inputs(byte_ids_BT[:, :-1], 0)  # the last byte is nobody's past
        keys, values = self.cross.keys_values(inputs_BTD, self.rotary(slice(0, num_bytes)))
        first = num_bytes - self.config.num_predicted(num_bytes)
        return self._to_logits(self._latents(inputs_BTD[:, first:], first, keys, values, recompute=recompute))

    def measure(self, byte_ids_BT: Tensor, of_logits: Measure, recompute: bool = False) -> dict[str, Tensor]:
        """What `of_logits` says of the logits of `forward` and of the S bytes they predict."""
        logits_BSV = self.forward(byte_ids_BT, recompute)
        return of_logits(logits_BSV, byte_ids_BT[:, byte_ids_BT.shape[1] - logits_BSV.shape[1] :])

    def new_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """Buffers for `batch_size` sequences of up to `max_seq_len` bytes, which must all stand at the same byte.

        Raises:
            ValueError: if batch_size < 1 or max_seq_len exceeds the context.
        """
        return self._new_cache(batch_size, max_seq_len, self.pad.device)

    @torch.no_grad()
    def prefill(self, byte_ids_BT: Tensor, cache: Cache) -> Tensor:
        """Starts the cache's sequences with byte values `(B, T)`, T >= 0; logits `(B, V)` of the byte after them.

        Raises:
            ValueError: if B is not the cache's, or no room is left for a byte after them.
        """
        num_bytes = byte_ids_BT.shape[1]
        cache.require_room(byte_ids_BT)
        cache.reset()
        cache.patch_bytes_BP[:, :num_bytes] = byte_ids_BT
        cache.positions_B.fill_(num_bytes)
        keys, values = self.cross.keys_values(self._inputs(byte_ids_BT, 0), self.rotary(slice(0, num_bytes + 1)))
        cache.levels[0].store(0, keys[:, None], values[:, None])
        return self._restart_latents(cache, num_bytes)

    @torch.no_grad()
    def step(self, byte_ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one byte to each row; logits `(B, V)` of the next one.

        Raises:
            ValueError: if the cache is full, or its rows stand at different bytes.
        """
        cache.append(byte_ids_B)
        position = int(cache.positions_B[0])
        context, latents = cache.levels
        input_B1D = self._inputs(byte_ids_B[:, None], position)
        rotation = self.rotary(slice(position, position + 1))
        keys, values = self.cross.keys_values(input_B1D, rotation)
        context.keys[0, :, :, position], context.values[0, :, :, position] = keys[:, :, 0], values[:, :, 0]
        first = self.first_latent(position)
        if first != self.first_latent(position - 1):
            return self._restart_latents(cache, position)
        seen = slice(0, position + 1)
        latent_BD = self.cross(input_B1D, context.keys[0, :, :, seen], context.values[0, :, :, seen], rotation)[:, 0]
        return self._to_logits(self.latent_transformer.step(latent_BD, latents, Slots.same(position - first)))

    def first_latent(self, position: int) -> int:
        """The position of the first latent that helps to predict the byte at `position`, in decoding.

        0 for the first N bytes; later a multiple of N / 2 that leaves at least N / 2 and at most N latents.
        """
        num_latents, half = self.config.num_latents, self.config.num_latents // 2
        return 0 if position < num_latents else ((position - num_latents) // half + 1) * half

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_byte(self, num_bytes: int) -> float:
        """Forward FLOPs per byte read of a sequence of `num_bytes`, two per multiply-add, attention included."""
        own = self.config
        num_latents = own.num_predicted(num_bytes)
        keys = num_bytes - (num_latents - 1) / 2  # seen by a latent in the cross-attention, on average
        cross = 2 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * own.dim * keys
        layer = 4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * own.dim * (num_latents + 1) / 2
        multiplies = num_latents * (cross + own.num_layers * layer + NUM_BYTE_VALUES * own.dim)
        return 2 * (2 * own.dim**2 + multiplies / num_bytes)

    def cache_bytes(self, batch_size: int, max_seq_len: int) -> int:
        """Memory of `new_cache(batch_size, max_seq_len)`, without making it."""
        return self._new_cache(batch_size, max_seq_len, torch.device("meta")).num_bytes

    def _new_cache(self, batch_size: int, max_seq_len: int, device: torch.device) -> Cache:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        own = self.config
        if not 1 <= max_seq_len <= own.max_seq_len:
            raise ValueError(f"max_seq_len={max_seq_len} must lie in 1..{own.max_seq_len}, the model's context")

        def level(num_layers: int, num_slots: int) -> LevelCache:
            shape = (num_layers, batch_size, own.num_heads, num_slots, own.head_dim)
            keys, values = (torch.zeros(shape, dtype=self.pad.dtype, device=device) for _ in range(2))
            return LevelCache(keys=keys, values=values, from_parent_BLD=None, conv_tails=[], memory=0)

        return Cache(
            levels=[level(1, max_seq_len), level(own.num_layers, min(own.num_latents, max_seq_len))],
            # All bytes read so far: latents are computed again from them. The whole sequence is one patch.
            patch_bytes_BP=torch.zeros(batch_size, max_seq_len, dtype=torch.int64, device=device),
            positions_B=torch.zeros(batch_size, dtype=torch.int64),
            woken_B=torch.full((batch_size,), -1),
            max_seq_len=max_seq_len,
        )

    def _inputs(self, past_BT: Tensor, first: int) -> Tensor:
        """The inputs from place `first` on: the bytes before these places, after the pad if that is the first place."""
        inputs_BTD = self.embedding(past_BT)
        if first == 0:
            inputs_BTD = torch.cat((self.pad.expand(len(past_BT), 1, -1).to(inputs_BTD.dtype), inputs_BTD), dim=1)
        if self.positions is not None:
            inputs_BTD = inputs_BTD + self.positions.weight[first : first + inputs_BTD.shape[1]]
        return inputs_BTD

    def _latents(
        self,
        inputs_BSD: Tensor,
        first: int,
        keys: Tensor,
        values: Tensor,
        cache: LevelCache | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """The finished latents `(B, S, D)` of the inputs from place `first` on."""
        latents_BSD = self.cross(inputs_BSD, keys, values, self.rotary(slice(first, first + inputs_BSD.shape[1])))
        return self.latent_transformer(latents_BSD[:, None], cache, recompute)[:, 0]

    def _restart_latents(self, cache: Cache, position: int) -> Tensor:
        """Computes the latents up to `position` anew from the bytes in the cache; logits `(B, V)` of the byte there."""
        context, latents = cache.levels
        first = self.first_latent(position)
        seen = slice(0, position + 1)
        inputs_BSD = self._inputs(cache.patch_bytes_BP[:, max(first - 1, 0) : position], first)
        finished_BSD = self._latents(inputs_BSD, first, context.keys[0, :, :, seen], context.values[0, :, :, seen], latents)
        return self._to_logits(finished_BSD[:, -1])

    def _to_logits(self, h: Tensor) -> Tensor:
        # fp32: bf16 keeps 8 significant bits, too few for a per-byte likelihood that is summed over a whole file.
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.embedding.weight.float())
