"""Group normalisation and SiLU in one, with a backward pass of its own on the CPU.

Torch's keeps the normalised image too, and takes 20 to 70 times as long with fewer than 16 channels per group.

Glossary: b batch, v voxels, c channels, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Numbers of a piece in the backward pass: the handful alive, 1 MiB each in float32, stay near the cache.
PIECE = 1 << 18
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
        if x.device.type != "cpu":
            return F.silu(F.group_norm(x, groups, weight, bias, self.eps), inplace=not torch.is_grad_enabled())
        result: Tensor = _NormSiLU.apply(x, weight, bias, groups, self.eps)
        return result


class _NormSiLU(torch.autograd.Function):
    """SiLU(weight (x - mean) / deviation + bias) that keeps `x` alone for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        b, c = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With y = scale x + shift per channel: dL/dx = scale dL/dy + slope x + offset, the last two per group."""
        x, weight, bias, *of_group = ctx.saved_tensors
        groups = of_group[0].shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, rstd = (value.to(wide).repeat_interleave(x.shape[1] // groups, dim=1)[:, None] for value in of_group)
        scale = rstd * weight
        shift = bias - mean * scale
        image, of_output = _voxels_first(x), _voxels_first(gradient)

        def of_normed_pieces() -> Iterator[tuple[Tensor, Tensor]]:
            for piece, above in zip(_pieces(image), _pieces(of_output), strict=True):
                piece = piece.to(wide)
                y = torch.addcmul(shift, piece, scale)
                yield piece, torch.ops.aten.silu_backward(above.to(wide), y)

        total, with_x = torch.zeros_like(scale), torch.zeros_like(scale)
        for piece, of_y in of_normed_pieces():
            total += of_y.sum(1, keepdim=True)
            with_x += (of_y * piece).sum(1, keepdim=True)
        of_weight = (with_x - mean * total) * rstd  # sum over the voxels of dL/dy (x - mean) / deviation
        count = image.shape[1] * image.shape[2] // groups
        slope = -_over_groups(of_weight * weight, groups) * rstd.square() / count
        offset = -mean * slope - _over_groups(total * weight, groups) * rstd / count
        of_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
        for (piece, of_y), part in zip(of_normed_pieces(), _pieces(_voxels_first(of_x)), strict=True):
            part.copy_(torch.addcmul(offset, of_y, scale).addcmul_(piece, slope))
        of_weight, of_bias = of_weight.sum((0, 1)).to(weight.dtype), total.sum((0, 1)).to(bias.dtype)
        return of_x, of_weight, of_bias, None, None


def _voxels_first(image: Tensor) -> Tensor:
    """(b, v, c) from (b, c, z, y, x): a view of an image that is channels last in memory."""
    return image.flatten(2).transpose(1, 2)


def _pieces(image: Tensor) -> tuple[Tensor, ...]:
    """(b, v, c) cut along v."""
    return image.split(max(PIECE // (image.shape[0] * image.shape[2]), 1), dim=1)


def _over_groups(values: Tensor, groups: int) -> Tensor:
    """(b, 1, c): the sum over the group of each channel."""
    grouped = values.unflatten(2, (groups, -1))
    return grouped.sum(3, keepdim=True).expand_as(grouped).flatten(2)
