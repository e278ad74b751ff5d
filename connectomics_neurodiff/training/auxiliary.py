"""What a segmenter can learn beside the affinities it is used for: affinities over larger distances, and local shape.

Such targets cost a few output channels in training and nothing afterwards, and make a network look beyond the membrane
in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import fastremap
import numpy as np
from scipy.ndimage import find_objects, gaussian_filter, map_coordinates

from ..errors import ValueRangeError

#: Mean offset (z, y, x), variance (zz, yy, xx), correlation (zy, zx, yx), and size.
DESCRIPTORS = 10
#: Gaussians end here; beyond lies 0.3 % of their mass.
_TRUNCATION_SIGMAS = 3.0
#: The statistics are smooth over one standard deviation: they are taken on a grid with this many points in it.
_POINTS_PER_SIGMA = 3.0
#: A variance below this, in sigma squared, is that of a flat neuron: it correlates with nothing.
_LEAST_VARIANCE = 1e-4


@dataclass(frozen=True)
class AuxiliaryTargets:
    """What is learnt beside the nearest-neighbour affinities; nothing by default.

    Attributes
    ----------
    long_range : tuple of (int, int, int)
        Distances (z, y, x) in voxels, each a channel: whether a voxel and the one that far before it on every axis
        belong to one neuron. Lee et al. 2017 (figure 3) learn y and x at 3, 9, 27 and z at 2, 3, 4.
    shape_sigma_nm : float
        Standard deviation in nm of the neighbourhood that the local shape descriptors describe; 0: none.
    shape_weight : float
        Weight of their loss.

    Raises
    ------
    ValueRangeError
        If a distance is negative or no longer than to a direct neighbour, or a number is negative.
    """

    long_range: tuple[tuple[int, int, int], ...] = ()
    shape_sigma_nm: float = 0.0
    shape_weight: float = 1.0

    def __post_init__(self) -> None:
        for offset in self.long_range:
            whole = len(offset) == 3 and all(isinstance(n, int) and n >= 0 for n in offset)
            if not whole or sum(offset) < 2:
                raise ValueRangeError(
                    "A long-range affinity has a distance of three whole numbers >= 0, (z, y, x) voxels, that reaches "
                    f"beyond the direct neighbour, such as [0, 9, 0]. Got {list(offset)}."
                )
        for name, value in (("shape_sigma_nm", self.shape_sigma_nm), ("shape_weight", self.shape_weight)):
            if not 0 <= value < float("inf"):
                raise ValueRangeError(f"{name} must be a number >= 0. Got {value}.")

    @property
    def channels(self) -> int:
        """Output channels that a network needs beside the three affinities."""
        return len(self.long_range) + (DESCRIPTORS if self.shape_sigma_nm else 0)


def long_range_affinities(
    label: np.ndarray, known: np.ndarray, offsets: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Affinities between voxels that lie farther apart, stored at the later one as those of direct neighbours are.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) integers, 0 = background.
    known : numpy.ndarray
        (z, y, x): 1 where the label is annotated, 0 elsewhere, or between them.
    offsets : sequence of 3 ints
        Distances (z, y, x) >= 0 in voxels.

    Returns
    -------
    affinity : numpy.ndarray
        (n, z, y, x) uint8: 1 where voxel v and voxel v - offset carry the same label > 0.
    usable : numpy.ndarray
        (n, z, y, x) in the type of `known`: the smaller value of both voxels, 0 if one does not exist.
    """
    affinity = np.zeros((len(offsets), *label.shape), dtype=np.uint8)
    usable = np.zeros(affinity.shape, dtype=known.dtype)
    for channel, offset in enumerate(offsets):
        here = tuple(slice(min(d, n), None) for d, n in zip(offset, label.shape, strict=True))
        before = tuple(slice(0, max(n - d, 0)) for d, n in zip(offset, label.shape, strict=True))
        affinity[channel][here] = (label[here] == label[before]) & (label[here] > 0)
        usable[channel][here] = np.minimum(known[here], known[before])
    return affinity, usable


