"""Masks as the diffusion model's condition."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError, VolumeFormatError
from ..volume import ArrayLike, LazyArray, slabs

#: Condition of a sample that is to have none, in both channels and every voxel: halfway between in and out, 0 on the
#: signed scale of the network. "No membrane" is 0 here and -1 there: another statement. The denoiser knows it only
#: if its training dropped conditions (Ho and Salimans 2022, classifier-free guidance).
NULL_CONDITION = 0.5
#: What else is dark inside neurons, in the channel of mitochondria: neither none, nor one, nor unknown.
DARK_LEVEL = 0.75


def organelles(mito: np.ndarray | None, dark: np.ndarray | None) -> np.ndarray | None:
    """What the denoiser is told of the inside of neurons: 1 in mitochondria, `DARK_LEVEL` where else it is dark.

    Parameters
    ----------
    mito, dark : numpy.ndarray or None
        (z, y, x) masks, 0 or 1; a voxel of both is mitochondrion.

    Returns
    -------
    numpy.ndarray or None
        (z, y, x) float32 in [0, 1]; `mito` itself where nothing else is known to be dark.
    """
    if dark is None:
        return mito
    level = np.where(dark > 0, np.float32(DARK_LEVEL), np.float32(0))
    return level if mito is None else np.maximum(level, mito)


class OrganelleMask(LazyArray):
    """:func:`organelles` of arrays on disk, part by part as it is indexed.

    Parameters
    ----------
    mito : array or None
        As there.
    dark : array
        As there, same shape.
    """

    def __init__(self, mito: ArrayLike | None, dark: ArrayLike) -> None:
        if mito is not None and tuple(mito.shape) != tuple(dark.shape):
            raise ShapeMismatch(f"Masks must have the same shape. Got mito {mito.shape}, dark {dark.shape}.")
        super().__init__(tuple(dark.shape), np.float32)
        self._mito, self._dark = mito, dark

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        mito = None if self._mito is None else np.asarray(self._mito[box])
        return np.asarray(organelles(mito, np.asarray(self._dark[box])))


def encode_condition(membrane: np.ndarray, mito: np.ndarray | None) -> np.ndarray:
    """Condition of the diffusion model.

    Parameters
    ----------
    membrane : numpy.ndarray
        (z, y, x), values in [0, 1].
    mito : numpy.ndarray or None
        Same, or :func:`organelles`; None where there are no mitochondria masks: the channel is 0 then.

    Returns
    -------
    numpy.ndarray
        (2, z, y, x) float32 in [0, 1]: channel 0 membrane, channel 1 mitochondria.

    Raises
    ------
    VolumeFormatError, ShapeMismatch, ValueRangeError
        If a mask has not three axes, the shapes differ, a value is not in [0, 1].
    """
    _require_same_shape({"membrane": membrane, **({} if mito is None else {"mito": mito})})
    condition = np.zeros((2, *membrane.shape), dtype=np.float32)
    condition[0] = membrane
    if mito is not None:
        condition[1] = mito
    # "not (in range)" also catches NaN.
    if condition.size and not (condition.min() >= 0 and condition.max() <= 1):
        raise ValueRangeError(
            f"Condition masks must lie in [0, 1]. Got [{condition.min():.4g}, {condition.max():.4g}]."
        )
    return condition


def check_masks(label: ArrayLike, membrane: ArrayLike, mito: ArrayLike | None, dark: ArrayLike | None = None) -> None:
    """Refuse masks that cannot condition a synthesis; arrays on disk are read a few sections at a time.

    Parameters
    ----------
    label : array
        (z, y, x) non-negative integers, at least one > 0.
    membrane, mito, dark : array
        (z, y, x) integers or bool, 0 or 1; all but the first may be None.

    Raises
    ------
    VolumeFormatError
        If an array has not three axes.
    ShapeMismatch
        If the shapes differ.
    LabelTypeError
        If labels or masks are not integers, or a label is negative.
    ValueRangeError
        If a mask holds something else than 0 and 1, or nothing is labelled.
    """
    given = {"membrane": membrane, "mito": mito, "dark": dark}
    masks = {name: mask for name, mask in given.items() if mask is not None}
    _require_same_shape({"label": label, **masks})
    for name, array in {"label": label, **masks}.items():
        if array.dtype.kind not in "uib":
            raise LabelTypeError(f"{name} must be made of non-negative integers. Got {array.dtype}.")
    low, high = _range(label)
    if low < 0:
        raise LabelTypeError(f"Labels must not be negative (0 = background). Got {low}.")
    if high == 0:
        raise ValueRangeError("At least one voxel must belong to a neuron (label > 0). Got background only.")
    for name, mask in masks.items():
        low, high = _range(mask)
        if low < 0 or high > 1:
            raise ValueRangeError(f"{name} must hold 0 and 1 only. Got values in [{low}, {high}].")


def _range(array: ArrayLike) -> tuple[int, int]:
    """Smallest and largest value."""
    parts = (np.asarray(array[index]) for index in slabs(tuple(array.shape)))
    ranges = [(int(part.min()), int(part.max())) for part in parts]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _require_same_shape(arrays: Mapping[str, ArrayLike]) -> None:
    for name, array in arrays.items():
        if len(array.shape) != 3 or 0 in array.shape:
            raise VolumeFormatError(f"{name} must have three axes (z, y, x), none empty. Got shape {array.shape}.")
    if len({tuple(array.shape) for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ShapeMismatch(f"Masks must have the same shape. Got {shapes}.")
