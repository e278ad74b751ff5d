"""Write volumes as gzip HDF5: atomically, and with the same bytes for the same content."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from ..errors import ShapeMismatch, UnknownName, ValueRangeError, did_you_mean
from ..geometry import voxel_size
from ..progress import progress
from ..provenance import atomic_write
from .arrays import ArrayLike, slabs
from .roles import require_finite, require_integers, require_natural

#: What a file of ours may hold, and how it is stored.
DATASETS = ("image", "label", "membrane", "mito", "dark", "affinity", "reliability")
#: Sections, rows and columns of a chunk: a training patch of 18 x 160 x 160 touches few of them.
CHUNK = (8, 128, 128)
#: HDF5 may hold back so much: a chunk or two of each dataset, and what it keeps about them.
_HELD_BACK = 4 << 20
#: Grey values computed in float32 may exceed 1 by this much.
_TOLERANCE = 1e-5


def write_volume(
    path: str | os.PathLike[str],
    arrays: Mapping[str, ArrayLike],
    voxel_nm: Sequence[float],
    attributes: Mapping[str, Any] = {},
    overwrite: bool = True,
) -> None:
    """Write arrays that describe the same space into one HDF5 file.

    Parameters
    ----------
    path : path
        Output file. It appears only when it is complete.
    arrays : mapping of str to array
        ``image``: float in [0, 1] (stored as ``round(255 x)``) or uint8; ``label``: non-negative integers (stored as
        uint32, or uint64 where needed); ``membrane``, ``mito``: integers or bool, stored as 0/1 uint8; ``affinity``:
        (3, z, y, x) float in [0, 1] (stored as float16) or uint8; ``reliability``: as ``image``.
        Arrays on disk are streamed a few sections at a time.
    voxel_nm : sequence of 3 floats
        Voxel size in nm, (z, y, x); stored as the attribute ``resolution_nm``.
    attributes : mapping
        Further attributes of the file: numbers, text, lists; mappings are stored as JSON.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputExists
        If `path` exists and `overwrite` is false.
    UnknownName
        If an array has another name.
    ShapeMismatch, LabelTypeError, ValueRangeError
        If shapes differ, labels or masks are not non-negative integers, an image or affinity is not in [0, 1].
    NotEnoughSpace
        If the disk is full.
    """
    size = voxel_size(voxel_nm)
    _check_names_and_shapes(path, arrays)
    with new_volume_file(path, size, attributes, overwrite) as file:
        for name, array in arrays.items():
            write_dataset(file, name, array)


@contextmanager
def new_volume_file(
    path: str | os.PathLike[str],
    voxel_nm: Sequence[float],
    attributes: Mapping[str, Any] = {},
    overwrite: bool = True,
) -> Iterator[h5py.File]:
    """An open file without datasets, for writing; it appears at `path` when the block succeeds.

    Parameters as for :func:`write_volume`.
    """
    size = voxel_size(voxel_nm)
    # Format version and time tracking are fixed so that equal content gives equal bytes.
    with (
        atomic_write(path, overwrite=overwrite) as temporary,
        h5py.File(temporary, "w", libver=("earliest", "v110")) as file,
    ):
        reserve_space(file, 0)
        file.attrs["resolution_nm"] = np.array(size)
        for key, value in sorted(attributes.items()):
            file.attrs[key] = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
        yield file
        file.flush()
        if hasattr(os, "posix_fallocate"):
            # What was reserved and not needed goes back.
            os.ftruncate(file.id.get_vfd_handle(), file.id.get_filesize())


def reserve_space(file: h5py.File, size: int) -> None:
    """Ask the disk for room before so many bytes are written to an open file.

    After a write that fails HDF5 crashes when the file is closed, or loses what it held back without an error.

    Raises
    ------
    OSError
        If there is no room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    handle = file.id.get_vfd_handle()
    there = os.fstat(handle).st_size
    wanted = file.id.get_filesize() + size + _HELD_BACK
    if wanted <= there:
        return
    try:
        os.posix_fallocate(handle, there, wanted - there)
    except OSError as error:
        # Some file systems cannot tell.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def new_dataset(file: h5py.File, name: str, shape: Sequence[int], dtype: np.dtype) -> h5py.Dataset:
    """An empty dataset of an open file, stored as all of ours are."""
    chunks = (1,) * (len(shape) - 3) + tuple(min(c, n) for c, n in zip(CHUNK, shape[-3:], strict=True))
    return file.create_dataset(
        name, tuple(shape), dtype, chunks=chunks, compression="gzip", compression_opts=4, track_times=False
    )


