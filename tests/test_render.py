"""Numbers to pictures: one fixed scale, clipping marked, every kind of content drawn at every length."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from app import render
from app.palette import ABOVE, BELOW, DIVERGING, NO_VALUE, SEQUENTIAL, VIRIDIS
from app.render import heat, heatmap, hex_heatmap, overlay, text_heatmap, waveform_heatmap
from app.service import Service
from core.errors import UserError


def has_colour(image: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(image) == colour).all(axis=-1).any())


def test_the_table_is_viridis():
    assert VIRIDIS.shape == (256, 3)
    known = {0: (68, 1, 84), 64: (59, 82, 139), 128: (33, 145, 140), 192: (94, 201, 98), 255: (253, 231, 37)}
    for index, colour in known.items():
        assert np.abs(VIRIDIS[index].astype(int) - colour).max() <= 1


def lightness(table: np.ndarray) -> np.ndarray:
    return table @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_table_grows_lighter_at_every_step(name):
    steps = lightness(SEQUENTIAL[name])
    assert np.diff(steps).min() > -0.6
    assert steps[-1] - steps[0] > 150


def test_differences_grow_darker_on_both_sides_of_nothing():
    steps = lightness(DIVERGING)
    assert np.abs(DIVERGING[127:129].astype(int) - (244, 243, 240)).max() <= 3
    assert np.diff(steps[:128]).min() > -0.6
    assert np.diff(steps[128:]).max() < 0.6


def test_what_lies_beyond_a_scale_is_like_no_colour_of_any_table():
    for table in (*SEQUENTIAL.values(), DIVERGING):
        for colour in (ABOVE, BELOW):
            assert np.abs(table.astype(int) - colour).sum(axis=1).min() > 100


def test_the_scale_is_fixed_whatever_the_values():
    assert (heat(np.array([0.0])) == VIRIDIS[0]).all()
    assert (heat(np.array([8.0])) == VIRIDIS[255]).all()
    assert (heat(np.array([4.0, 1.0]))[0] == heat(np.array([4.0, 7.9]))[0]).all()


def test_what_exceeds_the_scale_is_marked_and_no_colour_of_it():
    assert tuple(heat(np.array([8.01]))[0]) == ABOVE
    assert tuple(heat(np.array([np.inf]))[0]) == ABOVE
    assert tuple(heat(np.array([np.nan]))[0]) == NO_VALUE


def test_colours_keep_the_shape_of_the_bits():
    assert heat(np.zeros((2, 3, 4))).shape == (2, 3, 4, 3)
    assert heat(np.zeros((2, 3, 4))).dtype == np.uint8


def test_overlay_goes_from_picture_to_colours():
    rng = np.random.default_rng(0)
    pixels, colours = rng.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    assert (overlay(pixels, colours, 0.0) == pixels).all()
    assert (overlay(pixels, colours, 1.0) == colours).all()
    assert np.abs(overlay(pixels, colours) - (pixels / 2 + colours / 2)).max() <= 0.5


def test_a_picture_shows_itself_and_the_mean_bits_of_each_pixel():
    pixels = np.full((32, 32, 3), 200, dtype=np.uint8)
    bits = np.zeros((32, 32, 3), dtype=np.float32)
    bits[0, 0] = (3.0, 6.0, 9.0)
    image = np.asarray(render.picture_heatmap(pixels, bits))
    scale = image.shape[0] // 32
    heat_left = 32 * scale + render._MARGIN
    assert (image[0, 0] == 200).all()
    assert (image[scale // 2, heat_left + scale // 2] == heat(np.array([6.0]))[0]).all()
    assert (image[-1, heat_left] == VIRIDIS[0]).all()


def test_a_large_picture_is_drawn_smaller():
    pixels = np.zeros((1500, 3000, 3), dtype=np.uint8)
    assert render.picture_heatmap(pixels, np.zeros(pixels.shape, np.float32)).width < 3 * 1100


@pytest.mark.parametrize("num_samples", [1, 2, 500, 1024, 5000])
def test_a_waveform_is_coloured_from_end_to_end(num_samples):
    samples = np.where(np.arange(num_samples) % 2, 900, -900).astype(np.int16)
    image = waveform_heatmap(samples, np.full(num_samples, 8.0, np.float32), 8000)
    coloured = (np.asarray(image) == VIRIDIS[255]).all(axis=-1).any(axis=0)
    assert coloured.all()


def test_a_silent_sound_is_drawn():
    assert has_colour(waveform_heatmap(np.zeros(100, np.int16), np.zeros(100, np.float32), 8000), tuple(VIRIDIS[0]))


def test_each_character_has_the_mean_bits_of_its_bytes():
    data = np.frombuffer("aé\xff".encode() + b"\xff", dtype=np.uint8)  # characters of 1, 2 and 2 bytes, and a stray byte
    bits = np.array([1.0, 2.0, 4.0, 9.0, 9.0, 5.0], dtype=np.float32)
    cells = list(render._characters(data, bits))
    assert [cell.num_bytes for cell in cells] == [1, 2, 2, 1]
    assert [cell.colour for cell in cells] == [tuple(heat(np.array([mean]))[0].tolist()) for mean in (1, 3, 9, 5)]


@pytest.mark.parametrize("content", [b"a", b"\n", b"\x1b[31m\r\n\x00\t", b"caf\xc3\xa9 \xff\xc3", "漢字".encode(), b"x" * 30_000])
def test_any_text_is_drawn(content):
    data = np.frombuffer(content, dtype=np.uint8)
    assert has_colour(text_heatmap(data, np.full(len(data), 8.0, np.float32)), tuple(VIRIDIS[255]))


def test_a_character_that_the_font_lacks_is_a_dot():
    assert [render._visible(char) for char in "a~\n\t漢\U0010ffff"] == ["a", "~", " ", ".", ".", "."]


def test_a_long_text_says_that_it_is_cut():
    assert render._cut_note(30_000, 10_000) == "the first 10,000 of 30,000 bytes"
    assert render._cut_note(10, 10) == ""


@pytest.mark.parametrize("num_bytes", [1, 15, 16, 17, 5000])
def test_a_hex_dump_has_a_row_for_every_16_bytes(num_bytes):
    data = np.arange(num_bytes, dtype=np.int64).astype(np.uint8)
    image = hex_heatmap(data, np.zeros(num_bytes, np.float32))
    rows = -(-min(num_bytes, render._MAX_HEX_BYTES) // 16) + (num_bytes > render._MAX_HEX_BYTES)
    assert image.height == rows * render._CELL_HEIGHT


def test_the_legend_shows_both_ends_and_the_clipped_colour():
    for colour in (tuple(VIRIDIS[0]), tuple(VIRIDIS[255]), ABOVE):
        assert has_colour(render.legend(), colour)


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_every_modality_has_a_heatmap_with_legend(make, request, tiny_models):
    result = Service(weights=tiny_models).score_file(request.getfixturevalue(make)())
    assert has_colour(heatmap(result), ABOVE)


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_the_difference_from_another_score_is_drawn_byte_on_byte(make, request, tiny_models):
    service, path = Service(weights=tiny_models), request.getfixturevalue(make)()
    result = service.score_file(path)
    dearer = replace(result, bits=result.bits + 1)
    values = render._media_values(dearer, "difference", result)
    assert values.shape == result.media_bits.shape
    np.testing.assert_allclose(values, 1.0, atol=1e-5)
    image = heatmap(dearer, "difference", "viridis", result)
    assert has_colour(image, tuple(heat(np.array([1.0]), render.scale_of("difference"))[0]))
    assert has_colour(image, tuple(DIVERGING[0]))
    assert has_colour(image, BELOW)


def test_a_difference_ends_where_the_other_score_does(make_text, tiny_models):
    service = Service(weights=tiny_models)
    long, short = (service.score_file(make_text(f"{size}.txt", b"The lamp was lit. " * size)) for size in (3, 2))
    values = render._media_values(long, "difference", short)
    assert np.isnan(values).tolist() == [False] * 36 + [True] * 18
    np.testing.assert_allclose(values[:36], long.bits[:36] - short.bits)
    assert has_colour(heatmap(long, "difference", other=short), NO_VALUE)


def test_a_difference_needs_a_score_that_lies_byte_on_byte(make_text, make_png, tiny_models):
    service = Service(weights=tiny_models)
    text, picture, wide = (service.score_file(path) for path in (make_text(), make_png(), make_png("wide.png", width=16)))
    with pytest.raises(UserError, match="choose a file to compare with"):
        heatmap(text, "difference")
    for one, other in ((text, picture), (picture, wide)):
        with pytest.raises(UserError, match="one kind"):
            heatmap(one, "difference", other=other)


@pytest.mark.parametrize("measure", ["rank", "entropy", "excess"])
@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_every_measure_has_a_heatmap_in_its_colours(make, measure, request, tiny_models):
    result = Service(weights=tiny_models).score_file(request.getfixturevalue(make)(), detailed=True)
    image = heatmap(result, measure, "cividis")
    table = DIVERGING if measure == "excess" else SEQUENTIAL["cividis"]
    assert has_colour(image, tuple(table[0]))
    assert has_colour(image, BELOW) == (measure == "excess")
