"""Neurons straight from a segmenter that tells them apart itself: block by block, stitched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShapeMismatch, ValueRangeError
from .blockwise import Readable, segment_blockwise
from .stitching import WritableLabels

if TYPE_CHECKING:
    import torch
    from torch import nn


def segment_image(
    network: nn.Module,
    image: Readable,
    *,
    block: Sequence[int],
    overlap: Sequence[int],
    precision: str = "auto",
    device: str | torch.device = "cpu",
    smallest_area: float = 40.0,
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
    block, overlap, out, scratch
        See :func:`.stitch_blocks`, by which the instances of the blocks are joined.
    precision : {"fp32", "bf16", "auto"}
        What the network computes in.
    device : str or torch.device
        Where the network runs.
    smallest_area : float
        Instances of less probability mass, in voxels of the network's working grid, are dropped, >= 0.
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
        return labels

    return segment_blockwise(segment_block, image, block=block, overlap=overlap, out=out, scratch=scratch, label=label)
