"""The affinity convention, defined once, and affinities from labels.

Channels are z, y, x. 1 means "same neuron". The edge between voxels v-1 and v is stored at v (the destination):
waterz's native layout and pytorch_connectomics' TARGET_OPT "2".
"""

from __future__ import annotations

import numpy as np

#: Offset of the neighbour that channel c links a voxel with, (z, y, x).
OFFSETS: tuple[tuple[int, int, int], ...] = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
#: Recorded in the provenance of every affinity file.
CONVENTION = "channels z,y,x; 1 = same neuron; edge (v-1, v) stored at v"


def affinities_from_labels(label: np.ndarray) -> np.ndarray:
    """Nearest-neighbour affinities of a label volume.

    Parameters
    ----------
    label : numpy.ndarray
        (z, y, x) integers, 0 = background.

    Returns
    -------
    numpy.ndarray
        (3, z, y, x) uint8: 1 where voxel and predecessor carry the same label > 0. On the first plane of each axis,
        which has no predecessor, 1 where the voxel itself is foreground (as if the volume were replicated outwards).
    """
    affinity = np.empty((3, *label.shape), dtype=np.uint8)
    foreground = label > 0
    for axis in range(3):
        here, before = [slice(None)] * 3, [slice(None)] * 3
        here[axis], before[axis] = slice(1, None), slice(None, -1)
        first = [slice(None)] * 3
        first[axis] = slice(0, 1)
        affinity[axis][tuple(here)] = (label[tuple(here)] == label[tuple(before)]) & foreground[tuple(here)]
        affinity[axis][tuple(first)] = foreground[tuple(first)]
    return affinity
