"""Zarr arrays and groups, versions 2 and 3, also OME-NGFF."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import VolumeFormatError
from ..geometry import ZYX, voxel_size
from .arrays import LazyArray
from .hdf5 import voxel_from_attributes
from .source import Source
from .tiff import NM_PER_UNIT

#: What a damaged store makes zarr and its codecs raise.
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError, TypeError)


class ZarrArray(LazyArray):
    """One array of a Zarr store. Leading axes of length 1 (time, channel) are left out.

    Parameters
    ----------
    path : str
        The store.
    name : str
        The array inside it; empty if the store is one array.
    shape, dtype
        As stored.
    """

    def __init__(self, path: str, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        leading = 0
        while len(shape) - leading > 3 and shape[leading] == 1:
            leading += 1
        super().__init__(shape[leading:], dtype)
        self.path = path
        self.name = name
        self._first = (0,) * leading

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        import zarr

        try:
            array: Any = zarr.open(self.path, mode="r")
            if self.name:
                array = array[self.name]
            return np.asarray(array[self._first + box], dtype=self.dtype)
        except _DAMAGE as error:
            raise VolumeFormatError(f"{self.path}::{self.name} cannot be read: {error}.") from error


def read_zarr(path: str) -> Source:
    """Contents of a Zarr store: all arrays of a group, or the one array it is.

    The voxel size is looked for in the attributes ``resolution_nm``, ``resolution`` and ``voxel_size`` and in OME-NGFF
    ``multiscales`` (scale of each level, axes with units of length).

    Raises
    ------
    VolumeFormatError
        If it is no Zarr store.
    """
    import zarr

    arrays: dict[str, LazyArray] = {}
    attributes: dict[str, Any] = {}
    try:
        node = zarr.open(path, mode="r")
        attributes.update(node.attrs.asdict())
        if isinstance(node, zarr.Array):
            arrays[""] = ZarrArray(path, "", node.shape, node.dtype)
        else:
            for name, member in sorted(node.members(max_depth=None)):
                attributes.update({f"{name}.{key}": value for key, value in member.attrs.asdict().items()})
                if isinstance(member, zarr.Array):
                    arrays[name] = ZarrArray(path, name, member.shape, member.dtype)
    except _DAMAGE as error:
        raise VolumeFormatError(f"{path} is damaged or no Zarr store: {error}.") from error
    arrays = {name: array for name, array in arrays.items() if array.ndim >= 2}
    try:
        voxel_nm = voxel_from_attributes(attributes, list(arrays)) or _ngff_voxel(attributes)
        return Source(path, "Zarr", _ngff_full_resolution(arrays, attributes), voxel_nm, attributes)
    except (*_DAMAGE, AttributeError) as error:
        raise VolumeFormatError(f"{path} has damaged OME-NGFF metadata ({type(error).__name__}: {error}).") from error


def _multiscales(attributes: dict[str, Any]) -> dict[str, Any] | None:
    """First multiscales entry: at the top up to OME-NGFF 0.4, under ``ome`` from 0.5 on."""
    found = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
    return found[0] if found else None


def _ngff_full_resolution(arrays: dict[str, LazyArray], attributes: dict[str, Any]) -> dict[str, LazyArray]:
    """Of an image pyramid only the finest level, which comes first; other arrays as they are."""
    entry = _multiscales(attributes)
    if entry is None:
        return arrays
    levels = [level["path"] for level in entry["datasets"]]
    return {name: array for name, array in arrays.items() if name not in levels[1:]}


def _ngff_voxel(attributes: dict[str, Any]) -> ZYX | None:
    entry = _multiscales(attributes)
    if entry is None or not all(isinstance(axis, dict) for axis in entry.get("axes", [])):
        return None
    units = [NM_PER_UNIT.get(str(axis.get("unit", "")).lower()) for axis in entry.get("axes", [])][-3:]
    scales = [
        transform["scale"][-3:]
        for holder in (entry["datasets"][0], entry)
        for transform in holder.get("coordinateTransformations", [])
        if transform["type"] == "scale"
    ]
    if len(units) != 3 or None in units or not scales:
        return None
    # The level's own scale, then the one of the whole pyramid, if there is one.
    return voxel_size(np.prod(scales, axis=0) * np.array(units, dtype=float))
