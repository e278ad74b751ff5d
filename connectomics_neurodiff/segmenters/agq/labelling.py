"""From the logits of masks to labels."""

from __future__ import annotations

import torch
from scipy.ndimage import find_objects
from torch import Tensor

from ...errors import ValueRangeError
from .backbone import Size, resize
from .masks import QueryMasks, split


def enlarge(values: Tensor, stride: Size, size: Size) -> Tensor:
    """Values (b, c, z', y', x') of the working grid at all voxels, (b, c, *size); grid point i is voxel stride * i."""
    full = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], stride, strict=True)]
    z, y, x = size
    return resize(values, full)[..., :z, :y, :x]


def labels_from_masks(masks: QueryMasks, stride: Size, size: Size, smallest_area: float) -> Tensor:
    """The most probable query of each voxel; each is sought in the box around the grid points where it is that.

    Parameters
    ----------
    masks : QueryMasks
        Of one sample. The softmax of their logits and the background's gives the probabilities.
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
    winner, normaliser, kept = _winners(masks, smallest_area)
    number = kept.cumsum(0) - 1
    best = normaliser.new_full(size, -1.0)
    label = torch.zeros(size, dtype=torch.int64, device=best.device)
    # Enlarging every query everywhere costs as much as the network. Between grid points that others win, a query could
    # still be the largest, by a hair and for a voxel: that is given up.
    for channel, box in enumerate(find_objects(winner.cpu().numpy() + 1)):
        if box is None:
            continue
        around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        starts = [side.start * step for side, step in zip(around, stride, strict=True)]
        reach = [
            min((n - 1) * step + 1, end - start)
            for n, step, end, start in zip(normaliser[around].shape, stride, size, starts, strict=True)
        ]
        if min(reach) < 1:  # beyond the image's far end
            continue
        z, y, x = reach
        logits = masks.logits_of(channel - 1, around) if channel else masks.background[around]
        value = enlarge((logits - normaliser[around]).exp()[None, None], stride, (z, y, x))[0, 0]
        here = tuple(slice(start, start + n) for start, n in zip(starts, reach, strict=True))
        better = value > best[here]
        label[here] = torch.where(better, number[channel], label[here])
        best[here] = torch.where(better, value, best[here])
    return label


def _winners(masks: QueryMasks, smallest_area: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of every grid point the most probable channel of those that are kept (0 the background, i + 1 query i), and the
    logarithm of what the exponentials of all channels sum to; and which channels (1 + q,) are kept."""
    area = masks.kernels.new_zeros(1 + len(masks.kernels))
    winner = torch.zeros(masks.background.numel(), dtype=torch.int64, device=area.device)
    normaliser = torch.zeros_like(winner, dtype=area.dtype)
    for piece in masks.pieces():
        logits = masks.logits_with_background(piece)
        if not torch.isfinite(logits).all():
            raise ValueRangeError(
                "The network's output must be finite. Got NaN or infinity: its training has diverged."
            )
        probabilities = logits.softmax(dim=1)
        area += probabilities.sum(dim=0)
        value, winner[piece] = probabilities.max(dim=1)
        normaliser[piece] = logits.gather(1, winner[piece, None])[:, 0] - value.log()
    kept = area >= smallest_area
    kept[0] = True
    (contested,) = torch.nonzero(~kept[winner], as_tuple=True)
    for voxels in split(contested):
        winner[voxels] = masks.logits_with_background(voxels).masked_fill(~kept, -torch.inf).argmax(dim=1)
    grid = masks.background.shape
    return winner.unflatten(0, grid), normaliser.unflatten(0, grid), kept
