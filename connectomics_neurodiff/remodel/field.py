"""Smooth random displacement of space that cannot fold: a cubic B-spline with its Jacobian measured voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from scipy import sparse

from ..errors import ValueRangeError
from ..geometry import is_anisotropic, voxel_size
from .checks import positive
from .neighbours import sides

#: Mean square of a uniform cubic B-spline's weights per axis: with N(0, 1) coefficients, the variance of the spline.
_SPLINE_VARIANCE = 151 / 315
_SHRINK = 0.85
_MAX_SHRINKS = 40
_STRIP = 32


@dataclass(frozen=True, eq=False)
class _Axis:
    """Cubic B-spline along one axis: `even` mirrors the coefficients at both ends, `odd` mirrors and negates them.

    Both have at most four weights per voxel. Products with them start no threads: those of BLAS decide the last bits,
    and spin for a while when they are done, which took a fifth of the time of remodelling.
    """

    positions_nm: np.ndarray
    reach_nm: float
    even: sparse.csr_array
    odd: sparse.csr_array


def check_least_jacobian(least: float) -> None:
    """Raise ValueRangeError unless some field but the zero field can have such a smallest determinant."""
    if not 0 < positive("The smallest Jacobian determinant allowed", least) < 1:
        raise ValueRangeError(f"The smallest Jacobian determinant allowed lies in (0, 1). Got {least}.")


def _cubic_weights(t: np.ndarray) -> np.ndarray:
    """Weights of the four control points around fraction t in [0, 1), (..., 4)."""
    return np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=-1) / 6


def _spline_axis(length: int, pitch_nm: float, spacing_nm: float) -> _Axis:
    """Control points on both end voxels and about every `spacing_nm` between."""
    extent = (length - 1) * pitch_nm
    # Two intervals at least: one free control point for the component that must vanish at both ends.
    intervals = max(2, round(extent / spacing_nm)) if length > 1 else 1
    step = extent / intervals if length > 1 else spacing_nm
    at = np.arange(length) * pitch_nm / step
    cell = np.clip(at.astype(int), 0, intervals - 1)
    extended = np.zeros((length, intervals + 3))
    np.put_along_axis(extended, cell[:, None] + np.arange(4), _cubic_weights(at - cell), axis=1)
    even, odd = extended[:, 1:-1].copy(), extended[:, 1:-1].copy()
    for outer, inner in ((0, 1), (intervals + 2, intervals - 1)):
        even[:, inner] += extended[:, outer]
        odd[:, inner] -= extended[:, outer]
    # An odd function is 0 at the end itself.
    odd[:, [0, -1]] = 0
    return _Axis(np.arange(intervals + 1) * step, 2 * step, sparse.csr_array(even), sparse.csr_array(odd))


def _free_axis(length: int, pitch_nm: float, spacing_nm: float, phase: float) -> _Axis:
    """Control points every `spacing_nm`, not tied to the ends: a thin stack varies as slowly as a deep one.

    Four per voxel at most: a spline has four weights, so voxels are independent of one another then.
    """
    spacing_nm = max(spacing_nm, pitch_nm / 4)
    at = np.arange(length) * pitch_nm / spacing_nm + phase
    cell = at.astype(int)
    weights = np.zeros((length, int(cell[-1]) + 4))
    np.put_along_axis(weights, cell[:, None] + np.arange(4), _cubic_weights(at - cell), axis=1)
    positions = (np.arange(weights.shape[1]) - 1 - phase) * spacing_nm
    both = sparse.csr_array(weights)
    return _Axis(positions, 2 * spacing_nm, both, both)


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """Displacement in nm as a tensor-product cubic B-spline.

    The component across a face of the volume is zero on that face: space is mapped onto itself, nothing leaves the
    frame and nothing has to be invented at its border.

    Attributes
    ----------
    coefficients : numpy.ndarray
        (c, kz, ky, kx) float64, nm. c is 2 (y, x) where sections stay in their planes, else 3 (z, y, x).
    """

    coefficients: np.ndarray
    axes: tuple[_Axis, _Axis, _Axis]
    pitch_nm: tuple[float, float, float]

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        voxel_nm: Sequence[float],
        rng: np.random.Generator,
        *,
        sigma_nm: float,
        spacing_nm: float,
    ) -> DisplacementField:
        """Draw a field; in-plane where sections are at least twice as thick as pixels are wide, else in 3D.

        Parameters
        ----------
        shape : sequence of 3 ints
            Voxels (z, y, x).
        voxel_nm : sequence of 3 floats
            Voxel size (z, y, x).
        rng : numpy.random.Generator
        sigma_nm : float
            Standard deviation of each component of the displacement, away from the border.
        spacing_nm : float
            Distance of the control points. Across sections too, so neighbours move alike but not identically.
        """
        z, y, x = voxel_size(voxel_nm)
        in_plane = is_anisotropic((z, y, x)) or shape[0] == 1
        phase = float(rng.random())
        depth = _free_axis(shape[0], z, spacing_nm, phase) if in_plane else _spline_axis(shape[0], z, spacing_nm)
        axes = (depth, _spline_axis(shape[1], y, spacing_nm), _spline_axis(shape[2], x, spacing_nm))
        size = (2 if in_plane else 3, *(len(a.positions_nm) for a in axes))
        return cls(rng.standard_normal(size) * sigma_nm / _SPLINE_VARIANCE**1.5, axes, (z, y, x))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (z, y, x)."""
        z, y, x = (a.even.shape[0] for a in self.axes)
        return z, y, x

    @property
    def moves(self) -> tuple[int, ...]:
        """Axes along which voxels are displaced."""
        return tuple(range(3 - len(self.coefficients), 3))

    def section(self, z: int) -> np.ndarray:
        """Displacement of section z in voxels, (c, y, x) float32."""
        planes = []
        for axis, coefficients in zip(self.moves, self.coefficients, strict=True):
            bz, by, bx = (a.odd if i == axis else a.even for i, a in enumerate(self.axes))
            near = bz[[z]] @ coefficients.reshape(len(coefficients), -1)
            control = near.reshape(coefficients.shape[1:]) / self.pitch_nm[axis]
            along_x = np.ascontiguousarray((bx @ control.T).T, dtype=np.float32)
            planes.append(by.astype(np.float32) @ along_x)
        return np.stack(planes)

    def scaled(self, factor: float) -> DisplacementField:
        """The same field, `factor` times as strong."""
        return replace(self, coefficients=self.coefficients * factor)

    def damped(self, box: Sequence[slice], factor: float) -> DisplacementField:
        """Field weakened in a box of voxels: every control point with a say there is multiplied by `factor`."""
        inside = []
        for axis, part, pitch in zip(self.axes, box, self.pitch_nm, strict=True):
            low, high = part.start * pitch - axis.reach_nm, (part.stop - 1) * pitch + axis.reach_nm
            inside.append(np.flatnonzero((axis.positions_nm > low) & (axis.positions_nm < high)))
        coefficients = self.coefficients.copy()
        for component in coefficients:
            component[np.ix_(*inside)] *= factor
        return replace(self, coefficients=coefficients)

    def jacobian_minimum(self) -> float:
        """Smallest Jacobian determinant of p -> p + u(p) over all corners of all voxel cells; > 0 means no fold."""
        sections = (self.section(z) for z in range(self.shape[0]))
        if self.moves == (1, 2):
            return min(_minimum_by_strips(section) for section in sections)
        slabs = (np.stack(pair, axis=1) for pair in pairwise(sections))
        return min(_minimum_by_strips(slab) for slab in slabs)

    def without_folds(self, min_jacobian: float) -> tuple[DisplacementField, float]:
        """Field scaled down in equal steps until its smallest Jacobian determinant is at least `min_jacobian`.

        Returns
        -------
        field : DisplacementField
        minimum : float
            Its smallest Jacobian determinant.

        Raises
        ------
        ValueRangeError
            If `min_jacobian` is not in (0, 1): no field but the zero field reaches 1.
        """
        check_least_jacobian(min_jacobian)
        field = self
        for _ in range(_MAX_SHRINKS):
            minimum = field.jacobian_minimum()
            if minimum >= min_jacobian:
                return field, minimum
            field = field.scaled(_SHRINK)
        # Reached only by amplitudes hundreds of times the spacing.
        return self.scaled(0.0), 1.0

    def warp(self, volume: np.ndarray, first: int = 0, sections: range | None = None) -> np.ndarray:
        """Pull a label volume through the field: out(p) is the label with the largest linear weight at p + u(p).

        Linear interpolation of every label's indicator, and the largest wins: outlines stay smooth where the nearest
        voxel alone would fray them.

        Parameters
        ----------
        volume : numpy.ndarray
            (z, y, x) integers; of the field's shape, or some of its sections.
        first : int
            Section of the field that the first one of `volume` is.
        sections : range or None
            Sections of the field to make. `volume` must hold :attr:`reach` more on either side, as far as there are
            any. None: those of `volume`.

        Returns
        -------
        numpy.ndarray
            (sections, y, x), same dtype; every value occurs in `volume`.
        """
        wanted = range(first, first + len(volume)) if sections is None else sections
        out, flat = np.empty((len(wanted), self.shape[1] * self.shape[2]), volume.dtype), volume.ravel()
        strides = (self.shape[1] * self.shape[2], self.shape[2], 1)
        axes = [a for a in self.moves if self.shape[a] > 1]
        mixed = _mixed_cells(volume, axes).ravel()
        rows, columns = np.ogrid[: self.shape[1], : self.shape[2]]
        for z, section in zip(wanted, out, strict=True):
            displacement = dict(zip(self.moves, self.section(z), strict=True))
            # Where the cell starts: its pixel, which needs no 64 bits, and its section.
            pixel, fractions = np.zeros(self.shape[1:], dtype=np.int32), []
            start = np.full((1, 1), z - first, dtype=np.intp)
            for axis in axes:
                at = displacement[axis]
                at += np.float32((z, rows, columns)[axis])
                np.clip(at, 0, self.shape[axis] - 1, out=at)
                below = at.astype(np.int32)
                np.minimum(below, self.shape[axis] - 2, out=below)
                at -= below
                fractions.append(at.ravel())
                if axis == 0:
                    start = below.astype(np.intp) - first
                else:
                    below *= np.int32(strides[axis])
                    pixel += below
            corner = (start * strides[0] + pixel).ravel()
            flat.take(corner, out=section, mode="clip")
            voting = np.flatnonzero(mixed.take(corner, mode="clip"))
            section[voting] = _elect(flat, corner[voting], [f[voting] for f in fractions], [strides[a] for a in axes])
        return out.reshape(len(wanted), *self.shape[1:])

    @property
    def reach(self) -> int:
        """Sections that a label may come from beyond its own, at most."""
        if 0 not in self.moves:
            return 0
        # A spline is nowhere larger than its largest coefficient.
        return int(np.ceil(np.abs(self.coefficients[0]).max() / self.pitch_nm[0])) + 1


