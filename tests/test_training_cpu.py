"""The kernels that train on a CPU: as near to float32 as torch's own under autocast, in what they make and its gradients."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import LevelConfig, MegaByteConfig
from core.kernels import attention, training_cpu
from core.kernels.attention import attend_to_placed
from core.learner import MeanNll
from core.models import MegaByte
from core.models.layers import Rotary, rotate
from tests.kernel_builds import BUILDS, use_build

pytestmark = pytest.mark.skipif(
    training_cpu.library() is None or attention.library() is None, reason="this machine cannot have the kernels"
)


@pytest.fixture(params=BUILDS, autouse=True)
def kernels(request, monkeypatch):
    use_build(request.param, [training_cpu, attention], monkeypatch)


LEVELS = (LevelConfig(dim=128, num_layers=2, num_heads=2, patch_size=4), LevelConfig(dim=64, num_layers=1, num_heads=1))
PAPER = MegaByteConfig(levels=LEVELS, max_seq_len=1024, init_std=0.1)
RECIPE = MegaByteConfig(
    levels=LEVELS,
    max_seq_len=1024,
    init_std=0.1,
    positions="rotary",
    qk_norm=True,
    activation="relu2",
    logit_softcap=5.0,
    residual_scalars=True,
)
WITH_MEMORY = replace(RECIPE, levels=(LEVELS[0], replace(LEVELS[1], cross_patch=2)))


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean squares of the differences, as parts of those of what is exact."""
    return [float((a.float() - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, exact, strict=True)]


def random_numbers(*size: int, seed: int = 0) -> Tensor:
    """Normally distributed, and bf16 holds them."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def with_gradients(run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What `run` makes of `x` in `dtype`, and what `x` and the parameters get from random gradients of it."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = run(leaf.to(dtype))
    return [out.detach(), *torch.autograd.grad(out, [leaf, *parameters], random_numbers(*out.shape, seed=1).to(out.dtype))]


def layers_of(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[Tensor]]:
    """The kernel, what it stands for, and the parameters of both."""
    torch.manual_seed(0)
    narrow, wide, norm = nn.Linear(64, 96), nn.Linear(96, 64), nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    both = [*narrow.parameters(), *wide.parameters()]
    return {
        "linear": (lambda x: training_cpu.linear(x, narrow), narrow, both[:2]),
        "relu": (lambda x: training_cpu.feed_forward(x, narrow, wide, False), lambda x: wide(F.relu(narrow(x))), both),
        "relu2": (lambda x: training_cpu.feed_forward(x, narrow, wide, True), lambda x: wide(F.relu(narrow(x)).square()), both),
        "norm": (lambda x: training_cpu.normalized(x, norm), norm, [*norm.parameters()]),
        "sum and norm": (
            lambda x: torch.cat(training_cpu.add_normalized(x, x.roll(1), norm)),
            lambda x: torch.cat((x + x.roll(1), norm(x + x.roll(1)))),
            [*norm.parameters()],
        ),
        "logits": (
            lambda x: training_cpu.logits(x, narrow.weight),
            lambda x: F.linear(x.float(), narrow.weight),
            both[:1],
        ),
    }[name]


@pytest.mark.parametrize("num_rows", [1, 255, 513])
@pytest.mark.parametrize("name", ["linear", "relu", "relu2", "norm", "sum and norm", "logits"])
def test_layers_are_as_near_to_float32_as_those_of_torch(name, num_rows):
    ours, plain, parameters = layers_of(name)
    x = random_numbers(num_rows, 1, 64)
    x[3:4] = 0
    exact = with_gradients(plain, x, parameters, torch.float32)
    off, plain_off = (errors(with_gradients(run, x, parameters, torch.bfloat16), exact) for run in (ours, plain))
    # Gradients of logits are rounded, which torch leaves in float32.
    assert all(own <= 1.3 * their + (4e-3 if name == "logits" else 1e-3) for own, their in zip(off, plain_off, strict=True))


@pytest.mark.parametrize("num_rows", [1, 2, 511, 1026, 2077])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (144, 320), (384, 256)])
def test_gradients_of_weights_and_biases_are_sums_in_float32(outputs, inputs, num_rows):
    grad, x = random_numbers(num_rows, outputs, seed=1).bfloat16(), random_numbers(num_rows, inputs, seed=2).bfloat16()
    of_weight, of_bias = training_cpu.grads_of_weight(grad, x)
    assert of_weight.dtype == of_bias.dtype == torch.float32
    torch.testing.assert_close(of_weight.double(), grad.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(of_bias.double(), grad.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 255, 256, 700])
def test_gradients_of_biases_are_sums_in_float32_where_torch_multiplies(num_rows, monkeypatch):
    refused = SimpleNamespace(uses_tiles=lambda: False, sum_rows=training_cpu.library().sum_rows)
    monkeypatch.setattr(training_cpu, "multiplies_tiles", lambda: True)
    monkeypatch.setattr(training_cpu, "library", lambda: refused)
    run, kernels = training_cpu._run, []
    monkeypatch.setattr(training_cpu, "_run", lambda kernel, *arguments: (kernels.append(kernel), run(kernel, *arguments)))
    for outputs in (144, 10):
        grad = random_numbers(num_rows, outputs, seed=1).bfloat16()
        _, of_bias = training_cpu.grads_of_weight(grad, grad)
        assert of_bias.dtype == torch.float32
        torch.testing.assert_close(of_bias.double(), grad.double().sum(0), rtol=1e-5, atol=1e-4)
    assert kernels == ["sum_rows"]  # whole vectors alone


@pytest.mark.parametrize("name", ["linear", "relu", "relu2"])
def test_a_weight_is_laid_out_for_many_rows_and_makes_the_same_products(name, monkeypatch):
    ours, plain, parameters = layers_of(name)
    monkeypatch.setattr(training_cpu, "multiplies_tiles", lambda: True)
    product, laid_out = torch.ops.mkldnn._linear_pointwise, []
    watched = lambda x, weight, *arguments: (laid_out.append(weight.is_mkldnn), product(x, weight, *arguments))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    x = random_numbers(training_cpu._MANY_ROWS, 1, 64)
    exact = with_gradients(plain, x, parameters, torch.float32)
    off = errors(with_gradients(ours, x, parameters, torch.bfloat16), exact)
    assert laid_out
    assert all(laid_out)
    monkeypatch.setattr(training_cpu, "_MANY_ROWS", len(x) + 1)
    plain_off = errors(with_gradients(ours, x, parameters, torch.bfloat16), exact)
    assert not all(laid_out)
    assert all(own <= 1.3 * their + 1e-3 for own, their in zip(off, plain_off, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [PAPER, RECIPE, replace(RECIPE, real_previous=True)], ids=["paper", "recipe", "real previous"])
def test_a_level_reads_the_same_by_them(config, dtype):
    torch.manual_seed(0)
    level = MegaByte(config).levels[1]
    nn.init.normal_(level.pad)
    level.to(torch.bfloat16).to(dtype)
    level.has_kernels = True
    byte_ids, from_parents = torch.randint(256, (3, 100), dtype=torch.int32), random_numbers(3, 100, 64)
    parameters = [p for p in (level.embedder.embedding.weight, level.pad, level.positions) if p is not None]
    ours = with_gradients(lambda x: level._read_by_kernels(byte_ids, x), from_parents, parameters, torch.bfloat16)
    level.double()
    parameters = [p for p in (level.embedder.embedding.weight, level.pad, level.positions) if p is not None]
    exact = with_gradients(lambda x: level._read(byte_ids, x, None, 4), from_parents, parameters, torch.float64)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2**-8, atol=1e-6)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5  # to which gradients are rounded
    for own, wanted in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(own.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [256, -1, -100])
@pytest.mark.parametrize("place", [0, 3])
def test_a_value_that_is_no_byte_is_read_by_no_level(value, place):
    level, byte_ids = MegaByte(PAPER).levels[1], torch.zeros(1, 4, dtype=torch.int64)
    level.has_kernels, byte_ids[0, place] = True, value
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(IndexError, match=f"0..255, not in .*{value}"):
        level._read_by_kernels(byte_ids, torch.zeros(1, 4, 64, dtype=torch.bfloat16))


def test_the_loss_and_its_gradient_are_those_of_torch():
    logits = (3 * random_numbers(300, 256)).requires_grad_()
    byte_ids = torch.randint(256, (300,), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert training_cpu.can_measure(logits, byte_ids)
        assert not training_cpu.can_measure(logits, byte_ids.int())
        assert not training_cpu.can_measure(logits, byte_ids[1:])
    ours, plain = training_cpu.nll(logits, byte_ids), F.cross_entropy(logits, byte_ids, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    ours, plain = (torch.autograd.grad(nll, logits, random_numbers(300))[0] for nll in (ours, plain))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 8, 16, 17, 100])
@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
@pytest.mark.parametrize("turned", [False, True])
def test_attention_to_placed_keys_is_as_near_to_float32_as_that_of_torch(length, epsilon, turned):
    rotation = Rotary(64, 200)(slice(30, 30 + length)) if turned else None

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = (rotate(F.rms_norm(x, (64,), eps=epsilon) if epsilon else x, rotation) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    qkv = random_numbers(3, length, 3, 2, 64)
    exact = with_gradients(plain, qkv, [], torch.float32)
    ours = with_gradients(lambda x: attend_to_placed(x, rotation, epsilon), qkv, [], torch.bfloat16)
    off, plain_off = errors(ours, exact), errors(with_gradients(plain, qkv, [], torch.bfloat16), exact)
    assert all(own <= 1.3 * their + 1e-3 for own, their in zip(off, plain_off, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("config", "length"),
    [
        (PAPER, 900),
        (RECIPE, 900),
        (WITH_MEMORY, 900),
        (WITH_MEMORY, 4),
        (replace(RECIPE, levels=(replace(LEVELS[0], patch_size=2), *LEVELS)), 900),
        (replace(PAPER, levels=LEVELS[1:]), 200),
    ],
    ids=["paper", "recipe", "memory", "one row", "three levels", "one level"],
)
def test_a_model_learns_the_same_with_them(config, length, recompute, monkeypatch):
    torch.manual_seed(0)
    model, byte_ids = MegaByte(config).train(), torch.randint(256, (2, length))

    def loss_and_gradients(precision: str) -> list[Tensor]:
        loss = MeanNll(model, precision, recompute)(byte_ids)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    exact = loss_and_gradients("fp32")
    calls: list[str] = []
    used = {"linear", "feed_forward", "add_normalized", "normalized", "logits", "nll"}
    used |= {"embedded"} if len(config.levels) > 1 else set()
    for name in used:
        kernel = getattr(training_cpu, name)
        monkeypatch.setattr(training_cpu, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    ours = errors(loss_and_gradients("bf16"), exact)
    assert set(calls) == used
    monkeypatch.setattr(attention, "library", lambda: None)
    monkeypatch.setattr(training_cpu, "library", lambda: None)
    for module in model.modules():
        module.has_kernels = False
    plain = errors(loss_and_gradients("bf16"), exact)
    # A scalar's gradient is one sum of many numbers that are rounded and nearly cancel each other.
    slack = [0.3 if parameter.numel() <= 4 else 5e-3 for parameter in model.parameters()]
    assert all(own <= 1.3 * their + more for own, their, more in zip(ours, plain, [5e-3, *slack], strict=True))
    assert sorted(plain)[len(plain) // 2] < 0.1


@pytest.mark.parametrize("config", [PAPER, RECIPE, WITH_MEMORY], ids=["paper", "recipe", "memory"])
def test_a_model_scores_with_their_sums_and_norms(config, monkeypatch):
    torch.manual_seed(0)
    model, byte_ids = MegaByte(config).eval(), torch.randint(256, (2, 900))
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that can be told from their first values
            parameter.add_(0.1 * torch.randn(parameter.shape))

    @torch.inference_mode()
    def logits(is_bf16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            return model(byte_ids)

    exact, calls = logits(False), []
    for name in ("add_normalized", "normalized"):
        kernel = getattr(training_cpu, name)
        monkeypatch.setattr(training_cpu, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    ours = logits(True)
    assert set(calls) == {"add_normalized", "normalized"}
    monkeypatch.setattr(training_cpu, "library", lambda: None)
    (off, plain_off) = errors([ours, logits(True)], [exact, exact])
    assert off <= 1.1 * plain_off + 1e-4
    assert plain_off < 0.1


def test_a_part_of_the_numbers_is_dropped_and_of_their_gradients_the_same():
    x = torch.ones(500, 1, 64).bfloat16().requires_grad_()
    torch.manual_seed(3)
    once, other = training_cpu.dropped(x, 0.25), training_cpu.dropped(x, 0.25)
    torch.manual_seed(3)
    assert torch.equal(once, training_cpu.dropped(x, 0.25))
    assert once.unique().tolist() == [0, torch.tensor(1 / 0.75).bfloat16()]
    (grad,) = torch.autograd.grad(once, x, torch.full_like(once, 3))
    assert torch.equal(grad == 0, once == 0)
    kept, others = (drawn.detach().flatten() > 0 for drawn in (once, other))
    # Of 32,000 numbers; chance moves each by 0.0025. Neighbours, columns and further calls are independent.
    assert kept.float().mean() == pytest.approx(0.75, abs=0.01)
    for one, two in ((kept[1:], kept[:-1]), (kept[64:], kept[:-64]), (kept[4096:], kept[:-4096]), (kept, others)):
        assert (one & two).float().mean() == pytest.approx(0.75**2, abs=0.015)


def test_the_number_of_threads_changes_no_bit_of_them():
    ours, _, parameters = layers_of("norm")
    x, before, found = random_numbers(700, 1, 64), torch.get_num_threads(), []
    grad, inputs = (random_numbers(2100, width).bfloat16() for width in (384, 320))
    byte_ids, embedding = torch.arange(2100)[None] % 257 - 1, random_numbers(256, 320).requires_grad_()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            of_weight = training_cpu.grads_of_weight(grad, inputs)
            read = training_cpu.embedded(byte_ids, embedding, embedding[0], embedding[:4], inputs[None], 4)
            of_embedding = torch.autograd.grad(read, embedding, inputs[None])
            found.append([*with_gradients(ours, x, parameters, torch.bfloat16), *of_weight, *of_embedding])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_few_numbers_behind_a_relu_are_denormal(name):
    out = layers_of(name)[0](random_numbers(500, 1, 64).bfloat16())  # kept: with it goes what it was made of
    hidden_NF = out.grad_fn.saved_tensors[2]
    assert (hidden_NF.abs() < 1e-10).float().mean() > 0.4  # what was negative
    is_denormal = (hidden_NF != 0) & (hidden_NF.abs() < torch.finfo(torch.bfloat16).tiny)
    assert is_denormal.float().mean() < 1e-3


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_of_what_is_negative_for_all_rows_nothing_is_learned(name):
    ours, _, parameters = layers_of(name)
    with torch.no_grad():
        parameters[1][3] = -1e3
    out = ours(random_numbers(500, 1, 64).bfloat16())
    of_weight, of_bias = torch.autograd.grad(out, parameters[:2], torch.ones_like(out))
    assert (of_weight[3] == 0).all()
    assert of_bias[3] == 0
    assert (of_bias != 0).sum() == len(of_bias) - 1


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_what_is_not_a_number_stays_so(name):
    ours, _, parameters = layers_of(name)
    with torch.no_grad():
        parameters[0][3, 5] = torch.nan
    out = ours(random_numbers(4, 1, 64).bfloat16())
    assert out.isnan().all()
    assert torch.autograd.grad(out, parameters[0], torch.ones_like(out))[0][3].ne(0).any()


@pytest.mark.parametrize("name", ["linear", "relu", "sum and norm", "logits"])
def test_gradients_may_lie_anyhow_in_memory(name):
    ours, _, parameters = layers_of(name)
    x = random_numbers(6, 2, 64).bfloat16().requires_grad_()
    out = ours(x)
    for grad in (torch.ones(1).expand(out.shape), torch.ones(out.shape[::-1]).permute(2, 1, 0)):
        grad = grad.to(out.dtype)
        found = torch.autograd.grad(out, [x, *parameters], grad, retain_graph=True)
        expected = torch.autograd.grad(out, [x, *parameters], grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_parameters_of_a_norm_may_be_of_another_type(dtype):
    ours, plain, parameters = layers_of("norm")
    x = random_numbers(20, 1, 64)
    expected = with_gradients(plain, x, parameters, torch.float32)
    plain.to(dtype)
    found = with_gradients(ours, x, [*plain.parameters()], torch.bfloat16)
    assert max(errors(found, expected)) < 0.02


def test_of_a_sum_without_its_norm_the_gradient_goes_through():
    x = random_numbers(20, 1, 64).bfloat16().requires_grad_()
    summed, _ = training_cpu.add_normalized(x, x, nn.LayerNorm(64))
    assert torch.autograd.grad(summed.sum(), x)[0].eq(2).all()


def test_no_sequences_at_all_are_learned_from():
    model = MegaByte(PAPER)
    MeanNll(model, "bf16")  # from here on it uses the kernels
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 16, 256)


def test_values_that_are_no_bytes_have_no_loss():
    logits = random_numbers(4, 256).requires_grad_()
    nll = training_cpu.nll(logits, torch.tensor([0, 255, 256, -100]))
    assert nll.isnan().tolist() == [False, False, True, True]
    (grad,) = torch.autograd.grad(nll[:2].sum(), logits)
    assert grad.isfinite().all()


def test_widths_that_fill_no_vectors_are_left_to_torch():
    levels = (
        LevelConfig(dim=24, num_layers=1, num_heads=1, ffn_dim=40, patch_size=4),
        LevelConfig(dim=8, num_layers=1, num_heads=1),
    )
    model = MegaByte(MegaByteConfig(levels=levels, max_seq_len=64))
    loss = MeanNll(model, "bf16")(torch.randint(256, (3, 64)))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
