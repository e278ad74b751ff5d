"""Distances and smoothing in nm: section by section in anisotropic volumes, in 3D otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ..geometry import is_anisotropic


def distance_inside(mask: np.ndarray, voxel_nm: Sequence[float]) -> np.ndarray:
    """Distance from each voxel of a mask to the nearest one outside it; the faces of the volume are not outside.

    Parameters
    ----------
    mask : numpy.ndarray
        (z, y, x) bool.
    voxel_nm : sequence of 3 floats
        Voxel size, nm. In anisotropic volumes distances are those within the section.

    Returns
    -------
    numpy.ndarray
        (z, y, x) float32, nm; 0 outside the mask.
    """
    import edt

    if not is_anisotropic(voxel_nm):
        return np.asarray(edt.edt(mask, anisotropy=tuple(voxel_nm), black_border=False, parallel=1))
    pitch = tuple(voxel_nm[1:])
    return np.stack([edt.edt(section, anisotropy=pitch, black_border=False, parallel=1) for section in mask])


def smoothed(image: np.ndarray, voxel_nm: Sequence[float], width_nm: float) -> np.ndarray:
    """The image after a Gaussian of standard deviation `width_nm`, (z, y, x) float32; sections of anisotropic volumes
    are smoothed one by one."""
    flat = is_anisotropic(voxel_nm)
    sigma = [0.0 if flat and axis == 0 else width_nm / nm for axis, nm in enumerate(voxel_nm)]
    return np.asarray(ndimage.gaussian_filter(np.asarray(image, dtype=np.float32), sigma))
