"""The Mamba block, with the parameter names and the initialisation of mamba-ssm.

Glossary: b batch, l tokens, e model width, d = 2 e inner width, n states per channel, r rank of the step projection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ValueRangeError
from .scan import selective_scan

#: Initial steps are drawn log-uniformly from this range, but never below `STEP_FLOOR` (Gu and Dao 2023, section 3.6).
STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4


class StateSpaceDirection(nn.Module):
    """Causal depthwise convolution and selective scan: what a Mamba block needs once per scan direction.

    Parameters
    ----------
    inner : int
        Channels d.
    rank : int
        Rank r of the projection that makes the step sizes.
    d_state, d_conv : int
        States per channel and taps of the convolution.
    """

    def __init__(self, inner: int, rank: int, d_state: int, d_conv: int) -> None:
        super().__init__()
        self.rank, self.d_state = rank, d_state
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        # S4D-real initialisation: A[d, n] = -(n + 1).
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self._initialise_steps()

    def _initialise_steps(self) -> None:
        """Let softplus(bias) be spread log-uniformly over `STEP_RANGE`, and keep the variance of the projection."""
        low, high = (math.log(step) for step in STEP_RANGE)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.exp(torch.rand(self.dt_proj.out_features) * (high - low) + low).clamp(min=STEP_FLOOR)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of the softplus

    def scan(self, x: Tensor, z: Tensor) -> Tensor:
        """Convolve and scan `x` (b, d, l), gated by `z` (b, d, l)."""
        tokens = x.shape[-1]
        x = F.silu(self.conv1d(x)[..., :tokens])
        step, B, C = self.x_proj(x.transpose(1, 2)).split([self.rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(step, self.dt_proj.weight).transpose(1, 2)  # (b, d, l); the bias is added in float32
        A = -torch.exp(self.A_log.float())
        return selective_scan(
            x,
            delta,
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )


class Mamba(StateSpaceDirection):
    """Mamba block (Gu and Dao 2023, figure 3) over a sequence.

    Parameters
    ----------
    d_model : int
        Width e of the tokens.
    d_state, d_conv, expand : int
        States per channel, taps of the convolution, inner width as a multiple of `d_model`; mamba-ssm's defaults.
    directions : int
        1 scans in token order, as published; 2 adds a scan from the last token to the first with parameters of its
        own (under ``reverse.``), and sums both. With 1 the ``state_dict`` has exactly mamba-ssm's names and shapes.

    Raises
    ------
    ValueRangeError
        If `directions` is neither 1 nor 2.
    """

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2, directions: int = 1
    ) -> None:
        if directions not in (1, 2):
            raise ValueRangeError(f"Scan directions must be 1 or 2. Got {directions}.")
        inner, rank = expand * d_model, math.ceil(d_model / 16)
        super().__init__(inner, rank, d_state, d_conv)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reverse = StateSpaceDirection(inner, rank, d_state, d_conv) if directions == 2 else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (b, l, e) to (b, l, e)."""
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (b, d, l) each
        y = self.scan(x, z)
        if self.reverse is not None:
            y = y + self.reverse.scan(x.flip(-1), z.flip(-1)).flip(-1)
        return self.out_proj(y.transpose(1, 2))
