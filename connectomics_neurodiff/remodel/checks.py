"""What every door of this room checks, and the compact labels it works on."""

from __future__ import annotations

import fastremap
import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError

#: No length in tissue is set larger; a value beyond is a mistake, mostly of the unit.
MOST_NM = 1e5


def compact_labels(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Validate a label volume and renumber it 0..n, so that tables can be indexed by label.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.

    Returns
    -------
    compact : numpy.ndarray
        (z, y, x) uint32, C-ordered, labels 0..n in the order they are met.
    ids : numpy.ndarray
        (n + 1,) uint64; ``ids[compact] == label``.

    Raises
    ------
    LabelTypeError
        If the values are not integers, or one is negative.
    ShapeMismatch
        If there are not three axes of at least one voxel.
    """
    unsigned = unsigned_labels(label)
    narrow = unsigned.astype(np.uint32 if unsigned.max() < 2**32 else np.uint64)
    compact, table = fastremap.renumber(narrow, in_place=True)
    ids = np.zeros(int(max(table.values(), default=0)) + 1, dtype=np.uint64)
    for name, index in table.items():
        ids[int(index)] = name
    return compact.astype(np.uint32, copy=False), ids


def unsigned_labels(label: np.ndarray) -> np.ndarray:
    """Validate a label volume.

    Returns
    -------
    numpy.ndarray
        (z, y, x) unsigned, C-ordered, the same values.

    Raises
    ------
    LabelTypeError, ShapeMismatch
        As :func:`compact_labels`.
    """
    label = np.asarray(label)
    if label.ndim != 3 or label.size == 0:
        raise ShapeMismatch(f"A label volume has three non-empty axes (z, y, x). Got shape {label.shape}.")
    if label.dtype.kind not in "iu":
        raise LabelTypeError(f"A label volume is made of non-negative integers. Got dtype {label.dtype}.")
    if label.dtype.kind == "i" and label.min() < 0:
        raise LabelTypeError(f"A label volume is made of non-negative integers. Got {label.min()}.")
    # Byte order as the machine has it: some files are big-endian.
    native = np.ascontiguousarray(label, dtype=label.dtype.newbyteorder("="))
    return native.view(np.dtype(f"u{label.dtype.itemsize}"))


def binary_mask(mask: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Validate a mask against the label volume it belongs to.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8, C-ordered, 1 where `mask` is not zero.

    Raises
    ------
    ShapeMismatch
        If its shape differs from `shape`.
    LabelTypeError
        If it is not made of numbers or truth values.
    ValueRangeError
        If it holds a value that is not finite.
    """
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise ShapeMismatch(f"The {name} mask must have the label's shape {shape}. Got {mask.shape}.")
    if mask.dtype.kind not in "buif":
        raise LabelTypeError(f"The {name} mask must be 0 or 1. Got dtype {mask.dtype}.")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise ValueRangeError(f"The {name} mask must be 0 or 1. Got a value that is not finite.")
    return np.ascontiguousarray(mask != 0).view(np.uint8)


def require_generator(rng: np.random.Generator) -> None:
    """Raise ValueRangeError unless random numbers can be drawn from it: a seed alone is no generator."""
    if not isinstance(rng, np.random.Generator):
        raise ValueRangeError(
            f"rng must be a numpy.random.Generator, such as numpy.random.default_rng(0). Got {type(rng).__name__}."
        )


def positive(name: str, value: float, *, below: float = np.inf, zero: bool = False) -> float:
    """Validate a scalar setting: finite, > 0 (or >= 0 with `zero`) and <= `below`.

    Raises
    ------
    ValueRangeError
        If it is not.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueRangeError(f"{name} must be a number. Got {value!r}.")
    if not np.isfinite(value) or value < 0 or (value == 0 and not zero) or value > below:
        low, high = "[0" if zero else "(0", f"{below:g}]" if np.isfinite(below) else "infinity)"
        raise ValueRangeError(f"{name} must be a number in {low}, {high}. Got {value}.")
    return float(value)
