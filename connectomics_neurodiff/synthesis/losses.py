"""The training objective of the diffusion model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


def noise_loss(network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean absolute error of what the network predicts: L_simple (Ho et al. 2020, eq. 14) in L1, as published.

    Parameters
    ----------
    network : torch.nn.Module
        Denoiser, see :func:`~connectomics_neurodiff.synthesis.nets.build.build_denoiser`.
    batch : mapping
        ``noisy`` and ``target`` (b, 1, z, y, x), ``t`` (b,), ``condition`` (b, 2, z, y, x), ``voxel_nm`` (b, 3): what
        :class:`~connectomics_neurodiff.synthesis.crops.DiffusionCrops` makes, collated.

    Returns
    -------
    loss : torch.Tensor
        Scalar, float32.
    parts : dict
        ``l1``: the same, detached, for a log.
    """
    predicted = network(batch["noisy"], batch["t"], batch["condition"], batch["voxel_nm"])
    loss = F.l1_loss(predicted.float(), batch["target"].float())
    return loss, {"l1": loss.detach()}
