"""Look at volumes: what a file holds, and whether it can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingInput, ValueRangeError
from ..provenance import read_provenance
from .arrays import ArrayLike, slabs
from .reading import open_source, split_dataset
from .roles import ROLE_NAMES, require_finite, require_integers, require_natural
from .source import Source
from .volume import Volume


def describe(path: str | Path) -> dict[str, Any]:
    """What a file or folder holds, for ``neurodiff info``.

    Parameters
    ----------
    path : str
        As for :func:`.open_volume`; also files that are no volumes, such as affinities.

    Returns
    -------
    dict
        JSON types only. ``path``, ``format``, ``datasets`` (shape and dtype by name), ``shape`` (z, y, x),
        ``voxel_nm`` (list or None), ``labels`` (number of ids > 0, or None without a label dataset), ``attributes``,
        ``provenance`` (the sidecar's content, or None).

    Raises
    ------
    MissingInput, VolumeFormatError
        If it does not exist or cannot be read.
    """
    file, dataset = split_dataset(path)
    source = open_source(file, as_label=True)
    names = [dataset] if dataset else list(source.arrays)
    arrays = {name: source.array(name) for name in names}
    if not arrays:
        raise MissingInput(f"{file} holds no array with two or more axes.")
    label = _label_name(source, names)
    return {
        "path": str(path),
        "format": source.format,
        "datasets": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
        "shape": list(next(iter(arrays.values())).shape[-3:]),
        "voxel_nm": None if source.voxel_nm is None else list(source.voxel_nm),
        "labels": None if label is None else count_labels(source.array(label)),
        "attributes": {
            key: value for key, value in source.attributes.items() if "." not in key or key.partition(".")[0] in arrays
        },
        "provenance": read_provenance(file),
    }


def _label_name(source: Source, names: Sequence[str]) -> str | None:
    def holds_ids(name: str) -> bool:
        return source.array(name).dtype.kind in "ui" and source.array(name).ndim >= 3

    return next((name for name in ROLE_NAMES["label"] if name in names and holds_ids(name)), None)


def count_labels(label: ArrayLike) -> int:
    """Number of ids > 0, found a few sections at a time."""
    import fastremap

    ids: set[int] = set()
    for index in slabs(label.shape):
        ids.update(fastremap.unique(np.ascontiguousarray(label[index])).tolist())
    return len(ids - {0})


def check_training_volume(volume: Volume, *, needs: Sequence[str] = ("image", "label")) -> None:
    """Refuse, before any long work, a volume that cannot be trained on. Reads the volume once, in slabs.

    Parameters
    ----------
    volume : Volume
        Shapes and voxel size were checked when it was made.
    needs : sequence of {"image", "label", "mito"}
        Arrays that must be there.

    Raises
    ------
    MissingInput
        If a needed array is not there.
    ValueRangeError
        If the image is not finite or not in [0, 1], the mitochondria mask not 0/1, or no voxel is labelled.
    LabelTypeError
        If labels or mask are not integers, or a label is negative.
    VolumeFormatError
        If part of a file cannot be read.
    """
    where = volume.path or "The volume"
    for name in needs:
        if name not in volume.arrays:
            there = ", ".join(volume.arrays)
            raise MissingInput(f"{where} needs {' and '.join(needs)} here. It has: {there}, no {name}.")
    for name, array in volume.arrays.items():
        if name != "image":
            require_integers(np.dtype(array.dtype), where, name)
        largest = max(_largest_checked(array[index], name, where) for index in slabs(array.shape))
        if name == "label" and largest == 0:
            raise ValueRangeError(
                f"{where}: at least one voxel must belong to a neuron (label > 0). Got background only."
            )


def _largest_checked(block: np.ndarray, name: str, where: str) -> float:
    """Largest value of a slab whose values are allowed in that role."""
    if name == "image":
        require_finite(block, where)
    if name == "label":
        require_natural(block, where)
    low, high = block.min(), block.max()
    if name != "label" and (low < 0 or high > 1):
        raise ValueRangeError(f"{where}: {name} must lie in [0, 1]. Got [{low:.4g}, {high:.4g}].")
    return float(high)
