"""SegMamba (Xing et al., "SegMamba: Long-range sequential modeling Mamba for 3D medical image segmentation",
arXiv:2401.13560) for affinities, with standard selective scans in place of its fork of mamba-ssm.

Glossary: b batch, c channels, z, y, x sections, rows, columns, l = z y x tokens, d = 2 c inner width of Mamba.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import MissingDependency, ValueRangeError
from ..synthesis.nets.mamba import StateSpaceDirection
from .build import SEGMENTERS
from .levels import check_image, level_factors, pad_to_multiple

#: Feature maps per level, finest first; the encoder's four stages have the first four.
PUBLISHED_FILTERS = (48, 96, 192, 384, 768)
LAYERS_PER_STAGE = 2
STATES, TAPS, EXPANSION = 16, 4, 2


class TriOrientatedMamba(nn.Module):
    """Mamba block that scans a volume forwards, backwards and across sections, and sums the three (their eq. 2).

    Parameters
    ----------
    channels : int
        Width c of the tokens.
    orientations : int
        3 as published; 1 scans forwards only.
    """

    def __init__(self, channels: int, orientations: int) -> None:
        super().__init__()
        inner, rank = EXPANSION * channels, math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.directions: Any = nn.ModuleList(
            StateSpaceDirection(inner, rank, STATES, TAPS) for _ in range(orientations)
        )

    def forward(self, tokens: Tensor, sections: int) -> Tensor:
        """Map tokens (b, l, c), section after section, to (b, l, c)."""
        x, gate = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (b, d, l) each
        total = torch.zeros_like(x)
        for direction, there, back in zip(self.directions, _THERE, _BACK, strict=False):
            total = total + back(direction.scan(there(x, sections), there(gate, sections)), sections)
        return self.out_proj(total.transpose(1, 2))


def _as_it_is(x: Tensor, _sections: int) -> Tensor:
    return x


def _reversed(x: Tensor, _sections: int) -> Tensor:
    return x.flip(-1)


def across_sections(x: Tensor, sections: int) -> Tensor:
    """Tokens (b, d, z y x) in the order (y x z): the same place of all sections, then the next place."""
    return x.unflatten(-1, (sections, -1)).transpose(-1, -2).flatten(-2)


def along_sections(x: Tensor, sections: int) -> Tensor:
    """Inverse of :func:`across_sections`."""
    return x.unflatten(-1, (-1, sections)).transpose(-1, -2).flatten(-2)


_THERE = (_as_it_is, _reversed, across_sections)
_BACK = (_as_it_is, _reversed, along_sections)


class MambaLayer(nn.Module):
    """Layer normalisation and Mamba over the voxels, with a skip connection unless `residual` is off."""

    def __init__(self, channels: int, orientations: int, residual: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = TriOrientatedMamba(channels, orientations)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, c, z, y, x)."""
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mamba(self.norm(tokens), x.shape[2]).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + mixed if self.residual else mixed


class GatedSpatialConvolution(nn.Module):
    """Two 3x3x3 convolutions in parallel with a 1x1x1 one, their sum through another, residual (their eq. 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def layer(kernel: int) -> nn.Sequential:
            convolution = nn.Conv3d(channels, channels, kernel, padding=kernel // 2)
            return nn.Sequential(convolution, nn.InstanceNorm3d(channels), nn.ReLU())

        self.spatial = nn.Sequential(layer(3), layer(3))
        self.gate = layer(1)
        self.join = layer(1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, c, z, y, x)."""
        joined: Tensor = self.join(self.spatial(x) + self.gate(x))
        return x + joined


