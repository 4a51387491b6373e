"""The native attention: softmax(q k^T / 8) v and its gradients, blind to what comes later; torch's own where it cannot run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from core import kernels
from core.config import LevelConfig, MegaByteConfig
from core.kernels import attention
from core.kernels.attention import attend_causally, can_attend
from core.models import MegaByte
from core.models.layers import Rotary, attend, rotate
from tests.kernel_builds import BUILDS, use_build


@pytest.fixture(params=BUILDS)
def kernel(request, monkeypatch):
    use_build(request.param, [attention], monkeypatch)


def queries_keys_values(num_sequences: int, num_heads: int, length: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Three `(N, H, L, 64)` as a layer has them: views of one tensor, the channels of a head adjacent."""
    generator = torch.Generator().manual_seed(length)
    joint = torch.randn(num_sequences, length, 3, num_heads, 64, generator=generator) * scale
    return list(joint.bfloat16().permute(2, 0, 3, 1, 4))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("length", [1, 2, 5, 12, 33, 63, 64, 65, 97, 113, 200, 517])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_it_is_as_near_to_float32_as_the_kernel_of_torch(length, scale):
    q, k, v = queries_keys_values(2, 3, length, scale)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    reference = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert can_attend(q)
    ours, theirs = ((found.float() - exact).square().mean().sqrt() for found in (attend_causally(q, k, v), reference))
    assert ours <= 1.5 * theirs + 1e-7


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("length", [1, 5, 12, 63, 64, 65, 97, 200, 517])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_its_gradients_are_as_near_to_float32_as_those_of_torch(length, scale, monkeypatch):
    inputs, grad = queries_keys_values(2, 3, length, scale), queries_keys_values(2, 3, length)[0]

    def gradients(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return [found.float() for found in torch.autograd.grad(attend(*leaves), leaves, grad.to(dtype))]

    by_torch = partial(F.scaled_dot_product_attention, is_causal=True)
    exact, reference = gradients(by_torch, torch.float32), gradients(by_torch, torch.bfloat16)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    for ours, theirs, wanted in zip(gradients(attend_causally, torch.bfloat16), reference, exact, strict=True):
        off, their_off = ((found - wanted).square().mean().sqrt() for found in (ours, theirs))
        assert off <= 1.5 * their_off + 1e-6


@pytest.mark.usefixtures("kernel")
def test_scores_that_grow_along_the_row_and_large_ones_do_not_overflow():
    q, k, v = queries_keys_values(1, 1, 300)
    q, k = torch.full_like(q, 8.0), (torch.linspace(-8, 8, 300)[:, None] * torch.ones(64)).bfloat16()[None, None]
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(attend_causally(q, k, v).float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("kernel")
def test_what_comes_later_and_other_sequences_change_no_bit():
    q, k, v = queries_keys_values(2, 2, 333)
    whole = attend_causally(q, k, v)
    for length in (1, 50, 64, 100, 332):
        part = attend_causally(*(x[1:, :, :length] for x in (q, k, v)))
        assert torch.equal(part, whole[1:, :, :length])


@pytest.mark.usefixtures("kernel")
def test_the_number_of_threads_changes_no_bit():
    q, k, v = queries_keys_values(1, 3, 400)
    leaf = torch.stack([q, k, v]).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            out = attend_causally(*leaf)
            found.append(torch.cat([out[None], *torch.autograd.grad(out, leaf, q)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("kernel")
def test_layers_use_it_for_long_rows_of_whole_heads(monkeypatch):
    calls = []
    monkeypatch.setattr("core.kernels.attention.attend_causally", lambda *args: calls.append(1) or attend_causally(*args))
    q, k, v = queries_keys_values(1, 2, 200)
    attend(q, k, v, None)
    attend(q.requires_grad_(), k, v, None).sum().backward()
    assert len(calls) == 2
    assert q.grad is not None
    attend(q.detach().float(), k.float(), v.float(), None)
    attend(*(x.detach()[..., :32] for x in (q, k, v)), None)
    assert len(calls) == 2


@pytest.mark.parametrize("uses_tiles", [False, True])
def test_where_there_are_tiles_torch_takes_long_rows_that_ours_do_not(uses_tiles, monkeypatch):
    monkeypatch.setattr(attention, "multiplies_tiles", lambda: True)
    monkeypatch.setattr(attention, "library", lambda: SimpleNamespace(uses_tiles=lambda: uses_tiles))
    taken = {}
    for length in (1, 16, 17, 64, 127, 128, 400, 511, 512, 2000):
        q = queries_keys_values(1, 1, length)[0]
        taken[length] = can_attend(q), can_attend(q.requires_grad_())
    scoring = [1, 16, 64, 127, 128, 400, 511, 512, 2000] if uses_tiles else [1, 16, 64, 127]
    training = scoring if uses_tiles else [1, 16, 400, 511]
    assert [length for length, (is_taken, _) in taken.items() if is_taken] == scoring
    assert [length for length, (_, is_taken) in taken.items() if is_taken] == training


@pytest.mark.parametrize("supported", [("-fopenmp",), ("-fopenmp", "-mno-amx-tile"), ()])
def test_where_the_system_refuses_tiles_kernels_are_built_without(supported, monkeypatch):
    def load_library(source, *flags):
        return SimpleNamespace(
            uses_tiles=lambda: "-mno-amx-tile" not in flags, is_supported=lambda: flags == supported, flags=flags
        )

    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(kernels, "load_library", load_library)
    found = kernels.load_tiled_library(Path("attention.cpp"))
    assert (found.flags if found else ()) == supported


def test_of_other_devices_nothing_is_asked(monkeypatch):
    for name in ("multiplies_tiles", "library"):
        monkeypatch.setattr(attention, name, lambda: pytest.fail("torch.compile warns of a cached function in what it traces"))
    assert not can_attend(torch.empty(1, 2, 2000, 64, dtype=torch.bfloat16, device="meta"))


def test_without_the_kernel_torch_attends(monkeypatch):
    monkeypatch.setattr(attention, "library", lambda: None)
    q, k, v = queries_keys_values(1, 2, 200)
    assert not can_attend(q)
    torch.testing.assert_close(attend(q, k, v, None), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("length", [1, 3, 200])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 3.0])
@pytest.mark.parametrize("turned", [False, True])
def test_queries_are_placed_as_by_the_layer_in_float32(length, epsilon, turned):
    q = queries_keys_values(3, 2, length, 5.0)[0]
    q[1] = 0
    rotation = Rotary(64, 300)(slice(70, 70 + length)) if turned else None
    exact = F.rms_norm(q.float(), (64,), eps=epsilon) if epsilon else q.float()
    found = attention.place(q, rotation, epsilon)
    torch.testing.assert_close(found.float(), rotate(exact, rotation), rtol=2**-8, atol=1e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["normalised", "with a memory"])
def test_a_model_that_places_natively_predicts_as_one_that_does_not(name, monkeypatch):
    levels = (LevelConfig(dim=128, num_layers=2, num_heads=2, patch_size=4), LevelConfig(dim=64, num_layers=2, num_heads=1))
    config = MegaByteConfig(levels=levels, max_seq_len=1024, init_std=0.2, positions="rotary", qk_norm=name == "normalised")
    if name == "with a memory":
        config = replace(config, levels=(levels[0], replace(levels[1], cross_patch=2)))
    torch.manual_seed(0)
    model, byte_ids = MegaByte(config).eval(), torch.randint(256, (2, 900))
    calls = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "place", lambda *args, found=attention.place: calls.append(1) or found(*args))
            ours = model(byte_ids)
        assert calls
        monkeypatch.setattr(attention, "library", lambda: None)
        plain = model(byte_ids)
    with torch.inference_mode():
        exact = model(byte_ids)
    off, plain_off = ((logits - exact).square().mean().sqrt() for logits in (ours, plain))
    assert off <= 1.1 * plain_off
    assert plain_off < 0.1 * exact.std()


@pytest.mark.usefixtures("kernel")
def test_rows_that_begin_inside_a_word_are_attended_to():
    q, k, v = queries_keys_values(1, 2, 200)
    shifted = torch.zeros(k.numel() + 1, dtype=torch.bfloat16)[1:].view(k.shape).copy_(k)
    assert torch.equal(attend_causally(q, shifted, v), attend_causally(q, k, v))


@pytest.mark.usefixtures("kernel")
def test_tensors_that_do_not_fit_are_refused():
    q, k, v = queries_keys_values(1, 2, 200)
    with pytest.raises(ValueError, match="not bfloat16"):
        attend_causally(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match="not bfloat16"):
        attention.place(q.float(), None, 1e-6)
    with pytest.raises(ValueError, match="tables of angles"):
        attention.place(q, Rotary(64, 300)(slice(0, 199)), 1e-6)
