"""The network of the judge: image -> logit of "membrane" for every voxel, section by section."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 4


class SectionConvolution(nn.Conv3d):
    """Convolution of 3 x 3 within sections, of features (sections, channels, y, x).

    Its weights have five axes, which the engine's memory format asks for; two-dimensional convolutions of oneDNN are
    two to four times as fast on a CPU as its three-dimensional ones with a kernel of 1 x 3 x 3.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, (1, 3, 3), bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Same extent, zeros beyond the edges."""
        return F.conv2d(features, self.weight.squeeze(2).contiguous(), padding=1)


class BoundaryNetwork(nn.Module):
    """U-Net over sections, the finest level at half the in-plane resolution; a minute on one core trains it.

    Parameters
    ----------
    context : int
        Sections on either side that are seen with a section; 0 where sections are thick.
    channels : sequence of int
        Of the levels, finest first; multiples of 4.

    Notes
    -----
    2 x 2 voxels are unshuffled into channels on the way in and back on the way out: a convolution then costs a quarter.
    Any extent of a section: it is padded by its last rows and columns, and the logits are cropped.
    """

    def __init__(self, *, context: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.context, self.multiple = context, 2 ** len(channels)
        befores = (4 * (2 * context + 1), *channels[:-1])
        self.down = nn.ModuleList(self._block(before, after) for before, after in zip(befores, channels, strict=True))
        self.up = nn.ModuleList(
            self._block(channels[level] + channels[level + 1], channels[level])
            for level in reversed(range(len(channels) - 1))
        )
        self.head = nn.Conv3d(channels[0], 4, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [SectionConvolution(channels, after), nn.GroupNorm(_GROUPS, after), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (b, 1, z - 2 context, y, x) of an image (b, 1, z, y, x) of mean 0 and variance 1."""
        batch, _, depth, rows, columns = image.shape
        lack = -columns % self.multiple, -rows % self.multiple
        padded = F.pad(image, (0, lack[0], 0, lack[1], 0, 0), mode="replicate")
        # (b, z - 2 context, y, x, 2 context + 1) -> (b (z - 2 context), 2 context + 1, y, x)
        seen = padded[:, 0].unfold(1, 2 * self.context + 1, 1).permute(0, 1, 4, 2, 3).flatten(0, 1)
        features, levels = F.pixel_unshuffle(seen, 2), []
        for block in self.down:
            levels.append(block(features))
            features = F.avg_pool2d(levels[-1], 2)
        features = levels.pop()
        for block in self.up:
            features = block(torch.cat([F.interpolate(features, scale_factor=2), levels.pop()], dim=1))
        logits = F.pixel_shuffle(F.conv2d(features, self.head.weight.squeeze(2), self.head.bias), 2)
        return logits.reshape(batch, 1, depth - 2 * self.context, *logits.shape[2:])[..., :rows, :columns]
