"""Where the cell membranes are, given the neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError, VolumeFormatError
from ..geometry import is_anisotropic, voxel_size
from ..volume import ArrayLike, LazyArray

#: Background up to this width is taken for membrane: leaves 99 % of a nerve cord's glia alone (below).
MAX_GAP_NM = 80.0
#: No membrane, synapse or gap between neurons is drawn wider; a value beyond is a mistake, mostly of the unit.
MOST_THICKNESS_NM = 200.0


def with_background(membrane: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Membranes and all other background: what the diffusion model is conditioned on.

    Wide background - glia, vessels, what nobody traced - is only outlined by :func:`membrane_from_labels`. A model that
    sees the outline alone cannot tell its inside from that of a neuron and paints cytoplasm there, where the pair's
    affinities are 0: the segmenter then doubts cytoplasm everywhere (docs/results.md).

    Parameters
    ----------
    membrane, label : numpy.ndarray
        (z, y, x) mask, and integers with 0 = background.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8, 1 = outside all neurons.

    Raises
    ------
    ShapeMismatch
        If the shapes differ.
    """
    if membrane.shape != label.shape:
        raise ShapeMismatch(f"Membrane and label must have one shape. Got {membrane.shape} and {label.shape}.")
    return ((np.asarray(membrane) > 0) | (np.asarray(label) == 0)).astype(np.uint8)


class BackgroundMask(LazyArray):
    """:func:`with_background` of arrays on disk, part by part as it is indexed.

    Parameters
    ----------
    membrane, label : array
        As there.
    """

    def __init__(self, membrane: ArrayLike, label: ArrayLike) -> None:
        if tuple(membrane.shape) != tuple(label.shape):
            raise ShapeMismatch(f"Membrane and label must have one shape. Got {membrane.shape} and {label.shape}.")
        super().__init__(tuple(membrane.shape), np.uint8)
        self._membrane, self._label = membrane, label

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        return with_background(np.asarray(self._membrane[box]), np.asarray(self._label[box]))


def membrane_from_labels(
    label: np.ndarray, voxel_nm: Sequence[float], thickness_nm: float = 25.0, max_gap_nm: float = MAX_GAP_NM
) -> np.ndarray:
    """Membrane mask of a label volume, for dense labels and for labels separated by gaps of background.

    Work goes section by section if sections are at least twice as thick as pixels are wide (:func:`.is_anisotropic`),
    in 3D otherwise. "Near" and "thin" are meant in that space:

    1. Background is *thin* where no disk (ball) of diameter `max_gap_nm` fits into it: background minus its
       morphological opening. Thin background is membrane. Glia, vessels and other wide background are not thin.
    2. Labels grow into thin background, one voxel per step from all sides, until they meet in the middle of the gap
       (of several neighbours the first of z-1, z+1, y-1, y+1, x-1, x+1 wins). Now neurons touch, as in labels
       that were dense from the start.
    3. A voxel is membrane if a voxel of another label (wide background counts as one) lies within its reach:
       ``sum((offset_a / reach_a)**2) <= 1`` with ``reach_a = max((thickness_nm + voxel_a) / 2, voxel_a)``. So a
       membrane is the voxels whose centres lie within half the thickness of the surface between two labels, but at
       least the voxel on either side of it.

    Hence a membrane between two neurons is as wide as their gap or as `thickness_nm`, whichever is wider, and wide
    background is only outlined.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) integers, 0 = background.
    voxel_nm : sequence of 3 floats
        Voxel size in nm, (z, y, x).
    thickness_nm : float
        Thickness of a membrane between touching neurons, both sides together, in nm, in (0, 200]. 25 nm, two bilayers
        and a narrow cleft, are 4 pixels of 6 nm, as wide as the membranes of the published remodelling.
    max_gap_nm : float
        Background up to this width is taken for membrane, in nm, >= 0. 80 nm leaves 99 % of the glia that experts drew
        in a larval Drosophila nerve cord [Gerhard et al., figshare 10.6084/m9.figshare.856713] alone.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8, 1 = membrane.

    Raises
    ------
    VolumeFormatError
        If the label has not three axes.
    LabelTypeError
        If it is not made of integers.
    ValueRangeError
        If the voxel size or a length is not valid.
    """
    size = voxel_size(voxel_nm)
    _check(label, thickness_nm, max_gap_nm)
    flat = is_anisotropic(size)
    reach = np.maximum((thickness_nm + np.array(size)) / 2, size)
    if not flat:
        return _membrane(label, np.array(size), reach, max_gap_nm)
    membrane = np.empty(label.shape, dtype=np.uint8)
    for z in range(label.shape[0]):
        membrane[z] = _membrane(label[z], np.array(size[1:]), reach[1:], max_gap_nm)
    return membrane


def membrane_halo(voxel_nm: Sequence[float], thickness_nm: float = 25.0, max_gap_nm: float = 80.0) -> int:
    """Sections on either side of a block that the membranes within it depend on (:func:`membrane_from_labels`).

    Opening looks one gap far, labels grow half a gap, by steps along the axes, and a membrane reaches half its
    thickness.
    """
    z = voxel_size(voxel_nm).z
    if is_anisotropic(voxel_nm):
        return 0
    return int(np.ceil((2 * max_gap_nm + max((thickness_nm + z) / 2, z)) / z)) + 2


