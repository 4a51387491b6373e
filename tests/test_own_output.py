"""Bytes that a model may make, or anybody: every decoder turns any of them into a result that is shown, or into a sentence."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from page_client import client_of

import core
from app.provenance import FORMAT, read_provenance
from app.render import heatmap
from app.service import Service
from app.views import cards, score_values
from core.codecs import Codec, Picture, Raw, Sound, build_codec, read_media, read_partial, utf8_decoder
from core.config import AudioCodecConfig, ImageCodecConfig, TextCodecConfig
from core.errors import UserError
from tests.test_odd_files import check_plain, check_sentence

SIGNATURES = [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\xff\0\0\0WAVEfmt ", b"RIFF\xff\0\0\0WEBPVP8 ", b"RIFX\0\0\0\x20WAVE",
    b"\xff\xd8\xff\xe0", b"GIF89a", b"BM" + bytes(12) + b"\x28\0\0\0", b"P6 8 8 255\n", b"P5\n#x\n9 9 9\n", b"fLaC\0\0\0\x22",
    b"OggS\0\2", b"PK\3\4", b"%PDF-", b"\x1f\x8b\x08", b"ID3\3", b"\xef\xbb\xbf", b"\xff\xfe",
    f'{{"format": "{FORMAT}", "version": 1, '.encode(),
]  # fmt: skip
ODD = np.frombuffer(b"\0\1\7\x08\t\n\r\x1b[]<>&\"'`$\\{}\x7f\x80\xbf\xc0\xc3\xe2\x80\xae\xed\xa0\xf0\x9f\xf4\xff", np.uint8)
CODECS = [
    build_codec(config)
    for config in (
        ImageCodecConfig(side=8),
        *(AudioCodecConfig(sample_rate=8000, encoding=encoding) for encoding in ("mulaw8", "pcm16le", "pcm16be")),
        TextCodecConfig(),
    )
]


def strings(service: Service, count: int) -> Iterator[bytes]:
    """Samples of the models, uniform bytes, bytes behind the beginning of a known format, and bytes that mean something."""
    chance = np.random.default_rng(0)
    sampled = [
        sample.tobytes()
        for name in ("image32", "audio", "text")
        for sample in core.generate(service.model(name).model, b"", 48, num_samples=-(-count // 12), temperature=1.5)
    ]
    for number in range(count):
        noise = chance.integers(0, 256, chance.integers(1, 400), dtype=np.uint8).tobytes()
        yield (
            sampled[number // 4],
            noise,
            SIGNATURES[number // 4 % len(SIGNATURES)] + noise,
            chance.choice(ODD, len(noise)).tobytes(),
        )[number % 4]


def blank(codec: Codec, num_units: int) -> Picture | Sound | Raw:
    match codec.modality:
        case "image":
            return Picture(np.zeros((8, 8, 3), np.uint8))
        case "audio":
            return Sound(np.zeros(num_units, np.int16), 8000)
    return Raw(np.zeros(num_units, np.uint8))


def require_round_trip(codec: Codec, content: bytes, folder: Path) -> None:
    """As a stream of the codec, the bytes are a medium whose file holds them again, whatever comment it has."""
    _, layout = codec.encode(blank(codec, len(content)))
    stream = np.resize(np.frombuffer(content, np.uint8), layout.num_documents * layout.document_bytes)
    path = folder / f"made{codec.suffix}"
    codec.write(codec.decode(stream, layout), path, json.dumps(content.decode("latin-1")))
    found = path.read_bytes() if codec.modality == "text" else codec.encode(read_media(path))[0].tobytes()
    assert found == stream.tobytes(), (codec.config, content)


def require_shown_or_refused(service: Service, path: Path, folder: Path) -> bool:
    """As a file, the bytes are scored and shown, or refused in a plain sentence. Whether they were shown."""
    for read in (read_media, read_partial, read_provenance):
        try:
            read(path)
        except UserError as error:
            check_sentence(str(error), path)
    try:
        score = service.score_file(path, detailed=True)
        job = service.complete(path, num_bytes=8)
    except ValueError as error:
        check_plain(str(error))
        return False
    assert json.dumps([score_values.item(score, folder), cards.prompt(job)], allow_nan=False)
    assert heatmap(score).size > (100, 100)
    return True


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_bytes_are_a_result_that_is_shown_or_a_sentence(service, tmp_path, count):
    path, num_shown = tmp_path / "any", 0
    for content in strings(service, count):
        for codec in CODECS:
            require_round_trip(codec, content, tmp_path)
        decoder = utf8_decoder()
        pieces = [decoder.decode(content[place : place + 3]) for place in range(0, len(content), 3)]
        assert "".join(pieces) + decoder.decode(b"", final=True) == content.decode("utf-8", "replace")
        path.write_bytes(content)
        num_shown += require_shown_or_refused(service, path, tmp_path)
    assert count // 2 < num_shown < count


@pytest.mark.parametrize("count", [4, pytest.param(400, marks=pytest.mark.slow)])
def test_the_page_shows_any_bytes_or_says_why_not(service, page_server, tmp_path, count):
    client, logged, num_shown = client_of(page_server.url), page_server.log.stat().st_size, 0
    for number, content in enumerate(strings(service, count)):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        try:
            page, facts = client.predict(handle_file(path), "html", api_name="/export")
            [made], _ = client.predict(handle_file(path), "", num_bytes=8, api_name="/generate")
        except AppError as error:
            check_plain(str(error))
            continue
        num_shown += 1
        assert facts["bits_per_byte"] > 0
        assert path.name in Path(page).read_text()
        assert Path(made).stat().st_size > 0
    assert count // 2 < num_shown < count
    assert "Traceback" not in page_server.log.read_bytes()[logged:].decode(errors="replace")
