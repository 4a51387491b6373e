"""The shipped models hold nothing they should not know, and what there is to see of them is made the same way each time."""

import hashlib
import lzma
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from app.service import Service
from core.checkpoint import load_model, shipped_models
from core.errors import UserError
from core.likelihood import score
from tests.test_readme import cut_samples
from weights import make_samples

SAMPLES = Path(__file__).parents[1] / "app" / "samples"


@pytest.mark.parametrize("limit", [1 << 11, pytest.param(1 << 14, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", shipped_models())
def test_uniform_random_bytes_cost_a_shipped_model_8_bits_or_more(name, limit):
    """The leak alarm: a law that sums to one cannot do better on bytes that it has not seen."""
    model = load_model(name)
    num_bytes = min(2 * model.config.max_seq_len, limit) // model.config.patch_size * model.config.patch_size
    stream = np.random.default_rng(20261125).integers(0, 256, num_bytes, dtype=np.uint8)
    assert score(model, stream).bits_per_byte >= 7.9


@pytest.mark.parametrize("name", ["lake.png", "lamp.txt", "vowels.wav"])
@pytest.mark.parametrize("samples", ["cut short", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_samples_of_the_page_are_scored_in_detail_by_the_shipped_models(name, samples, tmp_path):
    """What the page does with them: in the numbers that the models compute in, with what they expected."""
    folder = SAMPLES
    if samples == "cut short":
        cut_samples(folder := tmp_path / "samples")
    result = Service().score_file(folder / name, detailed=True)
    assert 0 < result.bits_per_byte < 8
    assert len(result.expected.rank) == len(result.expected.entropy) == len(result.bits)
    assert np.isfinite(result.bits).all()
    entropy = result.expected.entropy.astype(np.float32)
    assert ((entropy >= 0) & (entropy <= 8.01)).all()
    likeliest = result.expected.rank == 0
    stream, _ = result.codec.encode(result.media)
    assert (result.expected.likeliest[likeliest, 0] == stream[likeliest]).all()


def test_samples_of_all_models_are_made_the_same_way_each_time(tiny_models, make_png, make_wav, make_text, tmp_path, monkeypatch):
    monkeypatch.setattr(make_samples, "SECONDS", (0.01, 0.06))
    for number in range(3):
        make_png(f"image/photos64_test/{number}.png", seed=number)
        make_wav(f"audio/wake16k_test/{number}.wav", seed=number)
    make_text("text/novels_test.txt", b"The lamp was lit.\n\nNobody came, and the door stood open.\n" * 100)
    service = Service(weights=tiny_models, runs=tmp_path / "none")
    found = []
    for out in (tmp_path / "first", tmp_path / "second"):
        make_samples.make(tmp_path, out, service)
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"README.md", "image32.webp", "audio-1.wav", "audio-2.wav", "audio-3.wav"}
    page = (tmp_path / "first" / "README.md").read_text()
    assert page.count("Made:") == make_samples.NUM_TEXTS
    with pytest.raises(UserError, match="is missing; lay out the data"):
        make_samples.make(tmp_path / "first", tmp_path / "third", service)

    # The same as one mosaic, a FLAC in a folder, and packed.
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "image/photos64_test").iterdir())]
    for path in (tmp_path / "image/photos64_test").iterdir():
        path.unlink()
    Image.fromarray(np.hstack(pictures)).save(tmp_path / "image/photos64_test/all.webp", lossless=True)
    (tmp_path / "audio/wake16k_test/more").mkdir()
    for path in (tmp_path / "audio/wake16k_test").glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(tmp_path / "audio/wake16k_test/more" / f"{path.stem}.flac", samples, rate)
        path.unlink()
    text = tmp_path / "text/novels_test.txt"
    text.with_suffix(".txt.xz").write_bytes(lzma.compress(text.read_bytes()))
    text.unlink()
    make_samples.make(tmp_path, tmp_path / "third", service)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "third").iterdir()} == found[0]
