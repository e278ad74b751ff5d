"""Our loss in the form that PyTC v1's ``Criterion`` calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...training import weighted_bce

NAME = "NeuroDiffWeightedBCE"


class NeuroDiffWeightedBCE(nn.Module):
    """Binary cross-entropy on logits, sum(w * bce) / sum(w): voxels of weight 0 do not count in the mean either.

    For ``MODEL.LOSS_OPTION``, with ``MODEL.OUTPUT_ACT`` "none": :func:`connectomics_neurodiff.training.weighted_bce`.
    """

    def forward(self, pred: Tensor, target: Tensor, weight_mask: Tensor | None = None) -> Tensor:
        """Loss of logits `pred` (b, c, z, y, x) against `target` of the same shape."""
        weight = torch.ones_like(target) if weight_mask is None else weight_mask
        return weighted_bce(pred, target, weight.expand_as(target))
