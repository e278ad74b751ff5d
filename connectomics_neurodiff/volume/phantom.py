"""A phantom: a grown piece of neuropil with its labels, for trying things out and for tests, at any voxel size.

Neurites are branching tubes (:mod:`.phantom_neurites`) that are blown up until they fill space and meet; a thin gap is
left for the membranes; mitochondria lie inside the thick ones along their centre lines; grey values are then rendered
(:mod:`.phantom_render`). All lengths are nanometres, so the same tissue is met at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ValueRangeError
from ..geometry import is_anisotropic, voxel_size
from ..seeding import rng_for
from .phantom_neurites import Path, grow_neurites
from .phantom_render import render, smooth_noise
from .volume import Volume

#: No median diameter above this fraction of the longest edge, so that a small phantom, too, holds several neurites.
_LARGEST_DIAMETER = 0.3
#: Voxels are grouped into cells of this fraction of a diameter while neurites are assigned; thinner sheets may be lost.
_COARSENESS = 13
#: Mitochondria keep this far from the surface of their neurite, in nm.
_MITO_CLEARANCE_NM = 24.0


@dataclass(frozen=True)
class _Tissue:
    """Space while it is being filled. Arrays are (z, y, x)."""

    coordinates: np.ndarray  # (z, y, x, 3) float32: position of each voxel in nm, bent by smooth noise
    dense: np.ndarray  # uint32, neurites that touch
    depth: np.ndarray  # float32, nm to the nearest voxel of another neurite
    label: np.ndarray  # uint32, neurites with gaps between them


def grow_phantom(
    shape: Sequence[int] = (24, 128, 128),
    voxel_nm: Sequence[float] = (29.0, 6.0, 6.0),
    seed: int = 0,
    *,
    diameter_nm: float = 330.0,
    diameter_spread: float = 0.45,
    gap_nm: float = 14.0,
    membrane_nm: float = 34.0,
    mito_fraction: float = 0.06,
    noise: float = 0.035,
) -> Volume:
    """Grow a labelled volume that looks like electron microscopy; a pure function of its arguments.

    Parameters
    ----------
    shape : sequence of 3 ints
        Voxels, (z, y, x).
    voxel_nm : sequence of 3 floats
        Voxel size in nm, (z, y, x). Sections are drawn one by one if it is anisotropic (:func:`.is_anisotropic`).
    seed : int
        Seed, >= 0.
    diameter_nm, diameter_spread : float
        Median of the neurites' diameters, and standard deviation of their logarithm. In volumes smaller than about
        three diameters the median is reduced to 0.3 of the longest edge.
    gap_nm : float
        Width of the unlabelled gap between neurites (at least the voxel on either side).
    membrane_nm : float
        Full width at half depth of the dark line between two neurites.
    mito_fraction : float
        Part of the volume that mitochondria are to fill, 0 to 0.3; an aim, limited by the room in thick neurites.
    noise : float
        Standard deviation of the shot noise at full brightness, in units of the grey range.

    Returns
    -------
    Volume
        In memory: image float32 (multiples of 1/255, so that a file holds it exactly), label uint64 with ids 1..n,
        each one 26-connected, mito uint8.

    Raises
    ------
    ValueRangeError
        If a parameter is out of range, or the volume is too small to hold a neurite.
    """
    size = np.array(voxel_size(voxel_nm))
    extent = _checked_shape(shape)
    _check_lengths(diameter_nm, diameter_spread, gap_nm, membrane_nm, mito_fraction, noise)
    diameter = min(diameter_nm, _LARGEST_DIAMETER * float((size * extent).max()))
    paths = grow_neurites(size * extent, diameter, diameter_spread, rng_for(seed, "phantom", "neurites"))
    tissue = _fill_space(paths, extent, size, diameter, gap_nm, rng_for(seed, "phantom", "space"))
    if not tissue.label.any():
        raise ValueRangeError(
            f"A phantom of {extent} voxels of {tuple(size.tolist())} nm is too small to hold a neurite with a gap of "
            f"{gap_nm} nm around it."
        )
    mito = _place_mitochondria(paths, tissue, size, mito_fraction, rng_for(seed, "phantom", "mitochondria"))
    image = render(
        tissue.dense, tissue.depth, mito, size, rng_for(seed, "phantom", "image"), membrane_nm=membrane_nm, noise=noise
    )
    return Volume(image, tissue.label.astype(np.uint64), (mito > 0).astype(np.uint8), voxel_size(size))


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueRangeError(f"A phantom's shape is three positive whole numbers (z, y, x). Got {tuple(shape)}.")
    z, y, x = (int(n) for n in shape)
    return z, y, x


def _check_lengths(
    diameter_nm: float, diameter_spread: float, gap_nm: float, membrane_nm: float, mito_fraction: float, noise: float
) -> None:
    allowed = {
        "diameter_nm": (diameter_nm, 1.0, 1e5),
        "diameter_spread": (diameter_spread, 0.0, 2.0),
        "gap_nm": (gap_nm, 0.0, 1e4),
        "membrane_nm": (membrane_nm, 1.0, 1e4),
        "mito_fraction": (mito_fraction, 0.0, 0.3),
        "noise": (noise, 0.0, 1.0),
    }
    for name, (value, low, high) in allowed.items():
        if not low <= value <= high:
            raise ValueRangeError(f"{name} of a phantom must lie in [{low:g}, {high:g}]. Got {value}.")


def _fill_space(
    paths: list[Path],
    shape: tuple[int, int, int],
    size: np.ndarray,
    diameter: float,
    gap_nm: float,
    rng: np.random.Generator,
) -> _Tissue:
    import edt

    coordinates = _bent_coordinates(shape, size, diameter, rng)
    stride = np.maximum(diameter / _COARSENESS / size, 1).astype(int)
    dense = _without_crumbs(_nearest_neurite(paths, coordinates, stride), size, (0.3 * diameter) ** 3)
    depth = edt.edt(dense, anisotropy=tuple(size), black_border=False, parallel=1)
    # One lone neurite has no boundary: infinitely deep.
    depth = np.minimum(depth, np.float32(10 * diameter))
    # A voxel is in the gap if its centre is at most half the gap away from the surface, which is half a voxel
    # nearer than the next neurite's first voxel; along thick sections the gap is thinner than a voxel.
    gap = depth <= max((gap_nm + size.min()) / 2, size.min()) * (1 + 1e-4) if gap_nm > 0 else np.zeros(shape, bool)
    label = _components(np.where(gap, 0, dense), size, (0.3 * diameter) ** 3)
    # What the gap has cut off is painted as membrane.
    depth[label == 0] = np.minimum(depth[label == 0], size.min())
    return _Tissue(coordinates, dense, depth, label)


def _bent_coordinates(
    shape: tuple[int, int, int], size: np.ndarray, diameter: float, rng: np.random.Generator
) -> np.ndarray:
    """Positions in nm, displaced by smooth noise so that surfaces are not straight, and by a jitter of sections."""
    coordinates = np.empty((*shape, 3), dtype=np.float32)
    for axis in range(3):
        bend = 0.11 * diameter * smooth_noise(shape, size, 0.6 * diameter, rng)
        bend += 0.025 * diameter * smooth_noise(shape, size, 0.18 * diameter, rng)
        line = (np.arange(shape[axis]) * size[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
        coordinates[..., axis] = line + bend
    if is_anisotropic(size.tolist()):
        # Serial sections are never aligned perfectly: about half a pixel is left.
        coordinates[..., 1:] += (0.6 * size[1:] * rng.normal(size=(shape[0], 2)))[:, None, None, :]
    return coordinates


def _nearest_neurite(paths: list[Path], coordinates: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """Neurite (from 1) whose surface is nearest in the power distance ``|v - p|^2 - r^2``.

    The power distance becomes the plain one in four dimensions, with ``sqrt(R^2 - r^2)`` as the fourth coordinate of
    a point and 0 for a voxel [Aurenhammer 1987], so a k-d tree finds the nearest. Only every `stride`-th voxel is asked
    for first; cells whose corners agree are taken to be of one neurite.
    """
    from scipy.spatial import cKDTree

    points = np.concatenate([path.points for path in paths])
    radii = np.concatenate([path.radii for path in paths])
    neurites = np.concatenate([np.full(len(path.points), path.neurite + 1, np.uint32) for path in paths])
    tree = cKDTree(np.column_stack([points, np.sqrt((squares := radii**2).max() - squares)]))

    def nearest(at: np.ndarray) -> np.ndarray:
        return neurites[tree.query(np.column_stack([at, np.zeros(len(at))]))[1]]

    shape = coordinates.shape[:3]
    # Corners of the cells: every stride-th voxel, and the last.
    corners = [np.minimum(np.arange(-(-(n - 1) // s) + 1) * s, n - 1) for n, s in zip(shape, stride, strict=True)]
    coarse = nearest(coordinates[np.ix_(*corners)].reshape(-1, 3)).reshape([len(c) for c in corners])
    low, high = coarse, coarse
    for axis in range(3):
        after = np.minimum(np.arange(coarse.shape[axis]) + 1, coarse.shape[axis] - 1)
        low, high = np.minimum(low, low.take(after, axis)), np.maximum(high, high.take(after, axis))
    cells = np.ix_(*(np.arange(n) // s for n, s in zip(shape, stride, strict=True)))
    label, mixed = low[cells], (low != high)[cells]
    label[mixed] = nearest(coordinates[mixed])
    return label


def _components(label: np.ndarray, size: np.ndarray, smallest_nm3: float) -> np.ndarray:
    """26-connected components numbered from 1; those below a volume become background, unless none is above."""
    import cc3d
    import fastremap

    parts = cc3d.connected_components(label, connectivity=26)
    counts = np.bincount(parts.ravel())
    small = counts * size.prod() < smallest_nm3
    small[0] = False
    if small[1:].all():
        small[:] = False
    parts[small[parts]] = 0
    return fastremap.renumber(parts, preserve_zero=True)[0].astype(np.uint32)


def _without_crumbs(label: np.ndarray, size: np.ndarray, smallest_nm3: float) -> np.ndarray:
    """Connected components; small ones are taken over by what is nearest."""
    from scipy import ndimage

    parts = _components(label, size, smallest_nm3)
    crumbs, _ = ndimage.label(parts == 0, structure=np.ones((3, 3, 3)))
    for box in ndimage.find_objects(crumbs):
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        hole = parts[around] == 0
        nearest = ndimage.distance_transform_edt(hole, sampling=size, return_distances=False, return_indices=True)
        parts[around] = parts[around][tuple(nearest)]
    return parts


def _place_mitochondria(
    paths: list[Path], tissue: _Tissue, size: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Mitochondria as int32 ids from 1: bent capsules along the centre lines of thick neurites."""
    mito = np.zeros(tissue.label.shape, dtype=np.int32)
    extent = np.array(mito.shape) * size
    inside = [((path.points >= 0) & (path.points < extent)).all(axis=1) for path in paths]
    radii = np.array([np.median(path.radii) for path in paths])
    thick = radii >= np.quantile(radii, 0.5)
    sites = [(path, np.flatnonzero(within)) for path, within in zip(paths, inside, strict=True)]
    sites = [site for site, is_thick in zip(sites, thick, strict=True) if is_thick and len(site[1])]
    wanted, filled, count = fraction * mito.size, 0, 0
    # Several rounds, since a long neurite holds several mitochondria.
    for _ in range(6):
        for k in rng.permutation(len(sites)):
            if filled >= wanted:
                return mito
            path, points = sites[k]
            box, body = _mitochondrion(path, int(rng.choice(points)), tissue, mito, size, rng)
            if body.any():
                count += 1
                mito[box][body] = count
                filled += int(body.sum())
    return mito


