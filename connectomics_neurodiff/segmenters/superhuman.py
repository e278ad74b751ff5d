"""Superhuman: the residual symmetric 3D U-Net of Lee et al., "Superhuman accuracy on the SNEMI3D connectomics
challenge", arXiv:1706.00120 (figure 2), in the arrangement of 1,555,471 parameters that the field trains today.

Lee et al. sum the skip connections; that arrangement concatenates them, normalises batches and upsamples with a
learned depthwise transposed convolution. ``skip="sum", upsample="trilinear", norm="none"`` gives the paper's network.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnknownName, did_you_mean
from ..normalisation import BatchNormELU, GroupNormELU, InstanceNormELU
from .build import SEGMENTERS
from .levels import check_image, level_factors, pad_to_multiple

#: Feature maps per level of Lee et al., finest first.
PAPER_FILTERS = (28, 36, 48, 64, 80)

#: Slower than PyTorch's 0.1: with one or two patches a batch, the statistics of single batches scatter.
_BATCH_NORM_MOMENTUM = 0.05

#: A normalisation and an ELU.
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda channels: BatchNormELU(channels, momentum=_BATCH_NORM_MOMENTUM),
    "group": lambda channels: GroupNormELU(math.gcd(4, channels), channels),
    "instance": lambda channels: InstanceNormELU(channels, affine=True),
    "none": lambda channels: nn.ELU(inplace=True),
}
_UPSAMPLERS = ("transposed", "trilinear")
_SKIPS = ("concat", "sum")


def _check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UnknownName(
            f"Superhuman has no {option} '{value}'.{did_you_mean(value, allowed)} Known: {', '.join(allowed)}."
        )


def projected_upsampling(coarse: Tensor, upsample: nn.ConvTranspose3d, project: nn.Conv3d) -> Tensor:
    """``project(upsample(coarse))`` as one matrix product over the coarse voxels.

    Each fine voxel has one coarse voxel above it. So there is no fine image of as many channels as the coarse one has,
    and none of torch's backward pass of depthwise transposed convolutions, a quarter of a training step on a CPU.

    Parameters
    ----------
    coarse : torch.Tensor
        (b, c, z, y, x).
    upsample : torch.nn.ConvTranspose3d
        Depthwise, its kernel its stride.
    project : torch.nn.Conv3d
        1x1x1, from c to o channels.

    Returns
    -------
    torch.Tensor
        (b, o, kz z, ky y, kx x), the channels last in memory.
    """
    factor = upsample.weight.shape[2:]
    assert upsample.bias is not None
    mixing = project.weight.flatten(1)
    weight = upsample.weight.flatten(1).T[:, None] * mixing  # (kz ky kx, o, c)
    bias = F.linear(upsample.bias, mixing, project.bias).expand(len(weight), -1)
    fine = F.linear(coarse.movedim(1, -1), weight.flatten(0, 1), bias.flatten())
    fine = fine.unflatten(-1, (*factor, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return fine.flatten(1, 2).flatten(2, 3).flatten(3, 4).movedim(-1, 1)


class ResidualModule(nn.Module):
    """Three convolutions, the first in the plane, with the other two as a residual branch (Lee et al., figure 2b).

    Maps (b, `in_channels`, z, y, x) to (b, `out_channels`, z, y, x).
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        # A normalisation behind a convolution makes its bias redundant.
        bias = norm == "none"
        make_norm = _NORMS[norm]
        self.entry = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, (1, 3, 3), padding=(0, 1, 1), bias=bias),
            make_norm(out_channels),
        )
        inner, outer = (nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=bias) for _ in range(2))
        # Named as the checkpoints name them: the ELU has been part 2.
        self.branch = nn.Sequential(OrderedDict({"0": inner, "1": make_norm(out_channels), "3": outer}))
        self.exit = nn.Sequential(make_norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, out_channels, z, y, x)."""
        x = self.entry(x)
        return self.exit(x + self.branch(x))


class UpModule(nn.Module):
    """Upsample the coarse features, join them with the skip connection, and refine."""

    def __init__(
        self, coarse: int, fine: int, factor: tuple[int, int, int], norm: str, upsample: str, skip: str
    ) -> None:
        super().__init__()
        if upsample == "transposed":
            self.upsample: nn.Module = nn.ConvTranspose3d(coarse, coarse, factor, stride=factor, groups=coarse)
        else:
            self.upsample = nn.Upsample(scale_factor=factor, mode="trilinear", align_corners=False)
        self.project = nn.Conv3d(coarse, fine, 1)
        self.concatenates = skip == "concat"
        joined = 2 * fine if self.concatenates else fine
        self.joined = nn.Sequential(_NORMS[norm](joined))
        self.refine = ResidualModule(joined, fine, norm)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Features at the fine level."""
        if isinstance(self.upsample, nn.ConvTranspose3d):
            up = projected_upsampling(coarse, self.upsample, self.project)
        else:
            up = self.project(self.upsample(coarse))
        return self.refine(self.joined(torch.cat([up, fine], dim=1) if self.concatenates else up + fine))


