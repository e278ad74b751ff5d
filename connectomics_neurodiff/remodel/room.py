"""Room for mitochondria: how deep every voxel lies inside its neuron, and which neurons are candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import edt
import fastremap
import numpy as np

from ..geometry import is_anisotropic
from .neighbours import sides

_SQUARE = np.ones((3, 3), dtype=np.uint8)
#: Deepest need of a template, unless told otherwise.
_NEED_NM = 400.0
#: Radius in pixels from which on a distance map is faster than a filter.
_LARGEST_DISK = 12
#: Anchors are drawn from every second row and column where these are at most so far apart: a fourth of the memory, and
#: of the time to find them. Coarser pixels are all looked at: few of a neuron may be deep enough.
_LATTICE_NM = 16.0


def depth_map(inside: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """Distance of every voxel inside to the nearest one outside, in nm.

    Parameters
    ----------
    inside : numpy.ndarray
        (z, y, x) uint8, 0 = outside.
    voxel_nm : sequence of 3 floats
        Voxel size. Where sections are thick the distance is measured within each section, else in 3D.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32, 0 outside, at most the volume's diagonal. The volume's border is no obstacle.

    Notes
    -----
    In sections of square pixels within 2 % (Borgefors 1986, chamfer distances of a 5 x 5 mask), at an eighth of the
    time; exact otherwise.
    """
    z, y, x = voxel_nm
    depth = np.empty(inside.shape, dtype=np.float32)
    # Where nothing is outside, the distance is infinite (edt) or almost (OpenCV).
    diagonal = np.float32(np.linalg.norm(np.multiply(inside.shape, voxel_nm)))
    if is_anisotropic(voxel_nm) or inside.shape[0] == 1:
        for i, section in enumerate(inside):
            if np.isclose(y, x):
                cv2.distanceTransform(section, cv2.DIST_L2, cv2.DIST_MASK_5, dst=depth[i])
                np.minimum(depth[i], diagonal / y, out=depth[i])
                depth[i] *= y
            else:
                depth[i] = edt.edt(section, anisotropy=(y, x), black_border=False, parallel=1)
    else:
        depth[:] = edt.edt(inside, anisotropy=(z, y, x), black_border=False, parallel=1)
    return np.minimum(depth, diagonal, out=depth)


def _with_neighbours(mask: np.ndarray) -> np.ndarray:
    """Mask (z, y, x) uint8 and the 26 neighbours of its voxels, as bool."""
    flat: np.ndarray = np.stack([cv2.dilate(section, _SQUARE) for section in mask])
    grown = flat.copy()
    grown[1:] |= flat[:-1]
    grown[:-1] |= flat[1:]
    return grown != 0


def _eroded(inside: np.ndarray, pitch_nm: Sequence[float], by_nm: float) -> np.ndarray:
    """Section (y, x) uint8 without what is at most `by_nm` from its outside; the frame's border is no obstacle."""
    reach = [int(by_nm / pitch + 1e-4) for pitch in pitch_nm]
    if max(reach) > _LARGEST_DISK:
        deep = edt.edt(inside, anisotropy=tuple(pitch_nm), black_border=False, parallel=1)
        return (deep > by_nm * (1 + 1e-4)).view(np.uint8)
    y, x = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disk = np.hypot(y * pitch_nm[0], x * pitch_nm[1]) <= by_nm * (1 + 1e-4)
    return cv2.erode(inside, disk.astype(np.uint8))


