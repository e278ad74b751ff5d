"""One mitochondrion: a template's chain of sections led through a neuron, drawn, refined and validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, cos, floor, sin
from typing import Any

import cc3d
import cv2
import numpy as np
from scipy import ndimage

from ..geometry import is_anisotropic
from .library import Signature
from .room import Room

#: A section may lose this share to the neuron's wall. With more it is drawn smaller, or the chain ends. Published: .20,
#: and what lies outside is kept.
MAX_OUTSIDE = 0.15
_SHRINKS = (1.0, 0.9, 0.8, 0.7)
#: Radius of opening and closing. Published: a disk of 3 px of 6 nm.
_REFINE_NM = 18.0
#: The chain's path and width are smoothed over this height: isotropic sections are thinner than the noise in them.
_SMOOTH_Z_NM = 40.0
#: Sections smaller than a 50 nm disk are no mitochondrion's.
_MIN_SECTION_NM2 = 2000.0
#: Of the drawn volume, at least this much must survive clipping and refinement.
_MIN_KEPT = 0.5
_SUBPIXEL_BITS = 4


@dataclass(frozen=True, eq=False)
class Pose:
    """How a template is put into a neuron.

    Attributes
    ----------
    label : int
        The neuron's compact label.
    anchor : tuple of int
        Voxel (z, y, x) where the centre of the template's widest section goes.
    turn : float
        Rotation in the plane, radians.
    mirror : bool
        Reflect in the plane.
    up : bool
        Whether the chain runs upwards in z, or upside down.
    scale : float
        Size relative to the template.
    """

    label: int
    anchor: tuple[int, int, int]
    turn: float
    mirror: bool
    up: bool
    scale: float

    @cached_property
    def _matrix(self) -> np.ndarray:
        c, s, flip = cos(self.turn), sin(self.turn), -1.0 if self.mirror else 1.0
        return self.scale * np.array([[flip * c, -flip * s], [s, c]])

    def transform(self, points_nm: np.ndarray) -> np.ndarray:
        """Mirror, turn and scale (..., 2) vectors (y, x)."""
        return points_nm @ self._matrix


@dataclass(frozen=True, eq=False)
class _Section:
    """One section of a chain in the making: outline around its centre, and the centre, in nm from pixel (0, 0)."""

    z: int
    contour: np.ndarray
    centre: np.ndarray
    minor_nm: float
    fit: float


def _polygon(shape: tuple[int, int], points_nm: np.ndarray, origin: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Filled polygon in a window whose pixel (0, 0) is at `origin`, uint8."""
    mask = np.zeros(shape, dtype=np.uint8)
    pixels = (points_nm / pitch - origin)[:, ::-1]
    cv2.fillPoly(mask, [np.rint(pixels * (1 << _SUBPIXEL_BITS)).astype(np.int32)], 1, shift=_SUBPIXEL_BITS)
    return mask


def _window(
    low_nm: np.ndarray, high_nm: np.ndarray, pitch: np.ndarray, frame: tuple[int, ...]
) -> tuple[slice, slice] | None:
    """Pixels that cover the points between two corners, or None if that is outside the frame."""
    lows, highs = (low_nm / pitch).tolist(), (high_nm / pitch).tolist()
    return _inside([floor(v) - 1 for v in lows], [ceil(v) + 2 for v in highs], frame)


def _inside(low: Sequence[int], high: Sequence[int], frame: Sequence[int]) -> tuple[slice, slice] | None:
    """Window from `low` up to `high` as far as it lies in the frame, or None if it does not."""
    y, x = (slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, frame, strict=True))
    return (y, x) if y.stop > y.start and x.stop > x.start else None


def _settle(room: Room, pose: Pose, z: int, wanted: np.ndarray, need_nm: float) -> np.ndarray | None:
    """Nearest place to `wanted` in section z that is `need_nm` deep, or the best compromise around it."""
    pitch = room.voxel_nm[1:]
    reach = [max(ceil(0.75 * need_nm / p), 1) for p in pitch]
    at = [round(w / p) for w, p in zip(wanted.tolist(), pitch, strict=True)]
    inside = all(0 <= a < n for a, n in zip(at, room.label.shape[1:], strict=True))
    if inside and room.label[z, *at] == pose.label and room.depth[z, *at] >= need_nm:
        # Nothing scores higher than the nearest pixel if that is deep enough.
        return np.array([a * p for a, p in zip(at, pitch, strict=True)])
    window = _inside(
        [a - r for a, r in zip(at, reach, strict=True)],
        [a + r + 1 for a, r in zip(at, reach, strict=True)],
        room.label.shape[1:],
    )
    if window is None:
        return None
    depth = room.depth[z][window]
    free = (room.label[z][window] == pose.label) & (depth > 0)
    if not free.any():
        return None
    y, x = (np.arange(part.start, part.stop) * p - w for part, p, w in zip(window, pitch, wanted, strict=True))
    away = np.sqrt((y * y)[:, None] + x * x)
    # A place deep enough and near beats a deeper one far off: chains stay continuous.
    score = np.where(free, np.minimum(depth, need_nm) - 0.3 * away, -np.inf)
    row, column = divmod(int(score.argmax()), score.shape[1])
    return np.array([(window[0].start + row) * pitch[0], (window[1].start + column) * pitch[1]])


