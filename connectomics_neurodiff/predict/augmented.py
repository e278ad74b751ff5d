"""Test-time augmentation that is right for affinities.

An affinity belongs to a pair of voxels. Mirroring an axis turns the pair (v-1, v) round, so the mirrored prediction of
that axis' channel has the edge at v-1 and must move one voxel up to its destination v; exchanging y and x exchanges the
channels y and x. Without both, flips blur every boundary by a voxel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ..training.pose import Pose

#: The 16 symmetries of a stack of sections.
POSES = tuple(Pose(exchange, (z, y, x)) for exchange, z, y, x in product((False, True), repeat=4))


def _mirrored_axes(pose: Pose) -> list[int]:
    """Mirrored axes of a (b, c, z, y, x) tensor."""
    return [axis + 2 for axis, mirrored in enumerate(pose.flip) if mirrored]


def turn_image(image: Tensor, pose: Pose) -> Tensor:
    """The image (b, c, z, y, x) in another pose; the exchange of axes comes first, the mirroring second."""
    turned = image.transpose(3, 4) if pose.exchange_yx else image
    return turned.flip(_mirrored_axes(pose))


def turn_back(affinity: Tensor, pose: Pose) -> tuple[Tensor, Tensor]:
    """Affinities predicted on a turned image, brought back.

    Parameters
    ----------
    affinity : torch.Tensor
        (b, 3, z, y, x) in the turned frame, edges at their destination voxel.
    pose : Pose
        How the image was turned.

    Returns
    -------
    affinity : torch.Tensor
        (b, 3, z, y, x) in the original frame, edges at their destination voxel.
    known : torch.Tensor
        (3, z, y, x), 1 where this pose predicts the edge; 0 on the first plane of a mirrored axis, where it cannot.
    """
    upright = affinity.flip(_mirrored_axes(pose))
    known = torch.ones(upright.shape[1:], dtype=upright.dtype, device=upright.device)
    for axis, mirrored in enumerate(pose.flip):
        if mirrored:
            # roll brings the last plane round to the first, where there is no edge: known is 0 there.
            upright[:, axis] = upright[:, axis].roll(1, dims=axis + 1)
            known[axis].select(axis, 0).zero_()
    if pose.exchange_yx:
        upright = upright.transpose(3, 4)[:, (0, 2, 1)]
        known = known.transpose(2, 3)[(0, 2, 1),]
    return upright, known


def predict_in_all_poses(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Mean of the predictions in all 16 poses, each voxel's over the poses that know its edge.

    Parameters
    ----------
    predict : callable
        Image (b, c, z, y, x) -> affinities (b, 3, z, y, x) in [0, 1].
    image : torch.Tensor
        (b, c, z, y, x).
    """
    total = weight = None
    for pose in POSES:
        affinity, known = turn_back(predict(turn_image(image, pose)), pose)
        total = affinity * known if total is None else total + affinity * known
        weight = known if weight is None else weight + known
    assert total is not None  # POSES is not empty
    assert weight is not None
    return total / weight
