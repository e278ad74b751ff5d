"""Samplers: how x_t becomes x_s, voxel by voxel, from what the network predicts. No network and no generator inside.

As no voxel needs its neighbours here, a sampler works on blocks of any shape: volumes that do not fit into memory are
denoised block by block.

A denoiser that predicts the noise and is hardly trained does better with ``ddpm``: the noise it adds lets later steps
correct the early guesses, which the deterministic samplers carry to the end as excess contrast. One that predicts the
velocity does better with ``dpmpp``, in a tenth of the steps (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from ..errors import ValueRangeError
from ..registry import Registry
from .process import DiffusionProcess


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes
    ----------
    number : int
        From 0.
    t, t_next : int
        Diffusion step before and after; -1 after the last one: the clean image.
    t_before : int or None
        Diffusion step of the sampler step before this one; None in the first.
    """

    number: int
    t: int
    t_next: int
    t_before: int | None


def sampler_steps(timesteps: Sequence[int]) -> list[Step]:
    """The steps of a sampler that visits `timesteps`, falling; see :meth:`.DiffusionProcess.timesteps`."""
    after = [*timesteps[1:], -1]
    before = [None, *timesteps[:-1]]
    return [Step(k, *ts) for k, ts in enumerate(zip(timesteps, after, before, strict=True))]


@dataclass(frozen=True, eq=False)
class Given:
    """What a step may use, arrays of one shape.

    Attributes
    ----------
    x, clean : numpy.ndarray
        x_t, and the clean image predicted for it, clipped.
    before, noise, coefficient : numpy.ndarray or None
        Clean image of the step before; standard normal noise; the predicted coefficient v of the variance.
    """

    x: np.ndarray
    clean: np.ndarray
    before: np.ndarray | None
    noise: np.ndarray | None
    coefficient: np.ndarray | None


#: x_s of a step.
Update = Callable[[DiffusionProcess, Step, Given], np.ndarray]


@dataclass(frozen=True)
class Sampler:
    """A sampler, and what its steps need.

    Attributes
    ----------
    update : callable
        x_s from x_t and the clean image.
    adds_noise : bool
        Whether a step, unless it is the last, adds standard normal noise.
    looks_back : bool
        Whether a step, unless it is the first, needs the clean image that the step before predicted.
    """

    update: Update
    adds_noise: bool = False
    looks_back: bool = False

    def __call__(
        self,
        process: DiffusionProcess,
        step: Step,
        x: np.ndarray,
        prediction: np.ndarray,
        before: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        limits: tuple[float, float] = (-1.0, 1.0),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take one step.

        Parameters
        ----------
        process : DiffusionProcess
            Schedule that the denoiser was trained on.
        step : Step
            Which one.
        x : numpy.ndarray
            x_t of any shape; not modified.
        prediction : numpy.ndarray
            (1, ...) what the network predicts for it, or (2, ...) with the coefficient of its variance.
        before : numpy.ndarray, optional
            Clean image of the step before, for samplers that look back.
        noise : numpy.ndarray, optional
            Standard normal noise, for samplers that add it.
        limits : tuple of 2 floats
            Black and white: the clean image is clipped to them, as published to [-1, 1].

        Returns
        -------
        x_s, clean : numpy.ndarray
            Image after the step, and the clean image predicted in it, clipped. Both are the same after the last step of
            a deterministic sampler.

        Raises
        ------
        ValueRangeError
            If noise or the clean image of the step before is needed and not there.
        """
        if self.adds_noise and noise is None and step.t_next >= 0:
            raise ValueRangeError(f"Step {step.number} of this sampler adds noise. Got none.")
        if self.looks_back and before is None and step.t_before is not None:
            raise ValueRangeError(f"Step {step.number} of this sampler needs the clean image of the step before.")
        clean = np.clip(process.clean_from(prediction[0], x, step.t), *limits)
        coefficient = prediction[1] if len(prediction) > 1 else None
        return self.update(process, step, Given(x, clean, before, noise, coefficient)), clean


SAMPLERS: Registry[Sampler] = Registry("sampler", call="f(process, step, x, prediction, before, noise) -> x_s, clean")


def _update_ddpm(process: DiffusionProcess, step: Step, given: Given) -> np.ndarray:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 with eq. 6 and 7), the variance learned where there is one.

    With fewer timesteps than T the process is respaced (Nichol and Dhariwal 2021, section 4).
    """
    of_clean, of_noisy, variance = process.posterior(step.t, step.t_next)
    mean = of_clean * given.clean + of_noisy * given.x
    if given.noise is None or step.t_next < 0:
        return mean
    if given.coefficient is None:
        return mean + sqrt(variance) * given.noise
    log_variance = process.learned_log_variance(given.coefficient, step.t, step.t_next)
    return mean + np.exp(0.5 * log_variance) * given.noise


def _update_ddim(process: DiffusionProcess, step: Step, given: Given) -> np.ndarray:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0).

    The noise is taken anew from the clipped clean image, so that the two still add up to x_t.
    """
    now, after = process.signal_at(step.t), process.signal_at(step.t_next)
    left = (given.x - sqrt(now) * given.clean) / sqrt(1 - now)
    return sqrt(after) * given.clean + sqrt(1 - after) * left


def _update_dpmpp(process: DiffusionProcess, step: Step, given: Given) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    The first and the last step are of first order: the one has nothing to extrapolate from, the other ends at an
    infinite signal-to-noise ratio, where the solution is the clean image itself.
    """
    if step.t_next < 0:
        return given.clean
    h = _half_log_snr(process, step.t_next) - _half_log_snr(process, step.t)
    target = given.clean
    if given.before is not None and step.t_before is not None:
        ratio = (_half_log_snr(process, step.t) - _half_log_snr(process, step.t_before)) / h
        target = given.clean + (given.clean - given.before) / (2 * ratio)
    now, after = process.signal_at(step.t), process.signal_at(step.t_next)
    return sqrt((1 - after) / (1 - now)) * given.x + sqrt(after) * (1 - exp(-h)) * target


def _half_log_snr(process: DiffusionProcess, t: int) -> float:
    """lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t))."""
    signal = process.signal_at(t)
    return 0.5 * (log(signal) - log(1 - signal))


SAMPLERS.register("ddpm")(Sampler(_update_ddpm, adds_noise=True))
SAMPLERS.register("ddim")(Sampler(_update_ddim))
SAMPLERS.register("dpmpp")(Sampler(_update_dpmpp, looks_back=True))
