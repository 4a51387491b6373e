"""The use cases behind the page and the command line: scores are the model's, completions keep what they say."""

import lzma
import shutil
import threading
import wave
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core
from app import scoring
from app.messages import plain_sentence
from app.outputs import OutputNames
from app.scoring import ReferenceSizes
from app.service import CompletionSettings, Failure, Service, list_files
from core.checkpoint import export_model, model_tensors
from core.codecs import Raw, read_media
from core.errors import UserError
from tests.conftest import TINY_CONFIGS

HOSTILE_NAMES = [
    "..",
    "...",
    "../up.png",
    "/etc/passwd",
    "..\\up.png",
    "a\nb.txt",
    "\x1b[2J.wav",
    "x" * 250,
    "é" * 120,
    "-r",
    " ",
]


@pytest.fixture(params=["make_png", "make_wav", "make_text"])
def media_file(request):
    return request.getfixturevalue(request.param)()


def run(job):
    """The results of a job that is run to its end."""
    for _ in job.run():
        pass
    return job.results


class TestModels:
    @pytest.mark.parametrize(
        "odd",
        [
            {"bits_per_byte": odd}
            for odd in ("8", [8], None, {"test": 8}, {"test": {}}, {"test": {"value": None}}, {"test": {"value": "8"}})
        ]
        + [{"name": 3}, {"data": None}],
    )
    def test_a_card_that_says_odd_things_is_refused_and_stops_no_other(self, tiny_models, tmp_path, odd):
        weights = tmp_path / "weights"
        for name, card in (("odd", odd), ("whole", {"bits_per_byte": {"valid": {"value": 8.5}}})):
            model = core.models.build_model(TINY_CONFIGS["text"])
            export_model(weights / name, TINY_CONFIGS["text"], model_tensors(model), card)
        service = Service(weights=weights, runs=tmp_path)
        assert [info.path.name for info in service.models()] == ["whole"]
        with pytest.raises(UserError, match=r"card of .*odd is damaged"):
            service.model_info("odd")

    @pytest.mark.parametrize(("width", "height", "name"), [(16, 16, "image64"), (40, 20, "image64"), (40, 15, "image32")])
    def test_a_picture_is_read_by_the_largest_model_that_is_no_larger(self, tiny_models, make_png, tmp_path, width, height, name):
        weights = tmp_path / "weights"
        shutil.copytree(tiny_models, weights)
        codec = replace(TINY_CONFIGS["image32"].codec, side=16)
        config = replace(
            TINY_CONFIGS["image32"],
            name="image64",
            codec=codec,
            model=replace(TINY_CONFIGS["image32"].model, max_seq_len=3 * 16 * 16),
        )
        export_model(weights / "image64", config, model_tensors(core.build_model(config)), {"name": "image64"})
        service = Service(weights=weights, runs=tmp_path / "no-runs")
        assert service.score_file(make_png(width=width, height=height)).model == name
        assert service.score_file(make_png(width=width, height=height), model="image32").model == "image32"

    def test_every_model_of_the_folder_is_listed(self, service):
        infos = {info.name: info for info in service.models()}
        assert set(infos) == set(TINY_CONFIGS)
        for name, config in TINY_CONFIGS.items():
            assert infos[name].modality == config.codec.modality
            assert infos[name].num_parameters == core.build_model(config).num_parameters()
            assert len(infos[name].digest) == 64

    def test_a_model_is_loaded_once(self, service, tiny_models):
        assert service.model("text") is service.model("text")
        assert service.model(tiny_models / "text") is service.model("text")

    def test_a_damaged_model_is_left_out_and_refused_by_name(self, tiny_models, tmp_path, caplog):
        shutil.copytree(tiny_models, tmp_path / "weights")
        (tmp_path / "weights" / "audio" / "model.safetensors").write_bytes(b"not tensors")
        service = Service(weights=tmp_path / "weights", runs=tmp_path)
        assert [info.name for info in service.models()] == ["image32", "text"]
        assert "model.safetensors is damaged" in caplog.text
        with pytest.raises(UserError, match="damaged"):
            service.model("audio")

    def test_exports_of_local_runs_are_listed(self, tiny_models, tmp_path):
        shutil.copytree(tiny_models / "text", tmp_path / "runs" / "mine" / "export")
        service = Service(weights=tmp_path, runs=tmp_path / "runs")
        assert [info.path for info in service.models()] == [tmp_path / "runs" / "mine" / "export"]


