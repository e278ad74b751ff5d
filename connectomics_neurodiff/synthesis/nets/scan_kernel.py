"""The selective scan on the CPU in float32: numba kernels that hold the state of a few channels in the cache.

The recurrence is that of :mod:`.scan`; :mod:`.scan_blocks` is the readable twin of these kernels. Work is cut into one
task per batch element and `CHANNELS` channels, walked by plain threads: numba's own would not survive a fork or a
second caller. Sums over channels are made per task and added in order, so that results do not depend on the number of
threads.

Glossary: b batch, l tokens, d channels, n states per channel. Arrays are (b, l, d) and (b, l, n), channels last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger("connectomics_neurodiff")

#: Channels of a task: with 16 states, state, decays and gradients of a token are 4 KiB each.
CHANNELS = 64
#: Tokens between two states that are kept for the backward pass; what it recomputes between them is 256 KiB.
BLOCK = 32

# No "reassoc" here: it would undo the rounding in `_exp`.
_EXACT = {"contract"}
_SUMS = {"contract", "reassoc", "nsz"}

_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)
_LOWEST = np.float32(-87.33)  # below, exp(x) is less than the smallest normal number
_HIGHEST = np.float32(88.0)
_LOG2_E = np.float32(1 / np.log(2))
#: Added and taken away again, it leaves the nearest whole number, and that number in the lowest bits in between.
_ROUND = np.float32(1.5 * 2**23)
_LN2_HIGH = np.float32(0.693359375)  # 9 bits: its products with |k| <= 127 are exact
_LN2_LOW = np.float32(np.log(2) - 0.693359375)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.polynomial.Chebyshev.interpolate(np.exp, 6, (-0.35, 0.35))
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)
_ONE_BITS = np.int32(0x3F800000)  # 1.0
_MANTISSA = np.int32(23)


def _kernel(fastmath: set[str]) -> Callable[[Callable[..., None]], Any]:
    """Decorator: compiled at the first call and cached on disk, or, where no folder can be written, not cached."""

    def compiled(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            logger.warning(
                "The kernel %s is compiled anew in every process, which takes seconds: set NUMBA_CACHE_DIR to a folder "
                "that can be written.",
                function.__name__,
            )
            return njit(**options)(function)

    return compiled


def _bitcast(source: Any, target: Any, llvm_target: Any) -> Any:
    """A function for kernels that takes the bits of one type for those of another."""

    @intrinsic
    def cast(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_target)

        return target(source), generate

    return cast


_bits_of = _bitcast(types.float32, types.int32, ir.IntType(32))
_from_bits = _bitcast(types.int32, types.float32, ir.FloatType())


@njit(inline="always", fastmath=_EXACT)
def _exp(x: Any) -> Any:
    """exp(x) = 2^k exp(f) to 2e-7, in steps that LLVM makes for 16 numbers at once, as libm's function is not.

    0 below -87.33, infinite above 88, NaN for NaN.
    """
    inside = min(max(x, _LOWEST), _HIGHEST)
    rounded = inside * _LOG2_E + _ROUND
    k = rounded - _ROUND
    f = (inside - k * _LN2_HIGH) - k * _LN2_LOW
    power = _from_bits((_bits_of(rounded) << _MANTISSA) + _ONE_BITS)
    value = power * ((((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0)
    if x < _LOWEST:
        value = _ZERO
    if x > _HIGHEST:
        value = _INFINITY
    return value


@_kernel(_EXACT)
def _forward(
    u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, y: np.ndarray, starts: np.ndarray
) -> None:
    """Channels of one sample: y (l, d) from u and delta (l, d), A (n, d), B and C (l, n).

    The state before every `BLOCK`-th token goes to `starts` (blocks, n, d), unless that has no block.
    """
    tokens, channels = u.shape
    states = A.shape[0]
    h = np.zeros((states, channels), np.float32)
    decay_rate = A.copy()
    step, drive, sums = np.empty((3, channels), np.float32)
    for t in range(tokens):
        if starts.shape[0] > 0 and t % BLOCK == 0:
            starts[t // BLOCK] = h
        for j in range(channels):
            step[j] = delta[t, j]
            drive[j] = delta[t, j] * u[t, j]
            sums[j] = 0
        for n in range(states):
            b, c = B[t, n], C[t, n]
            for j in range(channels):
                state = _exp(step[j] * decay_rate[n, j]) * h[n, j] + drive[j] * b
                h[n, j] = state
                sums[j] += state * c
        y[t] = sums


@_kernel(_EXACT)
def _states(u: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, decays: np.ndarray, h: np.ndarray) -> None:
    """Decays (l, n, d) and states of a block; h[0] is the state before it, h[t + 1] (n, d) the one after token t."""
    tokens, channels = u.shape
    step, drive = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for t in range(tokens):
        for j in range(channels):
            step[j] = delta[t, j]
            drive[j] = delta[t, j] * u[t, j]
        for n in range(A.shape[0]):
            b = B[t, n]
            for j in range(channels):
                decay = _exp(step[j] * A[n, j])
                decays[t, n, j] = decay
                h[t + 1, n, j] = decay * h[t, n, j] + drive[j] * b


@_kernel(_SUMS)
def _backward(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    starts: np.ndarray,
    grad_y: np.ndarray,
    grad_u: np.ndarray,
    grad_delta: np.ndarray,
    grad_A: np.ndarray,
    grad_B: np.ndarray,
    grad_C: np.ndarray,
) -> None:
    """Gradients of `_forward`; those of B and C (l, n) are sums over these channels only.

    The gradient g of the states obeys the recurrence backwards in time: g_t = C_t dy_t + decay_(t+1) g_(t+1).
    """
    tokens, channels = u.shape
    states = A.shape[0]
    decay_rate = A.copy()
    decays = np.empty((BLOCK, states, channels), np.float32)
    h = np.empty((BLOCK + 1, states, channels), np.float32)
    later = np.zeros((states, channels), np.float32)  # decay_(t+1) g_(t+1)
    sum_A = np.empty((states, channels), np.float32)
    grad_A[:] = 0
    step, drive, grad_sum, grad_drive, grad_step = np.empty((5, channels), np.float32)
    for block in range(starts.shape[0] - 1, -1, -1):
        first, last = block * BLOCK, min((block + 1) * BLOCK, tokens)
        h[0] = starts[block]
        sum_A[:] = 0
        _states(u[first:last], delta[first:last], decay_rate, B[first:last], decays, h)
        for t in range(last - 1, first - 1, -1):
            row = t - first
            for j in range(channels):
                step[j] = delta[t, j]
                drive[j] = delta[t, j] * u[t, j]
                grad_sum[j] = grad_y[t, j]
                grad_drive[j] = 0
                grad_step[j] = 0
            for n in range(states):
                b, c = B[t, n], C[t, n]
                sum_B, sum_C = _ZERO, _ZERO
                for j in range(channels):
                    g = c * grad_sum[j] + later[n, j]
                    sum_B += g * drive[j]
                    sum_C += grad_sum[j] * h[row + 1, n, j]
                    grad_drive[j] += g * b
                    decayed = decays[row, n, j] * g
                    later[n, j] = decayed
                    of_exponent = decayed * h[row, n, j]
                    grad_step[j] += of_exponent * decay_rate[n, j]
                    sum_A[n, j] += of_exponent * step[j]
                grad_B[t, n] = sum_B
                grad_C[t, n] = sum_C
            for j in range(channels):
                grad_u[t, j] = grad_drive[j] * step[j]
                grad_delta[t, j] = grad_step[j] + grad_drive[j] * u[t, j]
        grad_A += sum_A  # block by block: a sum over all tokens one by one would lose digits


def scan_in_kernels(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y (b, d, l) from u, delta (b, d, l), A (d, n), B and C (b, n, l): float32 on the CPU, differentiable once."""
    # Inside a Function autograd is always off.
    y: Tensor = _KernelScan.apply(u, delta, A, B, C, torch.is_grad_enabled())
    return y


