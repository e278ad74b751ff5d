"""Test-time augmentation for PyTC v1 that is right for affinities.

PyTC mirrors the image and mirrors the prediction back. An affinity lies between two voxels: mirrored, it is stored at
the other one, and exchanging y and x exchanges two channels. PyTC does neither: errors of up to .75 on perfect ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from connectomics.data.augmentation import TestAugmentor
from torch import Tensor
from yacs.config import CfgNode

from ...predict.augmented import turn_back, turn_image
from ...training.pose import Pose

AFFINITY = "2"


def poses_of(number: int | None) -> list[Pose]:
    """The poses behind PyTC's INFERENCE.AUG_NUM: none, 4 (y and x mirrored), 8 (and exchanged), 16 (and z mirrored)."""
    both, only = (False, True), (False,)
    exchange = both if number in (8, 16) else only
    in_plane = both if number in (4, 8, 16) else only
    through = both if number == 16 else only
    return [Pose(e, (z, y, x)) for e, z, y, x in product(exchange, through, in_plane, in_plane)]


class AffinityTestAugmentor(TestAugmentor):  # type: ignore[misc]  # PyTC has no types
    """PyTC's test-time augmentor, with every affinity brought back to its voxel and its channel.

    Parameters
    ----------
    plain : TestAugmentor
        PyTC's augmentor, built from the configuration.
    targets : sequence of str
        MODEL.TARGET_OPT; "2" is an affinity of three channels.
    channels : sequence of int
        Channels of each target.
    """

    def __init__(self, plain: TestAugmentor, targets: Sequence[str], channels: Sequence[int]) -> None:
        self.__dict__.update(plain.__dict__)
        starts = np.cumsum([0, *channels])
        self.affinity_channels = [
            slice(int(start), int(start) + 3) for start, name in zip(starts, targets, strict=False) if name == AFFINITY
        ]

    @classmethod
    def build_from_cfg(cls, cfg: CfgNode, activation: bool = True) -> TestAugmentor:
        """What PyTC's trainer calls: this augmentor for volumes with affinities, else PyTC's own."""
        plain = TestAugmentor.build_from_cfg(cfg, activation)
        if AFFINITY not in cfg.MODEL.TARGET_OPT or cfg.DATASET.DO_2D:
            return plain
        return cls(plain, cfg.MODEL.TARGET_OPT, plain.inference_act.split_channels)

    def _tta_3d(self, model: Any, data: Tensor) -> np.ndarray:
        """Predictions (b, c, z, y, x) in all poses, joined by mean, minimum or maximum of those that know."""
        joined, known_in = self._neutral, torch.zeros(())
        for pose in poses_of(self.num_aug):
            with torch.no_grad():
                output = model(turn_image(data, pose))
            output = output if isinstance(output, Tensor) else next(iter(output.values()))
            upright, known = self._turned_back(self.inference_act(output).detach().cpu().float(), pose)
            joined, known_in = self._joined(joined, upright, known), known_in + known
        result = (joined / known_in if self.mode == "mean" else joined).numpy()
        if any(factor != 1 for factor in self.scale_factors):
            result = _resized(result, self.scale_factors)
        return result

    def _turned_back(self, output: Tensor, pose: Pose) -> tuple[Tensor, Tensor]:
        upright = output.flip([axis + 2 for axis, mirrored in enumerate(pose.flip) if mirrored])
        upright = upright.transpose(3, 4) if pose.exchange_yx else upright
        upright, known = upright.clone(), torch.ones(upright.shape[1:])
        for channels in self.affinity_channels:
            upright[:, channels], known[channels] = turn_back(output[:, channels], pose)
        return upright, known

    @property
    def _neutral(self) -> Tensor:
        """What joining leaves everything as it is with."""
        return torch.tensor({"mean": 0.0, "min": float("inf"), "max": float("-inf")}[self.mode])

    def _joined(self, joined: Tensor, upright: Tensor, known: Tensor) -> Tensor:
        """One pose more; where it does not know an edge it changes nothing."""
        upright = torch.where(known > 0, upright, self._neutral)
        join: Any = {"mean": torch.add, "min": torch.minimum, "max": torch.maximum}[self.mode]
        result: Tensor = join(joined, upright)
        return result


def _resized(result: np.ndarray, factors: Sequence[float]) -> np.ndarray:
    """Resampled in space, as PyTC does for INFERENCE.OUTPUT_SCALE."""
    from skimage.transform import resize

    shape = np.ceil(np.array(result.shape) * np.array([1.0, 1.0, *factors])).astype(int)
    resampled: np.ndarray = resize(result, shape, order=1, preserve_range=True, anti_aliasing=True)
    return resampled
