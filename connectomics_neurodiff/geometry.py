"""Space: (z, y, x) triples, boxes, and the overlapping tiles that cover a volume.

Everything here counts in voxels unless a name ends in ``_nm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from .errors import ValueRangeError


class ZYX(NamedTuple):
    """A triple in array order: sections, rows, columns."""

    z: float
    y: float
    x: float


#: Voxel sizes outside are mistakes, mostly of the unit: micrometres would be .03, .006, .006.
_LEAST_NM, _MOST_NM = 0.1, 1e5


def voxel_size(values: Sequence[float] | np.ndarray | float) -> ZYX:
    """Validated voxel size.

    Parameters
    ----------
    values : sequence of 3 floats
        Nanometres in the order (z, y, x); each from 0.1 to 1e5.

    Raises
    ------
    ValueRangeError
        If there are not three such numbers.
    """
    try:
        flat = np.atleast_1d(np.asarray(values, dtype=float)).ravel()
    except (TypeError, ValueError):
        flat = np.zeros(0)
    if flat.size != 3 or not ((flat >= _LEAST_NM) & (flat <= _MOST_NM)).all():
        raise ValueRangeError(
            f"A voxel size is three positive numbers in nm, (z, y, x), {_LEAST_NM:g} to {_MOST_NM:g} each. "
            f"Got {np.asarray(values).tolist() if flat.size else values!r}."
        )
    return ZYX(*(float(v) for v in flat))


def same_voxel_size(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two voxel sizes, nm, agree within 1 % on every axis."""
    return bool(np.allclose(first, second, rtol=0.01, atol=0))


def is_anisotropic(voxel_nm: Sequence[float], ratio: float = 2.0) -> bool:
    """Whether sections are at least `ratio` times thicker than a pixel is wide: then work goes section by section."""
    z, y, x = voxel_nm
    return z >= ratio * max(y, x)


@dataclass(frozen=True)
class Box:
    """Half-open box ``[start, stop)`` in voxels, (z, y, x)."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def __post_init__(self) -> None:
        if any(b <= a for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueRangeError(f"A box must have stop > start on every axis. Got {self.start} to {self.stop}.")

    @classmethod
    def of(cls, corners: Sequence[int]) -> Box:
        """The box of a configuration, [z0, y0, x0, z1, y1, x1]."""
        z0, y0, x0, z1, y1, x1 = corners
        return cls((z0, y0, x0), (z1, y1, x1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extent in voxels."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index for a (z, y, x) array."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def overlaps(self, other: Box) -> bool:
        """Whether the two boxes share a voxel."""
        return all(a < d and c < b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def within(self, shape: Sequence[int]) -> bool:
        """Whether the box lies inside an array of that shape."""
        return all(a >= 0 and b <= n for a, b, n in zip(self.start, self.stop, shape, strict=True))

    def without(self, other: Box) -> list[Box]:
        """Disjoint boxes that cover what another does not: whole sections first, then rows, then columns.

        >>> Box((0, 0, 0), (4, 9, 9)).without(Box((1, 0, 0), (9, 9, 3)))
        [Box(start=(0, 0, 0), stop=(1, 9, 9)), Box(start=(1, 0, 3), stop=(4, 9, 9))]
        """
        if not self.overlaps(other):
            return [self]
        left, start, stop = [], list(self.start), list(self.stop)
        for axis in range(3):
            for first, last in ((start[axis], other.start[axis]), (other.stop[axis], stop[axis])):
                if first < last:
                    a, b = start.copy(), stop.copy()
                    a[axis], b[axis] = first, last
                    left.append(Box((a[0], a[1], a[2]), (b[0], b[1], b[2])))
            start[axis], stop[axis] = max(start[axis], other.start[axis]), min(stop[axis], other.stop[axis])
        return left


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First voxels of the tiles that cover one axis.

    Tiles are `tile` long, neighbours share at least `overlap` voxels, the last one ends at `size`. An axis no longer
    than one tile gets one tile at 0.

    >>> tile_starts(10, 4, 1)
    [0, 3, 6]
    >>> tile_starts(3, 4, 1)
    [0]
    """
    if size < 1 or tile < 1 or not 0 <= overlap < tile:
        raise ValueRangeError(
            f"Tiles need size >= 1, tile >= 1 and 0 <= overlap < tile. Got size {size}, tile {tile}, overlap {overlap}."
        )
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def tiles(shape: Sequence[int], tile: Sequence[int], overlap: Sequence[int]) -> list[Box]:
    """Boxes that cover `shape`, in raster order; an axis shorter than its tile gets one shorter box."""
    axes = [tile_starts(n, t, o) for n, t, o in zip(shape, tile, overlap, strict=True)]
    extent = [min(n, t) for n, t in zip(shape, tile, strict=True)]
    return [Box(start, tuple(s + e for s, e in zip(start, extent, strict=True))) for start in product(*axes)]  # type: ignore[arg-type]


def blend_weights(size: int) -> np.ndarray:
    """Weights along one axis of a tile when overlapping tiles are averaged: a triangle, float32 in (0, 1]."""
    rising = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1))
    return rising.astype(np.float32) / np.float32((size + 1) // 2)


def blend_window(shape: Sequence[int]) -> np.ndarray:
    """Weight of each voxel of a tile when overlapping tiles are averaged: a triangle per axis, never zero.

    Returns
    -------
    numpy.ndarray
        float32 (z, y, x), values in (0, 1], largest in the middle. Dividing the weighted sum by the sum of weights
        gives a seam-free mean for any overlap.
    """
    z, y, x = (blend_weights(n) for n in shape)
    return z[:, None, None] * y[None, :, None] * x[None, None, :]
