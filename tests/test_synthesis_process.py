"""The noise schedule and the Gaussian algebra that follows from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from connectomics_neurodiff.errors import UnknownName, ValueRangeError
from connectomics_neurodiff.synthesis import DiffusionProcess, cosine_betas, noise_loss


def test_cosine_schedule_matches_diffusers() -> None:
    theirs = DDPMScheduler(num_train_timesteps=250, beta_schedule="squaredcos_cap_v2").betas.numpy()
    np.testing.assert_allclose(cosine_betas(250), theirs, rtol=1e-4)


def test_signal_follows_the_squared_cosine_until_the_cap() -> None:
    process = DiffusionProcess(cosine_betas(250, 0.008))
    expected = [math.cos((t / 250 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1, 250)]
    np.testing.assert_allclose(process.signal[:-1], np.array(expected) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    assert process.betas[-1] == 0.999


@pytest.mark.parametrize(("steps", "s"), [(0, 0.008), (-3, 0.008), (10, -0.1), (10, float("nan"))])
def test_schedules_that_are_refused(steps: int, s: float) -> None:
    with pytest.raises(ValueRangeError, match="Got"):
        cosine_betas(steps, s)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [float("nan")], [[0.1]]])
def test_betas_that_are_refused(betas: list) -> None:
    with pytest.raises(ValueRangeError, match="Got"):
        DiffusionProcess(betas)


@pytest.mark.parametrize("t", [0, 100, 249])
def test_noise_added_step_by_step_has_the_moments_of_adding_it_at_once(t: int) -> None:
    """Eq. 1 applied t + 1 times is eq. 4: mean and variance are tracked through the chain by hand."""
    process = DiffusionProcess(cosine_betas(250))
    mean, variance = 0.7, 0.0
    for beta in process.betas[: t + 1]:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    clean, zero, one = np.full(3, 0.7), np.zeros(3), np.ones(3)
    np.testing.assert_allclose(process.add_noise(clean, t, zero), mean, rtol=1e-9)
    np.testing.assert_allclose(process.add_noise(zero, t, one), math.sqrt(variance), rtol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "image"])
@pytest.mark.parametrize("t", [0, 120, 240])
def test_a_perfect_prediction_gives_the_image_back(prediction: str, t: int) -> None:
    rng = np.random.default_rng(0)
    process = DiffusionProcess(cosine_betas(250), prediction)
    clean, noise = rng.uniform(-1, 1, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    x_t, target = process.add_noise(clean, t, noise), process.target(clean, t, noise)
    np.testing.assert_allclose(process.clean_from(target, x_t, t), clean, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "image"])
def test_an_error_of_the_prediction_is_an_error_of_the_image_as_said(prediction: str) -> None:
    process = DiffusionProcess(cosine_betas(250), prediction)
    for t in (0, 60, 200, 249):
        moved = process.clean_from(np.array([1.0]), np.zeros(1), t) - process.clean_from(
            np.array([0.0]), np.zeros(1), t
        )
        assert abs(float(moved[0])) == pytest.approx(process.clean_errors[t], rel=1e-9)


@pytest.mark.parametrize("prediction", ["velocity", "image"])
@pytest.mark.parametrize("t", [0, 20, 90, 200, 249])
def test_what_is_predicted_has_unit_variance_at_every_noise_level(prediction: str, t: int) -> None:
    """Of an image of unit variance; the network's output then needs no scale of its own (Karras et al. 2022)."""
    rng = np.random.default_rng(0)
    process = DiffusionProcess(cosine_betas(250), prediction)
    target = process.target(rng.standard_normal(100_000), t, rng.standard_normal(100_000))
    assert float(target.std()) == pytest.approx(1, abs=0.01)


def test_the_grain_filter_is_wieners() -> None:
    """Kept of an image that is nothing but grain, the share is the one with the least error; by brute force."""
    process = DiffusionProcess(cosine_betas(250), "image")
    rng = np.random.default_rng(0)
    grain, noise = 0.12 * rng.standard_normal(200_000), rng.standard_normal(200_000)
    for t in (5, 20, 60):
        x_t = process.add_noise(grain, t, noise)
        kept = float(process.clean_from(np.zeros(1), np.ones(1), t)[0])
        errors = {share: float(np.square(share * x_t - grain).mean()) for share in np.linspace(0, 1.2, 1201)}
        assert kept == pytest.approx(min(errors, key=lambda share: errors[share]), abs=0.01)


