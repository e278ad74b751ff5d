"""Convolutions on the CPU: by oneDNN at every size, and in bfloat16 with results that can be trusted.

Torch leaves some float32 convolutions of single samples to an older way of its own, see `ONEDNN_THRESHOLD`; here none.

oneDNN 3.12 (torch 2.13) goes wrong twice in bfloat16 on processors with AMX:

* It writes past its buffers in the bfloat16 weight gradient: mostly of layers with 32 output channels or fewer, in
  sections of 2,000 pixels or more; the process dies later in malloc, or worse, does not. The weight gradient is
  computed in float32 here: where exactly it is sound may change with the processor's caches.
* It reads memory that is not its own in the forward pass on a single section with a kernel of several (3x3x3; 1, 3, 5,
  7 or 12 input channels): NaN, or wrong numbers that look right. Of such a kernel only the middle section meets the
  image; it alone is used here, and it is sound.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight

# Torch leaves a float32 convolution of a single sample to its own im2col, up to 13 times slower than oneDNN, where
# batch x channels x z x y is not larger than this (use_mkldnn in aten/src/ATen/native/Convolution.cpp). Besides, its
# result is not channels last in memory, and every later layer pays for that.
ONEDNN_THRESHOLD = 20480


def weight_gradient(
    gradient: Tensor, x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Weight gradient of an undilated, ungrouped conv3d: dL/dw[o, i, k] = sum over p of g[o, p] x[i, stride p + k].

    Parameters
    ----------
    gradient : torch.Tensor
        (b, o, z, y, x) gradient of the output.
    x : torch.Tensor
        (b, i, z', y', x') input, of the same type.
    kernel, stride, padding : tuple of 3 ints
        Geometry of the convolution, zero padding.

    Returns
    -------
    torch.Tensor
        (o, i, *kernel), computed in float32, or in float64 if the operands are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (gradient.shape[1], x.shape[1], *kernel)
    x, gradient = x.to(wide), gradient.to(wide)
    if _left_to_torch(x) and gradient.shape[3] > 1 and set(kernel) != {1}:
        x, gradient = _halves_as_batch(x, gradient, kernel[1], stride[1], padding[1])
        padding = (padding[0], 0, padding[2])
    return conv3d_weight(x, shape, gradient, stride, padding)


def _halves_as_batch(x: Tensor, gradient: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Upper and lower half of one sample as a batch of two, padded along y; the weight gradient sums over both."""
    rows = gradient.shape[3]
    half = (rows + 1) // 2
    reach, below = (half - 1) * stride + kernel, half * stride
    missing = below + reach - x.shape[3] - padding
    x = F.pad(x, (0, 0, padding, max(missing, 0)))
    gradient = F.pad(gradient, (0, 0, 0, 2 * half - rows))
    halves = torch.cat([x[:, :, :, :reach], x[:, :, :, below : below + reach]])
    gradients = torch.cat([gradient[:, :, :, :half], gradient[:, :, :, half:]])
    layout = torch.channels_last_3d
    return halves.contiguous(memory_format=layout), gradients.contiguous(memory_format=layout)


def input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Input gradient of an undilated, ungrouped conv3d.

    Parameters
    ----------
    gradient : torch.Tensor
        (b, o, z, y, x) gradient of the output.
    x : torch.Tensor
        (b, i, z', y', x') input; only its shape and layout matter.
    weight : torch.Tensor
        (o, i, kz, ky, kx).
    stride, padding : tuple of 3 ints
        Geometry of the convolution, zero padding.

    Returns
    -------
    torch.Tensor
        (b, i, z', y', x').
    """
    geometry = (stride, padding, [1, 1, 1], False, [0, 0, 0], 1)
    if x.dtype == torch.float32 and _left_to_torch(
        x
    ):  # a batch of two goes to oneDNN: twice the work in a fraction of the time
        x, gradient = (torch.cat([tensor, tensor]) for tensor in (x, gradient))
        return torch.ops.aten.convolution_backward(gradient, x, weight, None, *geometry, [True, False, False])[0][:1]
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *geometry, [True, False, False])[0]


def _left_to_torch(x: Tensor) -> bool:
    """Whether torch would not give a float32 convolution of `x` to oneDNN."""
    return len(x) == 1 and x[..., 0].numel() <= ONEDNN_THRESHOLD


class _OneDNNConvolution(torch.autograd.Function):
    """conv3d by oneDNN in the type of `x`, its gradients by :func:`weight_gradient` and :func:`input_gradient`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, precision: torch.dtype
    ) -> Tensor:
        low = x.to(precision), weight.to(precision)
        ctx.save_for_backward(*low)
        ctx.stride, ctx.padding, ctx.has_bias, ctx.input_type = stride, padding, bias is not None, x.dtype
        bias = None if bias is None else bias.to(precision)
        with torch.autocast("cpu", enabled=False):
            if precision == torch.float32:
                return torch.ops.aten.mkldnn_convolution(*low, bias, padding, stride, [1, 1, 1], 1)
            return F.conv3d(*low, bias, stride, padding)  # to oneDNN where the processor has bfloat16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Of a last layer it comes channels first, and so would that of its input: every layer before it would convert.
        low = gradient.to(x.dtype, memory_format=torch.channels_last_3d)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = input_gradient(low, x, weight, ctx.stride, ctx.padding).to(ctx.input_type)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(low, x, weight.shape[2:], ctx.stride, ctx.padding)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3, 4), dtype=torch.float32)
        return of_x, of_weight, of_bias, None, None, None


def _forward(convolution: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = convolution.groups == 1 and set(convolution.dilation) == {1} and not isinstance(convolution.padding, str)
    if x.device.type != "cpu":
        return nn.Conv3d._conv_forward(convolution, x, weight, bias)
    low = torch.is_autocast_enabled("cpu")
    if not low and not (plain and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return nn.Conv3d._conv_forward(convolution, x, weight, bias)
    if not plain:  # none of our networks has one; float32 is sound
        with torch.autocast("cpu", enabled=False):
            return nn.Conv3d._conv_forward(convolution, x.float(), weight, bias).to(torch.bfloat16)
    padding: Any = convolution.padding
    if convolution.padding_mode != "zeros":
        x = F.pad(x, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
        padding = (0, 0, 0)
    if x.shape[2] == 1 and weight.shape[2] == 2 * padding[0] + 1:
        weight, padding = weight[:, :, padding[0] : padding[0] + 1], (0, *padding[1:])
    precision = torch.bfloat16 if low else torch.float32
    result: Tensor = _OneDNNConvolution.apply(x, weight, bias, convolution.stride, padding, precision)
    return result


class Convolution(nn.Conv3d):
    """A 3D convolution that computes as this module says; parameters and names are torch's."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(self, x, weight, bias)


def use_sound_convolutions(network: nn.Module) -> None:
    """Let every 3D convolution of a network compute as this module says, as :class:`Convolution` does.

    Parameters
    ----------
    network : torch.nn.Module
        Changed in place; parameters and names stay as they are. Doing it twice does no harm.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = partial(_forward, module)  # type: ignore[method-assign]
