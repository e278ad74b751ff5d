"""Shared by the tests of the plugin for pytorch_connectomics v1: the host itself, or a stand-in for it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from connectomics_neurodiff.host import find_host, v1

KIND = find_host().kind
STAND_IN = Path(__file__).parent / "pytc_v1"


def host_or_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Body of a fixture: `import connectomics` gives PyTC v1, or where it is not installed what stands in for it.

    So it is in processes that the test starts. Afterwards everything that has seen the stand-in is forgotten.
    """
    if KIND == "v1":
        yield
        v1.unregister()
        return
    before = _forget_host()
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN), prepend=":")
    yield
    v1.unregister()
    _forget_host()
    sys.modules.update(before)


def _forget_host() -> dict[str, object]:
    """Remove the host, and our modules that derive from its classes, from the loaded modules -> the host's."""
    removed = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "connectomics"}
    for name in ("augmentation", "datasets", "engine", "project", "trainer"):
        if sys.modules.pop(f"{v1.__name__}.{name}", None) is not None:
            delattr(v1, name)
    return removed


def stand_in_signatures() -> dict[str, list[str]]:
    """Arguments of every public function and method of the stand-in, by "module:name", read without importing it."""
    found = {}
    for file in sorted((STAND_IN / "connectomics").rglob("*.py")):
        module = ".".join(file.relative_to(STAND_IN).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found[f"{module}:{node.name}"] = [argument.arg for argument in node.args.args]
            elif isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        arguments = [argument.arg for argument in method.args.args][1:]
                        found[f"{module}:{node.name}.{method.name}"] = arguments
    return found
