"""Images of any size for networks that halve theirs a fixed number of times."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def pad_to_multiple(image: Tensor, multiple: Sequence[int], least: Sequence[int] = (1, 1, 1)) -> Tensor:
    """Repeat the far border until every axis is a multiple.

    Parameters
    ----------
    image : torch.Tensor
        (b, c, z, y, x).
    multiple, least : sequence of 3 ints
        (z, y, x): what the sizes must be multiples of, and the least that they must be (a multiple itself, or 1).

    Returns
    -------
    torch.Tensor
        (b, c, z', y', x'); the image itself if it fits. What was added is at the far ends: crop with
        ``[..., :z, :y, :x]``.
    """
    sizes = image.shape[2:]
    missing = [max(-n % m, low - n) for n, m, low in zip(sizes, multiple, least, strict=True)]
    if not any(missing):
        return image
    return functional.pad(image, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
