"""Kernels of bf16 as they are built here and, where those multiply tiles, by vectors alone as well."""

from types import ModuleType

import pytest

from core import kernels

BUILDS = ["as built", "by vectors"]


def use_build(build: str, modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `core.kernels.attention` or `training_cpu` use that build, and never think torch faster; skips where there is none."""
    for module in modules:
        if module.library() is None:
            pytest.skip("this machine cannot have the kernels")
        monkeypatch.setattr(module, "multiplies_tiles", lambda: False)
        if build == "by vectors":
            if not module.library().uses_tiles():
                pytest.skip("the kernels as built use no tiles")
            with monkeypatch.context() as patch:
                load = kernels.load_library
                patch.setattr(kernels, "load_library", lambda source, *flags, load=load: load(source, *flags, "-mno-amx-tile"))
                found = module.library.__wrapped__()
            monkeypatch.setattr(module, "library", lambda found=found: found)
