"""Group normalisation and SiLU, over the image itself where that saves memory."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...normalisation import SILU, group_norm_and

#: At most so many parts of the channels are normalised one after the other where the result overwrites the image.
PARTS = 4


class NormSiLU(nn.GroupNorm):
    """Group normalisation with at most `groups` groups, the largest number that divides both, and a SiLU.

    Parameters
    ----------
    channels, groups : int
        Channels, and the most groups.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(math.gcd(groups, channels), channels)

    def forward(self, x: Tensor, *, over: bool = False) -> Tensor:
        """Map (b, c, z, y, x) to the same shape; `over` itself, and without gradients, it takes less memory.

        Written over `x`, channels are normalised in :data:`PARTS`, for twice the time or more. With fewer than three
        groups that would save nothing.
        """
        if not over or self.num_groups < 3:
            return self._of_groups(x, 0, self.num_groups)
        size, step = self.num_channels // self.num_groups, math.ceil(self.num_groups / PARTS)
        for first in range(0, self.num_groups, step):
            last = min(first + step, self.num_groups)
            x[:, first * size : last * size] = self._of_groups(x[:, first * size : last * size], first, last)
        return x

    def _of_groups(self, x: Tensor, first: int, last: int) -> Tensor:
        """Map the channels of the groups `first` to `last`, exclusively."""
        size, groups = self.num_channels // self.num_groups, last - first
        weight, bias = (of_channel[first * size : last * size] for of_channel in (self.weight, self.bias))
        return group_norm_and(SILU, x, groups, weight, bias, self.eps)
