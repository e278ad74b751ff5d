"""``python -m connectomics.main`` in every layout: how this package is installed, and where a host lies, if any.

Each test makes a bare virtual environment; wheels are unpacked into it, as pip does. In place of the command line
stands a program that reports on the process it runs in, so that no dependency is needed.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")

#: Reports the process as JSON; "--workers" adds what a child process of each kind says.
REPORT = """
    import importlib, json, os, sys

    def in_child(number):
        return 2 * number, "connectomics" in sys.modules, sys.modules["__main__"].__name__

    def main(arguments=None):
        from connectomics_neurodiff.host import find_host
        report = {
            "arguments": sys.argv[1:] if arguments is None else arguments, "argv": sys.argv[1:],
            "spec": sys.modules["__main__"].__spec__.name, "host": find_host().kind,
        }
        try:
            report["import"] = importlib.import_module("connectomics").__file__
        except ImportError as error:
            report["import"] = str(error)
        try:
            report["child"] = importlib.import_module("connectomics.main").main.__module__
        except ImportError as error:
            report["child"] = str(error)
        if "--workers" in report["arguments"]:
            import concurrent.futures, multiprocessing
            for method in multiprocessing.get_all_start_methods():
                context = multiprocessing.get_context(method)
                with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                    report[method] = pool.submit(in_child, 21).result()
        print(json.dumps(report))
        return 5
"""
HOSTS = {
    "v1": "model/build.py",
    "v2": "models/architectures/__init__.py",
    "google": "common/bounding_box.py",
}


@dataclass
class Environment:
    """A virtual environment without pip, and how to start its Python."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        base = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", base))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        cwd = self.cwd or self.folder
        command = [str(self.python), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=kept | self.variables, timeout=300)

    def report(self, *arguments: str) -> dict[str, object]:
        result = self.run(*arguments)
        assert result.returncode == 5, result.stderr
        assert result.stderr == ""
        report: dict[str, object] = json.loads(result.stdout)
        return report


def new_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder, {"PYTHONNOUSERSITE": "1"})


def unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)