def shape_descriptors(label: np.ndarray, voxel_nm: Sequence[float], sigma_nm: float) -> np.ndarray:
    """Local shape descriptors (Sheridan et al., Nature Methods 20, 2023): of each voxel's neuron, near that voxel.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) integers, 0 = background.
    voxel_nm : sequence of 3 floats
        Voxel size in nm.
    sigma_nm : float
        Standard deviation of the Gaussian neighbourhood in nm, > 0.

    Returns
    -------
    numpy.ndarray
        (10, z, y, x) float32 in [0, 1], 0 on background. Channels 0-2: offset from the voxel to the centre of mass, z,
        y, x; 0.5 is none, a step of 0.5 is sigma. 3-5: variance in units of sigma squared. 6-8: correlation of zy, zx,
        yx; 0.5 is none. 9: share of the neighbourhood that the neuron fills.

    Notes
    -----
    The neuron ends at the border of the array. The statistics are taken on a coarser grid, with three points per sigma,
    and interpolated: neighbourhoods of many voxels cost as much as small ones. ``lsds``, the authors' package, computes
    the same numbers; it cannot be installed without a compiler, and needs gunpowder.
    """
    sigma = np.array([sigma_nm / nm for nm in voxel_nm])  # voxels
    step = np.maximum(1, np.floor(sigma / _POINTS_PER_SIGMA)).astype(int)
    descriptors = np.zeros((DESCRIPTORS, *label.shape), dtype=np.float32)
    compact, _ = fastremap.renumber(label, preserve_zero=True, in_place=False)
    for neuron, box in enumerate(find_objects(compact.astype(np.int64)), start=1):
        if box is None:  # of a label without background, the number 0 is free
            continue
        mask = compact[box] == neuron
        where = np.nonzero(mask)
        # In blocks: the centre of block i lies at i.
        points = [(axis + 0.5) / s - 0.5 for axis, s in zip(where, step, strict=True)]
        for channel, values in enumerate(_statistics(_occupancy(mask, step), sigma / step)):
            here = map_coordinates(values, points, order=1, mode="nearest")
            if channel < 3:  # a centre of mass: its offset from the voxel, 0.5 for none
                here = 0.5 + 0.5 * (here - points[channel]) * step[channel] / sigma[channel]
            descriptors[channel][box][where] = here
    return np.clip(descriptors, 0.0, 1.0, out=descriptors)


def _occupancy(mask: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Share of true voxels in every block of `step` voxels, float32; the last blocks may reach beyond the mask."""
    padded = np.pad(mask, [(0, -n % s) for n, s in zip(mask.shape, step, strict=True)])
    blocks = [size for n, s in zip(padded.shape, step, strict=True) for size in (n // s, s)]
    return padded.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32)


def _statistics(occupancy: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
    """Of the Gaussian neighbourhood of each block: centre of mass in blocks; the other descriptors as they are to be.

    Where the neighbourhood is empty the values mean nothing; the blocks around a voxel of the neuron are not.
    """

    def around(values: np.ndarray) -> np.ndarray:
        smooth: np.ndarray = gaussian_filter(values, sigma, mode="constant", truncate=_TRUNCATION_SIGMAS)
        return smooth

    size = around(occupancy)
    mass = np.maximum(size, np.finfo(np.float32).tiny)
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in occupancy.shape), indexing="ij", sparse=True)
    mean = [around(occupancy * axis) / mass for axis in axes]
    products = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    covariance = [
        (around(occupancy * axes[i] * axes[j]) / mass - mean[i] * mean[j]) / (sigma[i] * sigma[j]) for i, j in products
    ]
    variance = covariance[:3]
    correlation = [
        0.5 + 0.5 * value / np.sqrt(np.maximum(variance[i] * variance[j], _LEAST_VARIANCE**2))
        for value, (i, j) in zip(covariance[3:], products[3:], strict=True)
    ]
    return [*mean, *variance, *correlation, size]
