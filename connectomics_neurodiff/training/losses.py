"""The loss of affinity training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Weights of a patch without a single annotated voxel sum to 0: its loss is 0, not NaN.
_LEAST_WEIGHT = 1e-6
#: Added to numerator and denominator of the Dice loss: a patch without a neuron has loss 0, not NaN. [pytc]
_DICE_SMOOTHING = 100.0
DEFAULT_TERMS: Mapping[str, float] = MappingProxyType({"WeightedBCEWithLogitsLoss": 1.0})


def weighted_bce(logits: Tensor, affinity: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy, sum(w * bce) / sum(w).

    Parameters
    ----------
    logits : torch.Tensor
        (b, c, z, y, x), any real numbers; computed in float32 whatever the precision of the network.
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


def dice_loss(logits: Tensor, affinity: Tensor, weight: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016, section 3), smoothed as pytorch_connectomics does; mean over the batch.

    Parameters
    ----------
    logits, affinity, weight : torch.Tensor
        As for :func:`weighted_bce`; edges of weight 0 are left out, other weights make no difference.

    Returns
    -------
    torch.Tensor
        Scalar in [0, 1].
    """
    known = (weight > 0).float()
    predicted = (torch.sigmoid(logits.float()) * known).flatten(1)
    target = (affinity * known).flatten(1)
    overlap = 2 * (predicted * target).sum(1) + _DICE_SMOOTHING
    whole = (predicted**2).sum(1) + (target**2).sum(1) + _DICE_SMOOTHING
    return (1 - overlap / whole).mean()


#: Loss terms by the names that pytorch_connectomics gives them.
LOSS_TERMS = {"WeightedBCEWithLogitsLoss": weighted_bce, "DiceLoss": dice_loss}


def shape_loss(logits: Tensor, shape: Tensor, weight: Tensor) -> Tensor:
    """Squared error of local shape descriptors inside neurons (Sheridan et al. 2023); mean over voxels and channels.

    Parameters
    ----------
    logits, shape : torch.Tensor
        (b, 10, z, y, x); descriptors are the sigmoids of the logits.
    weight : torch.Tensor
        (b, 1, z, y, x) >= 0.

    Returns
    -------
    torch.Tensor
        Scalar in [0, 1]; 0 where nothing is labelled.
    """
    error = (torch.sigmoid(logits.float()) - shape).square().mean(1, keepdim=True)
    return (error * weight).sum() / weight.sum().clamp_min(_LEAST_WEIGHT)


def affinity_loss(
    network: nn.Module,
    batch: dict[str, Tensor],
    *,
    terms: Mapping[str, float] = DEFAULT_TERMS,
    shape_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a segmenter on a batch of :class:`AffinityPatches`, in the form that ``engine.fit`` takes.

    Parameters
    ----------
    network : torch.nn.Module
        Image (b, 1, z, y, x) -> logits (b, c, z, y, x): the channels of affinity, then those of shape if there are any.
    batch : dict
        image, affinity and weight, with shape descriptors shape and shape_weight, each with a leading batch axis.
    terms : mapping of str to float
        Weight of each of `LOSS_TERMS` that takes part.
    shape_weight : float
        Weight of the loss of the shape descriptors.

    Returns
    -------
    loss : torch.Tensor
        Scalar.
    logs : dict
        The terms by name; ``"accuracy"``: weighted share of edges on the right side of 0.5.
    """
    affinity, weight = batch["affinity"], batch["weight"]
    output = network(batch["image"])
    logits = output[:, : affinity.shape[1]]
    logs = {name: LOSS_TERMS[name](logits, affinity, weight) for name in terms}
    loss = torch.stack([terms[name] * value for name, value in logs.items()]).sum()
    if "shape" in batch:
        logs["shape"] = shape_loss(output[:, affinity.shape[1] :], batch["shape"], batch["shape_weight"])
        loss = loss + shape_weight * logs["shape"]
    with torch.no_grad():
        right = ((logits > 0) == (affinity > 0.5)).float()
        accuracy = (right * weight).sum() / weight.sum().clamp_min(_LEAST_WEIGHT)
    return loss, {name: value.detach() for name, value in logs.items()} | {"accuracy": accuracy}
