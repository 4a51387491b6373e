"""The command line, the page and Python, each in a process of its own: equal bytes for a seed, equal bits for a file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from own_process import command_line
from page_server import ROOT

from core.codecs import build_codec, read_media
from tests.conftest import TINY_CONFIGS

NUM_BYTES = 96
FIGURES = ("model", "num_bytes", "window", "hop", "strided")
WAYS = [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9, "temperature": 1.3}]
IN_PYTHON = """
import json, sys
from pathlib import Path
import core
from core.codecs import build_codec, read_media

weights, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
models = {name: core.load_model(weights / name) for name, _, _ in asked}
for name, path, settings in asked:
    codec = build_codec(models[name].codec_config)
    stream, layout = codec.encode(read_media(path))
    if settings:
        kept = codec.round_prefix(len(stream) // 2)
        print(core.generate(models[name], stream[:kept], **settings)[0].tobytes().hex())
    else:
        print(core.score(models[name], stream, counted=layout.counted).total_bits)
"""


@pytest.fixture
def files(make_png, make_wav, make_text) -> dict[str, Path]:
    """A file for each of the tiny models; the sound and the text are longer than the models' contexts."""
    return {"image32": make_png(), "audio": make_wav(num_samples=700), "text": make_text()}


@pytest.fixture
def client(page_url) -> Client:
    return Client(page_url, verbose=False)


def lines_of(command: list[str]) -> list[str]:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300).stdout.splitlines()


def in_python(weights: Path, asked: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    return lines_of([sys.executable, "-c", IN_PYTHON, str(weights), json.dumps(asked)])


@pytest.mark.parametrize("num_seeds", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_bytes_in_three_processes(tiny_models, client, files, tmp_path, num_seeds):
    asked = []
    for seed in range(num_seeds):
        name = list(files)[seed % 3]
        asked.append((name, str(files[name]), {"num_bytes": NUM_BYTES, "seed": seed, **WAYS[seed % 4]}))
    recipe, out = tmp_path / "jobs.toml", tmp_path / "out"
    jobs = [{"files": path} | settings for _, path, settings in asked]
    recipe.write_text("\n".join("[[jobs]]\n" + "\n".join(f"{key} = {json.dumps(job[key])}" for key in job) for job in jobs))
    lines_of(command_line(tiny_models, "generate", "--recipe", recipe, "--out", out))
    made = in_python(tiny_models, asked)
    for (name, path, settings), expected in zip(asked, made, strict=True):
        [by_page], _ = client.predict(handle_file(path), "", "", **settings, api_name="/generate")
        [by_command] = out.glob(f"{Path(path).stem}*-s{settings['seed']}-1{Path(path).suffix}")
        for result in (by_command, by_page):
            stream, _ = build_codec(TINY_CONFIGS[name].codec).encode(read_media(result))
            assert stream[-NUM_BYTES:].tobytes().hex() == expected, (result, settings)
    assert len(set(made)) == num_seeds


def test_a_file_has_the_same_total_in_three_processes(tiny_models, client, files, make_png):
    asked = [*files.items(), ("image32", make_png("tiles.png", width=20, height=11))]
    command = command_line(tiny_models, "score", "--json", *(path for _, path in asked))
    *by_command, _ = map(json.loads, lines_of(command))
    totals = map(float, in_python(tiny_models, [(name, str(path), {}) for name, path in asked]))
    for (_, path), mine, total in zip(asked, by_command, totals, strict=True):
        by_page = client.predict(handle_file(path), "", api_name="/score")
        assert by_page["total_bits"] == total
        assert mine["total_bits"] == pytest.approx(total, rel=1e-6)  # the two pictures of that call share a batch
        assert [by_page[key] for key in FIGURES] == [mine[key] for key in FIGURES]
