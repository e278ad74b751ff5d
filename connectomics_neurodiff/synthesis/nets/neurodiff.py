"""The NeuroDiff denoiser: a conditional 3D U-Net with MSC and RGM that predicts the noise in x_t.

Glossary: b batch, c channels, z, y, x sections, rows, columns, t diffusion step; level i is reduced by `pixels` 2^i
within sections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import ShapeMismatch
from .blocks import (
    Downsample,
    ResidualBlock,
    Upsample,
    conv3,
    join_pixels,
    part_pixels,
    resize_sections,
    time_embedding,
    zero_conv3,
)
from .build import SYNTHESISERS
from .msc import ConditionPath
from .norm import NormSiLU
from .options import DenoiserOptions, as_keywords, options_from
from .resolution import ResolutionEmbedding, check_voxel_sizes
from .rgm import ResolutionGuidedMamba


class Stage(nn.Module):
    """Residual block, then the level's hint if there is one, then RGM where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, level: int, o: DenoiserOptions, *, middle: bool = False):
        super().__init__()
        self.reduction = o.reductions[level]
        flat = level < o.flat_levels
        self.residual = ResidualBlock(in_channels, out_channels, o.time_channels, o.groups, flat=flat)
        with_rgm = o.rgm and (middle or self.reduction in o.rgm_reductions)
        self.rgm = ResolutionGuidedMamba(out_channels, rpge=o.rpge, directions=o.scan_directions) if with_rgm else None

    def forward(
        self, x: Tensor, time: Tensor, voxel_nm: Tensor, hint: Tensor | None = None, *, spent: bool = False
    ) -> Tensor:
        """Map (b, in, z, y, x) to (b, out, z, y, x); `hint` may have another in-plane resolution, a `spent` image may
        be overwritten."""
        x = self.residual(x, time, spent=spent)
        if hint is not None:
            x += resize_sections(hint, (x.shape[3], x.shape[4]))  # f_i <- f_i + c_i
        if self.rgm is not None:
            x = self.rgm(x, voxel_nm * voxel_nm.new_tensor([1, self.reduction, self.reduction]))
        return x


