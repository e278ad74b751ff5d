"""connectomics_neurodiff: new labelled EM volumes from the ones a lab has, and the segmenter trained on both.

The data's way, one sub-package each; each imports only the foundations and earlier ones:

    volume -> conditions -> remodel -> synthesis -> pairs -> segmenters -> training -> predict -> agglomerate
    -> metrics -> report

Foundations: errors, geometry, affinities, registry, seeding, provenance, progress, checkpoints, engine, config.
:mod:`~connectomics_neurodiff.pipeline` runs the stages in order, :mod:`~connectomics_neurodiff.study` compares many
such runs, :mod:`~connectomics_neurodiff.cli` is the command line.

The names below are loaded on first use, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .metrics import Scores as Scores
    from .metrics import evaluate as evaluate
    from .remodel import RemodelledMask as RemodelledMask
    from .segmenters import build_segmenter as build_segmenter
    from .synthesis import build_denoiser as build_denoiser
    from .synthesis import selective_scan as selective_scan
    from .volume import Volume as Volume
    from .volume import open_volume as open_volume

_HOMES = {
    "Volume": "volume",
    "open_volume": "volume",
    "RemodelledMask": "remodel",
    "build_denoiser": "synthesis",
    "selective_scan": "synthesis",
    "build_segmenter": "segmenters",
    "Scores": "metrics",
    "evaluate": "metrics",
}

__all__ = ["__version__", "remodel", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name == "remodel":
        return importlib.import_module(".remodel", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
