"""bfloat16 convolutions on the CPU whose weight gradient is computed in float32.

oneDNN 3.12 (torch 2.13) writes past its buffers in the bfloat16 weight gradient of convolutions on processors with AMX:
layers of 32 channels or fewer, images 64 voxels wide or wider; the process dies later in malloc, or worse, does not.
Forward pass and input gradient are sound and three to four times faster than float32, so only the weight gradient is
taken back to float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _MixedConvolution(torch.autograd.Function):
    """conv3d in bfloat16; the gradient of weight and bias in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor:
        low = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(*low)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.has_bias, ctx.input_type = bias is not None, x.dtype
        with torch.autocast("cpu", enabled=False):
            low_bias = None if bias is None else bias.to(torch.bfloat16)
            return torch.nn.functional.conv3d(*low, low_bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry

        def backward_of(kind: torch.dtype, wanted: list[bool]) -> tuple[Tensor | None, ...]:
            return torch.ops.aten.convolution_backward(
                gradient.to(kind), x.to(kind), weight.to(kind), [weight.shape[0]] if ctx.has_bias else None,
                stride, padding, dilation, False, [0, 0, 0], groups, wanted,
            )  # fmt: skip

        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = backward_of(torch.bfloat16, [True, False, False])[0]
            of_x = of_x.to(ctx.input_type) if of_x is not None else None
        _, of_weight, of_bias = backward_of(torch.float32, [False, ctx.needs_input_grad[1], ctx.has_bias])
        return of_x, of_weight, of_bias, None, None, None, None


def _forward(convolution: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if convolution.padding_mode != "zeros":
        x = torch.nn.functional.pad(x, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode)
    padding = convolution.padding if convolution.padding_mode == "zeros" else (0, 0, 0)
    geometry: Any = (convolution.stride, padding, convolution.dilation, convolution.groups)
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
        result: Tensor = _MixedConvolution.apply(x, weight, bias, *geometry)
        return result
    return torch.nn.functional.conv3d(x, weight, bias, *geometry)


def keep_weight_gradients_in_float32(network: nn.Module) -> None:
    """Let every 3D convolution of a network compute its weight gradient in float32 under CPU autocast.

    Parameters
    ----------
    network : torch.nn.Module
        Changed in place; parameters, names and the forward pass stay as they are.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = _forward.__get__(module)  # type: ignore[method-assign]
