"""Manners of the command line where something is amiss around it: odd paths, full disks, no terminal, hostile names in logs."""

import contextlib
import itertools
import json
import logging
import os
import random
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from own_process import command_line

from app.__main__ import main
from app.console import LogHandler
from app.outputs import OutputNames
from tests.forked_app import ForkedApp

ROOT = Path(__file__).parents[1]


def odd_paths(folder: Path) -> dict[str, str | None]:
    """Names in a folder, and the words that refuse each; None for those that are ordinary files."""
    content = {
        name: None for name in ("-rf", "#", "line\nbreak", os.fsdecode(b"\xff\xfe"), "n" * 255, "%s", "~", "* ?", "é\u0301")
    }
    for name in content:
        (folder / name).write_bytes(b"some text")
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to(folder / "gone")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    (folder / "unreadable").write_bytes(b"text")
    (folder / "unreadable").chmod(0)
    refused = {
        "empty": "is empty", "pipe": "device or a pipe", "broken": "link to a file that is gone", "circle": "could not be read",
        "zero": "device or a pipe", "null": "device or a pipe", "socket": "could not be read", "missing": "does not exist",
        "n" * 256: "could not be read", "empty/inside": "could not be read", "line\nmissing": "does not exist",
        "unreadable": None if os.geteuid() == 0 else "may not be read",
    }  # fmt: skip
    return content | refused


def test_twenty_odd_paths_get_a_score_or_a_sentence(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = odd_paths(tmp_path)
    assert len(paths) >= 20
    exit_code, out, err = cli("score", "--json", "--", *paths)
    lines = [json.loads(line) for line in out]
    assert exit_code == 1
    assert [line["file"] for line in lines[:-1]] == [path for path, words in paths.items() if words is None]
    assert len(err) == sum(words is not None for words in paths.values())
    for line, words in zip(err, [words for words in paths.values() if words], strict=True):
        assert words in line
        assert line.isprintable()


def test_a_file_that_goes_while_it_is_listed_is_one_sentence(cli, make_text, monkeypatch):
    paths = [make_text(f"{number}.txt") for number in range(3)]
    really_open, opened = os.open, itertools.count()

    def open_and_remove(path, *arguments, **options):
        if str(path).endswith(".txt") and next(opened) == 1:
            paths[1].unlink()
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_and_remove)
    exit_code, out, err = cli("score", *paths)
    assert (exit_code, len(out)) == (1, 3)
    assert err == [f"error: {paths[1]}: the file does not exist; check the name"]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_links_in_a_circle_cost_the_other_files_nothing(cli, make_text, tmp_path, verb):
    for one, other in ("ab", "ba"):
        (tmp_path / one).symlink_to(tmp_path / other)
    exit_code, out, err = cli(verb, tmp_path / "a", make_text(), "--out", tmp_path / "out", "--json")
    assert (exit_code, len(err), "could not be read" in err[0]) == (1, 1, True)
    assert json.loads(out[0])[{"score": "file", "generate": "source"}[verb]] == str(tmp_path / "text.txt")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def test_without_a_terminal_nothing_moves_a_cursor(tiny_models, make_text):
    with ForkedApp("score", make_text(), weights=tiny_models, before=os.setsid) as call:
        out, err = call.communicate()
    assert (call.returncode, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())


def test_closed_standard_streams_are_no_fault(tiny_models, tmp_path):
    with contextlib.ExitStack() as stack:
        calls = {}
        for number, closed in enumerate(("1>&-", "2>&-", "0<&- 1>&- 2>&-")):
            settings = f'--model "{tiny_models}/text" --num-bytes 4 --out "{tmp_path}/{number}"'
            command = ["sh", "-c", f'"{sys.executable}" -m app generate {settings} {closed}']
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            calls[closed] = stack.enter_context(subprocess.Popen(command, cwd=ROOT, **streams))
        said = {closed: call.communicate(timeout=60)[1] for closed, call in calls.items()}
    assert {closed: (call.returncode, said[closed]) for closed, call in calls.items()} == dict.fromkeys(calls, (0, ""))
    assert [len(list((tmp_path / str(number)).glob("new-s0-1.txt"))) for number in range(3)] == [1, 1, 1]


