"""The diffusion process: a noise schedule and what follows from it. No weights, no randomness.

Glossary (Ho et al. 2020): beta_t variance added at step t, alpha_t = 1 - beta_t, alpha_bar_t their product up to t (the
share of the variance that is still signal), x_0 clean image, x_t noisy image, epsilon the noise in it.
Steps count from 0 (least noisy) to T - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt
from typing import Any

import numpy as np

from ..errors import UnknownName, ValueRangeError, did_you_mean

#: No step may destroy more than this share of the variance (Nichol and Dhariwal 2021, section 3.2).
MAX_BETA = 0.999
PREDICTIONS = ("noise", "velocity", "image")
#: Standard deviation of what is as fine as the noise in an image of unit variance: the grain of EM.
GRAIN = 0.12
#: Noise levels (noise over image, as standard deviations) between which a sampler's steps are spaced, and how much
#: denser they lie at the lower end (Karras et al. 2022, eq. 5 and table 1). Above the first nothing of EM shows.
LEVELS, DENSITY = (30.0, 0.03), 7.0


def cosine_betas(steps: int, s: float = 0.008) -> np.ndarray:
    """Cosine noise schedule (Nichol and Dhariwal 2021, eq. 17).

    Parameters
    ----------
    steps : int
        T >= 1; 250 as published by NeuroDiff.
    s : float
        Offset >= 0 that keeps the first steps from being too small.

    Returns
    -------
    numpy.ndarray
        (T,) float64 in (0, 0.999].

    Raises
    ------
    ValueRangeError
        If `steps` < 1 or `s` < 0.
    """
    if steps < 1 or not s >= 0:
        raise ValueRangeError(f"A cosine schedule needs steps >= 1 and s >= 0. Got steps {steps}, s {s}.")
    time = np.arange(steps + 1) / steps
    alpha_bar = np.cos((time + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def interpolated(v: Any, least: Any, largest: Any) -> Any:
    """Eq. 15 of Nichol and Dhariwal 2021 for numbers, arrays or tensors: `least` at v = -1, `largest` at v = 1."""
    return least + (v + 1) / 2 * (largest - least)


class DiffusionProcess:
    """Forward process q and its posterior for a schedule of betas (paper eq. 1).

    Parameters
    ----------
    betas : sequence of float
        (T,) variances, each in (0, 1).
    prediction : {"noise", "velocity", "image"}
        What the network predicts: epsilon as published; v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans
        and Ho 2022, section 4), which at the noisiest steps is the image itself: there a small error in epsilon is a
        large one in x_0; or x_0, less its grain. An image is smooth and noise is not: a small network that predicts
        the image need not carry every voxel's noise through its layers. Of x_t, as much is kept as a Wiener filter
        keeps for grain of standard deviation `GRAIN`, and the network predicts the rest, scaled to unit variance
        (preconditioning as in Karras et al. 2022, eq. 7, for an image that is mostly smooth).

    Attributes
    ----------
    betas : numpy.ndarray
        (T,) float64.
    signal : numpy.ndarray
        (T,) float64: alpha_bar_t.

    Raises
    ------
    ValueRangeError
        If a beta is not in (0, 1), or there is none.
    UnknownName
        If there is no such prediction.
    """

    def __init__(self, betas: Sequence[float] | np.ndarray, prediction: str = "noise") -> None:
        if prediction not in PREDICTIONS:
            raise UnknownName(
                f"No prediction '{prediction}'.{did_you_mean(prediction, PREDICTIONS)} Known: {', '.join(PREDICTIONS)}."
            )
        self.prediction = prediction
        self.betas = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not self.betas.size or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueRangeError(f"Betas are one or more numbers in (0, 1). Got {betas}.")
        self.signal = np.cumprod(1 - self.betas)

    @property
    def steps(self) -> int:
        """T, the number of steps trained on."""
        return int(self.betas.size)

    def signal_at(self, t: int) -> float:
        """alpha_bar_t, and 1 for t = -1: the step after the last is the clean image."""
        return 1.0 if t < 0 else float(self.signal[t])

    def timesteps(self, steps: int) -> list[int]:
        """The steps t that a sampler visits, noisiest first.

        The first is T - 1 whatever the count: x_T is pure noise, as in training (Lin et al. 2024). The noise levels of
        the others are spaced between `LEVELS` as those of Karras et al. (2022, eq. 5), each at the nearest step of the
        process that is left.

        Raises
        ------
        ValueRangeError
            If `steps` is not in 1 .. T.
        """
        if not 1 <= steps <= self.steps:
            raise ValueRangeError(f"A sampler takes 1 to {self.steps} steps from this process. Got {steps}.")
        high, low = (level ** (1 / DENSITY) for level in LEVELS)
        wanted = np.log(np.linspace(high, low, steps) ** DENSITY)
        nearest = np.abs(self._log_levels - wanted[:, None]).argmin(axis=1)
        chosen = [self.steps - 1]
        for number in range(1, steps):
            # Below the one before, and with room for those to come.
            chosen.append(max(min(int(nearest[number]), chosen[-1] - 1), steps - 1 - number))
        return chosen

    def step_at(self, level: float) -> int:
        """The least noisy step whose noise is `level` times the image or more, as standard deviations; T if none is."""
        return int(np.count_nonzero((1 - self.signal) / self.signal < level**2))

    @property
    def _log_levels(self) -> np.ndarray:
        """(T,) logarithm of the noise level: noise over image, as standard deviations."""
        return np.asarray(0.5 * np.log((1 - self.signal) / self.signal))

    def level_shares(self, mean: float, spread: float) -> np.ndarray:
        """How often each step is drawn in training, so that noise levels are log-normal (Karras et al. 2022, table 1).

        Parameters
        ----------
        mean, spread : float
            Mean and standard deviation of ln(standard deviation of the noise / that of the signal). A spread of 0 draws
            all steps alike, as published; the cosine schedule then has a mean of 0 and a spread of about 1.6.

        Returns
        -------
        numpy.ndarray
            (T,) float64 >= 0, sum 1.

        Raises
        ------
        ValueRangeError
            If the spread is negative, or an argument not finite.
        """
        if not (np.isfinite(mean) and np.isfinite(spread) and spread >= 0):
            raise ValueRangeError(f"Noise levels have a finite mean and a spread >= 0. Got {mean} and {spread}.")
        if spread == 0 or self.steps == 1:
            return np.full(self.steps, 1 / self.steps)
        level = self._log_levels
        exponent = -0.5 * ((level - mean) / spread) ** 2
        density = np.exp(exponent - exponent.max()) * np.gradient(level)
        return np.asarray(density / density.sum())

    def add_noise(self, clean: np.ndarray, t: int, noise: np.ndarray) -> np.ndarray:
        """Sample of q(x_t | x_0) from standard normal noise (Ho et al. 2020, eq. 4), in the type of `clean`."""
        signal = self.signal_at(t)
        return sqrt(signal) * clean + sqrt(1 - signal) * noise

    def target(self, clean: np.ndarray, t: int, noise: np.ndarray) -> np.ndarray:
        """What the network is trained to predict, in the type of `clean`."""
        if self.prediction == "noise":
            return noise
        signal = self.signal_at(t)
        if self.prediction == "velocity":
            return sqrt(signal) * noise - sqrt(1 - signal) * clean
        kept, spread = self._grain_filter(t)
        return (clean - kept * self.add_noise(clean, t, noise)) / spread

    def clean_from(self, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
        """Clean image that a prediction of the network implies; not clipped."""
        signal = self.signal_at(t)
        if self.prediction == "noise":  # eq. 4 of Ho et al. solved for x_0
            return (x_t - sqrt(1 - signal) * prediction) / sqrt(signal)
        if self.prediction == "velocity":
            return sqrt(signal) * x_t - sqrt(1 - signal) * prediction
        kept, spread = self._grain_filter(t)
        return kept * x_t + spread * prediction

    def _grain_filter(self, t: int) -> tuple[float, float]:
        """Of x_t, the share that stays in the image; and the standard deviation of the rest of the image."""
        signal = self.signal_at(t)
        level = (1 - signal) / signal
        share = GRAIN**2 / (GRAIN**2 + level)
        return share / sqrt(signal), sqrt((1 - share) ** 2 + share**2 * level)

    @property
    def clean_errors(self) -> np.ndarray:
        """(T,) error of x_0 per error of the prediction."""
        if self.prediction == "image":
            return np.array([self._grain_filter(t)[1] for t in range(self.steps)])
        return np.asarray(np.sqrt((1 - self.signal) / (self.signal if self.prediction == "noise" else 1)))

    def posterior(self, t: int, t_next: int) -> tuple[float, float, float]:
        """Posterior q(x_s | x_t, x_0) of an earlier step s = `t_next` < t (Ho et al. 2020, eq. 6 and 7).

        Returns
        -------
        of_clean, of_noisy, variance : float
            The mean is of_clean x_0 + of_noisy x_t. Where steps are skipped, beta_t is that of all of them together.
        """
        now, after = self.signal_at(t), self.signal_at(t_next)
        alpha = now / after
        of_clean = sqrt(after) * (1 - alpha) / (1 - now)
        of_noisy = sqrt(alpha) * (1 - after) / (1 - now)
        return of_clean, of_noisy, (1 - after) / (1 - now) * (1 - alpha)

    def log_variance_bounds(self, t: int, t_next: int) -> tuple[float, float]:
        """Logarithms of the least and the largest sensible variance of the reverse step from t to `t_next` < t.

        They are those of the posterior and of beta_t (Nichol and Dhariwal 2021, section 3.1), of all skipped steps
        together. The posterior of a step to the clean image (`t_next` = -1) has no variance; that of the step before
        the last stands in for it, as published.
        """
        beta = 1 - self.signal_at(t) / self.signal_at(t_next)
        last = t_next < 0
        least = beta if last and self.steps == 1 else self.posterior(*((1, 0) if last else (t, t_next)))[2]
        return log(least), log(beta)

    def learned_log_variance(self, v: np.ndarray, t: int, t_next: int) -> np.ndarray:
        """Logarithm of the learned variance of the reverse step from t to `t_next` (Nichol and Dhariwal 2021, eq. 15).

        Parameters
        ----------
        v : numpy.ndarray
            Second channel of a denoiser with ``learn_variance``: -1 is the posterior's variance, 1 is beta_t, 0 halfway
            between their logarithms. Not bounded, as published.
        t, t_next : int
            ``t_next < t``, neighbours in the process or in a respaced one; -1 is the clean image.

        Returns
        -------
        numpy.ndarray
            In the shape and type of `v`.
        """
        least, largest = self.log_variance_bounds(t, t_next)
        return np.asarray(interpolated(v, least, largest))
