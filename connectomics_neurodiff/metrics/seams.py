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


def seams(image: ArrayLike, tile: Sequence[int], overlap: Sequence[int]) -> dict[str, Seams]:
    """Gradient energy on the borders of tiles over that elsewhere.

    Parameters
    ----------
    image : array
        (z, y, x), in memory or on disk, which is read a few sections at a time.
    tile, overlap : sequence of 3 ints
        What it was computed with.

    Returns
    -------
    dict of str to Seams
        By axis, ``"z"``, ``"y"``, ``"x"``; only axes with more than one tile and a plane that is no border.
    """
    energies = _gradient_energies(image)
    found = {}
    for axis, energy, t, o in zip("zyx", energies, tile, overlap, strict=True):
        borders = np.array(tile_borders(len(energy) + 1, t, o), dtype=int)
        on = np.zeros(len(energy), dtype=bool)
        on[borders - 1] = True
        if on.any() and not on.all():
            found[axis] = _compared(energy[on], energy[~on])
    return found


def _compared(at_borders: np.ndarray, elsewhere: np.ndarray) -> Seams:
    ratio = at_borders.mean() / elsewhere.mean()
    spread = elsewhere.std() / elsewhere.mean()
    error = ratio * spread * np.sqrt(1 / len(at_borders) + 1 / len(elsewhere))
    return Seams(float(ratio), float(error), len(at_borders))


def _gradient_energies(image: ArrayLike) -> list[np.ndarray]:
    """Per axis, the mean squared difference between each plane and the next."""
    depth, rows, columns = (int(n) for n in image.shape)
    energies = [np.zeros(max(n - 1, 0)) for n in (depth, rows, columns)]
    before: np.ndarray | None = None
    for index in slabs((depth, rows, columns)):
        block = np.asarray(image[index], dtype=np.float64)
        joined = block if before is None else np.concatenate([before, block])
        first = index[0].start - (before is not None)
        energies[0][first : first + len(joined) - 1] = np.square(np.diff(joined, axis=0)).mean((1, 2))
        energies[1] += np.square(np.diff(block, axis=1)).sum((0, 2)) / (depth * columns)
        energies[2] += np.square(np.diff(block, axis=2)).sum((0, 1)) / (depth * rows)
        before = block[-1:]
    return energies
