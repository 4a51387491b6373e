"""Imports only point down, and each layer stays free of what belongs above it; read from the source, nothing is run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each module may import modules of lower lines, and of its own line within the same package (`core.codecs.*`, ...).
LAYERS = [
    ["core.errors", "core.allocator", "core.arena", "core.kernels"],
    ["core.limits"],
    ["core.config", "core.distributed"],
    ["core.cache", "core.codecs", "core.folder", "core.presets", "core.optim"],
    ["core.models", "core.data", "core.run_folder"],
    ["core.checkpoint", "core.likelihood", "core.native"],
    ["core.law"],
    ["core.rows", "core.lockstep"],
    ["core.sample", "core.learner", "core.report"],
    ["core.train", "core.bench"],
    ["core.curve"],
    ["core.plans", "core.comparison"],
    ["core.compare"],
    ["core"],
    ["app.messages", "app.uploads", "app.settings", "app.media", "app.palette", "app.sources", "app.turns"],
    ["app.guard"],
    ["app.recipe", "app.ledger", "app.jobs", "app.store", "app.console"],
    ["app.canvas", "app.framing"],
    ["app.scoring", "app.completion"],
    ["app.provenance"],
    ["app.outputs"],
    ["app.gallery"],
    ["app.service"],
    ["app.render", "app.plot"],
    ["app.exports", "app.comparison"],
    ["app.batch", "app.score_folder"],
    ["app.console_batch", "app.console_bench"],
    ["app.views"],
    ["app.downloads", "app.upload_parser"],
    ["app.tabs"],
    ["app.calls"],
    ["app.job_endpoints"],
    ["app.endpoints"],
    ["app.ui"],
    ["app.without_stubs"],
    ["app.__main__"],
]
PLOTTING = {"matplotlib", "seaborn", "plotly", "cv2"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in ("core", "app") for path in sorted((ROOT / package).rglob("*.py"))}
# The samples' recipe is a script beside its data, not a part of the program.
MODULES = {name: path for name, path in MODULES.items() if name != "app" and not name.startswith("app.samples")}


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def layer(module: str) -> int:
    """The line of LAYERS that names the module or its nearest package."""
    found = [(len(name), index) for index, names in enumerate(LAYERS) for name in names if _is_in(module, name)]
    assert found, f"{module} stands in no layer; give it its place in LAYERS"
    return max(found)[1]


def _is_in(module: str, package: str) -> bool:
    # "core" stands for the package's own file alone: a new module must be given its place.
    return module == package or (package not in ("core", "app") and module.startswith(f"{package}."))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = layer(module)
    for imported in imported_modules(MODULES[module]):
        if imported.split(".")[0] not in ("core", "app"):
            continue
        same_package = ".".join(module.split(".")[:2]) == ".".join(imported.split(".")[:2])
        assert layer(imported) < own or (layer(imported) == own and same_package), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core")])
def test_core_knows_neither_the_app_nor_a_page_nor_plots(module):
    roots = {imported.split(".")[0] for imported in imported_modules(MODULES[module])}
    assert not roots & ({"app", "gradio", "argparse"} | PLOTTING)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("core.config", "core.errors", "core.codecs"))])
def test_config_and_codecs_import_no_torch(module):
    assert "torch" not in {imported.split(".")[0] for imported in imported_modules(MODULES[module])}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("app")])
def test_the_app_holds_no_tensor_mathematics(module):
    assert "torch" not in {imported.split(".")[0] for imported in imported_modules(MODULES[module])}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("app") and layer(name) <= layer("app.render")])
def test_use_cases_know_neither_gradio_nor_argparse(module):
    assert not {"gradio", "argparse"} & {imported.split(".")[0] for imported in imported_modules(MODULES[module])}


def test_a_module_without_a_place_is_noticed():
    with pytest.raises(AssertionError, match="no layer"):
        layer("core.unheard_of")


def test_codecs_and_presets_work_without_torch_and_the_public_names_are_all_there():
    program = """
import sys
import core, core.codecs, core.config, core.data, core.presets
assert "torch" not in sys.modules
for name in core.__all__:
    getattr(core, name)
assert not hasattr(core, "nothing")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
