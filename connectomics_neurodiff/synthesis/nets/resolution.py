"""The voxel size as an input of the denoiser: which values are legal, what unknown means, and an embedding of it.

The published prior (RPGE) enters by coordinates, at reductions of 8 and more; fine texture is painted at reductions
that never see it. :class:`ResolutionEmbedding` tells every residual block [ours].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import ValueRangeError

#: All three entries of a voxel size that is not known.
UNKNOWN_NM = 0.0
#: Voxel sizes are embedded as logarithms of their ratio to this length, between pixels and sections of EM.
REFERENCE_NM = 10.0


def is_known(voxel_nm: Tensor) -> Tensor:
    """(b,) bool: which samples of (b, 3) have a voxel size."""
    return (voxel_nm > UNKNOWN_NM).all(dim=1)


def check_voxel_sizes(voxel_nm: Tensor) -> None:
    """Refuse what is neither three positive lengths nor three zeros, the unknown voxel size.

    Raises
    ------
    ValueRangeError
        If an entry of (b, 3) is negative or not finite, or only some of a sample's are 0.
    """
    for size in voxel_nm.tolist():
        if not (all(0 < v < float("inf") for v in size) or all(v == UNKNOWN_NM for v in size)):
            raise ValueRangeError(
                "A voxel size of the denoiser is three positive numbers in nm, (z, y, x), or three zeros where it is "
                f"unknown. Got {size}."
            )


class ResolutionEmbedding(nn.Module):
    """Embedding of the voxel size that is added to that of the diffusion step.

    Its last layer starts at zero, so that the network starts as one without it. An unknown voxel size has a learnt
    vector of its own: "nothing" would be a point that the embedding of a real size may take.

    Parameters
    ----------
    channels : int
        Width of the time embedding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.known = nn.Sequential(nn.Linear(3, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.unknown = nn.Parameter(torch.zeros(channels))
        for parameter in self.known[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, voxel_nm: Tensor) -> Tensor:
        """Map (b, 3) voxel sizes in nm, zeros where unknown, to (b, channels)."""
        known = is_known(voxel_nm)[:, None]
        ratio = torch.where(known, voxel_nm.float() / REFERENCE_NM, 1.0)  # no log(0), which would spoil the gradient
        return torch.where(known, self.known(ratio.log()), self.unknown)
