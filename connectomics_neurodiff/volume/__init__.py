"""Room 1: disk <-> :class:`Volume`. The only place where axes and types are converted.

Whatever a lab has - our HDF5 layout, one-dataset HDF5 as pytorch_connectomics uses, TIFF stacks, folders of sections,
Zarr - is opened by :func:`open_volume`. Arrays are (z, y, x) and stay on disk until they are indexed; images come as
float32 in [0, 1], labels as uint64, mitochondria as 0/1. The voxel size, in nm and (z, y, x), travels with them.
:func:`write_volume` goes the other way, :func:`convert` goes all the way, :func:`grow_phantom` needs no disk at all.
"""

from .arrays import ArrayLike, LazyArray, slabs
from .convert import convert
from .inspection import check_training_volume, count_labels, describe
from .phantom import grow_phantom
from .reading import (
    open_array,
    open_source,
    open_volume,
    read_voxel_size,
    require_hdf5_name,
    split_dataset,
    voxel_size_of,
)
from .roles import Scaling
from .volume import Volume
from .writing import write_volume

__all__ = [
    "ArrayLike",
    "LazyArray",
    "Scaling",
    "Volume",
    "check_training_volume",
    "convert",
    "count_labels",
    "describe",
    "grow_phantom",
    "open_array",
    "open_source",
    "open_volume",
    "read_voxel_size",
    "require_hdf5_name",
    "slabs",
    "split_dataset",
    "voxel_size_of",
    "write_volume",
]
