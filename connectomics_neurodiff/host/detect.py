"""What is installed under the name ``connectomics``: PyTC v1, PyTC v2, Google's package, another one, or nothing.

Nothing is imported to find out: PyTC's import takes seconds and may fail.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import MissingDependency

Kind = Literal["v1", "v2", "google", "unknown", "absent"]

#: A file that only this package has, below ``connectomics``.
_MARKS: tuple[tuple[Kind, str], ...] = (
    ("v2", "models/architectures"),
    ("v1", "model/build.py"),
    ("google", "segclr"),
    ("google", "common/bounding_box.py"),
)
INSTALL_V1 = "pip install --no-deps git+https://github.com/PytorchConnectomics/pytorch_connectomics@v1.0.0"
INSTALL_V2 = "pip install git+https://github.com/PytorchConnectomics/pytorch_connectomics"


@dataclass(frozen=True)
class Host:
    """What answers to ``import connectomics``.

    Attributes
    ----------
    kind : str
        ``"v1"`` (yacs), ``"v2"`` (Lightning), ``"google"`` (an unrelated package of the same name), ``"unknown"`` or
        ``"absent"``.
    folders : tuple of pathlib.Path
        The package's folders; none if it is absent.
    """

    kind: Kind
    folders: tuple[Path, ...] = ()


def find_host() -> Host:
    """Look for a package ``connectomics`` without importing it."""
    try:
        spec = importlib.util.find_spec("connectomics")
    except ValueError:  # a module without a spec stands in sys.modules
        spec = None
    folders = tuple(Path(path) for path in (spec.submodule_search_locations or ())) if spec else ()
    if not folders:
        return Host("absent")
    for kind, mark in _MARKS:
        if any((folder / mark).exists() for folder in folders):
            return Host(kind, folders)
    return Host("unknown", folders)


def explain(host: Host) -> str:
    """One sentence on what is installed."""
    where = f" ({host.folders[0]})" if host.folders else ""
    return {
        "v1": f"pytorch_connectomics v1 is installed{where}.",
        "v2": f"pytorch_connectomics v2 is installed{where}.",
        "google": f"The package 'connectomics' here is Google's unrelated one{where}, not pytorch_connectomics.",
        "unknown": f"The package 'connectomics' here{where} is none that this plugin knows.",
        "absent": "pytorch_connectomics is not installed.",
    }[host.kind]


def require_host(kind: Literal["v1", "v2"]) -> Host:
    """The host, if it is of this kind.

    Raises
    ------
    MissingDependency
        If another package, or none, answers to its name; the message says what to do.
    """
    host = find_host()
    if host.kind == kind:
        return host
    remedy = INSTALL_V1 if kind == "v1" else INSTALL_V2
    if host.kind == "google":
        remedy = f"pip uninstall connectomics, then {remedy}"
    raise MissingDependency(f"{explain(host)} This needs pytorch_connectomics {kind}: {remedy}")
