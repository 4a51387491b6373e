"""Training data: files become shards exactly once, and batches are a pure function of seed and step."""

import lzma
import resource

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.codecs import Codec, Picture, build_codec
from core.config import AudioCodecConfig, ImageCodecConfig, TextCodecConfig
from core.data import ByteData, Loader, build_shards, collect_files, evaluation_windows, shared_files
from core.errors import UserError

TEXT = build_codec(TextCodecConfig())
IMAGE = build_codec(ImageCodecConfig(side=8, scan_patch=4))
AUDIO = build_codec(AudioCodecConfig(sample_rate=8000))


def counting_data(num_bytes: int, document_bytes: int = 0) -> ByteData:
    """Bytes 0, 1, 2 ... 255, 0 ...; one document unless told otherwise."""
    offsets = np.arange(0, num_bytes + 1, document_bytes or num_bytes)
    return ByteData(np.arange(num_bytes).astype(np.uint8), offsets)


def make_loader(data: ByteData, **options) -> Loader:
    return Loader(data, **{"seq_len": 10, "batch_size": 4, "seed": 3, "aligned": False} | options)


@pytest.fixture
def shards(tmp_path):
    """Builds shards and gives back the data and the lines of the log."""

    def build(codec: Codec, *paths) -> tuple[ByteData, list[str]]:
        lines: list[str] = []
        return build_shards(list(paths), codec, tmp_path / "cache", lines.append), lines

    return build


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "files"
    path.mkdir()
    return path


def test_text_shards_are_the_files_one_after_another(shards, folder):
    (folder / "b.txt").write_bytes(b"second")
    (folder / "a.txt.xz").write_bytes(lzma.compress(b"first"))
    data, lines = shards(TEXT, folder)
    assert data.bytes.tobytes() == b"firstsecond"
    assert data.document_offsets.tolist() == [0, 5, 11]
    assert lines == []


def test_a_mosaic_gives_all_its_pictures_in_row_order(shards, folder):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "mosaic.webp", lossless=True)
    data, _ = shards(IMAGE, folder)
    expected = [pixels[top : top + 8, left : left + 8] for top in (0, 8) for left in (0, 8, 16)]
    for start, tile in zip(data.document_offsets[:-1], expected, strict=True):
        _, layout = IMAGE.encode(Picture(tile))
        assert np.array_equal(IMAGE.unscan(data.bytes[start : start + 192], layout), tile)


def test_sound_at_another_rate_is_resampled_and_it_is_said(shards, folder):
    soundfile.write(folder / "a.wav", np.zeros(160, np.int16), 16000)
    soundfile.write(folder / "b.flac", np.zeros(50, np.int16), 8000)
    data, lines = shards(AUDIO, folder)
    assert data.document_offsets.tolist() == [0, 80, 130]
    assert lines == ["1 of 2 files resampled from 16000 Hz to 8000 Hz"]


def test_other_files_are_skipped_with_the_reason(shards, folder):
    (folder / "good.txt").write_bytes(b"good")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / "empty").touch()
    (folder / "doc.pdf").write_bytes(b"%PDF-1.7")
    (folder / "bad.xz").write_bytes(b"\xfd7zXZ\x00 nonsense")
    (folder / "loop").symlink_to(folder)
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    data, lines = shards(TEXT, folder)
    assert data.bytes.tobytes() == b"good"
    reasons = {line.partition(": ")[0].rpartition("/")[2]: line for line in lines}
    assert "starts with a dot" in reasons[".hidden"]
    assert "is empty" in reasons["empty"]
    assert "PDF" in reasons["doc.pdf"]
    assert "damaged xz" in reasons["bad.xz"]
    assert "link to a folder" in reasons["loop"]
    assert "it is image, the model reads text" in reasons["picture.png"]


