"""Mitochondria that move along with the deformation, clipped to their neurons."""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from ..errors import ShapeMismatch

_CUBE = np.ones((3, 3, 3), dtype=bool)


def keep_inside(mito: np.ndarray, label: np.ndarray, membrane: np.ndarray) -> np.ndarray:
    """Clip a mitochondria mask to neurons, off the membrane, and part what touches across two neurons.

    Parameters
    ----------
    mito, label, membrane : numpy.ndarray
        (z, y, x), non-negative integers; 0 is outside.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8; each 26-connected component lies in exactly one neuron.

    Raises
    ------
    ShapeMismatch
        If the shapes differ.
    """
    if not mito.shape == label.shape == membrane.shape:
        raise ShapeMismatch(f"Masks must have the same shape. Got {mito.shape}, {label.shape}, {membrane.shape}.")
    kept = ((mito > 0) & (label > 0) & (membrane == 0)).astype(np.uint8)
    components = cc3d.connected_components(kept, connectivity=26)
    for i, box in enumerate(ndimage.find_objects(components), start=1):
        component = components[box] == i
        held = label[box]
        hosts, sizes = np.unique(held[component], return_counts=True)
        if len(hosts) == 1:
            continue
        # The largest part stays whole; each next one keeps what does not touch the parts before it.
        parted = np.zeros(component.shape, dtype=bool)
        for host in hosts[np.argsort(-sizes, kind="stable")]:
            touched = ndimage.binary_dilation(parted, _CUBE)
            parted |= component & (held == host) & ~touched
        kept[box][component & ~parted] = 0
    return kept
