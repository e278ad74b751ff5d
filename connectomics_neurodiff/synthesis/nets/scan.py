"""The selective scan of Mamba: numba kernels on the CPU, mamba-ssm's kernel on CUDA, plain torch everywhere else.

Recurrence (Gu and Dao 2023, eq. 2 with the zero-order hold of mamba-ssm), per batch element, channel d and state n::

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t          y_t = sum_n C_t h_t + D u_t

Glossary: b batch, d channels, n states per channel, l tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ShapeMismatch
from .scan_blocks import scan_in_blocks


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective state-space scan, differentiable once in every tensor argument.

    The state is float32 (float64 for float64 input), also under bfloat16 autocast.

    Parameters
    ----------
    u, delta : torch.Tensor
        (b, d, l): input and step size per token.
    A : torch.Tensor
        (d, n): decay rates, negative in a stable system.
    B, C : torch.Tensor
        (b, n, l): input and output projections per token.
    D : torch.Tensor, optional
        (d,): skip connection; absent means none.
    z : torch.Tensor, optional
        (b, d, l): the output is multiplied by SiLU(z); absent means no gate.
    delta_bias : torch.Tensor, optional
        (d,): added to `delta` before the softplus.
    delta_softplus : bool
        Whether to pass `delta` through a softplus.

    Returns
    -------
    torch.Tensor
        (b, d, l) in the type of `u`.

    Raises
    ------
    ShapeMismatch
        If the shapes do not belong together.

    References
    ----------
    A. Gu and T. Dao, Mamba: Linear-time sequence modeling with selective state spaces, arXiv:2312.00752, 2023.
    """
    _check_shapes(u, delta, A, B, C, {"D": D, "delta_bias": delta_bias}, z)
    if u.is_cuda and u.dtype != torch.float64:
        kernel = _cuda_kernel()
        if kernel is not None:
            return _scan_on_cuda(kernel, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    state = torch.promote_types(u.dtype, torch.float32)
    with _full_precision(u.device.type):
        step = delta.to(state)
        if delta_bias is not None:
            step = step + delta_bias.to(state)[:, None]
        if delta_softplus:
            step = F.softplus(step)
        wide = u.to(state)
        y = _scan_for(wide)(wide, step, A.to(state), B.to(state), C.to(state))
        if D is not None:
            y = y + D.to(state)[:, None] * wide
        if z is not None:
            y = y * F.silu(z.to(state))
    return y.to(u.dtype)


def _scan_for(u: Tensor) -> Callable[..., Tensor]:
    """The scan for the device and precision of `u`."""
    if u.device.type == "cpu" and u.dtype == torch.float32:
        from .scan_kernel import scan_in_kernels  # numba takes a second to import

        return scan_in_kernels
    return scan_in_blocks


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Autocast off; nothing to do on devices without it, such as "meta"."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, per_channel: dict[str, Tensor | None], z: Tensor | None
) -> None:
    if u.ndim != 3 or 0 in u.shape or A.ndim != 2:
        raise ShapeMismatch(f"A scan needs u (b, d, l), not empty, and A (d, n). Got {_shape(u)} and {_shape(A)}.")
    b, d, tokens = u.shape
    n = A.shape[1]
    wanted = {"delta": (delta, (b, d, tokens)), "A": (A, (d, n)), "B": (B, (b, n, tokens)), "C": (C, (b, n, tokens))}
    wanted |= {name: (tensor, (d,)) for name, tensor in per_channel.items() if tensor is not None}
    if z is not None:
        wanted["z"] = (z, (b, d, tokens))
    for name, (tensor, shape) in wanted.items():
        if _shape(tensor) != shape:
            raise ShapeMismatch(f"For u {_shape(u)} and A {_shape(A)}, {name} must be {shape}. Got {_shape(tensor)}.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


@cache
def _cuda_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's fused kernel, or None where the package is not installed (it needs CUDA and a compiler)."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def _scan_on_cuda(
    kernel: Callable[..., Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The kernel wants the per-token tensors in one type and the parameters in float32."""

    def tokenwise(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(u.dtype).contiguous()

    def parameter(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float()

    return kernel(
        tokenwise(u),
        tokenwise(delta),
        parameter(A),
        tokenwise(B),
        tokenwise(C),
        parameter(D),
        z=tokenwise(z),
        delta_bias=parameter(delta_bias),
        delta_softplus=delta_softplus,
    )
