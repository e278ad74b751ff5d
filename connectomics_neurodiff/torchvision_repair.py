"""Repair of a torchvision that cannot be imported beside a torch for the CPU; applied only where that really happens.

Nothing here uses torchvision, but Lightning (through torchmetrics) and pytorch_connectomics import it if it is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from .errors import MissingDependency

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
    one here needs that operator. So the operators are declared, still without an implementation, and the import is
    repeated; calling them remains an error.

    Returns
    -------
    bool
        True if the repair was needed and done; False if torchvision works as it is, or is not installed.

    Raises
    ------
    MissingDependency
        If torchvision fails in another way; the message says what to run.
    """
    if not has_torchvision():
        return False
    error = _failure()
    if error is None:
        return False
    if _SYMPTOM in str(error):
        _forget("torchvision")
        _declare_box_operators()
        error = _failure()
        if error is None:
            return True
    raise MissingDependency(
        f"torchvision does not fit the torch beside it ({' '.join(str(error).split())}). Run: {INSTALL_TORCHVISION}"
    ) from error


def _failure() -> Exception | None:
    """How the import of torchvision fails; None if it does not."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a wheel for another torch fails in many ways
        return error
    return None


def has_torchvision() -> bool:
    """Whether torchvision is installed, sound or broken; it is not imported."""
    return "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None


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