def _mitochondrion(
    path: Path, middle: int, tissue: _Tissue, taken: np.ndarray, size: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """Box and mask of one mitochondrion around a point of a path; an empty mask if there is no room."""
    import cc3d
    import edt
    from scipy import ndimage
    from scipy.spatial import cKDTree

    radius = float(path.radii[middle] * rng.uniform(0.5, 0.7))
    pitch = float(np.linalg.norm(np.diff(path.points[:2], axis=0))) if len(path.points) > 1 else 1.0
    half = max(int(rng.uniform(1.0, 4.0) * radius / pitch), 1)
    line = path.points[max(middle - half, 0) : middle + half + 1]
    # Bent coordinates differ from straight ones by less than the neurite's radius, mostly.
    reach = 2.5 * radius
    low = np.clip(np.floor((line.min(axis=0) - reach) / size).astype(int), 0, taken.shape)
    high = np.clip(np.ceil((line.max(axis=0) + reach) / size).astype(int) + 1, 0, taken.shape)
    z, y, x = (slice(a, b) for a, b in zip(low, high, strict=True))
    box = (z, y, x)
    nothing = np.zeros(taken[box].shape, dtype=bool)
    distance, _ = cKDTree(line).query(tissue.coordinates[box].reshape(-1, 3), distance_upper_bound=1.2 * radius)
    distance = distance.reshape(nothing.shape)
    owner = tissue.label[box].ravel()[int(distance.argmin())]
    inside = (distance < radius) & (tissue.label[box] == owner) & (tissue.depth[box] > _MITO_CLEARANCE_NM)
    if owner == 0 or not inside.any():
        return box, nothing
    body = cc3d.largest_k(inside, k=1, connectivity=26) > 0
    # Slivers are dropped, and so is whatever touches another mitochondrion.
    thickest = edt.edt(body, anisotropy=tuple(size), black_border=False, parallel=1).max()
    if thickest < 0.5 * radius or taken[box][ndimage.binary_dilation(body, iterations=2)].any():
        return box, nothing
    return box, body
