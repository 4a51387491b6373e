"""Completions of larger pictures and of files cut short, branches, and settings that make the same bytes again."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.provenance import provenance_of, read_provenance, sidecar_of
from app.service import Completion, CompletionJob
from app.settings import CompletionSettings
from core.codecs import read_media
from core.sample import SampleConfig, Sampler

SIDE, BLOCK = 8, 4  # of the tiny picture model


def run(job: CompletionJob) -> list[Completion]:
    for _ in job.run():
        pass
    return job.results


def cut(path: Path, num_bytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:num_bytes])
    return path


class TestTiles:
    def test_a_larger_picture_keeps_its_size_and_its_kept_rows(self, service, make_png):
        path = make_png(width=21, height=19)
        job = service.complete(path, keep_bytes=3 * 21 * 7)
        [completion] = run(job)
        assert completion.media.pixels.shape == (19, 21, 3)
        assert completion.media.known is None
        np.testing.assert_array_equal(completion.media.pixels[:7], read_media(path).pixels[:7])
        assert job.plan.says.startswith("keeps top 7 of 19 rows")
        assert "at its own size in 9 tiles: each reads up to 4 rows above it and nothing at its sides" in job.notes[-1]

    @pytest.mark.parametrize(("height", "kept"), [(8, 3), (9, 9 - 1), (12, 0), (13, 5), (19, 4), (19, 12), (24, 23)])
    @pytest.mark.parametrize("width", [8, 11, 16])
    def test_every_new_byte_has_one_place_and_every_place_a_byte(self, service, make_png, height, width, kept):
        job = service.complete(make_png(width=width, height=height), keep_bytes=3 * width * kept)
        [completion] = run(job)
        numbers = job.canvas_of(completion.made).numbers()
        kept_rows = job.plan.num_bytes_kept // (3 * width)
        assert (numbers[:kept_rows] == -1).all()
        new = numbers[kept_rows:]
        assert (new >= 0).all()
        assert np.unique(new).size == new.size
        np.testing.assert_array_equal(completion.media.pixels[kept_rows:], completion.made[new])

    def test_a_tile_is_made_from_the_rows_above_it(self, service, make_png):
        path = make_png(width=16, height=16)
        job = service.complete(path, keep=0.5, seed=5, samples=2)
        second = run(job)[1]
        loaded, above = service.model("image32"), read_media(path).pixels[4:8]
        for number, left in enumerate((0, 8)):
            tile = np.zeros((SIDE, SIDE, 3), np.uint8)
            tile[:4] = above[:, left : left + SIDE]
            stream, layout = loaded.codec.encode(type(second.media)(tile))
            sampler = Sampler(loaded.model, stream[:96], 96, SampleConfig(seed=5))
            # Four tiles in all; each has random numbers of its own in each sample.
            new_bytes = np.concatenate([chunk.byte_values for chunk in sampler.stream(4 + number)])
            expected = loaded.codec.decode(np.concatenate((stream[:96], new_bytes)), layout)
            np.testing.assert_array_equal(second.media.pixels[8:12, left : left + SIDE], expected.pixels[4:])

    def test_upside_down_is_the_turned_picture(self, service, make_png, tmp_path):
        path = make_png(width=16, height=12)
        turned = tmp_path / "turned.png"
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(turned)
        [one] = run(service.complete(path, upside_down=True))
        [other] = run(service.complete(turned))
        np.testing.assert_array_equal(one.media.pixels, other.media.pixels[::-1])

    def test_a_smaller_picture_is_enlarged_and_that_is_said(self, service, make_png):
        job = service.complete(make_png(width=6, height=5))
        assert job.given.media.pixels.shape == (SIDE, SIDE, 3)
        assert "6x5" in job.notes[0]

    def test_too_much_to_make_is_refused_with_ways_out(self, service, make_png):
        path = make_png(width=900, height=700)
        with pytest.raises(ValueError, match=r"at most 1,000,000 are.*framing fit"):
            service.complete(path, keep=0.1)
        assert service.complete(path, keep=0.1, framing="fit").plan.num_bytes_to_generate < 200
        assert service.complete(path, keep=0.1, num_bytes=500).plan.num_bytes_to_generate == 500


class TestCutFiles:
    def test_a_cut_png_is_completed_from_what_is_there(self, service, make_png):
        path = make_png(width=16, height=16)
        whole = read_media(path).pixels
        cut(path, 500)
        job = service.complete(path)
        kept = job.plan.num_bytes_kept // 48
        assert 5 < kept < 14
        assert any(f"top {kept} of 16 rows" in note and "cut short" in note for note in job.notes)
        [completion] = run(job)
        np.testing.assert_array_equal(completion.media.pixels[:kept], whole[:kept])

    def test_a_cut_bmp_is_completed_upwards(self, service, make_png, tmp_path):
        path = tmp_path / "picture.bmp"
        whole = np.asarray(Image.open(make_png(width=16, height=16)))
        Image.fromarray(whole).save(path)
        cut(path, 54 + 48 * 10 + 7)
        job = service.complete(path)
        assert job.plan.says.startswith("keeps bottom 10 of 16 rows")
        [completion] = run(job)
        np.testing.assert_array_equal(completion.media.pixels[6:], whole[6:])

    @pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 30)])
    def test_a_cut_picture_that_is_fitted_keeps_only_what_is_there(self, service, make_png, width, height):
        path = make_png(width=width, height=height)
        whole = service.complete(path, framing="fit").given.media.pixels
        cut(path, path.stat().st_size * 2 // 3)
        given = service.complete(path, framing="fit").given
        assert 0 < given.num_there < given.num_whole
        rows = given.num_there // (3 * SIDE)
        # The scaling filter reaches over the cut, where it sees the last row again; that is all it may change.
        assert np.abs(given.media.pixels[: rows - 2].astype(int) - whole[: rows - 2]).max(initial=0) <= 2

    def test_a_cut_sound_is_made_as_long_as_it_was_to_be(self, service, make_wav):
        path = make_wav(num_samples=400)
        whole = read_media(path).samples
        job = service.complete(cut(path, 44 + 2 * 300))
        assert (job.plan.num_bytes_kept, job.plan.num_bytes_to_generate) == (300, 100)
        [completion] = run(job)
        assert completion.media.samples.size == 400
        np.testing.assert_array_equal(completion.media.samples[:300], whole[:300])

    def test_scoring_a_cut_picture_offers_its_raw_bytes(self, service, make_png):
        path = cut(make_png(width=16, height=16), 400)
        with pytest.raises(ValueError, match=r"cut short.*--bytes file"):
            service.score_file(path)
        assert service.score_file(path, scored_as="file").num_bytes == 400


def make_any(request: pytest.FixtureRequest, kind: str) -> Path:
    make: Callable[..., Path] = request.getfixturevalue({"picture": "make_png", "tiles": "make_png"}.get(kind, f"make_{kind}"))
    # The text and its completion fit into the tiny model's context: beyond it, a branch reads another part anew.
    return {"tiles": lambda: make(width=13, height=17), "text": lambda: make(content=b"The lamp was lit.")}.get(kind, make)()


def content_of(completion: Completion) -> list[np.ndarray]:
    return [value for value in vars(completion.media).values() if isinstance(value, np.ndarray)]


KINDS = ["picture", "tiles", "wav", "text"]


class TestBranches:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_branch_keeps_what_was_before_it_and_goes_on(self, service, request, kind):
        job = service.complete(make_any(request, kind), temperature=0.0, num_bytes=60 if kind in ("wav", "text") else None)
        [completion] = run(job)
        number = len(completion.made) // 2 + 1
        alternatives = job.alternatives(completion.made, number)
        assert alternatives[0][0] == completion.made[number]  # the likeliest byte is what temperature 0 took
        assert [p for _, p in alternatives] == sorted((p for _, p in alternatives), reverse=True)
        [same] = run(job.branched(completion.made, number, alternatives[0][0]))
        np.testing.assert_array_equal(same.made, completion.made)
        [other] = run(job.branched(completion.made, number, alternatives[1][0]))
        np.testing.assert_array_equal(other.made[:number], completion.made[:number])
        assert other.made[number] == alternatives[1][0]
        assert len(other.made) == len(completion.made)
        assert len(other.bits) == len(completion.made) - number - 1
        assert "are given" in other.job.plan.says

    def test_a_byte_beyond_the_new_ones_has_no_alternatives(self, service):
        job = service.complete(None, text=b"a", num_bytes=3)
        [completion] = run(job)
        with pytest.raises(ValueError, match="byte 3 is none of the 3"):
            job.alternatives(completion.made, 3)

    @pytest.mark.parametrize("first_bytes", ["abc", "zz", "AB", "0x41", "a b"])
    def test_what_is_no_hex_is_refused(self, first_bytes):
        with pytest.raises(ValueError, match="bytes in hex"):
            CompletionSettings(first_bytes=first_bytes)

    def test_more_given_than_asked_for_is_refused(self, service):
        with pytest.raises(ValueError, match="none is left"):
            service.complete(None, text=b"a", num_bytes=2, first_bytes="4142")


class TestSettingsInResults:
    @pytest.mark.parametrize("kind", [*KINDS, "branch", "cut bmp", "fit"])
    def test_a_result_makes_the_same_bytes_again(self, service, request, kind, tmp_path, make_png):
        settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 11, "samples": 2}
        if kind == "cut bmp":
            path = tmp_path / "picture.bmp"
            Image.open(make_png(width=16, height=16)).save(path)
            job = service.complete(cut(path, 54 + 48 * 10), **settings)
        elif kind == "fit":
            job = service.complete(make_png(width=20, height=12), framing="fit", **settings)
        elif kind == "branch":
            first = service.complete(make_png(width=13, height=17), **settings)
            job = first.branched(run(first)[0].made, 100, 7)
        else:
            job = service.complete(make_any(request, kind), **settings)
        completion = run(job)[-1]
        path = service.write_completion(completion, tmp_path)
        given = sidecar_of(path) if completion.modality == "text" else path
        provenance = read_provenance(given)
        assert provenance == provenance_of(completion)
        assert provenance.model_sha256 == service.model(completion.model).info.digest
        assert provenance.source_sha256 is not None
        again = service.repeat(given)
        repeated = run(again)[completion.sample]
        np.testing.assert_array_equal(repeated.made, completion.made)
        for one, other in zip(content_of(repeated), content_of(completion), strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize(
        "content",
        [
            b"{}",
            b'{"format": "megabyte-completion"',
            b'{"format": "megabyte-completion", "version": 1}',
            b'{"format": "megabyte-completion", "version": 2}',
            b'{"format": "megabyte-completion", "version": 1, "settings": {"seed": -1}}',
            b"[" * 100_000,
        ],
    )
    def test_other_json_is_a_text_like_any(self, make_text, content):
        assert read_provenance(make_text("a.json", content)) is None

    def test_changed_settings_are_checked_like_any(self, service, tmp_path):
        [completion] = run(service.complete(None, text=b"Once", num_bytes=4))
        path = sidecar_of(service.write_completion(completion, tmp_path))
        text = path.read_text()
        for old, new in [('"seed": 0', '"seed": -1'), ('"seed": 0', '"seed": "0"'), ('"sample": 0', '"sample": "0"'),
                         ('"text": "', '"text": "?'), ('"model": "text"', '"model": null')]:  # fmt: skip
            assert old in text
            path.write_text(text.replace(old, new))
            assert read_provenance(path) is None
        path.write_text(text)
        assert read_provenance(path).text == b"Once"


def test_a_stopped_sample_keeps_no_room_for_what_was_not_made(service):
    job = service.complete(None, text=b"Once", num_bytes=1_000_000)
    with closing(job.run()) as steps:
        progress = next(step for step in steps if step.chunk is not None)
        data = progress.stopped().media.data
    assert len(data) < 1000
    assert data.base is None or data.base.nbytes < 1000