def _minimum_by_strips(displacement: np.ndarray) -> float:
    """:func:`jacobian_minimum` by strips of rows that fit into the cache, each with the first row of the next one."""
    rows = displacement.shape[-2]
    strips = (displacement[..., y : y + _STRIP + 1, :] for y in range(0, max(rows - 1, 1), _STRIP))
    return min(jacobian_minimum(strip) for strip in strips)


def _mixed_cells(volume: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Whether the corners of the cell that starts at a voxel differ, (z, y, x) bool; a cell spans 2 voxels per axis."""
    mixed = np.zeros(volume.shape, dtype=bool)
    for axis in axes:
        here, ahead = sides(3, axis)
        # Either face of the cell across this axis is mixed, or the two faces differ.
        mixed[here] |= mixed[ahead]
        mixed[here] |= volume[ahead] != volume[here]
    return mixed


def _elect(flat: np.ndarray, first: np.ndarray, fractions: list[np.ndarray], strides: list[int]) -> np.ndarray:
    """Label with the largest multilinear weight among the corners of the cells that start at `first`, (n,)."""
    corners = list(product((0, 1), repeat=len(strides)))
    votes = np.stack([flat[first + int(np.dot(corner, strides))] for corner in corners])
    weights = np.ones(votes.shape, dtype=np.float32)
    for i, corner in enumerate(corners):
        for side, fraction in zip(corner, fractions, strict=True):
            weights[i] *= fraction if side else 1 - fraction
    support = np.stack([(weights * (votes == vote)).sum(axis=0) for vote in votes])
    return np.asarray(np.take_along_axis(votes, support.argmax(axis=0)[None], axis=0)[0])


def jacobian_minimum(displacement: np.ndarray) -> float:
    """Smallest Jacobian determinant of p -> p + u(p), by differences along the edges of every voxel cell.

    At each corner of each cell the determinant is taken of the three (two) edges that meet there. All of them positive
    means that no cell is turned over, which central differences would not notice.

    Parameters
    ----------
    displacement : numpy.ndarray
        (n, \\*shape), n = 2 or 3 axes, in voxels along the same axes.

    Examples
    --------
    >>> squeeze = np.zeros((2, 4, 5), dtype=np.float32)
    >>> squeeze[1] = -0.5 * np.arange(5)
    >>> jacobian_minimum(squeeze)
    0.5
    """
    n = displacement.shape[0]
    # Along an axis of one voxel nothing moves and nothing changes.
    axes = [a for a in range(n) if displacement.shape[1 + a] > 1]
    if not axes:
        return 1.0
    u = displacement[axes]
    edges = {a: np.diff(u, axis=1 + a) for a in axes}
    lowest = np.inf
    for corner in product((0, 1), repeat=len(axes)):
        rows = []
        for a in axes:
            index: list[slice] = [slice(None)] * (n + 1)
            for b, side in zip(axes, corner, strict=True):
                if b != a:
                    index[1 + b] = slice(side, displacement.shape[1 + b] - 1 + side)
            rows.append(edges[a][tuple(index)])
        lowest = min(lowest, float(_determinant(rows).min()))
    return lowest


def _determinant(rows: list[np.ndarray]) -> np.ndarray:
    """Determinant of I + G per voxel; ``rows[a][c]`` is the derivative of component c along axis a."""
    if len(rows) == 1:
        return 1 + rows[0][0]
    if len(rows) == 2:
        return (1 + rows[0][0]) * (1 + rows[1][1]) - rows[0][1] * rows[1][0]
    (a, b, c), (d, e, f), (g, h, i) = rows
    a, e, i = 1 + a, 1 + e, 1 + i
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
