"""Importing PyTC v1 with today's libraries. A fix is applied only where the import really fails, and nowhere else.

* torchvision: PyTC uses two of its functions, ``make_grid`` (pictures for TensorBoard) and ``rotate`` (copy-paste
  augmentation), and does not name it among its requirements. Where it is not installed, stand-ins take its place for
  the time of PyTC's import; where it cannot be imported, ``torchvision_repair`` mends it.
* em_util: the head of PyTC's branch v1.0 imports one function of it; the package is not on the package index and not
  among PyTC's requirements.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ...errors import MissingDependency
from ...torchvision_repair import repair_torchvision
from ..detect import require_host

#: Name of the package on the index where it is not the name of the import.
_PACKAGES = {
    "GPUtil": "gputil",
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "cc3d": "connected-components-3d",
}


def import_host() -> ModuleType:
    """PyTC v1's trainer module, imported, with fixes where they are needed.

    Raises
    ------
    MissingDependency
        If another package answers to PyTC's name, or a package that PyTC needs is not installed or broken.
    """
    require_host("v1")
    repair_torchvision()
    with ExitStack() as stack:
        stack.enter_context(_replaced_if_missing("torchvision", _torchvision))
        stack.enter_context(_replaced_if_missing("em_util", _em_util))
        try:
            return importlib.import_module("connectomics.engine.trainer")
        except ModuleNotFoundError as error:
            name = (error.name or "").split(".")[0]
            if name == "connectomics":
                raise MissingDependency(
                    f"This version of pytorch_connectomics is none that the plugin knows ({error}). Known: v1.0.0 and "
                    "the head of its branch v1.0."
                ) from error
            raise MissingDependency(
                f"pytorch_connectomics v1 needs the package '{name}': pip install {_PACKAGES.get(name, name)}"
            ) from error
        except Exception as error:  # whatever its import runs into with today's libraries
            raise MissingDependency(
                f"pytorch_connectomics v1 cannot be imported here: {type(error).__name__}: "
                f"{' '.join(str(error).split())}."
            ) from error


@contextmanager
def _replaced_if_missing(name: str, make: Callable[[], dict[str, ModuleType]]) -> Iterator[None]:
    """Within the block the modules of `make` stand in for a package that is not installed; afterwards it is gone."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    modules = make()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module]


def _as_modules(functions: dict[str, Callable[..., Any]]) -> dict[str, ModuleType]:
    """Modules that hold the functions, by dotted name, with their parent packages."""
    modules: dict[str, ModuleType] = {}
    for path, function in functions.items():
        *parents, name = path.split(".")
        for depth in range(1, len(parents) + 1):
            dotted = ".".join(parents[:depth])
            if dotted not in modules:
                modules[dotted] = ModuleType(dotted)
                modules[dotted].__path__ = []  # type: ignore[attr-defined]  # a package
                if depth > 1:
                    setattr(modules[".".join(parents[: depth - 1])], parents[depth - 1], modules[dotted])
        setattr(modules[".".join(parents)], name, function)
    return modules


def _torchvision() -> dict[str, ModuleType]:
    return _as_modules({"torchvision.utils.make_grid": make_grid, "torchvision.transforms.functional.rotate": _rotate})


def _em_util() -> dict[str, ModuleType]:
    return _as_modules({"em_util.io.compute_bbox_all": bounding_boxes})


def make_grid(
    tensor: Tensor, nrow: int = 8, padding: int = 2, normalize: bool = False, scale_each: bool = False
) -> Tensor:
    """Images (n, 3, y, x) side by side in rows of `nrow`, `padding` black pixels around each -> (3, y, x)."""
    if normalize:
        axes = (1, 2, 3) if scale_each else (0, 1, 2, 3)
        low, high = tensor.amin(axes, keepdim=True), tensor.amax(axes, keepdim=True)
        tensor = (tensor - low) / (high - low).clamp_min(1e-5)
    count, channels, height, width = tensor.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    grid = tensor.new_zeros(channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    for i, image in enumerate(tensor):
        y, x = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        grid[:, y : y + height, x : x + width] = image
    return grid


def _rotate(*_args: Any, **_options: Any) -> Tensor:
    raise MissingDependency(
        "PyTC's copy-paste augmentation needs torchvision: pip install --no-deps torchvision, or leave "
        "AUGMENTOR.COPYPASTE off."
    )


def bounding_boxes(label: np.ndarray, uid: np.ndarray | None = None) -> np.ndarray:
    """Rows (label, first and last index per axis) of every label in `uid`, ascending; all labels if it is None."""
    ids = np.unique(label) if uid is None else np.asarray(uid)
    compact = np.searchsorted(ids, label) + 1
    compact[~np.isin(label, ids)] = 0
    boxes = ndimage.find_objects(compact, max_label=len(ids))
    rows = []
    for value, box in zip(ids, boxes, strict=True):
        if box is None:
            continue
        rows.append([value, *(edge for axis in box for edge in (axis.start, axis.stop - 1))])
    return np.array(rows, dtype=np.int64).reshape(-1, 1 + 2 * label.ndim)


@contextmanager
def swapped(module: Any, **names: Any) -> Iterator[None]:
    """Within the block a module has other values under these names; what somebody else then puts there stays."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            if getattr(module, name) is names[name]:
                setattr(module, name, value)


def bare(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without the wrapper for several GPUs."""
    if isinstance(network, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        module: torch.nn.Module = network.module
        return module
    return network
