"""The objective: weights that mean the same for both predictions, and the bound of a learned variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from connectomics_neurodiff.errors import ValueRangeError
from connectomics_neurodiff.synthesis import (
    DiffusionProcess,
    VariationalBound,
    cosine_betas,
    min_snr_weight,
    noise_loss,
    velocity_weight,
)

SHAPE = (1, 2, 3, 5)
STEPS = 40
PREDICTIONS = ("noise", "velocity", "image")


def process_of(prediction: str) -> DiffusionProcess:
    return DiffusionProcess(cosine_betas(STEPS), prediction)


class Fixed(nn.Module):
    """A network that has learnt one output by heart."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor) -> Tensor:
        return self.output


def batch_at(process: DiffusionProcess, steps: list[int], seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray]:
    """Noisy samples at these steps, and the clean images behind them."""
    rng = np.random.default_rng(seed)
    clean = rng.uniform(-1, 1, (len(steps), *SHAPE))
    noise = rng.standard_normal(clean.shape)
    noisy = [process.add_noise(c, t, n) for c, t, n in zip(clean, steps, noise, strict=True)]
    target = [process.target(c, t, n) for c, t, n in zip(clean, steps, noise, strict=True)]
    arrays = {"noisy": np.array(noisy), "target": np.array(target), "condition": noise, "voxel_nm": noise}
    return {name: torch.tensor(a) for name, a in arrays.items()} | {"t": torch.tensor(steps)}, clean


def implied_clean(process: DiffusionProcess, prediction: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
    return process.clean_from(prediction, x_t, t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_all_predictions_weigh_the_same_error_of_the_image_alike(prediction: str, gamma: float) -> None:
    """Each weighted error is sqrt(min(SNR, gamma)) times the error of x_0, whatever is predicted."""
    process = process_of(prediction)
    steps = [0, 7, 20, 38]
    batch, clean = batch_at(process, steps)
    predicted = batch["target"] + 0.1 * torch.tensor(np.random.default_rng(1).standard_normal(clean.shape))
    by_hand = []
    for i, t in enumerate(steps):
        snr = process.signal[t] / (1 - process.signal[t])
        error = implied_clean(process, predicted[i].numpy(), batch["noisy"][i].numpy(), t) - clean[i]
        by_hand.append(math.sqrt(min(snr, gamma)) * np.abs(error).mean())
    loss, parts = noise_loss(Fixed(predicted), batch, weight=min_snr_weight(process, gamma))
    assert float(loss.detach()) == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert set(parts) == {"l1"}


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_an_image_is_weighed_as_its_velocity(norm: str, power: int) -> None:
    """The same error of x_0, as an error of the image and as one of the velocity, written out."""
    process, steps = process_of("image"), [10, 20, 38]
    batch, clean = batch_at(process, steps)
    predicted = batch["target"] + 0.1 * torch.tensor(np.random.default_rng(1).standard_normal(clean.shape))
    by_hand = []
    for i, t in enumerate(steps):
        x_t, signal = batch["noisy"][i].numpy(), process.signal[t]
        guess = implied_clean(process, predicted[i].numpy(), x_t, t)
        velocity, truth = ((np.sqrt(signal) * x_t - image) / np.sqrt(1 - signal) for image in (guess, clean[i]))
        by_hand.append((np.abs(velocity - truth) ** power).mean())
    loss, _ = noise_loss(Fixed(predicted), batch, norm=norm, weight=velocity_weight(process, norm))
    assert float(loss.detach()) == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_the_velocitys_own_weight_is_one_but_for_the_least_noise() -> None:
    weight = velocity_weight(DiffusionProcess(cosine_betas(250), "velocity"))
    assert torch.allclose(weight[20:], torch.ones(230))
    assert float(weight[0]) < 1


def test_a_gamma_beyond_every_ratio_leaves_the_noise_loss_as_it_is() -> None:
    weight = min_snr_weight(process_of("noise"), 1e9)
    assert torch.equal(weight, torch.ones(STEPS))
    assert float(min_snr_weight(process_of("noise"), 5.0)[0]) < 0.2  # least noise, least weight


@pytest.mark.parametrize("gamma", [0.0, -5.0, math.inf, math.nan])
def test_gammas_that_are_refused(gamma: float) -> None:
    with pytest.raises(ValueRangeError, match="gamma > 0"):
        min_snr_weight(process_of("noise"), gamma)


@settings(max_examples=40, deadline=None)
@given(
    prediction=st.sampled_from(PREDICTIONS),
    steps=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=4),
    spread=st.floats(-1.5, 1.5),
    seed=st.integers(0, 99),
)
def test_the_bound_is_the_divergence_of_gaussians(prediction: str, steps: list[int], spread: float, seed: int) -> None:
    """Means and variances of both Gaussians written out, and torch's divergence of them."""
    process = process_of(prediction)
    batch, clean = batch_at(process, steps, seed)
    rng = np.random.default_rng(seed)
    predicted = batch["target"].numpy() + 0.1 * rng.standard_normal(clean.shape)
    v = spread + 0.1 * rng.standard_normal(clean.shape)
    terms = []
    for i, t in enumerate(steps):
        x_t = batch["noisy"][i].numpy()
        of_clean, of_noisy, variance = process.posterior(t, t - 1)
        guess = of_clean * implied_clean(process, predicted[i], x_t, t) + of_noisy * x_t
        learned = Normal(torch.tensor(guess), torch.tensor(np.exp(process.learned_log_variance(v[i], t, t - 1) / 2)))
        if t == 0:
            terms.append(-learned.log_prob(torch.tensor(clean[i])))
        else:
            truth = Normal(torch.tensor(of_clean * clean[i] + of_noisy * x_t), math.sqrt(variance))
            terms.append(kl_divergence(truth, learned))
    error = torch.tensor(predicted) - batch["target"]
    got = VariationalBound(process)(error.float(), torch.tensor(v).float(), batch["t"])
    assert float(got) == pytest.approx(STEPS * float(torch.stack(terms).mean()), rel=1e-4, abs=1e-4)


def test_the_bound_is_least_where_the_variance_is_the_true_one() -> None:
    process = process_of("noise")
    v = torch.linspace(-1.5, 1.5, 61)
    bound = VariationalBound(process)
    values = [float(bound(torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), float(x)), torch.tensor([12]))) for x in v]
    assert float(v[int(np.argmin(values))]) == pytest.approx(-1)  # a perfect mean: nothing but the posterior is left
    assert min(values) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_trains_the_variance_and_leaves_the_mean_alone(prediction: str) -> None:
    process = process_of(prediction)
    batch, _ = batch_at(process, [0, 9, 33])
    output = torch.randn(3, 2, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    alone, both = Fixed(output[:, :1].clone()), Fixed(output.clone())
    simple, _ = noise_loss(alone, batch)
    hybrid, parts = noise_loss(both, batch, bound=VariationalBound(process))
    simple.backward()
    hybrid.backward()
    assert torch.equal(both.output.grad[:, :1], alone.output.grad)
    assert both.output.grad[:, 1].abs().min() > 0
    assert float(hybrid.detach()) == pytest.approx(float(parts["l1"]) + 0.001 * float(parts["vlb"]), rel=1e-6)
    assert float(parts["l1"]) == float(simple.detach())
