"""Comparisons are fair in FLOPs, go on after a kill, and say figures with their errors."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from app.comparison import Comparison, compare_models
from core import plans
from core.codecs import build_codec
from core.compare import flops_per_predicted_byte, with_budget
from core.comparison import Measurement, Result, ratio_error, table
from core.config import LevelConfig, MegaByteConfig, PerceiverArConfig, TextCodecConfig
from core.data import build_shards, shared_items
from core.errors import UserError
from core.models import build_model
from core.plans import Member, Split, build_plan, plan_names
from tests.model_cases import random_bytes
from tests.tiny_run import tiny_config

_FINE = LevelConfig(dim=16, num_layers=1, num_heads=2)
MODELS = {
    "megabyte": MegaByteConfig(levels=(dataclasses.replace(_FINE, patch_size=4), _FINE), max_seq_len=32),
    "transformer": MegaByteConfig(levels=(_FINE,), max_seq_len=16),
    "perceiver-ar": PerceiverArConfig(dim=16, num_layers=1, num_heads=2, num_latents=8, max_seq_len=32),
}
BUDGET = 2e7


@pytest.fixture(scope="module")
def tiny_plan():
    """A plan named tiny, of three small models of text."""
    split = Split(train="text/train*", valid="text/valid.txt", test="text/test.txt", test_items=5, segment_bytes=64)
    members = [
        Member(group="text", config=dataclasses.replace(tiny_config(model), name=name), split=split)
        for name, model in MODELS.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plans._PLANS, "tiny", (lambda size: members, {"cpu": BUDGET, "gpu": BUDGET}))
        yield build_plan("tiny", "cpu")


def write_data(root: Path) -> Path:
    (root / "text").mkdir(parents=True)
    for seed, name in enumerate(("train", "valid", "test")):
        words = np.random.default_rng(seed).choice([b"lamp ", b"door ", b"sea\n", b"and "], 400)
        (root / "text" / f"{name}.txt").write_bytes(b"".join(words.tolist()))
    return root


@pytest.fixture
def root(tmp_path):
    return write_data(tmp_path / "root")


class Finished(NamedTuple):
    """A comparison that is done, its data and its folder."""

    comparison: Comparison
    root: Path
    out: Path


@pytest.fixture(scope="module")
def finished(tiny_plan, tmp_path_factory) -> Finished:
    """One for all tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("comparison")
    root = write_data(folder / "root")
    comparison, _ = run(root, folder / "out")
    return Finished(comparison, root, folder / "out")


def run(root, out, **options):
    said = []
    return compare_models("tiny", "cpu", root, out, log=said.append, **options), said


def test_all_models_get_the_same_flops_and_the_same_test_items(finished):
    results = finished.comparison.results
    assert [result.name for result in results] == list(MODELS)
    for result in results:
        # As near as whole steps come.
        step_flops = (
            result.training_flops / json.loads((finished.out / result.name / "config.json").read_text())["train"]["num_steps"]
        )
        assert result.training_flops == pytest.approx(step_flops * result.num_steps)
        assert abs(result.training_flops - BUDGET) <= step_flops / 2 * 1.0001
        assert sum(result.basic.item_bytes) == 5 * 64
        assert result.basic.bits_per_byte < 8.2
        assert len(result.curve) >= 2
        assert result.curve[-1][0] == pytest.approx(result.training_flops)
    text = (finished.root / "text/test.txt").read_bytes()
    assert results[0].num_words == pytest.approx(5 * 64 * len(text.split()) / len(text), rel=0.3)
    megabyte, transformer, perceiver = results
    assert (megabyte.sliding.hop, megabyte.sliding.strided) == (16, True)
    assert (transformer.sliding.hop, transformer.sliding.strided) == (8, False)
    assert perceiver.sliding is None
    assert (perceiver.basic.window, perceiver.basic.hop) == (32, 8)


def test_tables_json_and_plot_say_the_same(finished):
    found = finished.comparison
    saved = json.loads((finished.out / "comparison.json").read_text())
    assert [Result.from_dict(raw) for raw in saved["results"]] == found.results
    markdown = (finished.out / "table.md").read_text()
    for result in found.results:
        figure = f"{result.basic.bits_per_byte:.4f} ± {result.basic.standard_error:.4f}"
        assert f"| {result.training_flops:.3g} | {result.num_steps} |" in markdown
        assert figure in markdown
        assert figure in found.table
    assert f"Words in the scored text: {found.results[0].num_words}." in markdown
    perplexity = 2.0 ** (sum(found.results[0].basic.item_bits) / found.results[0].num_words)
    assert f"{perplexity:.4g}" in markdown
    with Image.open(finished.out / "plot.png") as plot:
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 5


