"""The selective scan on the CPU in float32: numba kernels that hold the state of a few channels in the cache.

The recurrence is that of :mod:`.scan`; :mod:`.scan_blocks` is the readable twin of these kernels. Work is cut into one
task per batch element and one or two times `PART` channels, walked by plain threads: numba's would not survive a fork
or a second caller. Sums over channels are made per part and added in order, so that results do not depend on the number
of threads.

Glossary: b batch, l tokens, d channels, n states per channel. Arrays are (b, l, d) and (b, l, n), channels last; d is
padded to whole parts; rate is A in powers of two, A / ln 2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .scan_vectors import LANES, exp2, load, spread, store, total

logger = logging.getLogger("connectomics_neurodiff")

#: Channels whose sums are made together: the results depend on it, not on the number of threads.
PART = 4 * LANES
#: Parts of a task at most, for rows of memory are read faster in one piece. With 16 states, the state, decays and
#: gradients of a token are then 8 KiB each.
TASK_PARTS = 2
#: Tokens between two states that are kept for the backward pass; what it recomputes between them is 512 KiB.
BLOCK = 32
#: Arrays (n, d) that the backward pass of a task works in.
WORK = 2 * BLOCK + 3

_ZERO, _LN_2 = np.float32(0), np.float32(np.log(2))


def _kernel(function: Callable[..., None]) -> Any:
    """Decorator: compiled at the first call and cached on disk, or, where no folder can be written, not cached."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        logger.warning(
            "The kernel %s is compiled anew in every process, which takes seconds: set NUMBA_CACHE_DIR to a folder "
            "that can be written.",
            function.__name__,
        )
        return njit(nogil=True)(function)


