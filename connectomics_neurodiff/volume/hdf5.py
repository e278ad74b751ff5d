"""HDF5 files, ours and other people's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import h5py
import numpy as np

from ..errors import ValueRangeError, VolumeFormatError
from ..geometry import ZYX, voxel_size
from .arrays import LazyArray
from .source import Source

#: Attributes that may hold the voxel size in nm, (z, y, x): ours, then CREMI's and funlib's.
VOXEL_ATTRIBUTES = ("resolution_nm", "resolution", "voxel_size")


class HDF5Array(LazyArray):
    """One dataset of an HDF5 file; the file is open only while something is read.

    Parameters
    ----------
    path : str
        The file.
    name : str
        The dataset.
    shape, dtype
        As stored.
    """

    def __init__(self, path: str, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(shape, dtype)
        self.path = path
        self.name = name

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        try:
            with h5py.File(self.path, "r") as file:
                return np.asarray(file[self.name][box], dtype=self.dtype)
        except (OSError, KeyError) as error:
            raise VolumeFormatError(f"{self.path}::{self.name} cannot be read: {_one_line(error)}.") from error


def read_hdf5(path: str) -> Source:
    """Contents of an HDF5 file.

    Raises
    ------
    VolumeFormatError
        If the file is truncated or no HDF5 file.
    """
    arrays: dict[str, LazyArray] = {}
    attributes: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "uifb" and item.ndim >= 2:
            arrays[name] = HDF5Array(path, name, item.shape, item.dtype)
            attributes.update({f"{name}.{key}": _plain(value) for key, value in item.attrs.items()})

    try:
        with h5py.File(path, "r") as file:
            attributes.update({key: _plain(value) for key, value in file.attrs.items()})
            file.visititems(visit)
    except (OSError, RuntimeError) as error:
        raise VolumeFormatError(f"{path} is truncated or no HDF5 file: {_one_line(error)}.") from error
    return Source(path, "HDF5", arrays, voxel_from_attributes(attributes, list(arrays)), attributes)


def voxel_from_attributes(attributes: dict[str, Any], names: list[str]) -> ZYX | None:
    """Voxel size from the attributes of the root or, failing that, of the first array that has one.

    What is no voxel size is passed over: files call all sorts of things a resolution, and the size may be given anyway.
    """
    for prefix in ("", *(f"{name}." for name in names)):
        for key in VOXEL_ATTRIBUTES:
            with suppress(ValueRangeError, ValueError, TypeError):
                if prefix + key in attributes:
                    return voxel_size(attributes[prefix + key])
    return None


def _plain(value: Any) -> Any:
    """Attribute value as plain Python: numbers, text, lists."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
