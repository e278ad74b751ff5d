"""What of a synthetic volume is fitted to the real one before it is judged: grey values, and the power of detail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft

from ..errors import ValueRangeError
from ..geometry import Box, is_anisotropic, tiles, voxel_size
from .tissue import LEAST_STD, image_defect

#: Coarser details than this, cycles per micrometre, are the layout's, which the mask decides: they stay as they are.
COARSEST = 8.0
#: Detail is made at most so many times stronger, or weaker: what is not there cannot be brought out.
MOST_GAIN = 2.0
#: Width of the rings of frequency, as a ratio; how far a block sees beyond its faces, mirrored at the volume's: four
#: times the longest wave that is filtered.
_RING, _MARGIN_NM = 1.15, 4000 / COARSEST
#: Side of the blocks that an isotropic volume is filtered in, voxels: memory does not grow with the volume.
_BLOCK = 160


def match_grey_values(synthetic: ArrayLike, real: ArrayLike) -> np.ndarray:
    """Give a synthetic volume the mean and standard deviation of the real one.

    One increasing linear map for the whole volume, then clipping to [0, 1]; never per section, which would remove
    the very differences between sections that a segmenter must learn to bear.

    Parameters
    ----------
    synthetic, real : array_like
        Images in [0, 1], any shapes.

    Returns
    -------
    numpy.ndarray
        float32 in [0, 1], shape of `synthetic`.

    Raises
    ------
    ValueRangeError
        If an image is empty, not finite or outside [0, 1], or the synthetic one is constant.
    """
    image, reference = _comparable(synthetic, real)
    std = float(image.std(dtype=np.float64))
    gain = reference.std(dtype=np.float64) / std
    offset = reference.mean(dtype=np.float64) - gain * image.mean(dtype=np.float64)
    return np.clip(image * np.float32(gain) + np.float32(offset), 0.0, 1.0)


def match_spectrum(synthetic: ArrayLike, real: ArrayLike, voxel_nm: Sequence[float]) -> np.ndarray:
    """Give the fine detail of a synthetic volume the power that it has in the real one.

    A denoiser that was trained briefly paints fine detail too faintly; a segmenter learns such differences. One
    linear filter for the whole volume, the same in all directions, in the plane for anisotropic volumes and in 3D else.
    Its gain is the root of the ratio of the powers in rings of frequency, between 1 / `MOST_GAIN` and `MOST_GAIN`, and
    1 below `COARSEST`.

    Parameters
    ----------
    synthetic, real : array_like
        Images in [0, 1], (z, y, x), of one voxel size; shapes may differ.
    voxel_nm : sequence of 3 floats
        Voxel size, nm.

    Returns
    -------
    numpy.ndarray
        float32 in [0, 1], shape of `synthetic`.

    Raises
    ------
    ValueRangeError
        If an image is empty, not finite or outside [0, 1], or the synthetic one is constant.
    """
    image, reference = _comparable(synthetic, real)
    size = voxel_size(voxel_nm)
    axes = (1, 2) if is_anisotropic(size) else (0, 1, 2)
    nyquist = 500 / max(size[axis] for axis in axes)
    count = max(1, round(np.log(nyquist / COARSEST) / np.log(_RING))) if nyquist > COARSEST else 0
    if not count:
        return image
    edges = np.geomspace(COARSEST, nyquist, count + 1)
    power, wanted = (_ring_power(array, size, axes, edges) for array in (image, reference))
    known = (power > 0) & (wanted > 0)
    gain = np.ones(count)
    gain[known] = np.clip(np.sqrt(wanted[known] / power[known]), 1 / MOST_GAIN, MOST_GAIN)
    middles = np.concatenate([[0.0, COARSEST], np.sqrt(edges[:-1] * edges[1:])])
    return _filtered(image, size, axes, middles, np.concatenate([[1.0, 1.0], gain]))


def _comparable(synthetic: ArrayLike, real: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both images as float32, the synthetic one not constant."""
    image, reference = np.asarray(synthetic, dtype=np.float32), np.asarray(real, dtype=np.float32)
    reason = image_defect("synthetic", image) or image_defect("real", reference)
    if not reason and float(image.std(dtype=np.float64)) < LEAST_STD:
        reason = "A constant synthetic image cannot be matched to a real one."
    if reason:
        raise ValueRangeError(reason)
    return image, reference


def _blocks(shape: Sequence[int], axes: Sequence[int]) -> list[Box]:
    """Sections one by one where they are filtered one by one, else blocks."""
    size = (1, *shape[1:]) if len(axes) == 2 else (_BLOCK,) * 3
    return tiles(shape, size, (0, 0, 0))


def _frequencies(shape: Sequence[int], size: Sequence[float], axes: Sequence[int]) -> np.ndarray:
    """Cycles per micrometre of the coefficients of a real transform along `axes`."""
    total = np.zeros([1] * len(shape))
    for axis in axes:
        transform = np.fft.rfftfreq if axis == axes[-1] else np.fft.fftfreq
        along = transform(shape[axis], size[axis] / 1000)
        total = total + along.reshape([-1 if a == axis else 1 for a in range(len(shape))]) ** 2
    return np.sqrt(total)


def _ring_power(image: np.ndarray, size: Sequence[float], axes: Sequence[int], edges: np.ndarray) -> np.ndarray:
    """Mean power of a coefficient in each ring of frequency; 0 where there is none. White noise has its variance."""
    blocks = _blocks(image.shape, axes)
    window = np.ones([1] * 3)
    for axis in axes:
        # Without the zeros at the ends of numpy's window, so that an axis may be short.
        along = np.hanning(blocks[0].shape[axis] + 2)[1:-1]
        window = window * along.reshape([-1 if a == axis else 1 for a in range(3)])
    ring = np.digitize(_frequencies(blocks[0].shape, size, axes), edges) - 1
    total, count = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for block in blocks:
        piece = image[block.slices]
        centred = (piece - piece.mean()) * window
        power = np.abs(fft.rfftn(centred, axes=axes)) ** 2 / (np.square(window).mean() * np.prod(piece.shape))
        inside = np.broadcast_to((ring >= 0) & (ring < len(total)), power.shape)
        index = np.broadcast_to(ring, power.shape)[inside]
        total += np.bincount(index, power[inside], minlength=len(total))
        count += np.bincount(index, minlength=len(total))
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _filtered(
    image: np.ndarray, size: Sequence[float], axes: Sequence[int], frequency: np.ndarray, gain: np.ndarray
) -> np.ndarray:
    """The image through a filter whose gain is given at some frequencies; mirrored beyond its faces."""
    result = np.empty(image.shape, np.float32)
    margins = [round(_MARGIN_NM / size[axis]) if axis in axes else 0 for axis in range(3)]
    mirrored = np.pad(image, [(margin, margin) for margin in margins], mode="symmetric")
    inner = tuple(slice(margin, -margin or None) for margin in margins)
    blocks = _blocks(image.shape, axes)
    padded = [n + 2 * margin for n, margin in zip(blocks[0].shape, margins, strict=True)]
    response = np.interp(_frequencies(padded, size, axes), frequency, gain).astype(np.float32)
    for block in blocks:
        around = tuple(slice(a, a + n) for a, n in zip(block.start, padded, strict=True))
        spectrum = fft.rfftn(mirrored[around], axes=axes)
        spectrum *= response
        sharpened = fft.irfftn(spectrum, s=[padded[axis] for axis in axes], axes=axes, overwrite_x=True)
        result[block.slices] = sharpened[inner]
    return np.clip(result, 0, 1)