def test_results_that_cannot_be_printed_are_one_sentence(tiny_models, make_text):
    command = command_line(tiny_models, "score", make_text())
    with open("/dev/full", "w") as full:  # the interpreter complains at its end, too, so it is one of its own
        done = subprocess.run(command, cwd=ROOT, timeout=60, text=True, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_complaints_that_cannot_be_printed_stop_no_work(tiny_models, make_text):
    with ForkedApp("score", "/nonexistent", make_text(), weights=tiny_models, stderr="/dev/full") as call:
        out, _ = call.communicate()
    assert call.returncode == 1
    assert "bits/byte" in out


def test_a_full_disk_costs_no_older_result(cli, tiny_models, make_text, tmp_path):
    out = tmp_path / "out"
    settings = ("--keep", 1, "--num-bytes", 4)
    assert cli("generate", make_text("a.txt"), *settings, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.glob("a-*")}
    large = make_text("b.txt", b"x" * 5000)
    with ForkedApp("generate", large, *settings, "--out", out, weights=tiny_models, before=limit_files) as call:
        _, err = call.communicate()
    assert call.returncode == 1
    assert re.fullmatch(r"error: .*could not be written \(File too large\); choose another folder\n", err)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "ledger.jsonl"} == before


def test_the_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for code in ("0 all done", "1 something failed", "2 wrong usage", "130", "143"):
        assert code in said


def hostile_names(count: int) -> list[str]:
    """Names that try to leave their folder, to hide, or to be mistaken, put together at random from such parts."""
    choose = random.Random(0)
    parts = [
        "..", "/", "\\", "../", "..\\", "/etc/passwd", "C:\\", "~", "\0", "\n", "\r", "\x1b[2J", "\u202e", "\ufeff", " ", ".",
        "-rf", "%2e%2e%2f", "CON", "nul.txt", "$(x)", "`x`", ";", "|", "*", "?", "<b>", "'", '"', "é", "田", "🙂", "\udcff",
        "x" * 90, "A\u0301" * 40, "a",
    ]  # fmt: skip
    return ["".join(choose.choices(parts, k=choose.randint(1, 5))) for _ in range(count)]


def test_five_hundred_names_stay_in_their_folder_and_apart(tmp_path):
    out, keep = tmp_path / "deep" / "out", tmp_path / "deep" / "kept"
    out.mkdir(parents=True)
    keep.write_bytes(b"kept")
    names = hostile_names(500)
    stems = [stem for _, stem in OutputNames([Path(name) for name in names if "\0" not in name]).stems()]
    assert len(stems) > 400
    assert len(set(stems)) == len(stems)
    for stem in stems:
        for ending in ("-s9223372036854775807-1000.png", "-s0-1.txt.json", ".npz"):
            path = out / f"{stem}{ending}"
            assert path.resolve().parent == out.resolve()
            assert not path.exists()
            assert path.name.isprintable()
            path.write_bytes(b"")
    assert keep.read_bytes() == b"kept"
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["kept", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_a_log_line_is_one_line_and_moves_no_cursor(capsys):
    logger = logging.Logger("test")
    logger.addHandler(LogHandler())
    logger.warning("%s is damaged", "a\r\nb\x1b[2J\u202e")
    [line] = capsys.readouterr().err.splitlines()
    assert line == r"warning: a\r\nb\x1b[2J\u202e is damaged"


def test_the_content_of_a_file_is_never_printed(cli, make_text, make_png):
    marker = b"4711 nobody may read this"
    broken = make_png("a.png")
    broken.write_bytes(broken.read_bytes()[:40] + marker)
    _, out, err = cli("score", make_text(content=marker * 10), make_text("b.txt", b"%PDF-" + marker), broken)
    assert len(out) == 2
    assert len(err) == 2
    assert not any("4711" in line for line in (*out, *err))