class TestScoring:
    def test_scores_are_those_of_core(self, service, media_file):
        result = service.score_file(media_file)
        loaded = service.model(result.model)
        stream, layout = loaded.codec.encode(read_media(media_file))
        expected = core.score(loaded.model, stream, counted=layout.counted)
        np.testing.assert_array_equal(result.bits, expected.bits)
        assert result.total_bits == expected.total_bits
        assert result.bits_per_byte == pytest.approx(result.total_bits / result.num_bytes)

    def test_files_scored_together_and_alone_agree(self, service, make_png, make_wav, make_text, tolerance):
        files = [make_text("a.txt"), make_png("a.png"), make_text("b.txt", b"short"), make_wav("a.wav"), make_png("b.png", 20, 9)]
        together = list(service.score_files(files))
        assert [result.file for result in together] == files
        for result in together:
            alone = service.score_file(result.file)
            assert result.num_bytes == alone.num_bytes
            np.testing.assert_allclose(result.bits, alone.bits, **tolerance[torch.float32])

    def test_a_bad_file_stops_nothing_and_keeps_its_place(self, service, make_png, make_text, tmp_path):
        files = [make_text(), tmp_path / "gone.txt", make_png(), tmp_path]
        results = list(service.score_files(files))
        assert [isinstance(result, Failure) for result in results] == [False, True, False, True]
        assert results[1].message == "the file does not exist; check the name"
        assert "folder" in results[3].message

    def test_an_overlap_of_tiles_is_counted_once(self, service, make_png):
        result = service.score_file(make_png(width=20, height=11))
        assert result.num_bytes == 20 * 11 * 3
        assert result.media_bits.shape == (11, 20, 3)
        assert result.total_bits == pytest.approx(result.media_bits.sum(dtype=np.float64))

    def test_a_files_own_bytes_are_scored_when_asked(self, service, make_png):
        path = make_png()
        result = service.score_file(path, scored_as="file")
        assert (result.model, result.modality, result.scored_as) == ("text", "text", "file")
        assert result.num_bytes == path.stat().st_size

    def test_bytes_of_no_known_format_are_scored_and_that_is_said(self, service, make_text):
        noise = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
        result = service.score_file(make_text("noise.png", noise))
        assert (result.model, result.scored_as, result.num_bytes) == ("text", "media", 1000)
        assert "no known format" in result.notes[0]
        assert service.score_file(make_text()).notes == ()

    def test_windows_are_reported(self, service, make_text):
        result = service.score_file(make_text(), hop=32, strided=True)
        assert (result.window, result.hop, result.strided) == (128, 32, True)

    def test_progress_ends_at_the_number_of_bytes(self, service, make_text, make_wav):
        seen = []
        files = [make_text(), make_wav()]
        results = list(service.score_files(files, progress=lambda done, known: seen.append((done, known))))
        total = sum(len(result.bits) for result in results)
        assert seen[-1] == (total, total)
        assert all(done <= known for done, known in seen)
        assert seen == sorted(seen)

    @pytest.mark.parametrize(
        ("make", "arguments", "options", "words"),
        [
            ("make_text", {}, {"model": "image32"}, "reads image, not text"),
            ("make_text", {}, {"model": "nowhere"}, "neither a shipped name"),
            ("make_text", {}, {"hop": 1000}, "hop=1000"),
            ("make_png", {}, {"hop": 3}, "whole pictures"),
            ("make_png", {}, {"strided": True}, "strided"),
            ("make_png", {"width": 3}, {}, "3x8 pixels.*--adapt"),
            ("make_wav", {"sample_rate": 22050}, {}, "22050 Hz.*--adapt"),
            ("make_text", {"content": b"%PDF-1.7 and so on"}, {}, "--bytes file"),
            ("make_text", {"content": b""}, {}, "empty"),
        ],
    )
    def test_what_cannot_be_scored_is_refused_in_words(self, service, request, make, arguments, options, words):
        path = request.getfixturevalue(make)(**arguments)
        with pytest.raises(ValueError, match=words) as refusal:
            service.score_file(path, **options)
        assert str(path) not in str(refusal.value)

    @pytest.mark.parametrize(
        ("make", "arguments", "shape", "words"),
        [
            ("make_png", {"width": 3, "height": 5}, (8, 8, 3), "from 3x5 to 8x8 pixels"),
            ("make_wav", {"sample_rate": 16000}, (200,), "from 16000 Hz to 8000 Hz"),
        ],
    )
    def test_what_does_not_fit_the_model_is_adapted_when_asked_and_that_is_said(
        self, service, request, make, arguments, shape, words
    ):
        result = service.score_file(request.getfixturevalue(make)(**arguments), adapt=True)
        assert result.media_bits.shape == shape
        assert result.num_bytes == np.prod(shape)
        assert words in result.notes[-1]

    @pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
    def test_what_fits_the_model_is_left_as_it_is(self, service, request, make):
        path = request.getfixturevalue(make)()
        plain, adapted = service.score_file(path), service.score_file(path, adapt=True)
        assert (adapted.notes, adapted.total_bits) == (plain.notes, plain.total_bits)

    def test_a_large_picture_is_tiled_though_adapting_is_allowed(self, service, make_png):
        result = service.score_file(make_png(width=20, height=11), adapt=True)
        assert (result.num_bytes, result.notes) == (20 * 11 * 3, ())

    def test_what_progress_raises_ends_the_scoring_and_frees_the_model(self, service, make_text):
        def refuse(num_scored: int, num_bytes: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            service.score_file(make_text(), progress=refuse)
        assert not service.model("text").lock.locked()

    def test_whoever_waits_for_the_model_can_give_up(self, service, make_text):
        def refuse(num_scored: int, num_bytes: int) -> None:
            raise InterruptedError

        with service.model("text").lock, pytest.raises(InterruptedError):
            service.score_file(make_text(), progress=refuse)

    def test_reference_sizes_are_those_of_the_same_bytes(self, service, make_png, make_wav, make_text):
        noise = ReferenceSizes().of(service.score_file(make_png(width=64, height=64)))
        assert set(noise) == {"xz", "PNG"}
        assert all(8.0 <= size < 8.3 for size in noise.values())
        assert set(ReferenceSizes().of(service.score_file(make_text()))) == {"xz"}
        sound = ReferenceSizes().of(service.score_file(make_wav(num_samples=8000)))
        assert set(sound) == {"xz", "FLAC"}
        assert 2.0 < sound["FLAC"] < 8.0

    def test_reference_sizes_pause_between_pieces_and_are_computed_once(self, service, make_text):
        data = np.random.default_rng(0).bytes(1_000_000)
        scores = [
            service.score_file(make_text(content=data[:1000]), model=model, scored_as="file") for model in ("text", "audio")
        ]
        scores = [replace(each, media=Raw(np.frombuffer(data, np.uint8)), num_bytes=len(data)) for each in scores]
        pauses = []
        references = ReferenceSizes(lambda: pauses.append(1))
        sizes = references.of(scores[0])
        num_pauses = len(pauses)
        assert num_pauses > 3
        assert sizes["xz"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
        assert references.of(scores[1]) == sizes
        assert len(pauses) == num_pauses

        def stop() -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            ReferenceSizes(stop).of(scores[0])


class TestCompletion:
    def test_new_bytes_are_those_of_core(self, service, media_file):
        job = service.complete(media_file, num_bytes=40, seed=7, temperature=0.9, samples=2)
        completions = run(job)
        loaded = service.model(completions[0].model)
        prefix, _ = job.codec.encode(job.given.media)
        prefix = prefix[: job.plan.num_bytes_kept]
        expected = core.generate(loaded.model, prefix, 40, seed=7, temperature=0.9, num_samples=2)
        for completion, new_bytes in zip(completions, expected, strict=True):
            assert completion.num_bytes_kept == len(prefix)
            stream = np.concatenate((prefix, new_bytes))
            if completion.modality == "text":
                np.testing.assert_array_equal(completion.media.data, stream)
            made, _ = loaded.codec.encode(completion.media)
            np.testing.assert_array_equal(made[len(prefix) : len(stream)], new_bytes)

    def test_the_rate_of_new_bytes_is_their_score(self, service, make_text, tolerance):
        [completion] = run(service.complete(make_text(content=b"A short beginning"), keep=1.0, num_bytes=50, temperature=0.7))
        scored = core.score(service.model("text").model, completion.media.data)
        np.testing.assert_allclose(completion.bits, scored.bits[-50:], **tolerance[torch.float32])
        assert completion.bits_per_byte == pytest.approx(completion.bits.mean(dtype=np.float64))

    def test_a_picture_keeps_whole_block_rows_and_fills_the_rest(self, service, make_png):
        path = make_png()
        job = service.complete(path, keep=0.7)
        assert job.plan.num_bytes_kept == 96  # 0.7 of 192 bytes, rounded down to the upper block row
        assert job.plan.num_bytes_to_generate == 96
        assert "top 4 of 8 rows" in job.plan.says
        assert job.notes == ("the kept part is rounded down from 134 to 96 bytes, top 4 of 8 rows",)
        [completion] = run(job)
        np.testing.assert_array_equal(completion.media.pixels[:4], read_media(path).pixels[:4])

    def test_what_is_not_made_of_a_picture_stays_grey_and_that_is_said(self, service, make_png):
        [completion] = run(service.complete(make_png(), num_bytes=48))
        assert (completion.media.pixels[4:, 4:] == 128).all()
        assert completion.notes == ("the last 48 bytes of the picture are not made and stay grey",)

    @pytest.mark.parametrize(("keep", "num_bytes"), [(0.0, 0), (0.29, 29), (0.57, 57), (1.0, 100)])
    def test_a_fraction_of_text_is_its_number_of_bytes(self, service, make_text, keep, num_bytes):
        assert service.complete(make_text(content=b"x" * 100), keep=keep).plan.num_bytes_kept == num_bytes

    def test_a_picture_of_another_size_is_fitted_when_asked_and_that_is_said(self, service, make_png):
        [completion] = run(service.complete(make_png(width=30, height=20), framing="fit"))
        assert completion.media.pixels.shape == (8, 8, 3)
        assert "30x20" in completion.notes[0]

    def test_a_sound_keeps_its_16_bit_samples_before_the_cut(self, service, make_wav, tmp_path):
        path = make_wav(num_samples=400)
        [completion] = run(service.complete(path, keep=0.25, num_bytes=60))
        output = service.write_completion(completion, tmp_path)
        with wave.open(str(output)) as written:
            assert (written.getframerate(), written.getsampwidth(), written.getnframes()) == (8000, 2, 160)
            samples = np.frombuffer(written.readframes(160), dtype="<i2")
        np.testing.assert_array_equal(samples[:100], read_media(path).samples[:100])

    def test_a_sound_is_continued_by_as_much_as_was_cut(self, service, make_wav):
        plan = service.complete(make_wav(num_samples=400), keep=0.75).plan
        assert (plan.num_bytes_kept, plan.num_bytes_to_generate) == (300, 100)

    def test_a_sound_of_another_rate_is_resampled_and_that_is_said(self, service, make_wav):
        job = service.complete(make_wav(num_samples=400, sample_rate=16000), num_bytes=5)
        assert job.plan.num_bytes_kept == 100
        assert "resampled from 16000 Hz to 8000 Hz" in job.notes

    def test_typed_text_is_kept_whole(self, service):
        job = service.complete(None, text=b"Once upon a time", num_bytes=8)
        assert bytes(job.kept.data) == b"Once upon a time"
        assert run(job)[0].media.data.tobytes().startswith(b"Once upon a time")

    @pytest.mark.parametrize(("model", "num_bytes"), [("image32", 192), ("audio", 8000), ("text", 500), (None, 500)])
    def test_nothing_given_starts_from_nothing(self, service, model, num_bytes):
        job = service.complete(None, model=model)
        assert (job.plan.num_bytes_kept, job.plan.num_bytes_to_generate) == (0, num_bytes)
        assert job.estimate_seconds > 0

    def test_the_same_seed_gives_the_same_bytes_and_another_number_others(self, service, make_text):
        path = make_text()
        first, second = (run(service.complete(path, num_bytes=30, seed=3, samples=2)) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.media.data, other.media.data)
        assert (first[0].media.data != first[1].media.data).any()

    def test_progress_shows_the_media_as_far_as_it_is_made(self, service, make_png):
        path = make_png()
        steps = [(step.done_bytes, step.partial, step.completion) for step in service.complete(path).run()]
        assert [done for done, _, _ in steps] == [48, 96]
        assert (steps[0][1].pixels[4:, 4:] == 128).all()
        assert not steps[0][1].known[4:, 4:].any()
        np.testing.assert_array_equal(steps[-1][1].pixels, steps[-1][2].media.pixels)

    def test_closing_a_job_frees_its_model(self, service, make_text):
        with closing(service.complete(make_text()).run()) as steps:
            next(steps)
            assert service.model("text").lock.locked()
        assert not service.model("text").lock.locked()

    def test_a_job_waits_for_the_model_and_can_be_closed_meanwhile(self, service, make_text):
        loaded = service.model("text")
        with loaded.lock:
            with closing(service.complete(make_text()).run()) as steps:
                assert next(steps).waits_for == "other work to give way"
            assert loaded.lock.locked()
        assert not loaded.lock.locked()

    def test_a_job_that_waits_for_the_decoder_says_so_and_can_be_closed(self, service, make_text, monkeypatch):
        is_built = threading.Event()
        monkeypatch.delenv("MEGABYTE_ENGINE", raising=False)
        monkeypatch.setattr("core.native.library", is_built.wait)
        loaded = service.model("text")
        with closing(service.complete(make_text()).run()) as steps:
            assert next(steps).waits_for == "the decoder to be built, once"
            assert not loaded.lock.locked()
        is_built.set()

    @pytest.mark.parametrize(
        ("make", "settings", "words"),
        [
            ("make_png", {"num_bytes": 97}, "at most 96"),
            ("make_png", {"keep": 1.0}, "nothing is left"),
            ("make_wav", {"keep": 1.0}, "nothing is left"),
            ("make_text", {"keep_bytes": 10_000}, "keep_bytes=10000"),
            ("make_text", {"model": "audio"}, "reads audio, not text"),
        ],
    )
    def test_what_cannot_be_completed_is_refused_in_words(self, service, request, make, settings, words):
        with pytest.raises(ValueError, match=words):
            service.complete(request.getfixturevalue(make)(), **settings)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "keep": (-0.1, 1.1, float("nan"), float("inf")),
        "keep_bytes": (-1,),
        "num_bytes": (0, -1, 10**9),
        "samples": (0, -1, 10**6),
        "temperature": (-1.0, 101.0, float("nan"), float("inf")),
        "top_k": (0, 257, -1),
        "top_p": (0.0, -0.1, 1.1, float("nan")),
        "seed": (-1, 2**63),
    }.items(),
)
def test_settings_out_of_range_are_refused_with_the_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}=.* must lie"):
            CompletionSettings(**{name: value})


