"""The selective scan in plain torch, for any device and precision: blocks that stay in the cache, recomputed backwards.

The recurrence is that of :mod:`.scan`. A chunk is `CHUNK` tokens that are walked one after another, in all chunks of a
block at once; a block is as many tokens as keep one (tokens, b, d, n) array inside the cache. Only products of decays
exp(delta A) are formed, never quotients or logarithms of them, so that large steps underflow to the right answer,
zero, instead of overflowing.

Glossary: b batch, d channels, n states per channel, l tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Tokens walked one after another inside a chunk; 16 steps across some 30 chunks keep both loops of a block short.
CHUNK = 16
#: Numbers in one (tokens, b, d, n) array of a block: 4 MiB in float32, so that the handful alive stay near the cache.
BLOCK_NUMBERS = 1 << 20


def scan_in_blocks(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y (b, d, l) from u, delta (b, d, l), A (d, n), B and C (b, n, l); differentiable once."""
    y: Tensor = _BlockedScan.apply(u, delta, A, B, C)
    return y


class _BlockedScan(torch.autograd.Function):
    """y_t = sum_n C_t h_t with the states of a block recomputed in the backward pass from the state at its start."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        tokens = u.shape[2]
        u_, delta_, B_, C_ = (_tokens_first(t) for t in (u, delta, B, C))
        block = _block_length(u_.shape[0], u_.shape[1] * A.numel())
        y = torch.empty_like(u_)
        starts = []
        state = u.new_zeros(u.shape[0], *A.shape)  # (b, d, n)
        for first in range(0, u_.shape[0], block):
            part = slice(first, first + block)
            starts.append(state)
            _, h = _states(u_[part], delta_[part], A, B_[part], state)
            y[part] = torch.matmul(h, C_[part].unsqueeze(-1)).squeeze(-1)
            state = h[-1].clone()
        ctx.save_for_backward(u_, delta_, A, B_, C_, torch.stack(starts))
        ctx.block, ctx.tokens = block, tokens
        return _channels_first(y, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, starts = ctx.saved_tensors
        grad_y = _tokens_first(grad_y)
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
        dA = torch.zeros_like(A)
        later = torch.zeros_like(starts[0])  # decay of the next token times the gradient of its state, (b, d, n)
        with torch.autocast(u.device.type, enabled=False):
            for index in reversed(range(len(starts))):
                part = slice(index * ctx.block, (index + 1) * ctx.block)
                grads = _block_gradients(u[part], delta[part], A, B[part], C[part], starts[index], grad_y[part], later)
                du[part], ddelta[part], dB[part], dC[part], block_dA, later = grads
                dA += block_dA
        du, ddelta, dB, dC = (_channels_first(t, ctx.tokens) for t in (du, ddelta, dB, dC))
        return du, ddelta, dA, dB, dC


def _block_length(tokens: int, numbers_per_token: int) -> int:
    """Tokens per block, a multiple of `CHUNK`."""
    fitting = max(BLOCK_NUMBERS // numbers_per_token // CHUNK, 1) * CHUNK
    return min(fitting, tokens)


def _tokens_first(tensor: Tensor) -> Tensor:
    """(b, k, l) -> contiguous (l', b, k), padded to a multiple of `CHUNK` by zeros: a zero step keeps the state."""
    padded = F.pad(tensor, (0, -tensor.shape[2] % CHUNK))
    return padded.permute(2, 0, 1).contiguous()


def _channels_first(tensor: Tensor, tokens: int) -> Tensor:
    """(l', b, k) -> (b, k, l), without the padding."""
    return tensor[:tokens].permute(1, 2, 0)


def _states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of one block from the state `start` (b, d, n) before it.

    Returns
    -------
    decays : torch.Tensor
        (l + 1, b, d, n): exp(delta A); the last row is zero, the decay into a token that is not there.
    states : torch.Tensor
        (l, b, d, n).
    """
    tokens, b, _ = u.shape
    decays = u.new_empty(tokens + 1, b, *A.shape)
    decays[tokens] = 0
    torch.mul(delta.unsqueeze(-1), A, out=decays[:tokens]).exp_()
    h = (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
    _linear_recurrence_(decays[:tokens], h, start)
    return decays, h


def _linear_recurrence_(decay: Tensor, x: Tensor, start: Tensor, *, backwards: bool = False) -> None:
    """In place, x_t <- decay_t x_(t-1) + x_t with x_(-1) = start; backwards x_t <- decay_t x_(t+1) + x_t.

    `decay` and `x` are (l, b, d, n) with l a multiple of `CHUNK`; `start` is (b, d, n).
    """
    order = slice(None, None, -1) if backwards else slice(None)
    steps, chunks = range(CHUNK)[order], range(x.shape[0] // CHUNK)[order]
    a, h = (t.view(-1, CHUNK, *t.shape[1:]) for t in (decay, x))
    reach = torch.empty_like(h)  # product of the decays from where the walk enters the chunk to each token
    reach[:, steps[0]] = a[:, steps[0]]
    for before, step in pairwise(steps):
        torch.mul(reach[:, before], a[:, step], out=reach[:, step])
        h[:, step].addcmul_(a[:, step], h[:, before])
    entering = torch.empty_like(h[:, 0])
    entering[chunks[0]] = start
    for before, chunk in pairwise(chunks):
        torch.addcmul(h[before, steps[-1]], reach[before, steps[-1]], entering[before], out=entering[chunk])
    h.addcmul_(reach, entering.unsqueeze(1))


def _block_gradients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor, grad_y: Tensor, later: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one block with respect to u, delta, B, C and A, and what the block before it inherits.

    The gradient g of the states obeys the same recurrence backwards in time: g_t = C_t dy_t + decay_(t+1) g_(t+1).
    """
    decays, h = _states(u, delta, A, B, start)
    dC = torch.matmul(grad_y.unsqueeze(-2), h).squeeze(-2)
    g = grad_y.unsqueeze(-1) * C.unsqueeze(-2)
    g[-1] += later
    _linear_recurrence_(decays[1:], g, torch.zeros_like(start), backwards=True)
    dx = torch.matmul(g, B.unsqueeze(-1)).squeeze(-1)  # gradient of delta u, (l, b, d)
    dB = torch.matmul((delta * u).unsqueeze(-2), g).squeeze(-2)

    dlog = decays[:-1].mul_(g)  # becomes the gradient of delta A: decay_t g_t h_(t-1)
    later = dlog[0].clone()
    dlog[1:] *= h[:-1]
    dlog[0] *= start
    ddelta = torch.einsum("lbdn,dn->lbd", dlog, A).addcmul_(dx, u)
    dA = torch.einsum("lbdn,lbd->dn", dlog, delta)
    return dx * delta, ddelta, dB, dC, dA, later
