"""Neurons that shrink and swell: where two meet, their boundary moves towards one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import edt
import numpy as np
from scipy import ndimage

from ..conditions.membrane import MAX_GAP_NM, grow_into, thin_background
from ..geometry import ZYX, is_anisotropic, voxel_size
from .checks import MOST_NM, compact_labels, positive, require_generator
from .elastic import mend, pieces_of, torn_labels
from .field import DisplacementField
from .neighbours import sides

#: Distance over which a neuron goes from swollen to shrunken.
_PATCH_NM = 300.0
#: A boundary moves by so many standard deviations, and by this share of the half-width of the neuron that loses, at
#: most.
_MOST_SIGMAS, _SHARE_OF_WIDTH = 3.0, 0.5
#: Where thin background ends beyond its last voxel's centre, in halves of a voxel.
_GAP_END = 0.8
#: Sections that are worked on together where work goes in 3D.
_SLAB = 64
#: A torn label moves so much less in the next pass, then not at all.
_CALM = 0.5


def swell(label: np.ndarray, voxel_nm: Sequence[float], rng: np.random.Generator, *, spread_nm: float) -> np.ndarray:
    """Let neurons shrink and swell against one another, losing and tearing none.

    Every neuron has a pressure that varies smoothly along it; where two meet, their boundary moves along its normal,
    away from the higher pressure, by half the difference: the boundary of two sites in the diagram of additively
    weighted distances [Aurenhammer 1991, Voronoi diagrams]. It moves by three standard deviations at most, and by half
    the local half-width of the neuron that loses. Thin background between two neurons moves with their boundary and
    keeps its width; wide background (:func:`.membrane_from_labels`) is a neighbour without pressure. A label that
    vanishes, or of which more than 5 % breaks off, moves half as far in the next pass, then not at all; smaller
    fragments are given to their surroundings.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background. A label may be disconnected: it will not have more pieces.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x). Boundaries move within sections where these are at least twice as thick as pixels are
        wide, else in 3D.
    rng : numpy.random.Generator
    spread_nm : float
        Standard deviation of a boundary's displacement before it is bounded, 0 to 1e5.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint64.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid.
    """
    require_generator(rng)
    compact, ids = compact_labels(label)
    return np.asarray(ids[swell_compact(compact, voxel_nm, rng, spread_nm=spread_nm)])


def swell_compact(
    compact: np.ndarray, voxel_nm: Sequence[float], rng: np.random.Generator, *, spread_nm: float
) -> np.ndarray:
    """:func:`swell` of labels 0..n (uint32)."""
    size = voxel_size(voxel_nm)
    positive("The spread of the neurons' boundaries in nm", spread_nm, below=MOST_NM, zero=True)
    count = int(compact.max()) + 1
    noise = DisplacementField.random(compact.shape, size, rng, sigma_nm=1.0, spacing_nm=_PATCH_NM)
    pressure = _Pressure(noise, rng.uniform(0, 2 * np.pi, count), spread_nm, np.ones(count))
    allowed = pieces_of(compact).counts(count)
    moved, torn = np.empty_like(compact), np.ones(count, dtype=bool)
    # This ends: boundaries that do not move tear no label, so every pass calms at least one more.
    while torn.any():
        for into, seen in _slabs(compact.shape[0], size, pressure.most_nm):
            # Other boundaries than those of torn labels stay as they are.
            if not torn[compact[seen]].any():
                continue
            part = _Boundaries.of(compact[seen], size, pressure.most_nm / _SHARE_OF_WIDTH).moved(pressure, seen.start)
            moved[into] = part[into.start - seen.start : into.stop - seen.start]
        pieces = pieces_of(moved)
        torn = torn_labels(pieces, allowed)
        pressure.calm[torn] = np.where(pressure.calm[torn] == 1, _CALM, 0)
    mend(moved, pieces, allowed)
    return moved


def _slabs(depth: int, size: ZYX, most_nm: float) -> Iterator[tuple[slice, slice]]:
    """Sections to make, and sections to see for it: all that can have a say."""
    if is_anisotropic(size) or depth == 1:
        yield from ((slice(z, z + 1), slice(z, z + 1)) for z in range(depth))
        return
    halo = int(np.ceil((most_nm / _SHARE_OF_WIDTH + 2 * MAX_GAP_NM) / size.z))
    for start, stop in pairwise([*range(0, depth, _SLAB), depth]):
        yield slice(start, stop), slice(max(0, start - halo), min(depth, stop + halo))


@dataclass(frozen=True, eq=False)
class _Pressure:
    """Pressure of every neuron at every place.

    Two smooth fields are shared by all neurons and mixed by each with a phase of its own: of unit variance, smooth, and
    as good as independent between most pairs of neurons.

    Attributes
    ----------
    noise : DisplacementField
        Its last two components, in nm, are the fields.
    phases : numpy.ndarray
        (n + 1,) per label.
    spread_nm : float
        Standard deviation of a boundary's displacement.
    calm : numpy.ndarray
        (n + 1,) factor per label of the displacement of its boundaries, [0, 1].
    """

    noise: DisplacementField
    phases: np.ndarray
    spread_nm: float
    calm: np.ndarray

    @property
    def most_nm(self) -> float:
        """Largest displacement."""
        return _MOST_SIGMAS * self.spread_nm

    def displacement(self, own: np.ndarray, other: np.ndarray, fields: np.ndarray) -> np.ndarray:
        """Displacement in nm of the boundary of two labels, > 0 into `own`; (n,), of fields (2, n)."""
        # A pressure of variance 2 sigma^2 on either side: half their difference has variance sigma^2.
        scale = np.sqrt(2) * self.spread_nm
        mine, theirs = (self._of(label, fields) * scale for label in (own, other))
        moved = np.clip((theirs - mine) / 2, -self.most_nm, self.most_nm)
        return np.asarray(moved * np.minimum(self.calm[own], self.calm[other]))

    def _of(self, label: np.ndarray, fields: np.ndarray) -> np.ndarray:
        phase = self.phases[label]
        return np.where(label > 0, np.cos(phase) * fields[0] + np.sin(phase) * fields[1], 0.0)

    def fields(self, first: int, depth: int) -> np.ndarray:
        """The two fields in sections `first` and on, (2, depth, y, x)."""
        planes = [self.noise.section(z)[-2:] for z in range(first, first + depth)]
        return np.stack(planes, axis=1) * np.reshape(self.noise.pitch_nm[1:], (2, 1, 1, 1))


@dataclass(frozen=True, eq=False)
class _Boundaries:
    """Where the neurons of a slab meet.

    Arrays of one value per voxel have the shape of the slab; those of one value per boundary voxel, (b,).

    Attributes
    ----------
    label, dense : numpy.ndarray
        The slab's labels; the same grown into thin background, where neurons touch.
    nearest, distance : numpy.ndarray
        Of every voxel: number of the nearest boundary voxel, and nm to the boundary itself.
    here, across : numpy.ndarray
        Flat index of every boundary voxel, and of its neighbour of another label.
    gap, gap_across : numpy.ndarray
        nm from every boundary to the end of the thin background on its own side, and on the other one; 0 without.
    empty : numpy.ndarray
        Per voxel: nm from the nearest neuron's end, below 0 in neurons.
    width : numpy.ndarray
        Per voxel, flat: half-width in nm of the neuron there, with its share of thin background.
    """

    label: np.ndarray
    dense: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    here: np.ndarray
    across: np.ndarray
    gap: np.ndarray
    gap_across: np.ndarray
    empty: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, label: np.ndarray, size: ZYX, reach_nm: float) -> _Boundaries:
        """Boundaries in a slab (z, y, x), or within its section if it has one only; widths up to about `reach_nm`."""
        axes = (1, 2) if len(label) == 1 else (0, 1, 2)
        shape, pitch = label.shape[3 - len(axes) :], np.array(size)[list(axes)]
        seen = label.reshape(shape)
        thin = thin_background(seen, pitch, MAX_GAP_NM)
        dense = grow_into(seen, thin)
        across, half = _neighbours(dense, pitch)
        here = np.flatnonzero(across >= 0)
        if not here.size:
            none = np.zeros(0, dtype=np.intp)
            return cls(
                label, dense, np.zeros(shape, np.intp), np.full(shape, np.inf), none, none, none, none, none, none
            )
        distance, feature = ndimage.distance_transform_edt(across.reshape(shape) < 0, pitch, return_indices=True)
        number = np.zeros(label.size, dtype=np.intp)
        number[here] = np.arange(len(here))
        nearest = number[np.ravel_multi_index(tuple(feature), shape)]
        distance += half[here][nearest]
        gap = np.zeros(len(here))
        empty = edt.edt(seen == 0, anisotropy=tuple(pitch), black_border=False, parallel=1) - pitch.min() / 2
        # The farthest voxel of the gap says how wide it is, but only where the neuron's middle is not nearer.
        np.maximum.at(gap, nearest[thin], distance[thin])
        # The gap ends between its last voxel and the next one.
        gap += np.where(gap > 0, _GAP_END * half[here], 0)
        gap = np.maximum(gap, np.where(thin, empty, 0).ravel()[here])
        width = _widest_near(distance, dense, pitch, reach_nm).ravel()
        return cls(label, dense, nearest, distance, here, across[here], gap, gap[number[across[here]]], empty, width)

    def moved(self, pressure: _Pressure, first: int) -> np.ndarray:
        """The slab, which starts at section `first`, after its boundaries have moved."""
        if not self.here.size:
            return self.label
        fields = pressure.fields(first, len(self.label)).reshape(2, -1)
        # Both sides of a boundary read the fields at the same place, so that they agree on where it goes.
        fields = fields[:, np.minimum(self.here, self.across)]
        dense = self.dense.ravel()
        own, other = dense[self.here], dense[self.across]
        shift = pressure.displacement(own, other, fields)
        most_in, most_out = (
            _SHARE_OF_WIDTH * np.maximum(self.width[at] - gap, 0)
            for at, gap in ((self.here, self.gap), (self.across, self.gap_across))
        )
        shift = np.clip(shift, -most_out, most_in)[self.nearest]
        yields = self.distance < shift
        made = np.where(yields, other[self.nearest], self.dense)
        made[yields & (shift - self.distance < self.gap_across[self.nearest])] = 0
        # Of a neuron that loses, its part of the gap moves into it; one that gains grows into its part of the gap.
        made[~yields & (shift > 0) & (self.distance - shift < self.gap[self.nearest])] = 0
        made[(shift < 0) & (self.label.reshape(made.shape) == 0) & (self.empty >= -shift)] = 0
        return np.where(shift == 0, self.label.reshape(made.shape), made).reshape(self.label.shape)


def _neighbours(dense: np.ndarray, pitch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat index of a neighbour of another label for every voxel, -1 without; half the distance to it in nm."""
    across, half = np.full(dense.shape, -1, dtype=np.intp), np.zeros(dense.shape, dtype=np.float32)
    flat = np.arange(dense.size).reshape(dense.shape)
    for axis in range(dense.ndim):
        below, above = sides(dense.ndim, axis)
        differ = dense[below] != dense[above]
        for side, beyond in ((below, above), (above, below)):
            across[side][differ] = flat[beyond][differ]
            half[side][differ] = pitch[axis] / 2
    return across.ravel(), half.ravel()


def _widest_near(depth: np.ndarray, dense: np.ndarray, pitch: np.ndarray, reach_nm: float) -> np.ndarray:
    """Largest depth of the same label within about `reach_nm`, going from voxel to voxel along the axes."""
    widest = depth.astype(np.float32)
    pairs = [sides(dense.ndim, axis) for axis in range(dense.ndim)]
    alike = [(dense[below] == dense[above]).astype(np.float32) for below, above in pairs]
    for _ in range(int(np.ceil(reach_nm / pitch.min()))):
        before = widest.copy()
        for (below, above), same in zip(pairs, alike, strict=True):
            np.maximum(widest[below], before[above] * same, out=widest[below])
            np.maximum(widest[above], before[below] * same, out=widest[above])
        if np.array_equal(widest, before):
            break
    return widest
