"""What the agglomerators accept: validated float32 affinities, and affinities made from an interior probability."""

from __future__ import annotations

import numpy as np

from ..affinities import CONVENTION
from ..errors import ShapeMismatch, ValueRangeError

#: How far outside [0, 1] an affinity may lie by rounding (half precision, blended tiles); it is clipped.
ROUNDING = 1e-3


def as_affinities(affinities: np.ndarray) -> np.ndarray:
    """Affinities as contiguous float32 in [0, 1].

    Parameters
    ----------
    affinities : numpy.ndarray
        (3, z, y, x), channels z, y, x; 1 = same neuron; the edge (v-1, v) stored at v. Floats in [0, 1], booleans, or
        uint8: 0..255 is divided by 255, but an array that holds nothing but 0 and 1, as
        :func:`connectomics_neurodiff.affinities.affinities_from_labels` returns, is taken as it is.

    Returns
    -------
    numpy.ndarray
        (3, z, y, x) float32, C-contiguous; the input itself if it is that already.

    Raises
    ------
    ShapeMismatch
        If the shape is not (3, z, y, x) with at least one voxel.
    ValueRangeError
        If a value is NaN or outside [0, 1], or the dtype is another.
    """
    values = np.asarray(affinities)
    if values.ndim != 4 or values.shape[0] != 3 or values.size == 0:
        raise ShapeMismatch(f"Affinities must have the shape (3, z, y, x), {CONVENTION}. Got {values.shape}.")
    if values.dtype == np.uint8 and values.max() > 1:
        return values.astype(np.float32) / np.float32(255)
    if values.dtype.kind not in "fb" and values.dtype != np.uint8:
        raise ValueRangeError(f"Affinities must be floats in [0, 1] or uint8 in 0..255. Got dtype {values.dtype}.")
    values = np.ascontiguousarray(values, dtype=np.float32)
    low, high = float(values.min()), float(values.max())  # NaN propagates into both
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueRangeError(f"Affinities must lie in [0, 1] and hold no NaN. Got values from {low:g} to {high:g}.")
    return values if low >= 0 and high <= 1 else values.clip(0, 1)


def affinities_from_interior(probability: np.ndarray) -> np.ndarray:
    """Affinities for a network that predicts the interior of cells rather than affinities.

    Two neighbours belong together as far as both are inside a cell: aff(v-1, v) = min(p(v-1), p(v)). On the first
    plane of each axis, which has no predecessor, p(v) itself.

    Parameters
    ----------
    probability : numpy.ndarray
        (z, y, x) probability that a voxel is inside a cell (membrane = low): floats in [0, 1] or uint8 0..255.

    Returns
    -------
    numpy.ndarray
        (3, z, y, x) float32 in [0, 1]. Across sections this is optimistic: where two cells lie on top of each other
        with no membrane between, both voxels are interior and the z affinity is high.

    Raises
    ------
    ShapeMismatch, ValueRangeError
        As :func:`as_affinities`.
    """
    interior = np.asarray(probability)
    if interior.ndim != 3:
        raise ShapeMismatch(f"An interior probability must have the shape (z, y, x). Got {interior.shape}.")
    affinities = as_affinities(np.stack([interior] * 3))
    inside = affinities[0].copy()
    for axis, channel in enumerate(affinities):
        np.minimum(inside, np.roll(inside, 1, axis=axis), out=channel)
        first = np.take(inside, [0], axis=axis)  # np.roll wraps around: the first plane has no predecessor
        channel[(slice(None),) * axis + (slice(0, 1),)] = first
    return affinities