def write_dataset(file: h5py.File, name: str, array: ArrayLike, *, show: bool = False) -> h5py.Dataset:
    """Stream one array into an open file, a few sections at a time, in the type its name asks for.

    Parameters
    ----------
    file : h5py.File
        Open for writing.
    name : str
        One of :data:`DATASETS`.
    array : array
        As for :func:`write_volume`.
    show : bool
        Whether to show a progress bar.

    Raises
    ------
    LabelTypeError, ValueRangeError
        As :func:`write_volume`.
    """
    shape = tuple(array.shape)
    dataset = new_dataset(file, name, shape, _stored_type(name, array))
    steps = list(slabs(shape, CHUNK[0]))
    for index in progress(steps, label=f"Writing {name}") if show else steps:
        block = _stored(name, np.asarray(array[index]), dataset.dtype)
        reserve_space(file, block.nbytes)
        dataset[index] = block
    return dataset


def _check_names_and_shapes(path: str | os.PathLike[str], arrays: Mapping[str, ArrayLike]) -> None:
    for name, array in arrays.items():
        if name not in DATASETS:
            raise UnknownName(
                f"No dataset '{name}' in a volume file.{did_you_mean(name, DATASETS)} Known: {', '.join(DATASETS)}."
            )
        leading = (3,) if name == "affinity" else ()
        if len(array.shape) != 3 + len(leading) or tuple(array.shape[: len(leading)]) != leading:
            axes = "(3, z, y, x)" if leading else "(z, y, x)"
            raise ShapeMismatch(f"{path}: {name} must be {axes}. Got {tuple(array.shape)}.")
    if len({tuple(array.shape[-3:]) for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
        raise ShapeMismatch(f"{path}: all arrays of a volume must have the same shape. Got {shapes}.")


def _stored_type(name: str, array: ArrayLike) -> np.dtype:
    if name == "affinity":
        return np.dtype(np.uint8 if array.dtype == np.uint8 else np.float16)
    if name != "label":
        return np.dtype(np.uint8)
    require_integers(array.dtype, name, name)
    if array.dtype.itemsize < 8:
        return np.dtype(np.uint32)
    largest = max((int(array[index].max()) for index in slabs(array.shape, CHUNK[0])), default=0)
    return np.dtype(np.uint32 if largest < 2**32 else np.uint64)


def _stored(name: str, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if name in ("image", "affinity", "reliability"):
        if block.dtype == np.uint8:
            return block
        _require_unit_range(block, name)
        if name == "affinity":
            return block.astype(dtype)
        # Half precision would round 255 x.
        wide = np.clip(block.astype(np.float32), 0, 1)
        wide *= 255
        return np.rint(wide, out=wide).astype(dtype)
    require_integers(block.dtype, name, name)
    if name != "label":
        return (block != 0).astype(dtype)
    require_natural(block, name)
    return block.astype(dtype)


def _require_unit_range(block: np.ndarray, name: str) -> None:
    if block.dtype.kind != "f":
        raise ValueRangeError(f"{name} must be float in [0, 1] or uint8. Got {block.dtype}.")
    require_finite(block, name)
    if block.min() < -_TOLERANCE or block.max() > 1 + _TOLERANCE:
        raise ValueRangeError(f"{name} must lie in [0, 1]. Got [{block.min():.4g}, {block.max():.4g}].")
