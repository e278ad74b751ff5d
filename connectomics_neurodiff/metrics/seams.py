"""Seams: whether the borders of tiles show in a volume that was computed tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..geometry import tile_starts
from ..volume import ArrayLike, slabs


@dataclass(frozen=True)
class Seams:
    """What the borders of tiles show along one axis.

    Attributes
    ----------
    ratio : float
        Mean squared difference across borders, over that of all other neighbours: 1 without seams.
    standard_error : float
        Of the ratio, from how much the planes differ among themselves: a volume without seams lies within two or three
        of them around 1.
    borders : int
        Planes that are borders.
    """

    ratio: float
    standard_error: float
    borders: int


def tile_borders(size: int, tile: int, overlap: int) -> list[int]:
    """Voxels i of an axis such that a tile begins or ends between i - 1 and i; for tiles of :func:`.tiles`.

    >>> tile_borders(10, 4, 1)
    [3, 4, 6, 7]
    """
    starts = tile_starts(size, tile, overlap)
    return sorted({*starts[1:], *(start + tile for start in starts[:-1])})


def seams(
    image: ArrayLike, tile: Sequence[int], overlap: Sequence[int], where: ArrayLike | None = None
) -> dict[str, Seams]:
    """Gradient energy on the borders of tiles over that elsewhere.

    Parameters
    ----------
    image : array
        (z, y, x), in memory or on disk, which is read a few sections at a time.
    tile, overlap : sequence of 3 ints
        What it was computed with.
    where : array, optional
        (z, y, x) bool: only differences between two such voxels count. Where membranes lie says more about the
        difference of two planes than any seam, so count the inside of cells (:func:`even_inside`).

    Returns
    -------
    dict of str to Seams
        By axis, ``"z"``, ``"y"``, ``"x"``; only axes with more than one tile and planes of both kinds that count.
    """
    energies = _gradient_energies(image, where)
    found = {}
    for axis, energy, t, o in zip("zyx", energies, tile, overlap, strict=True):
        borders = np.array(tile_borders(len(energy) + 1, t, o), dtype=int)
        on = np.zeros(len(energy), dtype=bool)
        on[borders - 1] = True
        counted = np.isfinite(energy)
        if (on & counted).any() and np.any(energy[~on & counted] > 0):
            found[axis] = _compared(energy[on & counted], energy[~on & counted])
    return found


def _compared(at_borders: np.ndarray, elsewhere: np.ndarray) -> Seams:
    ratio = at_borders.mean() / elsewhere.mean()
    spread = elsewhere.std() / elsewhere.mean()
    error = ratio * spread * np.sqrt(1 / len(at_borders) + 1 / len(elsewhere))
    return Seams(float(ratio), float(error), len(at_borders))


def _gradient_energies(image: ArrayLike, where: ArrayLike | None) -> list[np.ndarray]:
    """Per axis, the mean squared difference between each plane and the next; NaN where nothing counts."""
    shape = tuple(int(n) for n in image.shape)
    sums, counts = ([np.zeros(max(n - 1, 0)) for n in shape] for _ in range(2))
    before: tuple[np.ndarray, np.ndarray] | None = None
    for index in slabs(shape):
        block = np.asarray(image[index], dtype=np.float64)
        counted = np.ones(block.shape, bool) if where is None else np.asarray(where[index]) > 0
        for axis in (0, 1, 2):
            values, valid, first = block, counted, 0
            if axis == 0:
                first = index[0].start
                if before is not None:
                    values, valid = (np.concatenate(pair) for pair in zip(before, (block, counted), strict=True))
                    first -= 1
            both = np.logical_and(*(valid.take(part, axis) for part in _neighbours(valid.shape[axis])))
            squared = np.square(np.diff(values, axis=axis)) * both
            rest = tuple(other for other in (0, 1, 2) if other != axis)
            planes = slice(first, first + squared.shape[axis])
            sums[axis][planes] += squared.sum(rest)
            counts[axis][planes] += both.sum(rest)
        before = block[-1:], counted[-1:]
    return [
        np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        for total, count in zip(sums, counts, strict=True)
    ]


def _neighbours(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all voxels of an axis but the last, and of those that follow them."""
    return np.arange(size - 1), np.arange(1, size)


def even_inside(outside: np.ndarray, distance: int = 3) -> np.ndarray:
    """Where an image is of one kind: more than `distance` voxels from membranes, mitochondria and background.

    Parameters
    ----------
    outside : numpy.ndarray
        (z, y, x), > 0 on all of those.
    distance : int
        Voxels, >= 0, in the plane.

    Returns
    -------
    numpy.ndarray
        (z, y, x) bool.
    """
    from scipy.ndimage import maximum_filter

    return maximum_filter(np.asarray(outside) > 0, (1, 2 * distance + 1, 2 * distance + 1)) == 0
