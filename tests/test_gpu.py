"""The same promises on a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from app.service import Service
from core.config import LevelConfig, MegaByteConfig
from core.kernels.gpu import has_training_kernels
from core.law import SampleConfig, uniforms
from core.learner import MeanNll, Nll
from core.likelihood import score
from core.lockstep import Job, Lockstep
from core.models import MegaByte
from core.models.layers import attend
from core.sample import Sampler, generate
from tests.model_cases import CASES, CONTEXT, build, random_bytes
from tests.tiny_run import run_tiny, tiny_config

# Widths of no whole tiles.
TRAINED_LEVELS = (
    LevelConfig(dim=96, num_layers=2, num_heads=3, ffn_dim=200),
    LevelConfig(dim=96, num_layers=1, num_heads=3, ffn_dim=200, patch_size=4),
    LevelConfig(dim=72, num_layers=2, num_heads=3, ffn_dim=200, cross_patch=2),
)
HAS_TRAINING_KERNELS = torch.cuda.is_available() and has_training_kernels(torch.device("cuda"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    # What torch.compile's own parts warn of.
    pytest.mark.filterwarnings(
        "ignore:.*script_method.*:DeprecationWarning",
        "ignore:.*should not be instantiated:DeprecationWarning",
        "ignore:TensorFloat32",
        r"ignore:\s*Online softmax",
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_cached_steps_on_the_gpu_equal_the_full_forward_on_the_cpu(name, tolerance):
    model, byte_ids = build(CASES[name]), random_bytes(2, CONTEXT)
    with torch.no_grad():
        expected = model(byte_ids)
        model.cuda()
        torch.testing.assert_close(model(byte_ids.cuda()).cpu(), expected, **tolerance[torch.float32])
    cache = model.new_cache(2, CONTEXT)
    logits = [model.prefill(byte_ids[:, :9].cuda(), cache)]
    logits += [model.step(byte_ids[:, t].cuda(), cache) for t in range(9, CONTEXT - 1)]
    torch.testing.assert_close(torch.stack(logits, 1).cpu(), expected[:, 9:], **tolerance[torch.float32])


@pytest.mark.parametrize("name", ["exact", "all_rotary", "three_levels"])
def test_bf16_scores_are_close_to_the_cpu_s(name):
    model = build(CASES[name])
    stream = np.random.default_rng(0).integers(0, 256, 20 * CONTEXT, dtype=np.uint8)
    on_cpu, on_gpu = score(model, stream), score(model.cuda(), stream)
    assert (on_cpu.engine, on_gpu.engine) == ("torch-fp32", "cuda-bf16")
    assert on_gpu.bits_per_byte == pytest.approx(on_cpu.bits_per_byte, rel=0.005)


@pytest.mark.parametrize("way", ["plain", "compiled", "fused", "fused, many rows"])
@pytest.mark.parametrize("name", ["exact", "recipe_all", "all_rotary", "three_levels", "flat"])
def test_captured_graphs_give_the_logits_of_the_cpu(name, way, tolerance):
    num_rows = 6 if way == "fused, many rows" else 3
    model, byte_ids = build(CASES[name]), random_bytes(num_rows, CONTEXT)
    with torch.no_grad():
        expected = model(byte_ids)
    patch_size = model.config.patch_size
    batch = Lockstep(model.cuda(), num_rows, CONTEXT, compiled=way == "compiled", is_fused=way.startswith("fused"))
    positions = [0, 2 * patch_size, 3 * patch_size] * (num_rows // 3)
    given_BR = np.full((num_rows, batch.round_size), -1)
    for row, position in enumerate(positions):
        prefix = byte_ids[row, :position].numpy().astype(np.uint8)
        batch._begin(row, Job(prefix, 1, SampleConfig(), uniforms(0, 0)), given_BR)
    while max(positions) < CONTEXT:
        given_BR[:, :patch_size] = np.stack([byte_ids[row, p : p + patch_size].numpy() for row, p in enumerate(positions)])
        batch._load(positions, given_BR, [], patch_size)
        for offset, phase in enumerate(batch.phases(max(positions), patch_size)):
            batch.make_byte(phase)
            wanted = torch.stack([expected[row, p + offset] for row, p in enumerate(positions)])
            torch.testing.assert_close(batch.logits_BV.cpu(), wanted, **tolerance[torch.float32])
        positions = [p + patch_size for p in positions]


@pytest.mark.parametrize("name", ["exact", "recipe", "full_unembedder", "cross_patch_rotary", "flat"])
def test_fused_draws_are_those_of_the_law(name):
    model = build(CASES[name]).cuda()
    laws = [SampleConfig(), SampleConfig(temperature=0.5), SampleConfig(temperature=0.0)]
    made = []
    for is_fused in (False, True):
        jobs = [Job(np.arange(5, dtype=np.uint8), 20, law, uniforms(3, row)) for row, law in enumerate(laws)]
        batch = Lockstep(model, 3, CONTEXT, has_filters=False, is_fused=is_fused)
        bits = [[], [], []]
        for index, chunk in batch.run(jobs):
            bits[index].append(chunk.bits)
        made.append(([job.history() for job in jobs], [np.concatenate(row) for row in bits]))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["cuda-bf16", "cuda-bf16-64", "cuda-bf16-fused", "cuda-bf16-64-fused"])
def test_a_seed_gives_the_same_bytes_beside_any_neighbours_on_the_gpu(engine, monkeypatch):
    monkeypatch.setenv("MEGABYTE_ENGINE", engine)
    model = build(CASES["all_rotary"]).cuda()
    assert Sampler(model, b"", 1, SampleConfig()).engine == engine
    alone = generate(model, b"abc", 20, seed=5)[0]
    assert np.array_equal(alone, generate(model, [b"abc", b"other"], 20, seed=5, num_samples=3)[0])


def test_compiled_attention_of_tiny_rows_equals_the_plain_one(tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(40, 2, rows, 16, device="cuda", generator=generator) for rows in (4, 8, 8))
    mask = torch.ones(4, 8, dtype=torch.bool, device="cuda").tril(4)
    torch.testing.assert_close(torch.compile(attend)(q, k, v, mask), attend(q, k, v, mask), **tolerance[torch.float32])


@pytest.mark.skipif(not HAS_TRAINING_KERNELS, reason="no GPU for the kernels on this machine")
@pytest.mark.parametrize("way", ["eager", "compiled", "recomputed"])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("levels", [TRAINED_LEVELS[:1], TRAINED_LEVELS[1:]], ids=["flat", "cross-patch"])
def test_products_of_training_are_as_near_to_float32_as_plain_ones(levels, activation, way):
    options = {"positions": "rotary", "qk_norm": True, "activation": activation, "init_std": 0.1}
    config = MegaByteConfig(levels=levels, max_seq_len=300, **options)
    byte_ids, gradients = random_bytes(3, 288).cuda(), []
    for precision, with_kernels in (("fp32", False), ("bf16", False), ("bf16", True)):
        torch.manual_seed(0)
        model = MegaByte(config).cuda()
        objective = (MeanNll if with_kernels else Nll)(model, precision, recompute=way == "recomputed")
        assert (model.levels[0].transformer.blocks[0].has_kernels) == with_kernels
        (torch.compile(objective) if with_kernels and way == "compiled" else objective)(byte_ids).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    exact, plain, ours = gradients
    for name, gradient in exact.items():
        plain_off, off = ((found[name] - gradient).norm() / gradient.norm() for found in (plain, ours))
        assert off <= 1.3 * plain_off + 1e-3, name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_the_gpu_learns_and_goes_on_where_it_stopped(tmp_path, compiled):
    settings = {"lr": 1e-2, "batch_size": 16, "precision": "bf16", "compile": compiled}
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):  # each run has its own graph
        run_tiny(tmp_path, config=tiny_config(num_steps=50, **settings), num_values=4, device="cuda")
        result = run_tiny(tmp_path, config=tiny_config(num_steps=100, **settings), num_values=4, device="cuda", resume=True)
    assert result.steps == 100
    assert 2.0 - 0.05 < result.bits_per_byte < 2.2


def test_the_app_works_on_the_gpu(tiny_models, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"The lamp was lit. " * 20)
    service = Service("auto", weights=tiny_models, runs=tiny_models / "no-runs")
    assert service.score_file(tmp_path / "a.txt").engine == "cuda-bf16"
    job = service.complete(tmp_path / "a.txt", num_bytes=40, samples=3, seed=1)
    for _ in job.run():
        pass
    assert [result.engine for result in job.results] == ["cuda-bf16-fused"] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_a_model_on_another_gpu_than_the_current_one_makes_the_same_bytes_there():
    model = build(CASES["all_rotary"]).to("cuda:0")
    expected = generate(model, b"abc", 20, seed=5, num_samples=2)
    torch.cuda.synchronize(0)
    taken = torch.cuda.memory_reserved(0)
    other = build(CASES["all_rotary"]).to("cuda:1")
    made = generate(other, b"abc", 20, seed=5, num_samples=2)
    assert all(map(np.array_equal, made, expected))
    assert torch.cuda.memory_reserved(0) == taken  # nothing was captured there
    assert torch.cuda.current_device() == 0
