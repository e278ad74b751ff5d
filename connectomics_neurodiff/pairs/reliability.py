"""Reliability: where the masks decide what an image looks like, and where chance does.

Several images painted onto one mask agree where the mask determines the grey value, and differ where the denoiser is
free to choose. A label is worth learning where they agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ..errors import ShapeMismatch, ValueRangeError
from ..geometry import is_anisotropic, voxel_size
from ..volume import ArrayLike, LazyArray, slabs
from .tissue import SMOOTHING_NM

#: The variance among a handful of images is noisy itself: it is averaged over this distance.
AVERAGING_NM = 24.0
_REACH = 4  # a Gaussian ends at four standard deviations


class ReliabilityMap(LazyArray):
    """Share of the grey values' variance that the masks decide, per voxel; computed part by part as it is indexed.

    reliability = 1 - (variance among the images) / (variance over all voxels and images), clipped to [0, 1], both of
    images smoothed by `SMOOTHING_NM`, as texture is not what is meant. 1: all images alike; 0: a voxel differs as much
    from image to image as any two voxels do.

    Parameters
    ----------
    images : sequence of array
        At least two of one shape (z, y, x), values in [0, 1], painted onto the same masks from different seeds.
    voxel_nm : sequence of 3 floats
        Voxel size; sections of anisotropic volumes are smoothed one by one.

    Raises
    ------
    ValueRangeError
        If there are fewer than two images, or all are constant.
    ShapeMismatch
        If they differ in shape.
    """

    def __init__(self, images: Sequence[ArrayLike], voxel_nm: Sequence[float]) -> None:
        if len(images) < 2:
            raise ValueRangeError(f"A reliability map needs at least two images of one mask. Got {len(images)}.")
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ShapeMismatch(f"Images of one mask have one shape. Got {sorted(shapes)}.")
        super().__init__(shapes.pop(), np.float32)
        self._images = images
        size = voxel_size(voxel_nm)
        flat = is_anisotropic(size)
        self._smoothing, self._averaging = (
            [0.0 if flat and axis == 0 else length / nm for axis, nm in enumerate(size)]
            for length in (SMOOTHING_NM, AVERAGING_NM)
        )
        self._variance = self._variance_over_all()

    def _variance_over_all(self) -> float:
        total = square = count = 0.0
        for sections, _, _ in slabs(self.shape):
            box = (sections, slice(0, self.shape[1]), slice(0, self.shape[2]))
            for image in self._smoothed(box):
                total += image.sum(dtype=np.float64)
                square += np.square(image, dtype=np.float64).sum()
                count += image.size
        variance = square / count - (total / count) ** 2
        if not variance > 1e-12:
            raise ValueRangeError("A reliability map needs images that are not constant.")
        return float(variance)

    def _smoothed(self, box: tuple[slice, ...]) -> list[np.ndarray]:
        """The images in a box, smoothed as if it were cut out of the whole."""
        wide, inner = _with_halo(box, self._smoothing, self.shape)
        return [
            ndimage.gaussian_filter(np.asarray(image[wide], np.float32), self._smoothing, truncate=_REACH)[inner]
            for image in self._images
        ]

    def _read(self, box: tuple[slice, ...]) -> np.ndarray:
        wide, inner = _with_halo(box, self._averaging, self.shape)
        variance = np.var(self._smoothed(wide), axis=0, ddof=1)
        averaged = ndimage.gaussian_filter(variance, self._averaging, truncate=_REACH)[inner]
        return np.clip(1 - averaged / np.float32(self._variance), 0, 1).astype(np.float32)


def _with_halo(
    box: tuple[slice, ...], sigma: Sequence[float], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The box enlarged by what a Gaussian reaches, within the volume; and where the box lies in that."""
    halo = [int(_REACH * s + 0.5) for s in sigma]
    wide = tuple(slice(max(b.start - h, 0), min(b.stop + h, n)) for b, h, n in zip(box, halo, shape, strict=True))
    inner = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))
    return wide, inner