def test_what_fails_halfway_leaves_no_bytes_behind(shards, folder):
    noise = np.random.default_rng(0).bytes(300_000)
    (folder / "a.xz").write_bytes(lzma.compress(noise)[:-100_000])
    (folder / "b.txt").write_bytes(b"whole")
    data, lines = shards(TEXT, folder)
    assert data.bytes.tobytes() == b"whole"
    assert len(lines) == 1


def test_a_full_disk_is_not_taken_for_a_bad_file(shards, folder):
    (folder / "a.txt").write_bytes(b"x" * 3_000_000)
    (folder / "b.txt").write_bytes(b"y")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"\.bin could not be written"):
            shards(TEXT, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_pictures_smaller_than_the_model_are_skipped(shards, folder):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (7, 9)).save(folder / "b.png")
    data, lines = shards(IMAGE, folder)
    assert len(data) == 192
    assert "7x9 pixels" in lines[0]


def test_a_shard_is_reused_until_a_file_or_the_codec_changes(shards, folder, tmp_path):
    path = folder / "a.txt"
    path.write_bytes(b"one")
    (folder / "skip.pdf").write_bytes(b"%PDF-")
    _, first_lines = shards(TEXT, path, folder / "skip.pdf")
    made = sorted((tmp_path / "cache").iterdir())
    _, second_lines = shards(TEXT, path, folder / "skip.pdf")
    assert sorted((tmp_path / "cache").iterdir()) == made
    assert first_lines == second_lines
    path.write_bytes(b"three")
    assert shards(TEXT, path)[0].bytes.tobytes() == b"three"


def test_a_damaged_shard_is_built_again(shards, folder, tmp_path):
    (folder / "a.txt").write_bytes(b"whole")
    shards(TEXT, folder)
    for leftover in ("*.bin", "*.json"):
        (damaged,) = (tmp_path / "cache").glob(leftover)
        damaged.write_bytes(b"{")
        assert shards(TEXT, folder)[0].bytes.tobytes() == b"whole"


def test_no_usable_file_is_refused(shards, folder):
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    with pytest.raises(UserError, match=r"no text data.*1 files were skipped"):
        shards(TEXT, folder)
    with pytest.raises(UserError, match="does not exist"):
        shards(TEXT, folder / "missing")


def test_files_are_collected_in_sorted_order_through_folders(folder):
    for name in ("b/2", "b/1", "a"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"text")
    files, skipped = collect_files([folder], TEXT)
    assert [str(path.relative_to(folder)) for path in files] == ["a", "b/1", "b/2"]
    assert skipped == []


def test_a_batch_depends_on_seed_and_step_alone():
    data = counting_data(1000)
    first, second = make_loader(data), make_loader(data)
    late = first.batch(70)
    for step in range(5):
        second.batch(step)
    assert np.array_equal(second.batch(70), late)
    assert not np.array_equal(make_loader(data, seed=4).batch(70), late)


@given(st.integers(10, 300), st.integers(1, 12), st.booleans())
def test_an_epoch_visits_every_window_once(num_bytes, seq_len, aligned):
    data = counting_data(num_bytes)
    if aligned:
        data = counting_data(num_bytes - num_bytes % seq_len or seq_len, seq_len)
    if len(data) < seq_len:
        return
    loader = make_loader(data, seq_len=seq_len, batch_size=1, aligned=aligned)
    num_windows = loader.windows_per_epoch
    for epoch in range(3):
        firsts = sorted(loader._start(epoch * num_windows + index) for index in range(num_windows))
        assert set(np.diff(firsts)) <= {seq_len}
        assert firsts[0] >= 0
        assert firsts[-1] + seq_len <= len(data)


def test_unaligned_epochs_cut_the_data_at_different_offsets():
    loader = make_loader(counting_data(1000), batch_size=1)
    offsets = {loader._start(epoch * loader.windows_per_epoch) % 10 for epoch in range(200)}
    assert offsets == set(range(10))


