"""Roles of arrays in a volume, and the only place where grey values, labels and masks change type.

=========  ==========================  ==========================================
role       on disk                     in a :class:`~.volume.Volume`
=========  ==========================  ==========================================
image      uint8 (or 16 bit, float)    float32 in [0, 1], one linear scaling
label      any non-negative integers   uint64, 0 = background
mito       any integers                uint8, 1 where the stored value is not 0
dark       integers, 0 or 1            uint8
=========  ==========================  ==========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import LabelTypeError, UnknownName, ValueRangeError, did_you_mean
from .arrays import ArrayLike, LazyArray, slabs

#: Names under which each role is looked for in a file with several datasets, in order of preference.
ROLE_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "raw", "volumes/raw"),
    "label": ("label", "labels", "segmentation", "volumes/labels/neuron_ids"),
    "mito": ("mito", "mitochondria"),
    "dark": ("dark",),
}


@dataclass(frozen=True)
class Scaling:
    """The one linear scaling of a volume's grey values.

    Attributes
    ----------
    low, high : float
        Grey values of the recording that become 0 and 1. A uint8 image has (0, 255).
    """

    low: float = 0.0
    high: float = 255.0

    def to_unit(self, grey: np.ndarray) -> np.ndarray:
        """Grey values as float32 in [0, 1]."""
        # In float64 for wide integers and floats, where float32 would round before the subtraction.
        wide: np.ndarray = grey.astype(np.float32 if grey.dtype.itemsize <= 2 else np.float64)
        # Python numbers keep the type.
        unit = (wide - self.low) / (self.high - self.low)
        return np.clip(unit, 0.0, 1.0).astype(np.float32, copy=False)

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`to_unit`: float64 grey values of the recording."""
        return np.asarray(unit, dtype=np.float64) * (self.high - self.low) + self.low


def require_role(role: str) -> str:
    """`role` if it is one of image, label, mito, dark; raises :class:`UnknownName` otherwise."""
    if role not in ROLE_NAMES:
        raise UnknownName(
            f"No role '{role}' of an array.{did_you_mean(role, ROLE_NAMES)} Known: {', '.join(ROLE_NAMES)}."
        )
    return role


def role_by_type(dtype: Any) -> str:
    """Role of an array that has no telling name: wide or signed integers are labels, all else is an image.

    uint8, uint16 and floats are grey values; a label volume stored as uint16 needs an explicit role.
    """
    kind = np.dtype(dtype)
    return "label" if kind.kind == "i" or (kind.kind == "u" and kind.itemsize >= 4) else "image"


def grey_scaling(image: ArrayLike, name: str) -> Scaling:
    """Scaling of an image: (0, 255) for uint8, else its true minimum and maximum, found in one pass over the file.

    Raises
    ------
    ValueRangeError
        If a value is NaN or infinite.
    """
    if image.dtype == np.uint8:
        return Scaling()
    low, high = np.inf, -np.inf
    for index in slabs(image.shape):
        slab = image[index]
        if slab.dtype.kind == "f":
            require_finite(slab, name)
        low, high = min(low, float(slab.min())), max(high, float(slab.max()))
    return Scaling(low, high if high > low else low + 1.0)


def require_finite(image: np.ndarray, name: str) -> None:
    """Raise :class:`ValueRangeError` if an image holds NaN or infinity."""
    bad = int(image.size - np.count_nonzero(np.isfinite(image)))
    if bad:
        raise ValueRangeError(f"{name}: image values must be finite. Got {bad} NaN or infinite voxels in one slab.")


def require_integers(dtype: np.dtype, name: str, role: str) -> None:
    """Raise :class:`LabelTypeError` if labels or a mask are not made of integers."""
    if dtype.kind not in "uib":
        raise LabelTypeError(f"{name}: a {role} must be made of non-negative integers (0 = background). Got {dtype}.")


def require_natural(label: np.ndarray, name: str) -> None:
    """Raise :class:`LabelTypeError` if a label is negative."""
    if label.dtype.kind == "i" and label.size and label.min() < 0:
        raise LabelTypeError(f"{name}: labels must not be negative (0 = background). Got {int(label.min())}.")


class RoleArray(LazyArray):
    """A stored array seen through its role: reads come back in the type and range of a volume.

    Parameters
    ----------
    stored : LazyArray
        The array as it is on disk, (z, y, x).
    role : {"image", "label", "mito", "dark"}
        What it is.
    scaling : Scaling
        Grey values that become 0 and 1; used for images only.
    name : str
        For messages: file and dataset.

    Raises
    ------
    LabelTypeError
        If labels or masks are not integers; on reading, if a label is negative.
    ValueRangeError
        On reading, if `dark` holds something else than 0 and 1.
    """

    _TYPES: ClassVar[dict[str, type]] = {"image": np.float32, "label": np.uint64, "mito": np.uint8, "dark": np.uint8}

    def __init__(self, stored: LazyArray, role: str, scaling: Scaling, name: str) -> None:
        super().__init__(stored.shape, self._TYPES[require_role(role)])
        if role != "image":
            require_integers(stored.dtype, name, role)
        self.stored = stored
        self.role = role
        self.scaling = scaling
        self.name = name

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        stored = self.stored[box]
        if self.role == "image":
            return self.scaling.to_unit(stored)
        if self.role == "dark" and stored.size and not 0 <= stored.min() <= stored.max() <= 1:
            raise ValueRangeError(
                f"{self.name}: a dataset of this name is a mask, 0 or 1, of what is dark inside neurons. Got values "
                f"from {stored.min()} to {stored.max()}; rename it if it is something else."
            )
        if self.role in ("mito", "dark"):
            return (stored != 0).astype(np.uint8)
        require_natural(stored, self.name)
        return stored.astype(np.uint64)
