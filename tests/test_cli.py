"""The command line: exact JSON, exit codes, one plain sentence for each bad file, and good manners with pipes and signals."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.service import Service
from core.codecs import read_media
from tests.forked_app import ForkedApp

ROOT = Path(__file__).parents[1]
PROTOCOL_KEYS = ["window", "hop", "strided", "engine"]
SCORE_KEYS = ["file", "model", "modality", "scored_as", "num_bytes", "total_bits", "bits_per_byte", *PROTOCOL_KEYS]
TOTAL_KEYS = ["num_files", "num_bytes", "total_bits", "bits_per_byte", "seconds"]
MADE_KEYS = ["num_bytes_kept", "num_bytes_generated", "bits_per_byte", "engine", "seconds"]
GENERATE_KEYS = ["source", "output", "model", "seed", *MADE_KEYS]


class TestScore:
    def test_json_is_one_object_a_file_and_the_total(self, cli, make_png, make_wav, make_text):
        files = [make_png(), make_wav(), make_text()]
        exit_code, out, _ = cli("score", *files, "--json")
        *scores, last = map(json.loads, out)
        assert exit_code == 0
        assert [list(score) for score in scores] == [SCORE_KEYS] * 3
        assert [score["file"] for score in scores] == [str(file) for file in files]
        assert [score["model"] for score in scores] == ["image32", "audio", "text"]
        assert list(last) == ["total"]
        total = last["total"]
        assert list(total) == TOTAL_KEYS
        assert total["num_files"] == 3
        assert total["num_bytes"] == sum(score["num_bytes"] for score in scores)
        assert total["total_bits"] == pytest.approx(sum(score["total_bits"] for score in scores), rel=1e-12)
        assert total["bits_per_byte"] == total["total_bits"] / total["num_bytes"]

    def test_lines_for_people_carry_the_rate_and_the_file(self, cli, make_text):
        file = make_text()
        _, [line, total], _ = cli("score", file)
        _, [score, _], _ = cli("score", file, "--json")
        assert f"{json.loads(score)['bits_per_byte']:.4f} bits/byte" in line
        assert str(file) in line
        assert total.endswith("total, files: 1")

    def test_options_reach_the_score(self, cli, make_png, make_text):
        _, [line, _], _ = cli("score", make_text(), "--hop", 64, "--strided", "--json")
        score = json.loads(line)
        assert (score["window"], score["hop"], score["strided"]) == (128, 64, True)
        _, [line, _], _ = cli("score", make_png(), "--bytes", "file", "--json")
        assert (json.loads(line)["scored_as"], json.loads(line)["model"]) == ("file", "text")

    def test_a_device_that_is_not_there_is_refused_once(self, cli, make_text):
        exit_code, out, err = cli("score", make_text(), make_text(), "--device", "quantum")
        assert (exit_code, out) == (1, [])
        assert err == ["error: --device quantum is not a device; use cpu, cuda or auto"]

    def test_what_does_not_fit_is_adapted_when_asked_and_that_is_said(self, cli, make_png, make_wav):
        files = [make_png(width=3), make_wav(sample_rate=22050)]
        exit_code, out, err = cli("score", *files)
        assert (exit_code, len(out)) == (1, 1)
        assert all("--adapt" in line for line in err)
        exit_code, out, err = cli("score", *files, "--adapt")
        assert (exit_code, len(out), len(err)) == (0, 3, 2)
        assert "3x8" in err[0]
        assert "22050 Hz" in err[1]

    @pytest.mark.parametrize("verb", ["score", "generate"])
    def test_an_unknown_model_is_said_once_not_for_each_file(self, cli, make_text, tmp_path, verb):
        files = [make_text("a.txt"), make_text("b.txt")]
        exit_code, out, err = cli(verb, *files, "--model", "nowhere", "--out", tmp_path / "out")
        assert (exit_code, out, len(err)) == (1, [], 1)
        assert not (tmp_path / "out").exists()

    def test_a_model_may_be_given_as_a_folder(self, cli, make_text, tiny_models):
        exit_code, [line, _], _ = cli("score", make_text(), "--model", tiny_models / "text", "--json")
        assert (exit_code, json.loads(line)["model"]) == (0, "text")

    def test_folders_are_scored_file_by_file(self, cli, make_text, tmp_path):
        for name in ("d/b.txt", "d/a.txt", "d/.hidden"):
            make_text(name)
        _, out, _ = cli("score", tmp_path / "d", "--json")
        assert [Path(json.loads(line)["file"]).name for line in out[:-1]] == ["a.txt", "b.txt"]

    def test_a_bad_file_gets_one_sentence_and_the_others_are_done(self, cli, make_text, tmp_path):
        good, pdf, gone = make_text("a.txt"), make_text("b.txt", b"%PDF-1.7 ..."), tmp_path / "gone.txt"
        exit_code, out, err = cli("score", gone, pdf, good, "--json")
        assert exit_code == 1
        assert len(out) == 2
        assert json.loads(out[1])["total"]["num_files"] == 1
        assert err[0] == f"error: {gone}: the file does not exist; check the name"
        assert err[1].startswith(f"error: {pdf}: the file is a PDF document")
        assert len(err) == 2

    def test_no_file_that_works_still_prints_a_total(self, cli, tmp_path):
        exit_code, [line], _ = cli("score", tmp_path / "gone", "--json")
        assert exit_code == 1
        assert json.loads(line)["total"]["bits_per_byte"] is None

    @pytest.mark.parametrize("name", ["a\rb.txt", "a\nb.txt", "a\x1b[31mb.txt", "a\u202eb.txt", os.fsdecode(b"a\xff.txt")])
    def test_odd_names_are_printed_escaped(self, cli, make_text, name, tmp_path):
        good = make_text(name)
        _, out, _ = cli("score", good)
        _, _, err = cli("score", tmp_path / "no" / name)
        for line in (out[0], err[0]):
            assert line.isprintable()
        assert (len(out), len(err)) == (2, 1)
        _, [line, _], _ = cli("score", good, "--json")
        assert line.isascii()
        assert json.loads(line)["file"] == str(good)

    def test_notes_go_to_stderr(self, cli, make_wav):
        path = make_wav(num_samples=400)
        path.write_bytes(path.read_bytes()[:-400])
        exit_code, out, err = cli("score", path, "--json")
        assert (exit_code, len(out)) == (0, 2)
        assert err == [f"note: {path}: ends early: 0.03 s of 0.05 s are there"]

    def test_out_gets_bits_and_a_heatmap_for_each_file(self, cli, make_png, make_text, tmp_path):
        out = tmp_path / "out"
        files = [make_png("a.png"), make_text("a.txt"), make_text("d/a.txt")]
        assert cli("score", *files, "--out", out)[0] == 0
        names = {"a.npz", "a.png", "a-2.npz", "a-2.png", "a-3.npz", "a-3.png", "ledger.jsonl"}
        assert {path.name for path in out.iterdir()} == names
        with np.load(out / "a.npz") as arrays:
            assert arrays["media_bits"].shape == (8, 8, 3)
        assert read_media(out / "a-2.png").pixels.size

    def test_nothing_is_overwritten_without_force(self, cli, make_text, tmp_path):
        file, other, out = make_text("a.txt"), make_text("b.txt"), tmp_path / "out"
        cli("score", file, "--out", out)
        before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "ledger.jsonl"}
        exit_code, lines, err = cli("score", file, other, "--out", out)
        assert exit_code == 1
        assert "--force" in err[0]
        assert "b.txt" in lines[0]
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert cli("score", file, "--out", out, "--force")[0] == 0

    def test_a_heatmap_never_replaces_a_picture_that_was_given(self, cli, make_png, tmp_path):
        path = make_png("a.png")
        content = path.read_bytes()
        exit_code, _, err = cli("score", path, "--out", tmp_path, "--force")
        assert exit_code == 1
        assert "not overwritten" in err[0]
        assert path.read_bytes() == content

    def test_a_file_in_place_of_the_folder_is_refused(self, cli, make_text, tmp_path):
        exit_code, out, err = cli("score", make_text("a.txt"), "--out", make_text("b.txt"))
        assert (exit_code, out, len(err)) == (1, [], 1)
        assert "no folder" in err[0]


class TestGenerate:
    @pytest.mark.parametrize("make", ["make_png", "make_wav", "make_text"])
    def test_json_is_one_object_a_sample_and_the_files_are_real(self, cli, make, request, tmp_path):
        source, options = request.getfixturevalue(make)(), ("--samples", 2, "--num-bytes", 48, "--seed", 9, "--json")
        exit_code, out, _ = cli("generate", source, "--out", tmp_path / "out", *options)
        assert exit_code == 0
        facts = [json.loads(line) for line in out]
        assert [list(each) for each in facts] == [GENERATE_KEYS] * 2
        for number, each in enumerate(facts, start=1):
            assert each["source"] == str(source)
            assert Path(each["output"]).stem == f"{source.stem}-s9-{number}"
            assert (each["seed"], each["num_bytes_generated"]) == (9, 48)
            assert type(read_media(each["output"])) is type(read_media(source))
        assert Path(facts[0]["output"]).read_bytes() != Path(facts[1]["output"]).read_bytes()

    def test_the_command_line_makes_the_bytes_of_the_service(self, cli, make_text, tiny_models, tmp_path):
        source = make_text()
        _, [line], _ = cli("generate", source, "--out", tmp_path / "out", "--num-bytes", 20, "--seed", 4, "--top-k", 9, "--json")
        job = Service(weights=tiny_models).complete(source, num_bytes=20, seed=4, top_k=9)
        list(job.run())
        assert Path(json.loads(line)["output"]).read_bytes() == job.results[0].media.data.tobytes()

    def test_no_path_starts_text_from_nothing(self, cli, tmp_path):
        _, [line], _ = cli("generate", "--out", tmp_path, "--num-bytes", 10, "--json")
        facts = json.loads(line)
        assert (facts["source"], facts["model"], facts["num_bytes_kept"]) == (None, "text", 0)
        assert len(Path(facts["output"]).read_bytes()) == 10

    def test_a_bad_file_stops_nothing(self, cli, make_text, tmp_path):
        files = [tmp_path / "gone", make_text()]
        exit_code, out, err = cli("generate", *files, "--num-bytes", 5, "--out", tmp_path / "out", "--json")
        assert (exit_code, len(out), len(err)) == (1, 1, 1)

    def test_files_of_one_name_get_outputs_of_their_own(self, cli, make_text, tmp_path):
        files = [make_text("a.txt"), make_text("d/a.txt")]
        _, out, _ = cli("generate", *files, "--num-bytes", 5, "--out", tmp_path / "out", "--json")
        assert [Path(json.loads(line)["output"]).name for line in out] == ["a-s0-1.txt", "a-2-s0-1.txt"]

    def test_nothing_is_overwritten_without_force(self, cli, make_text, tmp_path):
        call = ("generate", make_text(), "--num-bytes", 5, "--out", tmp_path / "out")
        assert cli(*call)[0] == 0
        exit_code, out, err = cli(*call)
        assert (exit_code, out) == (1, [])
        assert "--force" in err[0]
        assert cli(*call, "--force")[0] == 0

    def test_keep_is_said_and_kept(self, cli, make_png, tmp_path):
        source = make_png()
        _, [line], _ = cli("generate", source, "--keep-bytes", 100, "--out", tmp_path / "out", "--json")
        facts = json.loads(line)
        assert (facts["num_bytes_kept"], facts["num_bytes_generated"]) == (96, 96)
        np.testing.assert_array_equal(read_media(facts["output"]).pixels[:4], read_media(source).pixels[:4])


class TestInfo:
    def test_json_is_one_object_a_model(self, cli):
        exit_code, out, _ = cli("info", "--json")
        infos = [json.loads(line) for line in out]
        assert exit_code == 0
        assert [info["name"] for info in infos] == ["audio", "image32", "text"]
        for info in infos:
            assert {"name", "modality", "num_parameters", "bits_per_byte", "digest"} <= set(info)
            assert info["bits_per_byte"] == info["measured"]["test"]["value"] == 8.5

    def test_one_model_can_be_asked_for(self, cli, tiny_models):
        _, [line], _ = cli("info", "--model", tiny_models / "audio")
        assert line.startswith("audio: audio;")
        assert "8000 Hz" in line

    def test_an_unknown_model_is_one_sentence(self, cli):
        exit_code, out, err = cli("info", "--model", "nowhere")
        assert (exit_code, out, len(err)) == (1, [], 1)


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["frobnicate"],
            ["score"],
            ["score", "a", "--hop", "0"],
            ["score", "a", "--hop", "x"],
            ["score", "a", "--bytes", "none"],
            ["score", "a", "--jso"],
            ["generate", "a"],
            ["generate", "--out", "o", "--keep", "0.5", "--keep-bytes", "3"],
            ["generate", "--out", "o", "--keep", "nan"],
            ["generate", "--out", "o", "--temperature", "-1"],
            ["generate", "--out", "o", "--top-k", "257"],
            ["generate", "--out", "o", "--top-p", "0"],
            ["generate", "--out", "o", "--num-bytes", "1000000000"],
            ["train", "--preset", "text"],
            ["ui", "--port", "70000"],
            ["ui", "--port", "9" * 5000],
            ["generate", "--seed", "9" * 5000, "--out", "out"],
            ["generate", "--keep", "x" * 5000, "--out", "out"],
            ["--no-such-option"],
            ["score", "--\x1b[2J"],
        ],
    )
    def test_wrong_usage_is_one_line_and_exit_code_2(self, cli, arguments):
        exit_code, out, err = cli(*arguments)
        assert (exit_code, out, len(err)) == (2, [], 1)
        assert err[0].startswith("error: ")
        assert "value" not in err[0]
        assert len(err[0]) < 300
        assert err[0].isprintable()

    @pytest.mark.parametrize("verb", [[], ["ui"], ["train"], ["score"], ["generate"], ["info"]])
    def test_every_verb_has_help(self, cli, verb):
        exit_code, out, err = cli(*verb, "--help")
        assert (exit_code, err) == (0, [])
        assert out[0].startswith("usage: python -m app")

    def test_help_and_wrong_usage_import_nothing_slow(self):
        code = (
            "import sys; from app.__main__ import main\n"
            "for call in (['--help'], ['score'], ['generate', '--out', 'o', '--top-k', '0']):\n"
            "    try: main(call)\n"
            "    except SystemExit: pass\n"
            "print(sorted({'torch', 'gradio', 'numpy', 'PIL'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_an_unknown_preset_or_setting_is_one_sentence(self, cli, make_text, tmp_path):
        paths = ("--data", make_text(), "--valid", make_text(), "--out", tmp_path / "run")
        for arguments in (["--preset", "nothing"], ["--preset", "text", "--set", "train.speed=9"]):
            exit_code, out, err = cli("train", *arguments, *paths)
            assert (exit_code, out, len(err)) == (1, [], 1)


class TestManners:
    def test_a_closed_pipe_ends_the_call_without_a_traceback(self, tiny_models, tmp_path):
        with ForkedApp(*self.endless(tiny_models, tmp_path)) as call:
            assert call.stdout.readline()
            call.stdout.close()
            assert call.stderr.read() == ""
            assert call.wait(timeout=30) == 1

    def test_ctrl_c_ends_a_call_that_is_still_being_imported_without_a_traceback(self, tmp_path):
        (tmp_path / "tqdm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "app", "info"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")

    @pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_the_call_at_once_with_its_code(self, tiny_models, tmp_path, number, exit_code):
        with ForkedApp(*self.endless(tiny_models, tmp_path)) as call:
            assert call.stdout.readline()
            call.send_signal(number)
            _, err = call.communicate(timeout=30)
        assert (call.returncode, err) == (exit_code, "")
        assert not list(tmp_path.glob(".*"))  # no half-written file

    def test_a_busy_port_is_one_plain_sentence(self, cli):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            exit_code, out, err = cli("ui", "--port", port, "--no-browser")
        assert (exit_code, out, len(err)) == (1, [], 1)
        assert f"port {port}" in err[0]

    @staticmethod
    def endless(tiny_models, out):
        """A call that would go on for minutes."""
        return "generate", "--model", tiny_models / "text", "--out", out, "--num-bytes", 40, "--samples", 1000, "--json"