@pytest.mark.parametrize("num_bytes", [50, 95, 96, 200])
def test_epochs_together_see_every_byte(num_bytes):
    loader = make_loader(counting_data(num_bytes), seq_len=32, batch_size=1)
    seen = {int(value) for step in range(1000) for value in loader.batch(step)[0]}
    assert seen == set(range(num_bytes))


def test_aligned_windows_lie_side_by_side_from_where_documents_begin():
    loader = make_loader(counting_data(230, document_bytes=23), aligned=True, batch_size=20)
    assert sorted(loader.batch(0)[:, 0].tolist()) == sorted([*range(0, 230, 23), *range(10, 230, 23)])
    assert {window[0] % 23 for window in loader.batch(1)} == {0, 10}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_process_sees(world_size):
    data = counting_data(1000)
    whole = make_loader(data)
    parts = [make_loader(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 40):
        assert np.array_equal(np.concatenate([part.batch(step) for part in parts]), whole.batch(step))


def test_reading_ahead_gives_the_same_batches_from_any_step():
    loader = make_loader(counting_data(1000))
    batches = list(loader.iterate(5, 11))
    assert len(batches) == 11
    for step, batch in enumerate(batches, start=5):
        assert np.array_equal(batch.numpy(), loader.batch(step))


def test_reading_ahead_can_be_left_early():
    batches = make_loader(counting_data(1000)).iterate(0, 10**9)
    next(batches)
    batches.close()


def test_too_little_data_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"9 bytes.*needs 10"):
        make_loader(counting_data(9))
    with pytest.raises(UserError, match=r"9 bytes.*needs 10"):
        evaluation_windows(counting_data(9), 10, 1, aligned=False)
    with pytest.raises(UserError, match="none of the 4 documents has 10 bytes"):
        make_loader(counting_data(20, document_bytes=5), aligned=True)
    with pytest.raises(UserError, match="divisible"):
        make_loader(counting_data(100), batch_size=3, world_size=2)


def test_evaluation_windows_are_spread_over_the_data_and_do_not_overlap():
    windows = evaluation_windows(counting_data(255), 10, 5, aligned=False)
    assert windows[:, 0].tolist() == [0, 60, 120, 180, 240]
    assert evaluation_windows(counting_data(255), 10, 100, aligned=False).shape == (25, 10)


def test_aligned_evaluation_windows_begin_where_documents_begin_as_in_training():
    data = counting_data(72, document_bytes=18)
    assert evaluation_windows(data, 10, 100, aligned=True)[:, 0].tolist() == [0, 18, 36, 54]
    assert sorted(make_loader(data, aligned=True).batch(0)[:, 0].tolist()) == [0, 18, 36, 54]


def test_files_of_both_splits_are_found_under_any_name(shards, folder):
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(name.encode())
    (folder / "link.txt").symlink_to(folder / "a.txt")
    train, _ = shards(TEXT, folder / "a.txt")
    both, _ = shards(TEXT, folder / "b.txt", folder / "link.txt")
    assert shared_files(both, train) == [folder / "link.txt"]
    apart, _ = shards(TEXT, folder / "b.txt")
    assert shared_files(apart, train) == []


def test_windows_begin_at_whole_units_and_at_every_one_of_them():
    data = counting_data(205)
    starts = {int(row[0]) for step in range(300) for row in make_loader(data, unit=2).batch(step)}
    assert all(start % 2 == 0 for start in starts)
    assert len(starts) > 60


def test_augmentation_depends_on_the_window_alone():
    def augment(window: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return window + np.uint8(generator.integers(256))

    data = counting_data(200)
    plain = make_loader(data).batch(5)
    whole = make_loader(data, augment=augment).batch(5)
    shares = [make_loader(data, augment=augment, rank=rank, world_size=2).batch(5) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(shares), whole)
    changes = whole - plain
    assert (changes == changes[:, :1]).all()
    assert len(np.unique(changes)) > 1
