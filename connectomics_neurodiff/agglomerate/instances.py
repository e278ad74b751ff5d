"""Neurons straight from a segmenter that tells them apart itself: block by block, stitched."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LabelTypeError, ShapeMismatch, ValueRangeError
from .blockwise import Readable, segment_blockwise
from .stitching import WritableLabels

if TYPE_CHECKING:
    import torch
    from torch import nn


def grow_labels(labels: np.ndarray, growth: Sequence[int]) -> np.ndarray:
    """Give background next to instances to the nearest of them.

    Parameters
    ----------
    labels : numpy.ndarray
        (z, y, x) integers >= 0, 0 = background.
    growth : sequence of 3 ints
        Half sides (z, y, x) in voxels, >= 0, of the box around a voxel in which an instance must be seen for the voxel
        to become part of one. Along an axis of 0 nothing grows.

    Returns
    -------
    numpy.ndarray
        (z, y, x) of the same type; the input itself where nothing grows.

    Raises
    ------
    ValueRangeError
        If a size is negative or not whole.
    ShapeMismatch
        If the labels have not three axes.
    LabelTypeError
        If the labels are not integers.
    """
    from scipy.ndimage import distance_transform_edt, maximum_filter

    _check_growth(growth)
    if labels.ndim != 3:
        raise ShapeMismatch(f"Labels have three axes (z, y, x). Got shape {labels.shape}.")
    if labels.dtype.kind not in "iu":
        raise LabelTypeError(f"Labels must be integers >= 0, 0 = background. Got {labels.dtype}.")
    background = labels == 0
    if not any(growth) or not background.any() or background.all():
        return labels
    # No farther than the volume: the filter's memory grows with its size.
    sides = [2 * min(int(n), size) + 1 for n, size in zip(growth, labels.shape, strict=True)]
    reached = maximum_filter(~background, sides, mode="nearest")
    # The nearest by Euclid, in voxels; along axes that do not grow no distance is short enough.
    far = float(sum(labels.shape))
    pitch = [1.0 if n else far for n in growth]
    nearest = distance_transform_edt(background, sampling=pitch, return_distances=False, return_indices=True)
    grown = labels[tuple(nearest)]
    return np.where(background & reached, grown, labels)


def _check_growth(growth: Sequence[int]) -> None:
    sized = isinstance(growth, Sequence) and len(growth) == 3
    if not (sized and all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in growth)):
        raise ValueRangeError(f"Growth is a list of three whole sizes >= 0, (z, y, x). Got {growth!r}.")


def segment_image(
    network: nn.Module,
    image: Readable,
    *,
    block: Sequence[int],
    overlap: Sequence[int],
    precision: str = "auto",
    device: str | torch.device = "cpu",
    smallest_area: float = 40.0,
    growth: Sequence[int] = (0, 0, 0),
    min_fraction: float = 0.5,
    out: WritableLabels | None = None,
    scratch: str | Path | None = None,
    label: str = "instances",
) -> WritableLabels:
    """Segment an image of any size with a network that predicts instances.

    Parameters
    ----------
    network : torch.nn.Module
        With ``segment(image (b, 1, z, y, x), smallest_area) -> labels (b, z, y, x)``, as :class:`.AGQ`. Used in
        evaluation mode, its mode is restored.
    image : array-like
        (z, y, x), values in [0, 1]; one block at a time is read.
    block, overlap, min_fraction, out, scratch
        See :func:`.stitch_blocks`, by which the instances of the blocks are joined.
    precision : {"fp32", "bf16", "auto"}
        What the network computes in.
    device : str or torch.device
        Where the network runs.
    smallest_area : float
        Instances of less probability mass, in voxels of the network's working grid, are dropped, >= 0.
    growth : sequence of 3 ints
        Voxels (z, y, x) by which instances grow over background, >= 0: those that training took from neurons in
        contact. Left as background they count as one segment that touches all neurons: of FIB's labels an erosion by
        one voxel takes 24 %, and what is left has a VOI of 1.97 bits.
    label : str
        Name on the progress bar.

    Returns
    -------
    numpy.ndarray (uint64) or `out`
        (z, y, x), 0 = background, instances 1, 2, ...

    Raises
    ------
    ValueRangeError
        If the network predicts affinities only, the image is not finite or leaves [0, 1], or the network's output is
        not finite; also as :func:`.stitch_blocks`.
    ShapeMismatch
        If the image has not three axes, none empty.
    """
    import torch

    from ..convolution import use_sound_convolutions
    from ..engine import resolve_precision
    from ..predict import check_values

    segment: Any = getattr(network, "segment", None)
    if segment is None:
        raise ValueRangeError(
            f"The segmenter {type(network).__name__} predicts affinities, not instances: agglomerate them with waterz "
            "or multicut."
        )
    if len(image.shape) != 3 or 0 in image.shape:
        raise ShapeMismatch(f"An image has three axes (z, y, x), none empty. Got shape {tuple(image.shape)}.")
    _check_growth(growth)
    if len(block) != 3 or min(block) < 1:
        raise ValueRangeError(f"A block has three sizes >= 1, (z, y, x). Got {tuple(block)}.")
    for _ in check_values(image, block[0]):  # before the first block is computed
        pass
    dtype = resolve_precision(precision, device)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.to(device)
    use_sound_convolutions(network)

    def segment_block(part: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(part.astype(np.float32, copy=False))[None, None].to(device)
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            labels: np.ndarray = segment(pixels, smallest_area)[0].cpu().numpy()
        return grow_labels(labels, growth)

    return segment_blockwise(
        segment_block,
        image,
        block=block,
        overlap=overlap,
        out=out,
        min_fraction=min_fraction,
        scratch=scratch,
        label=label,
    )
