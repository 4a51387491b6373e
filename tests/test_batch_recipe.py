"""Recipes: what they mean, and that a mistake in one job is said in that job alone."""

import os
import signal
from pathlib import Path

import pytest

from app.recipe import parse_recipe, read_recipe
from app.settings import CompletionSettings
from app.sources import find_files


def items(text: str, folder: Path = Path("nowhere")):
    return parse_recipe(text, lambda pattern: find_files(pattern, folder))


def problem(job: str) -> str | None:
    [item] = items(f"[[jobs]]\n{job}")
    return item.problem


def test_files_patterns_and_folders_are_those_of_the_recipes_folder(make_text, tmp_path):
    for name in ("b/2.txt", "b/1.txt", "b/deep/3.txt", "b/.hidden", "a.png", "[odd].txt"):
        make_text(name)
    found = items('[[jobs]]\nfiles = ["gone.txt", "b/**/*.txt", "a.png", "b", "[odd].txt"]', tmp_path)
    names = [str(item.source.relative_to(tmp_path)) for item in found]
    in_b = ["b/1.txt", "b/2.txt", "b/deep/3.txt"]
    assert names == ["gone.txt", *in_b, "a.png", *in_b, "[odd].txt"]


def test_defaults_hold_unless_a_job_says_otherwise():
    first, second, third = items(
        "[defaults]\nseed = 7\nkeep = 0.25\n"
        '[[jobs]]\nfiles = "a"\nsamples = 3\n[[jobs]]\ntext = "é"\nkeep_bytes = 1\nseed = 1\n[[jobs]]\nmodel = "audio"'
    )
    assert first.settings == CompletionSettings(seed=7, keep=0.25, samples=3)
    assert (second.text, second.settings) == ("é".encode(), CompletionSettings(seed=1, keep_bytes=1))
    assert (third.source, third.text, third.model, third.job) == (None, None, "audio", 3)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("temperature = -1", "temperature=-1 must lie in 0..100"),
        ("temperature = nan", "temperature=nan"),
        ('temperature = "hot"', "temperature must be a number, not 'hot'"),
        ("top_k = 2.5", "top_k must be a whole number"),
        ("seed = true", "seed must be a whole number"),
        ("sed = 1", "sed is no setting"),
        ("keep = 0.5\nkeep_bytes = 3", "twice"),
        ("files = []", "files must be"),
        ("files = [1]", "files must be"),
        ('files = "a"\ntext = "b"', "exclude each other"),
        (r'files = "a\u0000b"', "zero byte"),
        ('files = "*.none"', "no file fits"),
        ("seed.a = 1", "seed must be a whole number, not what stands there"),
        ("framing = 0x" + "f" * 5000, "framing must be a text, not what stands there"),
        (f"seed = '{'7' * 5000}'", "not '7777"),
        (f"{'k' * 5000} = 1", "is no setting"),
    ],
)
def test_a_mistake_is_one_sentence_of_its_job(job, words):
    assert words in problem(job)
    assert len(problem(job)) < 300
    [bad, good] = items(f'[[jobs]]\n{job}\n[[jobs]]\nfiles = "a"')
    assert (bad.settings, good.problem) == (None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no job"),
        ("jobs = 3", "no job"),
        ("[[job]]", "job is no part"),
        ("[[jobs]]\n[[jobs", "no TOML"),
        ("[defaults]\nfiles = 'a'\n[[jobs]]", "without files"),
        ("[defaults]\nsed = 1\n[[jobs]]", "sed is no setting"),
        ("a = " + "[" * 3000, "too many brackets"),
        ("[[jobs]]\nseed" + ".a" * 5000 + " = 1", "too many brackets or dots"),
        ("[[jobs]]\n[jobs" + """. "\\"'" . '"' """ * 5000 + "]\n", "too many brackets or dots"),
        ("[[jobs]]\nseed = " + "1" * 5000, "the recipe has a number of too many digits"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_recipe_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        items(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "device or a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "device or a pipe"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to(path), "could not be read"),
        (lambda path: path.write_bytes(b"\xff"), "no text in UTF-8"),
        (lambda path: path.touch() or os.truncate(path, 1 << 40), "at most 16,777,216 are read"),
    ],
)
def test_a_recipe_is_an_ordinary_file_of_text(tmp_path, make, words, request):
    make(tmp_path / "recipe")
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for somebody who writes into the pipe"))
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, previous))
    request.addfinalizer(lambda: signal.alarm(0))
    signal.alarm(5)
    with pytest.raises(ValueError, match=words):
        read_recipe(tmp_path / "recipe")
