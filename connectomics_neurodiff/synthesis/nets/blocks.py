"""Parts of the denoising U-Net: time embedding, residual block, resampling within sections.

Glossary: b batch, c channels, z, y, x sections, rows, columns. Sections are few and thick, so z is never resampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...convolution import Convolution
from .norm import NormSiLU


def time_embedding(t: Tensor, width: int, max_period: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of diffusion steps (Ho et al. 2020, after Vaswani et al. 2017).

    Parameters
    ----------
    t : torch.Tensor
        (b,) steps.
    width : int
        Even number of features: cosines, then sines.
    max_period : float
        Longest period in steps; 1000 as published.

    Returns
    -------
    torch.Tensor
        (b, width) float32 in [-1, 1].
    """
    half = width // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def conv3(in_channels: int, out_channels: int, *, flat: bool = False) -> Convolution:
    """3x3x3 convolution that keeps the shape, or 1x3x3: `flat`, within sections."""
    kernel, padding = ((1, 3, 3), (0, 1, 1)) if flat else (3, 1)
    return Convolution(in_channels, out_channels, kernel, padding=padding)


def zero_conv3(in_channels: int, out_channels: int, *, flat: bool = False) -> Convolution:
    """:func:`conv3` whose weights and bias start at zero, so that its branch starts as the identity."""
    conv = conv3(in_channels, out_channels, flat=flat)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class Pointwise(nn.Conv3d):
    """1x1x1 convolution as a matrix product over the voxels.

    The gradient of torch's is not channels last in memory, and every layer behind it would pay for that.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in, z, y, x) to (b, out, z, y, x)."""
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around an added time embedding, and a skip connection.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels; a 1x1x1 convolution adapts the skip connection where they differ.
    time_channels : int
        Width of the time embedding.
    groups : int
        Groups of the normalisation.
    flat : bool
        Whether its convolutions stay within a section.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, groups: int, *, flat: bool = False
    ) -> None:
        super().__init__()
        self.norm_in = NormSiLU(in_channels, groups)
        self.conv_in = conv3(in_channels, out_channels, flat=flat)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm_out = NormSiLU(out_channels, groups)
        self.conv_out = zero_conv3(out_channels, out_channels, flat=flat)
        self.skip = nn.Identity() if in_channels == out_channels else Pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, time: Tensor, *, spent: bool = False) -> Tensor:
        """Map (b, in, z, y, x) with the time embedding (b, time) to (b, out, z, y, x).

        A `spent` image is needed by nobody else. Unless a gradient or the skip connection needs it, it is overwritten,
        which saves a third of its memory.
        """
        overwrites = spent and not isinstance(self.skip, nn.Identity) and not torch.is_grad_enabled()
        skip = self.skip(x) if overwrites else None
        h = self.conv_in(self.norm_in(x, over=overwrites))
        h += self.time(F.silu(time))[:, :, None, None, None]  # in place: no convolution keeps its result
        h = self.norm_out(h)  # what was normalised can go before the convolution
        h = self.conv_out(h)
        h += self.skip(x) if skip is None else skip
        return h


class Downsample(Convolution):
    """Halve y and x by a strided 3x3x3 convolution, or a 1x3x3 one: `flat`."""

    def __init__(self, in_channels: int, out_channels: int, *, flat: bool = False) -> None:
        kernel, padding = ((1, 3, 3), (0, 1, 1)) if flat else (3, 1)
        super().__init__(in_channels, out_channels, kernel, padding=padding, stride=(1, 2, 2))


class Upsample(nn.Module):
    """Double y and x by interpolation, then convolve."""

    def __init__(self, channels: int, *, flat: bool = False) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, flat=flat)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, z, y, x) to (b, c, z, 2y, 2x)."""
        return self.conv(resize_sections(x, (2 * x.shape[3], 2 * x.shape[4])))


def join_pixels(x: Tensor, side: int) -> Tensor:
    """(b, c, z, y, x) as (b, c side^2, z, y / side, x / side): squares of pixels become channels."""
    if side == 1:
        return x
    b, c, z, height, width = x.shape
    squares = x.view(b, c, z, height // side, side, width // side, side)
    return squares.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, c * side * side, z, height // side, width // side)


def part_pixels(x: Tensor, side: int) -> Tensor:
    """Inverse of :func:`join_pixels`."""
    if side == 1:
        return x
    b, joined, z, height, width = x.shape
    c = joined // side**2
    squares = x.reshape(b, c, side, side, z, height, width).permute(0, 1, 4, 5, 2, 6, 3)
    return squares.reshape(b, c, z, height * side, width * side)


def resize_sections(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (b, c, z, y, x) to `size` (y, x) within sections: means when it shrinks, trilinear when it grows.

    With z kept, trilinear is bilinear per section, which is several times faster on the CPU. `size` must be a whole
    multiple or a whole fraction of the present one.
    """
    b, c, z, height, width = x.shape
    if size == (height, width):
        return x
    sections = x.transpose(1, 2).reshape(b * z, c, height, width)
    if size[0] < height:
        sections = F.avg_pool2d(sections, (height // size[0], width // size[1]))
    else:
        sections = F.interpolate(sections, size=size, mode="bilinear", align_corners=False)
    return sections.view(b, z, c, *size).transpose(1, 2)