@pytest.mark.parametrize("name", ["keep", "keep_bytes", "num_bytes", "samples", "temperature", "top_k", "top_p", "seed"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["long", "negative", "longest"])
def test_a_number_of_hundreds_of_digits_is_refused_without_them(name, value):
    with pytest.raises(ValueError, match=f"^{name} of so many digits must lie in [0-9.]*$"):
        CompletionSettings(**{name: value})


def test_keep_and_keep_bytes_exclude_each_other():
    with pytest.raises(ValueError, match="twice"):
        CompletionSettings(keep=0.5, keep_bytes=3)


class TestOutputs:
    def test_a_completion_is_written_as_what_it_is(self, service, media_file, tmp_path):
        [completion] = run(service.complete(media_file, num_bytes=48, seed=5))
        path = service.write_completion(completion, tmp_path)
        assert path == tmp_path / f"{media_file.stem}-s5-1{completion.codec.suffix}"
        written = read_media(path)
        assert type(written) is type(completion.media)

    def test_a_written_picture_is_exact(self, service, make_png, tmp_path):
        [completion] = run(service.complete(make_png()))
        with Image.open(service.write_completion(completion, tmp_path)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image), completion.media.pixels)

    def test_nothing_is_overwritten_unasked(self, service, tmp_path):
        [completion] = run(service.complete(None, num_bytes=4))
        path = service.write_completion(completion, tmp_path)
        with pytest.raises(ValueError, match="--force"):
            service.write_completion(completion, tmp_path)
        assert service.write_completion(completion, tmp_path, force=True) == path

    def test_names_stay_inside_the_folder_and_differ(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        sources = [Path(name) for name in HOSTILE_NAMES] * 2
        stems = [stem for _, stem in OutputNames(sources).stems()]
        assert len(set(stems)) == len(stems)
        for stem in stems:
            path = out / f"{stem}-s{2**63 - 1}-1000.png"
            assert path.resolve().parent == out.resolve()
            assert stem.isprintable()
            path.write_bytes(b"")

    def test_a_source_is_never_overwritten(self, make_png, tmp_path):
        path = make_png("a.png")
        with pytest.raises(ValueError, match="one of the files given"):
            OutputNames([path]).protect_sources([tmp_path / "." / "a.png"])


def test_folders_stand_for_their_files_without_hidden_ones(make_text, tmp_path):
    for name in ("d/b.txt", "d/sub/c.txt", "d/a.txt", "d/.hidden", "d/.git/x"):
        make_text(name)
    names = [str(path.relative_to(tmp_path)) for path in list_files([tmp_path / "d", tmp_path / "gone"])]
    assert names == ["d/a.txt", "d/b.txt", "d/sub/c.txt", "gone"]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        list_files([tmp_path])


def test_a_sentence_speaks_of_the_file_without_its_path():
    assert plain_sentence(ValueError("a/b.png is empty; x"), Path("a/b.png")) == "the file is empty; x"
    assert plain_sentence(ValueError("hop=3 is too short"), Path("a/b.png")) == "hop=3 is too short"
    assert plain_sentence(OSError(28, "No space left on device"), None) == "No space left on device"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_costs_the_files_of_one_group(service, make_text, monkeypatch, error):
    score, failures = scoring.score, [error]

    def fail_once(*args, **options):
        if failures:
            raise failures.pop()
        return score(*args, **options)

    monkeypatch.setattr(scoring, "score", fail_once)
    monkeypatch.setattr(scoring, "_MAX_GROUP_FILES", 1)
    bad, good = service.score_files([make_text("a.txt"), make_text("b.txt")])
    assert bad.message.startswith("out of memory while it was scored; score fewer files")
    assert good.num_bytes > 0
