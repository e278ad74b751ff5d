"""Masks as the diffusion model's condition."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError, VolumeFormatError
from ..volume import ArrayLike, slabs

#: Condition of a sample that is to have none, in both channels and every voxel: halfway between in and out, 0 on the
#: signed scale of the network. "No membrane" is 0 here and -1 there: another statement. The denoiser knows it only
#: if its training dropped conditions (Ho and Salimans 2022, classifier-free guidance).
NULL_CONDITION = 0.5


def encode_condition(membrane: np.ndarray, mito: np.ndarray | None) -> np.ndarray:
    """Condition of the diffusion model.

    Parameters
    ----------
    membrane : numpy.ndarray
        (z, y, x), values in [0, 1].
    mito : numpy.ndarray or None
        Same; None where there are no mitochondria masks: the channel is 0 then.

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


def check_masks(label: ArrayLike, membrane: ArrayLike, mito: ArrayLike | None) -> None:
    """Refuse masks that cannot condition a synthesis; arrays on disk are read a few sections at a time.

    Parameters
    ----------
    label : array
        (z, y, x) non-negative integers, at least one > 0.
    membrane, mito : array
        (z, y, x) integers or bool, 0 or 1; `mito` may be None.

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
    masks = {"membrane": membrane, **({} if mito is None else {"mito": mito})}
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