def _check(label: np.ndarray, thickness_nm: float, max_gap_nm: float) -> None:
    if label.ndim != 3:
        raise VolumeFormatError(f"A label volume must have three axes (z, y, x). Got shape {label.shape}.")
    if label.dtype.kind not in "uib":
        raise LabelTypeError(f"A label volume must be made of integers (0 = background). Got {label.dtype}.")
    if not (0 < thickness_nm <= MOST_THICKNESS_NM and np.isfinite(max_gap_nm) and max_gap_nm >= 0):
        raise ValueRangeError(
            f"thickness_nm must lie in (0, {MOST_THICKNESS_NM:g}] and max_gap_nm be >= 0. "
            f"Got {thickness_nm} and {max_gap_nm}."
        )


def _membrane(label: np.ndarray, voxel: np.ndarray, reach: np.ndarray, max_gap_nm: float) -> np.ndarray:
    """Membrane of one section, or of an isotropic volume."""
    thin = thin_background(label, voxel, max_gap_nm)
    grown = grow_into(label, thin)
    if label.ndim == 2:
        return (thin | _meets_another(grown, voxel / reach)).astype(np.uint8)
    import edt

    # edt keeps ids apart but takes 0 for outside: number the ids from 1.
    distance = edt.edt(_numbered_from_one(grown), anisotropy=tuple(voxel / reach), black_border=False, parallel=1)
    # Distances are float32.
    return (thin | (distance <= 1 + 1e-4)).astype(np.uint8)


def _disk(spacing: np.ndarray, radius: float) -> np.ndarray:
    """Structuring element: offsets no longer than `radius`, of voxels `spacing` apart, (y, x) uint8."""
    # Lengths are compared as distances of float32 are elsewhere.
    radius = radius * (1 + 1e-4)
    reach = (radius / spacing).astype(int)
    y, x = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    return (np.hypot(y * spacing[0], x * spacing[1]) <= radius).astype(np.uint8)


def _meets_another(section: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Whether another label lies within distance 1 of a voxel of a section; 0 is a label too."""
    import cv2

    ids = section if section.max() < 2**16 else _numbered_from_one(section)
    # OpenCV filters no integers of 32 bits; float32 holds them exactly up to 2^24, more than a section has voxels.
    ids = ids.astype(np.uint16 if ids.max() < 2**16 else np.float32)
    disk = _disk(spacing, 1.0)
    return np.asarray(cv2.dilate(ids, disk) != cv2.erode(ids, disk))


def _numbered_from_one(label: np.ndarray) -> np.ndarray:
    if label.max() < 2**32 - 1:
        return label.astype(np.uint32) + np.uint32(1)
    import fastremap

    ids, _ = fastremap.renumber(np.ascontiguousarray(label), start=1, preserve_zero=True)
    return np.ascontiguousarray(ids.astype(np.uint32) + np.uint32(1))


def thin_background(label: np.ndarray, voxel: np.ndarray, max_gap_nm: float) -> np.ndarray:
    """Background into which no disk (ball) of diameter `max_gap_nm` fits; the volume goes on beyond its faces.

    A disk holds the voxels at most ``max_gap_nm / 2`` from its centre voxel.
    """
    background = label == 0
    if not background.any() or background.all():
        return np.zeros(label.shape, dtype=bool)
    if label.ndim == 2:
        import cv2

        # Most sections are faster through a filter than through two distance transforms.
        cores = cv2.erode(background.astype(np.uint8), disk := _disk(voxel, max_gap_nm / 2))
        return np.asarray(background & (cv2.dilate(cores, disk) == 0))
    import edt

    spacing, radius = tuple(voxel), max_gap_nm / 2
    # Erosion, then dilation, by a disk. edt measures from foreground to the nearest voxel outside it.
    cores = edt.edt(background, anisotropy=spacing, black_border=False, parallel=1) > radius + 1e-3
    if not cores.any():
        return background
    opened = edt.edt(~cores, anisotropy=spacing, black_border=False, parallel=1) <= radius + 1e-3
    return background & ~opened


def grow_into(label: np.ndarray, thin: np.ndarray) -> np.ndarray:
    """Labels grown into the voxels of `thin`, one voxel per step."""
    if not thin.any():
        return label
    grown = np.pad(label, 1)
    strides = np.array(grown.strides) // grown.itemsize
    offsets = [sign * stride for stride in strides for sign in (-1, 1)]
    values = grown.reshape(-1)
    todo = np.flatnonzero(np.pad(thin, 1))
    while True:
        # Decide for all voxels first, so that a step does not see its own growth.
        found = np.zeros(len(todo), dtype=label.dtype)
        for offset in reversed(offsets):
            neighbour = values[todo + offset]
            found = np.where(neighbour != 0, neighbour, found)
        reached = found != 0
        if not reached.any():
            return grown[(slice(1, -1),) * label.ndim]
        values[todo[reached]] = found[reached]
        todo = todo[~reached]
