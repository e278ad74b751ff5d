"""Training samples of the denoiser: augmented crops with their condition, a diffusion step, and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..conditions import NULL_CONDITION, encode_condition, membrane_from_labels, organelles, with_background
from ..errors import MissingInput, UnknownName, ValueRangeError, did_you_mean
from ..seeding import rng_for
from ..volume import Volume
from .grey import GreyScale, grey_scale_of
from .nets.resolution import UNKNOWN_NM
from .process import DiffusionProcess

#: How several volumes share the samples: in proportion to their voxels, or alike.
SHARES = ("voxels", "equal")


class DiffusionCrops:
    """Endless training samples; item i is a pure function of (seed, i).

    Parameters
    ----------
    volumes : sequence of Volume
        In memory, with image and label; of mitochondria and what else is dark, what is there. Voxel sizes may differ.
        One without a label, which nobody has annotated, is learnt without masks: :data:`.NULL_CONDITION` everywhere.
    patch : sequence of 3 ints
        Crop in voxels (z, y, x). An axis that is shorter in the volume is reflected up to it.
    seed : int
        Seed of positions, augmentation, steps and noise.
    process : DiffusionProcess
        Where the steps t and the noise levels come from.
    thickness_nm : float
        Width of the membrane condition.
    flips, transpose : bool
        Mirror every axis, and exchange y and x (square patches only), each with probability 1/2.
    intensity_jitter : float
        Largest relative change of contrast and absolute change of brightness, [0, 1] units. Small on purpose: what
        varies in training varies in the synthetic images.
    share : {"voxels", "equal"}
        How often each volume is drawn: in proportion to its voxels, or all alike, so that a small one is not starved.
    annotated : int
        So many of the volumes, the first ones, have masks that people made. They are drawn at least half of the time,
        however large the others are; 0: all volumes have.
    condition_dropout : float
        Probability in [0, 1) of a sample without masks: :data:`.NULL_CONDITION` everywhere. What classifier-free
        guidance needs; .1 to .2 as published (Ho and Salimans 2022).
    voxel_size_dropout : float
        Probability in [0, 1) of a sample without voxel size: three zeros.
    noise_mean, noise_spread : float
        Which noise levels are drawn, see :meth:`.DiffusionProcess.level_shares`.

    Attributes
    ----------
    scales : list of GreyScale
        Scale of each volume: on it the volume is centred and has unit variance.

    Raises
    ------
    MissingInput
        If there is no volume, one lacks its image, or all their labels.
    ValueRangeError
        If the patch is not three sizes >= 1, a probability not in [0, 1), or an image constant.
    UnknownName
        If there is no such share.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        patch: Sequence[int],
        seed: int,
        process: DiffusionProcess,
        *,
        thickness_nm: float,
        flips: bool = True,
        transpose: bool = True,
        intensity_jitter: float = 0.02,
        share: str = "voxels",
        annotated: int = 0,
        condition_dropout: float = 0.0,
        voxel_size_dropout: float = 0.0,
        noise_mean: float = 0.0,
        noise_spread: float = 0.0,
    ) -> None:
        if len(patch) != 3 or min(patch) < 1:
            raise ValueRangeError(f"A crop has three sizes >= 1, (z, y, x). Got {tuple(patch)}.")
        if any(v.image is None for v in volumes) or all(v.label is None for v in volumes):
            raise MissingInput("Diffusion training needs volumes with image and label.")
        if share not in SHARES:
            raise UnknownName(f"No share '{share}'.{did_you_mean(share, SHARES)} Known: {', '.join(SHARES)}.")
        if not (0 <= condition_dropout < 1 and 0 <= voxel_size_dropout < 1):
            raise ValueRangeError(
                f"Dropouts are probabilities in [0, 1). Got {condition_dropout} of the condition and "
                f"{voxel_size_dropout} of the voxel size."
            )
        self.patch, self.seed, self.process = tuple(patch), seed, process
        self.flips, self.transpose, self.intensity_jitter = flips, transpose, intensity_jitter
        self._voxel_nm = [np.asarray(v.voxel_nm, np.float32) for v in volumes]
        self._images = [self._at_least_patch(np.asarray(v.image, np.float32)) for v in volumes]
        self.scales: list[GreyScale] = [grey_scale_of(np.asarray(v.image)) for v in volumes]
        self._level_shares = process.level_shares(noise_mean, noise_spread) if noise_spread else None
        self._conditions = [self._condition_of(v, thickness_nm) for v in volumes]
        self.condition_dropout, self.voxel_size_dropout = condition_dropout, voxel_size_dropout
        sizes = np.array([image.size if share == "voxels" else 1 for image in self._images], dtype=np.float64)
        self._share = _at_least_half(sizes / sizes.sum(), annotated)

    def _at_least_patch(self, array: np.ndarray) -> np.ndarray:
        """Reflect the last three axes up to the patch where they are shorter."""
        lacking = [max(p - n, 0) for p, n in zip(self.patch, array.shape[-3:], strict=True)]
        if not any(lacking):
            return array
        return np.pad(array, [(0, 0)] * (array.ndim - 3) + [(0, n) for n in lacking], mode="symmetric")

    def _condition_of(self, volume: Volume, thickness_nm: float) -> np.ndarray:
        if volume.label is None:
            shape = (2, *self._at_least_patch(volume.array("image")).shape)
            return np.broadcast_to(np.float16(NULL_CONDITION), shape)
        label = np.asarray(volume.label)
        membrane = with_background(membrane_from_labels(label, volume.voxel_nm, thickness_nm), label)
        inside = organelles(volume.mito_array, volume.dark_array)
        return self._at_least_patch(encode_condition(membrane, inside).astype(np.float16))  # half of the memory

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`: noisy, target (1, z, y, x), t, condition (2, z, y, x), voxel_nm (3,)."""
        rng = rng_for(self.seed, "diffusion", index)
        which = int(rng.choice(len(self._images), p=self._share))
        image, condition = self._images[which], self._conditions[which]
        corner = [int(rng.integers(n - p + 1)) for n, p in zip(image.shape, self.patch, strict=True)]
        cut = tuple(slice(c, c + p) for c, p in zip(corner, self.patch, strict=True))
        stack = np.concatenate([image[cut][None], condition[(slice(None), *cut)]]).astype(np.float32)
        stack, voxel_nm = self._reoriented(stack, self._voxel_nm[which], rng)
        clean = self.scales[which].to_model(self._jittered(stack[:1], rng))
        t = int(rng.choice(self.process.steps, p=self._level_shares))
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        condition, voxel_nm = self._dropped(stack[1:], voxel_nm, index)
        return {
            "noisy": self.process.add_noise(clean, t, noise),
            "target": self.process.target(clean, t, noise),
            "t": np.asarray(t, np.int64),
            "condition": np.ascontiguousarray(condition),
            "voxel_nm": voxel_nm,
        }

    def _reoriented(
        self, stack: np.ndarray, voxel_nm: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mirrored and transposed (c, z, y, x), and the voxel size along its axes."""
        if self.flips:
            stack = np.flip(stack, tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5))
        if self.transpose and self.patch[1] == self.patch[2] and rng.random() < 0.5:
            stack, voxel_nm = stack.swapaxes(2, 3), voxel_nm[[0, 2, 1]]
        return stack, voxel_nm

    def _dropped(self, condition: np.ndarray, voxel_nm: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Condition and voxel size, or what stands for none of them; drawn apart, so that all else stays as it is."""
        rng = rng_for(self.seed, "dropout", index)
        if rng.random() < self.condition_dropout:
            condition = np.full_like(condition, NULL_CONDITION)
        if rng.random() < self.voxel_size_dropout:
            voxel_nm = np.full_like(voxel_nm, UNKNOWN_NM)
        return condition, voxel_nm

    def _jittered(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        contrast, brightness = rng.uniform(-self.intensity_jitter, self.intensity_jitter, 2).astype(np.float32)
        return np.clip(image * (1 + contrast) + brightness, 0, 1)


def _at_least_half(share: np.ndarray, first: int) -> np.ndarray:
    """Shares of which the first so many make at least a half."""
    of_first = share[:first].sum()
    if not 0 < of_first < 0.5:
        return share
    return np.concatenate([share[:first] / of_first, share[first:] / (1 - of_first)]) / 2