@SEGMENTERS.register("superhuman")
class Superhuman(nn.Module):
    """Residual symmetric 3D U-Net for affinities.

    Parameters
    ----------
    in_channels, out_channels : int
        1 image in, 3 affinity channels (z, y, x) out. With the defaults the network has 1,555,471 parameters.
    filters : sequence of int
        Feature maps per level, finest first; at least two levels. Empty means those of the paper.
    z_pool : sequence of bool
        For each of the ``len(filters) - 1`` poolings whether z is halved too. All false, for sections much thicker
        than a pixel, as published; set the last ones, or all, for isotropic volumes. Empty means all false.
    norm : {"batch", "group", "instance", "none"}
        Default "batch", as published: at inference it is a fixed scaling, so tiles cannot differ in brightness as they
        do with "group" or "instance". A patch holds > 1e5 voxels, which steadies the statistics even at batch size 1.
    upsample : {"transposed", "trilinear"}
        Depthwise transposed convolution, or fixed interpolation as in the paper.
    skip : {"concat", "sum"}
        How skip connections join; the paper sums.

    Raises
    ------
    UnknownName
        For an unknown `norm`, `upsample` or `skip`.
    ValueRangeError
        For fewer than two levels, filters below 1 or a `z_pool` of another length.

    References
    ----------
    Lee, Zung, Li, Jain, Seung. arXiv:1706.00120, 2017.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        filters: Sequence[int] = (),
        z_pool: Sequence[bool] = (),
        norm: str = "batch",
        upsample: str = "transposed",
        skip: str = "concat",
    ) -> None:
        super().__init__()
        _check_choice("norm", norm, list(_NORMS))
        _check_choice("upsample", upsample, _UPSAMPLERS)
        _check_choice("skip", skip, _SKIPS)
        filters = list(filters) or list(PAPER_FILTERS)
        halve_z = list(z_pool) or [False] * (len(filters) - 1)
        factors = level_factors("Superhuman", filters, halve_z, least=2, step="pooling")
        #: Sizes that need no padding are multiples of this, (z, y, x).
        self.multiple = tuple(math.prod(axis) for axis in zip(*factors, strict=True))
        self.in_channels = in_channels
        first = filters[0]
        self.embed = nn.Sequential(nn.Conv3d(in_channels, first, (1, 5, 5), padding=(0, 2, 2)), nn.ELU(inplace=True))
        self.down = nn.ModuleList(
            ResidualModule(a, b, norm) for a, b in zip([first, *filters[:-1]], filters, strict=True)
        )
        self.pool = nn.ModuleList(nn.MaxPool3d(factor) for factor in factors)
        self.up = nn.ModuleList(
            UpModule(filters[i + 1], filters[i], factors[i], norm, upsample, skip)
            for i in reversed(range(len(factors)))
        )
        self.head = nn.Sequential(
            nn.Conv3d(first, first, (1, 5, 5), padding=(0, 2, 2)),
            nn.ELU(inplace=True),
            nn.Conv3d(first, out_channels, 1),
        )

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
        levels = self._encode(image)
        features = levels.pop()
        for module in self.up:
            features = module(features, levels.pop())
        z, y, x = image.shape[2:]
        return self.head(features)[:, :, :z, :y, :x]

    def deepest_features(self, image: Tensor) -> Tensor:
        """Features (b, filters[-1], z', y', x') of the coarsest level, of an image as :meth:`forward` takes it."""
        return self._encode(image)[-1]

    def _encode(self, image: Tensor) -> list[Tensor]:
        """Features of every level before the decoder, finest first."""
        check_image(image, self.in_channels)
        # The coarsest level needs more than one voxel, or there is nothing to normalise over.
        least = (self.multiple[0], 2 * self.multiple[1], 2 * self.multiple[2])
        levels = [self.down[0](self.embed(pad_to_multiple(image, self.multiple, least)))]
        for pool, module in zip(self.pool, self.down[1:], strict=True):
            levels.append(module(pool(levels[-1])))
        return levels
