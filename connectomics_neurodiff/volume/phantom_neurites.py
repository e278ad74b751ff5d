"""Centre lines of artificial neurites: branching tubes that wander through space and keep clear of one another.

All lengths are nanometres, all positions (z, y, x) relative to the first voxel. Tubes are laid one after the other
on a coarse lattice that records how far the nearest tube is; each is a persistent random walk that is pushed away
from its predecessors, until no room is left for even a thin one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Preference of neurites for the directions z, y, x: a tract along z and x, some fibres along y.
DIRECTION_WEIGHTS = (1.0, 0.35, 0.8)
#: Steps of a walk, and cells of the lattice, per median diameter; space filled around a volume, in diameters.
_STEPS, _MARGIN = 6, 0.75
#: Random change of direction per step; 0 = straight.
_WANDER = 0.18
#: Pull towards open space, per step.
_AVOID = 0.4
#: A walk ends where less than this fraction of its radius is free.
_END = 0.15
#: Mean distance between two branches of a neurite, in median diameters.
_BRANCH_INTERVAL = 8.0
#: Tubes thinner than this fraction of the median radius are not laid.
_THINNEST = 0.4


@dataclass(frozen=True)
class Path:
    """One unbranched stretch: (n, 3) points and (n,) radii in nm, and the index of its neurite."""

    points: np.ndarray
    radii: np.ndarray
    neurite: int


class _Lattice:
    """Distance to the nearest tube laid so far, on a coarse isotropic grid."""

    def __init__(self, extent_nm: np.ndarray, margin_nm: float, pitch_nm: float, farthest_nm: float) -> None:
        self.pitch = pitch_nm
        self.origin = np.full(3, -margin_nm)
        shape = np.ceil((extent_nm + 2 * margin_nm) / pitch_nm).astype(int) + 1
        self.free = np.ones(shape, dtype=bool)
        # Farther away it does not matter; so a new tube changes only what is around it.
        self.farthest = farthest_nm
        self.clearance = np.full(shape, farthest_nm, dtype=np.float32)

    def index(self, point: np.ndarray) -> tuple[int, int, int]:
        z, y, x = np.rint((point - self.origin) / self.pitch).astype(int)
        return z, y, x

    def position(self, flat: int) -> np.ndarray:
        return np.array(np.unravel_index(flat, self.free.shape)) * self.pitch + self.origin

    def holds(self, index: tuple[int, int, int]) -> bool:
        return all(0 <= i < n for i, n in zip(index, self.free.shape, strict=True))

    def uphill(self, index: tuple[int, int, int]) -> np.ndarray:
        """Direction of growing clearance (length at most sqrt(3))."""
        slope = np.zeros(3)
        here = np.array(index)
        for axis, n in enumerate(self.free.shape):
            before, after = here.copy(), here.copy()
            before[axis], after[axis] = max(here[axis] - 1, 0), min(here[axis] + 1, n - 1)
            slope[axis] = (self.clearance[tuple(after)] - self.clearance[tuple(before)]) / (2 * self.pitch)
        return slope

    def lay(self, paths: list[Path]) -> None:
        """Mark the inside of some tubes as taken."""
        import edt

        for path in paths:
            for point, radius in zip(path.points, path.radii, strict=True):
                box = self._box(point - radius, point + radius)
                axes = [np.arange(s.start, s.stop) * self.pitch for s in box]
                z, y, x = ((a + o - p) ** 2 for a, o, p in zip(axes, self.origin, point, strict=True))
                self.free[box] &= z[:, None, None] + y[None, :, None] + x[None, None, :] > radius**2
        points = np.concatenate([path.points for path in paths])
        reach = self.farthest + max(float(path.radii.max()) for path in paths)
        around = self._box(points.min(axis=0) - reach, points.max(axis=0) + reach)
        distance = edt.edt(self.free[around], black_border=False, parallel=1) * self.pitch
        self.clearance[around] = np.minimum(self.clearance[around], distance)

    def _box(self, low_nm: np.ndarray, high_nm: np.ndarray) -> tuple[slice, slice, slice]:
        low = np.clip(np.floor((low_nm - self.origin) / self.pitch).astype(int), 0, self.free.shape)
        high = np.clip(np.ceil((high_nm - self.origin) / self.pitch).astype(int) + 1, 0, self.free.shape)
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return z, y, x


def grow_neurites(
    extent_nm: np.ndarray, diameter_nm: float, diameter_spread: float, rng: np.random.Generator
) -> list[Path]:
    """Lay tubes until space is full.

    Parameters
    ----------
    extent_nm : numpy.ndarray
        Size of the volume, (z, y, x); tubes also fill a margin around it.
    diameter_nm, diameter_spread : float
        Median, and standard deviation of the logarithm, of the tubes' diameters.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    list of Path
        Stretches of all neurites; those of one neurite share their index.
    """
    lattice = _Lattice(extent_nm, _MARGIN * diameter_nm, diameter_nm / _STEPS, 1.5 * diameter_nm)
    paths: list[Path] = []
    neurite = 0
    while True:
        largest = float(lattice.clearance.max())
        if largest < _THINNEST * diameter_nm / 2:
            return paths
        radius = min(rng.lognormal(np.log(diameter_nm / 2), diameter_spread), 0.9 * largest)
        room = np.flatnonzero(lattice.clearance >= radius)
        start = lattice.position(int(rng.choice(room)))
        new = _grow_one(lattice, start, radius, neurite, rng)
        lattice.lay(new)
        paths += new
        neurite += 1


def _grow_one(
    lattice: _Lattice, start: np.ndarray, radius: float, neurite: int, rng: np.random.Generator
) -> list[Path]:
    """A neurite: a walk from `start` both ways, and branches off it."""
    direction = rng.normal(size=3) * DIRECTION_WEIGHTS
    direction /= np.linalg.norm(direction)
    back, ahead = (_walk(lattice, start, sign * direction, radius, rng) for sign in (-1, 1))
    points = np.concatenate([back[0][::-1], start[None], ahead[0]])
    radii = np.concatenate([back[1][::-1], [radius], ahead[1]])
    paths = [Path(points, radii, neurite)]
    for i in np.flatnonzero(rng.random(len(points)) < 1 / (_STEPS * _BRANCH_INTERVAL)).tolist():
        along = points[min(i + 1, len(points) - 1)] - points[max(i - 1, 0)]
        side = rng.normal(size=3)
        branch_direction = 0.5 * along / max(float(np.linalg.norm(along)), 1e-9) + side / np.linalg.norm(side)
        branch = _walk(lattice, points[i], branch_direction, rng.uniform(0.5, 0.8) * radii[i], rng)
        if len(branch[0]) > 2:
            paths.append(Path(*branch, neurite))
    return paths


def _walk(
    lattice: _Lattice, start: np.ndarray, direction: np.ndarray, radius: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points and radii from `start` (exclusive) until the walk leaves the lattice or finds no room."""
    point, heading, swelling = start.copy(), direction / np.linalg.norm(direction), 0.0
    points, radii = [], []
    # A walk may curl up in open space; it ends after crossing the domain three times.
    for _ in range(3 * max(lattice.free.shape)):
        index = lattice.index(point)
        heading = heading + _WANDER * rng.normal(size=3) + _AVOID * lattice.uphill(index)
        heading /= np.linalg.norm(heading)
        point = point + lattice.pitch * heading
        index = lattice.index(point)
        if not lattice.holds(index):
            break
        clearance = float(lattice.clearance[index])
        if clearance < _END * radius:
            break
        # Varicosities: the logarithm of the radius drifts by 20 % around its mean.
        swelling = 0.9 * swelling + 0.087 * float(rng.normal())
        points.append(point)
        radii.append(min(radius * np.exp(swelling), clearance + 0.25 * radius))
    return np.array(points).reshape(-1, 3), np.array(radii)