@_kernel
def _forward(
    u: np.ndarray,
    delta: np.ndarray,
    rate: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    y: np.ndarray,
    starts: np.ndarray,
    h: np.ndarray,
) -> None:
    """Channels of one sample: y (l, d) from u and delta (l, d), rate (n, d), B, C (l, n); h (n, d) is for the state.

    The state before every `BLOCK`-th token goes to `starts` (blocks, n, d), unless that has no block.
    """
    tokens, channels = u.shape
    states = rate.shape[0]
    h[:] = 0
    for t in range(tokens):
        if starts.shape[0] > 0 and t % BLOCK == 0:
            starts[t // BLOCK] = h
        for j in range(0, channels, LANES):
            step = load(delta, (t, j))
            drive = step * load(u, (t, j))
            sums = spread(_ZERO)
            for n in range(states):
                state = exp2(step * load(rate, (n, j))) * load(h, (n, j)) + drive * B[t, n]
                store(h, (n, j), state)
                sums = sums + state * C[t, n]
            store(y, (t, j), sums)


@_kernel
def _states(
    u: np.ndarray, delta: np.ndarray, rate: np.ndarray, B: np.ndarray, decays: np.ndarray, h: np.ndarray
) -> None:
    """Decays (l, n, d) and states of a block; h[0] is the state before it, h[t + 1] (n, d) the one after token t."""
    tokens, channels = u.shape
    for t in range(tokens):
        for j in range(0, channels, LANES):
            step = load(delta, (t, j))
            drive = step * load(u, (t, j))
            for n in range(rate.shape[0]):
                decay = exp2(step * load(rate, (n, j)))
                store(decays, (t, n, j), decay)
                store(h, (t + 1, n, j), decay * load(h, (t, n, j)) + drive * B[t, n])


@njit(inline="always")
def _four(array: Any, i: Any, j: Any) -> Any:
    """The vectors of a part: `PART` neighbours from (i, j) on."""
    return (
        load(array, (i, j)),
        load(array, (i, j + LANES)),
        load(array, (i, j + 2 * LANES)),
        load(array, (i, j + 3 * LANES)),
    )


@njit(inline="always")
def _store_four(array: Any, i: Any, j: Any, first: Any, second: Any, third: Any, fourth: Any) -> None:
    store(array, (i, j), first)
    store(array, (i, j + LANES), second)
    store(array, (i, j + 2 * LANES), third)
    store(array, (i, j + 3 * LANES), fourth)


@njit(inline="always")
def _through_state(
    row: Any, n: Any, j: Any, from_y: Any, step: Any, decays: Any, h: Any, later: Any, sum_A: Any
) -> Any:
    """Gradients of a state and of its decay's exponent, given what the state's output adds to the former."""
    g = from_y + load(later, (n, j))
    decayed = load(decays, (row, n, j)) * g
    store(later, (n, j), decayed)
    of_exponent = decayed * load(h, (row, n, j))
    store(sum_A, (n, j), load(sum_A, (n, j)) + of_exponent * step)
    return g, of_exponent


@_kernel
def _backward(
    u: np.ndarray,
    delta: np.ndarray,
    rate: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    starts: np.ndarray,
    grad_y: np.ndarray,
    grad_u: np.ndarray,
    grad_delta: np.ndarray,
    grad_A: np.ndarray,
    grad_B: np.ndarray,
    grad_C: np.ndarray,
    work: np.ndarray,
) -> None:
    """Gradients of `_forward`, with that of A for `rate`; those of B and C (parts, l, n) are sums over a part each.

    `work` is (`WORK`, n, d).

    The gradient g of the states obeys the recurrence backwards in time: g_t = C_t dy_t + decay_(t+1) g_(t+1).
    """
    tokens, channels = u.shape
    states = rate.shape[0]
    decays, h = work[:BLOCK], work[BLOCK : 2 * BLOCK + 1]
    later, sum_A = work[-2], work[-1]
    later[:] = 0  # decay_(t+1) g_(t+1)
    grad_A[:] = 0
    for block in range(starts.shape[0] - 1, -1, -1):
        first, last = block * BLOCK, min((block + 1) * BLOCK, tokens)
        h[0] = starts[block]
        sum_A[:] = 0
        _states(u[first:last], delta[first:last], rate, B[first:last], decays, h)
        for t in range(last - 1, first - 1, -1):
            row = t - first
            for j0 in range(0, channels, PART):  # four vectors at once: all sums of a part stay in registers
                j1, j2, j3 = j0 + LANES, j0 + 2 * LANES, j0 + 3 * LANES
                step0, step1, step2, step3 = _four(delta, t, j0)
                value0, value1, value2, value3 = _four(u, t, j0)
                grad0, grad1, grad2, grad3 = _four(grad_y, t, j0)
                drive0, drive1, drive2, drive3 = step0 * value0, step1 * value1, step2 * value2, step3 * value3
                of_drive0 = of_drive1 = of_drive2 = of_drive3 = spread(_ZERO)
                of_step0 = of_step1 = of_step2 = of_step3 = spread(_ZERO)
                for n in range(states):
                    b, c = B[t, n], C[t, n]
                    g0, x0 = _through_state(row, n, j0, grad0 * c, step0, decays, h, later, sum_A)
                    g1, x1 = _through_state(row, n, j1, grad1 * c, step1, decays, h, later, sum_A)
                    g2, x2 = _through_state(row, n, j2, grad2 * c, step2, decays, h, later, sum_A)
                    g3, x3 = _through_state(row, n, j3, grad3 * c, step3, decays, h, later, sum_A)
                    of_drive0, of_step0 = of_drive0 + g0 * b, of_step0 + x0 * load(rate, (n, j0))
                    of_drive1, of_step1 = of_drive1 + g1 * b, of_step1 + x1 * load(rate, (n, j1))
                    of_drive2, of_step2 = of_drive2 + g2 * b, of_step2 + x2 * load(rate, (n, j2))
                    of_drive3, of_step3 = of_drive3 + g3 * b, of_step3 + x3 * load(rate, (n, j3))
                    h0, h1, h2, h3 = _four(h[row + 1], n, j0)
                    grad_B[j0 // PART, t, n] = total(g0 * drive0 + g1 * drive1 + (g2 * drive2 + g3 * drive3))
                    grad_C[j0 // PART, t, n] = total(grad0 * h0 + grad1 * h1 + (grad2 * h2 + grad3 * h3))
                _store_four(grad_u, t, j0, of_drive0 * step0, of_drive1 * step1, of_drive2 * step2, of_drive3 * step3)
                _store_four(
                    grad_delta,
                    t,
                    j0,
                    of_step0 * _LN_2 + of_drive0 * value0,
                    of_step1 * _LN_2 + of_drive1 * value1,
                    of_step2 * _LN_2 + of_drive2 * value2,
                    of_step3 * _LN_2 + of_drive3 * value3,
                )
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
        u_, delta_, rate = (_whole_parts(tensor) for tensor in (u.mT, delta.mT, A.t() / math.log(2)))
        B_, C_ = B.mT.contiguous(), C.mT.contiguous()
        samples, tokens, channels = u_.shape
        blocks = -(-tokens // BLOCK) if differentiable and any(ctx.needs_input_grad) else 0
        y = _empty(*u_.shape)
        starts = _empty(samples, blocks, *rate.shape)
        nu, ndelta, nrate, nB, nC, ny, nstarts = (
            tensor.detach().numpy() for tensor in (u_, delta_, rate, B_, C_, y, starts)
        )

        def task(i: int, part: slice) -> None:
            channel, r = (i, slice(None), part), nrate[:, part]
            _forward(
                *(nu[channel], ndelta[channel], r, nB[i], nC[i], ny[channel], nstarts[i][:, :, part]),
                _empty(*r.shape).numpy(),
            )

        _in_threads(task, samples, channels)
        ctx.save_for_backward(u_, delta_, rate, B_, C_, starts)
        ctx.channels = u.shape[1]
        return y.mT[:, : u.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        u = saved[0]
        samples, tokens, channels = u.shape
        states = saved[2].shape[0]
        parts = channels // PART
        grad_u, grad_delta = _empty(*u.shape), _empty(*u.shape)
        grad_A = _empty(samples, states, channels)
        grad_B, grad_C = (_empty(samples, parts, tokens, states) for _ in range(2))
        nu, ndelta, nrate, nB, nC, nstarts, ngrad = (
            tensor.detach().numpy() for tensor in (*saved, _whole_parts(grad_y.mT))
        )
        du, ddelta, dA, dB, dC = (tensor.numpy() for tensor in (grad_u, grad_delta, grad_A, grad_B, grad_C))

        def task(i: int, part: slice) -> None:
            channel, first, r = (i, slice(None), part), part.start // PART, nrate[:, part]
            _backward(
                *(nu[channel], ndelta[channel], r, nB[i], nC[i], nstarts[i][:, :, part], ngrad[channel]),
                *(du[channel], ddelta[channel], dA[i][:, part], dB[i, first:], dC[i, first:]),
                _empty(WORK, *r.shape).numpy(),
            )

        _in_threads(task, samples, channels)
        given = slice(ctx.channels)
        return (
            grad_u.mT[:, given],
            grad_delta.mT[:, given],
            grad_A.sum(0).t()[given],
            grad_B.sum(1).mT,
            grad_C.sum(1).mT,
            None,
        )


def _whole_parts(tensor: Tensor) -> Tensor:
    """Contiguous, and padded to a multiple of `PART` channels; those that are added stay zero."""
    missing = -tensor.shape[-1] % PART
    return F.pad(tensor, (0, missing)) if missing else tensor.contiguous()


def _empty(*shape: int) -> Tensor:
    """Memory that begins with a cache line, or every vector would lie in two; in huge pages, if it is large.

    numpy, unlike torch, asks Linux for those: a fresh array costs half the time.
    """
    numbers = math.prod(shape)
    raw = np.empty(numbers + LANES, np.float32)
    first = -raw.ctypes.data % (4 * LANES) // 4
    return torch.from_numpy(raw[first : first + numbers]).view(shape)


def _in_threads(task: Callable[[int, slice], None], samples: int, channels: int) -> None:
    """Run the task of every sample and channel slice in as many threads as torch may use."""
    wide = samples * -(-channels // (TASK_PARTS * PART)) >= torch.get_num_threads()
    width = TASK_PARTS * PART if wide else PART
    tasks: Sequence[tuple[int, slice]] = [
        (i, slice(first, min(first + width, channels))) for i in range(samples) for first in range(0, channels, width)
    ]
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for one in tasks:
            task(*one)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda one: task(*one), tasks))
