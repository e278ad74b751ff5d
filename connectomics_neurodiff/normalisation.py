"""Normalisation and an activation in one, with a backward pass of its own on the CPU.

Torch's backward pass of group normalisation takes 20 to 70 times as long with fewer than 16 channels per group, that of
batch normalisation in float32 twice as long as here; before a SiLU it keeps the normalised image too.

Glossary: b batch, v voxels, c channels, g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Numbers of a piece in the backward pass: the handful alive, 1 MiB each in float32, stay near the cache.
PIECE = 1 << 18


@dataclass(frozen=True)
class Activation:
    """A function of single numbers, and its backward pass: dL/dx of dL/dy and x, or of dL/dy and y (`of_result`)."""

    forward: Callable[..., Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    of_result: bool


def _elu_backward(gradient: Tensor, result: Tensor) -> Tensor:
    alpha = scale = input_scale = 1.0
    of_x: Tensor = torch.ops.aten.elu_backward(gradient, alpha, scale, input_scale, True, result)
    return of_x


SILU = Activation(F.silu, torch.ops.aten.silu_backward, of_result=False)
ELU = Activation(F.elu, _elu_backward, of_result=True)


def group_norm_and(activation: Activation, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation and an activation.

    Parameters
    ----------
    activation : Activation
        What follows.
    x : torch.Tensor
        (b, c, z, y, x).
    groups : int
        Groups of channels; c groups make it instance normalisation.
    weight, bias : torch.Tensor
        (c,).
    eps : float
        Added to the variance.

    Returns
    -------
    torch.Tensor
        As `x`; on the CPU with the channels last in memory.
    """
    if x.device.type != "cpu":
        return activation.forward(
            F.group_norm(x, groups, weight, bias, eps), inplace=activation.of_result or not torch.is_grad_enabled()
        )

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, c = x.shape[:2]
        return torch.native_group_norm(x, weight, bias, b, c, x[0, 0].numel(), groups, eps)

    result: Tensor = _NormalisedActivation.apply(x, weight, bias, normalise, activation)
    return result


class BatchNormELU(nn.BatchNorm3d):
    """Batch normalisation and an ELU: (b, c, z, y, x) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the batch in training, which moves the running statistics; by these in evaluation."""
        lone = x.numel() == x.shape[1]  # which torch refuses
        if x.device.type != "cpu" or not self.training or lone:
            return F.elu(super().forward(x), inplace=True)
        self._check_input_dim(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        result: Tensor = _NormalisedActivation.apply(x, self.weight, self.bias, self._normalise, ELU)
        return result

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.momentum is not None
        running = self.running_mean, self.running_var
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, *running, True, self.momentum, self.eps)
        return y, mean[None], rstd[None]


class InstanceNormELU(nn.InstanceNorm3d):
    """Instance normalisation and an ELU: (b, c, z, y, x) to the same shape.

    By torch: as group normalisation with a channel per group, torch 2.13 takes the variance from the mean of squares
    where channels are last in memory, and loses three digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the sample and channel."""
        return F.elu(super().forward(x), inplace=True)


class GroupNormELU(nn.GroupNorm):
    """Group normalisation and an ELU: (b, c, z, y, x) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the sample and group."""
        return group_norm_and(ELU, x, self.num_groups, self.weight, self.bias, self.eps)


class _NormalisedActivation(torch.autograd.Function):
    """activation(weight (x - mean) / deviation + bias), without keeping what stands in the brackets.

    `normalise` gives that, the mean and 1 / deviation, the two of samples and groups (b, g) or of channels (1, c) over
    the whole batch, which is one sample to what follows.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalise: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
        activation: Activation,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        y, mean, rstd = normalise(x, weight, bias)
        result = activation.forward(y, inplace=True)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, bias, mean, rstd, *([result] if activation.of_result else []))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """y = scale (x - mean) + bias, so dL/dx = scale dL/dy + slope (x - mean) + offset, the last two per group."""
        x, weight, bias, mean, rstd, *result = ctx.saved_tensors
        samples, groups = mean.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, rstd = (value.to(wide).repeat_interleave(x.shape[1] // groups, dim=1)[:, None] for value in (mean, rstd))
        scale = rstd * weight
        image, of_output, *result = (_voxels_first(image, samples) for image in (x, gradient, *result))

        def of_normed_pieces() -> Iterator[tuple[Tensor, Tensor]]:
            for piece, above, *after in zip(*map(_pieces, (image, of_output, *result)), strict=True):
                piece = piece - mean  # first of all: sums of what is far from 0 lose their digits
                known = after[0].to(wide) if after else torch.addcmul(bias, piece, scale)
                yield piece, ctx.activation.backward(above.to(wide), known)

        total, with_x = torch.zeros_like(scale), torch.zeros_like(scale)
        for piece, of_y in of_normed_pieces():
            total += of_y.sum(1, keepdim=True)
            with_x += of_y.mul_(piece).sum(1, keepdim=True)
        of_weight = with_x * rstd  # sum over the voxels of dL/dy (x - mean) / deviation
        count = image.shape[1] * image.shape[2] // groups
        slope = -_over_groups(of_weight * weight, groups) * rstd.square() / count
        offset = -_over_groups(total * weight, groups) * rstd / count
        of_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
        for (piece, of_y), part in zip(of_normed_pieces(), _pieces(_voxels_first(of_x, samples)), strict=True):
            part.copy_(of_y.mul_(scale).add_(offset).addcmul_(piece, slope))
        of_weight, of_bias = of_weight.sum((0, 1)).to(weight.dtype), total.sum((0, 1)).to(bias.dtype)
        return of_x, of_weight, of_bias, None, None


def _voxels_first(image: Tensor, samples: int) -> Tensor:
    """(samples, v, c) from (b, c, z, y, x): a view of an image that is channels last in memory."""
    image = image.contiguous(memory_format=torch.channels_last_3d)
    return image.movedim(1, -1).reshape(samples, -1, image.shape[1])


def _pieces(image: Tensor) -> tuple[Tensor, ...]:
    """(b, v, c) cut along v."""
    return image.split(max(PIECE // (image.shape[0] * image.shape[2]), 1), dim=1)


def _over_groups(values: Tensor, groups: int) -> Tensor:
    """(b, 1, c): the sum over the group of each channel."""
    grouped = values.unflatten(2, (groups, -1))
    return grouped.sum(3, keepdim=True).expand_as(grouped).flatten(2)
