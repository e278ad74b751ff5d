"""Affinities of an image of any size, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..convolution import use_sound_convolutions
from ..engine import resolve_precision
from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import Box, blend_window, tile_starts, tiles
from ..memory import kept_memory
from ..progress import progress
from .augmented import predict_in_all_poses


class ImageLike(Protocol):
    """Image in [0, 1], (z, y, x), in memory or read from disk when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in voxels, (z, y, x)."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """Part of the image."""


class WritableAffinities(Protocol):
    """Float array (3, z, y, x) that can be read and written in parts: a numpy array or an HDF5 dataset."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, z, y, x)."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """Part of the affinities."""

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        """Replace a part."""


@kept_memory()
def predict_affinities(
    network: nn.Module,
    image: ImageLike,
    *,
    tile: Sequence[int],
    overlap: Sequence[int],
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    batch: int = 1,
    flip_augmentation: bool = False,
    out: WritableAffinities | None = None,
    label: str = "predict",
) -> WritableAffinities:
    """Predict the affinities of a volume in overlapping tiles, blended without seams.

    Parameters
    ----------
    network : torch.nn.Module
        Segmenter: image (b, 1, z, y, x) -> logits (b, 3, z, y, x). Used in evaluation mode, its mode is restored.
    image : array-like
        (z, y, x), values in [0, 1], any size; only one tile at a time is read.
    tile, overlap : sequence of 3 ints
        Tile size and least overlap of neighbours, voxels (z, y, x). An axis shorter than its tile is reflected up to
        it.
    precision : {"fp32", "bf16", "auto"}
        What the network computes in; results are float32.
    device : str or torch.device
        Where the network runs.
    batch : int
        Tiles per forward pass.
    flip_augmentation : bool
        Average over the 16 flips and transposes of each tile (16 times the work).
    out : writable array, optional
        Where the affinities go, e.g. an HDF5 dataset (3, z, y, x) for a volume larger than memory; else a new array.
    label : str
        Name on the progress bar.

    Returns
    -------
    numpy.ndarray or `out`
        (3, z, y, x) in [0, 1], float32 unless `out` has another type; channels z, y, x, edges at their destination.

    Raises
    ------
    ValueRangeError
        If the image is not finite or leaves [0, 1], the tiling is impossible, or the network's output is not finite.
    ShapeMismatch
        If the image has not three axes, or `out` or the network's output not the right shape.
    """
    shape = _check_request(image, tile, overlap, batch, out)
    affinities: WritableAffinities = np.empty((3, *shape), dtype=np.float32) if out is None else out
    for slab in check_values(image, tile[0]):
        affinities[:, slab] = np.zeros((3, slab.stop - slab.start, *shape[1:]), dtype=np.float32)
    weights = [_axis_weights(n, t, o) for n, t, o in zip(shape, tile, overlap, strict=True)]
    dtype = resolve_precision(precision, device)
    was_training = network.training
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # a third less time on the CPU
    network.to(device).eval()
    use_sound_convolutions(network)

    def predict_tile(images: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            logits = network(images)
        return torch.sigmoid(logits.float())

    boxes = tiles(shape, tile, overlap)
    try:
        with torch.inference_mode():
            for group in _batches(progress(boxes, label=label), batch):
                images = np.stack([_read_tile(image, box, tile) for box in group])[:, None]
                predicted = _run(predict_tile, torch.from_numpy(images).to(device), flip_augmentation)
                for box, prediction in zip(group, predicted, strict=True):
                    _accumulate(affinities, box, prediction, weights)
    finally:
        network.train(was_training)
    return affinities


def _check_request(
    image: ImageLike, tile: Sequence[int], overlap: Sequence[int], batch: int, out: WritableAffinities | None
) -> tuple[int, int, int]:
    """Shape of the image, if everything fits together."""
    if len(image.shape) != 3 or 0 in image.shape:
        raise ShapeMismatch(f"An image has three axes (z, y, x), none empty. Got shape {tuple(image.shape)}.")
    if len(tile) != 3 or len(overlap) != 3 or any(t < 1 or not 0 <= o < t for t, o in zip(tile, overlap, strict=True)):
        raise ValueRangeError(
            f"Tile and overlap need three values, 0 <= overlap < tile. Got {tuple(tile)} and {tuple(overlap)}."
        )
    if batch < 1:
        raise ValueRangeError(f"The batch must be at least 1. Got {batch}.")
    z, y, x = image.shape
    if out is not None and tuple(out.shape) != (3, z, y, x):
        raise ShapeMismatch(f"Affinities of this image have the shape {(3, z, y, x)}. Got {tuple(out.shape)}.")
    return z, y, x


def check_values(image: ImageLike, sections: int) -> Iterator[slice]:
    """Read an image some sections at a time, and yield which, once they are known to be in [0, 1].

    Raises
    ------
    ValueRangeError
        If a value is not finite or leaves [0, 1].
    """
    for start in range(0, image.shape[0], sections):
        slab = slice(start, min(start + sections, image.shape[0]))
        part = np.asarray(image[slab])
        lowest, highest = part.min(), part.max()
        if not (lowest >= 0 and highest <= 1):  # written so that NaN is refused too
            raise ValueRangeError(
                f"An image must be finite and in [0, 1]. Got {lowest:.3g} to {highest:.3g} in sections {slab.start} to "
                f"{slab.stop - 1}."
            )
        yield slab


def _batches(boxes: Any, size: int) -> Iterator[list[Box]]:
    for _, group in groupby(enumerate(boxes), key=lambda item: item[0] // size):
        yield [box for _, box in group]


def _read_tile(image: ImageLike, box: Box, tile: Sequence[int]) -> np.ndarray:
    """One tile, float32, reflected at its end up to the tile size."""
    part = np.asarray(image[box.slices], dtype=np.float32)
    missing = [(0, max(0, t - n)) for t, n in zip(tile, part.shape, strict=True)]
    return np.pad(part, missing, mode="reflect")


def _run(predict: Callable[[Tensor], Tensor], images: Tensor, flip_augmentation: bool) -> np.ndarray:
    """Affinities (b, 3, z, y, x) of a batch of tiles (b, 1, z, y, x)."""
    predicted = predict_in_all_poses(predict, images) if flip_augmentation else predict(images)
    wanted = (len(images), 3, *images.shape[2:])
    if tuple(predicted.shape) != wanted:
        raise ShapeMismatch(f"The network must return affinities of shape {wanted}. Got {tuple(predicted.shape)}.")
    if not torch.isfinite(predicted).all():
        raise ValueRangeError("The network's output must be finite. Got NaN or infinity: its training has diverged.")
    return predicted.cpu().numpy()


def _axis_weights(size: int, tile: int, overlap: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Blending weights along one axis, by first voxel of the tile.

    The sum over tiles is one at each voxel. As tiles form a grid and the blend window is a product of axes, so are
    the normalised weights: no volume of weights has to be kept.

    Returns
    -------
    dict
        start -> (weights of the other axes' edges, weights of this axis' edges). The second leaves out the tile's first
        plane wherever an earlier tile covers it: the edge there leads out of the tile, the network cannot see it.
    """
    starts = tile_starts(size, tile, overlap)
    extent = min(size, tile)
    window = blend_window((1, 1, extent)).ravel().astype(np.float64)
    inner = window.copy()
    inner[0] = 0.0
    totals = np.zeros((2, size))
    raw = {}
    for start in starts:
        covered_before = any(other < start < other + extent for other in starts)
        raw[start] = np.stack([window, inner if covered_before else window])
        totals[:, start : start + extent] += raw[start]
    normalised = {start: pair / totals[:, start : start + extent] for start, pair in raw.items()}
    return {start: (pair[0].astype(np.float32), pair[1].astype(np.float32)) for start, pair in normalised.items()}


def _accumulate(
    affinities: WritableAffinities,
    box: Box,
    prediction: np.ndarray,
    weights: Sequence[dict[int, tuple[np.ndarray, np.ndarray]]],
) -> None:
    """Add one tile's weighted share; `prediction` is (3, z, y, x), at least as large as the box."""
    depth, height, width = box.shape
    target = (slice(None), *box.slices)
    share = np.array(prediction[:, :depth, :height, :width])
    for channel in range(3):
        wz, wy, wx = (weights[axis][box.start[axis]][int(axis == channel)] for axis in range(3))
        share[channel] *= wz[:, None, None] * wy[:, None] * wx
    # Rounding may carry a sum of ones a hair above 1.
    affinities[target] = np.minimum(affinities[target] + share, 1.0)
