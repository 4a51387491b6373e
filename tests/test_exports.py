"""Scored files as files for other programs: complete, in stated orders, equal to the scores."""

import csv

import numpy as np
import pytest
from PIL import Image

from app import exports


def test_export_writes_bits_in_stream_order_and_in_media_shape(make_png, service, tmp_path):
    result = service.score_file(make_png(width=11, height=9))
    exports.export_score(result, tmp_path / "bits.npz", tmp_path / "heat.png")
    with np.load(tmp_path / "bits.npz") as arrays:
        assert arrays["bits"].dtype == np.float32
        assert arrays["bits"].shape == (4 * 3 * 8 * 8,)  # four tiles
        assert arrays["media_bits"].shape == (9, 11, 3)
        counted = arrays["bits"][arrays["counted"]]
        assert counted.sum(dtype=np.float64) == pytest.approx(arrays["media_bits"].sum(dtype=np.float64))
        assert counted.sum(dtype=np.float64) == pytest.approx(result.total_bits)
    with Image.open(tmp_path / "heat.png") as image:
        assert image.format == "PNG"


def test_a_detailed_score_exports_what_was_expected(make_text, service, tmp_path):
    result = service.score_file(make_text(), detailed=True)
    exports.write_npz(result, tmp_path / "bits.npz")
    with np.load(tmp_path / "bits.npz") as arrays:
        assert arrays["likeliest"].shape == (*result.bits.shape, 5)
        assert (arrays["rank"] == result.expected.rank).all()


@pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
def test_csv_has_a_line_for_each_byte(make, request, service, tmp_path):
    result = service.score_file(request.getfixturevalue(make)(), detailed=True)
    exports.write_csv(result, tmp_path / "bits.csv")
    with (tmp_path / "bits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    stream, _ = result.codec.encode(result.media)
    assert [int(row["offset"]) for row in rows] == list(range(len(stream)))
    assert [int(row["value"]) for row in rows] == stream.tolist()
    assert [int(row["rank"]) for row in rows] == (result.expected.rank.astype(int) + 1).tolist()
    np.testing.assert_allclose([float(row["bits"]) for row in rows], result.bits, atol=6e-5)
    assert int(rows[0]["context"]) == 0