def _fit(
    room: Room, pose: Pose, z: int, contour: np.ndarray, corners: tuple[np.ndarray, np.ndarray], centre: np.ndarray
) -> float:
    """Largest of the allowed sizes at which enough of the section lies in free space; 0 if none does."""
    pitch = room.pitch_nm
    window = _window(centre + corners[0], centre + corners[1], pitch, room.label.shape[1:])
    if window is None:
        return 0.0
    origin = np.array([window[0].start, window[1].start])
    free = room.free(pose.label, (slice(z, z + 1), *window))[0].view(np.uint8)
    if cv2.countNonZero(free) == free.size:
        return _SHRINKS[0]
    for size in _SHRINKS:
        drawn = _polygon(free.shape, centre + size * contour, origin, pitch)
        if cv2.countNonZero(drawn & free) >= (1 - MAX_OUTSIDE) * cv2.countNonZero(drawn):
            return size
    return 0.0


def _height(template: Signature, pose: Pose, z: Any, pitch_z: float) -> Any:
    """Height in the template, above its first section, that section z of the volume shows."""
    rise = (z - pose.anchor[0]) * pitch_z / pose.scale
    return template.widest * template.pitch_z_nm + (rise if pose.up else -rise)


def _hoped_for(room: Room, template: Signature, pose: Pose) -> range:
    """The volume's sections that the whole template would occupy; the anchor's is among them."""
    half = template.pitch_z_nm / 2
    heights = _height(template, pose, np.arange(room.label.shape[0]), room.voxel_nm[0])
    inside = np.flatnonzero((heights >= -half) & (heights <= template.z_extent_nm - half))
    return range(int(inside[0]), int(inside[-1]) + 1)


def _lead(room: Room, template: Signature, pose: Pose, hoped_for: range, least: int) -> list[_Section]:
    """Lead the chain from its anchor upwards and downwards as far as template and neuron allow.

    Empty if fewer than `least` sections find room; given up as soon as that is certain.
    """
    contours, centroids, minors = template.at(_height(template, pose, np.array(hoped_for), room.voxel_nm[0]))
    contours, drift, minors = pose.transform(contours), pose.transform(centroids), pose.scale * minors
    low, high = contours.min(axis=1), contours.max(axis=1)

    def section(z: int, previous: _Section | None) -> _Section | None:
        """The chain's section at z next to the previous one; None where the template or the room ends."""
        if z not in hoped_for:
            return None
        i = z - hoped_for.start
        if previous is None:
            wanted = np.array(pose.anchor[1:]) * room.pitch_nm
        else:
            wanted = previous.centre + drift[i] - drift[previous.z - hoped_for.start]
        centre = _settle(room, pose, z, wanted, minors[i] / 2)
        fit = 0.0 if centre is None else _fit(room, pose, z, contours[i], (low[i], high[i]), centre)
        return _Section(z, contours[i], centre, minors[i], fit) if centre is not None and fit else None

    start = section(pose.anchor[0], None)
    if start is None:
        return []
    chain = [start]
    for step, beyond in ((1, pose.anchor[0] - hoped_for.start), (-1, 0)):
        last = section(start.z + step, start)
        while last is not None:
            chain.append(last)
            last = section(last.z + step, last)
        if len(chain) + beyond < least:
            return []
    return sorted(chain, key=lambda s: s.z)


def _caps(room: Room, template: Signature, pose: Pose, chain: list[_Section]) -> np.ndarray:
    """Size of each section so that the chain ends round.

    Where the template itself ends it is tapered already, and at the volume's faces the cut goes on. An end made by a
    cut of the template's volume, or by a neuron that became too narrow, is closed by a half ellipsoid.
    """
    pitch = room.voxel_nm[0]
    sizes = np.ones(len(chain))
    for first in (True, False):
        end = chain[0] if first else chain[-1]
        outwards = (end.z - 1) if first else (end.z + 1)
        beyond = _height(template, pose, outwards, pitch)
        half = template.pitch_z_nm / 2
        natural = (beyond < -half and not template.cut_below) or (
            beyond > template.z_extent_nm - half and not template.cut_above
        )
        if natural or not 0 <= outwards < room.label.shape[0]:
            continue
        height = max(min(end.minor_nm, len(chain) * pitch) / 2, pitch)
        depth = (np.arange(len(chain)) + 0.5) * pitch
        cap = np.sqrt(1 - np.clip(1 - depth / height, 0, None) ** 2)
        sizes *= cap if first else cap[::-1]
    return sizes


