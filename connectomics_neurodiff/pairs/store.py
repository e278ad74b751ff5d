"""Synthetic pairs on disk: an image and the masks it was painted onto, in one HDF5 file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..conditions import membrane_from_labels
from ..errors import LabelTypeError, MissingInput, ShapeMismatch, ValueRangeError
from ..geometry import same_voxel_size, voxel_size
from ..provenance import hash_of_file
from ..volume import ArrayLike, Volume, open_array, open_source, open_volume, write_volume

#: Suffix of the gate's verdict beside a pair.
VERDICT = ".gate.json"


class Mask(Protocol):
    """Arrays (z, y, x) to paint onto; :class:`~connectomics_neurodiff.remodel.RemodelledMask` is one."""

    @property
    def label(self) -> ArrayLike:
        """Neuron ids, unsigned integers, 0 = background."""

    @property
    def membrane(self) -> ArrayLike:
        """uint8, 1 on membranes."""

    @property
    def mito(self) -> ArrayLike | None:
        """uint8, 1 inside mitochondria."""


@dataclass(frozen=True, eq=False)
class MaskArrays:
    """The three masks of a file as a :class:`Mask`."""

    label: ArrayLike
    membrane: ArrayLike
    mito: ArrayLike | None = None


def write_pair(
    path: str | os.PathLike[str],
    image: ArrayLike,
    mask: Mask,
    voxel_nm: Sequence[float],
    attributes: Mapping[str, Any],
    reliability: ArrayLike | None = None,
) -> None:
    """Write one synthetic pair, atomically; arrays on disk are streamed a few sections at a time.

    Parameters
    ----------
    path : path
        HDF5 file: datasets image (uint8), label, membrane, mito, reliability (uint8).
    image : array
        float in [0, 1], (z, y, x); stored as round(255 x).
    mask : Mask
        Label, membrane and, if there are any, mitochondria of the same shape.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x), nm.
    attributes : mapping
        Recorded with the file: seed, sampler, checkpoint.
    reliability : array, optional
        (z, y, x) in [0, 1], see :class:`.ReliabilityMap`; stored as round(255 x).

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
    if reliability is not None:
        arrays["reliability"] = reliability
    for name, array in arrays.items():
        if tuple(array.shape) != tuple(image.shape):
            raise ShapeMismatch(f"A pair's {name} must have the image's shape {image.shape}. Got {array.shape}.")
    if not np.issubdtype(mask.label.dtype, np.integer):
        raise LabelTypeError(f"A pair's label must be integers. Got {mask.label.dtype}.")
    write_volume(path, {"image": image, **arrays}, voxel_size(voxel_nm), attributes)


def read_reliability(path: str | os.PathLike[str]) -> np.ndarray:
    """The reliability map of a pair in memory, float32 in [0, 1].

    Raises
    ------
    MissingInput
        If the pair has none.
    """
    return np.asarray(open_array(Path(path), ("reliability",)), dtype=np.float32) / 255


def membrane_of_pair(path: str | Path, pair: Volume, membrane_nm: float) -> np.ndarray:
    """The membranes that a pair was painted on, (z, y, x) uint8; of a pair made elsewhere, those between its labels.

    Parameters
    ----------
    path : path
        File of the pair.
    pair : Volume
        What :func:`open_pair` made of it.
    membrane_nm : float
        Thickness of membranes, nm, where the file holds none.
    """
    if "membrane" in open_source(path).arrays:
        return np.asarray(open_array(path, ("membrane",)))
    return membrane_from_labels(pair.array("label"), pair.voxel_nm, membrane_nm)


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
        If a voxel size differs from the real one, or the gate refused a pair (:data:`VERDICT`).
    """
    return [open_pair(path, real.voxel_nm) for path in paths]


def open_pair(path: str | os.PathLike[str], voxel_nm: Sequence[float], *, even_refused: bool = False) -> Volume:
    """Open one synthetic pair that is to be trained on together with real data of that voxel size.

    Parameters
    ----------
    path : path
        See :func:`open_pairs`.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) of the real data, nm.
    even_refused : bool
        Whether a pair may be opened that the gate refused: to look at it.

    Returns
    -------
    Volume
        Lazily read.

    Raises
    ------
    MissingInput, ShapeMismatch, LabelTypeError, ValueRangeError
        As :func:`open_pairs`.
    """
    if not even_refused:
        _require_not_refused(Path(path))
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


def _require_not_refused(path: Path) -> None:
    """A verdict of the gate beside a pair holds wherever the pair is trained on, unless the pair is another by now."""
    report = path.with_suffix(VERDICT)
    if not (report.exists() and path.exists()):
        return
    verdict = json.loads(report.read_text())
    if not verdict["passed"] and verdict.get("pair") == hash_of_file(path):
        raise ValueRangeError(f"The gate refused {path}: {verdict['reason']} ({report.name})")
