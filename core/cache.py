"""Static buffers that make the next byte cheap: keys and values, convolution tails, the bytes of the open patch.

A cache is made once for a batch and a length; nothing is allocated per byte. Its rows may stand at different
positions as long as they stand at the same place inside a coarsest patch (the phase), because the phase decides
which levels wake. `cache.rows(...)` is a view of some rows, so prompts of unequal length are prefilled row by row.
"""

# Shapes: B rows, H heads, S slots, C channels per head, L elements of a row, D width.

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LevelCache:
    """What one level remembers.

    The S slots hold first the `memory` last elements of the previous patch, then the elements of the open one. Level 0
    has no previous patch: its slots are the elements of the whole sequence.

    Attributes:
        keys, values: `(num_layers, B, H, S, C)`, keys already rotated for their slot.
        from_parent_BLD: what the parent's newest element says to each of its children; None on level 0.
        conv_tails: for each causal convolution its last kernel - 1 inputs, `(B, kernel - 1, byte_dim)`.
        memory: r, the number of slots kept for the previous patch.
    """

    keys: Tensor
    values: Tensor
    from_parent_BLD: Tensor | None
    conv_tails: list[Tensor]
    memory: int

    def store(self, layer: int, keys_BKHLC: Tensor, values_BKHLC: Tensor) -> None:
        """Keeps the last of K rows, which is all that later elements can attend to."""
        slots = slice(self.memory, self.memory + keys_BKHLC.shape[3])
        self.keys[layer, :, :, slots] = keys_BKHLC[:, -1]
        self.values[layer, :, :, slots] = values_BKHLC[:, -1]

    def rows(self, rows: slice) -> "LevelCache":
        return LevelCache(
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            from_parent_BLD=None if self.from_parent_BLD is None else self.from_parent_BLD[rows],
            conv_tails=[tail[rows] for tail in self.conv_tails],
            memory=self.memory,
        )

    def tensors(self) -> list[Tensor]:
        parent = [] if self.from_parent_BLD is None else [self.from_parent_BLD]
        return [self.keys, self.values, *parent, *self.conv_tails]


@dataclass
class Cache:
    """The decoding state of B sequences.

    Attributes:
        levels: one `LevelCache` per level, coarsest first.
        patch_bytes_BP: the bytes of the newest coarsest patch; the phase says how many belong to the open one.
        positions_B: bytes read so far by each row, int64 on the host: which levels wake must not wait for a device.
        woken_B: where each row was last predicted from, int64 on the host, -1 for nowhere. For `core.native`, which may predict
            a byte again and must not move a finished patch into a level's memory again; torch predicts each byte once.
        max_seq_len: bytes that fit.
    """

    levels: list[LevelCache]
    patch_bytes_BP: Tensor
    positions_B: Tensor
    woken_B: Tensor
    max_seq_len: int

    @property
    def batch_size(self) -> int:
        return self.positions_B.shape[0]

    @property
    def patch_size(self) -> int:
        """Bytes in a coarsest patch."""
        return self.patch_bytes_BP.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        tensors = [self.patch_bytes_BP, *(tensor for level in self.levels for tensor in level.tensors())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def require_room(self, byte_ids_BT: Tensor) -> None:
        """Refuses to start with sequences that do not fit, or after which no byte could be made.

        Raises:
            ValueError: if B is not the cache's, or no room is left for a byte after them.
        """
        num_rows, num_bytes = byte_ids_BT.shape
        if num_rows != self.batch_size:
            raise ValueError(f"{num_rows} sequences given for a cache of {self.batch_size}")
        if num_bytes >= self.max_seq_len:
            raise ValueError(f"{num_bytes} bytes leave no room in a cache of {self.max_seq_len}; keep fewer of them")

    def append(self, byte_ids_B: Tensor) -> None:
        """Takes in the next byte of every row.

        Raises:
            ValueError: if a row is full, or the rows stand at different places inside a patch.
        """
        positions = self.positions_B.tolist()
        phase = positions[0] % self.patch_size
        if any(position % self.patch_size != phase for position in positions):
            raise ValueError(f"the rows stand at {positions}, not at one place inside their patches of {self.patch_size} bytes")
        if max(positions) + 1 >= self.max_seq_len:
            raise ValueError(f"the cache holds {self.max_seq_len} bytes and no byte can follow the last; start a new one")
        self.patch_bytes_BP[:, phase] = byte_ids_B
        self.positions_B += 1

    def rows(self, rows: slice) -> "Cache":
        """A view of some rows; what is written through it is written here."""
        return Cache(
            levels=[level.rows(rows) for level in self.levels],
            patch_bytes_BP=self.patch_bytes_BP[rows],
            positions_B=self.positions_B[rows],
            woken_B=self.woken_B[rows],
            max_seq_len=self.max_seq_len,
        )

    def copy_from(self, other: "Cache") -> None:
        """Takes over the state of `other`, whose one row is repeated if this cache has more."""
        for mine, theirs in zip(self.levels, other.levels, strict=True):
            for target, source in zip(mine.tensors(), theirs.tensors(), strict=True):
                target.copy_(source)
        self.patch_bytes_BP.copy_(other.patch_bytes_BP)
        self.positions_B.copy_(other.positions_B)
        self.woken_B.copy_(other.woken_B)

    def reset(self) -> None:
        """Back to the empty sequence. Stale keys may stay: no slot is read before it is written."""
        self.positions_B.zero_()
        self.woken_B.fill_(-1)
        for level in self.levels:
            for tail in level.conv_tails:
                tail.zero_()
