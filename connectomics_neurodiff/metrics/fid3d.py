"""3D-FID: how far synthetic volumes are from a real one, as a segmenter sees them that was trained on real data only.

As in Heusel et al. 2017 (arXiv:1706.08500), with the deepest features of the segmenter in place of those of an
Inception network, which has seen photographs, not tissue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import Box
from ..memory import kept_memory
from ..progress import progress
from ..seeding import rng_for
from .frechet import bootstrap_interval, frechet_distance

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..predict.affinities import ImageLike

#: The numbers of a :class:`FID3D`, as metrics.json names them.
NAMES = ("fid3d", "fid3d_interval", "fid3d_floor", "fid3d_patches", "fid3d_features")
#: Patches per forward pass; the result does not depend on it.
BATCH = 4


@dataclass(frozen=True)
class FID3D:
    """Outcome of :func:`fid3d`.

    Attributes
    ----------
    distance : float
        Frechet distance between the features of real and synthetic patches, >= 0.
    interval : tuple of 2 floats
        95 % of the bootstrap around it; patches overlap, so that it says nothing of other volumes.
    floor : float
        Frechet distance between these real patches and as many others of the same volume: what an equal source gives
        at this number of patches.
    patches : int
        Patches in each of the three samples.
    features : int
        Features of a patch.
    """

    distance: float
    interval: tuple[float, float]
    floor: float
    patches: int
    features: int

    @property
    def warning(self) -> str:
        """One line where there are too few patches for the covariances, else empty."""
        if self.patches >= self.features:
            return ""
        return (
            f"3D-FID from {self.patches} patches of {self.features} features: with fewer patches than features the "
            "distance is much too large; compare it with its floor only."
        )

    def as_dict(self) -> dict[str, Any]:
        """The numbers by their :data:`NAMES`."""
        values = (self.distance, list(self.interval), self.floor, self.patches, self.features)
        return dict(zip(NAMES, values, strict=True))


def fid3d(
    network: nn.Module,
    real: ImageLike,
    synthetic: Sequence[ImageLike],
    *,
    patch: Sequence[int],
    patches: int,
    seed: int = 0,
    resamples: int = 100,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    label: str = "3D-FID",
) -> FID3D:
    """Compare synthetic volumes with a real one.

    Parameters
    ----------
    network : torch.nn.Module
        Segmenter trained on real data only, one of :mod:`~connectomics_neurodiff.segmenters`. Used in evaluation mode,
        its mode is restored.
    real : array-like
        (z, y, x), values in [0, 1], any size; one patch at a time is read.
    synthetic : sequence of array-like
        As `real`; the patches are shared out among them.
    patch : sequence of 3 ints
        Patch in voxels, (z, y, x). Where a volume is shorter, patches of all volumes are as short.
    patches : int
        Patches of each source, >= 2, all at different places; fewer where there are not so many. Those of volumes of
        the same size lie at the same places.
    seed : int
        Of the places and of the bootstrap, >= 0.
    resamples : int
        Resamples of the bootstrap, >= 1.
    precision : {"fp32", "bf16", "auto"}
        What the network computes in.
    device : str or torch.device
        Where the network runs.
    label : str
        Name on the progress bar.

    Raises
    ------
    ValueRangeError
        If there are too few patches or places for them, an image is not finite or leaves [0, 1], or the network's
        features are not finite.
    ShapeMismatch
        If an image has not three axes.
    UnknownName
        If the network does not tell its deepest features.
    """
    size, count = _size_and_count(real, synthetic, patch, patches)
    # Twice as many as are compared: the second half is what the floor compares with.
    boxes = _boxes(real, size, 2 * count, seed)
    features_of = partial(patch_features, network, precision=precision, device=device)
    ours = features_of(real, boxes[:count], label=f"{label}, real")
    others = features_of(real, boxes[count:], label=f"{label}, floor")
    shares = [
        (image, _boxes(image, size, 2 * count, seed)[first : count : len(synthetic)])
        for first, image in enumerate(synthetic)
    ]
    theirs = np.concatenate(
        [features_of(image, share, label=f"{label}, synthetic") for image, share in shares if share]
    )
    return FID3D(
        frechet_distance(ours, theirs),
        bootstrap_interval(ours, theirs, resamples, rng_for(seed, "fid3d", "bootstrap")),
        frechet_distance(ours, others),
        count,
        ours.shape[1],
    )


def _size_and_count(
    real: ImageLike, synthetic: Sequence[ImageLike], patch: Sequence[int], patches: int
) -> tuple[tuple[int, ...], int]:
    """Size of every patch, and how many there are of each source."""
    if not synthetic:
        raise ValueRangeError("3D-FID needs at least one synthetic volume. Got none.")
    for image in (real, *synthetic):
        if len(image.shape) != 3 or 0 in image.shape:
            raise ShapeMismatch(f"An image has three axes (z, y, x), none empty. Got shape {tuple(image.shape)}.")
    if len(patch) != 3 or min(patch) < 1:
        raise ValueRangeError(f"A patch has three sizes >= 1, (z, y, x). Got {tuple(patch)}.")
    if patches < 2:
        raise ValueRangeError(f"3D-FID needs at least 2 patches. Got {patches}.")
    size = tuple(min(extents) for extents in zip(patch, real.shape, *(image.shape for image in synthetic), strict=True))
    count = min(patches, _places(real.shape, size) // 2, *(_places(image.shape, size) for image in synthetic))
    if count < 2:
        raise ValueRangeError(
            f"3D-FID needs 4 places for a patch in the real volume and 2 in a synthetic one. A patch {size} has "
            f"{_places(real.shape, size)} in {tuple(real.shape)} and "
            f"{[_places(image.shape, size) for image in synthetic]} in the synthetic ones: take a smaller patch."
        )
    return size, count


def _places(shape: Sequence[int], size: Sequence[int]) -> int:
    """How many places a patch has in a volume."""
    return math.prod(n - s + 1 for n, s in zip(shape, size, strict=True))


def _boxes(image: ImageLike, size: Sequence[int], count: int, seed: int) -> list[Box]:
    """Patches at `count` different places, all there are if fewer; the same ones for volumes of the same shape."""
    room = [n - s + 1 for n, s in zip(image.shape, size, strict=True)]
    places = _places(image.shape, size)
    chosen = rng_for(seed, "fid3d", "patches").choice(places, min(count, places), replace=False)
    starts = np.stack(np.unravel_index(chosen, room), axis=1).tolist()
    return [Box((z, y, x), (z + size[0], y + size[1], x + size[2])) for z, y, x in starts]


def patch_features(
    network: nn.Module,
    image: ImageLike,
    boxes: Sequence[Box],
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    label: str = "features",
) -> np.ndarray:
    """Deepest features of a segmenter, their mean over each patch.

    Parameters
    ----------
    network, image, precision, device, label
        As in :func:`fid3d`.
    boxes : sequence of Box
        Patches of one size, inside the image, at least one.

    Returns
    -------
    numpy.ndarray
        (patches, features) float64.

    Raises
    ------
    ValueRangeError
        If the image or the features are not finite, or the image leaves [0, 1].
    UnknownName
        If the network does not tell its deepest features.
    """
    import torch

    from ..convolution import use_sound_convolutions
    from ..engine import resolve_precision
    from ..segmenters import encoder_of

    encoder = encoder_of(network)
    dtype = resolve_precision(precision, device)
    was_training = network.training
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.to(device).eval()
    use_sound_convolutions(network)
    batches = [boxes[first : first + BATCH] for first in range(0, len(boxes), BATCH)]
    means = []
    try:
        with kept_memory(), torch.inference_mode():
            for batch in progress(batches, label=label):
                patches = torch.from_numpy(np.stack([_read(image, box) for box in batch])[:, None]).to(device)
                with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
                    features = encoder.deepest_features(patches)
                means.append(features.float().mean(dim=(2, 3, 4)).cpu().double().numpy())
    finally:
        network.train(was_training)
    found = np.concatenate(means)
    if not np.isfinite(found).all():
        raise ValueRangeError("The network's features must be finite. Got NaN or infinity: its training has diverged.")
    return found


def _read(image: ImageLike, box: Box) -> np.ndarray:
    """One patch, float32."""
    patch = np.asarray(image[box.slices], dtype=np.float32)
    lowest, highest = patch.min(), patch.max()
    if not (lowest >= 0 and highest <= 1):  # written so that NaN is refused too
        raise ValueRangeError(
            f"An image must be finite and in [0, 1]. Got {lowest:.3g} to {highest:.3g} in the patch at {box.start}."
        )
    return patch
