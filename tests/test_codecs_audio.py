"""Sound: byte encodings are exact both ways, and reading says what it changed and where a file ends early."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.codecs import AudioCodec, Sound, build_codec, read_media, resample
from core.config import AudioCodecConfig
from core.errors import UserError

RATE = 8000
ENCODINGS = ("mulaw8", "pcm16le", "pcm16be")

sample_arrays = arrays(np.int16, st.integers(1, 50))


def make_codec(encoding: str = "mulaw8", sample_rate: int = RATE) -> AudioCodec:
    return build_codec(AudioCodecConfig(encoding=encoding, sample_rate=sample_rate))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3000, num_samples).astype(np.int16)


def sine(frequency_hz: float, sample_rate: int, seconds: float = 0.25) -> np.ndarray:
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    return (10_000 * np.sin(2 * np.pi * frequency_hz * times)).astype(np.int16)


def saved(path: Path, samples: np.ndarray, **options) -> Path:
    soundfile.write(path, samples, RATE, **options)
    return path


def cut(path: Path, num_bytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:num_bytes])
    return path


def test_mulaw_gives_back_each_of_the_256_bytes():
    codec = make_codec()
    stream = np.arange(256, dtype=np.uint8)
    _, layout = codec.encode(Sound(np.zeros(256, np.int16), RATE))
    assert np.array_equal(codec.encode(codec.decode(stream, layout))[0], stream)


def test_mulaw_error_is_at_most_half_a_level():
    codec = make_codec()
    samples = np.arange(-32768, 32768).astype(np.int16)
    stream, layout = codec.encode(Sound(samples, RATE))
    decoded = codec.decode(stream, layout).samples
    levels = codec.decode(np.arange(256, dtype=np.uint8), layout).samples.astype(int)
    assert (np.diff(levels) > 0).all()
    # Half a level in companded units; the steepest place of the curve, at full scale, has steps of 2.2 % of full scale.
    assert np.abs(decoded.astype(int) - samples).max() <= np.diff(levels).max() / 2 * 1.05
    assert np.array_equal(np.sort(stream), stream)


@given(sample_arrays, st.sampled_from(ENCODINGS[1:]))
def test_pcm_decode_inverts_encode(samples, encoding):
    codec = make_codec(encoding)
    stream, layout = codec.encode(Sound(samples, RATE))
    assert stream.size == 2 * samples.size
    assert np.array_equal(codec.decode(stream, layout).samples, samples)


def test_pcm_byte_orders_put_low_or_high_byte_first():
    sound = Sound(np.array([0x1234], np.int16), RATE)
    assert make_codec("pcm16le").encode(sound)[0].tolist() == [0x34, 0x12]
    assert make_codec("pcm16be").encode(sound)[0].tolist() == [0x12, 0x34]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unscan_adds_up_the_bits_of_each_sample(encoding):
    codec = make_codec(encoding)
    stream, layout = codec.encode(Sound(noise(10), RATE))
    bits = np.random.default_rng(0).random(stream.size).astype(np.float32)
    unscanned = codec.unscan(bits, layout)
    assert unscanned.shape == (10,)
    assert unscanned.dtype == np.float32
    assert unscanned.sum() == pytest.approx(bits.sum())


def test_a_prefix_is_rounded_to_whole_samples_and_said_in_seconds():
    codec = make_codec("pcm16le")
    assert codec.round_prefix(8001) == 8000
    assert codec.prefix_says(8000) == "0.50 s"


def test_splice_keeps_the_original_samples_before_the_cut():
    codec, original = make_codec(), Sound(noise(100), RATE)
    decoded = codec.decode(*codec.encode(original))
    spliced = codec.splice(original, 40, decoded).samples
    assert np.array_equal(spliced[:40], original.samples[:40])
    assert np.array_equal(spliced[40:], decoded.samples[40:])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_write_gives_back_the_exact_samples(tmp_path, encoding):
    sound = Sound(noise(99), RATE)
    make_codec(encoding).write(sound, tmp_path / "out.wav")
    read = read_media(tmp_path / "out.wav")
    assert np.array_equal(read.samples, sound.samples)
    assert (read.sample_rate, read.notes, read.is_truncated) == (RATE, (), False)


def test_another_rate_is_refused_unless_resampling_is_asked_for():
    codec, sound = make_codec(sample_rate=16000), Sound(noise(80), RATE)
    with pytest.raises(UserError, match=r"8000 Hz.*16000 Hz"):
        codec.encode(sound)
    stream, layout = codec.encode(sound, resample=True)
    assert stream.size == 160
    assert layout.notes == ("resampled from 8000 Hz to 16000 Hz",)


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (8000, 16000), (16000, 8000), (22050, 16000), (16001, 16000)])
def test_resampling_keeps_a_tone_below_the_lower_nyquist_frequency(source, target):
    frequency = 0.45 * min(source, target) * 0.98
    resampled = resample(Sound(sine(frequency, source), source), target)
    expected = sine(frequency, target)
    inner = slice(target // 40, -target // 40)  # the filter sees silence beyond both ends
    assert resampled.samples.size == pytest.approx(expected.size, abs=1)
    assert np.abs(resampled.samples[: expected.size].astype(int) - expected)[inner].max() <= 4


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (16000, 8000)])
def test_resampling_removes_what_the_lower_rate_cannot_hold(source, target):
    resampled = resample(Sound(sine(0.51 * target, source), source), target)
    assert np.abs(resampled.samples[target // 40 : -target // 40].astype(int)).max() <= 1  # 80 dB below 10,000


def test_resampling_keeps_a_constant():
    resampled = resample(Sound(np.full(4000, 12345, np.int16), 44100), 16000).samples
    assert (resampled[200:-200] == 12345).all()


@pytest.mark.parametrize("options", [{}, {"subtype": "PCM_24"}, {"subtype": "PCM_32"}, {"endian": "BIG", "subtype": "PCM_16"}])
def test_integer_wavs_keep_16_bit_values_exactly(tmp_path, options):
    samples = noise(500)
    assert np.array_equal(read_media(saved(tmp_path / "a.wav", samples, **options)).samples, samples)


@pytest.mark.parametrize(("subtype", "step"), [("PCM_U8", 256), ("FLOAT", 1), ("DOUBLE", 1), ("ULAW", 1024)])
def test_other_wavs_are_turned_into_16_bit_samples_and_it_is_said(tmp_path, subtype, step):
    samples = noise(500)
    sound = read_media(saved(tmp_path / "a.wav", samples / 32768, subtype=subtype))
    assert np.abs(sound.samples.astype(int) - samples).max() <= step
    assert "turned into 16-bit samples" in sound.notes[0]


@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_what_is_beyond_full_scale_is_cut_off_and_it_is_said(tmp_path, num_channels):
    wild = np.array([np.nan, np.inf, -np.inf, 2.0, -2.0, 3e38, -3e38, 0.5], np.float32)
    sound = read_media(saved(tmp_path / "a.wav", np.stack([wild] * num_channels, axis=1), subtype="FLOAT"))
    assert sound.samples.tolist() == [0, 32767, -32768, 32767, -32768, 32767, -32768, 16384]
    assert sound.notes[-1] == "cut off at full scale"


def test_channels_without_bounds_have_a_mean_too(tmp_path):
    sound = read_media(saved(tmp_path / "a.wav", np.array([[np.inf, -np.inf], [0.5, 0.0]], np.float32), subtype="FLOAT"))
    assert sound.samples.tolist() == [0, 8192]


@pytest.mark.parametrize("num_channels", [2, 3, 8])
def test_channels_are_averaged(tmp_path, num_channels):
    channels = np.stack([noise(100, seed) for seed in range(num_channels)], axis=1)
    sound = read_media(saved(tmp_path / "a.wav", channels))
    assert np.abs(sound.samples - channels.mean(axis=1)).max() <= 0.51
    assert sound.notes == (f"mixed down from {num_channels} channels",)


def test_more_than_8_channels_are_refused(tmp_path):
    with pytest.raises(UserError, match="9 channels, at most 8"):
        read_media(saved(tmp_path / "a.wav", np.zeros((10, 9))))


def test_flac_is_read_exactly_whatever_its_name(tmp_path):
    samples = noise(500)
    assert np.array_equal(read_media(saved(tmp_path / "a.raw", samples, format="FLAC")).samples, samples)


@pytest.mark.parametrize("num_samples", [1, 250, 499])
@pytest.mark.parametrize("surplus", [0, 1])
def test_a_cut_wav_is_read_as_far_as_it_reaches(tmp_path, num_samples, surplus):
    samples = noise(500)
    sound = read_media(cut(saved(tmp_path / "a.wav", samples), 44 + 2 * num_samples + surplus))
    assert np.array_equal(sound.samples, samples[:num_samples])
    assert sound.is_truncated
    assert sound.notes[-1].startswith("ends early: ")


def test_a_cut_wav_counts_what_is_missing_at_any_rate(tmp_path, make_wav):
    path = make_wav(num_samples=1000)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 600])
    sound = read_media(path)
    assert (sound.samples.size, sound.num_missing) == (600, 400)
    assert resample(sound, 4000).num_missing == 200


def test_a_cut_wav_says_how_much_is_there(tmp_path):
    sound = read_media(cut(saved(tmp_path / "a.wav", noise(2 * RATE)), 44 + RATE))
    assert sound.notes == ("ends early: 0.50 s of 2.00 s are there",)


def test_a_cut_flac_is_read_as_far_as_its_blocks_reach(tmp_path):
    samples = noise(20_000)
    path = saved(tmp_path / "a.flac", samples)
    sound = read_media(cut(path, path.stat().st_size // 2))
    assert 4096 <= sound.samples.size < samples.size
    assert np.array_equal(sound.samples, samples[: sound.samples.size])
    assert sound.is_truncated


@pytest.mark.parametrize("missing", [0.5, 0.01])
def test_a_cut_ogg_says_that_it_ends_early(tmp_path, missing):
    path = tmp_path / "a.ogg"
    soundfile.write(path, noise(80_000), RATE, format="OGG", subtype="VORBIS")
    whole = read_media(path)
    assert (whole.samples.size, whole.is_truncated) == (80_000, False)
    sound = read_media(cut(path, round(path.stat().st_size * (1 - missing))))
    assert 0 < sound.samples.size < 80_000
    assert sound.is_truncated
    assert sound.notes[-1] == f"ends early: {sound.seconds:.2f} s are there"


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF])
def test_a_wav_whose_recorder_left_the_length_open_is_read_to_its_end(tmp_path, length):
    samples = noise(500)
    path = saved(tmp_path / "a.wav", samples)
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", length)
    path.write_bytes(content)
    sound = read_media(path)
    assert np.array_equal(sound.samples, samples)
    assert not sound.is_truncated


@pytest.mark.parametrize("num_bytes", [12, 20, 40, 43])
def test_a_wav_cut_in_its_header_is_refused(tmp_path, num_bytes):
    with pytest.raises(UserError, match="damaged"):
        read_media(cut(saved(tmp_path / "a.wav", noise(10)), num_bytes))


def test_a_wav_without_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no sound"):
        read_media(saved(tmp_path / "a.wav", noise(0)))


def test_ten_minutes_are_the_most_that_is_read(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(601 * 1000, np.int16), 1000)
    with pytest.raises(UserError, match="longer than 600 s"):
        read_media(path)


@pytest.mark.parametrize(
    ("subtype", "num_channels", "seconds"), [("VORBIS", 1, 600), ("VORBIS", 2, 600), ("OPUS", 1, 480), ("OPUS", 2, 240)]
)
def test_an_ogg_that_is_too_long_is_refused_before_it_is_decoded(tmp_path, monkeypatch, subtype, num_channels, seconds):
    path = tmp_path / "a.ogg"
    with soundfile.SoundFile(path, "w", 8000, num_channels, subtype=subtype) as target:
        for _ in range(seconds + 1):
            target.write(np.zeros((8000, num_channels), np.int16))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UserError, match=f"longer than {seconds} s"):
        read_media(path)


def test_a_header_that_lies_about_the_length_does_not_stop_the_count(tmp_path):
    samples = noise(500)
    path = saved(tmp_path / "a.wav", samples)
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", 0x7FFFFFF0)
    path.write_bytes(content)
    assert np.array_equal(read_media(path).samples, samples)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_augmentation_is_a_gain_of_at_most_6_db_with_either_sign(encoding):
    codec, samples = make_codec(encoding), noise(20_000)
    stream, layout = codec.encode(Sound(samples, RATE))
    gains = []
    for seed in range(40):
        changed = codec.decode(codec.augmented(stream, np.random.default_rng(seed)), layout).samples
        gain = np.vdot(changed, samples.astype(float)) / np.vdot(samples, samples.astype(float))
        assert np.abs(changed - gain * samples).max() < 0.05 * 32768  # steps of mu-law before and after, at the top
        gains.append(gain)
    decibels = 20 * np.log10(np.abs(gains))
    assert decibels.min() > -6.1
    assert decibels.max() < 6.1
    assert decibels.std() > 2
    assert 10 <= np.sum(np.array(gains) < 0) <= 30


def test_augmentation_leaves_no_gaps_between_the_values_of_a_louder_sound():
    codec = make_codec("pcm16be")
    stream, layout = codec.encode(Sound(np.random.default_rng(0).integers(-50, 50, 200_000).astype(np.int16), RATE))
    values = codec.decode(codec.augmented(stream, np.random.default_rng(4)), layout).samples
    counts = np.unique(np.abs(values), return_counts=True)[1]
    assert np.abs(values).max() > 80
    assert counts[1:40].min() > 0.9 * counts[1:40].mean()
