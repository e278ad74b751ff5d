"""Grey values inside the diffusion model: centred, with unit variance, by a scale of each volume's own.

The noise of a diffusion process has unit variance. Images on [-1, 1] have a standard deviation of .2 to .4: against the
same noise they are two to five times fainter, and the velocity, the image at the noisiest steps, weighs as much less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoints import Checkpoint
from ..errors import CheckpointMismatch, ValueRangeError
from ..geometry import voxel_size

#: A volume whose standard deviation is below half a grey level of uint8 shows nothing.
_LEAST_STD = 0.5 / 255


@dataclass(frozen=True)
class GreyScale:
    """The linear map between grey values in [0, 1] and the scale of the diffusion model.

    Attributes
    ----------
    mean, std : float
        Grey values that become 0 and, from there, 1; std > 0. The default is the published scale, [-1, 1].
    """

    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueRangeError(f"A grey scale has a finite mean and a finite std > 0. Got {self.mean}, {self.std}.")

    @property
    def limits(self) -> tuple[float, float]:
        """Values of black and white on the scale of the model."""
        return -self.mean / self.std, (1 - self.mean) / self.std

    def to_model(self, image: np.ndarray) -> np.ndarray:
        """Grey values on the scale of the model, in the type of `image`."""
        return (image - self.mean) / self.std

    def to_grey(self, values: np.ndarray) -> np.ndarray:
        """Grey values in [0, 1], clipped, from values of the model."""
        return np.clip(np.asarray(values) * self.std + self.mean, 0, 1)


def grey_scale_of(image: np.ndarray) -> GreyScale:
    """The scale on which an image is centred and has unit variance.

    Raises
    ------
    ValueRangeError
        If the image is constant.
    """
    std = float(image.std(dtype=np.float64))
    if std < _LEAST_STD:
        raise ValueRangeError(
            f"A training image must show something: standard deviation of at least {_LEAST_STD:.2g} of the grey range. "
            f"Got {std:.2g}."
        )
    return GreyScale(float(image.mean(dtype=np.float64)), std)


def recorded_scales(scales: Sequence[GreyScale], voxel_nm: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The scales of the volumes that a denoiser was trained on, as a checkpoint keeps them."""
    return [
        {"mean": scale.mean, "std": scale.std, "voxel_nm": [float(n) for n in size]}
        for scale, size in zip(scales, voxel_nm, strict=True)
    ]


def grey_scale_for(checkpoint: Checkpoint, voxel_nm: Sequence[float] | None) -> GreyScale:
    """The grey scale of the volume that a denoiser was trained on whose voxels are most like these.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of a denoiser.
    voxel_nm : sequence of 3 floats or None
        Voxel size of the masks, nm. Of volumes alike in it the first is taken: the train part; so it is for None.

    Raises
    ------
    CheckpointMismatch
        If the checkpoint says nothing of its grey values, as those of older versions, or nonsense.
    ValueRangeError
        If the voxel size is not three positive numbers.
    """
    wanted = None if voxel_nm is None else voxel_size(voxel_nm)
    recorded = checkpoint.extra.get("grey_scales")
    if not recorded:
        raise CheckpointMismatch(
            "This denoiser does not say which grey values it was trained on: it was made by an older version, on "
            "another scale. Train it again."
        )
    try:
        return min((_entry(entry, wanted) for entry in recorded), key=lambda found: found[0])[1]
    except (KeyError, TypeError, ValueError, AttributeError, ValueRangeError) as error:
        raise CheckpointMismatch(
            f"The denoiser's checkpoint is damaged: its grey_scales must be mean, std and voxel_nm per volume. "
            f"Got {recorded!r}."
        ) from error


def _entry(entry: Mapping[str, Any], voxel_nm: Sequence[float] | None) -> tuple[float, GreyScale]:
    """How far a recorded volume's voxels are from these, in logarithms, and its scale."""
    voxel_nm = entry["voxel_nm"] if voxel_nm is None else voxel_nm
    apart = sum(abs(math.log(a / b)) for a, b in zip(entry["voxel_nm"], voxel_nm, strict=True))
    return round(apart, 6), GreyScale(float(entry["mean"]), float(entry["std"]))
