"""What the tests share: tolerances, tiny exported models, and media made on the spot."""

import functools
import os
import sys
import wave
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

# Read when torch is imported, also in the processes that tests start: threads that wait sleep, so a busy machine stays quick.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from browsing import browser, open_page, profiles  # noqa: F401  fixtures for every module
from page_server import PageProcess, starting_page
from PIL import Image

from app.__main__ import main
from app.jobs import JobStore
from app.service import Service
from app.without_stubs import import_page
from core import native
from core.checkpoint import export_model, model_tensors
from core.config import AudioCodecConfig, Config, ImageCodecConfig, LevelConfig, MegaByteConfig, TextCodecConfig
from core.models import ByteModel, build_model
from tests.tiny_run import SEQ_LEN, tiny_config

# How far logits, or bits, may lie apart that were computed in two ways; as arguments of `assert_close` and `assert_allclose`.
TOLERANCE = {
    torch.float64: {"rtol": 0.0, "atol": 1e-9},
    torch.float32: {"rtol": 0.0, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.0, "atol": 5e-2},
}


def _levels(patch_size: int, byte_dim: int) -> tuple[LevelConfig, ...]:
    coarse = LevelConfig(dim=32, num_layers=1, num_heads=2, patch_size=patch_size, byte_dim=byte_dim)
    return coarse, LevelConfig(dim=16, num_layers=1, num_heads=2)


# Wide initial weights: predictions far from uniform, so that a wrong one shows.
TINY_CONFIGS = {
    "image32": Config(
        name="image32",
        model=MegaByteConfig(levels=_levels(48, 4), unembedder="full", max_seq_len=3 * 8 * 8, init_std=0.3),
        codec=ImageCodecConfig(side=8, scan="patch", scan_patch=4),
    ),
    "audio": Config(
        name="audio",
        model=MegaByteConfig(levels=_levels(8, 4), max_seq_len=256, init_std=0.3),
        codec=AudioCodecConfig(sample_rate=8000, encoding="mulaw8"),
    ),
    "text": Config(
        name="text",
        model=MegaByteConfig(levels=_levels(4, 8), max_seq_len=128, init_std=0.3),
        codec=TextCodecConfig(),
    ),
}


def pytest_collection(session: pytest.Session) -> None:
    if session.config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        import_page()  # many of all modules import Gradio; this way it takes half as long


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, dict[str, float]]:
    return TOLERANCE


@pytest.fixture
def model() -> ByteModel:
    """The model of `tests.tiny_run`, fresh."""
    torch.manual_seed(0)
    return build_model(tiny_config())


@pytest.fixture
def byte_ids() -> torch.Tensor:
    """A batch for it."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, SEQ_LEN)))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like weights/: one exported random model for each modality, under the shipped names."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, (name, config) in enumerate(TINY_CONFIGS.items()):
        torch.manual_seed(seed)
        model = build_model(config)
        card = {
            "name": name,
            "modality": config.codec.modality,
            "data": "none",
            "num_parameters": model.num_parameters(),
            "bits_per_byte": {"test": {"value": 8.5, "protocol": "basic", "window": 128, "hop": 128, "num_bytes": 1000}},
        }
        export_model(folder / name, config, model_tensors(model), card)
    return folder


@pytest.fixture(scope="module")
def service(tiny_models: Path) -> Service:
    """The application's services on the tiny models."""
    native.build()  # no first completion waits for it
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


@pytest.fixture
def store() -> Iterator[JobStore]:
    """Jobs that end with the test."""
    store = JobStore()
    yield store
    store.close()


@pytest.fixture(scope="session")
def _starting_page(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageProcess]:
    with starting_page(tiny_models, tmp_path_factory.mktemp("page")) as page:
        yield page


@pytest.fixture(scope="session", autouse=True)
def _slow_starts_beside_the_first_tests(request: pytest.FixtureRequest) -> None:
    """Each takes a processor for seconds, and nothing waits for it before the first test that needs it."""
    if "tests.forked_run" in sys.modules:
        forkserver.ensure_running()
    if any("page_server" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("_starting_page")


@pytest.fixture(scope="session")
def page_server(_starting_page: PageProcess) -> PageProcess:
    """The page, served with the tiny models in a process of its own."""
    _starting_page.wait()
    return _starting_page


@pytest.fixture(scope="session")
def page_url(page_server: PageProcess) -> str:
    return page_server.url


@pytest.fixture
def make_png(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of random pixels."""

    def make(name: str = "picture.png", width: int = 8, height: int = 8, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return _saved(tmp_path / name, lambda path: Image.fromarray(pixels).save(path, "PNG"))

    return make


@pytest.fixture
def make_wav(tmp_path: Path) -> Callable[..., Path]:
    """Writes a mono 16-bit sine with some noise."""

    def make(name: str = "sound.wav", num_samples: int = 400, sample_rate: int = 8000, seed: int = 0) -> Path:
        noise = np.random.default_rng(seed).normal(0, 300, num_samples)
        samples = (8000 * np.sin(np.arange(num_samples) / 9) + noise).astype("<i2")

        def save(path: Path) -> None:
            with wave.open(str(path), "wb") as target:
                target.setparams((1, 2, sample_rate, num_samples, "NONE", "not compressed"))
                target.writeframes(samples.tobytes())

        return _saved(tmp_path / name, save)

    return make


@pytest.fixture
def make_text(tmp_path: Path) -> Callable[..., Path]:
    """Writes bytes, by default some lines of text."""

    def make(name: str = "text.txt", content: bytes = b"The lamp was lit.\nNobody came.\n" * 10) -> Path:
        return _saved(tmp_path / name, lambda path: path.write_bytes(content))

    return make


def _saved(path: Path, save: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path)
    return path


@pytest.fixture
def cli(tiny_models, monkeypatch, capsys):
    """Runs one call of the command line on the tiny models; its exit code, the lines on stdout and the lines on stderr."""
    monkeypatch.setattr("app.service.Service", functools.partial(Service, weights=tiny_models, runs=tiny_models / "no-runs"))

    def run(*arguments) -> tuple[int, list[str], list[str]]:
        try:
            exit_code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            exit_code = leaving.code
        written = capsys.readouterr()
        return exit_code, written.out.splitlines(), written.err.splitlines()

    return run
