"""From the logits of masks to labels."""

from __future__ import annotations

import torch
from scipy.ndimage import find_objects
from torch import Tensor

from ...errors import ValueRangeError
from .backbone import Size, resize


def enlarge(values: Tensor, stride: Size, size: Size) -> Tensor:
    """Values (b, c, z', y', x') of the working grid at all voxels, (b, c, *size); grid point i is voxel stride * i."""
    full = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], stride, strict=True)]
    z, y, x = size
    return resize(values, full)[..., :z, :y, :x]


def labels_from_masks(masks: Tensor, background: Tensor, stride: Size, size: Size, smallest_area: float) -> Tensor:
    """The most probable query of each voxel; each is sought in the box around the grid points where it is that.

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
    # Enlarging every query everywhere costs as much as the network. Between grid points that others win, a query could
    # still be the largest, by a hair and for a voxel: that is given up.
    for channel, box in enumerate(find_objects(probabilities.argmax(dim=0).cpu().numpy() + 1)):
        if box is None:
            continue
        around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        starts = [side.start * step for side, step in zip(around, stride, strict=True)]
        reach = [
            min((n - 1) * step + 1, end - start)
            for n, step, end, start in zip(probabilities[channel][around].shape, stride, size, starts, strict=True)
        ]
        if min(reach) < 1:  # beyond the image's far end
            continue
        z, y, x = reach
        value = enlarge(probabilities[None, channel : channel + 1, *around], stride, (z, y, x))[0, 0]
        here = tuple(slice(start, start + n) for start, n in zip(starts, reach, strict=True))
        better = value > best[here]
        label[here] = torch.where(better, channel, label[here])
        best[here] = torch.where(better, value, best[here])
    return label
