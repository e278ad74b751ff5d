"""Classifier-free guidance: how closely images follow their masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint
from ..conditions import NULL_CONDITION
from ..errors import CheckpointMismatch, ValueRangeError

#: Scale of the guidance unless told otherwise, and the noise level (noise over image, as standard deviations) below
#: which steps are not guided. Measured in docs/painting.md.
DEFAULT_GUIDANCE, GUIDED_LEVEL = 2.0, 1.0
#: Beyond, images are black and white whatever the network.
_MOST_SCALE = 100.0


class GuidedDenoiser(nn.Module):
    """A denoiser whose prediction moves along the line from "without condition" to "with condition".

    prediction = unconditional + scale (conditional - unconditional) (Ho and Salimans 2022, eq. 6, with scale = 1 + w);
    as it is linear it holds for noise and velocity alike. A scale of 1 is the denoiser itself. Above 1 membranes become
    clearer: easy samples. Below 1 they become fainter than the masks say: hard ones.

    A guided step costs two passes. Where membranes run is decided while there is much noise; guiding those steps alone
    leaves the texture as it was learnt, and costs less (Kynkaanniemi et al. 2024, "limited interval").

    Parameters
    ----------
    network : torch.nn.Module
        Denoiser that was trained with condition dropout, so that it knows :data:`.NULL_CONDITION`.
    scale : float
        0 to 100; 0 ignores the masks.
    first : int
        Steps t of the diffusion process below it are not guided; see :meth:`.DiffusionProcess.step_at`.

    Raises
    ------
    ValueRangeError
        If the scale is out of its range.
    """

    scale: Tensor
    first: Tensor

    def __init__(self, network: nn.Module, scale: float, first: int = 0) -> None:
        super().__init__()
        if not 0 <= scale <= _MOST_SCALE:
            raise ValueRangeError(f"The guidance scale must lie in [0, {_MOST_SCALE:g}] (1: none). Got {scale}.")
        self.network = network
        # Buffers, so that the state of the network tells one guidance from another.
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("first", torch.tensor(int(first)))

    @property
    def pixels(self) -> int:
        """Side of the squares of pixels that the denoiser joins."""
        return int(getattr(self.network, "pixels", 1))

    @property
    def learns_variance(self) -> bool:
        """Whether the denoiser predicts the coefficient of its variance too."""
        return bool(getattr(self.network, "learns_variance", False))

    def encode_condition_path(self, condition: Tensor) -> list[Tensor]:
        """Hints of the condition, followed by those of none; arguments as the denoiser's."""
        hints: list[Tensor] = self.network.encode_condition_path(condition)  # type: ignore[operator]
        return hints + self.network.encode_condition_path(torch.full_like(condition, NULL_CONDITION))  # type: ignore[operator, no-any-return]

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor, hints: list[Tensor] | None = None
    ) -> Tensor:
        """Guided prediction; arguments and shape as the denoiser's. The variance is that with condition."""
        if hints is None:
            hints = self.encode_condition_path(condition)
        half = len(hints) // 2
        if bool((t < self.first).all()):
            alone: Tensor = self.network(x_t, t, condition, voxel_nm, hints=hints[:half])
            return alone
        nothing = torch.full_like(condition, NULL_CONDITION)
        conditional = self.network(x_t, t, condition, voxel_nm, hints=hints[:half])
        unconditional = self.network(x_t, t, nothing, voxel_nm, hints=hints[half:])
        mean = unconditional[:, :1] + self.scale * (conditional[:, :1] - unconditional[:, :1])
        return torch.cat([mean, conditional[:, 1:]], dim=1)


def guided(network: nn.Module, scale: float, checkpoint: Checkpoint, first: int = 0) -> nn.Module:
    """A checkpoint's denoiser with guidance from step `first` on; itself for a scale of 1.

    Raises
    ------
    CheckpointMismatch
        If it was trained without condition dropout: its prediction without condition means nothing.
    ValueRangeError
        If the scale is out of its range.
    """
    if scale == 1:
        return network
    if not checkpoint.extra.get("condition_dropout"):
        raise CheckpointMismatch(
            f"A guidance scale of {scale:g} needs a denoiser trained with NEURODIFF.DIFFUSION.CONDITION_DROPOUT > 0; "
            "this one was trained without. Only 1 is possible with it."
        )
    return GuidedDenoiser(network, scale, first)
