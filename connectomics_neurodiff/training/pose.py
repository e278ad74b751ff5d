"""Flips, transposes and quarter turns of a patch: the augmentations that only rename voxels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pose(NamedTuple):
    """Exchange of y and x first, then mirroring of axes z, y, x of the result."""

    exchange_yx: bool
    flip: tuple[bool, bool, bool]


def draw_pose(rng: np.random.Generator, *, flip: float, transpose: float, rotate: float) -> Pose:
    """Random pose.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    flip : float
        Probability that an axis is mirrored, for each axis by itself.
    transpose : float
        Probability that y and x are exchanged.
    rotate : float
        Probability of a further turn by 90 degrees in the plane.
    """
    z, y, x = (bool(hit) for hit in rng.random(3) < flip)
    exchange = bool(rng.random() < transpose)
    if rng.random() < rotate:
        # A quarter turn exchanges the axes and mirrors the new y; the mirrorings drawn so far change places.
        exchange, y, x = not exchange, not x, y
    return Pose(exchange, (z, y, x))


def apply_pose(array: np.ndarray, pose: Pose) -> np.ndarray:
    """A (z, y, x) array in that pose; a view."""
    turned = array.swapaxes(1, 2) if pose.exchange_yx else array
    z, y, x = (slice(None, None, -1 if mirrored else 1) for mirrored in pose.flip)
    return turned[z, y, x]


def source_box(
    start: tuple[int, int, int], patch: tuple[int, int, int], pose: Pose
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Where to read so that, in that pose, the patch has one more plane in front on each axis.

    Parameters
    ----------
    start : tuple of int
        First voxel of the patch in the volume.
    patch : tuple of int
        Shape of the patch in the pose, (z, y, x).
    pose : Pose
        How it will be turned.

    Returns
    -------
    start, shape : tuple of int
        Box in the volume, one voxel larger than the patch on each axis: on the low side where the axis is kept,
        on the high side where it is mirrored, for there the front of the turned patch comes from. It may reach outside.
    """
    flips = pose.flip if not pose.exchange_yx else (pose.flip[0], pose.flip[2], pose.flip[1])
    shape = patch if not pose.exchange_yx else (patch[0], patch[2], patch[1])
    z, y, x = (s if mirrored else s - 1 for s, mirrored in zip(start, flips, strict=True))
    return (z, y, x), (shape[0] + 1, shape[1] + 1, shape[2] + 1)
