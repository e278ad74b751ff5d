"""Synthetic pairs on disk: an image and the masks it was painted onto, in one HDF5 file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import LabelTypeError, MissingInput, ShapeMismatch, ValueRangeError
from ..geometry import same_voxel_size, voxel_size
from ..volume import Volume, open_volume, write_volume


class Mask(Protocol):
    """Arrays (z, y, x) to paint onto; :class:`~connectomics_neurodiff.remodel.RemodelledMask` is one."""

    @property
    def label(self) -> np.ndarray:
        """Neuron ids, unsigned integers, 0 = background."""

    @property
    def membrane(self) -> np.ndarray:
        """uint8, 1 on membranes."""

    @property
    def mito(self) -> np.ndarray | None:
        """uint8, 1 inside mitochondria."""


@dataclass(frozen=True, eq=False)
class MaskArrays:
    """The three masks of a file as a :class:`Mask`."""

    label: np.ndarray
    membrane: np.ndarray
    mito: np.ndarray | None = None


def write_pair(
    path: str | os.PathLike[str],
    image: np.ndarray,
    mask: Mask,
    voxel_nm: Sequence[float],
    attributes: Mapping[str, Any],
) -> None:
    """Write one synthetic pair, atomically.

    Parameters
    ----------
    path : path
        HDF5 file: datasets image (uint8), label, membrane, mito (uint8).
    image : numpy.ndarray
        float in [0, 1], (z, y, x); stored as round(255 x).
    mask : Mask
        Label, membrane and, if there are any, mitochondria of the same shape.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x), nm.
    attributes : mapping
        Recorded with the file: seed, sampler, checkpoint.

    Raises
    ------
    ShapeMismatch
        If image and masks differ in shape.
    LabelTypeError
        If the label is not made of integers.
    ValueRangeError
        If the image is not finite or leaves [0, 1].
    """
    arrays = {"label": mask.label, "membrane": mask.membrane}
    if mask.mito is not None:
        arrays["mito"] = mask.mito
    for name, array in arrays.items():
        if array.shape != image.shape:
            raise ShapeMismatch(f"A pair's {name} must have the image's shape {image.shape}. Got {array.shape}.")
    if not np.issubdtype(mask.label.dtype, np.integer):
        raise LabelTypeError(f"A pair's label must be integers. Got {mask.label.dtype}.")
    lowest, highest = image.min(), image.max()
    if not (np.isfinite(lowest) and np.isfinite(highest) and lowest >= 0 and highest <= 1):
        raise ValueRangeError(f"A synthetic image must be finite and in [0, 1]. Got {lowest:.3g} to {highest:.3g}.")
    write_volume(path, {"image": image, **arrays}, voxel_size(voxel_nm), attributes)


def open_pairs(paths: Sequence[str | os.PathLike[str]], real: Volume) -> list[Volume]:
    """Open synthetic pairs that are to be trained on together with a real volume.

    Parameters
    ----------
    paths : sequence of paths
        Files of :func:`write_pair`, or any volumes with an image and a label.
    real : Volume
        The real volume; every pair must have its voxel size (within 1 %) and hold integers as labels.

    Returns
    -------
    list of Volume
        Lazily read, in the order of `paths`.

    Raises
    ------
    MissingInput
        If a file has no image or no label.
    ShapeMismatch
        If image and label of a pair differ in shape.
    LabelTypeError
        If a label is not made of integers.
    ValueRangeError
        If a voxel size differs from the real one.
    """
    return [open_pair(path, real.voxel_nm) for path in paths]


def open_pair(path: str | os.PathLike[str], voxel_nm: Sequence[float]) -> Volume:
    """Open one synthetic pair that is to be trained on together with real data of that voxel size.

    Parameters
    ----------
    path : path
        See :func:`open_pairs`.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) of the real data, nm.

    Returns
    -------
    Volume
        Lazily read.

    Raises
    ------
    MissingInput, ShapeMismatch, LabelTypeError, ValueRangeError
        As :func:`open_pairs`.
    """
    pair = open_volume(Path(path))
    if pair.image is None or pair.label is None:
        missing = "image" if pair.image is None else "label"
        raise MissingInput(f"A synthetic pair needs an image and a label; {path} has no {missing}.")
    if tuple(pair.image.shape) != tuple(pair.label.shape):
        raise ShapeMismatch(f"Image and label of {path} must agree. Got {pair.image.shape} and {pair.label.shape}.")
    if not np.issubdtype(pair.label.dtype, np.integer):
        raise LabelTypeError(f"The label of {path} must be integers. Got {pair.label.dtype}.")
    if not same_voxel_size(pair.voxel_nm, voxel_nm):
        raise ValueRangeError(
            f"{path} must have the real volume's voxel size {tuple(voxel_nm)} nm (z, y, x). "
            f"Got {tuple(pair.voxel_nm)} nm."
        )
    return pair
