"""RGM: resolution-prior guided global modelling, a Mamba block over all voxels that knows where they are in nm.

Paper section 2.1, eq. 3. Two deviations from the published code, where raw coordinates drown the features some 400:1
and the block cannot be skipped: coordinates are in physical units at the level's true pitch, centred and divided by
one reference length, and are added to *normalised* features; and the block is a residual that starts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mamba import Mamba
from .resolution import is_known

#: Coordinates are given in units of this length: a crop is then about as wide as a normalised feature, and crops of
#: the same voxel count at different voxel sizes still get different coordinates.
REFERENCE_NM = 1000.0


def physical_coordinates(shape: tuple[int, int, int], pitch_nm: Tensor) -> Tensor:
    """Coordinates of the voxel centres in units of `REFERENCE_NM`, centred on the volume.

    Parameters
    ----------
    shape : tuple of int
        (z, y, x) voxels of the level.
    pitch_nm : torch.Tensor
        (b, 3) distance of neighbouring voxels of the level in nm.

    Returns
    -------
    torch.Tensor
        (b, z * y * x, 3) float32 in raster order.
    """
    axes = [torch.arange(n, device=pitch_nm.device, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    return grid * (pitch_nm.float() / REFERENCE_NM)[:, None]


class ResolutionGuidedMamba(nn.Module):
    """x + Mamba(LayerNorm(x) + RPGE), over the voxels in raster order.

    Parameters
    ----------
    channels : int
        Channels of the level.
    rpge : bool
        Whether coordinates are encoded (eq. 3); a sample of unknown voxel size has none.
    directions : int
        Scan directions, 1 or 2.
    """

    def __init__(self, channels: int, *, rpge: bool, directions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.rpge = nn.Sequential(nn.Linear(3, channels), nn.ReLU(), nn.Linear(channels, channels)) if rpge else None
        self.mamba = Mamba(channels, directions=directions)
        nn.init.zeros_(self.mamba.out_proj.weight)

    def forward(self, x: Tensor, pitch_nm: Tensor) -> Tensor:
        """Map (b, c, z, y, x) with the level's pitch (b, 3) in nm, zeros where unknown, to (b, c, z, y, x)."""
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (b, l, c)
        if self.rpge is not None:
            shape = (x.shape[2], x.shape[3], x.shape[4])
            encoding = self.rpge(physical_coordinates(shape, pitch_nm))
            tokens = tokens + encoding * is_known(pitch_nm)[:, None, None]
        return x + self.mamba(tokens).transpose(1, 2).reshape(x.shape)