class NeuroDiffDenoiser(nn.Module):
    """Noise prediction epsilon(x_t, t, condition, voxel size) of any (z, y, x) shape.

    Parameters
    ----------
    options : DenoiserOptions
        Sizes and switches; kept in ``self.options`` as keyword arguments of ``build_denoiser``.
    """

    def __init__(self, options: DenoiserOptions) -> None:
        super().__init__()
        self.settings = options
        channels = options.channels
        self.time = nn.Sequential(
            nn.Linear(options.time_features, options.time_channels),
            nn.SiLU(),
            nn.Linear(options.time_channels, options.time_channels),
        )
        self.resolution = ResolutionEmbedding(options.time_channels) if options.resolution_embedding else None
        self.condition = ConditionPath(options) if options.injects else None
        joined = options.pixels**2
        self.stem = conv3((3 if options.concatenates else 1) * joined, channels[0], flat=options.flat_levels > 0)
        self._build_encoder(options)
        self._build_decoder(options)
        self.out_norm = NormSiLU(channels[0], options.groups)
        self.out_conv = zero_conv3(
            channels[0], (2 if options.learn_variance else 1) * joined, flat=options.flat_levels > 0
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``build_denoiser`` that rebuild this network."""
        return as_keywords(self.settings)

    @property
    def pixels(self) -> int:
        """Side of the squares of pixels that the first convolution joins; see :class:`DenoiserOptions`."""
        return self.settings.pixels

    @property
    def learns_variance(self) -> bool:
        """Whether there is a second output channel, v of :meth:`.DiffusionProcess.learned_log_variance`."""
        return self.settings.learn_variance

    def _build_encoder(self, o: DenoiserOptions) -> None:
        self.encoder, self.downsamples = nn.ModuleList(), nn.ModuleList()
        width = o.channels[0]
        self._skip_channels = [width]
        for level, channels in enumerate(o.channels):
            stages = nn.ModuleList()
            for _ in range(o.blocks):
                stages.append(Stage(width, channels, level, o))
                width = channels
                self._skip_channels.append(width)
            self.encoder.append(stages)
            if level < len(o.channels) - 1:
                self.downsamples.append(Downsample(width, width, flat=level + 1 < o.flat_levels))
                self._skip_channels.append(width)

    def _build_decoder(self, o: DenoiserOptions) -> None:
        width, deepest = o.channels[-1], len(o.channels) - 1
        flat = deepest < o.flat_levels
        self.middle = nn.ModuleList(
            [
                Stage(width, width, deepest, o, middle=True),
                ResidualBlock(width, width, o.time_channels, o.groups, flat=flat),
            ]
        )
        self.decoder, self.upsamples = nn.ModuleList(), nn.ModuleList()
        skips = list(self._skip_channels)
        for level in reversed(range(len(o.channels))):
            channels = o.channels[level]
            stages = nn.ModuleList()
            for _ in range(o.blocks + 1):
                stages.append(Stage(width + skips.pop(), channels, level, o))
                width = channels
            self.decoder.append(stages)
            if level > 0:
                self.upsamples.append(Upsample(width, flat=level - 1 < o.flat_levels))

    def encode_condition_path(self, condition: Tensor) -> list[Tensor]:
        """Hints for :meth:`forward`: they depend neither on x_t nor on t, so one call serves all steps of a sample.

        Parameters
        ----------
        condition : torch.Tensor
            (b, 2, z, y, x) in [0, 1].

        Returns
        -------
        list of torch.Tensor
            One hint per encoder level at low resolution; empty if the conditioning has none.
        """
        if self.condition is None:
            return []
        return self.condition(_layout(self._pad(_signed(condition))))

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor, hints: list[Tensor] | None = None
    ) -> Tensor:
        """Predict the noise in `x_t`.

        Parameters
        ----------
        x_t : torch.Tensor
            (b, 1, z, y, x), noisy image on the scale [-1, 1].
        t : torch.Tensor
            (b,) diffusion steps, 0 the least noisy.
        condition : torch.Tensor
            (b, 2, z, y, x) in [0, 1]: membrane, mitochondria.
        voxel_nm : torch.Tensor
            (b, 3) voxel size in nm; three zeros in a sample whose voxel size is unknown: it then gets no RPGE, and
            the resolution embedding's vector for "unknown".
        hints : list of torch.Tensor, optional
            What :meth:`encode_condition_path` gave for this condition; absent, it is computed here.

        Returns
        -------
        torch.Tensor
            (b, 1, z, y, x) noise, in the type that the last layer computes in. With ``learn_variance`` (b, 2, z, y, x):
            the second channel is v of :meth:`.DiffusionProcess.learned_log_variance`.

        Raises
        ------
        ShapeMismatch
            If the arguments do not belong together.
        ValueRangeError
            If a voxel size is neither three positive numbers nor three zeros.
        """
        _check_inputs(x_t, t, condition, voxel_nm)
        if hints is None:
            hints = self._kept(self.encode_condition_path, condition)
        time = self.time(time_embedding(t, self.settings.time_features))
        if self.resolution is not None:
            time = time + self.resolution(voxel_nm)
        x = torch.cat([x_t, _signed(condition).to(x_t.dtype)], dim=1) if self.settings.concatenates else x_t
        joined = join_pixels(self._pad(x), self.settings.pixels)
        h, skips = self._encode(self.stem(_layout(joined)), time, voxel_nm, hints)
        h = self._kept(self.middle[0], h, time, voxel_nm)
        h = self._kept(self.middle[1], h, time)
        h = self._decode(h, skips, time, voxel_nm)
        noise = part_pixels(self.out_conv(self.out_norm(h)), self.settings.pixels)
        return noise[..., : x_t.shape[3], : x_t.shape[4]]

    def _encode(self, h: Tensor, time: Tensor, voxel_nm: Tensor, hints: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        skips = [h]
        for level, stages in enumerate(cast("list[nn.ModuleList]", self.encoder)):
            for index, stage in enumerate(stages):
                last = index == len(stages) - 1
                h = self._kept(stage, h, time, voxel_nm, hints[level] if hints and last else None)
                skips.append(h)
            if level < len(self.downsamples):
                h = self.downsamples[level](h)
                skips.append(h)
        return h, skips

    def _decode(self, h: Tensor, skips: list[Tensor], time: Tensor, voxel_nm: Tensor) -> Tensor:
        for level, stages in enumerate(cast("list[nn.ModuleList]", self.decoder)):
            for index, stage in enumerate(stages):
                if self._checkpoints:
                    h = self._kept(_joined, stage, h, skips.pop(), time, voxel_nm)
                else:  # nothing may hold what has been joined
                    h = torch.cat([h, skips.pop()], dim=1)
                    # The first image of the finest level is the widest: it alone decides the peak of memory.
                    widest = level == len(self.decoder) - 1 and index == 0
                    h = stage(h, time, voxel_nm, spent=widest)
            if level < len(self.upsamples):
                h = self._kept(self.upsamples[level], h)
        return h

    @property
    def _checkpoints(self) -> bool:
        return self.settings.checkpointing and torch.is_grad_enabled()

    def _kept(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """``part(*arguments)``, of which only the arguments are kept for the backward pass if checkpointing is on."""
        if self._checkpoints:
            return checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False)
        return part(*arguments)

    def _pad(self, x: Tensor) -> Tensor:
        """Reflect rows and columns up to the multiple that the strides need."""
        multiple = max(self.settings.reductions[-1], self.settings.embedding_reduction if self.condition else 1)
        for axis in (3, 4):
            size = x.shape[axis]
            if size % multiple:
                x = x.index_select(axis, _reflected(size, size + -size % multiple, x.device))
        return x


def _joined(stage: nn.Module, h: Tensor, skip: Tensor, time: Tensor, voxel_nm: Tensor) -> Tensor:
    """A stage of the decoder, with what the encoder left for it."""
    result: Tensor = stage(torch.cat([h, skip], dim=1), time, voxel_nm)
    return result


def _reflected(size: int, padded: int, device: torch.device) -> Tensor:
    """Indices 0 .. size-1, size-2 .. 0, 1 .. of `padded` entries: reflection that may exceed the array."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(padded, device=device) % period
    return torch.where(index < size, index, period - index)


def _signed(condition: Tensor) -> Tensor:
    """Masks as {-1, +1}, the published scale, from [0, 1]."""
    return 2 * condition - 1


def _layout(x: Tensor) -> Tensor:
    """Channels last on the CPU, where 3D convolutions are about twice as fast in it."""
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


def _check_inputs(x_t: Tensor, t: Tensor, condition: Tensor, voxel_nm: Tensor) -> None:
    if x_t.ndim != 5 or x_t.shape[1] != 1:
        raise ShapeMismatch(f"x_t must be (b, 1, z, y, x). Got {tuple(x_t.shape)}.")
    b = x_t.shape[0]
    wanted = {
        "t": (t, (b,)),
        "condition": (condition, (b, 2, *x_t.shape[2:])),
        "voxel_nm": (voxel_nm, (b, 3)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ShapeMismatch(f"For x_t {tuple(x_t.shape)}, {name} must be {shape}. Got {tuple(tensor.shape)}.")
    if not voxel_nm.is_meta:  # a meta tensor, of the dry run's estimates, has no values
        check_voxel_sizes(voxel_nm)


@SYNTHESISERS.register("neurodiff")
def build_neurodiff(preset: str = "paper", **options: Any) -> NeuroDiffDenoiser:
    """NeuroDiff denoiser of a preset, single options replaced; see :class:`DenoiserOptions`."""
    return NeuroDiffDenoiser(options_from(preset, options))