def test_a_table_of_texts_and_pictures_leaves_the_words_of_pictures_out():
    text = Result(
        name="one",
        group="text",
        num_parameters=1,
        flops_per_byte=1.0,
        num_steps=1,
        training_flops=1.0,
        bytes_seen=1,
        seconds=1.0,
        device="cpu",
        basic=Measurement(item_bits=[80.0], item_bytes=[10], window=1, hop=1, strided=False),
        sliding=None,
        num_words=2,
        curve=[],
    )
    _, row_of_text, row_of_pictures = table([text, dataclasses.replace(text, group="pictures", num_words=0)])
    assert row_of_text[-2:] == [f"{2.0**40:.4g}", "-"]
    assert row_of_pictures[-2:] == ["-", "-"]


def test_a_plan_that_has_changed_since_is_not_resumed(tiny_plan, finished, monkeypatch):
    changed = [dataclasses.replace(tiny_plan.members[0], config=tiny_config()), *tiny_plan.members[1:]]
    monkeypatch.setitem(plans._PLANS, "tiny", (lambda size: changed, {"cpu": BUDGET, "gpu": BUDGET}))
    with pytest.raises(UserError, match="begun when the plan had other models"):
        run(finished.root, finished.out, resume=True)


def test_a_killed_comparison_goes_on_and_ends_with_the_same_figures(finished, root, tmp_path):
    def interrupted(line: str) -> None:
        if line.startswith("step") and (tmp_path / "out" / "transformer" / "checkpoints").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_models("tiny", "cpu", root, tmp_path / "out", log=interrupted)
    resumed, said = run(root, tmp_path / "out", resume=True)
    assert any("megabyte (1 of 3) is done already" in line for line in said)
    assert any("going on from" in line for line in said)
    for one, other in zip(finished.comparison.results, resumed.results, strict=True):
        assert (one.basic, one.sliding, one.curve, one.bytes_seen) == (other.basic, other.sliding, other.curve, other.bytes_seen)
    again, said = run(root, tmp_path / "out", resume=True)
    assert again == resumed
    assert all("is done already" in line for line in said)


def test_another_comparison_is_not_mixed_with_what_is_there(finished, tmp_path):
    with pytest.raises(UserError, match="no comparison to resume"):
        run(finished.root, tmp_path / "out", resume=True)
    with pytest.raises(UserError, match="exists and is not empty"):
        run(finished.root, finished.out)
    with pytest.raises(UserError, match=r"was begun with budget 20000000.0, not 1000"):
        run(finished.root, finished.out, resume=True, budget=1000.0)