class Stage(nn.Module):
    """Halving, gated spatial convolution, Mamba layers; and the projection of what goes to the decoder."""

    def __init__(self, halve: nn.Module, channels: int, orientations: int, residual: bool) -> None:
        super().__init__()
        self.halve = halve
        self.spatial = GatedSpatialConvolution(channels)
        self.layers = nn.Sequential(*(MambaLayer(channels, orientations, residual) for _ in range(LAYERS_PER_STAGE)))
        self.project = nn.Sequential(
            nn.InstanceNorm3d(channels),
            nn.Conv3d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv3d(2 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the next stage gets, and what the decoder gets."""
        x = self.layers(self.spatial(self.halve(x)))
        return x, self.project(x)


@SEGMENTERS.register("seg_mamba")
class SegMamba(nn.Module):
    """U-shaped network whose encoder mixes all voxels of a stage with selective scans.

    Parameters
    ----------
    in_channels, out_channels : int
        1 image in, 3 affinity channels (z, y, x) out. With the defaults the network has 67,362,723 parameters.
    filters : sequence of int
        Feature maps per level, finest first, at least three levels; empty: as published.
    z_pool : sequence of bool
        For each of the ``len(filters) - 1`` halvings whether z is halved too. Empty: always, as published. Without it
        a stack of any number of sections needs no padding along z.
    orientations : {3, 1}
        Scans forwards, backwards and across sections; or forwards only.
    residual : bool
        Skip connections around the Mamba layers. ``orientations=1, residual=False`` is the variant behind NeuroDiff's
        table 3.
    checkpointing : bool
        Recompute the encoder's activations in the backward pass: less memory, a third more time.

    Raises
    ------
    ValueRangeError
        For fewer than three levels, filters below 1, a `z_pool` of another length, or other `orientations`.
    MissingDependency
        If MONAI, whose decoder blocks are used, is not installed.

    References
    ----------
    Xing, Ye, Yang, Liu, Zhu. MICCAI 2024, arXiv:2401.13560.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        filters: Sequence[int] = (),
        z_pool: Sequence[bool] = (),
        orientations: int = 3,
        residual: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = list(filters) or list(PUBLISHED_FILTERS)
        halve_z = list(z_pool) or [True] * (len(widths) - 1)
        factors = level_factors("SegMamba", widths, halve_z, least=3, step="halving")
        if orientations not in (1, 3):
            raise ValueRangeError(f"SegMamba scans in 3 orientations, or in 1. Got {orientations}.")
        #: Sizes that need no padding are multiples of this, (z, y, x).
        self.multiple = tuple(math.prod(axis) for axis in zip(*factors, strict=True))
        #: The coarsest level needs more than one voxel to normalise over.
        self.least = (self.multiple[0], 2 * self.multiple[1], 2 * self.multiple[2])
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        self.stages = nn.ModuleList()
        for level, channels in enumerate(widths[:-1]):
            stem = nn.Conv3d(in_channels, channels, 7, stride=factors[0], padding=3)
            halve = _halving(widths[level - 1], channels, factors[level]) if level else stem
            self.stages.append(Stage(halve, channels, orientations, residual))
        self._make_decoder(in_channels, out_channels, widths, factors)

    def _make_decoder(
        self, in_channels: int, out_channels: int, widths: list[int], factors: list[tuple[int, int, int]]
    ) -> None:
        try:
            from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "The segmenter 'seg_mamba' needs MONAI: pip install -c constraints.txt '.[segmenters]'"
            ) from error
        shared: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        sources = [in_channels, *widths[:-1]]
        self.skips = nn.ModuleList(
            UnetrBasicBlock(in_channels=source, out_channels=width, stride=1, **shared)
            for source, width in zip(sources, widths, strict=True)
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(
                in_channels=widths[level + 1], out_channels=widths[level], upsample_kernel_size=factors[level], **shared
            )
            for level in reversed(range(len(factors)))
        )
        self.refine = UnetrBasicBlock(in_channels=widths[0], out_channels=widths[0], stride=1, **shared)
        self.head = nn.Conv3d(widths[0], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Affinity logits.

        Parameters
        ----------
        image : torch.Tensor
            (b, in_channels, z, y, x), values in [0, 1]; any size, padded inside by replicating the border.

        Returns
        -------
        torch.Tensor
            (b, out_channels, z, y, x) logits.
        """
        levels = [skip(level) for skip, level in zip(self.skips, self._encode(image), strict=True)]
        result = levels.pop()
        for up in self.up:
            result = up(result, levels.pop())
        logits: Tensor = self.head(self.refine(result))
        z, y, x = image.shape[2:]
        return logits[:, :, :z, :y, :x]

    def deepest_features(self, image: Tensor) -> Tensor:
        """Features (b, filters[-1], z', y', x') of the coarsest level, of an image as :meth:`forward` takes it."""
        features: Tensor = self.skips[-1](self._encode(image)[-1])
        return features

    def _encode(self, image: Tensor) -> list[Tensor]:
        """What the skip connections get: the padded image, and the output of every stage."""
        check_image(image, self.in_channels)
        features = pad_to_multiple(image, self.multiple, self.least)
        levels = [features]
        for stage in self.stages:
            if self.checkpointing and self.training:
                features, out = checkpoint(stage, features, use_reentrant=False)
            else:
                features, out = stage(features)
            levels.append(out)
        return levels


def _halving(before: int, channels: int, factor: tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(nn.InstanceNorm3d(before), nn.Conv3d(before, channels, factor, stride=factor))
