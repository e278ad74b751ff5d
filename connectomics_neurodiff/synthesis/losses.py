"""The training objective of the diffusion model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnknownName, ValueRangeError, did_you_mean
from .process import DiffusionProcess, interpolated

NORMS = ("l1", "l2")
#: Standard deviation of the noise below which errors of the image do not count more.
LEAST_NOISE = 0.05
#: Weight of L_vlb beside L_simple (Nichol and Dhariwal 2021, section 3.1).
VLB_WEIGHT = 0.001


def noise_loss(
    network: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    norm: str = "l1",
    weight: Tensor | None = None,
    bound: VariationalBound | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean error of what the network predicts: L_simple (Ho et al. 2020, eq. 14).

    The least squared error is that of the mean, which a sampler needs; the least absolute error, as published, is that
    of the median: where the mask leaves it open whether a voxel is dark, it is bright, and what is rare is not painted.

    Parameters
    ----------
    network : torch.nn.Module
        Denoiser, see :func:`~connectomics_neurodiff.synthesis.nets.build.build_denoiser`.
    batch : mapping
        ``noisy`` and ``target`` (b, 1, z, y, x), ``t`` (b,), ``condition`` (b, 2, z, y, x), ``voxel_nm`` (b, 3): what
        :class:`~connectomics_neurodiff.synthesis.crops.DiffusionCrops` makes, collated.
    norm : {"l1", "l2"}
        Absolute error as published, or squared error.
    weight : torch.Tensor, optional
        (T,) factor of the error at each step; see :func:`min_snr_weight`.
    bound : VariationalBound, optional
        For a network with ``learn_variance``: adds ``VLB_WEIGHT`` times L_vlb, which trains the variance alone
        (L_hybrid, Nichol and Dhariwal 2021, eq. 16).

    Returns
    -------
    loss : torch.Tensor
        Scalar, float32.
    parts : dict
        The error by its `norm` and, with a bound, ``vlb`` in nats per voxel: detached, for a log.

    Raises
    ------
    UnknownName
        If there is no such norm.
    """
    if norm not in NORMS:
        raise UnknownName(f"No norm '{norm}'.{did_you_mean(norm, NORMS)} Known: {', '.join(NORMS)}.")
    predicted = network(batch["noisy"], batch["t"], batch["condition"], batch["voxel_nm"]).float()
    error = predicted[:, :1] - batch["target"].float()
    size = error.abs() if norm == "l1" else error.square()
    if weight is not None:
        size = size * _per_sample(weight, batch["t"])
    loss = size.mean()
    parts = {norm: loss.detach()}
    if bound is not None:
        vlb = bound(error.detach(), predicted[:, 1:], batch["t"])
        loss = loss + VLB_WEIGHT * vlb
        parts["vlb"] = vlb.detach()
    return loss, parts


def min_snr_weight(process: DiffusionProcess, gamma: float, norm: str = "l1") -> Tensor:
    """Min-SNR-gamma weighting (Hang et al. 2023, eq. 8).

    Published for squared errors: the error of x_0 weighs min(SNR, gamma), hence that of the noise min(SNR, gamma) /
    SNR and that of the velocity min(SNR, gamma) / (SNR + 1). Absolute errors are scaled by the roots of these; only so
    do all predictions weigh the same error of x_0 alike.

    Parameters
    ----------
    process : DiffusionProcess
        Schedule, and what is predicted.
    gamma : float
        Largest weight > 0; 5 as published.
    norm : {"l1", "l2"}
        Of the loss.

    Returns
    -------
    torch.Tensor
        (T,) float32 > 0.

    Raises
    ------
    ValueRangeError
        If gamma is not a positive number.
    """
    if not 0 < gamma < math.inf:
        raise ValueRangeError(f"Min-SNR weighting needs a finite gamma > 0. Got {gamma}.")
    snr = process.signal / (1 - process.signal)
    return _of_norm(np.minimum(snr, gamma) * process.clean_errors**2, norm)


def velocity_weight(process: DiffusionProcess, norm: str = "l1") -> Tensor:
    """Weighting by which an error of the image counts as that of the velocity does; up to `LEAST_NOISE`.

    Without, a network that predicts the image hardly learns what is fine, which only little noise leaves visible
    (Li and He 2025, who predict the image and weigh its error so).

    Parameters
    ----------
    process, norm
        As in :func:`min_snr_weight`.

    Returns
    -------
    torch.Tensor
        (T,) float32 > 0; 1 for the velocity itself but for the least noise.
    """
    noise = np.maximum(1 - process.signal, LEAST_NOISE**2)
    return _of_norm(process.clean_errors**2 / noise, norm)


def _of_norm(squared: np.ndarray, norm: str) -> Tensor:
    """Weights of squared errors as weights of the errors of a norm."""
    return torch.tensor(np.sqrt(squared) if norm == "l1" else squared, dtype=torch.float32)


class VariationalBound:
    """L_vlb of a learned variance, the mean taken as given (Nichol and Dhariwal 2021, section 3.1).

    At t > 0 it is the Kullback-Leibler divergence of the posterior q(x_t-1 | x_t, x_0) from the network's Gaussian
    (Ho et al. 2020, L_t-1 of eq. 5). At t = 0 it is the negative log density of x_0 under that Gaussian, not the
    probability of an 8-bit grey value (their eq. 13): training images are jittered, and so not on the 8-bit grid.

    Both need of the two means only their distance, which is proportional to the error of the prediction.

    Parameters
    ----------
    process : DiffusionProcess
        Schedule, and what is predicted.
    """

    def __init__(self, process: DiffusionProcess) -> None:
        steps = range(process.steps)
        bounds = [process.log_variance_bounds(t, t - 1) for t in steps]
        self.steps = process.steps
        self.least, self.largest = (torch.tensor(side, dtype=torch.float32) for side in zip(*bounds, strict=True))
        of_clean = np.array([process.posterior(t, t - 1)[0] for t in steps])
        self.mean_error = torch.tensor(of_clean * process.clean_errors, dtype=torch.float32)

    def __call__(self, error: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Scalar estimate of L_vlb, the sum over all T steps, in nats per voxel.

        Parameters
        ----------
        error : torch.Tensor
            (b, 1, z, y, x), prediction minus target; detached, or the bound would also train the mean.
        v : torch.Tensor
            Same shape: see :meth:`.DiffusionProcess.learned_log_variance`.
        t : torch.Tensor
            (b,) steps, drawn evenly.
        """
        least = _per_sample(self.least, t)
        log_variance = interpolated(v, least, _per_sample(self.largest, t))
        squared = (_per_sample(self.mean_error, t) * error) ** 2 * torch.exp(-log_variance)
        divergence = 0.5 * (log_variance - least + torch.exp(least - log_variance) - 1 + squared)
        density = 0.5 * (math.log(2 * math.pi) + log_variance + squared)
        first = (t == 0).view(-1, 1, 1, 1, 1)
        return self.steps * torch.where(first, density, divergence).mean()


def _per_sample(table: Tensor, t: Tensor) -> Tensor:
    """Entries (b, 1, 1, 1, 1) of a (T,) table."""
    return table.to(t.device)[t].view(-1, 1, 1, 1, 1)