def test_missing_data_is_named_before_anything_is_trained(tiny_plan, root, tmp_path):
    (root / "text/test.txt").unlink()
    with pytest.raises(UserError, match=r"test.txt is missing; lay out the data as the README says"):
        run(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_test_items_that_were_trained_on_are_found_and_said(tiny_plan, root, tmp_path, make_text):
    line = b"\na line that is long enough to be no chance if it occurs a second time\n"
    for name in ("train", "test"):
        path = root / "text" / f"{name}.txt"
        path.write_bytes(path.read_bytes() + line)
    codec = build_codec(TextCodecConfig())
    train, test = (build_shards([root / "text" / f"{name}.txt"], codec, tmp_path / "cache", print) for name in ("train", "test"))
    assert shared_items(test, train, by_line=True) == 1
    assert shared_items(test, train, by_line=False) == 0
    assert shared_items(train, train, by_line=False) == 1
    said = []

    def end_before_training(line: str) -> None:
        said.append(line)
        if "1 items of text/test.txt are in text/train* as well" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_models("tiny", "cpu", root, tmp_path / "out", log=end_before_training)
    assert not any(line.startswith("step") for line in said)


def test_the_error_of_a_ratio_is_that_of_many_drawings():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, (4000, 40))
    bits = sizes * rng.normal(3.0, 0.5, sizes.shape)
    ratios = bits.sum(axis=1) / sizes.sum(axis=1)
    errors = [ratio_error(b, s) for b, s in zip(bits, sizes, strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)
    assert ratio_error(np.array([5.0]), np.array([2])) == 0.0


def test_a_difference_is_known_better_than_either_figure():
    noise = np.random.default_rng(1).normal(0, 50, 30)
    one, other = (
        Measurement(item_bits=(300 + noise + shift).tolist(), item_bytes=[100] * 30, window=1, hop=1, strided=False)
        for shift in (0.0, 5.0)
    )
    difference, error = other.minus(one)
    assert difference == pytest.approx(0.05)
    assert error < 1e-9 < one.standard_error


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", plan_names())
def test_every_plan_can_be_built_and_its_names_are_folders(name, size):
    plan = build_plan(name, size)
    assert len({member.name for member in plan.members}) == len(plan.members) > 2
    assert all(member.name == member.name.strip("./") and "/" not in member.name for member in plan.members)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", plan_names())
def test_the_models_of_a_group_take_equal_steps_enough_of_them_and_spend_what_they_are_given(name, size):
    plan = build_plan(name, size)
    bytes_per_step = defaultdict(set)
    for member in plan.members:
        with torch.device("meta"):
            flops_per_byte = flops_per_predicted_byte(build_model(member.config), member.config)
        train = with_budget(member.config, flops_per_byte, plan.budget).train
        num_bytes = train.batch_size * member.config.model.num_predicted(member.config.model.max_seq_len)
        bytes_per_step[member.group].add(num_bytes)
        assert train.batch_size % train.micro_batch_size == 0
        assert train.num_steps >= 40
        assert train.num_steps * num_bytes * 3 * flops_per_byte == pytest.approx(plan.budget, rel=0.02)
    assert all(len(sizes) == 1 for sizes in bytes_per_step.values())


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["text", "image32", "image64", "audio"])
def test_a_predicted_byte_costs_the_models_of_a_plan_about_the_same(name, size):
    costs = []
    for member in build_plan(name, size).members:
        with torch.device("meta"):
            costs.append(flops_per_predicted_byte(build_model(member.config), member.config))
    assert max(costs) < 1.5 * min(costs)


def test_an_ablation_changes_one_option_at_a_time():
    plan = build_plan("ablation-recipe", "cpu")
    for group in ("text", "image32"):
        ours, *changed = [member.config for member in plan.members if member.group == group]
        names = {config.name.removesuffix(f"-{group}") for config in changed}
        assert {"activation=relu", "qk_norm=False", "real_previous=False", "unembedder=slices", "optimizer=adamw"} <= names
        for config in changed:
            fields = {
                f.name for f in dataclasses.fields(config.model) if getattr(config.model, f.name) != getattr(ours.model, f.name)
            }
            training = {
                f.name for f in dataclasses.fields(config.train) if getattr(config.train, f.name) != getattr(ours.train, f.name)
            }
            assert len(fields) + len(training - {"lr"}) == 1


def test_an_unknown_plan_is_refused():
    with pytest.raises(ValueError, match="there is no plan 'all'; choose one of text, image32"):
        build_plan("all", "cpu")


@pytest.mark.parametrize("level", [0, 1])
def test_a_level_without_layers_sees_no_future_and_decodes_as_it_reads(level, tolerance):
    levels = [
        LevelConfig(dim=16, num_layers=1, num_heads=2, patch_size=4),
        LevelConfig(dim=16, num_layers=1, num_heads=2, cross_patch=4),
    ]
    levels[level] = dataclasses.replace(levels[level], num_layers=0)
    torch.manual_seed(0)
    model = build_model(tiny_config(MegaByteConfig(levels=tuple(levels), max_seq_len=32, positions="both", init_std=0.2)))
    byte_ids = random_bytes(1, 18)
    with torch.no_grad():
        full = model(byte_ids)
        for t in range(18):
            changed = byte_ids.clone()
            changed[0, t] ^= 1
            assert torch.equal(model(changed)[0, : t + 1], full[0, : t + 1])
    for length in range(10):
        cache = model.new_cache(1, 32)
        logits = [model.prefill(byte_ids[:, :length], cache)]
        logits += [model.step(byte_ids[:, t], cache) for t in range(length, 17)]
        torch.testing.assert_close(torch.stack(logits, 1), full[:, length:], **tolerance[torch.float32])
