"""The Frechet distance between two samples, each taken for a Gaussian, and how far it can be trusted."""

from __future__ import annotations

import numpy as np

from ..errors import ShapeMismatch, ValueRangeError

#: Share of the bootstrap distances that lies within the interval.
LEVEL = 0.95


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance between the Gaussians with the means and covariances of two samples.

    Parameters
    ----------
    first, second : numpy.ndarray
        (n, d) and (m, d), a vector of features per row; n, m >= 2, also fewer than d.

    Returns
    -------
    float
        ``|mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))`` (Dowson and Landau 1982, eq. 4), the square of a
        distance, as Heusel et al. 2017 use it. >= 0, and the same number with the samples exchanged.

    Raises
    ------
    ShapeMismatch
        If the samples are no matrices with as many columns.
    ValueRangeError
        If a sample has fewer than two rows, or a value is not finite.

    Notes
    -----
    With C = R^T R, where R comes from a QR decomposition of the centred sample, the last trace is the sum of the
    singular values of R_1 R_2^T: no covariance is formed and no root of one is taken, so that singular covariances,
    the rule with fewer rows than features, do no harm.
    """
    for sample in (first, second):
        if sample.ndim != 2 or sample.shape[1] != first.shape[-1]:
            raise ShapeMismatch(f"Samples are (n, d) and (m, d). Got {first.shape} and {second.shape}.")
        if len(sample) < 2:
            raise ValueRangeError(f"A covariance needs at least 2 samples. Got {len(sample)}.")
        if not np.isfinite(sample).all():
            raise ValueRangeError("Features must be finite. Got NaN or infinity.")
    mean_1, root_1 = _mean_and_root(first)
    mean_2, root_2 = _mean_and_root(second)
    # The two sums differ in their last bits; their mean does not depend on the order of the samples.
    coupling = np.linalg.norm(root_1 @ root_2.T, "nuc") + np.linalg.norm(root_2 @ root_1.T, "nuc")
    spread = np.square(root_1).sum() + np.square(root_2).sum()
    # Rounding may carry the distance of equal samples a hair below 0.
    return max(float(np.square(mean_1 - mean_2).sum() + (spread - coupling)), 0.0)


def _mean_and_root(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,), and R (min(n, d), d) of the covariance R^T R, float64."""
    sample = sample.astype(np.float64)
    mean = sample.mean(axis=0)
    return mean, np.asarray(np.linalg.qr((sample - mean) / np.sqrt(len(sample) - 1), mode="r"))


def bootstrap_interval(
    first: np.ndarray, second: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Interval of 95 % around the Frechet distance of two samples, from resampling both (Efron 1979).

    Parameters
    ----------
    first, second : numpy.ndarray
        (n, d) and (m, d), as :func:`frechet_distance` takes them.
    resamples : int
        How many distances are drawn, >= 1.
    rng : numpy.random.Generator
        Chooses the rows.

    Returns
    -------
    tuple of 2 floats
        Lower and upper end, >= 0; the distance lies between them.

    Notes
    -----
    A resample repeats rows, which raises the distance as a smaller sample does. The percentiles are therefore moved so
    that their median is the distance itself: they tell its spread, not its bias.
    """
    if resamples < 1:
        raise ValueRangeError(f"A bootstrap needs at least 1 resample. Got {resamples}.")
    drawn = [
        frechet_distance(
            first[rng.integers(len(first), size=len(first))], second[rng.integers(len(second), size=len(second))]
        )
        for _ in range(resamples)
    ]
    low, middle, high = np.quantile(drawn, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    distance = frechet_distance(first, second)
    return max(distance + float(low - middle), 0.0), distance + float(high - middle)
