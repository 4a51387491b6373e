"""What the program depends on: pinned, installed as pinned, and above the versions with known holes."""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# torch before 2.10 runs code from weights-only files (CVE-2026-24747), Gradio before 6.16 follows redirects to files.
FLOORS = {"torch": (2, 10), "gradio": (6, 16), "pillow": (12, 3)}


def pinned() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9.]*)", line) for line in lines]
    assert all(found), f"every line must pin one version: {lines}"
    return {match[1].lower(): match[2] for match in found}


def parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def test_every_dependency_is_pinned_and_that_version_is_installed():
    for name, version in pinned().items():
        assert parts(importlib.metadata.version(name)) == parts(version), name


def test_versions_lie_above_their_floors():
    for name, floor in FLOORS.items():
        assert parts(pinned()[name]) >= floor, name
