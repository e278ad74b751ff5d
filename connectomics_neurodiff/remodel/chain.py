"""One mitochondrion: a template's chain of sections led through a neuron, drawn, refined and validated."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import cv2
import numpy as np
from scipy import ndimage

from ..geometry import is_anisotropic
from .library import Signature
from .room import Room

#: A section may lose this share to the neuron's wall. With more it is drawn smaller, or the chain ends. Published: .20,
#: and what lies outside is kept.
MAX_OUTSIDE = 0.10
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

    def transform(self, points_nm: np.ndarray) -> np.ndarray:
        """Mirror, turn and scale (..., 2) vectors (y, x)."""
        y, x = points_nm[..., 0], points_nm[..., 1]
        if self.mirror:
            y = -y
        c, s = np.cos(self.turn), np.sin(self.turn)
        return self.scale * np.stack([s * x + c * y, c * x - s * y], axis=-1)


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


def _window(points_nm: np.ndarray, pitch: np.ndarray, frame: tuple[int, ...]) -> tuple[slice, slice] | None:
    """Pixels that cover the points, or None if that is outside the frame."""
    low = np.maximum(np.floor(points_nm.min(axis=0) / pitch).astype(int) - 1, 0)
    high = np.minimum(np.ceil(points_nm.max(axis=0) / pitch).astype(int) + 2, frame)
    if (high <= low).any():
        return None
    return slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))


def _settle(room: Room, pose: Pose, z: int, wanted: np.ndarray, need_nm: float) -> np.ndarray | None:
    """Nearest place to `wanted` in section z that is `need_nm` deep, or the best compromise around it."""
    pitch = np.array(room.voxel_nm[1:])
    reach = np.maximum(np.ceil(0.75 * need_nm / pitch).astype(int), 1)
    at = np.rint(wanted / pitch).astype(int)
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, room.label.shape[1:])
    if (high <= low).any():
        return None
    box = (slice(z, z + 1), slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1])))
    free = room.free(pose.label, box)[0]
    if not free.any():
        return None
    y, x = np.ogrid[box[1], box[2]]
    away = np.hypot(y * pitch[0] - wanted[0], x * pitch[1] - wanted[1])
    # A place deep enough and near beats a deeper one far off: chains stay continuous.
    score = np.where(free, np.minimum(room.depth[box][0], need_nm) - 0.3 * away, -np.inf)
    best = np.unravel_index(int(score.argmax()), score.shape)
    return (low + np.array(best)) * pitch


def _fit(room: Room, pose: Pose, z: int, contour: np.ndarray, centre: np.ndarray) -> float:
    """Largest of the allowed sizes at which enough of the section lies in free space; 0 if none does."""
    pitch = np.array(room.voxel_nm[1:])
    for size in _SHRINKS:
        points = centre + size * contour
        window = _window(points, pitch, room.label.shape[1:])
        if window is None:
            return 0.0
        origin = np.array([window[0].start, window[1].start])
        shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
        drawn = _polygon(shape, points, origin, pitch)
        free = room.free(pose.label, (slice(z, z + 1), *window))[0]
        if (drawn.astype(bool) & free).sum() >= (1 - MAX_OUTSIDE) * drawn.sum():
            return size
    return 0.0


def _height(template: Signature, pose: Pose, z: int, pitch_z: float) -> float:
    """Height in the template, above its first section, that section z of the volume shows."""
    rise = (z - pose.anchor[0]) * pitch_z / pose.scale
    return template.widest * template.pitch_z_nm + (rise if pose.up else -rise)


def _section(room: Room, template: Signature, pose: Pose, z: int, previous: _Section | None) -> _Section | None:
    """Place the chain's section at z next to the previous one; None where the template or the room ends."""
    height = _height(template, pose, z, room.voxel_nm[0])
    half = template.pitch_z_nm / 2
    if not 0 <= z < room.label.shape[0] or not -half <= height <= template.z_extent_nm - half:
        return None
    contour, centroid, minor = template.at(height)
    if previous is None:
        wanted = np.array(pose.anchor[1:]) * np.array(room.voxel_nm[1:])
    else:
        _, before, _ = template.at(_height(template, pose, previous.z, room.voxel_nm[0]))
        wanted = previous.centre + pose.transform(centroid - before)
    centre = _settle(room, pose, z, wanted, pose.scale * minor / 2)
    if centre is None:
        return None
    shape = pose.transform(contour)
    fit = _fit(room, pose, z, shape, centre)
    return _Section(z, shape, centre, pose.scale * minor, fit) if fit else None


def _lead(room: Room, template: Signature, pose: Pose) -> list[_Section]:
    """Lead the chain from its anchor upwards and downwards as far as template and neuron allow."""
    start = _section(room, template, pose, pose.anchor[0], None)
    if start is None:
        return []
    chain = [start]
    for step in (1, -1):
        last: _Section | None = start
        while last is not None:
            last = _section(room, template, pose, last.z + step, last)
            if last is not None:
                chain.append(last)
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
    pitch = np.array(room.voxel_nm[1:])
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


def _sections_hoped_for(room: Room, template: Signature, pose: Pose) -> int:
    """Number of the volume's sections that the whole template would occupy."""
    half = template.pitch_z_nm / 2
    heights = [_height(template, pose, z, room.voxel_nm[0]) for z in range(room.label.shape[0])]
    return sum(-half <= height <= template.z_extent_nm - half for height in heights)


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
    chain = _lead(room, template, pose)
    hoped_for = _sections_hoped_for(room, template, pose)
    if not chain or len(chain) < least_complete * hoped_for:
        return None
    pitch = np.array(room.voxel_nm[1:])
    centres, fits = _smoothed(chain, room.voxel_nm[0])
    sizes = fits * _caps(room, template, pose, chain)
    outlines = [c + k * s.contour for s, c, k in zip(chain, centres, sizes, strict=True)]
    window = _window(np.concatenate(outlines), pitch, room.label.shape[1:])
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
    complete = mask.sum() >= _MIN_KEPT * drawn and occupied >= least_complete * hoped_for
    return (mask, box) if complete and mask.any() else None