@pytest.mark.parametrize("t", [0, 120, 249])
def test_the_velocity_turns_into_the_image(t: int) -> None:
    """v and x_t are (epsilon, x_0) turned by the angle whose cosine is sqrt(alpha_bar): a rotation by hand."""
    rng = np.random.default_rng(0)
    process = DiffusionProcess(cosine_betas(250), "velocity")
    clean, noise = rng.uniform(-1, 1, (2, 3, 4)), rng.standard_normal((2, 3, 4))
    x_t, velocity = process.add_noise(clean, t, noise), process.target(clean, t, noise)
    angle = math.acos(math.sqrt(process.signal[t]))
    np.testing.assert_allclose(math.cos(angle) * x_t - math.sin(angle) * velocity, clean, atol=1e-12)


def test_the_published_prediction_is_the_noise_itself() -> None:
    process = DiffusionProcess(cosine_betas(10))
    noise = np.ones((2, 2))
    assert process.target(np.zeros((2, 2)), 4, noise) is noise
    with pytest.raises(UnknownName, match="Did you mean 'velocity'"):
        DiffusionProcess([0.1], "velocty")


@pytest.mark.parametrize(("t", "t_next"), [(249, 248), (200, 150), (1, 0), (30, -1)])
def test_posterior_is_bayes_rule(t: int, t_next: int) -> None:
    """q(s | t, 0) from the product of the Gaussians q(s | 0) and q(t | s), worked out in precisions."""
    process = DiffusionProcess(cosine_betas(250))
    of_clean, of_noisy, variance = process.posterior(t, t_next)
    if t_next < 0:
        assert (of_clean, of_noisy, variance) == (1.0, 0.0, 0.0)
        return
    kept = float(np.prod(1 - process.betas[t_next + 1 : t + 1]))
    prior, likelihood = 1 / (1 - process.signal[t_next]), kept / (1 - kept)
    assert variance == pytest.approx(1 / (prior + likelihood), rel=1e-6)
    assert of_clean == pytest.approx(variance * prior * math.sqrt(process.signal[t_next]), rel=1e-6)
    assert of_noisy == pytest.approx(variance * likelihood / math.sqrt(kept), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 249, 250])
def test_timesteps_fall_strictly_from_the_noisiest(steps: int) -> None:
    times = DiffusionProcess(cosine_betas(250)).timesteps(steps)
    assert len(times) == steps
    assert times[0] == 249
    assert times[-1] >= 0
    assert (np.diff(times) <= -1).all()
    assert steps != 250 or times == list(range(249, -1, -1))


def test_noise_levels_are_spaced_as_karras_et_al_space_them() -> None:
    """Eq. 5 of the paper by hand, from 30 to .03 with rho 7, against the levels that ten steps visit."""
    process = DiffusionProcess(cosine_betas(1000))
    level = np.sqrt((1 - process.signal) / process.signal)
    visited = level[process.timesteps(10)]
    by_hand = [(30 ** (1 / 7) + i / 9 * (0.03 ** (1 / 7) - 30 ** (1 / 7))) ** 7 for i in range(10)]
    np.testing.assert_allclose(visited[1:], by_hand[1:], rtol=0.05)
    assert visited[0] == level[-1]


@pytest.mark.parametrize("steps", [0, -1, 251])
def test_more_steps_than_the_process_has(steps: int) -> None:
    with pytest.raises(ValueRangeError, match="1 to 250"):
        DiffusionProcess(cosine_betas(250)).timesteps(steps)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.5), (1.0, 1.4)])
def test_levels_are_drawn_from_a_log_normal(mean: float, spread: float) -> None:
    """Against the normal distribution function between the levels of neighbouring steps."""
    process = DiffusionProcess(cosine_betas(1000))
    shares = process.level_shares(mean, spread)
    assert shares.sum() == pytest.approx(1)
    level = np.log(np.sqrt((1 - process.signal) / process.signal))
    for edge in (mean - spread, mean, mean + spread / 2):
        expected = 0.5 * (1 + math.erf((edge - mean) / spread / math.sqrt(2)))
        assert shares[level < edge].sum() == pytest.approx(expected, abs=0.01)