def hook(backend: str, name: str, source: Path, target: Path, settings: dict[str, str] | None = None) -> Path:
    """Call a build hook as a front end does: in the source folder, in a process of its own."""
    target.mkdir(parents=True, exist_ok=True)
    arguments = [str(target)] if name == "build_sdist" else [str(target), settings]
    code = f"import sys; sys.path.insert(0, 'building'); import {backend} as b; b.{name}(*{arguments!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that no build litters the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copy(REPOSITORY / "connectomics_neurodiff_finder.py", folder)
    for name in ("building", "connectomics_neurodiff"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target = tmp_path_factory.mktemp("wheels")
    return {
        "normal": hook("pth_backend", "build_wheel", source, target / "normal"),
        "editable": hook("pth_backend", "build_editable", source, target / "editable"),
    }


@pytest.fixture(params=["normal", "editable"])
def installed(request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path: Path) -> Environment:
    """An environment that has this package."""
    environment = new_environment(tmp_path / "venv")
    unpack(wheels[request.param], environment.site)
    return environment


@pytest.fixture
def reporting(installed: Environment) -> Environment:
    """The same, with the report in place of the command line."""
    (installed.site / "report_cli.py").write_text(textwrap.dedent(REPORT))
    line = 'import sys, report_cli; sys.modules["connectomics_neurodiff.cli"] = report_cli\n'
    (installed.site / "report_cli.pth").write_text(line)
    return installed


def make_host(folder: Path, kind: str) -> Path:
    """A package ``connectomics`` below a folder; returns the folder."""
    mark = folder / "connectomics" / HOSTS[kind]
    mark.parent.mkdir(parents=True)
    mark.touch()
    for package in mark.relative_to(folder).parents[:-1]:
        (folder / package / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def editable_hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What setuptools makes of an editable host: a finder (its default here), a path, or a folder of links."""
    folder = tmp_path_factory.mktemp("editable_hosts")
    wheels = {}
    for mode in ("lenient", "compat", "strict"):
        project = make_host(folder / mode, "v2")
        (project / "setup.py").write_text(
            "import setuptools\n"
            "setuptools.setup(name='connectomics', version='2', packages=setuptools.find_packages())\n"
        )
        wheels[mode] = hook(
            "setuptools.build_meta", "build_editable", project, folder / "wheels" / mode, {"editable_mode": mode}
        )
    return wheels


def host_as_folder(environment: Environment, folder: Path) -> str:
    make_host(environment.site, "v1")
    return "v1"


def host_as_path_line(environment: Environment, folder: Path) -> str:
    (environment.site / "easy-install.pth").write_text(f"{make_host(folder, 'v1')}\n")
    return "v1"


def host_in_pythonpath(environment: Environment, folder: Path) -> str:
    environment.variables["PYTHONPATH"] = str(make_host(folder, "v2"))
    return "v2"


def host_in_cwd(environment: Environment, folder: Path) -> str:
    environment.cwd = make_host(folder, "v1")
    return "v1"


def host_by_late_finder(environment: Environment, folder: Path) -> str:
    """A finder that some other tool adds after ours."""
    make_host(folder, "v2")
    (environment.site / "late_finder.py").write_text(
        "import sys, importlib.machinery\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        folders = [{str(folder)!r}] if name == 'connectomics' else path\n"
        "        if name.startswith('connectomics') and folders:\n"
        "            return importlib.machinery.PathFinder.find_spec(name, folders)\n"
        "sys.meta_path.append(Finder())\n"
    )
    (environment.site / "zz_late_finder.pth").write_text("import late_finder\n")
    return "v2"


def google_instead(environment: Environment, folder: Path) -> str:
    make_host(environment.site, "google")
    return "google"


def nobody(environment: Environment, folder: Path) -> str:
    return "absent"


LAYOUTS = [
    host_as_folder, host_as_path_line, host_in_pythonpath, host_in_cwd, host_by_late_finder, google_instead, nobody,
]  # fmt: skip


def check_report(environment: Environment, kind: str) -> None:
    """The command gets its arguments, sees the host as it is, and its children work."""
    report = environment.report("-m", "connectomics.main", "--config-file", "x.yaml", "KEY", "1", "--workers")
    assert report["arguments"] == ["run", "--config-file", "x.yaml", "KEY", "1", "--workers"]
    assert report["host"] == kind
    for method in ("fork", "spawn", "forkserver"):
        value, sees_host, main_name = report[method]  # type: ignore[misc]
        assert value == 42
        assert main_name == "__main__", "the child ran the main module again"
        assert sees_host == (method == "fork" and kind != "absent")
    if kind == "absent":
        assert report["import"] == report["child"] == "No module named 'connectomics'"
    else:
        assert str(report["import"]).endswith("connectomics/__init__.py")
        assert report["child"] == "report_cli"
    # Lightning starts the other ranks so.
    again = environment.report("-m", str(report["spec"]), *report["argv"][:-1])  # type: ignore[index]
    assert again["arguments"] == ["run", "--config-file", "x.yaml", "KEY", "1"]
    assert again["host"] == kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(reporting: Environment, layout: Callable[[Environment, Path], str], tmp_path: Path) -> None:
    check_report(reporting, layout(reporting, tmp_path / "host"))


@pytest.mark.parametrize("mode", ["lenient", "compat", "strict"])
def test_editable_host(reporting: Environment, editable_hosts: dict[str, Path], mode: str) -> None:
    unpack(editable_hosts[mode], reporting.site)
    check_report(reporting, "v2")


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x is not nobody])
def test_a_main_module_of_the_host_wins(
    reporting: Environment, layout: Callable[[Environment, Path], str], tmp_path: Path
) -> None:
    layout(reporting, tmp_path / "host")
    base = tmp_path / "host" if (tmp_path / "host").exists() else reporting.site
    (base / "connectomics" / "main.py").write_text("print('the host')\n")
    result = reporting.run("-m", "connectomics.main", "--help")
    assert (result.returncode, result.stdout, result.stderr) == (0, "the host\n", "")


def test_help_is_that_of_neurodiff_run(installed: Environment) -> None:
    help_ = installed.run("-m", "connectomics.main", "--help")
    assert help_.returncode == 0, help_.stderr
    assert help_.stdout == installed.run("-m", "connectomics_neurodiff", "run", "--help").stdout
    assert "--config-file" in help_.stdout
    wrong = installed.run("-m", "connectomics.main", "--confg-file", "x")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--config-file" in wrong.stderr


@pytest.mark.parametrize("options", [["-mconnectomics.main"], ["-um", "connectomics.main"], ["-Imconnectomics.main"]])
def test_spellings_of_m(reporting: Environment, options: list[str]) -> None:
    assert reporting.report(*options)["arguments"] == ["run"]


@pytest.mark.parametrize("tool", ["cProfile", "pdb"])
def test_under_a_profiler_or_debugger(reporting: Environment, tool: str) -> None:
    extra = ["-c", "continue"] if tool == "pdb" else []
    result = reporting.run("-m", tool, *extra, "-m", "connectomics.main", "X", "1")
    line = next(x for x in result.stdout.splitlines() if x.startswith("{"))
    assert json.loads(line)["arguments"] == ["run", "X", "1"]


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import connectomics", "connectomics"),
        ("import connectomics.main", "connectomics"),
        ("import importlib.util as u; assert u.find_spec('connectomics') is None; import a", "a"),
    ],
)
def test_nothing_is_there_that_was_not_asked_for(installed: Environment, code: str, missing: str) -> None:
    for arguments in (["-c", code], ["-c", code, "-m", "connectomics"]):
        result = installed.run(*arguments)
        assert result.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{missing}'"
    assert installed.run("-m", "connectomics").stderr.endswith(": No module named connectomics\n")


def test_other_modules_of_the_host_are_not_answered(installed: Environment) -> None:
    make_host(installed.site, "v1")
    result = installed.run("-m", "connectomics.other")
    assert result.stderr.endswith(": No module named connectomics.other\n")


def test_a_start_of_python_costs_one_module(installed: Environment) -> None:
    code = "import sys; print(*sorted(sys.modules))"
    with_us = set(installed.run("-c", code).stdout.split())
    (installed.site / "connectomics_neurodiff.pth").unlink()
    without_us = set(installed.run("-c", code).stdout.split())
    assert with_us - without_us == {"connectomics_neurodiff_finder"}


def test_one_pass_over_the_path_files_is_enough(installed: Environment) -> None:
    """A virtual environment's are processed twice, which hides a wrong order; those of other Pythons are not."""
    code = f"import site, sys; site.addsitedir({str(installed.site)!r}); print(sys.meta_path[-1].__name__)"
    assert installed.run("-I", "-S", "-c", code).stdout == "MainFinder\n"


def test_a_half_removed_installation_is_silent(installed: Environment) -> None:
    for name in installed.site.glob("*connectomics_neurodiff*"):
        if name.name != "connectomics_neurodiff.pth" and not name.name.endswith(".dist-info"):
            shutil.rmtree(name) if name.is_dir() else name.unlink()
    result = installed.run("-c", "print('started')")
    assert (result.stdout, result.stderr) == ("started\n", "")
    assert installed.run("-m", "connectomics.main").returncode == 1


@pytest.mark.parametrize("kind", ["normal", "editable"])
def test_record_lists_every_file_once(wheels: dict[str, Path], kind: str) -> None:
    wheel = wheels[kind]
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (record,) = [name for name in names if name.endswith("RECORD")]
        rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(file.read(record).decode()))}
        assert names[-1] == record, "as the format recommends"
        assert len(names) == len(set(names))
        assert set(names) == set(rows)
        for name in set(names) - {record}:
            digest = base64.urlsafe_b64encode(hashlib.sha256(file.read(name)).digest()).decode().rstrip("=")
            assert rows[name] == [f"sha256={digest}", str(file.getinfo(name).file_size)]
    assert "connectomics_neurodiff.pth" in names


