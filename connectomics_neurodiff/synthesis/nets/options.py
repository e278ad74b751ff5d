"""Sizes and switches of the NeuroDiff denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...errors import UnknownName, ValueRangeError, did_you_mean

CONDITIONINGS = ("msc", "concat", "both", "none")


@dataclass(frozen=True)
class DenoiserOptions:
    """How large the denoiser is and which of its modules are on; the defaults are the published network.

    Attributes
    ----------
    base_channels : int
        Channels that the multipliers refer to.
    multipliers : tuple of float
        Channels of each level in units of `base_channels`, finest level first; level i is reduced by `pixels` 2^i
        within sections.
    pixels : int
        Side of the square of pixels that the first convolution joins into one, and the last one parts again; 1 as
        published. With 2 the same channels cost a quarter.
    flat_levels : int
        Finest levels whose convolutions stay within a section, 0 as published. Where sections are thick their texture
        does not go on from one to the next, and the deeper levels see what does.
    blocks : int
        Residual blocks per encoder level; a decoder level has one more.
    groups : int
        Groups of the group normalisation (fewer where they do not divide the channels).
    time_features, time_channels : int
        Width of the sinusoidal embedding of t, and of the perceptron behind it.
    condition_channels : tuple of int
        Channels of the condition encoder; n of them end at the reduction `pixels` 2^(n-1) within sections.
    rgm_reductions : tuple of int
        In-plane reductions at which every block is followed by an RGM block; the bottleneck always has one.
    conditioning : str
        ``"msc"``: multi-scale hints, as the paper says; ``"concat"``: masks concatenated with x_t; ``"both"``: as the
        published code does; ``"none"``: the condition is ignored.
    rgm, rpge : bool
        Global modelling at all; the encoding of coordinates in nanometres within it.
    scan_directions : int
        1 as published, or 2 for a bidirectional scan.
    resolution_embedding : bool
        Whether the voxel size is also added to the time embedding, and so reaches every residual block [ours].
    learn_variance : bool
        Whether a second output channel interpolates the variance of a reverse step (Nichol and Dhariwal 2021, eq. 15).
    checkpointing : bool
        Whether a training keeps only what enters every block, and computes the rest again in the backward pass.
    """

    base_channels: int = 64
    multipliers: tuple[float, ...] = (0.5, 1, 1, 2, 2, 4, 4)
    pixels: int = 1
    flat_levels: int = 0
    blocks: int = 1
    groups: int = 32
    time_features: int = 64
    time_channels: int = 256
    condition_channels: tuple[int, ...] = (32, 64, 128, 256)
    rgm_reductions: tuple[int, ...] = (8, 16, 32)
    conditioning: str = "both"
    rgm: bool = True
    rpge: bool = True
    scan_directions: int = 1
    resolution_embedding: bool = False
    learn_variance: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise UnknownName(
                f"No conditioning '{self.conditioning}'.{did_you_mean(str(self.conditioning), CONDITIONINGS)} "
                f"Known: {', '.join(CONDITIONINGS)}."
            )
        if self.scan_directions not in (1, 2):
            raise ValueRangeError(f"Scan directions must be 1 or 2. Got {self.scan_directions}.")
        if self.flat_levels < 0 or self.pixels & (self.pixels - 1):
            raise ValueRangeError(
                f"flat_levels must be >= 0 and pixels a power of two. Got {self.flat_levels} and {self.pixels}."
            )
        counts = (self.pixels, self.blocks, self.groups, self.time_channels, *self.channels, *self.condition_channels)
        if min(counts) < 1 or self.time_features < 2 or self.time_features % 2:
            raise ValueRangeError(f"A denoiser needs positive sizes and even time_features. Got {self}.")
        if not self.multipliers or not self.condition_channels:
            raise ValueRangeError(f"A denoiser needs at least one level and one condition layer. Got {self}.")
        odd = set(self.rgm_reductions) - set(self.reductions)
        if odd:
            raise ValueRangeError(f"rgm_reductions must be among {self.reductions} here. Got {sorted(odd)}.")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(self.base_channels * factor) for factor in self.multipliers)

    @property
    def reductions(self) -> tuple[int, ...]:
        """In-plane reduction of each level, finest first."""
        return tuple(self.pixels * 2**level for level in range(len(self.multipliers)))

    @property
    def embedding_reduction(self) -> int:
        """In-plane reduction of the condition encoder's output."""
        return int(self.pixels * 2 ** (len(self.condition_channels) - 1))

    @property
    def injects(self) -> bool:
        """Whether hints from the condition encoder are added to the encoder levels (MSC)."""
        return self.conditioning in ("msc", "both")

    @property
    def concatenates(self) -> bool:
        """Whether the masks are concatenated with x_t."""
        return self.conditioning in ("concat", "both")


# For crops of 8x96x96 to 16x128x128 on two CPU cores. Pixels are joined by fours: at the same cost per voxel three
# times as many iterations as with single pixels and 32 channels. A convolution with 16 channels or fewer on both
# sides overruns its buffers in the weight gradient on processors with AMX (oneDNN 3.12, rows of 96 to 120 voxels).
_SMALL = DenoiserOptions(
    base_channels=16,
    multipliers=(3, 4, 6),
    pixels=2,
    groups=2,
    time_channels=128,
    condition_channels=(32, 48, 64),
    rgm_reductions=(8,),
)
PRESETS: Mapping[str, DenoiserOptions] = {
    # 62,339,361 parameters, the published count; 62,337,633 with conditioning="msc".
    "paper": DenoiserOptions(),
    "small": _SMALL,
    # In the same time two thirds more iterations; images follow their masks sooner on AC4 and FIB (docs/painting.md).
    "tiny": replace(_SMALL, multipliers=(2, 3, 4)),
}


def options_from(preset: str, overrides: Mapping[str, Any]) -> DenoiserOptions:
    """A preset with some fields replaced; lists, as read from a file, are taken for tuples.

    Raises
    ------
    UnknownName
        If the preset or an override's name is not known.
    """
    if preset not in PRESETS:
        raise UnknownName(
            f"No denoiser preset '{preset}'.{did_you_mean(preset, PRESETS)} Known: {', '.join(sorted(PRESETS))}."
        )
    known = [field.name for field in fields(DenoiserOptions)]
    for name in overrides:
        if name not in known:
            raise UnknownName(f"No denoiser option '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()
    }
    return replace(PRESETS[preset], **values)


def as_keywords(options: DenoiserOptions) -> dict[str, Any]:
    """The options as keyword arguments of ``build_denoiser``, in types that a checkpoint may hold."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
