"""Turn what a lab has into a volume file, one role at a time if need be."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from ..errors import OutputExists, ShapeMismatch
from ..provenance import atomic_write, require_writable
from .arrays import ArrayLike
from .reading import open_source, open_volume, require_hdf5_name
from .roles import RoleArray
from .volume import Volume
from .writing import write_dataset


def convert(
    source: str | Path, target: str | Path, *, voxel_nm: Sequence[float] | None = None, role: str = "auto"
) -> None:
    """Convert any readable volume to our HDF5 layout, streaming a few sections at a time.

    An existing `target` is extended: a role that it lacks is added if shape and voxel size agree. That is how an image
    stack and a label stack become one file. The target is replaced only by a complete file.

    Parameters
    ----------
    source : path
        As for :func:`.open_volume`.
    target : path
        HDF5 file to make or to extend.
    voxel_nm : sequence of 3 floats, optional
        Voxel size in nm, (z, y, x), if the source does not state it. When a target is extended its voxel size is the
        default.
    role : {"auto", "image", "label", "mito", "dark"}
        As for :func:`.open_volume`.

    Raises
    ------
    OutputExists
        If the target has one of the roles already.
    ShapeMismatch
        If the target's shape or voxel size differs.
    VolumeFormatError
        If the target's name is not that of an HDF5 file.
    UserError
        Whatever :func:`.open_volume` raises for the source or the target.
    """
    path = Path(target)
    require_hdf5_name(path)
    require_writable(path)
    exists = path.exists()
    if exists and voxel_nm is None:
        voxel_nm = (
            open_source(str(source).partition("::")[0], as_label=role == "label").voxel_nm or open_volume(path).voxel_nm
        )
    volume = open_volume(source, voxel_nm=voxel_nm, role=role)
    if exists:
        _require_room_for(volume, open_volume(path), path)
    with atomic_write(path) as temporary:
        if exists:
            shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+" if exists else "w", libver=("earliest", "v110")) as file:
            file.attrs["resolution_nm"] = np.array(volume.voxel_nm)
            _write_roles(file, volume)


def _require_room_for(new: Volume, old: Volume, path: Path) -> None:
    there = sorted(new.arrays.keys() & old.arrays.keys())
    if there:
        raise OutputExists(f"{path} has {' and '.join(there)} already; nothing was overwritten. Name another output.")
    if new.shape != old.shape:
        raise ShapeMismatch(f"{path} has the shape {old.shape}; {new.path} cannot be added to it. Got {new.shape}.")
    if not np.allclose(new.voxel_nm, old.voxel_nm, rtol=1e-3):
        raise ShapeMismatch(
            f"{path} has voxels of {tuple(old.voxel_nm)} nm; {new.path} cannot be added to it. "
            f"Got {tuple(new.voxel_nm)} nm."
        )


def _write_roles(file: h5py.File, volume: Volume) -> None:
    for role, array in volume.arrays.items():
        dataset = write_dataset(file, role, _to_write(array, role), show=True)
        dataset.attrs["converted_from"] = Path(volume.path).name
        if role == "image":
            dataset.attrs["grey_range"] = np.array([volume.scaling.low, volume.scaling.high])


def _to_write(array: ArrayLike, role: str) -> ArrayLike:
    """Labels and masks as they are stored: their narrow type says without a look at the data what is needed."""
    return array.stored if isinstance(array, RoleArray) and role != "image" else array
