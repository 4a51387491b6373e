"""Pictures: scans and tiles are exact both ways, and reading keeps the meaning of every kind of picture."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.codecs import ImageCodec, Picture, build_codec, read_media
from core.config import ImageCodecConfig
from core.errors import UserError

SIDE = 8

scans = st.sampled_from([("raster", 1), ("patch", 1), ("patch", 2), ("patch", 4), ("patch", 8)])


def make_codec(scan: str = "patch", scan_patch: int = 4, side: int = SIDE) -> ImageCodec:
    return build_codec(ImageCodecConfig(side=side, scan=scan, scan_patch=scan_patch))


def random_picture(height: int, width: int, seed: int = 0) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def outcome(path: Path) -> bytes | str:
    """The bytes of the pixels that a picture file holds, or that it is refused."""
    try:
        return read_media(path).pixels.tobytes()
    except UserError:
        return "refused"


@given(scans, st.integers(SIDE, 30), st.integers(SIDE, 30), st.integers(0, 99))
def test_decode_inverts_encode_at_any_size(scan, height, width, seed):
    codec, picture = make_codec(*scan), random_picture(height, width, seed)
    stream, layout = codec.encode(picture)
    assert np.array_equal(codec.decode(stream, layout).pixels, picture.pixels)


@given(scans, st.integers(SIDE, 30), st.integers(SIDE, 30))
def test_every_sub_pixel_is_counted_once(scan, height, width):
    codec = make_codec(*scan)
    stream, layout = codec.encode(random_picture(height, width))
    assert stream.size == layout.counted.size == layout.num_documents * layout.document_bytes
    assert layout.counted.sum() == 3 * height * width


@given(scans, st.integers(SIDE, 30), st.integers(SIDE, 30))
def test_unscan_takes_the_counted_value_of_each_sub_pixel(scan, height, width):
    codec = make_codec(*scan)
    stream, layout = codec.encode(random_picture(height, width))
    places = np.arange(stream.size, dtype=np.int64)
    unscanned = codec.unscan(places, layout)
    assert unscanned.shape == (height, width, 3)
    assert np.array_equal(np.sort(unscanned, axis=None), places[layout.counted])


def test_unscan_keeps_further_axes():
    codec = make_codec()
    stream, layout = codec.encode(random_picture(9, 11))
    values = np.stack([stream, 255 - stream], axis=1)
    unscanned = codec.unscan(values, layout)
    assert np.array_equal(unscanned[..., 1], 255 - codec.unscan(stream, layout))


def test_raster_scan_is_row_major_rgb():
    picture = random_picture(SIDE, SIDE)
    stream, _ = make_codec("raster").encode(picture)
    assert np.array_equal(stream, picture.pixels.reshape(-1))


def test_patch_scan_is_raster_between_and_within_blocks():
    picture = random_picture(SIDE, SIDE)
    stream, _ = make_codec("patch", 4).encode(picture)
    blocks = [picture.pixels[top : top + 4, left : left + 4].reshape(-1) for top in (0, 4) for left in (0, 4)]
    assert np.array_equal(stream, np.concatenate(blocks))


def test_tiles_are_independent_of_their_neighbours():
    codec, picture = make_codec(), random_picture(2 * SIDE, SIDE)
    stream, layout = codec.encode(picture)
    lower, _ = codec.encode(Picture(picture.pixels[SIDE:]))
    assert np.array_equal(stream[layout.document_bytes :], lower)


def test_last_tiles_shift_inward():
    _, layout = make_codec().encode(random_picture(20, 8))
    assert layout.corners == ((0, 0), (8, 0), (12, 0))


def test_grid_rule_leaves_out_partial_tiles():
    codec, picture = make_codec(), random_picture(20, 9)
    stream, layout = codec.encode(picture, rule="grid")
    assert layout.counted.all()
    assert np.array_equal(codec.decode(stream, layout).pixels, picture.pixels[:16, :8])


@pytest.mark.parametrize("rule", ["tile", "grid"])
def test_a_picture_smaller_than_a_tile_is_refused_with_a_way_out(rule):
    with pytest.raises(UserError, match=r"12x7 pixels.*8x8.*--adapt"):
        make_codec().encode(random_picture(7, 12), rule=rule)


def test_fit_rule_scales_what_the_square_covers():
    codec, wide = make_codec(), random_picture(SIDE, 40)
    stream, layout = codec.encode(wide, rule="fit")
    assert np.array_equal(codec.decode(stream, layout).pixels, wide.pixels[:, 16:24])
    assert layout.notes == ("scaled and cropped from 40x8 to 8x8 pixels",)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (100, 30)])
def test_fit_rule_scales_a_ramp_to_a_ramp(height, width):
    ramp = np.broadcast_to(np.linspace(0, 255, height)[:, None, None], (height, width, 3)).astype(np.uint8)
    codec = make_codec()
    fitted = codec.decode(*codec.encode(Picture(ramp), rule="fit")).pixels.astype(int)
    assert (np.diff(fitted, axis=0) >= 0).all()
    assert (fitted == fitted[:, :1]).all()


@pytest.mark.parametrize("rule", ["fit", "tile"])
def test_a_picture_of_the_right_size_is_left_alone_by_every_rule(rule):
    codec, picture = make_codec(), random_picture(SIDE, SIDE)
    stream, layout = codec.encode(picture, rule=rule)
    assert np.array_equal(codec.decode(stream, layout).pixels, picture.pixels)
    assert layout.notes == ()


@given(scans, st.integers(-5, 300))
def test_a_rounded_prefix_is_the_top_rows_of_the_picture(scan, num_bytes):
    codec, picture = make_codec(*scan), random_picture(SIDE, SIDE)
    stream, layout = codec.encode(picture)
    kept = codec.round_prefix(num_bytes)
    rows = kept // (3 * SIDE)
    is_kept = codec.unscan(np.arange(stream.size) < kept, layout)
    assert is_kept[:rows].all()
    assert not is_kept[rows:].any()
    assert codec.prefix_says(kept) == f"top {rows} of {SIDE} rows"


def test_write_gives_back_the_exact_pixels(tmp_path):
    picture = random_picture(5, 7)
    make_codec().write(picture, tmp_path / "out.png")
    assert np.array_equal(read_media(tmp_path / "out.png").pixels, picture.pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.bmp", {}), ("a.ppm", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"format": "PNG"})],
)
def test_lossless_formats_are_read_exactly_whatever_their_name(tmp_path, name, options):
    picture = random_picture(6, 9)
    read = read_media(saved(tmp_path / name, picture.pixels, **options))
    assert np.array_equal(read.pixels, picture.pixels)
    assert read.notes == ()


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path):
    grey = np.array([[0, 128, 300, 32768, 65535]], np.uint16)
    picture = read_media(saved(tmp_path / "grey.png", grey))
    assert picture.pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert picture.notes == ("16 bits per value scaled to 8",)


@pytest.mark.parametrize(("mode", "value"), [("RGBA", (200, 100, 0, 51)), ("LA", (100, 51))])
def test_alpha_is_laid_on_white(tmp_path, mode, value):
    picture = read_media(saved(tmp_path / "clear.png", Image.new(mode, (4, 4), value)))
    expected = [round(255 + (colour - 255) * 51 / 255) for colour in value[:-1]]
    assert picture.pixels[2, 2].tolist() == (expected * 3)[:3]
    assert picture.notes == ("alpha laid on white",)


def test_a_palette_colour_that_is_transparent_is_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    picture = read_media(saved(tmp_path / "palette.png", image, transparency=0))
    assert picture.pixels[0, :2].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_opaque_alpha_needs_no_note(tmp_path):
    assert read_media(saved(tmp_path / "opaque.png", Image.new("RGBA", (4, 4), (1, 2, 3, 255)))).notes == ()


def test_black_and_white_and_cmyk_become_rgb(tmp_path):
    assert (read_media(saved(tmp_path / "bits.png", Image.new("1", (4, 4), 1))).pixels == 255).all()
    cyan = read_media(saved(tmp_path / "print.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)))).pixels
    assert np.abs(cyan.astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = random_picture(3, 5).pixels
    turned = Image.fromarray(upright)
    # The inverse of what the tag asks a viewer to do.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation > 1:
        turned = turned.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_media(saved(tmp_path / "photo.png", turned, exif=exif))
    assert np.array_equal(picture.pixels, upright)
    assert bool(picture.notes) == (orientation > 1)


def test_of_an_animation_the_first_frame_is_read_and_said(tmp_path):
    frames = [Image.new("L", (6, 6), value) for value in (40, 200)]
    picture = read_media(saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert (picture.pixels == 40).all()
    assert picture.notes == ("first frame of several",)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "ppm"])
def test_a_cut_picture_is_refused_or_whole_at_every_length(tmp_path, suffix):
    path = saved(tmp_path / f"whole.{suffix}", random_picture(6, 6).pixels)
    whole, content = outcome(path), path.read_bytes()
    for num_bytes in range(40, len(content), 7):
        path.write_bytes(content[:num_bytes])
        assert outcome(path) in ("refused", whole)


def test_a_cut_picture_is_refused_every_time(tmp_path):
    path = saved(tmp_path / "cut.png", random_picture(32, 32).pixels)
    path.write_bytes(path.read_bytes()[:-200])
    for _ in range(2):
        with pytest.raises(UserError, match=r"cut short or damaged.*--bytes file"):
            read_media(path)


@pytest.mark.parametrize("size", [(16_385, 1), (7000, 7000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, size):
    path = saved(tmp_path / "bomb.png", np.zeros((1, 1), np.uint8))
    content = bytearray(path.read_bytes())
    content[16:24] = np.array(size, ">u4").tobytes()
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(UserError, match="40,000,000 pixels and 16,384"):
        read_media(path)


@pytest.mark.parametrize("scan", ["raster", "patch"])
def test_augmentation_mirrors_half_of_the_pictures_and_changes_nothing_else(scan):
    codec, picture = make_codec(scan), random_picture(SIDE, SIDE)
    stream, layout = codec.encode(picture)
    mirrored = 0
    for seed in range(100):
        pixels = codec.decode(codec.augmented(stream, np.random.default_rng(seed)), layout).pixels
        is_mirrored = np.array_equal(pixels, picture.pixels[:, ::-1])
        assert is_mirrored or np.array_equal(pixels, picture.pixels)
        mirrored += is_mirrored
    assert 30 <= mirrored <= 70


def test_part_of_a_picture_is_not_mirrored():
    stream = random_picture(SIDE, SIDE).pixels.reshape(-1)[:-3]
    assert all(make_codec().augmented(stream, np.random.default_rng(seed)) is stream for seed in range(8))
