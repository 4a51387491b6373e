"""The model is the paper's, sees no future, and decodes step by step as it reads at once."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.config import LevelConfig
from core.models import MegaByte, build_model
from core.models.megabyte import Level
from core.plans import _paper_form
from core.presets import preset, preset_names
from tests.model_cases import CASES, CONTEXT, build, naive_megabyte, random_bytes, two_level
from tests.tiny_run import tiny_config


def test_exact_form_equals_the_equations():
    model = build(CASES["exact"]).double()
    byte_ids = random_bytes(CONTEXT)
    with torch.no_grad():
        # The model returns float32, so agreement ends at its resolution; the sums before are float64.
        expected = naive_megabyte(model, byte_ids.tolist()).float()
        torch.testing.assert_close(model(byte_ids[None])[0], expected, rtol=1e-5, atol=1e-5)


def dependence(model: MegaByte, num_bytes: int) -> torch.Tensor:
    """|d sum(logits[t]) / d embedding[s]| as a (t, s) table, through every byte embedding of the model."""
    gates = torch.ones(CONTEXT, 1, requires_grad=True)

    def gate(_module, _inputs, embedded):
        return embedded * gates[: embedded.shape[1]]

    hooks = [level.embedder.embedding.register_forward_hook(gate) for level in model.levels]
    weights = torch.randn(256, generator=torch.Generator().manual_seed(3))
    logits_TV = model(random_bytes(1, num_bytes))[0]
    table = torch.stack([torch.autograd.grad(logits @ weights, gates, retain_graph=True)[0][:, 0] for logits in logits_TV])
    for hook in hooks:
        hook.remove()
    assert (table[:, num_bytes:] == 0).all()  # the bytes that fill the last patch
    return table[:, :num_bytes].abs()


# num_bytes is no multiple of any patch, so that the padding of the last patch is under test as well.
@pytest.mark.parametrize("name", CASES)
def test_gradient_sees_all_of_the_past_and_none_of_the_future(name):
    table = dependence(build(CASES[name]), num_bytes=2 * 8 + 3)
    past = torch.ones_like(table, dtype=torch.bool).tril(-1)
    assert (table[~past] == 0).all()
    assert (table[past] > 0).all()


@pytest.mark.parametrize("name", ["exact", "flat", "all_rotary"])
def test_without_the_shift_the_causality_test_fails(name, monkeypatch):
    monkeypatch.setattr(Level, "_shifted_elements", lambda self, byte_ids_BT, cache: self.embedder(byte_ids_BT))
    table = dependence(build(CASES[name]), num_bytes=16)
    assert (table.triu() > 0).any()


@pytest.mark.parametrize("name", CASES)
def test_rows_with_prompts_of_unequal_length_decode_as_alone(name, tolerance):
    model, byte_ids = build(CASES[name]), random_bytes(3, CONTEXT)
    lengths = [0, 8, 16]
    with torch.no_grad():
        full = model(byte_ids)
    cache = model.new_cache(3, CONTEXT)
    for row, length in enumerate(lengths):
        first = model.prefill(byte_ids[row : row + 1, :length], cache.rows(slice(row, row + 1)))
        torch.testing.assert_close(first[0], full[row, length], **tolerance[torch.float32])
    for step in range(15):
        logits = model.step(torch.stack([byte_ids[row, length + step] for row, length in enumerate(lengths)]), cache)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row], full[row, length + step + 1], **tolerance[torch.float32])


@pytest.mark.parametrize("name", CASES)
def test_dropout_falls_on_the_branches_and_not_on_the_embeddings(name):
    model, byte_ids = build(dataclasses.replace(CASES[name], dropout=0.5)).train(), random_bytes(2, CONTEXT)
    assert not torch.equal(model(byte_ids), model(byte_ids))
    for level in model.levels:
        for block in level.transformer.blocks:
            for linear in (block.attention.out, block.ffn_out):
                torch.nn.init.zeros_(linear.weight)
    assert torch.equal(model(byte_ids), model(byte_ids))


def test_no_activation_is_copied_for_its_gradient():
    nodes, todo = set(), [build(CASES["exact"])(random_bytes(1, CONTEXT)).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo.extend(before for before, _ in node.next_functions)
    names = {node.name() for node in nodes}
    assert "ReluBackward0" in names
    assert "CopySlices" not in names  # of a change in place to a view


def test_a_used_cache_starts_again_without_a_trace(tolerance):
    model, byte_ids = build(CASES["all_rotary"]), random_bytes(1, 20)
    cache = model.new_cache(1, CONTEXT)
    model.prefill(random_bytes(1, 31, seed=9), cache)
    reused = model.prefill(byte_ids, cache)
    assert torch.equal(reused, model.prefill(byte_ids, model.new_cache(1, CONTEXT)))


def test_a_copied_cache_goes_on_like_the_original():
    model, byte_ids = build(CASES["all_rotary"]), random_bytes(1, 20)
    cache, copies = model.new_cache(1, CONTEXT), model.new_cache(1, CONTEXT)
    model.prefill(byte_ids[:, :10], cache)
    copies.copy_from(cache)
    for t in range(10, 20):
        assert torch.equal(model.step(byte_ids[:, t], cache), model.step(byte_ids[:, t], copies))


@pytest.mark.parametrize("name", ["text", "image32", "audio"])
def test_untrained_model_knows_nothing(name):
    torch.manual_seed(0)
    model, byte_ids = build_model(preset(name)).eval(), random_bytes(1, 768)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(byte_ids)[0], byte_ids[0])
    assert nats.item() / torch.log(torch.tensor(2.0)).item() == pytest.approx(8.0, abs=0.15)


def test_one_level_equals_torch_transformer(tolerance):
    config = two_level().levels[1]
    flat = build(type(CASES["flat"])(levels=(config,), max_seq_len=CONTEXT, init_std=0.2))
    level = flat.levels[0]
    layer = torch.nn.TransformerEncoderLayer(config.dim, config.num_heads, config.ffn_dim, batch_first=True, norm_first=True)
    reference = torch.nn.TransformerEncoder(layer, config.num_layers, norm=level.transformer.norm, enable_nested_tensor=False)
    for theirs, ours in zip(reference.layers, level.transformer.blocks, strict=True):
        theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = ours.attention.qkv.weight, ours.attention.qkv.bias
        theirs.self_attn.out_proj = ours.attention.out
        theirs.linear1, theirs.linear2, theirs.norm1, theirs.norm2 = ours.ffn_in, ours.ffn_out, ours.attention_norm, ours.ffn_norm
    byte_ids = random_bytes(2, 19)
    with torch.no_grad():
        embedded = level.embedder.embedding(byte_ids) + level.embedder.positions.weight[:19]
        shifted = torch.cat((level.pad.expand(2, 1, -1), embedded[:, :-1]), dim=1)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(19)
        hidden = reference.eval()(shifted, mask=mask, is_causal=True)
        torch.testing.assert_close(flat(byte_ids), hidden @ level.embedder.embedding.weight.T, **tolerance[torch.float32])


PAPER_MILLIONS = {  # Table 15: global, local
    "paper-text": (758, 262),
    "paper-generation": (1300, 218),  # Section 6.2
    "paper-image64": (2700, 350),
    "paper-image64-matched": (1300, 1300),
    "paper-image256": (125, 125),
    "paper-image640": (125, 83),
    "paper-audio": (350, 125),
}


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_paper_presets_have_the_paper_s_parameters(name):
    with torch.device("meta"):
        model = build_model(preset(name))
    per_level = [sum(parameter.numel() for parameter in level.parameters()) for level in model.levels]
    assert per_level == pytest.approx([millions * 1e6 for millions in PAPER_MILLIONS[name]], rel=0.05)
    assert sum(per_level) == model.num_parameters()


def test_every_paper_model_is_a_preset():
    assert {name for name in preset_names() if name.startswith("paper-")} == set(PAPER_MILLIONS)
    with pytest.raises(ValueError, match="choose one of text, image32"):
        preset("nothing")


@pytest.mark.parametrize("name", ["exact", "all_learned", "flat", "three_levels"])
def test_flop_count_equals_the_counted_ones(name):
    model, byte_ids = build(CASES[name]), random_bytes(1, CONTEXT)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(byte_ids)
    # The counter knows nothing of the fused attention kernel and sees that the last element of a level is not embedded.
    attention = 0.0
    for level in model.levels:
        own = level.config
        keys = (level.row_length + 1) / 2 + own.cross_patch
        attention += 4 * own.num_layers * own.dim * keys / level.span
    counted = counter.get_total_flops() / CONTEXT
    assert model.flops_per_byte(CONTEXT) - attention == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_cache_bytes_are_those_of_the_cache(name):
    model = build(CASES[name])
    assert model.cache_bytes(3, 17) == model.new_cache(3, 17).num_bytes


def test_no_bytes_in_no_logits_out():
    assert build(CASES["exact"])(random_bytes(2, 0)).shape == (2, 0, 256)


def test_all_weights_of_the_papers_form_begin_alike():
    """A.1: N(0, 0.006), truncated at two sigma; biases 0, norms 1 and 0."""
    torch.manual_seed(0)
    level = LevelConfig(dim=64, num_layers=3, num_heads=2)
    form = _paper_form(dataclasses.replace(level, patch_size=4), level, 64)
    model = build_model(tiny_config(dataclasses.replace(form, init_std=0.006)))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            assert parameter.std().item() == pytest.approx(0.88 * 0.006, rel=0.1), name  # 0.88: what truncation leaves
            assert parameter.abs().max() <= 0.012


def test_lengths_beyond_the_context_are_refused():
    model = build(CASES["exact"])
    with pytest.raises(ValueError, match="33 bytes exceed the model's context of 32"):
        model(random_bytes(1, 33))
    with pytest.raises(ValueError, match="32 bytes leave no room"):
        model.prefill(random_bytes(1, 32), model.new_cache(1, 32))
    with pytest.raises(ValueError, match=r"must lie in 1\.\.32"):
        model.new_cache(1, 33)
    cache = model.new_cache(1, CONTEXT)
    model.prefill(random_bytes(1, 31), cache)
    with pytest.raises(ValueError, match="no byte can follow"):
        model.step(random_bytes(1), cache)


def test_rows_out_of_phase_are_refused():
    model = build(CASES["exact"])
    cache = model.new_cache(2, CONTEXT)
    model.prefill(random_bytes(1, 1), cache.rows(slice(0, 1)))
    model.prefill(random_bytes(1, 2), cache.rows(slice(1, 2)))
    with pytest.raises(ValueError, match="not at one place inside their patches"):
        model.step(random_bytes(2), cache)
