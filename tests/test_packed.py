"""Packed Transformers step as plain ones do: by our kernel, or with oneDNN's weights where it cannot be had."""

import importlib
from dataclasses import replace

import pytest
import torch

from core.cache import LevelCache
from core.config import LevelConfig, MegaByteConfig
from core.errors import UserError
from core.kernels import step as kernel
from core.kernels.gpu import can_fuse
from core.models.layers import Slots, Transformer
from core.models.megabyte import MegaByte
from core.models.packed import PackedLinear, PackedTransformer, fused, packed

FLAT = MegaByteConfig(levels=(LevelConfig(dim=128, num_layers=2, num_heads=2),), max_seq_len=300, init_std=0.2)
CASES = {
    "plain": FLAT,
    "rotary": replace(FLAT, positions="rotary"),
    "qk-norm, rotary": replace(FLAT, positions="rotary", qk_norm=True),
    "squared relu, residual scalars": replace(FLAT, activation="relu2", residual_scalars=True),
}


@pytest.fixture
def _kernel():
    if kernel.library() is None:
        pytest.skip("this machine cannot have the kernel")


def transformer(config: MegaByteConfig, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    torch.manual_seed(1)
    found = MegaByte(config).requires_grad_(False).levels[0].transformer
    if found.residual_scalars is not None:
        found.residual_scalars.copy_(torch.tensor([[0.75, 0.5], [1.25, -0.5]]))
    for parameter in found.parameters():
        if parameter.ndim == 1:  # norms and biases that can be told from their first values
            parameter.add_(0.1 * torch.randn(parameter.shape))
        parameter.copy_(parameter.bfloat16())
    return found.to(dtype)


def filled(num_rows: int, dtype: torch.dtype = torch.bfloat16) -> LevelCache:
    keys, values = torch.randn(2, 2, num_rows, 2, 300, 64, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
    return LevelCache(keys, values, None, [], 0)


def places(seen: list[int], num_read: int, first: int = 0, dtype: torch.dtype = torch.bfloat16) -> Slots:
    """Row b writes slot `seen[b]` and attends to the slots from `first` to its own, of `num_read` that are looked at."""
    slots_B, slots_S = torch.tensor(seen), torch.arange(num_read)
    hidden_BS = (slots_S > slots_B[:, None]) | (slots_S < first)
    mask_BS = torch.zeros(len(seen), num_read, dtype=dtype).masked_fill(hidden_BS, float("-inf"))
    return Slots(slots_B[:, None, None], (torch.arange(len(seen)), slice(None), slots_B), slice(0, num_read), mask_BS)


def inputs(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_as_near_to_float32_as_that_of_torch(name):
    seen, num_read = [3, 299, 0, 150, 17], 300
    exact_cache, plain_cache, cache = filled(5, torch.float32), filled(5), filled(5)
    exact = transformer(CASES[name], torch.float32).step(
        inputs(5).float(), exact_cache, places(seen, num_read, dtype=torch.float32)
    )
    plain = transformer(CASES[name]).step(inputs(5), plain_cache, places(seen, num_read))
    ours = packed(transformer(CASES[name]))
    assert isinstance(ours, PackedTransformer)
    found = ours.step(inputs(5), cache, places(seen, num_read))
    off, plain_off = ((y.float() - exact).square().mean().sqrt() for y in (found, plain))
    assert off <= 1.2 * plain_off
    assert plain_off < 0.05 * exact.square().mean().sqrt()
    for kept, expected in ((cache.keys, exact_cache.keys), (cache.values, exact_cache.values)):
        torch.testing.assert_close(kept.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.usefixtures("_kernel")
def test_other_rows_hidden_slots_and_threads_change_no_bit():
    model = packed(transformer(CASES["qk-norm, rotary"]))
    seen = [70, 40, 33, 65, 70, 41, 50, 60, 44, 70, 70, 70, 69, 68, 40, 55, 66]
    whole = model.step(inputs(17), filled(17), places(seen, 300, first=32))
    before, few_threads = torch.get_num_threads(), filled(17)
    few_threads.keys[:, :, :, :32] = few_threads.values[:, :, :, 71:] = float("nan")
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert torch.equal(model.step(inputs(17), few_threads, places(seen, 80, first=32)), whole)
    finally:
        torch.set_num_threads(before)
    one = filled(17)
    one = LevelCache(one.keys[:, 6:7].contiguous(), one.values[:, 6:7].contiguous(), None, [], 0)
    assert torch.equal(model.step(inputs(17)[6:7], one, places(seen[6:7], 128, first=32))[0], whole[6])


@pytest.mark.usefixtures("_kernel")
def test_inputs_that_do_not_fit_are_refused():
    model = packed(transformer(FLAT))
    for wrong in (inputs(3), inputs(2)[:, :64], inputs(2).float()):
        with pytest.raises(ValueError, match="not bfloat16"):
            model.step(wrong, filled(2), places([1, 2], 3))


@pytest.mark.usefixtures("_kernel")
def test_heads_and_widths_that_the_kernel_does_not_take_are_left_to_torch():
    narrow = LevelConfig(dim=128, num_layers=2, num_heads=4)
    assert not isinstance(packed(transformer(replace(FLAT, levels=(narrow,)))), PackedTransformer)
    assert not isinstance(packed(transformer(FLAT, torch.float32)), PackedTransformer)


def test_without_the_kernel_onednn_multiplies(monkeypatch):
    monkeypatch.setattr(kernel, "library", lambda: None)
    plain, ours = transformer(FLAT), packed(transformer(FLAT))
    has_onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert type(ours.blocks[0].ffn_in) is (PackedLinear if has_onednn else torch.nn.Linear)
    expected = plain.step(inputs(2), filled(2), places([3, 7], 20))
    torch.testing.assert_close(ours.step(inputs(2), filled(2), places([3, 7], 20)), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("reason", [ModuleNotFoundError("no triton"), RuntimeError("Failed to find C compiler")])
def test_fused_steps_whose_kernels_cannot_be_built_are_refused_in_a_sentence(reason, monkeypatch):
    def import_module(_: str) -> None:
        raise reason

    monkeypatch.setattr(importlib, "import_module", import_module)
    can_fuse.cache_clear()
    assert not can_fuse(torch.device("cuda"))
    with pytest.raises(UserError, match="need Triton, a C compiler and Python's headers"):
        fused(MegaByte(FLAT))
    can_fuse.cache_clear()
