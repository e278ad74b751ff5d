"""The quality gate: a synthetic volume whose grey values are not those of the real one does not enter training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from ..errors import ValueRangeError
from ..geometry import is_anisotropic

BINS = 256
#: Membranes are looked for in an image smoothed by this, against the cytoplasm within this distance.
SMOOTHING_NM, SURROUNDINGS_NM = 8.0, 200.0
#: A volume whose standard deviation is below one grey level of uint8 shows nothing.
_LEAST_STD = 1 / 255


@dataclass(frozen=True)
class GateReport:
    """What the gate found.

    Attributes
    ----------
    distance : float
        1-Wasserstein distance of the two grey value distributions, in [0, 1]; infinite if an image is not finite or
        leaves [0, 1].
    mean_real, mean_synthetic, std_real, std_synthetic : float
        Grey value moments, [0, 1] units.
    passed : bool
        Whether the pair may be trained on.
    reason : str
        Why not; empty if it passed.
    """

    distance: float
    mean_real: float
    mean_synthetic: float
    std_real: float
    std_synthetic: float
    passed: bool
    reason: str

    def require(self) -> None:
        """Raise :class:`ValueRangeError` with the reason unless the pair passed."""
        if not self.passed:
            raise ValueRangeError(self.reason)


def _histogram(image: np.ndarray) -> np.ndarray:
    """Share of voxels in each of `BINS` equal bins of [0, 1]."""
    counts, _ = np.histogram(image, bins=BINS, range=(0.0, 1.0))
    return counts / image.size


def _defect(name: str, image: np.ndarray) -> str:
    """Why an image cannot be compared at all, or an empty string."""
    if image.size == 0:
        return f"The {name} image is empty."
    if not np.isfinite(image).all():
        return f"The {name} image must be finite. Got {int((~np.isfinite(image)).sum())} NaN or infinite voxels."
    if image.min() < 0 or image.max() > 1:
        return f"The {name} image must lie in [0, 1]. Got {image.min():.3g} to {image.max():.3g}."
    return ""


def grey_value_gate(synthetic: ArrayLike, real: ArrayLike, *, limit: float = 0.1) -> GateReport:
    """Compare the grey values of a synthetic volume with those of a real one.

    Parameters
    ----------
    synthetic, real : array_like
        Images in [0, 1], any shapes.
    limit : float
        Largest 1-Wasserstein distance that passes, [0, 1] units: the mean shift in grey value that would turn one
        distribution into the other.

    Returns
    -------
    GateReport
        Never raises for a bad pair; call :meth:`GateReport.require` for that.

    Notes
    -----
    In one dimension the distance is the area between the cumulative distributions; here of histograms of 256 bins,
    so it is exact to one grey level of uint8.
    Two halves of one real volume lie .005 to .05 apart. The gate sees grey values only, not where they are: an image of
    noise with the right histogram passes.
    """
    image, reference = np.asarray(synthetic, dtype=np.float32), np.asarray(real, dtype=np.float32)
    reason = _defect("synthetic", image) or _defect("real", reference)
    if reason:
        return GateReport(np.inf, *(np.nan,) * 4, passed=False, reason=reason)
    distance = float(np.abs(np.cumsum(_histogram(image) - _histogram(reference))).sum() / BINS)
    std, std_reference = float(image.std(dtype=np.float64)), float(reference.std(dtype=np.float64))
    if std < _LEAST_STD:
        reason = f"The synthetic image is constant (standard deviation {std:.2g}, needs {_LEAST_STD:.2g})."
    elif distance > limit:
        reason = f"Grey values are {distance:.3f} from those of the real volume; at most {limit:g} is allowed."
    return GateReport(
        distance=distance,
        mean_real=float(reference.mean(dtype=np.float64)),
        mean_synthetic=float(image.mean(dtype=np.float64)),
        std_real=std_reference,
        std_synthetic=std,
        passed=not reason,
        reason=reason,
    )


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
    image, reference = np.asarray(synthetic, dtype=np.float32), np.asarray(real, dtype=np.float32)
    reason = _defect("synthetic", image) or _defect("real", reference)
    std = 0.0 if reason else float(image.std(dtype=np.float64))
    if not reason and std < _LEAST_STD:
        reason = "A constant synthetic image cannot be matched to a real one."
    if reason:
        raise ValueRangeError(reason)
    gain = reference.std(dtype=np.float64) / std
    offset = reference.mean(dtype=np.float64) - gain * image.mean(dtype=np.float64)
    return np.clip(image * np.float32(gain) + np.float32(offset), 0.0, 1.0)


def membrane_visibility(
    image: np.ndarray, label: np.ndarray, membrane: np.ndarray, mito: np.ndarray | None, voxel_nm: Sequence[float]
) -> float:
    """Share of the membrane that stands out dark against the cytoplasm beside it.

    Grey values alone cannot tell whether an image follows its mask: an inverted image, or noise with the right
    histogram, has those of the real one. A membrane with gaps teaches a segmenter to merge.

    Parameters
    ----------
    image : numpy.ndarray
        (z, y, x), values in [0, 1]; compared after smoothing by `SMOOTHING_NM`.
    label, membrane, mito : numpy.ndarray
        Masks of the same shape; `mito` may be None. Cytoplasm is what lies in a neuron and is neither.
    voxel_nm : sequence of 3 floats
        Voxel size. Anisotropic volumes are judged section by section.

    Returns
    -------
    float
        Share of the membrane voxels, [0, 1], that are darker than the mean of the cytoplasm within `SURROUNDINGS_NM` by
        at least the standard deviation of all cytoplasm; 0 if there is no membrane or no cytoplasm.
    """
    by_section = is_anisotropic(voxel_nm)
    sigma = [0.0 if by_section and axis == 0 else SMOOTHING_NM / size for axis, size in enumerate(voxel_nm)]
    width = [1 if by_section and axis == 0 else int(SURROUNDINGS_NM / size) | 1 for axis, size in enumerate(voxel_nm)]
    smooth = ndimage.gaussian_filter(np.asarray(image, dtype=np.float32), sigma)
    on = np.asarray(membrane) > 0
    cytoplasm = ~on & (np.asarray(label) > 0)
    if mito is not None:
        cytoplasm &= np.asarray(mito) == 0
    share = ndimage.uniform_filter(cytoplasm.astype(np.float32), width)
    judged = on & (share > 0.1)
    if not judged.any():
        return 0.0
    beside = ndimage.uniform_filter(np.where(cytoplasm, smooth, 0), width)[judged] / share[judged]
    return float((beside - smooth[judged] > smooth[cytoplasm].std()).mean())


def membrane_gate(synthetic: float, real: float, *, least: float) -> str:
    """Why a synthetic volume does not show the membranes it was painted on, or an empty string.

    Parameters
    ----------
    synthetic, real : float
        :func:`membrane_visibility` of the synthetic volume on its mask, and of the real one on its own.
    least : float
        Smallest share of the real visibility that passes, [0, 1]; 0 lets everything pass.
    """
    share = synthetic / real if real else 1.0
    if not least or share >= least:
        return ""
    return (
        f"The image does not follow its mask: {100 * synthetic:.0f} % of its membrane is visible, {100 * real:.0f} % "
        f"of the real one; at least {100 * least:.0f} % of that is needed."
    )
