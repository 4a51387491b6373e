"""Odd and hostile files: each keeps its meaning or is refused in one plain sentence, in little time and memory."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from odd_files import ROOT, exif, odd_files, picture, pixels, samples, sound, wav
from page_client import client_of
from PIL import Image

from core.codecs import Picture, Raw, Sound, read_media, read_partial, shown
from core.errors import UserError

MAX_SECONDS = 2.0
MAX_BYTES = 300e6  # beyond the program's own start
NAMES = list(odd_files())
LIBRARY_WORDS = re.compile(
    r"PIL|Pillow|libsndfile|soundfile|numpy|Error|Exception|Traceback|errno|\b0x[0-9a-f]+|cannot identify|truncated|broken data"
    r"|unrecognized|decoder|buffer|IDAT|IHDR|<.*>",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name, file in odd_files().items():
        (folder / name).write_bytes(file.content)
    return folder


def opened_in_a_process(paths: list[Path]) -> list[dict]:
    """What becomes of files that a process of its own opens one after another, with the time and memory of each."""
    command = [sys.executable, Path(__file__).with_name("odd_files.py"), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    return [{"name": path.name} | json.loads(line) for path, line in zip(paths, lines, strict=True)]


def check_bounds(opened: dict, max_seconds: float = MAX_SECONDS, max_bytes: float = MAX_BYTES) -> None:
    assert opened["kind"] in ("Picture", "Sound", "Raw", "UserError"), opened
    assert opened["seconds"] < max_seconds, opened
    assert opened["peak_bytes"] < max_bytes, opened
    assert opened["events"] == [], opened


def check_sentence(sentence: str, path: Path) -> None:
    """One line that names the file, says what is wrong and what to do, in our own words."""
    assert sentence.startswith(shown(path))
    said = sentence.removeprefix(shown(path))
    check_plain(said)
    assert re.search(r"[;,] (\w+ )*(give|score|make|save|which|cut|resample|so)", said), sentence


def check_plain(sentence: str) -> None:
    assert sentence.isprintable()
    assert not LIBRARY_WORDS.search(sentence), sentence


def test_there_are_enough_of_them():
    assert len(NAMES) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_file_keeps_its_meaning_or_is_refused_in_a_plain_sentence(folder, name):
    file, path = odd_files()[name], folder / name
    if isinstance(file.expected, str):
        with pytest.raises(UserError, match=file.expected) as refusal:
            read_media(path)
        check_sentence(str(refusal.value), path)
        return
    media = read_media(path)
    if isinstance(file.expected, bytes):
        assert isinstance(media, Raw)
        assert media.data.tobytes() == file.expected
        return
    values = media.pixels if isinstance(media, Picture) else media.samples
    assert isinstance(media, Picture if file.expected.ndim == 3 else Sound)
    assert values.shape == file.expected.shape
    assert np.abs(values.astype(int) - file.expected.astype(int)).max() <= file.tolerance
    assert file.notes in "; ".join(media.notes)


def test_each_takes_little_time_and_memory_and_starts_nothing(folder):
    for opened in opened_in_a_process([folder / name for name in NAMES]):
        check_bounds(opened)
        if "bomb" in opened["name"]:
            check_bounds(opened, 1.0, 100e6)


def test_the_command_line_has_a_score_or_a_sentence_for_each(folder, cli):
    paths = [folder / name for name in NAMES]
    exit_code, out, err = cli("score", "--json", "--", *paths)
    scored = [json.loads(line)["file"] for line in out[:-1]]
    refused = [line for line in err if line.startswith("error: ")]
    assert exit_code == 1
    assert len(scored) + len(refused) == len(paths)
    assert len(scored) > len(paths) // 3
    for path in paths:
        [said] = [line for line in refused if line.startswith(f"error: {path}: ")] if str(path) not in scored else [""]
        check_plain(said.removeprefix(f"error: {path}: "))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_page_has_a_score_or_a_sentence_for_each(folder, page_server, every):
    client, logged = client_of(page_server.url), page_server.log.stat().st_size
    for name in NAMES[::every]:
        try:
            assert client.predict(handle_file(folder / name), "", api_name="/score")["num_bytes"] > 0
        except AppError as error:
            check_plain(str(error))
    assert "Traceback" not in page_server.log.read_bytes()[logged:].decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_takes_little_time_and_memory_in_a_new_process(folder, name):
    [opened] = opened_in_a_process([folder / name])
    check_bounds(opened)
    assert opened["waited"] < MAX_SECONDS, opened


def test_only_listed_formats_are_tried(folder, monkeypatch):
    tried = set()
    really_open = Image.open

    def open_image(file, formats=None):
        tried.update(formats or ["any"])
        return really_open(file, formats=formats)

    monkeypatch.setattr(Image, "open", open_image)
    for name in NAMES:
        with contextlib.suppress(UserError):
            read_media(folder / name)
        with contextlib.suppress(UserError):
            read_partial(folder / name)
    assert tried == {"PNG", "WEBP", "JPEG", "BMP", "GIF", "PPM"}


SPARSE_HEADS = {
    "text": b"text",
    "jpg": picture(pixels(), "JPEG"),
    "gif": picture(pixels(), "GIF")[:-1],
    "webp": picture(pixels(), "WEBP"),
    "wav": wav(b"", claimed=2**30 - 44),
    "unfinished.wav": wav(b"", claimed=0),
    "flac": sound(samples(), format="FLAC")[:42],
    "ogg": sound(samples() / 32768, format="OGG"),
}


def test_a_sparse_file_of_1_gb_is_refused_at_once(tmp_path):
    paths = [tmp_path / name for name in SPARSE_HEADS]
    for path, head in zip(paths, SPARSE_HEADS.values(), strict=True):
        path.write_bytes(head)
        os.truncate(path, 2**30)
    for opened in opened_in_a_process(paths):
        check_bounds(opened, 1.0, 50e6)
        assert opened["kind"] == "UserError", opened


@pytest.mark.parametrize(
    ("name", "options", "height"),
    [("a.webp", {"lossless": True, "method": 0, "quality": 0}, 3800), ("a.jpg", {"progressive": True}, 4700)],
)
def test_kinds_whose_decoders_take_more_memory_have_lower_limits(tmp_path, name, options, height):
    path = tmp_path / name
    Image.new("L", (height, height)).save(path, **options)
    with pytest.raises(UserError, match=f"{height}x{height} pixels"):
        read_media(path)


def largest(name: str) -> Image.Image:
    """A noisy picture of as many pixels as its kind may have."""
    height, width, num_channels = {
        "webp": (3500, 4000, 4), "progressive.jpg": (4400, 5000, 4), "noise.png": (5000, 8000, 4), "sideways.jpg": (5000, 8000, 3)
    }[name]  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 64, (height, width, num_channels), dtype=np.uint8)
    noise += (np.arange(width, dtype=np.uint8) % 180)[:, None]
    return Image.fromarray(noise, {3: "RGB", 4: "CMYK" if name.endswith("jpg") else "RGBA"}[num_channels])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("webp", {"format": "WEBP", "lossless": True, "method": 0, "quality": 0}),
        ("progressive.jpg", {"quality": 90, "progressive": True}),
        ("noise.png", {"compress_level": 1}),
        ("sideways.jpg", {"quality": 90, "exif": exif(6)}),
    ],
)
def test_the_largest_pictures_stay_within_the_bounds(tmp_path, name, options):
    largest(name).save(tmp_path / name, **options)
    [opened] = opened_in_a_process([tmp_path / name])
    check_bounds(opened)
    assert opened["kind"] == "Picture"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seconds", "options"),
    [
        ("a.wav", 600, {"subtype": "PCM_24"}),
        ("a.flac", 600, {"subtype": "PCM_16"}),
        ("vorbis.ogg", 600, {"subtype": "VORBIS"}),
        ("opus.ogg", 240, {"subtype": "OPUS"}),
    ],
)
def test_the_longest_sounds_stay_within_the_bounds(tmp_path, name, seconds, options):
    noise = np.random.default_rng(0).normal(0, 0.1, (48_000, 2))
    with soundfile.SoundFile(tmp_path / name, "w", 48_000, 2, **options) as target:
        for _ in range(seconds - 1):
            target.write(noise)
    [opened] = opened_in_a_process([tmp_path / name])
    check_bounds(opened)
    assert opened["kind"] == "Sound"
