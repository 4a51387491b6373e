"""Files nobody vouches for: known by content, refused in one plain sentence, and written whole or not at all."""

import contextlib
import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.codecs import Raw, TextCodec, atomic_file, build_codec, read_media, read_raw, shown, sniff, utf8_decoder
from core.codecs.files import MAX_RAW_BYTES
from core.config import TextCodecConfig
from core.errors import UserError

ODD_TEXTS = [
    b"BMW builds cars.",
    b"P6 is a format.",
    b"ID3 tags are text here",
    b"RIFF",
    b"MM/II",
    b"\xff\xfeU\x00T\x00F\x00",
    b"\xef\xbb\xbfwith a mark\r\nand\rmixed\nlines\x00\x1b[31m",
    b"\x80\x81 invalid UTF-8 \xf0\x9f",
    b"dns.google answers at 8.8.8.8",
    b"DDS is a kind of texture",
    b"DDS and others are textures",
    b"icns, BLP1 and qoif are pictures",
    b"BLP2 too",
    b"qoif as well",
    b"8BPS begins a Photoshop picture",
    b"....moov",
    b"The mdat box follows",
    b"They ftypavif",
    b"P1 2 3",
    b"P1 2 3 are the first of ten parts",
    b"P2 10 20 30 and so on",
    b"P4 8 8 is a seat",
    b"P7 1 2 3",
    b"wvpk begins a WavPack sound",
    b"RF64 is a long WAV",
    b"#!AMRita",
    b"gimp xcf files",
]


def fill_the_disk(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("content", ODD_TEXTS)
def test_odd_text_is_its_own_bytes(tmp_path, content):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    assert sniff(path).name == "raw"
    assert read_media(path).data.tobytes() == content


@given(st.binary(min_size=1, max_size=100))
def test_text_codec_changes_nothing(content):
    codec = build_codec(TextCodecConfig())
    stream, layout = codec.encode(Raw(np.frombuffer(content, np.uint8)))
    assert codec.decode(stream, layout).data.tobytes() == content
    assert layout.document_bytes == len(content)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04", "ZIP"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"II*\x00", "TIFF"),
        (b"ID3\x04\x00", "MP3"),
        (b"\x00\x00\x00\x20ftypisom", "MP4"),
        (b"\x00\x00\x00\x20ftypavif", "AVIF"),
        (b"FORM\x00\x00\x00\x00AIFF", "AIFF"),
        (b"RIFF\x00\x00\x00\x00AVI ", "video"),
        (b"\x00\x00\x00\x08moov", "MP4"),
        (b"DDS \x7c\x00\x00\x00", "picture"),
        (b"icns\x00\x00\x12\x34", "picture"),
        (b"BLP2\x01\x00\x00\x00", "picture"),
        (b"qoif\x00\x00\x01\x00", "picture"),
        (b"gimp xcf v011\x00", "picture"),
        (b"8BPS\x00\x01", "Photoshop"),
        (b"P4\n# a comment\n8 8\n", "PNM"),
        (b"P7\nWIDTH 8\nHEIGHT 8\n", "PNM"),
        (b"dns.\x18\x00\x00\x00", "AU"),
        (b".snd\x00\x00\x00\x18", "AU"),
        (b"wvpk\x00\x01\x00\x00\x10\x04", "sound"),
        (b"RF64\xff\xff\xff\xffWAVE", "sound"),
        (b"#!AMR\n", "sound"),
    ],
)
def test_a_known_container_that_is_not_listed_is_refused_with_what_works(tmp_path, head, what):
    path = tmp_path / "file.txt"
    path.write_bytes(head + b"\x00" * 50)
    with pytest.raises(UserError, match=f"{what}.*PNG, WebP, JPEG.*WAV, FLAC.*--bytes file"):
        read_media(path)
    assert read_raw(path).data.tobytes() == head + b"\x00" * 50


@pytest.mark.parametrize("content", [b"P1\n# a comment\n3 2\n0 1 0\n101\n", b"P2 2 2 255 1 2 3 4\n", b"P3\n1 1\n255\n1 2 3\n"])
def test_a_picture_in_numbers_is_refused(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"PNM.*PNG, WebP, JPEG"):
        read_media(path)


@pytest.mark.parametrize(
    "signature", [b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"fLaC", b"OggS\x00", b"RIFFxxxxWAVE"]
)
def test_a_signature_with_nonsense_behind_it_is_damaged(tmp_path, signature):
    path = tmp_path / "nonsense"
    path.write_bytes(signature + np.random.default_rng(0).bytes(3000))
    with pytest.raises(UserError, match=r"damaged|holds no sound"):
        read_media(path)


@pytest.mark.parametrize("read", [sniff, read_media, read_raw])
def test_what_is_no_ordinary_file_is_refused_without_waiting(tmp_path, read):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {
        "empty": "is empty",
        ".": "is a folder",
        "missing": "does not exist",
        "link": "link to a file that is gone",
        "pipe": "device or a pipe",
        "/dev/zero": "device or a pipe",
        "a\0b": "zero byte",
        "x" * 300: "could not be read",
        "line\nbreak": r"line\\nbreak does not exist",
    }.items():
        with pytest.raises(UserError, match=problem):
            read(os.path.join(tmp_path, name))


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "sparse"
    for head in (b"text", b"\xff\xd8\xff\xe0", b"GIF89a"):
        with path.open("wb") as file:
            file.write(head)
            file.truncate(2**30)
        with pytest.raises(UserError, match="1,073,741,824 bytes"):
            read_media(path)


def test_a_parser_lost_in_a_large_file_is_stopped(tmp_path):
    path = tmp_path / "lost.gif"
    with path.open("wb") as file:
        file.write(b"GIF89a\x01\x00\x01\x00\x00\x00\x00")
        file.truncate(2**27)
    with pytest.raises(UserError, match="damaged"):
        read_media(path)


def test_raw_bytes_up_to_the_limit_are_read(tmp_path):
    path = tmp_path / "most"
    with path.open("wb") as file:
        file.truncate(MAX_RAW_BYTES)
    assert read_raw(path).data.size == MAX_RAW_BYTES


def test_raw_bytes_can_be_handed_to_torch_as_they_are(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    assert read_media(tmp_path / "a").data.flags.writeable


def test_media_may_be_read_from_a_name_of_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff-#-rf.txt"
    with open(path, "wb") as file:
        file.write(b"text")
    assert read_media(os.fsdecode(path)).data.tobytes() == b"text"
    assert shown(path).isascii()


def test_flipped_bits_raise_nothing_but_user_errors(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped"
    for format_name in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path, format_name)
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 60):
            content = bytearray(whole)
            content[place] ^= 1 << rng.integers(8)
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                read_media(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="No space left"):
        fill_the_disk(path)
    assert path.read_bytes() == b"old"
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_written_file_has_ordinary_permissions_and_the_longest_name(tmp_path):
    path = tmp_path / ("n" * 255)
    TextCodec(TextCodecConfig()).write(Raw(np.frombuffer(b"text", np.uint8)), path)
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@given(st.text(max_size=30), st.lists(st.integers(0, 100), max_size=4))
def test_utf8_in_chunks_is_the_same_text(text, cuts):
    content = text.encode("utf-8", "surrogatepass")
    bounds = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    decoder = utf8_decoder()
    chunks = [decoder.decode(content[start:end]) for start, end in itertools.pairwise(bounds)]
    assert "".join(chunks) + decoder.decode(b"", final=True) == content.decode("utf-8", "replace")
