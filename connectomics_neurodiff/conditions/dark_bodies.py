"""What is dark inside neurons, found in the image itself: nobody annotates more of it than mitochondria.

A mask of membranes says nothing about mitochondria, clouds of vesicles, reticulum and whorls of myelin, which are as
dark as membranes. A denoiser that is told membranes alone leaves them out, and the segmenter that trains on its empty
neurons takes all that is dark for a boundary (docs/painting.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import ShapeMismatch
from ..geometry import ZYX, voxel_size
from ..volume import Volume
from .measures import distance_inside, smoothed
from .membrane import membrane_from_labels

logger = logging.getLogger("connectomics_neurodiff")

#: Grain is smoothed away by these, standard deviations: of bodies, and of all that is dark, vesicles included.
SMOOTHING_NM, FINE_NM = 12.0, 8.0
#: The membrane's own blur reaches so far into a neuron.
MARGIN_NM = 15.0
#: What is dark so near to a mitochondrion is its own membrane, which is painted with it wherever it is placed.
RIM_NM = 20.0
#: Radius of the smallest disk (ball) that fits into a body: vesicles and tubules by themselves are no bodies.
LEAST_RADIUS_NM = 30.0
#: How dark a body is: 0 as cytoplasm, 1 as membranes. With a half, and the lengths above, bodies agree with experts'
#: mitochondria by Dice .82 (nerve cord, 50 x 4.6 x 4.6 nm) and .92 (medulla, 8 nm).
DARKNESS = 0.5


def dark_bodies(
    image: np.ndarray, label: np.ndarray, voxel_nm: Sequence[float], membrane_nm: float = 25.0
) -> np.ndarray:
    """Mask of the bodies inside neurons that are dark by the measure of the volume's own membranes.

    Work goes section by section in anisotropic volumes (:func:`.is_anisotropic`), in 3D otherwise. The image is
    smoothed by `SMOOTHING_NM`. A voxel of a neuron further than `MARGIN_NM` from every membrane is dark if it lies
    beyond the grey value `DARKNESS` of the way from the median of all such voxels to the mean of the membranes. A body
    is what a disk (ball) of radius `LEAST_RADIUS_NM` reaches without leaving the dark: a morphological opening.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1]; membranes are darker than cytoplasm.
    label : numpy.ndarray
        Same shape, integers, 0 = background.
    voxel_nm : sequence of 3 floats
        Voxel size in nm, (z, y, x).
    membrane_nm : float
        Thickness of the membranes, see :func:`.membrane_from_labels`.

    Returns
    -------
    numpy.ndarray
        (z, y, x) uint8, 1 = dark body. Never on a membrane or outside neurons. All 0, with a warning in the log, where
        membranes are not darker than cytoplasm or no neuron is wide enough to tell.

    Raises
    ------
    ShapeMismatch
        If the shapes differ.
    """
    size = voxel_size(voxel_nm)
    return _bodies(image, *_deep_and_membrane(image, label, size, membrane_nm), size)


def with_dark_bodies(volume: Volume, membrane_nm: float = 25.0) -> Volume:
    """A volume in memory that knows what is dark inside its neurons.

    Where it has no masks of mitochondria its :func:`dark_bodies` stand for them. All else that is dark by the same
    measure, smoothed by `FINE_NM` only and however small, is :attr:`.Volume.dark`, except within `RIM_NM` of these:
    vesicles, reticulum, myelin, densities. What the volume has of either stays as it is.

    Raises
    ------
    MissingInput
        If it has no image or no label.
    """
    if volume.mito is not None and volume.dark is not None:
        return volume
    image, label, size = volume.array("image"), volume.array("label"), volume.voxel_nm
    places = _deep_and_membrane(image, label, size, membrane_nm)
    mito = _bodies(image, *places, size) if volume.mito is None else volume.array("mito")
    dark = volume.dark
    if dark is None:
        apart = distance_inside(mito == 0, size) > RIM_NM if mito.any() else True
        dark = (_dark(image, *places, size, FINE_NM) & apart).astype(np.uint8)
    return replace(volume, mito=mito, dark=dark)


def _deep_and_membrane(
    image: np.ndarray, label: np.ndarray, size: ZYX, membrane_nm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where neurons are deeper than the membrane's blur, and where membranes are, bool."""
    if image.shape != label.shape:
        raise ShapeMismatch(f"Image and label must have one shape. Got {image.shape} and {label.shape}.")
    membrane = membrane_from_labels(label, size, membrane_nm) > 0
    return distance_inside((label > 0) & ~membrane, size) > MARGIN_NM, membrane


def _bodies(image: np.ndarray, deep: np.ndarray, membrane: np.ndarray, size: ZYX) -> np.ndarray:
    """Mask of the dark bodies, uint8."""
    return _opened(_dark(image, deep, membrane, size, SMOOTHING_NM), size).astype(np.uint8)


def _dark(image: np.ndarray, deep: np.ndarray, membrane: np.ndarray, size: ZYX, width_nm: float) -> np.ndarray:
    """Where neurons are dark inside, bool; nowhere, with a warning, where that cannot be told."""
    if not deep.any() or not membrane.any():
        logger.warning("No dark bodies are looked for: no neuron is wide enough, or there is no membrane.")
        return np.zeros(image.shape, bool)
    smooth = smoothed(image, size, width_nm)
    cytoplasm, of_membrane = float(np.median(smooth[deep])), float(smooth[membrane].mean(dtype=np.float64))
    if of_membrane >= cytoplasm:
        logger.warning(
            "No dark bodies are looked for: membranes (mean grey value %.3f) are not darker than cytoplasm (%.3f). "
            "Invert the image if it has bright membranes.",
            of_membrane,
            cytoplasm,
        )
        return np.zeros(image.shape, bool)
    return np.asarray(deep & (smooth < cytoplasm + DARKNESS * (of_membrane - cytoplasm)))


def _opened(dark: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """Opening by a disk (ball) of `LEAST_RADIUS_NM`; nothing is known, and nothing shrinks, beyond the faces."""
    core = distance_inside(dark, size) > LEAST_RADIUS_NM
    return dark & (distance_inside(~core, size) <= LEAST_RADIUS_NM) if core.any() else core
