"""The page, the command line and scripts make the same completion of a file: equal files, byte for byte."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from browsing import upload
from gradio_client import Client, handle_file
from page_client import client_of

SETTINGS = {"keep": 0.5, "num_bytes": 48, "samples": 2, "seed": 5}


class Case(NamedTuple):
    """A file, and by their names the files that the command line makes of it with `SETTINGS`."""

    path: Path
    files: dict[str, bytes]

    @property
    def media(self) -> dict[str, bytes]:
        """Those without the settings that lie beside a text."""
        return {name: content for name, content in self.files.items() if not name.endswith(".json")}


@pytest.fixture(params=["make_png", "make_wav", "make_text"])
def case(request, cli, tmp_path) -> Case:
    path, out = request.getfixturevalue(request.param)(), tmp_path / "out"
    options = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert cli("generate", path, "--out", out, *options)[0] == 0
    return Case(path, {file.name: file.read_bytes() for file in out.glob(f"{path.stem}-*")})


@pytest.fixture(scope="module")
def client(page_url: str) -> Client:
    return client_of(page_url)


def generated(client: Client, path: Path) -> dict[str, bytes]:
    """What a script gets that asks for the same."""
    files, facts = client.predict(handle_file(path), "", "", **SETTINGS, api_name="/generate")
    assert [(each["source"], each["seed"]) for each in facts] == [(path.name, 5)] * 2
    return {Path(file).name: Path(file).read_bytes() for file in files}


def test_client_batch_and_command_line(client, case):
    recipe = '[[jobs]]\nfiles = "*"\n' + "\n".join(f"{name} = {value}" for name, value in SETTINGS.items())
    archive, facts = client.predict([handle_file(case.path)], recipe, api_name="/batch")
    with zipfile.ZipFile(archive) as files:
        made = {name: files.read(name) for name in files.namelist()}
    assert len(case.media) == 2
    assert generated(client, case.path) == case.media
    assert {name: made[name] for name in case.files} == case.files
    assert set(made) == {*case.files, "jobs.toml", "results.jsonl"}
    assert [json.loads(line) for line in made["results.jsonl"].splitlines()] == facts


@pytest.mark.browser
@pytest.mark.parametrize("case", ["make_png", "make_text", pytest.param("make_wav", marks=pytest.mark.slow)], indirect=True)
def test_page_client_and_command_line(open_page, client, case, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Complete").click()
    page.wait_for_selector("#complete-start", state="visible")
    upload(page, case.path, field="complete-file")
    page.wait_for_function("document.querySelector('#complete-plan textarea').value.startsWith('Keeps')")  # half, by itself
    page.get_by_text("Model and sampling").click()
    for field in ("num-bytes", "samples", "seed"):
        page.fill(f"#complete-{field} input[type=number]", str(SETTINGS[field.replace("-", "_")]))
        page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('#complete-plan textarea').value.includes('makes 48 ')")
    page.wait_for_function("document.querySelector('#complete-plan textarea').value.includes(', 2 times')")
    page.click("#complete-start")
    page.wait_for_function("n => document.querySelectorAll('#results-view .actions a').length === n", arg=len(case.files))
    page.wait_for_selector("#complete-start:not([disabled])")
    shown = {}
    for link in page.locator("#results-view .actions a").all():
        with page.expect_download() as event:
            link.click()
        event.value.save_as(tmp_path / "downloaded")
        shown[event.value.suggested_filename] = (tmp_path / "downloaded").read_bytes()
    assert len(case.media) == 2
    assert generated(client, case.path) == case.media
    assert shown == case.files
