"""Neurites grown in the empty space of a mask: where nobody traced anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import edt
import numpy as np

from ..errors import ValueRangeError
from ..geometry import is_anisotropic, voxel_size
from .apart import with_new_ids
from .checks import MOST_NM, compact_labels, positive, require_generator

#: A neurite's radius, of the one asked for; at its tips and where it squeezes through, of its own.
_RADII, _TIP = (0.7, 1.4), 0.4
#: Length, nm, of either half of a neurite that does not run out of room.
_LENGTHS_NM = (500.0, 3000.0)
#: Branches per nm, their radius and length, of their stem's.
_BRANCHES_PER_NM, _BRANCH = 1 / 1500, 0.6
#: A step, in radii; the turn at each, and the number of turns tried, each wider than the last, before it ends.
_STEP, _TURN, _TRIES = 0.5, 0.2, 12
#: One of fewer steps is not kept.
_LEAST_STEPS = 10
#: Failures in a row before the rest stays empty.
_PATIENCE = 25
_MOST_FILLED = 0.9


def grow_neurites(
    label: np.ndarray,
    voxel_nm: Sequence[float],
    rng: np.random.Generator,
    *,
    fraction: float,
    radius_nm: float = 60.0,
    clearance_nm: float = 25.0,
) -> np.ndarray:
    """Fill empty space with thin neurites: smooth random walks of a tube that tapers and branches.

    A neurite starts anywhere in the background and grows both ways, turning little at every step, until it has its
    length, leaves the frame or finds no room. It keeps `clearance_nm` from all neurons and from the neurites before it
    and thins where space is narrow. The background left between them is as narrow as a membrane is wide, so
    :func:`.membrane_from_labels` makes it one.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) non-negative integers, 0 = background.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x). Distances are kept within sections where these are at least twice as thick as pixels are
        wide, else in 3D.
    rng : numpy.random.Generator
    fraction : float
        Share, in [0, 0.9], of the background farther than `clearance_nm` from neurons that is to be filled. Growth ends
        below it when 25 neurites in a row find no room.
    radius_nm : float
        Mean radius, half a pixel to 1e5; each neurite draws its own, .7 to 1.4 times as large.
    clearance_nm : float
        > 0; one voxel at least.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint64; the neurites carry the smallest ids that were not in use, each is 26-connected.

    Raises
    ------
    LabelTypeError, ShapeMismatch, ValueRangeError
        If an argument is not valid.
    """
    require_generator(rng)
    compact, ids = compact_labels(label)
    grown = grow_compact(compact, voxel_nm, rng, fraction=fraction, radius_nm=radius_nm, clearance_nm=clearance_nm)
    return np.asarray(with_new_ids(ids, grown)[grown])


def grow_compact(
    compact: np.ndarray,
    voxel_nm: Sequence[float],
    rng: np.random.Generator,
    *,
    fraction: float,
    radius_nm: float,
    clearance_nm: float,
) -> np.ndarray:
    """:func:`grow_neurites` in labels 0..n (uint32): neurites are n + 1 and on."""
    size = voxel_size(voxel_nm)
    positive("The share of empty space to fill", fraction, below=_MOST_FILLED, zero=True)
    positive("The radius of a neurite in nm", radius_nm, below=MOST_NM)
    positive("The clearance of a neurite in nm", clearance_nm)
    pixel = max(size.y, size.x)
    if fraction and radius_nm < pixel / 2:
        raise ValueRangeError(f"A neurite's radius must be half a pixel at least, {pixel / 2:g} nm. Got {radius_nm:g}.")
    space = _Space.of(compact, np.array(size), max(clearance_nm, pixel), _RADII[1] * radius_nm)
    starts = np.flatnonzero(space.room > 0)
    wanted, filled, failures, name = fraction * len(starts), 0, 0, int(compact.max()) + 1
    while filled < wanted and failures < _PATIENCE:
        start = np.unravel_index(starts[rng.integers(len(starts))], compact.shape)
        points = _neurite(space, np.array(start), radius_nm * rng.uniform(*_RADII), rng)
        if len(points) < _LEAST_STEPS:
            failures += 1
            continue
        filled += space.put(points, name)
        name, failures = name + 1, 0
    return space.label


@dataclass(frozen=True, eq=False)
class _Space:
    """Empty space of a mask; shrinks as neurites grow.

    Attributes
    ----------
    label : numpy.ndarray
        (z, y, x) uint32.
    room : numpy.ndarray
        (z, y, x) float32: radius in nm of the largest neurite that could be centred on a voxel; <= 0 without room.
    pitch : numpy.ndarray
        Voxel size (z, y, x) in nm.
    clearance_nm, reach_nm : float
        Distance kept, and the distance up to which a neurite lowers the room around it.
    """

    label: np.ndarray
    room: np.ndarray
    pitch: np.ndarray
    clearance_nm: float
    reach_nm: float

    @classmethod
    def of(cls, compact: np.ndarray, pitch: np.ndarray, clearance_nm: float, radius_nm: float) -> _Space:
        """Space of labels; `radius_nm` is that of the thickest neurite."""
        room = np.empty(compact.shape, dtype=np.float32)
        space = cls(compact.copy(), room, pitch, clearance_nm, clearance_nm + radius_nm)
        space.room[:] = space._room_in(tuple(slice(0, n) for n in compact.shape))
        return space

    def _room_in(self, box: tuple[slice, ...]) -> np.ndarray:
        empty = self.label[box] == 0
        if is_anisotropic(self.pitch.tolist()) or len(self.label) == 1:
            pitch = tuple(self.pitch[1:])
            away = np.stack([edt.edt(s, anisotropy=pitch, black_border=False, parallel=1) for s in empty])
        else:
            away = edt.edt(empty, anisotropy=tuple(self.pitch), black_border=False, parallel=1)
        return np.asarray(away - self.clearance_nm)

    def radius_at(self, point: np.ndarray) -> float | None:
        """Room in nm around a point given in voxels; None outside the frame."""
        at = np.rint(point).astype(int)
        if (at < 0).any() or (at >= self.label.shape).any():
            return None
        return float(self.room[tuple(at)])

    def put(self, points: list[tuple[np.ndarray, float]], name: int) -> int:
        """Draw the balls of a neurite as far as they are connected with the first; number of its voxels."""
        reach = [radius / self.pitch + 1 for _, radius in points]
        low = np.min([at - r for (at, _), r in zip(points, reach, strict=True)], axis=0).astype(int)
        high = np.max([at + r for (at, _), r in zip(points, reach, strict=True)], axis=0).astype(int) + 1
        low, high = np.maximum(low, 0), np.minimum(high, self.label.shape)
        drawn = np.zeros(high - low, dtype=bool)
        for (at, radius), r in zip(points, reach, strict=True):
            start, stop = np.maximum((at - r).astype(int), low), np.minimum((at + r).astype(int) + 1, high)
            z, y, x = ((np.arange(a, b) - c) * p for a, b, c, p in zip(start, stop, at, self.pitch, strict=True))
            # A voxel stands for the whole thickness of its section.
            z = np.maximum(np.abs(z) - self.pitch[0] / 2, 0)
            box = tuple(slice(a, b) for a, b in zip(start - low, stop - low, strict=True))
            drawn[box] |= z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 <= radius**2
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        drawn &= self.room[box] > 0
        pieces = cc3d.connected_components(drawn, connectivity=26)
        neurite = pieces == pieces[tuple(np.rint(points[0][0]).astype(int) - low)]
        self.label[box][neurite] = name
        halo = np.ceil(self.reach_nm / self.pitch).astype(int)
        low, high = np.maximum(low - halo, 0), np.minimum(high + halo, self.label.shape)
        around = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        np.minimum(self.room[around], self._room_in(around), out=self.room[around])
        return int(neurite.sum())


def _neurite(
    space: _Space, start: np.ndarray, radius_nm: float, rng: np.random.Generator
) -> list[tuple[np.ndarray, float]]:
    """Balls (centre in voxels, radius in nm) of a neurite, as far as there is room; the first one is at `start`."""
    direction = _unit(rng.standard_normal(3))
    length = rng.uniform(*_LENGTHS_NM)
    stems = [(start, direction, radius_nm, length), (start, -direction, radius_nm, length)]
    points: list[tuple[np.ndarray, float]] = []
    for stem in stems:
        walked = _walk(space, *stem, rng)
        points += walked
        for at, radius in walked[_LEAST_STEPS:]:
            if radius > _BRANCH * radius_nm and rng.random() < _STEP * radius * _BRANCHES_PER_NM:
                points += _walk(space, at, _unit(rng.standard_normal(3)), _BRANCH * radius_nm, _BRANCH * length, rng)
    return points


def _walk(
    space: _Space, at: np.ndarray, direction: np.ndarray, radius_nm: float, length_nm: float, rng: np.random.Generator
) -> list[tuple[np.ndarray, float]]:
    """Balls along a smooth random walk that tapers towards its end."""
    least, points, walked = _TIP * radius_nm, [], 0.0
    room = space.radius_at(at)
    while room is not None and room >= least and walked < length_nm:
        tapered = radius_nm * min(1.0, _TIP + (1 - _TIP) * (length_nm - walked) / (4 * radius_nm))
        radius = min(tapered, room)
        points.append((at, radius))
        step = _STEP * radius
        walked += step
        for attempt in range(1, _TRIES + 1):
            turned = _unit(direction + _TURN * attempt * rng.standard_normal(3))
            ahead = at + step * turned / space.pitch
            room = space.radius_at(ahead)
            if room is None or room >= least:
                break
        at, direction = ahead, turned
    return points


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
