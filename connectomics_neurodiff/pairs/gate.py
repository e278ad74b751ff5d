"""The quality gate: a synthetic volume whose grey values are not those of the real one does not enter training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ValueRangeError

BINS = 256
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


def membrane_contrast(image: ArrayLike, membrane: ArrayLike) -> float:
    """How much brighter an image is off the membranes than on them.

    Parameters
    ----------
    image : array_like
        Values in [0, 1].
    membrane : array_like
        Same shape, non-zero on membranes.

    Returns
    -------
    float
        Difference of the two means in standard deviations of the image; 0 if there is no membrane, nothing else, or no
        variation.
    """
    grey, on = np.asarray(image, dtype=np.float32), np.asarray(membrane) > 0
    spread = float(grey.std(dtype=np.float64))
    if not on.any() or on.all() or spread == 0:
        return 0.0
    return float(grey[~on].mean(dtype=np.float64) - grey[on].mean(dtype=np.float64)) / spread


def membrane_gate(synthetic: float, real: float, *, least: float) -> str:
    """Why a synthetic volume does not show the membranes it was painted on, or an empty string.

    Grey values alone cannot tell: an inverted image, or noise with the right histogram, may have those of the real one.

    Parameters
    ----------
    synthetic, real : float
        :func:`membrane_contrast` of the synthetic volume on its mask, and of the real one on its own.
    least : float
        Smallest share of the real contrast that passes, [0, 1]; 0 lets everything pass.
    """
    share = synthetic / real if real else 1.0
    if not least or share >= least:
        return ""
    return (
        f"The image does not follow its mask: membranes have {100 * share:.0f} % of the real contrast, "
        f"at least {100 * least:.0f} % is needed."
    )
