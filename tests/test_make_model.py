"""A shipped model is made by one command, with a card that says what it reaches on data that it has not seen."""

import json
import sys

import numpy as np
import pytest

from core.checkpoint import load_model
from core.errors import UserError
from core.likelihood import score
from tests.tiny_run import tiny_config
from weights import make_model


@pytest.fixture
def root(tmp_path, make_text, monkeypatch):
    monkeypatch.setattr(make_model, "preset", lambda name: tiny_config())
    for seed, name in enumerate(("train", "valid", "test")):
        words = np.random.default_rng(seed).choice([b"lamp ", b"door ", b"sea\n", b"and "], 400)
        make_text(f"root/text/novels_{name}.txt", b"".join(words.tolist()))
    return tmp_path / "root"


def test_the_card_says_what_the_shipped_weights_score_on_the_test_set(root, tmp_path):
    said = []
    card = make_model.make_model("text", root, tmp_path / "run", device="cpu", log=said.append)
    model = load_model(tmp_path / "run" / "shipped")
    test = (root / "text/novels_test.txt").read_bytes()
    for protocol, options in {"test": {}, "test_strided_sliding": {"hop": 16, "strided": True}}.items():
        expected = score(model, test, **options)
        assert card["bits_per_byte"][protocol]["value"] == pytest.approx(expected.bits_per_byte, abs=1e-6)
        assert card["bits_per_byte"][protocol]["num_bytes"] == len(test)
    assert card["bits_per_byte"]["test"]["protocol"] == "basic"
    assert json.loads((tmp_path / "run/shipped/card.json").read_text()) == {"format_version": 1, **card}
    assert card["classical_coders_test"]["xz"] == 2.224
    assert card["data"].endswith(f"{(root / 'text/novels_train.txt').stat().st_size:,} bytes")


def test_it_goes_on_where_it_was_stopped(root, tmp_path):
    first = make_model.make_model("text", root, tmp_path / "run", device="cpu", log=lambda line: None)
    again = make_model.make_model("text", root, tmp_path / "run", resume=True, device="cpu", log=lambda line: None)
    assert again["bits_per_byte"] == first["bits_per_byte"]


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_model", "text", str(tmp_path), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"^error: .*novels_train.*is missing; lay out the data"):
        make_model.main()


def test_a_test_item_in_the_training_data_stops_it_before_it_begins(root, tmp_path):
    line = b"\na line that is long enough to be no chance if it occurs a second time\n"
    for name in ("train", "test"):
        path = root / f"text/novels_{name}.txt"
        path.write_bytes(path.read_bytes() + line)
    with pytest.raises(UserError, match=r"1 items of .* are in .* as well; take them out"):
        make_model.make_model("text", root, tmp_path / "run", device="cpu", log=lambda line: None)
    assert not (tmp_path / "run").exists()
