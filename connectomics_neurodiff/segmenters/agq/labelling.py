"""From the logits of masks to labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ValueRangeError
from .backbone import Size, resize

#: Channels that are enlarged at a time; bounds the memory at full resolution.
_CHUNK = 16


def enlarge(values: Tensor, stride: Size, size: Size) -> Tensor:
    """Values (b, c, z', y', x') of the working grid at all voxels, (b, c, *size); grid point i is voxel stride * i."""
    full = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], stride, strict=True)]
    z, y, x = size
    return resize(values, full)[..., :z, :y, :x]


def labels_from_masks(masks: Tensor, background: Tensor, stride: Size, size: Size, smallest_area: float) -> Tensor:
    """The most probable query of each voxel.

    Parameters
    ----------
    masks, background : torch.Tensor
        Logits of one sample on the working grid, (q, z', y', x') and (1, z', y', x').
    stride, size : tuple of 3 ints
        Spacing of the grid in voxels; extent of the result.
    smallest_area : float
        Queries whose probabilities sum to less (in voxels of the grid) are dropped.

    Returns
    -------
    torch.Tensor
        `size`, int64: 0 for background, 1..n for the queries that were kept, in their order.

    Raises
    ------
    ValueRangeError
        If a logit is not finite.
    """
    if not (torch.isfinite(masks).all() and torch.isfinite(background).all()):
        raise ValueRangeError("The network's output must be finite. Got NaN or infinity: its training has diverged.")
    probabilities = torch.cat([background, masks]).float().softmax(dim=0)
    large = probabilities.flatten(1).sum(dim=1) >= smallest_area
    large[0] = True
    probabilities = probabilities[large]
    best = probabilities.new_full(size, -1.0)
    label = torch.zeros(size, dtype=torch.int64, device=masks.device)
    for first in range(0, len(probabilities), _CHUNK):
        value, channel = enlarge(probabilities[None, first : first + _CHUNK], stride, size)[0].max(dim=0)
        better = value > best
        label = torch.where(better, channel + first, label)
        best = torch.where(better, value, best)
    return label