def _smoothed(chain: list[_Section], pitch_z: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n, 2) and sizes (n,) of a chain, smoothed along it."""
    sigma = _SMOOTH_Z_NM / pitch_z
    centres = ndimage.gaussian_filter1d(np.array([s.centre for s in chain]), sigma, axis=0, mode="nearest")
    fits = ndimage.minimum_filter1d(np.array([s.fit for s in chain]), 3, mode="nearest")
    return centres, ndimage.gaussian_filter1d(fits, sigma, mode="nearest")


def _refine_section(mask: np.ndarray, minor_nm: float, pitch: np.ndarray) -> np.ndarray:
    """Opening and closing with a disk, smaller where the section is."""
    radius = min(_REFINE_NM, 0.3 * minor_nm) / pitch
    size = 2 * np.rint(radius[::-1]).astype(int) + 1
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (int(size[0]), int(size[1])))
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, disk)
    return cv2.morphologyEx(opened, cv2.MORPH_CLOSE, disk)


def _refine(mask: np.ndarray, free: np.ndarray, minors: np.ndarray, room: Room) -> np.ndarray:
    """Smooth a drawn chain inside the free space and keep its largest connected part."""
    pitch = room.pitch_nm
    smooth = np.empty_like(mask)
    for i, minor in enumerate(minors):
        smooth[i] = _refine_section(mask[i], float(minor), pitch)
    if not is_anisotropic(room.voxel_nm) and mask.shape[0] > 1:
        # In 3D the majority around each voxel also smooths from section to section.
        sigma = 0.5 * _REFINE_NM / np.array(room.voxel_nm)
        smooth = (ndimage.gaussian_filter(smooth.astype(np.float32), sigma, mode="nearest") > 0.5).astype(np.uint8)
    smooth &= free
    area = smooth.sum(axis=(1, 2)) * pitch.prod()
    smooth[area < _MIN_SECTION_NM2] = 0
    if not smooth.any():
        return smooth.astype(bool)
    return cc3d.largest_k(smooth, k=1, connectivity=6, binary_image=True).astype(bool)


def grow_chain(
    room: Room, template: Signature, pose: Pose, least_complete: float
) -> tuple[np.ndarray, tuple[slice, ...]] | None:
    """Draw one mitochondrion.

    The template's chain of sections is led through the neuron from the anchor: every section goes where the template's
    drift puts it, moved by as little as it takes to be deep enough. A section that does not fit is drawn
    smaller; where that does not help the chain ends, rounded off.

    Parameters
    ----------
    room : Room
        Free space.
    template : Signature
    pose : Pose
    least_complete : float
        Share, in [0, 1], of the sections that the whole template would occupy in this volume, that must be there.

    Returns
    -------
    tuple of (numpy.ndarray, tuple of slice) or None
        Bool mask and its box: one 6-connected object inside the free space of the neuron; None if none fits.
    """
    hoped_for = _hoped_for(room, template, pose)
    least = ceil(least_complete * len(hoped_for))
    chain = _lead(room, template, pose, hoped_for, least)
    if not chain:
        return None
    pitch = room.pitch_nm
    centres, fits = _smoothed(chain, room.voxel_nm[0])
    sizes = fits * _caps(room, template, pose, chain)
    outlines = [c + k * s.contour for s, c, k in zip(chain, centres, sizes, strict=True)]
    points = np.concatenate(outlines)
    window = _window(points.min(axis=0), points.max(axis=0), pitch, room.label.shape[1:])
    if window is None:
        return None
    box = (slice(chain[0].z, chain[-1].z + 1), *window)
    free = room.free(pose.label, box)
    origin = np.array([window[0].start, window[1].start])
    mask = np.stack([_polygon(free.shape[1:], points, origin, pitch) for points in outlines])
    drawn = int(mask.sum())
    minors = np.array([s.minor_nm for s in chain]) * sizes
    mask = _refine(mask & free, free, minors, room)
    occupied = np.count_nonzero(mask.any(axis=(1, 2)))
    complete = mask.sum() >= _MIN_KEPT * drawn and occupied >= least
    return (mask, box) if complete and mask.any() else None
