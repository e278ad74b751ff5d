"""Build backend: setuptools', and a line in each wheel that Python runs when it starts.

Setuptools has no public way to put a ``.pth`` file at the root of normal and editable wheels alike; a wheel is a zip
file with a list of its contents, though, and may be completed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

#: Sorted after ``__editable__.*.pth``, through which the finder of an editable installation is found itself.
NAME = "connectomics_neurodiff.pth"
#: Python runs lines that begin with "import"; one that fails would print a traceback at every start.
LINE = (
    r'import sys; exec("try:\n from connectomics_neurodiff_finder import install\n install()\n'
    r'except ImportError: pass")' + "\n"
)


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """PEP 517: build the wheel; returns its name."""
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_file(Path(wheel_directory, name), NAME, LINE.encode())
    return name


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """PEP 660: build the wheel that points back to this folder; returns its name."""
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_file(Path(wheel_directory, name), NAME, LINE.encode())
    return name


def add_file(wheel: Path, name: str, content: bytes) -> None:
    """Add a file at the root of a wheel, and to its list of files.

    Parameters
    ----------
    wheel : pathlib.Path
        Replaced.
    name : str
        Without characters that CSV would quote.
    content : bytes
        What the file holds.
    """
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    row = f"{name},sha256={digest},{len(content)}\n".encode()
    unfinished = wheel.with_suffix(".unfinished")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(unfinished, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = row + data
                added = zipfile.ZipInfo(name, entry.date_time)
                added.external_attr, added.compress_type = entry.external_attr, entry.compress_type
                new.writestr(added, content)
            new.writestr(entry, data)
    os.replace(unfinished, wheel)
