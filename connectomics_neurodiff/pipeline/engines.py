"""Which training loop drives the run: our own (Lightning), or that of an installed pytorch_connectomics v1."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from torch import nn

from ..engine import FitSettings, Loss, SampleSource, Watch
from ..errors import UnknownName, did_you_mean
from ..host import find_host
from ..host.detect import explain

ENGINES = ("auto", "native", "host")


class Engine(Protocol):
    """What an engine's module offers; see :mod:`connectomics_neurodiff.engine`."""

    def fit(
        self,
        network: nn.Module,
        loss: Loss,
        dataset: SampleSource,
        settings: FitSettings,
        folder: Path,
        *,
        label: str,
        key: str = "",
        watch: Watch | None = None,
    ) -> nn.Module:
        """Train a network, or go on where an interrupted training stopped."""

    def check_resume_point(self, folder: Path, key: str) -> None:
        """Raise if `folder` holds the half-finished training of other settings, or a broken one."""


def choose_engine(name: str) -> str:
    """ "native" or "host"; "auto" is the host if pytorch_connectomics v1 is installed.

    Raises
    ------
    UnknownName
        If there is no such engine.
    """
    if name not in ENGINES:
        raise UnknownName(f"No engine '{name}'.{did_you_mean(name, ENGINES)} Known: {', '.join(ENGINES)}.")
    if name != "auto":
        return name
    return "host" if find_host().kind == "v1" else "native"


def load_engine(name: str) -> Engine:
    """The engine's module, imported.

    Raises
    ------
    MissingDependency
        If the host was asked for, or chosen as it is installed, and cannot be used. There is no fall-back.
    """
    if name == "native":
        return importlib.import_module("connectomics_neurodiff.engine")
    from ..host.v1.compat import import_host

    import_host()
    return importlib.import_module("connectomics_neurodiff.host.v1.engine")


def describe_engine(name: str) -> str:
    """One line on the engine and why it was chosen."""
    return f"engine: {name}. {explain(find_host())}"