def test_a_wheel_from_the_sdist_is_the_same(source: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    sdist = hook("pth_backend", "build_sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    wheel = hook("pth_backend", "build_wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheels["normal"]) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")
@pytest.mark.parametrize("options", [[], ["--editable"]])
def test_pip_installs_and_removes_it(source: Path, tmp_path: Path, options: list[str]) -> None:
    environment = new_environment(tmp_path / "venv")
    copy = shutil.copytree(source, tmp_path / "copy")

    # Our own Python's pip and setuptools, lent to the environment; nothing else of it, for this package may be there.
    lent = tmp_path / "lent"
    lent.mkdir()
    for pattern in ("pip", "pip-*", "setuptools", "setuptools-*", "_distutils_hack", "pkg_resources"):
        for found in Path(sysconfig.get_path("purelib")).glob(pattern):
            (lent / found.name).symlink_to(found)
    environment.variables["PYTHONPATH"] = str(lent)

    def pip(*arguments: str) -> None:
        result = environment.run("-m", "pip", "--isolated", "--disable-pip-version-check", *arguments)
        assert result.returncode == 0, result.stderr

    pip("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", *options, str(copy))
    assert (environment.site / "connectomics_neurodiff.pth").exists()
    assert environment.run("-m", "connectomics.main", "--help").returncode == 0
    pip("uninstall", "--quiet", "--yes", "connectomics_neurodiff")
    assert not list(environment.site.glob("*neurodiff*"))  # pip removes even the emptied folder
    assert environment.run("-m", "connectomics.main", "--help").returncode == 1
