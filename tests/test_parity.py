"""The command line, the page and Python, each in a process of its own: equal bytes for a seed, equal bits, equal refusals."""

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from own_process import command_line
from page_client import client_of
from page_server import ROOT

from app.service import Service
from core.codecs import build_codec, read_media
from tests.conftest import TINY_CONFIGS
from tests.test_page_safety import CALLS, call

NUM_BYTES = 96
FIGURES = ("model", "num_bytes", "window", "hop", "strided")
WAYS = [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9, "temperature": 1.3}]
IN_PYTHON = """
import json, sys
from pathlib import Path
import core
from app.service import Service
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
    return client_of(page_url)


@pytest.fixture
def service(tiny_models) -> Service:
    return Service(weights=tiny_models, runs=tiny_models / "no-runs")


def said_by_command_and_in_python(
    weights: Path, arguments: list[object], asked: list[tuple[str, str, dict[str, Any]]]
) -> tuple[list[str], list[str]]:
    """The lines of a call of the command line, and those of `IN_PYTHON`; the two processes run side by side."""
    commands = command_line(weights, *arguments), [sys.executable, "-c", IN_PYTHON, str(weights), json.dumps(asked)]
    with ExitStack() as stack:
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
        processes = [stack.enter_context(subprocess.Popen(command, **options)) for command in commands]
        by_command, in_python = (process.communicate(timeout=300)[0].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    return by_command, in_python


@pytest.mark.parametrize("num_seeds", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_bytes_in_three_processes(tiny_models, client, files, tmp_path, num_seeds):
    asked = []
    for seed in range(num_seeds):
        name = list(files)[seed % 3]
        asked.append((name, str(files[name]), {"num_bytes": NUM_BYTES, "seed": seed, **WAYS[seed % 4]}))
    recipe, out = tmp_path / "jobs.toml", tmp_path / "out"
    jobs = [{"files": path} | settings for _, path, settings in asked]
    recipe.write_text("\n".join("[[jobs]]\n" + "\n".join(f"{key} = {json.dumps(job[key])}" for key in job) for job in jobs))
    _, made = said_by_command_and_in_python(tiny_models, ["generate", "--recipe", recipe, "--out", out], asked)
    for (name, path, settings), expected in zip(asked, made, strict=True):
        [by_page], _ = client.predict(handle_file(path), "", "", **settings, api_name="/generate")
        [by_command] = out.glob(f"{Path(path).stem}*-s{settings['seed']}-1{Path(path).suffix}")
        for result in (by_command, by_page):
            stream, _ = build_codec(TINY_CONFIGS[name].codec).encode(read_media(result))
            assert stream[-NUM_BYTES:].tobytes().hex() == expected, (result, settings)
    assert len(set(made)) == num_seeds


def test_a_file_has_the_same_total_in_three_processes(tiny_models, client, files, make_png):
    asked = [*files.items(), ("image32", make_png("tiles.png", width=20, height=11))]
    arguments, in_python = ["score", "--json", *(path for _, path in asked)], [(name, str(path), {}) for name, path in asked]
    [*by_command, _], totals = said_by_command_and_in_python(tiny_models, arguments, in_python)
    for (_, path), mine, total in zip(asked, map(json.loads, by_command), map(float, totals), strict=True):
        by_page = client.predict(handle_file(path), "", api_name="/score")
        assert by_page["total_bits"] == total
        assert mine["total_bits"] == pytest.approx(total, rel=1e-6)  # the two pictures of that call share a batch
        assert [by_page[key] for key in FIGURES] == [mine[key] for key in FIGURES]


NAN, INF = float("nan"), float("inf")
BAD = {
    "temperature": ("0..100", (NAN, INF, -INF, -1.0, -1e-9, 100.1, 1e300)),
    "top_k": ("1..256", (0, -1, 257, 1 << 40)),
    "top_p": ("0..1|above 0 and up to 1", (0.0, -0.1, 1.0000001, NAN, INF)),
    "seed": ("0..9223372036854775807", (-1, 1 << 63, -(1 << 63))),
    "num_bytes": (r"1..1000000\b", (0, -1, 10**6 + 1, 10**9, 1 << 63)),
    "samples": (r"1..1000\b", (0, -1, 1001, 10**9)),
    "keep": ("0..1", (-0.5, 1.5, NAN, INF)),
    "keep_bytes": ("0..2147483648", (-2, 1 << 40)),
}
NOT_GIVEN = {"top_k": 0, "num_bytes": 0}  # what these mean on the page
IN_CALL = ["text", "model", "keep", "num_bytes", "samples", "temperature", "top_k", "top_p", "seed", "keep_bytes"]


def test_thirty_bad_settings_are_refused_with_their_range_in_all_three_ways(service, page_server, cli, tmp_path):
    assert sum(len(values) for _, values in BAD.values()) >= 30
    for name, (allowed, values) in BAD.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name}=.*({allowed})"):
                service.complete(None, text=b"Once", **{name: value})
            exit_code, out, err = cli("generate", f"--{name.replace('_', '-')}={value}", "--out", tmp_path / "out")
            assert (exit_code, out, len(err)) == (2, [], 1)
            assert re.search(rf"{name}=.*({allowed})", err[0]), err
            if value != NOT_GIVEN.get(name):
                values_of_call = list(CALLS["generate"])
                values_of_call[1 + IN_CALL.index(name)] = value
                answer = call(page_server, "generate", values_of_call)
                assert re.search(rf"{name}=.*({allowed})", answer), (name, value, answer)
    assert not (tmp_path / "out").exists()