class _KernelScan(torch.autograd.Function):
    """`scan_in_kernels`; keeps one state per `BLOCK` tokens where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, differentiable: bool) -> Tensor:
        u_, delta_, B_, C_ = (tensor.transpose(1, 2).contiguous() for tensor in (u, delta, B, C))
        A_ = A.t().contiguous()
        samples, tokens, channels = u_.shape
        blocks = -(-tokens // BLOCK) if differentiable and any(ctx.needs_input_grad) else 0
        y = torch.empty_like(u_)
        starts = u.new_empty(samples, blocks, *A_.shape)
        arrays = [tensor.detach().numpy() for tensor in (u_, delta_, A_, B_, C_, y, starts)]
        nu, ndelta, nA, nB, nC, ny, nstarts = arrays

        def task(i: int, part: slice) -> None:
            channel = (i, slice(None), part)
            _forward(nu[channel], ndelta[channel], nA[:, part], nB[i], nC[i], ny[channel], nstarts[i][:, :, part])

        _in_threads(task, samples, channels)
        ctx.save_for_backward(u_, delta_, A_, B_, C_, starts)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        u = saved[0]
        samples, tokens, channels = u.shape
        states = saved[2].shape[0]
        parts = -(-channels // CHANNELS)
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_A = u.new_empty(samples, states, channels)
        grad_B, grad_C = (u.new_empty(parts, samples, tokens, states) for _ in range(2))
        nu, ndelta, nA, nB, nC, nstarts, ngrad = (
            tensor.detach().numpy() for tensor in (*saved, grad_y.transpose(1, 2).contiguous())
        )
        du, ddelta, dA, dB, dC = (tensor.numpy() for tensor in (grad_u, grad_delta, grad_A, grad_B, grad_C))

        def task(i: int, part: slice) -> None:
            channel, index = (i, slice(None), part), part.start // CHANNELS
            _backward(
                *(nu[channel], ndelta[channel], nA[:, part], nB[i], nC[i], nstarts[i][:, :, part], ngrad[channel]),
                *(du[channel], ddelta[channel], dA[i][:, part], dB[index, i], dC[index, i]),
            )

        _in_threads(task, samples, channels)
        return (
            grad_u.transpose(1, 2),
            grad_delta.transpose(1, 2),
            grad_A.sum(0).t(),
            grad_B.sum(0).transpose(1, 2),
            grad_C.sum(0).transpose(1, 2),
            None,
        )


def _in_threads(task: Callable[[int, slice], None], samples: int, channels: int) -> None:
    """Run the task of every sample and channel part in as many threads as torch may use."""
    tasks: Sequence[tuple[int, slice]] = [
        (i, slice(first, min(first + CHANNELS, channels)))
        for i in range(samples)
        for first in range(0, channels, CHANNELS)
    ]
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for one in tasks:
            task(*one)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda one: task(*one), tasks))