def test_without_a_spread_all_steps_are_alike() -> None:
    np.testing.assert_allclose(DiffusionProcess(cosine_betas(8)).level_shares(1.0, 0.0), 1 / 8)
    np.testing.assert_allclose(DiffusionProcess([0.5]).level_shares(1.0, 1.0), 1)


@pytest.mark.parametrize(("mean", "spread"), [(0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_levels_that_are_refused(mean: float, spread: float) -> None:
    with pytest.raises(ValueRangeError, match="spread >= 0"):
        DiffusionProcess(cosine_betas(8)).level_shares(mean, spread)


def test_the_squared_loss_is_least_at_the_mean_and_the_absolute_one_at_the_median() -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x_t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x_t, self.value)

    values = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 2, 2)  # a quarter is dark
    batch = {"noisy": values, "target": values, "t": torch.zeros(1), "condition": values, "voxel_nm": values}
    grid = [i / 20 for i in range(21)]
    best = {n: min(grid, key=lambda v: float(noise_loss(Constant(v), batch, norm=n)[0])) for n in ("l1", "l2")}
    assert best == {"l1": 0.0, "l2": 0.25}
    with pytest.raises(UnknownName, match="l1, l2"):
        noise_loss(Constant(0.0), batch, norm="l3")


def test_the_loss_is_the_mean_absolute_error_of_the_noise() -> None:
    class Constant(nn.Module):
        def forward(
            self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, voxel_nm: torch.Tensor
        ) -> torch.Tensor:
            return torch.full_like(x_t, 0.5)

    noise = torch.tensor([1.0, -1.0, 0.5, 2.0]).view(1, 1, 1, 2, 2)
    batch = {"noisy": noise, "target": noise, "t": torch.zeros(1), "condition": noise, "voxel_nm": noise}
    loss, parts = noise_loss(Constant(), batch)
    assert float(loss) == pytest.approx((0.5 + 1.5 + 0 + 1.5) / 4)
    assert float(parts["l1"]) == float(loss)


@pytest.mark.parametrize("t", [1, 30, 120, 248, 249])
def test_the_learned_variance_matches_diffusers(t: int) -> None:
    betas = cosine_betas(250)
    theirs = DDPMScheduler(trained_betas=betas.tolist(), variance_type="learned_range")
    v = np.array([-1.0, -0.3, 0.0, 1.0, 1.4])
    expected = theirs._get_variance(t, predicted_variance=torch.tensor(v)).numpy()
    np.testing.assert_allclose(DiffusionProcess(betas).learned_log_variance(v, t, t - 1), expected, atol=2e-4)


@pytest.mark.parametrize(("t", "t_next"), [(249, 248), (249, 187), (62, 0), (5, 4)])
def test_the_learned_variance_of_skipped_steps_lies_between_posterior_and_their_beta(t: int, t_next: int) -> None:
    process = DiffusionProcess(cosine_betas(250))
    beta = 1 - float(np.prod(1 - process.betas[t_next + 1 : t + 1]))
    low, middle, high = np.exp(process.learned_log_variance(np.array([-1.0, 0.0, 1.0]), t, t_next))
    assert low == pytest.approx(process.posterior(t, t_next)[2], rel=1e-9)
    assert high == pytest.approx(beta, rel=1e-9)
    assert middle == pytest.approx(math.sqrt(low * high), rel=1e-9)


def test_the_last_step_takes_the_posterior_of_the_one_before() -> None:
    process = DiffusionProcess(cosine_betas(250))
    low, high = np.exp(process.learned_log_variance(np.array([-1.0, 1.0]), 0, -1))
    assert low == pytest.approx(process.posterior(1, 0)[2], rel=1e-9)
    assert high == pytest.approx(process.betas[0], rel=1e-9)
    one_step = DiffusionProcess([0.3])
    np.testing.assert_allclose(one_step.learned_log_variance(np.array([-1.0, 1.0]), 0, -1), math.log(0.3))


def test_the_learned_variance_keeps_shape_and_type() -> None:
    v = np.zeros((2, 3, 5), np.float32)
    got = DiffusionProcess(cosine_betas(9)).learned_log_variance(v, 4, 2)
    assert (got.shape, got.dtype) == (v.shape, v.dtype)
