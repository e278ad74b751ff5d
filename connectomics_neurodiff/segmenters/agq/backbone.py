"""The backbone of AGQ: a residual 3D U-Net whose strides keep sizes of the form 2n + 1 aligned, and the fusion of its
levels into one map.

Voxel i of a level lies exactly on voxel 2i of the finer one (2n + 1 voxels become n + 1), so going down is a stride,
going up an interpolation with aligned corners, and nothing shifts by half a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..levels import Size

IN_PLANE: Size = (1, 3, 3)
ISOTROPIC: Size = (3, 3, 3)


def conv(in_channels: int, out_channels: int, kernel: Size, stride: Size = (1, 1, 1), bias: bool = False) -> nn.Conv3d:
    """Convolution that keeps the size (2n + 1 to n + 1 under a stride of 2); the border is replicated."""
    z, y, x = (k // 2 for k in kernel)
    return nn.Conv3d(in_channels, out_channels, kernel, stride, (z, y, x), bias=bias, padding_mode="replicate")


def conv_norm(in_channels: int, out_channels: int, kernel: Size, stride: Size = (1, 1, 1)) -> nn.Sequential:
    """Convolution and normalisation over 8 groups of channels."""
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride), nn.GroupNorm(math.gcd(8, out_channels), out_channels)
    )


def conv_norm_elu(in_channels: int, out_channels: int, kernel: Size, stride: Size = (1, 1, 1)) -> nn.Sequential:
    """Convolution, group normalisation, ELU."""
    return nn.Sequential(*conv_norm(in_channels, out_channels, kernel, stride), nn.ELU(inplace=True))


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear interpolation to `size` (z, y, x) with aligned corners."""
    if tuple(features.shape[2:]) == tuple(size):
        return features
    return functional.interpolate(features, size=tuple(size), mode="trilinear", align_corners=True)


class ResidualBlock(nn.Module):
    """Two convolutions in the plane, added to their input; (b, c, z, y, x) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_norm_elu(channels, channels, IN_PLANE), conv_norm(channels, channels, IN_PLANE)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return functional.elu(x + self.branch(x))


class Backbone(nn.Module):
    """Residual 3D U-Net; image in, the features of every level out.

    Parameters
    ----------
    in_channels : int
        Image channels.
    filters : sequence of int
        Feature maps per level, finest first.
    strides : sequence of (int, int, int)
        Step from each level to the next, (z, y, x), ``len(filters) - 1`` of them. A level that was reached by a step
        in z has 3x3x3 convolutions before its residual block, the others convolve in the plane.
    """

    def __init__(self, in_channels: int, filters: Sequence[int], strides: Sequence[Size]) -> None:
        super().__init__()
        kernels = [IN_PLANE, *(ISOTROPIC if stride[0] > 1 else IN_PLANE for stride in strides)]
        steps = [(1, 1, 1), *strides]
        inputs = [filters[0], *filters[:-1]]
        self.embed = conv_norm_elu(in_channels, filters[0], (1, 5, 5))
        self.down = nn.ModuleList(
            nn.Sequential(conv_norm_elu(a, b, kernel, step), ResidualBlock(b))
            for a, b, kernel, step in zip(inputs, filters, kernels, steps, strict=True)
        )
        levels = list(zip(filters[1:], filters[:-1], kernels[1:], strict=True))[::-1]
        self.project = nn.ModuleList(conv_norm_elu(coarse, fine, kernel) for coarse, fine, kernel in levels)
        self.refine = nn.ModuleList(ResidualBlock(fine) for _, fine, _ in levels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of all levels, finest first: level i is (b, filters[i], z_i, y_i, x_i)."""
        skips = self.encode(image)
        levels = [skips.pop()]
        for project, refine in zip(self.project, self.refine, strict=True):
            skip = skips.pop()
            levels.append(refine(resize(project(levels[-1]), skip.shape[2:]) + skip))
        return levels[::-1]

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of all levels before the decoder, finest first."""
        features, levels = self.embed(image), []
        for module in self.down:
            features = module(features)
            levels.append(features)
        return levels


class Fusion(nn.Module):
    """All levels of the backbone in one map at the second level, the grid on which AGQ works.

    Parameters
    ----------
    filters : sequence of int
        Feature maps per level, finest first.
    width : int
        Feature maps of the result.
    stride : (int, int, int)
        Step from the first level to the second.
    """

    def __init__(self, filters: Sequence[int], width: int, stride: Size) -> None:
        super().__init__()
        # Shrinking with aligned corners keeps every stride-th voxel of the finest level: the rest is not computed.
        self.lateral = nn.ModuleList(
            conv(channels, width, IN_PLANE, stride if level == 0 else (1, 1, 1))
            for level, channels in enumerate(filters)
        )
        self.merge = conv(width, width, IN_PLANE)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Features (b, width, z', y', x') at the second level."""
        size = levels[1].shape[2:]
        summed = torch.stack(
            [resize(lateral(level), size) for lateral, level in zip(self.lateral, levels, strict=True)]
        ).sum(0)
        return self.merge(summed)


def with_coordinates(features: Tensor) -> Tensor:
    """Append three channels with the position along z, y and x, each from -1 to 1."""
    axes = [torch.linspace(-1, 1, n, device=features.device, dtype=features.dtype) for n in features.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(features), -1, -1, -1, -1)
    return torch.cat([features, grid], dim=1)
