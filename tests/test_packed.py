"""Packed models step as plain ones do: by our kernel, or with oneDNN's weights where it cannot be had."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config import LevelConfig, MegaByteConfig
from core.errors import UserError
from core.kernels import has_onednn
from core.kernels import step as kernel
from core.kernels.gpu import can_fuse
from core.law import SampleConfig, draw, sampling_law, surprisal, uniforms
from core.lockstep import Job, Lockstep, bf16_copy
from core.models.layers import linear_relu
from core.models.megabyte import MegaByte
from core.models.packed import PackedLinear, PackedMegaByte, PackedProducts, fused
from tests.forced_rows import begin_rows, logits_in_rows, read_patch
from tests.model_cases import build, random_bytes

GLOBAL = LevelConfig(dim=128, num_layers=2, num_heads=2, patch_size=4)
LOCAL = LevelConfig(dim=64, num_layers=2, num_heads=1)
PAPER = MegaByteConfig(levels=(GLOBAL, LOCAL), max_seq_len=96, init_std=0.2)
CASES = {
    "paper": PAPER,
    "flat": replace(PAPER, levels=(replace(GLOBAL, patch_size=1),), positions="rotary"),
    "memory": replace(PAPER, levels=(GLOBAL, replace(LOCAL, cross_patch=3)), positions="rotary", residual_scalars=True),
    "recipe": replace(
        PAPER,
        levels=(replace(GLOBAL, byte_dim=24, conv_kernels=(3, 5, 7)), replace(LOCAL, cross_patch=4)),
        positions="both",
        unembedder="full",
        real_previous=True,
        activation="relu2",
        qk_norm=True,
        logit_softcap=5.0,
    ),
    "three levels": replace(
        PAPER,
        levels=(GLOBAL, replace(LOCAL, num_layers=1, patch_size=2, cross_patch=2, conv_kernels=(3,)), LOCAL),
        positions="both",
        qk_norm=True,
    ),
}


@pytest.fixture
def _kernel():
    if kernel.library() is None:
        pytest.skip("this machine cannot have the kernel")


def exact_in_bf16(config: MegaByteConfig) -> MegaByte:
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that can be told from their first values
                parameter.add_(0.1 * torch.randn(parameter.shape))
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("name", CASES)
def test_rows_by_the_kernel_are_as_near_to_float32_as_those_of_torch(name, monkeypatch):
    exact, byte_ids = exact_in_bf16(CASES[name]), random_bytes(3, 96)
    assert isinstance(bf16_copy(exact), PackedMegaByte)
    ours, _ = logits_in_rows(bf16_copy(exact), byte_ids)
    monkeypatch.setattr(kernel, "library", lambda: None)
    plain, _ = logits_in_rows(bf16_copy(exact_in_bf16(CASES[name])), byte_ids)
    _, expected = logits_in_rows(exact, byte_ids)
    off, plain_off = ((logits - expected).square().mean().sqrt() for logits in (ours, plain))
    assert off <= 1.2 * plain_off
    assert plain_off < 0.05 * expected.std()


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("name", ["recipe", "three levels"])
def test_other_rows_hidden_slots_and_threads_change_no_bit(name):
    model, byte_ids = bf16_copy(exact_in_bf16(CASES[name])), random_bytes(17, 96)
    patch_size = model.config.patch_size
    positions = [row % 7 * patch_size for row in range(17)]

    def logits(rows: list[int], poison: float = 0.0) -> torch.Tensor:
        batch, own_ids, own_positions = Lockstep(model, len(rows), 96), byte_ids[rows], [positions[row] for row in rows]
        begin_rows(batch, own_ids, own_positions)
        for row, position in enumerate(own_positions):
            for level, kept in zip(model.levels, batch.cache.levels, strict=True):
                past = slice(0, level.row_length if position else None)  # its last elements are moved into the memory
                hidden = slice(position // level.span, None) if level.is_top else past
                kept.keys[:, row, :, hidden] = kept.values[:, row, :, hidden] = poison
        return torch.stack(
            [each for step in (0, patch_size) for each in read_patch(batch, own_ids, [p + step for p in own_positions])], dim=1
        )

    whole, before = logits(list(range(17))), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert torch.equal(logits(list(range(17)), float("nan")), whole)
    finally:
        torch.set_num_threads(before)
    for row in (0, 6):
        assert torch.equal(logits([row])[0], whole[row])


@pytest.mark.usefixtures("_kernel")
def test_rows_draw_by_laws_and_numbers_of_their_own():
    settings = {}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.3}, {"temperature": 2.0}
    configs, num_bytes = [SampleConfig(**each) for each in settings], 8
    batch = Lockstep(bf16_copy(exact_in_bf16(PAPER)), len(configs), 96)
    jobs = [(row, row, Job(np.zeros(0, np.uint8), num_bytes, config, uniforms(1, row)), 0) for row, config in enumerate(configs)]
    given_BR = np.full((len(configs), batch.round_size), -1)
    given_BR[4, 2] = 77
    batch._load([0, 8, 4, 0, 12], given_BR, jobs, num_bytes)
    numbers = [uniforms(1, row).random(num_bytes) for row in range(len(configs))]
    for place, phase in enumerate(batch.phases(12, num_bytes)):
        batch.make_byte(phase)
        for row, (config, logits_V) in enumerate(zip(configs, batch.logits_BV.numpy(), strict=True)):
            byte = 77 if (row, place) == (4, 2) else draw(sampling_law(logits_V, config), numbers[row][place])
            assert batch._bytes_BR[row, place] == byte
            assert batch._bits_BR[row, place].item() == pytest.approx(surprisal(logits_V, byte), rel=1e-6)


@pytest.mark.usefixtures("_kernel")
def test_what_the_kernel_does_not_take_is_left_to_torch():
    narrow = replace(GLOBAL, num_heads=4)
    assert not isinstance(bf16_copy(build(replace(PAPER, levels=(narrow, LOCAL)))), PackedMegaByte)


def test_without_the_kernel_onednn_multiplies(monkeypatch):
    monkeypatch.setattr(kernel, "library", lambda: None)
    model, byte_ids = bf16_copy(exact_in_bf16(PAPER)), random_bytes(3, 96)
    assert type(model.levels[0].transformer.blocks[0].ffn_in) is (PackedLinear if has_onednn() else torch.nn.Linear)
    found, _ = logits_in_rows(model, byte_ids)
    _, expected = logits_in_rows(exact_in_bf16(PAPER), byte_ids)
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_multiplied_by_weights_that_are_laid_out_once(dtype, bias):
    if not has_onednn(dtype):
        pytest.skip("oneDNN has no such products on this processor")
    layer, x = torch.nn.Linear(96, 80, bias=bias), torch.randn(2, 96, 700).transpose(1, 2)
    products, tolerance = PackedProducts(), {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = layer(x)
        with products:
            assert torch.equal(layer(x[:, :10]), plain[:, :10])
        assert not products._packed
        for _ in range(2):
            with products:
                found = layer(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, plain, rtol=tolerance, atol=0.1 * tolerance)
            assert list(products._packed) == [(layer.weight, dtype)]
        with products:
            rectified = linear_relu(x, layer)
        torch.testing.assert_close(rectified, linear_relu(x, layer), rtol=tolerance, atol=0.1 * tolerance)
        assert -1e-12 < rectified.min() <= 0 < rectified.max()
        with products:
            assert linear_relu(torch.full_like(x, torch.nan), layer).isnan().all()
        with products:
            doubled, found = F.linear(x, 2 * layer.weight), F.linear(x, layer.weight)
        torch.testing.assert_close(doubled, 2 * found, rtol=tolerance, atol=tolerance)
        assert len(products._packed) == 1


@pytest.mark.parametrize("reason", [ModuleNotFoundError("no triton"), RuntimeError("Failed to find C compiler")])
def test_fused_steps_whose_kernels_cannot_be_built_are_refused_in_a_sentence(reason, monkeypatch):
    def import_module(_: str) -> None:
        raise reason

    monkeypatch.setattr(importlib, "import_module", import_module)
    can_fuse.cache_clear()
    assert not can_fuse(torch.device("cuda"))
    with pytest.raises(UserError, match="need Triton, a C compiler and Python's headers"):
        fused(MegaByte(PAPER))
    can_fuse.cache_clear()
