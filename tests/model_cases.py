"""Small models with every option of the architecture, and a naive reading of the paper's equations."""

import torch
from torch import Tensor

from core.config import LevelConfig, MegaByteConfig
from core.models import MegaByte

PATCH = 4
CONTEXT = 32


def two_level(**options) -> MegaByteConfig:
    """Global and local with P = 4; `options` of either the model or one of its levels (global_*, local_*)."""
    global_options = {key.removeprefix("global_"): value for key, value in options.items() if key.startswith("global_")}
    local_options = {key.removeprefix("local_"): value for key, value in options.items() if key.startswith("local_")}
    rest = {key: value for key, value in options.items() if not key.startswith(("global_", "local_"))}
    return MegaByteConfig(
        levels=(
            LevelConfig(**{"dim": 24, "num_layers": 2, "num_heads": 2, "patch_size": PATCH, **global_options}),
            LevelConfig(dim=16, num_layers=2, num_heads=2, **local_options),
        ),
        max_seq_len=CONTEXT,
        # Large enough that every byte moves every later logit measurably.
        **{"init_std": 0.2, **rest},
    )


def three_level(**options) -> MegaByteConfig:
    return MegaByteConfig(
        levels=(
            LevelConfig(dim=24, num_layers=1, num_heads=2, patch_size=2, conv_kernels=(3,)),
            LevelConfig(dim=16, num_layers=1, num_heads=2, patch_size=4, conv_kernels=(3, 5), cross_patch=1),
            LevelConfig(dim=16, num_layers=2, num_heads=2, cross_patch=3),
        ),
        max_seq_len=CONTEXT,
        init_std=0.2,
        **options,
    )


ALL_OPTIONS = {
    "global_conv_kernels": (3, 5, 7),
    "global_byte_dim": 5,
    "local_cross_patch": 3,
    "unembedder": "full",
    "real_previous": True,
}

RECIPE = {"activation": "relu2", "qk_norm": True, "residual_scalars": True, "logit_softcap": 5.0, "positions": "both"}

CASES: dict[str, MegaByteConfig] = {
    "exact": two_level(),
    "rotary": two_level(positions="rotary"),
    "convolution": two_level(global_conv_kernels=(3, 5, 7)),
    "both_positions": two_level(positions="both"),
    "cross_patch": two_level(local_cross_patch=PATCH),
    "cross_patch_rotary": two_level(local_cross_patch=PATCH, positions="rotary"),
    "one_element_cross_patch": two_level(local_cross_patch=1, positions="rotary"),
    "projection": two_level(global_byte_dim=5),
    "full_unembedder": two_level(unembedder="full"),
    "indivisible": two_level(global_dim=22, global_byte_dim=5, unembedder="full"),
    "real_previous": two_level(real_previous=True),
    "dropout": two_level(dropout=0.1),
    "all_learned": two_level(**ALL_OPTIONS),
    "all_rotary": two_level(**ALL_OPTIONS, positions="both"),
    "flat": MegaByteConfig(
        levels=(LevelConfig(dim=16, num_layers=2, num_heads=2),), max_seq_len=CONTEXT, positions="rotary", init_std=0.2
    ),
    "relu2": two_level(activation="relu2"),
    "qk_norm": two_level(qk_norm=True),
    "residual_scalars": two_level(residual_scalars=True),
    "softcap": two_level(logit_softcap=5.0),
    "recipe": two_level(**RECIPE),
    "recipe_all": two_level(**ALL_OPTIONS, **RECIPE),
    "three_levels": three_level(),
    "three_levels_rotary": three_level(positions="rotary", real_previous=True),
    "three_levels_both": three_level(positions="both", unembedder="full"),
}


def build(config: MegaByteConfig, seed: int = 0) -> MegaByte:
    torch.manual_seed(seed)
    model = MegaByte(config).eval()
    for level in model.levels:
        if (scalars := level.transformer.residual_scalars) is not None:
            torch.nn.init.uniform_(scalars, 0.5, 1.5)  # at their start of 1 and 0 they do nothing
    return model


def random_bytes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def naive_megabyte(model: MegaByte, byte_ids: list[int]) -> Tensor:
    """Logits `(T, 256)` of one sequence of whole patches, byte by byte from equations 1 to 6, in the model's dtype."""
    global_level, local_level = model.levels
    patch_size, num_patches = global_level.span, len(byte_ids) // global_level.span
    embed, position = global_level.embedder.embedding.weight, global_level.embedder.positions.weight
    h_embed = [embed[x] + position[t] for t, x in enumerate(byte_ids)]
    h_global_in = [global_level.pad] + [
        torch.cat([h_embed[k * patch_size + p] for p in range(patch_size)]) for k in range(num_patches - 1)
    ]
    h_global_out = _naive_transformer(global_level.transformer, h_global_in)
    logits = []
    width = global_level.config.dim // patch_size
    for k in range(num_patches):
        h_local_in = []
        for p in range(patch_size):
            from_global = global_level.unembedder.project.weight @ h_global_out[k][p * width : (p + 1) * width]
            previous = local_level.pad if p == 0 else local_level.embedder.embedding.weight[byte_ids[k * patch_size + p - 1]]
            h_local_in.append(from_global + previous + local_level.positions[p])
        for h_local_out in _naive_transformer(local_level.transformer, h_local_in):
            logits.append(local_level.embedder.embedding.weight @ h_local_out)
    return torch.stack(logits)


def _naive_transformer(transformer, inputs: list[Tensor]) -> list[Tensor]:
    states = list(inputs)
    for block in transformer.blocks:
        queries, keys, values = [], [], []
        for x in states:
            qkv = block.attention.qkv.weight @ _norm(block.attention_norm, x) + block.attention.qkv.bias
            for store, part in zip((queries, keys, values), qkv.chunk(3), strict=True):
                store.append(part.chunk(block.attention.num_heads))
        attended = []
        for t in range(len(states)):
            heads = []
            for head, query in enumerate(queries[t]):
                scores = torch.stack([query @ keys[s][head] for s in range(t + 1)]) / len(query) ** 0.5
                weights = scores.softmax(0)
                heads.append(sum(weights[s] * values[s][head] for s in range(t + 1)))
            attended.append(block.attention.out.weight @ torch.cat(heads) + block.attention.out.bias)
        states = [x + a for x, a in zip(states, attended, strict=True)]
        hidden = [(block.ffn_in.weight @ _norm(block.ffn_norm, x) + block.ffn_in.bias).clamp(min=0) for x in states]
        states = [x + block.ffn_out.weight @ h + block.ffn_out.bias for x, h in zip(states, hidden, strict=True)]
    return [_norm(transformer.norm, x) for x in states]


def _norm(norm, x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
