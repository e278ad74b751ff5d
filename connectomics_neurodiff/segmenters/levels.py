"""Levels of U-shaped networks: their steps from options, and images of any size for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from ..errors import ShapeMismatch, ValueRangeError

Size = tuple[int, int, int]
_NUMBERS = {2: "two", 3: "three"}


def level_factors(network: str, filters: Sequence[int], z_pool: Sequence[bool], *, least: int, step: str) -> list[Size]:
    """Factor (z, y, x) of every step from a level to the next: 2 in the plane, and along z where `z_pool` says so.

    Parameters
    ----------
    network, step : str
        Names for the messages: the network's, and what it calls a step.
    filters : sequence of int
        Feature maps per level.
    z_pool : sequence of bool
        One entry per step.
    least : {2, 3}
        Levels that the network needs.

    Raises
    ------
    ValueRangeError
        For fewer levels, filters below 1, or a `z_pool` of another length.
    """
    if len(filters) < least or min(filters) < 1:
        raise ValueRangeError(
            f"{network} needs filters >= 1 on at least {_NUMBERS[least]} levels. Got {list(filters)}."
        )
    if len(z_pool) != len(filters) - 1:
        raise ValueRangeError(
            f"{network} needs one z_pool per {step}, {len(filters) - 1} for {len(filters)} filters. Got {len(z_pool)}."
        )
    return [(2 if halve else 1, 2, 2) for halve in z_pool]


def check_image(image: Tensor, channels: int) -> None:
    """Refuse what is no batch of images.

    Raises
    ------
    ShapeMismatch
        Unless it has the axes (b, `channels`, z, y, x), none empty.
    """
    if image.ndim != 5 or image.shape[1] != channels or 0 in image.shape:
        raise ShapeMismatch(
            f"A segmenter takes images (b, {channels}, z, y, x), no axis empty. Got shape {tuple(image.shape)}."
        )


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
