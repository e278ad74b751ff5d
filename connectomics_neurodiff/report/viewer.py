"""Volumes in Neuroglancer: every array of a file as a layer, in nanometres, served to this machine only."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import MissingDependency, ValueRangeError, VolumeFormatError
from ..geometry import ZYX, voxel_size
from ..volume import ArrayLike, Volume, open_source, open_volume, split_dataset, voxel_size_of

if TYPE_CHECKING:
    from neuroglancer import Viewer

#: How a layer is drawn: grey values, ids in colours, or three channels as red (z), green (y), blue (x).
LayerKind = Literal["image", "labels", "affinities"]

_GREY_SHADER = "#uicontrol invlerp normalized(range=[0, 1])\nvoid main() { emitGrayscale(normalized()); }\n"
# emitRGB wants floats in [0, 1]: toNormalized maps uint8 there, and leaves float32 as it is.
_AFFINITY_SHADER = (
    "void main() { emitRGB(vec3(toNormalized(getDataValue(0)), toNormalized(getDataValue(1)), "
    "toNormalized(getDataValue(2)))); }\n"
)


@dataclass(frozen=True)
class Layer:
    """One layer of the viewer.

    Attributes
    ----------
    name : str
        Shown on its tab; unique in a viewer.
    kind : {"image", "labels", "affinities"}
        How it is drawn.
    array : array
        (z, y, x), or (3, z, y, x) for affinities; read only where the viewer looks.
    voxel_nm : sequence of 3 floats
        Voxel size (z, y, x) in nm.
    """

    name: str
    kind: LayerKind
    array: ArrayLike
    voxel_nm: Sequence[float]


@dataclass(frozen=True)
class View:
    """A running viewer; a context manager that stops it.

    Attributes
    ----------
    address : str
        What to open in the browser.
    viewer : neuroglancer.Viewer
        Its state can be read and changed while it runs.
    """

    address: str
    viewer: Viewer

    def close(self) -> None:
        """Stop the server; the address is dead afterwards."""
        import neuroglancer

        neuroglancer.server.stop()

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Served:
    """An array in a type that Neuroglancer draws, converted block by block as it is looked at.

    Neuroglancer knows no float16 (our affinities), no bool and, for ids, no signed integers.
    """

    def __init__(self, array: ArrayLike, kind: LayerKind) -> None:
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = _served_type(np.dtype(array.dtype), kind)

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self._array[key]).astype(self.dtype, copy=False)

    def transpose(self) -> np.ndarray:
        """The whole array with reversed axes: what Neuroglancer makes meshes of."""
        return self[...].transpose()


def _served_type(stored: np.dtype, kind: LayerKind) -> np.dtype:
    if kind == "labels":
        return stored if stored.kind == "u" else np.dtype(np.uint64)
    return stored if stored == np.uint8 else np.dtype(np.float32)


def layers_of(path: str | os.PathLike[str], *, voxel_nm: Sequence[float] | None = None) -> list[Layer]:
    """Layers of a file: image, labels, mitochondria and membranes, affinities; whatever it holds.

    Parameters
    ----------
    path : path
        As for :func:`~connectomics_neurodiff.volume.open_volume`, ``file.h5::dataset`` included.
    voxel_nm : sequence of 3 floats, optional
        Voxel size (z, y, x) in nm, where the file states none; goes before what the file states.

    Returns
    -------
    list of Layer
        Named ``"<file name> <dataset>"``.

    Raises
    ------
    MissingInput, VolumeFormatError
        If it does not exist or cannot be read as a volume.
    VoxelSizeMissing
        If the voxel size is neither stated nor given.
    """
    file, dataset = split_dataset(os.fspath(path))
    source = open_source(file)
    arrays = {dataset: source.array(dataset)} if dataset else dict(source.arrays)
    size = voxel_size_of(source, voxel_nm)
    stem = Path(file).stem
    layers: list[Layer] = []
    if any(array.ndim == 3 and name != "membrane" for name, array in arrays.items()):
        layers += layers_of_volume(open_volume(os.fspath(path), voxel_nm=size), stem)
    for name, array in arrays.items():
        if name == "membrane":
            layers.append(Layer(f"{stem} membrane", "labels", array, size))
        elif array.ndim == 4 and array.shape[0] == 3:
            layers.append(Layer(f"{stem} {name or 'affinity'}", "affinities", array, size))
    if not layers:
        got = ", ".join(f"{name or '(unnamed)'} {array.shape}" for name, array in arrays.items())
        raise VolumeFormatError(
            f"{path}: shown are (z, y, x) volumes and (3, z, y, x) affinities. Got {got or 'nothing'}."
        )
    return layers


def layers_of_volume(volume: Volume, name: str) -> list[Layer]:
    """Layers of an opened volume, named ``"<name> image"``, ``"<name> label"``, ``"<name> mito"``."""
    return [
        Layer(f"{name} {role}", "image" if role == "image" else "labels", array, volume.voxel_nm)
        for role, array in volume.arrays.items()
    ]


def view(
    paths: Sequence[str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    voxel_nm: Sequence[float] | None = None,
) -> View:
    """Show volumes, segmentations and affinities in Neuroglancer.

    Parameters
    ----------
    paths : sequence of path
        Files, as for :func:`layers_of`.
    host : str
        Address to listen on. The default can be reached from this machine only.
    port : int
        0 takes any free one.
    voxel_nm : sequence of 3 floats, optional
        Voxel size (z, y, x) in nm, for files that state none.

    Returns
    -------
    View
        Running until it is closed or the process ends.

    Raises
    ------
    MissingDependency
        If Neuroglancer is not installed.
    UserError
        As :func:`layers_of` and :func:`show` raise.
    """
    layers: list[Layer] = []
    for path in paths:
        layers += layers_of(path, voxel_nm=voxel_nm)
    return show(layers, host=host, port=port)


def show(layers: Sequence[Layer], *, host: str = "127.0.0.1", port: int = 0) -> View:
    """Serve layers; there is one server per process, so an earlier view ends.

    Parameters
    ----------
    layers : sequence of Layer
        Names that occur twice are numbered: ``"ac4 image"``, ``"ac4 image 2"``.
    host, port
        As for :func:`view`.

    Raises
    ------
    MissingDependency
        If Neuroglancer is not installed.
    ValueRangeError
        If there is no layer, or the address cannot be listened on.
    """
    try:
        import neuroglancer
    except ImportError as error:
        raise MissingDependency(
            "Viewing needs Neuroglancer: pip install 'connectomics_neurodiff[view]' (or: pip install neuroglancer)."
        ) from error
    if not layers:
        raise ValueRangeError("A view needs at least one volume. Got none.")
    neuroglancer.server.stop()
    _require_free(host, port)
    neuroglancer.set_server_bind_address(host, port)
    viewer = neuroglancer.Viewer()
    with viewer.txn() as state:
        # Neuroglancer takes the first dimension to the right and the second down; our arrays start with z.
        state.dimensions = _space(voxel_size(layers[0].voxel_nm))
        state.display_dimensions = ["x", "y", "z"]
        for name, layer in zip(_distinct([layer.name for layer in layers]), layers, strict=True):
            state.layers[name] = _neuroglancer_layer(layer)
    return View(viewer.get_viewer_url(), viewer)


def _require_free(host: str, port: int) -> None:
    """Try the address first: the server behind Neuroglancer would die in its thread, and leave a socket open."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueRangeError(
            f"Cannot listen on {host}, port {port} ({error}): choose another --bind or --port."
        ) from error


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, the second and later of equal ones numbered."""
    return [name if (n := names[: i + 1].count(name)) == 1 else f"{name} {n}" for i, name in enumerate(names)]


def _space(voxel_nm: ZYX, *, channels: bool = False) -> Any:
    """Axes of an array; a name that ends in ``^`` makes a channel axis, which a shader sees as a whole."""
    from neuroglancer import CoordinateSpace

    names, units, scales = ["z", "y", "x"], ["nm"] * 3, list(voxel_nm)
    if channels:
        names, units, scales = ["c^", *names], ["", *units], [1, *scales]
    return CoordinateSpace(names=names, units=units, scales=scales)


def _neuroglancer_layer(layer: Layer) -> Any:
    import neuroglancer

    size = voxel_size(layer.voxel_nm)
    volume = neuroglancer.LocalVolume(
        _Served(layer.array, layer.kind),
        dimensions=_space(size, channels=layer.kind == "affinities"),
        volume_type="segmentation" if layer.kind == "labels" else "image",
    )
    if layer.kind == "labels":
        return neuroglancer.SegmentationLayer(source=volume)
    if layer.kind == "affinities":
        return neuroglancer.ImageLayer(source=volume, shader=_AFFINITY_SHADER, opacity=0.6)
    return neuroglancer.ImageLayer(source=volume, shader=_GREY_SHADER if _is_float(layer.array) else "")


def _is_float(array: ArrayLike) -> bool:
    return np.dtype(array.dtype).kind == "f"