def _apart(label: np.ndarray, membrane: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Neurons without membranes and, should these have gaps, without voxels that touch another label along `axes`.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8.
    """
    inside = ((label > 0) & (membrane == 0)).astype(np.uint8)
    for axis in axes:
        here, ahead = sides(3, axis)
        same = label[here] == label[ahead]
        inside[here] *= same
        inside[ahead] *= same
    return inside


def unknown_sections(voxel_nm: Sequence[float], margin_nm: float) -> int:
    """Sections, where the volume goes on unseen, in which it is not known how near the next membrane is; 1 at least."""
    flat = is_anisotropic(voxel_nm)
    return 1 if flat else int(np.ceil(max(margin_nm, *voxel_nm[1:]) / voxel_nm[0]))


@dataclass(frozen=True)
class Window:
    """Sections of a volume that are in memory, and those of them in which mitochondria may be centred.

    Attributes
    ----------
    depth : int
        Sections of the volume.
    seen : range
        Those in memory.
    core : range
        Those for the centres.
    """

    depth: int
    seen: range
    core: range

    @classmethod
    def whole(cls, depth: int) -> Window:
        """All sections of a volume."""
        return cls(depth, range(depth), range(depth))

    @property
    def core_seen(self) -> slice:
        """Those for the centres, among those in memory."""
        return slice(self.core.start - self.seen.start, self.core.stop - self.seen.start)

    def unknown(self, sections: int) -> list[slice]:
        """So many sections in memory at either end, where the volume goes on."""
        ends = []
        if self.seen.start > 0:
            ends.append(slice(0, sections))
        if self.seen.stop < self.depth:
            ends.append(slice(max(len(self.seen) - sections, 0), len(self.seen)))
        return ends


@dataclass(frozen=True, eq=False)
class Candidate:
    """A neuron that may receive mitochondria.

    Attributes
    ----------
    label : int
        Its compact label.
    deep : numpy.ndarray
        Flat indices, into the volume, of its voxels deep enough for the centre of the smallest template; where pixels
        are fine, of those in every second row and column.
    """

    label: int
    deep: np.ndarray


@dataclass(eq=False)
class Room:
    """Free space of a deformed volume; shrinks as mitochondria are placed.

    Attributes
    ----------
    label : numpy.ndarray
        (z, y, x) uint32, compact labels 0..n.
    depth : numpy.ndarray
        (z, y, x) float32: nm to the nearest membrane voxel, other neuron or mitochondrion; 0 within the margin of one
        and on the 26 neighbours of a mitochondrion.
    voxel_nm : tuple of float
        Voxel size (z, y, x).
    margin_nm : float
        Distance that stays free, one voxel at least.
    need_nm : float
        Nobody asks for more depth than this: a new mitochondrion leaves the depth map beyond it as it is.
    window : Window
        Which sections of the volume these are. Where it goes on, the outermost ones stay free.
    pitch_nm : numpy.ndarray
        (2,) the voxel size within a section.
    mito : numpy.ndarray
        (z, y, x) uint8: mitochondria placed so far.
    """

    label: np.ndarray
    depth: np.ndarray
    voxel_nm: tuple[float, float, float]
    margin_nm: float
    need_nm: float
    window: Window
    pitch_nm: np.ndarray = field(init=False)
    mito: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.pitch_nm = np.array(self.voxel_nm[1:])
        self.mito = np.zeros(self.label.shape, dtype=np.uint8)

    @classmethod
    def of(
        cls,
        label: np.ndarray,
        membrane: np.ndarray,
        voxel_nm: tuple[float, float, float],
        margin_nm: float,
        need_nm: float = _NEED_NM,
        window: Window | None = None,
    ) -> Room:
        """Empty room: every neuron without its membrane, eroded by `margin_nm` and by one pixel at least."""
        flat = is_anisotropic(voxel_nm) or label.shape[0] == 1
        inside = _apart(label, membrane, (1, 2) if flat else (0, 1, 2))
        depth = depth_map(inside, voxel_nm)
        margin = max(margin_nm, *voxel_nm[1:])
        if flat:
            for section, deep in zip(inside, depth, strict=True):
                deep[_eroded(section, voxel_nm[1:], margin) == 0] = 0
        else:
            depth[depth <= margin] = 0
        window = window or Window.whole(len(label))
        for end in window.unknown(unknown_sections(voxel_nm, margin_nm)):
            depth[end] = 0
        return cls(label, depth, voxel_nm, margin, max(need_nm, margin), window)

    def free(self, label: int, box: tuple[slice, ...]) -> np.ndarray:
        """Where a mitochondrion of that neuron may lie, as a bool mask of the box."""
        return (self.label[box] == label) & (self.depth[box] > 0)

    def occupy(self, mito: np.ndarray) -> None:
        """Keep off mitochondria, (z, y, x) uint8, that are there already."""
        if not mito.any():
            return
        self.mito |= mito
        self.depth[_with_neighbours(self.mito)] = 0
        self._keep_off(tuple(slice(0, n) for n in mito.shape))

    def put(self, mask: np.ndarray, box: tuple[slice, ...], need_nm: float = np.inf) -> None:
        """Place a mitochondrion: mark it, and lower the depth around it, as far as those to come need so much depth."""
        self.mito[box][mask] = 1
        near = self._grown(box, (1, 1, 1))
        self.depth[near][_with_neighbours(self.mito[near])] = 0
        need_nm = min(self.need_nm, max(need_nm, self.margin_nm))
        around = self._grown(box, self._reach(need_nm))
        # Within another neuron a membrane is always nearer; and what is nowhere deeper than that is lowered no further.
        same = self.label[around] == self.label[box][mask][0]
        deepest = float((self.depth[around] * same).max())
        self._keep_off(self._grown(box, self._reach(min(need_nm, deepest))))

    def _keep_off(self, around: tuple[slice, ...]) -> None:
        """Lower the depth in a box to the distance from its mitochondria."""
        gap = depth_map((self.mito[around] == 0).view(np.uint8), self.voxel_nm)
        gap[gap <= self.margin_nm] = 0
        np.minimum(self.depth[around], gap, out=self.depth[around])

    def _reach(self, distance_nm: float) -> list[int]:
        """Voxels per axis within a distance, as :func:`depth_map` measures it."""
        reach = [int(np.ceil(distance_nm / v)) for v in self.voxel_nm]
        return [0, *reach[1:]] if is_anisotropic(self.voxel_nm) else reach

    def _grown(self, box: tuple[slice, ...], by: Sequence[int]) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, b.start - r), min(n, b.stop + r)) for b, r, n in zip(box, by, self.label.shape, strict=True)
        )


def volume_groups(volumes: np.ndarray, fraction: float) -> np.ndarray:
    """Group of each neuron by falling volume: the largest `fraction` of them (at least one) is group 0, and so on.

    Parameters
    ----------
    volumes : numpy.ndarray
        (n,) voxels; those of 0 are no neurons.
    fraction : float
        In (0, 1]. Paper: 10 %.

    Returns
    -------
    numpy.ndarray
        (n,) int64, -1 where there is no neuron.
    """
    order = np.argsort(-volumes, kind="stable")
    order = order[volumes[order] > 0]
    group = np.full(len(volumes), -1, dtype=np.int64)
    group[order] = np.arange(len(order)) // max(1, int(np.ceil(fraction * len(order))))
    return group


class CandidateGroups:
    """Neurons in groups of falling volume, largest first within a group.

    The later groups, for volumes whose first group cannot hold all the mitochondria, are made when asked for.

    Parameters
    ----------
    room : Room
    fraction : float
        Size of a group as a share of all neurons (:func:`volume_groups`).
    deep_nm : float
        A neuron with no voxel at least this deep cannot hold the smallest template and is left out.
    group : numpy.ndarray or None
        (n + 1,) group of each label by its volume, where more of the neurons than the room shows is known. None: by
        the volume in the room.
    """

    def __init__(self, room: Room, fraction: float, deep_nm: float, group: np.ndarray | None = None) -> None:
        self._room, self._deep = room, room.depth >= deep_nm
        elsewhere = np.ones(len(self._deep), dtype=bool)
        elsewhere[room.window.core_seen] = False
        self._deep[elsewhere] = False
        labels, counts = fastremap.unique(room.label, return_counts=True)
        volumes = np.zeros(int(labels[-1]) + 1, dtype=np.int64)
        volumes[labels] = counts
        volumes[0] = 0
        self._labels = len(volumes)
        if group is None:
            group = volume_groups(volumes, fraction)
        order = np.argsort(-volumes, kind="stable")
        self._groups = [order[group[order] == i] for i in range(int(group.max(initial=-1)) + 1)]
        self._made: list[list[Candidate]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def largest(self, groups: int) -> list[Candidate]:
        """Candidates of the first so many groups, largest first; none where there are no neurons."""
        while len(self._made) < min(groups, len(self)):
            self._made.append(self._candidates(self._groups[len(self._made)]))
        return [candidate for group in self._made[:groups] for candidate in group]

    def _candidates(self, labels: np.ndarray) -> list[Candidate]:
        """Those of a group that have a voxel deep enough; one pass over the volume for all of them."""
        count = len(labels)
        rank = np.full(self._labels, count, dtype=np.min_scalar_type(count))
        rank[labels] = np.arange(count)
        parts: list[list[np.ndarray]] = [[] for _ in labels]
        _, height, width = self._room.label.shape
        down, right = (2 if 2 * pitch <= _LATTICE_NM else 1 for pitch in self._room.voxel_nm[1:])
        lattice = (slice(None), slice(None, None, down), slice(None, None, right))
        for z, (section, deep) in enumerate(zip(self._room.label[lattice], self._deep[lattice], strict=True)):
            rows, columns = np.nonzero(deep & ((ranks := rank.take(section, mode="clip")) < count))
            of = ranks[rows, columns]
            at = (z * height + down * rows) * width + right * columns
            ordered = at[np.argsort(of, kind="stable")]
            ends = np.cumsum(np.bincount(of, minlength=count))
            for part, low, high in zip(parts, (0, *ends), ends, strict=False):
                part.append(ordered[low:high])
        found = (np.concatenate(part) for part in parts)
        return [Candidate(int(label), at) for label, at in zip(labels, found, strict=True) if at.size]
