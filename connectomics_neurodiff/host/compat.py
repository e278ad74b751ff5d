"""Repairs of third-party packages that the host imports, applied only where their import really fails."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ..errors import MissingDependency

INSTALL_TORCHVISION = "pip install --no-deps torchvision==0.28.0"
#: What torchvision says at import beside a torch that cannot load its compiled part.
_SYMPTOM = "operator torchvision::nms does not exist"
_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
#: torch forgets the operators of a library that is garbage-collected.
_kept: list[Any] = []


def repair_torchvision() -> bool:
    """Make ``import torchvision`` work beside a torch that cannot load torchvision's compiled operators.

    The package index has torchvision for CUDA only. Beside torch for the CPU its compiled part is not loaded, and its
    import stops at the first operator that it describes but nobody has defined: non-maximum suppression of boxes. No
    host needs that operator, but v1 and v2 import torchvision for its image grids. So the operators are declared, still
    without an implementation, and the import is repeated; calling them remains an error.

    Returns
    -------
    bool
        True if the repair was needed and done; False if torchvision works as it is.

    Raises
    ------
    MissingDependency
        If torchvision is not installed, or fails in another way; the message says what to run.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise MissingDependency(
            f"pytorch_connectomics needs torchvision, which is not installed. Run: {INSTALL_TORCHVISION}"
        ) from error
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise MissingDependency(
                f"torchvision does not fit the torch beside it ({error}). Run: {INSTALL_TORCHVISION}"
            ) from error
    else:
        return False
    _forget("torchvision")
    _declare_box_operators()
    importlib.import_module("torchvision")
    return True


def _forget(package: str) -> None:
    """Remove what a failed import has left behind, or the next one would find the halves."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _declare_box_operators() -> None:
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}{_BOXES}")
    _kept.append(library)
