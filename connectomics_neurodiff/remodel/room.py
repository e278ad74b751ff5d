"""Room for mitochondria: how deep every voxel lies inside its neuron, and which neurons are candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import edt
import numpy as np
from scipy import ndimage

from ..geometry import is_anisotropic

_CUBE = np.ones((3, 3, 3), dtype=bool)
#: Beyond this distance a new mitochondrion leaves the depth map as it is: deeper than any need of a template.
_UPDATE_NM = 400.0


def depth_map(inside: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """Distance of every voxel to the nearest voxel of another value, in nm.

    Parameters
    ----------
    inside : numpy.ndarray
        (z, y, x) uint32; 0 is outside, other values are separate from one another.
    voxel_nm : sequence of 3 floats
        Voxel size. Where sections are thick the distance is measured within each section, else in 3D.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32, 0 outside, at most the volume's diagonal. The volume's border is no obstacle.
    """
    diagonal = float(np.linalg.norm(np.multiply(inside.shape, voxel_nm)))
    if is_anisotropic(voxel_nm) or inside.shape[0] == 1:
        depth = np.stack([edt.edt(s, anisotropy=tuple(voxel_nm[1:]), black_border=False, parallel=1) for s in inside])
    else:
        depth = edt.edt(inside, anisotropy=tuple(voxel_nm), black_border=False, parallel=1)
    return np.minimum(depth, np.float32(diagonal))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A neuron that may receive mitochondria.

    Attributes
    ----------
    label : int
        Its compact label.
    box : tuple of slice
        Its bounding box.
    deep : numpy.ndarray
        Flat indices, into the volume, of its voxels deep enough for the centre of the smallest template.
    """

    label: int
    box: tuple[slice, ...]
    deep: np.ndarray


@dataclass(eq=False)
class Room:
    """Free space of a deformed volume; shrinks as mitochondria are placed.

    Attributes
    ----------
    label : numpy.ndarray
        (z, y, x) uint32, compact labels 0..n.
    depth : numpy.ndarray
        (z, y, x) float32: nm to the nearest membrane voxel, other neuron or mitochondrion.
    voxel_nm : tuple of float
        Voxel size (z, y, x).
    margin_nm : float
        Voxels no deeper than this stay free: the neuron is eroded by it, by one voxel at least.
    blocked : numpy.ndarray
        (z, y, x) bool: mitochondria and their 26 neighbours.
    mito : numpy.ndarray
        (z, y, x) uint8: mitochondria placed so far.
    """

    label: np.ndarray
    depth: np.ndarray
    voxel_nm: tuple[float, float, float]
    margin_nm: float
    blocked: np.ndarray = field(init=False)
    mito: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.blocked = np.zeros(self.label.shape, dtype=bool)
        self.mito = np.zeros(self.label.shape, dtype=np.uint8)

    @classmethod
    def of(
        cls, label: np.ndarray, membrane: np.ndarray, voxel_nm: tuple[float, float, float], margin_nm: float
    ) -> Room:
        """Empty room: every neuron without its membrane, eroded by `margin_nm` and by one pixel at least."""
        depth = depth_map(np.where(membrane > 0, np.uint32(0), label), voxel_nm)
        return cls(label, depth, voxel_nm, max(margin_nm, *voxel_nm[1:]))

    def free(self, label: int, box: tuple[slice, ...]) -> np.ndarray:
        """Where a mitochondrion of that neuron may lie, as a bool mask of the box."""
        return (self.label[box] == label) & (self.depth[box] > self.margin_nm) & ~self.blocked[box]

    def put(self, mask: np.ndarray, box: tuple[slice, ...]) -> None:
        """Place a mitochondrion: mark it, block its neighbours, and lower the depth around it."""
        self.mito[box][mask] = 1
        near = self._grown(box, (1, 1, 1))
        self.blocked[near] |= ndimage.binary_dilation(self.mito[near] > 0, _CUBE)
        reach = [int(np.ceil(_UPDATE_NM / v)) for v in self.voxel_nm]
        if is_anisotropic(self.voxel_nm):
            reach[0] = 0
        around = self._grown(box, reach)
        gap = depth_map((self.mito[around] == 0).astype(np.uint32), self.voxel_nm)
        np.minimum(self.depth[around], gap, out=self.depth[around])

    def _grown(self, box: tuple[slice, ...], by: Sequence[int]) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, b.start - r), min(n, b.stop + r)) for b, r, n in zip(box, by, self.label.shape, strict=True)
        )


def candidates_by_volume(room: Room, fraction: float, deep_nm: float) -> list[list[Candidate]]:
    """Neurons in groups of falling volume; the first group holds the largest `fraction` of them.

    Parameters
    ----------
    room : Room
    fraction : float
        Size of a group as a share of all neurons, in (0, 1]; at least one neuron. Paper: 10 %.
    deep_nm : float
        A neuron with no voxel at least this deep cannot hold the smallest template and is left out.

    Returns
    -------
    list of list of Candidate
        The second and later groups are for volumes whose first group cannot hold all the mitochondria.
    """
    volumes = np.bincount(room.label.ravel())[1:]
    order = np.argsort(-volumes, kind="stable")
    order = order[volumes[order] > 0] + 1
    size = max(1, int(np.ceil(fraction * len(order))))
    boxes = ndimage.find_objects(room.label)
    groups = []
    for start in range(0, len(order), size):
        group = [_candidate(room, int(n), boxes[n - 1], deep_nm) for n in order[start : start + size]]
        groups.append([c for c in group if c.deep.size])
    return [g for g in groups if g]


def _candidate(room: Room, label: int, box: tuple[slice, ...], deep_nm: float) -> Candidate:
    z, y, x = np.nonzero((room.label[box] == label) & (room.depth[box] >= deep_nm))
    at = (z + box[0].start, y + box[1].start, x + box[2].start)
    return Candidate(label, box, np.ravel_multi_index(at, room.label.shape))
