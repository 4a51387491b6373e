"""Configurations: an exact JSON round trip, and one plain sentence for every setting that does not fit."""

import json

import pytest

from core.config import Config
from core.presets import preset, preset_names

TEXT = preset("text")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_comes_back_from_its_json(name):
    assert Config.from_json(preset(name).to_json()) == preset(name)


def test_settings_that_a_file_leaves_out_have_their_defaults():
    raw = json.loads(TEXT.to_json())
    del raw["train"]["deterministic"]
    assert Config.from_json(json.dumps(raw)).train.deterministic


def test_overrides_replace_settings_at_any_depth():
    config = TEXT.with_overrides(
        ["train.lr=1", "train.deterministic=false", "model.levels.0.dim=560", "train.betas=[0.8, 0.9]", "name=mine"]
    )
    assert (config.train.lr, config.train.deterministic, config.name) == (1.0, False, "mine")
    assert (config.model.levels[0].dim, config.train.betas) == (560, (0.8, 0.9))
    assert config.model.levels[1] == TEXT.model.levels[1]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("train.lr", "'train.lr' must look like train.lr=1e-3"),
        ("train.speed=1", "train.speed: there is no such setting"),
        ("model.levels.7.dim=1", "model.levels.7.dim: there is no such setting"),
        ("train.lr=fast", "train.lr='fast' must be a number"),
        ("train.compile=True", "train.compile='True' must be true or false"),
        ("train.num_steps=1.5", "train.num_steps=1.5 must be a whole number"),
        ("name=12", "name=12 must be a text"),
        ("train.schedule=steps", "train.schedule='steps' must be one of linear, cosine, constant"),
        ("train.parallel=zero", "train.parallel='zero' must be one of ddp, fsdp"),
        ("train.betas=0.9", "train.betas=0.9 must be a list"),
        ("train.betas=[0.9]", "must have 2 entries"),
        ("train.lr=NaN", "lr=nan must be a finite number"),
        ("train.betas=[0.9, 1]", "must both lie in"),
        ("train.seed=99999999999999999999", "seed=99999999999999999999 must be below"),
        ("model.levels.0.num_heads=3", "dim=448 must be divisible by num_heads=3"),
        ("codec.modality=smell", "must be image, audio or text"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(assignment, says):
    with pytest.raises(ValueError, match=says):
        TEXT.with_overrides([assignment])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "format_version=None"),
        (TEXT.to_json().replace('"dropout": 0.1', '"dropout": 1' + "0" * 400), "dropout=.* must be a number"),
        (TEXT.to_json().replace('"dropout"', '"drop"'), "config.model.drop is not a known setting"),
        (TEXT.to_json().replace('"name"', '"nickname"'), "config.nickname is not a known setting"),
    ],
)
def test_a_damaged_configuration_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Config.from_json(text)
