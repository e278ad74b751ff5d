"""MSC: multi-scale conditioning. The masks are encoded once and added, as hints, to every level of the U-Net encoder.

Paper section 2.1: c_i = zero convolution(resize(c_embed)), f_i <- f_i + c_i.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Downsample, conv3, join_pixels, resize_sections, zero_conv3
from .options import DenoiserOptions


class ConditionPath(nn.Module):
    """Condition encoder and projections: masks to one hint per encoder level.

    A hint is projected to the level's channels at the lower of the two resolutions, its own and the embedding's;
    :func:`~connectomics_neurodiff.synthesis.nets.blocks.resize_sections` brings it to the level's when it is added.
    Interpolating first, as published, costs 9 times more at a crop of 8x512x512, for an equal number of parameters.
    """

    def __init__(self, options: DenoiserOptions) -> None:
        super().__init__()
        widths = options.condition_channels
        flat = options.flat_levels
        self.pixels = options.pixels
        first = conv3(2 * self.pixels**2, widths[0], flat=flat > 0)
        deeper = (Downsample(a, b, flat=level < flat) for level, (a, b) in enumerate(pairwise(widths), start=1))
        self.encoder = nn.ModuleList([first, *deeper])
        self.projections = nn.ModuleList(
            zero_conv3(widths[-1], channels, flat=level < flat) for level, channels in enumerate(options.channels)
        )
        self.shrinkage = [max(r // options.embedding_reduction, 1) for r in options.reductions]

    def forward(self, condition: Tensor) -> list[Tensor]:
        """Map (b, 2, z, y, x) in [-1, 1] to one hint (b, c_i, z, y', x') per level, finest level first."""
        h = join_pixels(condition, self.pixels)
        for layer in self.encoder:
            h = F.silu(layer(h))
        return [
            project(resize_sections(h, (h.shape[3] // shrink, h.shape[4] // shrink)))
            for project, shrink in zip(self.projections, self.shrinkage, strict=True)
        ]
