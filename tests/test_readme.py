"""What the README shows works: its Python blocks and the commands it marks as quick."""

import os
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(.+?)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [code for kind, code in BLOCKS if kind == "python"]
PAGE_SCRIPTS = [code for kind, code in BLOCKS if kind == "python page"]
QUICK_COMMANDS = [line for kind, code in BLOCKS if kind == "sh quick" for line in code.splitlines()]


@pytest.fixture(scope="module", params=["cut short", pytest.param("whole", marks=pytest.mark.slow)])
def samples(request) -> str:
    """Whether the samples are whole."""
    return request.param


def make_checkout(folder: Path, samples: str) -> None:
    """A folder that looks like the checkout, so that what a block writes does not land in the real one.

    The models and the commands are the real ones. The samples are cut short or whole.
    """
    for name in ("core", "weights"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "app").mkdir()
    for path in (ROOT / "app").iterdir():
        (folder / "app" / path.name).symlink_to(path)
    if samples == "cut short":
        (folder / "app" / "samples").unlink()
        cut_samples(folder / "app" / "samples")


@pytest.fixture
def checkout(samples: str, tmp_path: Path) -> Path:
    make_checkout(tmp_path, samples)
    return tmp_path


@pytest.fixture(scope="module")
def begun(samples: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Future[str]]]]:
    """All blocks and commands with their checkouts, two at a time: most of what they do is to import, on one processor."""
    calls = {code: [sys.executable, "-c", code] for code in PYTHON_BLOCKS}
    calls |= {command: ["bash", "-c", command] for command in QUICK_COMMANDS}
    with ThreadPoolExecutor(2) as pool:
        work = {}
        for name, arguments in calls.items():
            folder = tmp_path_factory.mktemp("checkout")
            make_checkout(folder, samples)
            work[name] = folder, pool.submit(run, arguments, folder)
        yield work
        pool.shutdown(cancel_futures=True)


def cut_samples(folder: Path) -> None:
    """The samples of the page under their names: a quarter of the picture, some words, an eighth of a second."""
    samples = ROOT / "app" / "samples"
    folder.mkdir()
    with Image.open(samples / "lake.png") as picture:
        picture.crop((0, 0, 32, 32)).save(folder / "lake.png")
    (folder / "lamp.txt").write_bytes((samples / "lamp.txt").read_bytes()[:200])
    with wave.open(str(samples / "vowels.wav")) as sound, wave.open(str(folder / "vowels.wav"), "wb") as cut:
        cut.setparams(sound.getparams())
        cut.writeframes(sound.readframes(2000))


def run(arguments: list[str], folder: Path) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_shows_both_kinds():
    assert PYTHON_BLOCKS
    assert len(QUICK_COMMANDS) >= 3
    assert len(PAGE_SCRIPTS) == 1


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_block_runs(code, begun):
    folder, said = begun[code]
    assert "bits per byte" in said.result()
    assert (folder / "completed.png").stat().st_size > 0


@pytest.mark.parametrize("code", PAGE_SCRIPTS)
def test_the_script_for_the_page_runs(code, checkout, page_url):
    own_page = "http://127.0.0.1:7860"
    assert own_page in code
    said = run([sys.executable, "-c", code.replace(own_page, page_url)], checkout)
    assert re.search(r"^[0-9.]+ bits per byte$", said, re.MULTILINE)
    assert "probability" in said
    assert "lamp.txt" in said


@pytest.mark.parametrize("command", QUICK_COMMANDS)
def test_quick_command_runs(command, begun):
    _, said = begun[command]
    assert said.result()


def test_the_two_commands_stand_before_everything_else():
    code = [code.strip() for _, code in BLOCKS[:2]]
    assert code == [
        "pip install -r requirements.txt && python -m app",
        "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest",
    ]


def test_everything_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
