"""Open whatever holds a volume: HDF5, TIFF stack, folder of sections, Zarr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingInput, ValueRangeError, VolumeFormatError, VoxelSizeMissing, did_you_mean
from ..geometry import ZYX, voxel_size
from .arrays import LazyArray
from .hdf5 import VOXEL_ATTRIBUTES, read_hdf5
from .roles import ROLE_NAMES, RoleArray, Scaling, grey_scaling, require_role, role_by_type
from .sections import read_folder
from .source import Source
from .tiff import read_tiff
from .volume import Volume
from .zarr_store import read_zarr

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
TIFF_SUFFIXES = (".tif", ".tiff")
ZARR_SUFFIX = ".zarr"
_ZARR_FILES = (".zarray", ".zgroup", "zarr.json")
#: Names that say what a dataset is; a file's only dataset is taken for something else only if it has none of them.
_TELLING_NAMES = {"membrane", "affinity", *(name for names in ROLE_NAMES.values() for name in names)}


def split_dataset(path: str | Path) -> tuple[str, str]:
    """Split ``file.h5::dataset`` in two; the second part is empty if there is none.

    >>> split_dataset("ac4.h5::volumes/raw")
    ('ac4.h5', 'volumes/raw')
    """
    file, _, dataset = str(path).partition("::")
    return file, dataset.strip("/")


def require_hdf5_name(path: str | Path) -> None:
    """Raise :class:`VolumeFormatError` unless an output is named like an HDF5 file: no command would read it back."""
    suffix = Path(path).suffix
    if suffix.lower() not in HDF5_SUFFIXES:
        raise VolumeFormatError(
            f"{path}: the output is an HDF5 file, {', '.join(HDF5_SUFFIXES)}. "
            f"Got '{suffix}'.{did_you_mean(suffix, HDF5_SUFFIXES)}"
        )


def open_source(path: str | Path, *, as_label: bool = False) -> Source:
    """Contents of a file or folder, whatever its format; nothing but headers is read.

    Parameters
    ----------
    path : str
        Without ``::dataset``.
    as_label : bool
        Read coloured sections of a folder as ids.

    Raises
    ------
    MissingInput
        If it does not exist.
    VolumeFormatError
        If the format is not known or the file is damaged.
    """
    file = Path(path)
    if not file.exists():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise MissingInput(f"{file} does not exist.{did_you_mean(file.name, siblings)}")
    suffix = file.suffix.lower()
    if file.is_dir():
        is_zarr = suffix == ZARR_SUFFIX or any((file / name).exists() for name in _ZARR_FILES)
        return read_zarr(str(file)) if is_zarr else read_folder(str(file), as_label=as_label)
    if suffix in HDF5_SUFFIXES:
        return read_hdf5(str(file))
    if suffix in TIFF_SUFFIXES:
        return read_tiff(str(file))
    known = (*HDF5_SUFFIXES, *TIFF_SUFFIXES, ZARR_SUFFIX)
    raise VolumeFormatError(
        f"{file}: a volume is {', '.join(known)} or a folder of PNG or TIFF sections. "
        f"Got '{suffix}'.{did_you_mean(suffix, known)}"
    )


def open_volume(path: str | Path, *, voxel_nm: Sequence[float] | None = None, role: str = "auto") -> Volume:
    """Open a volume; arrays stay on disk until they are indexed.

    Parameters
    ----------
    path : str
        ``file.h5``, ``file.h5::dataset``, a TIFF stack, a folder of PNG or TIFF sections, a Zarr store
        (``store.zarr`` or ``store.zarr::array``).
    voxel_nm : sequence of 3 floats, optional
        Voxel size in nm, (z, y, x). Needed if the file does not state it; goes before what the file states.
    role : {"auto", "image", "label", "mito", "dark"}
        ``"auto"``: every dataset whose name tells its role (``image``, ``raw``, ``label``, ``labels``, ``mito``, ...).
        An array without a telling name is an image if it is uint8, uint16 or float, else labels. A role by name: only
        that array, whatever it is called if there is only one.

    Returns
    -------
    Volume
        uint8 images are divided by 255. Others are scaled once per volume by their true minimum and maximum, for
        which the file is read once here; `Volume.scaling` says how.

    Raises
    ------
    MissingInput
        If the file or dataset does not exist.
    VolumeFormatError
        If the format is unknown, the file damaged, or an array is not (z, y, x).
    VoxelSizeMissing
        If the voxel size is neither stated nor given.
    ShapeMismatch, LabelTypeError, ValueRangeError
        If arrays differ in shape, labels are not integers, image values are not finite.
    """
    if role != "auto":
        require_role(role)
    file, dataset = split_dataset(path)
    source = open_source(file, as_label=role == "label")
    names = _choose(source, dataset, role)
    size = voxel_size_of(source, voxel_nm)
    arrays = {}
    scaling = Scaling()
    for kind, name in names.items():
        stored = source.array(name)
        where = f"{file}::{name}" if name else file
        stored_scaling = grey_scaling(stored, where) if kind == "image" else Scaling()
        arrays[kind] = RoleArray(stored, kind, stored_scaling, where)
        if kind == "image":
            # A uint8 image that was converted from a wider type carries the scaling of the recording.
            scaling = Scaling(*source.attributes.get(f"{name}.grey_range", (stored_scaling.low, stored_scaling.high)))
    masks = arrays.get("label"), arrays.get("mito")
    return Volume(arrays.get("image"), *masks, size, scaling, str(path), arrays.get("dark"))


def read_voxel_size(path: str | Path, *, voxel_nm: Sequence[float] | None = None) -> ZYX:
    """Voxel size of any file, also one that is no volume, such as affinities.

    Parameters
    ----------
    path : str
        As for :func:`open_volume`.
    voxel_nm : sequence of 3 floats, optional
        Goes before what the file states.

    Returns
    -------
    ZYX
        nm.

    Raises
    ------
    VoxelSizeMissing
        If it is neither stated nor given.
    MissingInput, VolumeFormatError
        If the file does not exist or cannot be read.
    """
    return voxel_size_of(open_source(split_dataset(path)[0], as_label=True), voxel_nm)


def voxel_size_of(source: Source, given: Sequence[float] | None) -> ZYX:
    """Voxel size given, or else the one that the source states.

    Raises
    ------
    VoxelSizeMissing
        If there is neither.
    ValueRangeError
        If what the source states is no voxel size, and none was given.
    """
    size = given if given is not None else source.voxel_nm
    if size is None:
        how = "give it in nm, --voxel-nm Z Y X (e.g. 29 6 6), in a run NEURODIFF.VOXEL_NM."
        for key, value in source.attributes.items():
            if key.rpartition(".")[2] in VOXEL_ATTRIBUTES:
                raise ValueRangeError(
                    f"{source.path}: its voxel size is not three positive numbers in nm ({key} is {value!r}): {how}"
                )
        raise VoxelSizeMissing(f"{source.path} does not state its voxel size: {how}")
    return voxel_size(size)


def open_array(path: str | Path, names: Sequence[str]) -> LazyArray:
    """Open one array as it is stored, without any conversion.

    Parameters
    ----------
    path : str
        As for :func:`open_volume`; ``::dataset`` decides if it is there.
    names : sequence of str
        Datasets to look for, in order of preference. A file's only dataset is taken too, unless its name says that it
        is something else.

    Returns
    -------
    LazyArray
        (z, y, x) or (channel, z, y, x), stored type.

    Raises
    ------
    MissingInput
        If there is none of them; the message lists what is there.
    """
    file, dataset = split_dataset(path)
    source = open_source(file, as_label="label" in names)
    return source.array(dataset or _find(source, names))


def _find(source: Source, names: Sequence[str]) -> str:
    """Name of the first of `names` that is there, or of the only array if its name tells nothing else."""
    found = source.first_of(names)
    if found is not None:
        return found
    only = next(iter(source.arrays)) if len(source.arrays) == 1 else None
    if only is None or only in _TELLING_NAMES:
        raise source.missing(names)
    return only


def _choose(source: Source, dataset: str, role: str) -> dict[str, str]:
    """Which array plays which role."""
    if role != "auto":
        names = ROLE_NAMES[role]
        return {role: dataset or _find(source, names)}
    if dataset:
        return {_role_of(dataset, source): dataset}
    found = {kind: source.first_of(names) for kind, names in ROLE_NAMES.items()}
    named = {kind: name for kind, name in found.items() if name is not None}
    if named:
        return named
    only = _find(source, ("image", "label"))
    return {role_by_type(source.array(only).dtype): only}


def _role_of(dataset: str, source: Source) -> str:
    telling = (kind for kind, names in ROLE_NAMES.items() if dataset in names)
    return next(telling, None) or role_by_type(source.array(dataset).dtype)
