"""Samplers against diffusers' schedulers, and against data whose perfect denoiser is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from connectomics_neurodiff.errors import UnknownName, ValueRangeError
from connectomics_neurodiff.synthesis import SAMPLERS, DiffusionProcess, cosine_betas, sampler_steps

MEAN, DEVIATION = 0.1, 0.2
PROCESS = DiffusionProcess(cosine_betas(250))


def perfect_denoiser(process: DiffusionProcess) -> Callable[[np.ndarray, int], np.ndarray]:
    """E[noise | x_t] for data N(MEAN, DEVIATION^2): x_t is normal too, and the regression is linear."""

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        signal = process.signal[t]
        variance = signal * DEVIATION**2 + 1 - signal
        return np.sqrt(1 - signal) / variance * (x - np.sqrt(signal) * MEAN)

    return denoise


def start(shape: tuple[int, ...] = (3, 5, 7)) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape)


def noise_for(k: int, shape: tuple[int, ...] = (3, 5, 7)) -> np.ndarray:
    return np.random.default_rng([9, k]).standard_normal(shape)


def walk(
    name: str,
    denoise: Callable[[np.ndarray, int], np.ndarray],
    x: np.ndarray,
    steps: int,
    noise: Callable[[int], np.ndarray] = noise_for,
    process: DiffusionProcess = PROCESS,
    times: list[int] | None = None,
) -> np.ndarray:
    """All steps of a sampler on an array in memory."""
    rule, clean = SAMPLERS.get(name), None
    for step in sampler_steps(times or process.timesteps(steps)):
        added = noise(step.number) if rule.adds_noise and step.t_next >= 0 else None
        x, clean = rule(process, step, x, denoise(x, step.t)[None], clean if rule.looks_back else None, added)
    return x


def run(name: str, steps: int) -> np.ndarray:
    return walk(name, perfect_denoiser(PROCESS), start(), steps, times=trailing(steps))


def walk_diffusers(scheduler: Any, times: list[int], **options: Any) -> np.ndarray:
    """Their loop with our denoiser."""
    assert [int(t) for t in scheduler.timesteps] == times
    denoise, x = perfect_denoiser(PROCESS), torch.from_numpy(start())
    for t in times:
        noise = torch.from_numpy(denoise(x.numpy(), t))
        x = scheduler.step(noise, t, x, **options).prev_sample
    return x.numpy()


def trailing(steps: int) -> list[int]:
    """Evenly spaced steps of the process, as diffusers spaces them."""
    return [round(250 * (1 - i / steps)) - 1 for i in range(steps)]


def shared(**options: Any) -> dict[str, Any]:
    return {"num_train_timesteps": 250, "trained_betas": PROCESS.betas.astype(np.float32), **options}


def test_ddpm_matches_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(range(250))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: torch.from_numpy(noise_for(next(drawn))),
    )
    scheduler = DDPMScheduler(**shared(variance_type="fixed_small", clip_sample=True))
    scheduler.set_timesteps(250)
    np.testing.assert_allclose(run("ddpm", 250), walk_diffusers(scheduler, PROCESS.timesteps(250)), atol=1e-4)


def test_ddpm_with_a_learned_variance_matches_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 1, 5, 7)  # their split of mean and variance is along axis 1
    drawn = iter(range(250))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: torch.from_numpy(noise_for(next(drawn), shape)),
    )
    scheduler = DDPMScheduler(**shared(variance_type="learned_range", clip_sample=True))
    scheduler.set_timesteps(250)
    rule, denoise = SAMPLERS.get("ddpm"), perfect_denoiser(PROCESS)
    coefficients = [np.tanh(np.random.default_rng([1, k]).standard_normal(shape)) for k in range(250)]
    ours, theirs = start(shape), torch.from_numpy(start(shape))
    for step, v in zip(sampler_steps(PROCESS.timesteps(250)), coefficients, strict=True):
        noise = noise_for(step.number, shape) if step.t_next >= 0 else None
        ours, _ = rule(PROCESS, step, ours, np.stack([denoise(ours, step.t), v]), None, noise)
        output = torch.from_numpy(np.concatenate([denoise(theirs.numpy(), step.t), v], axis=1))
        theirs = scheduler.step(output, step.t, theirs).prev_sample
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    assert np.abs(ours - run("ddpm", 250)[0]).max() > 0.01


@pytest.mark.parametrize("steps", [10, 25, 50, 250])
def test_ddim_matches_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(**shared(clip_sample=True, timestep_spacing="trailing"))
    scheduler.set_timesteps(steps)
    theirs = walk_diffusers(scheduler, trailing(steps), use_clipped_model_output=True)
    np.testing.assert_allclose(run("ddim", steps), theirs, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_dpmpp_matches_diffusers(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **shared(
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
    )
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(run("dpmpp", steps), walk_diffusers(scheduler, trailing(steps)), atol=1e-4)


@pytest.mark.parametrize("steps", [250, 60])
def test_ancestral_sampling_has_the_moments_of_its_chain(steps: int) -> None:
    """For Gaussian data every step is linear, so mean and variance of the chain follow by a scalar recursion."""
    times = PROCESS.timesteps(steps)
    mean, variance = 0.0, 1.0
    for t, t_next in zip(times, [*times[1:], -1], strict=True):
        signal = PROCESS.signal[t]
        gain = np.sqrt(signal) * DEVIATION**2 / (signal * DEVIATION**2 + 1 - signal)
        of_clean, of_noisy, added = PROCESS.posterior(t, t_next)
        mean = of_clean * (MEAN + gain * (mean - np.sqrt(signal) * MEAN)) + of_noisy * mean
        variance = (of_clean * gain + of_noisy) ** 2 * variance + added
    shape = (40_000,)
    x = np.random.default_rng(0).standard_normal(shape)
    sample = walk("ddpm", perfect_denoiser(PROCESS), x, steps, lambda k: noise_for(k, shape))
    assert sample.mean() == pytest.approx(mean, abs=0.005)
    assert sample.std() == pytest.approx(np.sqrt(variance), rel=0.015)  # 4 standard errors of 40,000 draws
    assert mean == pytest.approx(MEAN, abs=0.005)
    assert np.sqrt(variance) == pytest.approx(DEVIATION, rel=0.04 if steps == 250 else 0.12)


def exact_solution(x: np.ndarray) -> np.ndarray:
    """Probability-flow ODE of Gaussian data: x_t keeps its standard score within the marginal of t."""
    signal = PROCESS.signal[-1]
    return MEAN + DEVIATION * (x - np.sqrt(signal) * MEAN) / np.sqrt(signal * DEVIATION**2 + 1 - signal)


def error(name: str, steps: int) -> float:
    return float(np.abs(run(name, steps) - exact_solution(start())).mean())


@pytest.mark.parametrize("steps", [20, 40, 80])
def test_ddim_is_of_first_order(steps: int) -> None:
    assert error("ddim", 2 * steps) / error("ddim", steps) == pytest.approx(0.5, abs=0.1)


def test_dpmpp_is_of_higher_order() -> None:
    assert error("dpmpp", 40) < 0.3 * error("dpmpp", 20)
    assert error("dpmpp", 250) < 0.001 * DEVIATION


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_second_order_is_nearer_to_the_exact_solution(steps: int) -> None:
    assert error("dpmpp", steps) < error("ddim", steps)


@pytest.mark.parametrize("name", SAMPLERS.names())
class TestEverySampler:
    def test_works_voxel_by_voxel(self, name: str) -> None:
        """A block of a volume takes the step that the whole volume takes."""
        rule = SAMPLERS.get(name)
        x, prediction, before, noise = np.random.default_rng(2).standard_normal((4, 3, 5, 7))
        for step in sampler_steps(PROCESS.timesteps(12)):
            whole = rule(PROCESS, step, x, prediction[None], before, noise)
            part = rule(PROCESS, step, x[1:, 2:4], prediction[None, 1:, 2:4], before[1:, 2:4], noise[1:, 2:4])
            for of_whole, of_part in zip(whole, part, strict=True):
                np.testing.assert_array_equal(of_whole[1:, 2:4], of_part)

    def test_does_not_modify_what_it_is_given(self, name: str) -> None:
        given = np.random.default_rng(2).standard_normal((4, 3, 5, 7))
        kept = given.copy()
        for step in sampler_steps(PROCESS.timesteps(3)):
            SAMPLERS.get(name)(PROCESS, step, given[0], given[1][None], given[2], given[3])
        np.testing.assert_array_equal(given, kept)

    def test_stays_within_the_range_of_images(self, name: str) -> None:
        assert np.abs(walk(name, lambda x, t: 30 * np.sin(50 * x), start(), 9)).max() <= 1

    def test_keeps_float32(self, name: str) -> None:
        x = walk(name, lambda x, t: 0.5 * x, start().astype(np.float32), 5, lambda k: noise_for(k).astype(np.float32))
        assert x.dtype == np.float32

    def test_takes_a_single_step(self, name: str) -> None:
        assert np.isfinite(run(name, 1)).all()

    def test_refuses_to_go_without_what_it_needs(self, name: str) -> None:
        rule, (first, second, *_) = SAMPLERS.get(name), sampler_steps(PROCESS.timesteps(4))
        x = start()
        if rule.adds_noise:
            with pytest.raises(ValueRangeError, match="adds noise"):
                rule(PROCESS, first, x, x[None])
        if rule.looks_back:
            rule(PROCESS, first, x, x[None])
            with pytest.raises(ValueRangeError, match="step before"):
                rule(PROCESS, second, x, x[None])


def test_steps_know_their_neighbours() -> None:
    steps = sampler_steps([9, 4, 0])
    assert [(s.number, s.t_before, s.t, s.t_next) for s in steps] == [(0, None, 9, 4), (1, 9, 4, 0), (2, 4, 0, -1)]


def test_only_ddpm_adds_noise_and_only_dpmpp_looks_back() -> None:
    assert [name for name in SAMPLERS.names() if SAMPLERS.get(name).adds_noise] == ["ddpm"]
    assert [name for name in SAMPLERS.names() if SAMPLERS.get(name).looks_back] == ["dpmpp"]


def test_unknown_sampler() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'ddim'"):
        SAMPLERS.get("dim")
