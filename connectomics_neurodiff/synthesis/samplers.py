"""Samplers: functions of a callable that predicts noise. No network and no generator inside.

All share one signature. `denoise(x, t)` predicts the noise in `x` at step t; `noise_for(k)` is the standard normal
noise that the k-th sampler step may add. After every step `on_step` gets a :class:`SamplerState`; a sampler that is
given one as `state` goes on from there to the same result.

A denoiser that is hardly trained does better with ``ddpm``: the noise it adds lets later steps correct the early
guesses, which the deterministic samplers carry to the end as excess contrast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from ..registry import Registry
from .process import DiffusionProcess

Denoise = Callable[[np.ndarray, int], np.ndarray]
NoiseFor = Callable[[int], np.ndarray]


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Where a sampler stands.

    Attributes
    ----------
    done : int
        Sampler steps done.
    x : numpy.ndarray
        Image after them.
    clean : numpy.ndarray
        Clean image predicted in the last of them, which DPM-Solver++(2M) extrapolates from.
    """

    done: int
    x: np.ndarray
    clean: np.ndarray


OnStep = Callable[[SamplerState], object]
#: (t, t after the step, x_t, predicted clean image, clean image of the step before, t of the step before, k) -> x.
Update = Callable[[int, int, np.ndarray, np.ndarray, "np.ndarray | None", int, int], np.ndarray]
SAMPLERS: Registry = Registry("sampler", call="f(denoise, process, x, timesteps, noise_for, *, state, on_step) -> x_0")


def _walk(
    denoise: Denoise,
    process: DiffusionProcess,
    x: np.ndarray,
    timesteps: Sequence[int],
    update: Update,
    state: SamplerState | None,
    on_step: OnStep | None,
) -> np.ndarray:
    """The loop that all samplers share; the clean image is clipped to the range of images, as published."""
    first, clean = 0, None
    if state is not None:
        first, x, clean = state.done, state.x, state.clean
    for k in range(first, len(timesteps)):
        t, t_next = timesteps[k], timesteps[k + 1] if k + 1 < len(timesteps) else -1
        before, clean = clean, np.clip(process.predict_clean(x, t, denoise(x, t)), -1, 1)
        x = update(t, t_next, x, clean, before, timesteps[k - 1] if k else -1, k)
        if on_step is not None:
            on_step(SamplerState(k + 1, x, clean))
    return x


@SAMPLERS.register("ddpm")
def sample_ddpm(
    denoise: Denoise,
    process: DiffusionProcess,
    x: np.ndarray,
    timesteps: Sequence[int],
    noise_for: NoiseFor,
    *,
    state: SamplerState | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Ancestral sampling with the posterior's fixed variance (Ho et al. 2020, algorithm 2 with eq. 6 and 7).

    With fewer timesteps than T the process is respaced (Nichol and Dhariwal 2021, section 4).

    Parameters
    ----------
    denoise : callable
        ``denoise(x, t) -> noise``, in the shape of `x`.
    process : DiffusionProcess
        Schedule that the denoiser was trained on.
    x : numpy.ndarray
        Standard normal noise of any shape; not modified, and not used when going on from a `state`.
    timesteps : sequence of int
        Steps t to visit, falling; see :meth:`.DiffusionProcess.timesteps`.
    noise_for : callable
        ``noise_for(k)``: noise in the shape of `x` for the k-th of the timesteps.
    state : SamplerState, optional
        Go on from here.
    on_step : callable, optional
        Called with a :class:`SamplerState` after every step.

    Returns
    -------
    numpy.ndarray
        Clean image in [-1, 1].
    """

    def update(
        t: int, t_next: int, x: np.ndarray, clean: np.ndarray, before: np.ndarray | None, t_before: int, k: int
    ) -> np.ndarray:
        of_clean, of_noisy, variance = process.posterior(t, t_next)
        mean = of_clean * clean + of_noisy * x
        return mean + sqrt(variance) * noise_for(k) if variance > 0 else mean

    return _walk(denoise, process, x, timesteps, update, state, on_step)


@SAMPLERS.register("ddim")
def sample_ddim(
    denoise: Denoise,
    process: DiffusionProcess,
    x: np.ndarray,
    timesteps: Sequence[int],
    noise_for: NoiseFor,
    *,
    state: SamplerState | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0); arguments as in :func:`sample_ddpm`.

    The noise is taken anew from the clipped clean image, so that the two still add up to x_t. `noise_for` is not asked.
    """

    def update(
        t: int, t_next: int, x: np.ndarray, clean: np.ndarray, before: np.ndarray | None, t_before: int, k: int
    ) -> np.ndarray:
        now, after = process.signal_at(t), process.signal_at(t_next)
        noise = (x - sqrt(now) * clean) / sqrt(1 - now)
        return sqrt(after) * clean + sqrt(1 - after) * noise

    return _walk(denoise, process, x, timesteps, update, state, on_step)


@SAMPLERS.register("dpmpp")
def sample_dpmpp(
    denoise: Denoise,
    process: DiffusionProcess,
    x: np.ndarray,
    timesteps: Sequence[int],
    noise_for: NoiseFor,
    *,
    state: SamplerState | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); arguments as in :func:`sample_ddpm`.

    The first and the last step are of first order: the one has nothing to extrapolate from, the other ends at an
    infinite signal-to-noise ratio, where the solution is the clean image itself. `noise_for` is not asked.
    """

    def update(
        t: int, t_next: int, x: np.ndarray, clean: np.ndarray, before: np.ndarray | None, t_before: int, k: int
    ) -> np.ndarray:
        if t_next < 0:
            return clean
        h = _half_log_snr(process, t_next) - _half_log_snr(process, t)
        target = clean
        if before is not None:
            ratio = (_half_log_snr(process, t) - _half_log_snr(process, t_before)) / h
            target = clean + (clean - before) / (2 * ratio)
        now, after = process.signal_at(t), process.signal_at(t_next)
        return sqrt((1 - after) / (1 - now)) * x + sqrt(after) * (1 - exp(-h)) * target

    return _walk(denoise, process, x, timesteps, update, state, on_step)


def _half_log_snr(process: DiffusionProcess, t: int) -> float:
    """lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t))."""
    signal = process.signal_at(t)
    return 0.5 * (log(signal) - log(1 - signal))
