"""The architecture is a test: the order of rooms, light imports, a quick command line, complete wheels."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "connectomics_neurodiff"
ROOMS = [
    "volume", "conditions", "remodel", "synthesis", "pairs", "segmenters", "training", "predict", "agglomerate",
    "metrics", "report",
]  # fmt: skip
FOUNDATIONS = {
    "_version", "errors", "geometry", "affinities", "registry", "seeding", "provenance", "progress", "checkpoints",
    "convolution", "normalisation", "libraries", "memory", "torchvision_repair", "engine",
}  # fmt: skip


def package_imports(file: Path) -> set[str]:
    """First component below the package of every import in the file, wherever it stands."""
    below = file.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(below[: len(below) - node.level]) if node.level else []
            dotted = [*base, *(node.module or "").split(".")] if node.level else (node.module or "").split(".")[1:]
            if not node.level and not (node.module or "").startswith("connectomics_neurodiff"):
                continue
            dotted = [part for part in dotted if part]
            found |= {dotted[0]} if dotted else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("connectomics_neurodiff.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_foundations_and_earlier_rooms(room: str) -> None:
    allowed = FOUNDATIONS | set(ROOMS[: ROOMS.index(room) + 1])
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    wrong = {f"{f.relative_to(PACKAGE)}: {name}" for f in files for name in package_imports(f) - allowed}
    assert not wrong


@pytest.mark.parametrize("foundation", sorted(FOUNDATIONS))
def test_foundations_import_no_room(foundation: str) -> None:
    assert package_imports(PACKAGE / f"{foundation}.py") <= FOUNDATIONS


@pytest.mark.parametrize("module", ["connectomics_neurodiff", "connectomics_neurodiff.cli"])
def test_light_imports(module: str) -> None:
    code = (
        f"import {module}, sys; print([m for m in ('torch', 'matplotlib', 'lightning', 'scipy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("room", ["volume", "conditions", "remodel", "agglomerate", "metrics"])
def test_rooms_without_networks_do_not_load_torch(room: str) -> None:
    code = f"import connectomics_neurodiff.{room}, sys; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_help_answers_within_a_second() -> None:
    command = [sys.executable, "-m", "connectomics_neurodiff", "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_names_of_the_package_load_on_first_use() -> None:
    import connectomics_neurodiff as nd

    for name in nd.__all__:
        assert getattr(nd, name) is not None
    assert callable(nd.remodel)
    with pytest.raises(AttributeError, match="no attribute 'segmnt'"):
        nd.segmnt  # noqa: B018


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    code = "import sys; sys.path.insert(0, 'building'); import pth_backend as b; print(b.build_wheel('dist'))"
    build = [sys.executable, "-c", code]
    result = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    import zipfile

    (wheel,) = (copy / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {
        "connectomics_neurodiff", "connectomics_neurodiff_finder.py", "connectomics_neurodiff.pth",
        next(t for t in tops if t.endswith(".dist-info")),
    }  # fmt: skip
    assert "connectomics_neurodiff/report/template.html" in names
    assert "connectomics_neurodiff/py.typed" in names
