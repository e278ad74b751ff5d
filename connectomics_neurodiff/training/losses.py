"""The loss of affinity training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Weights of a patch without a single annotated voxel sum to 0: its loss is 0, not NaN.
_LEAST_WEIGHT = 1e-6


def weighted_bce(logits: Tensor, affinity: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy, sum(w * bce) / sum(w).

    Parameters
    ----------
    logits : torch.Tensor
        (b, 3, z, y, x), any real numbers; computed in float32 whatever the precision of the network.
    affinity : torch.Tensor
        Targets in [0, 1], same shape.
    weight : torch.Tensor
        Weights >= 0, same shape; 0 leaves a voxel out.

    Returns
    -------
    torch.Tensor
        Scalar; nats per unit of weight.
    """
    loss = functional.binary_cross_entropy_with_logits(logits.float(), affinity, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp_min(_LEAST_WEIGHT)


def affinity_loss(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a segmenter on a batch of :class:`AffinityPatches`, in the form that ``engine.fit`` takes.

    Parameters
    ----------
    network : torch.nn.Module
        Image (b, 1, z, y, x) -> logits (b, 3, z, y, x).
    batch : dict
        image, affinity and weight, each with a leading batch axis.

    Returns
    -------
    loss : torch.Tensor
        Scalar.
    logs : dict
        ``"bce"``: the loss; ``"accuracy"``: weighted share of edges on the right side of 0.5.
    """
    logits = network(batch["image"])
    affinity, weight = batch["affinity"], batch["weight"]
    loss = weighted_bce(logits, affinity, weight)
    with torch.no_grad():
        right = ((logits > 0) == (affinity > 0.5)).float()
        accuracy = (right * weight).sum() / weight.sum().clamp_min(_LEAST_WEIGHT)
    return loss, {"bce": loss.detach(), "accuracy": accuracy}
