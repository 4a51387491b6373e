"""Our text inside PNG and WAV files: it comes back, and no decoder sees another picture or sound."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from core.codecs import AudioCodec, ImageCodec, Picture, Sound, read_comment, read_media
from core.config import AudioCodecConfig, ImageCodecConfig

COMMENT = '{"seed": 3, "note": "\\u00e9"}'


def test_a_picture_keeps_its_comment_and_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    path = tmp_path / "made.png"
    ImageCodec(ImageCodecConfig(side=8)).write(Picture(pixels), path, COMMENT)
    assert read_comment(path) == COMMENT
    assert Image.open(path).text == {"megabyte": COMMENT}
    assert (read_media(path).pixels == pixels).all()


@pytest.mark.parametrize("num_samples", [1, 2, 1001])
def test_a_sound_keeps_its_comment_and_its_samples(tmp_path, num_samples):
    samples = np.random.default_rng(0).integers(-30_000, 30_000, num_samples).astype(np.int16)
    path = tmp_path / "made.wav"
    AudioCodec(AudioCodecConfig(sample_rate=8000, encoding="mulaw8")).write(Sound(samples, 8000), path, COMMENT)
    assert read_comment(path) == COMMENT
    read = read_media(path)
    assert (read.samples == samples).all()
    assert not read.is_truncated
    with soundfile.SoundFile(path) as file:
        assert file.comment == COMMENT
        assert file.frames == num_samples
    assert int.from_bytes(path.read_bytes()[4:8], "little") == path.stat().st_size - 8


def test_files_of_others_have_no_comment(tmp_path, make_png, make_wav, make_text):
    other = tmp_path / "other.png"
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG", pnginfo=None)
    other.write_bytes(buffer.getvalue())
    for path in (make_png(), make_wav(), make_text(), other):
        assert read_comment(path) is None


def test_damaged_files_have_no_comment_or_a_wrong_one_but_no_error(tmp_path):
    path = tmp_path / "made.png"
    ImageCodec(ImageCodecConfig(side=8)).write(Picture(np.zeros((2, 2, 3), np.uint8)), path, COMMENT)
    content = path.read_bytes()
    sound = tmp_path / "made.wav"
    AudioCodec(AudioCodecConfig(sample_rate=8000, encoding="mulaw8")).write(Sound(np.zeros(9, np.int16), 8000), sound, COMMENT)
    for whole in (content, sound.read_bytes()):
        chance = np.random.default_rng(0)
        for _ in range(200):
            changed = bytearray(whole[: chance.integers(16, len(whole))])
            changed[chance.integers(12, len(changed))] = chance.integers(256)
            path.write_bytes(changed)
            comment = read_comment(path)
            assert comment is None or isinstance(comment, str)
